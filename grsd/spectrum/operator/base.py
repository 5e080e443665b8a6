"""What every form of M = J Jᵀ shares: parameters, a checked forward pass, the plan of a product.

The forms: one operator on a batch (:mod:`grsd.spectrum.operator.ntk`), independent batches in
lock-step (:mod:`grsd.spectrum.operator.batches`), and one operator over micro-batches and processes
(:mod:`grsd.spectrum.operator.shards`).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from grsd import checks
from grsd.spectrum.observables import Observable, Outputs, raw_output
from grsd.spectrum.operator.algebra import Symmetric
from grsd.spectrum.operator.double_backward import MASKED
from grsd.spectrum.operator.forward_pass import (
    Guard,
    as_written,
    call,
    copy_of,
    refuse_noise,
    same_generators,
    states,
)
from grsd.spectrum.operator.gradients import (
    custom_functions,
    refuse_hooks,
    refuse_other_derivatives,
)
from grsd.spectrum.operator.precision import mixed, rounding, unmixed
from grsd.spectrum.operator.trace import Trace
from grsd.spectrum.operator.watch import Watch
from grsd.spectrum.programs.record import Unrecordable

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Normalize = Literal["mean", "sum"]
Made = TypeVar("Made")

# buffers are swapped for copies during a pass, which two threads must not do at once
_FORWARD = threading.RLock()
SAME = 64.0  # in eps of the largest output: what two passes by other kernels may differ by
WHOLE = (
    "Pass the model before it is sharded, with the full weights: "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True has "
    "them, or full_tensor() of each; NTKShards shares the rows among processes"
)
DROPS: dict[type[nn.Module], str] = {
    nn.modules.dropout._DropoutNd: "p",
    nn.MultiheadAttention: "dropout",
    nn.RNNBase: "dropout",
}


class Operator(Protocol):
    """What Lanczos needs of M: a symmetric (T, T) matrix that multiplies vectors."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, u: Tensor, /) -> Tensor: ...


class Pass(Protocol):
    """What is known of the arithmetic of the passes of a product."""

    dtypes: set[torch.dtype]
    convolves: bool


@dataclass(frozen=True)
class PlanRow:
    """One line of `NTK.plan()`: what a product does for one parameter or pass.

    Attributes
    ----------
    layer : names of the parameters, or the pass.
    rule : how the parameter enters: `name` of :mod:`grsd.spectrum.operator.rules`, joined by "+".
    association : the form of K that is used.
    flops : multiplications and additions of one product.
    bytes : memory held for it beyond the weights.
    setup : FLOPs at set-up that buy this form.
    pays : number of products from which a set-up pays: of this form, or, where `setup` is 0, of the
        form that was not taken; None where there is no choice.
    """

    layer: str
    rule: str
    association: str
    flops: int
    bytes: int
    setup: int = 0
    pays: float | None = None


@dataclass(frozen=True)
class Plan:
    """The rows of a plan; prints as a table."""

    method: str
    rows: tuple[PlanRow, ...]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def setup(self) -> int:
        return sum(row.setup for row in self.rows)

    def __str__(self) -> str:
        held = sum(row.bytes for row in self.rows)
        whole = PlanRow("total", self.method, "", self.flops, held, self.setup)
        head = ("layer", "rule", "association", "MFLOP", "MB", "set-up MFLOP", "pays from")
        lines: list[tuple[str, ...]] = [head]
        for r in (*self.rows, whole):
            numbers = [f"{x / 1e6:.3f}" for x in (r.flops, r.bytes, r.setup)]
            pays = "" if r.pays is None else f"{r.pays:.1f}"
            lines.append((r.layer, r.rule, r.association, *numbers, pays))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = (*[str.ljust] * 3, *[str.rjust] * 4)
        table = [[f(x, w) for f, x, w in zip(aligned, r, widths, strict=True)] for r in lines]
        return "\n".join("  ".join(row).rstrip() for row in table)


