"""Planted faults that a control must not hide: the rates of fused parts in standard parametrization, and every row's optimizer against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grsd import mup
from grsd.lab.nets import stock
from grsd.mup.planning import unscaled
from grsd.mup.registry import OPTIMIZERS

from .test_planning import Residual

G1 = torch.tensor([[3.0, 0.5], [-1.0, 2.0]])
G2 = torch.tensor([[-1.0, 0.25], [-2.0, 0.5]])


def test_the_control_has_one_rate_for_every_part_of_a_fused_matrix() -> None:
    """StarCoder's one key head grows otherwise than its queries: μP has a rate for each, SP one."""
    build = stock.factory(stock.configuration("gpt_bigcode"), positions=8)
    plan = mup.plan(build(256, 2), base=build(64, 2), optimizer="muon_kimi")
    fused = [e for e in plan if isinstance(e.split, tuple)]
    assert fused and all(len(set(e.rates)) == 2 for e in fused)
    plain = unscaled(plan)
    assert all(e.rates == () for e in plain)
    groups = plain.param_groups(build(256, 2), lr=0.5)
    assert {g["lr"] for by in groups.values() for g in by} == {0.5}
    assert not any(g.get("rates") for by in groups.values() for g in by)


def _polar(G: torch.Tensor) -> torch.Tensor:
    U, _, V = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ V


def _adam(b1: float, b2: float) -> torch.Tensor:
    """The second step of Adam, with its corrections written out."""
    m = (1 - b1) * (b1 * G1 + G2) / (1 - b1**2)
    v = (1 - b2) * (b2 * G1**2 + G2**2) / (1 - b2**2)
    return m / v.sqrt()


# the second step A of ΔW = −η A on the gradients G1, G2, from the optimizer's own paper
SECOND: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({}, lambda: G2),
    "adamw": ({"betas": (0.9, 0.95), "eps": 1e-12}, lambda: _adam(0.9, 0.95)),
    "lion": ({"betas": (0.9, 0.99)}, lambda: torch.sign(0.9 * 0.01 * G1 + 0.1 * G2)),
    "muon": ({"exact": True, "momentum": 0.5, "nesterov": False}, lambda: _polar(0.5 * G1 + G2)),
    "muon_kimi": (
        {"exact": True, "momentum": 0.5, "nesterov": False},
        lambda: 0.2 * 2**0.5 * _polar(0.5 * G1 + G2),
    ),
    "muon_keller": (
        {"exact": True, "momentum": 0.5, "nesterov": False},
        lambda: _polar(0.5 * G1 + G2),
    ),
}


@pytest.mark.parametrize("name", sorted(SECOND))
def test_the_second_step_is_that_of_the_optimizer_it_is_called(name: str) -> None:
    """The first step of many optimizers is one and the same; the second tells them apart."""
    options, wanted = SECOND[name]
    W = torch.nn.Parameter(torch.zeros(2, 2))
    group = {"params": [W], "lr": 0.01, "mup_lr": 1.0, "weight_decay": 0.0}
    if OPTIMIZERS[name].matrices_only:
        group |= {"split": 1, "transposed": False, "batched": False, "rates": ()}
    optimizer = OPTIMIZERS[name].build([group], lr=0.01, **options)
    for G in (G1, G2):
        before = W.detach().clone()
        W.grad = G.clone()
        optimizer.step()
    A = (before - W.detach()) / 0.01
    # float32, and a difference of numbers of size .01: 1e-5 of the step
    torch.testing.assert_close(A, wanted().float(), rtol=1e-4, atol=1e-4)


def test_no_two_rows_of_one_kind_step_alike() -> None:
    """Lion, AdamW and Sophia share a table: built as each other, no first step would tell."""
    steps = {}
    for name in ("adamw", "lion", "sophia"):
        net = Residual(16, 2)
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.1)
        made = mup.plan(net, base=net, optimizer=name)
        optimizer = made.make_optimizer(net, lr=0.01)
        p = net.head.weight
        for size in (1.0, -0.3):
            for other in net.parameters():
                other.grad = torch.full_like(other, size)
            if name == "sophia":
                held = (q for group in optimizer.param_groups for q in group["params"])
                curvature = [torch.full_like(q, 100.0) for q in held]
                optimizer.step(hessian=curvature)  # type: ignore[call-arg]
            else:
                optimizer.step()
        steps[name] = float(p.detach().mean())
    assert len({round(v, 5) for v in steps.values()}) == 3, steps
