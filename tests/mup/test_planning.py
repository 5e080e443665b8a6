"""Plans of stock models: roles by hand, hooks against folding, refusals."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from grsd import mup
from grsd.lab.nets import models
from grsd.mup import Plan


def gpt2(hidden: int, layers: int, **more: Any) -> nn.Module:
    return models.gpt2(seed=0, hidden=hidden, layers=layers, heads=hidden // 8, **more)


def neox(hidden: int, layers: int) -> nn.Module:
    return models.gpt_neox(seed=0, hidden=hidden, layers=layers, heads=hidden // 8)


def llama(hidden: int, layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 8,
        num_key_value_heads=hidden // 8,
    )
    return LlamaForCausalLM(config)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.branch_end = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.branch_end(torch.relu(self.first(h)))


class Residual(nn.Module):
    """The paper's network, equation (2), with biases."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.read = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.read(x)
        for block in self.blocks:
            h = block(h)
        out: torch.Tensor = self.head(h)
        return out


def roles(plan: Plan, *parts: str) -> set[str]:
    return {e.role for e in plan if any(part in e.name for part in parts)}


def test_gpt2_has_the_roles_that_one_would_give_by_hand() -> None:
    plan = mup.plan(gpt2(32, 4), base=gpt2(16, 2), optimizer="muon_kimi")
    assert (plan.r_n, plan.r_L) == (2.0, 2.0)
    assert roles(plan, "wte", "wpe") == {"input"}
    assert roles(plan, "c_attn.weight", "c_proj.weight", "c_fc.weight") == {"hidden"}
    assert roles(plan, "ln_1", "ln_2", "c_attn.bias", "c_proj.bias", "c_fc.bias") == {"hidden_bias"}
    assert roles(plan, "ln_f") == {"input_bias"}
    assert plan.tied == (("transformer.wte.weight", "lm_head.weight"),)
    assert {e.optimizer for e in plan if e.role == "hidden"} == {"muon_kimi"}
    assert {e.optimizer for e in plan if e.role != "hidden"} == {"adamw"}
    ends = {m.module for m in plan.multipliers if m.side == "output"}
    assert ends == {
        f"transformer.h.{i}.{part}.c_proj" for i in range(4) for part in ("attn", "mlp")
    }
    assert [m for m in plan.multipliers if m.side == "input"] == [("lm_head", 0.5, "input")]


@pytest.mark.parametrize("make", [neox, llama])
def test_other_families_classify(make: Any) -> None:
    plan = mup.plan(make(32, 6), base=make(16, 2), optimizer="adamw")
    assert roles(plan, "embed") == (
        {"input", "output"} if "embed_out.weight" in {e.name for e in plan} else {"input"}
    )
    assert roles(plan, "lm_head", "embed_out") == {"output"}
    assert sum(m.side == "output" for m in plan.multipliers) == 12 and plan.r_L == 3.0
    assert {m.factor for m in plan.multipliers if m.side == "output"} == {1 / 3}


def test_equal_sizes_change_nothing() -> None:
    plan = mup.plan(Residual(16, 2), base=Residual(16, 2), optimizer="sgd")
    assert {(e.multiplier, e.std, e.lr, e.weight_decay) for e in plan} == {(1.0, 1.0, 1.0, 1.0)}
    assert {m.factor for m in plan.multipliers} == {1.0}


def test_deeper_at_one_width_has_the_same_roles_as_wider() -> None:
    wider = {
        e.name: e.role for e in mup.plan(Residual(32, 4), base=Residual(16, 4), optimizer="sgd")
    }
    deeper = {
        e.name: e.role for e in mup.plan(Residual(16, 4), base=Residual(16, 2), optimizer="sgd")
    }
    assert (
        wider == deeper
        and wider["head.bias"] == "output_bias"
        and wider["read.bias"] == "input_bias"
    )


def trained(model: nn.Module, plan: Plan, x: torch.Tensor, steps: int = 4) -> torch.Tensor:
    opt = plan.make_optimizer(model, lr=0.02, weight_decay=0.1, eps=1e-3)
    for _ in range(steps):
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()
    out: torch.Tensor = model(x).detach()
    return out


