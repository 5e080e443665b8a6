"""Shells lose nothing, intervals hold, and each statistic is shown what it must catch and what it must pass."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grsd.spectrum import LogShells, ShellProfile, SpectralMeasure, average, lanczos, statistics

from .test_lanczos import with_spectrum


def profile(energies: list[float], half_width: float = 0.0) -> ShellProfile:
    """Return a profile on shells [1, 2), [2, 4), … with these energies and relative half-widths."""
    e = np.array(energies, float)
    shells = LogShells(2.0 ** np.arange(e.size + 1))
    return ShellProfile(
        shells,
        e,
        e * (1 - half_width),
        e * (1 + half_width),
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        e,
        np.ones(e.size),
    )


def test_spanning_covers_and_aligns() -> None:
    shells = LogShells.spanning(0.3, 5.0)
    assert shells.edges.tolist() == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0] and len(shells) == 5
    assert LogShells.spanning(1.0, 4.0).edges.tolist() == [
        1.0,
        2.0,
        4.0,
        8.0,
    ]  # hi itself lies inside [4, 8)
    assert np.allclose(shells.centers, np.sqrt(2) * shells.edges[:-1])


@pytest.mark.parametrize(
    ("lo", "hi", "ratio"),
    [(0.0, 1.0, 2.0), (2.0, 1.0, 2.0), (1.0, float("inf"), 2.0), (1.0, 2.0, 1.0)],
)
def test_bad_spans_are_refused(lo: float, hi: float, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{lo}|{ratio}"):
        LogShells.spanning(lo, hi, ratio=ratio)


def test_bad_edges_are_refused() -> None:
    for edges in ([1.0], [2.0, 1.0], [0.0, 1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="edges"):
            LogShells(np.array(edges))


def test_energy_is_half_the_mass_and_none_is_lost() -> None:
    eigenvalues = np.concatenate([np.zeros(10), 10.0 ** np.linspace(-3, 1, 50)])
    M, start, energies = with_spectrum(eigenvalues, seed=1)
    mu = lanczos(M, start, 60).measure()
    for shells in (
        LogShells.spanning(1e-3, 10),
        LogShells(np.array([0.1, 1.0])),
        LogShells(np.array([50.0, 60.0])),
    ):
        p = mu.shells(shells)
        exact = SpectralMeasure.exact(eigenvalues, energies).shells(shells)
        assert p.total == pytest.approx(0.5 * energies.sum(), rel=1e-12)
        for name in ("below", "above", "kernel"):
            assert getattr(p, name) == pytest.approx(getattr(exact, name), abs=1e-7 * p.total)
        assert np.allclose(p.energies, exact.energies, atol=1e-7 * p.total)
    assert (
        p.energies.sum() == 0.0 and p.below > 0 and p.kernel > 0
    )  # edges that miss the spectrum: reported, not dropped
    assert p.kernel == pytest.approx(0.5 * energies[:10].sum(), rel=1e-7)


def test_intervals_hold_the_exact_energies() -> None:
    rng = np.random.default_rng(2)
    for case in range(40):
        eigenvalues = 10 ** rng.uniform(-3, 1, 80)
        M, start, energies = with_spectrum(eigenvalues, seed=case)
        p = lanczos(M, start, 12).measure().shells(shells := LogShells.spanning(1e-3, 10))
        exact = SpectralMeasure.exact(eigenvalues, energies).shells(shells).energies
        slack = 1e-10 * energies.sum()
        assert (exact >= p.lower - slack).all() and (exact <= p.upper + slack).all()
        assert (p.energies >= p.lower - slack).all() and (p.energies <= p.upper + slack).all()
        assert (
            np.abs(p.energies - exact).max() > 1e-3 * energies.sum()
        )  # without the interval one would be wrong


def test_average_carries_the_spread_over_batches() -> None:
    rng = np.random.default_rng(3)
    batches = [
        profile((np.array([1.0, 4.0, 2.0]) * (1 + 0.1 * rng.normal(size=3))).tolist())
        for _ in range(400)
    ]
    mean = average(batches)
    assert mean.batches == 400
    # standard error 0.1 E / sqrt(400); its own relative error is 1/sqrt(800), so 15 % is four of those
    assert np.allclose(mean.sem, 0.005 * np.array([1.0, 4.0, 2.0]), rtol=0.15)
    assert (np.abs(mean.energies - [1, 4, 2]) < 4 * mean.sem).all()
    assert np.allclose(mean.upper - mean.energies, 2 * mean.sem)
    assert average(batches[:1]).sem.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="different shells"):
        average([profile([1.0, 2.0]), profile([1.0, 2.0, 3.0])])
    with pytest.raises(ValueError, match="no profile"):
        average([])


def test_peak_and_its_interval() -> None:
    s = statistics(profile([1, 5, 9, 4, 1], half_width=0.1))
    assert s.peak == pytest.approx(np.sqrt(4 * 8)) and (s.peak_low, s.peak_high) == (4.0, 8.0)
    s = statistics(
        profile([1, 8, 9, 4, 1], half_width=0.1)
    )  # the neighbour's interval reaches the peak's
    assert (s.peak_low, s.peak_high) == (2.0, 8.0)


def test_frontier_is_the_99_percent_point() -> None:
    assert statistics(profile([98, 1, 1])).frontier == pytest.approx(4.0)
    assert statistics(profile([50, 0, 48, 2])).frontier == pytest.approx(8 * 2**0.5)
    assert statistics(profile([25, 50, 25])).median == pytest.approx(2 * 2**0.5)


def test_unimodality_catches_a_valley_and_passes_a_null() -> None:
    assert statistics(profile([1, 3, 9, 4, 1])).unimodal
    assert statistics(profile([5, 3, 1])).unimodal and statistics(profile([1, 3, 5])).unimodal
    two = statistics(profile([1, 6, 2, 8, 1], half_width=0.1))
    assert not two.unimodal and two.dip == pytest.approx(3.0)
    blurred = statistics(
        profile([1, 6, 5, 8, 1], half_width=0.2)
    )  # a valley that the intervals do not resolve
    assert blurred.unimodal and blurred.dip == pytest.approx(1.2)
    speck = statistics(
        profile([0.05, 0, 1, 9, 1])
    )  # half a percent of the peak beyond an empty shell is no second peak
    assert speck.unimodal and speck.dip == 1.0
    empty = statistics(profile([1, 4, 0, 4, 1]))
    assert not empty.unimodal and empty.dip == np.inf


def test_slope_of_the_low_side() -> None:
    assert statistics(profile([1, 2**0.7, 2**1.4, 2**2.1, 0.1])).slope == pytest.approx(0.7)
    assert np.isnan(statistics(profile([3, 1])).slope)
    with pytest.raises(ValueError, match="miss the spectrum"):
        statistics(profile([0, 0, 0]))


def test_json_round_trip() -> None:
    M, start, _ = with_spectrum(10.0 ** np.linspace(-3, 1, 40), seed=4)
    p = lanczos(M, start, 6).measure().shells(LogShells.spanning(1e-4, 10))
    assert np.isnan(p.minima).any()
    back = ShellProfile.from_json(json.loads(json.dumps(p.to_json())))
    for name in ("energies", "lower", "upper", "minima", "counts"):
        assert np.array_equal(getattr(back, name), getattr(p, name), equal_nan=True)
    assert (back.negative, back.below, back.above, back.kernel, back.floor) == (
        p.negative,
        p.below,
        p.above,
        p.kernel,
        p.floor,
    )


def test_a_node_at_an_edge_belongs_to_the_shell_above() -> None:
    found = SpectralMeasure.exact(np.array([1.0, 2.0, 4.0]), np.array([1.0, 10.0, 100.0]))
    binned = found.shells(LogShells(np.array([1.0, 2.0, 4.0, 8.0])))
    # [1, 2) holds 1, [2, 4) holds 2, [4, 8) holds 4: half of each energy
    assert binned.energies.tolist() == [0.5, 5.0, 50.0] and binned.above == binned.below == 0.0
    short = found.shells(LogShells(np.array([1.0, 2.0, 4.0])))
    assert short.energies.tolist() == [0.5, 5.0] and short.above == 50.0


def test_a_positive_node_within_rounding_of_zero_is_kernel() -> None:
    nodes, energies = np.array([1e-16, 1e-15, 1e-3, 1.0]), np.array([2.0, 4.0, 8.0, 16.0])
    found = SpectralMeasure.exact(nodes, energies)
    assert 1e-16 < found.floor < 1e-15  # 4 eps of the largest
    binned = found.shells(LogShells(10.0 ** np.arange(-17.0, 2.0)))
    assert binned.kernel == 1.0 and binned.energies.sum() == 14.0
    assert binned.energies[0] == binned.energies[1] == 0.0  # the shell of 1e-16 stays empty


def test_the_peak_shell_counts_for_the_slope() -> None:
    # without the last point the line through 1, 2, 4 has slope 1; with it the slope is
    # Σ x y/Σ x² for x = −3, −1, 1, 3 (halves) and log₂ E = 0, 1, 2, 5
    assert statistics(profile([1, 2, 4, 32])).slope == pytest.approx(2 * (3 * 5 + 2 - 1) / 20)
    # two shells and the peak are enough, two with the peak are not
    assert statistics(profile([1, 2, 8])).slope == pytest.approx(1.5)
    assert np.isnan(statistics(profile([1, 8])).slope)
