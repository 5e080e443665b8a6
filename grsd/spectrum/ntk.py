"""The operator M = J Jᵀ of a network on a batch, as a matrix that is only ever multiplied.

By default a product is the factored one, J_ε K J_εᵀ u, which forms no parameter gradient (:mod:`grsd.spectrum.factored`).
The plain form, a vector–Jacobian product followed by a Jacobian–vector product on a retained graph, is the definition and
the other engine (:mod:`grsd.spectrum.retained`). Lanczos, which calls either, is in :mod:`grsd.spectrum.krylov`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from grsd.spectrum.factored import Factored
from grsd.spectrum.observables import Observable, raw_output
from grsd.spectrum.plan import Plan, PlanRow
from grsd.spectrum.replay import Product, replayed
from grsd.spectrum.retained import CHANGED, Retained
from grsd.spectrum.uses import Trace

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Method = Literal["auto", "graph", "factored"]
_FORWARD = threading.RLock()  # buffers are swapped for copies during a pass, which two threads must not do at once


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
    method
        ``"factored"``: J_ε K J_εᵀ; ``"graph"``: VJP and JVP on a retained graph; ``"auto"``: factored, and the graph
        for a model whose backward pass cannot be recorded (`plan` says so).

    Attributes
    ----------
    shape : (T, T)
    outputs : Tensor, (T,), f at the rows, detached.
    samples : int, n. For language models n = T.
    inner_weight : float, 1/n for "mean" and 1 for "sum": ⟨u, v⟩ = inner_weight · Σ u v.
    eps : float, the relative accuracy of a product (unit of rounding of the arithmetic that is used).
    method : "factored" or "graph", the one that is in use.

    Raises
    ------
    ValueError
        Active dropout, no trainable parameter, non-finite outputs, targets that do not fit, an output that does
        not depend on the parameters, layers whose inputs are overwritten in place, or an operation without a second
        derivative.
    RuntimeError
        A product after the parameters were changed.

    Notes
    -----
    Cost of "factored": see :mod:`grsd.spectrum.factored`. Cost of "graph": one forward and two backward passes to build;
    about 1.4 forward-plus-backward passes per product, and the graph of one forward and one backward pass is held until
    the object goes. Scaled-dot-product attention is run with its mathematical backend: the fused ones have no second
    derivative. The model is left as it was found: parameters, gradients, buffers and flags; the state of the random
    generator is put back. Source: 2512.10427, section 2.2.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        normalize: Literal["mean", "sum"] = "mean",
        method: Method = "auto",
    ) -> None:
        if normalize not in ("mean", "sum"):
            raise ValueError(f'normalize must be "mean" or "sum", got {normalize!r}')
        if method not in ("auto", "graph", "factored"):
            raise ValueError(f'method must be "auto", "graph" or "factored", got {method!r}')
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names, self._parameters = [name for name, _ in named], [p for _, p in named]
        if not self._parameters:
            raise ValueError("no parameter of the model requires a gradient, so J is empty")
        refuse_dropout(model)
        self._model, self._inputs, self._observable = model, inputs, observable
        self._versions = [p._version for p in self._parameters]
        self._graph: Retained | None = None
        self._factored: Factored | None = None
        self._product: Product | None = None
        self._why = ""
        if method != "graph":
            self._factor(strict=method == "factored")
        if self._factored is None:
            self._retain()
        self.method = "graph" if self._factored is None else "factored"
        self.normalize = normalize
        self.samples: int = observable.samples(self.outputs)
        self.inner_weight: float = 1.0 / self.samples if normalize == "mean" else 1.0

    def _factor(self, strict: bool) -> None:
        trace = Trace(self._parameters)
        rows = forward_rows(self._model, self._inputs, self._observable, trace)
        trace.check_inputs()
        self.outputs: Tensor = rows.detach()
        try:
            self._factored = Factored(rows, trace, self._names)
        except RuntimeError as failure:
            self._why = str(failure).splitlines()[0]
            if strict:
                raise ValueError(
                    f'the backward pass of this model cannot be recorded ({self._why}); use method="auto" or "graph"'
                ) from failure

    def _retain(self) -> Retained:
        """Return the retained graph of the model, made on first use."""
        if self._graph is None:
            self._same_parameters()
            rows = forward_rows(self._model, self._inputs, self._observable)
            if self._factored is not None and not torch.equal(rows.detach(), self.outputs):
                raise RuntimeError("the model or its inputs were changed after this operator was made; make a new NTK")
            self.outputs = rows.detach()
            self._graph = Retained(rows, self._parameters)
        return self._graph

    def _same_parameters(self) -> None:
        if any(p._version != version for p, version in zip(self._parameters, self._versions, strict=True)):
            raise RuntimeError(CHANGED)

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

    def plan(self) -> Plan:
        """Return what a product does, parameter by parameter, with FLOPs and bytes; prints as a table."""
        if self._factored is not None:
            return Plan("factored", tuple(self._factored.plan_rows))
        rule = f"cannot be recorded: {self._why}" if self._why else "as asked"
        return Plan("graph", (PlanRow("all parameters", rule, "VJP, then JVP; not counted", 0, 0),))

    def __repr__(self) -> str:
        used = self._retain().used if self._factored is None else [self._parameters[k] for k in self._factored.used]
        count = sum(p.numel() for p in used)
        return (
            f"NTK(T={self.shape[0]}, parameters={count}, normalize={self.normalize!r}, method={self.method!r}, "
            f"{self.dtype}, {self.device})"
        )

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return Jᵀu as one tensor per parameter in use (no normalisation).

        Cost: one backward pass; the first call of `vjp`, `jvp` or `jacobian` on a factored operator runs the model again.
        """
        self._check(u, (self.shape[0],))
        return self._retain().vjp(u)

    def jvp(self, v: tuple[Tensor, ...]) -> Tensor:
        """Return J v, shape (T,), for one tensor per parameter in use. Cost: one pass through the doubled graph."""
        return self._retain().jvp(v)

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M u for u of shape (T,) or (T, k), same dtype and device. Cost: one product a column."""
        if u.ndim == 2:
            self._check(u, (self.shape[0], u.shape[1]))
            return torch.stack([self @ column for column in u.unbind(1)], dim=1)
        self._check(u, (self.shape[0],))
        if self._factored is None:
            graph = self._retain()
            return graph.jvp(graph.vjp(u)) * self.inner_weight
        self._same_parameters()
        if self._product is None:
            self._product = replayed(self._factored, u)
        return self._product(u) * self.inner_weight

    def jacobian(self) -> Tensor:
        """Return J itself, (T, P), in the order of `model.parameters()`. Cost: T backward passes, T·P numbers."""
        rows = []
        for unit in torch.eye(self.shape[0], dtype=self.dtype, device=self.device):
            rows.append(torch.cat([g.reshape(-1) for g in self.vjp(unit)]))
        return torch.stack(rows)

    def to_dense(self) -> Tensor:
        """Return M as a (T, T) matrix by T products; no (T, P) matrix is formed."""
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


def refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and rate > 0:
            raise ValueError(
                f"dropout {name!r} is active (p = {rate}): each pass would see another network. Call model.eval() first"
            )


def forward_rows(model: nn.Module, inputs: Inputs, observable: Observable, trace: Trace | None = None) -> Tensor:
    """Run the model once with its graph and return the rows; what the pass writes to buffers goes to copies."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args: tuple[Any, ...] = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else inputs
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args, kwargs = tree_map(_copied, args), tree_map(_copied, kwargs)
    fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())  # type: ignore[no-untyped-call]
    with _FORWARD, fork, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), trace or nullcontext():
        rows = observable.rows(raw_output(functional_call(model, buffers, args, kwargs)))
    if rows.ndim != 1:
        raise ValueError(f"the observable must give one number per row, shape (T,); it gave {tuple(rows.shape)}")
    if not rows.requires_grad:
        raise ValueError("the outputs carry no gradient: was the model's forward run under no_grad or detached?")
    bad = int((~torch.isfinite(rows.detach())).sum())
    if bad:
        raise ValueError(f"{bad} of {rows.numel()} outputs are not finite; check the checkpoint and the inputs")
    return rows


def _copied(x: Any) -> Any:
    """Copy a tensor, so that a model that writes into its inputs writes into the copy."""
    return x.detach().clone() if isinstance(x, Tensor) else x
