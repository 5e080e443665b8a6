"""A monitor names the layer whose rate is wrong, and is silent where every rate is right."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from grsd import mup
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup.monitoring import entry_norms

STEPS, LARGE = 11, (64, 8)


def trained(
    size: tuple[int, int],
    optimizer: str,
    base: mup.Monitor | None = None,
    wrong: dict[str, float] | None = None,
    seed: int = 0,
    **more: Any,
) -> mup.Monitor:
    """Train a small Llama; `wrong` multiplies the rate of parameters of some names."""
    build = stock.factory(stock.configuration("llama"), positions=16)
    model, text = build(*size), help_text.text()
    plan = mup.plan(model, base=build(32, 2), optimizer=optimizer)
    plan.initialize_(model, seed=seed)
    plan.attach(model)
    opt = plan.make_optimizer(model, lr=2.0**-7)
    for name, factor in (wrong or {}).items():
        parameter = dict(model.named_parameters())[name]
        apart(opt, parameter, factor)
    watch = mup.monitor(plan, model, opt, every=5, base=base, **{"log": None, **more})
    for step in range(STEPS):
        ids, targets = text.batch(seed, step, 4, 16)
        opt.zero_grad()
        logits = model(ids).logits.flatten(0, 1)
        nn.functional.cross_entropy(logits, targets.flatten()).backward()
        opt.step()
    return watch


def apart(opt: torch.optim.Optimizer, parameter: nn.Parameter, factor: float) -> None:
    """Give a parameter a group of its own, at a multiple of its rate."""
    for one in getattr(opt, "optimizers", [opt]):
        for group in list(one.param_groups):
            kept = [p for p in group["params"] if p is not parameter]
            if len(kept) < len(group["params"]):
                group["params"] = kept
                new = {k: v for k, v in group.items() if k != "params"}
                one.add_param_group({**new, "params": [parameter], "lr": factor * group["lr"]})
                return
    raise AssertionError("no such parameter")


@pytest.mark.parametrize("optimizer", ["adamw", "muon_kimi"])
def test_right_rates_are_within_and_a_wrong_one_is_named(optimizer: str) -> None:
    base = trained((32, 2), optimizer)
    # nulls: the base itself, and twice its width at four times its depth
    assert base.departures == [], str(base)
    right = trained(LARGE, optimizer, base, seed=1)
    assert right.departures == [], str(right)
    assert sorted(right.norms) == [0, 5, 10] and "every layer is within" in str(right)
    # one layer at four times its rate: named by its peers, and beside the base
    one = "model.layers.3.mlp.up_proj.weight"
    watch = trained(LARGE, optimizer, base, wrong={one: 4.0})
    first = [d for d in watch.departures if d.step == 0]
    assert {(d.name, d.quantity) for d in first} == {(one, "update")}
    assert {d.beside for d in first} == {"its peers", "the base"}
    assert all(d.ratio == pytest.approx(4.0, rel=0.5) for d in first)
    # every block at four times its rate has equal peers: only the base tells it
    several = {f"model.layers.{i}.mlp.down_proj.weight": 0.25 for i in range(8)}
    watch = trained(LARGE, optimizer, base, wrong=several)
    first = [d for d in watch.departures if d.step == 0]
    assert {d.name for d in first} == set(several) and {d.beside for d in first} == {"the base"}


def test_a_few_lines_are_logged_and_a_figure_is_drawn() -> None:
    lines: list[str] = []
    watch = trained((32, 2), "muon_kimi", log=lines.append)
    # every fifth step, a line for each role of the model
    roles = {e.role for e in watch.plan}
    assert len(lines) == 3 * len(roles) and lines[0].startswith("step 0: input")
    fig, axes = plt.subplots(1, 2)
    watch.draw(axes)
    for ax in axes:
        assert len(ax.lines) == len(roles) and ax.get_yscale() == "log"
        assert list(ax.lines[0].get_xdata()) == [0, 5, 10]
    plt.close(fig)
    seen = len(watch.norms)
    watch.remove()
    assert len(watch.norms) == seen


def test_what_is_watched_is_the_norm_and_the_update() -> None:
    """Against one step by hand: α‖W‖_R and α η ‖U Vᵀ‖_R, which is known for an exact Muon."""
    torch.manual_seed(0)
    build = stock.factory(stock.configuration("llama"), positions=16)
    model = build(64, 4)
    plan = mup.plan(model, base=build(32, 2), optimizer="muon")
    opt = plan.make_optimizer(model, lr=0.01, options={"muon": {"exact": True}})
    watch = mup.monitor(plan, model, opt, every=1, log=None)
    name = "model.layers.1.mlp.down_proj.weight"
    W = dict(model.named_parameters())[name].detach().clone()
    model(torch.arange(12)[None] % 7).logits.square().mean().backward()
    opt.step()
    root = (W.shape[1] / W.shape[0]) ** 0.5
    weight, update = watch.norms[0][name]
    assert weight == pytest.approx(plan[name].multiplier * root * float(torch.linalg.svdvals(W)[0]))
    # float32 rounds W − ηUVᵀ by 6e-8 of its entries, some .05 against steps of .01/√64
    assert update == pytest.approx(plan[name].multiplier * root * 0.01 * plan[name].lr, rel=1e-3)
    with pytest.raises(ValueError, match="every is 0"):
        mup.monitor(plan, model, opt, every=0)


def test_positions_without_a_layer_are_rows_and_no_matrix() -> None:
    """ViT adds rows of (1, T, n) to its stream: their size is a token's, and stays as n grows.

    Read as a matrix with n inputs, (T, n) seemed to start like width^.4 (C1.1 "broken").
    """
    build = stock.factory(stock.configuration("vit"), positions=16)
    sizes = []
    for width in (32, 128):
        model = build(width, 2)
        made = mup.plan(model, base=build(32, 2), optimizer="adamw")
        made.initialize_(model, seed=0)
        e = made["vit.embeddings.position_embeddings"]
        values = dict(model.named_parameters())[e.name].detach()
        largest = max(float(row.square().mean().sqrt()) for row in values[0])
        assert entry_norms(values, e) == [pytest.approx(largest, rel=1e-6)]
        assert e.kind == made["vit.embeddings.cls_token"].kind == "embeddings"
        assert made["vit.embeddings.patch_embeddings.projection.weight"].kind == "weights"
        sizes.append(largest)
    # of five rows the largest: its noise falls with n
    assert 0.7 < sizes[1] / sizes[0] < 1.1
