"""Residual stacks by layer, and the two steps of Proposition 1, against automatic differentiation and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem
from grsd.lab.nets.architectures import res_conv, res_mlp
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.theorems import depth


def data(samples: int = 9, inputs: int = 4) -> Tensor:
    return torch.randn(
        samples, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )


def jacobians(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return Blocks.of(Problem(net, x, torch.zeros(len(x)))).jacobian()


class Plain(nn.Module):
    """A stack of square layers without skip connections."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(count))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = torch.tanh(block(h))
        return h.sum(dim=1)


# --- Section 4.1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "bias"), [(1, False), (2, True)])
def test_the_factors_give_the_jacobian_of_every_block_in_decreasing_order_only(
    layers: int, bias: bool
) -> None:
    net = res_mlp(inputs=4, width=6, depth=5, layers=layers, epsilon=0.5, bias=bias, seed=2)
    x = data()
    stack, exact = depth.ResidualFactors(net, x), jacobians(net, x)
    for block in range(5):
        torch.testing.assert_close(
            stack.layer_jacobian(block), exact[block + 1], rtol=1e-12, atol=1e-13
        )
    for block in range(3):  # two factors or more do not commute
        gap = (stack.layer_jacobian(block, increasing=True) - exact[block + 1]).norm() / exact[
            block + 1
        ].norm()
        assert float(gap) > 0.01
    with pytest.raises(ValueError, match="block is 5"):
        stack.layer_jacobian(5)


def test_the_states_carry_the_derivatives_of_the_output() -> None:
    net, x = res_mlp(inputs=4, width=5, depth=3, layers=1, epsilon=0.3, seed=1), data()
    stack = depth.ResidualFactors(net, x)
    for k in range(3):
        torch.testing.assert_close(
            (stack.downstream[k + 1][:, None] @ stack.transfers[k])[:, 0],
            stack.downstream[k],
            rtol=1e-12,
            atol=1e-14,
        )
    torch.testing.assert_close(stack.states[0], net.read(x).detach())
    products = stack.downstream_products()
    torch.testing.assert_close(
        products[0], stack.transfers[2] @ stack.transfers[1], rtol=1e-12, atol=1e-14
    )
    assert stack.departures()[-1] == 0
    assert stack.departures()[1] == pytest.approx(stack.distances[2], rel=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_of_a_linear_layer_is_an_entrywise_product(bias: bool) -> None:
    net, x = res_mlp(inputs=4, width=6, depth=2, layers=2, epsilon=0.7, bias=bias, seed=4), data()
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            wanted = [f"{name}.{own}" for own, _ in module.named_parameters()]
            blocks = Blocks.of(
                Problem(net, x, torch.zeros(9)),
                split=[wanted, [n for n, _ in net.named_parameters() if n not in wanted]],
            )
            J = blocks.jacobian()[0]
            found = depth.layer_grams(net, name, x)
            torch.testing.assert_close(found.kernel, J @ J.T, rtol=1e-12, atol=1e-13)
            assert (
                float((found.forward @ found.backward - J @ J.T).norm() / (J @ J.T).norm()) > 0.1
            )  # not the matrix product


def test_what_is_not_a_residual_stack_is_refused() -> None:
    x = data()
    with pytest.raises(ValueError, match="no ModuleList called 'blocks'"):
        depth.ResidualFactors(nn.Linear(4, 1).double(), x)
    with pytest.raises(ValueError, match="block 0 has no skip connection"):
        depth.ResidualFactors(Plain(), x)
    with pytest.raises(ValueError, match="1 block: a product"):
        depth.ResidualFactors(Plain(1), x)
    with pytest.raises(ValueError, match="not near the identity"):
        depth.ResidualFactors(
            res_mlp(inputs=4, width=6, depth=2, layers=1, epsilon=3.0, activation="linear", seed=0),
            x,
        )
    with pytest.raises(ValueError, match="one per sample"):
        depth.ResidualFactors(res_mlp(inputs=4, width=6, depth=2, outputs=2, seed=0), x)
    with pytest.raises(ValueError, match=r"expected one shape \(N, w\)"):
        depth.ResidualFactors(
            res_conv(width=3, depth=2, epsilon=0.1, seed=0),
            torch.randn(2, 1, 4, 4, dtype=torch.float64),
        )
    net = res_mlp(inputs=4, width=6, depth=2, seed=0)
    with pytest.raises(ValueError, match="'first' is not a linear layer"):
        depth.layer_grams(net, "first", x)
    with pytest.raises(ValueError, match="entered 1 times and the outputs"):
        depth.layer_grams(res_mlp(inputs=4, width=6, depth=2, outputs=2, seed=0), "head", x)


# --- Proposition 1 -----------------------------------------------------------------------------------------------------------


def pair(seed: int, n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, n))
    cross = rng.standard_normal((n, n)) @ root.T
    return root @ root.T, cross + cross.T


