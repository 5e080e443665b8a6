"""One operator over micro-batches and over two processes against the dense Jacobian and against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.lab.runs.memory import peak
from grsd.spectrum import NTK, NTKShards, Outputs, TokenLogProb, lanczos, micro_batches
from tests.cases import CASES, VOCABULARY, conv, dense, gpt_neox, mlp

from .two_processes import SILENCE


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_are_the_whole_batch(name: str, hold: bool) -> None:
    model, x, observable = case = CASES[name]()
    truth = dense(*case) / NTK(*case).samples
    M = NTKShards(model, micro_batches(x, observable, 2), hold=hold)
    # sums of up to a few thousand products of rounding 1e-16
    assert torch.linalg.norm(M.to_dense() - truth) < 1e-13 * torch.linalg.norm(truth)
    u = torch.randn(M.shape[0], dtype=torch.float64)
    before = u.clone()
    assert torch.equal(M @ u, M @ u) and torch.equal(u, before)
    # the control: what is lost without the cross terms of the micro-batches
    apart = torch.zeros_like(truth)
    half = M._sizes[0]
    apart[:half, :half], apart[half:, half:] = truth[:half, :half], truth[half:, half:]
    assert torch.linalg.norm(apart - truth) > 1e-2 * torch.linalg.norm(truth)


def test_error_outputs_and_lanczos_are_those_of_one_batch() -> None:
    model, x, observable = mlp()
    one, parts = NTK(model, x, observable), NTKShards(model, micro_batches(x, observable, 5))
    assert (
        parts.shape == one.shape
        and parts.samples == one.samples
        and parts.inner_weight == one.inner_weight
    )
    assert torch.allclose(parts.outputs, one.outputs, rtol=1e-13) and torch.allclose(
        parts.error, one.error, rtol=1e-13
    )
    a, b = lanczos(one, one.error, 8), lanczos(parts, parts.error, 8)
    # eight steps amplify the rounding of a product, 1e-16, by less than 1e4
    assert np.allclose(a.alphas, b.alphas, rtol=0, atol=1e-12 * a.alphas[0])
    assert np.allclose(a.betas, b.betas, rtol=0, atol=1e-12 * a.alphas[0]) and a.eps == b.eps
    raw = NTKShards(model, micro_batches(x, observable, 5), normalize="sum")
    assert torch.allclose(raw @ one.error, 12 * (parts @ one.error), rtol=1e-12)


class Shared(nn.Module):
    """Two full-shape biases whose gradients are one and the same tensor, and a parameter that is the output itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.a) + self.b


@pytest.mark.parametrize("hold", [True, False])
def test_gradients_that_are_one_tensor_are_summed_apart(hold: bool) -> None:
    x = torch.randn(1, 3, dtype=torch.float64)
    M = NTKShards(
        Shared().double(), [(x, Outputs()), (2 * x, Outputs())], normalize="sum", hold=hold
    )
    assert torch.equal(M.to_dense(), 2 * torch.eye(3, dtype=torch.float64).repeat(2, 2))


