"""Diagnostic D1, locality of the Jacobian's motion: how much of J̇^(l) comes from parameters far from block l.

Condition 1 of 2512.18209 says J̇^(l) ∈ span{J^(m) : |m − l| ≤ K} and leaves open with which coefficients. `bandedness` measures three
readings side by side: the motion itself, J̇^(l) = Σ_m G_lm with the tail B_l(K) = ‖Σ_{|m−l|>K} G_lm‖/‖J̇^(l)‖; scalar coefficients, which
exist between blocks of one shape; and operators on the parameter side, J̇^(l) = Σ_m J^(m)B_m, whose residual is never shown without the
norm of the coefficients and the rank that makes it empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grsd.renorm.diagnostics.block_matrices import Grams
from grsd.renorm.diagnostics.blocks import Blocks

__all__ = ["Bandedness", "RightSpan", "bandedness", "right_span"]


@dataclass(frozen=True)
class RightSpan:
    """J̇^(l) = Σ_{|m−l|≤K} J^(m)B_m + rest, with the smallest B, by block and K in `bands`.

    Attributes
    ----------
    residual : (L, k), ‖rest‖_F/‖J̇^(l)‖_F. Read from squares: values below 1e-7 or so are zero.
    coefficient : (L, k), ‖B‖_op in 1/time: how fast the neighbours would have to turn into J̇^(l).
    rank : (L, k) int, of the neighbours' range, out of T. Where it is T, the residual is 0 whatever J̇^(l) is.
    rows : int, T.
    """

    residual: np.ndarray
    coefficient: np.ndarray
    rank: np.ndarray
    rows: int

    @property
    def vacuous(self) -> np.ndarray:
        """(L, k) bool: the neighbours span all of function space, so membership says nothing."""
        found: np.ndarray = self.rank == self.rows
        return found


@dataclass(frozen=True)
class Bandedness:
    """How far J̇^(l) reaches, in three readings of Condition 1. Rows are blocks l.

    Attributes
    ----------
    names : tuple of str, the L blocks.
    parts, parts_error : (L, L), ‖G_lm‖_F/‖J̇^(l)‖_F, column m. Parts may cancel, so their squares need not sum to 1.
    tails, tails_error : (L, L), B_l(K), column K = 0 … L − 1; the last is 0.
    pooled, pooled_error : (L,), √(Σ_l ‖tail_l(K)‖²/Σ_l ‖J̇^(l)‖²): one number a K.
    mixture : (L, L), Σ_l ⟨G_lm, G_lk⟩/Σ_l ‖J̇^(l)‖², column m by column k: how much of all motion is owed to blocks m and k. Sums to 1.
    norms : (L,), ‖J̇^(l)‖_F/√n, per time. A block that does not move has nan in its row.
    bands : tuple of int, the K of `scalar` and `right`.
    scalar : (L, k), least ‖J̇^(l) − Σ a_m J^(m)‖_F/‖J̇^(l)‖_F over the blocks m within K that have the shapes of block l.
    alike : (L, k) int, how many those are, l itself among them.
    right : RightSpan or None, where T × T matrices were at hand.
    probes : int, random output vectors used; 0 for the exact value from all T rows.
    passes : int, forward passes spent.
    """

    names: tuple[str, ...]
    parts: np.ndarray
    parts_error: np.ndarray
    tails: np.ndarray
    tails_error: np.ndarray
    pooled: np.ndarray
    pooled_error: np.ndarray
    mixture: np.ndarray
    norms: np.ndarray
    bands: tuple[int, ...]
    scalar: np.ndarray
    alike: np.ndarray
    right: RightSpan | None
    probes: int
    passes: int

    @property
    def worst(self) -> np.ndarray:
        """(L,), max_l B_l(K), what the condition bounds."""
        found: np.ndarray = np.nanmax(self.tails, axis=0)
        return found

    @property
    def unlocal(self) -> np.ndarray:
        """(L,), what `pooled` would be if distance played no part: all J̇^(l) made of the others' motion in one and the same mixture.

        The mixture is the measured one, averaged over l (`mixture`), so that blocks that move faster count for more. A tail
        below this line is locality; a tail that only falls with K is not.
        """
        count = len(self.names)
        weight = np.nan_to_num(self.norms) ** 2
        place = np.arange(count)
        found = np.zeros(count)
        for band in place:
            far = (np.abs(place[:, None] - place[None, :]) > band).astype(float)
            found[band] = weight @ np.einsum("im,mk,ik->i", far, self.mixture, far) / weight.sum()
        result: np.ndarray = np.sqrt(np.maximum(found, 0.0))
        return result


def _ratio(top: np.ndarray, bottom: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """√(Σ top/Σ bottom) over the first axis (probes), and its jackknife standard error."""
    above, below = top.sum(axis=0), bottom.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.sqrt(above / below)
        if exact:
            return value, np.zeros_like(value)
        count = len(top)
        without = np.sqrt(np.maximum(above - top, 0.0) / (below - bottom))
        error = np.sqrt((count - 1) / count * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    return value, error


def _scalar(
    gram: np.ndarray, lean: np.ndarray, square: np.ndarray, shapes: tuple, bands: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares residual of J̇^(l) by multiples of the J^(m) of its shape, from inner products."""
    count = len(square)
    residual, alike = (
        np.full((count, len(bands)), np.nan),
        np.zeros((count, len(bands)), dtype=np.int64),
    )
    for i in range(count):
        for k, band in enumerate(bands):
            near = [m for m in range(count) if abs(m - i) <= band and shapes[m] == shapes[i]]
            alike[i, k] = len(near)
            if square[i] > 0:
                system, aim = gram[np.ix_(near, near)], lean[i, near]
                solution = np.linalg.lstsq(system, aim, rcond=1e-12)[0]
                residual[i, k] = np.sqrt(max(0.0, 1 - float(aim @ solution) / square[i]))
    return residual, alike


