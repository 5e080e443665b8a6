"""Diagnostics D5 to D7: how the speeds ṡ = λ̇/λ of the modes depend on λ and on time.

The law of 2512.18209 is (S), v = λ c(t), with (U), c ∝ 1/t. `separability` measures (S) at one
instant (D7): under it all ṡ are equal. The others ask for less than the law: `roughness` (D6)
whether ṡ has an *order* in λ, `collapse` (D5) whether t·ṡ is explained by λt. Both divide by the
spread of ṡ over modes, which the exact law makes zero: the noise that is left then has no order
and is explained by nothing, and both read 1. They are about what remains of ṡ where D7 is large.

Invariances. Units of time, scales of outputs with their targets, and factors of the loss multiply
λ, ṡ and t by constants: D5, D6 and the variation and exponent of D7 keep their values, and they do
when units or samples are permuted. A rescaling of layers that keeps the function of a ReLU net
leads to another M, and changes all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from grsd import checks, statistics

__all__ = ["Collapse", "Roughness", "Separability", "collapse", "roughness", "separability"]

LEAST = 8  # modes, or points a bin
ROUNDING = 1e-12  # spread, as a share of the largest ṡ, below which all are equal
NO_LOGARITHM = "it has no logarithm: leave ker M out, it has no place on the axis of s"


@dataclass(frozen=True)
class Roughness:
    """Von Neumann's ratio of ṡ in the order of λ, Σ (ṡ_{u+1} − ṡ_u)²/(2 Σ (ṡ_u − mean)²).

    0 for a smooth function of λ, 1 for values without an order, up to 2 if they alternate. It says
    nothing of the size of the differences: equal ṡ with noise of any size read 1. It depends on the
    batch, through the error that moves the modes: compare at one batch size.
    """

    value: float
    ranks: float  # of the ranks of ṡ (Bartels), on which wild modes weigh no more than others
    null_error: float  # sd around 1 where ṡ has no relation to λ; of `value` if ṡ is Gaussian
    modes: int


@dataclass(frozen=True)
class Separability:
    """How nearly v = λ c(t) at one instant: under it `variation` is 0 and `exponent` 1.

    The exponent alone is no evidence: it is 1 also where ṡ has no relation to λ. Errors are
    jackknifed over modes. With Student's t at modes − 1 degrees of freedom, value ± t · error holds
    95 %, and for the variation log value ± t · error/value.
    """

    mean: float  # c, the mean of ṡ over modes, 1/time
    mean_error: float
    variation: float  # coefficient of variation, standard deviation of ṡ over |c|; 0 to rounding
    variation_error: float
    exponent: float  # slope of log |λ̇| on log λ; nan if a mode rests
    exponent_error: float
    modes: int


@dataclass(frozen=True)
class Collapse:
    """Spread of t·ṡ at given λt, as a share of its whole spread.

    `value` is the variance within bins of log(λt), about each bin's own straight line, over the
    total variance, both by their degrees of freedom: 0 if t·ṡ is one function of λt, about 1 if it
    has no relation to it. `null` is that after the ṡ(t) of the modes were dealt out anew among
    them: no relation between a mode's λ and its ṡ, the same λ(t), the same ṡ(t). Where all modes
    move alike it equals `value`: that is not evidence.
    """

    value: float
    error: float  # jackknife over modes (all times of a mode go together)
    null: float  # mean over the deals
    null_error: float  # their standard deviation
    bins: int
    points: int
    modes: int


def separability(eigenvalues: ArrayLike, speeds: ArrayLike) -> Separability:
    """Measure D7 at one instant, from λ > 0 and ṡ = λ̇/λ of 8 modes or more, (n,) each.

    Cost: n means and slopes of n numbers. Source: (C2) of 2512.18209, first box.
    """
    lam, v = _modes(eigenvalues, speeds)
    mean, spread = float(v.mean()), float(v.std(ddof=1))
    if spread <= ROUNDING * float(np.abs(v).max()):
        variation = error = 0.0
    else:
        with np.errstate(divide="ignore"):  # c = 0: the variation is infinite
            variation, error = statistics.jackknife(lambda w: w.std(ddof=1) / abs(w.mean()), v)
    slope = slope_error = math.nan
    if v.all():
        x, y = np.log(lam), np.log(np.abs(v)) + np.log(lam)
        slope, slope_error = statistics.jackknife(lambda a, b: np.polyfit(a, b, 1)[0], x, y)
    return Separability(
        mean=mean,
        mean_error=spread / math.sqrt(len(v)),
        variation=float(variation),
        variation_error=float(error),
        exponent=float(slope),
        exponent_error=float(slope_error),
        modes=len(v),
    )


def roughness(eigenvalues: ArrayLike, speeds: ArrayLike) -> Roughness:
    """Measure D6 at one instant, from λ > 0 and ṡ = λ̇/λ of 8 modes or more, (n,) each.

    The order does not matter. If all ṡ agree to rounding, they are a smooth function: 0. The ratio
    resolves features of ṡ(λ) wider than the spacing of the modes, and noise of variance share q
    gives about q. Source of the null: von Neumann (1941), variance (n − 2)/(n² − 1).
    """
    lam, v = _modes(eigenvalues, speeds)
    count, ordered = len(lam), v[np.argsort(lam, kind="stable")]
    error = math.sqrt((count - 2) / (count**2 - 1))
    return Roughness(_neumann(ordered), _neumann(rankdata(ordered)), error, count)


def _modes(eigenvalues: ArrayLike, speeds: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    lam, v = np.asarray(eigenvalues, dtype=np.float64), np.asarray(speeds, dtype=np.float64)
    if lam.ndim != 1 or lam.shape != v.shape:
        raise ValueError(f"eigenvalues {lam.shape} and speeds {v.shape}: expected two arrays (n,)")
    why = f"spread or order over fewer than {LEAST} says nothing"
    checks.at_least("modes", len(lam), LEAST, why)
    checks.positive("eigenvalues", lam, NO_LOGARITHM)
    checks.finite("speeds", v)
    return lam, v


def _neumann(v: np.ndarray) -> float:
    spread = float(((v - v.mean()) ** 2).sum())
    if spread <= len(v) * (ROUNDING * float(np.abs(v).max())) ** 2:
        return 0.0
    return float((np.diff(v) ** 2).sum()) / (2 * spread)


def collapse(
    times: ArrayLike,
    eigenvalues: ArrayLike,
    speeds: ArrayLike,
    *,
    bins: int | None = None,
    seed: int = 0,
    deals: int = 40,
) -> Collapse:
    """Measure D5 along a path.

    Parameters
    ----------
    times : (K,), positive, two or more
        Since the start of the flow. Theorem 1 with another origin, v = c λ/(t + t*), is tested by
        giving t + t*.
    eigenvalues, speeds : (K, n)
        λ_u(t) > 0 and ṡ_u(t), 8 modes or more in one order along the path (ascending will do: a
        field does not know names).
    bins : int, optional
        Of equal count, each of 8 points or more; by default one for each 24 points, at most 40.
    seed, deals : int
        Of the null.
    """
    t = np.asarray(times, dtype=np.float64)
    lam, v = np.asarray(eigenvalues, dtype=np.float64), np.asarray(speeds, dtype=np.float64)
    if t.ndim != 1 or lam.ndim != 2 or lam.shape != v.shape or len(lam) != len(t):
        raise ValueError(
            f"times {t.shape}, eigenvalues {lam.shape}, speeds {v.shape}: expected (K,), (K, n), "
            "(K, n)"
        )
    path = "a path of one point has no time along it: collapse in λt needs two times or more"
    checks.at_least("number of times", len(t), 2, path)
    origin = "it has no logarithm: leave the initial point out, or count from another origin"
    checks.positive("times", t, origin)
    checks.positive("eigenvalues", lam, NO_LOGARITHM)
    checks.finite("speeds", v)
    count = lam.shape[1]
    checks.at_least("modes", count, LEAST, f"spread over fewer than {LEAST} says nothing")
    # the two sides that one function would join
    x, y = np.log(lam * t[:, None]), v * t[:, None]
    number = min(40, max(1, x.size // 24)) if bins is None else int(bins)
    if number < 1 or x.size // number < LEAST:
        raise ValueError(f"{number} bins for {x.size} points: each needs {LEAST} or more")
    # each mode left out at all times
    value, error = statistics.jackknife(lambda a, b: _within(a.T, b.T, number), x.T, y.T)
    # null: speeds dealt out anew among the modes
    rng = np.random.default_rng(seed)
    null = np.array([_within(x, y[:, rng.permutation(count)], number) for _ in range(deals)])
    null_error = float(null.std(ddof=1))
    return Collapse(value, float(error), float(null.mean()), null_error, number, x.size, count)


def _within(x: np.ndarray, y: np.ndarray, bins: int) -> float:
    """Residual variance about a line in each bin of equal count, over the total variance."""
    order = np.argsort(x, axis=None, kind="stable")
    a, b = x.ravel()[order], y.ravel()[order]
    total = float(((b - b.mean()) ** 2).sum())
    if total <= len(b) * (ROUNDING * float(np.abs(b).max())) ** 2:
        return 0.0
    inside = 0.0
    for places in np.array_split(np.arange(len(a)), bins):
        u, w = a[places] - a[places].mean(), b[places] - b[places].mean()
        spread = float(u @ u)
        inside += float(w @ w) - (float(u @ w) ** 2 / spread if spread > 0 else 0.0)
    return (inside / (len(b) - 2 * bins)) / (total / (len(b) - 1))
