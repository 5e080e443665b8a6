"""Small networks whose gradient flow realises :mod:`grsd.renorm.theorems.closed_forms`.

Inputs are √n times the identity, so that in ⟨u, v⟩ = (1/n) Σ u v the coordinate
functions are orthonormal and no factor n appears: the eigenvalues of M = J Jᵀ/n are those of the
formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.problem import Problem

__all__ = ["parallel_modes", "spiral"]


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
    return _on_identity(_Modes(torch.tensor(factors)), y)


class _Spirals(nn.Module):
    """K planes: F_k = r ê(ψ) + θ₂ √β ê⊥(ψ), r = r₀ − pθ₁, ψ = (q/p) log(r/r₀)."""

    shape: Tensor

    def __init__(self, shape: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, shape.shape[1], dtype=torch.float64))
        self.register_buffer("shape", shape)

    def forward(self, x: Tensor) -> Tensor:
        inward, across, normal, radius = self.shape
        r = radius - inward * self.theta[0]
        angle = across / inward * torch.log(r / radius)
        push = self.theta[1] * torch.sqrt(normal)
        first = r * torch.cos(angle) - push * torch.sin(angle)
        second = r * torch.sin(angle) + push * torch.cos(angle)
        return x @ torch.stack([first, second], dim=1).reshape(-1)


def spiral(
    inward: ArrayLike = 1.0,
    across: ArrayLike = 1.0,
    normal: ArrayLike = 1.0,
    radius: ArrayLike = 1.0,
) -> Problem:
    """Return a network whose M(t) turns at a constant rate and keeps its eigenvalues.

    It has two parameters, two samples and the target 0. Its outputs run along a logarithmic spiral
    into the target, |e| = r₀ e^{−p²t}, with p = `inward`, q = `across`, β = `normal`, r₀ =
    `radius`, all but q positive. In the frame (ê, ê⊥) of the error M = [[p², pq], [pq, q² + β]] for
    ever, and the frame turns at the rate −pq. Arrays (K,), which broadcast, give K such planes side
    by side, with 2K samples and parameters.

    ∂F/∂θ₁ = −pê − qê⊥ and ∂F/∂θ₂ = √β ê⊥ on θ₂ = 0, where gradient flow from 0 stays because ⟨e,
    ê⊥⟩ = 0. Rotation without drift: the flux of energy is not zero, λ̇ is.
    """
    given = {"inward": inward, "across": across, "normal": normal, "radius": radius}
    arrays = {name: np.atleast_1d(np.asarray(x, float)) for name, x in given.items()}
    for name in ("inward", "normal", "radius"):
        checks.positive(name, checks.shape(name, arrays[name], ("K",)))
    shape = np.stack(np.broadcast_arrays(*arrays.values()))
    return _on_identity(_Spirals(torch.tensor(shape)), np.zeros(2 * shape.shape[1]))


def _on_identity(model: nn.Module, targets: np.ndarray) -> Problem:
    n = len(targets)
    scale = math.sqrt(n)
    return Problem(model, scale * torch.eye(n, dtype=torch.float64), scale * torch.tensor(targets))
