"""A residual stack layer by layer: what M^(l) is, what depth averaging does to its boundary, and which couplings add up.

`ResidualFactors` holds the factors of J^(l) in a residual network and refuses any other. `layer_grams` gives the two Gram matrices whose entrywise
product is M^(l).
`additivity` and `dilute` are the two steps of Proposition 1. Here J and M = JJᵀ are without the 1/n of the other modules, as in section 4 of
2512.18209. Products of random layers alone are in :mod:`grsd.renorm.theorems.products`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

__all__ = [
    "Additivity",
    "LayerGrams",
    "ResidualFactors",
    "additivity",
    "binned_sums",
    "dilute",
    "end_share",
    "layer_grams",
    "linear_end_share",
]


class ResidualFactors:
    """A residual network on a batch: its states, the derivatives of the output by them, and the Jacobians of its blocks.

    Parameters
    ----------
    model : nn.Module
        With a ModuleList called ``blocks`` of maps from states (N, w) to states (N, w), each entered once, and one output per sample.
    inputs : Tensor
        Samples must not mix.

    Attributes
    ----------
    states : list of Tensor (N, w), h_0 … h_L: what enters the first block, and what each block returns.
    downstream : list of Tensor (N, w), ∂f/∂h_0 … ∂f/∂h_L for every sample.

    Raises
    ------
    ValueError
        No such list, fewer than two blocks, states that are not (N, w), a block without a skip connection (mean diagonal of A_k below
        1/2), or one that is far from the identity (‖A_k − I‖_F ≥ √w).

    Notes
    -----
    Cost: one pass forward and back; the Jacobians of the blocks, N w² numbers each, when they are asked for. Source: 2512.18209, 4.1.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no ModuleList called 'blocks': this needs a residual stack h ↦ h + ε F(h), and "
                "a plain network has no near-identity layers to follow"
            )
        if len(blocks) < 2:
            raise ValueError(f"{len(blocks)} block: a product over depth needs two or more")
        self.model, self.blocks = model, blocks
        found: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            found.extend([given[0], out] if not found else [out])

        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            with torch.enable_grad():
                rows = model(inputs.detach().requires_grad_(inputs.is_floating_point()))
                if rows.numel() != len(inputs) or len(found) != len(blocks) + 1:
                    raise ValueError(
                        f"outputs {tuple(rows.shape)}: expected one per sample, and each block entered once"
                    )
                # the sum over samples: ∂f(x)/∂h(x') vanishes for x ≠ x'
                down = torch.autograd.grad(rows.sum(), found, materialize_grads=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.states, self.downstream = [h.detach() for h in found], [b.detach() for b in down]
        shape = self.states[0].shape
        if len(shape) != 2 or any(h.shape != shape for h in self.states):
            raise ValueError(
                f"states have shapes {sorted({tuple(h.shape) for h in self.states})}; expected one shape (N, w)"
            )
        self._check()

    def _check(self) -> None:
        for k, (a, distance) in enumerate(zip(self.transfers, self.distances, strict=True)):
            skip = float(a.diagonal(dim1=1, dim2=2).mean())
            if skip < 0.5:
                raise ValueError(
                    f"block {k} has no skip connection: the mean diagonal of its state Jacobian is {skip:.2f}, and that of "
                    "I + εG is 1 + O(ε); take a residual network"
                )
            if distance >= 1:
                raise ValueError(
                    f"block {k} is not near the identity: ‖A − I‖_F/√w = {distance:.2f}, and 4.1 asks for a small ε; make the "
                    "branch smaller"
                )

    @cached_property
    def transfers(self) -> list[Tensor]:
        """A_k = ∂h_{k+1}/∂h_k for every sample, (N, w, w) each, k = 0 … L−1."""
        return [
            vmap(jacrev(lambda h, block=block: block(h[None])[0]))(h).detach()
            for block, h in zip(self.blocks, self.states[:-1], strict=True)
        ]

    @cached_property
    def distances(self) -> list[float]:
        """‖A_k − I‖_F/√w of each block, root mean square over samples: the ε‖G‖_F/√w of the block."""
        return [_distance(a) for a in self.transfers]

    def downstream_products(self) -> list[Tensor]:
        """A_{L−1} ⋯ A_{l+1} for l = 0 … L−1, (N, w, w) each: L−1−l factors, none for the last block."""
        found = [
            torch.eye(self.states[0].shape[1], dtype=self.states[0].dtype).expand_as(
                self.transfers[0]
            )
        ]
        for a in self.transfers[:0:-1]:
            found.append(found[-1] @ a)
        return found[::-1]

    def departures(self) -> list[float]:
        """‖A_{L−1} ⋯ A_{l+1} − I‖_F/√w, l = 0 … L−1: how far the product of Theorem 2 has gone at each layer."""
        return [_distance(p) for p in self.downstream_products()]

    def layer_jacobian(self, block: int, *, increasing: bool = False) -> Tensor:
        """Return J^(l) = (∂f/∂h_L) A_{L−1} ⋯ A_{l+1} ∂F_l/∂θ_l from its factors, (N, p_l), all parameters of one block.

        With `increasing` the product is taken as ∏_{k=l+1}^{L−1} reads when factors are written in the order of their index,
        A_{l+1} ⋯ A_{L−1}.
        """
        if not 0 <= block < len(self.blocks):
            raise ValueError(f"block is {block}; this stack has {len(self.blocks)}")
        row = self.downstream[-1][:, None, :]
        chosen = self.transfers[block + 1 :]
        for a in chosen if increasing else chosen[::-1]:
            row = row @ a
        module = self.blocks[block]
        own = {name: p.detach() for name, p in module.named_parameters()}

        def branch(parameters: dict[str, Tensor], h: Tensor) -> Tensor:
            out: Tensor = functional_call(module, parameters, (h[None],))[0]
            return out

        grads = vmap(jacrev(branch), in_dims=(None, 0))(own, self.states[block])
        return torch.cat([(row @ g.flatten(2))[:, 0] for g in grads.values()], dim=1).detach()


def _distance(a: Tensor) -> float:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return math.sqrt(float((a - eye).square().sum(dim=(1, 2)).mean()) / a.shape[-1])


class LayerGrams(NamedTuple):
    """The factors of M^(l) for one linear layer s = W a + b of a network with one output per sample, without 1/n."""

    forward: Tensor  # (N, N), a(x)·a(x'), plus 1 with a bias
    backward: Tensor  # (N, N), ∂f/∂s(x) · ∂f/∂s(x')

    @property
    def kernel(self) -> Tensor:
        """M^(l) = forward ∘ backward, entry by entry."""
        return self.forward * self.backward


def layer_grams(model: nn.Module, layer: str, inputs: Tensor) -> LayerGrams:
    """Return the two Gram matrices of the linear layer called `layer`.

    Raises
    ------
    ValueError
        No such layer, not an `nn.Linear`, entered more than once or by anything but (N, features), or more than one output per sample.

    Notes
    -----
    ∂f(x)/∂W = ∂f/∂s(x) ⊗ a(x), so that J^(l)J^(l)ᵀ is the entrywise product. Cost: one pass forward and back.
    """
    modules = dict(model.named_modules())
    chosen = modules.get(layer)
    if not isinstance(chosen, nn.Linear):
        known = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"{layer!r} is not a linear layer of this model: expected one of {', '.join(known) or 'none'}"
        )
    seen: list[tuple[Tensor, Tensor]] = []
    hook = chosen.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    try:
        with torch.enable_grad():
            rows = model(inputs)
    finally:
        hook.remove()
    if rows.numel() != len(inputs) or len(seen) != 1 or seen[0][1].ndim != 2:
        raise ValueError(
            f"{layer!r} was entered {len(seen)} times and the outputs are {tuple(rows.shape)}; expected one use on (N, features) "
            "and one output per sample: with shared weights or positions M^(l) is a sum of such products"
        )
    a = seen[0][0].flatten(1).detach()
    (b,) = torch.autograd.grad(rows.sum(), [seen[0][1]])
    return LayerGrams(a @ a.T + (chosen.bias is not None), b @ b.T)


