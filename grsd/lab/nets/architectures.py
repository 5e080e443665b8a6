"""One small network per family of section 6 of 2512.18209.

The plain MLP and the plain CNN are in `grsd.lab.nets.models`. Here every net is ``read`` →
``blocks`` (an `nn.ModuleList`, the residual stack) → ``head``, and a branch adds ``epsilon`` times
what its last layer, ``branch_end``, gives. All come in eval mode, without dropout, float64 unless
asked otherwise, weights normal with variance 1/fan-in, biases with variance 0.01, drawn from a
generator of their own. Images are (n, channels, side, side). Every family takes what `Common`
holds, beside what is its own. Sizes below 1 (depth: below 0), an unknown activation and an ε that
is negative or not finite raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from grsd.checks import at_least, one_of, whole
from grsd.lab.nets import models, parts
from grsd.lab.nets.parts import Branch, Norm, ResidualNet

__all__ = ["Common", "Norm", "ResidualNet"]
__all__ += ["mixer", "res_conv", "res_mlp", "ssm", "transformer"]

Branches = dict[str, nn.Module]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every family takes, with the defaults of most."""

    width: int  #: of the residual stream
    depth: int  #: residual blocks h + ε·branch(h); 0 leaves ``head(read(x))``
    outputs: int = 1
    activation: str = "tanh"  #: a key of `grsd.lab.nets.models.ACTIVATIONS`
    epsilon: float = 1.0  #: ε ≥ 0; a stack of fixed size needs ε ∝ 1/√depth
    skip: bool = True  #: False leaves ε·branch(h) alone: the twin without skips
    bias: bool = True  #: of every layer
    seed: int
    dtype: torch.dtype = torch.float64

    def check(self, **own: int) -> None:
        """Refuse sizes that are not positive, those named among them."""
        whole("depth", self.depth, 0)
        for name, size in {"width": self.width, "outputs": self.outputs, **own}.items():
            whole(name, size, 1)
        why = "the factor of a branch must be finite and not negative"
        at_least("epsilon", self.epsilon, 0, why)

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=self.bias)

    def across(self) -> Branch:
        """Two layers along the channels, of a norm of h."""
        first, end = (self.linear(self.width, self.width) for _ in range(2))
        return Branch(first, self.activation, end, norm=Norm(self.width))

    def net(
        self, read: Callable[[], nn.Module], branches: Callable[[], Branches], pool: parts.Map
    ) -> ResidualNet:
        """The network that reads, adds these branches at every depth, pools and reads out."""
        with models.undrawn():
            block = partial(parts.Residual, self.epsilon, self.skip)
            blocks = [block(**branches()) for _ in range(self.depth)]
            net = ResidualNet(read(), blocks, self.linear(self.width, self.outputs), pool)
        return models.drawn(net, self.seed, self.dtype)


def res_mlp(*, inputs: int, layers: int = 2, bias: bool = False, **common: Any) -> ResidualNet:
    """A residual MLP: (n, inputs), or anything that flattens to it, → (n, outputs).

    A branch has one matrix, branch_end(φ(h)), or two `layers`, branch_end(φ(first(h))).
    """
    how = Common(bias=bias, **common)
    how.check(inputs=inputs)
    one_of("layers", layers, (1, 2), "a branch has 1 or 2 matrices")
    width = how.width

    def branch() -> Branches:
        first = how.linear(width, width) if layers == 2 else None
        return {"branch": Branch(first, how.activation, how.linear(width, width))}

    return how.net(lambda: parts.Flatten(inputs, width, bias=bias), branch, nn.Identity())


