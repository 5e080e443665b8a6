"""The envelope of block correlations, u_k = max over |l − m| = k of ‖C_lm‖: what bounds its growth along a path.

With coefficients of bounded row sums, and only then, the envelope obeys a linear comparison system, and Grönwall's inequality
bounds it. `banded_process` makes paths that satisfy every premise. The coefficients themselves are in
:mod:`grsd.renorm.theorems.jacobian`.

Source: 2512.18209, appendix A.2, equations (18)–(22).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from grsd.renorm.theorems.jacobian import correlations

__all__ = ["Gronwall", "Process", "banded_process", "comparison", "envelope", "gronwall"]

Array = NDArray[np.float64]


def envelope(blocks: Sequence[ArrayLike]) -> Array:
    """Return u_k = max over |l − m| = k of ‖C_lm‖, (L,): the distance profile that equation (19) is about.

    Cost: L²/2 singular values; O(n L²) for blocks of one parameter.
    """
    count = len(blocks)
    if all(np.shape(block)[1:] == (1,) for block in blocks):  # one product instead of L²
        (sizes,) = (
            np.abs(row)
            for row in correlations([np.hstack([np.asarray(b, dtype=np.float64) for b in blocks])])[
                0
            ]
        )
        return np.array([np.diagonal(sizes, k).max() for k in range(count)])
    cross = correlations(blocks)
    return np.array(
        [
            max(float(np.linalg.norm(cross[i][i + k], 2)) for i in range(count - k))
            for k in range(count)
        ]
    )


def _start(start: ArrayLike, band: int, row_sum: float, time: float) -> Array:
    u = np.asarray(start, dtype=np.float64)
    if u.ndim != 1 or not u.size or not np.isfinite(u).all() or (u < 0).any():
        raise ValueError(
            f"start must be u_0, u_1, …, finite and not negative; got shape {u.shape}, smallest {u.min(initial=0)}"
        )
    if int(band) != band or band < 0:
        raise ValueError(f"band is {band!r}; expected a whole number from 0")
    for name, value in (("row_sum", row_sum), ("time", time)):
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}; expected a finite number from 0")
    return u


def comparison(
    start: ArrayLike, *, band: int, row_sum: float, time: float, decreasing: bool = False
) -> Array:
    """Return y(time) of the comparison system of the envelope, (L,): u_k(t) ≤ y_k(time) for every t ≤ time.

    Parameters
    ----------
    start : (L,), y(0) ≥ u(0).
    band : int, K.
    row_sum : float
        C_A, a bound on the row sums of scalar or right coefficients at all times.
    time : float
    decreasing : bool
        False: ẏ_k = 2C_A Σ_{|j|≤K} y_{k+j}, equation (19) with equality. True: ẏ_k = 2C_A y_{max(k−K, 0)}, started at the
        decreasing majorant max_{j≥k} start_j, which bounds the same envelopes and grows with the rate 2C_A instead of
        2(2K+1)C_A.

    Notes
    -----
    The entries of the matrix are not negative, so y never decreases. Distances of L and beyond do not occur. Cost: one matrix
    exponential of L × L.
    """
    u = _start(start, band, row_sum, time)
    size = len(u)
    if decreasing:
        generator = np.zeros((size, size))
        generator[np.arange(size), np.maximum(np.arange(size) - band, 0)] = 1.0
        u = np.maximum.accumulate(u[::-1])[::-1]
    else:
        generator = (np.abs(np.subtract.outer(np.arange(size), np.arange(size))) <= band).astype(
            np.float64
        )
    found: Array = expm(2.0 * row_sum * time * generator) @ u
    return found


class Gronwall(NamedTuple):
    """A bound on Σ ρᵏ u_k."""

    rate: float  # C_ρ = 2 C_A Σ_{|j|≤K} ρ^{−j}, 1/time
    start: float  # U(0) = Σ ρᵏ u_k(0)
    bound: float  # U(0) e^{C_ρ time}


def gronwall(
    start: ArrayLike, *, band: int, row_sum: float, time: float, rho: float = 1.0
) -> Gronwall:
    """Return Grönwall's bound on U = Σ ρᵏ y_k(time), equations (20) and (21), for any ρ > 0.

    ρ = 1 bounds the sum of the envelope. ρ > 1 bounds a geometric tail, u_k ≤ ρ⁻ᵏ · bound. ρ < 1, the paper's choice, allows
    u_k to grow like ρ⁻ᵏ.

    Raises
    ------
    ValueError
        If ρ is not positive, or an argument is out of range.
    """
    u = _start(start, band, row_sum, time)
    if not np.isfinite(rho) or rho <= 0:
        raise ValueError(f"rho is {rho!r}; expected a positive number: the weights are ρᵏ")
    rate = 2.0 * row_sum * float(np.sum(rho ** -np.arange(-band, band + 1, dtype=np.float64)))
    total = float(np.sum(rho ** np.arange(len(u), dtype=np.float64) * u))
    return Gronwall(rate, total, total * float(np.exp(rate * time)))


@dataclass(frozen=True)
class Process:
    """A path of blocks that obeys J̇^(l) = Σ_{|p−l|≤K} J^(p)B_pl(t).

    Attributes
    ----------
    times : (k,)
    blocks : (k, L, n, p).
    row_sum : float. C_A, an upper bound on max_m Σ_q ‖B_qm(t)‖ at all times.
    """

    times: Array
    blocks: Array
    row_sum: float


def banded_process(
    start: ArrayLike,
    times: ArrayLike,
    *,
    band: int,
    row_sum: float,
    seed: int,
    frequency: float = 2.0,
) -> Process:
    """Integrate a random banded process with right coefficients: the null of the envelope inequality.

    Parameters
    ----------
    start : (L, n, p)
        The blocks at `times[0]`.
    times : (k,), ascending.
    band : int, K.
    row_sum : float
        C_A: B_pl(t) = B′ cos ωt + B″ sin ωt with normal B′, B″, scaled so that Σ_p (‖B′_pl‖² + ‖B″_pl‖²)^½ = C_A for every l.
    seed : int
    frequency : float, ω.

    Returns
    -------
    Process

    Raises
    ------
    ValueError
        Arguments out of range, or an integration that fails.
    """
    begin = np.asarray(start, dtype=np.float64)
    grid = np.asarray(times, dtype=np.float64)
    if begin.ndim != 3 or not begin.size:
        raise ValueError(f"start has shape {begin.shape}; expected (blocks, outputs, parameters)")
    if grid.ndim != 1 or len(grid) < 2 or (np.diff(grid) <= 0).any():
        raise ValueError(f"times must be two or more ascending numbers, got {grid!r}")
    _start([1.0], band, row_sum, 0.0)
    count, n, size = begin.shape
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((2, count, count, size, size))  # [phase, p, l] = B_pl
    near = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) <= band
    parts *= near[None, :, :, None, None]
    norms = np.linalg.norm(parts, 2, axis=(-2, -1))
    parts *= (row_sum / np.sqrt((norms**2).sum(0)).sum(0))[None, None, :, None, None]

    def rate(t: float, state: Array) -> Array:
        mixed = np.cos(frequency * t) * parts[0] + np.sin(frequency * t) * parts[1]
        moved: Array = np.einsum("pna,plab->lnb", state.reshape(begin.shape), mixed).ravel()
        return moved

    done = solve_ivp(
        rate,
        (grid[0], grid[-1]),
        begin.ravel(),
        method="DOP853",
        t_eval=grid,
        rtol=1e-11,
        atol=1e-13,
    )
    if not done.success:
        raise ValueError(f"the integration stopped at t = {done.t[-1]:.4g}: {done.message}")
    return Process(
        grid, np.ascontiguousarray(done.y.T).reshape(len(grid), count, n, size), float(row_sum)
    )
