"""Shells and their bounds for spectra, start vectors and edges that hypothesis picks.

Diagonal matrices are enough: Lanczos sees the eigenvalues and the start vector's energies alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd.spectrum import LogShells, SpectralMeasure, lanczos

SHORT = settings(derandomize=True, max_examples=60, deadline=None)
EIGENVALUES = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 10.0)), min_size=2, max_size=24)
EDGES = st.lists(st.floats(1e-4, 20.0), min_size=2, max_size=7, unique=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[SpectralMeasure, SpectralMeasure, np.ndarray]:
    """A measure after some Lanczos steps, the exact one, and edges: some of them eigenvalues."""
    eigenvalues = np.sort(draw(EIGENVALUES.filter(any)))
    size = len(eigenvalues)
    energies = np.array(draw(st.lists(st.floats(1e-6, 1.0), min_size=size, max_size=size)))
    hit = eigenvalues[draw(st.lists(st.integers(0, size - 1), max_size=2))]
    edges = np.unique([*draw(EDGES), *hit[hit > 0]])
    start, steps = torch.tensor(np.sqrt(energies)), draw(st.integers(1, size))
    mu = lanczos(torch.diag(torch.tensor(eigenvalues)), start, steps).measure()
    return mu, SpectralMeasure.exact(eigenvalues, energies), edges


@SHORT
@given(cases())
def test_bounds_hold_the_exact_measure_and_do_not_decrease(
    case: tuple[SpectralMeasure, SpectralMeasure, np.ndarray],
) -> None:
    mu, exact, edges = case
    lower, upper = mu.cdf_bounds(edges)
    slack = 1e-10 * mu.mass  # rounding of sums of 24, over gaps that Lanczos resolves
    for inside in (exact.nodes < edges[:, None], exact.nodes <= edges[:, None]):
        truth = (exact.weights * inside).sum(axis=1)
        assert (lower - slack <= truth).all() and (truth <= upper + slack).all()
    assert (np.diff(lower) >= 0).all() and (np.diff(upper) >= 0).all()
    assert (lower <= upper).all()


@SHORT
@given(cases())
def test_shells_lose_no_mass_and_their_intervals_hold_the_exact_energies(
    case: tuple[SpectralMeasure, SpectralMeasure, np.ndarray],
) -> None:
    mu, exact, edges = case
    found, truth = mu.shells(LogShells(edges)), exact.shells(LogShells(edges))
    slack = 1e-10 * mu.mass
    for profile in (found, truth):
        assert abs(profile.total - 0.5 * mu.mass) <= 1e-14 * 24 * mu.mass
    assert (found.lower - slack <= truth.energies).all()
    assert (truth.energies <= found.upper + slack).all()
    assert np.array_equal(truth.lower, truth.upper)
    assert np.abs(truth.lower - truth.energies).max() <= 1e-14 * 24 * mu.mass


@SHORT
@given(cases(), st.lists(st.floats(1e-4, 20.0), max_size=5))
def test_a_finer_division_nests_in_a_coarser_one(
    case: tuple[SpectralMeasure, SpectralMeasure, np.ndarray], more: list[float]
) -> None:
    mu, _, edges = case
    fine = np.unique([*edges, *more])
    shared = np.searchsorted(fine, edges)
    for one, other, sign in zip(mu.cdf_bounds(edges), mu.cdf_bounds(fine), (1, -1), strict=True):
        assert (sign * (other[shared] - one) >= 0).all()  # more edges can only tighten a bound
    wide, narrow = mu.shells(LogShells(edges)), mu.shells(LogShells(fine))
    rounding = 1e-14 * mu.mass
    for i, (a, b) in enumerate(pairwise(shared)):
        assert abs(narrow.energies[a:b].sum() - wide.energies[i]) <= rounding
        assert (narrow.upper[a:b] <= wide.upper[i] + rounding).all()
        assert narrow.lower[a:b].sum() <= wide.upper[i] + rounding


def test_a_node_at_an_edge_lies_in_the_shell_above_it() -> None:
    found = SpectralMeasure.exact([1.0, 2.0, 4.0], [1.0, 3.0, 5.0]).shells(
        LogShells(np.array([1.0, 2.0, 4.0]))
    )
    assert found.energies.tolist() == [0.5, 1.5] and (found.below, found.above) == (0.0, 2.5)
    assert found.counts.tolist() == [1, 1] and found.minima.tolist() == [0.5, 1.5]
    assert found.lower.tolist() == found.upper.tolist() == [0.5, 1.5]


def test_nodes_up_to_the_floor_are_the_kernel_and_no_others() -> None:
    floor = 4 * 2.0**-52
    mu = SpectralMeasure.exact([-floor / 2, 0.0, floor / 2, floor, 2 * floor, 1.0], np.arange(1, 7))
    assert mu.floor == floor and mu.in_kernel.tolist() == [True] * 4 + [False] * 2
    found = mu.shells(LogShells(np.array([floor / 4, 1.5 * floor, 0.5])))
    assert (found.kernel, found.below, found.above) == (5.0, 0.0, 3.0)
    assert found.energies.tolist() == [0.0, 2.5]
    assert found.lower.tolist() == found.upper.tolist() == [0.0, 2.5]


def test_below_zero_lies_at_most_the_kernel() -> None:
    eigenvalues, start = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([2.0, 1.0, 1.0])
    mu = lanczos(torch.diag(eigenvalues.double()), start.double(), 3).measure()
    lower, upper = mu.cdf_bounds([-1.0, -8 * mu.floor, -mu.floor / 2, 0.0])
    assert (lower == 0).all() and (upper[:2] == 0).all()
    assert np.allclose(upper[2:], 4.0, atol=1e-13)
    mu = replace(mu, semidefinite=True)
    lower, upper = mu.cdf_bounds([-1.0, -mu.floor, -mu.floor / 2, 0.0])
    assert (lower == 0).all() and (upper[:2] == 0).all()
    assert np.allclose(upper[2:], 4.0, atol=1e-13)
