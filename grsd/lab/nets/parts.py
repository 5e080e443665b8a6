"""Parts of the families: residual branches, attention, recurrence, patches, norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from grsd.lab.nets import models

Layer = nn.Module
Map = Callable[[Tensor], Tensor]


class Norm(nn.LayerNorm):
    """Layer normalisation in plain tensor operations: PyTorch's has a wrong second derivative in
    forward mode (#196699)."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - input.mean(-1, keepdim=True)
        scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return scaled * self.weight + self.bias if self.bias is not None else scaled * self.weight


class ResidualNet(nn.Module):
    """``head(pool(blocks(read(x))))``. Attributes: read, blocks (ModuleList), head."""

    def __init__(self, read: Layer, blocks: Iterable[Layer], head: Layer, pool: Map) -> None:
        super().__init__()
        self.read, self.blocks, self.pool = read, nn.ModuleList(blocks), pool
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        h = self.read(inputs)
        for block in self.blocks:
            h = block(h)
        return self.head(self.pool(h))


class Branch(nn.Module):
    """What one residual branch adds: branch_end(φ(h)) for one layer, branch_end(φ(first(h))) for
    two; with a norm, of norm(h)."""

    def __init__(
        self, first: Layer | None, activation: str, branch_end: Layer, norm: Layer | None = None
    ) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm
        if first is not None:
            self.first = first
        self.activation = models.activation_of(activation)
        self.branch_end = branch_end

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.children():  # in the order of __init__
            h = layer(h)
        return h


class Residual(nn.Module):
    """h + ε·branch(h) for each of its branches in turn; without the skip, ε·branch(h)."""

    def __init__(self, epsilon: float, skip: bool = True, **branches: nn.Module) -> None:
        super().__init__()
        self.epsilon, self.skip = epsilon, skip
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, h: Tensor) -> Tensor:
        for branch in self.children():
            h = self.skip * h + self.epsilon * branch(h)
        return h


class Attention(nn.Module):
    """Attention of every token to all, softmax(q kᵀ/√d) v, of a norm of h (n, tokens, width)."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.query, self.key, self.value, self.branch_end = (
            nn.Linear(width, width, bias=bias) for _ in range(4)
        )

    def forward(self, h: Tensor) -> Tensor:
        n, tokens, width = h.shape
        d = width // self.heads
        h = self.norm(h)
        q, k, v = (
            layer(h).view(n, tokens, self.heads, d).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d), dim=-1)
        return self.branch_end((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class Transposed(nn.Module):
    """A branch that acts along the tokens of (n, tokens, width)."""

    def __init__(self, norm: Layer, inner: Branch) -> None:
        super().__init__()
        self.norm = norm
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(self.norm(h).transpose(1, 2)).transpose(1, 2)


class Recurrence(nn.Module):
    """branch_end(φ(z)) with z_t = a ⊙ z_{t−1} + first(h_t), z_{−1} = 0: one diagonal linear system,
    the same at every time.

    Computed as the causal convolution z_t = Σ_s a^(t−s) first(h_s). Each a = σ(decay) lies in (0,
    1).
    """

    def __init__(
        self, width: int, states: int, decays: Tensor, activation: str, bias: bool
    ) -> None:
        super().__init__()
        self.first = nn.Linear(width, states, bias=bias)
        self.decay = nn.Parameter(torch.logit(decays))
        self.activation = models.activation_of(activation)
        self.branch_end = nn.Linear(states, width, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        steps = torch.arange(h.shape[1], device=h.device)
        lag = (steps[:, None] - steps[None, :]).to(h.dtype)  # (T, T)
        log_a = nn.functional.logsigmoid(self.decay)[:, None, None]
        powers = torch.exp(log_a * lag.clamp(min=0)) * (lag >= 0)  # (states, T, T)
        z = torch.einsum("kts,nsk->ntk", powers, self.first(h))
        return self.branch_end(self.activation(z))


class Flatten(nn.Linear):
    """(n, …) → (n, features), then a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(1))


class Patches(nn.Module):
    """Images (n, channels, side, side) → tokens (n, (side/patch)², width): one linear map of every
    patch, plus positions."""

    def __init__(
        self, channels: int, side: int, patch: int, width: int, positions: bool, bias: bool
    ) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * patch**2, width, bias=bias)
        table = torch.empty((side // patch) ** 2, width)
        self.positions = nn.Parameter(table) if positions else None

    def forward(self, images: Tensor) -> Tensor:
        cut = nn.functional.unfold(images, self.patch, stride=self.patch)  # row by row
        tokens = self.linear(cut.transpose(1, 2))
        return tokens if self.positions is None else tokens + self.positions


class Rows(nn.Linear):
    """Images (n, channels, T, side) → T rows, each through a linear layer: (n, T, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2).flatten(2))


def last(h: Tensor) -> Tensor:
    """The last of the tokens of (n, tokens, width)."""
    return h[:, -1]


class NormOfMean(nn.Module):
    """The layer norm of the mean over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h.mean(1))
