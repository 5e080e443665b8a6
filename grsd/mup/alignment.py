"""Are the bounds behind the spectral condition tight? Norm ratios at every layer.

The condition is derived from ‖A + B‖ ≤ ‖A‖ + ‖B‖ and ‖W h‖ ≤ ‖W‖ ‖h‖, each said to have the right
order. Whether it has is a matter of alignment: a ratio of the two sides that stays away from zero
as width, depth or batch grows. `observe` reads what is needed from one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grsd import checks
from grsd.mup.norms import rms_norm, rms_operator_norm


@dataclass(frozen=True)
class Observed:
    """One linear layer s = W a on a batch of which the loss is the mean.

    Sample i alone asks for the update −η δ_i a_iᵀ, of rank one; the batch asks for their mean.
    """

    weight: Tensor  #: (n_out, n_in)
    inputs: Tensor  #: (B, n_in), a_i
    deltas: Tensor  #: (B, n_out), ∂ℓ_i/∂s_i of the samples' own losses

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, (n_out, n_in)."""
        return self.deltas.T @ self.inputs / len(self.inputs)

    def one(self, i: int) -> Tensor:
        """Return the gradient of the loss of sample i."""
        return torch.outer(self.deltas[i], self.inputs[i])

    def alignment(self) -> float:
        """Return the mean of ‖G a_i‖_R / (‖G‖_R ‖a_i‖_R), G the batch gradient (claim E.2)."""
        G = self.gradient()
        gain = rms_norm(self.inputs @ G.T) / rms_norm(self.inputs)
        return float(gain.mean()) / rms_operator_norm(G)

    def batch_norm_ratio(self) -> float:
        """Return ‖mean of G_i‖_R over the mean of ‖G_i‖_R, in [0, 1] (assumption F.3)."""
        # a matrix of rank one has the RMS norm n_in ‖δ‖_R ‖a‖_R
        singles = rms_norm(self.deltas) * rms_norm(self.inputs) * self.inputs.shape[1]
        return rms_operator_norm(self.gradient()) / float(singles.mean())

    def own_share(self) -> float:
        """Return the median of ‖G a_i‖ / ‖(1/B) G_i a_i‖: the batch in units of a sample."""
        own = self.deltas * (self.inputs.square().sum(1, keepdim=True) / len(self.inputs))
        both = self.inputs @ self.gradient().T
        norms = torch.linalg.vector_norm(own, dim=1)
        seen = norms > 0
        if not bool(seen.any()):
            raise ValueError("no sample has a gradient at this layer: all inputs or all δ are zero")
        return float((torch.linalg.vector_norm(both[seen], dim=1) / norms[seen]).median())


@dataclass(frozen=True)
class Step:
    """A weight (or feature) before and after: ‖W + ΔW‖ against ‖W‖ + ‖ΔW‖ (assumption F.1).

    For a small step the ratio says nothing: it is at least its floor, which tends to 1 with the
    size. What could fail is only seen when `floor` is well below 1.
    """

    ratio: float  #: ‖W + ΔW‖_R / (‖W‖_R + ‖ΔW‖_R)
    size: float  #: ‖ΔW‖_R / ‖W‖_R
    floor: float  #: the least that `ratio` can be at this size, |1 − size| / (1 + size)
    cosine: float  #: ⟨W, ΔW⟩ / (‖W‖_F ‖ΔW‖_F)


