"""Spectra over many batches and checkpoints, kept batch by batch so that a run can be killed at any moment.

A run walks revisions × batches, builds the operator of the token log-probabilities on each batch and runs Lanczos from
the start vectors asked for. What it keeps is small: the tridiagonal matrices (some hundred numbers), the loss and
where they came from, one JSON file per (checkpoint, batch), written in one rename. Shells are drawn from them later,
so edges can be chosen when all spectra are known.

A file's place is the hash of what determines its numbers: the measurement, the corpus, the checkpoint's weights.
Runs that differ only in how many batches or which revisions they ask for share their files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from grsd import results
from grsd.lab.checkpoints import hub
from grsd.lab.data import corpora
from grsd.lab.data.corpora import Corpus
from grsd.lab.runs import spectra
from grsd.lab.runs.processes import Ranks
from grsd.lab.runs.record import DTYPES, STARTS, TARGETS, BatchResult, RunResult, RunSpec
from grsd.lab.runs.spectra import Batch, Group, Recipe

__all__ = [
    "DTYPES",
    "STARTS",
    "TARGETS",
    "BatchResult",
    "Progress",
    "RunResult",
    "RunSpec",
    "shell_run",
]

Progress = Callable[[int, int, str], None]  # (files done, files in all, what)


@dataclass(frozen=True)
class _Checkpoint:
    folder: Path
    revision: str
    fingerprint: str


@dataclass(frozen=True)
class _Plan:
    """What is to be done, settled before any of it: the files that are missing, in groups of one checkpoint each."""

    checkpoints: list[_Checkpoint]
    work: list[
        tuple[int, list[int], list[int]]
    ]  # checkpoint, batches that go together, those whose files are missing
    group: Group | None


def shell_run(
    spec: RunSpec,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    cache: Path | str | None = None,
    corpus: Corpus | None = None,
    memory: int | None = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Measure ``spec``, some batches at a time.

    Parameters
    ----------
    spec : RunSpec
    resume : bool
        Use the files that an earlier run left; False measures all again and replaces them.
    progress : callable, optional
        Called with (files done, files in all, description) after each file.
    cache : path, optional
        Default `grsd.results.cache_dir`.
    corpus : Corpus, optional
        An opened corpus in place of the one ``spec.corpus`` names.
    memory : int, optional
        Bytes beyond the weights. Several batches of a checkpoint go in lock-step as far as they fit, by the measured peak of
        one; 0 measures one at a time. Default: 512 MiB on a CPU, four fifths of what the weights leave of a GPU.
    ranks : Ranks, optional
        The processes that share the work; by default this one alone.

    Raises
    ------
    ValueError
        What `hub.load` and `corpora.open_corpus` raise; a vocabulary or context that does not fit; products that are
        not finite.
    MemoryError
        A batch does not fit; the message says what to lower.
    RuntimeError
        Another process of the run failed.

    Notes
    -----
    Cost per batch: one operator and ``steps`` products for each start vector. The files of a group are written together. With an
    unchanged number of threads and batches, and the same ``memory``, a run that was killed and resumed equals an uninterrupted
    one bit for bit, whatever the number of processes; another grouping moves the numbers by rounding.
    """
    ranks = ranks or Ranks()
    hub.check_device(spec.device)
    plan = ranks.from_first(lambda: _planned(spec, resume, cache, corpus, memory))
    origin = results.provenance(spec.argv(), asdict(spec), [spec.seed])
    if plan.group is not None:
        origin |= {"lockstep": asdict(plan.group), "process": f"{ranks.rank} of {ranks.size}"}
    if corpus is None:
        corpus = corpora.open_corpus(
            spec.corpus, hub.tokenizer_of(plan.checkpoints[0].folder), cache=cache
        )
    root = _folder(spec, corpus, cache)
    mine = ranks.share(plan.work)
    total = spec.batches * len(plan.checkpoints)
    done = total - sum(len(missing) for _, _, missing in plan.work)
    if ranks.size > 1:
        total = done + sum(len(missing) for _, _, missing in mine)
    if progress is not None:
        for k in range(done):
            progress(k + 1, total, "found in the cache")

    stream: list[Batch] = _stream(spec, corpus) if mine else []
    loaded: tuple[int, hub.Loaded] | None = None
    for at, together, missing in mine:
        checkpoint = plan.checkpoints[at]
        if loaded is None or loaded[0] != at:
            loaded = None  # the one before is freed first
            loaded = at, _loaded(spec, corpus, checkpoint)
        found = _measure(spec, loaded[1].model, [stream[k] for k in together])
        for index, (loss, rows, matrices) in zip(together, found, strict=True):
            if index in missing:
                result = BatchResult(
                    checkpoint.revision,
                    checkpoint.fingerprint,
                    index,
                    loss,
                    rows,
                    matrices,
                    provenance=origin,
                )
                results.atomic_write(
                    _file(root, checkpoint, index), results.dumps(result.to_json())
                )
                done += 1
                if progress is not None:
                    progress(
                        done, total, f"{checkpoint.revision}, batch {index + 1} of {spec.batches}"
                    )
    ranks.wait()
    measured: dict[str, tuple[BatchResult, ...]] = {}
    for checkpoint in plan.checkpoints:
        read = [_read(_file(root, checkpoint, k), checkpoint, spec) for k in range(spec.batches)]
        lost = [k for k, result in enumerate(read) if result is None]
        if lost:
            raise RuntimeError(
                f"the files of batches {lost} of {checkpoint.revision} are not in {root}: all processes must share "
                "one cache folder (GRSD_CACHE)"
            )
        measured[checkpoint.revision] = tuple(result for result in read if result is not None)
    return RunResult(spec, root, measured, plan.group)


