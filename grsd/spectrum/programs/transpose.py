"""The transpose of a recorded linear program, operation by operation, without running anything.

Every operation of usual networks has its transpose in a table; another one is transposed by
recording its own backward pass at zeros of its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.programs.program import (
    NORMS,
    RESHAPING,
    Kind,
    Kinds,
    Node,
    Program,
    Slot,
    collect,
    fill,
    pullback,
    spread,
)
from grsd.spectrum.programs.record import Unrecordable, record

aten = torch.ops.aten

Given = list[tuple[int, Slot]]  # slot of the program → what goes back to it
Transpose = Callable[["Writer", Node, Slot, Kinds], Given | None]


class Writer:
    """Collects nodes and the shape and dtype of every slot."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.kinds: Kinds = {}

    def new(self, kind: Kind) -> Slot:
        """Return a slot that no node has yet."""
        slot = Slot(len(self.kinds))
        self.kinds[slot.index] = kind
        return slot

    def emit(self, func: Any, args: tuple[Any, ...], kind: Kind, flops: int = 0) -> Slot:
        """Append func(*args) and return its slot."""
        slot = self.new(kind)
        self.nodes.append(Node(func, args, {}, (slot.index,), flops))
        return slot

    def like(self, func: Any, x: Slot, *rest: Any) -> Slot:
        """Append func(x, *rest), whose result has the kind of x."""
        return self.emit(func, (x, *rest), self.kinds[x.index])

    def reshape(self, x: Slot, shape: Sequence[int]) -> Slot:
        before, dtype = self.kinds[x.index]
        if before == tuple(shape):
            return x
        return self.emit(torch.reshape, (x, tuple(shape)), (tuple(shape), dtype))

    def cast(self, x: Slot, dtype: torch.dtype) -> Slot:
        shape, before = self.kinds[x.index]
        return x if before == dtype else self.emit(torch.Tensor.to, (x, dtype), (shape, dtype))

    def reduce(self, x: Slot, shape: Sequence[int]) -> Slot:
        """Sum over the axes along which `shape` was broadcast."""
        before, dtype = self.kinds[x.index]
        padded = (*[1] * (len(before) - len(shape)), *shape)
        axes = [k for k, n in enumerate(before) if n != 1 and padded[k] == 1]
        if axes:
            x = self.emit(torch.sum, (x, axes, True), (padded, dtype))
        return self.reshape(x, shape)


def transpose(program: Program, device: torch.device) -> Program:
    """Return the transposed map, from one vector per output to one per input.

    An input without effect, or an operation whose backward pass cannot be recorded, raises
    Unrecordable. Cost: no arithmetic, but for operations that the table does not know.
    """
    writer = Writer()
    entering = [writer.new(program.kinds[slot]) for slot in program.outputs]
    back: dict[int, Slot] = {}

    def give(slot: int, value: Slot) -> None:
        back[slot] = writer.like(torch.add, back[slot], value) if slot in back else value

    for slot, seed in zip(program.outputs, entering, strict=True):
        give(slot, seed)
    for node in reversed(program.nodes):
        given = [(k, back.pop(out)) for k, out in enumerate(node.outs) if out in back]
        if not given:
            continue
        rule = TRANSPOSES.get(node.func) if len(node.outs) == 1 else None
        pairs = None if rule is None else rule(writer, node, given[0][1], program.kinds)
        if pairs is None:
            pairs = _by_autograd(writer, node, given, program.kinds, device)
        for slot, value in pairs:
            give(slot, value)
    if any(slot not in back for slot in program.inputs):
        raise Unrecordable("an input of the program has no effect on its outputs")
    leaving = [back[slot].index for slot in program.inputs]
    return Program(writer.nodes, [x.index for x in entering], leaving, writer.kinds)


