"""Velocity fields v(λ, t) in closed form: balanced modes, their ensembles, and a network of them.

A balanced two-factor mode is f = a b with a = b: λ = a² + b² = 2f, error y − λ/2, λ̇ = λ(2y − λ).
It is the one learning system here whose λ(t) is elementary, and an ensemble of them is a velocity
field, or fails to be one. What compares two flows is in :mod:`grsd.renorm.theorems.covariance`.
Arguments broadcast; results are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import exprel, lambertw
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.problem import Problem

__all__ = [
    "BalancedModes",
    "balanced_eigenvalue",
    "balanced_velocity",
    "parallel_modes",
    "scale_free_exponent",
    "scale_free_velocity",
]

Array = NDArray[np.float64]


def balanced_eigenvalue(t: ArrayLike, target: ArrayLike, start: ArrayLike) -> Array:
    """Return λ(t) of λ̇ = λ(2y − λ), λ(0) = `start`: λ₀/(e^{−2yt} + λ₀(1 − e^{−2yt})/2y), y = 0 too.

    t and y in units whose product is a number, λ₀ ≥ 0 in units of y.
    """
    times, y, first = (np.asarray(x, float) for x in (t, target, start))
    checks.at_least("start", first, 0, "an eigenvalue of J Jᵀ is not negative")
    return first / (np.exp(-2 * y * times) + first * times * exprel(-2 * y * times))


def balanced_velocity(lam: ArrayLike, target: ArrayLike, imbalance: ArrayLike = 0.0) -> Array:
    """Return λ̇ = 4f(y − f), 2f = √(λ² − D²), of a mode f = a b with λ = a² + b², D = a² − b².

    The `imbalance` D is constant in time, |D| ≤ λ. For D = 0 this is λ(2y − λ). At one and the same
    λ it depends on y and on D: v is no function of λ and t alone.
    """
    x, y, d = (np.asarray(a, float) for a in (lam, target, imbalance))
    checks.at_least("λ − |D|", x - np.abs(d), 0, "λ = a² + b² cannot be less than |a² − b²|")
    f = 0.5 * np.sqrt((x - d) * (x + d))
    return 4 * f * (y - f)


@dataclass(frozen=True)
class BalancedModes:
    """Balanced modes without coupling: targets y_k and starts λ_k(0) > 0, (n,), both in 1/time."""

    targets: Array
    starts: Array

    def __post_init__(self) -> None:
        checks.shape("targets", self.targets, ("n",))
        checks.shape("starts", self.starts, self.targets.shape)
        checks.finite("targets", self.targets)
        checks.positive("starts", self.starts)

    @classmethod
    def scale_free(cls, targets: ArrayLike, kappa: float) -> BalancedModes:
        """λ_k(0) = κ y_k: every mode is one curve λ = yΛ(yt) in its own unit of time. 0 < κ < 2."""
        y = np.asarray(targets, float)
        return cls(y, _kappa(kappa) * y)

    @classmethod
    def common_target(cls, starts: ArrayLike, target: float = 1.0) -> BalancedModes:
        """One target for all: v = λ(2y − λ), a field that stands still and has the scale y."""
        first = np.asarray(starts, float)
        return cls(np.full(first.shape, float(target)), first)

    @classmethod
    def random(cls, count: int, *, seed: int, span: float = 100.0) -> BalancedModes:
        """Targets and starts (around 0.01) log-uniform over a factor `span`, independent."""
        rng = np.random.default_rng(seed)
        y, first = np.exp(math.log(span) * (rng.random((2, count)) - 0.5))
        return cls(y, 0.01 * first)

    def eigenvalues(self, t: float) -> Array:
        """Return λ_k(t), (n,)."""
        return balanced_eigenvalue(t, self.targets, self.starts)

    def velocities(self, t: float) -> Array:
        """Return λ̇_k(t), (n,)."""
        return 2 * self.eigenvalues(t) * self.errors(t)

    def errors(self, t: float) -> Array:
        """Return e_k(t) = y_k − λ_k/2, (n,).

        As ½λ(2y/λ(0) − 1)e^{−2yt}, which keeps its digits when little error is left.
        """
        y = self.targets
        return 0.5 * self.eigenvalues(t) * (2 * y / self.starts - 1) * np.exp(-2 * y * t)


def scale_free_velocity(lam: ArrayLike, t: ArrayLike, kappa: float) -> Array:
    """Return the field of balanced modes with λ(0) = κy, 0 < κ < 2, for every y > 0, exactly.

    v = (λ/t) W((2/κ − 1) λt e^{−λt}), W Lambert's function. Derivation: with τ = yt and u = λt, λ =
    yΛ(τ) reads u(1 + c e^{−2τ}) = 2τ, c = 2/κ − 1. Put z = 2τ − u: then z eᶻ = c u e^{−u}, and t²v
    = τ²Λ(2 − Λ) = u z.
    """
    x, times = np.asarray(lam, float), np.asarray(t, float)
    return x / times * _lambert(x * times, kappa)


def scale_free_exponent(u: ArrayLike, kappa: float) -> Array:
    """Return d log F/d log u of F(u) = t²v, u = λt: 2 at u → 0, 1 at u = 1, falling beyond.

    It is 1 + (1 − u)/(1 + W(c u e^{−u})).
    """
    x = np.asarray(u, float)
    return 1 + (1 - x) / (1 + _lambert(x, kappa))


def _lambert(u: Array, kappa: float) -> Array:
    return np.real(lambertw((2 / _kappa(kappa) - 1) * u * np.exp(-u)))


def _kappa(kappa: float) -> float:
    why = "expected a number between 0 and 2 (at 2 the modes start where they end)"
    return checks.between("kappa", kappa, 0, 2, "()", why)


# --- A network whose gradient flow realises them


class _Modes(nn.Module):
    """f = Σ_k φ_k Π_l θ_lk: one product of L numbers a sample, and no coupling between samples."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(row.clone()) for row in factors])

    def forward(self, x: Tensor) -> Tensor:
        product = self.factors[0]
        for row in list(self.factors)[1:]:
            product = product * row
        return x @ product


