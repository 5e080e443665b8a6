"""Residual stacks by layer against automatic differentiation."""

from __future__ import annotations

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
