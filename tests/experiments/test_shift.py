"""Stacks against `Problem`, the crossing against lines with a known root, and the experiment end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from grsd import results
from grsd.cli import main
from grsd.dynamics.problem import Problem
from grsd.experiments import engine, shift
from grsd.experiments.shift import EXPERIMENT, Parameters, crossing, step_size
from grsd.experiments.tanh_stack import TanhStack
from grsd.lab.nets.architectures import res_mlp
from grsd.lab.nets.models import mlp

SMALL: dict[str, Any] = {"depths": (2, 5), "samples": 32, "width": 8, "inputs": 4, "seeds": 3}


def _data(n: int = 20) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randn(
        n, generator=g, dtype=torch.float64
    )


def _both(kind: str) -> tuple[TanhStack, Problem]:
    x, y = _data()
    if kind.startswith("plain"):
        depth = int(kind[-1])
        return TanhStack.plain(x, y, width=7, depth=depth, seed=3), Problem(
            mlp([5, *[7] * depth, 1], seed=3, bias=False), x, y
        )
    layers = int(kind[-1])
    net = res_mlp(inputs=5, width=7, depth=6, layers=layers, epsilon=0.4, seed=3)
    return TanhStack.residual(x, y, width=7, depth=6, layers=layers, epsilon=0.4, seed=3), Problem(
        net, x, y
    )


@pytest.mark.parametrize("kind", ["residual 1", "residual 2", "plain 1", "plain 4"])
def test_a_stack_is_the_network_of_its_family(kind: str) -> None:
    """M, Ṁ along θ̇ and along a random direction, error and velocity: Hadamard products against the dense Jacobian."""
    stack, problem = _both(kind)
    theta = problem.theta
    M, rate = stack.kernel_rate(stack.start)
    # float64 through ten layers
    torch.testing.assert_close(M, problem.kernel(theta), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(stack.kernel(stack.start), M, rtol=1e-13, atol=0)
    torch.testing.assert_close(rate, problem.kernel_rate(theta), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        stack.error(stack.start), problem.error(theta), rtol=1e-12, atol=1e-13
    )
    speed = sum(float(v.square().sum()) for v in stack.velocity(stack.start))
    assert speed == pytest.approx(float(problem.velocity(theta).square().sum()), rel=1e-12)
    moved = tuple(
        w + 0.1 * v for w, v in zip(stack.start, stack.velocity(stack.start), strict=True)
    )
    assert stack.loss(moved) == pytest.approx(
        problem.loss(theta + 0.1 * problem.velocity(theta)), rel=1e-12
    )
    g = torch.Generator().manual_seed(1)
    noise = tuple(torch.randn(w.shape, generator=g, dtype=torch.float64) for w in stack.start)
    flat = _flat(noise, kind)
    torch.testing.assert_close(
        stack.kernel_rate(stack.start, noise)[1],
        problem.kernel_rate(theta, flat),
        rtol=1e-10,
        atol=1e-12,
    )


def _flat(direction: tuple[Tensor, ...], kind: str) -> Tensor:
    """In the order of the module's parameters: read, the blocks one by one, head."""
    read, *middle, head = direction
    blocks = [weight.reshape(-1) for level in zip(*middle, strict=True) for weight in level]
    return torch.cat([read.reshape(-1), *blocks, head.reshape(-1)])


@pytest.mark.parametrize("layers", [1, 2])
def test_the_blocks_of_a_stack_are_columns_of_the_jacobian(layers: int) -> None:
    stack, problem = _both(f"residual {layers}")
    j = problem.jacobian(problem.theta)
    size = layers * 49
    first = 7 * 5
    for block in (0, 2, 5):
        part = j[:, first + block * size : first + (block + 1) * size]
        M, rate = stack.kernel_rate(stack.start, block=block)
        torch.testing.assert_close(M, part @ part.T / 20, rtol=1e-12, atol=1e-14)
        h, v = 1e-4, stack.velocity(stack.start)
        near, far = (
            stack.kernel_rate(
                tuple(w + k * h * d for w, d in zip(stack.start, v, strict=True)), block=block
            )[0]
            - stack.kernel_rate(
                tuple(w - k * h * d for w, d in zip(stack.start, v, strict=True)), block=block
            )[0]
            for k in (1, 2)
        )
        # rounding 1e-16/1e-4
        torch.testing.assert_close(rate, (8 * near - far) / (12 * h), rtol=1e-7, atol=1e-10)
    with pytest.raises(ValueError, match="blocks 0 to 5"):
        stack.kernel_rate(stack.start, block=6)


def test_descent_stops_at_the_share_of_the_loss() -> None:
    stack, _ = _both("residual 1")
    at = stack.descended(0.3)
    first = stack.loss(stack.start)
    assert 0.25 * first < stack.loss(at) <= 0.3 * first
    with pytest.raises(ArithmeticError, match="has not reached"):
        stack.descended(1e-9, limit=3)


