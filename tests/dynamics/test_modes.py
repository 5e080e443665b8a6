"""Kato's formulas and the form without gaps, against differences in time, closed forms and linear solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grsd.dynamics.flow import around, central, integrate
from grsd.dynamics.modes import Modes, divided, instant, modes
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import mlp
from tests.book.chapter_code import definitions

track = definitions("dynamics/modes.md", "Tracked", "track").track


def problem(n: int = 12, widths: tuple[int, ...] = (3, 10, 1), seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    y = torch.sin(2 * x @ torch.randn(3, generator=g, dtype=torch.float64))
    return Problem(mlp(widths, seed=seed), x, y)


def symmetric(
    n: int, seed: int, eigenvalues: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    a, rate = (q * eigenvalues) @ q.T, rng.standard_normal((n, n))
    return (a + a.T) / 2, rate + rate.T, rng.standard_normal(n)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rates_of_a_network_agree_with_differences_along_the_flow(seed: int) -> None:
    p = problem(seed=seed)
    theta = integrate(p, [0, 1.0], estimate=False).thetas[-1]
    m = modes(*instant(p, theta))
    best = np.full(4, np.inf)
    for h in (
        0.02,
        0.01,
    ):  # the error is the larger of h⁸ and rounding over h; close pairs want the smaller h
        values, vectors, g = (central(x, h) for x in track(around(p, theta, h), m))
        turned = p.error(theta).numpy() @ vectors / p.samples
        found = [
            relative(m.rates, values),
            relative(m.vector_rates, vectors),
            relative(m.coefficient_rates, g),
        ]
        best = np.minimum(best, [*found, relative(-m.coupling @ m.coefficients, turned)])
        assert abs(relative(m.coupling @ m.coefficients, turned) - 2) < 1e-3  # the printed sign
    assert best.max() < 1e-8


def test_modes_are_orthonormal_in_the_measure_and_carry_the_loss() -> None:
    p = problem()
    m = modes(*instant(p, p.theta))
    np.testing.assert_allclose(m.vectors.T @ m.vectors / p.samples, np.eye(p.samples), atol=1e-13)
    assert abs(0.5 * np.sum(m.coefficients**2) - p.loss(p.theta)) < 1e-14
    np.testing.assert_allclose(
        p.kernel(p.theta).numpy() @ m.vectors, m.vectors * m.eigenvalues, atol=1e-12
    )
    omega = m.coupling
    assert np.abs(omega + omega.T).max() < 1e-12 * np.abs(omega).max()


def test_a_rotating_pair_turns_at_its_known_rate() -> None:
    """M = R(t) diag(1, 3) R(t)ᵀ with a rotation by t: λ̇ = 0 and |Ω| = 1."""
    c, s = np.cos(0.3), np.sin(0.3)
    r, dr = np.array([[c, -s], [s, c]]), np.array([[-s, -c], [c, -s]])
    d = np.diag([1.0, 3.0])
    m = modes(r @ d @ r.T, dr @ d @ r.T + r @ d @ dr.T, np.array([1.0, 2.0]))
    np.testing.assert_allclose(m.rates, 0.0, atol=1e-14)
    assert abs(abs(m.coupling[0, 1]) - 1) < 1e-13
    # φ̇_v must be the derivative of ± the columns of r
    signs = np.sign(np.sum(m.vectors * r, axis=0))
    np.testing.assert_allclose(m.vector_rates, np.sqrt(2) * dr * signs, atol=1e-13)


def test_the_kernel_takes_part() -> None:
    p = problem(n=40, widths=(3, 5, 1))  # 26 parameters
    theta = integrate(p, [0, 1.0], estimate=False).thetas[-1]
    m = modes(*instant(p, theta))
    assert int(m.in_kernel.sum()) == 14 and np.all(
        m.coupling[np.ix_(m.in_kernel, m.in_kernel)] == 0
    )
    g, e = m.coefficients, p.error(theta).numpy()

    def outside(at: np.ndarray) -> float:
        q, x = np.linalg.qr(p.jacobian(at).numpy())[0], p.error(at).numpy()
        return 0.5 * float(x @ x - np.sum((q.T @ x) ** 2)) / p.samples

    formula = -g[m.in_kernel] @ m.coupling[np.ix_(m.in_kernel, ~m.in_kernel)] @ g[~m.in_kernel]
    best = min(
        abs(central(np.array([outside(x) for x in around(p, theta, h).thetas]), h) / formula - 1)
        for h in (0.02, 0.01, 0.005)
    )
    assert best < 1e-6  # the smallest eigenvalue is 1e-6 of the largest
    assert abs(np.sum(g**2) - e @ e / p.samples) < 1e-13


@pytest.mark.parametrize("gap", [0.1, 1e-5, 1e-9, 1e-13, 0.0])
def test_divided_differences_agree_with_linear_solves_at_every_gap(gap: float) -> None:
    x = np.geomspace(0.01, 1, 10)
    x[5] = x[4] * (1 + gap)
    M, rate, e = symmetric(10, 0, x)
    m, a = modes(M, rate, e), 0.1
    solve = np.linalg.inv(M + a * np.eye(10))
    found = (
        m.vectors @ divided(m, lambda x: x / (x + a), lambda x: a / (x + a) ** 2) @ m.vectors.T / 10
    )
    np.testing.assert_allclose(found, a * solve @ rate @ solve, atol=1e-10)


def test_repeated_eigenvalues_are_refused_and_the_kernel_is_not() -> None:
    M, rate, e = symmetric(6, 1, np.array([0.1, 0.5, 0.5, 1, 2, 3]))
    m = modes(M, rate, e)
    assert len(m.repeated()) == 1
    with pytest.raises(ValueError, match="single modes have no derivative"):
        _ = m.coupling
    low = modes(*symmetric(6, 1, np.array([0, 0, 0, 1, 2, 3.0])))
    assert (
        int(low.in_kernel.sum()) == 3
        and len(low.repeated()) == 0
        and np.isfinite(low.coupling).all()
    )


def test_tracking_keeps_the_name_of_a_mode_through_a_crossing() -> None:
    """Two linear models that do not talk: their eigenvalues cross, their eigenvectors do not move."""

    class Products(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor([0.5, 1.0], dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.tensor([0.6, 1.2], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.a * self.b).sum(1)

    p = Problem(
        Products(), torch.eye(2, dtype=torch.float64), torch.tensor([4.0, 1.0], dtype=torch.float64)
    )
    path = integrate(p, np.linspace(0, 4, 40), estimate=False)
    found = track(path)
    first, second = (found.eigenvalues[:, k] for k in (0, 1))
    assert first[0] < second[0] and first[-1] > second[-1]  # it crossed
    turned = np.abs(found.vectors - found.vectors[0]).max()
    assert turned < 1e-9
    ascending = np.array([np.linalg.eigvalsh(p.kernel(theta).numpy()) for theta in path.thetas])
    np.testing.assert_allclose(np.sort(found.eigenvalues, axis=1), ascending, atol=1e-14)


def good() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return symmetric(4, 0, np.array([0.1, 0.2, 0.5, 1.0]))


def check(M: np.ndarray, rate: np.ndarray, error: np.ndarray) -> Modes:
    return modes(M, rate, error)


def test_bad_arrays_are_refused() -> None:
    M, rate, e = good()
    with pytest.raises(TypeError, match="float32"):
        check(M.astype(np.float32), rate, e)
    with pytest.raises(ValueError, match="expected"):
        check(M, rate[:2], e)
    with pytest.raises(ValueError, match="not symmetric"):
        check(M + np.triu(rate), rate, e)
    with pytest.raises(ValueError, match="not finite"):
        check(M, rate * np.nan, e)
    with pytest.raises(ValueError, match="none below 0"):
        check(M - 0.5 * np.eye(4), rate, e)
