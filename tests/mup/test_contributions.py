"""What branches and heads contribute: exact where a plan is complete, and faults that are planted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd import mup
from grsd.mup.contributions import Verification, multiplying

from .test_planning import Plain, Residual, gpt2

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """A block of two branches; a norm may stand behind the ends, and the second may be unnamed."""

    def __init__(self, width: int, behind: bool, named: bool) -> None:
        super().__init__()
        self.branch_end, self.inner = nn.Linear(width, width), nn.Module()
        other = "branch_end" if named else "unnamed"
        self.inner.add_module(other, nn.Linear(width, width))
        self.behind = nn.RMSNorm(width, eps=1e-6) if behind else nn.Identity()

    def forward(self, *, h: Tensor, factor: float = 1.0) -> tuple[Tensor, None]:
        h = h + self.behind(self.branch_end(torch.tanh(h)))
        (second,) = self.inner.children()
        return h + factor * second(torch.tanh(h)), None


class Net(nn.Module):
    def __init__(
        self, width: int, depth: int, behind: bool = False, named: bool = True, power: float = 0.0
    ) -> None:
        super().__init__()
        self.read = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Two(width, behind, named) for _ in range(depth))
        self.head, self.scale = nn.Linear(width, 3), width**power
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * self.read(x)
        for block in self.blocks:
            h, _ = block(h=h)
        out: Tensor = self.head(h)
        return out


def verified(base: bool = False, depth: int = 8, **fault: Any) -> Verification:
    torch.manual_seed(0)
    model, small = Net(32, depth, **fault), Net(16, 2, **fault)
    plan = mup.plan(model, base=small, optimizer="adamw")
    plan.initialize_(model, seed=0)
    return plan.verify(model, X, base=small if base else None)


def test_a_complete_plan_contributes_its_factors_exactly() -> None:
    found = verified(base=True)
    assert found.complete and found.wrong == ()
    # double precision; there is no norm whose ε could disturb it
    for row in found.rows:
        wanted = {"adds": 0.25, "gives": 0.5, "reads": 1.0}[row.what]
        assert row.wanted == wanted and str(row.place) in str(found)
        if row.what != "reads":
            assert row.measured == pytest.approx(wanted, rel=1e-6)
    places = [row.place for row in found.rows if row.what == "adds"]
    assert len(places) == 8 + 16 and {f"blocks.{i}" for i in range(8)} <= set(places)


def test_an_end_that_no_pattern_names_is_found() -> None:
    found = verified(named=False)
    wrong = [row.place for row in found.wrong]
    assert wrong == [f"blocks.{i}" for i in range(8)]
    # by hand: of one block, whose ends give a and b, ‖a/4 + b‖ / ‖a + b‖
    torch.manual_seed(0)
    model, small = Net(32, 8, named=False), Net(16, 2, named=False)
    plan = mup.plan(model, base=small, optimizer="adamw")
    plan.initialize_(model, seed=0)
    h = model.read(X).detach()
    h = h / h.square().mean().sqrt()
    block: Any = model.blocks[0]
    with torch.no_grad():
        a = block.branch_end(torch.tanh(h))
        b = [block.inner.unnamed(torch.tanh(h + x)) for x in (a / 4, a)]
        wanted = (a / 4 + b[0]).norm() / (a + b[1]).norm()
    assert found.wrong[0].measured == pytest.approx(float(wanted), rel=1e-6)
    assert "some of it passes no multiplier: name all ends of its branches" in str(found)


def test_a_norm_behind_an_end_is_found_however_small_the_end() -> None:
    for size in (1.0, 1e-6):
        model, small = Net(32, 8, behind=True), Net(16, 2, behind=True)
        plan = mup.plan(model, base=small, optimizer="adamw")
        with torch.no_grad():
            for block in model.blocks:
                block.branch_end.weight.mul_(size)
                block.branch_end.bias.mul_(size)
        found = plan.verify(model, X)
        ends = {row.place: row.measured for row in found.rows if row.place.endswith("branch_end")}
        for i in range(8):
            assert ends[f"blocks.{i}.branch_end"] == pytest.approx(1.0, abs=1e-3)  # ε/¼² of it
            assert ends[f"blocks.{i}.inner.branch_end"] == pytest.approx(0.25, rel=1e-6)
        assert "name the norm behind it in branch_ends" in str(found)
    # the remedy
    plan = mup.plan(
        model, base=small, optimizer="adamw", branch_ends=["*.behind", "*.inner.branch_end"]
    )
    assert plan.verify(model, X).complete


def test_a_power_of_the_width_is_found_beside_the_base() -> None:
    assert verified(power=0.5).complete  # of one model nothing can be seen
    found = verified(base=True, depth=2, power=0.5)
    assert {(row.place, row.what) for row in found.wrong} == {
        ("blocks.0", "reads"),
        ("head", "reads"),
    }
    assert found.wrong[0].measured == pytest.approx(2**0.5, rel=0.15)  # 96 Gaussian numbers
    assert "a power of the width of its own" in str(found)


def test_what_is_zero_or_never_called_is_not_called_right() -> None:
    model, small = Residual(32, 4).double(), Residual(16, 2).double()
    plan = mup.plan(model, base=small, optimizer="adamw")
    with torch.no_grad():
        model.head.weight.zero_()
        for block in model.blocks:
            block.branch_end.weight.zero_()  # an end that starts from zero is measured by a probe
    found = plan.verify(model, X)
    by_place = {row.place: row for row in found.rows}
    assert by_place["blocks.0.branch_end"].measured == pytest.approx(0.5, rel=1e-12)
    assert not by_place["head"].right and "head: nothing to measure" in str(found)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model, small = gpt2(32, 4).train(), gpt2(16, 2)
    plan = mup.plan(model, base=small, optimizer="adamw")
    before, tokens = copy.deepcopy(model), torch.arange(8)[None]
    assert plan.verify(model, {"input_ids": tokens}, base=small).complete
    assert torch.equal(model(tokens).logits, before(tokens).logits)
    assert model.training and not any(map(multiplying, model.modules()))
    # with the multipliers on, they stay on, at their factors
    plan.attach(model)
    wanted = model(tokens).logits
    found = plan.verify(model, lambda m: m(tokens).logits.sum())
    assert found.complete and torch.equal(model(tokens).logits, wanted)
    assert all(not m._forward_hooks for name, m in model.named_modules() if name.endswith("ln_1"))


def test_attention_of_torch_and_embeddings_of_gemma_are_measured() -> None:
    plan: Any = mup.plan(
        Plain(32, 4),
        base=Plain(16, 2),
        optimizer="adamw",
        roles={"places": "input"},
        branch_ends=["*.attn", "*.mlp"],
    )
    assert plan.verify(Plain(32, 4), (IDS,)).complete
