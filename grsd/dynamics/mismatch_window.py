"""The test loss of the transport model: L_te = ∫ε dλ + ½∫wε dλ with a mismatch window w, and the exact sign of its rate.

Any density ε(λ) at one time will do; :func:`grsd.dynamics.transport.density` is the exact one. Source: 2512.10427,
section 6.4, whose condition ∂_tA > 0 the rate here replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

__all__ = ["ClosureRate", "Window", "closure_loss", "closure_rate"]

Density = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Window:
    """A weight w(λ): `height` between `lower` and `upper`, zero outside.

    Attributes
    ----------
    lower, upper : float, 0 < lower < upper, units of λ.
    height : float, at least −2: P_te = P_tr + Δ ⪰ 0 forces 1 + w/2 ≥ 0.
    ramp : float
        Width, in e-folds of λ, over which w climbs after `lower` and falls before `upper`, as the C² polynomial
        x³(10 − 15x + 6x²) of log λ. Zero: two jumps.
    """

    lower: float
    upper: float
    height: float
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not np.isfinite([self.lower, self.upper, self.height, self.ramp]).all():
            raise ValueError(f"{self} holds values that are not finite")
        if not 0 < self.lower < self.upper:
            raise ValueError(f"a window needs 0 < lower < upper, got {self.lower} and {self.upper}")
        if self.height < -2:
            raise ValueError(
                f"height {self.height} is below −2: 1 + w/2 is a ratio of squared norms, never negative"
            )
        half = np.log(self.upper / self.lower) / 2
        if not 0 <= self.ramp <= half:
            raise ValueError(
                f"ramp {self.ramp} must lie between 0 and half of the window, {half:.4g} e-folds"
            )

    @property
    def breaks(self) -> tuple[float, ...]:
        """Where w is not smooth: quadrature must not step over these points."""
        inner = (
            (self.lower * np.exp(self.ramp), self.upper * np.exp(-self.ramp)) if self.ramp else ()
        )
        return tuple(sorted({self.lower, self.upper, *map(float, inner)}))

    def _flanks(self, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        climb, fall = np.log(lam / self.lower) / self.ramp, np.log(self.upper / lam) / self.ramp
        return np.clip(climb, 0.0, 1.0), np.clip(fall, 0.0, 1.0)

    def __call__(self, lam: np.ndarray | float) -> np.ndarray:
        """Return w(λ), shape of `lam`."""
        points = np.asarray(lam, dtype=np.float64)
        if not self.ramp:
            jumps: np.ndarray = self.height * ((points >= self.lower) & (points < self.upper))
            return jumps
        a, b = (x**3 * (10 - 15 * x + 6 * x**2) for x in self._flanks(points))
        found: np.ndarray = self.height * a * b
        return found

    def slope(self, lam: np.ndarray | float) -> np.ndarray:
        """Return w′(λ) = dw/dλ, shape of `lam`; a window that jumps has none and is refused."""
        if not self.ramp:
            raise ValueError(
                "w jumps at its edges and has no derivative there; give the window a ramp"
            )
        points = np.asarray(lam, dtype=np.float64)
        climb, fall = (
            30 * x**2 * (1 - x) ** 2 for x in self._flanks(points)
        )  # at most one of the two is not zero
        found: np.ndarray = self.height * (climb - fall) / (self.ramp * points)
        return found


class ClosureRate(NamedTuple):
    """The two parts of dL_te/dt in the transport model."""

    dissipation: float  # −∫(2 + w) λ ε dλ, never positive
    transport: float  # (c0/2t) ∫ λ w′ ε dλ, of either sign

    @property
    def total(self) -> float:
        """dL_te/dt."""
        return self.dissipation + self.transport


def _nodes(window: Window, span: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre for ∫ dλ over `span`: 16 nodes a panel, panels of at most ½ e-fold that end at the breaks of w."""
    lo, hi = map(float, span)
    if not (np.isfinite([lo, hi]).all() and 0 < lo < hi):
        raise ValueError(f"span must be 0 < λ_min < λ_max, both finite; got {span!r}")
    marks = np.log([lo, *(b for b in window.breaks if lo < b < hi), hi])
    parts = [np.linspace(a, b, int(np.ceil(2 * (b - a))) + 1)[:-1] for a, b in pairwise(marks)]
    cuts = np.concatenate([*parts, marks[-1:]])
    x, w = np.polynomial.legendre.leggauss(16)
    half, middle = np.diff(cuts)[:, None] / 2, (cuts[1:] + cuts[:-1])[:, None] / 2
    lam = np.exp(middle + half * x)
    return lam.ravel(), (half * w * lam).ravel()


def _energy(density: Density, lam: np.ndarray) -> np.ndarray:
    found = np.asarray(density(lam), dtype=np.float64)
    if found.shape != lam.shape:
        raise ValueError(
            f"the density gave shape {found.shape} for {lam.shape} eigenvalues; it must act entry by entry"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            "the density is not finite on the whole span; check its time, its exponents and the span"
        )
    if not np.any(found):
        raise ValueError(
            f"the density is zero on all of [{lam[0]:.3g}, {lam[-1]:.3g}]: the span holds no energy"
        )
    return found


def closure_loss(density: Density, window: Window, span: tuple[float, float]) -> float:
    """Return L_te = ∫ε dλ + ½∫wε dλ for the density ε(λ) at one time.

    Parameters
    ----------
    density : callable
        ε (k,) at eigenvalues (k,).
    window : Window
    span : (λ_min, λ_max)
        Must hold the energy: what lies outside is left out. The quadrature is in log λ, so λ_min may be very small.

    Raises
    ------
    ValueError
        A span that is empty or holds no energy, a density that is not finite.
    """
    lam, weight = _nodes(window, span)
    return float(np.sum(weight * (1 + window(lam) / 2) * _energy(density, lam)))


def closure_rate(
    density: Density, window: Window, c0: float, t: float, span: tuple[float, float]
) -> ClosureRate:
    """Return dL_te/dt under ∂_tε + ∂_λ(c0 (λ/t) ε) = −2λε, from the density ε(λ) at one time.

    d/dt [∫ε + ½∫wε] = −∫(2 + w) λ ε dλ + (c0/2t) ∫ λ w′ ε dλ. The test loss rises if and only if the second term, which holds
    the *derivative* of w, exceeds the first. For a window that jumps, w′ is a pair of delta functions and the second term is
    (c0/2t) height [lower ε(lower) − upper ε(upper)]. Arguments and errors as in :func:`closure_loss`.
    """
    if not (np.isfinite(c0) and np.isfinite(t) and t > 0):
        raise ValueError(f"need a finite c0 and a time t > 0, got c0 = {c0} and t = {t}")
    lam, weight = _nodes(window, span)
    energy = _energy(density, lam)
    dissipation = -float(np.sum(weight * (2 + window(lam)) * lam * energy))
    if window.ramp:
        carried = float(np.sum(weight * lam * window.slope(lam) * energy))
    else:
        ends = np.array([window.lower, window.upper])
        at = np.where((ends >= span[0]) & (ends <= span[1]), ends * np.asarray(density(ends)), 0.0)
        carried = window.height * float(at[0] - at[1])
    return ClosureRate(dissipation, c0 / (2 * t) * carried)
