"""The transpose of a recorded linear program, operation by operation, without running anything.

Every operation that passes of neural networks are made of has its transpose in a table; one that is not in the table is
transposed by recording its own backward pass at zeros of its shapes. The programs are in :mod:`grsd.spectrum.programs.program`.
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

Found = list[tuple[int, Slot]]  # slot of the program → what goes back to it
Rule = Callable[["Writer", Node, Slot, dict[int, Kind]], Found | None]


class Writer:
    """Collects nodes and the shape and dtype of every slot."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.kinds: dict[int, Kind] = {}

    def new(self, kind: Kind) -> Slot:
        """Return a slot that no node has yet."""
        slot = Slot(len(self.kinds))
        self.kinds[slot.index] = kind
        return slot

    def emit(
        self, func: Any, args: tuple[Any, ...], kind: Kind, flops: int = 0, **kwargs: Any
    ) -> Slot:
        """Append func(*args, **kwargs) and return its slot."""
        slot = self.new(kind)
        self.nodes.append(Node(func, args, kwargs, (slot.index,), flops))
        return slot

    def reshape(self, x: Slot, shape: Sequence[int]) -> Slot:
        before, dtype = self.kinds[x.index]
        return (
            x
            if before == tuple(shape)
            else self.emit(torch.reshape, (x, tuple(shape)), (tuple(shape), dtype))
        )

    def add(self, a: Slot, b: Slot) -> Slot:
        return self.emit(torch.add, (a, b), self.kinds[a.index])

    def scale(self, x: Slot, factor: Any) -> Slot:
        return x if factor == 1 else self.emit(torch.mul, (x, factor), self.kinds[x.index])

    def reduce(self, x: Slot, shape: Sequence[int]) -> Slot:
        """Sum over the axes along which `shape` was broadcast."""
        before, dtype = self.kinds[x.index]
        lead = len(before) - len(shape)
        axes = [
            k for k in range(len(before)) if k < lead or (shape[k - lead] == 1 and before[k] != 1)
        ]
        if axes:
            kept = tuple(1 if k in axes else n for k, n in enumerate(before))
            x = self.emit(torch.sum, (x, axes, True), (kept, dtype))
        return self.reshape(x, shape)


def transpose(program: Program, device: torch.device) -> Program:
    """Return the transposed map, from one vector per output to one per input.

    Raises
    ------
    Unrecordable
        An input without effect on the outputs, or an operation whose backward pass cannot be recorded.

    Notes
    -----
    Cost: no arithmetic, but for operations that the table does not know.
    """
    writer = Writer()
    entering = [writer.new(program.kinds[slot]) for slot in program.outputs]
    back: dict[int, Slot] = {}

    def give(slot: int, value: Slot) -> None:
        back[slot] = writer.add(back[slot], value) if slot in back else value

    for slot, seed in zip(program.outputs, entering, strict=True):
        give(slot, seed)
    for node in reversed(program.nodes):
        given = [(k, back.pop(out)) for k, out in enumerate(node.outs) if out in back]
        if not given:
            continue
        rule = TRANSPOSES.get(node.func) if len(node.outs) == 1 else None
        found = None if rule is None else rule(writer, node, given[0][1], program.kinds)
        for slot, value in (
            _by_autograd(writer, node, given, program.kinds, device) if found is None else found
        ):
            give(slot, value)
    if any(slot not in back for slot in program.inputs):
        raise Unrecordable("an input of the program has no effect on its outputs")
    leaving = [back[slot].index for slot in program.inputs]
    return Program(writer.nodes, [x.index for x in entering], leaving, writer.kinds)


