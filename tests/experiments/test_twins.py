"""Residual nets beside their twins without skips: one pair against formulas, and a planted gap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from grsd.experiments import engine, tour, twins
from grsd.experiments.twins import EXPERIMENT, KINDS, Parameters
from grsd.renorm.diagnostics.couplings import planted, shift_invariance


def piece(**changed: Any) -> dict[str, Any]:
    asked = {"family": "MLP", "depth": 3, "samples": 40, "width": 8, "remaining": 1.0, "seed": 2}
    return {**asked, **changed}


def test_a_twin_has_the_same_weights_and_no_skip() -> None:
    """Both as formulas: h + tanh(h)Wᵀ/√3 against tanh(h)Wᵀ, three times."""
    both = twins.pair(piece())
    assert torch.equal(both["residual"].theta, both["twin"].theta)
    x, _ = tour.data(40, seed=1002)
    net = twins.FAMILIES["MLP"](8, 3, 2, True)
    w = [p.detach() for p in net.parameters()]
    for kind, skip, epsilon in (("residual", 1, 1 / math.sqrt(3)), ("twin", 0, 1.0)):
        h = x.flatten(1) @ w[0].T + w[1]
        for block in range(3):
            h = skip * h + epsilon * (torch.tanh(h) @ w[2 + 2 * block].T + w[3 + 2 * block])
        expected = (h @ w[-2].T + w[-1]).squeeze(1)
        # three layers of eight terms of order one
        torch.testing.assert_close(
            both[kind].output(both[kind].theta), expected, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_a_pair_of_every_family_is_read_as_d4_reads_its_dense_kernel(family: str) -> None:
    one = piece(family=family, depth=2)
    data = twins.measure(one)
    at = twins.pair(one)["twin"]
    lam, vectors = np.linalg.eigh(at.kernel(at.theta).numpy())
    h, v = 1e-4, at.velocity(at.theta)
    near, far = (
        (at.kernel(at.theta + k * h * v) - at.kernel(at.theta - k * h * v)).numpy() for k in (1, 2)
    )
    rate = (8 * near - far) / (12 * h)
    seen = shift_invariance(lam, vectors.T @ rate @ vectors)
    # differences to 1e-16/1e-4 of M beside couplings of the smallest modes
    assert data["twin"]["slope"] == pytest.approx(seen.slope, abs=1e-3)
    assert data["twin"]["rms"] == pytest.approx(seen.rms, abs=1e-3)
    assert data["residual"]["slope"] != data["twin"]["slope"]


def test_training_stops_at_the_share_of_the_loss_or_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = twins.pair(piece())["residual"]
    theta = twins.trained(at, 0.1)
    assert theta is not None and 0.08 < at.loss(theta) / at.loss(at.theta) <= 0.1
    monkeypatch.setattr(twins, "STEPS", 1)
    lost = {"residual": None, "twin": None, "failed": "residual"}
    assert twins.measure(piece(remaining=0.5)) == lost

    def refused(*_: object) -> None:
        raise ArithmeticError("the second derivative of this model is off")

    monkeypatch.setattr(twins.modes, "instant", refused)
    assert twins.measure(piece()) == lost


def planted_pair(seed: int, residual: float, twin: float) -> dict[str, Any]:
    lam = np.exp(np.sort(np.random.default_rng(seed).normal(0, 2, 64)))
    data = {}
    for index, (kind, slope) in enumerate(zip(KINDS, (residual, twin), strict=True)):
        for name, size in ((kind, slope), (f"{kind} null", 0.0)):
            one = shift_invariance(lam, planted(lam, slope=size, seed=10 * seed + index))
            keys = ("slope", "slope_error", "rms", "floor", "span")
            data[name] = {key: getattr(one, key) for key in keys}
    return data


@pytest.mark.parametrize(
    ("residual", "twin", "answers"),
    [(0.0, 0.4, (1, 1)), (0.0, 0.0, (1, 0)), (0.4, 0.0, (0, 0)), (0.4, 0.8, (0, 1))],
)
def test_both_answers_are_found_where_they_are_planted(
    residual: float, twin: float, answers: tuple[int, int]
) -> None:
    asked = Parameters(families=("MLP",), depths=(2,), seeds=16)
    data = [planted_pair(seed, residual, twin) for seed in range(16)]
    (group,) = twins.reduce(asked, twins.pieces(asked), data)["groups"]
    assert (group["realized"], group["degraded"]) == answers
    assert abs(group["twin"]["slope"][0] - twin) < 0.1  # its error is 0.08/√16
    columns, rows = EXPERIMENT.table({"groups": [group]})
    assert len(rows[0]) == len(columns)


def test_a_pair_that_does_not_learn_is_counted_and_left_out() -> None:
    asked = Parameters(families=("MLP",), depths=(2,), seeds=3)
    data = [planted_pair(seed, 0.0, 0.0) for seed in range(2)]
    data.append({"residual": None, "twin": None, "failed": "twin"})
    (group,) = twins.reduce(asked, twins.pieces(asked), data)["groups"]
    assert group["pairs"] == 2 and group["failed"] == ["twin"]
    lost = twins.reduce(asked, twins.pieces(asked), [data[2]] * 3)["groups"]
    assert "gap" not in lost[0] and len(EXPERIMENT.table({"groups": lost})[1][0]) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"families": ("RNN",)}, "family is 'RNN'"),
        ({"depths": (4, 2)}, "depths"),
        ({"samples": 24}, "too small"),
        ({"width": 6}, "multiple of 4"),
        ({"seeds": 1}, "seeds is 1"),
        ({"remaining": 0.0}, "remaining is 0.0"),
    ],
)
def test_parameters_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(**change)


def test_it_is_an_experiment_of_the_command_line() -> None:
    assert engine.find("twins") is EXPERIMENT


def test_a_twin_that_bends_within_the_widest_steps_is_measured_and_not_refused() -> None:
    """Without skips the norms of a transformer bend: the check of `Problem` needs a fourth step."""
    one = piece(family="transformer", depth=4, samples=64, width=12, seed=2)
    at = twins.pair(one)["twin"]
    rate, h, v = at.kernel_rate(at.theta), 1e-8, at.velocity(at.theta)
    quotient = (at.kernel(at.theta + h * v) - at.kernel(at.theta - h * v)) / (2 * h)
    # h² times a third derivative, and rounding over h
    torch.testing.assert_close(quotient, rate, rtol=0, atol=1e-4 * float(rate.abs().max()))
