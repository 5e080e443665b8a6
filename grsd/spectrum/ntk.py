"""The operator M = J Jᵀ of a network on a batch, as a matrix that is only ever multiplied.

One forward pass is kept, with its graph. A product M u is then a vector–Jacobian product (v = Jᵀ u) followed by
a Jacobian–vector product (J v), the latter taken as the derivative of a VJP with respect to its own input, so that
only reverse-mode differentiation is needed. Lanczos, which calls it, is in :mod:`grsd.spectrum.krylov`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd.spectrum.observables import Observable, raw_output

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


class NTK:
    """The (T, T) neural tangent kernel M = J Jᵀ of a model on a batch: symmetric, positive semidefinite.

    Parameters
    ----------
    model
        Any module. Dropout must be inactive. Parameters that do not require a gradient are left out of J.
    inputs
        A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
    observable
        What the rows are: `Outputs`, `ClassLogits`, `TokenLogProb`, or an object with the same three methods.
    normalize
        ``"mean"``: M = J Jᵀ / n for the empirical measure of n samples (the operator of ė = −M e); ``"sum"``: J Jᵀ.

    Attributes
    ----------
    shape : (T, T)
    outputs : Tensor, (T,), f at the rows, detached.
    samples : int, n. For language models n = T.
    inner_weight : float, 1/n for "mean" and 1 for "sum": ⟨u, v⟩ = inner_weight · Σ u v.
    eps : float, the relative accuracy of a product (unit of rounding of the arithmetic that is used).

    Raises
    ------
    ValueError
        Active dropout, no trainable parameter, non-finite outputs, targets that do not fit, an output that does
        not depend on the parameters, or an operation without a second derivative.

    Notes
    -----
    Cost: one forward and two backward passes to build; about 1.4 forward-plus-backward passes per product. The
    graph of one forward and one backward pass is held until the object goes. Scaled-dot-product attention is run with
    its mathematical backend while the graph is built: the fused ones have no second derivative. The model is left as
    it was found: parameters, gradients, buffers and flags. Source: 2512.10427, section 2.2.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        normalize: Literal["mean", "sum"] = "mean",
    ) -> None:
        if normalize not in ("mean", "sum"):
            raise ValueError(f'normalize must be "mean" or "sum", got {normalize!r}')
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("no parameter of the model requires a gradient, so J is empty")
        _refuse_dropout(model)
        rows = _forward(model, inputs, observable)
        self._rows = rows
        self._observable = observable
        self.normalize = normalize
        self.outputs: Tensor = rows.detach()
        self.samples: int = observable.samples(self.outputs)
        self.inner_weight: float = 1.0 / self.samples if normalize == "mean" else 1.0
        self._probe = torch.zeros_like(self.outputs, requires_grad=True)
        self._used, self._vjp = self._transposable_vjp()

    def _transposable_vjp(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that f depends on, and Jᵀu₀ as a graph whose derivative in u₀ is J."""
        products = torch.autograd.grad(self._rows, self._parameters, self._probe, create_graph=True, allow_unused=True)
        used = [(p, w) for p, w in zip(self._parameters, products, strict=True) if w is not None]
        if not used:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")
        parameters, vjp = [p for p, _ in used], [w for _, w in used]
        try:
            torch.autograd.grad(vjp, self._probe, vjp, retain_graph=True)
        except RuntimeError as failure:
            raise ValueError(
                f"an operation of this model has no second derivative ({str(failure).splitlines()[0]}). Fused "
                'attention is the usual cause: load the model with attn_implementation="eager"'
            ) from failure
        return parameters, vjp

    @property
    def shape(self) -> tuple[int, int]:
        return (self.outputs.numel(), self.outputs.numel())

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs.dtype

    @property
    def device(self) -> torch.device:
        return self.outputs.device

    @property
    def eps(self) -> float:
        tf32 = self.device.type == "cuda" and self.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return 2.0**-11 if tf32 else torch.finfo(self.dtype).eps

    @property
    def error(self) -> Tensor:
        """The observable's error vector, (T,): target − output, onehot − softmax, or −log q."""
        return self._observable.error(self.outputs)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self._used)
        return f"NTK(T={self.shape[0]}, parameters={count}, normalize={self.normalize!r}, {self.dtype}, {self.device})"

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return Jᵀu as one tensor per parameter in use (no normalisation). Cost: one backward pass."""
        self._check(u, (self.shape[0],))
        with _same_parameters():
            return torch.autograd.grad(self._rows, self._used, u, retain_graph=True)

    def jvp(self, v: tuple[Tensor, ...]) -> Tensor:
        """Return J v, shape (T,), for one tensor per parameter in use. Cost: one pass through the doubled graph."""
        with _same_parameters():
            return torch.autograd.grad(self._vjp, self._probe, v, retain_graph=True)[0]

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M u for u of shape (T,) or (T, k), same dtype and device. Cost: about 1.4 (F + B) a column."""
        if u.ndim == 2:
            self._check(u, (self.shape[0], u.shape[1]))
            return torch.stack([self @ column for column in u.unbind(1)], dim=1)
        return self.jvp(self.vjp(u)) * self.inner_weight

    def jacobian(self) -> Tensor:
        """Return J itself, (T, P), in the order of `model.parameters()`. Cost: T backward passes, T·P numbers."""
        rows = []
        for unit in torch.eye(self.shape[0], dtype=self.dtype, device=self.device):
            rows.append(torch.cat([g.reshape(-1) for g in self.vjp(unit)]))
        return torch.stack(rows)

    def to_dense(self) -> Tensor:
        """Return M as a (T, T) matrix by T products. Cost: about 1.4 T (F + B); no (T, P) matrix is formed."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def scipy(self) -> LinearOperator:
        """Return M as a `scipy.sparse.linalg.LinearOperator` on NumPy vectors (for `eigsh` and friends)."""

        def product(u: Any) -> Any:
            return (self @ torch.as_tensor(u, dtype=self.dtype, device=self.device)).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=numpy_dtype)

    def _check(self, u: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(u.shape) != shape:
            raise ValueError(f"M is {self.shape}: it multiplies vectors of shape {shape}, got {tuple(u.shape)}")
        if u.dtype != self.dtype or u.device != self.device:
            raise ValueError(f"M is {self.dtype} on {self.device}, the vector is {u.dtype} on {u.device}")


@contextmanager
def _same_parameters() -> Iterator[None]:
    try:
        yield
    except RuntimeError as failure:
        if "modified by an inplace operation" not in str(failure):
            raise
        raise RuntimeError(
            "the model's parameters were changed in place after this operator was made, so its graph is gone; "
            "make a new NTK after every training step"
        ) from failure


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and rate > 0:
            raise ValueError(
                f"dropout {name!r} is active (p = {rate}): each pass would see another network. Call model.eval() first"
            )


def _forward(model: nn.Module, inputs: Inputs, observable: Observable) -> Tensor:
    """Run the model once with its graph and return the rows; what the pass writes to buffers goes to copies."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args: tuple[Any, ...] = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else inputs
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        rows = observable.rows(raw_output(functional_call(model, buffers, args, kwargs)))
    if rows.ndim != 1:
        raise ValueError(f"the observable must give one number per row, shape (T,); it gave {tuple(rows.shape)}")
    if not rows.requires_grad:
        raise ValueError("the outputs carry no gradient: was the model's forward run under no_grad or detached?")
    bad = int((~torch.isfinite(rows.detach())).sum())
    if bad:
        raise ValueError(f"{bad} of {rows.numel()} outputs are not finite; check the checkpoint and the inputs")
    return rows
