"""The continuum of 2512.10427: ∂ₜε + ∂_λ(vε) = −2λε with v = c0 λ/t, and its exact solution.

ε(λ, t) is the density of ½g² over λ, L = ∫ε dλ, and h = λε is the energy per unit of log λ. Times
start at t0, where ε = ε0; u = λ(t/t0)^(−c0) is where the characteristic through (λ, t) started.
Numerical routes to the same numbers are in :mod:`grsd.dynamics.transport_solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gamma, gammainc, gammaincc

from grsd import checks

__all__ = [
    "CovariantDrift",
    "LossExponent",
    "PowerSpectrum",
    "density",
    "effective_clock",
    "local_exponent",
    "loss",
    "loss_exponent",
    "quadrature",
]

Array = NDArray[np.float64]
Spectrum = Callable[[Array], Array]  # ε0: densities (n,) at eigenvalues (n,)


class LossExponent(NamedTuple):
    """The exponent s of L ∝ t^(−s): what (7) gives, and what equation (21) of 2512.10427 prints."""

    corrected: float  # (1 + c0)(p + 1)
    printed: float  # (1 + c0) p + 1


def loss_exponent(c0: float, p: float) -> LossExponent:
    """Return the exponent of the loss for v = c0 λ/t and ε0 ∝ λ^p; the printed one differs by c0.

    Refused are c0 ≤ −1 and p ≤ −1: then the loss is no power of t. See `loss` for what it is.
    """
    c0, p = checks.finite("c0", c0), checks.finite("p", p)
    if c0 <= -1.0:
        what = "falls like (log t)^(−p−1)" if c0 == -1.0 else "tends to a positive constant"
        raise ValueError(
            f"c0 = {c0}: the loss {what}, so it has no exponent in t; a power law needs c0 > −1"
        )
    if p <= -1.0:
        raise ValueError(f"p = {p}: the energy lies at λ → 0 and never dissipates; use p > −1")
    return LossExponent((1.0 + c0) * (p + 1.0), (1.0 + c0) * p + 1.0)


@dataclass(frozen=True)
class PowerSpectrum:
    """Initial data ε0(u) = u^p exp(−u/soft) on [low, high], and 0 outside.

    Attributes
    ----------
    p : float
    low, high : float, the window, 0 ≤ low < high ≤ ∞. With p ≤ −1 both must be positive and finite.
    soft : float, scale of an exponential cutoff, ∞ for none.
    """

    p: float
    low: float = 0.0
    high: float = math.inf
    soft: float = math.inf

    def __post_init__(self) -> None:
        checks.finite("p", self.p)
        checks.between("soft", self.soft, 0, math.inf, "(]", "give a scale, or inf for no cutoff")
        if not 0.0 <= self.low < self.high:
            raise ValueError(
                f"the window [{self.low}, {self.high}] holds no mass; give 0 ≤ low < high"
            )
        if self.p <= -1.0 and not (self.low > 0.0 and self.high < math.inf):
            raise ValueError(
                f"p = {self.p} has infinite energy on [{self.low}, {self.high}]: make it finite"
            )

    def __call__(self, u: ArrayLike) -> Array:
        points = np.asarray(u, float)
        inside = (points >= self.low) & (points <= self.high) & (points > 0.0)
        safe = np.where(inside, points, 1.0)
        return np.where(inside, safe**self.p * np.exp(-safe / self.soft), 0.0)

    def laplace(self, rate: ArrayLike, low: ArrayLike = 0.0, high: ArrayLike = math.inf) -> Array:
        """Return ∫ ε0(u) exp(−u·rate) du over [low, high] and the window; rates ≥ 0, all broadcast.

        By differences of incomplete Γ functions; for p ≤ −1 by `quadrature`.
        """
        a, lo, hi = np.broadcast_arrays(
            np.asarray(rate, float) + 1.0 / self.soft,
            np.maximum(np.asarray(low, float), self.low),
            np.minimum(np.asarray(high, float), self.high),
        )
        checks.between("rate + 1/soft", a, 0, np.inf, "[]", "it must be ≥ 0")
        hi = np.maximum(hi, lo)
        if self.p <= -1.0:
            cells = zip(a.ravel(), lo.ravel(), hi.ravel(), strict=True)
            return np.array([self._by_quadrature(*cell) for cell in cells]).reshape(a.shape)
        s = self.p + 1.0
        safe = np.where(a > 0.0, a, 1.0)
        below, above = gammainc(s, safe * lo), gammainc(s, safe * hi)
        # far out both are 1 to rounding; there the complements keep their digits
        beyond = gammaincc(s, safe * lo) - gammaincc(s, safe * hi)
        regular = np.where(safe * lo > s, beyond, above - below)
        return np.where(a > 0.0, gamma(s) * regular / safe**s, (hi**s - lo**s) / s)

    def _by_quadrature(self, rate: float, low: float, high: float) -> float:
        if not high > low:
            return 0.0
        return quadrature(lambda u: u**self.p * np.exp(-u * rate), low, high)


def panels_of(low: float, high: float, panels: int, order: int) -> tuple[Array, Array]:
    """Return Gauss–Legendre nodes and weights, (panels, order) each, on equal panels."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(low, high, panels + 1)
    half, middle = 0.5 * np.diff(edges)[:, None], 0.5 * (edges[1:] + edges[:-1])[:, None]
    return middle + half * nodes, half * weights


