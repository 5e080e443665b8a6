"""Calls that the trace reads beside those of :mod:`grsd.spectrum.operator.rules`.

A norm is a gain and a bias. A loss a row has no parameter, and becomes one operation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grsd.spectrum.operator.factors import Use
from grsd.spectrum.operator.rules import Scale, Shift
from grsd.spectrum.operator.trace import reads
from grsd.spectrum.programs.record import CrossEntropy

CHANNELS = (functional.group_norm, functional.batch_norm)  # norms with one gain a channel


@reads(functional.layer_norm, functional.rms_norm, *CHANNELS)
def _norm(call: SimpleNamespace) -> list[Use]:
    """x̂ is the norm without gain and bias."""
    given = {**vars(call), "weight": None}
    function, bias = given.pop("func"), given.get("bias")
    given |= {"bias": None} if "bias" in given else {}
    if given.get("training"):  # the running statistics must not move twice
        given |= {"running_mean": None, "running_var": None}
    x = call.input
    spread = (x.shape[1], *[1] * (x.ndim - 2)) if function in CHANNELS else ()
    with torch.no_grad():
        plain = function(**given)
    return [Scale.of(call.weight, plain, spread), Shift.of(bias, None, spread)]


@reads(functional.cross_entropy, always=True)
def _cross_entropy(call: SimpleNamespace) -> Tensor | None:
    """A loss a row, whose gradient is made in one pass over the logits and kept, row by row."""
    settings: tuple[Any, ...] = (call.weight, call.size_average, call.reduce, call.reduction)
    if settings != (None, None, None, "none") or call.label_smoothing != 0:
        return None
    logits, target = call.input, call.target
    if logits.ndim != 2 or target.dtype != torch.int64 or not logits.requires_grad:
        return None
    if bool(((target < 0) | (target == call.ignore_index)).any()):
        return None
    if torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64:
        logits = logits.float()  # as torch runs a loss under autocast
    return CrossEntropy.apply(logits, target)  # type: ignore[no-untyped-call]
