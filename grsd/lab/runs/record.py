"""What a run is asked to measure, and what it found: plain records that JSON can hold.

How a run is carried out is in :mod:`grsd.lab.runs.run`, which has these names as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grsd.checks import at_least, one_of
from grsd.lab.data import corpora
from grsd.lab.runs.spectra import Group, Measurement
from grsd.spectrum import AveragedProfile, LogShells, ShellProfile, average
from grsd.spectrum.measure import SpectralMeasure, Tridiagonal

STARTS = ("error", "ones", "signs", "random")
TARGETS = ("text", "shuffled")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunSpec:
    """What to measure: independent batches of T = batch_size · length rows each.

    Attributes
    ----------
    model, corpus : as `grsd.lab.checkpoints.opened.load` and `grsd.lab.data.corpora.open_corpus`
    revisions : checkpoints; empty for the model's last one
    steps : Lanczos steps m, at most T
    starts : ``"error"`` (e = −log q), ``"ones"`` (what evolves under cross-entropy), and two nulls
        with the norm of e: ``"signs"`` (e with random signs) and ``"random"`` (Gaussian)
    seed : of the batches, the random start vectors and the shuffled targets
    normalize : ``"mean"`` for M = J Jᵀ/T, ``"sum"`` for J Jᵀ
    targets : ``"text"``, or ``"shuffled"``: permuted within each batch, a null model
    split : part of the corpus; by default ``"heldout"`` of source texts, ``"all"`` of any other
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
        for name in ("revisions", "starts"):
            words = getattr(self, name)
            words = (words,) if isinstance(words, str) else tuple(words)
            object.__setattr__(self, name, words)
            if len(set(words)) < len(words):
                raise ValueError(f"{name} name something twice: {', '.join(words)}")
        for name in ("batches", "batch_size", "length", "steps"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        rows = self.batch_size * self.length
        at_least("T = batch_size x length", rows, 2, "raise length or batch_size")
        if self.steps > rows:
            what = f"steps = {self.steps} exceeds T = batch_size x length = {rows}"
            raise ValueError(f"{what}; lower steps or enlarge the batch")
        one_of("dtype", self.dtype, DTYPES)
        one_of("normalize", self.normalize, ("mean", "sum"))
        one_of("targets", self.targets, TARGETS)
        one_of("split", self.split or "all", corpora.SPLITS)
        if not self.starts or set(self.starts) - set(STARTS):
            known = ", ".join(STARTS)
            raise ValueError(f"starts are {self.starts}: expected one or more of {known}")

    @property
    def part(self) -> str:
        """The split that is measured."""
        return self.split or corpora.default_split(self.corpus)

    @property
    def measurement(self) -> Measurement:
        """What is done with every batch."""
        return Measurement(**{one.name: getattr(self, one.name) for one in fields(Measurement)})

    def argv(self) -> list[str]:
        """The ``grsd`` command line that makes this run."""
        options = [("--revision", revision) for revision in self.revisions]
        options.append(("--corpus", self.corpus))
        if self.split is not None:
            options.append(("--split", self.split))
        for name in ("batches", "batch_size", "length", "steps", "seed", "dtype", "device"):
            options.append(("--" + name.replace("_", "-"), str(getattr(self, name))))
        options += [("--normalize", self.normalize), ("--targets", self.targets)]
        options += [("--start", start) for start in self.starts]
        return ["shells", self.model, *(word for option in options for word in option)]


@dataclass(frozen=True)
class BatchResult:
    """Spectra of one checkpoint, whose weights have this fingerprint, on one batch of T `rows`.

    The loss is the mean of e, in nats per token; `tridiagonals` go by start vector.
    """

    revision: str
    fingerprint: str
    batch: int
    loss: float
    rows: int
    tridiagonals: dict[str, Tridiagonal]
    provenance: dict[str, Any] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        matrices = {start: matrix.to_json() for start, matrix in self.tridiagonals.items()}
        return {**vars(self), "tridiagonals": matrices}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BatchResult:
        matrices = record["tridiagonals"]
        spectra = {start: Tridiagonal.from_json(matrix) for start, matrix in matrices.items()}
        return cls(**{**record, "tridiagonals": spectra})


@dataclass(frozen=True)
class RunResult:
    """All batches of all checkpoints of a run; spectra are binned on demand.

    Attributes
    ----------
    root : folder of the per-batch files, of this run and of all others
    results : revision to its batches, in order
    group : how many batches went in lock-step; None when nothing had to be measured
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
        return np.array([batch.loss for batch in self._of(revision)])

    def tridiagonals(self, revision: str, start: str = "error") -> list[Tridiagonal]:
        """Lanczos matrices, one per batch."""
        if start not in self.spec.starts:
            has = ", ".join(self.spec.starts)
            raise ValueError(f"no start vector {start!r} in this run; it has {has}")
        return [batch.tridiagonals[start] for batch in self._of(revision)]

    def measures(self, revision: str, start: str = "error") -> list[SpectralMeasure]:
        """Spectral measures, one per batch."""
        return [matrix.measure() for matrix in self.tridiagonals(revision, start)]

    def profiles(self, revision: str, start: str, shells: LogShells) -> list[ShellProfile]:
        """Shell profiles, one per batch."""
        return [measure.shells(shells) for measure in self.measures(revision, start)]

    def average(self, revision: str, start: str, shells: LogShells) -> AveragedProfile:
        """Mean profile over the batches with its standard error."""
        return average(self.profiles(revision, start, shells))

    def common_shells(self, ratio: float = 2.0) -> LogShells:
        """Shells that span every Ritz value above its floor, over the whole run."""
        pairs = [(revision, start) for revision in self.revisions for start in self.spec.starts]
        measures = [measure for pair in pairs for measure in self.measures(*pair)]
        seen = np.concatenate([one.nodes[one.nodes > one.floor] for one in measures])
        if not (seen.size and seen.max() > 0):
            why = "the operator is zero to precision"
            raise ValueError(f"no eigenvalue stands above the rounding floor: {why}")
        return LogShells.spanning(float(seen.min()), float(seen.max()), ratio=ratio)

    def to_json(self) -> dict[str, Any]:
        """The spec and every batch, plain lists and numbers."""
        batches = {r: [b.to_json() for b in several] for r, several in self.results.items()}
        return {"spec": asdict(self.spec), "revisions": batches}

    def _of(self, revision: str) -> tuple[BatchResult, ...]:
        if revision not in self.results:
            has = ", ".join(self.results)
            raise ValueError(f"no revision {revision!r} in this run; it has {has}")
        return self.results[revision]
