"""Unrolled recurrences against convolutions, plain autograd, differences and closed forms; a finite memory as the null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from grsd.dynamics.flow import central
from grsd.renorm.theorems.jacobian import coefficients, envelope
from grsd.renorm.theorems.recurrence import Cell, Unrolled, diagonal_cell, gated_cell

MAKERS = (diagonal_cell, gated_cell)


def signs(steps: int, width: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice([-1.0, 1.0], (steps, width))


def register_cell(length: int) -> Cell:
    """A shift register: y_t = Σ_{j<length} c_j w u_{t−j}. Its memory ends after `length` steps, A^length = 0."""

    def step(theta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([theta[:1] * u, h[:-1]])
        return h, (theta[1:] @ h).reshape(1)

    return Cell(step, torch.linspace(1.0, 2.0, length + 1, dtype=torch.float64), length, 1, 1)


def test_copies_of_one_state_in_closed_form() -> None:
    """J^(l)_t = [c a^{t−l}h_{l−1}, c a^{t−l}u_l, δ_tl h_l], and h_t = Σ_k aᵏ b u_{t−k}."""
    unrolled = Unrolled(diagonal_cell(1, decay=0.7, seed=3), signs(9))
    a, b, c = unrolled.cell.theta.tolist()
    u = unrolled.inputs[:, 0].numpy()
    h = np.array([sum(a**k * b * u[t - k] for k in range(t + 1)) for t in range(9)])
    np.testing.assert_allclose(unrolled.states()[:, 0], h, rtol=1e-13)
    np.testing.assert_allclose(unrolled.output(), c * h, rtol=1e-13)
    expected = np.zeros((9, 9, 3))
    for i in range(9):
        for t in range(i, 9):
            expected[i, t] = [
                c * a ** (t - i) * (h[i - 1] if i else 0),
                c * a ** (t - i) * u[i],
                h[i] if t == i else 0,
            ]
    np.testing.assert_allclose(unrolled.copies(), expected, atol=1e-13)


@pytest.mark.parametrize("make", MAKERS)
def test_tied_jacobian_and_velocity_by_plain_autograd(make: type) -> None:
    """The sum of the copies is the Jacobian of the network that has one θ, and the tied velocity its −∇½‖e‖²."""
    cell = make(3, inputs=2, outputs=2, decay=0.8, seed=1)
    unrolled = Unrolled(cell, signs(7, 2))
    theta = cell.theta.clone().requires_grad_(True)
    h, outputs = torch.zeros(3, dtype=torch.float64), []
    for u in unrolled.inputs:
        h, y = cell.step(theta, h, u)
        outputs.append(y)
    found = torch.cat(outputs)
    rows = [torch.autograd.grad(y, theta, retain_graph=True)[0] for y in found]
    np.testing.assert_allclose(unrolled.copies().sum(0), torch.stack(rows).numpy(), atol=1e-13)
    target = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(0.5 * (target - found).square().sum(), theta)
    velocity = unrolled.velocity(target.numpy() - unrolled.output())
    np.testing.assert_allclose(velocity, -gradient.expand(7, -1).numpy(), atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", MAKERS)
def test_rates_against_differences(make: type, tied: bool) -> None:
    """Order-8 differences over copies that move apart; the diagonal cell is a polynomial, the gated one nearly so at h = 0.02."""
    unrolled = Unrolled(make(2, inputs=2, decay=0.6, seed=2), signs(6, 2))
    velocity = unrolled.velocity(np.linspace(-1, 1, 6) / 3, tied=tied)
    at = unrolled.cell.theta.expand(6, -1)
    values = [
        unrolled._jacobian(at + k * 0.02 * torch.as_tensor(velocity)).numpy() for k in range(-4, 5)
    ]
    np.testing.assert_allclose(unrolled.rates(velocity), central(np.array(values), 0.02), atol=1e-9)


def test_untied_velocity_is_each_copys_own() -> None:
    unrolled = Unrolled(diagonal_cell(2, decay=0.6, seed=2), signs(6))
    e = np.arange(6.0)
    own = unrolled.velocity(e, tied=False)
    np.testing.assert_allclose(own, [j.T @ e for j in unrolled.copies()], atol=1e-13)
    np.testing.assert_allclose(unrolled.velocity(e), np.tile(own.sum(0), (6, 1)), atol=1e-12)


@pytest.mark.parametrize("rho", [0.5, 0.8])
@pytest.mark.parametrize("band", [0, 3, 8])
def test_remainder_of_one_state_in_closed_form(rho: float, band: int) -> None:
    """|cȧ|·‖(h_{l−1}, u_l)‖·ρ^K·ρ/(1−ρ²)^{3/2} for T → ∞: kρ^{k−1} beyond K, less its part along ρᵏ. Cut off at ρ^54."""
    unrolled = Unrolled(diagonal_cell(1, decay=rho, seed=1), signs(72))
    velocity = np.tile([1.5, 0.3, -0.7], (72, 1))
    moved, i = unrolled.rates(velocity), 10
    copies = unrolled.copies()
    found = coefficients(
        [copies[m] for m in range(i - band, i + band + 1)],
        list(moved[i - band : i + band + 1]),
        band=band,
    )
    c, h, u = (
        float(unrolled.cell.theta[2]),
        unrolled.states()[i - 1, 0],
        float(unrolled.inputs[i, 0]),
    )
    expected = abs(1.5 * c) * np.hypot(h, u) * rho**band * rho / (1 - rho**2) ** 1.5
    assert found.remainders[band] == pytest.approx(expected, rel=1e-6)


def test_finite_memory_is_exactly_banded_and_instability_is_seen() -> None:
    unrolled = Unrolled(register_cell(4), signs(16))
    moved, copies = unrolled.rates(unrolled.velocity(np.ones(16))), list(unrolled.copies())
    assert unrolled.row_tail(moved, 3).max() == 0
    assert unrolled.row_tail(moved, 2).max() > 0.1
    assert coefficients(copies, list(moved), band=3).remainders.max() < 1e-12
    assert envelope(copies)[4:].max() == 0 and envelope(copies)[3] > 0.1

    stable = diagonal_cell(2, decay=0.8, seed=0)
    tails = {}
    for decay in (0.8, 1.05):
        one = Unrolled(
            stable.at(torch.cat([torch.full((2,), decay, dtype=torch.float64), stable.theta[2:]])),
            signs(40),
        )
        rates = one.rates(np.ones((40, 6)))
        tails[decay] = one.row_tail(rates, 20)[5] / one.row_tail(rates, 5)[5]
    assert tails[0.8] < 0.2 and tails[1.05] > 0.8


@pytest.mark.parametrize("rho", [0.5, 0.7, 0.9])
def test_coherence_of_copies_decays_like_rho(rho: float) -> None:
    u = envelope(list(Unrolled(diagonal_cell(1, decay=rho, seed=1), signs(96)).copies()))
    k = np.arange(4, 40)
    # sup over the signs of the inputs is reached at every distance, up to fluctuations of order (1−ρ)/10 in the exponent
    assert np.polyfit(k, np.log(u[k]), 1)[0] == pytest.approx(np.log(rho), abs=0.02)


@pytest.mark.parametrize("make", MAKERS)
def test_a_late_loss_moves_early_copies_only_through_shared_weights(make: type) -> None:
    rho = 0.6
    unrolled = Unrolled(make(4, inputs=2, decay=rho, seed=1), signs(40, 2))
    late = np.zeros(40)
    late[-1] = 1.0
    sizes = {
        tied: np.linalg.norm(unrolled.rates(unrolled.velocity(late, tied=tied))[4], 2)
        for tied in (True, False)
    }
    assert sizes[True] > 0.1
    assert (
        sizes[False] < 1e5 * rho**35 < 1e-2
    )  # 35 steps from copy 4 to the loss; prefactors of up to 35² and the weights


def test_gated_decay_is_below_rho_for_every_parameter() -> None:
    cell = gated_cell(3, inputs=2, decay=0.7, seed=0)
    rng = np.random.default_rng(1)
    for _ in range(5):
        theta = torch.as_tensor(5 * rng.standard_normal(len(cell.theta)))
        moved = torch.func.jacrev(
            lambda h, at=theta: cell.step(at, h, torch.ones(2, dtype=torch.float64))[0]
        )(torch.ones(3, dtype=torch.float64))
        assert float(torch.linalg.matrix_norm(moved, 2)) < 0.7


CELL = diagonal_cell(1, decay=0.5, seed=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: diagonal_cell(2, decay=1.0, seed=0), "decay is 1.0; a stable recurrence"),
        (lambda: gated_cell(2, decay=0.0, seed=0), "decay is 0.0"),
        (lambda: diagonal_cell(0, decay=0.5, seed=0), r"states, inputs, outputs\[0\] is 0"),
        (lambda: CELL.at(np.ones(2)), r"θ has shape \(2,\); expected \(3,\)"),
        (lambda: Unrolled(CELL, signs(1)), "number of steps is 1; a recurrence"),
        (lambda: Unrolled(CELL, signs(4, 2)), r"expected \(steps, 1\)"),
        (lambda: Unrolled(CELL, signs(4) * np.nan), "not finite"),
        (lambda: Unrolled(CELL, signs(4)).velocity(np.ones(3)), r"expected \(4,\)"),
        (lambda: Unrolled(CELL, signs(4)).rates(np.ones(3)), r"expected \(4, 3\)"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