@pytest.mark.parametrize("name", ["adamw", "sgd", "shampoo"])
def test_folding_trains_like_hooks(name: str) -> None:
    torch.manual_seed(0)
    hooked = Residual(32, 6).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    plan = mup.plan(hooked, base=Residual(16, 2), optimizer=name)
    folded = copy.deepcopy(hooked)
    plan.attach(hooked)
    other = plan.fold_(folded)
    before = hooked(x).detach()
    torch.testing.assert_close(folded(x).detach(), before, rtol=1e-13, atol=1e-14)
    a, b = trained(hooked, plan, x), trained(folded, other, x)
    assert float((a - before).abs().max()) > 1e-3  # it moved
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # rounding of four steps
    # what folding must not forget: with the rates of the hooked model it is another training
    torch.manual_seed(0)
    fresh = Residual(32, 6).double()
    plan.fold_(fresh)
    assert float((trained(fresh, plan, x) - a).abs().max()) > 1e-6


def test_folding_a_tied_head_is_refused_and_hooks_are_not() -> None:
    model = gpt2(32, 2)
    plan = mup.plan(model, base=gpt2(16, 2), optimizer="adamw")
    with pytest.raises(ValueError, match=r"'lm_head.weight' shares its tensor"):
        plan.fold_(model)
    tokens = torch.arange(6)[None]
    before = model(tokens).logits
    handles = plan.attach(model)
    torch.testing.assert_close(
        model(tokens).logits, before / 2
    )  # r_L = 1: the head alone is scaled
    with pytest.raises(ValueError, match="already carries a multiplier"):
        plan.attach(model)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(tokens).logits, before)


def test_initialization_follows_the_base() -> None:
    base, model = gpt2(16, 2), gpt2(64, 2)
    plan = mup.plan(model, base=base, optimizer="adamw")
    plan.initialize_(model, seed=1)
    found, wanted = ({n: p.detach() for n, p in m.named_parameters()} for m in (model, base))
    name = "transformer.h.1.mlp.c_fc.weight"
    # the standard error of a standard deviation from N values is 1/√(2N): 0.7 % for the base's 1024
    assert float(found[name].std() / wanted[name].std()) == pytest.approx(0.5, rel=0.05)
    assert float(
        found["transformer.wte.weight"].std() / wanted["transformer.wte.weight"].std()
    ) == pytest.approx(1, rel=0.1)
    assert torch.equal(found["transformer.ln_f.weight"], torch.ones(64, dtype=torch.float64))
    assert not found["transformer.h.0.mlp.c_fc.bias"].any()
    again = gpt2(64, 2)
    plan.initialize_(again, seed=1)
    assert torch.equal(dict(again.named_parameters())[name], found[name])


def test_the_plan_sees_through_wrappers_and_lives_outside_the_state() -> None:
    model, base = Residual(32, 4), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer="sgd")
    keys = list(model.state_dict())
    plan.attach(model)
    assert list(model.state_dict()) == keys
    for wrapper in (nn.DataParallel(model), torch.compile(model)):
        wrapped = mup.plan(wrapper, base=base, optimizer="sgd")  # type: ignore[arg-type]
        assert wrapped == plan
        assert plan.param_groups(wrapper, lr=0.1)  # type: ignore[arg-type]
    copied = copy.deepcopy(model)
    x = torch.randn(3, 5)
    assert torch.equal(copied(x), model(x)) and not torch.equal(Residual(32, 4)(x), model(x))


def test_groups_carry_the_rates() -> None:
    model = Residual(64, 8)
    plan = mup.plan(model, base=Residual(16, 2), optimizer="adamw")
    groups = {
        g["role"]: g for g in plan.param_groups(model, lr=0.01, weight_decay=0.1, eps=1e-8)["adamw"]
    }
    assert groups["hidden"]["lr"] == 0.01 / 4 and groups["hidden"]["weight_decay"] == 0.4
    assert groups["hidden"]["eps"] == 1e-8 / 16 and groups["input"]["lr"] == 0.01
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    plain = mup.plan(model, base=Residual(16, 2), optimizer="adamw", wd_rule="unscaled")
    assert {
        g["weight_decay"] for g in plain.param_groups(model, lr=0.01, weight_decay=0.1)["adamw"]
    } == {0.1}


def test_the_table_shows_rules_and_numbers() -> None:
    text = mup.plan(Residual(64, 8), base=Residual(16, 2), optimizer="muon_kimi").table()
    rows = {
        line[:19].strip(): re.split(r"\s{2,}", line[19:].strip()) for line in text.splitlines()[1:]
    }
    assert text.startswith("width ratio r_n = 4, depth ratio r_L = 4, k ≥ 2")
    assert rows[""][:3] == ["input weights", "hidden weights", "output weights"]
    assert rows["optimizer"][:3] == ["adamw", "muon_kimi", "adamw"] and rows["tensors"][1] == "16"
    assert rows["block multiplier α"][:3] == ["1", "1/r_L = 0.25", "1/r_n = 0.25"]
    assert (
        rows["initial variance σ²"][1] == "1/r_n = 0.25"
        and rows["learning rate η"][1] == "1/√r_n = 0.5"
    )
    assert rows["weight decay λ"][1] == "√r_n = 2" and rows["stabilizer ε"][1:3] == [
        "–",
        "1/r_n = 0.25",
    ]
    note = mup.plan(
        gpt2(32, 2), base=models.gpt2(seed=0, hidden=16, layers=2, heads=4), optimizer="adamw"
    ).table()
    assert "The head dimension goes from 4 to 8" in note and "head dimension" not in text


