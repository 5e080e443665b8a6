"""The ways in which a parameter enters, one class each.

A subclass of :class:`grsd.spectrum.operator.factors.Use` stands for one call in which one parameter changes the output s. It has

- a **reader** (one or more), under ``@reads(torch function)``: it knows the call, carries it out with the detached
  parameter and notes the use;
- ``gradient``: the parameter's share of Jᵀu from δ = ∂(Σ u f)/∂s, and ``change``: what s becomes when the parameter changes;
- ``flops`` of one of each.

That is all that exactness needs. What makes a product cheap is optional: ``partners`` and ``factor``, a block of K that forms
no gradient, and, for layers that output i reaches at its own position alone, ``rowwise`` with ``meet`` or ``own``, by which
the layer's share of M is folded into one T × T matrix. A new rule is a new class here and nothing else; `NTK.plan` shows its
``name``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
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
    matrix,
)
from grsd.spectrum.operator.own_positions import Share
from grsd.spectrum.operator.trace import Trace, reads
from grsd.spectrum.programs.program import Rows


@dataclass(eq=False)
class Linear(Use):
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
        return [use for use in uses if isinstance(use, Linear) or _is_bias(use, width)]

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        """A cached n × n matrix, where making it pays within the products to come; else A (Aᵀ δ)."""
        inputs = [use.tensor for use in uses if isinstance(use, Linear)]
        biases, item = len(uses) - len(inputs), at.delta.element_size()
        n, rows = at.count, at.count // at.groups  # all rows, and those that meet
        fan_in = sum(a.shape[-1] for a in inputs)
        key = (inputs, biases, at.delta.dtype, at.groups)
        made = 0 if at.grams.has(*key) else n * rows * fan_in
        gram, span = 2 * n * rows * at.width, 4 * n * fan_in * at.width
        pays = made / (span - gram) if gram < span else None
        if pays is not None and pays <= at.products:
            form = Form("(A Aᵀ + b 1 1ᵀ) δ", gram, n * rows * item, made, pays)
            return Gram(at.slot, at.grams.of(*key)), form
        blocks = [matrix(a).to(at.delta.dtype).view(at.groups, rows, -1) for a in inputs]
        form = Form("A (Aᵀ δ) + b 1 (1ᵀ δ)", span, n * fan_in * item, 0, pays)
        return Span(at.slot, tuple(blocks), biases), form

    def rowwise(self, rows: Rows, front: int) -> bool:
        return _whole_rows(self, rows, front)

    def meet(self, share: Share, rows: Rows, rest: torch.Size) -> bool:
        share.inputs.append(rows.pick(self.tensor))
        return True

    @reads(functional.linear)
    @staticmethod
    def _linear(
        trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor | None:
        if not trace.has(weight, bias) or trace.has(input):
            return None
        out = functional.linear(input, trace.free(weight), trace.free(bias))
        return trace.note(out, Linear(weight, input), Shift.of(bias))

    @reads(torch.addmm)
    @staticmethod
    def _addmm(
        trace: Trace,
        input: Tensor,
        mat1: Tensor,
        mat2: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
    ) -> Tensor | None:
        if not trace.has(input, mat2) or trace.has(mat1) or beta != 1 or alpha != 1:
            return None
        out = torch.addmm(trace.free(input), mat1, trace.free(mat2))
        return trace.note(out, Linear(mat2, mat1, transposed=True), Shift.of(input))

    @reads(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
    @staticmethod
    def _matmul(trace: Trace, input: Tensor, other: Tensor) -> Tensor | None:
        if not trace.has(other) or trace.has(input) or other.ndim != 2:
            return None
        out = torch.matmul(input, trace.free(other))
        return trace.note(out, Linear(other, input, transposed=True))


@dataclass(eq=False)
class Embedding(Use):
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

    def rowwise(self, rows: Rows, front: int) -> bool:
        return _whole_rows(self, rows, front)

    def meet(self, share: Share, rows: Rows, rest: torch.Size) -> bool:
        tokens = rows.pick(self.tensor)[:, 0]
        share.tokens.append((tokens, tokens != (-1 if self.padding is None else self.padding)))
        return True

    @reads(functional.embedding)
    @staticmethod
    def _embedding(
        trace: Trace,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        if not trace.has(weight) or max_norm is not None or scale_grad_by_freq:
            return None
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        out = functional.embedding(input, trace.free(weight))
        return trace.note(out, Embedding(weight, input, padding=padding))


@dataclass(eq=False)
class Broadcast(Use):
    """A parameter that is broadcast to s, in the shape `spread`."""

    spread: tuple[int, ...] = ()

    @classmethod
    def of(cls, parameter: Any, data: Tensor | None = None, spread: tuple[int, ...] = ()) -> Use:
        """Return the use of `parameter`, which may be None; `spread` is its own shape by default."""
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
    """s = x̂ ⊙ w: the gain of a norm (read in :mod:`grsd.spectrum.operator.calls`), or of anything else."""

    name: ClassVar[str] = "scale"

    def gradient(self, delta: Tensor) -> Tensor:
        return (self.tensor * delta).sum_to_size(self.spread).reshape(self.parameter.shape)

    def change(self, g: Tensor) -> Tensor:
        return self.tensor * g.reshape(self.spread)

    def partners(self, uses: Sequence[Use], width: int) -> list[Use]:
        """The biases, if this is the gain of a norm."""
        biases = [use for use in uses if _is_bias(use, width)] if self.spread == (width,) else []
        return [self, *biases]

    def factor(self, uses: Sequence[Use], at: Setting) -> tuple[Factor, Form]:
        if self.spread != (at.width,) or self.tensor.dtype != at.delta.dtype:
            return super().factor(uses, at)
        plain = self.tensor.reshape(at.groups, at.count // at.groups, at.width)
        held = plain.numel() * at.delta.element_size()
        form = Form("x̂ Σ x̂ δ + b Σ δ", 4 * at.delta.numel(), held)
        return Gain(at.slot, plain, len(uses) - 1), form

    @reads(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
    @staticmethod
    def _mul(trace: Trace, input: Any, other: Any) -> Tensor | None:
        weight, x = (input, other) if trace.has(input) else (other, input)
        if not trace.has(weight) or trace.has(x) or not isinstance(x, Tensor):
            return None
        out = torch.mul(x, trace.free(weight))
        return trace.note(out, Scale.of(weight, x)) if out.shape == x.shape else None


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

    @reads(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
    @staticmethod
    def _add(trace: Trace, input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
        bias, x = (input, other) if trace.has(input) else (other, input)
        if not trace.has(bias) or trace.has(x) or not isinstance(x, Tensor) or alpha != 1:
            return None
        out = torch.add(x, trace.free(bias))
        return trace.note(out, Shift.of(bias)) if out.shape == x.shape else None


@dataclass(eq=False)
class Convolution(Use):
    """s = x ∗ W; `settings` are stride, padding, dilation, False, padding of the output, and groups."""

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


def _convolution(dimensions: int, call: Any) -> None:
    """Register the reader of F.conv1d, F.conv2d or F.conv3d."""

    def each(value: Any) -> tuple[int, ...]:
        given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return given * (dimensions // len(given))

    @reads(call)
    def _conv(
        trace: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if not trace.has(weight, bias) or trace.has(input) or input.ndim != dimensions + 2:
            return None
        steps, holes = each(stride), each(dilation)
        if padding == "same":
            spans = [h * (k - 1) for h, k in zip(holes, weight.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                return None  # it pads one side more than the other
            pads = tuple(span // 2 for span in spans)
        else:
            pads = each(0 if padding == "valid" else padding)
        out = call(input, trace.free(weight), trace.free(bias), steps, pads, holes, groups)
        settings = (steps, pads, holes, False, [0] * dimensions, groups)
        shift = Shift.of(bias, None, (weight.shape[0], *[1] * dimensions))
        return trace.note(out, Convolution(weight, input, settings=settings), shift)


for _dimensions, _call in ((1, functional.conv1d), (2, functional.conv2d), (3, functional.conv3d)):
    _convolution(_dimensions, _call)


def _is_bias(use: Use, width: int) -> bool:
    return isinstance(use, Shift) and use.spread == (width,)


def _whole_rows(use: Use, rows: Rows, front: int) -> bool:
    """Say whether the rows are all axes of s but the last."""
    return front == len(use.shape) - 1 and prod(use.shape[:-1]) == rows.count
