"""Fits recover what was planted, and each loses where the other's shape was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from grsd.spectrum import LogShells, ShellProfile, fits

SHELLS = LogShells(2.0 ** np.arange(-10, 5))


def profile(energies: np.ndarray) -> ShellProfile:
    n = np.ones(energies.size)
    return ShellProfile(SHELLS, energies, energies, energies, 0.0, 0.0, 0.0, 0.0, energies, n)


def test_gamma_shells_equal_quadrature() -> None:
    found = np.exp(fits.log_gamma_shells(SHELLS, 0.4, 1.3))
    truth = [
        quad(lambda x: x**0.4 * np.exp(-1.3 * x), a, b)[0]
        for a, b in zip(SHELLS.edges, SHELLS.edges[1:], strict=False)
    ]
    assert np.allclose(found, truth, rtol=1e-9)
    with pytest.raises(ValueError, match=r"p = -1\.5"):
        fits.log_gamma_shells(SHELLS, -1.5, 1.0)


def test_frozen_fit_recovers_planted_parameters() -> None:
    fit = fits.frozen(profile(2.0 * np.exp(fits.log_gamma_shells(SHELLS, 0.4, 1.3))))
    assert fit.rms < 1e-6
    assert np.exp(fit.parameters["log_p_plus_1"]) - 1 == pytest.approx(0.4, abs=1e-5)
    assert np.exp(fit.parameters["log_kappa"]) == pytest.approx(1.3, rel=1e-5)


def test_piecewise_fit_follows_its_own_shape_better_than_the_null_does() -> None:
    s = np.log(SHELLS.centers)
    step = 1 / (1 + np.exp(-(s - 0.2) / 0.3))
    planted = profile(np.exp((1 - step) * (0.6 * s) + step * (1.0 - 0.9 * np.exp(s))))
    two, null = fits.piecewise(planted), fits.frozen(planted)
    assert two.rms < 0.02 < null.rms
    assert two.aic < null.aic


def test_extra_parameters_do_not_pay_on_the_null_with_noise() -> None:
    rng = np.random.default_rng(0)
    shape = np.exp(fits.log_gamma_shells(SHELLS, 0.4, 1.3))
    wins = 0
    for _ in range(10):
        noisy = profile(shape * np.exp(0.1 * rng.normal(size=shape.size)))
        wins += fits.frozen(noisy, share=1e-6).aic < fits.piecewise(noisy, share=1e-6).aic
    assert wins >= 8  # the criterion prefers the planted three-parameter shape


def test_too_few_shells_are_refused() -> None:
    with pytest.raises(ValueError, match="2 shells hold energy, too few for 6"):
        fits.piecewise(profile(np.r_[1.0, 2.0, np.zeros(12)]))
