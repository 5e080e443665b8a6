"""Diagnostic D4, log-shift invariance: do the couplings between modes depend on log λ_v − log λ_u alone?

With X = ⟨φ_u, Ṁ φ_v⟩ and s = log λ, the normalised coupling X̃_uv = X_uv/√(λ_u λ_v) has no dimension but 1/time, its diagonal
is ṡ_u, and Kato's Ω is X̃/(2 sinh(Δ/2)): X̃ is invariant under a shift of s exactly when Ω is, and X then is not.
`shift_invariance` measures what X̃² owes to the absolute position (s_u + s_v)/2, `binned` is the K̂_ij of 2512.18209.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.interpolate import BSpline

__all__ = [
    "NOISE",
    "Kernel",
    "Shift",
    "average",
    "binned",
    "normalized",
    "omega",
    "planted",
    "shift_invariance",
]

Smooth = Literal["spline", "classes"]
Statistic = Literal["log", "square"]

NOISE = math.pi / math.sqrt(
    2
)  # standard deviation of log χ²₁ in nats: the noise of log X̃² when X̃ is Gaussian
KNOTS = 8  # pieces of the cubic spline in |Δ|, or 2·KNOTS classes
LEAST = 16  # modes that a window must hold


@dataclass(frozen=True)
class Shift:
    """What the squared couplings of one network, or the average of several, owe to absolute position.

    Attributes
    ----------
    slope : float
        Change of log X̃² per nat of s̄ = (s_u + s_v)/2 at fixed |Δ|, the best straight line in the window. 0 for log-shift
        invariance; −2 where X instead of X̃ is invariant.
    slope_error : float
        Its standard error: over networks when there are several, else from this network with any correlation allowed between
        pairs that share a mode.
    rms : float
        Root mean square over pairs of the fitted linear and quadratic dependence on s̄, nats. It sees a bump, which the slope
        does not, and it is positive by noise alone: compare with `floor`.
    floor : float
        The rms that noise alone gives, nats: √2 · noise/√pairs for independent pairs, more when the pairs that share a mode
        vary together.
    noise : float
        Standard deviation of the residual, nats; `NOISE` = π/√2 for Gaussian couplings.
    deviation : float
        Standard deviation of s̄ at fixed |Δ|, nats: a pure slope gives rms = |slope| · deviation.
    span : float
        Width of the window, nats of λ.
    modes, pairs : int
        In the window.
    kernel : int
        Modes left out because their eigenvalue is zero to rounding.
    nets : int
    each : tuple of Shift
        The single networks; empty for one.
    """

    slope: float
    slope_error: float
    rms: float
    floor: float
    noise: float
    deviation: float
    span: float
    modes: int
    pairs: int
    kernel: int
    nets: int = 1
    each: tuple[Shift, ...] = ()

    @property
    def score(self) -> float:
        """slope/slope_error: how many standard errors the slope lies from log-shift invariance."""
        return (
            self.slope / self.slope_error
            if self.slope_error > 0
            else math.copysign(math.inf, self.slope)
        )

    @property
    def excess(self) -> float:
        """√max(0, rms² − floor²), nats: the rms without its expected noise."""
        return math.sqrt(max(0.0, self.rms**2 - self.floor**2))


class Kernel(NamedTuple):
    """The binned statistic K̂_ij and how far it is from a function of j − i."""

    values: (
        np.ndarray
    )  # (B, B) means of the weights over pairs of the two bins, nan where fewer than `least`
    counts: np.ndarray  # (B, B) int
    rms: float  # nats: spread of log K̂ within diagonals, about each diagonal's mean
    r2: float  # share of the variance of log K̂ that j − i explains


def _spectrum(eigenvalues: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lam, x = np.asarray(eigenvalues, dtype=np.float64), np.asarray(X, dtype=np.float64)
    if lam.ndim != 1 or x.shape != (len(lam), len(lam)):
        raise ValueError(
            f"eigenvalues {lam.shape} and X {x.shape} do not fit: expected (n,) and (n, n)"
        )
    if not (np.isfinite(lam).all() and np.isfinite(x).all()):
        raise ValueError("eigenvalues or X hold values that are not finite")
    if np.any(np.diff(lam) < 0):
        raise ValueError(
            "eigenvalues must ascend, in the order of X's rows; grsd.dynamics.modes.modes gives both so"
        )
    if np.abs(x - x.T).max() > 1e-8 * max(float(np.abs(x).max()), np.finfo(float).tiny):
        raise ValueError(
            f"X is not symmetric: the largest |X − Xᵀ| is {np.abs(x - x.T).max():.3g}; is it φᵀṀφ?"
        )
    return lam, x


def normalized(eigenvalues: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Return X̃ = X/√(λ_u λ_v), (n, n), in 1/time. Its diagonal is ṡ_u = λ̇_u/λ_u.

    Raises
    ------
    ValueError
        Eigenvalues that are not positive: cut the kernel of M off first.
    """
    lam, x = _spectrum(eigenvalues, X)
    if lam[0] <= 0:
        raise ValueError(
            f"the eigenvalue {lam[0]:.3g} has no logarithm: leave ker M out, it has no place on the axis of s"
        )
    root = np.sqrt(lam)
    found: np.ndarray = x / root[:, None] / root[None, :]
    return found


