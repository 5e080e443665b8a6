"""Linear programs: a computation that is linear in its inputs, recorded once and run again without autograd.

A backward pass is linear in the vector that starts it; :mod:`grsd.spectrum.recording` turns one into a program. What the
programs are for is in :mod:`grsd.spectrum.factored`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# dx = P (w ⊙ g) with P symmetric: the position of w in the call, and whether it runs over channels (axis 1)
NORMS = {
    aten.native_layer_norm_backward.default: (5, False),
    aten.native_group_norm_backward.default: (4, True),
    aten.native_batch_norm_backward.default: (2, True),
}
if hasattr(aten, "_fused_rms_norm_backward"):
    NORMS[aten._fused_rms_norm_backward.default] = (4, False)


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
        return [leaf.index for leaf in leaves_of(self.args, self.kwargs) if isinstance(leaf, Slot)]


class Pullback(torch.autograd.Function):
    """g → P (w ⊙ g), the backward pass of a normalisation, as one kernel; its transpose is v → w ⊙ P v."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
        ctx.func, ctx.rest = func, args
        result: Tensor = func(g, *args)[0]
        return result

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        place, channels = NORMS[ctx.func]
        weight, plain = ctx.rest[place - 1], list(ctx.rest)
        plain[place - 1] = None
        g = ctx.func(v.contiguous(), *plain)[0]
        if weight is not None:
            g = g * (weight.reshape(-1, *[1] * (g.ndim - 2)) if channels else weight)
        return g, None, None


def pullback(g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
    """Call `Pullback`; a function of its own so that a program can name it."""
    result: Tensor = Pullback.apply(g, func, args)  # type: ignore[no-untyped-call]
    return result


class Program:
    """A recorded linear map. `run(*inputs)` returns the outputs; no gradient is recorded unless an input asks for it."""

    def __init__(self, nodes: Sequence[Node], inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.nodes = _reachable(nodes, self.outputs)
        last: dict[int, int] = {}
        for k, node in enumerate(self.nodes):
            last.update(dict.fromkeys(node.sources(), k))
            for out in node.outs:
                last.setdefault(out, k)
        dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, k in last.items():
            if slot not in self.outputs:
                dead[k].append(slot)
        self._steps = [_compile(node, tuple(d)) for node, d in zip(self.nodes, dead, strict=True)]

    @property
    def flops(self) -> int:
        """Multiplications and additions in matrix products and convolutions of one run."""
        return sum(node.flops for node in self.nodes)

    def constants(self) -> int:
        """Return the bytes of the distinct tensors that the program holds (weights included)."""
        held: dict[int, int] = {}
        for node in self.nodes:
            for leaf in leaves_of(node.args, node.kwargs):
                if isinstance(leaf, Tensor):
                    held[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return sum(held.values())

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
                call[k] = values[slot] if type(slot) is int else _fill(slot, values)
            result = func(*call, **kwargs) if not kwargs else func(*call, **_fill(kwargs, values))
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
    found: list[Any] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, (tuple, list)):
            found.extend(leaves_of(x))
        else:
            found.append(x)
    return found


def _reachable(nodes: Sequence[Node], outputs: Sequence[int]) -> list[Node]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outs):
            wanted.update(node.sources())
            kept.append(node)
    return kept[::-1]


def _compile(node: Node, dead: tuple[int, ...]) -> tuple[Any, ...]:
    holes: list[tuple[int, Any]] = []
    for k, arg in enumerate(node.args):
        if isinstance(arg, Slot):
            holes.append((k, arg.index))
        elif isinstance(arg, (tuple, list)) and any(isinstance(leaf, Slot) for leaf in leaves_of(arg)):
            holes.append((k, arg))
    return node.func, node.args, node.kwargs, holes, node.outs, dead


def _fill(tree: Any, values: dict[int, Any]) -> Any:
    if isinstance(tree, Slot):
        return values[tree.index]
    return rebuild(lambda branch: _fill(branch, values), tree)
