"""Calls that the trace reads beside those of :mod:`grsd.spectrum.operator.rules`.

A norm is a gain and a bias, so that it is no rule of its own. Dropout is refused. A loss a row has no parameter, and becomes
one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grsd.spectrum.operator.rules import Scale, Shift
from grsd.spectrum.operator.trace import Trace, reads
from grsd.spectrum.programs.record import CrossEntropy


def _norm(
    trace: Trace,
    norm: Callable[[Any, Any], Tensor],
    weight: Any,
    bias: Any = None,
    spread: tuple[int, ...] = (),
    plain: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """Read a call of norm(weight, bias); x̂ is `plain()`, or the norm without either."""
    if not trace.has(weight, bias):
        return None
    data = None
    if trace.has(weight):
        with torch.no_grad():
            data = plain() if plain else norm(None, None)
    out = norm(trace.free(weight), trace.free(bias))
    return trace.note(out, Scale.of(weight, data, spread), Shift.of(bias, None, spread))


@reads(functional.layer_norm)
def _layer_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor | None:
    def norm(w: Any, b: Any) -> Tensor:
        return functional.layer_norm(input, normalized_shape, w, b, eps)

    return _norm(trace, norm, weight, bias)


@reads(functional.rms_norm)
def _rms_norm(
    trace: Trace, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor | None:
    return _norm(trace, lambda w, b: functional.rms_norm(input, normalized_shape, w, eps), weight)


@reads(functional.group_norm)
def _group_norm(
    trace: Trace,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor | None:
    def norm(w: Any, b: Any) -> Tensor:
        return functional.group_norm(input, num_groups, w, b, eps)

    return _norm(trace, norm, weight, bias, _channels(input))


@reads(functional.batch_norm)
def _batch_norm(
    trace: Trace,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    def norm(w: Any, b: Any) -> Tensor:
        running = (running_mean, running_var)
        return functional.batch_norm(input, *running, w, b, training, momentum, eps)

    def plain() -> Tensor:  # must not move the running statistics
        mean, var = (None, None) if training else (running_mean, running_var)
        return functional.batch_norm(input, mean, var, None, None, training, eps=eps)

    return _norm(trace, norm, weight, bias, _channels(input), plain)


def _channels(x: Tensor) -> tuple[int, ...]:
    """Return the shape in which one number a channel is broadcast to x."""
    return (x.shape[1], *[1] * (x.ndim - 2))


@reads(functional.scaled_dot_product_attention)
def _attention(
    trace: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    _dropout(trace, query, dropout_p)


@reads(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
@reads(functional.alpha_dropout, functional.feature_alpha_dropout)
def _dropout(
    trace: Trace, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    if training and p > 0:
        raise ValueError(
            f"dropout is active (p = {p}): each pass would see another network. "
            "Call model.eval() first"
        )


@reads(functional.cross_entropy)
def _cross_entropy(
    trace: Trace,
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """A loss a row, whose gradient is made in one pass over the logits and kept as fixed vectors."""
    if (weight, size_average, reduce, reduction, label_smoothing) != (None, None, None, "none", 0):
        return None
    if input.ndim != 2 or target.dtype != torch.int64 or not input.requires_grad:
        return None
    if bool(((target < 0) | (target == ignore_index)).any()):
        return None
    return CrossEntropy.apply(input, target)  # type: ignore[no-untyped-call]
