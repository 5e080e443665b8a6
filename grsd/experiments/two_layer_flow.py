"""Two-layer nets on the targets of `grsd.lab.data.functions`, and their gradient flow.

What the experiments ``drift`` and ``dilation`` share: the net of a piece, the times at which it is
looked at, and the edges and orders of its shells.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from grsd.dynamics import drift, flow, modes
from grsd.dynamics.problem import Problem
from grsd.experiments.two_layer_forms import TwoLayerProblem
from grsd.lab.data.functions import data
from grsd.lab.nets import models

# edges of λ, in 1/time: two decades below what t = 1000 can learn, up to 2
EDGES = np.power(2.0, np.arange(-18, 2))
ORDERS = {"1": 1.0, "4": 4.0, "sharp": math.inf}
PARTS: tuple[drift.Part, ...] = ("advective", "kato", "total")
REFERENCE = 128  # width at which `gamma` is quoted
ROUNDING = 1 - 1e-9  # a grid in log t rounds


def problem(
    target: str,
    n: int,
    gamma: float,
    *,
    seed: int,
    h: int = 0,
    data_seed: int = -1,
    inputs: int = 2,
    activation: str = "tanh",
    gain: float = 1.0,
    device: str = "cpu",
    **_: Any,
) -> TwoLayerProblem:
    """Return a two-layer net on n samples of one of the `TARGETS`.

    Its width is `h`, or n when that is 0; the data are drawn from `data_seed`, or from `seed` when
    that is negative. What else a piece holds is not looked at.
    """
    x, y = data(target, n, seed if data_seed < 0 else data_seed, inputs)
    net = models.two_layer(inputs, h or n, gamma, activation, seed=seed, gain=gain)
    return TwoLayerProblem(net.to(device), x.to(device), y.to(device))


def follow(
    at: Problem, until: float = 1000.0, points: int = 25, rtol: float = 1e-7
) -> tuple[flow.Path, list[modes.Modes]]:
    """Integrate gradient flow: the path at 0 and times even in log t from 0.1; modes at these."""
    times = np.append(0.0, np.geomspace(0.1, until, points))
    path = flow.integrate(at, times, rtol=rtol, atol=1e-2 * rtol, estimate=False)
    return path, [modes.modes(*modes.instant(at, theta)) for theta in path.thetas[1:]]
