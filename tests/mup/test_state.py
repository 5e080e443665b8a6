"""A plan outlives saving, compiling, copying and distributed wrapping, and schedules keep its ratios."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from grsd import mup
from grsd.mup import Plan, schedules
from grsd.mup.roles import plain

from .test_planning import Residual, gpt2

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
BASE = Residual(8, 2)
OWN = ("sgd", "adamw", "muon", "muon_keller", "muon_kimi", "shampoo", "sso")
KEPT = ("lion", "soap", "soap_sqrt")


def advance(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        (model(X) - 1).square().mean().backward()
        opt.step()


@pytest.fixture
def made() -> tuple[Residual, Plan]:
    torch.manual_seed(0)
    model = Residual(16, 4)
    return model, mup.plan(model, base=BASE, optimizer="adamw")


@pytest.mark.filterwarnings("ignore:soap. the paper's rule")
@pytest.mark.parametrize("name", [*OWN, *KEPT])
def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(name: str) -> None:
    torch.manual_seed(0)
    model = Residual(16, 3)
    plan = mup.plan(model, base=Residual(8, 3), optimizer=name)
    plan.attach(model)
    options: Any = {"sgd": {"momentum": 0.9}} if name == "sgd" else None
    opt = plan.make_optimizer(model, lr=0.01, weight_decay=0.1, options=options)
    schedule = LambdaLR(opt, schedules.cosine(8, warmup=2))
    advance(model, opt, 3)
    schedule.step()
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "opt": opt.state_dict(), "schedule": schedule.state_dict()},
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # nothing but tensors and plain data
    again = Residual(16, 3)
    again.load_state_dict(saved["model"])
    plan.attach(again)
    other = plan.make_optimizer(again, lr=0.01, weight_decay=0.1, options=options)
    second = LambdaLR(other, schedules.cosine(8, warmup=2))
    other.load_state_dict(saved["opt"])
    second.load_state_dict(saved["schedule"])
    assert schedules.base_lr(other) == pytest.approx(schedules.base_lr(opt), rel=1e-12)
    for m, o, s in ((model, opt, schedule), (again, other, second)):
        advance(m, o, 1)
        s.step()
        advance(m, o, 1)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = Residual(16, 3)
    fresh.load_state_dict(saved["model"])
    plan.attach(fresh)
    advance(fresh, plan.make_optimizer(fresh, lr=0.01, weight_decay=0.1, options=options), 2)
    same = all(  # without the state it is another training
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )
    assert not same


@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("_orig_mod.blocks.0.first.weight", "blocks.0.first.weight"),
        ("module.blocks.0.first.weight", "blocks.0.first.weight"),
        ("module._orig_mod.blocks.0.first.weight", "blocks.0.first.weight"),
        ("_orig_mod.module.blocks.0.first.weight", "blocks.0.first.weight"),
        ("blocks.0._orig_mod.first.weight", "blocks.0.first.weight"),
        (
            "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.first.weight",
            "blocks.0.first.weight",
        ),
        ("blocks.0._checkpoint_wrapped_module.first.weight", "blocks.0.first.weight"),
        ("submodule.module.weight", "submodule.module.weight"),  # a module's own names stay
    ],
)
def test_names_lose_what_wrappers_put_in(wrapped: str, bare: str) -> None:
    assert plain(wrapped) == bare


def test_a_compiled_model_trains_like_the_model(made: tuple[Residual, Plan]) -> None:
    model, plan = made
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert any(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    for m in (model, compiled):
        plan.attach(m)  # type: ignore[arg-type]
        advance(m, plan.make_optimizer(m, lr=0.01), 3)  # type: ignore[arg-type]
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_models_of_one_class_keep_their_own_multipliers(
    made: tuple[Residual, Plan],
) -> None:
    # by default torch.compile would give the third the graph, and with it the multipliers, of one of the others
    model, plan = made
    plain_one, third = copy.deepcopy(model), copy.deepcopy(model)
    plan.attach(model)
    mup.plan(third, base=Residual(4, 1), optimizer="adamw").attach(third)
    torch.compiler.reset()
    for m in (model, plain_one, third):
        wanted = m(X)
        torch.testing.assert_close(
            torch.compile(m, backend="eager")(X), wanted, rtol=1e-5, atol=1e-6
        )
    plan.attach(plain_one)  # and hooks that come after the first call are seen
    torch.testing.assert_close(
        torch.compile(plain_one, backend="eager")(X), model(X), rtol=1e-5, atol=1e-6
    )


def test_blocks_compiled_one_by_one_are_seen_through(made: tuple[Residual, Plan]) -> None:
    model, plan = made
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")  # type: ignore[assignment]
    assert mup.plan(model, base=Residual(8, 2), optimizer="adamw").multipliers == plan.multipliers
    assert len(plan.param_groups(model, lr=0.1)["adamw"]) == len(
        {(e.role, e.lr, e.weight_decay, e.eps) for e in plan}
    )


def test_a_distributed_model_trains_like_the_model(
    made: tuple[Residual, Plan], tmp_path: Path
) -> None:
    model, plan = made
    alone = copy.deepcopy(model)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
        assert mup.plan(wrapped, base=BASE, optimizer="adamw") == plan
        for m in (alone, wrapped):
            plan.attach(m)
            advance(m, plan.make_optimizer(m, lr=0.01, weight_decay=0.1), 3)
    finally:
        distributed.destroy_process_group()
    for a, b in zip(alone.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def scheduled(model: nn.Module, plan: Plan, make: Any) -> list[float]:
    opt = plan.make_optimizer(model, lr=0.02)
    schedule = make(opt)
    rates = []
    for _ in range(20):
        rates.append(schedules.base_lr(opt))
        opt.step()
        schedule.step()
    return rates


def test_schedules_keep_the_ratios_of_the_groups() -> None:
    model = Residual(16, 4)
    plan = mup.plan(model, base=Residual(8, 2), optimizer="muon_kimi")
    single = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    single.param_groups[0]["mup_lr"] = 1.0

    def alone(make: Any) -> list[float]:  # what the schedule does to one plain rate
        opt, rates = single, []
        opt.param_groups[0]["lr"] = 0.02
        schedule = make(opt)
        for _ in range(20):
            rates.append(opt.param_groups[0]["lr"])
            opt.step()
            schedule.step()
        opt.param_groups[0].pop("initial_lr")
        return rates

    for make in (
        lambda o: LambdaLR(o, schedules.cosine(20, warmup=4, floor=0.1)),
        lambda o: OneCycleLR(
            o, max_lr=schedules.relative(o, 0.1), total_steps=21, cycle_momentum=False
        ),
        lambda o: CosineAnnealingLR(o, 30),  # multiplies, as long as its floor is 0
    ):
        torch.testing.assert_close(scheduled(model, plan, make), alone(make), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingLR(o, 20, eta_min=1e-3),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=21, cycle_momentum=False),
    ],
)
def test_a_schedule_of_absolute_rates_is_found_out(make: Any) -> None:
    model = Residual(16, 4)
    plan = mup.plan(model, base=Residual(8, 2), optimizer="muon_kimi")
    with pytest.raises(ValueError, match="a schedule set them to absolute values"):
        scheduled(model, plan, make)


def test_the_cosine_is_the_papers_schedule() -> None:
    factor = schedules.cosine(100, warmup=10, floor=0.3)
    assert factor(0) == 0.1 and factor(9) == 1.0 and factor(10) == 1.0
    assert factor(55) == pytest.approx(0.65) and factor(100) == factor(500) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"got 5, 5 and 0\.0"):
        schedules.cosine(5, warmup=5)
    with pytest.raises(ValueError, match="no 'mup_lr'"):
        schedules.base_lr(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


# --- Plans from ratios alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Residual, gpt2])
@pytest.mark.parametrize("optimizer", ["muon_kimi", "adamw"])
def test_ratios_in_place_of_a_base_give_the_same_plan(make: Any, optimizer: str) -> None:
    model, base = make(32, 6), make(16, 4)
    with_base = mup.plan(model, base=base, optimizer=optimizer)
    by_ratio = mup.plan(
        model, r_n=2, r_L=1.5, optimizer=optimizer
    )  # a ratio need not be a whole number
    assert by_ratio.table() == with_base.table() and by_ratio.multipliers == with_base.multipliers
    for a, b in zip(by_ratio, with_base, strict=True):
        assert (a.name, a.role, a.lr, a.std, a.split) == (b.name, b.role, b.lr, b.std, b.split)
    with pytest.raises(ValueError, match="does not know the base's initial values"):
        by_ratio.initialize_(model, seed=0)
    sigma = {
        "input": 0.5,
        "hidden": 0.25,
        "output": 0.5,
        "hidden_bias": 0.0,
        "input_bias": 0.0,
        "output_bias": 0.0,
    }
    by_ratio.initialize_(model, seed=0, std=sigma)
    for name, p in model.named_parameters():
        if p.ndim == 2 and by_ratio[name].role == "hidden":
            # the standard error of a standard deviation is 1/√(2N), here at most 2.3 %
            assert float(p.std()) == pytest.approx(0.25 / 2**0.5, rel=0.1)


def test_what_is_no_ratio_is_refused() -> None:
    model = Residual(16, 2)
    for wrong in (0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ratios must be positive and finite"):
            mup.plan(model, r_n=wrong, optimizer="sgd")
    with pytest.raises(ValueError, match="give either base="):
        mup.plan(model, optimizer="sgd")
    with pytest.raises(ValueError, match="give either base="):
        mup.plan(model, base=model, r_L=2, optimizer="sgd")