def _by_autograd(
    writer: Writer, node: Node, given: Given, kinds: Kinds, device: torch.device
) -> Given:
    """Record the backward pass of one operation at zeros, and append it; `given` are (place, g)."""
    sources = list(dict.fromkeys(node.sources))
    _refuse_nonlinear(node, sources, kinds, device)
    leaves = [
        torch.zeros(kinds[s][0], dtype=kinds[s][1], device=device, requires_grad=True)
        for s in sources
    ]
    with torch.enable_grad():
        # copies: some operations write into an argument
        results = _results(node, {s: x.clone() for s, x in zip(sources, leaves, strict=True)})
    wanted = [results[k] for k, _ in given]

    def backward(*seeds: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(wanted, leaves, seeds, allow_unused=True)

    program, _, missing = record(backward, [torch.zeros_like(x) for x in wanted])
    # the recorded steps go on in the slots of the writer
    slots = {inner: slot for inner, (_, slot) in zip(program.inputs, given, strict=True)}
    for step in program.nodes:
        slots |= {out: writer.new(program.kinds[out]) for out in step.outs if out >= 0}
        outs = tuple(slots[out].index if out >= 0 else out for out in step.outs)
        args, kwargs = fill(step.args, slots), fill(step.kwargs, slots)
        writer.nodes.append(Node(step.func, args, kwargs, outs, step.flops))
    reached = [s for k, s in enumerate(sources) if k not in missing]
    return [(s, slots[out]) for s, out in zip(reached, program.outputs, strict=True)]


def _results(node: Node, values: dict[int, Any]) -> list[Any]:
    result = node.run(values)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _refuse_nonlinear(node: Node, sources: list[int], kinds: Kinds, device: torch.device) -> None:
    """Raise Unrecordable unless f(x) + f(y) is f(x + y) for random x, y: no transpose exists."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[int, Tensor]:
        return {
            s: torch.randn(kinds[s][0], generator=generator).to(device, kinds[s][1])
            for s in sources
        }

    x, y = draw(), draw()
    both = {s: x[s] + y[s] for s in sources}
    with torch.no_grad():
        for a, b, c in zip(*(_results(node, values) for values in (x, y, both)), strict=True):
            if not isinstance(c, Tensor) or not c.is_floating_point() or not c.numel():
                continue
            size = a.abs().amax() + b.abs().amax() + c.abs().amax()
            # √eps is far above rounding
            if not bool((a + b - c).abs().amax() <= torch.finfo(c.dtype).eps ** 0.5 * size):
                raise Unrecordable(f"{node.func} is not linear in the gradient that comes in")


def _of_one(rule: Callable[[Writer, Node, Slot, Kind], Slot | None]) -> Transpose:
    """Make the transpose of an operation with one moving argument; the rule is given its kind."""

    def transposed(w: Writer, node: Node, g: Slot, kinds: Kinds) -> Given | None:
        if len(node.sources) != 1:
            return None
        source = node.sources[0]
        value = rule(w, node, g, kinds[source])
        return None if value is None else [(source, value)]

    return transposed


def _permute(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot:
    axes = [axis % len(node.args[1]) for axis in node.args[1]]
    return w.emit(torch.permute, (g, [axes.index(k) for k in range(len(axes))]), kind)


def _times(func: Any) -> Transpose:
    """x ↦ x ∘ c entry by entry, or c x; a change of dtype, and c / x, are left to autograd."""

    def rule(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot | None:
        first = isinstance(node.args[0], Slot)
        if w.kinds[g.index][1] != kind[1] or not (first or func is torch.mul):
            return None
        return w.reduce(w.like(func, g, node.args[1 if first else 0]), kind[0])

    return _of_one(rule)


def _product(func: Any) -> Transpose:
    def rule(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot:
        a, b = node.args
        args = (g, b.mT) if isinstance(a, Slot) else (a.mT, g)
        return w.emit(func, args, kind, node.flops)

    return _of_one(rule)


def _slice(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot:
    shape = kind[0]
    defaults: tuple[Any, ...] = (0, None, None, 1)
    axis, start, end, step = node.args[1:] + defaults[len(node.args) - 1 :]
    bounds = (0 if start is None else start, shape[axis] if end is None else end)
    return w.emit(aten.slice_backward.default, (g, list(shape), axis, *bounds, step), kind)


def _sum(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot | None:
    if not node.args[1] or node.kwargs:
        return None
    axes = {axis % len(kind[0]) for axis in node.args[1]}
    kept = w.reshape(g, [1 if k in axes else n for k, n in enumerate(kind[0])])
    return w.emit(aten.expand.default, (kept, list(kind[0])), kind)


def _norm(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot:
    """(P w ⊙)ᵀ = w ⊙ P."""
    norm, rest = node.args[1], list(node.args[2])
    place, channels = NORMS[norm]
    weight = rest[place - 1]
    # a weight of another type makes the kernel one of mixed types, which it must stay
    mixed = weight is not None and weight.dtype != kind[1]
    rest[place - 1] = torch.ones_like(weight) if mixed else None
    value = w.emit(pullback, (g, norm, tuple(rest)), kind)
    if weight is None:
        return value
    shape = (-1, *[1] * (len(kind[0]) - 2)) if channels else weight.shape
    return w.like(torch.mul, value, weight.reshape(shape).to(kind[1]))


def _softmax(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot | None:
    if node.args[1].dtype != node.args[3]:
        return None
    return w.like(node.func, g, *node.args[1:])


def _spread(w: Writer, node: Node, g: Slot, kind: Kind) -> Slot:
    shape, dtype = w.kinds[g.index]
    inner = w.emit(collect, (g, *node.args[1:]), (kind[0], dtype), 2 * prod(shape))
    return w.cast(inner, kind[1])


def _add(w: Writer, node: Node, g: Slot, kinds: Kinds) -> Given | None:
    """x + y; a change of dtype, a factor, and x + c, which is not linear, are left to autograd."""
    dtype = w.kinds[g.index][1]
    if node.kwargs or [kinds[slot][1] for slot in node.sources] != [dtype, dtype]:
        return None
    return [(slot, w.reduce(g, kinds[slot][0])) for slot in node.sources]


def _cat(w: Writer, node: Node, g: Slot, kinds: Kinds) -> Given | None:
    axis = node.args[1] if len(node.args) > 1 else 0
    shapes = [kinds[x.index][0] if isinstance(x, Slot) else tuple(x.shape) for x in node.args[0]]
    whole, dtype = w.kinds[g.index]
    if any(len(shape) != len(whole) for shape in shapes):
        return None
    pieces, start = [], 0
    for x, shape in zip(node.args[0], shapes, strict=True):
        end = start + shape[axis]
        if isinstance(x, Slot):
            piece = w.emit(aten.slice.Tensor, (g, axis, start, end), (shape, dtype))
            pieces.append((x.index, piece))
        start = end
    return pieces


_copy = _of_one(lambda w, node, g, kind: w.cast(g, kind[1]))

TRANSPOSES: dict[Any, Transpose] = {
    **dict.fromkeys(RESHAPING, _of_one(lambda w, node, g, kind: w.reshape(g, kind[0]))),
    aten.alias.default: _copy,
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.expand.default: _of_one(lambda w, node, g, kind: w.reduce(g, kind[0])),
    aten.transpose.int: _of_one(
        lambda w, node, g, kind: w.emit(torch.transpose, (g, *node.args[1:]), kind)
    ),
    aten.t.default: _of_one(lambda w, node, g, kind: w.emit(torch.t, (g,), kind)),
    aten.permute.default: _of_one(_permute),
    aten.mul.Tensor: _times(torch.mul),
    aten.mul.Scalar: _times(torch.mul),
    aten.div.Tensor: _times(torch.div),
    aten.div.Scalar: _times(torch.div),
    aten.neg.default: _of_one(lambda w, node, g, kind: w.like(torch.neg, g)),
    aten.add.Tensor: _add,
    aten.mm.default: _product(torch.mm),
    aten.bmm.default: _product(torch.bmm),
    aten.slice.Tensor: _of_one(_slice),
    aten.slice_backward.default: _of_one(
        lambda w, node, g, kind: w.emit(aten.slice.Tensor, (g, *node.args[2:]), kind)
    ),
    aten.select.int: _of_one(
        lambda w, node, g, kind: w.emit(
            aten.select_backward.default, (g, list(kind[0]), *node.args[1:]), kind
        )
    ),
    aten.select_backward.default: _of_one(
        lambda w, node, g, kind: w.emit(aten.select.int, (g, *node.args[2:]), kind)
    ),
    aten.cat.default: _cat,
    aten.sum.dim_IntList: _of_one(_sum),
    aten._softmax_backward_data.default: _of_one(_softmax),
    pullback: _of_one(_norm),
    spread: _of_one(_spread),
}
