"""The change of a linear residual network's features, term by term, and the upper bounds that the spectral condition is made of.

A block adds α·(W_k(…(W₁h + b₁)…) + b_k). After one step every W and b has its Δ, and since the block is linear in each of them, its change is
a sum of products in which each factor is either the old one or its Δ. That is the expansion of 2603.00541, equations (5), (16), (17), (19). `expand`
computes every product, so that the triangle inequality and submultiplicativity can be compared with what they bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grsd.mup.norms import rms_norm, rms_operator_norm

__all__ = ["Expansion", "LinearStack", "Term", "descend", "expand", "gradient_step", "random_stack"]


@dataclass(frozen=True)
class LinearStack:
    """h₀, and blocks h + α·(W_k(…(W₁h + b₁)…) + b_k), as tensors.

    Attributes
    ----------
    start : (n,), h₀.
    blocks : per block its W₁ … W_k, each (n, n).
    biases : per block its b₁ … b_k, each (n,), or empty.
    alpha : float, one multiplier for all blocks.
    """

    start: Tensor
    blocks: tuple[tuple[Tensor, ...], ...]
    alpha: float
    biases: tuple[tuple[Tensor, ...], ...] = ()

    @property
    def layers(self) -> int:
        """k."""
        return len(self.blocks[0])

    def features(self) -> Tensor:
        """Return h₀ … h_L, (L+1, n)."""
        h = [self.start]
        for l, weights in enumerate(self.blocks):  # noqa: E741
            z = h[-1]
            for i, W in enumerate(weights):
                z = W @ z + (self.biases[l][i] if self.biases else 0.0)
            h.append(h[-1] + self.alpha * z)
        return torch.stack(h)

    def plus(self, other: LinearStack) -> LinearStack:
        """Return the stack whose every tensor is the sum of the two."""
        blocks = tuple(
            tuple(a + b for a, b in zip(x, y, strict=True))
            for x, y in zip(self.blocks, other.blocks, strict=True)
        )
        biases = tuple(
            tuple(a + b for a, b in zip(x, y, strict=True))
            for x, y in zip(self.biases, other.biases, strict=True)
        )
        return LinearStack(self.start + other.start, blocks, self.alpha, biases)


@dataclass(frozen=True)
class Term:
    """One kind of product, in every block.

    Attributes
    ----------
    source : 0 when the product acts on features, i when on bᵢ.
    changed : which of the k layers carry a Δ (for a bias its own index means Δbᵢ).
    values : (L, n), the products, with α.
    bound : float, Σ over blocks of α ∏‖·‖_R: what submultiplicativity makes of Σ‖values‖_R.
    """

    source: int
    changed: tuple[int, ...]
    values: Tensor
    bound: float

    @property
    def order(self) -> int:
        """How many factors carry a Δ."""
        return len(self.changed)

    @property
    def size(self) -> float:
        """‖Σ_l values‖_R."""
        return float(rms_norm(self.values.sum(0)))

    @property
    def triangle(self) -> float:
        """Σ_l ‖values_l‖_R, what the triangle inequality makes of `size`."""
        return float(rms_norm(self.values).sum())


@dataclass(frozen=True)
class Expansion:
    """Δh_L in its terms. `terms` are the products; the rest of Δh_L is Δh₀."""

    terms: tuple[Term, ...]
    start: Tensor
    change: Tensor

    def of(self, order: int, source: int | None = None) -> list[Term]:
        """Return the terms with so many Δ, of all sources or one."""
        return [t for t in self.terms if t.order == order and source in (None, t.source)]

    def size(self, order: int) -> float:
        """Return ‖·‖_R of the sum of all terms of one order."""
        return float(
            rms_norm(sum((t.values.sum(0) for t in self.of(order)), torch.zeros_like(self.start)))
        )

    @property
    def defect(self) -> float:
        """‖Δh_L − Δh₀ − Σ terms‖_R / ‖Δh_L‖_R: rounding, if the expansion is one."""
        total = self.start + sum(t.values.sum(0) for t in self.terms)
        return float(rms_norm(self.change - total) / rms_norm(self.change))


def expand(stack: LinearStack, step: LinearStack) -> Expansion:
    """Return the expansion of the change of h_L when every tensor of `stack` gets the one of `step` added.

    Zero-order terms act on Δh_{l−1}, all others on h_{l−1} + Δh_{l−1}: then the sum is exact.

    Notes
    -----
    Cost: 2^k products of k matrices with a vector for each block, 2^{k+1} with biases, and 2k operator norms.
    """
    if (
        stack.layers != step.layers
        or len(stack.blocks) != len(step.blocks)
        or bool(stack.biases) != bool(step.biases)
    ):
        raise ValueError("the step has other layers, blocks or biases than the stack")
    before, after, k = stack.features(), stack.plus(step).features(), stack.layers
    moved = after - before
    norms = [[[rms_operator_norm(W) for W in ws] for ws in s.blocks] for s in (stack, step)]
    found = []
    for source in range(k + 1 if stack.biases else 1):
        free = range(
            max(source, 1), k + 1
        )  # factors: W₁ … W_k of features; bᵢ, W_{i+1} … W_k of a bias
        for order in range(len(free) + 1):
            for changed in itertools.combinations(free, order):
                if source and not changed:
                    continue  # unchanged factors of a bias do not move
                values, bound = [], 0.0
                for l in range(len(stack.blocks)):  # noqa: E741
                    both = (stack.blocks[l], step.blocks[l])
                    if source:
                        z = (step if source in changed else stack).biases[l][source - 1]
                    else:
                        z = after[l] if changed else moved[l]
                    size = float(rms_norm(z))
                    for i in range(source + 1, k + 1):
                        new = int(i in changed)
                        z, size = both[new][i - 1] @ z, size * norms[new][l][i - 1]
                    values.append(stack.alpha * z)
                    bound += stack.alpha * size
                found.append(Term(source, changed, torch.stack(values), bound))
    return Expansion(tuple(found), moved[0], moved[-1])


def random_stack(
    width: int,
    depth: int,
    layers: int,
    alpha: float,
    *,
    seed: int,
    bias: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> LinearStack:
    """Return a stack with ‖h₀‖_R = 1, entries of W of variance 1/width, and biases of ‖b‖_R about `bias` (None: no biases)."""
    if min(width, depth, layers) < 1 or not math.isfinite(alpha):
        raise ValueError(
            f"need positive sizes and a finite α, got {width}, {depth}, {layers}, {alpha}"
        )
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    start = draw(width)
    blocks = tuple(
        tuple(draw(width, width) / math.sqrt(width) for _ in range(layers)) for _ in range(depth)
    )
    biases = (
        ()
        if bias is None
        else tuple(tuple(bias * draw(width) for _ in range(layers)) for _ in range(depth))
    )
    return LinearStack(start / rms_norm(start), blocks, alpha, biases)


def descend(
    stack: LinearStack,
    output: Tensor,
    *,
    weights: float,
    biases: float = 0.0,
    start: float = 0.0,
    steps: int = 1,
) -> LinearStack:
    """Return the sum of several `gradient_step`, each at the place that the last one led to."""
    total, now = None, stack
    for _ in range(steps):
        step = gradient_step(now, output, weights=weights, biases=biases, start=start)
        now, total = now.plus(step), step if total is None else total.plus(step)
    if total is None:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return total


def gradient_step(
    stack: LinearStack, output: Tensor, *, weights: float, biases: float = 0.0, start: float = 0.0
) -> LinearStack:
    """Return a step down the gradient of −⟨output, h_L⟩/n whose every tensor has the norm that is asked for.

    Parameters
    ----------
    output : (n,), what h_L is paired with.
    weights, biases, start : ‖ΔW‖_R, ‖Δb‖_R, ‖Δh₀‖_R. Directions are those of the gradient: of rank one for the weights, as an update of any
        optimizer of the paper at its first step on one sample.
    """
    tensors = [stack.start, *itertools.chain(*stack.blocks), *itertools.chain(*stack.biases)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    rest: Sequence[Tensor] = leaves[1:]
    k, count = stack.layers, len(stack.blocks) * stack.layers

    def group(flat: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(flat[i : i + k]) for i in range(0, len(flat), k))

    live = LinearStack(leaves[0], group(rest[:count]), stack.alpha, group(rest[count:]))
    value = (output * live.features()[-1]).mean()
    G = torch.autograd.grad(value, leaves)

    def scaled(g: Tensor, size: float) -> Tensor:
        norm = (
            float(rms_norm(g)) if g.ndim == 1 else float(torch.linalg.matrix_norm(g))
        )  # square, of rank one
        return g * (size / norm) if norm > 0 else torch.zeros_like(g)

    new = [scaled(g, weights) for g in G[1 : count + 1]]
    return LinearStack(
        scaled(G[0], start),
        group(new),
        stack.alpha,
        group([scaled(g, biases) for g in G[count + 1 :]]),
    )
