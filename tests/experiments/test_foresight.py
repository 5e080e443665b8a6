"""What is read early and how a net trains: plain loops, closed forms, and planted foresight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grsd.dynamics.problem import Problem
from grsd.experiments import engine, foresight
from grsd.experiments.foresight import CONDITIONS, EXPERIMENT, OUTCOMES, RATES, Parameters
from grsd.renorm.diagnostics import conditions

SMALL = {"width": 8, "samples": 40, "steps": 30}


def piece(**changed: Any) -> dict[str, Any]:
    recipe = {"depth": 2, "epsilon": 0.5, "gain": 1.0, "norm": 1, "seed": 3}
    return {**SMALL, **recipe, **changed}


def problem(**changed: Any) -> Problem:
    x, y = foresight.images.digits(foresight.CLASSES, 40, seed=5)
    return Problem(foresight.network(piece(**changed)), x, y)


@pytest.mark.parametrize("norm", [0, 1])
def test_the_network_is_that_of_its_formula(norm: int) -> None:
    net = foresight.network(piece(norm=norm, gain=1.3))
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    w = dict(net.named_parameters())

    def layer(h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = layer(x.flatten(1), "read")
    for k in range(2):
        read, branch = h, f"blocks.{k}.branch"
        if norm:
            centred = h - h.mean(1, keepdim=True)
            scale = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            read = centred / scale + w[f"{branch}.norm.bias"]
        h = h + 0.5 * layer(torch.tanh(layer(read, f"{branch}.first")), f"{branch}.branch_end")
    torch.testing.assert_close(net(x), layer(h, "head"), rtol=1e-12, atol=1e-12)
    # the same draws, 1.3 times as large
    plain = dict(foresight.network(piece(norm=norm)).named_parameters())
    torch.testing.assert_close(w["head.weight"], 1.3 * plain["head.weight"])


def test_side_by_side_is_one_rate_after_another() -> None:
    at = problem()
    rate, loss, theta = foresight.outcome(at, steps=30)
    ends = []
    for one in RATES:
        moved = at.theta
        for _ in range(30):
            moved = moved + one * at.velocity(moved)
        ends.append(at.loss(moved))
    below = [end < at.loss(at.theta) for end in ends]
    assert all(below[: list(RATES).index(rate) + 1]) and not below[list(RATES).index(rate) + 1]
    assert loss == pytest.approx(min(end for end, fine in zip(ends, below, strict=True) if fine))
    assert at.loss(theta) == pytest.approx(loss, rel=1e-12)


def test_of_a_linear_net_the_largest_rate_is_two_over_the_sharpness() -> None:
    x, y = foresight.images.digits(foresight.CLASSES, 40, seed=5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1, bias=False)).to(torch.float64)
    nn.init.zeros_(net[1].weight)
    at = Problem(net, x, y)
    rate, _, _ = foresight.outcome(at, steps=3000)
    top = 2 / float(torch.linalg.eigvalsh(at.kernel(at.theta))[-1])
    assert rate < top < rate * math.sqrt(2)


def test_early_is_the_first_step_at_the_share() -> None:
    at = problem()
    sharpness = float(torch.linalg.eigvalsh(at.kernel(at.theta))[-1])
    theta = foresight.early(at, sharpness)
    assert theta is not None and at.loss(theta) <= 0.9 * at.loss(at.theta)
    moved = at.theta
    while at.loss(moved) > 0.9 * at.loss(at.theta):
        before, moved = moved, moved + at.velocity(moved) / (4 * sharpness)
    assert torch.equal(moved, theta) and at.loss(before) > 0.9 * at.loss(at.theta)


def test_readings_are_those_of_the_report() -> None:
    at = problem()
    read = foresight.reading(at, at.theta)
    (told,) = conditions.report(at, probes=2).instants
    assert read["variation"] == pytest.approx(math.log(told.separability.variation))
    assert read["clock"] == pytest.approx(math.log(told.size.clock))
    assert read["slope"] == pytest.approx(told.shift.slope)
    assert read["sharpness"] == pytest.approx(2 * math.log(told.size.jacobian))


def nets(seed: int, *, own: float = 0.0, shared: float = 0.0) -> list[dict[str, Any]]:
    """120 nets of 24 recipes whose outcomes follow sharpness, and the variation as planted: that of
    the single net (`own`), or the part of it that all nets of a recipe have (`shared`)."""
    rng = np.random.default_rng(seed)
    listed = []
    for recipe in range(24):
        centre, sharp = rng.standard_normal(2)
        for k in range(5):
            apart = rng.standard_normal(5)
            net = dict(zip(CONDITIONS, [centre + apart[0], *apart[1:4]], strict=True))
            net |= {"sharpness": sharp + apart[4], "sharpness at first": sharp}
            follows = sharp + own * apart[0] + shared * centre
            net |= {name: follows + rng.standard_normal() for name in OUTCOMES}
            listed.append({**net, "recipe": recipe, "seed": k})
    return listed


def answer(listed: list[dict[str, Any]], question: str) -> dict[str, Any]:
    places = [np.array([net[k] for net in listed]) for k in ("recipe", "seed")]
    return foresight.answer(listed, "loss", question, *places)


def test_planted_foresight_is_found_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "DEALS", 80)  # the least chance is 1/81, below 0.05/3
    for question in foresight.QUESTIONS:
        assert answer(nets(0, own=1.0, shared=1.0), question)["yes"]
    # what the recipe has in common is foreseen, and is nothing beside the recipe
    assert answer(nets(1, shared=2.0), "seeds")["yes"]
    assert answer(nets(1, shared=2.0), "recipes")["yes"]
    assert not answer(nets(1, shared=2.0), "beyond")["yes"]
    # 36 nulls at 0.05/3 or less: four and more have probability below 0.004
    told = [answer(nets(k), q)["yes"] for k in range(2, 14) for q in foresight.QUESTIONS]
    assert sum(told) < 4


def test_gains_are_those_of_regression_on_what_was_not_held_out() -> None:
    rng = np.random.default_rng(0)
    x, y, folds = rng.standard_normal((30, 2)), rng.standard_normal(30), np.arange(30) % 3
    base = np.column_stack([np.ones(30), x[:, 0]])
    alone = foresight.held_out(y, base, x[:, 1:], folds)[1]
    for k in range(3):
        line = np.polyfit(x[folds != k, 0], y[folds != k], 1)
        np.testing.assert_allclose(
            alone[folds == k], (y[folds == k] - np.polyval(line, x[folds == k, 0])) ** 2
        )


def test_the_experiment_runs_and_counts_what_cannot_be_read() -> None:
    asked = Parameters(
        depths=(1,), epsilons=(0.5,), gains=(1.0, 2.0), norms=(0, 1), seeds=3, width=8,
        samples=40, steps=5,
    )  # fmt: skip
    found = EXPERIMENT.reduce(
        asked,
        foresight.pieces(asked),
        [{"failed": "not early"}, *map(foresight.measure, foresight.pieces(asked)[1:])],
    )
    assert len(found["nets"]) == 11 and found["failed"] == ["not early"]
    columns, rows = EXPERIMENT.table(found)
    assert len(rows) == 9 and all(len(row) == len(columns) for row in rows)
    assert engine.find("foresight") is EXPERIMENT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depths": (4, 2)}, "depths"),
        ({"samples": 24}, "too small"),
        ({"gains": (0.0,)}, r"gains\[0\] is 0.0"),
        ({"norms": (2,)}, "norms is 2"),
        ({"seeds": 1}, "seeds is 1"),
    ],
)
def test_parameters_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(**change)
