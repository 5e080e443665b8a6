"""One instant in the eigenbasis of M: eigenvalues, their rates, the coupling Ω, the mode equation.

Kato's formulas need Ṁ, which :meth:`grsd.dynamics.problem.Problem.kernel_rate` gives by exact
autodiff. Where eigenvalues repeat, single modes have no derivative; `divided` needs no gaps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from grsd import checks
from grsd.dynamics.problem import Problem, Vector

__all__ = ["Modes", "as_array", "divided", "in_float64", "instant", "modes"]

Array = Tensor | np.ndarray


def in_float64(name: str, array: Array, sizes: tuple[int | str, ...]) -> Array:
    """Return a finite array or tensor of that shape; other precisions than float64 are refused."""
    if str(array.dtype) not in ("float64", "torch.float64"):
        raise TypeError(f"{name} is {array.dtype}; identities hold in float64 only, convert it")
    return checks.finite(name, checks.shape(name, array, sizes))


def as_array(name: str, array: Array, sizes: tuple[int | str, ...]) -> np.ndarray:
    checked = in_float64(name, array, sizes)
    return checked.detach().cpu().numpy() if isinstance(checked, Tensor) else checked


@dataclass(frozen=True)
class Modes:
    """M, Ṁ and e in the eigenbasis of M at one instant; index order is ascending eigenvalue.

    Attributes
    ----------
    eigenvalues : (n,), λ_u ascending.
    vectors : (n, n), columns φ_u with ⟨φ_u, φ_v⟩ = (1/n) Σ φ_u φ_v = δ_uv.
    coefficients : (n,), g_u = ⟨e, φ_u⟩, so that Σ g_u² = ⟨e, e⟩.
    matrix : (n, n), ⟨φ_u, Ṁ φ_v⟩; symmetric to rounding, not made so.
    in_kernel : (n,) bool, modes of ker M: λ_u at or below `floor`.
    floor : float, n ε λ_max: below it an eigenvalue is rounding.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    coefficients: np.ndarray
    matrix: np.ndarray
    in_kernel: np.ndarray
    floor: float

    @property
    def rates(self) -> np.ndarray:
        """λ̇_u = ⟨φ_u, Ṁ φ_u⟩, (n,), the diagonal of `matrix`."""
        return np.diagonal(self.matrix).copy()

    def repeated(self) -> np.ndarray:
        """Pairs (u, u+1) of non-zero eigenvalues that agree to `floor`, as an (r, 2) array."""
        u = np.flatnonzero((np.diff(self.eigenvalues) <= self.floor) & ~self.in_kernel[:-1])
        return np.stack([u, u + 1], axis=1)

    @cached_property
    def coupling(self) -> np.ndarray:
        """Ω, (n, n): `coupling[u, v]` = Ω_{v→u} = ⟨φ_u, Ṁ φ_v⟩/(λ_v − λ_u) = ⟨φ_u, φ̇_v⟩.

        Antisymmetric. Inside ker M the basis is free to turn; here it does not, Ω = 0. Other
        eigenvalues that repeat are refused: their eigenvectors have no derivative.
        """
        if len(pairs := self.repeated()):
            first, second = self.eigenvalues[pairs[0]]
            raise ValueError(
                f"{len(pairs)} pair(s) of eigenvalues repeat, e.g. {first:.6g} and {second:.6g} "
                f"(closer than {self.floor:.1g}): single modes have no derivative there. Use "
                "modes.divided or the soft shells of grsd.dynamics.balance, which need no gaps"
            )
        gaps = self.eigenvalues[None, :] - self.eigenvalues[:, None]  # λ_v − λ_u
        free = np.eye(len(gaps), dtype=bool) | (self.in_kernel[:, None] & self.in_kernel[None, :])
        return np.where(free, 0.0, self.matrix / np.where(free, 1.0, gaps))

    @property
    def vector_rates(self) -> np.ndarray:
        """φ̇, (n, n): column v is Σ_u Ω_{v→u} φ_u."""
        return self.vectors @ self.coupling

    @property
    def coefficient_rates(self) -> np.ndarray:
        """ġ, (n,), by the mode equation ġ_u = −λ_u g_u − Σ_v Ω_{v→u} g_v."""
        return -self.eigenvalues * self.coefficients - self.coupling @ self.coefficients


def modes(M: Array, rate: Array, error: Array, *, floor: float | None = None) -> Modes:
    """Diagonalise M = J Jᵀ/n, and express Ṁ (`rate`) and e (`error`) in its eigenbasis.

    M and rate are (n, n), symmetric, error is (n,), all in float64. Eigenvalues up to `floor`, by
    default n ε λ_max, belong to ker M. Cost: one eigenproblem. Source: 2512.10427, section 3.1.
    """
    n = len(error)
    e = as_array("error", error, (n,))
    a, b = as_array("M", M, (n, n)), as_array("rate", rate, (n, n))
    for name, m in (("M", a), ("rate", b)):
        skew = np.abs(m - m.T).max()
        if skew > 1e-10 * max(np.abs(m).max(), np.finfo(float).tiny):
            raise ValueError(f"{name} is not symmetric: the largest |a − aᵀ| is {skew:.3g}")
    # orthonormal columns in R^n are φ_u/√n in the measure of the samples
    eigenvalues, columns = np.linalg.eigh((a + a.T) / 2)
    largest = float(np.abs(eigenvalues).max())
    least = n * np.finfo(float).eps * largest if floor is None else floor
    if eigenvalues[0] < -max(least, 1e-12 * largest):
        raise ValueError(f"M has the eigenvalue {eigenvalues[0]:.3g}: J Jᵀ has none below 0")
    return Modes(
        eigenvalues=eigenvalues,
        vectors=columns * np.sqrt(n),
        coefficients=columns.T @ e / np.sqrt(n),
        matrix=columns.T @ ((b + b.T) / 2) @ columns,
        in_kernel=eigenvalues <= least,
        floor=least,
    )


def instant(problem: Problem, theta: Vector) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (M, Ṁ, e) of gradient flow at θ as arrays, for `modes`. Cost: about four Jacobians."""
    M, rate, error = problem.kernel(theta), problem.kernel_rate(theta), problem.error(theta)
    return M.cpu().numpy(), rate.cpu().numpy(), error.cpu().numpy()


def divided(
    at: Modes,
    function: Callable[[np.ndarray], np.ndarray],
    derivative: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Return d/dt of function(M(t)), (n, n) in the eigenbasis, by Daleckii and Krein, without gaps.

    Its entries are [function(λ_u) − function(λ_v)]/(λ_u − λ_v) · ⟨φ_u, Ṁ φ_v⟩, with `derivative`
    for the quotient where the two agree. Repeated eigenvalues are harmless.
    """
    x = at.eigenvalues
    gaps, rise = x[:, None] - x[None, :], function(x)[:, None] - function(x)[None, :]
    # below that gap the derivative in the middle is closer than a quotient of roundings
    middle = derivative((x[:, None] + x[None, :]) / 2)
    near = np.abs(gaps) <= 1e-5 * np.maximum(np.abs(x[:, None]), np.abs(x[None, :])) + at.floor
    return np.where(near, middle, rise / np.where(near, 1.0, gaps)) * at.matrix
