"""One operator over rows that do not sit in one place: micro-batches, and processes of a cluster.

M u = J (Jᵀ u) with J = (J_1; …; J_B) by micro-batch: Jᵀu = Σ_b J_bᵀ u_b is summed over the
micro-batches, and over the processes by an all-reduce of the size of the parameters; then every
micro-batch takes J_b of the sum, which has all cross terms. Where all rows fit,
:mod:`grsd.spectrum.operator.ntk` is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves, tree_map

from grsd.spectrum.observables import Observable
from grsd.spectrum.operator.base import Inputs, Normalize, NTKBase, Plan, PlanRow, copied
from grsd.spectrum.operator.double_backward import Gradients, Retained
from grsd.spectrum.operator.exchange import Processes, refuse_disagreement
from grsd.spectrum.operator.factored import Factored, Placed
from grsd.spectrum.operator.factors import Form, Vectors, accumulate, gradient
from grsd.spectrum.operator.precision import unmixed
from grsd.spectrum.programs.program import Rows
from grsd.spectrum.programs.record import Unrecordable

Part = tuple[Inputs, Observable]


class NTKShards(NTKBase):
    """The (T, T) operator M = J Jᵀ of all rows of all micro-batches, of this process or of several.

    Parameters
    ----------
    model, normalize
        As for `NTK`, with n the samples of all processes, whose copies of the model are equal.
    parts
        This process's micro-batches; see `micro_batches`. Processes may differ in rows.
    hold
        Whether the recorded passes of all micro-batches, with their activations, are kept. If not,
        they are made anew in both sweeps of a product, in the memory of one micro-batch.
    processes
        True for all processes of `torch.distributed`, or a group; every one of them must make the
        operator and take part in every product. False: this process alone.

    Attributes
    ----------
    shape, outputs : of the rows of all processes, in the order of their ranks.
    samples, inner_weight, eps : as for `NTK`.
    local : slice, the rows of this process.

    Raises
    ------
    ValueError
        What `NTK` raises; no parts; batch statistics in training mode.
    RuntimeError
        `torch.distributed` is not initialised; another process failed, is late by the timeout of
        the group, or has other parameters; a product after the parameters were changed.

    Notes
    -----
    Every process passes the same u, (T,), and gets the same M u, so that `lanczos` runs unchanged.
    Cost: about 4/3 of a forward and backward pass, one all-reduce of the gradients in use, one
    gather of T numbers; hold=False adds a pass and a set-up. For h = 256, 4 layers, V = 2048,
    T = 1024 on two cores, in passes, and the peak of memory beyond the weights (17 MB): `NTK` 0.80,
    351 MB; four micro-batches held 1.3, 165 MB; made anew 3.9, 113 MB.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        *,
        normalize: Normalize = "mean",
        hold: bool = True,
        processes: bool | distributed.ProcessGroup = False,
    ) -> None:
        self._processes = Processes(processes)
        self._hold = hold
        self._parts: list[Part] = []
        self._halves: list[Halves | Retained] = []
        self._plan: list[PlanRow] = []
        local: dict[str, Any] = {"failure": None}
        # A process that fails must still answer: the others wait for it.
        try:
            super().__init__(model, normalize)
            self._parts = [copied(*part) for part in parts]
            if len(self._parts) > 1 or self._processes.size > 1:
                _refuse_batch_statistics(model)
            local |= self._build()
        except Exception as error:
            if self._processes.group is None:
                raise
            local["failure"] = f"{type(error).__name__}: {error}"
        everyone = self._processes.everyone(local)
        refuse_disagreement(everyone)
        # Put the rows of this process among those of all.
        self._counts: list[int] = [one["rows"] for one in everyone]
        start = sum(self._counts[: self._processes.rank])
        self.local = slice(start, start + self._counts[self._processes.rank])
        self._used = sorted({k for one in everyone for k in one["used"]})
        self.samples: int = sum(one["samples"] for one in everyone)
        self.inner_weight = 1.0 / self.samples if normalize == "mean" else 1.0
        self.outputs = self._processes.gather(self._outputs, self._counts)

    def _build(self) -> dict[str, Any]:
        """Make the halves of all micro-batches, and return what the other processes must know."""
        if not self._parts:
            raise ValueError("no micro-batches: pass at least one (inputs, observable)")
        outputs, samples, used = [], 0, set()
        for inputs, observable in self._parts:
            rows, halves = self._halves_of(inputs, observable)
            outputs.append(rows)
            samples += self._samples
            used |= set(halves.used)
            self._count(halves)
            if isinstance(halves, Halves):
                self._plan += halves.plan_rows
            if self._hold:
                self._halves.append(halves)
        self._outputs, self._sizes = torch.cat(outputs), [rows.numel() for rows in outputs]
        named = zip(self._names, self._parameters, strict=True)
        norms = [torch.linalg.vector_norm(p.detach().double()) for p in self._parameters]
        return {
            "rows": self._outputs.numel(),
            "samples": samples,
            "used": used,
            "marks": [(name, p.shape) for name, p in named],
            "norms": [float(norm) for norm in norms],
        }

    def _halves_of(
        self, inputs: Inputs, observable: Observable
    ) -> tuple[Tensor, Halves | Retained]:
        """Return the rows of one micro-batch, and its halves, retained if it cannot be recorded."""

        try:
            return self._recorded(inputs, observable, partial(Halves, names=self._names))
        except Unrecordable:
            rows = self._rows(inputs, observable)
            return rows.detach(), Retained(rows, self._parameters)

    @property
    def error(self) -> Tensor:
        """The error vector of all rows, (T,); every process must ask for it. Cost: one gather."""
        pieces = zip(self._parts, torch.split(self._outputs, self._sizes), strict=True)
        errors = [observable.error(rows) for (_, observable), rows in pieces]
        return self._processes.gather(torch.cat(errors), self._counts)

    def plan(self) -> Plan:
        """Return what this process does in a product, as `NTK.plan`."""
        # One row for each parameter; held micro-batches add up their bytes.
        merged: dict[tuple[str, str, str], list[int]] = {}
        for row in self._plan:
            total = merged.setdefault((row.layer, row.rule, row.association), [0, 0])
            total[0] += row.flops
            total[1] = total[1] + row.bytes if self._hold else max(total[1], row.bytes)
        rows = [PlanRow(*key, *total) for key, total in merged.items()]
        if any(isinstance(h, Retained) for h in self._halves) or not rows:
            why = "cannot be recorded"
            rows.append(PlanRow("all parameters", why, "VJP, then JVP; not counted", 0, 0))
        # The gradients, which the micro-batches and the processes sum.
        gradients = sum(self._parameters[k].numel() for k in self._used)
        what = f"summed over {len(self._parts)} micro-batches"
        if self._processes.group is not None:
            what += f", all-reduced over {self._processes.size} processes"
        costs = (gradients * len(self._parts), gradients * self._outputs.element_size())
        rows.append(PlanRow("(Jᵀu)", "gradient", what, *costs))
        if not self._hold:
            anew = "every micro-batch is run and recorded anew; not counted"
            rows.append(PlanRow("(both sweeps)", "pass", anew, 0, 0))
        return Plan("two sweeps", tuple(rows))

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M u for u of shape (T,) or (T, k), the same in all processes."""
        if u.ndim == 2:
            self._check(u, (self.shape[0], u.shape[1]))
            return torch.stack([self @ column for column in u.unbind(1)], dim=1)
        self._check(u, self.shape[:1])
        self._watch.check()
        # First sweep: Jᵀu. Neither u may be written to, nor a gradient that is also another's.
        pieces = torch.split(u[self.local], self._sizes)
        total: Gradients = {}
        held = {u.untyped_storage().data_ptr()}
        for k, piece in enumerate(pieces):
            for at, g in self._vjp(k, piece).items():
                if at in total:
                    total[at] += g
                    continue
                pointer = g.untyped_storage().data_ptr()
                total[at] = g.clone() if pointer in held else g
                held.add(pointer)
        # Sum over the processes, with zeros for what has no effect in this one.
        if self._processes.group is not None:
            for k in self._used:
                if k not in total:
                    total[k] = torch.zeros_like(self._parameters[k], dtype=self.dtype)
                total[k] = total[k].contiguous()  # an expanded one is not
            self._processes.sum_up([total[k] for k in self._used])
        # Second sweep: J of the sum, micro-batch by micro-batch.
        changes = torch.cat([self._jvp(k, total) for k in range(len(pieces))])
        product = self._processes.gather(changes, self._counts)
        return self._finite(product * self.inner_weight, u)

    def __repr__(self) -> str:
        count = sum(self._parameters[k].numel() for k in self._used)
        parts = f"micro-batches={len(self._parts)}, processes={len(self._counts)}"
        how = f"normalize={self.normalize!r}, {self.dtype}, {self.device}"
        return f"NTKShards(T={self.shape[0]}, parameters={count}, {parts}, {how})"

    def _vjp(self, k: int, u: Tensor) -> Gradients:
        if self._hold:
            return self._halves[k].vjp(u)
        rows = self._rows(*self._parts[k])
        self._same_outputs(rows, torch.split(self._outputs, self._sizes)[k])
        with unmixed():
            gradients = torch.autograd.grad(rows, self._parameters, u, allow_unused=True)
        return {at: g for at, g in enumerate(gradients) if g is not None}

    def _jvp(self, k: int, gradients: Gradients) -> Tensor:
        if self._hold:
            return self._halves[k].jvp(gradients)
        rows, halves = self._halves_of(*self._parts[k])
        self._same_outputs(rows, torch.split(self._outputs, self._sizes)[k])
        return halves.jvp(gradients)


def micro_batches(inputs: Inputs, observable: Observable, count: int) -> list[Part]:
    """Split a batch along the first axis into `count` micro-batches; sizes differ by one at most.

    The observable must be a dataclass with targets.
    """
    tree: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    sizes = [len(x) for x in tree_leaves(tree) if isinstance(x, Tensor) and x.ndim]
    if not sizes:
        raise ValueError("the inputs hold no tensor with a batch axis: there is nothing to split")
    if not 1 <= count <= sizes[0]:
        raise ValueError(f"a batch of {sizes[0]} cannot be split into {count} micro-batches")
    kind: Any = observable
    if "targets" not in ({f.name for f in fields(kind)} if is_dataclass(kind) else ()):
        raise ValueError(
            f"{type(kind).__name__} has no targets to split: make the (inputs, observable) yourself"
        )

    def part(at: slice) -> Part:
        def cut(x: Any) -> Any:
            return x[at] if isinstance(x, Tensor) and x.ndim and len(x) == sizes[0] else x

        targets = None if kind.targets is None else kind.targets[at]
        return tree_map(cut, tree), replace(kind, targets=targets)

    bounds = [k * sizes[0] // count for k in range(count + 1)]
    return [part(slice(start, stop)) for start, stop in pairwise(bounds)]


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if normalises and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name!r} normalises by the statistics of the batch, which a micro-batch does not "
                "share with the others: call model.eval(), or use NTK on the whole batch"
            )


class Halves(Factored):
    """J and Jᵀ apart: the recorded product cut in two at the parameters, K δ = A (Aᵀ δ).

    Cost of each half: one activation-only pass, and 2 n in out FLOPs per weight matrix.
    """

    def _build(self, placed: Placed, own: dict[int, Rows], values: dict[int, Tensor]) -> set[int]:
        self._placed = placed
        for k, entrances in placed.items():
            uses = [use for use, _ in entrances]
            held = sum(use.data.nbytes for use in uses if use.data is not None)
            shape = tuple(self._parameters[k].shape)
            self._note(uses, Form(f"its gradient, {shape}", sum(u.flops for u in uses), held))
        return {slot for uses in placed.values() for _, slot in uses}

    def vjp(self, u: Tensor) -> Gradients:
        """Return Jᵀu."""
        assert self.adjoint is not None
        with torch.no_grad(), unmixed():
            deltas = dict(zip(self.slots, self.adjoint.run(u), strict=True))
            return {
                k: gradient([use for use, _ in uses], [deltas[s] for _, s in uses])
                for k, uses in self._placed.items()
            }

    def jvp(self, v: Gradients) -> Tensor:
        """Return J v, (T,)."""
        assert self.adjoint is not None and self.forward is not None
        changes: Vectors = {}
        with torch.no_grad(), unmixed():
            for k, uses in self._placed.items():
                for use, slot in uses:
                    dtype = self.adjoint.kinds[slot][1]
                    accumulate(changes, slot, use.change(v[k]).to(dtype))
            return self.forward.consume([changes.pop(slot) for slot in self.slots])[0]
