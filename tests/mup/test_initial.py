"""Initial values as the base has them, plans of models without weights, and faults planted in plans."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from grsd import mup
from grsd.lab.nets import stock
from grsd.mup.coordcheck import _standard
from grsd.mup.planning import unscaled
from grsd.mup.plans import numbers

from .test_planning import Residual, gpt2


class Drawn(nn.Module):
    """A stack with every kind of initial values."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width, padding_idx=3)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Fused(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            self.norm.weight.normal_(1.0, 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


class Fused(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.branch_end = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.normal_(self.branch_end.weight, std=0.05)
        with torch.no_grad():
            self.qkv.weight[:width].zero_()  # queries that start from zero

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).chunk(3, -1)
        return h + self.branch_end(torch.tanh(q * k) + v)


def drawn() -> tuple[nn.Module, nn.Module, mup.Plan]:
    torch.manual_seed(0)
    base, model = Drawn(64, 2), Drawn(256, 4)
    plan = mup.plan(model, base=base, optimizer="adamw", fused={"*.qkv.weight": 3})
    plan.initialize_(model, seed=1)
    return base, model, plan


def test_what_has_a_structure_in_the_base_has_it_in_the_model() -> None:
    base, model, plan = drawn()
    here, there = (dict(m.named_parameters()) for m in (model, base))
    table = here["table.weight"].detach()
    assert not table[3].any() and bool(table[[0, 1, 2, 4]].any(1).all())
    # 39 · 64 values in the base: 1/√(2N) = 1.4 %
    assert float(table[4:].std()) == pytest.approx(
        float(there["table.weight"].detach()[4:].std()), rel=0.06
    )
    for i in range(4):
        qkv = here[f"blocks.{i}.qkv.weight"].detach()
        assert not qkv[:256].any() and bool(qkv[256:].any(1).all())
        # uniform in ±1/√n: the bound, σ√3, is met to 1/N, and σ has no other spread
        assert float(qkv.abs().max()) == pytest.approx(256**-0.5, rel=0.03)
        assert float(qkv[256:].std()) == pytest.approx(256**-0.5 / 3**0.5, rel=0.03)
    gains = here["norm.weight"].detach()
    # 64 values of 1 + 0.1 z in the base, 256 here: 1 % and 9 %
    assert float(gains.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(gains.std()) == pytest.approx(0.1, rel=0.35)
    # normal noise has tails beyond √3 σ
    end = here["blocks.0.branch_end.weight"].detach()
    assert float(end.abs().max()) > 3 * float(end.std())
    # of one number the size is known, and the sign drawn
    size = abs(float(there["head.bias"].detach()))
    signs = []
    for seed in range(12):
        plan.initialize_(model, seed=seed)
        signs.append(float(here["head.bias"].detach()))
    assert [abs(s) for s in signs] == pytest.approx([size] * 12) and min(signs) < 0 < max(signs)


def test_a_state_space_keeps_its_own_structure() -> None:
    build = stock.factory(stock.configuration("mamba"))
    model: Any = build(128, 2)
    before = model.backbone.layers[0].mixer.A_log.detach().clone()
    plan = mup.plan(model, base=build(64, 2), optimizer="adamw")
    plan.initialize_(model, seed=3)
    assert torch.equal(model.backbone.layers[0].mixer.A_log, before)
    assert torch.equal(before[0], torch.log(torch.arange(1, 17.0)))


def seven_billion(layers: int = 32, width: int = 4096) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11008 * width // 4096,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_seven_billion_parameters_without_weights_are_planned_in_little_memory() -> None:
    model, base = seven_billion(), seven_billion(4, 512)
    assert sum(p.numel() for p in model.parameters()) > 6.7e9
    tracemalloc.start()
    try:
        plan = mup.plan(model, base=base, optimizer="muon_kimi")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20  # names and numbers of 291 tensors; the weights are 27 GB
    assert (plan.r_n, plan.r_L, len(plan.entries)) == (8.0, 8.0, 291)
    assert {e.role for e in plan} == {"input", "hidden", "hidden_bias", "input_bias", "output"}
    with pytest.raises(ValueError, match="make it with a base= that has weights"):
        plan.initialize_(model, seed=0)


def test_rounded_feed_forward_widths_have_the_rates_of_their_own_shape() -> None:
    """1376/512 and 2752/1024 are 2.6875, 2816/1024 is rounded up to a multiple of 256."""
    config: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

    def llama(width: int, inner: int, keys: int = 4) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_key_value_heads": keys}
        return LlamaForCausalLM(LlamaConfig(**{**config, **sizes, "head_dim": width // 4}))

    exact = mup.plan(llama(128, 344), base=llama(64, 172), optimizer="adamw")
    rounded = mup.plan(llama(128, 352), base=llama(64, 172), optimizer="adamw")
    for a, b in zip(exact, rounded, strict=True):
        if "down_proj" in a.name:
            # AdamW's η and σ² are 1/n_in
            assert b.lr == pytest.approx(172 / 352, rel=1e-3) and a.lr == 0.5
            assert b.std**2 == pytest.approx(172 / 352, rel=1e-3)
        else:
            assert b.lr == pytest.approx(a.lr, rel=1e-9) and b.std == pytest.approx(a.std, rel=1e-9)
    with pytest.raises(ValueError, match=r"do not grow alike: .* by 2 and 'the rest' by 1"):
        mup.plan(llama(64, 344), base=llama(64, 172), optimizer="adamw")


# --- Faults that are planted ----------------------------------------------------------------------


def test_the_unscaled_plan_multiplies_by_nothing() -> None:
    model = Residual(32, 8)
    made = unscaled(mup.plan(model, base=Residual(16, 2), optimizer="adamw"))
    x = torch.randn(3, 5)
    before = model(x)
    assert made.attach(model) == [] and torch.equal(model(x), before)
    assert {(e.multiplier, e.std, e.lr, e.weight_decay, e.eps) for e in made} == {(1, 1, 1, 1, 1)}


class Stored(nn.Module):
    """A block with matrices (n_in, n_out), as GPT-2 has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.branch_end = Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch_end(torch.relu(self.up(h)))


class Backwards(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.read = Conv1D(width, 5)
        self.blocks = nn.ModuleList(Stored(width) for _ in range(depth))
        self.head = Conv1D(3, width)


@pytest.mark.parametrize("make", [Backwards, gpt2])
def test_standard_parametrization_has_one_over_fan_in(make: Any) -> None:
    model = make(32, 2)
    made = _standard(mup.plan(model, base=make(16, 2), optimizer="adamw"))
    made.initialize_(model, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and name not in ("read", "head"):
            # a matrix that maps unit vectors to unit size: Σ over its inputs of the variance is 1
            fan_in = module.weight.shape[0]
            assert float(module.weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.1)
            assert made[f"{name}.weight"].fan_in == fan_in


def test_sides_of_a_matrix_stored_backwards_are_not_mixed_up() -> None:
    plan = mup.plan(Backwards(32, 4), base=Backwards(16, 2), optimizer="adamw")
    roles = {e.name: e.role for e in plan if e.name.endswith("weight")}
    assert roles["read.weight"] == "input" and roles["head.weight"] == "output"
    assert {role for name, role in roles.items() if "blocks" in name} == {"hidden"}
    assert [m.module for m in plan.multipliers if m.side == "input"] == ["head"]
    # one width only: the position says it
    alone = mup.plan(Backwards(32, 4), r_n=2, optimizer="adamw")
    assert {e.name: e.role for e in alone if e.name.endswith("weight")} == roles


def test_every_block_has_its_own_partner() -> None:
    """Blocks of the base may start from different values: block i is that of i modulo its depth."""
    base, model = Residual(16, 2), Residual(32, 4)
    with torch.no_grad():
        for i, block in enumerate(base.blocks):
            block.first.weight.normal_(0.0, 0.1 * (i + 1))
    plan = mup.plan(model, base=base, optimizer="adamw")
    plan.initialize_(model, seed=0)
    for i, block in enumerate(model.blocks):
        wanted = 0.1 * (i % 2 + 1) * 2**-0.5
        assert float(block.first.weight.detach().std()) == pytest.approx(wanted, rel=0.15)


def test_lion_is_lion() -> None:
    """Its step is η sign(β₁ m + (1 − β₁) g): at the second step the old gradient still decides."""
    net = Residual(16, 2)
    made = mup.plan(net, base=net, optimizer="lion")
    optimizer = made.make_optimizer(net, lr=0.01)
    p = net.head.weight
    first, second = torch.ones_like(p), -0.05 * torch.ones_like(p)
    start = p.detach().clone()
    for gradient in (first, second):
        for other in net.parameters():
            other.grad = torch.zeros_like(other)
        p.grad = gradient.clone()
        optimizer.step()
    # m₁ = (1 − β₂) g₁ = .01, c₂ = .9 · .01 − .1 · .05 = .004 > 0: both steps go down by η
    torch.testing.assert_close(p.detach(), start - 0.02, rtol=0, atol=1e-6)
    scaled = replace(made.entries[0], **numbers(made.entries[0].rule, 2.0, 1.0))
    assert scaled.lr == 1.0  # the rule of a sign
