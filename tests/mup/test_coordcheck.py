"""Coordinate checks: flat where the rules hold, a named condition where a rule is wrong, and runs that diverge."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd import mup
from grsd.mup import Plan, coord_check
from grsd.mup.coordcheck import CoordCheck, fit_slope

from .test_planning import Residual, gpt2

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
        "seeds": (0, 1),
    }
    return coord_check(Residual, loss, optimizer=optimizer, lr=lr, **{**settings, **more})


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("adamw", 2**-8), ("muon_kimi", 2**-6), ("sgd", 0.1)]
)
def test_mup_is_flat_and_sp_is_not(optimizer: str, lr: float) -> None:
    good = check(optimizer, lr)
    assert good.verdict == "flat" and good.findings == ()
    bad = check(optimizer, lr, parametrization="sp")
    assert bad.verdict in ("not flat", "diverged") and bad.first["depth"].value > 1
    named = {(f.role, f.quantity, f.axis, f.condition) for f in bad.findings}
    assert ("hidden", "initial norm", "depth", "C1.2") in named
    assert ("hidden", "update norm", "depth", "C2.2") in named or optimizer == "sgd"
    assert "C1.2 is broken: the initial norm of hidden goes like depth^" in bad.diagnosis


def test_outputs_are_fitted_where_they_are_asked_for() -> None:
    sizes: dict[str, Any] = {"depths": (4,), "outputs": lambda model: model(X)}
    good = check("adamw", 2**-8, **sizes)
    assert abs(good.output_slopes["width"].value) < 0.25 and len(good.runs[0].outputs) == 6
    # standard parametrization: the head adds up n aligned terms, at the same rate
    bad = check("adamw", 2**-8, parametrization="sp", **sizes)
    assert bad.output_slopes["width"].low > 0.25
    assert check("adamw", 2**-8, depths=(4,)).output_slopes == {}


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
