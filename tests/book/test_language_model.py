"""What the chapter on a language model's shells measures: planted moves come back, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from grsd.spectrum import SpectralMeasure

from .chapter_code import definitions

SHOWN = definitions("spectrum/language-model.md", "SHELLS", "moves", "overlap", "decayed", "shells")
GRID = np.geomspace(2.0**-18, 2.0**3, 6001)


def law(exponent: float, top: float, amplitude: float = 1.0) -> SpectralMeasure:
    """Energy (λ/top)^exponent below λ, up to `top`."""
    nodes = GRID[top >= GRID]
    share = np.diff((nodes / top) ** exponent, prepend=0.0)
    return SpectralMeasure.exact(nodes, amplitude * share)


def test_planted_moves_come_back() -> None:
    first = SHOWN.shells([law(0.5, 4.0), law(0.5, 4.0, 1.1)])
    last = SHOWN.shells([law(0.5, 1.0), law(0.5, 1.0, 1.1)])
    median, frontier, low = SHOWN.moves(first, last)
    # two octaves to the left; under λ the energy of a power law ½ grows by 4^½, one octave
    assert median == pytest.approx([-2, -2], abs=0.02)
    assert frontier == pytest.approx([-2, -2], abs=0.02)
    assert low == pytest.approx([1, 1], abs=0.02)
    # and back again
    for there, back in zip(SHOWN.moves(first, last), SHOWN.moves(last, first), strict=True):
        assert there == pytest.approx(-back)


def test_what_only_loses_energy_does_not_move() -> None:
    first, last = SHOWN.shells([law(0.5, 4.0)]), SHOWN.shells([law(0.5, 4.0, 0.25)])
    median, frontier, low = SHOWN.moves(first, last)
    assert median == pytest.approx([0]) and frontier == pytest.approx([0])
    assert low == pytest.approx([-2])


def test_decay_in_place_has_the_energy_of_the_end_and_loses_its_top() -> None:
    before, after = law(0.5, 4.0), law(0.5, 4.0, 0.5)
    profile = SHOWN.decayed(before, after)
    assert profile.total == pytest.approx(0.5 * after.mass, rel=1e-6)
    # the weight of every shell lies between the decay at its two edges
    start = before.shells(SHOWN.SHELLS)
    held = start.energies > 0
    kept = profile.energies[held] / start.energies[held]
    assert (np.diff(kept) < 0).all()  # the larger λ, the less is left
    assert (SHOWN.moves([start], [profile])[0] < 0).all()


def test_overlap_tells_shapes_apart() -> None:
    a, b, far = (law(x, top).shells(SHOWN.SHELLS) for x, top in ((0.5, 4), (0.6, 4), (5.0, 0.01)))
    assert SHOWN.overlap(a, a) == pytest.approx(1)
    assert SHOWN.overlap(a, far) < 0.2 < 0.9 < SHOWN.overlap(a, b)
