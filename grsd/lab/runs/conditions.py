"""The conditions of 2512.18209 along checkpoints: what `grsd conditions` runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grsd.checks import one_of, positive
from grsd.lab.checkpoints.opened import Model, open_model
from grsd.lab.checkpoints.revisions import in_order, step_of
from grsd.lab.data import corpora
from grsd.lab.runs.record import DTYPES
from grsd.renorm.diagnostics import conditions
from grsd.spectrum import TokenLogProb


def conditions_of(
    model: str | Path | Model,
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
    cache: Path | str | None = None,
    **options: Any,
) -> conditions.Report:
    """Measure D1–D7 of one model on one batch of text, at every revision.

    Parameters
    ----------
    model, revisions
        As for `grsd.lab.checkpoints.opened.load`, or an opened one; no revision means the last one.
        Several are put in the order of their step numbers, which each must have.
    corpus, split, batch_size, length, seed
        The batch: T = batch_size · length tokens, each a row.
    rate : float
        Time of one step, e.g. the learning rate: times are step · rate, counted from step 0 and not
        from the first revision asked for. D5 and t · ṡ do not depend on it along "path".
    options
        As for `grsd.renorm.diagnostics.conditions.report`.
    """
    positive("rate", rate, "the time of one step must be positive")
    one_of("dtype", dtype, DTYPES)
    steps = {name: step_of(name) for name in revisions}
    if len(steps) > 1 and None in steps.values():
        nameless = next(name for name, step in steps.items() if step is None)
        why = "so its place on a path is unknown"
        raise ValueError(f"revision {nameless!r} has no step number, {why}")

    # the text is cut with the tokenizer of the first checkpoint
    opened = model if isinstance(model, Model) else open_model(model, cache=cache)
    asked: list[str | None] = [*in_order(steps)] or [None]
    first = opened.checkpoint(asked[0]).load(DTYPES[dtype], device)
    text = corpora.open_corpus(corpus, first.tokenizer, cache=cache)
    first.check_fit(text, length)
    part = split or corpora.default_split(corpus)
    ((inputs, targets),) = text.batches(1, batch_size, length, seed, part)

    snapshots = []
    for name in asked:
        loaded = first
        if name != asked[0]:
            loaded = opened.checkpoint(name).load(DTYPES[dtype], device)
        state = {key: value.clone() for key, value in loaded.model.state_dict().items()}
        snapshots.append(((step_of(loaded.revision) or 0) * rate, state))
    batch = inputs.to(device), TokenLogProb(targets.to(device))
    own: dict[str, Any] = {"instants": len(snapshots), "seed": seed}
    return conditions.report(first.model, batch, snapshots, **own, **options)