# --- Proposition 1 ---------------------------------------------------------------------------------------------------------


class Additivity(NamedTuple):
    """How far couplings of a sum are from the sum of the couplings, ‖K(Σ) − Σ K‖/‖K(Σ)‖ in the Frobenius norm over bins."""

    own_first: float  # Σ X over pairs of bins; bins and eigenvectors of each summand are its own, as in K̂(M^(l))
    own_second: float  # the same with Σ X²
    total_first: float  # bins and eigenvectors of the whole M for every summand
    total_second: float


def binned_sums(kernel: np.ndarray, rate: np.ndarray, edges: np.ndarray, power: int) -> np.ndarray:
    """Return Σ X_uv^power over the pairs of two bins of log λ, (B, B), with X = φᵀ rate φ in the eigenbasis of `kernel`.

    Modes outside the edges, the kernel's null space among them, are left out. Cost: one eigenproblem.
    """
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    s = np.log(np.maximum(values, np.finfo(float).tiny))
    place = np.searchsorted(edges, s, side="right") - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    member = np.zeros((len(s), len(edges) - 1))
    member[np.flatnonzero(inside), place[inside]] = 1
    found: np.ndarray = member.T @ (vectors.T @ rate @ vectors) ** power @ member
    return found


def additivity(
    kernels: Sequence[np.ndarray], rates: Sequence[np.ndarray], edges: np.ndarray
) -> Additivity:
    """Compare the binned couplings of M = Σ M^(l) with the sum of those of its summands, equation (28).

    Parameters
    ----------
    kernels, rates : sequences of (n, n) symmetric arrays
        M^(l) and Ṁ^(l).
    edges : (B + 1,) ascending
        Bins of s = log λ, the same for all; they should hold the positive spectra of all summands and of the sum.

    Notes
    -----
    X is linear in Ṁ, so that first moments add up exactly at one eigenbasis. No statistic of two bases does.
    """
    if len(kernels) != len(rates) or len(kernels) < 2:
        raise ValueError(
            f"{len(kernels)} kernels and {len(rates)} rates; expected the same number, two or more"
        )
    if len(edges) < 2 or np.any(np.diff(edges) <= 0):
        raise ValueError("edges must ascend, and hold one bin or more")
    whole, rate = np.sum(kernels, axis=0), np.sum(rates, axis=0)

    def defect(power: int, bases: Sequence[np.ndarray]) -> float:
        sums = np.sum(
            [binned_sums(k, r, edges, power) for k, r in zip(bases, rates, strict=True)], axis=0
        )
        together = binned_sums(whole, rate, edges, power)
        return float(np.linalg.norm(together - sums) / np.linalg.norm(together))

    same = [whole] * len(kernels)
    return Additivity(defect(1, kernels), defect(2, kernels), defect(1, same), defect(2, same))


