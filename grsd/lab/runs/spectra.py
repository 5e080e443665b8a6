"""One group of batches of one checkpoint: operators, start vectors, Lanczos; in lock-step where that is possible.

Batches in lock-step share their passes through the network (:mod:`grsd.spectrum.operator.batches`), which is what fills a GPU. On two
CPU cores the whole measurement of mini-1.3m at T = 256 takes 0.75 to 0.78 of the time of one batch at a time (10 and 5
batches; m = 20), that of mini-4.2m the same time. The numbers are those of one batch at a time to rounding. How many batches
go together follows from a budget of memory and the measured peak of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grsd.lab.runs import memory
from grsd.spectrum import (
    NTK,
    NTKBatches,
    TokenLogProb,
    Tridiagonal,
    lanczos,
    lanczos_batches,
    nulls,
)

CPU_BUDGET = 2**29  # bytes; beyond some hundred MB a larger group saves no time on a CPU
GPU_BUDGET = 0.8  # share of the device's memory that the weights leave
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
Batch = tuple[int, Tensor, Tensor]  # number, inputs and targets, both (batch_size, length)
Spectra = tuple[float, int, dict[str, Tridiagonal]]  # loss, rows, start vector → Lanczos matrix


@dataclass(frozen=True)
class Group:
    """How many batches go in lock-step, and why.

    Attributes
    ----------
    batches : int
    bytes : int, measured peak of one batch beyond the weights, its Lanczos basis included; 0 when it was not asked for.
    budget : int, bytes.
    """

    batches: int
    bytes: int
    budget: int

    def __str__(self) -> str:
        one = f"{self.bytes / 1e6:.0f} MB each, budget {self.budget / 1e6:.0f} MB"
        return (
            f"up to {self.batches} batches in lock-step ({one})"
            if self.batches > 1
            else f"one batch at a time ({one})"
        )


@dataclass(frozen=True)
class Recipe:
    """What is measured on every batch: the fields of `grsd.lab.runs.run.RunSpec` that matter here."""

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
        found = {}
        for start in self.starts:
            if start == "error":
                found[start] = error
            elif start == "ones":
                found[start] = torch.ones_like(error)
            else:
                null = nulls.random_signs if start == "signs" else nulls.random_start
                found[start] = null(error, generator=_generator(self.seed, index, start))
        return found


def grouping(
    recipe: Recipe, model: nn.Module, batch: Batch, most: int, budget: int | None
) -> Group:
    """Return how many batches like this one go in lock-step, at most `most`, within `budget` bytes beyond the weights.

    By default 512 MiB on a CPU, and on a GPU four fifths of what the weights leave of it. Cost: one operator and one product.
    """
    device = torch.device(recipe.device)
    if budget is None:
        budget = CPU_BUDGET
        if device.type == "cuda":
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            budget = int(
                GPU_BUDGET * (torch.cuda.get_device_properties(device).total_memory - weights)
            )
    if most == 1:
        return Group(1, 0, budget)
    _, inputs, targets = recipe.prepared(batch)

    def once() -> None:
        M = NTKBatches(model, _arguments(inputs), TokenLogProb(targets), batches=1)
        M @ M.error

    try:
        found = memory.peak(once, device)
        found += recipe.steps * targets.numel() * next(model.parameters()).element_size()
    except ValueError:  # it cannot be kept apart, or not be measured at all, of which the measurement itself complains
        return Group(1, 0, budget)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        return Group(1, budget, budget)
    return Group(max(1, min(most, budget // max(found, 1))), found, budget)


def measure(recipe: Recipe, model: nn.Module, batches: Sequence[Batch]) -> list[Spectra]:
    """Return loss, rows and Lanczos matrices of every batch.

    Several batches go in lock-step; when the model does not allow that, one at a time, and when memory does not, in halves.
    """
    with torch.enable_grad():
        return _measure(recipe, model, [recipe.prepared(batch) for batch in batches])


def _measure(recipe: Recipe, model: nn.Module, ready: Sequence[Batch]) -> list[Spectra]:
    if len(ready) == 1:
        return [_one(recipe, model, ready[0])]
    try:
        return _together(recipe, model, ready)
    except ValueError:  # what is wrong with a batch of its own is said by the batch of its own
        return [_one(recipe, model, batch) for batch in ready]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
    half = len(ready) // 2
    return _measure(recipe, model, ready[:half]) + _measure(recipe, model, ready[half:])


def _one(recipe: Recipe, model: nn.Module, batch: Batch) -> Spectra:
    index, inputs, targets = batch
    M = NTK(
        model,
        _arguments(inputs),
        TokenLogProb(targets),
        normalize="mean" if recipe.normalize == "mean" else "sum",
    )
    error = M.error.detach()
    vectors = recipe.vectors(index, error)
    spectra = {start: lanczos(M, vector, recipe.steps) for start, vector in vectors.items()}
    return float(error.double().mean()), int(M.shape[0]), spectra


def _together(recipe: Recipe, model: nn.Module, batches: Sequence[Batch]) -> list[Spectra]:
    inputs, targets = (torch.cat([batch[k] for batch in batches]) for k in (1, 2))  # type: ignore[misc]
    M = NTKBatches(
        model,
        _arguments(inputs),
        TokenLogProb(targets),
        batches=len(batches),
        normalize="mean" if recipe.normalize == "mean" else "sum",
    )
    errors = M.error.detach()
    vectors = [
        recipe.vectors(batch[0], error) for batch, error in zip(batches, errors, strict=True)
    ]
    spectra = {
        s: lanczos_batches(M, torch.stack([v[s] for v in vectors]), recipe.steps)
        for s in recipe.starts
    }
    losses = errors.double().mean(1).tolist()
    return [
        (losses[g], int(M.shape[1]), {s: spectra[s][g] for s in recipe.starts})
        for g in range(len(batches))
    ]


def _arguments(inputs: Tensor) -> dict[str, object]:
    return {"input_ids": inputs, "use_cache": False}


def _generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A stream of its own for each batch and purpose, so that none depends on what else is asked for."""
    digest = hashlib.sha256(f"{seed} {index} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def is_memory(error: Exception) -> bool:
    """Say whether an exception means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def bytes_of(text: str) -> int:
    """Return the bytes that a size such as "512M", "4G", "1.5G" or "0" means (decimal units).

    Raises
    ------
    ValueError
        Not a size.
    """
    words = text.strip().upper().removesuffix("B")
    unit = words[-1:] if words[-1:].isalpha() else ""
    try:
        number = float(words.removesuffix(unit))
    except ValueError:
        number = -1.0
    if unit not in UNITS or not 0 <= number < float("inf"):
        raise ValueError(
            f"{text!r} is not a size of memory; write 512M or 4G (0 measures one batch at a time)"
        )
    return int(number * UNITS[unit])
