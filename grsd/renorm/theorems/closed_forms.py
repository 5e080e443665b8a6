"""Velocity fields v(λ, t) in closed form: balanced modes and ensembles of them, one common gain, spirals, a chain of shells.

A balanced two-factor mode is f = a b with a = b: λ = a² + b² = 2f, error y − λ/2, λ̇ = λ(2y − λ). It is the one learning system here
whose λ(t) is elementary, and an ensemble of them is a velocity field, or fails to be one. Networks that realise these formulas
under gradient flow are in :mod:`grsd.renorm.theorems.counterexamples`; what compares two flows is in :mod:`grsd.renorm.theorems.covariance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import exprel, lambertw

__all__ = [
    "BalancedModes",
    "Gain",
    "Shells",
    "Spirals",
    "balanced_eigenvalue",
    "balanced_field",
    "balanced_velocity",
    "deep_exponent",
    "deep_velocity",
    "scale_free_exponent",
    "scale_free_velocity",
]

Array = NDArray[np.float64]


def balanced_eigenvalue(t: ArrayLike, target: ArrayLike, start: ArrayLike) -> Array:
    """Return λ(t) of λ̇ = λ(2y − λ), λ(0) = `start`: λ₀/(e^{−2yt} + λ₀(1 − e^{−2yt})/2y). y = 0 is included.

    Arguments broadcast; t and y in units whose product is a number, λ₀ ≥ 0 in units of y.
    """
    times, y, first = (np.asarray(x, float) for x in (t, target, start))
    if np.any(~(first >= 0.0)):
        raise ValueError(f"start is {start!r}; an eigenvalue of J Jᵀ is not negative")
    found: Array = first / (np.exp(-2 * y * times) + first * times * exprel(-2 * y * times))
    return found


def balanced_velocity(lam: ArrayLike, target: ArrayLike, imbalance: ArrayLike = 0.0) -> Array:
    """Return λ̇ of one mode f = a b with λ = a² + b², a² − b² = D (`imbalance`, constant in time): 4f(y − f), 2f = √(λ² − D²).

    For D = 0 this is λ(2y − λ). At one and the same λ it depends on y and on D: v is no function of λ and t alone.

    Raises
    ------
    ValueError
        If λ < |D|, which a² + b² cannot be.
    """
    x, y, d = (np.asarray(a, float) for a in (lam, target, imbalance))
    if np.any(~(x >= np.abs(d))):
        raise ValueError(f"λ = {lam!r} is less than |a² − b²| = {imbalance!r}; a² + b² cannot be")
    f = 0.5 * np.sqrt((x - d) * (x + d))
    found: Array = 4 * f * (y - f)
    return found


def balanced_field(lam: ArrayLike, t: float, start: Callable[[float], float]) -> Array:
    """Return v(λ, t) of the family of all balanced modes y > 0 that start at λ(0) = start(y).

    Parameters
    ----------
    lam : (n,), positive
    t : float, positive
    start : callable
        y ↦ λ(0), such that λ(t) increases with y. Then one mode passes (λ, t), and the field has one value there.

    Raises
    ------
    ValueError
        If no y in [10⁻¹², 10¹²] gives λ at t.
    """
    if not t > 0:
        raise ValueError(f"t is {t}; expected a positive time")

    def gap(log_y: float, value: float) -> float:
        y = math.exp(log_y)
        return math.log(float(balanced_eigenvalue(t, y, start(y)))) - math.log(value)

    bracket, found = math.log(1e12), []
    for value in np.ravel(np.asarray(lam, float)):
        if not value > 0 or gap(-bracket, value) * gap(bracket, value) > 0:
            raise ValueError(
                f"no target between 1e-12 and 1e12 has λ = {value} at t = {t}; give a λ that the family reaches"
            )
        y = math.exp(brentq(gap, -bracket, bracket, args=(value,), xtol=1e-15, rtol=1e-15))
        found.append(float(balanced_velocity(value, y)))
    return np.array(found).reshape(np.shape(lam))


@dataclass(frozen=True)
class BalancedModes:
    """Balanced modes side by side, without coupling: mode k has the target y_k and starts at λ_k(0).

    Attributes
    ----------
    targets, starts : (n,), y_k in units of 1/time and λ_k(0) > 0 in the same.
    """

    targets: Array
    starts: Array

    def __post_init__(self) -> None:
        if (
            self.targets.ndim != 1
            or self.targets.shape != self.starts.shape
            or not len(self.targets)
        ):
            raise ValueError(
                f"targets {self.targets.shape} and starts {self.starts.shape} must be equally long lists"
            )
        if not (
            np.isfinite(self.targets).all()
            and np.isfinite(self.starts).all()
            and self.starts.min() > 0
        ):
            raise ValueError(
                f"starts must be positive and all numbers finite; the smallest start is {self.starts.min()}"
            )

    @classmethod
    def scale_free(cls, targets: ArrayLike, kappa: float) -> BalancedModes:
        """λ_k(0) = κ y_k: every mode is one curve λ = yΛ(yt) in its own unit of time. 0 < κ < 2."""
        y = np.asarray(targets, float)
        return cls(y, _kappa(kappa) * y)

    @classmethod
    def common_target(cls, starts: ArrayLike, target: float = 1.0) -> BalancedModes:
        """Return an ensemble with one target for all: v = λ(2y − λ), a field that stands still and has the scale y."""
        first = np.asarray(starts, float)
        return cls(np.full(first.shape, float(target)), first)

    @classmethod
    def random(cls, count: int, *, seed: int, span: float = 100.0) -> BalancedModes:
        """Targets and starts log-uniform over a factor `span` each, drawn independently (starts around 0.01)."""
        rng = np.random.default_rng(seed)
        y, first = np.exp(math.log(span) * (rng.random((2, count)) - 0.5))
        return cls(y, 0.01 * first)

    def eigenvalues(self, t: float) -> Array:
        """Return λ_k(t), (n,)."""
        return balanced_eigenvalue(t, self.targets, self.starts)

    def velocities(self, t: float) -> Array:
        """Return λ̇_k(t), (n,)."""
        found: Array = 2 * self.eigenvalues(t) * self.errors(t)
        return found

    def errors(self, t: float) -> Array:
        """Return e_k(t) = y_k − λ_k/2, (n,), as ½λ(2y/λ(0) − 1)e^{−2yt}, which keeps its digits when little error is left."""
        y = self.targets
        found: Array = 0.5 * self.eigenvalues(t) * (2 * y / self.starts - 1) * np.exp(-2 * y * t)
        return found


def scale_free_velocity(lam: ArrayLike, t: ArrayLike, kappa: float) -> Array:
    """Return the field of balanced modes with λ(0) = κy for every y > 0: v = (λ/t) W((2/κ − 1) λt e^{−λt}), exactly.

    W is Lambert's function. Derivation: with τ = yt and u = λt, λ = yΛ(τ) reads u(1 + c e^{−2τ}) = 2τ, c = 2/κ − 1. Put z = 2τ − u: then
    z eᶻ = c u e^{−u}, and t²v = τ²Λ(2 − Λ) = u z.

    Raises
    ------
    ValueError
        κ outside (0, 2).
    """
    x, times = np.asarray(lam, float), np.asarray(t, float)
    u = x * times
    found: Array = x / times * np.real(lambertw((2 / _kappa(kappa) - 1) * u * np.exp(-u)))
    return found


def scale_free_exponent(u: ArrayLike, kappa: float) -> Array:
    """Return d log F/d log u of F(u) = t²v, u = λt: 1 + (1 − u)/(1 + W(c u e^{−u})). 2 at u → 0, 1 at u = 1, falling beyond."""
    x = np.asarray(u, float)
    found: Array = 1 + (1 - x) / (1 + np.real(lambertw((2 / _kappa(kappa) - 1) * x * np.exp(-x))))
    return found


def _kappa(kappa: float) -> float:
    if not 0 < kappa < 2:
        raise ValueError(
            f"kappa is {kappa}; expected a number between 0 and 2 (at 2 the modes start where they end)"
        )
    return float(kappa)


def deep_velocity(lam: ArrayLike, depth: int, target: ArrayLike = 0.0) -> Array:
    """Return λ̇ of one mode f = a^L, L equal factors: λ = L a^{2L−2}, λ̇ = 2L(L−1)(λ/L)^α (y − (λ/L)^{L/(2L−2)}), α = (3L−4)/(2L−2).

    At y = 0 it is −2L(L−1)(λ/L)² for every L. For L = 2 it is λ(2y − λ).
    """
    if depth < 2:
        raise ValueError(
            f"depth is {depth}; a mode of one factor has a constant λ, so give 2 or more"
        )
    a = (np.asarray(lam, float) / depth) ** (1 / (2 * depth - 2))
    found: Array = (
        2 * depth * (depth - 1) * a ** (3 * depth - 4) * (np.asarray(target, float) - a**depth)
    )
    return found


def deep_exponent(depth: int) -> float:
    """Return α = (3L−4)/(2L−2): v ∝ λ^α while a balanced mode of L factors grows and its error is still y."""
    if depth < 2:
        raise ValueError(f"depth is {depth}; expected 2 or more")
    return (3 * depth - 4) / (2 * depth - 2)


@dataclass(frozen=True)
class Gain:
    """The gain model f = g Φ w with all of the target, and all of w, in the first mode of Φ.

    The other modes have λ_k = q s_k² with one common factor q = g², so λ̇_k/λ_k = q̇/q is the same for all of them, exactly. With g = w₁ at the
    start q̇ = 2 s₁ q (y₁ − s₁q): a logistic curve, or for y₁ = 0 the hyperbola q = 1/(2s₁²(t + t∗)).

    Attributes
    ----------
    s1, y1 : float, first singular value (> 0) and target.
    q0 : float, q(0) > 0.
    """

    s1: float
    y1: float
    q0: float

    def __post_init__(self) -> None:
        if not (self.s1 > 0 and self.q0 > 0):
            raise ValueError(f"s1 = {self.s1} and q0 = {self.q0}; both must be positive")

    @property
    def lag(self) -> float:
        """t∗ = 1/(2 s₁² q₀), the time by which the clock of the y₁ = 0 model runs ahead."""
        return 1 / (2 * self.s1**2 * self.q0)

    def gain(self, t: ArrayLike) -> Array:
        """Return q(t) = g². With λ = 2 s₁ q it is a balanced mode: λ̇ = λ(2 s₁y₁ − s₁λ)."""
        found: Array = balanced_eigenvalue(t, self.s1 * self.y1, 2 * self.s1**2 * self.q0) / (
            2 * self.s1**2
        )
        return found

    def log_velocity(self, t: ArrayLike) -> Array:
        """Return λ̇/λ of every mode but the first, 2 s₁(y₁ − s₁q(t))."""
        found: Array = 2 * self.s1 * (self.y1 - self.s1 * self.gain(t))
        return found


@dataclass(frozen=True)
class Spirals:
    """Pairs of modes (ρ, rρ) that turn at one rate ω while every eigenvalue stands still: all flux is rotation.

    Ω = ω for every pair, and the normalised coupling X/√(λ_uλ_v) = ω(r − 1)/√r: neither knows where in log λ the pair lies.
    The error of a pair decays as one, |e|² = e^{−2xt}, with x the lower root of x² − (1 + r)ρx + rρ² + ω² = 0. Its lower mode would lose
    energy at 2ρ; it loses it at 2x, so 2(x − ρ)E₁ passes to the upper one.

    Attributes
    ----------
    scales : (K,), ρ_k > 0, the lower eigenvalues.
    ratio : float, r > 1.
    rate : float, ω, 0 < ω < (r − 1)ρ/2.
    """

    scales: Array
    ratio: float
    rate: float

    def __post_init__(self) -> None:
        if not (
            self.ratio > 1 and 0 < self.rate < 0.5 * (self.ratio - 1) * float(np.min(self.scales))
        ):
            raise ValueError(
                f"ratio = {self.ratio} and rate = {self.rate}: expected ratio > 1 and 0 < rate < (ratio − 1)/2 times the least scale, "
                f"{np.min(self.scales)}"
            )

    @property
    def decay(self) -> Array:
        """x, (K,)."""
        r, rho = self.ratio, self.scales
        found: Array = 0.5 * ((1 + r) * rho - np.sqrt(((r - 1) * rho) ** 2 - 4 * self.rate**2))
        return found

    @property
    def shape(self) -> tuple[Array, Array, Array]:
        """(p, q, β), (K,) each, of the planes that realise them: p² = x, pq = ω, β = rρ²/x; for `counterexamples.spiral`."""
        p = np.sqrt(self.decay)
        return p, self.rate / p, self.ratio * self.scales**2 / p**2

    def energies(self, t: float) -> tuple[Array, Array]:
        """Return ½g² of the lower and the upper modes at t, (K,) each; every pair starts with ½."""
        whole = 0.5 * np.exp(-2 * self.decay * t)
        low = whole / (1 + ((self.decay - self.scales) / self.rate) ** 2)
        return low, whole - low

    def log_velocity(
        self, step: Callable[[Array], Array], slope: Callable[[Array], Array], t: float
    ) -> float:
        """Return J/ε in nats per time at a smooth edge χ: Σ 2(x − ρ)E₁[χ(rρ) − χ(ρ)] over Σ Eλχ'(λ)."""
        low, high = self.energies(t)
        upper = self.ratio * self.scales
        passed = float(
            np.sum(2 * (self.decay - self.scales) * low * (step(upper) - step(self.scales)))
        )
        density = float(
            np.sum(low * self.scales * slope(self.scales) + high * upper * slope(upper))
        )
        return passed / density


