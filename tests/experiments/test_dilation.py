"""The dilation's clock against closed forms, planted drifts, and the experiment end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad

from grsd.dynamics.drift import Drift
from grsd.experiments import dilation
from grsd.experiments.dilation import explained, local_exponents, shares
from grsd.experiments.drift import EDGES
from grsd.experiments.engine import find, run

TIMES = np.geomspace(0.1, 1000, 33)


@pytest.mark.parametrize("c", [-1.0, -0.5, 0.0, 0.7])
def test_a_constant_drift_has_the_clock_of_the_continuum(c: float) -> None:
    s, clock = dilation.dilation(TIMES, np.full(33, c))
    x = TIMES / TIMES[0]
    exact = np.log(x) if c == -1 else (x ** (1 + c) - 1) / (1 + c)
    np.testing.assert_allclose(s, x**c, rtol=1e-12)
    np.testing.assert_allclose(clock, TIMES[0] * exact, rtol=1e-12, atol=1e-15)


def test_a_drift_that_changes_has_the_clock_of_quadrature() -> None:
    c = np.sin(np.log(TIMES))  # s = exp(cos(log t₀) − cos(log t))
    start = np.cos(np.log(0.1))
    s, clock = dilation.dilation(TIMES, c)
    exact = quad(lambda t: np.exp(start - np.cos(np.log(t))), 0.1, 1000, limit=200)[0]
    # trapezoids of step h = 0.29 in log t: h²/12 = 0.7 % of the exponent, which is below two
    assert clock[-1] == pytest.approx(exact, rel=0.014)
    np.testing.assert_allclose(s, np.exp(start - np.cos(np.log(TIMES))), rtol=0.014)


def planted(c: np.ndarray) -> Drift:
    """Fields c(t, edge) with energy around the frontier λ = 1/2t, as training has it."""
    x = np.log(2 * EDGES[None, :] * TIMES[:, None])
    energy = np.exp(-((x / 3) ** 2))
    flux = c * energy / TIMES[:, None]
    return Drift(TIMES, EDGES, energy, flux, 0 * flux)


def test_a_schedule_is_told_from_a_function_of_lambda_t_both_ways() -> None:
    t, x = np.log(TIMES)[:, None], np.log(EDGES[None, :] * TIMES[:, None])
    schedule = shares(planted(np.sin(t) + 0 * x), "advective", 10)
    wave = shares(planted(np.sin(x)), "advective", 10)
    assert schedule["t"] == pytest.approx(1) and schedule["x"] < 0.2
    assert wave["x"] > 0.9 and wave["t"] < 0.2  # octaves blur a sine of period 2π a little
    assert wave["t of x"] < 0.2 and schedule["x of t"] == pytest.approx(schedule["x"])


def test_a_field_of_noise_is_explained_by_neither() -> None:
    noise = np.random.default_rng(0).standard_normal((33, len(EDGES)))
    found = shares(planted(noise), "advective", 10)
    # 17 means of some ten cells each: a tenth or so is explained by chance
    assert found["t"] < 0.4 and found["x"] < 0.4
    assert explained(np.ones((2, 3)), np.ones((2, 3)), np.eye(2, 3))[0] == 0.0


def test_local_exponents_of_a_straight_and_of_a_bent_loss() -> None:
    assert local_exponents(TIMES, TIMES**-0.4, 10) == pytest.approx([0.4] * 4)
    bent = local_exponents(TIMES, np.exp(-0.05 * np.log(TIMES) ** 2), 10)
    middles = np.log(10) + np.log(10) / 2 * (np.arange(4) + 0.5)
    assert bent == pytest.approx(0.1 * middles, rel=0.02)


def test_the_experiment_end_to_end(tmp_path: Path) -> None:
    p = dilation.Parameters(sizes=(24,), targets=("quadrant",), seeds=2, rtol=1e-6)
    data = run(find("dilation"), p, cache=tmp_path).data
    (group,) = data["groups"]
    json.dumps(data)
    assert len(group["curves"]["measured"]) == len(data["times"]) == 33
    columns, rows = dilation.table(data)
    assert len(rows) == 1 and len(columns) == len(rows[0])
    # nearly frozen: neither the net nor the dilation gains anything
    lazy = dilation.measure({**dilation.pieces(p)[0], "gamma": 1e-3})
    assert lazy["exponents"]["measured"] == pytest.approx(lazy["exponents"]["frozen"], abs=1e-3)
    assert lazy["exponents"]["dilated"] == pytest.approx(lazy["exponents"]["frozen"], abs=1e-3)
    rich = dilation.measure(dilation.pieces(p)[0])
    assert rich["exponents"]["measured"] > 1.2 * rich["exponents"]["frozen"]


def test_bad_parameters_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="targets is 'sine'"):
        dilation.Parameters(targets=("sine",))
    with pytest.raises(ValueError, match="after"):
        dilation.Parameters(after=2000.0)