class Reads(torch.autograd.Function):
    """A backward pass that looks at a number of the gradient: it can be differentiated, but not recorded."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return 2 * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * (2.0 if float(g.sum()) == float(g.sum()) else 0.0)


class Unusual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Reads.apply(super().forward(x))


@pytest.mark.parametrize("hold", [True, False])
def test_what_cannot_be_recorded_goes_through_the_graph(hold: bool) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    model = Unusual(3, 1).double()
    M = NTKShards(model, micro_batches(x, Outputs(), 2), normalize="sum", hold=hold)
    assert torch.allclose(
        M.to_dense(), 4 * (x @ x.T + 1), rtol=1e-13
    ) and "cannot be recorded" in str(M.plan())


def test_memory_without_holding_is_that_of_one_micro_batch() -> None:
    model, _, _ = gpt_neox()
    tokens = torch.randint(0, VOCABULARY, (16, 13), generator=torch.Generator().manual_seed(1))
    x, observable = tokens[:, :-1], TokenLogProb(tokens[:, 1:])

    def product(count: int, hold: bool) -> Callable[[], object]:
        return lambda: (
            NTKShards(model, micro_batches(x, observable, count), hold=hold)
            @ torch.ones(192, dtype=torch.float64)
        )

    whole, held, anew = (peak(product(*how), "cpu") for how in ((1, True), (8, True), (8, False)))
    parameters = 8 * sum(p.numel() for p in model.parameters())
    # an eighth of the rows, three buffers of the size of the parameters (sum, one gradient, one change),
    # and the operator's own copies of all inputs and targets
    copies = 8 * (x.numel() + tokens[:, 1:].numel())
    assert anew < whole / 8 + 3 * parameters + copies < held


def test_plan_says_what_is_summed_and_what_is_made_anew() -> None:
    model, x, observable = gpt_neox()
    held = NTKShards(model, micro_batches(x, observable, 2)).plan()
    one = NTKShards(model, [(x, observable)]).plan()
    assert "summed over 2 micro-batches" in str(held) and "anew" not in str(held)
    gradients = sum(p.numel() for p in model.parameters())
    assert held.flops - one.flops == gradients  # the same work, and one more sum of the gradients
    assert next(row.bytes for row in held.rows if row.layer == "(Jᵀu)") == 8 * gradients
    anew = NTKShards(model, micro_batches(x, observable, 2), hold=False).plan()
    assert "recorded anew" in str(anew) and sum(r.bytes for r in anew.rows) < sum(
        r.bytes for r in held.rows
    )


def test_wrong_use_is_refused() -> None:
    model, x, observable = conv()
    with pytest.raises(ValueError, match="at least one"):
        NTKShards(model, [])
    with pytest.raises(ValueError, match="a batch of 7 cannot be split into 8"):
        micro_batches(x, observable, 8)
    with pytest.raises(ValueError, match="nothing to split"):
        micro_batches({"flag": True}, observable, 2)
    with pytest.raises(ValueError, match="object has no targets"):
        micro_batches(x, object(), 2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"init_process_group first, or leave out processes="):
        NTKShards(model, [(x, observable)], processes=True)
    normed = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    parts = micro_batches(torch.randn(6, 3, dtype=torch.float64), Outputs(), 2)
    with pytest.raises(ValueError, match="'1' normalises by the statistics of the batch"):
        NTKShards(normed, parts)
    NTKShards(normed.eval(), parts)  # the null: with running statistics the rows are apart
    M = NTKShards(model, micro_batches(x, observable, 2))
    with pytest.raises(ValueError, match=r"\(28,\), got \(27,\)"):
        M @ torch.ones(27, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(RuntimeError, match="make a new NTK"):
        M @ torch.ones(28, dtype=torch.float64)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes on the loopback interface found."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    root = Path(__file__).parents[3]
    program = [sys.executable, "-m", "tests.spectrum.operator.two_processes"]
    children = [
        subprocess.Popen(
            [*program, str(rank), "2", str(folder / "meeting"), str(folder / f"{rank}.pt")],
            env=environment,
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=240)[1] for child in children]
    assert all((folder / f"{rank}.pt").exists() for rank in range(2)), said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two: list[dict[str, Any]], name: str) -> None:
    model, x, observable = CASES[name]()
    M = NTK(model, x, observable)
    u = torch.randn(M.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth, tri = M @ u, lanczos(M, u, 6)
    for found in (each[name] for each in two):
        assert found["shape"] == M.shape and found["weight"] == M.inner_weight
        assert torch.linalg.norm(found["product"] - truth) < 1e-13 * torch.linalg.norm(truth)
        assert torch.allclose(
            found["block"], torch.stack([found["product"], -found["product"]], 1), rtol=1e-14
        )
        assert torch.allclose(found["error"], M.error, rtol=1e-12)
        assert torch.allclose(found["outputs"], M.outputs, rtol=1e-12)
        assert np.allclose(found["alphas"], tri.alphas, rtol=0, atol=1e-12 * tri.alphas[0])
        assert np.allclose(found["betas"], tri.betas, rtol=0, atol=1e-12 * tri.alphas[0])
        assert found["mass"] == pytest.approx(tri.mass, rel=1e-14)
        assert "all-reduced over 2 processes" in found["plan"]
    assert torch.equal(
        two[0][name]["product"], two[1][name]["product"]
    )  # both hold the same numbers
    locals_ = [each[name]["local"] for each in two]
    assert (
        locals_[0].start == 0
        and locals_[0].stop == locals_[1].start
        and locals_[1].stop == M.shape[0]
    )
    # the control: a process alone has another operator
    own = NTK(model, *micro_batches(x, observable, 2)[0]) @ u[locals_[0]]
    assert torch.linalg.norm(own - truth[locals_[0]]) > 1e-2 * torch.linalg.norm(truth[locals_[0]])


def test_unequal_shards_were_among_them(two: list[dict[str, Any]]) -> None:
    assert [each["conv"]["local"] for each in two] == [slice(0, 12), slice(12, 28)]


def test_a_layer_that_one_process_does_not_use(two: list[dict[str, Any]]) -> None:
    found, x = two[0]["either"], two[0]["x"]
    assert torch.equal(found, two[1]["either"])
    one = torch.kron(x @ x.T + 1, torch.eye(2, dtype=torch.float64))
    assert torch.allclose(
        found, torch.block_diag(one, one), rtol=1e-13
    )  # different layers: no cross terms


def test_failures_are_heard_by_all_processes(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert (
            "could not be made in 1 of 2 processes; process 1: ValueError: dropout '1' is active"
            in found["one fails"]
        )
        assert "process 0: ValueError: no micro-batches: pass at least one" in found["no parts"]
        assert (
            "process 1 has other parameters than process 0; load the same checkpoint"
            in found["other weights"]
        )


def test_nobody_waits_for_ever(two: list[dict[str, Any]]) -> None:
    for how in ("silent", "dead"):
        message, seconds = two[0][how]
        assert "another process failed, or did not take part in this call in time" in message
        assert seconds < 30  # of the group's timeout: 3 s for the silent one, 60 s for all
    assert two[0]["silent"][1] > 0.5 * SILENCE
