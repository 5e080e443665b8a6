"""What can be read off U-curves: the best rate, its drift with size, what carrying it over costs.

All functions take arrays, of runs or of a published table. The best rate is the vertex of the
parabola through the smallest mean loss and its two neighbours, in log₂ η. A curve whose smallest
loss stands at the end of the grid gives a bound, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from grsd import checks, statistics

Array = npt.NDArray[np.float64]
Bound = Literal["", "at most", "at least", "unknown"]
SIGNS = {"": "", "at most": "≤ ", "at least": "≥ ", "unknown": "? "}
DRAWS = 2000  # resamples; a 95 % end is then known to a few per cent of the interval
_SEED = 20260301


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one U-curve, in log₂ η (or of one curve over log₂ λ).

    Attributes
    ----------
    value : vertex of the parabola; the end of the grid for a bound; NaN when every run diverged.
    low, high : 95 % interval over seeds, given noise, or both; NaN when unknown, and for a bound.
    bound : "" inside the grid; "at most" or "at least" at its left or right end (to half a step);
        "unknown" when fewer than two rates gave a loss.
    cliff : the next larger rate diverged; the interval is then the bracket of the two neighbours.
    index : of the smallest mean loss, in the sorted grid of the rates that were run; −1 when none.
    """

    value: float
    low: float
    high: float
    loss: float  #: the parabola's smallest (the smallest mean loss for a bound)
    bound: Bound
    cliff: bool
    index: int
    draws: Array = field(repr=False, compare=False)  #: resampled values, empty without an interval
    dof: float = math.inf  #: of the spread over seeds; infinite when only `noise` is known

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{SIGNS[self.bound]}{self.value:.2f}{interval}"


@dataclass(frozen=True)
class Drift:
    """How far the best rate moves per doubling of a size, in octaves.

    Attributes
    ----------
    low, high : 95 % interval, from the optima's own resamples when all have them, else from the
        scatter about the line (three sizes or more); NaN for a bound.
    bound : "" when every optimum is inside its grid; "at least" or "at most" when the bounded ones
        all push the slope one way; else "unknown", as with fewer than two optima.
    """

    value: float  #: least-squares slope of log₂ η∗ against log₂ size
    low: float
    high: float
    bound: Bound
    scatter: float  #: root mean square distance of the optima from the line, octaves
    points: int  #: optima used; those that are NaN are left out

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{SIGNS[self.bound]}{self.value:+.2f}{interval}"


@dataclass(frozen=True)
class Regret:
    """Loss that each size pays for the best rate of the source size.

    It is the mean loss at that rate minus the size's smallest mean loss: infinite when it diverges
    there, NaN when not run. The smallest of several noisy means is too small: a regret below the
    noise floor is none.
    """

    at: float  #: log₂ of the rate that is carried over
    values: Array  #: (sizes,)
    low: Array  #: (sizes,), 95 % interval over seeds, NaN with one seed
    high: Array
    censored: tuple[bool, ...]  #: its own best rate ends the grid, its regret is at least this


def optimum(
    log2_lr: npt.ArrayLike,
    losses: npt.ArrayLike,
    *,
    noise: float = 0.0,
    ceiling: float = math.inf,
    draws: int = DRAWS,
    seed: int = _SEED,
) -> Optimum:
    """Return the best rate of one U-curve.

    Parameters
    ----------
    log2_lr : (G,), rates in any order, none twice.
    losses : (G,) or (seeds, G). NaN and infinity are diverged runs: a rate at which one seed
        diverged counts as diverged. Mask (`numpy.ma`) what was not run: it is filled in by the
        additive model seed + rate, so that no rate gains by which seeds ran.
    noise : standard deviation of one run's loss, for one seed or on top of the seeds.
    ceiling : losses from here on count as diverged, e.g. that of the untrained model: a parabola
        through a run that exploded says nothing.
    draws : resamples of seeds and noise. Means of S seeds are spread by √(S/(S−1)), and the
        interval as in `statistics.percentile`: three seeds as they are cover far too little.
    """
    x, means, rows, kept = _curve(log2_lr, losses, ceiling)
    checks.at_least("noise", noise, 0, "it is a standard deviation, at least 0")
    value, loss, index, bound, cliff = _vertex(x, means)
    runs = len(rows)
    if bound or (runs < 2 and noise == 0):
        return Optimum(value, math.nan, math.nan, loss, bound, cliff, index, np.empty(0))
    # resample the seeds, then the noise, and take the best rate of every drawn curve
    rng = np.random.default_rng(seed)
    sample = np.tile(means, (draws, 1))
    if runs > 1:
        sample[:, kept] += _resampled(rows[:, kept], means[kept], draws, rng)
    if noise > 0:
        sample[:, kept] += noise / math.sqrt(runs) * rng.standard_normal((draws, int(kept.sum())))
    drawn = _vertices(x, sample, rng)
    dof = runs - 1.0 if runs > 1 else math.inf
    # beside a rate that diverged the bracket is all that is known
    if cliff:
        low, high = float(x[index - 1]), float(x[index + 1])
    else:
        _, low, high, _ = statistics.percentile(value, drawn, dof)
    return Optimum(value, low, high, loss, bound, cliff, index, drawn, dof)


