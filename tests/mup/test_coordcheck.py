"""Coordinate checks: flat where the rules hold, a named condition where a rule is wrong, and runs that diverge."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd import mup
from grsd.mup import Plan, coord_check
from grsd.mup.coordcheck import CoordCheck, Run, Slope, fit_slope
from grsd.mup.coordcheck import _judge as judge

from .test_planning import Residual, gpt2

ENDS = ("first", "branch_end")
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 5, generator=GENERATOR), torch.randn(32, 3, generator=GENERATOR)


def loss(model: nn.Module) -> Tensor:
    found: Tensor = -(model(X) * Y).mean()  # a fixed ∂ℓ/∂f: what the exponents are stated for
    return found


def check(optimizer: str, lr: float, **more: Any) -> CoordCheck:
    settings: dict[str, Any] = {
        "widths": (64, 128, 256),
        "depths": (4, 8, 16),
        "base": (64, 4),
        "seeds": range(6),
    }
    return coord_check(Residual, loss, optimizer=optimizer, lr=lr, **{**settings, **more})


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("adamw", 2**-8), ("muon_kimi", 2**-6), ("sgd", 0.1)]
)
def test_mup_is_flat_and_sp_is_not(optimizer: str, lr: float) -> None:
    more = {"seeds": range(10)} if optimizer == "sgd" else {}  # its runs scatter more
    good = check(optimizer, lr, **more)
    assert good.verdict == "flat" and good.findings == ()
    bad = check(optimizer, lr, parametrization="sp")
    assert bad.verdict in ("not flat", "diverged") and bad.first["depth"].value > 1
    named = {(f.role, f.quantity, f.axis, f.condition) for f in bad.findings}
    assert ("hidden", "initial norm", "depth", "C1.2") in named
    assert ("hidden", "update norm", "depth", "C2.2") in named or optimizer == "sgd"
    assert "C1.2 is broken: the initial norm of hidden goes like depth^" in bad.diagnosis


def test_the_output_counts() -> None:
    sizes: dict[str, Any] = {"depths": (4,)}
    good = check("adamw", 2**-8, **sizes)
    assert good.output_slopes["width"].against() == "inside" and len(good.runs[0].outputs) == 6
    # standard parametrization: the head adds up n aligned terms, at the same rate
    bad = check("adamw", 2**-8, parametrization="sp", **sizes)
    assert bad.output_slopes["width"].low > 0.25

    # a head whose rate is off moves nothing but the output: features are flat, the check is not
    def wrong(model: nn.Module, base: nn.Module) -> Plan:
        right = mup.plan(model, base=base, optimizer="adamw")
        rates = ((e, e.lr * right.r_n**2 if e.role == "output" else e.lr) for e in right)
        return replace(right, entries=tuple(replace(e, lr=lr) for e, lr in rates))

    one = check("adamw", 2**-8, make_plan=wrong, depths=(), steps=1)
    assert one.slopes["width"].against() == "inside"
    assert one.output_slopes["width"].against() == "outside" and one.verdict == "not flat"
    # recorded from the loss's own pass: by hand, after one step
    run = good.runs[0]
    assert run.outputs[0] == 0.0 and run.outputs[1] > 0


@pytest.mark.parametrize(
    ("low", "high", "place"),
    [
        (-0.1, 0.2, "inside"),
        (0.3, 0.9, "outside"),
        (-1.9, -0.3, "outside"),
        (-1.82, 0.89, "undecided"),
        (-math.inf, math.inf, "undecided"),
        (0.2, 0.3, "undecided"),
    ],
)
def test_a_slope_is_judged_by_its_whole_interval(low: float, high: float, place: str) -> None:
    middle = 0.18 if math.isinf(low) else (low + high) / 2
    assert Slope(middle, low, high, 3).against() == place
    assert Slope(middle + 1, low + 1, high + 1, 3).against(1.0) == place


def test_two_points_decide_nothing() -> None:
    found = check("adamw", 2**-8, widths=(64, 128), depths=(), seeds=(0,), steps=1)
    assert found.verdict == "undecided" and "more sizes or seeds" in found.diagnosis
    assert found.contributions and found.contributions[0].complete


def test_the_diagnosis_of_a_missed_end_comes_from_the_contributions() -> None:
    class Inside(nn.Module):
        def __init__(self, block: nn.Module, width: int) -> None:
            super().__init__()
            self.block, self.other = block, nn.Linear(width, width)

        def forward(self, h: Tensor) -> Tensor:
            h = self.block(h)
            return h + self.other(torch.relu(h))

    def missed(width: int, depth: int) -> nn.Module:
        model = Residual(width, depth)
        model.blocks = nn.ModuleList(Inside(block, width) for block in model.blocks)
        return model

    settings: dict[str, Any] = {"widths": (), "depths": (4, 8, 16), "base": (32, 4)}
    settings |= {"optimizer": "adamw", "lr": 2**-8, "seeds": range(6)}
    found = coord_check(missed, loss, **settings)
    assert found.verdict == "not flat" and found.findings == ()
    assert "name all ends of its branches in branch_ends" in found.diagnosis
    assert "every norm" not in found.diagnosis
    # said to the check, it is flat
    named = coord_check(missed, loss, branch_ends=["*.branch_end", "*.other"], **settings)
    assert named.verdict != "not flat" and all(one.complete for one in named.contributions)
    assert named.slopes["depth"].high < found.slopes["depth"].low


def test_runs_record_every_parameter() -> None:
    found = check("adamw", 2**-8, widths=(64, 128), depths=(), seeds=(0,), steps=1)
    run = found.runs[0]
    torch.manual_seed(0)
    assert set(run.modules) == {name for name, _ in Residual(64, 4).named_parameters()}
    hidden = [run.modules[f"blocks.{i}.{part}.weight"] for i in range(4) for part in ENDS]
    for i, by_role in enumerate((run.weights, run.updates)):
        mean = math.exp(sum(math.log(norms[i]) for norms in hidden) / len(hidden))
        assert by_role["hidden"] == pytest.approx(mean, rel=1e-12)
    # AdamW's first update is a sign of size η: of rank one nearly, ‖·‖_R ≤ η n
    assert all(norms[1] <= 2**-8 * 64 * (1 + 1e-4) for norms in hidden)


def test_intervals_cover_planted_slopes() -> None:
    """Four hundred sets of runs with a planted slope, one seed's scatter for each width."""
    generator = np.random.default_rng(0)
    sizes = [(width, 4, seed) for width in (64, 128, 256) for seed in range(3)]
    inside = {"features": 0, "outputs": 0}
    for _ in range(400):
        runs = []
        for width, depth, seed in sizes:
            noise = 0.2 * generator.standard_normal(2)
            change, out = (width**0.4 * 2 ** noise[0], width**-0.3 * 2 ** noise[1])
            runs.append(Run(width, depth, seed, (0.0, change), (1.0, 1.0), (0.0, out), {}, {}, {}))
        found = judge(runs, (64, 4), "mup", optimizer="adamw", other="adamw", k=2)
        inside["features"] += found.slopes["width"].low <= 0.4 <= found.slopes["width"].high
        inside["outputs"] += (
            found.output_slopes["width"].low <= -0.3 <= found.output_slopes["width"].high
        )
    for count in inside.values():
        assert 0.9 <= count / 400 <= 0.98


