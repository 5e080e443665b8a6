"""K of M = J_ε K J_εᵀ: what a perturbation of a layer's output becomes through the parameters.

With δ = J_εᵀ u at the output s of a layer, the parameter gradient of Jᵀu is linear in δ, and the
change of s that this gradient makes is K δ. For s = a Wᵀ + 1 bᵀ the gradient of W is δᵀ a and the
change is (A Aᵀ + 1 1ᵀ) δ: the weight gradient need not be formed. Here are the base class of the
rules (:mod:`grsd.spectrum.operator.rules`) and the blocks of K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from grsd.spectrum.programs.program import Rows

Vectors = dict[int, Tensor]  # slot of δ → its value


class Factor(Protocol):
    """One block of K. `add` reads δ at its slots and adds K δ to `out`."""

    @property
    def slots(self) -> tuple[int, ...]: ...
    def add(self, deltas: Vectors, out: Vectors) -> None: ...


@dataclass(frozen=True)
class Form:
    """What a product does for some uses, and what it costs: the fields of a `PlanRow`."""

    association: str
    flops: int
    bytes: int = 0
    setup: int = 0
    pays: float | None = None


@dataclass(frozen=True)
class Setting:
    """What a block of K is chosen by: δ at its slot, independent groups, products to come."""

    slot: int
    delta: Tensor
    groups: int
    products: int
    grams: Grams

    @property
    def width(self) -> int:
        return self.delta.shape[-1] if self.delta.ndim else 1

    @property
    def count(self) -> int:
        return self.delta.numel() // self.width


@dataclass(eq=False)
class Use:
    """One entrance of one parameter; itself the rule of a parameter that stays in the graph."""

    name: ClassVar[str] = "plain"
    parameter: Tensor
    # what the call did with it: a, (..., in); tokens; x̂ broadcast to s; input of a convolution
    data: Tensor | None = None
    number: int = -1  # position in the list of trainable parameters
    place: int = -1  # index into `Trace.places`, the output s
    shape: torch.Size = field(default_factory=torch.Size)  # of s

    def gradient(self, delta: Tensor) -> Tensor:
        """Return the parameter's share of Jᵀu, in the parameter's shape, from δ at the output."""
        return delta

    def change(self, g: Tensor) -> Tensor:
        """Return the change of the output, a new tensor, when the parameter changes by g."""
        return g.clone()

    @property
    def flops(self) -> int:
        """Multiplications and additions of one gradient and one change."""
        return 0

    def partners(self, uses: Sequence[Use], width: int) -> list[Use]:
        """Return the uses with the same δ, (..., width), that one block of K holds with this."""
        return [self]

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        """Return the block of K of this use and its partners, and what it costs."""
        held = 0 if self.data is None else self.data.numel() * at.delta.element_size()
        form = Form("through its gradient", self.flops, held)
        return Through((self,), (at.slot,), at.groups), form

    def rowwise(self, rows: Rows, front: int) -> bool:
        """Say whether rows, the `front` leading axes of s, meet only in the sum in `gradient`."""
        return False

    def meet(self, share: Any, rows: Rows, rest: torch.Size) -> bool:
        """Add to the `Share` of δ, rows of shape `rest`, how rows meet; False if `own` must be."""
        return False

    def own(self, delta: Tensor, front: int) -> Tensor:
        """Return every row's own gradient."""
        raise NotImplementedError

    @property
    def tensor(self) -> Tensor:
        """The data of a rule that always has some."""
        assert self.data is not None
        return self.data


def gradient(uses: Sequence[Use], deltas: Sequence[Tensor]) -> Tensor:
    """Return the gradient of one parameter, summed over its uses."""
    total = uses[0].gradient(deltas[0])
    for use, delta in zip(uses[1:], deltas[1:], strict=True):
        total = total + use.gradient(delta)
    return total


def matrix(x: Tensor) -> Tensor:
    """View (..., h) as (n, h)."""
    return x.reshape(-1, x.shape[-1])


