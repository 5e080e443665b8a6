"""The ways in which a parameter enters, one class each.

A subclass of :class:`grsd.spectrum.operator.factors.Use` stands for one call in which one parameter
changes the output s. It has

- a **reader** or more, under ``@reads(torch function)``: from the arguments of a call to its uses;
- ``gradient``: the parameter's share of Jᵀu from δ = ∂(Σ u f)/∂s, and ``change``: what s becomes
  when the parameter changes;
- ``flops`` of one of each.

That is all that exactness needs. What makes a product cheap is optional: ``partners`` and
``factor``, a block of K that forms no gradient, and, for layers that output i reaches at its own
position alone, ``rowwise`` with ``meet`` or ``own``, by which the layer's share of M is folded into
one T × T matrix. A new rule is a new class here and nothing else; `NTK.plan` shows its ``name``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from grsd.spectrum.operator.factors import (
    Factor,
    Form,
    Gain,
    Gram,
    Setting,
    Span,
    Tokens,
    Use,
    grouped,
    matrix,
)
from grsd.spectrum.operator.own_positions import Share
from grsd.spectrum.operator.trace import reads
from grsd.spectrum.programs.program import Rows

# What moving a number costs, in FLOPs of a matrix product that take as long (a CPU, float32)
MOVED_COST = 8

Call = SimpleNamespace
Uses = Sequence[Use] | None


@dataclass(eq=False)
class RowUse(Use):
    """Acts on the last axis of s alone."""

    def rowwise(self, rows: Rows, front: int) -> bool:
        return front == len(self.shape) - 1 and prod(self.shape[:-1]) == rows.count


@dataclass(eq=False)
class Linear(RowUse):
    """s = a Wᵀ, or a W where `transposed`. K δ = (A Aᵀ) δ = A (Aᵀ δ)."""

    name: ClassVar[str] = "rows"
    transposed: bool = False

    def gradient(self, delta: Tensor) -> Tensor:
        a, d = matrix(self.tensor).to(delta.dtype), matrix(delta)
        return a.T @ d if self.transposed else d.T @ a

    def change(self, g: Tensor) -> Tensor:
        return (self.tensor.to(g.dtype) @ (g if self.transposed else g.T)).reshape(self.shape)

    @property
    def flops(self) -> int:
        return 4 * self.shape.numel() * self.tensor.shape[-1]

    def partners(self, uses: Sequence[Use], width: int) -> list[Use]:
        """All linear layers and whole biases: (Σ A Aᵀ + b 1 1ᵀ) δ."""
        return [use for use in uses if isinstance(use, Linear) or is_bias(use, width)]

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        """A cached n × n matrix, where making it pays in the products to come; else A (Aᵀ δ)."""
        inputs = [use.tensor for use in uses if isinstance(use, Linear)]
        biases, item = len(uses) - len(inputs), at.delta.element_size()
        n, rows = at.count, at.count // at.groups  # all rows, and those that meet
        fan_in = sum(a.shape[-1] for a in inputs)
        key = (inputs, biases, at.delta.dtype, at.groups)
        made = 0 if at.grams.has(*key) else n * rows * fan_in
        gram, span = 2 * n * rows * at.width, 4 * n * fan_in * at.width
        # A is read twice, and Aᵀ δ is written and read; A Aᵀ is read once
        moved = 2 * n * fan_in + 2 * at.groups * fan_in * at.width - n * rows
        saved = span - gram + MOVED_COST * moved
        pays = made / saved if saved > 0 else None
        if pays is not None and pays <= at.products:
            form = Form("(A Aᵀ + b 1 1ᵀ) δ", gram, n * rows * item, made, pays)
            return Gram(at.slot, at.grams.of(*key)), form
        blocks = [matrix(a).to(at.delta.dtype) for a in inputs]
        joined = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
        form = Form("A (Aᵀ δ) + b 1 (1ᵀ δ)", span, joined.numel() * item, 0, pays)
        return Span(at.slot, grouped(joined, at.groups), biases), form

    def meet(self, share: Share, rows: Rows, rest: torch.Size) -> bool:
        share.inputs.append(rows.pick(self.tensor))
        return True

    @reads(functional.linear, form=lambda input, weight, bias=None: ...)
    @staticmethod
    def _linear(call: Call) -> Uses:
        if call.weight.ndim != 2:
            return None
        return Linear(call.weight, call.input), Shift.of(call.bias)

    @reads(torch.addmm, form=lambda input, mat1, mat2, *, beta=1, alpha=1: ...)
    @staticmethod
    def _addmm(call: Call) -> Uses:
        if call.beta != 1 or call.alpha != 1:
            return None
        return Linear(call.mat2, call.mat1, transposed=True), Shift.of(call.input)

    @reads(torch.mm, Tensor.mm, form=lambda input, mat2: ...)
    @staticmethod
    def _mm(call: Call) -> Uses:
        return (Linear(call.mat2, call.input, transposed=True),)

    @reads(torch.matmul, Tensor.matmul, Tensor.__matmul__, form=lambda input, other: ...)
    @staticmethod
    def _matmul(call: Call) -> Uses:
        if call.other.ndim != 2:
            return None
        return (Linear(call.other, call.input, transposed=True),)


@dataclass(eq=False)
class Embedding(RowUse):
    """s = W[t]; the row `padding` has no gradient. K δ sums rows of δ over equal tokens."""

    name: ClassVar[str] = "gather"
    padding: int | None = None

    def kept(self, dtype: torch.dtype) -> Tensor | float:
        """Return 0 for the rows of a padding token and 1 for the others, (n, 1)."""
        if self.padding is None:
            return 1.0
        return (self.tensor.reshape(-1, 1) != self.padding).to(dtype)

    def gradient(self, delta: Tensor) -> Tensor:
        rows = matrix(delta) * self.kept(delta.dtype)
        return delta.new_zeros(self.parameter.shape).index_add_(0, self.tensor.reshape(-1), rows)

    def change(self, g: Tensor) -> Tensor:
        return (g[self.tensor.reshape(-1)] * self.kept(g.dtype)).reshape(self.shape)

    @property
    def flops(self) -> int:
        return 4 * self.shape.numel()

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        tokens = self.tensor.reshape(-1)
        group = torch.arange(at.groups, device=tokens.device)
        apart = group.repeat_interleave(tokens.numel() // at.groups) * (int(tokens.max()) + 1)
        distinct, index = torch.unique(tokens + apart, return_inverse=True)
        block = Tokens(at.slot, index, distinct.numel(), self.kept(at.delta.dtype))
        return block, Form("sum over equal tokens", 2 * at.delta.numel(), 8 * at.count)

    def meet(self, share: Share, rows: Rows, rest: torch.Size) -> bool:
        tokens = rows.pick(self.tensor)[:, 0]
        share.tokens.append((tokens, tokens != (-1 if self.padding is None else self.padding)))
        return True

    @reads(functional.embedding)
    @staticmethod
    def _embedding(call: Call) -> Uses:
        if call.max_norm is not None or call.scale_grad_by_freq:
            return None
        padding = call.padding_idx
        padding = None if padding is None else padding % len(call.weight)
        return (Embedding(call.weight, call.input, padding=padding),)


@dataclass(eq=False)
class Broadcast(Use):
    """A parameter that is broadcast to s, in the shape `spread`."""

    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, parameter: Any, data: Tensor | None = None, spread: tuple[int, ...] = ()) -> Use:
        """Return the use of `parameter`, which may be None; `spread` is its shape by default."""
        own = () if parameter is None else tuple(parameter.shape)
        return cls(parameter, data, spread=spread or own)

    @property
    def flops(self) -> int:
        return 4 * self.shape.numel()

    def rowwise(self, rows: Rows, front: int) -> bool:
        return len(self.spread) <= len(self.shape) - front

    def own(self, delta: Tensor, front: int) -> Tensor:
        g = delta if self.data is None else self.data * delta
        gap = [1] * (g.ndim - front - len(self.spread))
        return g.sum_to_size(*g.shape[:front], *gap, *self.spread)


@dataclass(eq=False)
class Scale(Broadcast):
    """s = x̂ ⊙ w: the gain of a norm (:mod:`grsd.spectrum.operator.calls`), or of anything else."""

    name: ClassVar[str] = "scale"

    def gradient(self, delta: Tensor) -> Tensor:
        return (self.tensor * delta).sum_to_size(self.spread).reshape(self.parameter.shape)

    def change(self, g: Tensor) -> Tensor:
        return self.tensor * g.reshape(self.spread)

    def partners(self, uses: Sequence[Use], width: int) -> list[Use]:
        """The biases, if this is the gain of a norm."""
        biases = [use for use in uses if is_bias(use, width)] if self.spread == (width,) else []
        return [self, *biases]

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        if self.spread != (at.width,) or self.tensor.dtype != at.delta.dtype:
            return super().factor(uses, at)
        plain = self.tensor.reshape(at.groups, at.count // at.groups, at.width)
        held = plain.numel() * at.delta.element_size()
        form = Form("x̂ Σ x̂ δ + b Σ δ", 4 * at.delta.numel(), held)
        return Gain(at.slot, plain, len(uses) - 1), form

    @reads(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, form=lambda input, other: ...)
    @staticmethod
    def _mul(call: Call) -> Uses:
        return [Scale.of(w, x) for x, w in _one_of_two(call)]


@dataclass(eq=False)
class Shift(Broadcast):
    """s = x + b."""

    name: ClassVar[str] = "shift"

    def gradient(self, delta: Tensor) -> Tensor:
        return delta.sum_to_size(self.spread).reshape(self.parameter.shape)

    def change(self, g: Tensor) -> Tensor:
        return g.reshape(self.spread).expand(self.shape).clone()

    def meet(self, share: Share, rows: Rows, rest: torch.Size) -> bool:
        share.ones += self.spread == rest
        return self.spread == rest

    @reads(
        torch.add,
        Tensor.add,
        Tensor.__add__,
        Tensor.__radd__,
        form=lambda input, other, *, alpha=1: ...,
    )
    @staticmethod
    def _add(call: Call) -> Uses:
        return [Shift.of(b) for _, b in _one_of_two(call)] if call.alpha == 1 else None


@dataclass(eq=False)
class Convolution(Use):
    """s = x ∗ W; `settings`: stride, padding, dilation, False, padding of the output, groups."""

    name: ClassVar[str] = "conv"
    settings: tuple[Any, ...] = ()

    def gradient(self, delta: Tensor) -> Tensor:
        size, x = delta.new_empty(1).expand(self.parameter.shape), self.tensor.to(delta.dtype)
        backward = torch.ops.aten.convolution_backward
        return backward(delta, x, size, None, *self.settings, (False, True, False))[1]

    def change(self, g: Tensor) -> Tensor:
        return torch.convolution(self.tensor.to(g.dtype), g, None, *self.settings)

    @property
    def flops(self) -> int:
        return 4 * self.shape.numel() * self.parameter[0].numel()

    @staticmethod
    def _read(call: Call) -> Uses:
        dimensions = call.weight.ndim - 2

        def each(value: Any) -> tuple[int, ...]:
            given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            return given * (dimensions // len(given))

        if call.input.ndim != dimensions + 2:
            return None
        steps, holes, pads = each(call.stride), each(call.dilation), call.padding
        if pads == "same":
            spans = [h * (k - 1) for h, k in zip(holes, call.weight.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                return None  # it pads one side more than the other
            pads = tuple(span // 2 for span in spans)
        pads = each(0 if pads == "valid" else pads)
        settings = (steps, pads, holes, False, [0] * dimensions, call.groups)
        shift = Shift.of(call.bias, None, (call.weight.shape[0], *[1] * dimensions))
        return Convolution(call.weight, call.input, settings=settings), shift


reads(
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    form=lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: ...,
)(Convolution._read)


def _one_of_two(call: Call) -> list[tuple[Tensor, Tensor]]:
    """Return (x, parameter) of input ∘ other in the orders in which one is broadcast to x."""
    a, b = call.input, call.other
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a is b:
        return []
    whole = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return [(x, w) for x, w in ((a, b), (b, a)) if x.shape == whole]


def is_bias(use: Use, width: int) -> bool:
    """Say whether this is a bias of all `width` features."""
    return isinstance(use, Shift) and use.spread == (width,)
