"""Layer by layer: the parameters of a layer, what reaches its output, how two layers overlap.

The parameters are split by the module that holds them: M = J Jᵀ = Σ_ℓ M^(ℓ), M^(ℓ) = J^(ℓ) J^(ℓ)ᵀ.
A matrix that several modules share is one parameter and makes a layer of its own, so that the sum
is exact and its cross terms stay in one place. `NTK.layers`, `NTK.layer` and
`NTK.output_gradients` are the ways in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from grsd.spectrum.operator.base import Operator

ROOT = "(model)"  # name of the layer of parameters that the model itself holds


def by_layer(model: nn.Module, parameters: Sequence[Tensor]) -> dict[str, list[str]]:
    """Return layer → names of the given parameters in it, in the order of the model.

    A layer is named as its module; one of a shared parameter, as all its modules, joined by " + ".
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
    """Return the names of the parameters of a layer, or of all layers below a module."""
    if layer in groups:
        return groups[layer]
    chosen: list[str] = []
    for group, names in groups.items():
        inside = [owner == layer or owner.startswith(f"{layer}.") for owner in group.split(" + ")]
        if all(inside):
            chosen += names
        elif any(inside):
            raise ValueError(
                f"{layer!r} shares {names[0]!r} with modules outside it; its two uses have cross "
                f"terms and belong to the layer {group!r}"
            )
    if not chosen:
        near = get_close_matches(layer, [*groups], n=3, cutoff=0.3) or [*groups][:3]
        raise ValueError(
            f"no layer or module {layer!r} has parameters that reach the outputs; near it: {near}"
        )
    return chosen


def coherence(A: Operator, B: Operator, *, steps: int = 50, rtol: float = 1e-6) -> float:
    """Return ‖J^(ℓ)∗ J^(m)‖, the spectral norm of the overlap of two layers' parameter gradients.

    A and B are M^(ℓ) and M^(m), such as two `NTK.layer` of one operator. The norm is found from
    below to the relative accuracy `rtol`; RuntimeError if that takes more than `steps` Lanczos
    steps, of one product with each operator.

    J^(m)∗ J^(ℓ) J^(ℓ)∗ J^(m) has the eigenvalues of M^(ℓ) M^(m) apart from zeros, so nothing of the
    size of the parameters is needed. That product is self-adjoint in ⟨x, M^(m) y⟩, in which Lanczos
    with full reorthogonalisation is run.
    """
    size = int(A.shape[0])
    marks = [f"{tuple(M.shape)} {M.dtype} on {M.device}" for M in (A, B)]
    if marks[0] != marks[1]:
        raise ValueError(f"the operators differ: {', '.join(marks)}")
    draw = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    w = A @ draw.to(A.device)
    steps = min(steps, size)
    basis, images = w.new_zeros(steps, size), w.new_zeros(steps, size)
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    for k in range(steps + 1):
        # The next vector in the inner product of B, and the residual of the top Ritz pair.
        image = B @ w
        beta = max(float(w @ image), 0.0) ** 0.5
        if k:
            ritz, vectors = torch.linalg.eigh(projected[:k, :k])
            top = max(float(ritz[-1]), 0.0)
            if k == size or beta * abs(float(vectors[-1, -1])) <= rtol * top:
                return math.sqrt(top)
        elif beta == 0.0:
            return 0.0
        if k == steps:
            break
        if k:
            projected[k, k - 1] = projected[k - 1, k] = beta
        basis[k], images[k] = w / beta, image / beta
        # A step of the recurrence, orthogonalised twice.
        w = A @ images[k]
        inner = images[: k + 1] @ w
        projected[k, k] = float(inner[k])
        w = w - inner @ basis[: k + 1]
        w = w - (images[: k + 1] @ w) @ basis[: k + 1]
    raise RuntimeError(
        f"‖J^(ℓ)∗ J^(m)‖ is not right to {rtol} after {steps} Lanczos steps; raise steps or rtol"
    )
