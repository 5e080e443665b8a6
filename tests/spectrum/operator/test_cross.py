"""Kernels between two batches against dense Jacobians, and what they are used for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grsd.spectrum import NTK, Outputs, TokenLogProb
from tests.cases import CASES, Case, gpt_neox, jacobian, mlp

Method = Any


def other(case: Case) -> Case:
    """A batch of another size, and for tokens of another length, for the model of a case."""
    model, x, observable = case
    generator = torch.Generator().manual_seed(9)
    kind: Any = type(observable)
    if x.is_floating_point():
        drawn = torch.randn(5, *x.shape[1:], generator=generator, dtype=x.dtype)
        return model, drawn, kind(observable.targets[:5])  # type: ignore[attr-defined]
    tokens = torch.randint(0, 23, (2, 3, 7), generator=generator)
    targets = tokens[1].clone()
    targets[0, :2] = -100
    return model, tokens[0], kind(targets)


def truth(case: Case, second: Case, weight: float) -> Tensor:
    here, there = jacobian(*case), jacobian(*second)
    return weight * sum((there[k] @ here[k].T for k in here), torch.zeros(()).double())


def relative(A: Tensor, B: Tensor) -> float:
    return float(torch.linalg.norm(A - B) / torch.linalg.norm(B))


@pytest.mark.parametrize("method", ["factored", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_products_between_two_batches_are_those_of_dense_jacobians(
    name: str, method: Method
) -> None:
    case = CASES[name]()
    second = other(case)
    M = NTK(*case, method=method)
    C, D = M.cross(*second[1:]), truth(case, second, M.inner_weight)
    assert C.method == method and C.shape == tuple(D.shape) == C.T.shape[::-1]
    g = torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, 2, generator=g, dtype=M.dtype) for n in C.shape[::-1])
    for made, exact in (
        (C @ u[:, 0], D @ u[:, 0]),
        (C @ u, D @ u),
        (C.T @ v, D.T @ v),
        (v[:, 0] @ C, v[:, 0] @ D),
        (v.T @ C, v.T @ D),
        (C.to_dense(), D),
        (C.T.to_dense(), D.T),
        (C.T.T @ u, D @ u),
    ):
        assert relative(made, exact) < 2e-15 * 10
    assert torch.equal(C.T.outputs, M.outputs) and C.outputs.shape == (C.shape[0],)
    raw = NTK(*case, method=method, normalize="sum").cross(*second[1:])
    assert relative(raw @ u, D @ u / M.inner_weight) < 2e-14


class Odd(nn.Module):
    """A recurrent matrix, a scale without a rule, a table, a bias that several layers share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table, self.step = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 6)
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 2, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        state = torch.zeros_like(h[:, 0])
        for k in range(tokens.shape[1]):
            state = torch.tanh(self.step(state) + h[:, k] * torch.exp(self.scale))
        return self.head(functional.layer_norm(state, (6,))) + self.step.bias[:2]


@pytest.mark.parametrize("method", ["factored", "graph"])
def test_parameters_that_enter_in_other_ways_are_exact(method: Method) -> None:
    g = torch.Generator().manual_seed(2)
    model = Odd().double()
    case: Case = (model, torch.randint(0, 11, (4, 5), generator=g), Outputs())
    second: Case = (model, torch.randint(0, 11, (3, 7), generator=g), Outputs())
    M = NTK(*case, method=method)
    C = M.cross(second[1])
    assert relative(C.to_dense(), truth(case, second, M.inner_weight)) < 2e-14

    # parameters that one batch alone reaches give nothing
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if len(x) == 4 else self.a(x) + self.b(x)

    gated, x = Gated().double(), torch.randn(7, 3, generator=g).double()
    cases: list[Case] = [(gated, x[:4], Outputs()), (gated, x[4:], Outputs())]
    for here, there in (cases, cases[::-1]):
        M = NTK(*here, method=method)
        D = truth(here, there, M.inner_weight)
        assert relative(M.cross(there[1]).to_dense(), D) < 2e-15 * 10


def test_frozen_parameters_and_chosen_ones_are_left_out() -> None:
    case = gpt_neox(tie=True)
    second = other(case)
    for p in case[0].gpt_neox.layers[0].parameters():  # type: ignore[operator, union-attr, index]
        p.requires_grad_(False)
    M = NTK(*case)
    assert relative(M.cross(*second[1:]).to_dense(), truth(case, second, M.inner_weight)) < 2e-14
    name = M.layers()[-1]
    layer = M.layer(name)
    D = layer.cross(*second[1:]).to_dense()
    assert (
        0 < float(torch.linalg.norm(D)) < float(torch.linalg.norm(M.cross(*second[1:]).to_dense()))
    )