@pytest.mark.parametrize(
    ("role", "condition"), [("hidden", "C2.2"), ("input", "C2.1"), ("output", "C2.1")]
)
def test_a_wrong_learning_rate_is_named(role: str, condition: str) -> None:
    def wrong(model: nn.Module, base: nn.Module) -> Plan:
        right = mup.plan(model, base=base, optimizer="adamw")
        bent = tuple(replace(e, lr=e.lr * right.r_n) if e.role == role else e for e in right)
        return replace(right, entries=bent)

    found = check("adamw", 2**-8, make_plan=wrong, depths=(), seeds=(0,), steps=1)
    assert {(f.role, f.quantity, f.axis, f.condition) for f in found.findings} == {
        (role, "update norm", "width", condition)
    }
    # one power of the width, to what finite widths leave of the sign's exponent
    assert found.findings[0].measured.value == pytest.approx(1.0, abs=0.1)


def test_a_diverged_run_is_data() -> None:
    found = check("sgd", 1e30, widths=(64, 128), depths=(), seeds=(0,))
    assert found.verdict == "diverged" and any(
        not math.isfinite(v) for r in found.runs for v in r.losses
    )


def test_slopes_of_known_laws_are_recovered_with_their_intervals() -> None:
    from grsd.mup.coordcheck import fit_slope

    noise = torch.randn(300, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inside = 0
    for row in noise:
        points = [(2.0**k, 2.0 ** (0.7 * k + 0.1 * float(z))) for k, z in enumerate(row)]
        fitted = fit_slope(points)
        assert fitted is not None
        inside += fitted.low <= 0.7 <= fitted.high
    assert abs(inside / 300 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 300)
    exact = fit_slope([(2.0, 8.0), (4.0, 64.0), (8.0, math.nan)])
    assert (
        exact is not None
        and exact.value == pytest.approx(3.0)
        and exact.points == 2
        and exact.high == math.inf
    )
    assert fit_slope([(2.0, 8.0), (2.0, 9.0)]) is None


def test_a_stock_transformer_is_checked() -> None:
    tokens = torch.arange(32).reshape(2, 16) % 61

    def language(model: nn.Module) -> Tensor:
        found: Tensor = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        )
        return found

    settings: dict[str, Any] = {
        "widths": (16, 32, 64),
        "depths": (2, 4),
        "base": (16, 2),
        "seeds": (0,),
        "lr": 2**-8,
        "steps": 2,
    }
    found = coord_check(gpt2, language, optimizer="muon_kimi", **settings)
    # an embedding takes one row out, of size σ at every width; the norm of the table as a matrix from width to vocabulary grows with width
    for get in ("weights", "updates"):
        slope = fit_slope([(r.width, getattr(r, get)["input"]) for r in found.runs if r.depth == 2])
        assert slope is not None and abs(slope.value) < 0.25
    assert set(found.slopes) == {"width", "depth"} and {"hidden", "input"} <= set(
        found.runs[0].updates
    )


