"""Schedules against gradient descent step by step, kernels against a wide net, and a planted power law."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.experiments import scheduled
from grsd.experiments.engine import find, run
from grsd.experiments.scheduled import descended, kernel_matrix, steps_of

DRIFTS = (-0.5, 0.0, 0.5, 1.0)


@pytest.mark.parametrize("c0", DRIFTS)
def test_the_series_is_gradient_descent_step_by_step(c0: float) -> None:
    r = np.random.default_rng(0)
    q = np.linalg.qr(r.standard_normal((9, 9)))[0]
    lam = np.geomspace(1, 1e-3, 9)
    M, e = (q * lam) @ q.T, r.standard_normal(9)
    eta, k = steps_of(c0, 1.0, (2.0, 40.0))
    rates = eta * np.arange(1, k[-1] + 1) ** c0
    assert rates.max() <= 0.5 * (1 + 1 / k[-1])  # ηλ_max ≤ ½ to the rounding of the last step
    # Σ η reaches the clock's end: the sum is the integral to its first correction, of order 1/K
    assert rates.sum() == pytest.approx(40.0, rel=0.06)
    losses, left = [], e.copy()
    for j, rate in enumerate(rates, 1):
        left = left - rate * (M @ left)
        if j in k:
            losses.append(0.5 * left @ left)
    found = descended(lam, 0.5 * (q.T @ e) ** 2, c0, eta, k)
    np.testing.assert_allclose(found, losses, rtol=1e-10)  # rounding of some hundred steps
    assert np.abs(found / descended(lam, 0.5 * (q.T @ e) ** 2, c0, 1.01 * eta, k) - 1).max() > 1e-3


@pytest.mark.parametrize("c0", DRIFTS)
def test_a_planted_power_law_has_the_corrected_exponent_and_not_the_printed_one(c0: float) -> None:
    p = -0.7
    u = np.geomspace(1e-12, 1, 4000)
    eta, k = steps_of(c0, 1.0, (50.0, 500.0))
    found = fitted_exponent(k, descended(u, u ** (p + 1), c0, eta, k))
    # steps for an integral and u_max = 1: corrections of order 1/τλ_max = 2 %
    assert found == pytest.approx((1 + c0) * (p + 1), rel=0.04)
    assert c0 == 0 or abs(found - ((1 + c0) * p + 1)) > 0.4


def test_the_tangent_kernel_is_the_limit_of_a_wide_relu_net() -> None:
    generator, width = torch.Generator().manual_seed(0), 4096
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    shape = [5, width, width, 1]
    weights = [
        torch.randn(b, a, generator=generator, dtype=torch.float64).requires_grad_()
        for a, b in pairwise(shape)
    ]

    def net(one: torch.Tensor) -> torch.Tensor:
        h = one @ weights[0].T / 5**0.5
        for w in weights[1:]:
            h = nn.functional.relu(h) @ w.T * (2 / w.shape[1]) ** 0.5
        return h[0]

    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(net(one), weights)]) for one in x]
    J = torch.stack(rows)
    K = kernel_matrix("ntk", x)
    # fluctuations of an average over the width: 1/√4096 = 1.6 %, with room for three layers
    assert float((J @ J.T - K).norm() / K.norm()) < 0.08


def test_distances_of_the_other_kernels_have_median_one() -> None:
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    r = torch.cdist(x, x)
    off = r[~torch.eye(40, dtype=torch.bool)]
    scale = off.square().median().sqrt()
    torch.testing.assert_close(
        kernel_matrix("laplace", x), torch.exp(-r / scale), atol=1e-6, rtol=0
    )
    gauss = torch.exp(-((r / scale) ** 2) / 2)
    torch.testing.assert_close(kernel_matrix("gauss", x), gauss, atol=1e-10, rtol=0)


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Forty images of each of four labels: pictures of a common kind, labels at random."""
    r = np.random.default_rng(0)
    labels = np.repeat(np.arange(4, dtype=np.uint8), 40)
    scales = [
        np.kron(r.standard_normal((160, 32 // k, 32 // k, 3)), np.ones((1, k, k, 1))) * k
        for k in (1, 2, 4, 8, 16)
    ]
    pixels = np.clip(128 + 3 * sum(scales), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "some.npz", train_images=pixels, train_labels=labels)
    return str(tmp_path / "some.npz")


def test_the_experiment_end_to_end(images: str, tmp_path: Path) -> None:
    small = {"samples": 64, "net_samples": 48, "first": 2, "share": 4, "width": 24, "seeds": 2}
    p = scheduled.Parameters(images=images, kernels=("laplace", "net"), **small)
    data = run(find("scheduled"), p, cache=tmp_path).data
    assert [g["kernel"] for g in data["groups"]] == ["laplace", "net"]
    for one in data["runs"]:
        # a schedule only changes the clock: exponents over 1 + c₀ agree, up to the size of steps
        scaled = [one["measured"][f"{c0:g}"] / (1 + c0) for c0 in DRIFTS]
        assert max(scaled) / min(scaled) < 1.15
    columns, rows = scheduled.table(data)
    assert len(rows) == 8 and len(columns) == len(rows[0])
    # the net's own training is what its linear model does, at γ = 0.02
    net, k = data["groups"][1], np.array(data["groups"][1]["curves"]["0"]["steps"])
    made = scheduled.measure({**scheduled.pieces(p)[2]})
    far = scheduled.measure({**scheduled.pieces(p)[2], "gamma": 20.0})
    assert net["curves"]["0"]["losses"] == pytest.approx(made["curves"]["0"]["losses"], rel=1e-4)
    assert far["measured"]["0"] > 1.2 * made["measured"]["0"] and len(k) == len(
        made["curves"]["0"]["losses"]
    )


def test_bad_parameters_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="kernels is 'rbf'"):
        scheduled.Parameters(kernels=("rbf",))
    with pytest.raises(ValueError, match="five pairs"):
        scheduled.Parameters(seeds=6)
    with pytest.raises(ValueError, match="more eigenvalues"):
        scheduled.Parameters(samples=40)
    with pytest.raises(ValueError, match="drifts"):
        scheduled.Parameters(drifts=(-1.0,))
