"""Negative eigenvalues: proved bounds on the whole line, and a row of their own in a profile."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from grsd.figures import _remainder
from grsd.spectrum import (
    LogShells,
    ShellProfile,
    SpectralMeasure,
    Tridiagonal,
    average,
    lanczos,
    statistics,
)
from tests.spectrum.test_lanczos import with_spectrum


def test_bounds_of_the_smallest_example() -> None:
    M = torch.diag(torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64))
    lower, upper = lanczos(M, torch.ones(4, dtype=torch.float64), 4).measure().cdf_bounds([-0.5])
    assert lower[0] == pytest.approx(2.0, rel=1e-13) == upper[0]


@pytest.mark.parametrize("steps", [2, 5, 12])
def test_bounds_hold_on_the_whole_line(steps: int) -> None:
    rng = np.random.default_rng(steps)
    for seed in range(20):
        eigenvalues = np.sort(rng.normal(size=40))
        M, start, energies = with_spectrum(eigenvalues, seed)
        mu, edges = lanczos(M, start, steps).measure(), np.linspace(-2.5, 2.5, 41)
        lower, upper = mu.cdf_bounds(edges)
        truth = (energies * (eigenvalues < edges[:, None])).sum(axis=1)
        slack = 1e-10 * mu.mass
        assert (lower <= truth + slack).all() and (truth <= upper + slack).all()
        assert (lower <= upper).all()
        # they say something: at the middle they are closer together than nothing and everything
        assert (upper - lower)[20] < (0.999 if steps == 2 else 0.9) * mu.mass


def test_negative_mass_is_a_row_of_its_own_and_the_kernel_is_symmetric() -> None:
    eigenvalues = np.array([-3.0, -1.0, -1e-17, 0.0, 1e-17, 0.5, 3.0])
    energies = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    shells = LogShells(np.array([0.6, 4.0]))
    exact = SpectralMeasure.exact(eigenvalues, energies)
    M, start = torch.diag(torch.tensor(eigenvalues)), torch.tensor(energies).sqrt()
    for mu in (exact, lanczos(M, start, 7).measure()):
        p = mu.shells(shells)
        found = (p.negative, p.kernel, p.below, p.energies[0], p.above)
        assert found == pytest.approx((1.5, 14.0, 16.0, 32.0, 0.0), rel=1e-12)
        assert p.total == pytest.approx(63.5, rel=1e-14)
        back = ShellProfile.from_json(json.loads(json.dumps(p.to_json())))
        assert back.negative == p.negative and average([p, back]).negative == p.negative
        assert _remainder(p, p.energies).endswith("λ < 0 2.4 %")
    # of a matrix that is known to be semidefinite a negative node is rounding
    known = SpectralMeasure.exact(eigenvalues, energies, semidefinite=True).shells(shells)
    assert (known.negative, known.kernel) == (0.0, 15.5)
    # records without the row are those of semidefinite operators
    old = exact.shells(shells).to_json()
    del old["negative"]
    assert ShellProfile.from_json(old).negative == 0.0


def test_what_is_known_of_the_sign_travels() -> None:
    class Known(torch.Tensor):
        semidefinite = True

    M = torch.diag(torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64))
    one = torch.ones(4, dtype=torch.float64)
    known, plain = (lanczos(m, one, 2) for m in (M.as_subclass(Known), M))
    assert known.semidefinite and not plain.semidefinite
    assert Tridiagonal.from_json(known.to_json()).semidefinite
    old = known.to_json()
    del old["semidefinite"]
    assert not Tridiagonal.from_json(old).semidefinite
    # two steps cannot exclude mass below zero; what is known can
    assert known.measure().cdf_bounds([-0.1])[1] == 0.0 < plain.measure().cdf_bounds([-0.1])[1]


def test_ends_of_intervals_are_in_order_and_hold_the_energies() -> None:
    """Where all is known the ends are equal sums that round apart, which is what broke `statistics`."""
    rng = np.random.default_rng(0)
    for case in range(60):
        size = int(rng.integers(2, 40))
        eigenvalues = 10 ** rng.uniform(-3, 1, size)
        M, start, _ = with_spectrum(eigenvalues, case)
        for steps in (size, max(1, size // 2)):
            mu = lanczos(M, start, steps).measure()
            shells = LogShells.spanning(1e-4, 20.0, ratio=float(rng.uniform(1.5, 30.0)))
            lower, upper = mu.cdf_bounds(shells.edges)
            assert (lower <= upper).all()
            p = mu.shells(shells)
            assert (p.lower <= p.energies).all() and (p.energies <= p.upper).all()
            assert statistics(p).peak_low < statistics(p).peak_high
    # a stored profile whose ends crossed by a rounding has a peak all the same
    crossed = ShellProfile.from_json(
        {**p.to_json(), "lower": (p.energies * (1 + 1e-15)).tolist(), "upper": p.energies.tolist()}
    )
    assert statistics(crossed).peak == statistics(p).peak
