"""Layer by layer: which parameters make up a layer, what reaches a layer's output from u, and how two layers overlap.

The parameters of a model are split by the module that holds them, M = J Jᵀ = Σ_ℓ M^(ℓ) with M^(ℓ) = J^(ℓ) J^(ℓ)ᵀ. A matrix
that several modules share is one parameter and makes a layer of its own, so that the sum is exact and its cross terms stay
in one place. `NTK.layers`, `NTK.layer` and `NTK.output_gradients` are the ways in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from grsd.spectrum.operator.base import Operator
from grsd.spectrum.operator.double_backward import same_parameters
from grsd.spectrum.operator.trace import Trace

ROOT = "(model)"  # name of the layer of parameters that the model itself holds


def by_layer(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, list[str]]:
    """Return layer → names of its parameters, in the order of the model, for the given ones.

    A layer's name is that of its module; of a shared parameter, the names of all its modules joined by " + ".
    """
    wanted = {id(p) for p in parameters}
    first: dict[int, str] = {}
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in wanted:
            first.setdefault(id(p), name)
            owners.setdefault(id(p), []).append(name.rpartition(".")[0] or ROOT)
    groups: dict[str, list[str]] = {}
    for key, name in first.items():
        groups.setdefault(" + ".join(dict.fromkeys(owners[key])), []).append(name)
    return groups


def select(groups: dict[str, list[str]], layer: str) -> list[str]:
    """Return the names of the parameters of a layer, or of all layers below a module, such as one block.

    Raises
    ------
    ValueError
        No such layer; or a module that shares a parameter with modules outside it.
    """
    if layer in groups:
        return groups[layer]
    found: list[str] = []
    for group, names in groups.items():
        inside = [owner == layer or owner.startswith(f"{layer}.") for owner in group.split(" + ")]
        if all(inside):
            found += names
        elif any(inside):
            raise ValueError(
                f"{layer!r} shares {names[0]!r} with modules outside it; its two uses have cross terms and belong to "
                f"the layer {group!r}"
            )
    if not found:
        near = get_close_matches(layer, [*groups], n=3, cutoff=0.3) or [*groups][:3]
        raise ValueError(
            f"no layer or module {layer!r} has parameters that reach the outputs; near it: {near}"
        )
    return found


class OutputGradients:
    """J_εᵀ: the gradients of Σ u f with respect to the outputs of the layers, on the graph of one forward pass."""

    def __init__(self, rows: Tensor, trace: Trace, layers: Sequence[str]) -> None:
        self._rows, self._places = rows, trace.places
        at = {use.place: layers[use.number] for use in trace.uses}
        self._layers = [at[k] for k in range(len(trace.places))]

    def __call__(self, u: Tensor) -> dict[str, tuple[Tensor, ...]]:
        with same_parameters():
            found = torch.autograd.grad(
                self._rows,
                self._places,  # type: ignore[arg-type]
                u,
                retain_graph=True,
                allow_unused=True,
            )
        result: dict[str, tuple[Tensor, ...]] = {}
        for layer, delta in zip(self._layers, found, strict=True):
            if delta is not None:
                result[layer] = (*result.get(layer, ()), delta)
        return result


def coherence(
    A: Operator,
    B: Operator,
    *,
    generator: torch.Generator | None = None,
    steps: int = 50,
    rtol: float = 1e-6,
) -> float:
    """Return ‖J^(ℓ)∗ J^(m)‖, the spectral norm of the overlap of two layers' parameter gradients.

    Parameters
    ----------
    A, B
        M^(ℓ) = J^(ℓ) J^(ℓ)∗ and M^(m), (T, T), such as two `NTK.layer` of one operator.
    generator
        Of the random start vector, on the CPU; a fixed one by default.
    steps, rtol
        At most so many Lanczos steps, until the norm is right to this relative accuracy.

    Raises
    ------
    ValueError
        Operators of different shape, dtype or device.
    RuntimeError
        Not converged in `steps` steps.

    Notes
    -----
    J^(m)∗ J^(ℓ) J^(ℓ)∗ J^(m) has the eigenvalues of M^(ℓ) M^(m) apart from zeros, so nothing of the size of the parameters is
    needed. That product is self-adjoint in ⟨x, M^(m) y⟩, in which Lanczos with full reorthogonalisation is run. Cost: one
    product with each operator a step. The norm found approaches the true one from below.
    """
    size = int(A.shape[0])
    if tuple(A.shape) != tuple(B.shape) or A.dtype != B.dtype or A.device != B.device:
        raise ValueError(
            f"the operators differ: {tuple(A.shape)} {A.dtype} on {A.device}, {tuple(B.shape)} {B.dtype} on {B.device}"
        )
    draw = torch.randn(size, generator=generator or torch.Generator().manual_seed(0), dtype=A.dtype)
    w = A @ draw.to(A.device)
    steps = min(steps, size)
    basis, images = w.new_zeros(steps, size), w.new_zeros(steps, size)
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps + 1):
        image = B @ w
        beta = max(float(w @ image), 0.0) ** 0.5
        if k:
            ritz, vectors = torch.linalg.eigh(projected[:k, :k])
            top = max(float(ritz[-1]), 0.0)
            if (
                k == size or beta * abs(float(vectors[-1, -1])) <= rtol * top
            ):  # the residual of the Ritz pair
                return math.sqrt(top)
        elif beta == 0.0:
            return 0.0
        if k == steps:
            break
        if k:
            projected[k, k - 1] = projected[k - 1, k] = beta
        basis[k], images[k] = w / beta, image / beta
        w = A @ images[k]
        inner = images[: k + 1] @ w
        projected[k, k] = float(inner[k])
        w = w - inner @ basis[: k + 1]
        w = w - (images[: k + 1] @ w) @ basis[: k + 1]
    raise RuntimeError(
        f"‖J^(ℓ)∗ J^(m)‖ is not right to {rtol} after {steps} Lanczos steps; raise steps or rtol"
    )
