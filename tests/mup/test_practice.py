"""What practice adds to a plan: decay, ε, budgets, multipliers of one's own, attention of larger heads."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from grsd import mup
from grsd.lab.nets import stock
from grsd.mup import NO_DECAY, schedules
from grsd.mup.attention import head_dimension
from grsd.mup.planning import unscaled
from grsd.mup.schedules import Budget

from .test_planning import Residual, gpt2, llama

# --- Groups -------------------------------------------------------------------------------------------------


def by_name(model: nn.Module, plan: mup.Plan, **base: Any) -> dict[str, dict[str, Any]]:
    """Return parameter name → its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = plan.param_groups(model, **base)
    return {names[id(p)]: g for several in groups.values() for g in several for p in g["params"]}


def test_what_is_usually_without_decay_has_none_and_the_rest_as_before() -> None:
    model, base = gpt2(32, 4), gpt2(16, 2)
    plan = mup.plan(model, base=base, optimizer="muon_kimi")
    every, usual = (
        by_name(model, plan, lr=0.1, weight_decay=0.1, no_decay=kinds) for kinds in ((), NO_DECAY)
    )
    assert all(g["weight_decay"] > 0 for g in every.values())
    for name, group in usual.items():
        decays = name.endswith("weight") and not any(x in name for x in ("ln_", "wte", "wpe"))
        wanted = every[name]["weight_decay"] if decays else 0.0
        assert group["weight_decay"] == wanted, name
    assert {g["weight_decay"] > 0 for g in usual.values()} == {True, False}
    gains = by_name(model, plan, lr=0.1, weight_decay=0.1, no_decay=["gains"])
    assert {n for n, g in gains.items() if g["weight_decay"] == 0} == {
        n for n, _ in model.named_parameters() if "ln_" in n and n.endswith("weight")
    }
    with pytest.raises(ValueError, match="no_decay is 'norms'; expected one of gains, biases"):
        plan.param_groups(model, lr=0.1, no_decay=["norms"])


def test_the_second_optimizer_has_a_rate_of_its_own_that_schedules_keep() -> None:
    model, base = gpt2(32, 2), gpt2(16, 2)
    plan = mup.plan(model, base=base, optimizer="muon_kimi")
    plain, tenth = (by_name(model, plan, lr=0.02, other_ratio=r) for r in (1.0, 0.1))
    for name, group in tenth.items():
        ratio = 1.0 if plan[name].role == "hidden" else 0.1
        assert group["lr"] == pytest.approx(ratio * plain[name]["lr"], rel=1e-12)
    opt = plan.make_optimizer(model, lr=0.02, other_ratio=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.5)
    assert schedules.base_lr(opt) == pytest.approx(0.01)  # of the hidden matrices
    single = mup.plan(model, base=base, optimizer="adamw")  # where there is no second one
    assert by_name(model, single, lr=0.02, other_ratio=0.1) == by_name(model, single, lr=0.02)
    with pytest.raises(ValueError, match=r"other_ratio is 0; it must be positive"):
        plan.param_groups(model, lr=0.1, other_ratio=0)


@pytest.mark.parametrize("name", ["adamw", "muon_kimi", "sgd"])
def test_independent_decay_shrinks_every_weight_by_the_same_share(name: str) -> None:
    model, base = Residual(64, 8), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer=name, wd_rule="independent")
    for lr in (0.01, 0.3):
        opt = plan.make_optimizer(model, lr=lr, weight_decay=1e-3, other_ratio=0.5)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)  # nothing but decay moves the weights
        opt.step()
        for n, p in model.named_parameters():
            # float32 rounds a product by 6e-8
            torch.testing.assert_close(p.detach(), before[n] * (1 - 1e-3), rtol=2e-7, atol=0)
    paper = mup.plan(model, base=base, optimizer=name)
    groups = by_name(model, paper, lr=0.01, weight_decay=1e-3)
    assert {g["lr"] * g["weight_decay"] for g in groups.values()} != {1e-3}  # there λ is times η


