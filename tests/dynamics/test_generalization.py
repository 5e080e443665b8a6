"""Test loss: rates against autodiff and differences, closed forms against integrators and matrix exponentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from grsd.dynamics.flow import Problem, around, central, integrate
from grsd.dynamics.generalization import (
    FixedFeatures,
    heldout_rate,
    joint,
    kernel_between,
    mismatch,
    rise,
    shell_weight,
    turning_points,
)
from grsd.lab.nets.models import mlp


def problems(n: int = 12, m: int = 9) -> tuple[Problem, Problem]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n + m, 3, generator=g, dtype=torch.float64)
    y = torch.sin(x.sum(1)) + torch.randn(n + m, generator=g, dtype=torch.float64)
    train = Problem(mlp([3, 10, 1], seed=2), x[:n], y[:n])
    return train, train.on(x[n:], y[n:])


def features(seed: int = 0, n: int = 10, m: int = 7, p: int = 15) -> FixedFeatures:
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1, 0.03, p)
    return FixedFeatures(
        rng.normal(size=(n, p)) * scale,
        rng.normal(size=n),
        rng.normal(size=(m, p)) * scale,
        rng.normal(size=m),
    )


def test_rate_is_minus_the_product_of_gradients_and_the_derivative_along_the_flow() -> None:
    train, test = problems()
    signs = set()
    for theta in integrate(train, [0.0, 1.0, 30.0], rtol=1e-6, estimate=False).thetas:
        rate = heldout_rate(train, test, theta)
        a, b = test.velocity(theta), train.velocity(theta)
        scale = float(a.norm() * b.norm())
        assert abs(rate + float(a @ b)) < 1e-13 * scale  # some hundred roundings
        nearby = around(train, theta, h := 0.004)  # (h λ_max)⁸ is far below rounding / h
        assert abs(central([test.loss(x) for x in nearby.thetas], h) - rate) < 1e-10 * scale
        assert (
            abs(rate - float(b @ b)) > 1e-3 * scale
        )  # the reversed sign and the training rate would be seen
        signs.add(rate > 0)
    assert signs == {True, False}  # a falling and a rising instance


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


def test_fixed_features_equal_the_matrix_exponential_and_an_integrator() -> None:
    model = features()
    phi, e0 = (
        np.concatenate([model.train_features, model.test_features]),
        np.concatenate([model.train_error, model.test_error]),
    )
    operator = phi @ np.concatenate([model.train_features, np.zeros((7, 15))]).T / 10
    times = [0.0, 0.3, 4.0, 60.0]
    for t in times:
        e = expm(-operator * t) @ e0
        assert model.train_losses(t)[0] == pytest.approx(0.5 * np.mean(e[:10] ** 2), abs=1e-13)
        assert np.allclose(model.test_errors(t)[0], e[10:], rtol=0, atol=1e-12)
        assert model.test_losses(t)[0] == pytest.approx(0.5 * np.mean(e[10:] ** 2), abs=1e-12)
        rate = -np.mean(e[10:] * (operator @ e)[10:])
        assert model.test_rates(t)[0] == pytest.approx(rate, abs=1e-12)
    done = solve_ivp(
        lambda t, e: -operator @ e,
        (0, 60),
        e0,
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
        t_eval=times,
    )
    assert np.allclose(
        0.5 * np.mean(done.y[10:] ** 2, axis=0), model.test_losses(times), atol=1e-10
    )


def test_limit_is_the_solution_of_least_norm() -> None:
    model = features()
    least = np.linalg.lstsq(model.train_features, model.train_error, rcond=None)[0]
    assert np.allclose(
        model.test_errors(np.inf)[0], model.test_error - model.test_features @ least, atol=1e-11
    )
    assert np.allclose(model.residual, model.test_errors(np.inf)[0], atol=1e-12)
    tall = features(n=30, p=6)  # fewer features than samples: energy in ker M stays
    left = (
        tall.train_error
        - tall.train_features
        @ np.linalg.lstsq(tall.train_features, tall.train_error, rcond=None)[0]
    )
    assert tall.train_losses(np.inf)[0] == pytest.approx(0.5 * np.mean(left**2), rel=1e-12)


def test_modes_are_one_function_on_two_samples() -> None:
    model = features()
    phi = model.train_modes
    assert np.allclose(phi.T @ phi / 10, np.eye(phi.shape[1]), atol=1e-13)
    cross = model.test_features @ model.train_features.T
    assert np.allclose(
        cross @ phi / (10 * model.eigenvalues), model.test_modes, atol=1e-11
    )  # Nyström
    diagonal = np.diag(mismatch(phi, model.test_modes))
    assert np.allclose(diagonal, (model.test_modes**2).mean(axis=0) - 1, atol=1e-12)
    assert diagonal.min() >= -1 - 1e-12


def test_tangent_is_the_linearized_problem() -> None:
    train, test = problems()
    model = FixedFeatures.tangent(train, test, train.theta)
    frozen = train.linearized(train.theta)
    path = integrate(frozen, [0.0, 2.0, 20.0], rtol=1e-11, estimate=False)
    held = frozen.on(test.inputs, test.targets)
    assert np.allclose(
        [held.loss(x) for x in path.thetas], model.test_losses(path.times), atol=1e-8
    )
    assert np.allclose(path.losses, model.train_losses(path.times), atol=1e-8)
    assert np.allclose(
        kernel_between(test, train, train.theta),
        model.test_features @ model.train_features.T,
        atol=1e-12,
    )


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
    lam, d = np.array([0.1, 0.2, 0.6, 0.7, 3.0]), np.array([1.0, 2.0, -0.5, -0.5, 9.0])
    weight, counts = shell_weight(lam, d, np.array([0.0, 0.5, 1.0, 2.0]))
    assert weight.tolist() == [3.0, -1.0, 0.0] and counts.tolist() == [2, 2, 0]
    twice = shell_weight(np.repeat(lam, 2), np.repeat(d, 2), np.array([0.0, 0.5, 1.0, 2.0]))[0]
    assert np.array_equal(twice, weight)
    printed = [
        shell_weight(
            np.repeat(lam, k), np.repeat(d, k), np.array([0.0, 0.5, 1.0, 2.0]), printed=True
        )[0]
        for k in (1, 2)
    ]
    assert printed[0].tolist() == [6.0, -2.0, 0.0] and np.array_equal(printed[1], 2 * printed[0])


def test_turning_points_and_rise() -> None:
    t = np.linspace(0, 4 * np.pi, 1000)
    assert turning_points(3 + np.cos(t)) == pytest.approx([4, 2, 4, 2, 4], abs=1e-4)
    assert rise(3 + np.cos(t)) == pytest.approx(2, abs=1e-4)
    falling = np.exp(-t)
    assert turning_points(falling).tolist() == [falling[0], falling[-1]] and rise(falling) == 1.0
    wiggle = 1 + 1e-5 * np.cos(t)
    assert len(turning_points(wiggle)) == 2 and len(turning_points(wiggle, tolerance=1e-7)) > 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_error": np.zeros(9)}, ValueError, "10 rows and train_error has 9 entries"),
        (
            {"test_features": np.zeros((7, 14))},
            ValueError,
            "15 features on the training samples and 14",
        ),
        (
            {"test_features": np.zeros((0, 15)), "test_error": np.zeros(0)},
            ValueError,
            "it is empty",
        ),
        ({"test_error": np.full(7, np.nan)}, ValueError, "not finite"),
        ({"train_error": np.zeros(10, dtype=np.float32)}, TypeError, "float32"),
        ({"train_features": np.zeros(10)}, ValueError, "expected 2 dimensions"),
        ({"train_features": np.zeros((10, 15))}, ValueError, "all zero"),
    ],
)
def test_bad_samples_are_refused(
    change: dict[str, np.ndarray], error: type[Exception], message: str
) -> None:
    good = features()
    parts = {
        name: getattr(good, name)
        for name in ("train_features", "train_error", "test_features", "test_error")
    }
    with pytest.raises(error, match=message):
        FixedFeatures(**(parts | change))


def test_bad_arguments_are_refused() -> None:
    train, _ = problems()
    other = Problem(mlp([3, 4, 1], seed=0), train.inputs, train.targets)
    with pytest.raises(ValueError, match=r"Problem\.on"):
        kernel_between(other, train, train.theta)
    with pytest.raises(ValueError, match="0 or later"):
        features().test_losses(-1.0)
    with pytest.raises(ValueError, match="3 functions on the training samples and 2"):
        mismatch(np.ones((4, 3)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="2 eigenvalues and 1"):
        shell_weight(np.ones(2), np.ones(1), np.array([0.0, 2.0]))
    with pytest.raises(ValueError, match="ascending"):
        shell_weight(np.ones(2), np.ones(2), np.array([2.0, 0.0]))
    with pytest.raises(ValueError, match="no eigenvalue lies"):
        shell_weight(np.ones(2), np.ones(2), np.array([2.0, 3.0]))
    with pytest.raises(ValueError, match="must be positive"):
        rise(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="empty"):
        turning_points(np.array([]))
