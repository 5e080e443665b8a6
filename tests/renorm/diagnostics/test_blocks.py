from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem
from grsd.lab.nets import models
from grsd.lab.nets.planted import TiedNet, smooth_task
from grsd.renorm.diagnostics.block_matrices import block_matrices
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.splitting import split_parameters
from grsd.spectrum import NTK, Outputs, TokenLogProb

X, Y = smooth_task(14, 5, seed=3)
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """A residual net with layer normalisation, whose second derivatives are easy to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.read = models.mlp([5, 6], seed=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6, dtype=torch.float64), *models.mlp([6, 8, 6], seed=k))
            for k in (2, 3)
        )
        self.head = models.mlp([6, 1], seed=4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        for block in self.blocks:
            h = h + 0.5 * block(h)
        found: Tensor = self.head(h)
        return found


def _language(make: Callable[..., nn.Module]) -> Blocks:
    return Blocks(make(seed=0, layers=2), IDS[:, :-1], TokenLogProb(IDS[:, 1:]))


def _cases() -> dict[str, Blocks]:
    return {
        "mlp": Blocks.of(Problem(models.mlp([5, 6, 7, 1], seed=1), X, Y)),
        "layer norm": Blocks.of(Problem(Normed(), X, Y)),
        "tied": Blocks.of(Problem(TiedNet(5, 6, 3, seed=1), X, Y)),
        "gpt2": _language(models.gpt2),
    }


@pytest.fixture(params=["mlp", "layer norm", "tied", "gpt2"])
def blocks(request: pytest.FixtureRequest) -> Blocks:
    return _cases()[request.param]


def _shifted(blocks: Blocks, along: dict[str, Tensor], h: float) -> Blocks:
    now = blocks.by_name(blocks._values)
    return blocks.at(blocks._values | {name: now[name] + h * along[name] for name in along})


def _quotient(blocks: Blocks, block: int | None = None) -> list[Tensor]:
    """dJ^(l)/ds along θ̇ or along one block of it, by a difference quotient of fourth order."""
    names = [name for members in blocks.members for name in members]
    along = dict(zip(names, blocks._velocity, strict=True))
    if block is not None:
        along = {name: along[name] for name in blocks.members[block]}
    h = 1e-4 / max(1.0, max(float(v.abs().max()) for v in along.values()))
    j = {k: _shifted(blocks, along, k * h).jacobian() for k in (-2, -1, 1, 2)}
    return [
        (8 * (a - b) - (c - d)) / (12 * h)
        for a, b, c, d in zip(j[1], j[-1], j[2], j[-2], strict=True)
    ]


def test_j_and_its_rate_are_those_of_the_network(blocks: Blocks) -> None:
    model = blocks._model
    wanted = (
        NTK(model, blocks._inputs, blocks._observable)
        if isinstance(blocks._observable, TokenLogProb)
        else None
    )
    if wanted is not None:  # another engine: no retained graph, layer by layer
        M = sum(j @ j.T for j in blocks.jacobian()) / blocks.samples
        assert torch.allclose(M, wanted.to_dense(), rtol=1e-9, atol=1e-12)
    # fourth-order quotient at h ~ 1e-4: h⁴ times a fifth derivative, and 1e-16/h of J
    for found, expected in zip(blocks.rate(), _quotient(blocks), strict=True):
        assert float((found - expected).norm()) < 2e-5 * float(expected.norm()) + 1e-9


def test_rates_add_up_and_each_piece_is_its_own_motion(blocks: Blocks) -> None:
    pieces, rate = blocks.rate_pieces(), blocks.rate()
    for index, whole in enumerate(rate):
        total = sum((row[index] for row in pieces), torch.zeros_like(whole))
        assert float((total - whole).norm()) <= 1e-12 * float(torch.cat(rate, 1).norm())
    for m in range(len(blocks)):
        scale = float(torch.cat(pieces[m], 1).norm())
        for found, expected in zip(pieces[m], _quotient(blocks, m), strict=True):
            assert float((found - expected).norm()) < 2e-5 * scale + 1e-9


def test_products_are_those_of_the_dense_blocks(blocks: Blocks) -> None:
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(blocks.size, dtype=torch.float64, generator=generator)
    v = [torch.randn(p, dtype=torch.float64, generator=generator) for p in blocks.sizes]
    j, rate, pieces = blocks.jacobian(), blocks.rate(), blocks.rate_pieces()
    near = {"rtol": 1e-9, "atol": 1e-10 * float(torch.cat(rate, 1).norm())}
    for index in range(len(blocks)):
        assert torch.allclose(blocks.vjp(u)[index], u @ j[index], **near)
        assert torch.allclose(blocks.jvp(v[index], index), j[index] @ v[index], **near)
        assert torch.allclose(blocks.rate_vjp(u)[index], u @ rate[index], **near)
        assert torch.allclose(
            blocks.kernel(index) @ u, j[index] @ (j[index].T @ u) / blocks.samples, **near
        )
    assert torch.allclose(blocks.jvp_all(v), torch.cat(j, 1) @ torch.cat(v), **near)
    assert torch.allclose(blocks.rate_jvp(v), torch.cat(rate, 1) @ torch.cat(v), **near)
    for m, row in enumerate(blocks.pieces(u)):
        for index, found in enumerate(row):
            assert torch.allclose(found, u @ pieces[m][index], **near)


def test_velocity_is_that_of_the_flow() -> None:
    problem = Problem(Normed(), X, Y)
    blocks = Blocks.of(problem)
    assert torch.allclose(
        torch.cat(blocks.velocity), problem.velocity(problem.theta), rtol=1e-12, atol=1e-14
    )
    found = block_matrices(blocks)
    np.testing.assert_allclose(found.kernel, problem.kernel(problem.theta), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(
        found.kernel_rate, problem.kernel_rate(problem.theta), rtol=1e-9, atol=1e-11
    )
    small = block_matrices(blocks, budget=1)  # one block at a time
    np.testing.assert_allclose(small.cross, found.cross, rtol=1e-12, atol=1e-14)


def test_flow_of_a_language_model_is_that_of_its_mean_loss() -> None:
    model = models.gpt2(seed=0, layers=2)
    observable = TokenLogProb(IDS[:, 1:])
    blocks = Blocks(model, IDS[:, :-1], observable)
    loss = -observable.rows(model(IDS[:, :-1]).logits).mean()
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    for members, found in zip(blocks.members, blocks.velocity, strict=True):
        expected = torch.cat([-gradient[name].reshape(-1) for name in members])  # type: ignore[union-attr]
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_blocks_of_a_module_equal_layers_of_the_operator() -> None:
    model = models.gpt_neox(seed=0, layers=2)
    data = IDS[:, :-1], TokenLogProb(IDS[:, 1:])
    blocks, operator = Blocks(model, *data), NTK(model, *data)
    index = blocks.names.index("gpt_neox.layers.1")
    u = torch.randn(blocks.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # rotary embeddings are computed in float32 inside the model, and the two engines order them differently
    assert torch.allclose(
        blocks.kernel(index) @ u, operator.layer("gpt_neox.layers.1") @ u, rtol=1e-4, atol=1e-5
    )


def test_a_shared_matrix_is_counted_and_its_uses_have_cross_terms() -> None:
    tied = Blocks.of(Problem(TiedNet(5, 6, 3, seed=1), X, Y))
    untied = Blocks.of(Problem(TiedNet(5, 6, 3, seed=1, tied=False), X, Y))
    assert tied.reused == {"blocks.0.weight": 3} and untied.reused == {}
    assert torch.equal(tied.outputs, untied.outputs)
    (shared,), copies = tied.jacobian(slice(1, 2)), untied.jacobian(slice(1, 4))
    assert torch.allclose(shared, sum(copies, torch.zeros_like(shared)), rtol=1e-12, atol=1e-14)
    whole = shared @ shared.T
    parts = sum((c @ c.T for c in copies), torch.zeros_like(whole))
    assert float(torch.linalg.matrix_norm(whole - parts, 2)) > 0.1 * float(
        torch.linalg.matrix_norm(whole, 2)
    )
    problem = Problem(
        TiedNet(5, 6, 3, seed=1, tied=False), X, Y
    )  # without sharing the sum over blocks is exact
    every = sum((c @ c.T for c in untied.jacobian()), torch.zeros_like(whole)) / untied.samples
    assert torch.allclose(every, problem.kernel(problem.theta), rtol=1e-12, atol=1e-14)


def test_the_stack_is_found() -> None:
    assert _language(models.gpt2).names == (
        "transformer.wte + transformer.wpe",
        "transformer.h.0",
        "transformer.h.1",
        "transformer.ln_f",
    )
    names = _language(models.gpt_neox).names
    assert (
        names[1:3] == ("gpt_neox.layers.0", "gpt_neox.layers.1")
        and "lm_head" in names[3] + names[-1]
    )
    net = nn.Sequential(
        nn.Linear(5, 4),
        nn.Sequential(models.mlp([4, 4, 4], seed=0), nn.Tanh(), nn.Linear(4, 4)),
        nn.Linear(4, 1),
    )
    found = split_parameters(net, [name for name, _ in net.named_parameters()])
    assert [*found] == ["0", "1.0.0", "1.0.2", "1.2", "2"]
    assert [*split_parameters(Normed(), [n for n, _ in Normed().named_parameters()])] == [
        "read.0",
        "blocks.0",
        "blocks.1",
        "head.0",
    ]


def test_blocks_can_be_given() -> None:
    net = models.mlp([5, 6, 7, 1], seed=1)
    names = [name for name, _ in net.named_parameters()]
    assert split_parameters(net, names, ["0", ["2", "4.weight"], "4.bias"]) == {
        "0": ("0.weight", "0.bias"),
        "2 + 4.weight": ("2.weight", "2.bias", "4.weight"),
        "4.bias": ("4.bias",),
    }
    with pytest.raises(ValueError, match="no trainable parameter is called '9'"):
        split_parameters(net, names, ["0", "9"])
    with pytest.raises(ValueError, match=r"'0\.bias' is in the blocks '0' and '0\.bias'"):
        split_parameters(net, names, ["0", "0.bias", "2", "4"])
    with pytest.raises(
        ValueError, match=r"2 trainable parameters are in no block, e\.g\. '4\.weight'"
    ):
        split_parameters(net, names, ["0", "2"])
    with pytest.raises(ValueError, match="split is 'halves'"):
        split_parameters(net, names, "halves")  # type: ignore[arg-type]


def test_what_cannot_be_split_or_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 block with trainable parameters \(0\): locality"):
        Blocks.of(Problem(models.mlp([5, 1], seed=0), X, Y))
    net = models.mlp([5, 6, 1], seed=0)
    with pytest.raises(ValueError, match="carry no gradient"):
        Blocks(Constant(), X, Outputs(Y[:, None]))
    frozen = copy.deepcopy(net)
    for p in frozen.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Blocks(frozen, X, Outputs(Y[:, None]))
    with pytest.raises(ValueError, match="dropout '1' is active"):
        Blocks(
            nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 1)).train(),
            X.float(),
            Outputs(),
        )
    blocks = Blocks(net, X, Outputs(Y[:, None]))
    with pytest.raises(ValueError, match=r"state has shape \(3,\); the model has 43"):
        blocks.at(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"'0.weight' has shape \(6, 5\), the snapshot has nothing"
    ):
        blocks.at({"2.weight": torch.zeros(1, 6)})
    with pytest.raises(ValueError, match="state holds 'other'"):
        blocks.at(dict(net.state_dict()) | {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'0\.weight' holds values that are not finite"):
        blocks.at(torch.full((43,), torch.nan, dtype=torch.float64))


class Constant(nn.Module):
    """Two layers whose output forgets them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.mlp([5, 6, 1], seed=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach()  # type: ignore[no-any-return]


def test_states_of_any_form_agree_and_leave_the_model_alone() -> None:
    model = models.gpt2(seed=0, layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = Blocks(model, IDS[:, :-1], TokenLogProb(IDS[:, 1:]))
    moved = {
        name: value + 0.01 for name, value in model.state_dict().items()
    }  # the tied matrix under both its names
    flat = torch.cat([moved[name].reshape(-1) for name, _ in model.named_parameters()])
    one, other = blocks.at(moved), blocks.at(flat)
    assert torch.equal(one.outputs, other.outputs) and not torch.equal(one.outputs, blocks.outputs)
    assert (
        torch.equal(torch.cat(one.velocity), torch.cat(other.velocity))
        and one.names == blocks.names
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_wrong_second_derivative_is_noticed(blocks: Blocks) -> None:
    assert blocks.rate_gap() < 1e-4

    class Wrong(torch.autograd.Function):
        """tanh whose backward pass calls its slope a constant."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.slope = (1 - torch.tanh(x) ** 2).detach()  # type: ignore[attr-defined]
            return torch.tanh(x)

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * ctx.slope  # type: ignore[attr-defined, no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = models.mlp([5, 6], seed=0), models.mlp([6, 1], seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Wrong.apply(self.first(x)))  # type: ignore[no-any-return, no-untyped-call]

    assert Blocks(Net(), X, Outputs(Y[:, None])).rate_gap() > 0.05
