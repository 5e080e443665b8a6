"""Initial values: what a base model's tensors are drawn from, read off them, and drawn again.

A constant stays what it is; noise is normal or uniform, whichever is likelier, about a mean if it
has one. Parts of a fused matrix and rows of zeros are looked at apart.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from grsd.mup.optimizers import pieces


class Initial(NamedTuple):
    """What the values of a tensor, or of a part of it, are drawn from."""

    mean: float
    std: float = 0.0
    noise: Literal["normal", "uniform", "sign"] = "normal"
    zeros: tuple[int, ...] = ()  #: rows that are zero, such as that of padding

    def draw_(self, part: Tensor, factor: float, generator: torch.Generator) -> None:
        """Fill a part with the mean and noise of `factor` times the deviation."""
        part.fill_(self.mean)
        if self.std > 0:
            if self.noise == "uniform":
                noise = (torch.rand(part.shape, generator=generator) - 0.5) * math.sqrt(12)
            else:
                noise = torch.randn(part.shape, generator=generator)
            noise = noise.sign() if self.noise == "sign" else noise
            part.add_((self.std * factor * noise).to(part))
        if self.zeros:
            part[list(self.zeros)] = 0.0


def initial(
    owner: nn.Module, values: Tensor, layout: dict[str, Any], known: bool
) -> tuple[Initial, ...] | None:
    """Return what a base model's tensor is drawn from: as a whole, or each of its fused parts.

    Without a base model, `known` false, only a constant is; None stands for what is not known, such
    as values on the meta device.
    """
    if values.is_meta:
        return None
    x = values.detach()
    apart = layout["split"] != 1 and not layout["batched"]
    found = tuple(_drawn_from(part) for part in (pieces(x, layout) if apart else [x]))
    # a single bias of a layer was drawn, and its sign is; a number that stands alone was set
    layer = any(p.ndim > 1 for p in owner.parameters(recurse=False))
    if x.numel() == 1 and layer and found[0].mean not in (0.0, 1.0):
        found = (Initial(0.0, abs(found[0].mean), "sign"),)
    return found if known or all(one.std == 0 for one in found) else None


def _drawn_from(x: Tensor) -> Initial:
    """Return the likelier of two kinds of noise, or a constant."""
    x = x.float() if x.dtype.itemsize < 4 else x
    first = x.flatten()[0]
    if bool((x == first).all()):
        return Initial(float(first))
    # rows of zeros in a table of noise
    zeros: tuple[int, ...] = ()
    if x.ndim == 2 and bool((empty := (x == 0).all(1)).any()):
        zeros = tuple(int(i) for i in empty.nonzero())
        x = x[~empty]
    variance, mean = torch.var_mean(x, correction=0)
    centre, spread = float(mean), math.sqrt(float(variance))
    # a mean within four standard errors of 0 is none
    if abs(centre) <= 4 * spread / math.sqrt(x.numel()):
        centre, spread = 0.0, math.hypot(spread, centre)
    # the likelihoods are range^-N and (√(2πe) s)^-N
    uniform = float(x.max() - x.min()) < math.sqrt(2 * math.pi * math.e) * spread
    return Initial(centre, spread, "uniform" if uniform else "normal", zeros)