def test_first_moments_add_up_at_one_basis_and_nothing_adds_up_across_bases() -> None:
    kernels, rates = zip(pair(1), pair(2), pair(3), strict=True)
    edges = np.arange(-20.0, 10.0)
    found = depth.additivity(kernels, rates, edges)
    assert found.total_first < 1e-13
    assert min(found.own_first, found.own_second) > 0.3 and found.total_second > 0.05
    same = depth.additivity(
        [kernels[0]] * 2, [rates[0], 2 * rates[0]], edges
    )  # one basis, but 2M has other bins
    assert same.total_first < 1e-13
    assert same.total_second == pytest.approx(4 / 9, rel=1e-10)  # (1 + 4)/9 of the square of 3
    shifted = depth.additivity([kernels[0]] * 2, [rates[0], 2 * rates[0]], np.array([-40.0, 40.0]))
    assert shifted.own_first < 1e-13  # one bin holds everything: bases and bins agree
    with pytest.raises(ValueError, match="two or more"):
        depth.additivity(kernels[:1], rates[:1], edges)
    with pytest.raises(ValueError, match="ascend"):
        depth.additivity(kernels, rates, edges[::-1])


def test_layers_on_disjoint_samples_add_up_in_every_sense() -> None:
    kernels, rates = [np.zeros((20, 20)) for _ in range(2)], [np.zeros((20, 20)) for _ in range(2)]
    for index, rows in enumerate((slice(0, 8), slice(8, 20))):
        kernels[index][rows, rows], rates[index][rows, rows] = pair(index, rows.stop - rows.start)
    assert max(depth.additivity(kernels, rates, np.arange(-20.0, 10.0))) < 1e-12


def test_sums_over_bins_hold_every_pair_once() -> None:
    kernel, rate = pair(5)
    values, vectors = np.linalg.eigh(kernel)
    X = vectors.T @ rate @ vectors
    for power in (1, 2):
        found = depth.binned_sums(kernel, rate, np.arange(-30.0, 12.0, 0.5), power)
        assert found.sum() == pytest.approx((X**power).sum(), rel=1e-10)
    middle = float(np.log(values[10:12]).mean())
    split = depth.binned_sums(kernel, rate, np.array([-40.0, middle, 40.0]), 2)
    assert split[0, 1] == pytest.approx((X[:11, 11:] ** 2).sum(), rel=1e-10)
    empty = depth.binned_sums(np.diag([0.0, 1.0]), np.ones((2, 2)), np.array([-5.0, 5.0]), 2)
    assert empty.tolist() == [[pytest.approx(1.0)]]  # the null mode has no bin


def test_dilution_is_one_over_the_depth_for_layers_of_fixed_size_and_none_for_a_bounded_sum() -> (
    None
):
    rng = np.random.default_rng(0)
    bulk, boundary = rng.standard_normal((4, 4)), rng.standard_normal((3, 4, 4))
    constant = np.abs((boundary - bulk).sum(axis=0)).max()
    for L in (5, 500, 50_000):
        assert depth.dilute(boundary, bulk, L).deviation * L == pytest.approx(constant, rel=1e-9)
        layers = np.concatenate([boundary, np.broadcast_to(bulk, (L - 3, 4, 4))])
        np.testing.assert_allclose(
            depth.dilute(boundary, bulk, L).kernel, layers.mean(axis=0), atol=1e-10
        )
    bounded = [depth.dilute(boundary, bulk, L, "bounded").deviation for L in (5, 500, 50_000)]
    assert bounded[2] == pytest.approx(np.abs(boundary.sum(axis=0)).max(), rel=1e-3)
    assert bounded[2] > 0.5 * bounded[0]
    with pytest.raises(ValueError, match="depth is 3 with 3 boundary layers"):
        depth.dilute(boundary, bulk, 3)
    with pytest.raises(ValueError, match="weight is 'free'"):
        depth.dilute(boundary, bulk, 9, "free")  # type: ignore[arg-type]


def test_the_share_of_the_ends_of_linear_networks_is_the_closed_form() -> None:
    x, L, epsilon, seeds = data(6, 3), 5, 0.5, 150
    traces = np.array(
        [
            [
                float(j.square().sum())
                for j in jacobians(
                    res_mlp(
                        inputs=3,
                        width=7,
                        depth=L,
                        layers=1,
                        activation="linear",
                        epsilon=epsilon,
                        seed=s,
                    ),
                    x,
                )
            ]
            for s in range(seeds)
        ]
    )
    mean, error = traces.mean(axis=0), traces.std(axis=0) / np.sqrt(seeds)
    growth, size = (1 + epsilon**2) ** L, float(x.square().sum())
    expected = np.array(
        [
            growth * size,
            *[epsilon**2 / (1 + epsilon**2) * growth * size * 7 / 3] * L,
            growth * size * 7 / 3,
        ]
    )
    assert np.all(np.abs(mean - expected) < 4.5 * error)
    share = (expected[0] + expected[-1]) / expected.sum()
    assert depth.linear_end_share(3, 7, L, epsilon) == pytest.approx(share, rel=1e-12)
    assert depth.end_share([np.diag([one, 0.0]) for one in expected]) == pytest.approx(
        share, rel=1e-12
    )
    assert depth.linear_end_share(8, 16, 10**6, 1e-3) == pytest.approx(24 / 40, rel=1e-5)
    with pytest.raises(ValueError, match="epsilon is 0"):
        depth.linear_end_share(3, 7, 4, 0.0)
    with pytest.raises(ValueError, match="two ends"):
        depth.end_share([np.eye(2), np.eye(2)])