def res_conv(
    *, channels: int = 1, kernel: int = 3, layers: int = 2, circular: bool = False, **common: Any
) -> ResidualNet:
    """A residual CNN with mean pooling: (n, channels, H, W) → (n, outputs), for any H, W.

    Stride 1 and ``kernel // 2`` padding by zeros, or around the torus with ``circular=True``: the
    output then does not change when the image is shifted cyclically. The rest as `res_mlp`, with
    convolutions of odd size for matrices.
    """
    how = Common(**common)
    how.check(channels=channels, kernel=kernel)
    one_of("layers", layers, (1, 2), "a branch has 1 or 2 convolutions")
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; convolutions have an odd size")
    mode = "circular" if circular else "zeros"
    same: dict[str, Any] = {"padding": kernel // 2, "padding_mode": mode, "bias": how.bias}

    def conv(fan_in: int, fan_out: int) -> nn.Conv2d:
        return nn.Conv2d(fan_in, fan_out, kernel, **same)

    def branch() -> Branches:
        first = conv(how.width, how.width) if layers == 2 else None
        return {"branch": Branch(first, how.activation, conv(how.width, how.width))}

    return how.net(lambda: conv(channels, how.width), branch, partial(torch.mean, dim=(-2, -1)))


def transformer(
    *,
    side: int = 8,
    patch: int = 2,
    channels: int = 1,
    heads: int = 2,
    positions: bool = True,
    activation: str = "gelu",
    **common: Any,
) -> ResidualNet:
    """A pre-norm transformer encoder on patches: (n, channels, side, side) → (n, outputs).

    A block is h + ε·attention(norm(h)), then h + ε·mlp(norm(h)) with `width` hidden units. The mean
    over tokens is normalised before the head. ``patch=1`` makes every pixel a token. Without
    learned `positions` the output does not depend on the order of the patches.
    """
    how = Common(activation=activation, **common)
    how.check(side=side, patch=patch, channels=channels, heads=heads)
    width = how.width
    if side % patch or width % heads:
        raise ValueError(f"patch {patch} must divide side {side}, and heads {heads} width {width}")

    def branches() -> Branches:
        return {"attention": parts.Attention(width, heads, how.bias), "mlp": how.across()}

    read = partial(parts.Patches, channels, side, patch, width, positions, how.bias)
    return how.net(read, branches, parts.NormOfMean(width))


def ssm(
    *,
    inputs: int = 8,
    states: int | None = None,
    decays: tuple[float, float] = (0.5, 0.95),
    **common: Any,
) -> ResidualNet:
    """A state-space model over the T rows of an image: (n, channels, T, side) → (n, outputs).

    A block is h_t + ε·branch_end(φ(z_t)) with z_t = a ⊙ z_{t−1} + first(h_t): the recurrence is
    diagonal and linear and its weights are shared by all times. The head reads the last time. With
    ``activation="linear"`` the whole net is linear.

    Parameters
    ----------
    inputs : numbers per time step
    states : dimension of z; by default the width
    decays : smallest and largest a at the start, strictly between 0 and 1, evenly spaced between
    """
    how = Common(**common)
    states = how.width if states is None else states
    how.check(inputs=inputs, states=states)
    low, high = decays
    if not 0 < low <= high < 1:
        why = "expected 0 < smallest ≤ largest < 1, where the recurrence contracts"
        raise ValueError(f"decays are {decays}; {why}")
    start = torch.linspace(low, high, states, dtype=torch.float64)

    def branch() -> Branches:
        return {"recurrence": parts.Recurrence(how.width, states, start, how.activation, how.bias)}

    return how.net(lambda: parts.Rows(inputs, how.width, bias=how.bias), branch, parts.last)


def mixer(
    *,
    side: int = 8,
    patch: int = 2,
    channels: int = 1,
    hidden: int | None = None,
    activation: str = "gelu",
    **common: Any,
) -> ResidualNet:
    """An MLP-Mixer on the patches of an image: (n, channels, side, side) → (n, outputs).

    A block adds ε times a two-layer net along the tokens (`hidden` units, by default as many as
    tokens), then ε times one along the channels, each of a layer norm of h. The rest as
    `transformer`.
    """
    how = Common(activation=activation, **common)
    how.check(side=side, patch=patch, channels=channels)
    if side % patch:
        raise ValueError(f"patch {patch} must divide side {side}")
    tokens, width = (side // patch) ** 2, how.width
    units = whole("hidden", tokens if hidden is None else hidden, 1)

    def branches() -> Branches:
        along = Branch(how.linear(tokens, units), activation, how.linear(units, tokens))
        return {"tokens": parts.Transposed(Norm(width), along), "channels": how.across()}

    read = partial(parts.Patches, channels, side, patch, width, False, how.bias)
    return how.net(read, branches, parts.NormOfMean(width))
