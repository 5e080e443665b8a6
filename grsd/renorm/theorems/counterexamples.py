"""Small networks whose gradient flow realises the closed forms of :mod:`grsd.renorm.theorems.closed_forms`, as `Problem` on fixed data.

Inputs are √n times the identity (or √n diag(s)), so that in ⟨u, v⟩ = (1/n) Σ u v the coordinate functions are orthonormal and no factor n
appears: the eigenvalues of M = J Jᵀ/n are those of the formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from grsd.dynamics.problem import Problem

__all__ = ["gain_network", "parallel_modes", "spiral"]


class _Modes(nn.Module):
    """f = Σ_k φ_k Π_l θ_lk: one product of L numbers for each sample, and no coupling between samples."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.ParameterList([nn.Parameter(row.clone()) for row in factors])

    def forward(self, x: Tensor) -> Tensor:
        product = self.factors[0]
        for row in list(self.factors)[1:]:
            product = product * row
        found: Tensor = x @ product
        return found


def parallel_modes(
    targets: ArrayLike, starts: ArrayLike, *, depth: int = 2, imbalance: ArrayLike = 0.0
) -> Problem:
    """Return n modes f_k = Π_l θ_lk without coupling, each with its target y_k and its own eigenvalue.

    Parameters
    ----------
    targets, starts : (n,)
        y_k, and λ_k(0) > 0.
    depth : int
        Factors L ≥ 2; λ = Σ_l Π_{m≠l} θ_m², which is a² + b² for two and L a^{2L−2} for equal ones.
    imbalance : (n,) or number
        D = a² − b², constant in time; two factors only, |D| ≤ λ(0).

    Returns
    -------
    Problem
        Parameters layer by layer, (L n,). M is diagonal at all times: Ω = 0, and eigenvalues move on their own.

    Raises
    ------
    ValueError
        Shapes that do not fit, starts that are not positive, or an imbalance that the start does not allow.
    """
    y, first = (np.asarray(x, float) for x in (targets, starts))
    d = np.broadcast_to(np.asarray(imbalance, float), y.shape)
    if y.ndim != 1 or y.shape != first.shape or not np.all(first > 0):
        raise ValueError(
            f"targets {y.shape} and starts {first.shape} must be equally long lists, and starts positive"
        )
    if depth < 2 or (depth != 2 and np.any(d != 0)) or np.any(np.abs(d) > first):
        raise ValueError(
            f"depth {depth} with imbalance {imbalance!r}: expected depth ≥ 2, and |D| ≤ λ(0) for two factors or D = 0"
        )
    if depth == 2:
        factors = np.sqrt(np.stack([first + d, first - d]) / 2)
    else:
        factors = np.tile((first / depth) ** (1 / (2 * depth - 2)), (depth, 1))
    return _on_identity(_Modes(torch.tensor(factors)), y)


class _Gain(nn.Module):
    """f = g Φ w with a number g; `x` is Φ."""

    def __init__(self, gain: float, weights: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([gain], dtype=torch.float64))
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.gain * (x @ self.weights)
        return found


def gain_network(singular: ArrayLike, y1: float, q0: float) -> Problem:
    """Return f = g Φ w with g² = w₁² = q₀, w = w₁ in the first mode, and the target y₁ there: the network of `ensembles.Gain`.

    Parameters
    ----------
    singular : (n,), positive
        Singular values s_k of Φ/√n. M = g² diag(s²) + s₁²w₁² in the first place; its modes do not turn.
    y1, q0 : float, target of the first mode and q₀ > 0.
    """
    s = np.asarray(singular, float)
    if s.ndim != 1 or len(s) < 2 or not np.all(s > 0) or not q0 > 0:
        raise ValueError(
            f"need two or more positive singular values and q0 > 0, got {s.tolist()} and {q0}"
        )
    n = len(s)
    weights = torch.zeros(n, dtype=torch.float64)
    weights[0] = math.sqrt(q0)
    goal = torch.zeros(n, dtype=torch.float64)
    goal[0] = math.sqrt(n) * y1
    return Problem(_Gain(math.sqrt(q0), weights), math.sqrt(n) * torch.diag(torch.tensor(s)), goal)


class _Spirals(nn.Module):
    """K planes, two parameters each: F_k = r(θ₁) ê(ψ(θ₁)) + θ₂ √β ê⊥(ψ), r = r₀ − pθ₁, ψ = (q/p) log(r/r₀)."""

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
        found: Tensor = x @ torch.stack([first, second], dim=1).reshape(-1)
        return found


def spiral(
    inward: ArrayLike = 1.0,
    across: ArrayLike = 1.0,
    normal: ArrayLike = 1.0,
    radius: ArrayLike = 1.0,
) -> Problem:
    """Return a network of two parameters and two samples, target 0, whose M(t) turns at a constant rate and keeps its eigenvalues.

    Its outputs run along a logarithmic spiral into the target, |e| = r₀ e^{−p²t}, with p = `inward`, q = `across`, β = `normal`. In the frame
    (ê, ê⊥) of the error M = [[p², pq], [pq, q² + β]] for ever, and the frame turns at the rate −pq. Arrays (K,), which broadcast, give K such
    planes side by side, with 2K samples and parameters; `ensembles.Spirals` is a family of them.

    Notes
    -----
    ∂F/∂θ₁ = −pê − qê⊥ and ∂F/∂θ₂ = √β ê⊥ on θ₂ = 0, where gradient flow from 0 stays because ⟨e, ê⊥⟩ = 0. Rotation without drift: the
    flux of energy is not zero, λ̇ is.
    """
    shape = np.stack(
        np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(x, float)) for x in (inward, across, normal, radius))
        )
    )
    if shape.ndim != 2 or not (shape[[0, 2, 3]] > 0).all():
        raise ValueError(
            f"inward = {inward!r}, normal = {normal!r}, radius = {radius!r}: all must be positive"
        )
    return _on_identity(_Spirals(torch.tensor(shape)), np.zeros(2 * shape.shape[1]))


def _on_identity(model: nn.Module, targets: np.ndarray) -> Problem:
    n = len(targets)
    scale = math.sqrt(n)
    return Problem(model, scale * torch.eye(n, dtype=torch.float64), scale * torch.tensor(targets))
