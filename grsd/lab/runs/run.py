"""Spectra over batches and checkpoints, kept one by one: a run can be killed at any moment.

A run walks revisions × batches, builds the operator of the token log-probabilities on each batch
and runs Lanczos from the start vectors asked for. What it keeps is small: the tridiagonal matrices
(some hundred numbers), the loss and where they came from, one piece per (checkpoint, batch). Shells
are drawn from them later, so edges can be chosen when all spectra are known.

A piece is keyed by what determines its numbers: the measurement, the tokens of the batch, the
weights, and the code that loads and measures. Runs that differ only in how many batches or which
revisions they ask for share their pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from grsd import pieces, results, scale
from grsd.lab.checkpoints.opened import Loaded, Model, open_model
from grsd.lab.data import corpora
from grsd.lab.data.corpora import Corpus
from grsd.lab.runs import spectra
from grsd.lab.runs.processes import Ranks
from grsd.lab.runs.record import DTYPES, BatchResult, RunResult, RunSpec
from grsd.lab.runs.spectra import Batch, Group, Spectra

__all__ = ["BatchResult", "Progress", "RunResult", "RunSpec", "shell_run"]

_FORMAT = 2  # of a batch's record
Progress = Callable[[int, int, str], None]  # (pieces done, pieces in all, what)
Work = tuple[int, list[int], set[int]]  # checkpoint, batches that go together, missing ones


def shell_run(
    spec: RunSpec,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    cache: Path | str | None = None,
    model: Model | None = None,
    corpus: Corpus | None = None,
    memory: int | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Measure ``spec``, some batches at a time.

    Parameters
    ----------
    resume
        Use the pieces that an earlier run left; False measures all again and replaces them.
    progress
        Called with (pieces done, pieces in all, description) after each piece.
    model, corpus
        Opened ones in place of those that the spec names.
    memory
        Bytes beyond the weights. Several batches of a checkpoint go in lock-step as far as they
        fit, by the measured peak of one; 0 measures one at a time. Default: 512 MiB on a CPU, four
        fifths of what the weights leave of a GPU.
    ranks
        The processes that share the work; by default this one alone.

    Raises
    ------
    MemoryError
        A batch does not fit; the message says what to lower.
    RuntimeError
        Another process of the run failed.

    Notes
    -----
    Cost per batch: one operator and ``steps`` products for each start vector. The pieces of a group
    are written together. With an unchanged number of threads and batches, and the same ``memory``,
    a run that was killed and resumed equals an uninterrupted one bit for bit, whatever the number
    of processes; another grouping moves the numbers by rounding.
    """
    ranks = ranks or Ranks()
    job = _Job(spec, model, corpus, cache)
    group, work = ranks.from_first(lambda: job.plan(resume, memory))
    mine = ranks.share(work)
    origin = results.provenance(spec.argv(), asdict(spec), [spec.seed])
    origin["weights"] = {one.revision: one.provenance() for one in job.checkpoints}
    if group is not None:
        origin |= {"lockstep": asdict(group), "process": f"{ranks.rank} of {ranks.size}"}

    report = progress or (lambda done, total, what: None)
    done = spec.batches * len(job.checkpoints) - sum(len(missing) for _, _, missing in work)
    total = done + sum(len(missing) for _, _, missing in mine)
    for k in range(done):
        report(k + 1, total, "found in the cache")

    current, loaded = -1, None
    for at, together, missing in mine:
        if loaded is None or at != current:
            loaded = None  # the one before is freed first
            current, loaded = at, job.load(at)
        with _what_to_lower(spec):
            batches = [job.batches[k] for k in together]
            several = spectra.measure(spec.measurement, loaded.model, batches)
        for index, found in zip(together, several, strict=True):
            if index in missing:
                job.write(at, index, found, origin)
                done += 1
                report(done, total, f"{loaded.revision}, batch {index + 1} of {spec.batches}")
    ranks.wait()
    return RunResult(spec, job.store.root, job.read_all(), group)


