"""Small nets with explicit seeds, for checks of the theory against dense oracles.

All come in eval mode, float64 unless asked otherwise, with parameters drawn from a generator of
their own: the global one is left alone. Nets of a size worth training are in
`grsd.lab.checkpoints.suites`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from grsd.checks import one_of, positive

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
Net = TypeVar("Net", bound=nn.Module)


def activation_of(name: str) -> nn.Module:
    """The activation of that name, a key of `ACTIVATIONS`."""
    return ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]()


def undrawn() -> AbstractContextManager[None]:
    """Layers made inside leave the global generator alone; `drawn` overwrites their values."""
    return torch.random.fork_rng(devices=[])


def drawn(net: Net, seed: int, dtype: torch.dtype, gain: float = 1.0) -> Net:
    """Weights normal with variance gain²/fan-in, biases normal with variance 0.01, norm gains 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim >= 2:
                fan_in = math.prod(weight.shape[1:])
                weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.1, generator=generator)
    return net.to(dtype).eval()


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
    widths : input, hidden and output widths; two or more
    activation : between layers, a key of `ACTIVATIONS`
    gain : weights are normal with standard deviation gain/√fan-in
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths need two or more positive numbers, got {list(widths)}")
    layers: list[nn.Module] = []
    with undrawn():
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), activation_of(activation)]
    return drawn(nn.Sequential(*layers[:-1]), seed, dtype, gain)


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
        why = "channels need two or more positive numbers and classes one"
        raise ValueError(f"{why}, got {list(channels)}, {classes}")
    layers: list[nn.Module] = []
    with undrawn():
        for fan_in, fan_out in pairwise(channels):
            layers.append(nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2))
            if len(layers) == 1:
                layers.append(nn.GroupNorm(1, fan_out))
            layers.append(activation_of(activation))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes)]
    return drawn(nn.Sequential(*layers), seed, dtype)


def language_model(
    family: Literal["gpt2", "gpt_neox"],
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
    """A tiny net of a family: token ids (B, L) → an output with ``logits`` (B, L, V)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own: dict[str, dict[str, Any]] = {
        "gpt2": dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        "gpt_neox": {"intermediate_size": 4 * hidden},
    }
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **own[family],
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(dtype).eval()


def gpt2(*, seed: int, tie: bool = True, **options: Any) -> nn.Module:
    """A tiny GPT-2; embeddings are tied unless ``tie=False``. Options as `language_model`."""
    return language_model("gpt2", seed=seed, tie=tie, **options)


def gpt_neox(*, seed: int, **options: Any) -> nn.Module:
    """A tiny GPT-NeoX, the architecture of Pythia. Options as `language_model`."""
    return language_model("gpt_neox", seed=seed, **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence bars and warnings of transformers; callers check what they would report."""
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
    """A two-layer net on one dial: f(δ) = [F(θ₀ + γδ) − F(θ₀)]/γ with F(a, W) = h^{-1/2} Σ_j a_j
    φ(w_j · (x/√d, 1)).

    The parameters are the displacement δ, zero at the start; θ₀ are buffers. See `two_layer`.
    """

    outer_start: torch.Tensor
    inner_start: torch.Tensor

    def __init__(
        self, outer: torch.Tensor, inner: torch.Tensor, gamma: float, activation: str
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.activation = activation_of(activation)
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
        ones = inputs.new_ones(*inputs.shape[:-1], 1)
        return torch.cat([inputs / math.sqrt(inputs.shape[-1]), ones], dim=-1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = self.augmented(inputs)
        start = self.activation(x @ self.inner_start.T) @ self.outer_start
        now = self.activation(x @ (self.inner_start + self.gamma * self.inner).T)
        moved = now @ (self.outer_start + self.gamma * self.outer) - start
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

    Let F(θ) = h^{-1/2} Σ_j a_j φ(w_j · (x/√d, 1)) with h hidden units. The net is the divided
    difference f_γ(δ) = [F(θ₀ + γδ) − F(θ₀)]/γ and its parameters are δ, which start at 0. Then f_γ
    = 0 at the start, and ∂f_γ/∂δ = ∂F/∂θ at θ₀ + γδ. So nets of every γ start with the same error
    and the same kernel M(0), and Ṁ(0) is γ times that of γ = 1. As γ → 0 the divided difference
    becomes the derivative: f_0 is the net linearized at θ₀, whose kernel never moves. γ = 1 is the
    usual net less its initial output. Gradient flow of f_γ is that of F with outputs scaled by 1/γ
    and the clock by γ² (the lazy-training scale of Chizat, Oyallon and Bach is 1/γ).

    What counts as a large γ depends on the width: a unit's weights move by about γ/√h. At fixed γ
    the net becomes lazy as h → ∞; at fixed γ/√h it keeps learning features (mean-field scaling).

    Parameters
    ----------
    inputs, width : dimension d of one input, and h
    gamma : γ > 0; for γ = 0 exactly, use `grsd.dynamics.flow.Problem.linearized`
    activation : as in `mlp`; with a smooth one M(t) is smooth
    gain : a_j has variance 1, every entry of w_j (bias included) variance gain²
    """
    positive("gamma", gamma, "it must be positive (the frozen limit 0 is Problem.linearized)")
    if inputs < 1 or width < 1:
        raise ValueError(f"inputs and width must be positive, got {inputs} and {width}")
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(width, generator=generator, dtype=torch.float64)
    inner = gain * torch.randn(width, inputs + 1, generator=generator, dtype=torch.float64)
    return TwoLayer(outer.to(dtype), inner.to(dtype), gamma, activation).eval()
