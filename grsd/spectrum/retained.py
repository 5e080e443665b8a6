"""The plain product M u = J (Jᵀ u) on a retained graph, with reverse-mode differentiation only.

A vector–Jacobian product is followed by a Jacobian–vector product, which is taken as the derivative of a VJP with respect
to its own input. The factored form, which is the default of :class:`grsd.spectrum.NTK`, is in :mod:`grsd.spectrum.factored`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CHANGED = (
    "the model's parameters were changed in place after this operator was made, so its graph is gone; "
    "make a new NTK after every training step"
)


class Retained:
    """J and Jᵀ of `rows`, (T,), with respect to those of `parameters` that it depends on (`used`)."""

    def __init__(self, rows: Tensor, parameters: Sequence[Tensor]) -> None:
        self._rows = rows
        self._probe = torch.zeros_like(rows.detach(), requires_grad=True)
        products = torch.autograd.grad(rows, parameters, self._probe, create_graph=True, allow_unused=True)
        pairs = [(p, w) for p, w in zip(parameters, products, strict=True) if w is not None]
        if not pairs:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")
        self.used, self._vjp = [p for p, _ in pairs], [w for _, w in pairs]
        try:
            torch.autograd.grad(self._vjp, self._probe, self._vjp, retain_graph=True)
        except RuntimeError as failure:
            raise ValueError(
                f"an operation of this model has no second derivative ({str(failure).splitlines()[0]}). Fused "
                'attention is the usual cause: load the model with attn_implementation="sdpa" (run here in its plain form; '
                'good in float64 too) or "eager"'
            ) from failure

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return Jᵀu as one tensor per parameter in use. Cost: one backward pass."""
        with same_parameters():
            return torch.autograd.grad(self._rows, self.used, u, retain_graph=True)

    def jvp(self, v: tuple[Tensor, ...]) -> Tensor:
        """Return J v, shape (T,), for one tensor per parameter in use. Cost: one pass through the doubled graph."""
        with same_parameters():
            return torch.autograd.grad(self._vjp, self._probe, v, retain_graph=True)[0]


@contextmanager
def same_parameters() -> Iterator[None]:
    try:
        yield
    except RuntimeError as failure:
        if "modified by an inplace operation" not in str(failure):
            raise
        raise RuntimeError(CHANGED) from failure