def right_span(found: Grams, bands: tuple[int, ...]) -> RightSpan:
    """Express every J̇^(l) by operators on the parameters of the blocks within K.

    With M_K = Σ_{|m−l|≤K} M^(m) = VΛVᵀ on its range, the residual is that of R^(l) outside the range, and the smallest B has
    ‖B‖² = λ_max(Λ^{-1/2}Vᵀ R^(l) V Λ^{-1/2}). Cost: L·k eigenproblems of size T.
    """
    count, rows = len(found.names), found.kernel.shape[0]
    residual, coefficient = (
        np.full((count, len(bands)), np.nan),
        np.full((count, len(bands)), np.nan),
    )
    rank = np.zeros((count, len(bands)), dtype=np.int64)
    for i in range(count):
        total = float(np.trace(found.rates[i]))
        for k, band in enumerate(bands):
            values, vectors = np.linalg.eigh(
                found.kernels[max(0, i - band) : i + band + 1].sum(axis=0)
            )
            held = values > rows * found.eps * max(float(values[-1]), np.finfo(float).tiny)
            rank[i, k] = int(held.sum())
            if total > 0 and held.any():
                outside = vectors[:, ~held]
                residual[i, k] = np.sqrt(
                    max(0.0, float(np.trace(outside.T @ found.rates[i] @ outside))) / total
                )
                whitened = vectors[:, held] / np.sqrt(values[held])
                coefficient[i, k] = np.sqrt(
                    np.linalg.norm(whitened.T @ found.rates[i] @ whitened, 2)
                )
    return RightSpan(residual, coefficient, rank, rows)


