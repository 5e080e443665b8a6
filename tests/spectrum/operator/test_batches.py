"""Batches in lock-step against one operator and one recurrence for each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from grsd.spectrum import NTK, NTKBatches, Outputs, TokenLogProb, lanczos, lanczos_batches
from grsd.spectrum.observables import Observable
from tests.cases import VOCABULARY, conv, gpt2, gpt_neox


def language(tie: bool, uncounted: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model, _, _ = gpt_neox(tie=tie)
    tokens = torch.randint(0, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    if uncounted:
        targets[::2, 3] = -100
    return model, tokens[:, :-1], targets


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("uncounted", [False, True])
def test_equals_one_operator_a_batch(tie: bool, uncounted: bool) -> None:
    model, x, y = language(tie, uncounted)
    M = NTKBatches(model, x, TokenLogProb(y), batches=3)
    u = torch.randn(M.shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    product, tridiagonals = M @ u, lanczos_batches(M, M.error, 8)
    for g in range(3):
        own = NTK(model, x[2 * g : 2 * g + 2], TokenLogProb(y[2 * g : 2 * g + 2]))
        # a few hundred roundings of 1e-16; Lanczos coefficients move by rounding times their condition, below 1e3 here
        assert torch.linalg.norm(product[g] - own @ u[g]) < 1e-12 * torch.linalg.norm(own @ u[g])
        one = lanczos(own, own.error, 8)
        assert np.allclose(
            one.alphas, tridiagonals[g].alphas, rtol=1e-9, atol=1e-10 * one.alphas[0]
        )
        assert np.allclose(one.betas, tridiagonals[g].betas, rtol=1e-9, atol=1e-10 * one.alphas[0])
        assert (
            np.isclose(one.mass, tridiagonals[g].mass, rtol=1e-12)
            and one.eps == tridiagonals[g].eps
        )
    # the control: the joint operator of all sequences is another one
    joint = NTK(model, x, TokenLogProb(y)) @ u.reshape(-1) * 3
    assert torch.linalg.norm(joint.view_as(product) - product) > 1e-3 * torch.linalg.norm(product)


@pytest.mark.parametrize("outputs", [1, 2])
def test_convolutions_norms_and_full_folding(outputs: int) -> None:
    model, x, _ = conv()
    model = nn.Sequential(*model, nn.Linear(4, outputs)).double()
    x = x[:6]
    M = NTKBatches(model, x, Outputs(), batches=2, normalize="sum")
    u = torch.randn(M.shape[:2], dtype=torch.float64)
    for g in range(2):
        own = NTK(model, x[3 * g : 3 * g + 3], Outputs(), normalize="sum", method="graph")
        assert torch.linalg.norm((M @ u)[g] - own @ u[g]) < 1e-12 * torch.linalg.norm(own @ u[g])


def test_an_exhausted_batch_does_not_stop_the_others() -> None:
    torch.manual_seed(3)
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    x[5:] = x[5:6]  # rank one in the second batch, rank three in the first
    M = NTKBatches(model, x, Outputs(), batches=2)
    starts = torch.rand(2, 5, dtype=torch.float64)
    first, second = lanczos_batches(M, starts, 5)
    one = lanczos(NTK(model, x[:5], Outputs()), starts[0], 5)
    assert second.steps == 2 and second.exhausted and first.steps == one.steps > 2
    assert np.allclose(first.alphas[:4], one.alphas[:4], rtol=1e-10)


class Shared(nn.Module):
    """A learned table of positions, the same for all sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(x + self.table.sin()))


def test_what_cannot_be_kept_apart_is_refused() -> None:
    model, x, observable = gpt2()
    with pytest.raises(ValueError, match="wpe"):
        NTKBatches(model, x, observable, batches=2)
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="'table' enters without a batch axis"):
        NTKBatches(Shared().double(), x, Outputs(), batches=2)
    normed: tuple[nn.Module, Observable] = (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
        Outputs(),
    )
    with pytest.raises(ValueError, match="without a batch axis"):
        NTKBatches(normed[0].double(), x[0], normed[1], batches=2)
    with pytest.raises(ValueError, match="12 rows cannot be split into 5"):
        NTKBatches(
            nn.Linear(3, 1).double(), torch.randn(12, 3, dtype=torch.float64), Outputs(), batches=5
        )