def test_decay_under_sophia_is_that_of_the_rule() -> None:
    """Its step has the rate η/ρ, so that a decay of λ would be λ/ρ."""
    model, base = Residual(32, 2), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer="sophia")
    opt: Any = plan.make_optimizer(model, lr=0.01, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step(hessian=[torch.ones_like(p) for g in opt.param_groups for p in g["params"]])
    for n, p in model.named_parameters():
        share = 0.01 * plan[n].lr * 0.1 * plan[n].weight_decay
        torch.testing.assert_close(p.detach(), before[n] * (1 - share), rtol=2e-7, atol=0)


def test_the_stabilizer_follows_the_paper_or_the_public_code() -> None:
    """The code of CompleteP: today ε/m_N outside the stack and ε/(m_N m_L) inside, once that everywhere."""
    model, base = gpt2(64, 8), gpt2(16, 2)
    eps, width, depth = 1e-8, 4.0, 4.0
    today, once, never = (
        by_name(
            model, mup.plan(model, base=base, optimizer="adamw", eps_rule=rule), lr=0.1, eps=eps
        )
        for rule in ("paper", "completep", "unscaled")
    )
    for name in today:
        hidden = ".h." in name
        assert today[name]["eps"] == pytest.approx(eps / width / (depth if hidden else 1))
        assert once[name]["eps"] == pytest.approx(eps / width / depth)
        assert never[name]["eps"] == eps
    with pytest.raises(ValueError, match="eps_rule is 'none'; expected one of paper, completep"):
        mup.plan(model, base=base, optimizer="adamw", eps_rule="none")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:soap. the paper's rule")
def test_soaps_stabilizer_scales_like_the_gradients_largest_singular_value() -> None:
    """Against NumPy's singular values of the first gradients, of models that differ in one size."""

    def largest(width: int, depth: int) -> tuple[dict[str, float], dict[str, float]]:
        sizes: dict[str, list[float]] = {}
        base = Residual(64, 4)
        for seed in range(4):
            model = Residual(width, depth)
            plan = mup.plan(model, base=base, optimizer="soap")
            plan.initialize_(model, seed=seed)
            plan.attach(model)
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
            model(x)[:, 0].mean().backward()
            for p, e in plan.matched(model):
                if p.ndim == 2 and p.grad is not None:
                    top = np.linalg.svd(p.grad.numpy(), compute_uv=False)[0]
                    sizes.setdefault(e.role, []).append(float(np.log(top)))
        # matrices outside the stack are AdamW's in a plan, with an ε of their own
        groups = plan.param_groups(model, lr=0.1, eps={"soap": 1e-3})
        assert {g["eps"] for g in groups["soap"]} == {1e-3 / plan.r_L}
        assert not any("eps" in g for g in groups["adamw"])
        means = {role: float(np.exp(np.mean(logs))) for role, logs in sizes.items()}
        rules = {role: mup.rules.rule("soap", role).eps for role in means}
        depths = {"input": 1.0, "hidden": plan.r_L, "output": 1.0}
        return means, {role: s.at(plan.r_n, depths[role]) for role, s in rules.items() if s}

    start, ones = largest(64, 4)
    assert set(ones.values()) == {1.0}
    for size in ((1024, 4), (64, 64)):
        found, eps = largest(*size)
        for role in ("input", "hidden", "output"):
            # the exponent of a ratio of 16; finite widths leave about a tenth
            miss = math.log(found[role] / start[role] / eps[role]) / math.log(16)
            assert abs(miss) < 0.12, (size, role, miss)
    table = mup.plan(Residual(64, 64), base=Residual(64, 4), optimizer="soap").table()
    (line,) = (row for row in table.splitlines() if row.startswith("stabilizer"))
    assert line.count("0.0625") == 2  # SOAP's matrices, and AdamW's biases in the stack


# --- Another batch, another number of tokens ----------------------------------------------------------------


def test_the_linear_rule_keeps_the_diffusion_of_sgd() -> None:
    """SGD on h w²/2 with noise of variance 1/B: mean and variance after n samples, in closed form."""

    def moments(lr: float, batch: float, samples: int, h: float = 1.0) -> tuple[float, float]:
        a, steps = 1 - lr * h, samples / batch
        return a**steps, lr**2 / batch * (1 - a ** (2 * steps)) / (1 - a**2)

    base = moments(1e-3, 1.0, 2048)
    budget = Budget.of("sgd", batch=8)
    moved = moments(1e-3 * budget.lr, 8.0, 2048)
    # both differ from the limit η → 0 by ηh times a number of order one: here 8e-3 · ln
    assert moved == pytest.approx(base, rel=3e-2)
    wrong = moments(1e-3 * math.sqrt(8), 8.0, 2048)
    assert abs(wrong[0] / base[0] - 1) > 0.5


@pytest.mark.parametrize("batch", [4.0, 16.0])
def test_the_root_rule_keeps_drift_and_diffusion_of_signs(batch: float) -> None:
    """E sign(μ + σz/√B) = 2Φ(μ√B/σ) − 1: per sample, drift and variance must not know B."""

    def per_sample(lr: float, size: float, mu: float = 1e-3) -> tuple[float, float]:
        drift = 2 * norm.cdf(mu * math.sqrt(size)) - 1
        return lr * drift / size, lr**2 * (1 - drift**2) / size

    base = per_sample(0.1, 1.0)
    moved = per_sample(0.1 * Budget.of("lion", batch=batch).lr, batch)
    # the next order of Φ is (μ√B)²/6, below 3e-6, and that of the variance (μ√B)²
    assert moved == pytest.approx(base, rel=5e-5)
    linear = per_sample(0.1 * Budget.of("sgd", batch=batch).lr, batch)
    assert linear[1] > 2 * base[1]


def test_the_root_rule_holds_for_orthogonal_updates_in_noise() -> None:
    """⟨M, polar(M + Z/√B)⟩ is linear in √B where noise rules: the drift of Muon per sample."""
    draws = 400
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(draws, 6, 4, generator=generator, dtype=torch.float64)
    M = 0.02 * torch.eye(6, 4, dtype=torch.float64)

    def drift(size: float) -> Tensor:
        # with antithetic noise the mean at M = 0 is 0 exactly
        both = [mup.optimizers.polar(M + s * Z / math.sqrt(size)) for s in (1.0, -1.0)]
        return (M * (both[0] + both[1])).sum((-2, -1)) / 2

    budget = Budget.of("muon", batch=4)
    gap = (drift(4.0) * budget.lr / 4 - drift(1.0)) / float(drift(1.0).mean())
    error = float(gap.std()) / math.sqrt(draws)
    assert abs(float(gap.mean())) < 4 * error + 0.01  # second order: (.02 · 2)² · some
    wrong = (drift(4.0) * Budget.of("sgd", batch=4).lr / 4 - drift(1.0)) / float(drift(1.0).mean())
    assert float(wrong.mean()) > 0.8  # the linear rule doubles it


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize(("batch", "horizon"), [(4.0, 1.0), (1.0, 8.0), (4.0, 8.0)])
def test_weights_average_over_the_same_share_of_the_run(
    name: str, batch: float, horizon: float
) -> None:
    """What is left of the first update after the run, (1 − ηλ)^T, does not change."""
    lr, decay, steps = 1e-3, 0.1, 20_000
    budget = Budget.of(name, batch, horizon)
    left = (1 - lr * decay) ** steps
    moved = (1 - lr * budget.lr * decay * budget.weight_decay) ** (steps * horizon / batch)
    # log(1 − x) = −x − x²/2: T (ηλ)²/2 times the change of ηλ, at most 4
    assert moved == pytest.approx(left, rel=4 * steps * (lr * decay) ** 2)
    assert budget.decay == pytest.approx(budget.lr * budget.weight_decay)
    if budget.weight_decay != 1:  # SGD's linear rule leaves λ as it is
        assert abs((1 - lr * budget.lr * decay) ** (steps * horizon / batch) / left - 1) > 0.2


def test_a_plan_takes_the_budget_and_averages_reach_as_far_back() -> None:
    model, base = Residual(32, 4), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer="muon_kimi")
    plain, moved = (
        by_name(model, plan, lr=0.01, weight_decay=0.1, eps=1e-8, batch=b, horizon=h)
        for b, h in ((1.0, 1.0), (4.0, 2.0))
    )
    for name, group in moved.items():
        assert group["lr"] == pytest.approx(2 * plain[name]["lr"])
        assert group["weight_decay"] == pytest.approx(plain[name]["weight_decay"])  # 4/2/2
        if plan[name].optimizer == "adamw":
            assert group["eps"] == pytest.approx(plain[name]["eps"] / 2)
    budget = Budget.of("adamw", batch=4)
    # the mean age of samples in the average, B/(1 − β)
    assert 4 / (1 - budget.beta(0.95)) == pytest.approx(1 / (1 - 0.95))
    with pytest.raises(ValueError, match=r"β = 0\.5 at 4 times the batch would be -1: the average"):
        budget.beta(0.5)
    with pytest.raises(ValueError, match=r"batch is -1\.0; it must be positive"):
        plan.param_groups(model, lr=0.1, batch=-1.0)


