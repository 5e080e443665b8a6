"""The spectral measure of a vector: where on the λ axis its energy lies, and how sure one can be.

Nodes and weights come from :mod:`grsd.spectrum.lanczos` (Gauss quadrature) or from a dense
eigendecomposition (exact). What a binned measure is, is in :mod:`grsd.spectrum.shells`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal, solve_banded

from grsd import checks
from grsd.spectrum.shells import LogShells, ShellProfile

Array = NDArray[np.float64]
# in eps of the largest node: products are right to about eps, so nodes this near to zero are
# rounding
FLOOR = 4.0
# of the largest node: the rounding of the small eigenproblems, which parts nodes that agree
TIE = 2.0**-48
# of the mass, a step: the rounding of weights and of their sums
SUMS = 2.0**-50
# a Radau corner this large moves no node by more than 1e-7 of the spectrum: a is a Ritz value
RITZ = 1e7


@dataclass(frozen=True)
class Tridiagonal:
    """The Lanczos matrix T_m with everything that is needed to read it.

    Attributes
    ----------
    alphas, betas : (m,) and (m-1,) float64, the diagonal, and the positive off-diagonal.
    mass : float, ⟨start, start⟩ in the operator's inner product (1/n Σ for ``normalize="mean"``).
    residual : float, β_m, the norm of what the last step left over; 0 when m = T.
    eps : float, relative accuracy of a product.
    reorthogonalized : bool, False for Algorithm 1 as printed.
    exhausted : bool, True when it ended early because nothing above rounding was left.
    semidefinite : bool, True when M is known to have no negative eigenvalue.
    """

    alphas: Array
    betas: Array
    mass: float
    residual: float
    eps: float
    reorthogonalized: bool = True
    exhausted: bool = False
    semidefinite: bool = False

    @property
    def steps(self) -> int:
        return int(self.alphas.size)

    def measure(self) -> SpectralMeasure:
        """Return the Gauss quadrature: Ritz values, with weights mass · U₁ᵢ² (Golub and Welsch)."""
        nodes, first = eigen_first(self.alphas, self.betas)
        floor = FLOOR * self.eps * float(np.abs(nodes).max())
        return SpectralMeasure(nodes, self.mass * first, floor, self, self.semidefinite)

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers; `from_json` gives the same object bit for bit."""
        return asdict(self) | {"alphas": self.alphas.tolist(), "betas": self.betas.tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tridiagonal:
        arrays = {key: np.asarray(record[key], dtype=np.float64) for key in ("alphas", "betas")}
        return cls(**{**record, **arrays})


@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete measure μ = Σ wᵢ δ(λ − θᵢ) that stands for the spectral measure of a vector.

    Attributes
    ----------
    nodes : (m,) float64, ascending: Ritz values, or eigenvalues when the measure is exact.
    weights : (m,) float64, ≥ 0, summing to the mass ⟨start, start⟩.
    floor : float, 4 eps · max |node|: nodes within it are rounding, and count as the kernel of M.
    tridiagonal : the Lanczos matrix it was made from, or None when nodes and weights are exact.
    semidefinite : bool, M is known to have no negative eigenvalue: every negative node is rounding.
    """

    nodes: Array
    weights: Array
    floor: float
    tridiagonal: Tridiagonal | None = None
    semidefinite: bool = False

    @classmethod
    def exact(
        cls,
        eigenvalues: ArrayLike,
        energies: ArrayLike,
        *,
        eps: float = 2.0**-52,
        semidefinite: bool = False,
    ) -> SpectralMeasure:
        """Return the measure of a dense eigendecomposition: eigenvalues (T,) and g_u² (T,)."""
        nodes, weights = np.asarray(eigenvalues, float), np.asarray(energies, float)
        checks.finite("eigenvalues", checks.shape("eigenvalues", nodes, ("T",)))
        checks.at_least("number of eigenvalues", nodes.size, 1)
        checks.shape("energies", weights, nodes.shape, f"there are {nodes.size} eigenvalues")
        checks.at_least("energies", weights, 0.0, "no energy is negative")
        order = np.argsort(nodes)
        floor = FLOOR * eps * float(np.abs(nodes).max())
        return cls(nodes[order], weights[order], floor, semidefinite=semidefinite)

    @property
    def mass(self) -> float:
        return float(self.weights.sum())

    @property
    def in_kernel(self) -> NDArray[np.bool_]:
        """Which nodes cannot be told from ker M, (m,)."""
        return (self.nodes if self.semidefinite else np.abs(self.nodes)) <= self.floor

    def moments(self, count: int) -> Array:
        """Return ∫ λᵏ dμ for k < count. The first 2m of m Lanczos steps are the true measure's."""
        return np.array([np.sum(self.weights * self.nodes**k) for k in range(count)])

    def cdf_bounds(self, edges: ArrayLike) -> tuple[Array, Array]:
        """Return lower and upper bounds (n,) of μ(−∞, a) for every one of n finite edges a.

        These are the Chebyshev–Markov–Stieltjes inequalities. With the 2m moments and the residual
        that m steps know, μ(−∞, a) of *any* measure on the line that has them lies between the two,
        and both ends are attained: they are read off the quadrature that has a as one of its nodes
        (Gauss–Radau). Nodes that agree with an edge to rounding count to both sides. An exact
        measure gives equal ends. No sign is assumed, except where M is known to be semidefinite.
        Different measures attain the bounds at different edges, so that differences of bounds hold
        and are not sharp.

        Without reorthogonalisation they are those of another measure. Cost: one (m+1)-sized
        tridiagonal problem per edge. Source: Golub and Meurant, Matrices, Moments and Quadrature,
        section 6.2; Krein and Nudelman, chapter 3.
        """
        points = checks.finite("edges", np.asarray(edges, float), "expected finite numbers")
        checks.shape("edges", points, ("n",))
        if self.tridiagonal is None:
            below = np.array([self.weights[self.nodes < a].sum() for a in points])
            return below, below.copy()
        pairs = [self._radau(float(a), self.tridiagonal) for a in points]
        lower, upper = np.array(pairs).reshape(-1, 2).T
        # μ(−∞, a) does not decrease in a, so a bound at one edge holds beyond it too
        order = np.argsort(points)
        lower[order] = np.maximum.accumulate(lower[order])
        upper[order] = np.minimum.accumulate(upper[order][::-1])[::-1]
        # ends that are equal are sums of different quadratures, which round apart
        slack = SUMS * self.tridiagonal.steps * self.mass
        highest = np.maximum(upper, np.minimum(upper + slack, self.mass))
        return np.maximum(lower - slack, 0.0), np.where(upper > 0, highest, 0.0)

    def _radau(self, a: float, tri: Tridiagonal) -> tuple[float, float]:
        if a <= 0.0 and self.semidefinite:  # only rounding lies there
            return 0.0, float(self.weights[self.in_kernel].sum()) if a > -self.floor else 0.0
        nodes, weights = self.nodes, self.weights
        tie = TIE * float(np.abs(nodes).max())
        near = max(self.floor, tie)
        under, up_to = nodes < a - near, nodes <= a + near
        # where a is a Ritz value already, the corner of an extension would be 0/0
        extended = None if (np.abs(nodes - a) <= tie).any() else with_node(tri, a)
        if extended is not None:
            # of the quadrature with a node at a, whose weight is what the bounds differ by
            nodes, first = eigen_first(*extended)
            weights = tri.mass * first
            index, node = np.arange(nodes.size), int(np.abs(nodes - a).argmin())
            under = (index < node) & (nodes < a - near)
            up_to = (index <= node) | (nodes <= a + near)
        return float(weights[under].sum()), float(weights[up_to].sum())

    def shells(self, shells: LogShells) -> ShellProfile:
        """Bin the energy ½ μ into shells, with an interval for each; nothing is dropped."""
        edges, nodes, half, kernel = shells.edges, self.nodes, 0.5 * self.weights, self.in_kernel
        index = np.where(kernel, -1, np.searchsorted(edges, nodes, side="right") - 1)
        inside = [half[index == i] for i in range(len(shells))]
        energies = np.array([e.sum() for e in inside])
        low, high = energies, energies
        if self.tridiagonal is not None:
            below, up_to = self.cdf_bounds(edges)
            # the quadrature is one of the measures that the interval holds, to rounding
            low = np.minimum(0.5 * np.maximum(below[1:] - up_to[:-1], 0.0), energies)
            high = np.maximum(0.5 * (up_to[1:] - below[:-1]), energies)
        return ShellProfile(
            shells=shells,
            energies=energies,
            lower=low,
            upper=high,
            negative=float(half[~kernel & (nodes < 0)].sum()),
            below=float(half[~kernel & (nodes >= 0) & (nodes < edges[0])].sum()),
            above=float(half[~kernel & (nodes >= edges[-1])].sum()),
            kernel=float(half[kernel].sum()),
            floor=self.floor,
            minima=np.array([e.min() if e.size else np.nan for e in inside]),
            counts=np.array([e.size for e in inside], float),
        )


def eigen_first(diagonal: Array, off: Array) -> tuple[Array, Array]:
    """Return eigenvalues and squared first components of eigenvectors, which sum to one."""
    if diagonal.size == 1:
        return diagonal.copy(), np.ones(1)
    # a power of two keeps LAPACK inside its range, and leaves every digit as it is
    power = int(np.frexp(max(np.abs(diagonal).max(), np.abs(off).max()))[1])
    nodes, vectors = eigh_tridiagonal(np.ldexp(diagonal, -power), np.ldexp(off, -power))
    return np.ldexp(nodes, power), vectors[0] ** 2


def with_node(tri: Tridiagonal, a: float) -> tuple[Array, Array] | None:
    """Extend T_m by one row so that a becomes an eigenvalue (Gauss–Radau).

    None when no extension is needed: every moment is known (no residual), or a is a Ritz value.
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
    # the Schur complement of T_{m+1} − a vanishes
    corner = a + beta * last
    if not abs(corner) < RITZ * float(np.abs(tri.alphas).max()):
        return None
    return np.append(tri.alphas, corner), np.append(tri.betas, beta)