def omega(eigenvalues: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return Ω_{v→u} = X̃_uv/(2 sinh((s_v − s_u)/2)), (n, n), as `grsd.dynamics.modes.Modes.coupling`; 0 on the diagonal.

    Source: λ_v − λ_u = 2 √(λ_u λ_v) sinh((s_v − s_u)/2).

    Raises
    ------
    ValueError
        Eigenvalues that repeat, or are not positive.
    """
    lam, x = _spectrum(eigenvalues, normal)
    if lam[0] <= 0 or np.any(np.diff(lam) == 0):
        raise ValueError("Ω needs positive eigenvalues without repetitions; X̃ does not")
    s = np.log(lam)
    gaps = 2 * np.sinh((s[None, :] - s[:, None]) / 2)
    free = np.eye(len(s), dtype=bool)
    found: np.ndarray = np.where(free, 0.0, x / np.where(free, 1.0, gaps))
    return found


def _window(
    lam: np.ndarray, window: tuple[float, float], floor: float | None
) -> tuple[np.ndarray, int]:
    """Indices of the modes inside the window, and how many belong to the kernel."""
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"window is {window}; expected two quantiles of the positive spectrum, 0 ≤ low < high ≤ 1"
        )
    if lam[-1] <= 0:
        raise ValueError(
            f"the largest eigenvalue is {lam[-1]:.3g}: M is zero, and no mode has a place on the axis of s"
        )
    # An eigenvector of λ is wrong by about n ε λ_max/λ of its neighbour's length: 1 % at this floor.
    least = 100 * len(lam) * np.finfo(float).eps * float(lam[-1]) if floor is None else floor
    kernel = int((lam <= least).sum())
    count = len(lam) - kernel
    chosen = np.arange(kernel + round(low * count), kernel + round(high * count))
    if len(chosen) < LEAST:
        raise ValueError(
            f"{len(chosen)} modes in the window {window} of {count} positive eigenvalues ({kernel} are zero to rounding); "
            f"a dependence on position needs {LEAST} or more: take more samples or a wider window"
        )
    return chosen, kernel


def _basis(distance: np.ndarray, smooth: Smooth) -> np.ndarray:
    """Functions of |Δ| alone, (pairs, k): cubic splines between quantiles, or indicators of quantile classes."""
    if smooth == "classes":
        count = 2 * KNOTS
        rank = np.empty(len(distance), dtype=np.int64)
        rank[np.argsort(distance, kind="stable")] = np.arange(len(distance))
        found: np.ndarray = np.eye(count)[rank * count // len(distance)]
        return found
    if smooth != "spline":
        raise ValueError(f"smooth is {smooth!r}; expected 'spline' or 'classes'")
    knots = np.unique(np.quantile(distance, np.linspace(0, 1, KNOTS + 1)))
    if len(knots) < 3:
        raise ValueError(
            f"all pairs of the window have the distance {knots[0]:.3g}: too few different eigenvalues"
        )
    knots = np.concatenate([np.repeat(knots[0], 3), knots, np.repeat(knots[-1], 3)])
    dense: np.ndarray = BSpline.design_matrix(distance, knots, 3).toarray()
    return dense


def _gamma(y: np.ndarray, basis: np.ndarray, start: np.ndarray) -> np.ndarray:
    """log E y in the span of `basis` by the quasi-likelihood Σ η + y e^{−η} of a Gamma law: convex, by Newton's method."""
    eta, height = start, float((start + y * np.exp(-start)).sum())
    for _ in range(200):
        ratio = y * np.exp(-eta)
        pull = basis.T @ (ratio - 1)
        if np.abs(pull).max() < 1e-9 * len(y):
            return eta
        step = basis @ np.linalg.solve((basis * ratio[:, None]).T @ basis, pull)
        scale = min(1.0, 5.0 / float(np.abs(step).max()))
        while scale > 1e-9:
            trial = eta + scale * step
            found = float((trial + y * np.exp(-trial)).sum())
            if found <= height:
                break
            scale /= 2
        eta, height = trial, found
    raise ArithmeticError(
        f"the Gamma regression has the gradient {np.abs(pull).max():.2g} after 200 steps"
    )


def _fit(
    s: np.ndarray, squares: np.ndarray, smooth: Smooth, statistic: Statistic, kernel: int
) -> Shift:
    u, v = np.triu_indices(len(s), 1)
    y, distance, place = squares[u, v], np.abs(s[v] - s[u]), (s[u] + s[v]) / 2
    if (zero := int((y == 0).sum())) > 0:
        raise ValueError(
            f"{zero} of {len(y)} couplings in the window are exactly zero, and their logarithm does not exist: modes that never "
            "couple (a diagonal model, for one) have no kernel to be invariant"
        )
    q, sizes, _ = np.linalg.svd(_basis(distance, smooth), full_matrices=False)
    q = q[:, sizes > 1e-9 * sizes[0]]
    place = place - place.mean()
    line = place - q @ (q.T @ place)
    size = float(line @ line)
    if size <= 1e-12 * max(float(place @ place), np.finfo(float).tiny):
        raise ValueError(
            "at fixed |Δ| the pairs of the window have one position only; nothing can depend on it"
        )
    bend = place**2 - q @ (q.T @ place**2)
    bend -= line * (line @ bend) / size
    x = np.stack([line, bend], axis=1) / np.array(
        [math.sqrt(size), np.linalg.norm(bend)]
    )  # orthonormal, ⊥ to the kernel
    whole = np.concatenate([q, x], axis=1)

    fitted = whole @ (whole.T @ np.log(y))
    residual = np.log(y) - fitted
    if statistic == "square":
        fitted = _gamma(y, whole, fitted + math.log(float(np.mean(np.exp(residual)))))
        residual = y / np.exp(fitted) - 1
    elif statistic != "log":
        raise ValueError(f"statistic is {statistic!r}; expected 'log' or 'square'")
    weights = x.T @ fitted

    count = len(y)
    freedom = count / (count - whole.shape[1])
    pulls = x * residual[:, None]
    shared = np.stack([np.bincount(i, pulls[:, k], len(s)) for i in (u, v) for k in (0, 1)])
    single = (pulls**2).sum(axis=0)  # pairs taken as independent
    dyadic = ((shared[:2] + shared[2:]) ** 2).sum(
        axis=1
    ) - single  # correlation between pairs that share a mode
    variance = freedom * np.maximum(dyadic, single)
    return Shift(
        slope=float(weights[0]) / math.sqrt(size),
        slope_error=math.sqrt(float(variance[0]) / size),
        rms=math.sqrt(float(weights @ weights) / count),
        floor=math.sqrt(float(variance.sum()) / count),
        noise=math.sqrt(freedom * float(residual @ residual) / count),
        deviation=math.sqrt(size / count),
        span=float(s[-1] - s[0]),
        modes=len(s),
        pairs=count,
        kernel=kernel,
    )


def shift_invariance(
    eigenvalues: np.ndarray | Sequence[np.ndarray],
    X: np.ndarray | Sequence[np.ndarray],
    *,
    window: tuple[float, float] = (0.1, 0.9),
    smooth: Smooth = "spline",
    statistic: Statistic = "log",
    floor: float | None = None,
) -> Shift:
    """Measure D4: regress log X̃² on a smooth function of |Δ| plus a line and a parabola in absolute position.

    For the pairs u < v of the window, log X̃²_uv = k(|s_v − s_u|) + p s̄ + c s̄² + noise. `slope` is p without the parabola, `rms`
    the size of both terms together, taken at right angles to every function k.

    Parameters
    ----------
    eigenvalues : (n,) float64, ascending; or one such array per network
        Of M = JJᵀ/n, or of JJᵀ: a common factor changes nothing.
    X : (n, n) float64, or one per network
        φᵀṀφ in the same order: `Modes.matrix` of `grsd.dynamics.modes`.
    window : (low, high)
        Quantiles of the positive spectrum, by count. The slope is an average over the window; rms grows with its width.
    smooth : "spline" or "classes"
        What stands for k: a cubic spline, or the means of 16 classes of |Δ|. Classes leave a bias where eigenvalues are denser on
        one side of the window, because position then varies with |Δ| within a class.
    statistic : "log" or "square"
        "square" fits log E X̃² (quasi-likelihood of a Gamma law) instead of E log X̃²: smaller errors if X̃ is Gaussian, larger
        ones if its tails are heavy. The two agree when the shape of the law of X̃ does not vary with position.
    floor : float, optional
        Eigenvalues at or below it belong to ker M and are left out; by default 100 n ε λ_max.

    Returns
    -------
    Shift

    Raises
    ------
    ValueError
        Fewer than 16 modes in the window, couplings that are exactly zero, shapes or an order that do not fit.

    Notes
    -----
    Bias. For Gaussian X̃ the logarithm shifts every pair by E log χ²₁ = −γ − log 2 = −1.270 and adds noise of variance π²/2;
    the constant goes into k, so that slope and rms of E X̃² are estimated without bias for any n. rms² has the expectation
    floor² when there is no dependence. Nothing here needs gaps: where eigenvalues nearly agree, X̃ stays finite. Where they
    agree to rounding, the basis of the eigenspace is an accident, but all of its pairs have one position and the distance 0.
    Cost: n² numbers times 13. Source: 2512.18209, Condition 4 and A.3.5.
    """
    if isinstance(eigenvalues, np.ndarray) and eigenvalues.ndim == 1:
        lam, x = _spectrum(eigenvalues, np.asarray(X))
        chosen, kernel = _window(lam, window, floor)
        kept = lam[chosen]
        squares = (x[np.ix_(chosen, chosen)] ** 2) / (kept[:, None] * kept[None, :])
        return _fit(np.log(kept), squares, smooth, statistic, kernel)
    if len(eigenvalues) != len(X) or len(X) == 0:
        raise ValueError(
            f"{len(eigenvalues)} spectra and {len(X)} matrices X; expected one of each for every network"
        )
    return average(
        [
            shift_invariance(
                np.asarray(lam),
                np.asarray(x),
                window=window,
                smooth=smooth,
                statistic=statistic,
                floor=floor,
            )
            for lam, x in zip(eigenvalues, X, strict=True)
        ]
    )


def average(found: Sequence[Shift]) -> Shift:
    """Return the mean slope of several networks with its standard error over them; rms and floor are quadratic means."""
    if len(found) == 0:
        raise ValueError("no network to average over")
    if len(found) == 1:
        return found[0]
    slopes = np.array([one.slope for one in found])

    def quadratic(name: str) -> float:
        return math.sqrt(float(np.mean([getattr(one, name) ** 2 for one in found])))

    return replace(
        found[0],
        slope=float(slopes.mean()),
        slope_error=float(slopes.std(ddof=1)) / math.sqrt(len(slopes)),
        rms=quadratic("rms"),
        floor=quadratic("floor"),
        noise=quadratic("noise"),
        deviation=quadratic("deviation"),
        span=float(np.mean([one.span for one in found])),
        modes=min(one.modes for one in found),
        pairs=min(one.pairs for one in found),
        kernel=max(one.kernel for one in found),
        nets=len(found),
        each=tuple(found),
    )


def planted(
    eigenvalues: np.ndarray, *, slope: float = 0.0, bump: float = 0.0, decay: float = 1.0, seed: int
) -> np.ndarray:
    """Draw Gaussian couplings X on a given spectrum whose X̃ is log-shift invariant up to a planted violation, (n, n).

    log E X̃² = −decay |Δ| + slope (s̄ − m) + bump exp(−½ ((s̄ − m)/w)²), with m the median of s and w an eighth of the distance
    between its deciles: what `shift_invariance` must pass (both 0), what its slope must see, and what only its rms sees.

    Parameters
    ----------
    eigenvalues : (n,) positive
    slope : float, nats of X̃² per nat of s̄
    bump : float, nats
    decay : float, per nat
    seed : int
    """
    lam = np.asarray(eigenvalues, dtype=np.float64)
    if lam.ndim != 1 or len(lam) < 2 or not (np.isfinite(lam).all() and lam.min() > 0):
        raise ValueError(f"eigenvalues must be two or more positive numbers, got {lam!r}")
    s = np.log(lam)
    draw = np.triu(np.random.default_rng(seed).standard_normal((len(s), len(s))))
    place = (s[:, None] + s[None, :]) / 2 - np.median(s)
    wide = max(float(np.quantile(s, 0.9) - np.quantile(s, 0.1)) / 8, np.finfo(float).tiny)
    logs = (
        -decay * np.abs(s[:, None] - s[None, :])
        + slope * place
        + bump * np.exp(-0.5 * (place / wide) ** 2)
    )
    found: np.ndarray = (draw + np.triu(draw, 1).T) * np.exp((logs + s[:, None] + s[None, :]) / 2)
    return found


def binned(s: np.ndarray, weights: np.ndarray, width: float, *, least: int = 1) -> Kernel:
    """Return K̂_ij, the mean of `weights` over the pairs of bins i and j of `width` nats, and its spread along diagonals.

    Parameters
    ----------
    s : (n,), log λ ascending
    weights : (n, n), symmetric and not negative
        Squares of couplings, or their expectations. The diagonal u = v is not used.
    width : float, h > 0 in nats
    least : int
        Pairs that a cell must hold.

    Raises
    ------
    ValueError
        A width that is not positive, negative weights, or fewer than two cells on every diagonal.

    Notes
    -----
    Source: 2512.18209, Condition 4. On one network this says little: the mean of few χ² variables is noisy, and log K̂ of a cell
    with m pairs has the standard deviation √(2/m) and more.
    """
    place, w = np.asarray(s, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if place.ndim != 1 or w.shape != (len(place), len(place)) or not width > 0:
        raise ValueError(
            f"s {place.shape}, weights {w.shape} and width {width}: expected (n,), (n, n) and a positive number"
        )
    if not np.isfinite(w).all() or w.min() < 0:
        raise ValueError(
            "weights must be finite and not negative: squares of couplings or their expectations"
        )
    cell = np.floor((place - place.min()) / width + 1e-9).astype(
        np.int64
    )  # an edge belongs to the bin above it
    member = np.eye(int(cell.max()) + 1)[cell]  # (n, B)
    off = ~np.eye(len(place), dtype=bool)
    counts = np.rint(member.T @ off @ member).astype(np.int64)
    sums = member.T @ (w * off) @ member
    held = (counts >= least) & (sums > 0)
    values = np.where(held, sums / np.maximum(counts, 1), np.nan)
    i, j = np.nonzero(np.triu(held))
    logs, diagonal = np.log(values[i, j]), j - i
    rest = logs - (np.bincount(diagonal, logs) / np.maximum(np.bincount(diagonal), 1))[diagonal]
    several = np.bincount(diagonal)[diagonal] > 1
    if not several.any():
        raise ValueError(
            f"no diagonal holds two cells of {least} or more pairs at width {width}: take narrower bins or more modes"
        )
    total = float(((logs - logs.mean())[several] ** 2).sum())
    inside = float((rest[several] ** 2).sum())
    return Kernel(
        values,
        counts,
        math.sqrt(inside / int(several.sum())),
        1 - inside / max(total, np.finfo(float).tiny),
    )
