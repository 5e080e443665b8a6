"""Families of transformers, one row each: what a plan knows of them by the names of their modules.

A row is found by the `model_type` of a model's configuration. `Plan.verify` measures whether it is
right; the chapter on using a plan shows the result for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

Split = int | tuple[int, ...]
"""A fused matrix along its outputs: equal parts, or sizes of parts that come again and again."""
Fused = Mapping[str, Split | Callable[[Any], tuple[int, ...]]]
"""Pattern of parameter names → how they are fused, or the same from the configuration."""


NONE: Mapping[str, Any] = MappingProxyType({})


class Family(NamedTuple):
    """What a plan knows of a family; all are patterns of names."""

    branch_ends: tuple[str, ...]  #: modules whose result, as it is, is added to the stream
    fused: Fused = NONE  #: matrices that hold several
    roles: Mapping[str, str] = NONE  #: roles that shapes do not tell
    transposed: tuple[str, ...] = ()  #: experts that are stored (experts, n_in, n_out)
    kept: tuple[str, ...] = ()  #: initial values that have a structure: the model's own stay
    refused: str = ""  #: why there is no plan, and what to do instead
    unscaled: bool = False  #: attention whose scores are not divided by √d


def _head(config: Any) -> int:
    """Return the dimension of a head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _by_head(config: Any) -> tuple[int, ...]:
    """Q, K, V of one head after another."""
    return (_head(config),) * 3


def _falcon(config: Any) -> tuple[int, ...]:
    """Queries, then key and value, for each key head; of each head with as many keys as queries."""
    if config.new_decoder_architecture:
        group = config.num_attention_heads // config.num_kv_heads
    else:
        group = config.num_attention_heads if config.multi_query else 1
    return (group * _head(config), _head(config), _head(config))


def _bigcode(config: Any) -> tuple[int, ...]:
    """All queries, then one key and one value; without multi-query by head."""
    queries = config.hidden_size if config.multi_query else _head(config)
    return (queries, _head(config), _head(config))


