"""Layers that output i reaches only at its own position: their share of M is a T × T matrix, and needs no pass.

In the backward pass from u, a value is *own-position* when its row i is u_i times a fixed vector: everything after the last
operation that mixes positions (in a decoder: head, last norm, last MLP, output projection of the last attention). The
recorded backward program says which values these are, operation by operation, so that no architecture has to be named; an
operation without a rule here ends the region. The passes of a product then start from the fixed vectors at its border.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.operator.factors import Grams, gram
from grsd.spectrum.operator.trace import Use
from grsd.spectrum.programs.program import (
    NORMS,
    RESHAPING,
    Kind,
    Node,
    Program,
    Rows,
    Slot,
    fill,
    pullback,
    spread,
)

aten = torch.ops.aten


class OwnPositions:
    """The slots of a backward pass from u, (size,) at slot `start`, whose row i is u_i times a fixed vector: `rows`."""

    def __init__(self, start: int | None, size: int) -> None:
        self.rows: dict[int, Rows] = {} if start is None else {start: Rows(size)}
        self.constant: set[int] = set()

    def reads(self, node: Node, kinds: Mapping[int, Kind]) -> bool:
        """Take in the next operation, and say whether its value is constant or own-position."""
        sources = node.sources()
        if all(s in self.constant for s in sources):
            self.constant.update(node.outs)
            return True
        entering = [s for s in sources if s not in self.constant]
        if not all(s in self.rows for s in entering):
            return False
        rows = self.rows[entering[0]]
        if any(self.rows[s] is not rows for s in entering):
            return False
        out = node.outs[0]
        after = _rows_after(node, rows, entering, kinds) if out >= 0 else None
        if after is None:
            return False
        self.rows[out] = after  # further results are gradients of parameters, in which rows meet
        return True


def _rows_after(
    node: Node, rows: Rows, entering: list[int], kinds: Mapping[int, Kind]
) -> Rows | None:
    shape, result = kinds[entering[0]][0], kinds[node.outs[0]][0]
    front = rows.front(shape)
    if node.func in KEEPING or (node.func in SLICES and shape == result):
        return rows
    if node.func is spread:
        return rows if rows.positions is None else None
    if node.func in PUTTING:
        return _put(node, rows, entering, result)
    if front is None or (
        node.func in ALIGNED and any(len(kinds[s][0]) != len(result) for s in entering)
    ):
        return None
    if any(kinds[s][0][:front] != shape[:front] for s in entering):
        return None
    rule = SEPARATE.get(node.func)
    if rule is None or not rule(node, front, len(shape)) or result[:front] != shape[:front]:
        return None
    return rows


def _put(node: Node, rows: Rows, entering: list[int], result: tuple[int, ...]) -> Rows | None:
    """Rows that are written to chosen positions of a larger tensor of zeros (the backward of boolean indexing)."""
    target, indices, values = node.args[:3]
    if (
        rows.positions is not None
        or values != Slot(entering[0])
        or target == values
        or len(entering) != 1
    ):
        return None
    places = [
        x.nonzero().unbind(1) if x.dtype == torch.bool else (x,) for x in indices if x is not None
    ]
    flat = [x for place in places for x in place]
    lengths = result[: len(flat)]
    if any(x is None for x in indices[: len(places)]) or any(
        x.shape != (rows.count,) for x in flat
    ):
        return None
    position = torch.zeros_like(flat[0])
    for x, length in zip(flat, lengths, strict=True):
        position = position * length + x % length
    if torch.unique(position).numel() != rows.count:
        return None
    return Rows(prod(lengths), position)


def _always(node: Node, front: int, ndim: int) -> bool:
    return True


def _first_only(node: Node, front: int, ndim: int) -> bool:
    return isinstance(node.args[0], Slot) and not isinstance(node.args[1], Slot) and front < ndim


def _axis(place: int, shift: int = 0) -> Callable[[Node, int, int], bool]:
    def behind(node: Node, front: int, ndim: int) -> bool:
        axes = node.args[place] if len(node.args) > place else 0
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        return all(front <= (axis + ndim + shift if axis < 0 else axis) for axis in axes) and bool(
            axes
        )

    return behind


def _two_axes(node: Node, front: int, ndim: int) -> bool:
    return all(front <= axis % ndim for axis in node.args[1:3])


def _norm(node: Node, front: int, ndim: int) -> bool:
    kernel, rest = node.args[1], node.args[2]
    if kernel is aten.native_batch_norm_backward.default:
        return False
    return front <= 1 if NORMS[kernel][1] else front <= ndim - len(rest[1])


def _samples(node: Node, front: int, ndim: int) -> bool:
    return front <= 1 and not any(isinstance(x, Slot) for x in node.args[1:])


def _scattering(node: Node, front: int, ndim: int) -> bool:
    return front <= node.args[1] % ndim and not isinstance(node.args[2], Slot)


KEEPING = RESHAPING | {
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.neg.default,
    aten.mul.Scalar,
    aten.div.Scalar,
}
SLICES = {
    aten.slice.Tensor,
    aten.slice_backward.default,
}  # of everything: what older versions of torch write for x[:, 0:]
PUTTING = {aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
ALIGNED = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.expand.default}
# operation → whether it keeps rows apart, from the node, the number of leading axes that are rows, and the value's ndim
SEPARATE: dict[Any, Callable[[Node, int, int], bool]] = {
    aten.mul.Tensor: lambda node, front, ndim: len(node.sources()) == 1,
    aten.div.Tensor: lambda node, front, ndim: (
        isinstance(node.args[0], Slot) and len(node.sources()) == 1
    ),
    aten.add.Tensor: lambda node, front, ndim: len(node.sources()) == 2,
    aten.sub.Tensor: lambda node, front, ndim: len(node.sources()) == 2,
    aten.expand.default: _always,
    aten.mm.default: _first_only,
    aten.bmm.default: _first_only,
    pullback: _norm,
    aten._softmax_backward_data.default: _axis(2),
    aten._log_softmax_backward_data.default: _axis(2),
    aten.nll_loss_backward.default: lambda node, front, ndim: (
        front == ndim == 1 and node.args[4] == 0
    ),
    aten.sum.dim_IntList: _axis(1),
    aten.slice.Tensor: _axis(1),
    aten.select.int: _axis(1),
    aten.slice_backward.default: _axis(2),
    aten.select_backward.default: _axis(2, shift=1),
    aten.cat.default: _axis(1),
    aten.transpose.int: _two_axes,
    aten.scatter_add_.default: _scattering,
    aten.scatter_add.default: _scattering,
    aten.convolution_backward.default: _samples,
    aten.max_pool2d_with_indices_backward.default: _samples,
    aten.avg_pool2d_backward.default: _samples,
}


def refuse(program: Program, values: Mapping[int, Tensor], region: OwnPositions, size: int) -> None:
    """Take out of `region` what the model itself denies: values whose rows mix after all.

    The region is run once more, from a vector with zeros: rows of outputs that were left out must be exactly zero, and the
    others their fixed vectors times u_i, which is a power of two, so that nothing rounds. What fails, and what follows
    from it, goes through the passes instead. Cost: the elementwise operations of the region; a corner of a large matrix
    product; nothing for a large value that is only renamed.
    """
    own, start = region.rows, program.inputs[0]
    if start not in own:
        return
    draw = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(0))
    draw[:1] = 1  # a row that says something
    like = values[start]
    u = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=like.dtype)[draw].to(like.device)
    found = _Probe(u, own, values)
    found[start] = u
    for node in program.nodes:
        sources, out = node.sources(), node.outs[0]
        if out not in own:
            if region.constant.issuperset(node.outs):
                found[out] = node.func(*fill(node.args, found), **fill(node.kwargs, found))
            continue
        if sum(x >= 0 for x in node.outs) > 1 or any(
            s not in own and s not in region.constant for s in sources
        ):
            del own[out]
            continue
        renamed = node.func in KEEPING or node.func is spread
        large = (
            node.func is aten.mm.default and node.flops > PROBED and isinstance(node.args[0], Slot)
        )
        if renamed and values[out].numel() > PROBED // 100:
            continue  # made from its own-position source when something asks for it
        if large:
            near = same_product(
                found.rows(node.args[0].index, 2), node.args[1][:, :8], found.rows(out, 2)[:, :8]
            )
        else:
            result = node.func(*fill(node.args, found), **fill(node.kwargs, found))
            result = result[0] if isinstance(result, (tuple, list)) else result
            wanted = None if renamed else spread(u, own[out], values[out])
            near = wanted is None or torch.equal(result, wanted) or _close(result, wanted)
            found[out] = result
        if not near:
            del own[out]


class _Probe(dict[int, Tensor]):
    """Values of the probing run; what was not run is the fixed vectors times u."""

    def __init__(self, u: Tensor, own: dict[int, Rows], values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.u, self.own, self.values_at_one = u, own, values

    def __missing__(self, slot: int) -> Tensor:
        self[slot] = found = spread(self.u, self.own[slot], self.values_at_one[slot])
        return found

    def rows(self, slot: int, few: int) -> Tensor:
        """Return the first rows of a value, flat."""
        count = self.own[slot].count
        if slot in self:
            return self[slot].reshape(count, -1)[:few]
        u, positions = self.u, self.own[slot].positions
        if positions is not None:
            u = u.new_zeros(count).index_copy(0, positions, u)
        fixed = self.values_at_one[slot].reshape(count, -1)[:few]
        return (u[:few, None] * fixed).to(fixed.dtype)


PROBED = 10**8  # FLOPs; a larger matrix product is not repeated as a whole


def same_product(a: Tensor, b: Tensor, product: Tensor) -> bool:
    """Say whether `product` is a b up to the order of summation: 10 √k ε |a||b| entry by entry, for sums of k terms.

    Terms may cancel, so the result itself is no measure of its rounding.
    """
    room = 10 * a.shape[1] ** 0.5 * torch.finfo(a.dtype).eps
    return bool(((a @ b - product).abs() <= room * (a.abs() @ b.abs())).all())


def _close(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(a.dtype).eps
    return bool((a - b).abs().amax() <= 100 * eps * b.abs().amax()) if a.numel() else True


def share(uses: Sequence[Use], delta: Tensor, rows: Rows, grams: Grams) -> Tensor | None:
    """Return the T × T share of M of single-use parameters at one own-position output; None when a use has no closed form.

    `delta` is δ at u = 1. Linear layers and biases: (Σ A Aᵀ + b 1 1ᵀ) ⊙ (δ δᵀ); gains: (x̂ ⊙ δ)(x̂ ⊙ δ)ᵀ; embeddings:
    [t_i = t_j] ⊙ (δ δᵀ). Cost: n² out FLOPs once.
    """
    front = rows.front(delta.shape)
    if front is None or any(not foldable(use, rows, front) for use in uses):
        return None
    flat = rows.pick(delta)
    rest = tuple(delta.shape[front:])
    whole = [
        u for u in uses if u.rule in ("rows", "gather") or (u.rule == "shift" and u.spread == rest)
    ]
    parts: list[Tensor] = []
    if whole:
        weight = _meeting(whole, rows, delta.dtype, grams)
        parts.append(gram(flat).mul_(weight))
    for u in uses:
        if u.rule == "scale" or (u.rule == "shift" and u.spread != rest):
            g = delta if u.data is None else u.data * delta
            g = g.sum_to_size(*g.shape[:front], *[1] * (g.ndim - front - len(u.spread)), *u.spread)
            parts.append(gram(rows.pick(g)))
    total, *others = parts
    for other in others:
        total += other
    return total


def _meeting(uses: Sequence[Use], rows: Rows, dtype: torch.dtype, grams: Grams) -> Tensor | int:
    """Return Σ A Aᵀ + b 1 1ᵀ + [t_i = t_j] of uses that see the whole of one δ: (T, T), or the number b alone."""
    inputs = [u.data for u in uses if u.rule == "rows" and u.data is not None]
    biases = sum(u.rule == "shift" for u in uses)
    weight: Tensor | int = biases
    if inputs:
        kernel = grams.of(inputs, biases, dtype)
        weight = kernel if rows.positions is None else kernel[rows.positions][:, rows.positions]
    for u in uses:
        if u.rule == "gather" and u.data is not None:
            t, padding = rows.pick(u.data), u.options["padding"]
            weight = weight + ((t == t.T) & (t != (-1 if padding is None else padding))).to(dtype)
    return weight


def foldable(use: Use, rows: Rows, front: int) -> bool:
    """Say whether `share` knows the use: its parameter must see rows that do not mix."""
    if use.rule in ("rows", "gather"):
        assert use.data is not None
        return front == len(use.shape) - 1 and prod(use.shape[:-1]) == rows.count
    if use.rule in ("scale", "shift"):
        return len(use.spread) <= len(use.shape) - front
    return False


def unfold(
    program: Program, values: dict[int, Tensor], own: dict[int, Rows], outputs: Sequence[int]
) -> Program:
    """Return the backward program that starts at the border of the own-position region and ends at `outputs`."""
    inner = [node for node in program.nodes if not any(out in own for out in node.outs)]
    needed = {s for node in inner for s in node.sources()} | set(outputs)
    start = program.inputs[0]
    border = [
        Node(spread, (Slot(start), own[s], values[s].detach()), {}, (s,))
        for s in sorted(needed & set(own) - {start})
    ]
    return Program(border + inner, [start], outputs, program.kinds)