def test_the_table_shows_the_multiplier_of_a_tied_head() -> None:
    text = mup.plan(gpt2(32, 4), base=gpt2(16, 2), optimizer="adamw").table()
    columns = [re.split(r"\s{2,}", line) for line in text.splitlines()[1:]]
    assert columns[0][-1] == "output, tied" and columns[1][-1] == "(as input)"
    assert columns[3][0] == "block multiplier α" and columns[3][-1] == "1/r_n = 0.5"
    untied = gpt2(32, 4, tie=False)
    base = gpt2(16, 2, tie=False)
    assert "tied" not in mup.plan(untied, base=base, optimizer="adamw").table()


class InSequence(Residual):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.blocks = nn.Sequential(*self.blocks)  # type: ignore[assignment]


def test_blocks_in_a_sequential_are_a_stack_and_layers_in_one_are_not() -> None:
    model, base = InSequence(32, 6), InSequence(16, 2)
    made = mup.plan(model, base=base, optimizer="adamw")
    wanted = mup.plan(Residual(32, 6), base=Residual(16, 2), optimizer="adamw")
    assert made.r_L == 3.0 and made.multipliers == wanted.multipliers
    assert [(e.name, e.role, e.lr) for e in made] == [(e.name, e.role, e.lr) for e in wanted]
    assert made.verify(model, torch.randn(4, 5)).complete
    layers = nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="put the blocks into one"):
        mup.plan(layers, base=layers, optimizer="adamw")


def test_nets_without_a_stack_are_planned_at_the_bases_depth() -> None:
    """An MLP and convolutions as microsoft/mup writes them; by hand, AdamW's 1/n_in and the head's 1/n."""

    def net(n: int) -> nn.Module:
        return nn.Sequential(
            *(
                nn.Conv2d(3, n, 3),
                nn.BatchNorm2d(n),
                nn.ReLU(),
                nn.Conv2d(n, 2 * n, 3),
                nn.Flatten(),
            ),
            *(nn.Linear(2 * n * 4, 16 * n), nn.ReLU(), nn.Linear(16 * n, 3)),
        )

    made = mup.plan(net(8), base=net(2), optimizer="adamw")
    weights = {e.name: (e.role, e.lr, e.std**2) for e in made if len(e.shape) > 1}
    assert weights == {
        "0.weight": ("input", 1, 1),
        "3.weight": ("hidden", 0.25, pytest.approx(0.25)),
        "5.weight": ("hidden", 0.25, pytest.approx(0.25)),
        "7.weight": ("output", 1, 1),
    }
    assert [tuple(m) for m in made.multipliers] == [("7", 0.25, "input")]
    assert made.verify(net(8), torch.randn(4, 3, 6, 6)).complete
    with pytest.raises(ValueError, match=r"has no nn\.ModuleList"):
        mup.plan(net(8), r_n=4, optimizer="adamw")  # nothing says which sides grow
    # a stage of a ResNet is a list, and what stands before it has two sides that grow
    stages = [Staged(n, 2) for n in (8, 2)]
    same = mup.plan(stages[0], base=stages[1], optimizer="adamw")
    assert same["first.weight"].role == "hidden"
    with pytest.raises(ValueError, match="outside the stack 'stage' of which both sides grow"):
        mup.plan(Staged(8, 4), base=stages[1], optimizer="adamw")


class Staged(nn.Module):
    def __init__(self, n: int, blocks: int) -> None:
        super().__init__()
        self.read, self.first = nn.Linear(5, n), nn.Linear(n, n)
        self.stage = nn.Sequential(*(Residual(n, 1).blocks[0] for _ in range(blocks)))
        self.head = nn.Linear(n, 3)


class Lopsided(Residual):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.gate = nn.Linear(width, width)


