"""Lemma 1 between flows, closed-form fields and their networks: each against an integrator, autodiff or computer algebra."""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.integrate import solve_ivp

from grsd.dynamics.flow import integrate
from grsd.dynamics.modes import Modes, instant, modes
from grsd.dynamics.problem import Problem
from grsd.dynamics.transport import CovariantDrift
from grsd.lab.nets.models import mlp
from grsd.renorm.theorems.closed_forms import (
    BalancedModes,
    balanced_eigenvalue,
    balanced_velocity,
    parallel_modes,
    scale_free_exponent,
    scale_free_velocity,
)
from grsd.renorm.theorems.covariance import between_flows, rescaled

EDGES = np.geomspace(1e-2, 1.0, 4)
Data = tuple[torch.nn.Module, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 2, dtype=torch.float64, generator=generator)
    return mlp([2, 8, 1], seed=0), x, torch.sin(2 * x[:, 0])


def look(problem: Problem, theta: np.ndarray | torch.Tensor) -> Modes:
    return modes(*instant(problem, theta))


# --- Lemma 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.5, 3.0])
def test_between_the_flows_of_L_and_aL_everything_scales(data: Data, a: float) -> None:
    found = between_flows(
        Problem(*data), rescaled(*data, a), a, np.array([0.3, 1.0]) / a, EDGES, rtol=1e-11
    )
    assert found.parameters.max() < 1e-9  # two integrators at rtol 1e-11 over some hundred steps
    assert (
        found.worst < 1e-8
    )  # the same, over the gaps between eigenvalues that rates and fluxes contain
    np.testing.assert_allclose(found.same, abs(a - 1), rtol=1e-8)  # forgetting the factor a is seen


def test_a_flow_that_is_not_that_of_aL_is_caught(data: Data) -> None:
    net, x, y = data
    louder = Problem(net, x, 2**0.5 * y)  # the targets were scaled, the outputs were not
    assert between_flows(Problem(*data), louder, 2.0, [0.5], EDGES).worst > 0.1
    assert between_flows(Problem(*data), rescaled(*data, 2.0), 1.9, [0.5], EDGES).worst > 1e-2


def test_flows_that_cannot_be_compared_are_refused(data: Data) -> None:
    net, x, y = data
    with pytest.raises(ValueError, match="33 and 33 parameters, 10 and 9 samples"):
        between_flows(Problem(net, x, y), Problem(net, x[:9], y[:9]), 1.0, [1.0], EDGES)
    for a in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match=f"a is {a}"):
            rescaled(net, x, y, a)


# --- balanced modes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.3, 0.0, -0.4])
def test_the_closed_form_solves_its_equation(target: float) -> None:
    t = np.array([0.1, 1.0, 4.0])
    numeric = solve_ivp(
        lambda _, x: x * (2 * target - x),
        (0, 4),
        [0.02],
        t_eval=t,
        method="DOP853",
        rtol=1e-12,
        atol=1e-15,
    ).y[0]
    np.testing.assert_allclose(balanced_eigenvalue(t, target, 0.02), numeric, rtol=1e-10)


def test_networks_of_parallel_modes_have_the_velocities_of_the_formulas() -> None:
    y, first, d = np.array([1.0, 0.5, 1.6]), np.array([0.01, 0.2, 1.2]), np.array([0.0, 0.1, -0.5])
    problem = parallel_modes(y, first, imbalance=d)
    at = integrate(problem, [0.0, 1.0], rtol=1e-11, estimate=False).thetas[-1]
    for theta in (problem.theta, at):
        found, (a, b) = look(problem, theta), np.reshape(np.asarray(theta), (2, -1))
        lam = a**2 + b**2
        order = np.argsort(lam)
        np.testing.assert_allclose(found.eigenvalues, lam[order], rtol=1e-12)
        np.testing.assert_allclose(
            found.rates, balanced_velocity(lam, y, d)[order], rtol=1e-9
        )  # D is conserved
        assert np.abs(found.coupling).max() == 0.0
    assert np.isclose(a[0] ** 2 + b[0] ** 2, balanced_eigenvalue(1.0, 1.0, 0.01), rtol=1e-9)


def deep_velocity(lam: np.ndarray, depth: int, target: float = 0.0) -> np.ndarray:
    """λ̇ of f = a^L with L equal factors, λ = L a^{2L−2}: 2L(L−1) a^{3L−4} (y − a^L)."""
    a = (lam / depth) ** (1 / (2 * depth - 2))
    return np.asarray(2 * depth * (depth - 1) * a ** (3 * depth - 4) * (target - a**depth))


