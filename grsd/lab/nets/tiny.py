"""The architectures of transformers that the field table names, each as one tiny model.

A row says what kind of model it is and which sizes of its configuration are not the common ones of
`SIZES`. All are far below one second: a width of 16, two layers, 23 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grsd import checks
from grsd.lab.nets.models import quiet

Kind = Literal["decoder", "recurrent", "mixture", "encoder", "encoder-decoder", "vision"]

VOCABULARY, LENGTH, BATCH, PIXELS, CLASSES = 23, 7, 2, 32, 5
# what a configuration gets of these is what it has
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "image_size": PIXELS,
    "patch_size": 16,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LOADERS = {
    "encoder": "AutoModelForMaskedLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "vision": "AutoModelForImageClassification",
}  # the rest: AutoModelForCausalLM


@dataclass(frozen=True)
class Architecture:
    """One row: the kind, and what of the configuration is its own; None leaves out a common size.

    `dtype` is float32 where transformers' own code does not run in float64.
    """

    kind: Kind
    own: dict[str, Any]
    dtype: torch.dtype = torch.float64


def _row(kind: Kind, **own: Any) -> Architecture:
    return Architecture(kind, own)


_FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
_LATENT |= {"v_head_dim": 4, "num_key_value_heads": 4}
_XGLM = {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}
_SWIN: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
_SWIN |= {"num_attention_heads": None, "num_hidden_layers": None, "hidden_size": None}
_CLIP = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
_CLIP |= {"num_attention_heads": 4, "image_size": PIXELS, "patch_size": 16}

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": _row("decoder"),
    "gpt_neox": _row("decoder"),
    "gpt_neo": _row("decoder", num_layers=2, attention_types=[[["global", "local"], 1]]),
    "gptj": _row("decoder", rotary_dim=4),
    "llama": _row("decoder"),
    "mistral": _row("decoder"),
    "qwen2": _row("decoder"),
    "qwen3": _row("decoder", head_dim=4),
    "gemma": _row("decoder", head_dim=4),
    "gemma2": _row("decoder", head_dim=4, query_pre_attn_scalar=4, sliding_window=4),
    "gemma3_text": _row("decoder", head_dim=4, query_pre_attn_scalar=4, sliding_window=4),
    "phi": _row("decoder"),
    "phi3": _row("decoder"),
    "bloom": _row("decoder"),
    "falcon": _row("decoder"),
    "opt": _row("decoder", ffn_dim=24, word_embed_proj_dim=16),
    "starcoder2": _row("decoder"),
    "gpt_bigcode": _row("decoder"),
    "olmo": _row("decoder"),
    "olmo2": _row("decoder"),
    "glm4": _row("decoder", head_dim=4),
    "cohere": _row("decoder"),
    "stablelm": _row("decoder"),
    "granite": _row("decoder"),
    "smollm3": _row("decoder"),
    "nemotron": _row("decoder"),
    "mpt": _row("decoder"),
    "codegen": _row("decoder", rotary_dim=4),
    "xglm": Architecture("decoder", _XGLM, torch.float32),
    "biogpt": _row("decoder"),
    "persimmon": _row("decoder"),
    "ctrl": _row("decoder", dff=24),
    "exaone4": _row("decoder", sliding_window=4),
    "mixtral": _row("mixture", num_local_experts=4),
    "qwen2_moe": _row("mixture", **_FEW, shared_expert_intermediate_size=16),
    "qwen3_moe": _row("mixture", **_FEW, head_dim=4),
    "gpt_oss": _row("mixture", num_local_experts=4, head_dim=4, sliding_window=4),
    "olmoe": _row("mixture", **_FEW),
    "granitemoe": _row("mixture", num_local_experts=4, num_experts_per_tok=2),
    "jamba": _row("mixture", num_experts=4, attn_layer_period=2, attn_layer_offset=1),
    "deepseek_v3": _row("mixture", **_LATENT, n_routed_experts=4, num_experts_per_tok=2),
    "phimoe": _row("mixture", num_local_experts=4),
    "mamba": _row("recurrent", state_size=4, expand=2),
    "mamba2": _row("recurrent", state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4),
    "falcon_mamba": _row("recurrent", state_size=4),
    "rwkv": _row("recurrent", use_cache=False),
    "recurrent_gemma": _row("recurrent", num_hidden_layers=3, lru_width=16),
    "bert": _row("encoder"),
    "roberta": _row("encoder"),
    "distilbert": _row("encoder", dim=16, hidden_dim=24, n_layers=2, n_heads=2),
    "electra": _row("encoder"),
    "albert": _row("encoder"),
    "deberta-v2": _row("encoder"),
    "mpnet": _row("encoder"),
    "modernbert": _row("encoder"),
    "t5": _row("encoder-decoder", d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4),
    "bart": _row("encoder-decoder", d_model=16),
    "pegasus": _row("encoder-decoder", d_model=16),
    "mbart": _row("encoder-decoder", d_model=16),
    "marian": _row("encoder-decoder", d_model=16),
    "blenderbot": _row("encoder-decoder", d_model=16),
    "vit": _row("vision"),
    "deit": _row("vision", architectures=["DeiTForImageClassification"]),
    "beit": _row("vision", use_relative_position_bias=True),
    "swin": _row("vision", **_SWIN),
    "convnext": _row("vision", patch_size=4, hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1]),
    "resnet": _row("vision", embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1]),
    "dinov2": _row("vision"),
    "clip": _row("vision", vision_config=_CLIP),
}


def configuration(name: str, *, drop: float = 0.0) -> Any:
    """Return the tiny configuration of one of the `ARCHITECTURES`; all its dropout rates are
    `drop`."""
    from transformers import AutoConfig

    row = ARCHITECTURES[checks.one_of("architecture", name, ARCHITECTURES)]
    with quiet():
        known = AutoConfig.for_model(name)
        sizes = {key: size for key, size in SIZES.items() if hasattr(known, key)} | row.own
        sizes = {key: size for key, size in sizes.items() if size is not None}
        config = AutoConfig.for_model(name, **sizes)
    parts = (config, getattr(config, "vision_config", None))
    for part in filter(None, parts):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, drop)
    return config


def network(
    config: Any, kind: Kind, dtype: torch.dtype = torch.float64, attention: str | None = None
) -> nn.Module:
    """Return the model of a configuration in eval mode, weights from seed 0.

    `attention` is an implementation of transformers; a model without it raises its ValueError.
    Experts are run one by one in float64, which the grouped kernel does not know.
    """
    import transformers

    loader = getattr(transformers, LOADERS.get(kind, "AutoModelForCausalLM"))
    how = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model: Any = loader.from_config(config, dtype=torch.float32, **how).to(dtype).eval()
        if kind == "mixture" and dtype == torch.float64:
            model.set_experts_implementation("eager")
    made: nn.Module = model
    return made


def batch(kind: Kind) -> tuple[dict[str, Tensor], Tensor]:
    """Return keyword arguments of the forward pass, and targets."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int = LENGTH) -> Tensor:
        return torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)

    if kind == "vision":
        pixels = torch.randn(BATCH, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels}, torch.tensor([4, 1])
    if kind == "encoder-decoder":
        return {"input_ids": tokens(LENGTH - 2), "decoder_input_ids": tokens()}, tokens()
    return {"input_ids": tokens()}, tokens()
