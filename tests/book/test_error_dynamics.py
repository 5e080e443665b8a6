"""The distance to an orbit, which the chapter on error dynamics defines."""

from __future__ import annotations

import numpy as np
import torch

from grsd.dynamics.flow import Path, integrate
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import mlp

from .chapter_code import definitions


def test_the_distance_to_an_orbit_ignores_time_and_sees_a_detour() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    y = torch.sin(2 * x @ torch.randn(3, generator=g, dtype=torch.float64))
    problem = Problem(mlp([3, 8, 1], seed=0), x, y)
    orbit_gap = definitions("dynamics/error-dynamics.md", "orbit_gap").orbit_gap
    curve = integrate(problem, np.linspace(0, 2, 200), estimate=False)
    slower = integrate(problem, np.linspace(0, 2, 30) ** 2 / 2, estimate=False)
    assert orbit_gap(slower, curve).max() < 1e-3  # sagitta of 200 pieces
    aside = Path(slower.times, slower.thetas + 0.05, slower.losses, 0.0, problem)
    assert orbit_gap(aside, curve).max() > 1e-2