@dataclass(frozen=True)
class Dilution:
    """The couplings of a stack over those of its bulk."""

    kernel: (
        np.ndarray
    )  # (B, B), Σ_l K^(l) over the number of layers times the weight of a bulk layer
    deviation: float  # largest |kernel − bulk|


def dilute(
    boundary: np.ndarray,
    bulk: np.ndarray,
    depth: int,
    weight: Literal["constant", "bounded"] = "constant",
) -> Dilution:
    """Average the kernels of ℓ∗ boundary layers and depth − ℓ∗ equal bulk layers, equations (29) and (30).

    Parameters
    ----------
    boundary : (ℓ∗, B, B)
    bulk : (B, B)
    depth : int, L > ℓ∗
    weight : str
        ``constant``: a bulk layer has the kernel `bulk` at every depth, as in the proof; the deviation is |Σ(K_b − K)|/L exactly. ``bounded``: it has
        bulk/L, since Condition 3 gives Σ_l ‖Ṁ^(l)‖₁ ≤ ½ N C_J² and so all layers of one kernel 1/L each; the deviation tends to |Σ K_b|.
    """
    count = len(boundary)
    if not 0 < count < depth:
        raise ValueError(
            f"depth is {depth} with {count} boundary layers; expected more layers than boundary, and a boundary"
        )
    if weight not in ("constant", "bounded"):
        raise ValueError(f"weight is {weight!r}; expected 'constant' or 'bounded'")
    one = 1.0 if weight == "constant" else 1.0 / depth
    kernel = (boundary.sum(axis=0) + (depth - count) * one * bulk) / (depth * one)
    return Dilution(kernel, float(np.abs(kernel - bulk).max()))


def end_share(kernels: Sequence[np.ndarray]) -> float:
    """(tr M^(1) + tr M^(L))/tr M for the blocks in order of depth: the share of the two ends, read-in and read-out in a residual net."""
    traces = [float(np.trace(k)) for k in kernels]
    if len(traces) < 3 or sum(traces) <= 0:
        raise ValueError(
            f"{len(traces)} blocks with traces {traces}; expected two ends, something between them, and M ≠ 0"
        )
    return (traces[0] + traces[-1]) / sum(traces)


def linear_end_share(inputs: int, width: int, depth: int, epsilon: float) -> float:
    """The share of read-in and read-out in E tr M for linear blocks h + εWh with weights of variance 1/fan-in.

    E tr M^(read) : E tr M^(head) : E tr M^(l) = d : w : w ε²/(1 + ε²) for every l, so that the share is
    (d + w)/(d + w + L w ε²/(1 + ε²)). It tends to (d + w)/(d + 2w) for ε² = 1/L, and to 0 like 1/L at fixed ε.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; at 0 the blocks have no part in the output")
    ends = inputs + width
    return ends / (ends + depth * width * epsilon**2 / (1 + epsilon**2))
