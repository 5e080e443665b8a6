"""Small nets with explicit seeds, for checks of the theory against dense oracles.

All come in eval mode, float64 unless asked otherwise, with parameters drawn from a generator of their own: the global
one is left alone. Nets of a size worth training are in `grsd.lab.checkpoints.suites`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _draw(model: nn.Module, seed: int, gain: float, dtype: torch.dtype) -> nn.Module:
    """Weights normal with variance gain²/fan-in, biases normal with variance 0.01, norm gains 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan_in = math.prod(weight.shape[1:])
                weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1, generator=generator)
    return model.to(dtype).eval()


def mlp(
    widths: Sequence[int],
    activation: str = "tanh",
    *,
    seed: int,
    bias: bool = True,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A multilayer perceptron: (n, widths[0]) → (n, widths[-1]).

    Parameters
    ----------
    widths : sequence of int
        Input, hidden and output widths; two or more.
    activation : str
        Between layers: ``"identity"``, ``"relu"``, ``"tanh"``, ``"gelu"``, ``"softplus"``.
    seed : int
    bias : bool
    gain : float
        Weights are normal with standard deviation gain/√fan-in.
    dtype : torch.dtype
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths need two or more positive numbers, got {list(widths)}")
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # torch draws values that are overwritten below
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            if index:
                layers.append(_activation(activation))
            layers.append(nn.Linear(fan_in, fan_out, bias=bias))
    net = nn.Sequential(*layers)
    _draw(net, seed, gain, dtype)
    return net


def conv_net(
    channels: Sequence[int] = (1, 4, 6),
    classes: int = 3,
    activation: str = "tanh",
    *,
    seed: int,
    kernel: int = 3,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A convolutional net with mean pooling: (n, channels[0], H, W) → (n, classes), for any H, W.

    Convolutions have stride 1 and ``kernel // 2`` padding; the first is followed by a group norm.
    """
    if len(channels) < 2 or min(channels) < 1 or classes < 1:
        raise ValueError(
            f"channels need two or more positive numbers and classes one, got {list(channels)}, {classes}"
        )
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # as above
        for index, (fan_in, fan_out) in enumerate(pairwise(channels)):
            layers.append(nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2))
            if index == 0:
                layers.append(nn.GroupNorm(1, fan_out))
            layers.append(_activation(activation))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes)]
    net = nn.Sequential(*layers)
    _draw(net, seed, 1.0, dtype)
    return net


def _language_model(config: Any, seed: int, dtype: torch.dtype, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(
        devices=[]
    ):  # transformers draws initial values from the global generator
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    found: nn.Module = model.to(dtype).eval()
    return found


def gpt2(
    *,
    seed: int,
    vocab_size: int = 61,
    hidden: int = 16,
    layers: int = 2,
    heads: int = 2,
    positions: int = 32,
    tie: bool = True,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A tiny GPT-2: token ids (B, L) → an output with ``logits`` (B, L, V). Tied embeddings unless ``tie=False``."""
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=positions,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return _language_model(config, seed, dtype, attention)


def gpt_neox(
    *,
    seed: int,
    vocab_size: int = 61,
    hidden: int = 16,
    layers: int = 2,
    heads: int = 2,
    positions: int = 32,
    tie: bool = False,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A tiny GPT-NeoX, the architecture of Pythia: token ids (B, L) → an output with ``logits`` (B, L, V)."""
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=positions,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return _language_model(config, seed, dtype, attention)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; what they would report is checked by the caller."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class TwoLayer(nn.Module):
    """A two-layer net on one dial: f(δ) = [F(θ₀ + γδ) − F(θ₀)]/γ with F(a, W) = h^{-1/2} Σ_j a_j φ(w_j · (x/√d, 1)).

    The parameters are the displacement δ, zero at the start; θ₀ are buffers. See `two_layer`.
    """

    outer_start: torch.Tensor
    inner_start: torch.Tensor

    def __init__(
        self, outer: torch.Tensor, inner: torch.Tensor, gamma: float, activation: str
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.activation = _activation(activation)
        self.register_buffer("outer_start", outer)
        self.register_buffer("inner_start", inner)
        self.outer = nn.Parameter(torch.zeros_like(outer))
        self.inner = nn.Parameter(torch.zeros_like(inner))

    @property
    def width(self) -> int:
        return len(self.outer_start)

    @staticmethod
    def augmented(inputs: torch.Tensor) -> torch.Tensor:
        """(x/√d, 1): what the first layer sees, (n, d + 1)."""
        return torch.cat(
            [inputs / math.sqrt(inputs.shape[-1]), inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.augmented(inputs)
        start = self.activation(x @ self.inner_start.T) @ self.outer_start
        now = self.activation(x @ (self.inner_start + self.gamma * self.inner).T)
        moved: torch.Tensor = now @ (self.outer_start + self.gamma * self.outer) - start
        return moved / (self.gamma * math.sqrt(self.width))


def two_layer(
    inputs: int,
    width: int,
    gamma: float,
    activation: str = "tanh",
    *,
    seed: int,
    gain: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> TwoLayer:
    """A two-layer net on one dial γ, from a frozen kernel to feature learning: (n, inputs) → (n,).

    Let F(θ) = h^{-1/2} Σ_j a_j φ(w_j · (x/√d, 1)) with h hidden units. The net is the divided difference
    f_γ(δ) = [F(θ₀ + γδ) − F(θ₀)]/γ and its parameters are δ, which start at 0. Then f_γ = 0 at the start, and
    ∂f_γ/∂δ = ∂F/∂θ at θ₀ + γδ. So nets of every γ start with the same error and the same kernel M(0), and Ṁ(0) is γ times
    that of γ = 1. As γ → 0 the divided difference becomes the derivative: f_0 is the net linearized at θ₀, whose kernel never
    moves. γ = 1 is the usual net less its initial output. Gradient flow of f_γ is that of F with outputs scaled by 1/γ
    and the clock by γ² (the lazy-training scale of Chizat, Oyallon and Bach is 1/γ).

    What counts as a large γ depends on the width: a unit's weights move by about γ/√h. At fixed γ the net becomes lazy
    as h → ∞; at fixed γ/√h it keeps learning features (mean-field scaling).

    Parameters
    ----------
    inputs : int
        Dimension d of one input.
    width : int, h
    gamma : float
        γ > 0. For γ = 0 exactly, use `grsd.dynamics.problem.Problem.linearized`.
    activation : str
        As in `mlp`. With a smooth one M(t) is smooth.
    seed : int
    gain : float
        a_j has variance 1, every entry of w_j (bias included) variance gain².
    dtype : torch.dtype

    Raises
    ------
    ValueError
        If γ is not a positive number (with the way to γ = 0), or a size is not positive.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise ValueError(
            f"gamma is {gamma}; it must be positive (the frozen limit 0 is Problem.linearized)"
        )
    if inputs < 1 or width < 1:
        raise ValueError(f"inputs and width must be positive, got {inputs} and {width}")
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(width, generator=generator, dtype=torch.float64)
    inner = gain * torch.randn(width, inputs + 1, generator=generator, dtype=torch.float64)
    return TwoLayer(outer.to(dtype), inner.to(dtype), gamma, activation).eval()
