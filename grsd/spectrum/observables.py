"""What f is: the rows whose Jacobian makes the operator, and the error that lives on them.

An observable turns a model's output into T numbers, one per row of the Jacobian, and says which
error vector belongs to them. The operator itself lives in :mod:`grsd.spectrum.operator.ntk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100  # the target of a token that is not counted, as in torch and transformers
INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


@runtime_checkable
class Observable(Protocol):
    """Maps a model's output to the rows f of the operator; any object with these methods."""

    def rows(self, output: Tensor) -> Tensor:
        """Return f, shape (T,), differentiable with respect to `output`."""

    def error(self, rows: Tensor) -> Tensor:
        """Return the error vector on the rows, shape (T,)."""

    def samples(self, rows: Tensor) -> int:
        """Return how many samples the T rows come from (the divisor of ``normalize="mean"``)."""


def raw_output(output: Any) -> Tensor:
    """Take the tensor out of a model's output: itself, its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"the model returned {type(output).__name__}; expected a tensor, an object with .logits or "
        "a tuple that starts with a tensor: wrap the model so that it returns what makes the rows"
    )


def _check_targets(targets: Tensor, shape: torch.Size, what: str) -> None:
    if targets.shape != shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; the {what} need {tuple(shape)}"
        )


def _indices(targets: Tensor) -> Tensor:
    """Return class indices as int64, which torch's losses need."""
    kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
    if not isinstance(targets, Tensor) or targets.dtype not in INTEGERS:
        raise TypeError(f"targets are {kind}; class indices are a tensor of integers")
    return targets.long()


def _counted(targets: Tensor, output: Tensor, what: str, ignore: int = IGNORE) -> Tensor:
    """Return the mask of counted targets; `output` holds classes on its last axis."""
    if output.ndim < 2:
        raise ValueError(f"{what}, the model returned {tuple(output.shape)}")
    _check_targets(targets, output.shape[:-1], "logits")
    counted = targets != ignore
    if not bool(counted.any()):
        raise ValueError(f"no target is counted: all {targets.numel()} are {ignore}")
    low, high = int(targets[counted].min()), int(targets[counted].max())
    if low < 0 or high >= output.shape[-1]:
        raise ValueError(
            f"targets run from {low} to {high}, but the model's output has {output.shape[-1]} "
            "classes: the tokenizer or the labels do not belong to this model"
        )
    return counted


@dataclass(frozen=True)
class Outputs:
    """Regression: every scalar output is a row, and e = target − output.

    `targets` have the shape of the model's output, or are None when only the operator is wanted.
    With targets or without, samples are counted along the first axis of the output: for shape
    (n, d) there are T = n·d rows and n samples, for shape (n,) T = n of both. Under the flow of
    L = (1/2n)‖e‖² the error obeys ė = −M e exactly (2512.10427, section 2.2).
    """

    targets: Tensor | None = None

    def rows(self, output: Tensor) -> Tensor:
        if output.ndim == 0:
            raise ValueError("the model returned a single number; expected a batch axis, (n, ...)")
        if self.targets is not None:
            _check_targets(self.targets, output.shape, "outputs")
        return output.reshape(-1)

    def error(self, rows: Tensor) -> Tensor:
        if self.targets is None:
            raise ValueError("Outputs() without targets has no error; pass Outputs(targets)")
        return self.targets.reshape(-1).to(rows) - rows

    def samples(self, rows: Tensor) -> int:
        """Return n; without targets, `rows` must be the model's output, whose shape says it."""
        return len(rows if self.targets is None else self.targets)


@dataclass(frozen=True)
class ClassLogits:
    """Classification: every logit is a row, and the error is δ = onehot(target) − softmax.

    `targets` are integers in [0, C), of the output's shape without its last axis (the classes).
    T = n·C rows from n samples. δ = −n ∂L/∂f for the mean cross-entropy L, so ḟ = M δ exactly;
    δ itself obeys δ̇ = −H M δ with H = blockdiag(diag q − q qᵀ), not −M δ.
    """

    targets: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _indices(self.targets))

    def rows(self, output: Tensor) -> Tensor:
        counted = _counted(self.targets, output, "class logits need shape (..., classes)")
        if not bool(counted.all()):
            raise ValueError(
                f"ClassLogits counts all samples; drop those with target {IGNORE} first"
            )
        return output.reshape(-1)

    def error(self, rows: Tensor) -> Tensor:
        logits = rows.reshape(self.targets.numel(), -1)
        hot = functional.one_hot(self.targets.reshape(-1), logits.shape[-1]).to(logits)
        return (hot - torch.softmax(logits, dim=-1)).reshape(-1)

    def samples(self, rows: Tensor) -> int:
        return self.targets.numel()


@dataclass(frozen=True)
class BinaryLogits:
    """Two classes by one logit: every logit is a row, and the error is e = y − σ(f).

    `targets` are probabilities y in [0, 1], or labels 0 and 1 of any type, of the output's shape or
    of that without a last axis of length 1. T logits are T rows and T samples. e = −n ∂L/∂f for the
    mean binary cross-entropy L, so ḟ = M e exactly; e itself obeys ė = −H M e with
    H = diag(σ(f)(1 − σ(f))).
    """

    targets: Tensor

    def rows(self, output: Tensor) -> Tensor:
        if output.ndim == 0:
            raise ValueError("the model returned a single number; expected a batch axis, (n, ...)")
        one = output.ndim > self.targets.ndim and output.shape[-1] == 1
        _check_targets(self.targets, output.shape[:-1] if one else output.shape, "logits")
        low, high = float(self.targets.min()), float(self.targets.max())
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"targets run from {low:g} to {high:g}; those of one logit are probabilities in "
                "[0, 1]. Of labels −1 and 1 take (y + 1) / 2"
            )
        return output.reshape(-1)

    def error(self, rows: Tensor) -> Tensor:
        return self.targets.reshape(-1).to(rows) - torch.sigmoid(rows)

    def samples(self, rows: Tensor) -> int:
        return rows.numel()


@dataclass(frozen=True)
class TokenLogProb:
    """Language modelling: row i is f_i = log q(y_i | x_i), and e = −log q (2512.10427, eq. 24).

    `targets` are integers (B, L), aligned with logits (B, L, V); tokens with target `ignore_index`
    give no row. T counted tokens are T rows and T samples. Under the flow of L = (1/T) Σ e the
    error obeys ė = −M·1 exactly, not ė = −M e: what evolves is shown by the start vector 1, what
    the paper draws by the start vector e.
    """

    targets: Tensor
    ignore_index: int = IGNORE

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _indices(self.targets))

    def rows(self, output: Tensor) -> Tensor:
        what = "token logits need shape (batch, length, vocabulary)"
        counted = _counted(self.targets, output, what, self.ignore_index)
        if bool(counted.all()):  # no copy of the logits
            logits, targets = output.flatten(0, -2), self.targets.flatten()
        else:
            logits, targets = output[counted], self.targets[counted]
        return -functional.cross_entropy(logits, targets, reduction="none")

    def error(self, rows: Tensor) -> Tensor:
        return -rows

    def samples(self, rows: Tensor) -> int:
        return rows.numel()