def bandedness(
    blocks: Blocks,
    *,
    probes: int | None = None,
    bands: tuple[int, ...] | None = None,
    grams: Grams | None = None,
    seed: int = 0,
) -> Bandedness:
    """Measure D1 at one instant.

    Parameters
    ----------
    blocks : Blocks
    probes : int, optional
        Random sign vectors u on the outputs: E‖Gᵀu‖² = ‖G‖_F². By default all T unit vectors instead, which is exact.
    bands : tuple of int, optional
        K of the scalar and the right-operator reading; by default 0, 1, 2 and L − 1.
    grams : Grams, optional
        Of the same blocks, for the right-operator reading.
    seed : int

    Returns
    -------
    Bandedness

    Raises
    ------
    ValueError
        Fewer than two probes; J̇ = 0, whose parts have no shares: a model that is linear in its parameters, or a flow that has
        come to rest.

    Notes
    -----
    Standard errors are jackknifed over probes. Cost: 4 + 6 L forward passes a probe and L·P numbers of memory; the error of
    B falls like 1/√probes, and 16 probes give about a tenth of B or better. Source: 2512.18209, Condition 1.
    """
    before, count = blocks.passes, len(blocks)
    if probes is not None and probes < 2:
        raise ValueError(
            f"probes is {probes}: two or more are needed for a standard error, or None for the exact value"
        )
    chosen = (
        bands
        if bands is not None
        else tuple(sorted({min(k, count - 1) for k in (0, 1, 2, count - 1)}))
    )
    if any(k < 0 for k in chosen):
        raise ValueError(f"bands are {chosen}: a distance between blocks is 0 or more")
    if probes is None:
        vectors = torch.eye(blocks.size, dtype=blocks.dtype, device=blocks.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (probes, blocks.size), generator=generator) * 2 - 1
        vectors = signs.to(blocks.device, blocks.dtype)
    parts, tails = np.zeros((len(vectors), count, count)), np.zeros((len(vectors), count, count))
    squares = np.zeros((len(vectors), count))
    gram, lean, mixture = (np.zeros((count, count)) for _ in range(3))
    for p, u in enumerate(vectors):
        pieces, pulled = blocks.pieces(u), blocks.vjp(u)
        for i in range(count):
            stack = torch.stack([piece[i] for piece in pieces])
            before_m = torch.cat([torch.zeros_like(stack[:1]), stack.cumsum(0)])
            whole = before_m[-1]
            parts[p, i] = stack.square().sum(1).cpu().numpy()
            squares[p, i] = float(whole.square().sum())
            mixture += (stack @ stack.T).cpu().numpy()
            for band in range(count - 1):
                outside = before_m[max(0, i - band)] + whole - before_m[min(count, i + band + 1)]
                if i - band > 0 or i + band + 1 < count:
                    tails[p, i, band] = float(outside.square().sum())
            for m in range(count):
                if blocks.shapes[m] == blocks.shapes[i]:
                    gram[i, m] += float(pulled[i] @ pulled[m])
                    lean[i, m] += float(whole @ pulled[m])
    if not squares.any():
        raise ValueError(
            "J̇ = 0: the model is linear in its parameters, or nothing moves them (zero error); locality of no motion is no statement"
        )
    exact = probes is None
    share, share_error = _ratio(parts, squares[:, :, None], exact)
    tail, tail_error = _ratio(tails, squares[:, :, None], exact)
    pooled, pooled_error = _ratio(tails.sum(axis=1), squares.sum(axis=1)[:, None], exact)
    scalar, alike = _scalar(gram, lean, squares.sum(axis=0), blocks.shapes, chosen)
    weight = 1 if exact else len(vectors)
    return Bandedness(
        names=blocks.names,
        parts=share,
        parts_error=share_error,
        tails=tail,
        tails_error=tail_error,
        pooled=pooled,
        pooled_error=pooled_error,
        mixture=mixture / squares.sum(),
        norms=np.where(
            squares.any(axis=0), np.sqrt(squares.sum(axis=0) / weight / blocks.samples), np.nan
        ),
        bands=chosen,
        scalar=scalar,
        alike=alike,
        right=right_span(grams, chosen) if grams is not None else None,
        probes=0 if exact else len(vectors),
        passes=blocks.passes - before,
    )