# --- Multipliers of one's own -------------------------------------------------------------------------------


def test_factors_on_embeddings_branches_and_head_act_and_are_verified() -> None:
    build = stock.factory(stock.configuration("llama"), positions=16)
    model, base = build(64, 4), build(32, 2)
    own = {"input": 3.0, "hidden": 0.5, "output": 2.0}
    plan = mup.plan(model, base=base, optimizer="adamw", multipliers=own)
    tokens = torch.arange(12)[None] % 7
    found = plan.verify(model, tokens, base=base)
    assert found.complete, str(found)
    assert {r.wanted for r in found.rows} == {0.25, 1.0, 3.0} | {0.25}
    plain = mup.plan(model, base=base, optimizer="adamw")
    assert plan["lm_head.weight"].multiplier == 2 * plain["lm_head.weight"].multiplier
    assert "= 0.25" in plan.table() and plan.table() != plain.table()
    # an embedding whose factor is lost is found
    kept = tuple(m for m in plan.multipliers if "embed" not in m.module)
    wrong = replace(plan, multipliers=kept).verify(model, tokens, base=base).wrong
    assert [r.what for r in wrong] == ["reads"] and wrong[0].wanted == 3.0
    with pytest.raises(ValueError, match="place of multipliers is 'embed'; expected one of input"):
        mup.plan(model, base=base, optimizer="adamw", multipliers={"embed": 1.0})
    assert unscaled(plan).multipliers == ()


