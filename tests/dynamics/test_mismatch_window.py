"""The transport model's test loss: its rate against differences in time and against moving lumps of energy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.integrate import quad

from grsd.dynamics.flow import central
from grsd.dynamics.mismatch_window import Window, closure_loss, closure_rate
from grsd.dynamics.transport import density

SPAN = (1e-18, 1e3)


def start(u: np.ndarray) -> np.ndarray:
    return np.asarray((1 + 100 * u) ** -2.5)


def at(t: float, c0: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda lam: density(lam, t, c0, start)


WINDOWS = [
    Window(0.02, 0.5, 0.2),
    Window(0.002, 0.5, 30.0, ramp=1.0),
    Window(0.002, 0.5, -1.5, ramp=0.4),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("c0", "t"), [(0.3, 1.5), (1.0, 4.0), (-0.5, 20.0), (0.0, 3.0)])
def test_rate_is_the_derivative_of_the_loss(window: Window, c0: float, t: float) -> None:
    h = 0.01 * t
    slope = central([closure_loss(at(t + k * h, c0), window, SPAN) for k in range(-4, 5)], h)
    rate = closure_rate(at(t, c0), window, c0, t, SPAN)
    assert slope == pytest.approx(rate.total, rel=1e-9)
    assert rate.dissipation < 0
    if c0:
        assert abs(slope - (rate.dissipation - rate.transport)) > 1e-3 * abs(
            slope
        )  # the sign of w′ is seen
    else:
        assert rate.transport == 0


def test_rate_is_that_of_moving_lumps() -> None:
    # Each lump at λ(t) = u t^c0 carries ε0 du exp(−u K): no partial derivative, no integration by parts.
    c0, t, window = 0.7, 2.0, Window(0.002, 0.5, 30.0, ramp=1.0)
    u = np.geomspace(1e-9, 1e2, 200_001)
    energy = start(u) * u * np.log(u[1] / u[0])

    def loss(time: float) -> float:
        clock = 2 / (1 + c0) * (time ** (1 + c0) - 1)
        return float(np.sum(energy * np.exp(-u * clock) * (1 + window(u * time**c0) / 2)))

    slope = central([loss(t + k * 0.02) for k in range(-4, 5)], 0.02)
    assert slope == pytest.approx(closure_rate(at(t, c0), window, c0, t, SPAN).total, rel=1e-6)


def test_amplitude_may_grow_while_the_test_loss_falls() -> None:
    window, lam = WINDOWS[0], np.geomspace(0.02, 0.5, 50)
    for t in (1.0, 1.3, 3.0, 10.0, 29.0):
        u = lam * t**-0.3
        assert (
            1 - 250 * u / (1 + 100 * u) + 2 * u / 1.3
        ).max() < -0.01  # t ∂ₜ log A = −c0 times this: it grows
        assert closure_rate(at(t, 0.3), window, 0.3, t, SPAN).total < 0


def test_a_steep_window_over_a_moving_lump_raises_the_test_loss() -> None:
    def lump(t: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda lam: density(
            lam, t, 1.0, lambda u: np.exp(-0.5 * (np.log(u / 1e-4) / 0.3) ** 2) / u
        )

    steep, flat = Window(1e-3, 1.0, 6.0, ramp=0.5), Window(1e-5, 1.0, 6.0)
    assert closure_rate(lump(13.0), steep, 1.0, 13.0, SPAN).total > 0
    assert (
        closure_rate(lump(13.0), flat, 1.0, 13.0, SPAN).total < 0
    )  # the same lump inside: nothing to climb


@pytest.mark.parametrize(
    "window", [Window(0.1, 2.0, 3.0, ramp=0.7), Window(0.1, 2.0, -2.0, ramp=np.log(20) / 2)]
)
def test_window_is_continuous_and_its_slope_is_its_derivative(window: Window) -> None:
    lam = np.linspace(0.05, 2.5, 201)
    h = 1e-6
    assert np.allclose((window(lam + h) - window(lam - h)) / (2 * h), window.slope(lam), atol=1e-7)
    assert window(0.09) == window(2.1) == 0 and window(np.sqrt(0.2)) == pytest.approx(window.height)
    assert quad(window.slope, 0.1, np.sqrt(0.2), epsabs=1e-10)[0] == pytest.approx(
        window.height, abs=1e-8
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"-2\.5 is below −2"):
        Window(0.1, 1.0, -2.5)
    with pytest.raises(ValueError, match="0 < lower < upper"):
        Window(1.0, 0.1, 1.0)
    with pytest.raises(ValueError, match="half of the window"):
        Window(0.1, 0.2, 1.0, ramp=1.0)
    with pytest.raises(ValueError, match="not finite"):
        Window(0.1, np.nan, 1.0)
    with pytest.raises(ValueError, match="jumps"):
        WINDOWS[0].slope(np.array([0.1]))
    with pytest.raises(ValueError, match="span must be"):
        closure_loss(start, WINDOWS[0], (1.0, 0.1))
    with pytest.raises(ValueError, match="holds no energy"):
        closure_loss(np.zeros_like, WINDOWS[0], SPAN)
    with pytest.raises(ValueError, match="not finite"):
        closure_loss(lambda lam: lam * np.nan, WINDOWS[0], SPAN)
    with pytest.raises(ValueError, match="entry by entry"):
        closure_loss(lambda lam: lam[:3], WINDOWS[0], SPAN)
    with pytest.raises(ValueError, match="t > 0"):
        closure_rate(start, WINDOWS[0], 1.0, 0.0, SPAN)
