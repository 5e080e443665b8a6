"""The T × T matrices of a model in blocks: what J and J̇ say in function space.

From M^(l) = J^(l)J^(l)∗, S^(l) = J̇^(l)J^(l)∗ and R^(l) = J̇^(l)J̇^(l)∗ follow M = Σ M^(l), Ṁ = Σ
(S^(l) + S^(l)∗), every norm and every overlap of two blocks. They serve batches of up to about a
thousand rows; beyond, the diagnostics iterate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from grsd.dynamics.modes import Modes, modes
from grsd.renorm.diagnostics.blocks import Blocks

__all__ = ["BlockMatrices", "block_matrices"]


@dataclass(frozen=True)
class BlockMatrices:
    """M^(l), S^(l) and R^(l) of every block at one instant, float64, with the 1/n of J∗."""

    names: tuple[str, ...]  # the L blocks
    kernels: np.ndarray  # (L, T, T), M^(l)
    cross: np.ndarray  # (L, T, T), S^(l) = J̇^(l)J^(l)∗
    rates: np.ndarray  # (L, T, T), R^(l)
    drive: np.ndarray  # (T,), −n ∂L/∂f; for regression the error e
    eps: float  # unit of rounding of the arithmetic that they were made in

    @property
    def kernel(self) -> np.ndarray:
        """M, (T, T)."""
        return self.kernels.sum(axis=0)

    @property
    def kernel_rate(self) -> np.ndarray:
        """Ṁ, (T, T)."""
        half = self.cross.sum(axis=0)
        return half + half.T

    @property
    def floor(self) -> float:
        """100 T ε λ_max: below it an eigenvector of M is rounding."""
        return 100 * len(self.drive) * self.eps * float(np.linalg.norm(self.kernel, 2))

    def modes(self) -> Modes:
        """Return M, Ṁ and the drive in the eigenbasis of M."""
        return modes(self.kernel, self.kernel_rate, self.drive, floor=self.floor)


def block_matrices(blocks: Blocks, *, budget: int = 2**26) -> BlockMatrices:
    """Compute M^(l), S^(l) and R^(l) of every block.

    `budget` is how many numbers the rows of J and J̇ may take at a time. Where T·P exceeds it,
    blocks are taken in groups, and each group costs the passes again; a single block takes T·p_l in
    any case. Cost: T gradients and T Hessian products a group, 10 T forward passes, and T²·P
    multiplications.
    """
    size, count = blocks.size, len(blocks)
    kernels, cross, rates = np.empty((3, count, size, size))
    start = 0
    while start < count:
        # as many blocks as the budget holds
        stop, held = start + 1, 2 * size * blocks.sizes[start]
        while stop < count and held + 2 * size * blocks.sizes[stop] <= budget:
            held += 2 * size * blocks.sizes[stop]
            stop += 1
        group = slice(start, stop)
        pairs = zip(blocks.jacobian(group), blocks.rate(group), strict=True)
        for index, (j, rate) in enumerate(pairs, start):
            for out, product in ((kernels, j @ j.T), (cross, rate @ j.T), (rates, rate @ rate.T)):
                out[index] = product.to("cpu", torch.float64).numpy() / blocks.samples
        start = stop
    kernels, rates = ((a + a.transpose(0, 2, 1)) / 2 for a in (kernels, rates))
    drive = blocks.drive.to("cpu", torch.float64).numpy()
    return BlockMatrices(blocks.names, kernels, cross, rates, drive, torch.finfo(blocks.dtype).eps)