def _by_autograd(
    writer: Writer,
    node: Node,
    given: list[tuple[int, Slot]],
    kinds: dict[int, Kind],
    device: torch.device,
) -> Found:
    """Record the backward pass of one operation at zeros, and append it."""
    sources = list(dict.fromkeys(node.sources()))
    _refuse_nonlinear(node, sources, kinds, device)
    leaves = [
        torch.zeros(kinds[s][0], dtype=kinds[s][1], device=device, requires_grad=True)
        for s in sources
    ]
    with torch.enable_grad():
        values: dict[int, Any] = {s: x.clone() for s, x in zip(sources, leaves, strict=True)}
        result = node.func(*fill(node.args, values), **fill(node.kwargs, values))
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    wanted = [results[k] for k, _ in given]
    seeds = [torch.zeros_like(x) for x in wanted]

    def backward(*seeds: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(wanted, leaves, seeds, allow_unused=True)

    program, _, missing = record(backward, seeds)
    slots = {inner: slot for inner, (_, slot) in zip(program.inputs, given, strict=True)}
    for step in program.nodes:
        outs = []
        for out in step.outs:
            if out >= 0:
                slots[out] = writer.new(program.kinds[out])
            outs.append(slots[out].index if out >= 0 else out)
        writer.nodes.append(
            Node(
                step.func, fill(step.args, slots), fill(step.kwargs, slots), tuple(outs), step.flops
            )
        )
    reached = [s for k, s in enumerate(sources) if k not in missing]
    return [(s, slots[out]) for s, out in zip(reached, program.outputs, strict=True)]


def _refuse_nonlinear(
    node: Node, sources: list[int], kinds: dict[int, Kind], device: torch.device
) -> None:
    """Raise Unrecordable when f(x) + f(y) is not f(x + y) for random x and y: such an operation has no transpose."""
    generator = torch.Generator().manual_seed(0)

    def at(values: dict[int, Any]) -> list[Tensor]:
        result = node.func(*fill(node.args, values), **fill(node.kwargs, values))
        return [
            x
            for x in (result if isinstance(result, (tuple, list)) else [result])
            if isinstance(x, Tensor)
        ]

    with torch.no_grad():
        x, y = (
            {
                s: torch.randn(kinds[s][0], generator=generator).to(device, kinds[s][1])
                for s in sources
            }
            for _ in range(2)
        )
        both = {s: x[s] + y[s] for s in sources}
        copies = [
            {s: v.clone() for s, v in values.items()} for values in (x, y, both)
        ]  # some write into an argument
        for a, b, c in zip(*(at(values) for values in copies), strict=True):
            if c.is_floating_point() and c.numel():
                size = a.abs().amax() + b.abs().amax() + c.abs().amax()
                if not bool(
                    (a + b - c).abs().amax() <= torch.finfo(c.dtype).eps ** 0.5 * size
                ):  # far above rounding
                    raise Unrecordable(f"{node.func} is not linear in the gradient that comes in")


def _source(node: Node, kinds: dict[int, Kind], place: int = 0) -> tuple[int, Kind] | None:
    """Return the slot at one argument and its kind; None when another argument is a slot as well."""
    x = node.args[place]
    return (x.index, kinds[x.index]) if isinstance(x, Slot) and len(node.sources()) == 1 else None


def _reshape(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    return None if found is None else [(found[0], w.reshape(g, found[1][0]))]


def _copy(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    if found is None:
        return None
    slot, kind = found
    return [
        (
            slot,
            g
            if w.kinds[g.index] == kind
            else w.emit(aten._to_copy.default, (g,), kind, dtype=kind[1]),
        )
    ]


def _expand(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    return None if found is None else [(found[0], w.reduce(g, found[1][0]))]


def _swap_axes(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    return (
        None
        if found is None
        else [(found[0], w.emit(torch.transpose, (g, *node.args[1:]), found[1]))]
    )


def _t(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    return None if found is None else [(found[0], w.emit(torch.t, (g,), found[1]))]


def _permute(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    if found is None:
        return None
    axes = [axis % len(node.args[1]) for axis in node.args[1]]
    inverse = [axes.index(k) for k in range(len(axes))]
    return [(found[0], w.emit(torch.permute, (g, inverse), found[1]))]


def _times(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    place = 0 if isinstance(node.args[0], Slot) else 1
    found = _source(node, kinds, place)
    if found is None or w.kinds[g.index][1] != found[1][1]:
        return None
    value = w.emit(torch.mul, (g, node.args[1 - place]), w.kinds[g.index])
    return [(found[0], w.reduce(value, found[1][0]))]


def _over(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    if found is None or w.kinds[g.index][1] != found[1][1]:
        return None
    value = w.emit(torch.div, (g, node.args[1]), w.kinds[g.index])
    return [(found[0], w.reduce(value, found[1][0]))]


def _neg(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    return [(node.args[0].index, w.emit(torch.neg, (g,), w.kinds[g.index]))]


def _sum_of_two(sign: int) -> Rule:
    def rule(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
        factors = (1, sign * node.kwargs.get("alpha", 1))
        if any(isinstance(x, Slot) and kinds[x.index][1] != w.kinds[g.index][1] for x in node.args):
            return None
        return [
            (x.index, w.reduce(w.scale(g, factor), kinds[x.index][0]))
            for x, factor in zip(node.args, factors, strict=True)
            if isinstance(x, Slot)
        ]

    return rule


def _matrix_product(func: Any) -> Rule:
    def rule(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
        place = 0 if isinstance(node.args[0], Slot) else 1
        found = _source(node, kinds, place)
        if found is None:
            return None
        fixed = node.args[1 - place].mT
        args = (g, fixed) if place == 0 else (fixed, g)
        return [(found[0], w.emit(func, args, found[1], node.flops))]

    return rule


def _slice(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    slot, (shape, dtype) = node.args[0].index, kinds[node.args[0].index]
    given = len(node.args) - 1
    settings: list[Any] = [*node.args[1:], *[0, None, None, 1][given:]]
    axis, start, end, step = settings
    bounds = (0 if start is None else start, shape[axis] if end is None else end)
    return [
        (
            slot,
            w.emit(
                aten.slice_backward.default, (g, list(shape), axis, *bounds, step), (shape, dtype)
            ),
        )
    ]


def _slice_back(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    slot = node.args[0].index
    return [(slot, w.emit(aten.slice.Tensor, (g, *node.args[2:]), kinds[slot]))]


def _select(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    slot = node.args[0].index
    args = (g, list(kinds[slot][0]), *node.args[1:])
    return [(slot, w.emit(aten.select_backward.default, args, kinds[slot]))]


def _select_back(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    slot = node.args[0].index
    return [(slot, w.emit(aten.select.int, (g, *node.args[2:]), kinds[slot]))]


def _cat(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    axis = node.args[1] if len(node.args) > 1 else 0
    shapes = [kinds[x.index][0] if isinstance(x, Slot) else tuple(x.shape) for x in node.args[0]]
    whole, dtype = w.kinds[g.index]
    if any(len(shape) != len(whole) for shape in shapes):
        return None
    found, at = [], 0
    for x, shape in zip(node.args[0], shapes, strict=True):
        if isinstance(x, Slot):
            found.append(
                (
                    x.index,
                    w.emit(aten.slice.Tensor, (g, axis, at, at + shape[axis]), (shape, dtype)),
                )
            )
        at += shape[axis]
    return found


def _sum(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    if found is None or not node.args[1] or node.kwargs:
        return None
    slot, (shape, dtype) = found
    axes = {axis % len(shape) for axis in node.args[1]}
    x = w.reshape(g, [1 if k in axes else n for k, n in enumerate(shape)])
    return [(slot, w.emit(aten.expand.default, (x, list(shape)), (shape, dtype)))]


def _softmax(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    found = _source(node, kinds)
    if found is None or node.args[1].dtype != node.args[3]:
        return None
    return [(found[0], w.emit(node.func, (g, *node.args[1:]), found[1]))]


def _norm(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    """(P w ⊙)ᵀ = w ⊙ P."""
    slot, kernel, rest = node.args[0].index, node.args[1], list(node.args[2])
    place, channels = NORMS[kernel]
    weight, rest[place - 1] = rest[place - 1], None
    value = w.emit(pullback, (g, kernel, tuple(rest)), kinds[slot])
    if weight is not None:
        shape = (-1, *[1] * (len(kinds[slot][0]) - 2)) if channels else weight.shape
        value = w.emit(torch.mul, (value, weight.reshape(shape)), kinds[slot])
    return [(slot, value)]


def _spread(w: Writer, node: Node, g: Slot, kinds: dict[int, Kind]) -> Found | None:
    slot = node.args[0].index
    (shape, dtype), (_, inner) = kinds[slot], w.kinds[g.index]
    found = w.emit(collect, (g, *node.args[1:]), (shape, inner), 2 * prod(w.kinds[g.index][0]))
    return [
        (
            slot,
            found
            if inner == dtype
            else w.emit(aten._to_copy.default, (found,), (shape, dtype), dtype=dtype),
        )
    ]


TRANSPOSES: dict[Any, Rule] = dict.fromkeys(RESHAPING, _reshape) | {
    aten.alias.default: _copy,
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.expand.default: _expand,
    aten.transpose.int: _swap_axes,
    aten.t.default: _t,
    aten.permute.default: _permute,
    aten.mul.Tensor: _times,
    aten.mul.Scalar: _times,
    aten.div.Tensor: _over,
    aten.div.Scalar: _over,
    aten.neg.default: _neg,
    aten.add.Tensor: _sum_of_two(1),
    aten.sub.Tensor: _sum_of_two(-1),
    aten.mm.default: _matrix_product(torch.mm),
    aten.bmm.default: _matrix_product(torch.bmm),
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_back,
    aten.select.int: _select,
    aten.select_backward.default: _select_back,
    aten.cat.default: _cat,
    aten.sum.dim_IntList: _sum,
    aten._softmax_backward_data.default: _softmax,
    pullback: _norm,
    spread: _spread,
}
