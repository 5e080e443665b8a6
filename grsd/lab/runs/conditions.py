"""The conditions of 2512.18209 along the checkpoints of a language model: what `grsd conditions` runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from grsd.lab.checkpoints import hub
from grsd.lab.data import corpora
from grsd.lab.runs.record import DTYPES
from grsd.renorm.diagnostics import conditions
from grsd.spectrum import TokenLogProb

__all__ = ["conditions_of", "step_of"]


def step_of(revision: str) -> int | None:
    """Return the number of updates in a revision's name: 512 for ``"step512"``, None where there is no number."""
    found = re.search(r"(\d+)$", revision)
    return int(found.group(1)) if found else None


def conditions_of(
    model: str | Path,
    revisions: Sequence[str],
    *,
    corpus: str = "embedded",
    split: str | None = None,
    batch_size: int = 2,
    length: int = 32,
    seed: int = 0,
    dtype: str = "float64",
    device: str = "cpu",
    rate: float = 1.0,
    probes: int | None = 16,
    rows: int = 512,
    along: conditions.Along = "flow",
    progress: Callable[[int, int, str], None] | None = None,
    cache: Path | str | None = None,
) -> conditions.Report:
    """Measure D1–D6 of one model on one batch of text, at every revision.

    Parameters
    ----------
    model, revisions
        As for `grsd.lab.checkpoints.hub.load`; no revision means the last one. Several are put in the order of their step numbers.
    corpus, split, batch_size, length, seed
        The batch: T = batch_size · length tokens, each a row.
    dtype, device
    rate : float
        Time of one step, e.g. the learning rate: times are step · rate. D5 does not depend on it.
    probes, rows, along, progress
        As for `grsd.renorm.diagnostics.conditions.report`.
    cache : path, optional

    Raises
    ------
    ValueError
        Several revisions one of which has no step number, a rate that is not positive, and what the parts of this raise.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; the time of one step must be positive")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    asked: tuple[str | None, ...] = tuple(revisions) or (None,)
    if len(asked) > 1:
        if nameless := [name for name in asked if step_of(str(name)) is None]:
            raise ValueError(
                f"revision {nameless[0]!r} has no step number, so its place on a path is unknown"
            )
        asked = tuple(sorted(set(asked), key=lambda name: step_of(str(name)) or 0))
    first = hub.load(model, asked[0], dtype=DTYPES[dtype], device=device, cache=cache)
    text = corpora.open_corpus(corpus, first.tokenizer, cache=cache)
    first.check_fit(text, length)
    part = split or ("heldout" if corpus.partition(":")[0] in corpora.SOURCES else "all")
    ((inputs, targets),) = text.batches(1, batch_size, length, seed, part)
    times, states = [], []
    for name in asked:
        loaded = (
            first
            if name == asked[0]
            else hub.load(model, name, dtype=DTYPES[dtype], device=device, cache=cache)
        )
        times.append((step_of(loaded.revision) or 0) * rate)
        states.append({key: value.clone() for key, value in loaded.model.state_dict().items()})
    where = torch.device(device)
    return conditions.report(
        first.model,
        (inputs.to(where), TokenLogProb(targets.to(where))),
        list(zip(times, states, strict=True)),
        probes=probes,
        rows=rows,
        along=along,
        instants=len(states),
        seed=seed,
        progress=progress,
    )