def grouped(x: Tensor, groups: int) -> Tensor:
    """View (groups · b, ...) as (groups, b, ...)."""
    return x.reshape(groups, len(x) // groups, *x.shape[1:])


def accumulate(out: Vectors, slot: int, value: Tensor) -> None:
    """Add `value`, which nothing else may hold, to the slot."""
    out[slot] = out[slot].add_(value) if slot in out else value


@dataclass(frozen=True)
class Through:
    """Any uses of one parameter, through its gradient, with all cross terms, at their `flops`."""

    uses: tuple[Use, ...]
    slots: tuple[int, ...]
    groups: int = 1

    def add(self, deltas: Vectors, out: Vectors) -> None:
        entering = [deltas[slot] for slot in self.slots]
        data = [use.data for use in self.uses]
        if self.groups == 1:
            results = self._through(entering, data)
        else:
            parts = [grouped(x, self.groups) for x in entering]
            data = [None if x is None else grouped(x, self.groups) for x in data]
            axes = [None if x is None else 0 for x in data]
            results = torch.func.vmap(self._through, in_dims=(0, axes))(parts, data)
        for slot, delta, result in zip(self.slots, entering, results, strict=True):
            accumulate(out, slot, result.reshape(delta.shape).to(delta.dtype))

    def _through(self, deltas: list[Tensor], data: list[Tensor | None]) -> list[Tensor]:
        uses = [
            replace(use, data=x, shape=delta.shape)
            for use, x, delta in zip(self.uses, data, deltas, strict=True)
        ]
        total = gradient(uses, deltas)
        return [use.change(total) for use in uses]


@dataclass(frozen=True)
class OneSlot:
    """A block of K with one δ; `times` is K δ, in any shape."""

    slot: int

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def add(self, deltas: Vectors, out: Vectors) -> None:
        delta = deltas[self.slot]
        accumulate(out, self.slot, self.times(delta).view(delta.shape))

    def times(self, delta: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Gram(OneSlot):
    """Linear layers and biases with one δ: (Σ A Aᵀ + b 1 1ᵀ) δ, cached. Cost 2 n² out FLOPs."""

    gram: Tensor  # (groups, n / groups, n / groups)

    def times(self, delta: Tensor) -> Tensor:
        return self.gram @ delta.reshape(*self.gram.shape[:-1], delta.shape[-1])


@dataclass(frozen=True)
class Span(OneSlot):
    """Linear layers and biases with one δ: A (Aᵀ δ) + b 1 (1ᵀ δ). Cost 4 n in out FLOPs."""

    inputs: Tensor  # (groups, n / groups, in)
    biases: int

    def times(self, delta: Tensor) -> Tensor:
        rows = delta.reshape(*self.inputs.shape[:-1], delta.shape[-1])
        value = self.inputs @ (self.inputs.mT @ rows)
        if self.biases:
            value += self.biases * rows.sum(-2, keepdim=True)
        return value


@dataclass(frozen=True)
class Gain(OneSlot):
    """Gain and biases of a norm with one δ: x̂ ⊙ Σ(x̂ ⊙ δ) + b Σ δ, sums over rows. Cost O(n h)."""

    plain: Tensor  # x̂, (groups, n / groups, h)
    biases: int

    def times(self, delta: Tensor) -> Tensor:
        delta = delta.reshape(self.plain.shape)
        gain = torch.linalg.vecdot(self.plain, delta, dim=1).unsqueeze(1)
        if not self.biases:
            return self.plain * gain
        return torch.addcmul(self.biases * delta.sum(1, keepdim=True), self.plain, gain)


@dataclass(frozen=True)
class Tokens(OneSlot):
    """An embedding: rows of δ are summed over equal tokens, and given to each. Cost O(n h)."""

    index: Tensor  # (n,) int64, number of the token among the distinct ones
    distinct: int
    kept: Tensor | float  # (n, 1), 0 at the padding token

    def times(self, delta: Tensor) -> Tensor:
        rows = matrix(delta)
        sums = rows.new_zeros(self.distinct, rows.shape[1]).index_add_(0, self.index, rows)
        return sums[self.index] * self.kept if isinstance(self.kept, Tensor) else sums[self.index]


@dataclass(frozen=True)
class Tied:
    """The cross terms of a matrix W, embedding s = W[t] and head z = a Wᵀ, in no V × h buffer.

    δ_z goes to s_j as Σ_i δ_z[i, t_j] a_i, and δ_s to z[i, v] as Σ_{j: t_j = v} a_i · δ_s,j.
    Cost 4 n m h FLOPs.
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
        forth = torch.zeros_like(rows).index_add_(1, self.tokens, inner)
        accumulate(out, self.head, forth.view(dz.shape))
        accumulate(out, self.embedding, back.view(ds.shape).to(ds.dtype))


@dataclass(frozen=True)
class FoldedTie:
    """The cross terms of embedding and folded head: δ_z = u ⊙ Γ there, of which Γ[:, t] is needed.

    δ_s gets Γ[:, t]ᵀ (u ⊙ a); M u gets rowsum(a ⊙ (Γ[:, t] δ_s)). Cost 4 T m h FLOPs.
    """

    embedding: int
    a: Tensor  # (T, h), in the dtype of M, as is the next
    fixed: Tensor  # (T, m), Γ at the tokens of the batch
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

    def has(self, inputs: Sequence[Tensor], biases: int, dtype: torch.dtype, groups: int) -> bool:
        return (*identity(inputs), biases, dtype, groups) in self.made

    def of(self, inputs: Sequence[Tensor], biases: int, dtype: torch.dtype, groups: int) -> Tensor:
        """Return Σ A Aᵀ + b 1 1ᵀ as blocks of the groups, (groups, n / groups, n / groups)."""
        key = (*identity(inputs), biases, dtype, groups)
        if key not in self.made:
            blocks = [grouped(matrix(a).to(dtype), groups) for a in inputs]
            total, *others = (gram(x[0])[None] if groups == 1 else x @ x.mT for x in blocks)
            for other in others:
                total += other
            self.made[key] = total.add_(biases) if biases else total
        return self.made[key]


def identity(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return what tells these tensors from others that are alive."""
    return sorted((x.data_ptr(), *x.shape, *x.stride()) for x in tensors)


def gram(x: Tensor, block: int = 256) -> Tensor:
    """Return x xᵀ, (n, n), from the lower half in blocks of rows. Cost about n² k FLOPs."""
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
