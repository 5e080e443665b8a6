"""A group of batches of one checkpoint: operators, start vectors, Lanczos, in lock-step.

Batches in lock-step share their passes through the network (:mod:`grsd.spectrum.operator.batches`),
which is what fills a GPU. On two CPU cores the whole measurement of mini-1.3m at T = 256 takes 0.75
to 0.78 of the time of one batch at a time (10 and 5 batches; m = 20), that of mini-4.2m the same
time. The numbers are those of one batch at a time to rounding. How many batches go together follows
from a budget of memory and the measured peak of one. A stored batch is keyed by the code of this
module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grsd.lab.runs import memory
from grsd.spectrum import NTK, NTKBatches, TokenLogProb, Tridiagonal, nulls
from grsd.spectrum.lanczos import lanczos, lanczos_batches

CPU_BUDGET = 2**29  # bytes; beyond some hundred MB a larger group saves no time on a CPU
GPU_BUDGET = 0.8  # share of the device's memory that the weights leave
Batch = tuple[int, Tensor, Tensor]  # number, inputs and targets, both (batch_size, length)
Spectra = tuple[float, int, dict[str, Tridiagonal]]  # loss, rows, start vector → Lanczos matrix


@dataclass(frozen=True)
class Group:
    """How many batches go in lock-step, and why."""

    batches: int
    bytes: int  # measured peak of one beyond the weights, with its Lanczos basis; 0 if not needed
    budget: int  # bytes

    def __str__(self) -> str:
        size = f"({self.bytes / 1e6:.0f} MB each, budget {self.budget / 1e6:.0f} MB)"
        together = f"up to {self.batches} batches in lock-step"
        return f"{together if self.batches > 1 else 'one batch at a time'} {size}"


@dataclass(frozen=True)
class Measurement:
    """What is done with every batch: the fields of `grsd.lab.runs.run.RunSpec` that matter here."""

    steps: int
    starts: tuple[str, ...]
    seed: int
    device: str
    normalize: str
    targets: str

    def prepared(self, batch: Batch) -> Batch:
        """Return the batch on the device, its targets shuffled where that is asked for."""
        index, inputs, targets = batch
        if self.targets == "shuffled":
            targets = nulls.shuffled(targets, generator=_generator(self.seed, index, "shuffled"))
        return index, inputs.to(self.device), targets.to(self.device)

    def vectors(self, index: int, error: Tensor) -> dict[str, Tensor]:
        """Return the start vectors of a batch, (T,) each."""

        def vector(start: str) -> Tensor:
            if start == "error":
                return error
            if start == "ones":
                return torch.ones_like(error)
            null = nulls.random_signs if start == "signs" else nulls.random_start
            return null(error, generator=_generator(self.seed, index, start))

        return {start: vector(start) for start in self.starts}

    def operator(self, kind: Any, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
        """Return the NTK or NTKBatches of the log-probabilities of tokens."""
        inputs = {"input_ids": x, "use_cache": False}
        return kind(model, inputs, TokenLogProb(y), normalize=self.normalize, **options)


def grouping(
    measurement: Measurement, model: nn.Module, batch: Batch, most: int, budget: int | None
) -> Group:
    """Return how many batches like this one go in lock-step, within `budget` bytes.

    By default 512 MiB on a CPU, and on a GPU four fifths of what the weights leave of it. Cost: one
    operator and one product.
    """
    device = torch.device(measurement.device)
    if budget is None:
        budget = CPU_BUDGET
        if device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            whole = torch.cuda.get_device_properties(device).total_memory
            budget = int(GPU_BUDGET * (whole - weights))
    if most == 1:
        return Group(1, 0, budget)
    _, inputs, targets = measurement.prepared(batch)

    def once() -> None:
        M = measurement.operator(NTKBatches, model, inputs, targets, batches=1)
        M @ M.error

    try:
        peak = memory.peak(once, device)
    except ValueError:
        # it cannot be kept apart, or not be measured at all, of which the measurement complains
        return Group(1, 0, budget)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return Group(1, budget, budget)
    basis = measurement.steps * targets.numel() * next(model.parameters()).element_size()
    one = peak + basis
    return Group(max(1, min(most, budget // max(one, 1))), one, budget)


def measure(measurement: Measurement, model: nn.Module, batches: Sequence[Batch]) -> list[Spectra]:
    """Return loss, rows and Lanczos matrices of every batch.

    Several batches go in lock-step; when the model does not allow that, one at a time, and when
    memory does not, in halves.
    """
    try:
        with torch.enable_grad():
            return _together(measurement, model, [measurement.prepared(one) for one in batches])
    except ValueError:
        if len(batches) == 1:
            raise
        # what is wrong with a batch of its own is said by the batch of its own
        parts = [[batch] for batch in batches]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if len(batches) == 1 or not is_memory(error):
            raise
        half = len(batches) // 2
        parts = [list(batches[:half]), list(batches[half:])]
    return [spectra for part in parts for spectra in measure(measurement, model, part)]


def _together(
    measurement: Measurement, model: nn.Module, batches: Sequence[Batch]
) -> list[Spectra]:
    """Spectra of batches in lock-step; one alone needs no model that keeps batches apart."""
    x, y = (torch.cat(parts) for parts in ([b[1] for b in batches], [b[2] for b in batches]))
    alone, steps = len(batches) == 1, measurement.steps
    options = {} if alone else {"batches": len(batches)}
    M = measurement.operator(NTK if alone else NTKBatches, model, x, y, **options)
    errors = M.error.detach().reshape(len(batches), -1)  # (batches, T)
    vectors = [measurement.vectors(b[0], error) for b, error in zip(batches, errors, strict=True)]
    spectra = {}
    for start in measurement.starts:
        v = torch.stack([each[start] for each in vectors])
        spectra[start] = [lanczos(M, v[0], steps)] if alone else lanczos_batches(M, v, steps)
    return [
        (float(error.double().mean()), error.numel(), {s: each[g] for s, each in spectra.items()})
        for g, error in enumerate(errors)
    ]


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A stream for each batch and purpose: none depends on what else is asked for."""
    digest = hashlib.sha256(f"{seed} {index} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def is_memory(error: Exception) -> bool:
    """Say whether an exception means that memory ran out."""
    signs = ("not enough memory", "can't allocate memory", "out of memory")
    said = any(words in str(error).lower() for words in signs)
    return said or isinstance(error, torch.OutOfMemoryError)