def test_a_crossing_is_found_where_the_line_has_its_root() -> None:
    rng, places = np.random.default_rng(0), np.geomspace(0.5, 32, 7)
    slopes = [np.log(x / 4.0) * 0.3 + 0.1 * rng.standard_normal(40) for x in places]
    found = crossing(places, [one.tolist() for one in slopes])
    assert found["low"] < 4.0 < found["high"] and found["share"] == 1.0
    assert found["low"] < found["place"] < found["high"] and found["high"] / found["low"] < 1.5
    exact = crossing([1.0, 4.0, 16.0], [[-1.0, -1.0], [-0.5, -0.5], [0.5, 0.5]])
    assert exact["place"] == pytest.approx(8.0) and exact["low"] == pytest.approx(8.0)
    # means −1, 0.2, −0.3, 1 of equal weight: the middle two are pooled to −0.05 before the root is taken
    rough = crossing([1.0, 2.0, 4.0, 8.0], [[m - 0.1, m + 0.1] for m in (-1.0, 0.2, -0.3, 1.0)])
    assert rough["place"] == pytest.approx(4.0 * 2 ** (0.05 / 1.05))


def test_no_crossing_is_said_not_invented() -> None:
    below = crossing([1.0, 2.0], [[-1.0, -1.1], [-0.5, -0.6]])
    above = crossing([1.0, 2.0], [[0.5, 0.6], [1.0, 1.1]])
    assert below == above == {"place": None, "low": None, "high": None, "share": 0.0}
    with pytest.raises(ValueError, match="two or more ascending"):
        crossing([2.0, 1.0], [[0.0, 1.0], [0.0, 1.0]])


def test_the_rules_of_epsilon() -> None:
    assert (
        step_size(0.3, "fixed", 9) == 0.3
        and step_size(1.0, "sqrt", 16) == 0.25
        and step_size(1.0, "inverse", 4) == 0.25
    )
    with pytest.raises(ValueError, match="scaling is 'half'"):
        step_size(1.0, "half", 4)
    with pytest.raises(ValueError, match="epsilon is -1"):
        step_size(-1.0, "fixed", 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": "rnn"}, "family is 'rnn'"),
        ({"depths": (4, 2)}, "depths"),
        ({"depths": ()}, "depths"),
        ({"samples": 24}, "too small"),
        ({"seeds": 1}, "seeds is 1"),
        ({"remaining": 0.0}, "remaining is 0.0"),
        ({"part": "third"}, "part is 'third'"),
        ({"part": "late", "family": "plain"}, "a plain net has all"),
    ],
)
def test_parameters_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(**change)


def test_the_experiment_resumes_and_its_groups_are_those_of_its_pieces(tmp_path: Path) -> None:
    asked = Parameters(**SMALL)
    whole = engine.run(EXPERIMENT, asked, cache=tmp_path)
    again = engine.run(EXPERIMENT, asked, cache=tmp_path)
    assert json.dumps(whole.data) == json.dumps(again.data)
    group = whole.data["groups"][1]
    listed = [piece for piece in EXPERIMENT.pieces(asked) if piece["depth"] == 5]
    slopes = [EXPERIMENT.measure(piece)["flow"]["slope"]["log"] for piece in listed]
    assert group["flow"]["slopes"] == pytest.approx(slopes, rel=1e-3)
    assert group["flow"]["slope"]["log"]["mean"] == pytest.approx(
        np.mean(slopes), abs=2e-3 * np.abs(slopes).max()
    )
    assert group["place"] == pytest.approx(5 * 0.09, rel=1e-3)
    assert all(
        g["tilted"]["slope"]["log"]["mean"] > g["null"]["slope"]["log"]["mean"]
        for g in whole.data["groups"]
    )
    columns, rows = EXPERIMENT.table(whole.data)
    assert len(rows) == 2 and all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize(
    "options", [{"family": "plain", "epsilon": 1.0}, {"part": "late"}, {"remaining": 0.5}]
)
def test_every_kind_of_piece_gives_finite_numbers(options: dict[str, Any]) -> None:
    asked = Parameters(**{**SMALL, "seeds": 2, **options})
    data = [EXPERIMENT.measure(piece) for piece in EXPERIMENT.pieces(asked)]
    results.dumps(
        EXPERIMENT.reduce(asked, EXPERIMENT.pieces(asked), data)
    )  # refuses what is not finite
    assert all(math.isfinite(one[name]["rms"]) for one in data for name in shift.VELOCITIES)


def test_the_command_line_makes_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRSD_SCALE", raising=False)
    words = [
        f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SMALL.items()
    ]
    options = [part for word in words for part in ("--option", word)]
    out = tmp_path / "shift-small.json"
    done = CliRunner().invoke(main, ["experiment", "shift", *options, "--output", str(out)])
    assert done.exit_code == 0, done.output
    assert len(results.load("shift-small", tmp_path).data["groups"]) == 2
