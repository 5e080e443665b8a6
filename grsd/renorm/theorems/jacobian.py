"""Blocks of a Jacobian along a path: their cross-operators and the coefficients of their motion.

The matrices of the proof of Theorem 1, step I, as arrays: J^(l) is (n, p_l), C_lm = J^(l)ᵀJ^(m), M
= Σ J^(l)J^(l)ᵀ without the factor 1/n, as the paper writes them. How the blocks of a network are
found is in :mod:`grsd.renorm.diagnostics.blocks`, and which shells of M exchange energy in
:mod:`grsd.dynamics.balance`. Source: 2512.18209, appendix A.2, equations (10)–(17).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grsd import checks

__all__ = ["Coefficients", "coefficients", "correlation_rate", "correlations", "envelope"]

Array = NDArray[np.float64]
Kind = Literal["scalar", "right", "left"]


def _arrays(blocks: Sequence[ArrayLike], name: str = "blocks") -> list[Array]:
    arrays = [np.asarray(block, dtype=np.float64) for block in blocks]
    if not arrays:
        raise ValueError(f"{name} is empty; expected the matrices J^(1), …, J^(L)")
    for index, block in enumerate(arrays):
        checks.shape(f"{name}[{index}]", block, (len(arrays[0]), "parameters"))
        checks.finite(f"{name}[{index}]", block)
    return arrays


def _pair(
    blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike]
) -> tuple[list[Array], list[Array]]:
    j, rate = _arrays(blocks), _arrays(rates, "rates")
    shapes = [[a.shape for a in arrays] for arrays in (j, rate)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"blocks have shapes {shapes[0]}, rates {shapes[1]}; they must agree")
    return j, rate


def correlations(blocks: Sequence[ArrayLike]) -> list[list[Array]]:
    """Return C_lm = J^(l)ᵀJ^(m) as a list of rows, each entry (p_l, p_m). Cost: O(n P²)."""
    j = _arrays(blocks)
    return [[a.T @ b for b in j] for a in j]


def correlation_rate(blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike]) -> list[list[Array]]:
    """Return Ċ_lm = J̇^(l)ᵀJ^(m) + J^(l)ᵀJ̇^(m), equation (14): true of any path."""
    pairs = list(zip(*_pair(blocks, rates), strict=True))
    return [[da.T @ b + a.T @ db for b, db in pairs] for a, da in pairs]


def envelope(blocks: Sequence[ArrayLike]) -> Array:
    """Return u_k = max over |l − m| = k of ‖C_lm‖, (L,): the profile that equation (19) is about.

    Cost: L²/2 singular values; O(n L²) for blocks of one parameter.
    """
    j = _arrays(blocks)
    count = len(j)
    if all(block.shape[1] == 1 for block in j):  # one product instead of L²
        whole = np.hstack(j)
        sizes = np.abs(whole.T @ whole)
        return np.array([np.diagonal(sizes, k).max() for k in range(count)])
    norms = [
        [float(np.linalg.norm(j[i].T @ j[i + k], 2)) for i in range(count - k)]
        for k in range(count)
    ]
    return np.array([max(row) for row in norms])


@dataclass(frozen=True)
class Coefficients:
    """J̇^(l) in terms of the blocks within distance K, in one of three readings of "span".

    `parts[l][p]` for |p − l| ≤ K is, by kind, scalar: a_lp, shape (), in J̇^(l) = Σ_p a_lp J^(p);
    right: B_pl, (p_p, p_l), in Σ_p J^(p)B_pl, from the parameters of block l to those of p; left:
    A_lp, (n, n), on function space, in Σ_p A_lp J^(p).
    """

    kind: Kind
    band: int  # K
    parts: list[dict[int, Array]]  # L dicts
    residuals: Array  # (L,), relative Frobenius norm of what the band leaves of J̇^(l)
    remainders: Array  # (L,), operator norm of the same, not relative
    ranks: NDArray[np.int64]  # (L,), of the system solved; "right" is vacuous where it is n

    @property
    def row_sum(self) -> float:
        """C_A of equation (16): max_l Σ_p of the operator norms."""
        norms = [
            [float(np.linalg.norm(np.atleast_2d(part), 2)) for part in row.values()]
            for row in self.parts
        ]
        return max(map(sum, norms))

    def rates(self, blocks: Sequence[ArrayLike]) -> list[Array]:
        """Return the J̇^(l) that these coefficients make of `blocks`."""
        j = _arrays(blocks)
        if len(j) != len(self.parts):
            raise ValueError(f"{len(j)} blocks for the coefficients of {len(self.parts)}")
        moved = [np.zeros_like(block) for block in j]
        for total, row in zip(moved, self.parts, strict=True):
            for p, part in row.items():  # np.dot multiplies by a number as well
                total += j[p] @ part if self.kind == "right" else np.dot(part, j[p])
        return moved


def coefficients(
    blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike], *, band: int, kind: Kind = "right"
) -> Coefficients:
    """Fit J̇^(l) by the blocks within distance `band`: least squares of smallest norm.

    Only kind "right" exists for blocks of different sizes: the other two add a J^(p) to a J̇^(l),
    so their parameters must be numbered alike. Residuals and row sum of the result belong together:
    either can be small at the price of the other. Cost: L dense least-squares problems, of at most
    n × P ("right"), P × n ("left"), np × (2K+1) ("scalar").
    """
    j, rate = _pair(blocks, rates)
    checks.one_of("kind", kind, get_args(Kind))
    band = checks.whole("band", band)
    if kind != "right" and len({a.shape for a in j}) > 1:
        raise ValueError(
            f"blocks have {sorted({a.shape[1] for a in j})} parameters: a {kind} coefficient adds "
            "blocks of one size. Use kind='right'"
        )
    parts, residuals, remainders, ranks = [], [], [], []
    for i, goal in enumerate(rate):
        near = range(max(0, i - band), min(len(j), i + band + 1))
        # the neighbours as columns of one system: A [J^(p); …] = J̇^(l) is transposed, scalars act
        # on raveled blocks
        system, aim = np.hstack([j[p] for p in near]), goal
        if kind == "left":
            system, aim = np.vstack([j[p] for p in near]).T, goal.T
        elif kind == "scalar":
            system, aim = np.stack([j[p].ravel() for p in near], axis=1), goal.ravel()
        solution, _, rank, _ = np.linalg.lstsq(system, aim, rcond=None)
        rest = (aim - system @ solution).reshape(goal.shape if kind == "scalar" else aim.shape)
        size = max(float(np.linalg.norm(goal)), np.finfo(float).tiny)
        residuals.append(float(np.linalg.norm(rest)) / size)
        remainders.append(float(np.linalg.norm(rest, 2)))
        ranks.append(int(rank))
        widths = [{"right": j[p].shape[1], "left": len(goal), "scalar": 1}[kind] for p in near]
        pieces = np.split(solution, np.cumsum(widths)[:-1])
        if kind == "scalar":
            pieces = [piece.reshape(()) for piece in pieces]
        parts.append({p: x.T if kind == "left" else x for p, x in zip(near, pieces, strict=True)})
    return Coefficients(kind, band, parts, *map(np.array, (residuals, remainders, ranks)))
