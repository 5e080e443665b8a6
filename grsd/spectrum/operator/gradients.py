"""Whether the gradients of a model are derivatives of its function: hooks, and autograd.Functions.

Hooks on parameters and modules are refused where they stand. A custom autograd.Function is compared
with differences of the function, once for each operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from grsd.spectrum.operator.precision import of_graph, unmixed
from grsd.spectrum.programs.record import CrossEntropy

REMEDY = (
    "it may change gradients on their way, so that they give no Jacobian; remove it (the handle "
    "that register_… returned has remove()), and put it back afterwards"
)
# The largest relative difference between gradients and differences of the function. Differences
# with the step √ε round at √ε, and miss a share ~ √ε of the kinks of ReLU and others: ε^¼.
CLOSE = {torch.float64: 1e-3, torch.complex128: 1e-3, torch.float32: 5e-2, torch.complex64: 5e-2}
DIRECTIONS = 4  # gradients that are compared; one alone is right by chance


def refuse_hooks(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a hook that sees gradients of the model; hooks that only log as well.

    Cost: a look at every parameter and module.
    """
    for name, p in parameters.items():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"parameter {name!r} has a hook on its gradient: {REMEDY}")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            what = f"module {name or type(module).__name__!r}"
            raise ValueError(f"{what} has a backward hook: {REMEDY}")
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        raise ValueError(f"a backward hook is registered for all modules: {REMEDY}")


def custom_functions(rows: Tensor) -> set[str]:
    """Return the names of the autograd.Functions in the graph of `rows`. Cost: one walk over it."""
    names: set[str] = set()
    seen: set[Any] = set()
    stack: list[Any] = [rows.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        written = getattr(node, "_forward_cls", CrossEntropy)  # nodes of torch have none
        if written is not CrossEntropy:
            names.add(written.__name__)
    return names


def refuse_other_derivatives(
    suspects: set[str], rows_at: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[Tensor]
) -> None:
    """Raise ValueError if gradients through `suspects` are not derivatives of the function.

    `rows_at` gives the rows, (T,) with their graph, at other values of the parameters. Along one
    random direction, gradients of four random sums of the rows are compared with differences of the
    function: to a thousandth in float64, and 5 % in float32. Cost: 3 forward and 4 backward passes.
    """
    named = ", ".join(sorted(suspects))
    rows = rows_at(parameters)
    dtypes = {rows.dtype, *(p.dtype for p in parameters), *of_graph([rows])[0]}
    if not dtypes <= set(CLOSE):
        raise ValueError(
            f"{named}: gradients of an autograd.Function can only be compared with its function in "
            f"float32 or float64, and the model has {', '.join(sorted(map(str, dtypes)))}: "
            "convert it, or write the operation with those of torch"
        )
    # A direction in which every parameter changes by its own size.
    generator = torch.Generator().manual_seed(0)
    sizes = [
        float(p.detach().double().square().mean().sqrt()) if p.numel() else 0.0 for p in parameters
    ]
    usual = max(sizes) or 1.0
    direction = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * (size or usual)
        for p, size in zip(parameters, sizes, strict=True)
    ]
    step = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    moved = []
    for sign in (1, -1):
        pairs = zip(parameters, direction, strict=True)
        values = [(p.detach() + sign * step * v).requires_grad_() for p, v in pairs]
        moved.append(rows_at(values).detach().double())
    differences = (moved[0] - moved[1]) / (2 * step)
    # Compare ⟨u, J v⟩ with ⟨Jᵀu, v⟩.
    wrong = size = 0.0
    with _gradients_aside(parameters):
        for _ in range(DIRECTIONS):
            u = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
            with unmixed():
                gradients = torch.autograd.grad(
                    rows, parameters, u, retain_graph=True, materialize_grads=True
                )
            pairs = zip(gradients, direction, strict=True)
            terms = [(g.to_dense().double() * v.double()) for g, v in pairs]
            along = sum(float(t.sum()) for t in terms)
            wrong += (along - float(differences @ u.double())) ** 2
            size += sum(float(t.square().sum()) for t in terms)
            # what rounding of the rows alone does to the difference
            size += float((u.double() * rows.detach().double()).square().sum())
    tolerance = max(CLOSE[dtype] for dtype in dtypes)
    if not wrong <= tolerance**2 * size:
        raise ValueError(
            f"{named}: the gradients are not the derivatives of the model's function (they differ "
            f"by {(wrong / size) ** 0.5:.2g} along a random direction), as after clipping, "
            "straight-through estimates, reversal, scaling or a solver, so that they give no "
            "Jacobian; take it out of the model"
        )


@contextmanager
def _gradients_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep what a backward pass adds to `grad` out of it."""
    kept = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, g in zip(parameters, kept, strict=True):
            p.grad = g
