"""How fast error energy moves along the λ axis of a network: velocity v(λ, t), its two parts, and what bounds it.

Energy crosses an edge of the λ axis in two ways. An eigenvalue carries its own energy with it (advective), and
eigenvectors turn, which moves energy between eigenvalues (Kato). `edge_flux` measures both at one instant, `Drift` holds
them along a path and reduces them to c = t v/λ. Balances of shells, which need the same fluxes, are in
`grsd.dynamics.balance`; the model that takes c for a constant is in `grsd.dynamics.transport`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = [
    "Drift",
    "EdgeFlux",
    "Interval",
    "PowerLaw",
    "Trend",
    "constant_drift_loss",
    "edge_flux",
    "interval",
    "loss_exponent_of",
    "realizability",
    "trend",
]

PARTS = ("advective", "kato", "total")


class EdgeFlux(NamedTuple):
    """Energy near each edge, and energy that crosses it upwards per unit time. All arrays have one entry per edge."""

    energy: np.ndarray  # energy per unit of log λ, ½ Σ λ χ'(λ) g²
    advective: np.ndarray  # ½ Σ χ'(λ) λ̇ g²
    kato: np.ndarray  # ½ Σ_{u≠v} χ[λ_u, λ_v] Ṁ_uv g_u g_v


class Interval(NamedTuple):
    """A mean with its 95 % interval over seeds (Student's t) and the seeds' standard deviation."""

    mean: float
    low: float
    high: float
    sd: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Trend(NamedTuple):
    """Slope of a least-squares line with its 95 % interval (Student's t)."""

    slope: float
    low: float
    high: float


class PowerLaw(NamedTuple):
    """A fit |v| ∝ λ^a t^b over the cells that were selected, the R² of log |v|, and the share of cells selected."""

    a: float
    b: float
    r2: float
    selected: float


def _check(kernel: Tensor, rate: Tensor, error: Tensor) -> None:
    n = error.shape[0] if error.ndim == 1 else -1
    if kernel.shape != (n, n) or rate.shape != (n, n):
        shapes = tuple(kernel.shape), tuple(rate.shape), tuple(error.shape)
        raise ValueError(f"kernel, rate and error have the shapes {shapes}; expected (n, n), (n, n) and (n,)")
    if not kernel.dtype == rate.dtype == error.dtype == torch.float64:
        raise TypeError(f"kernel, rate and error are {kernel.dtype}, {rate.dtype}, {error.dtype}; convert to float64")


def edge_flux(kernel: Tensor, rate: Tensor, error: Tensor, edges: Sequence[float] | np.ndarray, order: float = 1):
    raise NotImplementedError
