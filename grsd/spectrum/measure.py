"""The spectral measure of a vector: where on the λ axis its energy lies, and how sure one can be of it.

Nodes and weights come from :mod:`grsd.spectrum.krylov` (Gauss quadrature) or from a dense eigendecomposition (exact).
Binning into shells is in :mod:`grsd.spectrum.shells`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal, solve_banded

if TYPE_CHECKING:
    from grsd.spectrum.krylov import Tridiagonal
    from grsd.spectrum.shells import LogShells, ShellProfile

Array = NDArray[np.float64]
FLOOR = 4.0  # products are right to about eps; nodes within 4 eps of zero, relative to the largest, are rounding
RITZ = 1e7  # a Radau corner this large moves no node by more than 1e-7 of the spectrum: the edge is a Ritz value


@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete measure μ = Σ wᵢ δ(λ − θᵢ) that stands for the spectral measure of a start vector.

    Attributes
    ----------
    nodes : (m,) float64, ascending: Ritz values, or eigenvalues when the measure is exact.
    weights : (m,) float64, ≥ 0, summing to the mass ⟨start, start⟩.
    floor : float, 4 eps · max node: eigenvalues below it are rounding, and count as the kernel of M.
    tridiagonal : the Lanczos matrix it was made from, or None when nodes and weights are exact.
    """

    nodes: Array
    weights: Array
    floor: float
    tridiagonal: Tridiagonal | None = None

    @classmethod
    def from_tridiagonal(cls, tridiagonal: Tridiagonal) -> SpectralMeasure:
        """Gauss quadrature: nodes are the Ritz values, weights mass · U₁ᵢ² (Golub and Welsch)."""
        nodes, first = _eigen_first(tridiagonal.alphas, tridiagonal.betas)
        return cls(nodes, tridiagonal.mass * first, FLOOR * tridiagonal.eps * float(np.abs(nodes).max()), tridiagonal)

    @classmethod
    def exact(cls, eigenvalues: ArrayLike, energies: ArrayLike, *, eps: float = 2.0**-52) -> SpectralMeasure:
        """Return the measure of a dense eigendecomposition: eigenvalues (T,) and g_u² (T,) in the same inner product."""
        nodes, weights = np.asarray(eigenvalues, float), np.asarray(energies, float)
        if nodes.ndim != 1 or nodes.shape != weights.shape or nodes.size == 0:
            raise ValueError(f"eigenvalues {nodes.shape} and energies {weights.shape} must be equal vectors")
        if not (np.isfinite(nodes).all() and np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError("eigenvalues and energies must be finite, and no energy negative")
        order = np.argsort(nodes)
        return cls(nodes[order], weights[order], FLOOR * eps * float(np.abs(nodes).max()))

    @property
    def mass(self) -> float:
        return float(self.weights.sum())

    def moments(self, count: int) -> Array:
        """Return ∫ λᵏ dμ for k = 0 … count−1. With m Lanczos steps the first 2m are those of the true measure."""
        return np.array([np.sum(self.weights * self.nodes**k) for k in range(count)])

    def cdf_bounds(self, edges: ArrayLike) -> tuple[Array, Array]:
        """Return lower and upper bounds of μ(−∞, a) for every edge a: the Chebyshev–Markov–Stieltjes inequalities.

        Parameters
        ----------
        edges
            (n,) finite edges, in the units of λ.

        Returns
        -------
        lower, upper : (n,) float64
            With the 2m moments and the residual that m steps know, μ(−∞, a) of *any* measure on the line that has them
            lies between the two, and both ends are attained: they are read off the quadrature that has a as one of its
            nodes (Gauss–Radau). Edges within `floor` of a node are counted to both sides. An exact measure gives equal
            ends. Different measures attain them at different edges, so differences of bounds hold and are not sharp.

        Notes
        -----
        The bounds hold for Lanczos vectors that are orthogonal to rounding; for a tridiagonal matrix made without
        reorthogonalisation they are those of another measure. Cost: one (m+1)-sized tridiagonal problem per edge.
        Source: Golub and Meurant, Matrices, Moments and Quadrature, section 6.2; Krein and Nudelman, chapter 3.
        """
        points = np.asarray(edges, float)
        if points.ndim != 1 or not np.isfinite(points).all():
            raise ValueError(f"edges must be a vector of finite numbers, got {edges!r}")
        if self.tridiagonal is None:
            below = np.array([self.weights[self.nodes < a].sum() for a in points])
            return below, below.copy()
        pairs = [self._radau(float(a), self.tridiagonal) for a in points]
        lower, upper = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
        # F is non-decreasing, so a bound at one edge holds beyond it too
        order = np.argsort(points)
        lower[order] = np.maximum.accumulate(lower[order])
        upper[order] = np.minimum.accumulate(upper[order][::-1])[::-1]
        return lower, upper

    def _radau(self, a: float, tri: Tridiagonal) -> tuple[float, float]:
        if a <= 0.0:  # M is positive semidefinite
            return 0.0, float(self.weights[self.nodes <= self.floor].sum()) if a > -self.floor else 0.0
        extended = _with_node(tri, a)
        nodes, weights = self.nodes, self.weights
        under, up_to = nodes < a - self.floor, nodes <= a + self.floor
        if extended is not None:
            nodes, first = _eigen_first(*extended)
            weights = tri.mass * first
            index, node = np.arange(nodes.size), int(np.abs(nodes - a).argmin())
            under = (index < node) & (nodes < a - self.floor)
            up_to = (index <= node) | (nodes <= a + self.floor)
        return float(weights[under].sum()), float(weights[up_to].sum())

    def shells(self, shells: LogShells) -> ShellProfile:
        """Bin the energy ½ μ into logarithmic shells, with an interval for each; nothing outside them is dropped."""
        from grsd.spectrum.shells import ShellProfile

        return ShellProfile.of(self, shells)


def _eigen_first(diagonal: Array, off: Array) -> tuple[Array, Array]:
    """Return eigenvalues and squared first components of eigenvectors, which sum to one."""
    if diagonal.size == 1:
        return diagonal.copy(), np.ones(1)
    nodes, vectors = eigh_tridiagonal(diagonal, off)
    return nodes, vectors[0] ** 2


def _with_node(tri: Tridiagonal, a: float) -> tuple[Array, Array] | None:
    """Extend T_m by one row so that a becomes an eigenvalue (Gauss–Radau); None when T_m needs no extension.

    It needs none when every moment is known (no residual), or when a is a Ritz value already.
    """
    m, beta = tri.steps, tri.residual
    if beta == 0.0:
        return None
    banded = np.zeros((3, m))
    banded[0, 1:], banded[1], banded[2, :-1] = tri.betas, tri.alphas - a, tri.betas
    right = np.zeros(m)
    right[-1] = beta
    try:
        last = float(solve_banded((1, 1), banded, right, check_finite=False)[-1])
    except np.linalg.LinAlgError:
        return None
    corner = a + beta * last
    if not abs(corner) < RITZ * float(np.abs(tri.alphas).max()):
        return None
    return np.append(tri.alphas, corner), np.append(tri.betas, beta)