class NTKBase(Symmetric):
    """The parameters that J is taken over, and the arithmetic of the operators made of it."""

    outputs: Tensor
    inner_weight: float
    semidefinite = True  # a negative eigenvalue is rounding

    def __init__(
        self, model: nn.Module, normalize: Normalize, parameters: Sequence[str] | None = None
    ) -> None:
        checks.one_of("normalize", normalize, ("mean", "sum"))
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("no parameter of the model requires a gradient, so J is empty")
        if parameters is not None:
            unknown = sorted(set(parameters) - set(named))
            if unknown or not parameters:
                raise ValueError(
                    f"parameters {unknown or '()'} are none of the model's that require a "
                    "gradient; dict(model.named_parameters()) has the names"
                )
            chosen = set(parameters)
            named = {name: p for name, p in named.items() if name in chosen}
        refuse_unfit(model, list(named.values()))
        refuse_dropout(model)
        self._model, self.normalize = model, normalize
        refuse_hooks(model, named)
        self._names, self._parameters = list(named), list(named.values())
        self._dtypes, self._convolves = {p.dtype for p in self._parameters}, False
        # every pass runs under the autocast of this one
        self._mixed = mixed()
        # a frozen parameter that changes changes J as well; buffers are copied
        self._watch = Watch(model)
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._compared: set[str] = set()  # custom functions whose gradients are right

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outputs.numel(), self.outputs.numel())

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs.dtype

    @property
    def device(self) -> torch.device:
        return self.outputs.device

    @property
    def eps(self) -> float:
        """Relative accuracy of a product: the unit of rounding of its coarsest arithmetic.

        That is of the rows, the parameters, and all that lies between them: a norm in float32 of a
        model in float64, autocast, TF32 where it is allowed. What is constant in a product (tables,
        a frozen trunk, activations) is left out: how it was rounded is part of the function.
        """
        return rounding({self.dtype, *self._dtypes}, self._convolves, self.device)

    def _count(self, one: Pass) -> None:
        """Count the arithmetic of a pass among that of a product."""
        self._dtypes |= one.dtypes
        self._convolves |= one.convolves

    def _rows(self, inputs: Inputs, observable: Observable, trace: Trace | None = None) -> Tensor:
        """Run the model once, with a graph that holds the chosen parameters alone.

        `self._samples` becomes the number of samples of this pass.
        """
        chosen = {id(p) for p in self._parameters}
        named = self._model.named_parameters()
        constant = {name: p.detach() for name, p in named if id(p) not in chosen}
        constant |= self._buffers
        guard = trace or Guard()
        with self._mixed():
            rows, self._samples = forward_rows(self._model, inputs, observable, guard, constant)
            # Gradients that the model makes itself are compared with its function, once.
            suspects = custom_functions(rows) | ({"a hook on grad_fn"} if guard.nodes else set())
            if not suspects <= self._compared:

                def rows_at(values: Sequence[Tensor]) -> Tensor:
                    given = constant | dict(zip(self._names, values, strict=True))
                    return forward_rows(self._model, inputs, observable, None, given)[0]

                refuse_other_derivatives(suspects, rows_at, self._parameters)
                self._compared |= suspects
        return rows

    def _traced(self, inputs: Inputs, observable: Observable) -> tuple[Tensor, Trace]:
        """Run the model once, and return the rows with what was recorded on the way."""
        trace = Trace(self._parameters)
        rows = self._rows(inputs, observable, trace)
        trace.check_inputs()
        return rows, trace

    def _recorded(
        self, inputs: Inputs, observable: Observable, make: Callable[[Tensor, Trace], Made]
    ) -> tuple[Tensor, Made]:
        """Return the rows and what `make` builds of them and the trace, or raise Unrecordable."""
        rows, trace = self._traced(inputs, observable)
        try:
            with unmixed():
                return rows.detach(), make(rows, trace)
        except RuntimeError as failure:
            raise Unrecordable(str(failure).splitlines()[0]) from failure

    def _same_outputs(self, rows: Tensor, before: Tensor) -> None:
        """Raise RuntimeError unless a pass that was run again is the one before, to rounding.

        A traced pass may take other kernels than a plain one, whose last bits differ.
        """
        self._watch.check()
        apart, size = (rows.detach() - before).abs().max(), before.abs().max()
        if not bool(apart <= SAME * self.eps * size):
            raise RuntimeError(
                "the model was changed after this operator was made: its outputs are others; make "
                "a new NTK"
            )

    def _finite(self, product: Tensor, u: Tensor) -> Tensor:
        """Return the product, which is finite if u is, or raise ValueError."""
        if not bool(torch.isfinite(product).all()) and bool(torch.isfinite(u).all()):
            raise ValueError(f"gradients are not finite although the outputs are. {MASKED}")
        return product


def refuse_dropout(model: nn.Module) -> None:
    """Raise ValueError when a module of the model drops at random."""
    for name, module in model.named_modules():
        attribute = next((at for kind, at in DROPS.items() if isinstance(module, kind)), None)
        rate = getattr(module, attribute) if attribute is not None and module.training else 0.0
        if rate > 0:
            raise ValueError(
                f"dropout {name or type(module).__name__!r} is active (p = {rate}): each pass "
                "would see another network. Call model.eval() first"
            )


