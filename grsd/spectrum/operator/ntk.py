"""The operator M = J Jᵀ of a network on a batch, as a matrix that is only ever multiplied.

By default a product is the factored one, J_ε K J_εᵀ u, which forms no parameter gradient
(:mod:`grsd.spectrum.operator.factored`). The plain form, a vector–Jacobian product followed by a
Jacobian–vector product on a retained graph, is the definition and the other engine
(:mod:`grsd.spectrum.operator.double_backward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grsd import checks
from grsd.spectrum.observables import Observable, Outputs
from grsd.spectrum.operator.base import (
    Inputs,
    Normalize,
    NTKBase,
    Plan,
    PlanRow,
    copied,
    refuse_dropout,
)
from grsd.spectrum.operator.cross import CrossKernel, Side
from grsd.spectrum.operator.cuda_graph import Product, replayed
from grsd.spectrum.operator.double_backward import Retained
from grsd.spectrum.operator.factored import Factored
from grsd.spectrum.operator.layers import by_layer, select
from grsd.spectrum.operator.precision import rounding, unmixed
from grsd.spectrum.operator.trace import Trace
from grsd.spectrum.programs.record import Unrecordable

Method = Literal["auto", "graph", "factored"]

__all__ = ["NTK", "Inputs", "Method", "refuse_dropout"]


class NTK(NTKBase):
    """The (T, T) neural tangent kernel M = J Jᵀ of a model on a batch, symmetric and semidefinite.

    Parameters
    ----------
    model
        Any module without active dropout. Parameters that require no gradient are left out of J.
    inputs
        A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
    observable
        What the rows are: `Outputs`, `ClassLogits`, `BinaryLogits`, `TokenLogProb`, or one with the
        same methods.
    normalize
        ``"mean"``: J Jᵀ / n for n samples (the operator of ė = −M e); ``"sum"``: J Jᵀ.
    method
        ``"factored"``: J_ε K J_εᵀ; ``"graph"``: VJP and JVP on a retained graph; ``"auto"``:
        factored, and the graph where the backward pass cannot be recorded (`plan` says so).
    parameters
        Names of the parameters that J is taken over; None for all that require a gradient.
    products
        How many are expected. A form that costs more at set-up and less in every product is taken
        where it pays within them, by counted FLOPs; `plan` says from how many on it would.

    Attributes
    ----------
    outputs : (T,), f at the rows, detached.
    samples : n. For language models n = T.
    inner_weight : 1/n for "mean" and 1 for "sum": ⟨u, v⟩ = inner_weight · Σ u v.
    semidefinite : True: what knows it reads a negative Ritz value as rounding.
    method : "factored" or "graph", the one that is in use.

    Raises
    ------
    ValueError
        Active dropout or other noise, no trainable parameter, a complex one or one in pieces,
        non-finite outputs or gradients, targets that do not fit, an output that does not depend on
        the parameters, a forward pass that changes parameters or overwrites inputs of layers, an
        operation without a second derivative, hooks on gradients (those that only log as well), an
        autograd.Function whose gradients are no derivatives, or a model in a wrapper
        (`DataParallel`, `torch.jit`).
    RuntimeError
        A product after the model was changed: see :mod:`grsd.spectrum.operator.watch` for how that
        is seen. Inputs, targets and buffers are copied, so that theirs may change.

    Notes
    -----
    Cost of "factored": see :mod:`grsd.spectrum.operator.factored`. Cost of "graph": one forward and
    three backward passes to build, about 1.4 forward-plus-backward passes per product, and one such
    graph held. Attention is run with its mathematical backend: the fused ones have no second
    derivative. A compiled module is run as it was written, and parts under `torch.utils.checkpoint`
    without it. Checks at the door cost a walk over the graph; an autograd.Function, three forward
    and four backward passes (:mod:`grsd.spectrum.operator.gradients`). Not seen: noise from a
    counter or generator of the model's own that is none of torch, `random` or NumPy; and what the
    forward pass detaches (straight-through estimates by `detach`) is constant in J, as it is for
    autograd. The model and the random generators are left as they were found. Multiples, sums, M.T
    and u @ M: see :mod:`grsd.spectrum.operator.algebra`. Source: 2512.10427, section 2.2.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        normalize: Normalize = "mean",
        method: Method = "auto",
        parameters: Sequence[str] | None = None,
        products: int = 100,
    ) -> None:
        checks.one_of("method", method, ("auto", "graph", "factored"))
        checks.whole("products", products, 1)
        super().__init__(model, normalize, parameters)
        self._inputs, self._observable = copied(inputs, observable)
        self._settings: Any = {"normalize": normalize, "method": method, "products": products}
        self._graph: Retained | None = None
        self._traced_pass: tuple[Tensor, Trace] | None = None
        self._factored: Factored | None = None
        self._product: Product | None = None
        self._why = ""
        if method != "graph":
            self._factor(strict=method == "factored")
        if self._factored is None:
            self._retain()
        self.samples: int = self._samples
        self.method = "graph" if self._factored is None else "factored"
        self.inner_weight: float = 1.0 / self.samples if normalize == "mean" else 1.0

    def _factor(self, strict: bool) -> None:
        make = partial(Factored, names=self._names, products=self._settings["products"])
        try:
            self.outputs, made = self._recorded(self._inputs, self._observable, make)
            self._factored = made
            self._count(made)
        except Unrecordable as failure:
            self._why = str(failure)
            if strict:
                raise ValueError(
                    f"the backward pass of this model cannot be recorded ({self._why}); use "
                    'method="auto" or "graph"'
                ) from failure

    def _retain(self) -> Retained:
        """Return the retained graph of the model, made on first use."""
        self._watch.check()
        if self._graph is None:
            rows = self._rows(self._inputs, self._observable)
            if self._factored is not None:
                self._same_outputs(rows, self.outputs)
            self.outputs = rows.detach()
            self._graph = Retained(rows, self._parameters)
            self._count(self._graph)
        return self._graph

    @property
    def _used(self) -> list[Tensor]:
        if self._factored is None:
            return [self._parameters[k] for k in self._retain().used]
        return [self._parameters[k] for k in self._factored.used]

    @property
    def error(self) -> Tensor:
        """The observable's error vector, (T,): target − output, onehot − softmax, or −log q."""
        return self._observable.error(self.outputs)

    def plan(self) -> Plan:
        """Return what a product does per parameter, with FLOPs and bytes; prints as a table."""
        if self._factored is not None:
            return Plan("factored", tuple(self._factored.plan_rows))
        rule = f"cannot be recorded: {self._why}" if self._why else "as asked"
        return Plan("graph", (PlanRow("all parameters", rule, "VJP, then JVP; not counted", 0, 0),))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self._used)
        return (
            f"NTK(T={self.shape[0]}, parameters={count}, normalize={self.normalize!r}, "
            f"method={self.method!r}, {self.dtype}, {self.device})"
        )

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return Jᵀu without normalisation, one tensor per parameter in use.

        Cost: one backward pass. The first `vjp`, `jvp` or `jacobian` of a factored operator runs
        the model again.
        """
        self._check(u, (self.shape[0],))
        return tuple(self._retain().vjp(u).values())

    def jvp(self, v: tuple[Tensor, ...]) -> Tensor:
        """Return J v, (T,), for v as `vjp` returns it. Cost: one pass through the doubled graph."""
        graph = self._retain()
        return graph.jvp(dict(zip(graph.used, v, strict=True)))

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M u for u of shape (T,), or M U for U of shape (T, k).

        Cost: one product a column; the factored form shares its passes among the columns of U.
        """
        if u.ndim == 2:
            self._check(u, (self.shape[0], u.shape[1]))
            if self._factored is None:
                return torch.stack([self @ column for column in u.unbind(1)], dim=1)
            self._watch.check()
            return self._finite(self._factored.block(u) * self.inner_weight, u)
        self._check(u, (self.shape[0],))
        if self._factored is None:
            graph = self._retain()
            return self._finite(graph.jvp(graph.vjp(u)) * self.inner_weight, u)
        self._watch.check()
        if self._product is None:
            self._product = replayed(self._factored, u)
        return self._finite(self._product(u) * self.inner_weight, u)

    def layers(self) -> list[str]:
        """Return the names of the layers, in the order of the model: modules with used parameters.

        A matrix that several modules share is a layer of its own, its names joined by " + ".
        """
        return [*by_layer(self._model, self._used)]

    def layer(self, name: str) -> NTK:
        """Return M^(ℓ) = J^(ℓ) J^(ℓ)ᵀ of one layer, or of all layers below a module like a block.

        Σ_ℓ M^(ℓ) over `layers` is M, exactly. Cost: the model is run again; a product runs the
        passes as far down as the layer. A module that shares a parameter with others outside it
        raises ValueError; a model that was changed, RuntimeError.
        """
        self._watch.check()
        names = select(by_layer(self._model, self._used), name)
        batch = (self._model, self._inputs, self._observable)
        with self._mixed():
            one = NTK(*batch, parameters=names, **self._settings)
        self._same_outputs(one.outputs, self.outputs)
        for name, buffer in one._buffers.items():
            if not torch.equal(buffer, self._buffers.get(name, buffer)):
                raise RuntimeError(
                    f"the buffer {name!r} was changed after this operator was made; make a new NTK"
                )
        return one

    def cross(self, inputs: Inputs, observable: Observable | None = None) -> CrossKernel:
        """Return C = J′ Jᵀ, (T′, T), with J′ of another batch and J of this one.

        With ``normalize="mean"`` C is divided by the samples of *this* batch: along the flow on it
        ḟ′ = C e for squared error. `observable` says what the rows of the other batch are; None
        stands for all outputs, where this operator's is `Outputs`. No parameter gradient of the
        whole model is formed. ValueError as for `NTK`, and for rows of another type or on another
        device. Cost: both batches are run and recorded; a product, see
        :mod:`grsd.spectrum.operator.cross`.
        """
        if observable is None:
            if not isinstance(self._observable, Outputs):
                raise ValueError(
                    f"rows of {type(self._observable).__name__} depend on its targets: pass the "
                    "observable of the other batch"
                )
            observable = Outputs()
        # Record both batches, or retain the graphs of both.
        make = partial(Side, names=self._names)
        batches = [(self._inputs, self._observable), copied(inputs, observable)]
        sides: Any = []
        if self._factored is not None:
            try:
                sides = [self._recorded(*batch, make) for batch in batches]
            except Unrecordable as failure:
                if self._settings["method"] == "factored":
                    raise ValueError(
                        f"the backward pass of the other batch cannot be recorded ({failure}); "
                        'use method="auto" or "graph"'
                    ) from failure
        if not sides:
            graphs = (self._retain(), Retained(self._rows(*batches[1]), self._parameters))
            sides = [(graph.outputs, graph) for graph in graphs]
        # They must be of this model, as it is, and of one kind.
        (here, first), (there, second) = sides
        self._same_outputs(here, self.outputs)
        kinds = [f"{f.dtype} on {f.device}" for f in (here, there)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the rows are {kinds[0]}, those of the other batch {kinds[1]}")
        dtypes = {self.dtype, *self._dtypes, *first.dtypes, *second.dtypes}
        convolves = self._convolves or first.convolves or second.convolves
        settings = {
            "names": self._names,
            "folded": set() if self._factored is None else self._factored.folded,
            "products": self._settings["products"],
            "unchanged": self._watch.check,
            "eps": rounding(dtypes, convolves, self.device),
            "inner_weight": self.inner_weight,
        }
        return CrossKernel(first, second, (here, there), settings)

    def output_gradients(self, u: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """Return J_εᵀ u: for every layer, δ = ∂(Σ u f)/∂s at its output s, a tensor a use.

        With Kδ of :mod:`grsd.spectrum.operator.factors`, Σ_ℓ ⟨δ_ℓ, K_ℓ δ_ℓ⟩ = uᵀ J Jᵀ u. Layers
        that no rule knows ("plain" in `plan`) are left out. Cost: one activation-only backward
        pass; the first call runs the model again and keeps its graph.
        """
        self._check(u, (self.shape[0],))
        self._watch.check()
        if self._traced_pass is None:
            self._traced_pass = self._traced(self._inputs, self._observable)
            self._same_outputs(self._traced_pass[0], self.outputs)
        rows, trace = self._traced_pass
        places: Any = trace.places
        with unmixed():
            deltas = torch.autograd.grad(rows, places, u, retain_graph=True, allow_unused=True)
        # Every place is the output of one layer.
        groups = by_layer(self._model, self._parameters)
        layers = {name: layer for layer, names in groups.items() for name in names}
        at = {use.place: layers[self._names[use.number]] for use in trace.uses}
        result: dict[str, tuple[Tensor, ...]] = {}
        for place, delta in enumerate(deltas):
            if delta is not None:
                result[at[place]] = (*result.get(at[place], ()), delta)
        return result

    def jacobian(self) -> Tensor:
        """Return J, (T, P), in the order of `model.parameters()`. Cost: T backward passes."""
        units = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return torch.stack([torch.cat([g.reshape(-1) for g in self.vjp(u)]) for u in units])
