"""The bound on how fast eigenvalues can move, which the chapter on the lazy regime defines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grsd.dynamics.flow import integrate
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import mlp

from .chapter_code import definitions

realizability = definitions("dynamics/lazy-to-rich.md", "realizability").realizability


@pytest.fixture(scope="module")
def net() -> Problem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    return Problem(mlp([2, 10, 1], seed=3, gain=1.5), x, torch.sin(3 * x[:, 0]))


def test_realizability_holds_along_a_flow_and_catches_what_no_network_can_do(net: Problem) -> None:
    times = np.append(0.0, np.geomspace(0.1, 100, 20))
    path = integrate(net, times, rtol=1e-9, estimate=False)
    spectra, speeds = [], []
    for theta in path.thetas:
        spectra.append(np.linalg.eigvalsh(net.kernel(theta).numpy()))
        v = net.velocity(theta)
        j, moved = (net.jacobian(torch.as_tensor(theta) + x * v) for x in (0.0, 1e-5))
        speeds.append(
            float(torch.linalg.matrix_norm((moved - j) / 1e-5, 2)) / math.sqrt(12) / float(v.norm())
        )
    ratio = realizability(
        times, path.losses, np.array(spectra), 1.05 * max(speeds)
    )  # 5 %: the grid misses the maximum
    assert 0 < ratio <= 1
    assert (
        realizability(times, path.losses, np.array(spectra), max(speeds) * ratio / 2) > 1
    )  # B too small
    planted = spectra[-1] * (
        1 + times[:, None]
    )  # eigenvalues that keep growing while the loss stands still
    assert realizability(times, path.losses, planted, max(speeds)) > 1


def test_the_bound_grows_like_the_root_of_the_time_and_of_the_loss() -> None:
    # √λ moves by 1.9 while L falls by 1: over a time of 4 the bound is B √4 = 2, not 4
    def ratio(span: float, fall: float, B: float = 1.0) -> float:
        times, losses = np.array([1.0, 1.0 + span]), np.array([10.0, 10.0 - fall])
        return float(realizability(times, losses, np.array([[1.0], [2.9**2]]), B))

    assert ratio(4.0, 1.0) == pytest.approx(1.9 / 2)
    assert ratio(4.0, 4.0) == pytest.approx(1.9 / 4)
    assert ratio(9.0, 1.0, B=2.0) == pytest.approx(1.9 / 6)
    assert ratio(0.25, 1.0) == pytest.approx(1.9 / 0.5)  # over a short time √ allows more than t