@dataclass(frozen=True)
class Shells:
    """A chain of shells that exchange energy with their neighbours alike everywhere: Ė_i = k(E_{i+1} − 2E_i + E_{i−1}).

    The transfer between i and i+1, k(E_i − E_{i+1}) upwards, is antisymmetric, local, and the same function at every i: Condition 4
    holds for it without error. It is a model of shells; no network is claimed to realise it.

    Attributes
    ----------
    rate : float, k > 0 in 1/time.
    width : float, h > 0, width of a shell in s = log λ.
    """

    rate: float
    width: float

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.width > 0):
            raise ValueError(f"rate = {self.rate} and width = {self.width}; both must be positive")

    @property
    def diffusivity(self) -> float:
        """κ = k h²."""
        return self.rate * self.width**2

    def flux(self, energies: ArrayLike) -> Array:
        """Return what passes upwards through the inner edges, (n−1,), energy per time."""
        found: Array = -self.rate * np.diff(np.asarray(energies, float))
        return found

    def rates(self, energies: ArrayLike) -> Array:
        """Return Ė, (n,), with closed ends."""
        through = np.concatenate([[0.0], self.flux(energies), [0.0]])
        found: Array = -np.diff(through)
        return found

    def log_velocity(self, energies: ArrayLike) -> Array:
        """Return J/ε at the inner edges, (n−1,): flux over the mean density of the two shells, in nats per time."""
        e = np.asarray(energies, float)
        found: Array = 2 * self.width * self.flux(e) / (e[1:] + e[:-1])
        return found

    def gaussian_velocity(self, s: ArrayLike, variance: float) -> Array:
        """Return the velocity at edges s for E_i ∝ exp(−s_i²/2σ²): 2kh tanh(sh/2σ²), which is κs/σ² for narrow shells."""
        found: Array = (
            2 * self.rate * self.width * np.tanh(np.asarray(s, float) * self.width / (2 * variance))
        )
        return found