def _phi3(config: Any) -> tuple[int, ...]:
    """All queries, then all keys, then all values."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    return (heads * _head(config), keys * _head(config), keys * _head(config))


def _mamba2(config: Any) -> tuple[int, ...]:
    """The gate, then what is convolved (inputs, B and C), then the step sizes of all heads."""
    inner = int(config.expand * config.hidden_size)
    return (inner, inner + 2 * config.n_groups * config.state_size, config.num_heads)


def _latent_in(config: Any) -> tuple[int, ...]:
    """The latent of keys and values, then the one rotated key of all heads."""
    return (config.kv_lora_rank, config.qk_rope_head_dim)


def _latent_out(config: Any) -> tuple[int, ...]:
    """Key and value of one head after another, from the latent."""
    return (config.qk_nope_head_dim, config.v_head_dim)


_DOWN = ("*.self_attn.o_proj", "*.mlp.down_proj")
_EXPERTS = ("*.self_attn.o_proj", "*.mlp")
_BEHIND = ("*.post_attention_layernorm", "*.post_feedforward_layernorm")  # norms behind branches
_NEOX = ("*.attention.dense", "*.mlp.dense_4h_to_h")
_BLOOM = ("*.self_attention.dense", "*.mlp.dense_4h_to_h")
_MOE: Fused = {"*.experts.gate_up_proj": 2}
_GATE = {"*.mlp.gate.weight": "hidden"}
_LATENT = {"*.kv_a_proj_with_mqa.weight": _latent_in, "*.kv_b_proj.weight": _latent_out}
_MAMBA = {"*.A_log": "hidden_bias", "*.conv1d.weight": "hidden_bias"}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(("*.attn.c_proj", "*.mlp.c_proj"), {"*.attn.c_attn.weight": 3}),
    "gpt_neox": Family(_NEOX, {"*.query_key_value.weight": _by_head}),
    "llama": Family(_DOWN),
    "mistral": Family(_DOWN),
    "qwen2": Family(_DOWN),
    "qwen3": Family(_DOWN),
    "smollm3": Family(_DOWN),
    "stablelm": Family(_DOWN),
    "cohere": Family(_DOWN),
    "cohere2": Family(_DOWN),
    "granite": Family(_DOWN),
    "nemotron": Family(_DOWN),
    "gemma": Family(_DOWN),
    "gemma2": Family(_BEHIND),
    "gemma3_text": Family(_BEHIND),
    "phi": Family(("*.self_attn.dense", "*.mlp.fc2")),
    "phi3": Family(_DOWN, {"*.qkv_proj.weight": _phi3, "*.gate_up_proj.weight": 2}),
    "bloom": Family(_BLOOM, {"*.query_key_value.weight": _by_head}),
    "falcon": Family(_BLOOM, {"*.query_key_value.weight": _falcon}),
    "opt": Family(("*.self_attn.out_proj", "*.fc2")),
    "gptj": Family(("*.attn.out_proj", "*.mlp.fc_out")),
    "gpt_neo": Family(("*.attn.attention.out_proj", "*.mlp.c_proj"), unscaled=True),
    "gpt_bigcode": Family(("*.attn.c_proj", "*.mlp.c_proj"), {"*.attn.c_attn.weight": _bigcode}),
    "starcoder2": Family(("*.self_attn.o_proj", "*.mlp.c_proj")),
    "olmo": Family(_DOWN),
    "olmo2": Family(_BEHIND),
    "exaone4": Family(_BEHIND),
    "glm4": Family(
        ("*.post_self_attn_layernorm", "*.post_mlp_layernorm"), {"*.gate_up_proj.weight": 2}
    ),
    "mixtral": Family(_EXPERTS, _MOE, _GATE),
    "qwen2_moe": Family(_EXPERTS, _MOE, _GATE),
    "qwen3_moe": Family(_EXPERTS, _MOE, _GATE),
    "olmoe": Family(_EXPERTS, _MOE, _GATE),
    "phimoe": Family(_EXPERTS, _MOE),
    "granitemoe": Family(
        ("*.self_attn.o_proj", "*.block_sparse_moe"), _MOE, {"*.router.weight": "hidden"}
    ),
    "deepseek_v3": Family(_EXPERTS, {**_MOE, **_LATENT}, _GATE),
    "llama4_text": Family(
        ("*.self_attn.o_proj", "*.feed_forward"), _MOE, transposed=("*.experts.*_proj",)
    ),
    "gpt_oss": Family(
        _EXPERTS,
        {"*.experts.gate_up_proj": (1, 1)},
        {"*.mlp.router.weight": "hidden", "*.experts.*_bias": "hidden_bias"},
        transposed=("*.experts.*_proj",),
    ),
    "mamba": Family(
        ("*.mixer",), {"*.mixer.in_proj.weight": 2}, _MAMBA, kept=("*.A_log", "*.dt_proj.bias")
    ),
    "mamba2": Family(
        ("*.mixer",), {"*.mixer.in_proj.weight": _mamba2}, _MAMBA, kept=("*.A_log", "*.dt_bias")
    ),
    "bert": Family(
        ("*.output.dense",),
        roles={
            "*.predictions.transform.dense.weight": "hidden",
            "*.predictions.bias": "output_bias",
            "*.predictions.decoder.bias": "output_bias",
        },
    ),
    "vit": Family(
        ("*.attention.o_proj", "*.mlp.fc2"),
        roles={"*.cls_token": "input", "*.position_embeddings": "input"},
    ),
    "t5": Family(
        (),
        refused="it has two residual stacks, and its tied head carries a factor 1/√width of its "
        "own; plan T5EncoderModel, or untie the head and give both stacks a plan of their own",
    ),
}
"""transformers' name of a family → its row."""

BRANCH_ENDS = (
    *dict.fromkeys(
        end for name in ("gpt2", "gpt_neox", "llama") for end in FAMILIES[name].branch_ends
    ),
    "*.branch_end",
)
"""Ends of branches in models that are of no known family; the last is that of
`grsd.lab.nets.models`."""

FUSED: Fused = {
    "*.attn.c_attn.weight": 3,
    "*.in_proj_weight": 3,  # nn.MultiheadAttention: Q, K, V one after another
}
"""Fused matrices in models that are of no known family."""

SEVERAL = ("*qkv*", "*query_key_value*", "*c_attn*", "*gate_up*", "*gateup*", "*kv_proj*", "*Wi.*")
"""Names that mostly stand for several matrices in one."""


def configuration(model: nn.Module) -> Any:
    """Return the configuration of a transformers model, whatever wraps it; None without one."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((c for c in configs if hasattr(c, "model_type")), None)
