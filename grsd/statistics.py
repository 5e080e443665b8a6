"""Intervals, slopes and resampling: every statistical error that the package states is made here.

An `Interval` holds 95 %. Means and slopes take Student's t, over independent samples (seeds,
networks, batches); what has no closed form is jackknifed or bootstrapped over whole groups. NaN in
the samples makes NaN in the result: what diverged is for the caller to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from grsd import checks

Array = NDArray[np.float64]
TAILS = (0.025, 0.975)


class Interval(NamedTuple):
    """An estimate with its 95 % interval; ``f"{found:+.2f}"`` gives ``+0.71 [+0.65, +0.77]``.

    A tuple, since stored results hold it as a list: ``Interval(*stored)`` reads it back.

    Attributes
    ----------
    value, low, high : float
    sd : float, standard deviation of one sample (`mean`), of the residuals (`slope`) or of the
        draws, which is the standard error (`percentile`, `bootstrap`).
    """

    value: float
    low: float
    high: float
    sd: float

    @property
    def half(self) -> float:
        """Half of the width: the number after ±."""
        return (self.high - self.low) / 2

    def contains(self, x: float) -> bool:
        return self.low <= x <= self.high

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)


def standard_error(x: ArrayLike, alone: float | None = None) -> Any:
    """Return the standard error of the mean over the first axis, s/√n with n − 1 in s.

    One sample has no error and is refused, unless `alone` says what stands for it.
    """
    samples = np.asarray(x, np.float64)
    if len(samples) == 1 and alone is not None:
        return np.full(samples.shape[1:], alone)[()]
    checks.at_least("number of samples", len(samples), 2, "a standard error needs two or more")
    return samples.std(axis=0, ddof=1) / math.sqrt(len(samples))


def mean(x: ArrayLike) -> Interval:
    """Return the mean of two samples or more, with Student's t at n − 1 degrees of freedom."""
    samples = np.asarray(x, np.float64)
    if samples.ndim != 1 or len(samples) < 2:
        raise ValueError(f"an interval needs two or more values, got {samples.tolist()!r}")
    sd = float(samples.std(ddof=1))
    return _student(samples.mean(), sd / math.sqrt(len(samples)), len(samples) - 1, sd)


def p_value(x: ArrayLike) -> float:
    """Return the two-sided p of Student's test of mean 0: below 0.05 where `mean` leaves 0 out."""
    found = mean(x)
    if found.sd == 0:  # t is 0/0 or infinite
        return float(found.value == 0)
    return float(stats.ttest_1samp(np.asarray(x, np.float64), 0.0).pvalue)


def slope(x: ArrayLike, y: ArrayLike) -> Interval:
    """Return the slope of the least-squares line, with Student's t at n − 2 degrees of freedom.

    Parameters
    ----------
    x : (n,), not all equal
    y : (n,) or (n, k), k samples at every x

    Notes
    -----
    Two points have a slope and no residual: an infinite interval. For an exponent give logarithms.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or b.shape[:1] != a.shape or b.ndim > 2 or not a.size or np.ptp(a) == 0:
        raise ValueError(f"a slope needs points at two or more places, got x = {a.tolist()}")
    a, b = (np.repeat(a, b.shape[1]), b.ravel()) if b.ndim == 2 else (a, b)
    line: Any = stats.linregress(a, b)
    if not (freedom := len(a) - 2):
        return Interval(float(line.slope), -math.inf, math.inf, math.nan)
    residuals = b - line.intercept - line.slope * a
    sd = math.sqrt(residuals @ residuals / freedom)
    return _student(line.slope, sd / math.sqrt(((a - a.mean()) ** 2).sum()), freedom, sd)


def jackknife(statistic: Callable[..., Any], *samples: ArrayLike) -> tuple[Any, Any]:
    """Return a statistic, a number or an array, and its standard error by leaving out groups.

    The samples share their first axis, the independent groups; of each the same one is left out.
    """
    arrays = [np.asarray(sample) for sample in samples]
    groups = checks.at_least("groups", len(arrays[0]), 2, "a jackknife needs two or more")
    less = [statistic(*(a[np.arange(groups) != k] for a in arrays)) for k in range(groups)]
    return statistic(*arrays), math.sqrt(groups - 1) * np.std(less, axis=0)


def percentile(value: float, draws: ArrayLike, freedom: float = math.inf) -> Interval:
    """Return the interval of resampled estimates around an estimate.

    Parameters
    ----------
    value : float
        The estimate; NaN if it does not exist. An interval always holds it.
    draws : (B,)
        Those that are not finite are left out; of none the interval is NaN.
    freedom : float
        Percentiles of few samples are too narrow (three cover far too little) and are
        widened by the ratio of Student's quantile at so many degrees of freedom to the normal.
    """
    if not (held := np.asarray(draws, np.float64)[np.isfinite(draws)]).size:
        return Interval(value, math.nan, math.nan, math.nan)
    low, high = np.quantile(held, TAILS)
    wider = stats.t.ppf(TAILS[1], freedom) / stats.norm.ppf(TAILS[1])
    if math.isfinite(value):
        low = value - wider * max(value - low, 0.0)
        high = value + wider * max(high - value, 0.0)
    return Interval(value, float(low), float(high), float(held.std(ddof=min(1, held.size - 1))))


def bootstrap(
    statistic: Callable[..., float], *samples: ArrayLike, draws: int = 2000, seed: int = 0
) -> tuple[Interval, Array]:
    """Return the percentile interval of a statistic of independent samples, and its draws.

    Each sample is drawn anew within itself, along its first axis; where the statistic of a draw
    does not exist it is NaN.
    """
    rng, arrays = np.random.default_rng(seed), [np.asarray(sample) for sample in samples]
    chosen = [a[rng.integers(0, len(a), (draws, len(a)))] for a in arrays]
    drawn = np.array([statistic(*one) for one in zip(*chosen, strict=True)], np.float64)
    return percentile(float(statistic(*arrays)), drawn), drawn


def _student(value: float, error: float, freedom: int, sd: float) -> Interval:
    value, reach = float(value), float(stats.t.ppf(TAILS[1], freedom)) * float(error)
    return Interval(value, value - reach, value + reach, float(sd))