class Dropping(Residual):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.drop = nn.Dropout(0.1)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="dropout 'drop' is active"):
        coord_check(Dropping, loss, widths=(16,), depths=(), base=(16, 2), optimizer="sgd", lr=0.1)
    with pytest.raises(ValueError, match="need steps ≥ 1"):
        check("sgd", 0.1, steps=0)
    with pytest.raises(ValueError, match="positive sizes"):
        check("sgd", 0.1, widths=(0,))
    with pytest.raises(ValueError, match="parametrization is 'ntk'; expected one of mup, sp"):
        check("sgd", 0.1, parametrization="ntk")


def test_one_size_is_not_called_flat() -> None:
    found = check("adamw", 2**-8, widths=(64,), depths=(4,), seeds=(0,), steps=1)
    assert found.verdict == "not fitted" and found.slopes == {}


def test_a_head_with_many_outputs_is_not_blamed_for_a_finite_width() -> None:
    """α‖W‖_R of a Gaussian head goes like 1 + √(d/n): with d = 200 outputs a fit over n = 64 … 256 gives −0.3 instead of its limit 0."""

    def wide(width: int, depth: int) -> nn.Module:
        model = Residual(width, depth)
        model.head = nn.Linear(width, 200)
        return model

    found = coord_check(
        wide,
        lambda m: m(X).square().mean(),
        widths=(64, 128, 256),
        depths=(),
        base=(64, 4),
        optimizer="adamw",
        lr=2**-8,
        steps=1,
        seeds=(0, 1, 2),
    )
    assert not [f for f in found.findings if (f.role, f.quantity) == ("output", "initial norm")]
    norms = [(float(r.width), r.weights["output"]) for r in found.runs]
    fit = fit_slope(norms)
    assert fit is not None and abs(fit.value) < 0.05
    raw = fit_slope([(n, size * (1 + math.sqrt(200 / n))) for n, size in norms])
    assert raw is not None and raw.value < -0.25  # what the check would have read
