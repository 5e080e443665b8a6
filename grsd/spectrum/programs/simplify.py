"""Fewer passes over memory for a linear program: the same map, to rounding, in fused operations.

Slices that fill one tensor are joined, sums and factors go into matrix products, and operations
that do nothing are dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.programs.program import RESHAPING, Kinds, Node, Program, Slot, fill, reachable

aten = torch.ops.aten

# the plain function for an operation, which is quicker to call
NAMES: dict[Any, Any] = {
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.div.Tensor: torch.div,
    aten.add.Tensor: torch.add,
    aten.neg.default: torch.neg,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.transpose.int: torch.transpose,
}
SLICES = (aten.slice.Tensor, aten.slice_backward.default)
SCALING = (aten.mul.Tensor, aten.mul.Scalar)
PRODUCTS = (aten.mm.default, aten.bmm.default)
INTO_SUM: dict[Any, Any] = {torch.mm: torch.addmm, torch.bmm: torch.baddbmm}
Makers = dict[int, Node]  # slot → the node that makes it


def simplify(program: Program) -> Program:
    """Return the same map with fewer operations."""
    kinds = dict(program.kinds)
    nodes, swap = _without_idle(program, kinds)
    outputs = [swap.get(slot, slot) for slot in program.outputs]
    nodes = reachable(_joined(nodes, outputs), outputs)
    return Program(_added(nodes, outputs, kinds), program.inputs, outputs, kinds)


def absorb(program: Program) -> Program:
    """Return the same map, where constants of products took over the factors of scaled values."""
    kinds, nodes = dict(program.kinds), []
    scaled: dict[int, tuple[Slot, float]] = {}  # slot → what it is a multiple of, and by how much
    for node in program.nodes:
        first, second = (*node.args, None, None)[:2]
        at = next((s for s in node.sources if s in scaled), None)
        if node.func in SCALING and isinstance(first, Slot) and isinstance(second, float):
            scaled[node.outs[0]] = (first, second)
        elif at is not None and node.func in RESHAPING:
            plain = Slot(max(kinds) + 1)
            kinds[plain.index] = kinds[node.outs[0]]
            base, factor = scaled[at]
            nodes.append(replace(node, args=(base, *node.args[1:]), outs=(plain.index,)))
            scaled[node.outs[0]] = (plain, factor)
        elif at is not None and node.func in PRODUCTS and len(node.sources) == 1:
            base, factor = scaled[at]
            args = tuple(base if isinstance(x, Slot) else x * factor for x in node.args)
            node = replace(node, args=args)
        nodes.append(node)
    return Program(nodes, program.inputs, program.outputs, kinds)


def _without_idle(program: Program, kinds: Kinds) -> tuple[list[Node], dict[int, int]]:
    """Drop slices of everything and reshapes to the same shape; join reshapes of reshapes."""
    swap: dict[int, int] = {}  # slot that is no longer made → slot that stands for it
    source: dict[int, Slot] = {}  # reshaped slot → what it was reshaped from
    nodes: list[Node] = []
    for node in program.nodes:
        if any(s in swap for s in node.sources):
            through = {s: Slot(swap.get(s, s)) for s in node.sources}
            node = replace(node, args=fill(node.args, through), kwargs=fill(node.kwargs, through))
        out, first = node.outs[0], node.args[0]
        reshapes = node.func in RESHAPING or node.func is torch.reshape
        if reshapes:
            first = source[out] = source.get(first.index, first)
            node = Node(torch.reshape, (first, kinds[out][0]), {}, node.outs)
        if (reshapes or node.func in SLICES) and kinds[first.index] == kinds[out]:
            swap[out] = first.index
            continue
        nodes.append(replace(node, func=NAMES.get(node.func, node.func)))
    return nodes, swap


@dataclass(frozen=True)
class _Pieces:
    """A tensor of zeros into which sources were written along one axis: (start, end, source)."""

    shape: tuple[int, ...]
    axis: int
    parts: tuple[tuple[int, int, Slot], ...]

    def joined(self, other: _Pieces) -> _Pieces | None:
        if (self.shape, self.axis) != (other.shape, other.axis):
            return None
        parts = sorted((*self.parts, *other.parts), key=lambda part: part[0])
        if any(before[1] > after[0] for before, after in pairwise(parts)):
            return None
        return _Pieces(self.shape, self.axis, tuple(parts))

    def full(self) -> bool:
        ends = [0, *(end for _, end, _ in self.parts)]
        starts = [*(start for start, _, _ in self.parts), self.shape[self.axis]]
        return starts == ends


def _is_sum(node: Node) -> bool:
    return node.func is torch.add and not node.kwargs and len(node.sources) == 2


def _joined(nodes: list[Node], outputs: list[int]) -> list[Node]:
    """Write a sum of slices that fill a tensor as one concatenation."""
    uses = _uses(nodes, outputs)
    pieces: dict[int, _Pieces] = {}
    result: list[Node] = []
    for node in nodes:
        if node.func is aten.slice_backward.default:
            x, shape, axis, start, end, step = node.args
            axis, length = axis % len(shape), shape[axis]
            start, end = (k + length if k < 0 else min(k, length) for k in (start, end))
            if step == 1:
                pieces[node.outs[0]] = _Pieces(tuple(shape), axis, ((start, end, x),))
        elif _is_sum(node):
            a, b = (pieces.get(slot) if uses[slot] == 1 else None for slot in node.sources)
            both = None if a is None or b is None else a.joined(b)
            if both is not None and both.full():
                args = ([source for _, _, source in both.parts], both.axis)
                node = Node(torch.cat, args, {}, node.outs)
            elif both is not None:
                pieces[node.outs[0]] = both
        result.append(node)
    return result


def _added(nodes: list[Node], outputs: list[int], kinds: Kinds) -> list[Node]:
    """Write p + reshape(a b) as a product that is added to p, and p + x ⊙ c as one operation."""
    uses = _uses(nodes, outputs)
    makers = {node.outs[0]: node for node in nodes if len(node.outs) == 1}
    result: list[Node] = []
    for node in nodes:
        fused: Sequence[Node] = ()
        if _is_sum(node):
            p, q = node.args
            if p != q and kinds[p.index] == kinds[q.index] == kinds[node.outs[0]]:
                fused = _fused(node, p, q, makers, uses, kinds)
                fused = fused or _fused(node, q, p, makers, uses, kinds)
        for step in fused or [node]:
            makers[step.outs[0]] = step
            result.append(step)
    return result


def _fused(
    node: Node, p: Slot, q: Slot, makers: Makers, uses: Counter[int], kinds: Kinds
) -> Sequence[Node]:
    """Return the nodes that add q, seen through its reshapes, to p as it is made; () if none."""
    # Find what made q.
    at, maker = q, makers.get(q.index)
    while maker is not None and maker.func is torch.reshape and uses[at.index] == 1:
        at = maker.args[0]
        maker = makers.get(at.index)
    if maker is None or uses[at.index] != 1 or maker.kwargs:
        return ()
    # A product entry by entry with a constant goes into one operation.
    if maker.func is torch.mul and at == q:
        fixed = [x for x in maker.args if isinstance(x, Tensor)]
        moving = [x for x in maker.args if isinstance(x, Slot)]
        same = len(fixed) == 1 and kinds[moving[0].index] == kinds[q.index]
        if same and fixed[0].dtype == kinds[q.index][1]:
            addcmul: Any = torch.addcmul
            return [Node(addcmul, (p, moving[0], fixed[0]), {}, node.outs)]
    # So does a product of matrices.
    if maker.func not in INTO_SUM:
        return ()
    func, kind = INTO_SUM[maker.func], kinds[at.index]
    if kind == kinds[p.index]:
        return [Node(func, (p, *maker.args), {}, node.outs, maker.flops)]
    # the product has another shape than the sum: p goes into its shape, and the result back
    first = max(kinds) + 1
    second = first + 1
    kinds[first] = kinds[second] = kind
    return [
        Node(torch.reshape, (p, kind[0]), {}, (first,)),
        Node(func, (Slot(first), *maker.args), {}, (second,), maker.flops),
        Node(torch.reshape, (Slot(second), kinds[node.outs[0]][0]), {}, node.outs),
    ]


def _uses(nodes: list[Node], outputs: list[int]) -> Counter[int]:
    counts = Counter(outputs)
    for node in nodes:
        counts.update(node.sources)
    return counts
