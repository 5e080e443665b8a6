"""One small network per family of section 6 of 2512.18209: residual MLP and CNN, transformer, state-space model, MLP-Mixer.

The plain MLP and the plain CNN are in `grsd.lab.nets.models`. Here every net is ``read`` → ``blocks`` (an `nn.ModuleList`, the
residual stack) → ``head``, and a branch adds ``epsilon`` times what its last layer, ``branch_end``, gives. All come in
eval mode, without dropout, float64 unless asked otherwise, weights normal with variance 1/fan-in, biases with variance
0.01, drawn from a generator of their own. Images are (n, channels, side, side).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from grsd.lab.nets import models

__all__ = ["mixer", "res_conv", "res_mlp", "ssm", "transformer"]

ACTIVATIONS: dict[str, type[nn.Module]] = {**models.ACTIVATIONS, "linear": nn.Identity}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def _check(epsilon: float, **sizes: int) -> None:
    """Refuse sizes below 1 (depth: below 0) and an ε that is negative or not finite."""
    for name, size in sizes.items():
        least = 0 if name == "depth" else 1
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} is {size!r}; expected a whole number of at least {least}")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(
            f"epsilon is {epsilon}; the factor of a residual branch must be finite and not negative"
        )


class Norm(nn.LayerNorm):
    """Layer normalisation in plain tensor operations: PyTorch's has a wrong second derivative in forward mode (#196699)."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = (
            scaled * self.weight + self.bias if self.bias is not None else scaled * self.weight
        )
        return out


class ResidualNet(nn.Module):
    """``head(pool(blocks(read(x))))``. Attributes: read, blocks (ModuleList), head."""

    def __init__(
        self, read: nn.Module, blocks: list[nn.Module], head: nn.Module, pool: nn.Module
    ) -> None:
        super().__init__()
        self.read = read
        self.blocks = nn.ModuleList(blocks)
        self.pool = pool
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        h: Tensor = self.read(inputs)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(self.pool(h))
        return out


class Branch(nn.Module):
    """What one residual branch adds: branch_end(φ(h)) for one layer, branch_end(φ(first(h))) for two; with a norm, of norm(h)."""

    def __init__(
        self,
        first: nn.Module | None,
        activation: str,
        branch_end: nn.Module,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        if first is not None:
            self.first = first
        self.activation = _activation(activation)
        self.branch_end = branch_end

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.children():  # in the order of __init__
            h = layer(h)
        return h


class Residual(nn.Module):
    """h + ε·branch(h) for each of its branches in turn."""

    def __init__(self, epsilon: float, **branches: nn.Module) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, h: Tensor) -> Tensor:
        for branch in self.children():
            h = h + self.epsilon * branch(h)
        return h


class Attention(nn.Module):
    """Attention of every token to all: softmax(q kᵀ/√d) v over `heads`, of a norm of h (n, tokens, width)."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.query, self.key, self.value, self.branch_end = (
            nn.Linear(width, width, bias=bias) for _ in range(4)
        )

    def forward(self, h: Tensor) -> Tensor:
        n, tokens, width = h.shape
        h = self.norm(h)
        q, k, v = (
            layer(h).view(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads), dim=-1)
        out: Tensor = self.branch_end((scores @ v).transpose(1, 2).reshape(n, tokens, width))
        return out


class Transposed(nn.Module):
    """A branch that acts along the tokens: transposes (n, tokens, width), applies `inner`, transposes back."""

    def __init__(self, norm: nn.Module, inner: Branch) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.inner(self.norm(h).transpose(1, 2)).transpose(1, 2)
        return out


class Recurrence(nn.Module):
    """branch_end(φ(z)) with z_t = a ⊙ z_{t−1} + first(h_t), z_{−1} = 0: one diagonal linear system, the same at every time.

    Computed as the causal convolution z_t = Σ_s a^(t−s) first(h_s). Each a = σ(decay) lies in (0, 1).
    """

    def __init__(
        self, width: int, states: int, decays: Tensor, activation: str, bias: bool
    ) -> None:
        super().__init__()
        self.first = nn.Linear(width, states, bias=bias)
        self.decay = nn.Parameter(torch.logit(decays))
        self.activation = _activation(activation)
        self.branch_end = nn.Linear(states, width, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        steps = torch.arange(h.shape[1], device=h.device)
        lag = (steps[:, None] - steps[None, :]).to(h.dtype)  # (T, T)
        kernel = torch.exp(
            nn.functional.logsigmoid(self.decay)[:, None, None] * lag.clamp(min=0)
        ) * (lag >= 0)
        z = torch.einsum("kts,nsk->ntk", kernel, self.first(h))
        out: Tensor = self.branch_end(self.activation(z))
        return out


class Flatten(nn.Linear):
    """(n, …) → (n, features), then a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


