"""Layers that output i reaches only at its own position: their share of M is a T × T matrix.

In the backward pass from u, a value is *own-position* when its row i is u_i times a fixed vector:
everything after the last operation that mixes positions (in a decoder: head, last norm, last MLP,
output projection of the last attention). The recorded program says which values these are, so that
no architecture has to be named; an operation without a rule here ends the region. The model itself
is asked as well (`refuse`). The passes of a product start at the border of the region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.operator.factors import identity
from grsd.spectrum.programs.program import (
    NORMS,
    RESHAPING,
    Kinds,
    Node,
    Program,
    Rows,
    Slot,
    pullback,
    spread,
)

aten = torch.ops.aten

PROBED = 10**8  # FLOPs; a larger matrix product is not repeated as a whole
# least and most rows of a tile of a T × T matrix: what is added up stays in a cache
TILES = (128, 256)


class OwnPositions:
    """The slots of a backward pass from u, (size,), whose row i is u_i times a fixed vector."""

    def __init__(self, size: int) -> None:
        self.rows: dict[int, Rows] = {0: Rows(size)}
        self.constant: set[int] = set()

    def reads(self, node: Node, kinds: Kinds) -> bool:
        """Take in the next operation, and say whether its value is constant or own-position."""
        entering = [s for s in node.sources if s not in self.constant]
        if not entering:
            self.constant.update(node.outs)
            return True
        out = node.outs[0]
        if out < 0 or not all(s in self.rows for s in entering):
            return False
        rows = self.rows[entering[0]]
        if any(self.rows[s] is not rows for s in entering):
            return False
        after = _rows_after(node, rows, entering, kinds)
        if after is None:
            return False
        self.rows[out] = after  # further results are gradients of parameters, in which rows meet
        return True


def _rows_after(node: Node, rows: Rows, entering: list[int], kinds: Kinds) -> Rows | None:
    """Return how rows lie in the result; None when they may mix."""
    shape, result = kinds[entering[0]][0], kinds[node.outs[0]][0]
    if node.func in KEEPING or (node.func in SLICES and shape == result):
        return rows
    if node.func is spread:
        return rows if rows.positions is None else None
    if node.func is aten.index_put.default:
        return _put(node, rows, entering, result)
    front, rule = rows.front(shape), SEPARATE.get(node.func)
    if front is None or rule is None:
        return None
    shapes = [kinds[s][0] for s in entering]
    if node.func in ALIGNED and any(len(each) != len(result) for each in shapes):
        return None
    if any(each[:front] != shape[:front] for each in (*shapes, result)):
        return None
    return rows if rule(node, front, len(shape)) else None


def _put(node: Node, rows: Rows, entering: list[int], result: tuple[int, ...]) -> Rows | None:
    """Return the rows written to chosen positions of a tensor of zeros, as by boolean indexing."""
    _, indices, values = node.args[:3]
    if rows.positions is not None or entering != [getattr(values, "index", None)]:
        return None
    given = [x for x in indices if x is not None]
    leading = all(x is not None for x in indices[: len(given)])
    places: list[Tensor] = []
    for x in given:
        places += x.nonzero().unbind(1) if x.dtype == torch.bool else (x,)
    if not leading or any(x.shape != (rows.count,) for x in places):
        return None
    lengths = result[: len(places)]
    position = torch.zeros_like(places[0])
    for x, length in zip(places, lengths, strict=True):
        position = position * length + x % length
    if torch.unique(position).numel() != rows.count:
        return None
    return Rows(prod(lengths), position)


# Whether an operation keeps rows apart: from the node, the number of leading axes that are rows,
# and the ndim of the value.
Rule = Callable[[Node, int, int], bool]


def _by_constant(node: Node, front: int, ndim: int) -> bool:
    multiplied = node.func is aten.mul.Tensor or isinstance(node.args[0], Slot)
    return multiplied and len(node.sources) == 1


def _first_only(node: Node, front: int, ndim: int) -> bool:
    return isinstance(node.args[0], Slot) and not isinstance(node.args[1], Slot) and front < ndim


def _axes(place: int, shift: int = 0) -> Rule:
    """The operation works along the axes at this place: they must lie behind the rows."""

    def behind(node: Node, front: int, ndim: int) -> bool:
        axes = node.args[place] if len(node.args) > place else 0
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        size = ndim + shift
        return bool(axes) and all(front <= axis + (size if axis < 0 else 0) for axis in axes)

    return behind


def _norm(node: Node, front: int, ndim: int) -> bool:
    norm, rest = node.args[1], node.args[2]
    if norm is aten.native_batch_norm_backward.default:
        return False
    return front <= 1 if NORMS[norm][1] else front <= ndim - len(rest[1])


def _samples(node: Node, front: int, ndim: int) -> bool:
    return front <= 1 and not any(isinstance(x, Slot) for x in node.args[1:])


KEEPING = RESHAPING | {
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.neg.default,
    aten.mul.Scalar,
    aten.div.Scalar,
}
SLICES = {aten.slice.Tensor, aten.slice_backward.default}  # of everything, in older torch: x[:, 0:]
ALIGNED = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.expand.default}
SEPARATE: dict[Any, Rule] = {
    aten.mul.Tensor: _by_constant,
    aten.div.Tensor: _by_constant,
    aten.add.Tensor: lambda node, front, ndim: len(node.sources) == 2,
    aten.expand.default: lambda node, front, ndim: True,
    aten.mm.default: _first_only,
    aten.bmm.default: _first_only,
    pullback: _norm,
    aten._softmax_backward_data.default: _axes(2),
    aten.sum.dim_IntList: _axes(1),
    aten.slice.Tensor: _axes(1),
    aten.slice_backward.default: _axes(2),
    aten.select_backward.default: _axes(2, shift=1),
    aten.cat.default: _axes(1),
    aten.transpose.int: lambda node, front, ndim: all(front <= a % ndim for a in node.args[1:3]),
    aten.convolution_backward.default: _samples,
    aten.max_pool2d_with_indices_backward.default: _samples,
}


def refuse(program: Program, values: Mapping[int, Tensor], region: OwnPositions, size: int) -> None:
    """Take out of `region` what the model itself denies: values whose rows mix after all.

    The region is run once more, from a vector with zeros: rows that were left out must be exactly
    zero, and the others their fixed vectors times u_i, a power of two, so that nothing rounds. What
    fails, and what follows from it, goes through the passes instead. Cost: the elementwise
    operations of the region; a corner of a large matrix product; nothing for a large value that is
    only renamed.
    """
    own, like = region.rows, values[0]
    draw = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(0))
    draw[:1] = 1  # a row that says something
    u = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=like.dtype)[draw].to(like.device)
    probe = _Probe(u, own, values)
    for node in program.nodes:
        out = node.outs[0]
        if out not in own:
            if region.constant.issuperset(node.outs):
                probe[out] = node.run(probe)
            continue
        known = all(s in own or s in region.constant for s in node.sources)
        if not known or sum(x >= 0 for x in node.outs) > 1:
            del own[out]
            continue
        renamed = node.func in KEEPING or node.func is spread
        if renamed and values[out].numel() > PROBED // 100:
            continue  # made from its own-position source when something asks for it
        if node.func is aten.mm.default and node.flops > PROBED:
            a, b, product = node.args[0].index, node.args[1][:, :8], probe.rows(out, 2)[:, :8]
            near = same_product(probe.rows(a, 2), b, product)
        else:
            result = node.run(probe)
            result = result[0] if isinstance(result, (tuple, list)) else result
            near = renamed or _close(result, spread(u, own[out], values[out]))
            probe[out] = result
        if not near:
            del own[out]


class _Probe(dict[int, Tensor]):
    """Values of the probing run; what was not run is the fixed vectors times u."""

    def __init__(self, u: Tensor, own: dict[int, Rows], values: Mapping[int, Tensor]) -> None:
        super().__init__({0: u})
        self.u, self.own, self.at_one = u, own, values

    def __missing__(self, slot: int) -> Tensor:
        self[slot] = value = spread(self.u, self.own[slot], self.at_one[slot])
        return value

    def rows(self, slot: int, few: int) -> Tensor:
        """Return the first rows of a value, flat."""
        rows = self.own[slot]
        if slot in self:
            return self[slot].reshape(rows.count, -1)[:few]
        fixed = self.at_one[slot].reshape(rows.count, -1)[:few]
        return (rows.place(self.u)[:few, None] * fixed).to(fixed.dtype)


def same_product(a: Tensor, b: Tensor, product: Tensor) -> bool:
    """Say whether `product` is a b to the order of summation: 10 √k ε |a||b| for sums of k terms.

    Terms may cancel, so the result itself is no measure of its rounding.
    """
    room = 10 * a.shape[1] ** 0.5 * torch.finfo(a.dtype).eps
    return bool(((a @ b - product).abs() <= room * (a.abs() @ b.abs())).all())


def _close(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    return bool((a - b).abs().amax() <= 100 * torch.finfo(a.dtype).eps * b.abs().amax())


@dataclass
class Share:
    """A share of M that is one T × T matrix: (Σ A Aᵀ + b 1 1ᵀ + Σ [t_i = t_j]) ⊙ (D Dᵀ)."""

    vectors: Tensor  # D, (T, k): gradients at own-position outputs
    ones: int = 0  # b
    inputs: list[Tensor] = field(default_factory=list)  # A, (T, in) each
    # (t, whether it has a gradient), (T,) each
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def flops(self, met: int) -> int:
        """FLOPs that making it costs where each row meets `met` rows; one half is enough."""
        size, width = self.vectors.shape
        return size * met * (width + sum(a.shape[1] for a in self.inputs))


def total(shares: Sequence[Share], groups: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of the shares, (groups, T / groups, T / groups), by lower-half tiles."""
    vectors = shares[0].vectors
    size = len(vectors) // groups
    tile = min(max(size // 4, TILES[0]), TILES[1]) if vectors.device.type == "cpu" else size
    result = vectors.new_empty(groups, size, size, dtype=dtype)
    for group, block in enumerate(result):
        parts = [slice(k, min(k + tile, size)) for k in range(0, size, tile)]
        shifted = [slice(group * size + at.start, group * size + at.stop) for at in parts]
        for i, rows in enumerate(parts):
            for j, columns in enumerate(parts[: i + 1]):
                made = _tile(shares, shares, shifted[i], shifted[j])
                block[rows, columns] = made
                block[columns, rows] = made.T
    return result


def total_between(pairs: Sequence[tuple[Share, Share]], dtype: torch.dtype) -> Tensor:
    """Return the sum of the shares that two batches have in one another, (T′, T), by rows."""
    here, there = [one for one, _ in pairs], [other for _, other in pairs]
    height, width = len(here[0].vectors), len(there[0].vectors)
    parts = [slice(k, min(k + TILES[1], height)) for k in range(0, height, TILES[1])]
    return torch.cat([_tile(here, there, at, slice(width)).to(dtype) for at in parts])


def _tile(shares: Sequence[Share], others: Sequence[Share], rows: slice, columns: slice) -> Tensor:
    """Return one tile of the sum of the shares: `rows` of the first, `columns` of the others."""
    met: dict[tuple[object, ...], Tensor] = {}  # A Aᵀ of layers that read the same tensors
    result: Tensor | None = None
    for share, other in zip(shares, others, strict=True):
        part = share.vectors[rows] @ other.vectors[columns].T
        weight: Any = share.ones
        if share.inputs:
            key = (*identity(share.inputs), part.dtype)
            if key not in met:
                first, *more = (
                    a[rows].to(part) @ b[columns].to(part).T
                    for a, b in zip(share.inputs, other.inputs, strict=True)
                )
                for one in more:
                    first += one
                met[key] = first
            weight = met[key] + share.ones if share.ones else met[key]
        for (t, known), (t2, _) in zip(share.tokens, other.tokens, strict=True):
            same = (t[rows, None] == t2[None, columns]) & known[rows, None]
            weight = weight + same.to(part.dtype)
        if isinstance(weight, Tensor) or weight != 1:
            part = part.mul_(weight)
        result = part if result is None else result.add_(part)
    assert result is not None
    return result


def unfold(
    program: Program, values: dict[int, Tensor], own: dict[int, Rows], outputs: Sequence[int]
) -> Program:
    """Return the backward program from the border of the own-position region to `outputs`."""
    inner = [node for node in program.nodes if not any(out in own for out in node.outs)]
    needed = {s for node in inner for s in node.sources} | set(outputs)
    border = [
        Node(spread, (Slot(0), own[s], values[s].detach()), {}, (s,))
        for s in sorted(needed & own.keys() - {0})
    ]
    return Program(border + inner, [0], outputs, program.kinds)
