"""J and Jᵀ apart: the factored product cut in two at the parameters.

Where the rows do not sit in one place (micro-batches, processes), K δ = A (Aᵀ δ) is made in two halves: Aᵀδ, the gradient of
Jᵀu, is summed over the places, and A sends the sum forward. Both halves are linear programs, as in
:mod:`grsd.spectrum.operator.factored`; who sums is in :mod:`grsd.spectrum.operator.shards`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grsd.spectrum.operator.double_backward import Retained
from grsd.spectrum.operator.factored import Factored
from grsd.spectrum.operator.factors import Vectors, accumulate, change, gradient
from grsd.spectrum.operator.trace import Use
from grsd.spectrum.programs.program import Rows

Gradients = list[Tensor | None]  # one per parameter; None where it has no effect


class Halves(Factored):
    """J and Jᵀ from the recorded passes of one forward pass; own-position layers start from their fixed vectors.

    Cost of each half: one activation-only pass and one product per weight matrix, 2 n in out FLOPs.
    """

    def _build(
        self,
        by_parameter: dict[int, list[tuple[Use, int]]],
        own: dict[int, Rows],
        values: dict[int, Tensor],
    ) -> set[int]:
        self._uses = by_parameter
        for k, uses in by_parameter.items():
            flops = sum(self._passes(use) for use, _ in uses)
            held = sum(
                use.data.numel() * use.data.element_size()
                for use, _ in uses
                if use.data is not None
            )
            self._note(
                [use for use, _ in uses],
                f"its gradient, {tuple(self._parameters[k].shape)}",
                flops,
                held,
            )
        return {slot for uses in by_parameter.values() for _, slot in uses}

    def vjp(self, u: Tensor) -> Gradients:
        """Return Jᵀu, one tensor per parameter."""
        assert self.adjoint is not None
        found: Gradients = [None] * len(self._parameters)
        with torch.no_grad():
            deltas = dict(zip(self.slots, self.adjoint.run(u), strict=True))
            for k, uses in self._uses.items():
                shape = self._parameters[k].shape
                total = gradient(uses[0][0], deltas[uses[0][1]], shape)
                for use, slot in uses[1:]:
                    total = total + gradient(use, deltas[slot], shape)
                found[k] = total
        return found

    def jvp(self, v: Sequence[Tensor | None]) -> Tensor:
        """Return J v, (T,), for one tensor per parameter."""
        assert self.adjoint is not None and self.forward is not None
        out: Vectors = {}
        with torch.no_grad():
            for k, uses in self._uses.items():
                value = v[k]
                if value is None:
                    raise ValueError(
                        f"parameter {self._names[k]!r} has an effect here, so its part of v is needed"
                    )
                for use, slot in uses:
                    moved = change(use, value).to(self.adjoint.kinds[slot][1])
                    accumulate(
                        out, slot, moved.clone() if use.rule in ("shift", "plain") else moved
                    )
            result: Tensor = self.forward.consume([out.pop(slot) for slot in self.slots])[0]
            return result


class RetainedHalves:
    """The same two halves on a retained graph, for a model whose backward pass cannot be recorded."""

    def __init__(self, rows: Tensor, parameters: Sequence[Tensor]) -> None:
        self._graph = Retained(rows, parameters)
        places = {id(p): k for k, p in enumerate(parameters)}
        self._count, self.used = len(parameters), [places[id(p)] for p in self._graph.used]

    def vjp(self, u: Tensor) -> Gradients:
        found: Gradients = [None] * self._count
        for k, g in zip(self.used, self._graph.vjp(u), strict=True):
            found[k] = g
        return found

    def jvp(self, v: Sequence[Tensor | None]) -> Tensor:
        return self._graph.jvp(tuple(x for k in self.used if (x := v[k]) is not None))