def drift(sizes: npt.ArrayLike, optima: Sequence[Optimum] | npt.ArrayLike) -> Drift:
    """Return the slope of the best rate against log₂ size.

    Optima, one for each positive size, are `Optimum` or log₂ rates. Bounds are carried through: the
    slope is Σ wᵢ log₂ ηᵢ with known weights, so a bound on ηᵢ bounds it in the direction of wᵢ.
    """
    listed: list[Any] = list(optima)  # type: ignore[arg-type]
    x = np.log2(np.asarray(sizes, dtype=float))
    if x.ndim != 1 or len(x) != len(listed) or not np.isfinite(x).all():
        raise ValueError(
            f"need one positive size for each of the {len(listed)} optima, got {np.asarray(sizes)}"
        )
    y = np.array([o.value if isinstance(o, Optimum) else float(o) for o in listed])
    good = np.isfinite(y)
    x, y, known = x[good], y[good], [o for o, fine in zip(listed, good, strict=True) if fine]
    # fewer than two sizes have no slope
    if len(set(x)) < 2:
        if len(x) and good.all():
            raise ValueError(f"a drift needs two sizes, got {np.asarray(sizes)}")
        return Drift(math.nan, math.nan, math.nan, "unknown", math.nan, len(x))
    # the least-squares line, as weights on the optima
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    value = float(weights @ y)
    off = y - y.mean() - value * (x - x.mean())
    held = [o for o in known if isinstance(o, Optimum)]
    # bounds on optima, where all push the slope one way, bound it
    pairs = zip(known, weights, strict=True)
    pushes = {_push(o.bound, w) for o, w in pairs if isinstance(o, Optimum)} - {""}
    bound: Bound = "" if not pushes else pushes.pop() if len(pushes) == 1 else "unknown"
    low = high = math.nan
    if not bound and len(held) == len(known) and all(o.draws.size for o in held):
        # seeds of two sizes are taken as independent; shifting the resamples against each other
        # undoes their common generator
        count = min(o.draws.size for o in held)
        apart = [np.roll(o.draws[:count], 97 * k) for k, o in enumerate(held)]
        drawn = sum(w * one for w, one in zip(weights, apart, strict=True))
        _, low, high, _ = statistics.percentile(value, drawn, sum(o.dof for o in held))
    elif not bound and len(x) > 2:
        _, low, high, _ = statistics.slope(x, y)
    return Drift(value, low, high, bound, float(np.sqrt((off**2).mean())), len(x))


def regret(
    log2_lr: npt.ArrayLike,
    losses: npt.ArrayLike,
    *,
    source: int = 0,
    ceiling: float = math.inf,
    draws: int = DRAWS,
    seed: int = _SEED,
) -> Regret:
    """Return what every size pays for the source size's best rate of the grid.

    Parameters
    ----------
    log2_lr, losses, ceiling, draws : as in `optimum`, of losses (sizes, G) or (sizes, seeds, G).
    source : index of the size whose best rate is carried to the others, usually the smallest.
    """
    table = np.ma.masked_array(losses, dtype=float)
    if table.ndim not in (2, 3) or not 0 <= source < len(table):
        raise ValueError(
            "losses must be (sizes, rates) or (sizes, seeds, rates) with 0 ≤ source < sizes; got "
            f"{table.shape}, {source}"
        )
    curves = [_curve(log2_lr, one, ceiling) for one in table]
    # the rate that is carried over: the best of the grid at the source size
    x, means, _, _ = curves[source]
    best = _vertex(x, means)[2]
    if best < 0:
        raise ValueError(
            f"every run of the source size (index {source}) diverged; there is no rate to carry "
            "over"
        )
    at, rng = float(x[best]), np.random.default_rng(seed)
    values, lows, highs = np.full((3, len(table)), math.nan)
    ends = []
    for k, (grid, mean, rows, kept) in enumerate(curves):
        # this size's own best rate, and what the carried one costs beside it
        _, _, own, bound, _ = _vertex(grid, mean)
        ends.append(bound != "")
        here = np.flatnonzero(np.isclose(grid, at))
        if not here.size or own < 0:
            continue
        values[k] = mean[here[0]] - mean[own]
        if len(rows) > 1 and math.isfinite(values[k]):
            # the smallest mean is that of each draw: it need not stand at one rate
            sample = mean[kept] + _resampled(rows[:, kept], mean[kept], draws, rng)
            drawn = sample[:, int(kept[: here[0]].sum())] - sample.min(axis=1)
            _, lows[k], highs[k], _ = statistics.percentile(float(values[k]), drawn, len(rows) - 1)
    return Regret(at, values, np.maximum(lows, 0.0), highs, tuple(ends))


# --- Curves ---------------------------------------------------------------------------------------


