"""The residual MLP that ``mup-coords`` and ``soap-epsilon`` train at many widths and depths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grsd.lab.nets import architectures

INPUTS = 16


def factory(width: int, depth: int) -> nn.Module:
    """A residual MLP with two layers a block, ReLU, biases and α_b = ¼: (B, 16) → (B, 1), float32.

    With α_b = 1 a stack of four blocks is far from its limit of depth: its features grow tenfold,
    and those of a stack of 32 with α = ⅛ do not.
    """
    how: dict[str, Any] = {"activation": "relu", "epsilon": 0.25, "bias": True, "seed": 0}
    how |= {"inputs": INPUTS, "dtype": torch.float32}
    return architectures.res_mlp(width=width, depth=depth, **how)
