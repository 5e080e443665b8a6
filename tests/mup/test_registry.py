"""One row is enough: an optimizer that is added to the registry is in tables, plans, audits and coordinate checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grsd import mup
from grsd.experiments import mup_coords, mup_norms
from grsd.mup.registry import OPTIMIZERS, Optimizer, assemble, row
from grsd.mup.rules import ROLES, RULES, derive, rule, scale

from .test_planning import Residual

# Signed SGD, whose rule is that of every sign; and the gradient over its Frobenius norm, which for one sample is
# the orthogonal factor itself
SIGN = """
    η  1        n^-1     n^-1L^-1/2    1          1       1           L^-1/2       1
    λ  1        n        n             1          1       1           1            1
"""
BARE = """
    η  n^1/2    1        L^-1/2        n^1/2
    λ  n^-1/2   1        1             n^-1/2
"""


class Descent(torch.optim.Optimizer):
    """ΔW = −η A(∇), on the groups of a plan."""

    def __init__(self, params: Any, lr: float, direction: Callable[[Tensor], Tensor]) -> None:
        super().__init__(params, {"lr": lr})
        self.direction = direction

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.direction(p.grad), alpha=group["lr"])


TOYS = {
    "signed": Optimizer(
        "Signed SGD",
        lambda groups, lr: Descent(groups, lr, torch.sign),
        "sign",
        SIGN,
        rate=2.0**-11,
        mistake=(1.0, -0.5),
    ),
    "normed": Optimizer(
        "SGD of normed matrices",
        lambda groups, lr: Descent(groups, lr, lambda G: G / torch.linalg.vector_norm(G)),
        "orthogonal",
        BARE,
        rate=2.0**-9,
        mistake=(-0.5, -0.5),
        slow=1,
    ),
}


SMALL: dict[str, Any] = {
    "widths": (16, 32),
    "depths": (2,),
    "base_width": 16,
    "base_depth": 2,
    "seeds": 1,
    "steps": 1,
    "samples": 4,
}


@pytest.fixture(params=sorted(TOYS))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(OPTIMIZERS, request.param, TOYS[request.param])
    return str(request.param)


def test_the_tables_have_it_and_its_derivation_agrees(name: str) -> None:
    assert (name, 1) in RULES and len(RULES) == 2 * len(OPTIMIZERS)
    for k in (1, 2):
        assert RULES[name, k] == derive(name, k)
    assert set(RULES[name, 2]) == set(ROLES if name == "signed" else ROLES[:3])
    assert rule(name, "hidden").lr == (scale(-1) if name == "signed" else scale())


def test_a_plan_shows_it_and_builds_it(name: str) -> None:
    model, base = Residual(32, 4), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer=name)
    matrices = row(name).matrices_only
    assert matrices == (name == "normed")
    assert {e.optimizer for e in plan} == ({name, "adamw"} if matrices else {name})
    assert name in plan.table().splitlines()[2]
    optimizer = plan.make_optimizer(model, lr=0.01)
    hidden = [g for g in optimizer.param_groups if g["role"] == "hidden"]
    assert [g["lr"] for g in hidden] == [0.01 if matrices else 0.005]
    before = model.blocks[0].first.weight.detach().clone()
    model(torch.ones(3, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].first.weight, before)


def test_an_audit_finds_its_exponents(name: str) -> None:
    make = mup_norms.network(2)
    found = mup.audit_update_norms(
        make,
        mup_norms.one_sample,
        widths=(32, 64, 128),
        depths=(),
        base=(64, 4),
        optimizers=[name],
        seeds=(0,),
        tolerance=0.2,
    )
    own = [e for e in found.exponents if e.optimizer == name]
    assert len(own) == 2 * len(RULES[name, 2]) and not [str(e) for e in own if not e.holds]
    assert name in mup_norms.Parameters().optimizers


def test_a_coordinate_check_takes_it_with_its_rate_and_its_mistake(name: str) -> None:
    p = mup_coords.Parameters()
    assert name in p.optimizers and (name in p.slow) == (name == "normed")
    small = mup_coords.Parameters(optimizers=(name,), trained="hidden", **SMALL)
    pieces = mup_coords.pieces(small)
    assert {piece["lr"] for piece in pieces} == {TOYS[name].rate}
    right, wrong = (
        next(
            mup_coords.measure(piece)["features"][1]
            for piece in pieces
            if piece["size"] == [32, 2] and piece["parametrization"] == kind
        )
        for kind in ("mup", "wrong")
    )
    # to first order the features move with the rate, which the mistake makes 2^mistake times as large
    assert wrong / right == pytest.approx(2.0 ** TOYS[name].mistake[0], rel=0.05)  # type: ignore[index]


def test_a_table_of_the_wrong_shape_is_refused_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = Optimizer("short", torch.optim.SGD, "gradient", "η 1 1 1\nλ 1 1 1")
    monkeypatch.setitem(OPTIMIZERS, "short", short)
    with pytest.raises(ValueError, match=r"a table has lines of 4 or 8 cells for η and λ, got"):
        rule("short", "hidden")


def test_every_row_is_complete() -> None:
    for name, known in OPTIMIZERS.items():
        assert known.words and set(known.rules) == {1, 2}
        assert (known.mistake is None) or known.rate is not None
        assert known.variant_of is None or known.variant_of in OPTIMIZERS
        assert known.kind == "orthogonal" or not known.matrices_only, name


def decayed(name: str) -> float:
    """Distance between what decay adds to a first step and −η λ W, relative to the larger of the two."""
    rate, decay, ends = 1e-6, 0.1, []
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.0, decay):
        W = torch.nn.Parameter(start.clone())
        W.grad = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
        group = {"params": [W], "lr": rate, "mup_lr": 1.0, "weight_decay": share}
        row(name).first(assemble({name: [group]}, rate, {name: row(name).exact}))
        ends.append(W.detach())
    added, wanted = ends[1] - ends[0], -rate * decay * start
    return float((added - wanted).norm() / max(added.norm(), wanted.norm()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_stands_beside_the_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ΔW = −η (A + λ W), which the rules of λ assume; SSO's way back to its sphere undoes it."""
    # decay behind the update, as SOAP's, differs by η ‖A‖/‖W‖, about 1e-6
    assert decayed(name) < 1e-4 if name != "sso" else decayed(name) > 0.1
    # decay inside the gradient: a sign does not see it, and it is one thing with the rate
    monkeypatch.setitem(OPTIMIZERS, "adamax", Optimizer("", torch.optim.Adamax, "sign", SIGN))
    assert decayed("adamax") > 0.1