def refuse_unfit(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError for a model without a real Jacobian, or that other values cannot run."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{type(model).__name__} wraps the model: pass model.module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "a torch.jit module cannot be taken apart: pass the module that it was made from"
        )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(f"FullyShardedDataParallel holds pieces of the parameters. {WHOLE}")
    # parameters that are in pieces, no tensors yet, or not real
    trained = set(map(id, parameters))
    p: Any
    for name, p in model.named_parameters():
        kind = type(p).__name__
        if kind == "DTensor":  # fully_shard, tensor parallelism
            raise ValueError(f"parameter {name!r} is a DTensor, in pieces. {WHOLE}")
        if id(p) in trained and is_traceable_wrapper_subclass(p):
            raise ValueError(
                f"parameter {name!r} is a {kind}, which is no plain tensor: convert or freeze it"
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once on a batch")
    if any(p.is_complex() for p in parameters):
        raise ValueError(
            "a trainable parameter is complex, so J is not real: keep its real and imaginary parts "
            "as one real parameter, (..., 2), and use torch.view_as_complex in forward"
        )
    # tables that a pass rescales, or whose gradients are no derivatives
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.max_norm is not None:
            raise ValueError(
                f"{name!r} has max_norm = {module.max_norm}: its table is rescaled in place by "
                "every forward pass. Run the model once on this batch and set max_norm = None"
            )
        if module.scale_grad_by_freq and module.weight.requires_grad:
            raise ValueError(
                f"{name!r} has scale_grad_by_freq: its backward pass divides by counts and gives "
                "no Jacobian. Set it to False"
            )


def forward_rows(
    model: nn.Module,
    inputs: Inputs,
    observable: Observable,
    guard: Guard | None = None,
    constant: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Run the model once with its graph; return the rows and the number of samples.

    Copies of the buffers are written to.
    `constant` holds values without a graph that stand for parameters of the same names.
    """
    if not isinstance(observable, Observable):
        raise TypeError(
            f"the observable is a {type(observable).__name__}, which does not say what the rows "
            "are: use Outputs(targets), ClassLogits(targets) or TokenLogProb(targets)"
        )
    constant = dict(constant or {})
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args: Any = (inputs,) if isinstance(inputs, Tensor) else inputs
    args = () if isinstance(inputs, Mapping) else args
    guard = guard or Guard()
    guard.protect([*model.parameters(), *constant.values()])

    def run() -> Any:
        # The model gets copies of the buffers and the inputs, which it may write to.
        buffers = {k: constant.get(k, buffer).clone() for k, buffer in model.named_buffers()}
        copies = tree_map(copy_of, args), tree_map(copy_of, kwargs)
        return raw_output(call(model, constant | buffers, *copies))

    # It runs as it was written, without fused kernels, and leaves the random generators alone.
    plain: Any = nullcontext()
    if "torch._dynamo" in sys.modules:  # what a compiled module does cannot be watched
        plain = torch.compiler.set_stance("force_eager")
    math = sdpa_kernel(SDPBackend.MATH)  # the fused kernels have no second derivative
    with _FORWARD, same_generators(), plain, torch.enable_grad(), math, as_written():
        before = states()
        with guard:
            output = run()
            rows = observable.rows(output)
        drawn = [name for name, state in states().items() if state != before.get(name)]
        drawn += ["torch.Generator"] if guard.generators else []
        if drawn:
            refuse_noise(drawn, model.training, rows, lambda: observable.rows(run()))
    bad = int((~torch.isfinite(rows.detach())).sum())
    refused = {
        f"the observable must give one number per row, shape (T,); it gave {tuple(rows.shape)}": (
            rows.ndim != 1
        ),
        "the batch gives no rows: is it empty?": not rows.numel(),
        "the rows are complex: give real and imaginary parts as rows": rows.is_complex(),
        "the outputs carry no gradient: was the forward pass run under no_grad or detached?": (
            not rows.requires_grad
        ),
        f"{bad} of {rows.numel()} outputs are not finite. {MASKED}": bad,
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(reason)
    return rows, observable.samples(output if isinstance(observable, Outputs) else rows.detach())


def copied(inputs: Inputs, observable: Observable) -> tuple[Any, Observable]:
    """Return a batch whose tensors nobody else can change."""
    mine = copy.copy(observable)
    for name, value in getattr(observable, "__dict__", {}).items():
        object.__setattr__(mine, name, copy_of(value))
    tree: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map(copy_of, tree), mine
