"""Residual and plain tanh networks as stacks of equal layers: M and Ṁ as sums of Hadamard products, without a Jacobian.

For a weight matrix W with inputs a_i and backward signals δ_i (one per sample), the row of J that belongs to W is δ_i ⊗ a_i. So its
share of M = JJᵀ/n is (δδᵀ) ∘ (aaᵀ)/n: two Gram matrices of n samples, whatever the number of parameters. Ṁ is the derivative of
that expression in forward mode. `grsd.dynamics.problem.Problem` gives the same numbers for any network and is its test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import jvp

from grsd.lab.nets.architectures import ResidualNet, res_mlp
from grsd.lab.nets.models import mlp

__all__ = ["Parameters", "TanhStack"]

Parameters = tuple[Tensor, ...]  # read (w, d), blocks (L, w, w) in one or two tensors, head (w,)


@dataclass(frozen=True)
class TanhStack:
    """A network h ← skip·h + ε·W tanh(h), or with W tanh(V h), between ``read`` and ``head``, on fixed data.

    Attributes
    ----------
    start : tuple of Tensor. read (w, d), then (L, w, w) for W, or V and W, then head (w,).
    inputs : (n, d), targets : (n,)
    epsilon, skip : float. (ε, 1) for residual networks, (1, 0) for plain ones.
    closed : bool. The head reads tanh(h), as in plain networks, not h.

    Notes
    -----
    Conventions as in `grsd.dynamics.problem`: e = target − output, M = JJᵀ/n, θ̇ = Jᵀe/n.
    """

    start: Parameters
    inputs: Tensor
    targets: Tensor
    epsilon: float
    skip: float
    closed: bool

    @classmethod
    def residual(
        cls,
        inputs: Tensor,
        targets: Tensor,
        *,
        width: int,
        depth: int,
        epsilon: float,
        layers: int = 1,
        seed: int,
    ) -> TanhStack:
        """The network of `grsd.lab.nets.architectures.res_mlp` with tanh and no bias, weight for weight."""
        net = res_mlp(
            inputs=inputs.shape[1],
            width=width,
            depth=depth,
            layers=layers,
            epsilon=epsilon,
            seed=seed,
        )
        blocks: list[nn.Module] = list(net.blocks)
        names = ("branch.first.weight", "branch.branch_end.weight")[2 - layers :]
        middle = [torch.stack([block.get_parameter(name) for block in blocks]) for name in names]
        return cls._of(
            inputs,
            targets,
            net.get_parameter("read.weight"),
            middle,
            _head(net),
            epsilon,
            1.0,
            False,
        )

    @classmethod
    def plain(
        cls, inputs: Tensor, targets: Tensor, *, width: int, depth: int, seed: int
    ) -> TanhStack:
        """The network of `grsd.lab.nets.models.mlp` with `depth` hidden layers, tanh and no bias, weight for weight."""
        net = mlp([inputs.shape[1], *[width] * depth, 1], seed=seed, bias=False)
        first, *middle, last = [weight.detach() for weight in net.parameters()]
        blocks = torch.stack(middle) if middle else first.new_zeros(0, width, width)
        return cls._of(inputs, targets, first, [blocks], last[0], 1.0, 0.0, True)

    @classmethod
    def _of(
        cls,
        inputs: Tensor,
        targets: Tensor,
        read: Tensor,
        middle: list[Tensor],
        head: Tensor,
        epsilon: float,
        skip: float,
        closed: bool,
    ) -> TanhStack:
        start = tuple(t.detach().to(inputs.device, torch.float64) for t in (read, *middle, head))
        return cls(start, inputs, targets, epsilon, skip, closed)

    def _pairs(self, at: Parameters) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
        """The output (n,), and (δ, a, index of the tensor) for every matrix, from the head down to the read layer."""
        read, *middle, head = at
        h, saved = self.inputs @ read.T, []
        for level in zip(*middle, strict=True):
            inner = [torch.tanh(h)] if len(level) == 1 else [h, torch.tanh(h @ level[0].T)]
            h = self.skip * h + self.epsilon * (inner[-1] @ level[-1].T)
            saved.append(inner)
        last = torch.tanh(h) if self.closed else h
        pairs = [(torch.ones_like(last[:, :1]), last, len(at) - 1)]
        back = head.expand_as(last)
        if self.closed:
            back = back * (1 - last**2)
        for level, inner in zip(
            reversed(list(zip(*middle, strict=True))), reversed(saved), strict=True
        ):
            signal = self.epsilon * back
            for index in range(len(level) - 1, -1, -1):
                pairs.append((signal, inner[index], index + 1))
                signal = signal @ level[index]
                if index == len(level) - 1:  # its input is a tanh; the input of V is h itself
                    signal = signal * (1 - inner[index] ** 2)
            back = self.skip * back + signal
        pairs.append((back, self.inputs, 0))
        return last @ head, pairs

    def error(self, at: Parameters) -> Tensor:
        """Return e = target − output, (n,)."""
        return self.targets - self._pairs(at)[0]

    def loss(self, at: Parameters) -> float:
        """Return ½⟨e, e⟩."""
        return 0.5 * float(self.error(at).square().mean())

    def velocity(self, at: Parameters) -> Parameters:
        """Return θ̇ = Jᵀe/n in the shape of the parameters. Cost: a forward and a backward pass."""
        output, pairs = self._pairs(at)
        weight = (self.targets - output)[:, None] / len(output)
        found: list[list[Tensor]] = [[] for _ in at]
        for signal, a, index in reversed(pairs):
            found[index].append((weight * signal).T @ a)
        middle = [
            torch.stack(rows) if rows else torch.zeros_like(at[k]) for k, rows in enumerate(found)
        ][1:-1]
        return (found[0][0], *middle, found[-1][0][0])

    def _signals(self, at: Parameters) -> list[Tensor]:
        """δ and a of every matrix, those of equal shape stacked: [δ, a, δ, a, …], each (layers, n, width)."""
        pairs = self._pairs(at)[1]
        ends, middle = (pairs[0], pairs[-1]), pairs[1:-1]
        found = [part[None] for pair in ends for part in pair[:2]]
        inner = [torch.stack([pair[k] for pair in middle]) for k in (0, 1)] if middle else []  # type: ignore[misc]
        return found + inner

    def kernel(self, at: Parameters) -> Tensor:
        """Return M = JJᵀ/n, (n, n). Cost: two Gram matrices per weight matrix."""
        return _gram(self._signals(at)) / len(self.inputs)

    def kernel_rate(
        self, at: Parameters, direction: Parameters | None = None, *, block: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return M and Ṁ along θ̇, or `direction`, each (n, n). Cost: three times that of `kernel`.

        With `block` = 0, 1, …, counted from the input, the part M^(ℓ) = J^(ℓ)J^(ℓ)ᵀ/n of that residual block and its derivative.
        """
        along = self.velocity(at) if direction is None else direction
        found = jvp(lambda *theta: tuple(self._signals(theta)), at, along)
        signals, moved, n = found[0], found[1], len(self.inputs)
        if block is not None:
            depth, matrices = len(at[1]), len(at) - 2
            if not 0 <= block < depth:
                raise ValueError(f"block is {block}; this network has blocks 0 to {depth - 1}")
            here = slice((depth - 1 - block) * matrices, (depth - block) * matrices)
            signals, moved = ([part[here] for part in parts[-2:]] for parts in (signals, moved))
        return _gram(signals) / n, _gram(signals, moved) / n

    def descended(self, remaining: float, limit: int = 50_000) -> Parameters:
        """Return θ where gradient descent first has this share of the first loss, with ηλ_max = ½ and λ_max anew every 50 steps.

        Raises
        ------
        ArithmeticError
            If it has not by `limit` steps.
        """
        at, goal, rate = self.start, remaining * self.loss(self.start), 0.0
        for step in range(limit):
            if self.loss(at) <= goal:
                return at
            if step % 50 == 0:
                rate = 0.5 / float(torch.linalg.eigvalsh(self.kernel(at))[-1])
            at = tuple(weight + rate * v for weight, v in zip(at, self.velocity(at), strict=True))
        raise ArithmeticError(
            f"gradient descent has not reached {remaining} of its first loss in {limit} steps"
        )


def _gram(
    signals: Sequence[Tensor], moved: Sequence[Tensor] | None = None, layers: int = 32
) -> Tensor:
    """Σ (δδᵀ) ∘ (aaᵀ) over all matrices, or its derivative when δ and a move; `layers` Gram matrices in memory at a time."""
    n = signals[0].shape[1]
    total = signals[0].new_zeros(n, n)
    for k in range(0, len(signals), 2):
        for first in range(0, len(signals[k]), layers):
            here = slice(first, first + layers)
            back, a = signals[k][here], signals[k + 1][here]
            outer, inner = back @ back.mT, a @ a.mT
            if moved is None:
                total = total + (outer * inner).sum(0)
                continue
            half = (moved[k][here] @ back.mT) * inner + outer * (moved[k + 1][here] @ a.mT)
            total = total + (half + half.mT).sum(0)
    return total


def _head(net: ResidualNet) -> Tensor:
    return net.get_parameter("head.weight")[0]