def wide(tie: bool = False) -> Case:
    """A decoder whose head is most of the work, as in language models."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=1500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    tokens = torch.randint(0, 1500, (2, 2, 40), generator=torch.Generator().manual_seed(5))
    return GPTNeoXForCausalLM(config).eval(), tokens[0], TokenLogProb(tokens[1])


@pytest.mark.parametrize("make", [*CASES.values(), wide, lambda: wide(tie=True)])
def test_a_product_costs_at_most_twice_a_square_one(make: Callable[[], Case]) -> None:
    case = make()
    M = NTK(*case)
    C = M.cross(*case[1:])
    assert C.plan().flops <= 2 * M.plan().flops
    assert relative(C.to_dense(), M.to_dense()) < 100 * M.eps
    assert not any(row.association == "" for row in C.plan().rows) and "total" in str(C.plan())
    # the counter counts: through the parameters' gradients it would cost more
    if make is wide:
        assert any("folded" in row.association for row in C.plan().rows)


def test_regression_with_the_kernel_is_the_dense_closed_form() -> None:
    model, x, observable = mlp()
    M = NTK(model, x, observable)
    g = torch.Generator().manual_seed(3)
    x2 = torch.randn(6, 5, generator=g, dtype=torch.float64)
    C = M.cross(x2)
    ridge = 1e-3 * torch.eye(M.shape[0], dtype=M.dtype)
    alpha = torch.linalg.solve((M + ridge).to_dense(), M.error)
    J, J2 = (torch.cat([*jacobian(model, a, Outputs()).values()], 1) for a in (x, x2))
    D, D2 = J @ J.T / 12, J2 @ J.T / 12
    exact = model(x2).flatten().detach() + D2 @ torch.linalg.solve(D + ridge, M.error)
    assert relative(C.outputs + C @ alpha, exact) < 1e-11  # rounding times the condition, 1e4


def test_predictions_move_along_the_flow_as_the_kernel_says() -> None:
    """ė′ = −C e for squared error, by central differences of a step along −∇L: influence of a batch."""
    model, x, observable = mlp()
    x2 = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    M = NTK(model, x, observable)
    predicted = M.cross(x2) @ M.error  # of the outputs: + C e
    loss = 0.5 * (model(x) - observable.targets).square().sum() / M.samples  # type: ignore[attr-defined]
    parameters = [*model.parameters()]
    downhill, h = [-g for g in torch.autograd.grad(loss, parameters)], 1e-6

    def at(step: float) -> Tensor:
        moved = {
            n: p + step * d for (n, p), d in zip(model.named_parameters(), downhill, strict=True)
        }
        return torch.func.functional_call(model, moved, x2).flatten().detach()

    assert relative(predicted, (at(h) - at(-h)) / (2 * h)) < 1e-8  # h² and rounding over h


def test_wrong_use_is_refused() -> None:
    case = gpt_neox()
    M = NTK(*case)
    with pytest.raises(ValueError, match="rows of TokenLogProb depend on its targets"):
        M.cross(case[1])
    C = M.cross(*other(case)[1:])
    with pytest.raises(
        ValueError, match=r"C is \(19, 18\): it multiplies vectors of shape \(18,\)"
    ):
        C @ torch.ones(19, dtype=C.dtype)
    with pytest.raises(ValueError, match=r"torch\.float64 on cpu, the vector is torch\.float32"):
        C @ torch.ones(18)
    with torch.no_grad():
        next(case[0].parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="changed"):
        C @ torch.ones(18, dtype=C.dtype)
    with pytest.raises(RuntimeError, match="changed"):
        M.cross(*other(case)[1:])


def test_a_parameter_that_enters_differently_in_the_two_batches_is_exact() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.weight, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 4:
                return torch.tanh(functional.linear(x, self.weight, self.bias))
            return torch.tanh((x[:, None, :] * self.weight).sum(-1) + self.bias.exp())

    model, x = (
        Two().double(),
        torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double(),
    )
    cases: list[Case] = [(model, x[:4], Outputs()), (model, x[4:], Outputs())]
    for here, there in (cases, cases[::-1]):
        M = NTK(*here)
        D = truth(here, there, M.inner_weight)
        assert relative(M.cross(there[1]).to_dense(), D) < 2e-14


def test_the_accuracy_is_that_of_the_coarsest_arithmetic_of_either_batch() -> None:
    model, tokens, observable = gpt_neox()
    single = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = NTK(single, tokens, observable)
    C = mixed.cross(tokens, observable)  # run under the autocast of M
    assert C.eps == mixed.eps == 2.0**-7
    assert relative(C.to_dense(), mixed.to_dense()) < 4 * C.eps
    exact = NTK(single, tokens, observable)
    plain = exact.cross(tokens, observable)
    assert plain.eps == exact.eps == 2.0**-23
    assert relative(plain.to_dense(), exact.to_dense()) < 20 * plain.eps
