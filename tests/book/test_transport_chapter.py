"""What the chapter on transport defines: the printed density, and the solutions that keep their shape."""

from __future__ import annotations

import numpy as np
import pytest

from grsd.dynamics import transport
from grsd.dynamics.transport import CovariantDrift, PowerSpectrum
from grsd.dynamics.transport_solvers import particles

from .chapter_code import definitions

SHOWN = definitions("dynamics/transport.md", "printed_density", "self_similar")
RATIONAL = CovariantDrift(lambda x: 0.5 / (1 + x), lambda x: -0.5 / (1 + x) ** 2)
TIMES = np.geomspace(1.0, 1000.0, 25)


def soft(p: float) -> PowerSpectrum:
    return PowerSpectrum(p, soft=3.0)


def test_printed_density_has_residual_c0_over_t() -> None:
    def residual(
        f, c0: float, lam: float, t: float
    ) -> float:  # relative, by central differences of step 1e-5: error 1e-10
        d = 1e-5
        by_t = (f(lam, t + d * t) - f(lam, t - d * t)) / (2 * d * t)
        flux = [c0 * x / t * f(x, t) for x in (lam * (1 + d), lam * (1 - d))]
        return float((by_t + (flux[0] - flux[1]) / (2 * d * lam) + 2 * lam * f(lam, t)) / f(lam, t))

    for c0 in (-1.5, -0.5, 0.0, 0.5, 1.0):
        printed = residual(
            lambda x, t, c0=c0: SHOWN.printed_density(x, t, c0, soft(0.5)), c0, 0.3, 2.0
        )
        exact = residual(lambda x, t, c0=c0: transport.density(x, t, c0, soft(0.5)), c0, 0.3, 2.0)
        assert printed == pytest.approx(c0 / 2.0, abs=1e-8)
        assert exact == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("p", [-0.5, 0.5])
def test_particles_which_know_no_divergence_see_the_same_power_law(p: float) -> None:
    """`self_similar` takes H' from the drift; particles only move. A start without xH' is bent."""
    flat = CovariantDrift(RATIONAL.H, lambda x: 0.0 * x)  # xH' dropped from the start alone
    bends = []
    for known in (RATIONAL, flat):
        run = particles(
            lambda lam, known=known: SHOWN.self_similar(known, p, lam),
            RATIONAL,
            TIMES,
            window=(1e-14, 60.0),
            count=20_000,
        )
        level = run.loss * TIMES ** (1.5 * (p + 1))
        bends.append(level.max() / level.min() - 1)
    # strata of 0.002 in log λ, one random lump each: 1e-4 with room
    assert bends[0] < 1e-3 < 1e-2 < bends[1]


def test_self_similar_solution_for_a_constant_drift_is_the_known_one() -> None:
    x = np.geomspace(1e-6, 40.0, 50)
    for c0, p in ((0.5, 0.5), (-0.5, -0.5), (0.0, 1.0)):
        found = SHOWN.self_similar(CovariantDrift.linear(c0), p, x)
        assert found == pytest.approx(x**p * np.exp(-2 * x / (1 + c0)), rel=1e-9)


@pytest.mark.parametrize(
    ("H", "p", "words"), [(-1.0, 0.5, "λt cannot grow"), (0.5, -1.0, "energy is infinite")]
)
def test_a_drift_without_a_self_similar_solution_is_refused(H: float, p: float, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        SHOWN.self_similar(CovariantDrift.linear(H), p, np.array([1.0]))