def _planned(
    spec: RunSpec, resume: bool, cache: Path | str | None, corpus: Corpus | None, memory: int | None
) -> _Plan:
    asked: tuple[str | None, ...] = spec.revisions or (None,)
    resolved = [
        hub.resolve(spec.model, revision, cache=cache) for revision in asked
    ]  # unknown ones fail before any work
    checkpoints = [
        _Checkpoint(folder, name, hub.checkpoint_fingerprint(folder)) for folder, name in resolved
    ]
    if corpus is None:
        corpus = corpora.open_corpus(
            spec.corpus, hub.tokenizer_of(checkpoints[0].folder), cache=cache
        )
    root = _folder(spec, corpus, cache)
    absent = [
        [k for k in range(spec.batches) if not (resume and _read(_file(root, one, k), one, spec))]
        for one in checkpoints
    ]
    known: set[str] = set()
    for one, missing in zip(checkpoints, absent, strict=True):
        if one.fingerprint in known:  # the same weights under another name have the same files
            missing.clear()
        known.add(one.fingerprint)
    first = next((at for at, missing in enumerate(absent) if missing), None)
    if first is None:
        return _Plan(checkpoints, [], None)
    loaded = _loaded(spec, corpus, checkpoints[first])
    with _memory_says(spec):
        group = spectra.grouping(
            _recipe(spec), loaded.model, _stream(spec, corpus)[0], spec.batches, memory
        )
    work = []
    for at, missing in enumerate(absent):
        for start in range(
            0, spec.batches, group.batches
        ):  # a group is the same whatever is missing of it
            together = list(range(start, min(start + group.batches, spec.batches)))
            if wanted := [k for k in together if k in missing]:
                work.append((at, together, wanted))
    return _Plan(checkpoints, work, group)


def _stream(spec: RunSpec, corpus: Corpus) -> list[Batch]:
    stream = corpus.batches(spec.batches, spec.batch_size, spec.length, spec.seed, spec.part)
    return [(index, inputs, targets) for index, (inputs, targets) in enumerate(stream)]


def _recipe(spec: RunSpec) -> Recipe:
    return Recipe(spec.steps, spec.starts, spec.seed, spec.device, spec.normalize, spec.targets)


def _loaded(spec: RunSpec, corpus: Corpus, checkpoint: _Checkpoint) -> hub.Loaded:
    loaded = hub.load(checkpoint.folder, dtype=DTYPES[spec.dtype], device=spec.device)
    loaded.check_fit(corpus, spec.length)
    return loaded


def _folder(spec: RunSpec, corpus: Corpus, cache: Path | str | None) -> Path:
    base = Path(cache) if cache is not None else results.cache_dir()
    return base / "runs" / spec.key(corpus)[:16]


def _file(root: Path, checkpoint: _Checkpoint, index: int) -> Path:
    return root / f"{checkpoint.fingerprint[:16]}-b{index:04d}.json"


def _measure(spec: RunSpec, model: torch.nn.Module, batches: list[Batch]) -> list[spectra.Spectra]:
    with _memory_says(spec):
        return spectra.measure(_recipe(spec), model, batches)


@contextmanager
def _memory_says(spec: RunSpec) -> Iterator[None]:
    """Turn a failure to allocate into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not spectra.is_memory(error):
            raise
        raise MemoryError(
            f"not enough memory on {spec.device} for T = {spec.batch_size} x {spec.length} rows in {spec.dtype}: "
            "lower --batch-size first, then --length"
            + (", or take --dtype float32" if spec.dtype == "float64" else "")
        ) from error


def _read(path: Path, checkpoint: _Checkpoint, spec: RunSpec) -> BatchResult | None:
    """A finished batch, or None when it is absent, damaged or of other weights."""
    try:
        found = BatchResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if (
        found.fingerprint != checkpoint.fingerprint
        or set(found.tridiagonals) != set(spec.starts)
        or not found.sane()
    ):
        return None
    return replace(found, revision=checkpoint.revision)  # equal weights may go by several names
