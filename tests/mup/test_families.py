"""Every family that a plan knows: complete by measurement, its fused matrices cut where they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd import mup
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup.families import FAMILIES, configuration
from grsd.mup.optimizers import pieces

PLANNED = [name for name, family in FAMILIES.items() if not family.refused]


@cache
def net(family: str, width: int, depth: int) -> nn.Module:
    return stock.factory(stock.configuration(family), positions=16)(width, depth)


@cache
def planned(family: str, optimizer: str = "muon_kimi") -> mup.Plan:
    return mup.plan(net(family, 64, 4), base=net(family, 32, 2), optimizer=optimizer)


def batch(family: str) -> Any:
    return stock.images(stock.configuration(family), 2) or help_text.next_byte(2, 16)


@pytest.mark.parametrize("family", PLANNED)
def test_what_branches_and_the_head_contribute_is_what_the_plan_says(family: str) -> None:
    plan = planned(family)
    model = net(family, 64, 4)
    found = plan.verify(model, batch(family), base=net(family, 32, 2))
    assert found.complete, f"{family}\n{found}"
    adds = [r for r in found.rows if r.what == "adds"]
    blocks = [r for r in adds if r.place.rpartition(".")[2].isdigit()]
    assert len(blocks) == 4 and {r.wanted for r in blocks} == {0.5}
    assert plan.notes == () and configuration(model).model_type == family


@pytest.mark.parametrize("family", PLANNED)
def test_a_matrix_optimizer_takes_every_hidden_matrix(family: str) -> None:
    model = stock.factory(stock.configuration(family), positions=16)(64, 4)
    plan = planned(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = plan.make_optimizer(model, lr=0.01)
    batch(family)(model).backward()
    optimizer.step()
    for entry in plan:
        p = dict(model.named_parameters())[entry.name]
        if entry.role == "hidden" and p.grad is not None and bool(p.grad.any()):
            assert entry.optimizer == "muon_kimi" and not torch.equal(p, before[entry.name])


QKV = {
    "gpt2": "attn.c_attn.weight",
    "gpt_neox": "query_key_value.weight",
    "phi3": "qkv_proj.weight",
    "bloom": "query_key_value.weight",
    "falcon": "query_key_value.weight",
    "gpt_bigcode": "c_attn.weight",
}
GATES = {
    "phi3": "gate_up_proj.weight",
    "glm4": "gate_up_proj.weight",
    "mixtral": "experts.gate_up_proj",
    "qwen3_moe": "experts.gate_up_proj",
    "granitemoe": "experts.gate_up_proj",
    "llama4_text": "experts.gate_up_proj",
}


@pytest.mark.parametrize(
    ("family", "end"), [*QKV.items(), *GATES.items()], ids=lambda value: str(value)
)
def test_fused_matrices_are_cut_where_the_model_cuts_them(family: str, end: str) -> None:
    """Without queries or without keys all scores are 0; without gate or without up all is 0."""
    model, plan = stock.factory(stock.configuration(family), positions=16)(64, 1), planned(family)
    wide = mup.plan(model, r_n=2, optimizer="muon")
    (entry,) = (e for e in wide if e.name.endswith(end))
    assert entry.split == next(e.split for e in plan if e.name == entry.name)
    weight = dict(model.named_parameters())[entry.name]
    kept = weight.detach().clone()
    count = 3 if family in QKV and end == QKV[family] else 2
    cut = pieces(weight.detach(), entry.layout)
    every = len(cut) // count  # experts, each with its parts
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))

    def without(part: int) -> Tensor:
        with torch.no_grad():
            weight.copy_(kept)
            for expert in range(every):
                cut[expert * count + part].zero_()
            out: Tensor = model(ids).logits
        return out

    first, second, whole = without(0), without(1), model(ids).logits
    scale = float(first.abs().max())
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * scale)
    if count == 3:  # values are another part: without them there is no attention
        assert float((without(2) - first).abs().max()) > 1e-4 * scale
    with torch.no_grad():
        weight.copy_(kept)
    whole = model(ids).logits
    assert float((whole - first).detach().abs().max()) > 1e-5 * scale


def test_the_parts_of_multi_query_attention_are_not_thirds() -> None:
    split = {e.split for e in planned("gpt_bigcode") if e.name.endswith("c_attn.weight")}
    assert split == {(64, 16, 16)}
    # queries as the rule, 1/√r_n; one key head has the size 1/√r_n · √max(n, 16), and needs 1/r_n
    for entry in planned("gpt_bigcode"):
        if entry.name.endswith("c_attn.weight"):
            assert entry.lr == pytest.approx(2**-0.5)
            assert entry.rates == pytest.approx((1, 2**-0.5, 2**-0.5))


def test_an_unknown_family_is_planned_with_a_note_and_a_refused_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    monkeypatch.delitem(FAMILIES, "helium", raising=False)  # unknown also when it has a row
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("helium", **sizes, num_key_value_heads=2, head_dim=16)
    model = AutoModelForCausalLM.from_config(config)
    made = mup.plan(model, base=model, optimizer="adamw")
    assert "'helium' is no family of grsd.mup.families: measure with plan.verify" in made.table()
    small = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=32, num_layers=2, vocab_size=50)
    t5 = AutoModelForSeq2SeqLM.from_config(small)
    with pytest.raises(ValueError, match="no plan for the family 't5': it has two residual stacks"):
        mup.plan(t5, base=t5, optimizer="adamw")


def test_a_fused_matrix_that_is_not_known_as_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Persimmon's QKV is one matrix to Muon, unless its sizes are told; AdamW need not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.delitem(FAMILIES, "persimmon", raising=False)  # unknown also when it has a row
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("persimmon", **sizes))
    said = "'model.layers.*.self_attn.query_key_value.weight' may be several matrices in one"
    fused = {"*.query_key_value.weight": (16, 16, 16)}
    for optimizer, known, there in (("muon", None, 1), ("adamw", None, 0), ("muon", fused, 0)):
        made = mup.plan(model, base=model, optimizer=optimizer, fused=known)
        assert made.table().count(said) == there


def test_blocks_of_two_kinds_have_partners_of_their_own_kind() -> None:
    """ModernBERT's first block alone has no norm: block 2 of 4 stands beside block 1 of 2."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    def build(width: int, layers: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        sizes |= {
            "vocab_size": 50,
            "num_attention_heads": width // 16,
            "global_attn_every_n_layers": 1,
        }
        sizes |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0}
        made: nn.Module = AutoModelForMaskedLM.from_config(
            AutoConfig.for_model("modernbert", **sizes, sep_token_id=0)
        )
        return made

    model, base = build(64, 4), build(32, 2)
    ends = ["*.attn.Wo", "*.mlp.Wo"]
    plan = mup.plan(
        model, base=base, optimizer="adamw", branch_ends=ends, roles={"head.dense.weight": "hidden"}
    )
    names = {e.name for e in plan}
    assert "model.layers.0.attn_norm.weight" not in names
    assert plan["model.layers.2.attn_norm.weight"].role == "hidden_bias"
    assert plan.verify(model, torch.arange(8)[None], base=base).complete
