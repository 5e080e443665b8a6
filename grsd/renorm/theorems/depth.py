"""A residual stack layer by layer: the factors of J^(l), and what M^(l) is.

`ResidualFactors` holds the factors of J^(l) in a residual network and refuses any other.
`layer_grams` gives the two Gram matrices whose entrywise product is M^(l). Here J and M = JJᵀ are
without the 1/n of the other modules, as in section 4 of 2512.18209. Products of random layers alone
are in :mod:`grsd.renorm.theorems.products`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from grsd import checks

__all__ = ["LayerGrams", "ResidualFactors", "layer_grams"]


@contextmanager
def _seen(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What enters and leaves these modules, in the order of the calls, while the block runs."""
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, given, out: calls.append((given[0], out)))
        for module in modules
    ]
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


class ResidualFactors:
    """A residual network on a batch: its states, what they do to the output, its blocks' Jacobians.

    Parameters
    ----------
    model : nn.Module
        With a ModuleList called ``blocks`` of two or more maps from states (N, w) to states (N, w),
        each entered once, and one output per sample.
    inputs : Tensor
        Samples must not mix.

    Attributes
    ----------
    states : list of Tensor (N
        W), h_0 … h_L: what enters the first block, and what each block returns.
    downstream : list of Tensor (N, w), ∂f/∂h_0 … ∂f/∂h_L for every sample.

    Raises
    ------
    ValueError
        Also for a block without a skip connection (mean diagonal of A_k below 1/2), or one that is
        far from the identity (‖A_k − I‖_F ≥ √w).

    Notes
    -----
    Cost: one pass forward and back; the Jacobians of the blocks, N w² numbers each, when they are
    asked for. Source: 2512.18209, 4.1.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no ModuleList called 'blocks': this needs a residual "
                "stack h ↦ h + ε F(h), and a plain network has no near-identity layers to follow"
            )
        if len(blocks) < 2:
            raise ValueError(f"{len(blocks)} block: a product over depth needs two or more")
        self.model, self.blocks = model, blocks
        with _seen([*blocks]) as calls:
            rows = model(inputs.detach().requires_grad_(inputs.is_floating_point()))
            if rows.numel() != len(inputs) or len(calls) != len(blocks):
                raise ValueError(
                    f"outputs {tuple(rows.shape)}: expected one per sample, and each block entered "
                    "once"
                )
            states = [calls[0][0], *(out for _, out in calls)]
            # the sum over samples: ∂f(x)/∂h(x') vanishes for x ≠ x'
            down = torch.autograd.grad(rows.sum(), states, materialize_grads=True)
        self.states, self.downstream = [h.detach() for h in states], [b.detach() for b in down]
        shapes = {tuple(h.shape) for h in self.states}
        if len(shapes) > 1 or len(self.states[0].shape) != 2:
            raise ValueError(f"states have shapes {sorted(shapes)}; expected one shape (N, w)")
        # every block must be a near-identity map of its state
        for k, (a, distance) in enumerate(zip(self.transfers, self.distances, strict=True)):
            skip = float(a.diagonal(dim1=1, dim2=2).mean())
            if skip < 0.5:
                raise ValueError(
                    f"block {k} has no skip connection: the mean diagonal of its state Jacobian is "
                    f"{skip:.2f}, and that of I + εG is 1 + O(ε); take a residual network"
                )
            if distance >= 1:
                raise ValueError(
                    f"block {k} is not near the identity: ‖A − I‖_F/√w = {distance:.2f}, and 4.1 "
                    "asks for a small ε; make the branch smaller"
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
        """‖A_k − I‖_F/√w of each block, root mean square over samples: its ε‖G‖_F/√w."""
        return [_distance(a) for a in self.transfers]

    def downstream_products(self) -> list[Tensor]:
        """A_{L−1} ⋯ A_{l+1} for l = 0 … L−1, (N, w, w) each: I for the last block."""
        last = self.transfers[-1]
        products = [torch.eye(last.shape[1], dtype=last.dtype).expand_as(last)]
        for a in self.transfers[:0:-1]:
            products.append(products[-1] @ a)
        return products[::-1]

    def departures(self) -> list[float]:
        """‖A_{L−1} ⋯ A_{l+1} − I‖_F/√w, l = 0 … L−1: how far the product of Theorem 2 has gone."""
        return [_distance(p) for p in self.downstream_products()]

    def layer_jacobian(self, block: int, *, increasing: bool = False) -> Tensor:
        """Return J^(l) = (∂f/∂h_L) A_{L−1} ⋯ A_{l+1} ∂F_l/∂θ_l from its factors, (N, p_l).

        Of all parameters of one block. With `increasing` the product is taken as ∏_{k=l+1}^{L−1}
        reads when factors are written in the order of their index, A_{l+1} ⋯ A_{L−1}.
        """
        last = len(self.blocks) - 1
        checks.between("block", block, 0, last)
        # ∂f/∂h_L through the blocks above, then through the parameters of this one
        row = self.downstream[-1][:, None, :]
        chosen = self.transfers[block + 1 :]
        for a in chosen if increasing else chosen[::-1]:
            row = row @ a
        module = self.blocks[block]
        own = {name: p.detach() for name, p in module.named_parameters()}

        def branch(parameters: dict[str, Tensor], h: Tensor) -> Tensor:
            return functional_call(module, parameters, (h[None],))[0]

        grads = vmap(jacrev(branch), in_dims=(None, 0))(own, self.states[block])
        return torch.cat([(row @ g.flatten(2))[:, 0] for g in grads.values()], dim=1).detach()


def _distance(a: Tensor) -> float:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return math.sqrt(float((a - eye).square().sum(dim=(1, 2)).mean()) / a.shape[-1])


class LayerGrams(NamedTuple):
    """The factors of M^(l) for one linear layer s = W a + b, one output per sample, without 1/n."""

    forward: Tensor  # (N, N), a(x)·a(x'), plus 1 with a bias
    backward: Tensor  # (N, N), ∂f/∂s(x) · ∂f/∂s(x')

    @property
    def kernel(self) -> Tensor:
        """M^(l) = forward ∘ backward, entry by entry."""
        return self.forward * self.backward


def layer_grams(model: nn.Module, layer: str, inputs: Tensor) -> LayerGrams:
    """Return the Gram matrices of the linear layer called `layer`, entered once by (N, features).

    ∂f(x)/∂W = ∂f/∂s(x) ⊗ a(x), so that J^(l)J^(l)ᵀ is the entrywise product, for one output per
    sample. Cost: one pass forward and back.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if layer not in linear:
        raise ValueError(
            f"{layer!r} is not a linear layer of this model: expected one of "
            f"{', '.join(linear) or 'none'}"
        )
    with _seen([linear[layer]]) as calls:
        rows = model(inputs)
    if rows.numel() != len(inputs) or len(calls) != 1 or calls[0][1].ndim != 2:
        raise ValueError(
            f"{layer!r} was entered {len(calls)} times and the outputs are {tuple(rows.shape)}; "
            "expected one use on (N, features) and one output per sample: with shared weights or "
            "positions M^(l) is a sum of such products"
        )
    given, out = calls[0]
    a = given.flatten(1).detach()
    (b,) = torch.autograd.grad(rows.sum(), [out])
    return LayerGrams(a @ a.T + (linear[layer].bias is not None), b @ b.T)