class _Job:
    """A spec turned into its parts, once: checkpoints, batches, and the store of their spectra."""

    def __init__(
        self, spec: RunSpec, model: Model | None, corpus: Corpus | None, cache: Path | str | None
    ) -> None:
        model = model or open_model(spec.model, cache=cache)
        # unknown revisions fail here, before any work
        self.checkpoints = [model.checkpoint(name) for name in spec.revisions or (None,)]
        if corpus is None:
            tokenizer = self.checkpoints[0].tokenizer
            corpus = corpora.open_corpus(spec.corpus, tokenizer, cache=cache)
        cut = corpus.batches(spec.batches, spec.batch_size, spec.length, spec.seed, spec.part)
        self.batches: list[Batch] = [(k, *pair) for k, pair in enumerate(cut)]
        self.spec, self.corpus = spec, corpus

        loader = self.checkpoints[0].reader
        self.store = pieces.Store(scale.cache_dir(cache) / "runs", pieces.code(spectra, loader))

    def _inputs(self, at: int, index: int) -> dict[str, Any]:
        """What determines the numbers of one piece."""
        _, inputs, targets = self.batches[index]
        tokens = hashlib.sha256(inputs.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()
        return {
            "format": _FORMAT,
            **asdict(self.spec.measurement),
            "device": torch.device(self.spec.device).type,
            "dtype": self.spec.dtype,
            "weights": self.checkpoints[at].fingerprint,
            "batch": index,
            "tokens": tokens,
            "shape": list(inputs.shape),
        }

    def read(self, at: int, index: int) -> BatchResult | None:
        record = self.store.read(self._inputs(at, index))
        if record is None:
            return None
        # equal weights may go by several names
        return replace(BatchResult.from_json(record), revision=self.checkpoints[at].revision)

    def write(self, at: int, index: int, found: Spectra, origin: dict[str, Any]) -> None:
        one, (loss, rows, matrices) = self.checkpoints[at], found
        result = BatchResult(one.revision, one.fingerprint, index, loss, rows, matrices, origin)
        self.store.write(self._inputs(at, index), result.to_json())

    def load(self, at: int) -> Loaded:
        loaded = self.checkpoints[at].load(DTYPES[self.spec.dtype], self.spec.device)
        loaded.check_fit(self.corpus, self.spec.length)
        return loaded

    def plan(self, resume: bool, memory: int | None) -> tuple[Group | None, list[Work]]:
        """What is to be done: the missing pieces, in groups of one checkpoint each."""
        count = self.spec.batches
        absent: dict[str, tuple[int, set[int]]] = {}  # by weights: equal ones have the same pieces
        for at, checkpoint in enumerate(self.checkpoints):
            missing = {k for k in range(count) if not (resume and self.read(at, k))}
            absent.setdefault(checkpoint.fingerprint, (at, missing))
        todo = [(at, missing) for at, missing in absent.values() if missing]
        if not todo:
            return None, []
        net, first = self.load(todo[0][0]).model, self.batches[0]
        with _what_to_lower(self.spec):
            group = spectra.grouping(self.spec.measurement, net, first, count, memory)
        # a group is the same whatever is missing of it
        size = group.batches
        groups = [list(range(k, min(k + size, count))) for k in range(0, count, size)]
        wanted = [(at, g, missing.intersection(g)) for at, missing in todo for g in groups]
        return group, [work for work in wanted if work[2]]

    def read_all(self) -> dict[str, tuple[BatchResult, ...]]:
        """Revision → its batches, measured by this process or another."""
        measured = {}
        for at, checkpoint in enumerate(self.checkpoints):
            read = [self.read(at, k) for k in range(self.spec.batches)]
            if lost := [k for k, result in enumerate(read) if result is None]:
                raise RuntimeError(
                    f"the files of batches {lost} of {checkpoint.revision} are not in "
                    f"{self.store.root}: all processes must share one cache folder (GRSD_CACHE)"
                )
            measured[checkpoint.revision] = tuple(filter(None, read))
        return measured


@contextmanager
def _what_to_lower(spec: RunSpec) -> Iterator[None]:
    """Turn a failure to allocate into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not spectra.is_memory(error):
            raise
        shorter = ", or take --dtype float32" if spec.dtype == "float64" else ""
        raise MemoryError(
            f"not enough memory on {spec.device} for T = {spec.batch_size} x {spec.length} rows in "
            f"{spec.dtype}: lower --batch-size first, then --length{shorter}"
        ) from error
