"""Residual and plain tanh networks as stacks of equal layers: M and Ṁ without a Jacobian.

For a weight matrix W with inputs a_i and backward signals δ_i (one per sample), the row of J that
belongs to W is δ_i ⊗ a_i. So its share of M = JJᵀ/n is (δδᵀ) ∘ (aaᵀ)/n: two Gram matrices of n
samples, whatever the number of parameters. Ṁ is the derivative of that expression in forward mode.
`grsd.dynamics.problem.Problem` gives the same numbers for any network and is its test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from grsd.lab.nets.architectures import res_mlp
from grsd.lab.nets.models import mlp

Weights = tuple[Tensor, ...]  # read (w, d), blocks (L, w, w) in one or two tensors, head (w,)
CHUNK = 32  # layers whose Gram matrices are in memory at a time


@dataclass(frozen=True)
class TanhStack:
    """A network h ← skip·h + ε·W tanh(h), or W tanh(V h), between read and head, on fixed data.

    Conventions as in `grsd.dynamics.problem`: e = target − output, M = JJᵀ/n, θ̇ = Jᵀe/n.

    ``start`` is read (w, d), then (L, w, w) for W, or V and W, then head (w,).
    """

    start: Weights
    inputs: Tensor  #: (n, d)
    targets: Tensor  #: (n,)
    epsilon: float
    skip: float  #: 1 for residual networks, 0 (and ε = 1) for plain ones
    closed: bool  #: the head reads tanh(h), as in plain networks, not h

    @classmethod
    def residual(
        cls, inputs: Tensor, targets: Tensor, *, epsilon: float, layers: int = 1, **shape: int
    ) -> TanhStack:
        """The network of `architectures.res_mlp` with tanh and no bias, weight for weight.

        `shape` has its width, depth and seed.
        """
        known: dict[str, Any] = {"inputs": inputs.shape[1], "layers": layers, **shape}
        net = res_mlp(epsilon=epsilon, **known)
        blocks: list[nn.Module] = list(net.blocks)
        names = ("branch.first.weight", "branch.branch_end.weight")[2 - layers :]
        middle = [torch.stack([block.get_parameter(name) for block in blocks]) for name in names]
        read, head = (net.get_parameter(f"{name}.weight") for name in ("read", "head"))
        start = _on(inputs, read, *middle, head[0])
        return cls(start, inputs, targets, epsilon, skip=1.0, closed=False)

    @classmethod
    def plain(
        cls, inputs: Tensor, targets: Tensor, *, width: int, depth: int, seed: int
    ) -> TanhStack:
        """The network of `models.mlp` with `depth` hidden layers and no bias, weight for weight."""
        net = mlp([inputs.shape[1], *[width] * depth, 1], seed=seed, bias=False)
        read, *middle, head = [weight.detach() for weight in net.parameters()]
        blocks = torch.stack(middle) if middle else read.new_zeros(0, width, width)
        return cls(_on(inputs, read, blocks, head[0]), inputs, targets, 1.0, skip=0.0, closed=True)

    def _pairs(self, at: Weights) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
        """The output (n,), and (δ, a, index of the tensor) of every matrix, from head to read."""
        read, *middle, head = at
        levels = list(zip(*middle, strict=True))
        # forward: keep what every matrix reads
        h, saved = self.inputs @ read.T, []
        for level in levels:
            inner = [torch.tanh(h)] if len(level) == 1 else [h, torch.tanh(h @ level[0].T)]
            h = self.skip * h + self.epsilon * (inner[-1] @ level[-1].T)
            saved.append(inner)
        last = torch.tanh(h) if self.closed else h
        # backward: δ of the head is 1
        pairs = [(torch.ones_like(last[:, :1]), last, len(at) - 1)]
        back = head.expand_as(last)
        if self.closed:
            back = back * (1 - last**2)
        for level, inner in zip(reversed(levels), reversed(saved), strict=True):
            signal = self.epsilon * back
            for index in range(len(level) - 1, -1, -1):
                pairs.append((signal, inner[index], index + 1))
                signal = signal @ level[index]
                if index == len(level) - 1:  # its input is a tanh; the input of V is h itself
                    signal = signal * (1 - inner[index] ** 2)
            back = self.skip * back + signal
        pairs.append((back, self.inputs, 0))
        return last @ head, pairs

    def error(self, at: Weights) -> Tensor:
        """Return e = target − output, (n,)."""
        return self.targets - self._pairs(at)[0]

    def loss(self, at: Weights) -> float:
        """Return ½⟨e, e⟩."""
        return 0.5 * float(self.error(at).square().mean())

    def velocity(self, at: Weights) -> Weights:
        """Return θ̇ = Jᵀe/n in the shape of the weights. Cost: a forward and a backward pass."""
        output, pairs = self._pairs(at)
        weight = (self.targets - output)[:, None] / len(output)
        rates: list[list[Tensor]] = [[] for _ in at]
        for signal, a, index in reversed(pairs):
            rates[index].append((weight * signal).T @ a)
        read, *middle, head = rates
        stacks = zip(middle, at[1:-1], strict=True)
        blocks = [torch.stack(rows) if rows else torch.zeros_like(w) for rows, w in stacks]
        return (read[0], *blocks, head[0][0])

    def _signals(self, at: Weights) -> list[Tensor]:
        """δ, a, δ, a, … of head, read and blocks, these stacked: each (layers, n, width)."""
        head, *middle, read = self._pairs(at)[1]
        signals = [part[None] for delta, a, _ in (head, read) for part in (delta, a)]
        if middle:
            deltas, inputs, _ = zip(*middle, strict=True)
            signals += [torch.stack(deltas), torch.stack(inputs)]
        return signals

    def kernel(self, at: Weights) -> Tensor:
        """Return M = JJᵀ/n, (n, n). Cost: two Gram matrices per weight matrix."""
        return _gram(self._signals(at)) / len(self.inputs)

    def kernel_rate(
        self, at: Weights, direction: Weights | None = None, *, block: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return M and Ṁ along θ̇, or `direction`, each (n, n). Cost: three times that of `kernel`.

        With `block` = 0, 1, …, counted from the input: the part M^(ℓ) = J^(ℓ)J^(ℓ)ᵀ/n of that
        residual block and its derivative.
        """
        along = self.velocity(at) if direction is None else direction
        signals, moved = jvp(lambda *theta: tuple(self._signals(theta)), at, along)[:2]
        if block is not None:
            depth, matrices = len(at[1]), len(at) - 2
            if not 0 <= block < depth:
                raise ValueError(f"block is {block}; this network has blocks 0 to {depth - 1}")
            # the last two entries are those of the blocks, from the output down
            here = slice((depth - 1 - block) * matrices, (depth - block) * matrices)
            signals, moved = ([part[here] for part in parts[-2:]] for parts in (signals, moved))
        n = len(self.inputs)
        return _gram(signals) / n, _gram(signals, moved) / n

    def descended(self, remaining: float, limit: int = 50_000) -> Weights:
        """Return θ where gradient descent first has this share of the first loss.

        ηλ_max = ½, with λ_max anew every 50 steps. ArithmeticError after `limit` steps.
        """
        at, goal, rate = self.start, remaining * self.loss(self.start), 0.0
        for step in range(limit):
            if self.loss(at) <= goal:
                return at
            if step % 50 == 0:
                rate = 0.5 / float(torch.linalg.eigvalsh(self.kernel(at))[-1])
            at = tuple(weight + rate * v for weight, v in zip(at, self.velocity(at), strict=True))
        wanted = f"{remaining} of its first loss in {limit} steps"
        raise ArithmeticError(f"gradient descent has not reached {wanted}")


def _on(inputs: Tensor, *weights: Tensor) -> Weights:
    return tuple(weight.detach().to(inputs.device, torch.float64) for weight in weights)


def _gram(signals: Sequence[Tensor], moved: Sequence[Tensor] | None = None) -> Tensor:
    """Σ (δδᵀ) ∘ (aaᵀ) over all matrices, or its derivative when δ and a move."""
    total = signals[0].new_zeros(signals[0].shape[1], signals[0].shape[1])
    for k in range(0, len(signals), 2):
        for first in range(0, len(signals[k]), CHUNK):
            here = slice(first, first + CHUNK)
            delta, a = signals[k][here], signals[k + 1][here]
            outer, inner = delta @ delta.mT, a @ a.mT
            if moved is None:
                total = total + (outer * inner).sum(0)
                continue
            half = (moved[k][here] @ delta.mT) * inner + outer * (moved[k + 1][here] @ a.mT)
            total = total + (half + half.mT).sum(0)
    return total
