"""Linear programs: computations linear in their inputs, recorded, and run without autograd.

:mod:`grsd.spectrum.programs.record` turns a backward pass, which is linear in the vector that
starts it, into a program; :mod:`grsd.spectrum.programs.transpose` transposes it, and
:mod:`grsd.spectrum.programs.simplify` makes it fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a value
Kinds = dict[int, Kind]  # of every slot

# dx = P (w ⊙ g) with P symmetric: the position of w in the call, and whether it runs over channels
NORMS = {
    aten.native_layer_norm_backward.default: (5, False),
    aten.native_group_norm_backward.default: (4, True),
    aten.native_batch_norm_backward.default: (2, True),
}
if hasattr(aten, "_fused_rms_norm_backward"):
    NORMS[aten._fused_rms_norm_backward.default] = (4, False)

# the same numbers in the same order
RESHAPING = {aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default}
RESHAPING |= {aten.squeeze.dim, aten.squeeze.default}


@dataclass(frozen=True)
class Slot:
    """The place of a value in a program."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation: `func(*args, **kwargs)`, where a Slot stands for a value.

    Results go to the slots `outs`; a result that nobody can read has a negative one.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    flops: int = 0

    @cached_property
    def sources(self) -> list[int]:
        """The slots that the node reads."""
        return [x.index for x in leaves_of(self.args, self.kwargs) if type(x) is Slot]

    def run(self, values: Mapping[int, Any]) -> Any:
        return self.func(*fill(self.args, values), **fill(self.kwargs, values))


@dataclass(frozen=True)
class Rows:
    """How T outputs lie in a value whose leading axes have `count` elements in all.

    They are at `positions`, (T,) int64, or there are as many and they are in order (None).
    """

    count: int
    positions: Tensor | None = None

    def front(self, shape: Sequence[int]) -> int | None:
        """Return how many leading axes make up the rows, or None when no number of them does."""
        size = 1
        for axes, length in enumerate((*shape, 0)):
            if size == self.count:
                return axes
            size *= length
        return None

    def pick(self, x: Tensor) -> Tensor:
        """Return the T rows of x as (T, rest)."""
        x = x.reshape(self.count, -1)
        return x if self.positions is None else x[self.positions]

    def place(self, u: Tensor) -> Tensor:
        """Return (count,), with the T numbers u at their positions and zeros elsewhere."""
        if self.positions is None:
            return u
        return u.new_zeros(self.count).index_copy(0, self.positions, u)


def pullback(g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
    """Return P (w ⊙ g), the backward pass of a normalisation, in one call.

    Its transpose is v → w ⊙ P v.
    """
    return func(g.contiguous(), *args)[0]


def spread(u: Tensor, rows: Rows, fixed: Tensor) -> Tensor:
    """Return the own-position value at u: row i of `fixed`, (count, ...), times u_i."""
    value = rows.place(u).view(-1, 1) * fixed.reshape(rows.count, -1)
    return value.to(fixed.dtype).view(fixed.shape)


def collect(g: Tensor, rows: Rows, fixed: Tensor) -> Tensor:
    """Return the transpose of `spread` at g: inner products of rows of g and `fixed`, (T,)."""
    inner = torch.linalg.vecdot(g.reshape(rows.count, -1), fixed.reshape(rows.count, -1))
    return inner if rows.positions is None else inner[rows.positions]


class Program:
    """A recorded linear map from slots `inputs` to `outputs`; `kinds` are of all slots.

    Nodes are in the order in which they run; those that no output needs are left out.
    """

    def __init__(
        self, nodes: Sequence[Node], inputs: Sequence[int], outputs: Sequence[int], kinds: Kinds
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.nodes = reachable(nodes, self.outputs)
        self.kinds = dict(kinds)

    @property
    def flops(self) -> int:
        """Multiplications and additions in matrix products and convolutions of one run."""
        return sum(node.flops for node in self.nodes)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs at `inputs`. Cost: the recorded operations."""
        return self.consume(list(inputs))

    def consume(self, inputs: list[Tensor]) -> list[Tensor]:
        """As `run`, and empty the list, so that an input too is freed after its last use."""
        values: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        inputs.clear()
        for node, holes, dead in self._steps:
            call = list(node.args)
            for place, slot in holes:
                call[place] = values[slot] if type(slot) is int else fill(slot, values)
            result = node.func(*call, **fill(node.kwargs, values))
            if len(node.outs) == 1:
                values[node.outs[0]] = result[0] if type(result) is tuple else result
            else:
                values.update(zip(node.outs, result, strict=True))
            del call, result
            for slot in dead:
                del values[slot]
        return [values[slot] for slot in self.outputs]

    @cached_property
    def _steps(self) -> list[tuple[Node, list[tuple[int, Any]], list[int]]]:
        """Every node with the places of its arguments that are values, and the slots it frees."""
        last: dict[int, int] = {}
        for k, node in enumerate(self.nodes):
            last.update(dict.fromkeys(node.sources, k))
            for out in node.outs:
                last.setdefault(out, k)
        dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, k in last.items():
            if slot not in self.outputs:
                dead[k].append(slot)
        return [(node, _holes(node), slots) for node, slots in zip(self.nodes, dead, strict=True)]


def _holes(node: Node) -> list[tuple[int, Any]]:
    """Return (place, slot) of arguments that are values, and (place, list) of lists with some."""
    holes: list[tuple[int, Any]] = []
    for place, arg in enumerate(node.args):
        if isinstance(arg, Slot):
            holes.append((place, arg.index))
        elif type(arg) in (tuple, list) and any(type(leaf) is Slot for leaf in leaves_of(arg)):
            holes.append((place, arg))
    return holes


def rebuild(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to what a tuple, list or dict holds; return anything else as it is."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([function(branch) for branch in tree])
    if isinstance(tree, dict):
        return {key: function(branch) for key, branch in tree.items()}
    return tree


def leaves_of(args: Any, kwargs: dict[str, Any] | None = None) -> list[Any]:
    """Return what nested tuples and lists hold."""
    leaves: list[Any] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if type(x) is tuple or type(x) is list:
            leaves.extend(leaves_of(x))
        else:
            leaves.append(x)
    return leaves


def fill(tree: Any, values: Mapping[int, Any]) -> Any:
    """Put values where a tree has slots."""
    if isinstance(tree, Slot):
        return values[tree.index]
    return rebuild(lambda branch: fill(branch, values), tree)


def reachable(nodes: Sequence[Node], outputs: Sequence[int]) -> list[Node]:
    """Return the nodes that the outputs need."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outs):
            wanted.update(node.sources)
            kept.append(node)
    return kept[::-1]
