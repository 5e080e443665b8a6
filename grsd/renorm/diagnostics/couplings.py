"""Diagnostic D4, log-shift invariance: do couplings of modes depend on log λ_v − log λ_u alone?

With X = ⟨φ_u, Ṁ φ_v⟩ and s = log λ, the normalised coupling X̃_uv = X_uv/√(λ_u λ_v) has no
dimension but 1/time, its diagonal is ṡ_u, and Kato's Ω is X̃/(2 sinh(Δ/2)): X̃ is invariant under a
shift of s exactly when Ω is, and X then is not. `shift_invariance` measures what X̃² owes to the
absolute position (s_u + s_v)/2. Source: 2512.18209, Condition 4 and
A.3.5.

Invariances. Slope and rms keep their values under scales of outputs, loss and time and orders of
units and samples, not under a rescaling of layers that keeps the function of a ReLU net.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.interpolate import BSpline

from grsd import checks, statistics

__all__ = ["NOISE", "Shift", "average", "normalized", "omega", "planted", "shift_invariance"]

Smooth = Literal["spline", "classes"]
Statistic = Literal["log", "square"]
Window = tuple[float, float]

NOISE = math.pi / math.sqrt(2)  # of log χ²₁, nats: the noise of log X̃² when X̃ is Gaussian
KNOTS = 8  # pieces of the cubic spline in |Δ|, or 2·KNOTS classes
LEAST = 16  # modes that a window must hold
TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class Shift:
    """What the squared couplings of one network, or the average of several, owe to position.

    `slope` is 0 for log-shift invariance and −2 where X instead of X̃ is invariant. Its error is
    taken over networks when there are several, else from this network with any correlation allowed
    between pairs that share a mode. `rms` sees a bump, which the slope does not, and is positive by
    noise alone: compare with `floor`, √2 · noise/√pairs for independent pairs, more when those that
    share a mode vary together. A pure slope gives rms = |slope| · deviation.
    """

    slope: float  # change of log X̃² per nat of s̄ = (s_u + s_v)/2 at fixed |Δ|: the best line
    slope_error: float  # standard error
    rms: float  # root mean square over pairs of the fitted line and parabola in s̄, nats
    floor: float  # the rms that noise alone gives, nats
    noise: float  # standard deviation of the residual, nats; `NOISE` for Gaussian couplings
    deviation: float  # standard deviation of s̄ at fixed |Δ|, nats
    span: float  # width of the window, nats of λ
    modes: int  # in the window
    pairs: int
    left_out: int  # modes whose eigenvalue is zero to rounding
    nets: int = 1
    each: tuple[Shift, ...] = ()  # the single networks; empty for one

    @property
    def score(self) -> float:
        """slope/slope_error: how many standard errors the slope lies from invariance."""
        if self.slope_error > 0:
            return self.slope / self.slope_error
        return math.copysign(math.inf, self.slope)

    @property
    def excess(self) -> float:
        """√max(0, rms² − floor²), nats: the rms without its expected noise."""
        return math.sqrt(max(0.0, self.rms**2 - self.floor**2))


def _spectrum(eigenvalues: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lam, x = np.asarray(eigenvalues, dtype=np.float64), np.asarray(X, dtype=np.float64)
    if lam.ndim != 1 or x.shape != (len(lam), len(lam)):
        raise ValueError(
            f"eigenvalues {lam.shape} and X {x.shape} do not fit: expected (n,) and (n, n)"
        )
    checks.finite("eigenvalues", lam)
    checks.finite("X", x)
    if np.any(np.diff(lam) < 0):
        raise ValueError(
            "eigenvalues must ascend, in the order of X's rows; grsd.dynamics.modes.modes gives "
            "both so"
        )
    largest = float(np.abs(x - x.T).max())
    if largest > 1e-8 * max(float(np.abs(x).max()), TINY):
        raise ValueError(f"X is not symmetric: the largest |X − Xᵀ| is {largest:.3g}; is it φᵀṀφ?")
    return lam, x


def normalized(eigenvalues: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Return X̃ = X/√(λ_u λ_v), (n, n), in 1/time, for λ > 0. Its diagonal is ṡ_u = λ̇_u/λ_u."""
    lam, x = _spectrum(eigenvalues, X)
    why = "it has no logarithm: leave ker M out, it has no place on the axis of s"
    root = np.sqrt(checks.positive("eigenvalues", lam, why))
    return x / root[:, None] / root[None, :]