def quadrature(
    function: Spectrum, low: float, high: float, *, panels: int = 120, order: int = 12
) -> float:
    """Return ∫ function(λ) dλ over [low, high] by Gauss–Legendre on equal panels of log λ.

    For integrands that are smooth in log λ over many decades; one call of panels × order points.
    """
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"[{low}, {high}] is no window in log λ; give 0 < low < high < ∞")
    nodes, weights = panels_of(math.log(low), math.log(high), panels, order)
    points = np.exp(nodes.ravel())
    return float(np.sum(weights.ravel() * points * function(points)))


def effective_clock(t: ArrayLike, c0: float, t0: float = 1.0) -> Array:
    """Return K(t) = 2∫ λ(t')/u dt' = (2t0/(1+c0))[(t/t0)^(1+c0) − 1].

    Energy that started at u has decayed by exp(−uK). At c0 = −1 this is 2 t0 log(t/t0); the formula
    used is continuous there. The loss is a function of K alone.
    """
    log_ratio = np.log(_times(t, t0) / t0)
    z = (1.0 + checks.finite("c0", c0)) * log_ratio
    mean = np.where(z == 0.0, 1.0, np.expm1(z) / np.where(z == 0.0, 1.0, z))
    return 2.0 * t0 * log_ratio * mean


def density(lam: ArrayLike, t: ArrayLike, c0: float, eps0: Spectrum, t0: float = 1.0) -> Array:
    """Return ε(λ, t), the solution of (7) with v = c0 λ/t and ε(λ, t0) = ε0(λ), for every real c0.

    ε = (t/t0)^(−c0) ε0(u) exp(−u K(t)) with u = λ(t/t0)^(−c0) and K of `effective_clock`. λ > 0 and
    t ≥ t0 > 0 broadcast; `eps0` takes eigenvalues to densities, as `PowerSpectrum` does.
    """
    points = checks.positive("λ", np.asarray(lam, float), "λ = 0 is ker M, which does not move")
    stretch = (_times(t, t0) / t0) ** -checks.finite("c0", c0)
    u = points * stretch
    return stretch * eps0(u) * np.exp(-u * effective_clock(t, c0, t0))


def loss(t: ArrayLike, c0: float, eps0: PowerSpectrum, t0: float = 1.0) -> Array:
    """Return L(t) = ∫ ε0(u) exp(−u K(t)) du exactly, window and cutoff included.

    For a pure power law it is Γ(p+1) K^(−p−1): late ∝ t^(−(1+c0)(p+1)) for c0 > −1, ∝ (log
    t)^(−p−1) at c0 = −1, and for c0 < −1 it tends to a positive constant: K stays bounded.
    """
    return eps0.laplace(effective_clock(t, c0, t0))


def local_exponent(t: ArrayLike, c0: float, eps0: PowerSpectrum, t0: float = 1.0) -> Array:
    """Return the exact slope −d log L/d log t: what a fit over a short window measures."""
    times, K = _times(t, t0), effective_clock(t, c0, t0)
    first = replace(eps0, p=eps0.p + 1.0).laplace(K)
    return 2.0 * times * (times / t0) ** c0 * first / eps0.laplace(K)


@dataclass(frozen=True)
class CovariantDrift:
    """A drift v = (λ/t) H(λt): all with v(sλ, t/s) = s²v(λ, t), as the units of λ = 1/time ask.

    `H` and its derivative `slope` take x = λt, (n,) → (n,); a scalar result is broadcast.
    """

    H: Callable[[Array], ArrayLike]
    slope: Callable[[Array], ArrayLike]

    @classmethod
    def linear(cls, c0: float) -> CovariantDrift:
        """Equation (6) of 2512.10427: H = c0, v = c0 λ/t."""
        checks.finite("c0", c0)
        return cls(lambda x: c0, lambda x: 0.0)

    def speed(self, x: Array) -> Array:
        """Return d log λ/d log t = H(x), broadcast and checked, (n,)."""
        return self._values(self.H, x, "H")

    def divergence(self, x: Array) -> Array:
        """Return t ∂_λ v = H + xH', (n,)."""
        return self.speed(x) + x * self._values(self.slope, x, "slope")

    @staticmethod
    def _values(function: Callable[[Array], ArrayLike], x: Array, name: str) -> Array:
        values = np.broadcast_to(np.asarray(function(x), float), x.shape)
        if not np.isfinite(values).all():
            where = x[~np.isfinite(values)][0]
            raise ValueError(f"the drift's {name} is not finite at x = λt = {where:.3g}")
        return values


def _times(t: ArrayLike, t0: float) -> Array:
    checks.positive("t0", t0, "the drift c0 λ/t needs a positive starting time")
    return checks.at_least("t", np.asarray(t, float), t0, f"times are not before t0 = {t0}")
