from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.func import jvp

from grsd import results
from grsd.cli import main
from grsd.dynamics.drift import Drift
from grsd.dynamics.flow import integrate
from grsd.dynamics.modes import instant, modes
from grsd.experiments import drift, engine
from grsd.experiments.two_layer_forms import TwoLayerProblem
from grsd.lab.data import functions
from grsd.lab.nets.models import two_layer
from grsd.pieces import imported

SMALL = ["sizes=12,16", "seeds=2", "points=12", "until=60"]
EXPERIMENT = engine.find("drift")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRSD_SCALE", raising=False)


def _grsd(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def _options(*words: str) -> list[str]:
    return [part for word in words for part in ("--option", word)]


# --- The net and its closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("gamma", [0.05, 4.0])
def test_closed_forms_equal_automatic_differentiation(activation: str, gamma: float) -> None:
    x, y = functions.data("quadrant", 15, 0, inputs=3)
    closed = TwoLayerProblem(two_layer(3, 11, gamma, activation, seed=1, gain=1.3), x, y)
    auto = closed.autodiff()
    theta = (
        closed.theta
        + 0.3 * torch.randn(closed.theta.shape, generator=torch.Generator().manual_seed(2)).double()
    )
    for name in ("output", "error", "velocity", "jacobian", "kernel", "kernel_rate"):
        found, expected = getattr(closed, name)(theta), getattr(auto, name)(theta)
        # 1e-12 as asked; differences of outputs lose a factor 1/γ
        assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max()), name
    other = torch.randn(theta.shape, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(
        closed.kernel_rate(theta, other), auto.kernel_rate(theta, other), rtol=1e-11, atol=1e-12
    )
    torch.testing.assert_close(
        closed.velocity(theta, 0.1), auto.velocity(theta, 0.1), rtol=1e-11, atol=1e-13
    )
    v = auto.velocity(theta)
    _, moved = jvp(auto._jacobian, (theta,), (v,))
    speed = float(torch.linalg.matrix_norm(moved, 2)) / math.sqrt(15) / float(v.norm())
    assert closed.speed(theta) == pytest.approx(speed, rel=1e-11)
    seen = closed.on(x[:4], y[:4])
    torch.testing.assert_close(
        seen.kernel(theta), auto.on(x[:4], y[:4]).kernel(theta), rtol=1e-12, atol=1e-14
    )


def test_the_dial_starts_every_net_alike_and_turns_the_kernel_rate() -> None:
    nets = {gamma: drift.problem("wave", 14, gamma, seed=5) for gamma in (1e-4, 1.0, 3.0)}
    M, rate, e = instant(nets[1.0], nets[1.0].theta)
    for gamma, net in nets.items():
        found = instant(net, net.theta)
        np.testing.assert_allclose(found[0], M, rtol=1e-13)
        np.testing.assert_allclose(found[1], gamma * rate, rtol=1e-11, atol=1e-15)
        np.testing.assert_array_equal(found[2], e)
        assert not net.output(net.theta).any()
    times = [0.0, 1.0, 20.0]
    linear = integrate(nets[1.0].autodiff().linearized(nets[1.0].theta), times, estimate=False)
    gaps = [
        float(np.abs(integrate(nets[g], times, estimate=False).losses - linear.losses).max())
        for g in (1e-4, 3.0)
    ]
    assert gaps[0] < 1e-4 < 1e-2 < gaps[1]


def test_two_layer_is_drawn_from_its_seed_and_refuses_bad_sizes() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (two_layer(2, 8, 1.0, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.inner_start, same.inner_start) and not torch.equal(
        first.inner_start, other.inner_start
    )
    for gamma in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="gamma is"):
            two_layer(2, 8, gamma, seed=0)
    with pytest.raises(ValueError, match="must be positive"):
        two_layer(2, 0, 1.0, seed=0)
    x, y = functions.data("wave", 6, 0)
    with pytest.raises(ValueError, match="ReLU has no closed form"):
        TwoLayerProblem(two_layer(2, 8, 1.0, "relu", seed=0), x, y)
    with pytest.raises(ValueError, match="do not fit a net of 3 inputs"):
        TwoLayerProblem(two_layer(3, 8, 1.0, seed=0), x, y)


@pytest.mark.parametrize("target", sorted(drift.TARGETS))
def test_targets_have_mean_square_one(target: str) -> None:
    x, y = functions.data(target, 40, 3)
    assert x.shape == (40, 2) and y.shape == (40,) and float(y.square().mean()) == pytest.approx(1)
    assert not torch.equal(x, functions.data(target, 40, 4)[0])


# --- The registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engine.NAMES)
def test_an_experiment_is_a_module_with_one_constant(name: str) -> None:
    """Its name is the module's, its summary the docstring's, its key that of what it imports."""
    found = engine.find(name)
    assert found.name == name and 20 < len(found.summary) < 120 and not found.summary.endswith(".")
    asked = found.parameters()
    assert set(found.gpu) <= {field.name for field in fields(asked)} and asked.seeds > 0
    assert json.loads(json.dumps(found.pieces(asked)[0]))
    modules = {engine.find(other).parameters.__module__ for other in engine.NAMES}
    assert imported(found.parameters.__module__) & modules == {found.parameters.__module__}


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("drift", "dynamics.problem dynamics.transport_solvers"),
        ("tour", "dynamics.problem dynamics.modes renorm.diagnostics.splitting spectrum.nulls"),
        ("transfer", "mup.schedules mup.registry"),
    ],
)
def test_a_change_of_what_an_experiment_imports_changes_its_keys(name: str, needed: str) -> None:
    seen = imported(engine.find(name).parameters.__module__)
    assert {f"grsd.{module}" for module in needed.split()} <= seen


