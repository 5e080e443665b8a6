"""The continuum of 2512.10427: ∂ₜε + ∂_λ(vε) = −2λε with v = c0 λ/t, its exact solution, and the printed one beside it.

ε(λ, t) is the density of ½g² over λ, L = ∫ε dλ, and h = λε is the energy per unit of log λ. Times start at t0, where ε = ε0;
u = λ(t/t0)^(−c0) is where the characteristic through (λ, t) started. `CovariantDrift` and `self_similar` are for v = (λ/t) H(λt).
Numerical routes to the same numbers are in :mod:`grsd.dynamics.transport_solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.special import gamma, gammainc, gammaincc

__all__ = [
    "CovariantDrift",
    "LossExponent",
    "PowerSpectrum",
    "density",
    "effective_clock",
    "frontier",
    "local_exponent",
    "loss",
    "loss_exponent",
    "printed_density",
    "quadrature",
    "self_similar",
    "shell_energy",
]

Array = NDArray[np.float64]
Spectrum = Callable[[Array], Array]  # ε0: densities (n,) at eigenvalues (n,)


class LossExponent(NamedTuple):
    """The exponent s of L ∝ t^(−s): what (7) gives, and what equation (21) of 2512.10427 prints."""

    corrected: float  # (1 + c0)(p + 1)
    printed: float  # (1 + c0) p + 1


def loss_exponent(c0: float, p: float) -> LossExponent:
    """Return the exponent of the loss for v = c0 λ/t and ε0 ∝ λ^p, with the printed one beside it; they differ by c0.

    Raises
    ------
    ValueError
        If c0 ≤ −1 or p ≤ −1: then the loss is no power of t. See `loss` for what it is.
    """
    c0, p = _finite(c0, "c0"), _finite(p, "p")
    if c0 <= -1.0:
        what = "falls like (log t)^(−p−1)" if c0 == -1.0 else "tends to a positive constant"
        raise ValueError(
            f"c0 = {c0}: the loss {what}, so it has no exponent in t; a power law needs c0 > −1"
        )
    if p <= -1.0:
        raise ValueError(
            f"p = {p}: the energy lies at λ → 0, where nothing dissipates, and the loss has no exponent; use p > −1"
        )
    return LossExponent((1.0 + c0) * (p + 1.0), (1.0 + c0) * p + 1.0)


@dataclass(frozen=True)
class PowerSpectrum:
    """Initial data ε0(u) = u^p exp(−u/soft) on [low, high], and 0 outside.

    Attributes
    ----------
    p : float
    low, high : float, the window, 0 ≤ low < high ≤ ∞. With p ≤ −1 both must be positive and finite.
    soft : float, scale of an exponential cutoff; ∞ for none. With it the Laplace transform has no finite-window wiggle.
    """

    p: float
    low: float = 0.0
    high: float = math.inf
    soft: float = math.inf

    def __post_init__(self) -> None:
        _finite(self.p, "p")
        if not 0.0 <= self.low < self.high:
            raise ValueError(
                f"the window [{self.low}, {self.high}] holds no mass; give 0 ≤ low < high"
            )
        if not self.soft > 0.0:
            raise ValueError(f"soft = {self.soft}; give a positive scale, or inf for no cutoff")
        if self.p <= -1.0 and not (self.low > 0.0 and self.high < math.inf):
            raise ValueError(
                f"p = {self.p} has infinite energy on [{self.low}, {self.high}]: give a finite window with low > 0"
            )

    def __call__(self, u: ArrayLike) -> Array:
        points = np.asarray(u, float)
        inside = (points >= self.low) & (points <= self.high) & (points > 0.0)
        safe = np.where(inside, points, 1.0)
        return np.where(inside, safe**self.p * np.exp(-safe / self.soft), 0.0)

    def laplace(self, rate: ArrayLike, low: ArrayLike = 0.0, high: ArrayLike = math.inf) -> Array:
        """Return ∫ ε0(u) exp(−u·rate) du over [low, high] and the window, by differences of incomplete Γ functions.

        rate, low and high broadcast; rate ≥ 0. For p ≤ −1 by `quadrature`. Without any cutoff and at rate 0 it is infinite.
        """
        a, lo, hi = np.broadcast_arrays(
            np.asarray(rate, float) + 1.0 / self.soft,
            np.maximum(np.asarray(low, float), self.low),
            np.minimum(np.asarray(high, float), self.high),
        )
        if np.any(~(a >= 0.0)):
            raise ValueError(f"rate {rate!r} must be ≥ 0")
        hi = np.maximum(hi, lo)
        if self.p <= -1.0:
            flat = [
                quadrature(lambda u, r=r: u**self.p * np.exp(-u * r), x, y) if y > x else 0.0  # type: ignore[misc]
                for r, x, y in zip(a.ravel(), lo.ravel(), hi.ravel(), strict=True)
            ]
            return np.asarray(flat, float).reshape(a.shape)
        s = self.p + 1.0
        safe = np.where(a > 0.0, a, 1.0)
        below, above = gammainc(s, safe * lo), gammainc(s, safe * hi)
        # far out both are 1 to rounding; there the complements keep their digits
        regular = np.where(
            safe * lo > s, gammaincc(s, safe * lo) - gammaincc(s, safe * hi), above - below
        )
        found: Array = np.where(a > 0.0, gamma(s) * regular / safe**s, (hi**s - lo**s) / s)
        return found


def quadrature(
    function: Spectrum, low: float, high: float, *, panels: int = 120, order: int = 12
) -> float:
    """Return ∫ function(λ) dλ over [low, high] by Gauss–Legendre on equal panels of log λ.

    For integrands that are smooth in log λ over many decades. Cost: panels × order evaluations in one call.
    """
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"[{low}, {high}] is no window in log λ; give 0 < low < high < ∞")
    nodes, weights = _panels(math.log(low), math.log(high), panels, order)
    points = np.exp(nodes)
    return float(np.sum(weights * points * function(points)))


def effective_clock(t: ArrayLike, c0: float, t0: float = 1.0) -> Array:
    """Return K(t) = 2∫ λ(t')/u dt' = (2t0/(1+c0))[(t/t0)^(1+c0) − 1]: energy that started at u has decayed by exp(−uK).

    At c0 = −1 this is 2 t0 log(t/t0); the formula used is continuous there. The loss is a function of K alone.
    """
    times, t0 = _times(t, t0)
    log_ratio = np.log(times / t0)
    z = (1.0 + _finite(c0, "c0")) * log_ratio
    mean = np.where(z == 0.0, 1.0, np.expm1(z) / np.where(z == 0.0, 1.0, z))
    return 2.0 * t0 * log_ratio * mean


def density(lam: ArrayLike, t: ArrayLike, c0: float, eps0: Spectrum, t0: float = 1.0) -> Array:
    """Return ε(λ, t), the solution of (7) with v = c0 λ/t and ε(λ, t0) = ε0(λ).

    ε = (t/t0)^(−c0) ε0(u) exp(−u K(t)) with u = λ(t/t0)^(−c0) and K of `effective_clock`, for every real c0.

    Parameters
    ----------
    lam, t : broadcastable, λ > 0 (1/time) and t ≥ t0 > 0.
    c0 : float, drift constant.
    eps0 : callable, densities at eigenvalues; `PowerSpectrum` is one.
    """
    points, (times, t0) = _eigenvalues(lam), _times(t, t0)
    stretch = (times / t0) ** -_finite(c0, "c0")
    u = points * stretch
    found: Array = stretch * eps0(u) * np.exp(-u * effective_clock(times, c0, t0))
    return found


def printed_density(lam: ArrayLike, t: ArrayLike, c0: float, eps0: Spectrum) -> Array:
    """Return equation (13) as printed: ε0(λ t^(−c0)) exp(−2λt/(1+c0)). It does not solve (7): its residual is c0/t.

    Raises ValueError at c0 = −1, which (11) excludes.
    """
    points, (times, _) = _eigenvalues(lam), _times(t, None)
    if _finite(c0, "c0") == -1.0:
        raise ValueError(
            "c0 = −1: equations (11) and (13) divide by 1 + c0; `density` covers this case"
        )
    found: Array = eps0(points * times**-c0) * np.exp(-2.0 * points * times / (1.0 + c0))
    return found


def loss(t: ArrayLike, c0: float, eps0: PowerSpectrum, t0: float = 1.0) -> Array:
    """Return L(t) = ∫ ε0(u) exp(−u K(t)) du exactly, window and cutoff included.

    For a pure power law it is Γ(p+1) K^(−p−1): ∝ t^(−(1+c0)(p+1)) at late times for c0 > −1, ∝ (log t)^(−p−1) at c0 = −1, and it
    tends to a positive constant for c0 < −1, where K stays below 2t0/|1+c0|.
    """
    return eps0.laplace(effective_clock(t, c0, t0))


def local_exponent(t: ArrayLike, c0: float, eps0: PowerSpectrum, t0: float = 1.0) -> Array:
    """Return the exact slope −d log L/d log t at every t: what a fit over a short window measures."""
    times, t0 = _times(t, t0)
    K = effective_clock(times, c0, t0)
    first = replace(eps0, p=eps0.p + 1.0).laplace(K)
    return 2.0 * times * (times / t0) ** c0 * first / eps0.laplace(K)


def frontier(t: ArrayLike, c0: float, p: float, t0: float = 1.0) -> Array:
    """Return the λ where h = λε peaks, for ε0 ∝ λ^p: (p+1)(t/t0)^c0 / K(t), which is (1+c0)(p+1)/2t at late times.

    Raises ValueError for p ≤ −1, where h has no maximum, and at t = t0, where dissipation has not begun.
    """
    times, t0 = _times(t, t0)
    if _finite(p, "p") <= -1.0:
        raise ValueError(f"p = {p}: λε decreases everywhere and has no maximum; use p > −1")
    if np.any(times == t0):
        raise ValueError(
            f"t = t0 = {t0}: nothing has dissipated yet, so there is no frontier; use t > t0"
        )
    return (p + 1.0) * (times / t0) ** c0 / effective_clock(times, c0, t0)


def shell_energy(
    edges: ArrayLike, t: float, c0: float, eps0: PowerSpectrum, t0: float = 1.0
) -> Array:
    """Return the energies (n,) of the shells between ascending edges (n+1,) at time t, exactly.

    Each is a difference of incomplete Γ functions: for ε0 = u^p, (t/t0)^(−c0(p+1)) κ^(−p−1) [Γ(p+1, κλ_α) − Γ(p+1, κλ_{α+1})], with
    κ = K(t)(t/t0)^(−c0).
    """
    bounds = _eigenvalues(edges)
    if bounds.ndim != 1 or bounds.size < 2 or np.any(np.diff(bounds) <= 0.0):
        raise ValueError(f"edges {edges!r} must be at least two ascending numbers")
    time, t0 = _times(t, t0)
    u = bounds * (time / t0) ** -_finite(c0, "c0")
    return eps0.laplace(effective_clock(time, c0, t0), u[:-1], u[1:])


@dataclass(frozen=True)
class CovariantDrift:
    """A drift v = (λ/t) H(λt): the most general one with v(sλ, t/s) = s²v(λ, t), as the units of λ = 1/time ask.

    Attributes
    ----------
    H, slope : callables of x = λt, (n,) → (n,): the profile, and its derivative H'. A scalar result is broadcast.
    """

    H: Callable[[Array], ArrayLike]
    slope: Callable[[Array], ArrayLike]

    @classmethod
    def linear(cls, c0: float) -> CovariantDrift:
        """Equation (6) of 2512.10427: H = c0, v = c0 λ/t."""
        if not math.isfinite(c0):
            raise ValueError(f"c0 = {c0}; expected a finite number")
        return cls(lambda x: c0, lambda x: 0.0)

    def speed(self, x: Array) -> Array:
        """Return d log λ/d log t = H(x), broadcast and checked, (n,)."""
        return self._values(self.H, x, "H")

    def divergence(self, x: Array) -> Array:
        """Return t ∂_λ v = H + xH', (n,)."""
        return self.speed(x) + x * self._values(self.slope, x, "slope")

    @staticmethod
    def _values(function: Callable[[Array], ArrayLike], x: Array, name: str) -> Array:
        found = np.broadcast_to(np.asarray(function(x), float), x.shape)
        if not np.isfinite(found).all():
            raise ValueError(
                f"the drift's {name} is not finite at x = λt = {x[~np.isfinite(found)][0]:.3g}"
            )
        return found


def self_similar(drift: CovariantDrift, p: float, x: ArrayLike) -> Array:
    """Return Φ(x) of the exact solution ε = t^a Φ(λt) with Φ ~ x^p at small x, at ascending x (n,).

    Φ solves x(1+H)Φ' = −(a + H + xH' + 2x)Φ with 1 − a = (1+H(0))(p+1), so L = t^(a−1) ∫Φ is an exact power law for every H > −1. H(0) is
    read at x = 10⁻¹² of the first point.

    Raises
    ------
    ValueError
        If p ≤ −1, or H ≤ −1 somewhere: there λt cannot grow past x and the solution does not reach beyond it.
    """
    points = np.asarray(x, float)
    if (
        points.ndim != 1
        or points.size == 0
        or np.any(points <= 0.0)
        or np.any(np.diff(points) <= 0.0)
    ):
        raise ValueError(f"x = {x!r} must be ascending and positive")
    if not p > -1.0:
        raise ValueError(f"p = {p}: the solution has infinite energy at λ → 0; use p > −1")
    start = float(drift.speed(points[:1] * 1e-12)[0])
    grid = np.geomspace(points[0] * 1e-8, points[-1], 200)
    if min(start, float(drift.speed(grid).min()), float(drift.speed(points).min())) <= -1.0:
        raise ValueError(
            "H falls to −1 or below: λt cannot grow past that point, and no self-similar solution crosses it"
        )
    a = 1.0 - (1.0 + start) * (p + 1.0)

    def rate(s: float, _: Array) -> Array:
        at = np.array([math.exp(s)])
        # the slope p is taken out, so that the remainder starts at rest
        return -(a + drift.divergence(at) + 2.0 * at) / (1.0 + drift.speed(at)) - p

    done = solve_ivp(
        rate, (math.log(grid[0]), math.log(points[-1])), [0.0], t_eval=np.log(points), method="DOP853", rtol=1e-11, atol=1e-12
    )  # fmt: skip
    found: Array = points**p * np.exp(done.y[0])
    return found


def _panels(low: float, high: float, panels: int, order: int) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(low, high, panels + 1)
    half = 0.5 * np.diff(edges)[:, None]
    return (0.5 * (edges[1:] + edges[:-1])[:, None] + half * nodes).ravel(), (
        half * weights
    ).ravel()


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} = {value}; expected a finite number")
    return float(value)


def _times(t: ArrayLike, t0: float | None) -> tuple[Array, float]:
    times, start = np.asarray(t, float), 0.0 if t0 is None else float(t0)
    if t0 is not None and not 0.0 < start < math.inf:
        raise ValueError(f"t0 = {t0}; the drift c0 λ/t needs a positive starting time")
    if not (np.isfinite(times).all() and np.all(times > 0.0) and np.all(times >= start)):
        raise ValueError(f"t = {t!r}; times must be positive, finite and not before t0 = {start}")
    return times, start


def _eigenvalues(lam: ArrayLike) -> Array:
    points = np.asarray(lam, float)
    if not (np.isfinite(points).all() and np.all(points > 0.0)):
        raise ValueError(
            f"λ = {lam!r}; eigenvalues must be positive and finite (λ = 0 is ker M and does not move)"
        )
    return points