# --- Attention ----------------------------------------------------------------------------------------------


class Head(nn.Module):
    """nanoGPT's attention: fused, its scores divided by the root of the head's dimension."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for y in self.c_attn(x).split(self.n_embd, -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class Inner(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.attn = Head(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attn(x)
        return out


class NanoGPT(nn.Module):
    """The names and fields of nanoGPT, whose configuration has no model_type."""

    def __init__(self, width: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_embd=width, n_head=heads)
        self.wte = nn.Embedding(11, width)
        self.h = nn.ModuleList(Inner(self.config) for _ in range(depth))
        self.lm_head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        out: Tensor = self.lm_head(x)
        return out


TOKENS = torch.arange(12).reshape(2, 6) % 7


def attached(model: nn.Module, plan: mup.Plan) -> Tensor:
    """Return the logits of a plan; the model is left as it was."""
    handles = plan.attach(model)
    out = model(TOKENS)
    for handle in handles:
        handle.remove()
    result: Tensor = (out if isinstance(out, Tensor) else out.logits).detach()
    return result


def test_nanogpts_heads_are_seen_and_their_scores_divided_by_the_dimension() -> None:
    torch.manual_seed(0)
    model, base = NanoGPT(32, 2).double(), NanoGPT(16, 2).double()
    assert (head_dimension(model), head_dimension(base)) == (16, 8)
    plan = mup.plan(model, base=base, optimizer="adamw")
    assert "The head dimension goes from 8 to 16" in plan.table()
    # the same by hand: queries times √(8/16)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if ".c_attn." in name:
                p[:32] *= math.sqrt(0.5)
    fixed = mup.plan(twin, base=NanoGPT(16, 1).double(), optimizer="adamw")  # of one head dimension
    assert fixed.attention == () and fixed.notes == ()
    torch.testing.assert_close(attached(model, plan), attached(twin, fixed), rtol=1e-12, atol=1e-14)
    plain = model(TOKENS)
    assert torch.equal(model(TOKENS), plain)  # everything was taken off again
    assert float((attached(model, plan) - attached(model, fixed)).abs().max()) > 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom", "falcon", "gptj", "gpt_neo"])
def test_larger_heads_multiply_queries_once(family: str) -> None:
    """Applied to scores or to queries: the same logits as queries that are multiplied by hand."""
    config = stock.configuration(family)
    model, half = stock.factory(config, positions=16)(64, 2).double(), copy.deepcopy(config)
    # a base of half the width, with as many heads of half the dimension
    heads = next(n for n in ("num_attention_heads", "num_heads") if hasattr(config, n))
    setattr(half, heads, 2 * getattr(config, heads))
    for name, value in (("head_dim", 8), ("num_key_value_heads", 8)):
        if hasattr(half, name) and not isinstance(getattr(type(half), name, None), property):
            setattr(half, name, value)
    smaller = stock.factory(half, positions=16)(32, 2).double()
    assert (head_dimension(model), head_dimension(smaller)) == (16, 8)
    plan = mup.plan(model, base=smaller, optimizer="adamw")
    same = replace(plan, attention=())
    assert len(plan.attention) == 2
    # queries by hand: what the softmax sees is then half or 1/√2 of it
    factor = 0.5 if family == "gpt_neo" else math.sqrt(0.5)
    seen: list[Tensor] = []
    for made in (plan, same):
        twin = copy.deepcopy(model)
        if made is same:
            with torch.no_grad():
                multiply_queries(twin, family, factor)
        seen.append(attached(twin, made))
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)
    assert float((seen[0] - attached(model, same)).abs().max()) > 1e-9


def multiply_queries(model: nn.Module, family: str, factor: float) -> None:
    """Multiply weights and biases that make queries, or the gain of the norm behind them."""
    for name, p in model.named_parameters():
        if family == "qwen3":
            if ".q_norm." in name:
                p *= factor
        elif ".q_proj." in name:
            p *= factor
        elif ".c_attn." in name:
            p[..., : p.shape[-1] // 3] *= factor
        elif ".query_key_value." in name:
            # by head: queries, key, value; Falcon's of the stock size share one key head
            parts = 6 if family == "falcon" else 3
            size = p.shape[0] if family == "falcon" else 48
            rows = p.view(-1, size, *p.shape[1:])
            rows[:, : (size // parts) * (parts - 2)] *= factor


def test_gemmas_fixed_scale_is_seen() -> None:
    """Its scores are multiplied by a number of the configuration, whatever the head's dimension."""

    def build(dimension: int) -> nn.Module:
        config = Gemma2Config(
            vocab_size=17,
            hidden_size=2 * dimension,
            intermediate_size=4 * dimension,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=dimension,
            query_pre_attn_scalar=16,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config)

    plan = mup.plan(build(16), base=build(8), optimizer="adamw")
    # 1/d where the scale does not have a 1/√d
    assert {one.factor for one in plan.attention} == {0.5}


def test_heads_that_are_not_recognised_are_named_in_a_note() -> None:
    class Odd(Residual):
        def __init__(self, width: int, depth: int, heads: int = 2) -> None:
            super().__init__(width, depth)
            self.config = SimpleNamespace(n_embd=width, n_head=heads)

    plan = mup.plan(Odd(32, 2), base=Odd(16, 2), optimizer="adamw")
    assert plan.attention == () and "The plan does not do it" in plan.notes[0].replace("the", "The")
    assert "√8/16 instead of 1/√16" in plan.notes[0]
    assert mup.plan(Odd(32, 2, 4), base=Odd(16, 2), optimizer="adamw").notes == ()
    scores = mup.plan(
        llama(32, 2), base=llama(16, 2), optimizer="adamw", multipliers={"attention": 2.0}
    )
    assert {one.factor for one in scores.attention} == {2.0}
