"""The conservation law: closed forms against sympy, quadrature and two numerical routes; printed forms fail by what is stated."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
from scipy.integrate import quad

from grsd.dynamics import transport, transport_solvers
from grsd.dynamics.transport import CovariantDrift, PowerSpectrum
from grsd.dynamics.transport_solvers import finite_volume, fitted_exponent, particles

TIMES = np.geomspace(1.0, 1000.0, 25)
CASES = [(c0, p) for c0 in (-0.5, 0.0, 0.5, 1.0) for p in (-0.5, 0.0, 0.5, 1.0)]
RATIONAL = CovariantDrift(lambda x: 0.5 / (1 + x), lambda x: -0.5 / (1 + x) ** 2)


def soft(p: float) -> PowerSpectrum:
    return PowerSpectrum(p, soft=3.0)


# --- closed forms -------------------------------------------------------------------------------------------


def test_density_is_the_symbolic_solution_with_its_initial_data() -> None:
    lam, t, t0 = sp.symbols("lambda t t_0", positive=True)
    c, p = sp.symbols("c p", real=True)
    u, s = lam * (t / t0) ** -c, t / t0
    solution = s**-c * u**p * sp.exp(-u / 3) * sp.exp(-u * 2 * t0 / (1 + c) * (s ** (1 + c) - 1))
    residual = (
        sp.diff(solution, t) + sp.diff(c * lam / t * solution, lam) + 2 * lam * solution
    ) / solution
    assert sp.simplify(residual) == 0
    assert sp.simplify(solution.subs(t, t0) / (lam**p * sp.exp(-lam / 3))) == 1
    for c0, power, point in (
        (0.5, -0.5, (0.03, 7.0, 2.0)),
        (-1.5, 0.5, (2.0, 9.0, 0.5)),
        (-0.999, 0.5, (2.0, 9.0, 3.0)),
    ):
        exact = float(solution.subs({c: c0, p: power, lam: point[0], t: point[1], t0: point[2]}))
        found = float(transport.density(point[0], point[1], c0, soft(power), point[2]))
        assert found == pytest.approx(
            exact, rel=1e-11
        )  # 1/(1+c) at c = −0.999 costs three digits of sympy's float


def test_clock_is_continuous_at_minus_one() -> None:
    at = transport.effective_clock(50.0, -1.0, 2.0)
    assert at == pytest.approx(4.0 * math.log(25.0), rel=1e-15)
    for c0 in (-1.0 - 1e-9, -1.0 + 1e-9):  # dK/dc0 is of order log²(t/t0) ≈ 10, relative to K
        assert transport.effective_clock(50.0, c0, 2.0) == pytest.approx(at, rel=1e-7)


@pytest.mark.parametrize("p", [-1.5, -1.0, -0.5, 0.0, 2.0])
def test_laplace_transform_against_adaptive_quadrature(p: float) -> None:
    spectrum = PowerSpectrum(p, low=0.01, high=5.0, soft=2.0)
    for rate, low, high in (
        (0.0, 0.0, math.inf),
        (3.0, 0.2, 4.0),
        (80.0, 0.5, 1.0),
        (1e-3, 0.0, 0.02),
    ):
        lo, hi = max(low, 0.01), min(high, 5.0)
        exact = quad(
            lambda u, r=rate: u**p * math.exp(-u * (r + 0.5)), lo, hi, epsrel=1e-13, epsabs=0
        )[0]
        assert float(spectrum.laplace(rate, low, high)) == pytest.approx(exact, rel=1e-10)
    assert float(spectrum.laplace(1.0, 6.0, 7.0)) == 0.0  # outside the window


def test_shell_energies_are_integrals_of_the_density_below_and_far_beyond_the_frontier() -> None:
    edges, t, c0, p = 2.0 ** np.arange(-12, 3), 40.0, 0.5, 0.5
    clock, begun = transport.effective_clock(t, c0), edges * t**-c0
    energies = PowerSpectrum(p).laplace(clock, begun[:-1], begun[1:])
    exact = [
        quad(
            lambda x: float(transport.density(x, t, c0, PowerSpectrum(p))),
            a,
            b,
            epsrel=1e-13,
            epsabs=0,
        )[0]
        for a, b in pairwise(edges)
    ]
    assert energies == pytest.approx(exact, rel=1e-10)
    kappa = float(transport.effective_clock(t, c0)) * t**-c0
    beyond = edges[:-1] * kappa > 15
    edge_form = t ** (-c0 * (p + 1)) * edges[:-1] ** p * np.exp(-kappa * edges[:-1]) / kappa
    assert beyond.sum() >= 2
    # next term of Γ(p+1, x): p/x, and e^(−x) for the upper edge
    assert np.all(np.abs(energies / edge_form - 1)[beyond] < p / 15 + 1e-6)


def test_frontier_is_where_h_peaks_also_without_transport() -> None:
    def frontier(t: float, c0: float) -> float:  # p = ½
        return 1.5 * t**c0 / float(transport.effective_clock(t, c0))

    grid = np.geomspace(1e-5, 10.0, 200_001)
    for c0 in (-0.5, 0.0, 1.0):
        for t in (3.0, 30.0):
            h = grid * transport.density(grid, t, c0, PowerSpectrum(0.5))
            spacing = math.log(grid[1] / grid[0])
            assert math.log(grid[h.argmax()] / frontier(t, c0)) == pytest.approx(0.0, abs=spacing)
            assert frontier(1e6, c0) == pytest.approx((1 + c0) * 1.5 / 2e6, rel=2e-3)


def test_local_exponent_is_the_logarithmic_derivative() -> None:
    for c0, p in CASES:
        spectrum, t, d = soft(p), np.array([2.0, 60.0]), 1e-5
        ratio = transport.loss(t * (1 + d), c0, spectrum) / transport.loss(
            t * (1 - d), c0, spectrum
        )
        assert transport.local_exponent(t, c0, spectrum) == pytest.approx(
            -np.log(ratio) / (2 * d), rel=1e-8
        )


def test_exponents_differ_by_c0_and_the_local_slope_tends_to_the_corrected_one() -> None:
    for c0, p in CASES:
        found = transport.loss_exponent(c0, p)
        assert found.corrected - found.printed == pytest.approx(c0, abs=1e-15)
        slope = float(transport.local_exponent(1e8, c0, soft(p)))
        assert slope == pytest.approx(found.corrected, abs=1e-3)


# --- numerical routes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c0", "p"), CASES)
def test_both_routes_give_the_exact_loss_and_reject_the_printed_exponent(
    c0: float, p: float
) -> None:
    exact = transport.loss(TIMES, c0, soft(p))
    routes = {
        "finite volume": (
            finite_volume(soft(p), c0, TIMES, cells=1600).loss,
            5e-3,
        ),  # second order: see the test below
        "particles": (
            particles(soft(p), c0, TIMES, count=4000).loss,
            3e-3,
        ),  # width 0.01 strata, jittered
    }
    offset = fitted_exponent(TIMES, exact, after=31.0) - transport.loss_exponent(c0, p).corrected
    for name, (loss, tolerance) in routes.items():
        assert loss == pytest.approx(exact, rel=tolerance), name
        fit = fitted_exponent(TIMES, loss, after=31.0)
        assert fit - offset == pytest.approx(transport.loss_exponent(c0, p).corrected, abs=5e-3), (
            name
        )
        if c0 >= 0.0:
            assert fit == pytest.approx(transport.loss_exponent(c0, p).corrected, abs=0.03), name
        if c0 != 0.0:
            assert abs(fit - transport.loss_exponent(c0, p).printed) > 0.4, name


def test_the_density_of_finite_volumes_obeys_the_corrected_rule_along_a_characteristic() -> None:
    """log ε + uK falls by c0 log t: (10) of 2512.10427 says that it stays."""
    times, origins = np.array([1.0, 3.0, 20.0]), np.geomspace(1e-6, 1e-2, 9)
    for c0 in (-0.5, 0.5):
        run = finite_volume(soft(0.5), c0, times, cells=1600)
        ds = np.log(run.edges[1] / run.edges[0])
        logs = [
            np.interp(
                np.log(origins * t**c0),
                np.log(run.centers),
                np.log(np.maximum(run.energies[k], 1e-300) / (run.centers * ds)),
            )
            for k, t in enumerate(times)
        ]
        for k, t in enumerate(times):
            change = logs[k] - logs[0] + origins * transport.effective_clock(t, c0)
            # second order in cells of 0.024, over log t ≤ 3
            assert change == pytest.approx(-c0 * np.log(t), abs=0.02)


def test_finite_volume_is_second_order_and_its_budget_closes() -> None:
    spectrum, times = soft(0.5), np.array([1.0, 30.0])
    exact = float(transport.loss(30.0, 1.0, spectrum))
    runs = [finite_volume(spectrum, 1.0, times, cells=n) for n in (200, 400, 800)]
    errors = [abs(run.loss[-1] / exact - 1) for run in runs]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.all(orders > 1.8)  # a limiter clips maxima, which costs a little of the second order
    for run in runs:
        assert (
            run.budget.max() < 1e-13
        )  # sums of 800 cells over some 700 steps, each rounded at 1e-16
        assert run.energies.min() > -1e-200  # rounding of cells that e^(−2λt) has emptied


@pytest.mark.parametrize("c0", [-1.5, -1.0, -0.5, 0.5, 1.0])
def test_transport_alone_conserves_energy_and_the_printed_solution_creates_it(c0: float) -> None:
    spectrum, times = PowerSpectrum(0.5, low=1e-3, high=1e-2), np.array([1.0, 4.0, 10.0])
    box = (1e-7, 1e2)
    moved = finite_volume(spectrum, c0, times, window=box, dissipation=False)
    assert moved.loss == pytest.approx(moved.loss[0], rel=1e-12)
    lumps = particles(spectrum, c0, times, window=(1e-3, 1e-2), dissipation=False)
    assert lumps.loss == pytest.approx(lumps.loss[0], rel=1e-14)
    centre = np.sum(moved.energies * np.log(moved.centers), axis=1) / moved.loss
    assert centre - centre[0] == pytest.approx(
        c0 * np.log(times), abs=5e-3
    )  # a fifth of a cell: the data jump
    mass = [  # of the prefactor of (13) alone
        transport.quadrature(lambda x, t=t: spectrum(x * t**-c0), 1e-3 * t**c0, 1e-2 * t**c0)
        for t in times
    ]
    assert np.divide(mass, mass[0]) == pytest.approx(times**c0, rel=1e-10)


def test_at_and_below_minus_one_the_loss_is_no_power_of_t() -> None:
    for c0, expected in (
        (-1.0, (2 * math.log(1000.0) + 1.0) ** -1.0),
        (-1.5, 1 / (1 + 4 * (1 - 1000**-0.5))),
    ):
        spectrum = PowerSpectrum(0.0, soft=1.0)
        assert float(transport.loss(1000.0, c0, spectrum)) == pytest.approx(expected, rel=1e-12)
        assert finite_volume(spectrum, c0, TIMES).loss[-1] == pytest.approx(expected, rel=2e-3)
    assert float(transport.loss(1e12, -1.5, PowerSpectrum(0.0, soft=1.0))) == pytest.approx(
        0.2, rel=1e-5
    )


@pytest.mark.parametrize("p", [-0.5, 0.5])
def test_a_non_linear_drift_has_the_exponent_of_its_value_at_zero(p: float) -> None:
    target = 1.5 * (p + 1)
    for run in (finite_volume, particles):
        assert fitted_exponent(
            TIMES, run(soft(p), RATIONAL, TIMES).loss, after=31.0
        ) == pytest.approx(target, abs=0.02)


# --- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: transport.loss_exponent(-1.0, 0.5), r"\(log t\)"),
        (lambda: transport.loss_exponent(-1.5, 0.5), "positive constant"),
        (lambda: transport.loss_exponent(0.5, -1.0), "p = -1.0"),
        (lambda: transport.loss_exponent(math.nan, 0.5), "c0 is nan"),
        (lambda: PowerSpectrum(0.5, low=2.0, high=1.0), "holds no mass"),
        (lambda: PowerSpectrum(-1.0), "infinite energy"),
        (lambda: PowerSpectrum(0.0, soft=0.0), "soft is 0.0"),
        (lambda: soft(0.0).laplace(-1.0), "must be ≥ 0"),
        (lambda: transport.density(1.0, 0.0, 0.5, soft(0.0)), "t is 0.0"),
        (lambda: transport.density(1.0, 0.5, 0.5, soft(0.0)), "not before t0 = 1"),
        (lambda: transport.density(0.0, 2.0, 0.5, soft(0.0)), "ker M"),
        (lambda: transport.density(1.0, 2.0, 0.5, soft(0.0), t0=0.0), "positive starting time"),
        (lambda: transport.quadrature(np.exp, 0.0, 1.0), "no window"),
        (lambda: finite_volume(soft(0.0), 0.5, TIMES, cfl=0.9), "cfl is 0.9"),
        (lambda: finite_volume(soft(0.0), 0.5, TIMES, cells=3), "cells is 3"),
        (lambda: finite_volume(soft(0.0), 0.5, TIMES[::-1]), "ascending"),
        (lambda: finite_volume(soft(0.0), 0.5, TIMES, window=(1.0, 1.0)), "holds no mass"),
        (
            lambda: finite_volume(
                PowerSpectrum(0.0, low=1e-4, high=1e-3), 0.5, TIMES, window=(1.0, 2.0)
            ),
            "no mass",
        ),
        (lambda: finite_volume(lambda u: -u, 0.5, TIMES), "density ≥ 0"),
        (lambda: particles(soft(0.0), math.inf, TIMES), "c0 is inf"),
        (
            lambda: particles(soft(0.0), CovariantDrift(np.log, lambda x: 1 / x), [0.0, 1.0]),
            "0.0; .*ascending order, positive",
        ),
        (lambda: particles(soft(0.0), 0.5, TIMES, step=1.0), "step is 1.0"),
        (lambda: particles(soft(0.0), 0.5, TIMES, count=1), "count is 1"),
        (
            lambda: particles(soft(0.0), CovariantDrift(lambda x: np.nan * x, lambda x: x), TIMES),
            "not finite",
        ),
        (
            lambda: transport_solvers.fitted_exponent([1.0, 2.0], [1.0, 0.5]),
            "expected three or more",
        ),
    ],
)
def test_bad_input_is_refused_with_the_offending_value(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_divergence_is_the_derivative_of_the_velocity() -> None:
    """t ∂_λ v for v = (λ/t) H(λt), by central differences of v itself: H alone misses x H'."""
    x = np.geomspace(1e-2, 10, 25)
    for H, slope in (
        (lambda x: 0.5 / (1 + x), lambda x: -0.5 / (1 + x) ** 2),
        (lambda x: np.cos(x) * np.exp(-x), lambda x: -(np.sin(x) + np.cos(x)) * np.exp(-x)),
    ):
        drift, d = CovariantDrift(H, slope), 1e-6
        v = [x * (1 + s) * drift.speed(x * (1 + s)) for s in (d, -d)]  # at t = 1
        by_difference = (v[0] - v[1]) / (2 * d * x)
        # truncation d² and rounding 1e-16/d
        np.testing.assert_allclose(drift.divergence(x), by_difference, atol=1e-8)
        assert np.abs(drift.speed(x) - by_difference).max() > 0.1
