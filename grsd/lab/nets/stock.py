"""One transformers architecture at many widths and depths, for coordinate checks and sweeps of a
model that is not ours.

A configuration is read from a folder, a hub name or a family of `grsd.mup.families.FAMILIES`, and
scaled: the dimension of a head, the number of heads per width, the ratio of feedforward to model
width, and the ratio of query to key heads stay as they are; so does a single key head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grsd.lab.nets.models import quiet
from grsd.mup.families import FAMILIES

__all__ = ["FAMILIES", "configuration", "factory", "images"]

BYTES = 128  # the vocabulary of `grsd.lab.data.help_text`
# base sizes of a family, those of them that its configuration has, and what is its own
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "ffn_dim": 256, "num_kv_heads": 4}
SMALL |= {"word_embed_proj_dim": 64, "ffn_hidden_size": 256, "moe_intermediate_size": 64}
SMALL |= {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SMALL |= {"shared_expert_intermediate_size": 64, "query_pre_attn_scalar": 16, "n_groups": 1}
SMALL |= {"image_size": 8, "patch_size": 4, "state_size": 16, "rotary_dim": 8, "num_labels": 10}
SMALL |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
SMALL |= {"v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
SMALL |= {"intermediate_size_mlp": 256, "first_k_dense_replace": 0}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"head_dim": 8},  # of the rotated part
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba": {"intermediate_size": 128, "initializer_range": 0.02},
    "mamba2": {"num_heads": 8, "chunk_size": 16, "initializer_range": 0.02},
}
# what grows with the width, where a configuration has it
GROWING: tuple[str, ...] = (
    "n_inner",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "intermediate_size_mlp",
)
GROWING += ("moe_intermediate_size", "shared_expert_intermediate_size", "time_step_rank")
KEYS = ("num_key_value_heads", "num_kv_heads")  # a single one stays single
HEADS = ("num_attention_heads", "num_heads", *KEYS)


def configuration(model: str) -> Any:
    """Return the configuration of a folder or a hub name; for a family, a small one of our own."""
    from transformers import AutoConfig

    if model in FAMILIES and not Path(model).is_dir():
        if FAMILIES[model].refused:
            raise ValueError(f"no plan for the family {model!r}: {FAMILIES[model].refused}")
        with quiet():
            # sizes that the family's own configuration has
            known = AutoConfig.for_model(model)
            sizes = {name: size for name, size in SMALL.items() if _sets(known, name)}
            return AutoConfig.for_model(model, **{**sizes, **OWN.get(model, {})})
    try:
        with quiet():
            return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        known = f"{', '.join(FAMILIES)}, a folder or a name on the hub"
        raise ValueError(f"no configuration {model!r}: expected {known}; {error}") from None


def _sets(config: Any, name: str) -> bool:
    """Whether a configuration holds a size of this name, and does not compute it."""
    return hasattr(config, name) and not isinstance(getattr(type(config), name, None), property)


def factory(
    config: Any, *, vocabulary: int = BYTES, positions: int = 128
) -> Callable[[int, int], nn.Module]:
    """Return (width, depth) → a language model or an image classifier of this architecture,
    float32, without dropout, initial weights from seed 0.

    The vocabulary and the positions stand in place of the configuration's. The factory refuses a
    width at which the number of heads is not whole, and a configuration of neither kind.
    """
    loader = _loader(config)
    width, held = config.hidden_size, {n: getattr(config, n, 0) for n in HEADS if _sets(config, n)}
    counts = {n: count for n, count in held.items() if count and (count > 1 or n not in KEYS)}
    # at multiples of it the numbers of heads are whole
    unit = math.lcm(*(width // math.gcd(width, count) for count in counts.values()))

    def build(n: int, layers: int) -> nn.Module:
        if n < 1 or layers < 1 or n % unit:
            shape = ", ".join(f"{name} = {count}" for name, count in counts.items())
            rule = f"sizes are positive, and the width is a multiple of {unit} ({shape} at {width})"
            raise ValueError(f"width {n} and depth {layers}: {rule}")
        scaled = copy.deepcopy(config)
        # what grows with the width, where the configuration has it
        sizes = {name: getattr(config, name, None) for name in GROWING if _sets(config, name)}
        for name, size in {**counts, **sizes, "hidden_size": width}.items():
            if size is not None:
                setattr(scaled, name, n * size // width)
        # one entry a layer, in the configurations that have it
        scaled.num_hidden_layers = layers
        count = config.num_hidden_layers
        for name, kinds in vars(config).items():
            listed = name.endswith(("_layers", "_types")) and isinstance(kinds, list)
            if listed and len(kinds) == count:
                # the numbers of layers, or a kind for each
                numbered = kinds == list(range(count))
                spread = [k if numbered else kinds[k % count] for k in range(layers)]
                setattr(scaled, name, spread)
        if hasattr(config, "attention_types"):
            scaled.attention_types = [[scaled.attention_layers, 1]]
        scaled.vocab_size, scaled.max_position_embeddings = vocabulary, positions
        scaled.bos_token_id = scaled.eos_token_id = 0
        scaled.pad_token_id, scaled.use_cache = None, False
        for name, value in vars(scaled).items():
            if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, float):
                setattr(scaled, name, 0.0)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model: nn.Module = loader.from_config(scaled, dtype=torch.float32)
        return model

    return build


def _loader(config: Any) -> Any:
    """Return the class that makes a model of text or an image classifier of a configuration."""
    import transformers

    kinds = ("CausalLM", "MaskedLM", "ImageClassification")
    for loader in (getattr(transformers, f"AutoModelFor{kind}") for kind in kinds):
        if type(config) in loader._model_mapping:
            return loader
    raise ValueError(
        f"{config.model_type!r} is neither a language model nor an image classifier; give "
        "grsd.mup.coord_check a factory and a loss of your own"
    )


def images(config: Any, batch_size: int) -> Callable[[nn.Module], Tensor] | None:
    """Return model → its loss on Gaussian images of random classes; None where it reads text."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, config.num_channels, size, size, generator=generator)
    classes = torch.randint(config.num_labels, (batch_size,), generator=generator)

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(pixels).logits, classes)

    return loss