def observe(
    model: nn.Module, losses: Callable[[nn.Module], Tensor], layers: Iterable[str]
) -> dict[str, Observed]:
    """Return inputs and δ of some linear layers, from one forward and one backward pass.

    `losses` gives one loss a sample, (B,), in the order of the batch. The layers are `nn.Linear`,
    each called once a pass on (B, n_in).
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    with ExitStack() as hooks:
        for name, made in calls.items():
            if name not in linear:
                known = ", ".join(linear)
                raise ValueError(f"{name!r} is no nn.Linear of this model; it has {known}")

            def keep(_: Any, args: Any, out: Any, made: Any = made) -> None:
                made.append((args[0].detach(), out))

            # before other hooks, which may scale the output: δ is that of s = W a itself
            handle = linear[name].register_forward_hook(keep, prepend=True)
            hooks.callback(handle.remove)
        each = losses(model)
    # one loss a sample, and one call a layer, row by row of the same batch
    checks.shape("losses", each, ("B",), "they must give one number a sample, shape (B,)")
    for name, made in calls.items():
        shapes = [tuple(a.shape) for a, _ in made]
        if len(made) != 1 or shapes[0][:-1] != tuple(each.shape):
            raise ValueError(
                f"{name!r} was called with {shapes}; expected one call with ({len(each)}, n_in)"
            )
    # δ of every sample at once: sample i's loss alone depends on row i of an output
    deltas = torch.autograd.grad(each.sum(), [out for ((_, out),) in calls.values()])
    return {
        name: Observed(linear[name].weight.detach(), a, delta)
        for (name, ((a, _),)), delta in zip(calls.items(), deltas, strict=True)
    }


def step(before: Tensor, after: Tensor) -> Step:
    """Compare a weight (n_out, n_in), or a feature (n,), before and after; neither may be zero."""
    if before.shape != after.shape or before.ndim not in (1, 2):
        raise ValueError(
            f"need two matrices or two vectors of one shape, got {tuple(before.shape)}, "
            f"{tuple(after.shape)}"
        )

    def norm(x: Tensor) -> float:
        return rms_operator_norm(x) if x.ndim == 2 else float(rms_norm(x))

    change = after - before
    old, moved = norm(before), norm(change)
    if old == 0 or moved == 0:
        raise ValueError(f"‖W‖_R = {old} and ‖ΔW‖_R = {moved}; both must be positive")
    size = moved / old
    cosine = float(torch.cosine_similarity(before.flatten(), change.flatten(), dim=0))
    return Step(norm(after) / (old + moved), size, abs(1 - size) / (1 + size), cosine)


def contributions(
    model: nn.Module,
    changes: Sequence[Mapping[str, Tensor]],
    features: Callable[[nn.Module], Tensor],
) -> Tensor:
    """Return what each group of changes (name → ΔW) alone does to the features, (groups, …).

    These are the terms of equation (36): ‖Σ terms‖ / Σ ‖terms‖ is 1 when all point one way, and
    about groups^(−1/2) when their directions are unrelated. The model's parameters are put back.
    Cost: one forward pass a group, and one more.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted({name for group in changes for name in group} - set(parameters)):
        raise ValueError(f"{unknown[0]!r} is no parameter of this model")
    terms = []
    with torch.no_grad():
        start = features(model).clone()
        # one group at a time, each taken back before the next
        for group in changes:
            saved = {name: parameters[name].clone() for name in group}
            try:
                for name, change in group.items():
                    parameters[name].add_(change)
                terms.append(features(model) - start)
            finally:
                for name, value in saved.items():
                    parameters[name].copy_(value)
    return torch.stack(terms)


def submultiplicative(vector: Tensor, *weights: Tensor) -> float:
    """Return ‖W_k … W_1 h‖_R / (‖W_k‖_R … ‖W_1‖_R ‖h‖_R), at most 1 (claims E.1, E.2).

    Of rows h, (B, n), it is the mean; the weights stand in the order of application.
    """
    h, bound = vector, rms_norm(vector)
    for W in weights:
        h, bound = h @ W.T, bound * rms_operator_norm(W)
    return float((rms_norm(h) / bound).mean())


def stable_activation(before: Tensor, after: Tensor) -> float:
    """Return the mean over rows of ‖φ(z)‖_R / ‖z‖_R (assumption F.2), rows z of shape (B, n)."""
    return float((rms_norm(after.detach()) / rms_norm(before.detach())).mean())
