"""One small network per family of section 6 of 2512.18209.

The plain MLP and the plain CNN are in `grsd.lab.nets.models`. Here every net is ``read`` →
``blocks`` (an `nn.ModuleList`, the residual stack) → ``head``, and a branch adds ``epsilon`` times
what its last layer, ``branch_end``, gives. All come in eval mode, without dropout, float64 unless
asked otherwise, weights normal with variance 1/fan-in, biases with variance 0.01, drawn from a
generator of their own. Images are (n, channels, side, side). Sizes below 1 (depth: below 0), an
unknown activation and an ε that is negative or not finite raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from grsd.checks import at_least, one_of, whole
from grsd.lab.nets import models
from grsd.lab.nets.parts import (
    Attention,
    Branch,
    Flatten,
    Norm,
    NormOfMean,
    Patches,
    Recurrence,
    Residual,
    ResidualNet,
    Rows,
    Transposed,
    last,
)

__all__ = ["Norm", "ResidualNet", "mixer", "res_conv", "res_mlp", "ssm", "transformer"]

Branches = dict[str, nn.Module]


def _check(epsilon: float, **sizes: int) -> None:
    for name, size in sizes.items():
        whole(name, size, 0 if name == "depth" else 1)
    at_least("epsilon", epsilon, 0, "the factor of a branch must be finite and not negative")


def _stack(depth: int, epsilon: float, branches: Callable[[], Branches]) -> list[nn.Module]:
    return [Residual(epsilon, **branches()) for _ in range(depth)]


def res_mlp(
    *,
    inputs: int,
    width: int,
    depth: int,
    outputs: int = 1,
    layers: int = 2,
    activation: str = "tanh",
    epsilon: float = 1.0,
    bias: bool = False,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> ResidualNet:
    """A residual MLP: (n, inputs), or anything that flattens to it, → (n, outputs).

    Parameters
    ----------
    depth : residual blocks h + ε·branch(h); 0 leaves ``head(read(x))``
    layers : matrices in a branch, 1 for branch_end(φ(h)) or 2 for branch_end(φ(first(h)))
    activation : a key of `grsd.lab.nets.models.ACTIVATIONS`
    epsilon : ε ≥ 0; a stack of fixed size needs ε ∝ 1/√depth
    bias : of every layer
    """
    _check(epsilon, inputs=inputs, width=width, depth=depth, outputs=outputs)
    one_of("layers", layers, (1, 2), "a branch has 1 or 2 matrices")
    linear = partial(nn.Linear, bias=bias)

    def branch() -> Branches:
        first = linear(width, width) if layers == 2 else None
        return {"branch": Branch(first, activation, linear(width, width))}

    with models.undrawn():
        read, head = Flatten(inputs, width, bias=bias), linear(width, outputs)
        net = ResidualNet(read, _stack(depth, epsilon, branch), head, nn.Identity())
    return models.drawn(net, seed, dtype)


def res_conv(
    *,
    width: int,
    depth: int,
    channels: int = 1,
    outputs: int = 1,
    kernel: int = 3,
    layers: int = 2,
    activation: str = "tanh",
    epsilon: float = 1.0,
    circular: bool = False,
    bias: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> ResidualNet:
    """A residual CNN with mean pooling: (n, channels, H, W) → (n, outputs), for any H, W.

    Stride 1 and ``kernel // 2`` padding by zeros, or around the torus with ``circular=True``: the
    output then does not change when the image is shifted cyclically. The rest as `res_mlp`, with
    convolutions of odd size for matrices.
    """
    _check(epsilon, width=width, depth=depth, channels=channels, outputs=outputs, kernel=kernel)
    one_of("layers", layers, (1, 2), "a branch has 1 or 2 convolutions")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; convolutions have an odd size")
    mode: Literal["circular", "zeros"] = "circular" if circular else "zeros"

    def conv(fan_in: int, fan_out: int) -> nn.Conv2d:
        pad = kernel // 2
        return nn.Conv2d(fan_in, fan_out, kernel, padding=pad, padding_mode=mode, bias=bias)

    def branch() -> Branches:
        first = conv(width, width) if layers == 2 else None
        return {"branch": Branch(first, activation, conv(width, width))}

    with models.undrawn():
        read, head = conv(channels, width), nn.Linear(width, outputs, bias=bias)
        net = ResidualNet(
            read, _stack(depth, epsilon, branch), head, partial(torch.mean, dim=(-2, -1))
        )
    return models.drawn(net, seed, dtype)


def transformer(
    *,
    width: int,
    depth: int,
    side: int = 8,
    patch: int = 2,
    channels: int = 1,
    outputs: int = 1,
    heads: int = 2,
    activation: str = "gelu",
    epsilon: float = 1.0,
    positions: bool = True,
    bias: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> ResidualNet:
    """A pre-norm transformer encoder on patches: (n, channels, side, side) → (n, outputs).

    A block is h + ε·attention(norm(h)), then h + ε·mlp(norm(h)) with `width` hidden units. The mean
    over tokens is normalised before the head. ``patch=1`` makes every pixel a token. Without
    learned `positions` the output does not depend on the order of the patches. The rest as
    `res_mlp`.
    """
    sizes = {"side": side, "patch": patch, "channels": channels, "heads": heads}
    _check(epsilon, width=width, depth=depth, outputs=outputs, **sizes)
    if side % patch or width % heads:
        raise ValueError(f"patch {patch} must divide side {side}, and heads {heads} width {width}")
    linear = partial(nn.Linear, bias=bias)

    def branches() -> Branches:
        attention = Attention(width, heads, bias)
        first, end = linear(width, width), linear(width, width)
        return {"attention": attention, "mlp": Branch(first, activation, end, norm=Norm(width))}

    with models.undrawn():
        read, head = Patches(channels, side, patch, width, positions, bias), linear(width, outputs)
        net = ResidualNet(read, _stack(depth, epsilon, branches), head, NormOfMean(width))
    return models.drawn(net, seed, dtype)


def ssm(
    *,
    width: int,
    depth: int,
    inputs: int = 8,
    states: int | None = None,
    outputs: int = 1,
    decays: tuple[float, float] = (0.5, 0.95),
    activation: str = "tanh",
    epsilon: float = 1.0,
    bias: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> ResidualNet:
    """A state-space model over the T rows of an image: (n, channels, T, side) → (n, outputs).

    A block is h_t + ε·branch_end(φ(z_t)) with z_t = a ⊙ z_{t−1} + first(h_t): the recurrence is
    diagonal and linear and its weights are shared by all times. The head reads the last time. With
    ``activation="linear"`` the whole net is linear. The rest as `res_mlp`.

    Parameters
    ----------
    inputs : numbers per time step
    states : dimension of z; by default `width`
    decays : smallest and largest a at the start, strictly between 0 and 1, evenly spaced between
    """
    states = width if states is None else states
    _check(epsilon, width=width, depth=depth, inputs=inputs, states=states, outputs=outputs)
    low, high = decays
    if not 0 < low <= high < 1:
        why = "expected 0 < smallest ≤ largest < 1, where the recurrence contracts"
        raise ValueError(f"decays are {decays}; {why}")
    start = torch.linspace(low, high, states, dtype=torch.float64)

    def branch() -> Branches:
        return {"recurrence": Recurrence(width, states, start, activation, bias)}

    with models.undrawn():
        read, head = Rows(inputs, width, bias=bias), nn.Linear(width, outputs, bias=bias)
        net = ResidualNet(read, _stack(depth, epsilon, branch), head, last)
    return models.drawn(net, seed, dtype)


def mixer(
    *,
    width: int,
    depth: int,
    side: int = 8,
    patch: int = 2,
    channels: int = 1,
    outputs: int = 1,
    hidden: int | None = None,
    activation: str = "gelu",
    epsilon: float = 1.0,
    bias: bool = True,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> ResidualNet:
    """An MLP-Mixer on the patches of an image: (n, channels, side, side) → (n, outputs).

    A block adds ε times a two-layer net along the tokens (`hidden` units, by default as many as
    tokens), then ε times one along the channels, each of a layer norm of h. The rest as
    `transformer`.
    """
    sizes = {"side": side, "patch": patch, "channels": channels, "outputs": outputs}
    _check(epsilon, width=width, depth=depth, **sizes)
    if side % patch:
        raise ValueError(f"patch {patch} must divide side {side}")
    tokens = (side // patch) ** 2
    units = whole("hidden", tokens if hidden is None else hidden, 1)
    linear = partial(nn.Linear, bias=bias)

    def branches() -> Branches:
        along = Branch(linear(tokens, units), activation, linear(units, tokens))
        first, end = linear(width, width), linear(width, width)
        across = Branch(first, activation, end, norm=Norm(width))
        return {"tokens": Transposed(Norm(width), along), "channels": across}

    with models.undrawn():
        read, head = Patches(channels, side, patch, width, False, bias), linear(width, outputs)
        net = ResidualNet(read, _stack(depth, epsilon, branches), head, NormOfMean(width))
    return models.drawn(net, seed, dtype)
