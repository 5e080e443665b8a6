"""A small network whose gradient flow realises :mod:`grsd.renorm.theorems.closed_forms`.

Inputs are √n times the identity, so that in ⟨u, v⟩ = (1/n) Σ u v the coordinate functions are
orthonormal and no factor n appears: the eigenvalues of M = J Jᵀ/n are those of the formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.problem import Problem

__all__ = ["parallel_modes"]


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
