"""Conditions 1 and 2 apart, where no block vanishes: f = (θ₁, θ₂ + θ₁(θ₂ − ½)) at (0, ½)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem
from grsd.renorm.diagnostics.bandedness import bandedness
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.coherence import block_coherence


class Bent(nn.Module):
    """Two outputs on one-hot inputs, so that J is the identity at (0, `second`) for ½."""

    def __init__(self, second: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.second = nn.Parameter(torch.full((1,), second, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.first, self.second + self.first * (self.second - 0.5)])


class Vanishing(nn.Module):
    """f = θ₁θ₂x at (1, `second`): J⁽¹⁾ = θ₂x is zero at θ₂ = 0 and nowhere else."""

    def __init__(self, second: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.second = nn.Parameter(torch.full((1,), second, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.first * self.second).sum(1)


def blocks(net: nn.Module) -> Blocks:
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    return Blocks.of(Problem(net, x, y), split=["first", "second"])


def test_all_motion_comes_from_the_other_block_and_no_function_is_shared() -> None:
    """∂J⁽¹⁾/∂θ₁ = 0 and ∂J⁽²⁾/∂θ₂ = 0, J⁽¹⁾ = (1, 0), J⁽²⁾ = (0, 1): tail 1, coherence 0 of 1."""
    bent = blocks(Bent())
    found = bandedness(bent)
    np.testing.assert_allclose(found.tails[:, 0], 1.0, rtol=1e-12)
    pairs = block_coherence(bent)
    assert abs(pairs.normalized[0, 1]) < 1e-12
    np.testing.assert_allclose(np.diagonal(pairs.normalized), 1.0, rtol=1e-12)
    # elsewhere J⁽¹⁾ = (1, θ₂ − ½): the cosine with (0, 1) for θ₁ = 0
    off = block_coherence(blocks(Bent(0.75))).normalized[0, 1]
    assert off == pytest.approx(0.25 / np.hypot(1, 0.25), rel=1e-10)


def test_a_block_that_is_nearly_zero_is_not_incoherent() -> None:
    """Beside θ₂ = 0, where J⁽¹⁾ vanishes, both blocks span one function: the product is small, its cosine 1."""
    pairs = block_coherence(blocks(Vanishing(1e-6)))
    assert pairs.normalized[0, 1] == pytest.approx(1.0, rel=1e-9)
