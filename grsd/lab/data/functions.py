"""Functions on Gaussian inputs, as regression tasks whose target is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grsd.checks import one_of
from grsd.lab.nets import models


def _teacher(x: Tensor) -> Tensor:
    net = models.two_layer(x.shape[1], 20, 1.0, seed=77, gain=2.0).to(x.device)
    return torch.tanh(net.augmented(x) @ net.inner_start.T) @ net.outer_start


# Functions on inputs of two or more dimensions, scaled to mean square 1 on the sample.
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "wave": lambda x: torch.sin(2 * x[:, 0] + x[:, 1]),
    "product": lambda x: x[:, 0] * x[:, 1],
    "step": lambda x: torch.sign(x[:, 0]),
    "quadrant": lambda x: torch.sign(x[:, 0] * x[:, 1]),
    "teacher": _teacher,
}


def data(target: str, samples: int, seed: int, inputs: int = 2) -> tuple[Tensor, Tensor]:
    """Return inputs (n, d), standard normal, and targets (n,) of mean square 1, in float64."""
    one_of("target", target, TARGETS)
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(samples, inputs, dtype=torch.float64, generator=generator)
    y = TARGETS[target](x)
    return x, y / y.square().mean().sqrt()