def parallel_modes(
    targets: ArrayLike, starts: ArrayLike, *, depth: int = 2, imbalance: ArrayLike = 0.0
) -> Problem:
    """Return n modes f_k = Π_l θ_lk without coupling, each with its own target and eigenvalue.

    M is diagonal at all times: Ω = 0, and eigenvalues move on their own. Parameters layer by layer,
    (L n,).

    Parameters
    ----------
    targets, starts : (n,)
        y_k, and λ_k(0) > 0.
    depth : int
        Factors L ≥ 2; λ = Σ_l Π_{m≠l} θ_m², which is a² + b² for two and L a^{2L−2} for equal ones.
    imbalance : (n,) or number
        D = a² − b², constant in time; two factors only, |D| ≤ λ(0).
    """
    y, first = (np.asarray(x, float) for x in (targets, starts))
    d = np.broadcast_to(np.asarray(imbalance, float), y.shape)
    checks.shape("targets", y, ("n",))
    checks.positive("starts", checks.shape("starts", first, y.shape))
    if depth < 2 or (depth != 2 and np.any(d != 0)) or np.any(np.abs(d) > first):
        raise ValueError(
            f"depth {depth} with imbalance {imbalance!r}: expected depth ≥ 2, and |D| ≤ λ(0) for "
            "two factors or D = 0"
        )
    if depth == 2:
        factors = np.sqrt(np.stack([first + d, first - d]) / 2)
    else:
        factors = np.tile((first / depth) ** (1 / (2 * depth - 2)), (depth, 1))
    root = math.sqrt(len(y))
    eye = torch.eye(len(y), dtype=torch.float64)
    return Problem(_Modes(torch.tensor(factors)), root * eye, root * torch.tensor(y))