def _curve(
    log2_lr: npt.ArrayLike, losses: npt.ArrayLike, ceiling: float
) -> tuple[Array, Array, Array, npt.NDArray[np.bool_]]:
    """Return sorted rates, mean losses (∞ where one diverged), completed rows, finite rates."""
    x = np.asarray(log2_lr, dtype=float)
    table = np.ma.masked_array(losses, dtype=float)
    table = table[None] if table.ndim == 1 else table
    if x.ndim != 1 or table.ndim != 2 or table.shape[1] != len(x) or not len(x) or not len(table):
        raise ValueError(
            f"losses must be (rates,) or (seeds, rates); got {table.shape} for {x.shape} rates"
        )
    if not np.isfinite(x).all() or len(set(x.tolist())) < len(x):
        raise ValueError(f"rates must be finite (in log₂) and different from each other, got {x}")
    # sorted, without rates and seeds that were not run at all
    order = np.argsort(x)
    missing, values = np.ma.getmaskarray(table)[:, order], np.ma.getdata(table)[:, order]
    run = np.ix_(~missing.all(axis=1), ~missing.all(axis=0))
    missing, values, x = missing[run], values[run], x[order][run[1][0]]
    # a rate is lost where one seed diverged; a seed that ran only there says nothing
    values = np.where(missing | (values < ceiling), values, np.inf)
    kept = ~(np.isinf(values) & ~missing).any(axis=0)
    useful = (kept & ~missing).any(axis=1) | ~kept.any()
    values, missing = values[useful], missing[useful]
    rows = np.full(values.shape, np.inf)
    rows[:, kept] = _completed(values[:, kept], missing[:, kept])
    return x, rows.mean(axis=0) if len(rows) else np.empty(0), rows, kept


def _completed(values: Array, missing: npt.NDArray[np.bool_]) -> Array:
    """Fill what is missing by seed + rate, both by medians of what is there (Tukey's polish)."""
    if not missing.any():
        return values
    there = np.where(missing, math.nan, values)
    seed, rate = np.zeros((len(values), 1)), np.zeros(values.shape[1])
    for _ in range(20):
        rate = np.nanmedian(there - seed, axis=0)
        seed = np.nanmedian(there - rate, axis=1, keepdims=True)
    return np.where(missing, seed + rate, values)


def _vertex(x: Array, means: Array) -> tuple[float, float, int, Bound, bool]:
    """Return the vertex, its loss, the index of the smallest mean, the bound, and the cliff."""
    finite = np.isfinite(means)
    if not finite.any():
        return math.nan, math.inf, -1, "unknown", False
    i = int(np.argmin(means))
    left, right = i > 0 and finite[i - 1], i + 1 < len(x) and finite[i + 1]
    if left and right:
        value, loss = _parabola(*x[i - 1 : i + 2], *means[i - 1 : i + 2])
        return float(value), float(loss), i, "", False
    cliff = i + 1 < len(x) and not right
    bound: Bound = ""
    if i == 0:
        bound = "at most" if right or cliff else "unknown"
    elif not left:  # it diverged: no U-curve
        bound = "unknown"
    elif i == len(x) - 1:
        bound = "at least"
    return float(x[i]), float(means[i]), i, bound, cliff


def _parabola(x0: Any, x1: Any, x2: Any, y0: Any, y1: Any, y2: Any) -> tuple[Any, Any]:
    """Return vertex and value of the parabola through three points, the middle one lowest."""
    first = (y1 - y0) / (x1 - x0)
    curvature = ((y2 - y1) / (x2 - x1) - first) / (x2 - x0)
    slope = first + curvature * (x1 - x0)  # at the middle
    # three equal losses have no curvature
    step = np.divide(-slope, 2 * curvature, out=np.zeros_like(slope), where=curvature > 0)
    return x1 + step, y1 - curvature * step**2


def _vertices(x: Array, sample: Array, rng: np.random.Generator) -> Array:
    """Return the best rate of many curves (B, G) that diverged alike; `_vertex` row by row."""
    row, i = np.arange(len(sample)), sample.argmin(axis=1)
    left, right = np.maximum(i - 1, 0), np.minimum(i + 1, len(x) - 1)
    best: Array = x[i]
    # inside: the vertex of the parabola
    ends = np.isfinite(sample[row, left]) & np.isfinite(sample[row, right])
    inside = (left < i) & (right > i) & ends
    places, curves = [at[inside] for at in (left, i, right)], sample[inside]
    losses = (curves[np.arange(len(curves)), at] for at in places)
    best[inside] = _parabola(*(x[at] for at in places), *losses)[0]
    # beside a cliff nothing is known but the bracket
    cliff = (right > i) & ~np.isfinite(sample[row, right])
    best[cliff] = rng.uniform(x[left[cliff]], x[right[cliff]])
    return best


def _resampled(rows: Array, means: Array, draws: int, rng: np.random.Generator) -> Array:
    """Return deviations (draws, G) of the mean of resampled rows, with the variance of the mean."""
    count = len(rows)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
    return math.sqrt(count / (count - 1)) * (weights @ (rows - means))


def _push(bound: Bound, weight: float) -> Bound:
    """Return which way a bound on one optimum bounds the slope."""
    if bound in ("", "unknown") or weight == 0:
        return "" if weight == 0 else bound
    return bound if weight > 0 else "at most" if bound == "at least" else "at least"
