"""The fits of the chapter on a language model's shells: what was planted comes back.

Each shape loses where the other's was planted.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from grsd.spectrum import LogShells, ShellProfile

from .chapter_code import definitions

SHOWN = definitions("spectrum/language-model.md", "Fit", "fit", "frozen", "piecewise", "starts")
fit, frozen, piecewise = SHOWN.fit, SHOWN.frozen, SHOWN.piecewise
SHELLS = LogShells(2.0 ** np.arange(-10, 5))
DECAYS = np.log([2.0, 1.4, 1.3])  # C, p + 1 and κ


def profile(energies: np.ndarray) -> ShellProfile:
    n = np.ones(energies.size)
    return ShellProfile(SHELLS, energies, energies, energies, *[0.0] * 5, energies, n)


def test_frozen_shells_equal_quadrature() -> None:
    truth = [
        2.0 * quad(lambda x: x**0.4 * np.exp(-1.3 * x), a, b)[0]
        for a, b in zip(SHELLS.edges, SHELLS.edges[1:], strict=False)
    ]
    assert np.allclose(np.exp(frozen(DECAYS, SHELLS)), truth, rtol=1e-9)


def test_frozen_fit_recovers_planted_parameters() -> None:
    found = fit(frozen, profile(np.exp(frozen(DECAYS, SHELLS))))
    assert found.rms < 1e-6
    assert found.parameters == pytest.approx(DECAYS, abs=1e-5)


def test_piecewise_fit_follows_its_own_shape_better_than_the_null_does() -> None:
    s = np.log(SHELLS.centers)
    step = 1 / (1 + np.exp(-(s - 0.2) / 0.3))
    planted = profile(np.exp((1 - step) * (0.6 * s) + step * (1.0 - 0.9 * np.exp(s))))
    two, null = fit(piecewise, planted), fit(frozen, planted)
    assert two.rms < 0.02 < null.rms
    assert two.aic < null.aic


def test_extra_parameters_do_not_pay_on_the_null_with_noise() -> None:
    rng = np.random.default_rng(0)
    shape = np.exp(frozen(DECAYS - [np.log(2.0), 0, 0], SHELLS))
    wins = 0
    for _ in range(10):
        noisy = profile(shape * np.exp(0.1 * rng.normal(size=shape.size)))
        wins += fit(frozen, noisy, 1e-6).aic < fit(piecewise, noisy, 1e-6).aic
    assert wins >= 8  # the criterion prefers the planted three-parameter shape


def test_too_few_shells_are_refused() -> None:
    with pytest.raises(AssertionError, match="2 shells hold energy, too few for 6"):
        fit(piecewise, profile(np.r_[1.0, 2.0, np.zeros(12)]))
