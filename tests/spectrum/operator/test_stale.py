"""A model that was changed after its operator was made: every form refuses, or answers for the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd.spectrum import NTK, NTKBatches, NTKShards, Outputs, TokenLogProb
from tests.cases import dense, gpt_neox, jacobian


class Net(nn.Module):
    """Mixes its four rows, and has a frozen layer, batch statistics and a table that is no buffer."""

    def __init__(self, mix: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.requires_grad_(False)
        self.norm, self.table, self.mix = nn.BatchNorm1d(4), torch.linspace(1, 2, 4).double(), mix

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.norm(self.a(x)).tanh() * self.table).tanh()
        return self.out(h.cumsum(0) if self.mix else h)


def fused(optimizer: Any, **settings: Any) -> Callable[[Net], None]:
    return lambda net: optimizer(net.a.parameters(), lr=1e-3, **settings).step()


def quietly(change: Callable[[Net], Any]) -> Callable[[Net], None]:
    """Run without a graph."""

    def made(net: Net) -> None:
        with torch.no_grad():
            change(net)

    return made


def assign(net: Net) -> None:
    net.load_state_dict({k: v * 1.01 for k, v in net.state_dict().items()}, assign=True)


def swap(net: Net) -> None:
    net.a.weight = nn.Parameter(net.a.weight.detach() * 1.01)


def frozen(net: Net) -> None:
    net.b.weight.data.mul_(1.01)


def renew(net: Net) -> None:
    net.b = copy.deepcopy(net.b)


def turn(net: Net) -> None:
    net.b.weight.data = net.b.weight.data.T


CHANGES: dict[str, Callable[[Net], Any]] = {
    "fused AdamW": fused(torch.optim.AdamW, fused=True),
    "fused SGD": fused(torch.optim.SGD, fused=True),
    "foreach AdamW": fused(torch.optim.AdamW, foreach=True),
    "foreach by hand": quietly(lambda net: torch._foreach_mul_([net.a.weight], 1.01)),
    "in place": quietly(lambda net: net.a.weight.mul_(1.01)),
    "data in place": lambda net: net.a.weight.data.mul_(1.01),
    "data replaced": lambda net: setattr(net.a.weight, "data", net.a.weight.data * 1.01),
    "the same memory, turned": turn,
    "through NumPy": lambda net: net.a.weight.detach().numpy().__imul__(1.01),
    "storage replaced": quietly(lambda net: net.a.weight.set_(net.a.weight * 1.01)),
    "state assigned": assign,
    "another dtype": lambda net: net.float(),
    "another parameter": swap,
    "another module": renew,
    "a parameter taken out": lambda net: net.out.register_parameter("bias", None),
    "a frozen parameter": frozen,
    "a tensor that is no buffer": lambda net: net.table.mul_(1.01),
}
# the frozen copies of what is no parameter: none of these is the operator's business
ASIDE: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "a pass and its gradients": lambda net: net(X).sum().backward(),
    "running statistics": lambda net: net.norm.running_mean.add_(0.5),  # type: ignore[union-attr]
    "inputs": lambda net: X.mul_(2),
    "targets": lambda net: Y.mul_(2),
    "a table that another replaces": lambda net: setattr(net, "table", net.table * 2),
}
X, Y = torch.empty(4, 3).double(), torch.empty(4, 2).double()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    X.normal_()
    Y.normal_()
    made = Net().double().eval()
    made(X).square().sum().backward()
    return made


FORMS: dict[str, Callable[[Net], Any]] = {
    "factored": lambda net: NTK(net, X, Outputs(Y), method="factored"),
    "graph": lambda net: NTK(net, X, Outputs(Y), method="graph"),
    "shards": lambda net: NTKShards(net, [(X, Outputs(Y))]),
    "shards made anew": lambda net: NTKShards(net, [(X, Outputs(Y))], hold=False),
}
ASKED: dict[str, Callable[[Any], Tensor]] = {
    "@": lambda M: M @ torch.ones(8).double(),
    "block": lambda M: M @ torch.eye(8).double()[:, :3],
    "to_dense": lambda M: M.to_dense(),
}
ALSO: dict[str, Callable[[Any], Any]] = {
    "vjp": lambda M: M.vjp(torch.ones(8).double()),
    "jvp": lambda M: M.jvp(tuple(torch.ones_like(p) for p in M._used)),
    "jacobian": lambda M: M.jacobian(),
    "layer": lambda M: M.layer("a") @ torch.ones(8).double(),
    "output_gradients": lambda M: M.output_gradients(torch.ones(8).double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_sees_every_change(net: Net, form: str, change: str) -> None:
    """Operators that were used before the change, and ones that were not."""
    asked = ASKED | (ALSO if form in ("factored", "graph") else {})
    used, fresh = [{what: FORMS[form](net) for what in asked} for _ in range(2)]
    for what, ask in asked.items():
        ask(used[what])
    CHANGES[change](net)
    for made in (used, fresh):
        for what, ask in asked.items():
            with pytest.raises(RuntimeError, match="make a new"):
                ask(made[what])


@pytest.mark.parametrize("change", CHANGES)
def test_batches_see_every_change(net: Net, change: str) -> None:
    net.mix = False
    M = NTKBatches(net, X, Outputs(Y), batches=2)
    M @ torch.ones(2, 4).double()
    CHANGES[change](net)
    with pytest.raises(RuntimeError, match="make a new"):
        M @ torch.ones(2, 4).double()


@pytest.mark.parametrize("change", ASIDE)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_copied_may_change(net: Net, form: str, change: str) -> None:
    truth, J = dense(net, X, Outputs(Y)) / 4, jacobian(net, X, Outputs(Y))
    error = (Y - net(X).detach()).reshape(-1)
    M = FORMS[form](net)
    ASIDE[change](net)
    if form == "shards made anew" and change == "a table that another replaces":
        with pytest.raises(RuntimeError, match="its outputs are others"):
            M.to_dense()
        return
    # some tens of roundings of 1.1e-16 each
    assert (M.to_dense() - truth).norm() < 1e-13 * truth.norm()
    assert (M @ M.error - truth @ error).norm() < 1e-13 * (truth @ error).norm()
    if form in ("factored", "graph") and change != "a table that another replaces":
        assert (M.jacobian() - torch.cat([*J.values()], 1)).norm() < 1e-13 * truth.norm()


@pytest.mark.parametrize("change", ["running statistics", "a table that another replaces"])
def test_a_layer_of_a_model_with_other_buffers_is_refused(net: Net, change: str) -> None:
    M = NTK(net, X, Outputs(Y))
    ASIDE[change](net)
    with pytest.raises(RuntimeError, match="make a new NTK"):
        M.layer("a")


def test_targets_that_change_the_rows() -> None:
    model, x, observable = gpt_neox()
    assert isinstance(observable, TokenLogProb)
    tokens, truth = observable.targets, dense(model, x, observable)
    forms = [NTK(model, x, observable, normalize="sum", method=m) for m in ("factored", "graph")]  # type: ignore[arg-type]
    tokens.data[:] = 0
    for M in forms:
        assert (M.to_dense() - truth).norm() < 1e-12 * truth.norm()


def test_a_step_on_few_rows_of_a_table() -> None:
    """Sparse gradients through torch bump the version; rows that change behind it are seen if they are sampled."""
    torch.manual_seed(0)
    table = nn.Embedding(5000, 4, sparse=True)
    net = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 1))
    x = torch.randint(0, 5000, (6, 2))
    M = NTK(net, x, Outputs())
    net(x).sum().backward()
    torch.optim.SparseAdam(table.parameters()).step()
    with pytest.raises(RuntimeError, match=r"'0\.weight' of the model"):
        M @ torch.ones(6)
    M = NTK(net, x, Outputs())
    M @ torch.ones(6)
    table.weight.data[::7] += 1  # one row of seven
    with pytest.raises(RuntimeError, match=r"'0\.weight' of the model"):
        M @ torch.ones(6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_that_are_none_are_no_change(dtype: torch.dtype) -> None:
    """A parameter that nobody uses may hold NaN, and layouts need not be contiguous."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 1)).to(dtype)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.unused = nn.Parameter(torch.full((3, 2), torch.nan, dtype=dtype))  # type: ignore[assignment]
    net[2].weight = nn.Parameter(torch.randn(16, 3, dtype=dtype)[:, 1:2].T)
    net.gaps = nn.Parameter(torch.randn(5, 6, dtype=dtype)[:, ::2])  # type: ignore[assignment]
    M = NTK(net, torch.randn(3, 2, 4, 4, dtype=dtype), Outputs())
    M @ torch.ones(3, dtype=dtype)
    net.gaps.data[3] += 1
    with pytest.raises(RuntimeError, match="'gaps'"):
        M @ torch.ones(3, dtype=dtype)


def test_a_pass_that_is_run_again_may_round_apart_and_no_more() -> None:
    """A traced pass of a state-space model takes other kernels than a plain one."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    M = NTK(model, torch.randn(5, 3, dtype=torch.float64), Outputs())
    M._same_outputs(M.outputs * (1 + 4 * M.eps), M.outputs)
    with pytest.raises(RuntimeError, match="its outputs are others"):
        M._same_outputs(M.outputs * (1 + 1e3 * M.eps), M.outputs)
