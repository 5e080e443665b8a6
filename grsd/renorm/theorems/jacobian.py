"""Blocks of a Jacobian along a path: their cross-operators, the coefficients of their motion, the reach of a flux.

The matrices of the proof of Theorem 1, step I, as arrays: J^(l) is (n, p_l), C_lm = J^(l)ᵀJ^(m), M = Σ J^(l)J^(l)ᵀ without
the factor 1/n, as the paper writes them. What bounds the norms of C_lm is in :mod:`grsd.renorm.theorems.envelope`, how the blocks of a
network are found in :mod:`grsd.renorm.diagnostics.blocks`, and which shells of M exchange energy in :mod:`grsd.dynamics.balance`.

Source: 2512.18209, appendix A.2, equations (10)–(17), (23) and (24).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Coefficients", "coefficients", "correlation_rate", "correlations", "flux_by_distance"]

Array = NDArray[np.float64]
Kind = Literal["scalar", "right", "left"]


def _blocks(blocks: Sequence[ArrayLike], name: str = "blocks") -> list[Array]:
    found = [np.asarray(block, dtype=np.float64) for block in blocks]
    if not found:
        raise ValueError(f"{name} is empty; expected the matrices J^(1), …, J^(L)")
    rows = found[0].shape[0] if found[0].ndim else 0
    for index, block in enumerate(found):
        if block.ndim != 2 or block.shape[0] != rows or not block.size:
            raise ValueError(
                f"{name}[{index}] has shape {block.shape}; expected ({rows}, parameters), one row per output"
            )
        if not np.isfinite(block).all():
            raise ValueError(f"{name}[{index}] holds values that are not finite")
    return found


def _pair(
    blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike]
) -> tuple[list[Array], list[Array]]:
    j, rate = _blocks(blocks), _blocks(rates, "rates")
    if [a.shape for a in j] != [a.shape for a in rate]:
        raise ValueError(
            f"blocks have shapes {[a.shape for a in j]}, rates {[a.shape for a in rate]}; they must agree"
        )
    return j, rate


def correlations(blocks: Sequence[ArrayLike]) -> list[list[Array]]:
    """Return C_lm = J^(l)ᵀJ^(m) as a list of rows, each entry (p_l, p_m). Cost: O(n P²) for P parameters."""
    j = _blocks(blocks)
    return [[a.T @ b for b in j] for a in j]


def correlation_rate(blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike]) -> list[list[Array]]:
    """Return Ċ_lm = J̇^(l)ᵀJ^(m) + J^(l)ᵀJ̇^(m), equation (14): the product rule, true of any path."""
    j, rate = _pair(blocks, rates)
    return [
        [da.T @ b + a.T @ db for b, db in zip(j, rate, strict=True)]
        for a, da in zip(j, rate, strict=True)
    ]


@dataclass(frozen=True)
class Coefficients:
    """J̇^(l) in terms of the blocks within distance K, in one of three readings of "span".

    Attributes
    ----------
    kind : "scalar", "right" or "left"
        J̇^(l) = Σ_p a_lp J^(p), = Σ_p J^(p)B_pl, or = Σ_p A_lp J^(p).
    band : int, K.
    parts : list of L dicts
        `parts[l][p]` for |p − l| ≤ K: a_lp as an array of shape (); B_pl (p_p, p_l), from the parameters of block l to those of p;
        A_lp (n, n), on function space.
    residuals : (L,), relative Frobenius norm of what the band leaves of J̇^(l); 0 where J̇^(l) = 0.
    remainders : (L,), operator norm of the same, not relative.
    ranks : (L,) int, of the system that was solved; "right" is vacuous where it is n.
    """

    kind: Kind
    band: int
    parts: list[dict[int, Array]]
    residuals: Array
    remainders: Array
    ranks: NDArray[np.int64]

    @property
    def row_sum(self) -> float:
        """C_A of equation (16): max_l Σ_p of the operator norms."""
        return max(sum(_norm(part) for part in row.values()) for row in self.parts)

    def rates(self, blocks: Sequence[ArrayLike]) -> list[Array]:
        """Return the J̇^(l) that these coefficients make of `blocks`."""
        j = self._fits(blocks)
        return [
            sum((self._apply(part, j[p]) for p, part in row.items()), np.zeros_like(j[i]))
            for i, row in enumerate(self.parts)
        ]

    def correlation_rate(self, blocks: Sequence[ArrayLike]) -> list[list[Array]]:
        """Return Ċ_lm with every coefficient in its place: the corrected equation (17).

        right: Σ_p B_plᵀC_pm + Σ_q C_lq B_qm. left: Σ_p J^(p)ᵀA_lpᵀJ^(m) + Σ_q J^(l)ᵀA_mqJ^(q). scalar: Σ_p a_lp C_pm + Σ_q a_mq C_lq.
        The left form is not a function of the C_lm alone.
        """
        j = self._fits(blocks)
        found = []
        for i, row in enumerate(self.parts):
            line = []
            for m, column in enumerate(self.parts):
                total = np.zeros((j[i].shape[1], j[m].shape[1]))
                for p, part in row.items():
                    total += self._between(j[p], part, j[m])
                for q, part in column.items():
                    total += self._between(j[q], part, j[i]).T
                line.append(total)
            found.append(line)
        return found

    def _between(self, moved: Array, part: Array, still: Array) -> Array:
        """(what `part` makes of `moved`)ᵀ `still`, with the coefficient where it stands."""
        if self.kind == "scalar":
            return part * (moved.T @ still)
        return part.T @ (moved.T @ still) if self.kind == "right" else moved.T @ part.T @ still

    def printed_rate(self, blocks: Sequence[ArrayLike]) -> list[list[Array]]:
        """Return Σ_p C_pm A_lpᵀ + Σ_q A_mq C_lq, equation (17) in the printed order.

        Raises
        ------
        ValueError
            If the products do not exist. With operators on function space they need n = p_l for every block.
        """
        j = self._fits(blocks)
        found = []
        for i, row in enumerate(self.parts):
            line = []
            for m, column in enumerate(self.parts):
                try:
                    total = sum(
                        (_times(j[p].T @ j[m], part.T) for p, part in row.items()), np.zeros(())
                    )
                    total = total + sum(
                        (_times(part, j[i].T @ j[q]) for q, part in column.items()), np.zeros(())
                    )
                except ValueError as error:
                    shapes = f"C is {j[i].shape[1]} × {j[m].shape[1]}, a coefficient {next(iter(row.values())).shape}"
                    raise ValueError(
                        f"equation (17) as printed has no meaning for these blocks: {shapes}"
                    ) from error
                line.append(np.asarray(total))
            found.append(line)
        return found

    def _apply(self, part: Array, block: Array) -> Array:
        if self.kind == "scalar":
            return part * block
        return block @ part if self.kind == "right" else part @ block

    def _fits(self, blocks: Sequence[ArrayLike]) -> list[Array]:
        j = _blocks(blocks)
        if len(j) != len(self.parts):
            raise ValueError(f"{len(j)} blocks for the coefficients of {len(self.parts)}")
        return j


def _norm(part: Array) -> float:
    return float(np.abs(part)) if part.ndim == 0 else float(np.linalg.norm(part, 2))


def _times(a: Array, b: Array) -> Array:
    return a * b if a.ndim == 0 or b.ndim == 0 else a @ b


def coefficients(
    blocks: Sequence[ArrayLike], rates: Sequence[ArrayLike], *, band: int, kind: Kind = "right"
) -> Coefficients:
    """Fit J̇^(l) by the blocks within distance K: least squares, the smallest coefficients where there is a choice.

    Parameters
    ----------
    blocks, rates : sequences of (n, p_l)
        J^(l) and J̇^(l).
    band : int
        K ≥ 0.
    kind : "right", "scalar" or "left"
        Only "right" exists for blocks of different sizes: the other two add a J^(p) to a J̇^(l), so their parameters must be
        numbered alike.

    Returns
    -------
    Coefficients
        Its residuals and its row sum belong together: either can be small at the price of the other.

    Raises
    ------
    ValueError
        Shapes that do not fit, a negative band, another kind, "scalar" or "left" with blocks of different sizes.

    Notes
    -----
    Cost: L dense least-squares problems, of at most n × P ("right"), P × n ("left"), np × (2K+1) ("scalar").
    """
    j, rate = _pair(blocks, rates)
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; expected 'scalar', 'right' or 'left'")
    if int(band) != band or band < 0:
        raise ValueError(f"band is {band!r}; expected a whole number from 0")
    if kind != "right" and len({a.shape for a in j}) > 1:
        raise ValueError(
            f"blocks have {sorted({a.shape[1] for a in j})} parameters: a {kind} coefficient adds blocks of one size. Use kind='right'"
        )
    parts, residuals, remainders, ranks = [], [], [], []
    for i, goal in enumerate(rate):
        near = [p for p in range(len(j)) if abs(p - i) <= band]
        system: Array
        aim: Array
        if kind == "right":
            system, aim = np.hstack([j[p] for p in near]), goal
        elif kind == "left":  # A [J^(p); …] = J̇^(l), transposed
            system, aim = np.vstack([j[p] for p in near]).T, goal.T
        else:
            system, aim = np.stack([j[p].ravel() for p in near], axis=1), goal.ravel()
        solution, _, rank, _ = np.linalg.lstsq(system, aim, rcond=None)
        rest = (aim - system @ solution).reshape(goal.shape if kind == "scalar" else aim.shape)
        residuals.append(
            float(np.linalg.norm(rest) / max(np.linalg.norm(goal), np.finfo(float).tiny))
        )
        remainders.append(float(np.linalg.norm(rest, 2)))
        ranks.append(int(rank))
        if kind == "scalar":
            parts.append({p: np.asarray(a) for p, a in zip(near, solution, strict=True)})
        else:
            cuts = np.cumsum([j[p].shape[1] if kind == "right" else len(goal) for p in near])[:-1]
            pieces = np.split(solution, cuts)
            parts.append(
                {
                    p: piece if kind == "right" else piece.T
                    for p, piece in zip(near, pieces, strict=True)
                }
            )
    return Coefficients(
        kind, int(band), parts, np.array(residuals), np.array(remainders), np.array(ranks)
    )


def flux_by_distance(exchange: ArrayLike) -> Array:
    """Split the flux through every edge by the distance of the two cells that exchange it, (c, c).

    Parameters
    ----------
    exchange : (c, c)
        `exchange[γ, β]` = F_{β→γ}, energy per time that γ receives from β, e.g. of :class:`grsd.dynamics.balance.ShellBalance`.

    Returns
    -------
    (c, c): entry [α, d] is the part of Σ_{γ≤α<β} F_{β→γ} with β − γ = d. Its sum over d is
    :func:`grsd.dynamics.balance.cumulative_flux`. A flux is local if only small d contribute.

    Raises
    ------
    ValueError
        If `exchange` is not square.
    """
    f = np.asarray(exchange, dtype=np.float64)
    if f.ndim != 2 or f.shape[0] != f.shape[1]:
        raise ValueError(f"exchange has shape {f.shape}; expected one row and one column per cell")
    found = np.zeros_like(f)
    for low in range(len(f)):
        for high in range(low + 1, len(f)):
            found[low:high, high - low] += f[low, high]
    return found
