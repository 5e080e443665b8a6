"""What the chapter on double descent defines: the mismatch, curves, and the transport model's test loss.

Its rate is held against differences in time and against moving lumps of energy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from grsd.dynamics.flow import around, central
from grsd.dynamics.generalization import FixedFeatures
from grsd.dynamics.problem import Problem
from grsd.dynamics.transport import density
from grsd.lab.nets.models import mlp

from .chapter_code import definitions

SHOWN = definitions(
    "dynamics/double-descent.md",
    *("Rate", "Window", "closure_loss", "closure_rate", "integral"),
    *("joint", "mismatch", "rise", "shell_weight", "turning_points"),
)
Window, closure_loss, closure_rate = SHOWN.Window, SHOWN.closure_loss, SHOWN.closure_rate
joint, mismatch, shell_weight = SHOWN.joint, SHOWN.mismatch, SHOWN.shell_weight
rise, turning_points = SHOWN.rise, SHOWN.turning_points

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


def problems(n: int = 12, m: int = 9) -> tuple[Problem, Problem]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n + m, 3, generator=g, dtype=torch.float64)
    y = torch.sin(x.sum(1)) + torch.randn(n + m, generator=g, dtype=torch.float64)
    train = Problem(mlp([3, 10, 1], seed=2), x[:n], y[:n])
    return train, train.on(x[n:], y[n:])


def test_joint_operator_moves_both_errors_and_is_not_symmetric() -> None:
    train, test = problems()
    operator, error = joint(train, test, train.theta)
    nearby = around(train, train.theta, h := 0.004)
    for part, problem in ((operator[:12], train), (operator[12:], test)):
        slope = central(np.array([problem.error(x).numpy() for x in nearby.thetas]), h)
        assert np.allclose(slope, -part @ error, rtol=0, atol=1e-9 * np.abs(slope).max())
    assert np.linalg.norm(operator - operator.T) > 0.5 * np.linalg.norm(operator)
    assert np.array_equal(operator[:, 12:], np.zeros((21, 9)))
    assert np.allclose(operator[:12, :12], train.kernel(train.theta).numpy(), atol=1e-12)


def test_mismatch_of_fixed_functions_has_the_variance_of_the_text() -> None:
    rng = np.random.default_rng(1)
    n, m, draws = 40, 80, 4000

    def wave(size: int) -> np.ndarray:
        return np.asarray(
            np.sqrt(2) * np.cos(2 * np.pi * rng.random((size, 1)) * np.array([1, 7, 50]))
        )

    found = np.array([np.diag(mismatch(wave(n), wave(m))) for _ in range(draws)])
    expected = 0.5 * (1 / n + 1 / m)  # (Eψ⁴ − 1)(1/n + 1/m) with Eψ⁴ = 3/2
    assert np.allclose(found.var(axis=0), expected, rtol=0.12)  # 5 standard errors √(2/draws)
    assert np.abs(found.mean(axis=0)).max() < 5 * np.sqrt(expected / draws)


def test_weight_is_a_mean_and_splitting_modes_changes_nothing() -> None:
    edges = np.array([0.0, 0.5, 1.0, 2.0])
    lam, d = np.array([0.1, 0.2, 0.6, 0.7, 3.0]), np.array([1.0, 2.0, -0.5, -0.5, 9.0])
    weight = shell_weight(lam, d, edges)
    assert weight.tolist() == [3.0, -1.0, 0.0]
    assert np.array_equal(shell_weight(np.repeat(lam, 2), np.repeat(d, 2), edges), weight)
    printed = [shell_weight(np.repeat(lam, k), np.repeat(d, k), edges, True) for k in (1, 2)]
    assert printed[0].tolist() == [6.0, -2.0, 0.0] and np.array_equal(printed[1], 2 * printed[0])


def test_turning_points_and_rise() -> None:
    t = np.linspace(0, 4 * np.pi, 1000)
    assert turning_points(3 + np.cos(t)) == pytest.approx([4, 2, 4, 2, 4], abs=1e-4)
    assert rise(3 + np.cos(t)) == pytest.approx(2, abs=1e-4)
    falling = np.exp(-t)
    assert turning_points(falling).tolist() == [falling[0], falling[-1]] and rise(falling) == 1.0
    wiggle = 1 + 1e-5 * np.cos(t)
    assert len(turning_points(wiggle)) == 2 and len(turning_points(wiggle, tolerance=1e-7)) > 2


def test_no_noise_and_no_motion_of_the_kernel_go_down_up_down() -> None:
    rho, s = 0.8, 0.05
    x = np.sqrt(2) * np.linalg.cholesky([[1, rho * s], [rho * s, s * s]]).T
    z, target = np.sqrt(2) * np.diag([1, s]), np.array([0.4, 1 / s])
    model = FixedFeatures(x, x @ target, z, z @ target)
    turns = turning_points(model.test_losses(np.r_[0, np.geomspace(1e-2, 1e5, 400)]))
    assert len(turns) == 4 and turns[-1] < 1e-12
    assert turns[:3] == pytest.approx(
        [0.58, 0.5, 0.82], abs=0.02
    )  # ½(a²+b²), ½b², ½(b²+ρ²b²) as s → 0
    null = FixedFeatures(
        z, z @ target, z, z @ target
    )  # uncorrelated in training too: it only falls
    assert rise(null.test_losses(np.r_[0, np.geomspace(1e-2, 1e4, 400)])) == 1.0


def test_the_mismatch_of_modes_on_their_own_sample_is_that_of_their_values_elsewhere() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(10, 15)), rng.normal(size=(7, 15))
    model = FixedFeatures(train, rng.normal(size=10), test, rng.normal(size=7))
    diagonal = np.diag(mismatch(model.train_modes, model.test_modes))
    assert np.allclose(diagonal, (model.test_modes**2).mean(axis=0) - 1, atol=1e-12)
    assert diagonal.min() >= -1 - 1e-12
