"""K of M = J_ε K J_εᵀ: what a perturbation of a layer's output becomes when it is sent to the parameters and back.

With δ = J_εᵀ u at the output s of a layer, the parameter gradient of Jᵀu is linear in δ, and the change of s that this
gradient makes is K δ. For s = a Wᵀ + 1 bᵀ the gradient of W is δᵀ a and the change is (A Aᵀ + 1 1ᵀ) δ: the weight gradient
need not be formed. Which parameter enters where is recorded in :mod:`grsd.spectrum.operator.trace`; rows that do not mix are taken
out of the product in :mod:`grsd.spectrum.operator.own_positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from grsd.spectrum.operator.trace import Use

Vectors = dict[int, Tensor]  # slot of δ → its value


def matrix(x: Tensor) -> Tensor:
    """View (..., h) as (n, h)."""
    return x.reshape(-1, x.shape[-1])


def gradient(use: Use, delta: Tensor, shape: torch.Size) -> Tensor:
    """Return the parameter's share of Jᵀu, of the parameter's `shape`, from δ at one use."""
    if use.rule == "plain":
        return delta
    if use.rule == "shift":
        return delta.sum_to_size(use.spread).reshape(shape)
    assert use.data is not None
    if use.rule == "rows":
        a, d = matrix(use.data).to(delta.dtype), matrix(delta)
        return a.T @ d if use.options["transposed"] else d.T @ a
    if use.rule == "scale":
        return (use.data * delta).sum_to_size(use.spread).reshape(shape)
    if use.rule == "gather":
        tokens = use.data.reshape(-1)
        return delta.new_zeros(shape).index_add_(0, tokens, matrix(delta) * _kept(use, delta))
    o = use.options
    size = delta.new_empty(1).expand(shape)
    settings = (
        o["stride"],
        o["padding"],
        o["dilation"],
        False,
        [0] * (delta.ndim - 2),
        o["groups"],
    )
    backward = torch.ops.aten.convolution_backward
    result: Tensor = backward(
        delta, use.data.to(delta.dtype), size, None, *settings, (False, True, False)
    )[1]
    return result


def change(use: Use, g: Tensor) -> Tensor:
    """Return the change of the output s at one use, shape of s, when the parameter changes by g."""
    if use.rule == "plain":
        return g
    if use.rule == "shift":
        return g.reshape(use.spread).expand(use.shape)
    assert use.data is not None
    if use.rule == "rows":
        a = use.data.to(g.dtype)
        return (a @ (g if use.options["transposed"] else g.T)).reshape(use.shape)
    if use.rule == "scale":
        return use.data * g.reshape(use.spread)
    if use.rule == "gather":
        return (g[use.data.reshape(-1)] * _kept(use, g)).reshape(use.shape)
    o = use.options
    return torch.convolution(
        use.data.to(g.dtype),
        g,
        None,
        o["stride"],
        o["padding"],
        o["dilation"],
        False,
        [0] * (g.ndim - 2),
        o["groups"],
    )


def _parts(x: Tensor, groups: int) -> Tensor:
    """View (groups · b, ...) as (groups, b, ...)."""
    return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _kept(use: Use, like: Tensor) -> Tensor | float:
    """Return 0 for the rows of a padding token, whose embedding has no gradient, and 1 for the others."""
    padding = use.options["padding"]
    if padding is None or use.data is None:
        return 1.0
    mask: Tensor = use.data.reshape(-1, 1) != padding
    return mask.to(like.dtype)


class Factor(Protocol):
    """One block of K. `add` reads δ at its slots and adds K δ to `out`."""

    @property
    def slots(self) -> tuple[int, ...]: ...
    def add(self, deltas: Vectors, out: Vectors) -> None: ...


def accumulate(out: Vectors, slot: int, value: Tensor) -> None:
    """Add `value`, which nothing else may hold, to the slot."""
    out[slot] = out[slot].add_(value) if slot in out else value


@dataclass(frozen=True)
class Gram:
    """All linear layers and biases with one δ: (Σ A Aᵀ + b 1 1ᵀ) δ with a cached n × n matrix. Cost 2 n² out FLOPs."""

    slot: int
    gram: Tensor  # (n, n), or (groups, n / groups, n / groups)

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        delta = deltas[self.slot]
        rows = delta.reshape(*self.gram.shape[:-1], delta.shape[-1])
        accumulate(out, self.slot, (self.gram @ rows).view(delta.shape))


@dataclass(frozen=True)
class Span:
    """Linear layers and a bias with one δ, associated as A (Aᵀ δ) + 1 (1ᵀ δ). Cost 4 n in out FLOPs."""

    slot: int
    inputs: tuple[Tensor, ...]  # each (n, in), or (groups, n / groups, in)
    biases: int

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        delta = deltas[self.slot]
        delta = delta.reshape(*self.inputs[0].shape[:-1], delta.shape[-1])
        total = self.biases * delta.sum(-2, keepdim=True).expand_as(delta)
        for a in self.inputs:
            total = total + a @ (a.mT @ delta)
        accumulate(out, self.slot, total.view(deltas[self.slot].shape))


@dataclass(frozen=True)
class Gain:
    """Gain and bias of a norm with one δ: x̂ ⊙ Σ(x̂ ⊙ δ) + b Σ δ, sums over rows. Cost O(n h)."""

    slot: int
    plain: Tensor  # x̂, (groups, n / groups, h)
    biases: int

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        delta = deltas[self.slot].reshape(self.plain.shape)
        gain = torch.linalg.vecdot(self.plain, delta, dim=1).unsqueeze(1)
        if not self.biases:
            value = self.plain * gain
        else:
            value = torch.addcmul(self.biases * delta.sum(1, keepdim=True), self.plain, gain)
        accumulate(out, self.slot, value.view(deltas[self.slot].shape))


@dataclass(frozen=True)
class Tokens:
    """An embedding: rows of δ summed over equal tokens, and given back to each of them. Cost O(n h)."""

    slot: int
    group: Tensor  # (n,) int64, number of the token among the distinct ones
    distinct: int
    kept: Tensor | float  # (n, 1), 0 at the padding token

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        delta = deltas[self.slot]
        rows = matrix(delta)
        sums = rows.new_zeros(self.distinct, rows.shape[1]).index_add_(0, self.group, rows)
        back = sums[self.group]
        accumulate(
            out,
            self.slot,
            (back if isinstance(self.kept, float) else back * self.kept).view(delta.shape),
        )


@dataclass(frozen=True)
class Through:
    """Any uses of one parameter, by way of its gradient: Σ over all pairs of uses, exact. Cost: 2 passes of each use."""

    uses: tuple[Use, ...]
    slots: tuple[int, ...]
    shape: torch.Size
    groups: int = 1

    def add(self, deltas: Vectors, out: Vectors) -> None:
        entering = [deltas[slot] for slot in self.slots]
        if self.groups == 1:
            results = self._through(entering, [use.data for use in self.uses])
        else:
            parts = [_parts(x, self.groups) for x in entering]
            data = [
                None if use.data is None else _parts(use.data, self.groups) for use in self.uses
            ]
            axes = [None if d is None else 0 for d in data]
            results = torch.func.vmap(self._through, in_dims=(0, axes))(parts, data)
        for slot, delta, result in zip(self.slots, entering, results, strict=True):
            accumulate(out, slot, result.reshape(delta.shape).to(delta.dtype))

    def _through(self, deltas: list[Tensor], data: list[Tensor | None]) -> list[Tensor]:
        uses = [
            replace(use, data=d, shape=x.shape)
            for use, d, x in zip(self.uses, data, deltas, strict=True)
        ]
        total = gradient(uses[0], deltas[0], self.shape)
        for use, delta in zip(uses[1:], deltas[1:], strict=True):
            total = total + gradient(use, delta, self.shape)
        changes = [(use, change(use, total)) for use in uses]
        return [
            value.clone() if use.rule in ("shift", "plain") else value for use, value in changes
        ]


@dataclass(frozen=True)
class Tied:
    """The cross terms of one matrix W that is embedding s = W[t] and head z = a Wᵀ, both ways, without a V × h buffer.

    δ_z goes to s_j as Σ_i δ_z[i, t_j] a_i, and δ_s to z[i, v] as Σ_{j: t_j = v} a_i · δ_s,j. Cost 4 n m h FLOPs.
    """

    head: int
    embedding: int
    a: Tensor  # (n, h), in the dtype of δ_z
    tokens: Tensor  # (m,)
    kept: Tensor | float  # (m, 1)
    same: Tensor | float  # (n, m), 1 where both belong to one group

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.head, self.embedding)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        dz, ds = deltas[self.head], deltas[self.embedding]
        rows = matrix(dz)
        inner = (self.a @ (matrix(ds).to(self.a.dtype) * self.kept).T) * self.same
        back = ((rows[:, self.tokens] * self.same).T @ self.a) * self.kept
        accumulate(
            out, self.head, torch.zeros_like(rows).index_add_(1, self.tokens, inner).view(dz.shape)
        )
        accumulate(out, self.embedding, back.view(ds.shape).to(ds.dtype))


@dataclass(frozen=True)
class FoldedTie:
    """The cross terms of embedding and folded head: δ_z = u ⊙ Γ at the head, of which Γ[:, t] is all that is needed.

    δ_s gets Γ[:, t]ᵀ (u ⊙ a); M u gets rowsum(a ⊙ (Γ[:, t] δ_s)). Cost 4 T m h FLOPs.
    """

    embedding: int
    a: Tensor  # (T, h), in the dtype of M, as is the next
    fixed: Tensor  # (T, m), Γ at the tokens of the batch
    tokens: Tensor
    kept: Tensor | float

    def add(self, u: Tensor, deltas: Vectors, out: Vectors) -> Tensor:
        delta = deltas[self.embedding]
        back = (self.fixed.T @ (u[:, None] * self.a)) * self.kept
        result = (self.a * (self.fixed @ (matrix(delta).to(self.fixed.dtype) * self.kept))).sum(1)
        accumulate(out, self.embedding, back.view(delta.shape).to(delta.dtype))
        return result


@dataclass
class Grams:
    """Makes A Aᵀ once for all layers that read the same tensor."""

    made: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def of(
        self, inputs: Sequence[Tensor], biases: int, dtype: torch.dtype, groups: int = 1
    ) -> Tensor:
        """Return Σ A Aᵀ + biases · 1 1ᵀ, (n, n), or its blocks, (groups, n / groups, n / groups)."""
        key = (
            *sorted((a.data_ptr(), *a.shape, *a.stride()) for a in inputs),
            biases,
            dtype,
            groups,
        )
        if key not in self.made:
            total: Tensor | None = None
            for a in inputs:
                rows = matrix(a).to(dtype)
                blocks = rows.view(groups, -1, rows.shape[1])
                one = gram(rows) if groups == 1 else blocks @ blocks.mT
                total = one if total is None else total.add_(one)
            assert total is not None
            self.made[key] = total.add_(biases) if biases else total
        return self.made[key]


def gram(x: Tensor, block: int = 256) -> Tensor:
    """Return x xᵀ for x of shape (n, k), computing the lower half in blocks of rows. Cost about n² k FLOPs."""
    n = x.shape[0]
    if n < 2 * block:
        return x @ x.T
    result = x.new_empty(n, n)
    step = max(block // 2, n // 8)
    for i in range(0, n, step):
        j = min(i + step, n)
        torch.mm(x[i:j], x[:j].T, out=result[i:j, :j])
        result[:i, i:j] = result[i:j, :i].T
    return result
