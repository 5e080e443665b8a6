"""Spectra over many batches and checkpoints, kept batch by batch so that a run can be killed at any moment.

A run walks revisions × batches, builds the operator of the token log-probabilities on each batch and runs Lanczos from
the start vectors asked for. What it keeps is small: the tridiagonal matrices (some hundred numbers), the loss and
where they came from, one JSON file per (checkpoint, batch), written in one rename. Shells are drawn from them later,
so edges can be chosen when all spectra are known.

A file's place is the hash of what determines its numbers: the measurement, the corpus, the checkpoint's weights.
Runs that differ only in how many batches or which revisions they ask for share their files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grsd import results, spectrum
from grsd.lab import corpora, hub, measuring
from grsd.lab.corpora import Corpus
from grsd.lab.measuring import Batch, Group, Recipe
from grsd.lab.ranks import Ranks
from grsd.spectrum import AveragedProfile, LogShells, ShellProfile, SpectralMeasure, Tridiagonal, average

_FORMAT = 1
_CODE = results.code_fingerprint(Path(spectrum.__file__).parent)  # a change of the operator makes every spectrum anew
STARTS = ("error", "ones", "signs", "random")
TARGETS = ("text", "shuffled")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
Progress = Callable[[int, int, str], None]  # (files done, files in all, what)


@dataclass(frozen=True)
class RunSpec:
    """What to measure.

    Attributes
    ----------
    model : str
        As `grsd.lab.hub.load`.
    revisions : tuple of str
        Checkpoints; empty for the model's last one.
    corpus : str
        As `grsd.lab.corpora.open_corpus`; tokenized with the model's tokenizer.
    batches, batch_size, length : int
        Independent batches, sequences in each, tokens in each sequence: T = batch_size · length rows.
    steps : int
        Lanczos steps m, at most T.
    starts : tuple of str
        ``"error"`` (e = −log q), ``"ones"`` (what evolves under cross-entropy), and two nulls: ``"signs"`` (e with
        random signs) and ``"random"`` (Gaussian). Both have the norm of e.
    seed : int
        Of the batches, the random start vectors and the shuffled targets.
    dtype, device : str
    normalize : str
        ``"mean"`` for M = J Jᵀ/T, ``"sum"`` for J Jᵀ.
    targets : str
        ``"text"``, or ``"shuffled"``: the targets permuted within each batch, a null model.
    split : str or None
        Part of the corpus; default ``"heldout"`` for the embedded corpus and ``"all"`` for any other.
    """

    model: str
    revisions: tuple[str, ...] = ()
    corpus: str = "embedded"
    batches: int = 5
    batch_size: int = 4
    length: int = 128
    steps: int = 100
    starts: tuple[str, ...] = ("error", "ones")
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    normalize: str = "mean"
    targets: str = "text"
    split: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        object.__setattr__(self, "revisions", _words(self.revisions))
        object.__setattr__(self, "starts", _words(self.starts))
        for name in ("batches", "batch_size", "length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        size = self.batch_size * self.length
        if size < 2:
            raise ValueError("T = batch_size x length = 1: one token has no spectrum; raise length or batch_size")
        if self.steps > size:
            raise ValueError(
                f"steps = {self.steps} exceeds T = batch_size x length = {size}; lower steps or enlarge the batch"
            )
        for name, allowed in (("dtype", DTYPES), ("normalize", ("mean", "sum")), ("targets", TARGETS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.split is not None and self.split not in corpora.SPLITS:
            raise ValueError(f"unknown split {self.split!r}: expected one of {', '.join(corpora.SPLITS)}")
        if not self.starts or set(self.starts) - set(STARTS):
            raise ValueError(f"starts are {self.starts}: expected one or more of {', '.join(STARTS)}")
        for name in ("revisions", "starts"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} name something twice: {', '.join(getattr(self, name))}")

    @property
    def part(self) -> str:
        """The split that is measured."""
        return self.split or ("heldout" if self.corpus.partition(":")[0] in corpora.SOURCES else "all")

    def argv(self) -> list[str]:
        """The ``grsd`` command line that makes this run."""
        words = ["shells", self.model]
        for revision in self.revisions:
            words += ["--revision", revision]
        words += ["--corpus", self.corpus, *(["--split", self.split] if self.split else [])]
        for name in ("batches", "batch_size", "length", "steps", "seed", "dtype", "device", "normalize", "targets"):
            words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        for start in self.starts:
            words += ["--start", start]
        return words

    def key(self, corpus: Corpus) -> str:
        """SHA-256 of what determines the numbers of a batch, the checkpoint aside."""
        names = ("batch_size", "length", "steps", "starts", "seed", "dtype", "normalize", "targets", "part")
        content: dict[str, Any] = {name: getattr(self, name) for name in names}
        content |= {"format": _FORMAT, "corpus": corpus.fingerprint, "device": torch.device(self.device).type}
        content["code"] = _CODE
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _words(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class BatchResult:
    """Spectra of one checkpoint on one batch.

    Attributes
    ----------
    revision, fingerprint : str
        The checkpoint and the hash of its weights.
    batch : int
    loss : float
        Mean of e over the batch, nats per token.
    rows : int
        T.
    tridiagonals : dict of str to Tridiagonal
        Start vector to Lanczos matrix.
    provenance : dict
    """

    revision: str
    fingerprint: str
    batch: int
    loss: float
    rows: int
    tridiagonals: dict[str, Tridiagonal]
    provenance: dict[str, Any] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        record = {k: getattr(self, k) for k in ("revision", "fingerprint", "batch", "loss", "rows", "provenance")}
        return record | {"tridiagonals": {k: t.to_json() for k, t in self.tridiagonals.items()}}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BatchResult:
        spectra = {k: Tridiagonal.from_json(t) for k, t in record["tridiagonals"].items()}
        return cls(**{**record, "tridiagonals": spectra})


@dataclass(frozen=True)
class RunResult:
    """All batches of all checkpoints of a run; spectra are binned on demand.

    Attributes
    ----------
    spec : RunSpec
    root : Path
        Folder of the per-batch files.
    results : dict of str to tuple of BatchResult
        Revision to its batches, in order.
    group : Group or None
        How many batches went in lock-step; None when nothing had to be measured.
    """

    spec: RunSpec
    root: Path
    results: dict[str, tuple[BatchResult, ...]]
    group: Group | None = field(default=None, compare=False)

    @property
    def revisions(self) -> tuple[str, ...]:
        """Checkpoints that were measured, in the order asked for."""
        return tuple(self.results)

    def losses(self, revision: str) -> np.ndarray:
        """Loss per batch in nats per token, shape (batches,)."""
        return np.array([b.loss for b in self._of(revision)])

    def tridiagonals(self, revision: str, start: str = "error") -> list[Tridiagonal]:
        """Lanczos matrices, one per batch."""
        if start not in self.spec.starts:
            raise ValueError(f"no start vector {start!r} in this run; it has {', '.join(self.spec.starts)}")
        return [b.tridiagonals[start] for b in self._of(revision)]

    def measures(self, revision: str, start: str = "error") -> list[SpectralMeasure]:
        """Spectral measures, one per batch."""
        return [t.measure() for t in self.tridiagonals(revision, start)]

    def profiles(self, revision: str, start: str, shells: LogShells) -> list[ShellProfile]:
        """Shell profiles, one per batch."""
        return [mu.shells(shells) for mu in self.measures(revision, start)]

    def average(self, revision: str, start: str, shells: LogShells) -> AveragedProfile:
        """Mean profile over the batches with its standard error."""
        return average(self.profiles(revision, start, shells))

    def common_shells(self, ratio: float = 2.0) -> LogShells:
        """Shells that span every Ritz value above its floor, over all revisions, batches and start vectors."""
        lo, hi = math.inf, 0.0
        for revision in self.revisions:
            for start in self.spec.starts:
                for mu in self.measures(revision, start):
                    seen = mu.nodes[mu.nodes > mu.floor]
                    if seen.size:
                        lo, hi = min(lo, float(seen.min())), max(hi, float(seen.max()))
        if not hi > 0:
            raise ValueError("no eigenvalue stands above the rounding floor: the operator is zero to precision")
        return LogShells.spanning(lo, hi, ratio=ratio)

    def to_json(self) -> dict[str, Any]:
        """The spec and every batch, plain lists and numbers."""
        batches = {r: [b.to_json() for b in found] for r, found in self.results.items()}
        return {"spec": asdict(self.spec), "revisions": batches}

    def _of(self, revision: str) -> tuple[BatchResult, ...]:
        if revision not in self.results:
            raise ValueError(f"no revision {revision!r} in this run; it has {', '.join(self.results)}")
        return self.results[revision]


@dataclass(frozen=True)
class _Checkpoint:
    folder: Path
    revision: str
    fingerprint: str


@dataclass(frozen=True)
class _Plan:
    """What is to be done, settled before any of it: the files that are missing, in groups of one checkpoint each."""

    checkpoints: list[_Checkpoint]
    work: list[tuple[int, list[int], list[int]]]  # checkpoint, batches that go together, those whose files are missing
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
        corpus = corpora.open_corpus(spec.corpus, hub.tokenizer_of(plan.checkpoints[0].folder), cache=cache)
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
        for index, (loss, rows, spectra) in zip(together, found, strict=True):
            if index in missing:
                result = BatchResult(
                    checkpoint.revision, checkpoint.fingerprint, index, loss, rows, spectra, provenance=origin
                )
                results.atomic_write(_file(root, checkpoint, index), results.dumps(result.to_json()))
                done += 1
                if progress is not None:
                    progress(done, total, f"{checkpoint.revision}, batch {index + 1} of {spec.batches}")
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


def _planned(spec: RunSpec, resume: bool, cache: Path | str | None, corpus: Corpus | None, memory: int | None) -> _Plan:
    asked: tuple[str | None, ...] = spec.revisions or (None,)
    resolved = [
        hub.resolve(spec.model, revision, cache=cache) for revision in asked
    ]  # unknown ones fail before any work
    checkpoints = [_Checkpoint(folder, name, hub.checkpoint_fingerprint(folder)) for folder, name in resolved]
    if corpus is None:
        corpus = corpora.open_corpus(spec.corpus, hub.tokenizer_of(checkpoints[0].folder), cache=cache)
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
        group = measuring.grouping(_recipe(spec), loaded.model, _stream(spec, corpus)[0], spec.batches, memory)
    work = []
    for at, missing in enumerate(absent):
        for start in range(0, spec.batches, group.batches):  # a group is the same whatever is missing of it
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
    _check_fit(loaded, corpus, spec)
    return loaded


def _folder(spec: RunSpec, corpus: Corpus, cache: Path | str | None) -> Path:
    base = Path(cache) if cache is not None else results.cache_dir()
    return base / "runs" / spec.key(corpus)[:16]


def _file(root: Path, checkpoint: _Checkpoint, index: int) -> Path:
    return root / f"{checkpoint.fingerprint[:16]}-b{index:04d}.json"


def _check_fit(loaded: hub.Loaded, corpus: Corpus, spec: RunSpec) -> None:
    corpus.check_vocabulary(loaded.vocab_size)
    context = getattr(loaded.config, "max_position_embeddings", None)
    if context is not None and spec.length > context:
        raise ValueError(f"length = {spec.length} exceeds the model's context of {context} tokens; lower length")


def _measure(spec: RunSpec, model: torch.nn.Module, batches: list[Batch]) -> list[measuring.Spectra]:
    with _memory_says(spec):
        return measuring.measure(_recipe(spec), model, batches)


@contextmanager
def _memory_says(spec: RunSpec) -> Iterator[None]:
    """Turn a failure to allocate into one that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not measuring.is_memory(error):
            raise
        raise MemoryError(
            f"not enough memory on {spec.device} for T = {spec.batch_size} x {spec.length} rows in {spec.dtype}: "
            "lower --batch-size first, then --length" + (", or take --dtype float32" if spec.dtype == "float64" else "")
        ) from error


def _read(path: Path, checkpoint: _Checkpoint, spec: RunSpec) -> BatchResult | None:
    """A finished batch, or None when it is absent, damaged or of other weights."""
    try:
        found = BatchResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found.fingerprint != checkpoint.fingerprint or set(found.tridiagonals) != set(spec.starts):
        return None
    return replace(found, revision=checkpoint.revision)  # equal weights may go by several names
