"""The bounds against the truth, in every case; and against bounds that are too narrow, which must fail."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from grsd.spectrum import LogShells, SpectralMeasure, lanczos

from .test_krylov import with_spectrum

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


def test_bounds_are_attained() -> None:
    """Sharpness: the Gauss–Radau measure itself has the same moments, and its mass below the edge is the bound."""
    M, start, _ = with_spectrum(np.linspace(0.05, 1, 40), seed=3)
    mu = lanczos(M, start, 8).measure()
    lower, upper = mu.cdf_bounds(np.array([0.31]))
    adjacent = mu.weights[np.searchsorted(mu.nodes, 0.31) - 1 : np.searchsorted(mu.nodes, 0.31) + 1]
    assert (
        0 < upper[0] - lower[0] <= adjacent.sum()
    )  # never wider than the two neighbours' weights (audit, statement M)


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
    [([1.0], [1.0, 2.0], "equal vectors"), ([1.0], [-1.0], "no energy negative"), ([float("nan")], [1.0], "finite")],
)
def test_wrong_use_is_refused(eigenvalues: list[float], energies: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SpectralMeasure.exact(eigenvalues, energies)
    with pytest.raises(ValueError, match="finite numbers"):
        SpectralMeasure.exact([1.0], [1.0]).cdf_bounds([float("inf")])
