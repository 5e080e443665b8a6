"""Diagnostic D1, locality: how much of J̇^(l) comes from parameters far from block l.

Condition 1 of 2512.18209 says J̇^(l) ∈ span{J^(m) : |m − l| ≤ K} and leaves open with which
coefficients. `bandedness` measures three readings side by side: the motion itself, J̇^(l) = Σ_m
G_lm with the tail B_l(K) = ‖Σ_{|m−l|>K} G_lm‖/‖J̇^(l)‖; scalar coefficients, which exist between
blocks of one shape; and operators on the parameter side, J̇^(l) = Σ_m J^(m)B_m, whose residual is
never shown without the norm of the coefficients and the rank that makes it empty.

Invariances. All shares keep their values under scales of outputs, loss and time and orders of
samples, and the tails under orders of units; scalar coefficients between blocks do not, since they
compare parameters place by place. A rescaling of layers that keeps the function of a ReLU net
changes every one: which block a motion belongs to is a matter of coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grsd import checks, statistics
from grsd.renorm.diagnostics.block_matrices import BlockMatrices
from grsd.renorm.diagnostics.blocks import Blocks

__all__ = ["Bandedness", "RightSpan", "bandedness", "right_span"]

Bands = tuple[int, ...]


@dataclass(frozen=True)
class RightSpan:
    """J̇^(l) = Σ_{|m−l|≤K} J^(m)B_m + rest, with the smallest B, by block and K in `bands`."""

    residual: np.ndarray  # (L, k), ‖rest‖_F/‖J̇^(l)‖_F, from squares: below 1e-7 or so it is zero
    coefficient: np.ndarray  # (L, k), ‖B‖_op, 1/time: how fast neighbours would turn into J̇^(l)
    rank: np.ndarray  # (L, k) int, of the neighbours' range
    full: int  # rank of M, all blocks: T, less what repeated samples or zero outputs take away

    @property
    def vacuous(self) -> np.ndarray:
        """(L, k) bool: the neighbours span what all blocks span, so distance plays no part.

        Where `full` is T, or the rows of J̇ have the repetitions of those of J, any motion is a
        member, and `residual` is 0.
        """
        return np.asarray(self.rank >= self.full)


@dataclass(frozen=True)
class Bandedness:
    """How far J̇^(l) reaches, in three readings of Condition 1. Rows are blocks l, columns m or K.

    A block that does not move has nan in its row. Parts may cancel: their squares need not sum to
    1.
    """

    names: tuple[str, ...]  # the L blocks
    parts: np.ndarray  # (L, L), ‖G_lm‖_F/‖J̇^(l)‖_F
    parts_error: np.ndarray
    tails: np.ndarray  # (L, L), B_l(K), K = 0 … L − 1; the last is 0
    tails_error: np.ndarray
    pooled: np.ndarray  # (L,), √(Σ_l ‖tail_l(K)‖²/Σ_l ‖J̇^(l)‖²): one number a K
    pooled_error: np.ndarray
    mixture: np.ndarray  # (L, L), Σ_l ⟨G_lm, G_lk⟩/Σ_l ‖J̇^(l)‖² over l ≠ m, k: what others owe them
    norms: np.ndarray  # (L,), ‖J̇^(l)‖_F/√n, per time
    bands: Bands  # K of `scalar` and `right`
    scalar: np.ndarray  # (L, k), least ‖J̇^(l) − Σ a_m J^(m)‖_F/‖J̇^(l)‖_F over m alike within K
    alike: np.ndarray  # (L, k) int, how many have the shapes of block l, itself among them
    right: RightSpan | None  # where T × T matrices were at hand
    probes: int  # random output vectors used; 0 for the exact value from all T rows
    passes: int  # forward passes spent

    @property
    def worst(self) -> np.ndarray:
        """(L,), max_l B_l(K), what the condition bounds."""
        return np.nanmax(self.tails, axis=0)

    @property
    def unlocal(self) -> np.ndarray:
        """(L,), what `pooled` would be if distance played no part.

        Every J̇^(l) is then made of the motion of the *other* blocks in one and the same mixture:
        the measured one, averaged over the blocks that are others (`mixture`), so that blocks that
        move faster count for more. What J̇^(l) owes to others in all, the tail at K = 0, is kept as
        measured: a block that enters linearly has G_ll = 0, and that is no distance.
        A tail below this line is locality; a tail that only falls with K is not.
        """
        place = np.arange(len(self.names))
        distance = np.abs(place[:, None] - place[None, :])
        far = (distance[None] > place[:, None, None]).astype(float)  # (K, l, m)
        squares = np.maximum(np.einsum("Kim,mk,Kik->Ki", far, self.mixture, far), 0.0)
        shares = squares / np.maximum(squares[0], np.finfo(float).tiny)
        weight = np.nan_to_num(self.norms) ** 2
        return np.sqrt(shares @ (weight * np.nan_to_num(self.tails[:, 0]) ** 2) / weight.sum())


def _ratio(top: np.ndarray, bottom: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """√(Σ top/Σ bottom) over the first axis (probes), and its jackknife standard error."""

    def root(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(a.sum(axis=0) / b.sum(axis=0))

    with np.errstate(invalid="ignore", divide="ignore"):
        if exact:
            return (value := root(top, bottom)), np.zeros_like(value)
        return statistics.jackknife(root, top, bottom)


def _scalar(
    gram: np.ndarray, lean: np.ndarray, square: np.ndarray, shapes: tuple, bands: Bands
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares residual of J̇^(l) by multiples of the J^(m) of its shape."""
    count = len(square)
    residual = np.full((count, len(bands)), np.nan)
    alike = np.zeros((count, len(bands)), dtype=np.int64)
    for i, k in np.ndindex(residual.shape):
        near = [m for m in range(count) if abs(m - i) <= bands[k] and shapes[m] == shapes[i]]
        alike[i, k] = len(near)
        if square[i] > 0:
            aim = lean[i, near]
            solution = np.linalg.lstsq(gram[np.ix_(near, near)], aim, rcond=1e-12)[0]
            residual[i, k] = math.sqrt(max(0.0, 1 - float(aim @ solution) / float(square[i])))
    return residual, alike


