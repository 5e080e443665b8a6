"""The plain product M u = J (Jᵀ u) on a retained graph, with reverse-mode differentiation only.

A vector–Jacobian product is followed by a Jacobian–vector product, which is taken as the derivative
of a VJP with respect to its own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from grsd.spectrum.operator.precision import of_graph, unmixed

Gradients = dict[int, Tensor]  # number of a parameter → one of its shape

MASKED = (
    "A row of attention that is masked as a whole (padding on the left) is NaN in eager attention: "
    'load the model with attn_implementation="sdpa", or pad on the right. Else check the '
    "checkpoint and the inputs, or use a wider dtype (model.double())"
)
CURES = {
    "embedding_bag": "Write nn.EmbeddingBag as nn.Embedding and a sum over its tokens",
    "cdist": "Write torch.cdist as the root of ((x[:, None] - y) ** 2).sum(-1)",
    "torch.compile": "Pass the module that was compiled, model._orig_mod",
}
ATTENTION = (
    "Fused attention is the usual cause: load the model with attn_implementation="
    '"sdpa" (run here in its plain form; good in float64 too) or "eager"; write any other '
    "operation with elementary ones"
)


class Retained:
    """J and Jᵀ of `rows`, (T,), for the `parameters` that it depends on: their numbers, `used`."""

    def __init__(self, rows: Tensor, parameters: Sequence[Tensor]) -> None:
        self._rows, self.parameters = rows, parameters
        self.outputs = rows.detach()
        self._probe = torch.zeros_like(rows.detach(), requires_grad=True)
        with unmixed():
            products = torch.autograd.grad(
                rows, parameters, self._probe, create_graph=True, allow_unused=True
            )
        self._vjp = {k: w for k, w in enumerate(products) if w is not None}
        self.used = [*self._vjp]
        if not self.used:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")
        self.dtypes, self.convolves = of_graph([*self._vjp.values()])
        # ⟨u, J Jᵀu⟩ = ‖Jᵀu‖² for one u: the graph can be differentiated, and gives the Jacobian.
        u = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
        w = self.vjp(u)
        try:
            back = self.jvp(w)
        except RuntimeError as failure:
            reason = str(failure).splitlines()[0]
            cure = next((cure for words, cure in CURES.items() if words in reason), ATTENTION)
            raise ValueError(
                f"an operation of this model has no second derivative ({reason}). {cure}"
            ) from failure
        inner = float((u.double() * back.double()).sum())
        square = sum(float(x.double().square().sum()) for x in w.values())
        if not isfinite(inner) or not isfinite(square):
            raise ValueError(f"gradients are not finite although the outputs are. {MASKED}")
        # far more than rounding, even than that of a part in bf16, whose errors average
        rough = any(torch.finfo(x.dtype).bits < 32 for x in (rows, *w.values()))
        if not abs(inner - square) <= (0.2 if rough else 3e-3) * square:
            raise ValueError(
                f"⟨u, J Jᵀu⟩ is {inner:.4g} and ‖Jᵀu‖² is {square:.4g}: a hook or an "
                "autograd.Function of this model changes gradients on their way (clipping, "
                "normalising, a solver), so that they give no Jacobian; take it out of the model"
            )

    def vjp(self, u: Tensor) -> Gradients:
        """Return Jᵀu. Cost: one backward pass."""
        used = [self.parameters[k] for k in self.used]
        with unmixed():
            gradients = torch.autograd.grad(self._rows, used, u, retain_graph=True)
        return dict(zip(self.used, gradients, strict=True))

    def jvp(self, v: Gradients) -> Tensor:
        """Return J v, (T,). Cost: one pass through the doubled graph."""
        products, vectors = [*self._vjp.values()], [v[k] for k in self.used]
        with unmixed():
            return torch.autograd.grad(products, self._probe, vectors, retain_graph=True)[0]