@pytest.mark.parametrize("depth", [2, 3, 4, 8])
def test_modes_of_many_factors(depth: int) -> None:
    first = np.array([1e-6, 1e-3, 0.1])
    for target in (1.0, 0.0):
        found = look(*(p := parallel_modes(np.full(3, target), first, depth=depth), p.theta))
        np.testing.assert_allclose(found.eigenvalues, first, rtol=1e-12)
        np.testing.assert_allclose(found.rates, deep_velocity(first, depth, target), rtol=1e-10)
    small = np.array([1e-10, 1e-9])
    slope = np.diff(np.log(deep_velocity(small, depth, 1.0)))[0] / np.log(10)
    # the error's factor 1 − (λ/L)^{L/(2L−2)} bends the slope: by 1e-9 for two factors, by 1e-5 for eight
    assert abs(slope - (3 * depth - 4) / (2 * depth - 2)) < 1e-4
    slope = np.diff(np.log(-deep_velocity(small, depth)))[0] / np.log(10)
    assert abs(slope - 2) < 1e-12
    assert np.allclose(deep_velocity(first, 2, 0.7), balanced_velocity(first, 0.7))


def test_one_eigenvalue_has_many_velocities() -> None:
    found = balanced_velocity(1.2, [0.8, 0.8, 1.6], [0.0, 0.5, 0.0])
    np.testing.assert_allclose(
        found, [0.48, 4 * np.sqrt(1.19) / 2 * (0.8 - np.sqrt(1.19) / 2), 2.4], rtol=1e-14
    )


def test_arguments_that_make_no_mode_are_refused() -> None:
    with pytest.raises(ValueError, match="less than"):
        balanced_velocity(0.4, 1.0, 0.5)
    with pytest.raises(ValueError, match="not negative"):
        balanced_eigenvalue(1.0, 1.0, -0.1)
    with pytest.raises(ValueError, match="expected depth ≥ 2"):
        parallel_modes([1.0], [0.1], depth=3, imbalance=0.05)
    with pytest.raises(ValueError, match=r"starts\[0\] is 0.0"):
        parallel_modes([1.0], [0.0])
    with pytest.raises(ValueError, match=r"starts\[0\] is 0.0"):
        BalancedModes(np.ones(2), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"starts has shape \(3,\)"):
        BalancedModes(np.ones(2), np.ones(3))


# --- ensembles as fields ------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e-4, 0.1, 1.9])
def test_the_scale_free_ensemble_lies_on_the_lambert_field(kappa: float) -> None:
    rng = np.random.default_rng(0)
    for y in (
        np.geomspace(1e-3, 10, 12),
        np.exp(rng.normal(size=12)),
    ):  # the targets need not be geometric
        modes_ = BalancedModes.scale_free(y, kappa)
        for t in (0.3, 2.0):
            lam, v = modes_.eigenvalues(t), modes_.velocities(t)
            np.testing.assert_allclose(scale_free_velocity(lam, t, kappa), v, rtol=1e-9)


def test_lambert_field_by_algebra_and_by_its_exponent() -> None:
    tau, c = sp.symbols("tau c", positive=True)
    curve = 2 / (1 + c * sp.exp(-2 * tau))
    assert sp.simplify(sp.diff(curve, tau) - curve * (2 - curve)) == 0
    u, z = tau * curve, 2 * tau - tau * curve
    assert sp.simplify(z * sp.exp(z) - c * u * sp.exp(-u)) == 0
    assert sp.simplify(tau**2 * sp.diff(curve, tau) - u * z) == 0
    for kappa in (1e-3, 0.5):
        x, h = np.array([1e-4, 1e-2, 1.0, 3.0]), 1e-5
        F = [scale_free_velocity(x * np.exp(s), 1.0, kappa) for s in (h, -h)]
        np.testing.assert_allclose(
            scale_free_exponent(x, kappa), np.log(F[0] / F[1]) / (2 * h), atol=1e-8
        )


def test_covariance_tells_the_scale_free_family_from_one_with_a_scale() -> None:
    lam, t = np.array([0.05, 0.2, 0.5]), 2.0
    for a in (0.5, 2.0):
        ratio = scale_free_velocity(a * lam, t / a, 0.01) / (
            a**2 * scale_free_velocity(lam, t, 0.01)
        )
        np.testing.assert_allclose(ratio, 1, rtol=1e-13)
        late = scale_free_velocity(a * lam, t / a + 1, 0.01) / (
            a**2 * scale_free_velocity(lam, t + 1, 0.01)
        )
        assert np.abs(late - 1).min() > 0.05  # the origin of time is part of the statement
    H = CovariantDrift(lambda x: scale_free_velocity(x, 1.0, 0.01) / x, lambda x: 0 * x)
    np.testing.assert_allclose(
        lam / t * H.speed(lam * t), scale_free_velocity(lam, t, 0.01), rtol=1e-12
    )


def test_fields_refuse_what_they_cannot_reach() -> None:
    for kappa in (0.0, 2.0, -1.0):
        with pytest.raises(ValueError, match="between 0 and 2"):
            scale_free_velocity(0.1, 1.0, kappa)