def test_bad_input_is_refused() -> None:
    base = Residual(16, 2)
    with pytest.raises(
        ValueError,
        match=r"'gate.weight', a matrix outside the stack 'blocks' of which both sides grow",
    ):
        mup.plan(Lopsided(32, 4), base=Lopsided(16, 2), optimizer="adamw")
    # at the base's depth a stack asks for nothing, and both sides say it
    same = mup.plan(Lopsided(32, 2), base=Lopsided(16, 2), optimizer="adamw")
    assert (same["gate.weight"].role, same["gate.weight"].lr) == ("hidden", 0.5)
    named = mup.plan(
        Lopsided(32, 2),
        base=Lopsided(16, 2),
        optimizer="adamw",
        roles={"gate.*": "input_bias", "head.*": "output"},
    )
    assert named["gate.weight"].role == "input_bias"
    with pytest.raises(ValueError, match=r"roles\['gate.\*'\] is 'gate'"):
        mup.plan(Lopsided(32, 2), base=Lopsided(16, 2), optimizer="adamw", roles={"gate.*": "gate"})
    with pytest.raises(ValueError, match="another architecture"):
        mup.plan(Lopsided(32, 2), base=base, optimizer="adamw")
    with pytest.raises(ValueError, match="do not grow alike"):
        wide = Residual(32, 2)
        wide.head = nn.Linear(32, 9)
        mup.plan(wide, base=base, optimizer="adamw")
    with pytest.raises(ValueError, match="no rule for the optimizer 'adam'"):
        mup.plan(base, base=base, optimizer="adam")
    with pytest.raises(ValueError, match="other = 'muon' takes matrices only"):
        mup.plan(base, base=base, optimizer="muon", other="muon")
    with pytest.raises(ValueError, match=r"has no nn.ModuleList"):
        mup.plan(nn.Linear(3, 3), base=nn.Linear(3, 3), optimizer="sgd")
    with pytest.raises(ValueError, match="no end of a residual branch"):
        mup.plan(Residual(32, 4), base=base, optimizer="sgd", branch_ends=["*.nothing"])
    with pytest.raises(ValueError, match=r"branch_ends has the pattern '\*.nothing'"):
        mup.plan(Residual(32, 2), base=base, optimizer="sgd", branch_ends=["*.nothing"])
    with pytest.raises(ValueError, match="wd_rule is 'none'; expected one of paper, unscaled"):
        mup.plan(base, base=base, optimizer="sgd", wd_rule="none")  # type: ignore[arg-type]
    plan = mup.plan(Residual(32, 2), base=base, optimizer="sgd")
    with pytest.raises(ValueError, match=r"has shape \(16, 5\); the plan was made for \(32, 5\)"):
        plan.param_groups(base, lr=0.1)
    with pytest.raises(ValueError, match="made for another model"):
        plan.attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr is 0; it must be positive and finite"):
        plan.param_groups(Residual(32, 2), lr=0)


def test_a_tensor_in_two_roles_with_two_rules_is_refused() -> None:
    model, base = gpt2(32, 2), gpt2(16, 2)
    mup.plan(model, base=base, optimizer="sgd")  # η of input and output agree: r_n
    with pytest.raises(
        ValueError,
        match=r"one tensor in the roles hidden_bias and output, whose rules differ under sgd",
    ):
        mup.plan(
            model,
            base=base,
            optimizer="sgd",
            roles={"transformer.wte.*": "hidden_bias", "*wpe*": "input"},
        )


class Attention(nn.Module):
    """A block as many write it: nn.MultiheadAttention and a Sequential, each added to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, h: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        y = self.norm(h)
        h = h + factor * self.attn(y, y, y, need_weights=False)[0]
        return h + factor * self.mlp(h)


class Plain(nn.Module):
    """Positions as a bare parameter, a scale that is one number."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = (
            nn.Embedding(11, width),
            nn.Parameter(0.1 * torch.randn(7, width)),
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: torch.Tensor, branch: float = 1.0, head: float = 1.0) -> torch.Tensor:
        h = self.tokens(ids) + self.places
        for block in self.blocks:
            h = block(h, branch)
        out: torch.Tensor = self.scale * self.head(head * h)
        return out


def test_a_bare_matrix_is_not_taken_for_an_output_layer() -> None:
    """Its owner would be the model itself, whose input is token ids."""
    given: dict[str, Any] = {
        "base": Plain(16, 2),
        "optimizer": "adamw",
        "branch_ends": ["*.attn", "*.mlp"],
    }
    with pytest.raises(ValueError, match=r"role of 'places'.*say roles=\{'places': 'input'\}"):
        mup.plan(Plain(32, 4), **given)
    with pytest.raises(
        ValueError, match=r"'places' stands in 'the model itself'.*an nn.Linear of its own"
    ):
        mup.plan(Plain(32, 4), roles={"places": "output"}, **given)
    made = mup.plan(Plain(32, 4), roles={"places": "input"}, **given)
    assert (made["places"].role, made["scale"].role) == ("input", "output_bias")
    assert [m.module for m in made.multipliers if m.side == "input"] == ["head"]


