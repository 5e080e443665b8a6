"""Groups of batches: their size follows a budget, models that forbid them are measured one at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from grsd.lab.runs import spectra
from grsd.lab.runs.memory import Storages, bytes_of, peak
from grsd.lab.runs.spectra import Batch, Measurement, grouping, measure
from grsd.spectrum import NTKBatches, TokenLogProb
from tests.lab.cases import TINY

TASK = Measurement(
    steps=5, starts=("error", "signs"), seed=0, device="cpu", normalize="mean", targets="text"
)


def neox() -> nn.Module:
    from transformers import GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(TINY.config()).double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double().eval()


def batches(count: int, size: int = 2, length: int = 32) -> list[Batch]:
    tokens = torch.randint(
        0, 300, (count, size, length + 1), generator=torch.Generator().manual_seed(3)
    )
    return [(k, t[:, :-1], t[:, 1:]) for k, t in enumerate(tokens)]


def test_group_follows_the_budget() -> None:
    model, several = neox(), batches(8)
    free = grouping(TASK, model, several[0], 8, 10**9)
    assert free.batches == 8 and free.bytes > 0 and "up to 8 batches in lock-step" in str(free)
    assert grouping(TASK, model, several[0], 8, 3 * free.bytes).batches == 3
    assert grouping(TASK, model, several[0], 8, 4 * free.bytes - 1).batches == 3
    assert grouping(TASK, model, several[0], 8, 0).batches == 1
    assert "one batch at a time" in str(grouping(TASK, model, several[0], 8, 0))
    assert grouping(TASK, model, several[0], 1, None).batches == 1


@pytest.mark.parametrize("length", [16, 64])
def test_measured_peak_of_a_group_is_what_one_batch_foretells(length: int) -> None:
    """Within a factor of two; without the number of batches it would be off by six."""
    model, several = neox(), batches(6, length=length)
    one = grouping(TASK, model, several[0], 6, 10**9).bytes
    x, y = (torch.cat([b[k] for b in several]) for k in (1, 2))

    def run() -> None:
        M = NTKBatches(model, x, TokenLogProb(y), batches=6)
        M @ M.error

    assert 0.5 < peak(run, "cpu") / (6 * one) < 2


def test_storages_are_counted_while_anything_holds_them() -> None:
    x = torch.ones(1000, requires_grad=True)
    with Storages() as count:
        y = torch.tanh(
            x.sin()
        )  # the graph holds the output of tanh and no more: the sine of x is gone
        assert (count.now, count.most) == (4000, 8000)
        z = y.exp().view(10, 100)
        del y
        assert count.now == 8000  # as tanh's output is, by the graph
        z.add_(1)
        assert count.now == 8000
        del z
    assert count.now == 0 and count.most == 8000


def test_a_model_that_mixes_the_batches_is_measured_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2's table of positions is shared by all sequences."""
    several = batches(3)
    with pytest.raises(ValueError, match="wpe"):
        spectra._together(TASK, gpt2(), several)
    found = measure(TASK, gpt2(), several)
    for batch, (loss, rows, matrices) in zip(several, found, strict=True):
        ((loss_, rows_, alone),) = measure(TASK, gpt2(), [batch])
        assert (loss, rows) == (loss_, rows_) and np.array_equal(
            matrices["signs"].alphas, alone["signs"].alphas
        )


def test_what_does_not_fit_goes_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = spectra._together

    def full(task: Measurement, model: nn.Module, ready: list[Batch]) -> list[spectra.Spectra]:
        sizes.append(len(ready))
        if len(ready) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(task, model, ready)

    task = replace(TASK, targets="shuffled")
    whole = measure(task, neox(), batches(5))
    monkeypatch.setattr(spectra, "_together", full)
    found = measure(task, neox(), batches(5))
    assert sizes == [5, 2, 3, 1, 2]
    assert [loss for loss, _, _ in found] == pytest.approx(
        [loss for loss, _, _ in whole], rel=1e-13
    )


def test_sizes_of_memory() -> None:
    assert [bytes_of(t) for t in ("0", "512M", "4G", "1.5GB", "20k")] == [
        0,
        512 * 10**6,
        4 * 10**9,
        15 * 10**8,
        20000,
    ]
    for text in ("", "many", "-1G", "4X", "G", "inf"):
        with pytest.raises(ValueError, match="is not a size of memory; write 512M or 4G"):
            bytes_of(text)
