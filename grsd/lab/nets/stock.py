"""One transformers architecture at many widths and depths, for coordinate checks and sweeps of a
model that is not ours.

A configuration is read from a folder, a hub name or a family of `grsd.mup.roles.FAMILIES`, and
scaled: the dimension of a head, the number of heads per width, the ratio of feedforward to model
width, and the ratio of query to key heads stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd.lab.nets.models import quiet
from grsd.mup.roles import FAMILIES

__all__ = ["FAMILIES", "configuration", "factory"]

BYTES = 128  # the vocabulary of `grsd.lab.data.help_text`
# base sizes of a family, those of them that its configuration has
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def configuration(model: str) -> Any:
    """Return the configuration of a folder or a hub name; for a family, a small one of our own."""
    from transformers import AutoConfig

    if model in FAMILIES and not Path(model).is_dir():
        with quiet():
            # sizes that the family's own configuration has
            known = AutoConfig.for_model(model)
            sizes = {name: size for name, size in SMALL.items() if hasattr(known, name)}
            return AutoConfig.for_model(model, **sizes)
    try:
        with quiet():
            return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        known = f"{', '.join(FAMILIES)}, a folder or a name on the hub"
        raise ValueError(f"no configuration {model!r}: expected {known}; {error}") from None


def factory(
    config: Any, *, vocabulary: int = BYTES, positions: int = 128
) -> Callable[[int, int], nn.Module]:
    """Return (width, depth) → a causal language model of this architecture, float32, without
    dropout, initial weights from seed 0.

    The vocabulary and the positions stand in place of the configuration's. The factory refuses a
    width at which the number of key heads is not whole.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    head = int(getattr(config, "head_dim", None) or width // heads)
    keys = getattr(config, "num_key_value_heads", None) or heads
    # at multiples of it the number of key heads is whole, and so is that of query heads
    unit = width // math.gcd(width, keys)

    def build(n: int, layers: int) -> nn.Module:
        from transformers import AutoModelForCausalLM

        if n < 1 or layers < 1 or n % unit:
            why = f"heads of dimension {head}, {heads // keys} query heads to a key head"
            rule = f"sizes are positive, and the width is a multiple of {unit} ({why})"
            raise ValueError(f"width {n} and depth {layers}: {rule}")
        scaled = copy.deepcopy(config)
        scaled.hidden_size, scaled.num_attention_heads = n, n * heads // width
        # what grows with the width, where the configuration has it
        for name in ("n_inner", "intermediate_size", "num_key_value_heads"):
            size = getattr(config, name, None)
            if size is not None:
                setattr(scaled, name, n * size // width)
        scaled.num_hidden_layers = layers
        # one entry a layer, in the configurations that have it
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            scaled.layer_types = [kinds[k % len(kinds)] for k in range(layers)]
        scaled.vocab_size, scaled.max_position_embeddings = vocabulary, positions
        scaled.bos_token_id = scaled.eos_token_id = 0
        scaled.pad_token_id, scaled.use_cache = None, False
        for name, value in vars(scaled).items():
            if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
                setattr(scaled, name, 0.0)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model: nn.Module = AutoModelForCausalLM.from_config(scaled, dtype=torch.float32)
        return model

    return build
