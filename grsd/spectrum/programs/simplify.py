"""Fewer passes over memory for a linear program: the same map with fused, and then with overwriting, operations.

`simplify` joins slices that fill one tensor, adds into matrix products, and drops operations that do nothing. `overwrite`
lets an operation write into a value that nothing reads afterwards. Neither changes what is computed but for the order of
additions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.programs.program import (
    RESHAPING,
    Kind,
    Node,
    Program,
    Slot,
    fill,
    last_uses,
    reachable,
)

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
VIEWS = {torch.reshape, torch.transpose, torch.t, torch.permute}
INTO: dict[Any, Any] = {
    torch.add: torch.Tensor.add_,
    torch.mul: torch.Tensor.mul_,
    torch.neg: torch.Tensor.neg_,
    torch.addcmul: torch.Tensor.addcmul_,
    torch.addmm: torch.Tensor.addmm_,
    torch.baddbmm: torch.Tensor.baddbmm_,
}
ADDED: dict[Any, Any] = {torch.mm: torch.addmm, torch.bmm: torch.baddbmm}


def simplify(program: Program) -> Program:
    """Return the same map with fewer operations; every operation still makes a new value."""
    kinds = dict(program.kinds)
    nodes, swap = _without_idle(program, kinds)
    outputs = [swap.get(slot, slot) for slot in program.outputs]
    nodes = reachable(_joined(nodes, outputs), outputs)
    return Program(_added(nodes, outputs, kinds), program.inputs, outputs, kinds)


def _without_idle(program: Program, kinds: dict[int, Kind]) -> tuple[list[Node], dict[int, int]]:
    """Drop slices of everything and reshapes to the same shape; let a reshape of a reshape read the first one's source."""
    swap: dict[int, int] = {}
    source: dict[int, Slot] = {}
    nodes: list[Node] = []
    for node in program.nodes:
        if swap and any(s in swap for s in node.sources()):
            through = _Through(swap)
            node = replace(node, args=fill(node.args, through), kwargs=fill(node.kwargs, through))
        first = node.args[0]
        if node.func in RESHAPING or node.func is torch.reshape:
            first = source.get(first.index, first)
            node = replace(
                node, func=torch.reshape, args=(first, kinds[node.outs[0]][0]), kwargs={}
            )
            source[node.outs[0]] = first
        idle = node.func is torch.reshape or node.func in (
            aten.slice.Tensor,
            aten.slice_backward.default,
        )
        if idle and kinds[first.index] == kinds[node.outs[0]]:
            swap[node.outs[0]] = first.index
            continue
        func = NAMES.get(node.func)
        nodes.append(
            node if func is None else Node(func, node.args, node.kwargs, node.outs, node.flops)
        )
    return nodes, swap


class _Through(dict[int, Slot]):
    """Reads a slot as the one that stands for it."""

    def __init__(self, swap: dict[int, int]) -> None:
        super().__init__()
        self.swap = swap

    def __missing__(self, index: int) -> Slot:
        return Slot(self.swap.get(index, index))


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
        elif (
            node.func is torch.add
            and not node.kwargs
            and all(isinstance(x, Slot) for x in node.args)
        ):
            a, b = (pieces.get(x.index) if uses[x.index] == 1 else None for x in node.args)
            both = None if a is None or b is None else a.joined(b)
            if both is not None and both.full():
                args = ([source for _, _, source in both.parts], both.axis)
                node = Node(torch.cat, args, {}, node.outs)
            elif both is not None:
                pieces[node.outs[0]] = both
        result.append(node)
    return result


def _added(nodes: list[Node], outputs: list[int], kinds: dict[int, Kind]) -> list[Node]:
    """Write p + reshape(a b) as a product that is added to p, and p + x ⊙ c as one operation."""
    uses = _uses(nodes, outputs)
    makers = {node.outs[0]: node for node in nodes if len(node.outs) == 1}
    result: list[Node] = []
    for node in nodes:
        fused: list[Node] | None = None
        if (
            node.func is torch.add
            and not node.kwargs
            and all(isinstance(x, Slot) for x in node.args)
        ):
            for p, q in (node.args, node.args[::-1]):
                if (
                    fused is None
                    and kinds[p.index] == kinds[q.index] == kinds[node.outs[0]]
                    and p != q
                ):
                    fused = _fused(node, p, q, makers, uses, kinds)
        for step in fused or [node]:
            makers[step.outs[0]] = step
            result.append(step)
    return result


