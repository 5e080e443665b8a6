"""Linear programs: a computation that is linear in its inputs, recorded once and run again without autograd.

A backward pass is linear in the vector that starts it; :mod:`grsd.spectrum.programs.record` turns one into a program,
:mod:`grsd.spectrum.programs.transpose` transposes it, and :mod:`grsd.spectrum.programs.simplify` makes it fast. What the programs are for is
in :mod:`grsd.spectrum.operator.factored`.
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

# dx = P (w ⊙ g) with P symmetric: the position of w in the call, and whether it runs over channels (axis 1)
NORMS = {
    aten.native_layer_norm_backward.default: (5, False),
    aten.native_group_norm_backward.default: (4, True),
    aten.native_batch_norm_backward.default: (2, True),
}
if hasattr(aten, "_fused_rms_norm_backward"):
    NORMS[aten._fused_rms_norm_backward.default] = (4, False)

# the same numbers in the same order
RESHAPING = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overload in (
        ("view", "default"),
        ("_unsafe_view", "default"),
        ("reshape", "default"),
        ("unsqueeze", "default"),
        ("squeeze", "dim"),
        ("squeeze", "dims"),
        ("squeeze", "default"),
    )
)


@dataclass(frozen=True)
class Slot:
    """The place of a value in a program."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation: `func(*args, **kwargs)`, where a Slot stands for a value; results go to the slots `outs`."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    flops: int = 0

    def sources(self) -> list[int]:
        """Return the slots that the node reads."""
        found: list[int] | None = self.__dict__.get("_sources")
        if found is None:
            found = self.__dict__["_sources"] = [
                x.index for x in leaves_of(self.args, self.kwargs) if type(x) is Slot
            ]
        return found


@dataclass(frozen=True)
class Rows:
    """How the T outputs lie in a value whose leading axes have n elements in all: at `positions`, or in order (None)."""

    count: int
    positions: Tensor | None = None  # (T,) int64

    def front(self, shape: Sequence[int]) -> int | None:
        """Return how many leading axes make up the n rows, or None when no number of them does."""
        size = 1
        for k in range(len(shape) + 1):
            if size == self.count:
                return k
            size *= shape[k] if k < len(shape) else 1
        return None

    def pick(self, x: Tensor) -> Tensor:
        """Return the T rows of x as (T, rest)."""
        x = x.reshape(self.count, -1)
        return x if self.positions is None else x[self.positions]


def pullback(g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
    """Return P (w ⊙ g), the backward pass of a normalisation, as one kernel; its transpose is v → w ⊙ P v."""
    result: Tensor = func(g.contiguous(), *args)[0]
    return result


def spread(u: Tensor, rows: Rows, fixed: Tensor) -> Tensor:
    """Return the own-position value at u: row i of `fixed`, (n, ...), times u_i, in the dtype of `fixed`."""
    if rows.positions is not None:
        u = u.new_zeros(rows.count).index_copy(0, rows.positions, u)
    return (u.view(-1, 1) * fixed.reshape(rows.count, -1)).to(fixed.dtype).view(fixed.shape)


def collect(g: Tensor, rows: Rows, fixed: Tensor) -> Tensor:
    """Return the transpose of `spread` at g: the inner product of every row of g with that of `fixed`, (T,)."""
    found: Tensor = torch.linalg.vecdot(g.reshape(rows.count, -1), fixed.reshape(rows.count, -1))
    return found if rows.positions is None else found[rows.positions]


class Program:
    """A recorded linear map.

    Parameters
    ----------
    nodes : in the order in which they run; those that no output needs are left out.
    inputs, outputs : slots.
    kinds : shape and dtype of every slot.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[int],
        outputs: Sequence[int],
        kinds: Mapping[int, Kind],
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.nodes = reachable(nodes, self.outputs)
        self.kinds = dict(kinds)

    @cached_property
    def _steps(self) -> list[tuple[Any, ...]]:
        dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, k in last_uses(self.nodes).items():
            if slot not in self.outputs:
                dead[k].append(slot)
        return [_compile(node, tuple(d)) for node, d in zip(self.nodes, dead, strict=True)]

    @property
    def flops(self) -> int:
        """Multiplications and additions in matrix products and convolutions of one run."""
        return sum(node.flops for node in self.nodes)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs at `inputs`. Cost: the recorded operations; temporaries are freed after their last use."""
        return self.consume(list(inputs))

    def consume(self, inputs: list[Tensor]) -> list[Tensor]:
        """As `run`, and empty the list, so that an input is freed after its last use."""
        values: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        inputs.clear()
        for func, args, kwargs, holes, outs, dead in self._steps:
            call = list(args)
            for k, slot in holes:
                call[k] = values[slot] if type(slot) is int else fill(slot, values)
            result = func(*call, **kwargs) if not kwargs else func(*call, **fill(kwargs, values))
            if len(outs) == 1:
                values[outs[0]] = result[0] if type(result) is tuple else result
            else:
                values.update(zip(outs, result, strict=True))
            del call, result
            for slot in dead:
                del values[slot]
        return [values[slot] for slot in self.outputs]


def rebuild(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to what a tuple, list or dict holds; return anything else as it is."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([function(branch) for branch in tree])
    if isinstance(tree, dict):
        return {key: function(branch) for key, branch in tree.items()}
    return tree


def leaves_of(args: Any, kwargs: dict[str, Any] | None = None) -> list[Any]:
    """Return what nested tuples and lists hold."""
    found: list[Any] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if type(x) is tuple or type(x) is list:
            found.extend(leaves_of(x))
        else:
            found.append(x)
    return found


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
            wanted.update(node.sources())
            kept.append(node)
    return kept[::-1]


def last_uses(nodes: Sequence[Node]) -> dict[int, int]:
    """Return for every slot the position of the node that reads it last, or makes it when nothing reads it."""
    last: dict[int, int] = {}
    for k, node in enumerate(nodes):
        last.update(dict.fromkeys(node.sources(), k))
        for out in node.outs:
            last.setdefault(out, k)
    return last


def _compile(node: Node, dead: tuple[int, ...]) -> tuple[Any, ...]:
    holes: list[tuple[int, Any]] = []
    for k, arg in enumerate(node.args):
        if isinstance(arg, Slot):
            holes.append((k, arg.index))
        elif type(arg) in (tuple, list) and any(type(leaf) is Slot for leaf in leaves_of(arg)):
            holes.append((k, arg))
    return node.func, node.args, node.kwargs, holes, node.outs, dead