class Patches(nn.Module):
    """Images (n, channels, side, side) → tokens (n, (side/patch)², width): one linear map of every patch, plus positions."""

    def __init__(
        self, channels: int, side: int, patch: int, width: int, positions: bool, bias: bool
    ) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * patch**2, width, bias=bias)
        self.positions = (
            nn.Parameter(torch.empty((side // patch) ** 2, width)) if positions else None
        )

    def cut(self, images: Tensor) -> Tensor:
        """Return the patches, row by row, (n, tokens, channels · patch²)."""
        return nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.linear(self.cut(images))
        return tokens if self.positions is None else tokens + self.positions


class Rows(nn.Linear):
    """Images (n, channels, T, side) → a sequence of T rows, each through a linear layer: (n, T, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2).flatten(2))


class Mean(nn.Module):
    """The mean over the given dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, h: Tensor) -> Tensor:
        return h.mean(self.dims)


class NormOfMean(nn.Module):
    """The layer norm of the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.norm(h.mean(1))
        return out


class Last(nn.Module):
    """The last of the tokens."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, -1]


def _finish(make: ResidualNet, seed: int, dtype: torch.dtype) -> ResidualNet:
    models._draw(make, seed, 1.0, dtype)
    return make


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
    inputs, width, outputs : int
    depth : int
        Residual blocks h + ε·branch(h); 0 leaves ``head(read(x))``.
    layers : int
        Matrices in a branch: 1 for branch_end(φ(h)), 2 for branch_end(φ(first(h))).
    activation : str
        ``"tanh"``, ``"relu"``, ``"linear"``, ``"gelu"``, ``"softplus"``.
    epsilon : float
        ε ≥ 0. A stack of fixed size needs ε ∝ 1/√depth.
    bias : bool
        Of every layer.
    seed : int
    dtype : torch.dtype

    Raises
    ------
    ValueError
        Sizes below 1 (depth: 0), `layers` other than 1 and 2, an unknown activation, an ε that is negative or not finite.
    """
    _check(epsilon, inputs=inputs, width=width, depth=depth, outputs=outputs)
    if layers not in (1, 2):
        raise ValueError(f"layers is {layers}; a branch has 1 or 2 matrices")
    with torch.random.fork_rng(devices=[]):  # torch draws values that `_finish` overwrites
        blocks: list[nn.Module] = []
        for _ in range(depth):
            first = nn.Linear(width, width, bias=bias) if layers == 2 else None
            blocks.append(
                Residual(
                    epsilon, branch=Branch(first, activation, nn.Linear(width, width, bias=bias))
                )
            )
        read, head = Flatten(inputs, width, bias=bias), nn.Linear(width, outputs, bias=bias)
        net = ResidualNet(read, blocks, head, nn.Identity())
    return _finish(net, seed, dtype)


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

    Stride 1 and ``kernel // 2`` padding by zeros, or around the torus with ``circular=True``: the output then does not
    change when the image is shifted cyclically. The rest as `res_mlp`, with convolutions for matrices.
    """
    _check(epsilon, width=width, depth=depth, channels=channels, outputs=outputs, kernel=kernel)
    if layers not in (1, 2) or kernel % 2 == 0:
        raise ValueError(
            f"layers is {layers} and kernel {kernel}; a branch has 1 or 2 convolutions of odd size"
        )

    def conv(fan_in: int) -> nn.Conv2d:
        mode: Literal["circular", "zeros"] = "circular" if circular else "zeros"
        return nn.Conv2d(fan_in, width, kernel, padding=kernel // 2, padding_mode=mode, bias=bias)

    with torch.random.fork_rng(devices=[]):
        blocks: list[nn.Module] = []
        for _ in range(depth):
            first = conv(width) if layers == 2 else None
            blocks.append(Residual(epsilon, branch=Branch(first, activation, conv(width))))
        net = ResidualNet(
            conv(channels), blocks, nn.Linear(width, outputs, bias=bias), Mean(-2, -1)
        )
    return _finish(net, seed, dtype)


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
    """A pre-norm transformer encoder on the patches of an image: (n, channels, side, side) → (n, outputs).

    A block is h + ε·attention(norm(h)), then h + ε·mlp(norm(h)) with `width` hidden units. The mean over tokens is normalised
    before the head. ``patch=1`` makes every pixel a token. Without learned `positions` the output does not depend on the
    order of the patches. The rest as `res_mlp`.
    """
    _check(
        epsilon,
        width=width,
        depth=depth,
        side=side,
        patch=patch,
        channels=channels,
        outputs=outputs,
        heads=heads,
    )
    if side % patch or width % heads:
        raise ValueError(f"patch {patch} must divide side {side}, and heads {heads} width {width}")
    with torch.random.fork_rng(devices=[]):
        blocks: list[nn.Module] = []
        for _ in range(depth):
            first, end = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
            mlp = Branch(first, activation, end, norm=Norm(width))
            blocks.append(Residual(epsilon, attention=Attention(width, heads, bias), mlp=mlp))
        read = Patches(channels, side, patch, width, positions, bias)
        net = ResidualNet(read, blocks, nn.Linear(width, outputs, bias=bias), NormOfMean(width))
    return _finish(net, seed, dtype)


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
    """A state-space model over the rows of an image: (n, channels, T, side) → (n, outputs) with channels · side = inputs.

    A block is h_t + ε·branch_end(φ(z_t)) with z_t = a ⊙ z_{t−1} + first(h_t): the recurrence is diagonal and linear and its
    weights are shared by all times. The head reads the last time. With ``activation="linear"`` the whole net is linear.

    Parameters
    ----------
    width, depth, outputs, activation, epsilon, bias, seed, dtype
        As `res_mlp`.
    inputs : int
        Numbers per time step.
    states : int, optional
        Dimension of z; by default `width`.
    decays : (float, float)
        Smallest and largest a at the start, strictly between 0 and 1; the states' are spaced evenly between them.
    """
    states = width if states is None else states
    _check(epsilon, width=width, depth=depth, inputs=inputs, states=states, outputs=outputs)
    low, high = decays
    if not 0 < low <= high < 1:
        raise ValueError(
            f"decays are {decays}; expected 0 < smallest ≤ largest < 1, where the recurrence contracts"
        )
    with torch.random.fork_rng(devices=[]):
        start = torch.linspace(low, high, states, dtype=torch.float64)
        blocks: list[nn.Module] = [
            Residual(epsilon, recurrence=Recurrence(width, states, start, activation, bias))
            for _ in range(depth)
        ]
        read, head = Rows(inputs, width, bias=bias), nn.Linear(width, outputs, bias=bias)
        net = ResidualNet(read, blocks, head, Last())
    return _finish(net, seed, dtype)


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

    A block adds ε times a two-layer net along the tokens (`hidden` units, by default as many as tokens), then ε times one
    along the channels, each of a layer norm of h. The rest as `transformer`.
    """
    _check(
        epsilon,
        width=width,
        depth=depth,
        side=side,
        patch=patch,
        channels=channels,
        outputs=outputs,
    )
    if side % patch:
        raise ValueError(f"patch {patch} must divide side {side}")
    tokens = (side // patch) ** 2
    units = tokens if hidden is None else hidden
    _check(epsilon, hidden=units)
    with torch.random.fork_rng(devices=[]):
        blocks: list[nn.Module] = []
        for _ in range(depth):
            along = Branch(
                nn.Linear(tokens, units, bias=bias), activation, nn.Linear(units, tokens, bias=bias)
            )
            first, end = nn.Linear(width, width, bias=bias), nn.Linear(width, width, bias=bias)
            across = Branch(first, activation, end, norm=Norm(width))
            blocks.append(Residual(epsilon, tokens=Transposed(Norm(width), along), channels=across))
        read = Patches(channels, side, patch, width, False, bias)
        net = ResidualNet(read, blocks, nn.Linear(width, outputs, bias=bias), NormOfMean(width))
    return _finish(net, seed, dtype)
