"""One architecture at many sizes: what scales, what stays, and a loss that another code path gives as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.spectrum.operator.ntk import refuse_dropout

BRANCHES = {  # attention's output and feedforward's input, in the first block; GPT-2 stores (in, out)
    "gpt2": ("transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
    ),
    "llama": ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight"),
}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def saved(folder: Path, **more: Any) -> Any:
    """A llama with grouped keys, narrow feedforward and dropout, written to a folder as a configuration alone."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 258,  # 2.6875, as in the published models of 4096
        "num_hidden_layers": 3,
        "vocab_size": 77,
        "attention_dropout": 0.25,
    }
    LlamaConfig(**{**sizes, **more}).save_pretrained(folder)
    return stock.configuration(str(folder))


@pytest.mark.parametrize("family", BRANCHES)
def test_a_family_scales_its_width_and_keeps_its_head(family: str) -> None:
    config = stock.configuration(family)
    build = stock.factory(config, vocabulary=50, positions=9)
    for width, depth in ((16, 1), (48, 3)):
        model: Any = build(width, depth)
        found = shapes(model)
        attention, feed = (found[name] for name in BRANCHES[family])
        assert attention == (width, width) and sorted(feed) == [width, 4 * width]
        assert model.config.num_attention_heads == width // 16
        assert model.get_input_embeddings().weight.shape == (50, width)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        blocks = {part for name in found for part in name.split(".") if part.isdigit()}
        assert blocks == {str(k) for k in range(depth)}
        assert model(torch.arange(9)[None]).logits.shape == (1, 9, 50)
    assert (
        config.hidden_size == 64 and config.num_hidden_layers == 2
    )  # what was given stays as it was


@pytest.mark.parametrize("family", [n for n, row in stock.FAMILIES.items() if not row.refused])
def test_every_family_grows_in_width_and_depth(family: str) -> None:
    config = stock.configuration(family)
    build = stock.factory(config, positions=9)
    counts = {}
    for width, depth in ((32, 2), (64, 2), (64, 4)):
        model = build(width, depth)
        inside = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and ".0." in name]
        counts[width, depth] = sum(p.numel() for _, p in inside)
        blocks = {part for name in shapes(model) for part in name.split(".") if part.isdigit()}
        assert {str(k) for k in range(depth)} <= blocks
        task = stock.images(config, 2) or help_text.next_byte(2, 9)
        loss = task(model).detach()
        assert loss.isfinite() and 0 < float(loss) < 12
    # a matrix of a block has four times the entries, key heads and routers of fixed number twice
    assert 2.5 < counts[64, 2] / counts[32, 2] <= 4 and counts[64, 4] == counts[64, 2]


def test_what_is_no_language_model_and_no_classifier_is_refused() -> None:
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="'t5' is neither a language model nor an image"):
        stock.factory(AutoConfig.for_model("t5"))
    with pytest.raises(ValueError, match="no plan for the family 't5': it has two residual"):
        stock.configuration("t5")


def test_ratios_of_a_saved_configuration_are_kept(tmp_path: Path) -> None:
    config = saved(tmp_path)
    build = stock.factory(config, positions=16)
    found = shapes(build(48, 2))
    layer = "model.layers.1."
    assert found[layer + "self_attn.q_proj.weight"] == (48, 48)
    assert found[layer + "self_attn.k_proj.weight"] == (
        16,
        48,
    )  # three query heads of dimension 8 to a key head
    assert found[layer + "mlp.up_proj.weight"] == (129, 48)  # half of 258
    model: Any = build(48, 2)
    assert (
        model.config.num_attention_heads,
        model.config.num_key_value_heads,
        model.config.head_dim,
    ) == (6, 2, 8)
    with pytest.raises(
        ValueError,
        match=r"width 40 and depth 2: .* multiple of 24 \(num_attention_heads = 12, num_key",
    ):
        build(40, 2)
    for sizes in ((0, 2), (-24, 2), (24, 0)):
        with pytest.raises(ValueError, match="sizes are positive"):
            build(*sizes)


@pytest.mark.parametrize(
    "more",
    [{}, {"head_dim": 16}, {"num_attention_heads": 6, "num_key_value_heads": 6}, {"head_dim": 4}],
    ids=["grouped", "heads wider than the model", "ungrouped", "heads narrower than the model"],
)
def test_at_its_own_size_a_configuration_is_itself(tmp_path: Path, more: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = saved(tmp_path, **more)
    mine = stock.factory(config, vocabulary=77)(config.hidden_size, config.num_hidden_layers)
    assert shapes(mine) == shapes(AutoModelForCausalLM.from_config(config))


def test_dropout_is_off_wherever_the_configuration_has_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for config in (stock.configuration("gpt2"), saved(tmp_path)):
        model = stock.factory(config)(config.hidden_size, 1).train()
        refuse_dropout(model)
        tokens = torch.arange(12)[None]
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        active = AutoModelForCausalLM.from_config(
            config
        ).train()  # the control: as configured it does drop
        assert not torch.equal(active(tokens).logits, active(tokens).logits)


def test_initial_weights_are_those_of_seed_zero_and_the_generator_is_left_alone() -> None:
    build = stock.factory(stock.configuration("gpt_neox"))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build(32, 2).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second = build(32, 2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_is_the_cross_entropy_of_the_next_byte() -> None:
    model: Any = stock.factory(stock.configuration("llama"), positions=20)(32, 2)
    loss = help_text.next_byte(3, 20, seed=4)
    inputs, targets = help_text.text().batch(4, 0, 3, 20)
    with torch.no_grad():
        value = float(loss(model))
        logits = model(inputs).logits.double().numpy()
        shifted = float(
            model(inputs, labels=inputs).loss
        )  # transformers' own: 19 of the 20 places of every row
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(logp, targets.numpy()[..., None], -1)[..., 0]
    assert value == pytest.approx(each.mean(), rel=1e-5)  # float32
    assert shifted == pytest.approx(each[:, :-1].mean(), rel=1e-5)
    with torch.no_grad():
        assert float(loss(model)) == value != float(help_text.next_byte(3, 20, seed=5)(model))