def omega(eigenvalues: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return Ω_{v→u} = X̃_uv/(2 sinh((s_v − s_u)/2)), (n, n), 0 on the diagonal.

    As `grsd.dynamics.modes.Modes.coupling`, for λ_v − λ_u = 2 √(λ_u λ_v) sinh((s_v − s_u)/2).
    Refuses eigenvalues that repeat, or are not positive.
    """
    lam, x = _spectrum(eigenvalues, normal)
    if lam[0] <= 0 or np.any(np.diff(lam) == 0):
        raise ValueError("Ω needs positive eigenvalues without repetitions; X̃ does not")
    s = np.log(lam)
    gaps = 2 * np.sinh((s[None, :] - s[:, None]) / 2)
    diagonal = np.eye(len(s), dtype=bool)
    return np.where(diagonal, 0.0, x / np.where(diagonal, 1.0, gaps))


def _window(lam: np.ndarray, window: Window, floor: float | None) -> tuple[np.ndarray, int]:
    """Indices of the modes inside the window, and how many belong to ker M."""
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"window is {window}; expected two quantiles of the positive spectrum, 0 ≤ low < high "
            "≤ 1"
        )
    why = "M is zero, and no mode has a place on the axis of s"
    checks.positive("the largest eigenvalue", lam[-1], why)
    # An eigenvector of λ is wrong by about n ε λ_max/λ of its neighbour's length: 1 % at this
    # floor.
    least = 100 * len(lam) * np.finfo(float).eps * float(lam[-1]) if floor is None else floor
    left_out = int((lam <= least).sum())
    count = len(lam) - left_out
    chosen = np.arange(left_out + round(low * count), left_out + round(high * count))
    if len(chosen) < LEAST:
        raise ValueError(
            f"{len(chosen)} modes in the window {window} of {count} positive eigenvalues "
            f"({left_out} are zero to rounding); a dependence on position needs {LEAST} or more: "
            "take more samples or a wider window"
        )
    return chosen, left_out


def _basis(distance: np.ndarray, smooth: Smooth) -> np.ndarray:
    """Functions of |Δ| alone, (pairs, k): splines between quantiles, or indicators of classes."""
    checks.one_of("smooth", smooth, ("spline", "classes"))
    if smooth == "classes":
        count = 2 * KNOTS
        rank = np.empty(len(distance), dtype=np.int64)
        rank[np.argsort(distance, kind="stable")] = np.arange(len(distance))
        return np.eye(count)[rank * count // len(distance)]
    knots = np.unique(np.quantile(distance, np.linspace(0, 1, KNOTS + 1)))
    if len(knots) < 3:
        raise ValueError(
            f"all pairs of the window have the distance {knots[0]:.3g}: too few different "
            "eigenvalues"
        )
    knots = np.concatenate([np.repeat(knots[0], 3), knots, np.repeat(knots[-1], 3)])
    return BSpline.design_matrix(distance, knots, 3).toarray()


def _gamma(y: np.ndarray, basis: np.ndarray, start: np.ndarray) -> np.ndarray:
    """log E y in the span of `basis` by the quasi-likelihood Σ η + y e^{−η} of a Gamma law.

    It is convex: Newton's method, with half steps where a whole one climbs.
    """
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
            there = float((trial + y * np.exp(-trial)).sum())
            if there <= height:
                break
            scale /= 2
        eta, height = trial, there
    worst = np.abs(pull).max()
    raise ArithmeticError(f"the Gamma regression has the gradient {worst:.2g} after 200 steps")


def _fit(
    s: np.ndarray, squares: np.ndarray, smooth: Smooth, statistic: Statistic, left_out: int
) -> Shift:
    u, v = np.triu_indices(len(s), 1)
    y, distance, place = squares[u, v], np.abs(s[v] - s[u]), (s[u] + s[v]) / 2
    if (zero := int((y == 0).sum())) > 0:
        raise ValueError(
            f"{zero} of {len(y)} couplings in the window are exactly zero, and their logarithm "
            "does not exist: modes that never couple (a diagonal model, for one) have no kernel "
            "to be invariant"
        )
    # functions of |Δ| alone, orthonormal; then a line and a parabola in position, at right angles
    # to them
    q, sizes, _ = np.linalg.svd(_basis(distance, smooth), full_matrices=False)
    q = q[:, sizes > 1e-9 * sizes[0]]
    place = place - place.mean()
    line = place - q @ (q.T @ place)
    size = float(line @ line)
    if size <= 1e-12 * max(float(place @ place), TINY):
        raise ValueError(
            "at fixed |Δ| the pairs of the window have one position only; nothing can depend on it"
        )
    bend = place**2 - q @ (q.T @ place**2)
    bend -= line * (line @ bend) / size
    x = np.stack([line, bend], axis=1) / np.array([math.sqrt(size), np.linalg.norm(bend)])
    whole = np.concatenate([q, x], axis=1)

    # E log X̃² by least squares, or log E X̃² by the Gamma regression, started there
    checks.one_of("statistic", statistic, ("log", "square"))
    fitted = whole @ (whole.T @ np.log(y))
    residual = np.log(y) - fitted
    if statistic == "square":
        fitted = _gamma(y, whole, fitted + math.log(float(np.mean(np.exp(residual)))))
        residual = y / np.exp(fitted) - 1
    weights = x.T @ fitted

    # variances: pairs taken as independent, or correlated where they share a mode; the larger one
    # counts
    count = len(y)
    freedom = count / (count - whole.shape[1])
    pulls = x * residual[:, None]
    shared = np.stack([np.bincount(i, pulls[:, k], len(s)) for i in (u, v) for k in (0, 1)])
    single = (pulls**2).sum(axis=0)
    dyadic = ((shared[:2] + shared[2:]) ** 2).sum(axis=1) - single
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
        left_out=left_out,
    )


def shift_invariance(
    eigenvalues: np.ndarray | Sequence[np.ndarray],
    X: np.ndarray | Sequence[np.ndarray],
    *,
    window: Window = (0.1, 0.9),
    smooth: Smooth = "spline",
    statistic: Statistic = "log",
    floor: float | None = None,
) -> Shift:
    """Measure D4: regress log X̃² on a smooth function of |Δ| plus line and parabola in position.

    For the pairs u < v of the window, log X̃²_uv = k(|s_v − s_u|) + p s̄ + c s̄² + noise. `slope`
    is p without the parabola, `rms` the size of both terms together, taken at right angles to every
    k.

    Parameters
    ----------
    eigenvalues : (n,) float64, ascending; or one such array per network
        Of M = JJᵀ/n, or of JJᵀ: a common factor changes nothing.
    X : (n, n) float64, or one per network
        φᵀṀφ in the same order: `Modes.matrix` of `grsd.dynamics.modes`.
    window : (low, high)
        Quantiles of the positive spectrum, by count, with 16 modes or more between them. The slope
        is an average over the window; rms grows with its width.
    smooth : "spline" or "classes"
        What stands for k: a cubic spline, or the means of 16 classes of |Δ|. Classes leave a bias
        where eigenvalues are denser on one side of the window, because position then varies with
        |Δ| within a class.
    statistic : "log" or "square"
        "square" fits log E X̃² (quasi-likelihood of a Gamma law) instead of E log X̃²: smaller
        errors if X̃ is Gaussian, larger ones if its tails are heavy. The two agree when the shape
        of the law of X̃ does not vary with position.
    floor : float, optional
        Eigenvalues at or below it belong to ker M and are left out; by default 100 n ε λ_max.

    Notes
    -----
    Bias. For Gaussian X̃ the logarithm shifts every pair by E log χ²₁ = −γ − log 2 = −1.270 and
    adds noise of variance π²/2; the constant goes into k, so that slope and rms of E X̃² are
    estimated without bias for any n. rms² has the expectation floor² when there is no dependence.
    Nothing here needs gaps: where eigenvalues nearly agree, X̃ stays finite. Where they agree to
    rounding, the basis of the eigenspace is an accident, but all of its pairs have one position and
    the distance 0. Cost: n² numbers times 13.
    """
    if isinstance(eigenvalues, np.ndarray) and eigenvalues.ndim == 1:
        lam, x = _spectrum(eigenvalues, np.asarray(X))
        chosen, left_out = _window(lam, window, floor)
        kept = lam[chosen]
        squares = (x[np.ix_(chosen, chosen)] ** 2) / (kept[:, None] * kept[None, :])
        return _fit(np.log(kept), squares, smooth, statistic, left_out)
    if len(eigenvalues) != len(X) or len(X) == 0:
        raise ValueError(
            f"{len(eigenvalues)} spectra and {len(X)} matrices X; expected one of each for every "
            "network"
        )
    return average(
        [
            shift_invariance(
                np.asarray(lam), x, window=window, smooth=smooth, statistic=statistic, floor=floor
            )
            for lam, x in zip(eigenvalues, X, strict=True)
        ]
    )


def average(shifts: Sequence[Shift]) -> Shift:
    """Return the mean slope of several networks with its error over them.

    Of rms, floor, noise and deviation the quadratic means.
    """
    if len(shifts) == 0:
        raise ValueError("no network to average over")
    if len(shifts) == 1:
        return shifts[0]
    slopes = np.array([one.slope for one in shifts])
    quadratic = {
        name: math.sqrt(float(np.mean([getattr(one, name) ** 2 for one in shifts])))
        for name in ("rms", "floor", "noise", "deviation")
    }
    return replace(
        shifts[0],
        slope=float(slopes.mean()),
        slope_error=float(statistics.standard_error(slopes)),
        **quadratic,
        span=float(np.mean([one.span for one in shifts])),
        modes=min(one.modes for one in shifts),
        pairs=min(one.pairs for one in shifts),
        left_out=max(one.left_out for one in shifts),
        nets=len(shifts),
        each=tuple(shifts),
    )


def planted(
    eigenvalues: np.ndarray, *, slope: float = 0.0, bump: float = 0.0, decay: float = 1.0, seed: int
) -> np.ndarray:
    """Draw Gaussian couplings X, (n, n), whose X̃ is shift invariant up to a planted violation.

    log E X̃² = −decay |Δ| + slope (s̄ − m) + bump exp(−½ ((s̄ − m)/w)²) in nats, with m the median
    of s and w an eighth of the distance between its deciles: what `shift_invariance` must pass
    (both 0), what its slope must see, and what only its rms sees.
    """
    lam = np.asarray(eigenvalues, dtype=np.float64)
    if lam.ndim != 1 or len(lam) < 2 or not (np.isfinite(lam).all() and lam.min() > 0):
        raise ValueError(f"eigenvalues must be two or more positive numbers, got {lam!r}")
    s = np.log(lam)
    draw = np.triu(np.random.default_rng(seed).standard_normal((len(s), len(s))))
    place = (s[:, None] + s[None, :]) / 2 - np.median(s)
    wide = max(float(np.quantile(s, 0.9) - np.quantile(s, 0.1)) / 8, TINY)
    logs = -decay * np.abs(s[:, None] - s[None, :]) + slope * place
    logs += bump * np.exp(-0.5 * (place / wide) ** 2)
    return (draw + np.triu(draw, 1).T) * np.exp((logs + s[:, None] + s[None, :]) / 2)
