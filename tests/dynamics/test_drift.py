from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grsd.dynamics.balance import resolvent_flux
from grsd.dynamics.drift import Drift, constant_drift_loss, edge_flux
from grsd.dynamics.flow import around, central, integrate
from grsd.dynamics.modes import Modes, instant, modes
from grsd.dynamics.problem import Problem
from grsd.dynamics.transport import PowerSpectrum, loss, loss_exponent
from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.lab.nets.models import mlp

ORDERS = [1, 2, 4, 8]
PROBE = np.array([1e-3, 1e-2, 0.1])


@pytest.fixture(scope="module")
def net() -> Problem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    return Problem(mlp([2, 10, 1], seed=3, gain=1.5), x, torch.sin(3 * x[:, 0]))


@pytest.fixture(scope="module")
def trained(net: Problem) -> np.ndarray:
    theta: np.ndarray = integrate(net, [0.0, 5.0], rtol=1e-11, estimate=False).thetas[-1]
    return theta


def _random(n: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = np.random.default_rng(seed)
    q = np.linalg.qr(r.standard_normal((n, n)))[0]
    b = r.standard_normal((n, n))
    return (q * np.geomspace(1e-3, 1, n)) @ q.T, b + b.T, r.standard_normal(n)


@pytest.mark.parametrize("order", ORDERS)
def test_both_fluxes_close_the_balance_against_differences_along_the_flow(
    net: Problem, trained: np.ndarray, order: int
) -> None:
    step = 0.02
    near = around(net, trained, step)

    def chi(at: Modes) -> np.ndarray:
        lam = at.eigenvalues.clip(0)[:, None]
        found: np.ndarray = lam**order / (lam**order + PROBE**order)
        return found

    above = []
    for theta in near.thetas:
        at = modes(*instant(net, theta))
        above.append(0.5 * (chi(at) * at.coefficients[:, None] ** 2).sum(axis=0))
    at = modes(*instant(net, trained))
    flux = edge_flux(at, PROBE, order)
    lost = (chi(at) * at.eigenvalues[:, None] * at.coefficients[:, None] ** 2).sum(axis=0)
    slope = central(np.array(above), step)
    # eighth-order differences at this step: truncation below 1e-12, and rounding 1e-15/0.02 of energies near 0.1
    np.testing.assert_allclose(
        flux.advective + flux.kato - lost, slope, atol=1e-9 * np.abs(slope).max()
    )
    for one in (flux.advective, flux.kato):  # neither alone closes it
        assert np.abs(one - lost - slope).max() > 1e-2 * np.abs(slope).max()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_total_flux_is_that_of_linear_solves(order: int) -> None:
    M, rate, e = _random()
    solved = resolvent_flux(M, rate, e, PROBE, power=order).total
    if order == 3:
        with pytest.raises(ValueError, match="order is 3"):
            edge_flux(modes(M, rate, e), PROBE, order)
        return
    flux = edge_flux(modes(M, rate, e), PROBE, order)
    np.testing.assert_allclose(
        flux.advective + flux.kato, solved, rtol=1e-9
    )  # condition of (M/a)^4, 1e3·1e-16·room


@pytest.mark.parametrize("order", [*ORDERS, math.inf])
def test_modes_that_follow_the_linear_drift_give_c0_and_no_kato_flux(order: float) -> None:
    c0, t = 0.7, 3.0
    lam = np.geomspace(1e-4, 1, 40)
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((40, 40)))[0]
    M = (q * lam) @ q.T
    d = Drift.of(
        [modes(M, c0 / t * M, q.sum(axis=1))], np.array([t]), np.geomspace(1e-3, 1e-1, 7), order
    )
    # rounding of q diag q^T, divided by the smallest eigenvalue that matters (1e-3)
    np.testing.assert_allclose(d.c("advective"), c0, rtol=1e-10)
    np.testing.assert_allclose(d.c("kato"), 0, atol=1e-9)
    np.testing.assert_allclose(d.regime("total"), c0 / (2 * d.edges * t)[None], rtol=1e-9)


def test_turning_eigenvectors_give_a_kato_flux_and_no_advection() -> None:
    M, e = np.diag([0.01, 1.0]), np.array([1.0, 1.0])
    rate = np.array([[0.0, 1.0], [1.0, 0.0]])
    for order in (1.0, math.inf):
        flux = edge_flux(modes(M, rate, e), [0.1], order)
        assert flux.advective[0] == 0 and flux.kato[0] > 0.1
        back = edge_flux(
            modes(M, rate, e * [1, -1]), [0.1], order
        )  # the same energies, the opposite flux
        assert back.kato[0] == pytest.approx(-flux.kato[0]) and back.energy[0] == pytest.approx(
            flux.energy[0]
        )


