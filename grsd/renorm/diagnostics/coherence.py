"""Diagnostics D2 and D3: how much the blocks of J overlap, and how large J and J̇ are.

D2, Condition 2 of 2512.18209: ‖J^(l)∗J^(m)‖ by block distance. It is the square root of
λ_max(M^(l)M^(m)), so only the ranges of the blocks in function space matter, not their parameters.
D3, Condition 3: ‖J‖ + ‖J̇‖. Both are taken from T × T matrices where they are at hand, and by
Lanczos iteration on products otherwise.

Invariances. Normalised, D2 keeps its value under scales of outputs, loss and time, orders of units
and samples, and, without biases, under a rescaling of layers that keeps the function of a ReLU net.
‖J‖ and ‖J̇‖ keep theirs under orders alone: outputs and targets times a give a and a³, a loss times
a gives 1 and a, and the rescaling changes both without bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from grsd.renorm.diagnostics.block_matrices import BlockMatrices
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.spectrum.operator.layers import coherence

__all__ = ["BlockCoherence", "Size", "block_coherence", "size"]


@dataclass(frozen=True)
class BlockCoherence:
    """‖J^(l)∗J^(m)‖ of every pair of blocks."""

    names: tuple[str, ...]  # the L blocks
    norms: np.ndarray  # (L, L), symmetric; the diagonal is ‖J^(l)‖²
    passes: int  # forward passes spent; 0 when it was read from T × T matrices

    @property
    def normalized(self) -> np.ndarray:
        """(L, L), ‖J^(l)∗J^(m)‖/(‖J^(l)‖‖J^(m)‖) in [0, 1].

        1 if the two largest directions agree, 0 if the ranges are orthogonal.
        """
        sizes = np.sqrt(np.diag(self.norms))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.norms / np.outer(sizes, sizes)

    def by_distance(self, normalized: bool = False) -> np.ndarray:
        """u_k = max over |l − m| = k, (L,): the smallest sequence that Condition 2 would accept."""
        values = self.normalized if normalized else self.norms
        return np.array([np.nanmax(np.diagonal(values, k)) for k in range(len(values))])

    @property
    def total(self) -> float:
        """Σ_{k≥1} u_k, what Condition 2 wants bounded as the depth grows."""
        return float(self.by_distance()[1:].sum())


@dataclass(frozen=True)
class Size:
    """‖J‖ and ‖J̇‖ as operators between parameters and functions, with ⟨u, v⟩ = (1/n) Σ uv."""

    jacobian: float  # ‖J‖ = √λ_max(M), output per unit of parameter
    rate: float  # ‖J̇‖, the same per time
    passes: int

    @property
    def total(self) -> float:
        """‖J‖ + ‖J̇‖, what Condition 3 bounds. The sum depends on the unit of time."""
        return self.jacobian + self.rate

    @property
    def clock(self) -> float:
        """‖J̇‖/‖J‖, 1/time: free of the scale of the outputs."""
        return self.rate / self.jacobian


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    # rounding, whose root would be 1e-8
    least = len(values) * np.finfo(float).eps * max(float(values[-1]), 0.0)
    return (vectors * np.sqrt(np.where(values > least, values, 0.0))) @ vectors.T


def block_coherence(
    blocks: Blocks, *, matrices: BlockMatrices | None = None, rtol: float = 1e-8
) -> BlockCoherence:
    """Measure D2 at one instant.

    From `matrices` of the same blocks the norms are exact. Otherwise each pair is iterated, at most
    200 Lanczos steps, until the residual of the largest Ritz pair is `rtol` of it; the norm is then
    right to about rtol². Cost: L(L + 1)/2 pairs, 16 forward passes a step, 5 to 20 steps. Source:
    2512.18209, Condition 2.

    Raises
    ------
    RuntimeError
        Not converged.
    """
    before, count = blocks.passes, len(blocks)
    norms = np.zeros((count, count))
    if matrices is not None:
        # ‖J^(l)∗J^(m)‖ is that of the product of the roots of M^(l) and M^(m)
        roots = [_root(kernel) for kernel in matrices.kernels]
        for i in range(count):
            for m in range(i, count):
                norms[i, m] = norms[m, i] = np.linalg.norm(roots[i] @ roots[m], 2)
        return BlockCoherence(blocks.names, norms, 0)
    kernels = [blocks.kernel(i) for i in range(count)]
    for i in range(count):
        norms[i, i] = _largest(kernels[i].__matmul__, blocks, rtol)
        for m in range(i):
            norms[i, m] = norms[m, i] = coherence(kernels[i], kernels[m], steps=200, rtol=rtol)
    return BlockCoherence(blocks.names, norms, blocks.passes - before)


def size(blocks: Blocks, *, matrices: BlockMatrices | None = None, rtol: float = 1e-10) -> Size:
    """Measure D3 at one instant.

    From T × T matrices, or by Lanczos on J J∗ and J̇ J̇∗ to relative accuracy `rtol`. Iterated
    cost: 8 forward passes a step for ‖J‖ and 26 for ‖J̇‖, about 20 steps each. Source: 2512.18209,
    Condition 3.
    """
    before = blocks.passes

    def moved(u: Tensor) -> Tensor:
        return blocks.rate_jvp(blocks.rate_vjp(u)) / blocks.samples

    if matrices is not None:
        pair = (matrices.kernel, matrices.rates.sum(axis=0))
        largest = [max(0.0, float(np.linalg.eigvalsh(a)[-1])) for a in pair]
    else:
        largest = [_largest(a, blocks, rtol) for a in (blocks.kernel().__matmul__, moved)]
    return Size(math.sqrt(largest[0]), math.sqrt(largest[1]), blocks.passes - before)


def _largest(product: Callable[[Tensor], Tensor], blocks: Blocks, rtol: float) -> float:
    """The largest eigenvalue of a positive semidefinite operator on (T,) vectors."""
    count = blocks.size

    def on_numpy(u: np.ndarray) -> np.ndarray:
        vector = torch.as_tensor(u.reshape(-1), dtype=blocks.dtype, device=blocks.device)
        return product(vector).to("cpu", torch.float64).numpy()

    start = np.random.default_rng(0).standard_normal(count)
    if count < 3:  # too few for ARPACK
        dense = np.stack([on_numpy(unit) for unit in np.eye(count)])
        return max(0.0, float(np.linalg.eigvalsh((dense + dense.T) / 2)[-1]))
    if not on_numpy(start).any():
        return 0.0
    operator = LinearOperator((count, count), matvec=on_numpy, dtype=np.float64)
    accuracy = max(rtol, 10 * torch.finfo(blocks.dtype).eps)
    values = eigsh(operator, k=1, v0=start, tol=accuracy, return_eigenvectors=False)
    return max(0.0, float(values[0]))
