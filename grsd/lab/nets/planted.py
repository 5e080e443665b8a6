"""Networks that D1 and D2 of :mod:`grsd.renorm` must call local, coherent, or neither.

All keep their blocks in one ModuleList `blocks`, give one output per sample, shape (n, 1), and come
in float64. A deep linear chain is `mlp` of :mod:`grsd.lab.nets.models` with
``activation="identity"``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from grsd.lab.nets.models import drawn, mlp, undrawn


class SumOfNets(nn.Module):
    """f = Σ_l f_l(x; θ_l): no block moves another's Jacobian, G_lm = 0 for m ≠ l, B(0) = 0."""

    def __init__(
        self, inputs: int, width: int, blocks: int, *, seed: int, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            mlp([inputs, width, 1], activation, seed=seed + k) for k in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum(0)


class GroupedNets(SumOfNets):
    """f(x_i) = f_l(x_i; θ_l) with l = i modulo L: ranges at right angles, coherence 0."""

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([block(x) for block in self.blocks])  # (L, n, 1)
        group = torch.arange(len(x), device=x.device) % len(self.blocks)
        return each[group, torch.arange(len(x), device=x.device)]


class NeighbourChain(nn.Module):
    """f = Σ_l ⟨tanh(W_l x), tanh(W_{l+1} x)⟩/width: blocks move their neighbours' Jacobians and no
    others, B(1) = 0 < B(0)."""

    def __init__(self, inputs: int, width: int, blocks: int, *, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_linear(inputs, width) for _ in range(blocks))
        drawn(self, seed, torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        features = [torch.tanh(block(x)) for block in self.blocks]
        terms = [(a * b).mean(-1, keepdim=True) for a, b in pairwise(features)]
        return torch.stack(terms).sum(0)


class TiedNet(nn.Module):
    """f = a · tanh(W tanh(W … tanh(R x))) with W used `uses` times; with ``tied=False`` every use
    has its own copy, of equal value."""

    def __init__(self, inputs: int, width: int, uses: int, *, seed: int, tied: bool = True) -> None:
        super().__init__()
        whole = mlp([inputs, width, width, 1], seed=seed, bias=False)
        read, middle, head = (layer for layer in whole if isinstance(layer, nn.Linear))
        self.read, self.head, self.uses = read, head, uses
        self.blocks = nn.ModuleList([middle])
        for _ in range(0 if tied else uses - 1):
            copy = _linear(width, width)
            copy.load_state_dict(middle.state_dict())
            self.blocks.append(copy)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.read(x))
        for k in range(self.uses):
            h = torch.tanh(self.blocks[k % len(self.blocks)](h))
        return self.head(h)


def _linear(inputs: int, width: int) -> nn.Linear:
    with undrawn():
        return nn.Linear(inputs, width, bias=False, dtype=torch.float64)


def smooth_task(samples: int, inputs: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return Gaussian inputs (n, inputs) and a smooth target (n,), float64, of variance near 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, dtype=torch.float64, generator=generator)
    return x, torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1] * x[:, 2]