def right_span(matrices: BlockMatrices, bands: Bands) -> RightSpan:
    """Express every J̇^(l) by operators on the parameters of the blocks within K.

    With M_K = Σ_{|m−l|≤K} M^(m) = VΛVᵀ on its range, the residual is that of R^(l) outside the
    range, and the smallest B has ‖B‖² = λ_max(Λ^{-1/2}Vᵀ R^(l) V Λ^{-1/2}). Cost: L·k eigenproblems
    of size T.
    """
    count, rows = len(matrices.names), len(matrices.drive)

    def spanned(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues, eigenvectors, and which of them are above rounding."""
        values, vectors = np.linalg.eigh(kernel)
        least = rows * matrices.eps * max(float(values[-1]), np.finfo(float).tiny)
        return values, vectors, values > least

    residual, coefficient = np.full((2, count, len(bands)), np.nan)
    rank = np.zeros((count, len(bands)), dtype=np.int64)
    for i, k in np.ndindex(rank.shape):
        near = matrices.kernels[max(0, i - bands[k]) : i + bands[k] + 1].sum(axis=0)
        values, vectors, held = spanned(near)
        rank[i, k] = int(held.sum())
        moved = matrices.rates[i]
        if (total := float(np.trace(moved))) > 0 and held.any():
            outside = vectors[:, ~held]
            left = max(0.0, float(np.trace(outside.T @ moved @ outside)))
            residual[i, k] = np.sqrt(left / total)
            whitened = vectors[:, held] / np.sqrt(values[held])
            coefficient[i, k] = np.sqrt(np.linalg.norm(whitened.T @ moved @ whitened, 2))
    return RightSpan(residual, coefficient, rank, int(spanned(matrices.kernel)[2].sum()))


def _probes(blocks: Blocks, probes: int | None, seed: int) -> Tensor:
    """Output vectors u as rows: random signs, E uuᵀ = 1, or for None the identity, Σ uuᵀ = 1."""
    if probes is None:
        return torch.eye(blocks.size, dtype=blocks.dtype, device=blocks.device)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, blocks.size), generator=generator) * 2 - 1
    return signs.to(blocks.device, blocks.dtype)


def bandedness(
    blocks: Blocks,
    *,
    probes: int | None = None,
    bands: Bands | None = None,
    matrices: BlockMatrices | None = None,
    seed: int = 0,
) -> Bandedness:
    """Measure D1 at one instant.

    Parameters
    ----------
    probes : int, optional
        Random sign vectors u on the outputs: E‖Gᵀu‖² = ‖G‖_F². By default all T unit vectors
        instead, which is exact.
    bands : tuple of int, optional
        K of the scalar and the right-operator reading; by default 0, 1, 2 and L − 1.
    matrices : BlockMatrices, optional
        Of the same blocks, for the right-operator reading.

    Raises
    ------
    ValueError
        Fewer than two probes; J̇ = 0, whose parts have no shares: a model that is linear in its
        parameters, or a flow that has come to rest.

    Notes
    -----
    Standard errors are jackknifed over probes. Cost: 4 + 6 L forward passes a probe and L·P numbers
    of memory; the error of B falls like 1/√probes, and 16 probes give about a tenth of B or better.
    Source: 2512.18209, Condition 1.
    """
    before, count, exact = blocks.passes, len(blocks), probes is None
    check_probes(probes)
    if bands is None:
        bands = tuple(sorted({min(k, count - 1) for k in (0, 1, 2, count - 1)}))
    checks.at_least("bands", bands, 0, "a distance between blocks is 0 or more")
    vectors = _probes(blocks, probes, seed)

    # inner products over all probes: squares of G_lm, of the tails and of J̇^(l), one a probe for
    # the errors;
    # ⟨G_lm, G_lk⟩, ⟨J^(l), J^(m)⟩ and ⟨J̇^(l), J^(m)⟩ summed
    parts, tails = np.zeros((2, len(vectors), count, count))
    squares = np.zeros((len(vectors), count))
    mixture, gram, lean = np.zeros((3, count, count))
    for p, u in enumerate(vectors):
        pieces, pulled = blocks.pieces(u), blocks.vjp(u)
        for i in range(count):
            moved = torch.stack([piece[i] for piece in pieces])  # Gᵀu of block i, row m
            # sums over m < k: the part beyond a band is a difference of them
            sums = torch.cat([torch.zeros_like(moved[:1]), moved.cumsum(0)])
            whole = sums[-1]
            parts[p, i] = moved.square().sum(1).cpu().numpy()
            squares[p, i] = float(whole.square().sum())
            shared = (moved @ moved.T).cpu().numpy()
            shared[i, :] = shared[:, i] = 0.0  # what block i owes to itself is none of the others'
            mixture += shared
            for band in range(count - 1):
                low, high = max(0, i - band), min(count, i + band + 1)
                if low > 0 or high < count:
                    tails[p, i, band] = float((sums[low] + whole - sums[high]).square().sum())
            for m in range(count):
                if blocks.shapes[m] == blocks.shapes[i]:
                    gram[i, m] += float(pulled[i] @ pulled[m])
                    lean[i, m] += float(whole @ pulled[m])
    if not squares.any():
        raise ValueError(
            "J̇ = 0: the model is linear in its parameters, or nothing moves them (zero error); "
            "locality of no motion is no statement"
        )
    square = squares.sum(axis=0)
    scalar, alike = _scalar(gram, lean, square, blocks.shapes, bands)
    # Σ_l ‖J̇^(l)‖² over the blocks l other than m and k
    others = square.sum() - square[:, None] - square[None, :] + np.diag(square)
    mixture = np.where(others > 0, mixture / np.where(others > 0, others, 1.0), 0.0)
    samples = blocks.samples * (1 if exact else len(vectors))
    return Bandedness(
        blocks.names,
        *_ratio(parts, squares[:, :, None], exact),
        *_ratio(tails, squares[:, :, None], exact),
        *_ratio(tails.sum(axis=1), squares.sum(axis=1)[:, None], exact),
        mixture=mixture,
        norms=np.where(square > 0, np.sqrt(square / samples), np.nan),
        bands=bands,
        scalar=scalar,
        alike=alike,
        right=None if matrices is None else right_span(matrices, bands),
        probes=0 if exact else len(vectors),
        passes=blocks.passes - before,
    )


def check_probes(probes: int | None) -> None:
    """Refuse a single probe."""
    why = "two or more are needed for a standard error, or None for the exact value"
    checks.at_least("probes", 2 if probes is None else probes, 2, why)
