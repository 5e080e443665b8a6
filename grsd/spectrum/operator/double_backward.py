"""The plain product M u = J (Jᵀ u) on a retained graph, with reverse-mode differentiation only.

A vector–Jacobian product is followed by a Jacobian–vector product, which is taken as the derivative of a VJP with respect
to its own input. The factored form, which is the default of :class:`grsd.spectrum.NTK`, is in :mod:`grsd.spectrum.operator.factored`.
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


CURES = {
    "embedding_bag": "Write nn.EmbeddingBag as nn.Embedding and a sum over its tokens",
    "cdist": "Write torch.cdist as the root of ((x[:, None] - y) ** 2).sum(-1)",
    "torch.compile": "Pass the module that was compiled, model._orig_mod",
    "attention": 'Fused attention is the usual cause: load the model with attn_implementation="sdpa" (run here in its '
    'plain form; good in float64 too) or "eager"; write any other operation with elementary ones',
}


class Retained:
    """J and Jᵀ of `rows`, (T,), with respect to those of `parameters` that it depends on (`used`)."""

    def __init__(self, rows: Tensor, parameters: Sequence[Tensor]) -> None:
        self._rows = rows
        self._probe = torch.zeros_like(rows.detach(), requires_grad=True)
        products = torch.autograd.grad(
            rows, parameters, self._probe, create_graph=True, allow_unused=True
        )
        pairs = [(p, w) for p, w in zip(parameters, products, strict=True) if w is not None]
        if not pairs:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")
        self.used, self._vjp = [p for p, _ in pairs], [w for _, w in pairs]
        u = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        w = self.vjp(u)
        try:
            back = self.jvp(w)
        except RuntimeError as failure:
            reason = str(failure).splitlines()[0]
            cure = next(
                (cure for words, cure in CURES.items() if words in reason), CURES["attention"]
            )
            raise ValueError(
                f"an operation of this model has no second derivative ({reason}). {cure}"
            ) from failure
        there, size = (
            float((u.double() * back.double()).sum()),
            sum(float(x.double().square().sum()) for x in w),
        )
        rough = any(torch.finfo(x.dtype).bits < 32 for x in (rows, *w))
        # ⟨u, J Jᵀu⟩ = ‖Jᵀu‖² to far more than rounding, even to that of a part in bf16, whose errors average
        if not abs(there - size) <= (0.2 if rough else 3e-3) * size:
            raise ValueError(
                f"⟨u, J Jᵀu⟩ is {there:.4g} and ‖Jᵀu‖² is {size:.4g}: a hook or an autograd.Function of this model changes "
                "gradients on their way (clipping, normalising, a solver), so that the backward pass gives no Jacobian to "
                "double differentiation; take it out of the model"
            )

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