def test_sharp_edges_blow_up_at_an_avoided_crossing_and_soft_ones_do_not() -> None:
    def kato(delta: float, order: float) -> float:
        M = np.array([[1.0, delta / 2], [delta / 2, 1.0]])
        return float(
            edge_flux(modes(M, np.diag([1.0, -1.0]), np.array([0.8, 0.6])), [1.0], order).kato[0]
        )

    assert kato(1e-3, math.inf) / kato(1e-2, math.inf) == pytest.approx(10, rel=1e-6)
    assert kato(1e-3, 1) == pytest.approx(kato(1e-2, 1), rel=1e-4)


def test_sharp_flux_is_the_limit_of_soft_ones() -> None:
    M, rate, e = _random(6, 4)
    lam = np.linalg.eigvalsh(M)
    edge = [math.sqrt(lam[2] * lam[3])]  # a factor 2 from its neighbours: order 8 is off by 2^-8
    sharp, soft = (edge_flux(modes(M, rate, e), edge, order).kato[0] for order in (math.inf, 8))
    assert soft == pytest.approx(sharp, rel=0.05)


def test_statistics_of_a_planted_field() -> None:
    times, edges = np.geomspace(10, 1000, 9), np.geomspace(1e-3, 1, 11)
    energy = np.ones((9, 11))
    v = 2 * edges[None, :] ** 0.8 * times[:, None] ** -0.6
    flux = v * energy / edges
    d = Drift(times, edges, energy, flux, -0.5 * flux)
    law = d.power_law("advective")
    assert (law.a, law.b) == (pytest.approx(0.8), pytest.approx(-0.6))
    assert law.r2 == pytest.approx(1) and law.selected == pytest.approx(1)
    assert d.summary("total")["mean"] == pytest.approx(0.5 * d.summary("advective")["mean"])
    assert d.summary("kato")["negative"] == pytest.approx(1) and d.correlation() == pytest.approx(
        -1
    )
    assert d.weights(after=100).sum() == pytest.approx(1) and not d.weights(after=100)[0].any()
    flux = flux.copy()
    flux[:, ::2] *= -1  # downward cells leave the fit, and the fit says so
    assert Drift(times, edges, energy, flux, 0 * flux).power_law(
        "advective"
    ).selected == pytest.approx(5 / 11)


def test_every_time_has_the_same_weight_however_much_energy_is_left() -> None:
    times, edges = np.array([1.0, 10.0, 100.0]), np.array([0.1, 1.0])
    energy = np.array([[30.0, 10.0], [1.0, 3.0], [1e-6, 1e-6]])
    w = Drift(times, edges, energy, 0 * energy, 0 * energy).weights()
    # shares within a time, over three times; shares of the whole would leave the last time nothing
    np.testing.assert_allclose(w, [[1 / 4, 1 / 12], [1 / 12, 1 / 4], [1 / 6, 1 / 6]], rtol=1e-12)
    # so the mean of c is the mean over times: here c = t · flux/h is 1, 2 and 6 at every edge
    flux = energy * np.array([[1.0], [2.0], [6.0]]) / times[:, None]
    mean = Drift(times, edges, energy, flux, 0 * flux).summary("advective")["mean"]
    assert mean == pytest.approx(3.0)


def test_constant_drift_agrees_with_the_closed_form_of_the_continuum_and_the_printed_one_does_not() -> (
    None
):
    p, c0 = -0.3, 0.6
    u = np.geomspace(1e-16, 1e3, 36001)
    cell = np.diff(u)
    centre = np.sqrt(u[1:] * u[:-1])
    spectrum = PowerSpectrum(p)
    t = np.geomspace(10, 1e4, 12)
    corrected, printed = constant_drift_loss(centre, spectrum(centre) * cell, c0, 1.0, t)
    np.testing.assert_allclose(
        corrected, loss(t, c0, spectrum), rtol=1e-5
    )  # (step 0.0012 in log u)², and 1e-16^0.7 below
    exact = loss_exponent(c0, p)
    late = t >= 500
    assert fitted_exponent(t[late], corrected[late]) == pytest.approx(exact.corrected, abs=2e-3)
    assert fitted_exponent(t[late], printed[late]) == pytest.approx(exact.printed, abs=2e-3)


def test_bad_input_is_refused_in_a_sentence() -> None:
    at = modes(*_random())
    with pytest.raises(ValueError, match="edges must be positive"):
        edge_flux(at, [0.0])
    d = Drift.of([at], np.array([1.0]), PROBE)
    with pytest.raises(ValueError, match="no time lies in"):
        d.weights(after=2.0)
    with pytest.raises(ValueError, match="cells have v > 0"):
        d.power_law()
    with pytest.raises(ValueError, match="part is 'sum'"):
        d.flux("sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected \\(times, edges\\)"):
        Drift(np.ones(2), PROBE, np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="c0 > −1"):
        constant_drift_loss(np.ones(1), np.ones(1), -1.0, 1.0, np.ones(1))
    with pytest.raises(ValueError, match="no later than the times"):
        constant_drift_loss(np.ones(1), np.ones(1), 0.5, 1.0, np.array([0.5]))
