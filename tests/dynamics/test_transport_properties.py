"""What transport must keep for drifts, spectra and units that hypothesis picks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd.dynamics import transport
from grsd.dynamics.transport import CovariantDrift, PowerSpectrum
from grsd.dynamics.transport_solvers import finite_volume, particles

SHORT = settings(derandomize=True, max_examples=25, deadline=None)
DRIFTS = st.floats(-1.5, 1.5)
SPECTRA = st.builds(
    PowerSpectrum,
    p=st.floats(-0.8, 2.0),
    low=st.floats(1e-4, 1e-2),
    high=st.floats(0.1, 10.0),
    soft=st.one_of(st.just(np.inf), st.floats(0.1, 10.0)),
)
TIMES = np.array([1.0, 3.0, 20.0])
BOX = (1e-5, 30.0)


def bent(c0: float, turn: float) -> CovariantDrift:
    """H = c0/(1 + turn·x): a drift that is c0 at small x = λt."""
    return CovariantDrift(lambda x: c0 / (1 + turn * x), lambda x: -c0 * turn / (1 + turn * x) ** 2)


@SHORT
@given(SPECTRA, DRIFTS, st.floats(0.0, 2.0))
def test_energy_is_moved_escapes_or_dissipates_and_nothing_else(
    spectrum: PowerSpectrum, c0: float, turn: float
) -> None:
    drift = bent(c0, turn)
    # sums of 60 cells over some hundred steps, each rounded at 1e-16
    assert finite_volume(spectrum, drift, TIMES, window=BOX, cells=60).budget.max() < 1e-12
    free = finite_volume(spectrum, drift, TIMES, window=BOX, cells=60, dissipation=False)
    assert np.abs((free.loss + free.escaped) / free.loss[0] - 1).max() < 1e-12
    assert not free.dissipated.any() and free.energies.min() > -1e-12 * free.loss[0]
    lumps = particles(spectrum, drift, TIMES, window=BOX, count=50, dissipation=False)
    assert np.array_equal(lumps.energies, lumps.energies[:1].repeat(3, axis=0))
    damped = particles(spectrum, drift, TIMES, window=BOX, count=50)
    assert np.array_equal(damped.positions, lumps.positions)  # damping moves nothing
    assert (np.diff(damped.loss) < 0).all() and (np.diff(lumps.positions) > 0).all()


@SHORT
@given(SPECTRA, DRIFTS, st.floats(0.2, 5.0))
def test_a_change_of_the_unit_of_time_changes_nothing_but_units(
    spectrum: PowerSpectrum, c0: float, b: float
) -> None:
    """λ → bλ and t → t/b: ε0 gains b^(−p) in form and each energy b^(p+1) in size."""
    size = b ** (spectrum.p + 1)
    other = PowerSpectrum(spectrum.p, b * spectrum.low, b * spectrum.high, b * spectrum.soft)
    lam = np.geomspace(1e-3, 5.0, 9)
    one = transport.density(lam, 7.0, c0, spectrum)
    two = transport.density(b * lam, 7.0 / b, c0, other, t0=1.0 / b)
    inside = (one > 0) & (two > 0)  # rounding may put a point on either side of the window's end
    assert np.allclose(two[inside] * b / size, one[inside], rtol=1e-10, atol=1e-300)
    late = transport.loss(TIMES / b, c0, other, t0=1.0 / b)
    assert np.allclose(late / size, transport.loss(TIMES, c0, spectrum), rtol=1e-8)
    slopes = [
        transport.local_exponent(t, c0, s, t0=t0)
        for t, s, t0 in ((TIMES, spectrum, 1.0), (TIMES / b, other, 1.0 / b))
    ]
    assert np.allclose(*slopes, rtol=1e-8)
    drift, box = bent(c0, 1.0), (b * BOX[0], b * BOX[1])
    ours = finite_volume(spectrum, drift, TIMES, window=BOX, cells=40)
    theirs = finite_volume(other, drift, TIMES / b, window=box, cells=40)
    assert np.allclose(theirs.energies / size, ours.energies, rtol=1e-9, atol=1e-12 * ours.loss[0])


@SHORT
@given(SPECTRA, DRIFTS, st.floats(1.5, 50.0))
def test_the_loss_is_the_integral_of_the_density(
    spectrum: PowerSpectrum, c0: float, t: float
) -> None:
    ends = spectrum.low * t**c0, spectrum.high * t**c0  # the window is carried along
    whole = transport.quadrature(lambda x: transport.density(x, t, c0, spectrum), *ends, panels=200)
    assert abs(whole / float(transport.loss(t, c0, spectrum)) - 1) < 1e-8