def test_options_are_read_by_the_type_of_their_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine.parameters(EXPERIMENT, ["sizes=8, 16", "gamma=2", "target=step", "data-seed=3"])
    assert (
        found.sizes == (8, 16)
        and found.gamma == 2.0
        and found.target == "step"
        and found.data_seed == 3
    )
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    large = engine.parameters(EXPERIMENT, ["seeds=3"])
    assert large.sizes == EXPERIMENT.gpu["sizes"] and large.seeds == 3
    for option, words in (
        ("colour=red", "option of drift is 'colour'"),
        ("sizes", "has no value"),
        ("sizes=8,big", "expected ints between commas"),
        ("gamma=x", "expected float"),
        ("target=x", "target is 'x'"),
        ("scaling=x", "expected one of mean-field, ntk"),
        ("seeds=1", "a spread needs two"),
        ("sizes=2", "sizes is 2; it must be at least 4"),
        ("until=5", "after is 10.0; expected 0.1 < after < 5.0"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.parameters(EXPERIMENT, [option])
    with pytest.raises(ValueError, match=r"experiment is 'x'; expected one of .*drift"):
        engine.find("x")
    with pytest.raises(TypeError, match="takes Parameters"):
        engine.run(EXPERIMENT, {})


def test_a_stopped_run_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    asked = engine.parameters(EXPERIMENT, SMALL)
    calls: list[int] = []

    def stops(piece: dict[str, Any]) -> dict[str, Any]:
        calls.append(piece["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return EXPERIMENT.measure(piece)

    breaking = replace(EXPERIMENT, measure=stops)
    with pytest.raises(KeyboardInterrupt):
        engine.run(breaking, asked, cache=tmp_path)
    files = sorted((tmp_path / "experiments" / "drift").glob("*.json"))
    assert len(files) == 2
    files[0].write_text(files[0].read_text()[:100])  # a damaged piece is measured again
    seen: list[str] = []
    resumed = engine.run(breaking, asked, cache=tmp_path, progress=lambda *x: seen.append(x[2]))
    assert len(calls) == 3 + 3 and len(seen) == 4
    assert seen[0] == "gamma=1.225 data_seed=0 n=12 h=12 seed=0"  # what differs between pieces
    whole = engine.run(EXPERIMENT, asked, cache=tmp_path / "other")
    assert results.dumps(resumed.data) == results.dumps(whole.data)
    engine.run(breaking, asked, resume=False, cache=tmp_path)
    assert len(calls) == 6 + 4


def test_a_change_of_the_code_makes_pieces_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = engine.parameters(EXPERIMENT, [*SMALL, "sizes=12"])
    engine.run(EXPERIMENT, asked, cache=tmp_path)
    monkeypatch.setattr(engine, "code", lambda _: "another")
    engine.run(EXPERIMENT, asked, cache=tmp_path)
    assert len(list((tmp_path / "experiments" / "drift").glob("*.json"))) == 4


def test_the_command_makes_a_result_that_recompute_reproduces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _grsd(
        "experiment", "drift", *_options(*SMALL), "--output", str(tmp_path / "drift-tiny.json")
    )
    assert made.exit_code == 0, made.stderr
    assert "c_adv" in made.stdout
    stored = results.load("drift-tiny", tmp_path)
    words = [
        "sizes=12,16",
        "seeds=2",
        "until=60.0",
        "points=12",
        "device=cpu",
    ]  # what a scale could change is always there
    assert stored.provenance["command"] == ["experiment", "drift", *_options(*words)]
    assert (
        stored.provenance["seeds"] == [0, 1]
        and len(stored.data["runs"]) == 4
        and len(stored.data["groups"]) == 2
    )
    monkeypatch.setattr(results, "packaged_dir", lambda: tmp_path)
    again = _grsd("results", "recompute", "drift-tiny")
    assert again.exit_code == 0 and "the largest relative difference is 0" in again.stdout
    stored.data["runs"][0]["exponents"]["measured"] *= 2  # a planted error must be seen
    kept = tmp_path / f"{stored.id}.json"  # `save` would refuse it while this tree is edited
    kept.write_text(results.dumps(asdict(stored)))
    found = json.loads(_grsd("results", "recompute", "drift-tiny", "--json").stdout)
    assert found["largest_relative_difference"] == pytest.approx(0.5)


def test_the_command_lists_and_refuses() -> None:
    listed = _grsd("experiment")
    assert listed.exit_code == 0 and "drift: " in listed.stdout and "sizes" in listed.stdout
    assert (
        json.loads(_grsd("experiment", "--json").stdout)["experiments"]["drift"]["target"] == "wave"
    )
    for words in (
        ["experiment", "x"],
        ["experiment", "drift", "--option", "x=1"],
        ["experiment", "drift", "--output", "a.txt"],
    ):
        found = _grsd(*words)
        assert found.exit_code == 2 and found.stderr.startswith("grsd: ")


# --- The drift series -------------------------------------------------------------------------------------------------


def test_pieces_keep_the_richness_or_gamma() -> None:
    fixed = engine.parameters(EXPERIMENT, ["sizes=32", "widths=128,512", "seeds=2", "data_seed=7"])
    pieces = drift.pieces(fixed)
    assert [p["gamma"] for p in pieces] == [4.0, 4.0, 8.0, 8.0] and {
        p["data_seed"] for p in pieces
    } == {7}
    lazy = drift.pieces(replace(fixed, scaling="ntk", data_seed=-1))
    assert {p["gamma"] for p in lazy} == {4.0} and [p["data_seed"] for p in lazy] == [0, 1, 0, 1]


def test_a_frozen_net_does_not_drift_and_a_rich_one_does() -> None:
    frozen, rich = (drift.Parameters(sizes=(24,), gamma=g, seeds=2, points=13) for g in (1e-3, 6.0))
    for p, rule in ((frozen, lambda c: abs(c) < 1e-2), (rich, lambda c: c > 0.1)):
        pieces = drift.pieces(p)
        data = drift.reduce(p, pieces, [drift.measure(piece) for piece in pieces])
        assert all(rule(run["summaries"]["1"]["advective"]["mean"]) for run in data["runs"])
        x = data["runs"][0]["exponents"]
        assert x["formula_advective"] - x["printed_advective"] == pytest.approx(
            data["runs"][0]["summaries"]["1"]["advective"]["mean"], abs=1e-4
        )
        if p is frozen:  # every model is the frozen kernel
            for name in ("frozen", "still", "formula_total", "model_total"):
                assert x[name] == pytest.approx(x["measured"], abs=0.02)
    assert data["trends"] == {} and len(data["groups"][0]["total"]["field"]) == len(data["times"])


def test_statistics_over_seeds_of_planted_fields() -> None:
    """Fields mean + noise: the deviation between seeds is that of the noise, the mean field's that of the mean."""
    r = np.random.default_rng(0)
    weights = np.full((20, 30), 1 / 600)
    shape = np.where(np.arange(30) % 2, 1.0, -1.0) * np.ones((20, 1))
    members = []
    for _ in range(8):
        total = shape + 0.3 * r.standard_normal((20, 30))
        summary = {
            "mean": float(total.mean()),
            "spread": float(total.std()),
            "negative": float((total < 0).mean()),
        }
        members.append(
            {
                "weights": weights,
                "fields": dict.fromkeys(drift.PARTS, total),
                "summaries": {"1": dict.fromkeys(drift.PARTS, summary)},
                "correlation": 0.0,
                "exponents": {"measured": 1.0},
            }
        )
    group, rows = drift._group(members)
    # 600 cells · 7 degrees of freedom: relative error 1/√8400 = 1.1 %
    assert group["total"]["seed_sd"] == pytest.approx(0.3, rel=0.05)
    assert group["total"]["field_sd"] == pytest.approx(math.sqrt(1 + 0.3**2 / 8), rel=0.02)
    assert np.mean([row["total"] ** 2 for row in rows]) == pytest.approx(0.3**2, rel=0.1)


def test_drift_does_not_depend_on_the_integrator() -> None:
    at = drift.problem("step", 24, 3.0, seed=0)
    path, found = drift.follow(at, 100.0, 12)
    other = integrate(at, path.times, rtol=1e-10, atol=1e-12, method="LSODA", estimate=False)
    again = [modes(*instant(at, theta)) for theta in other.thetas[1:]]
    one, two = (Drift.of(m, path.times[1:], drift.EDGES) for m in (found, again))
    for part in drift.PARTS:
        # a local tolerance of 1e-7 in θ, amplified by the flow; c is of order 1
        assert np.abs(one.c(part) - two.c(part))[one.weights(10) > 1e-4].max() < 1e-3
    assert path.identity < 1e-6
