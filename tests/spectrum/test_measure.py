"""The bounds against the truth, in every case; and against bounds that are too narrow, which must fail."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from grsd.spectrum import LogShells, SpectralMeasure, lanczos

from .test_lanczos import with_spectrum

SPECTRA = {
    "uniform": lambda rng, n: rng.uniform(0, 1, n),
    "log-uniform": lambda rng, n: 10 ** rng.uniform(-4, 1, n),
    "clustered": lambda rng, n: rng.choice([0.1, 1.0, 4.0], n) * (1 + 1e-3 * rng.normal(size=n)),
    "with kernel": lambda rng, n: np.where(rng.random(n) < 0.3, 0.0, rng.uniform(0.05, 2, n)),
    "power law": lambda rng, n: np.arange(1, n + 1) ** -1.5,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_contain_the_truth_in_every_case(name: str) -> None:
    """60 cases a spectrum, 300 in all; the allowance is rounding of the mass over 1e3 sums."""
    rng = np.random.default_rng(11)
    violations = narrow = intervals = 0
    for case in range(60):
        size = int(rng.integers(4, 100))
        eigenvalues = np.sort(SPECTRA[name](rng, size))
        M, start, energies = with_spectrum(eigenvalues, seed=case)
        mu = lanczos(M, start, int(rng.integers(1, size + 1))).measure()
        positive = eigenvalues[eigenvalues > 0]
        # edges between eigenvalues, so that rounding cannot decide on which side an eigenvalue lies
        edges = LogShells.spanning(positive.min(), positive.max(), ratio=1.9).edges
        edges = edges[np.abs(eigenvalues[:, None] / edges - 1).min(axis=0) > 1e-9]
        truth = np.array([energies[eigenvalues < a].sum() for a in edges])
        lower, upper = mu.cdf_bounds(edges)
        slack = 1e-10 * energies.sum()
        violations += int(((truth < lower - slack) | (truth > upper + slack)).sum())
        middle, half = (upper + lower) / 2, (upper - lower) / 8
        narrow += int(((truth < middle - half - slack) | (truth > middle + half + slack)).sum())
        intervals += edges.size
    assert intervals > 150 and violations == 0
    assert narrow > 0  # a quarter of the width would be caught: the test can fail


@pytest.mark.parametrize("edge", [0.02, 0.31, 0.52, 0.99])
def test_bounds_are_attained(edge: float) -> None:
    """Sharpness: a measure with the same moments up to order 2m, found by dense algebra, has the lower bound below the edge.

    With the edge's own node it has the upper bound. The neighbours' weights, which also bound, are wider.
    """
    M, start, _ = with_spectrum(np.linspace(0.05, 1, 40), seed=3)
    tri = lanczos(M, start, 8)
    mu = tri.measure()
    T = np.zeros((9, 9))
    T[:8, :8] = np.diag(tri.alphas) + np.diag(tri.betas, 1) + np.diag(tri.betas, -1)
    T[7, 8] = T[8, 7] = tri.residual
    # the corner that makes the edge an eigenvalue: the Schur complement of T − edge vanishes
    T[8, 8] = edge + T[8, :8] @ np.linalg.solve(T[:8, :8] - edge * np.eye(8), T[:8, 8])
    nodes, vectors = np.linalg.eigh(T)
    weights = tri.mass * vectors[0] ** 2
    reach = np.abs(nodes - 0.5).max()  # moments of (λ − ½)/reach, so that all powers lie in [−1, 1]
    true = float(start @ start) * np.array([central_moment(M, start, k, reach) for k in range(18)])
    ours = np.array([np.sum(weights * ((nodes - 0.5) / reach) ** k) for k in range(18)])
    rounding = 17 * 40 * 2.0**-52 * tri.mass  # 17 products over 40 entries
    assert np.abs(ours - true)[:17].max() < rounding < 0.1 * np.abs(ours - true)[17]
    at = int(np.abs(nodes - edge).argmin())
    lower, upper = mu.cdf_bounds(np.array([edge]))
    assert lower[0] == pytest.approx(weights[:at].sum(), abs=1e-12 * tri.mass)
    assert upper[0] == pytest.approx(weights[: at + 1].sum(), abs=1e-12 * tri.mass)
    place = int(np.searchsorted(mu.nodes, edge))
    assert upper[0] - lower[0] < mu.weights[max(place - 1, 0) : place + 1].sum()


def central_moment(M: torch.Tensor, start: torch.Tensor, k: int, reach: float) -> float:
    """⟨start, ((M − ½)/reach)ᵏ start⟩ / ⟨start, start⟩, by k products."""
    v = start
    for _ in range(k):
        v = (M @ v - 0.5 * v) / reach
    return float(start @ v / (start @ start))


def test_one_step_gives_the_classical_inequalities() -> None:
    """m = 1 knows mean and variance: an edge has Cantelli's bound, and a shell about the mean less than Chebyshev's."""
    x, w = (
        torch.tensor([8.0, 10.0, 12.0], dtype=torch.float64),
        torch.tensor([1.0, 6.0, 1.0], dtype=torch.float64) / 8,
    )
    mu = lanczos(torch.diag(x), w.sqrt(), 1).measure()  # mean 10, variance 1
    lower, upper = mu.cdf_bounds([8.5, 11.5])
    assert (lower[0], upper[0]) == (0.0, pytest.approx(1 / (1 + 1.5**2), rel=1e-14))
    assert (lower[1], upper[1]) == (pytest.approx(1 - 1 / (1 + 1.5**2), rel=1e-14), 1.0)
    shell = mu.shells(LogShells(np.array([8.5, 11.5])))
    assert 2 * shell.lower[0] == pytest.approx(1 - 2 / (1 + 1.5**2), rel=1e-14)
    assert (
        2 * shell.lower[0] < 1 - 1 / 1.5**2 <= float(w[1])
    )  # safe, and not the best that is known


def test_bounds_tighten_with_depth_and_close_when_exhausted() -> None:
    eigenvalues = np.linspace(0.05, 1, 40)
    M, start, energies = with_spectrum(eigenvalues, seed=9)
    widths = []
    for steps in (3, 6, 12, 24, 40):
        lower, upper = lanczos(M, start, steps).measure().cdf_bounds(np.array([0.3, 0.6]))
        widths.append((upper - lower).max())
    assert all(b < a for a, b in pairwise(widths))
    assert widths[-1] < 1e-9 * energies.sum()


def test_exact_measure_has_no_interval() -> None:
    mu = SpectralMeasure.exact([2.0, 1.0, 4.0], [1.0, 3.0, 5.0])
    lower, upper = mu.cdf_bounds([1.0, 1.5, 4.0, 9.0])
    assert lower.tolist() == upper.tolist() == [0.0, 3.0, 4.0, 9.0]
    assert mu.moments(2).tolist() == [9.0, 25.0]


@pytest.mark.parametrize(
    ("eigenvalues", "energies", "words"),
    [
        ([1.0], [1.0, 2.0], r"energies has shape \(2,\); there are 1"),
        ([1.0], [-1.0], "no energy is negative"),
        ([float("nan")], [1.0], "finite"),
    ],
)
def test_wrong_use_is_refused(eigenvalues: list[float], energies: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpectralMeasure.exact(eigenvalues, energies)
    with pytest.raises(ValueError, match="finite numbers"):
        SpectralMeasure.exact([1.0], [1.0]).cdf_bounds([float("inf")])
