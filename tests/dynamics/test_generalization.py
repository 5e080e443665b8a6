"""Test loss: rates against autodiff and differences, closed forms against integrators and matrix exponentials."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from grsd.dynamics.flow import around, central, integrate
from grsd.dynamics.generalization import FixedFeatures, heldout_rate, kernel_between
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import mlp
from grsd.spectrum import NTK, Outputs


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"train_error": np.zeros(9)},
            ValueError,
            r"train_error has shape \(9,\); expected \(10,\)",
        ),
        (
            {"test_features": np.zeros((7, 14))},
            ValueError,
            r"test_features has shape \(7, 14\); expected \(n, 15\)",
        ),
        (
            {"test_features": np.zeros((0, 15)), "test_error": np.zeros(0)},
            ValueError,
            "it is empty",
        ),
        ({"test_error": np.full(7, np.nan)}, ValueError, "not finite"),
        ({"train_error": np.zeros(10, dtype=np.float32)}, TypeError, "float32"),
        ({"train_features": np.zeros(10)}, ValueError, r"shape \(10,\); expected \(n, P\)"),
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


def test_the_operator_between_test_and_training_batch_gives_the_rate_without_jacobians() -> None:
    train, test = problems()
    M = NTK(mlp([3, 10, 1], seed=2).double(), train.inputs, Outputs(train.targets[:, None]))
    C = M.cross(test.inputs, Outputs(test.targets[:, None]))
    between = kernel_between(test, train, train.theta)
    assert np.allclose(C.to_dense().numpy() * 12, between, atol=1e-13 * np.abs(between).max())
    e_te = Outputs(test.targets[:, None]).error(C.outputs)
    rate = -float(e_te @ (C @ M.error)) / 9
    assert rate == pytest.approx(heldout_rate(train, test, train.theta), rel=1e-12)