def _fused(
    node: Node,
    p: Slot,
    q: Slot,
    makers: dict[int, Node],
    uses: Counter[int],
    kinds: dict[int, Kind],
) -> list[Node] | None:
    maker = makers.get(q.index)
    at = q
    while maker is not None and maker.func is torch.reshape and uses[at.index] == 1:
        at = maker.args[0]
        maker = makers.get(at.index)
    if maker is None or uses[at.index] != 1 or maker.kwargs:
        return None
    if maker.func is torch.mul and at == q:
        fixed = [x for x in maker.args if isinstance(x, Tensor)]
        moving = [x for x in maker.args if isinstance(x, Slot)]
        if (
            len(fixed) == 1
            and fixed[0].dtype == kinds[q.index][1]
            and kinds[moving[0].index] == kinds[q.index]
        ):
            func: Any = torch.addcmul
            return [Node(func, (p, moving[0], fixed[0]), {}, node.outs)]
        return None
    func = ADDED.get(maker.func)
    if func is None:
        return None
    kind = kinds[at.index]
    if kind == kinds[p.index]:
        return [Node(func, (p, *maker.args), {}, node.outs, maker.flops)]
    reshape: Any = torch.reshape
    first = max(kinds) + 1
    second = first + 1
    kinds[first] = kinds[second] = kind
    return [
        Node(reshape, (p, kind[0]), {}, (first,)),
        Node(func, (Slot(first), *maker.args), {}, (second,), maker.flops),
        Node(reshape, (Slot(second), kinds[node.outs[0]][0]), {}, node.outs),
    ]


def _uses(nodes: list[Node], outputs: list[int]) -> Counter[int]:
    counts = Counter(outputs)
    for node in nodes:
        counts.update(node.sources())
    return counts


def overwrite(program: Program, owned: bool) -> Program:
    """Return the program with operations that write into values of which this was the last use.

    `owned` says that the inputs may be overwritten too.
    """
    store: dict[int, int] = {}  # slot → a slot that names its memory
    fixed: set[int] = set()  # memory that is not to be written
    for slot in program.inputs:
        store[slot] = slot
        if not owned:
            fixed.add(slot)
    for node in program.nodes:
        for out in node.outs:
            first = node.args[0] if node.args else None
            store[out] = (
                store[first.index] if isinstance(first, Slot) and _aliases(node.func) else out
            )
            if node.func is aten.expand.default:
                fixed.add(store[out])
    last: Counter[int] = Counter()
    for slot, k in last_uses(program.nodes).items():
        last[store[slot]] = max(last[store[slot]], k)
    for slot in program.outputs:
        last[store[slot]] = len(program.nodes)
    moved: dict[int, int] = {}

    def memory(slot: int) -> int:
        found = store[slot]
        while found in moved:
            found = moved[found]
        return found

    nodes = []
    for k, node in enumerate(program.nodes):
        if node.func in INTO and len(node.outs) == 1 and not node.kwargs:
            out = node.outs[0]
            sources = [memory(slot) for slot in node.sources()]
            either = node.func in (torch.add, torch.mul)
            for args in (node.args, node.args[::-1]) if either else (node.args,):
                target = args[0]
                if (
                    not isinstance(target, Slot)
                    or program.kinds[target.index] != program.kinds[out]
                ):
                    continue
                at = memory(target.index)
                if at in fixed or last[at] > k or sources.count(at) > 1:
                    continue
                moved[store[out]] = at
                last[at] = last[store[out]]
                if store[out] in fixed:
                    fixed.add(at)
                node = replace(node, func=INTO[node.func], args=tuple(args))
                break
        nodes.append(node)
    return Program(nodes, program.inputs, program.outputs, program.kinds)


def _aliases(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return func in VIEWS
    return any(result.alias_info is not None for result in schema.returns)