def test_multipliers_act_where_torch_attention_ends_a_branch() -> None:
    """MultiheadAttention reads out_proj's weight without calling it: a hook there never runs."""
    given: dict[str, Any] = {
        "base": Plain(16, 2),
        "optimizer": "muon_kimi",
        "roles": {"places": "input"},
    }
    with pytest.raises(
        ValueError, match=r"without being called.*name the attention itself, 'blocks.0.attn'"
    ):
        mup.plan(Plain(32, 4), branch_ends=["*.attn.out_proj", "*.mlp.2"], **given)
    model, ids = Plain(32, 4), torch.randint(0, 11, (3, 7))
    made = mup.plan(model, branch_ends=["*.attn", "*.mlp"], **given)
    made.initialize_(model, seed=0)
    by_hand = model(ids, branch=0.5, head=0.5)
    with pytest.raises(
        ValueError, match=r"'blocks.0.attn' is a MultiheadAttention and no linear layer"
    ):
        made.fold_(model)
    torch.testing.assert_close(
        model(ids, branch=0.5, head=0.5), by_hand
    )  # a refusal leaves the weights alone
    made.attach(model)
    torch.testing.assert_close(model(ids), by_hand)
    assert made["blocks.0.attn.in_proj_weight"].split == 3  # Muon sees Q, K and V apart


def test_patterns_that_match_nothing_are_refused() -> None:
    ends = ["*.attn", "*.mlp"]
    given: dict[str, Any] = {"base": Plain(16, 2), "optimizer": "adamw"}
    slips: list[tuple[dict[str, Any], str]] = [
        (
            {"branch_ends": ["*.attn", "*.mpl"], "roles": {"places": "input"}},
            r"branch_ends has the pattern '\*.mpl'",
        ),
        (
            {"branch_ends": ends, "roles": {"places": "input", "plcaes": "input"}},
            "roles has the pattern 'plcaes'",
        ),
        (
            {"branch_ends": ends, "roles": {"places": "input"}, "fused": {"*.qkv": 3}},
            r"fused has the pattern '\*.qkv'",
        ),
    ]
    for slip, words in slips:
        with pytest.raises(ValueError, match=words):
            mup.plan(Plain(32, 4), **given, **slip)


class Round(nn.Module):
    """ALBERT's way: one block that is passed again and again; `again` names it a second time."""

    def __init__(self, width: int, depth: int, again: bool = False, silent: bool = False) -> None:
        super().__init__()
        self.read = nn.Linear(3, width)
        block = nn.Sequential(nn.Tanh(), nn.Linear(width, width))
        self.silent = silent
        self.blocks = nn.ModuleList([block] * depth)
        if again:
            self.again = block[1]
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.read(x)
        for block in self.blocks:
            h = h + (block[1](block[0](h)) if self.silent else block(h))  # type: ignore[index]
        out: Tensor = self.head(h)
        return out


def test_a_module_under_two_names_is_planned_or_refused_by_a_sentence() -> None:
    how: Any = {"optimizer": "adamw", "branch_ends": ["*.1"]}
    net = Round(16, 4)
    made = mup.plan(net, base=Round(8, 2), **how)
    # one tensor in all blocks: one line of the plan, and one factor for every pass
    assert [e.name for e in made if e.role == "hidden"] == ["blocks.0.1.weight"]
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = net.read(x)
        for _ in range(4):
            h = h + 0.5 * net.blocks[0](h)  # 1/r_L
        expected = net.head(0.5 * h)  # 1/r_n
        handles = made.attach(net)
        torch.testing.assert_close(net(x), expected)
        for handle in handles:
            handle.remove()
    with pytest.raises(ValueError, match=r"'blocks.1' is a module that stands in the stack before"):
        made.verify(net, x)
    with pytest.raises(ValueError, match=r"cannot tell the role of 'again.weight'"):
        mup.plan(Round(16, 4, again=True), base=Round(8, 2, again=True), **how)

    def check(**more: bool) -> mup.CoordCheck:
        return mup.coord_check(
            lambda width, depth: Round(width, depth, **more),
            lambda model: model(x).square().mean(),
            widths=(8, 16, 32), depths=(), base=(8, 2), lr=2**-8, steps=1, seeds=(0,), **how
        )  # fmt: skip

    assert check().slopes["width"] is not None  # the last pass of the one block is watched
    with pytest.raises(ValueError, match=r"the block 'blocks.1' is never called"):
        check(silent=True)
