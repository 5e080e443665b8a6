"""What a run is asked to measure, and what it found: plain records that JSON can hold.

How a run is carried out is in :mod:`grsd.lab.runs.run`, which has these names as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grsd.checks import at_least, one_of
from grsd.lab.data import corpora
from grsd.lab.runs.spectra import Group, Measurement
from grsd.spectrum import (
    AveragedProfile,
    LogShells,
    ShellProfile,
    SpectralMeasure,
    Tridiagonal,
    average,
)

STARTS = ("error", "ones", "signs", "random")
TARGETS = ("text", "shuffled")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunSpec:
    """What to measure.

    Attributes
    ----------
    model : str
        As `grsd.lab.checkpoints.opened.load`.
    revisions : tuple of str
        Checkpoints; empty for the model's last one.
    corpus : str
        As `grsd.lab.data.corpora.open_corpus`; tokenized with the model's tokenizer.
    batches, batch_size, length : int
        Independent batches, sequences in each, tokens in each: T = batch_size · length rows.
    steps : int
        Lanczos steps m, at most T.
    starts : tuple of str
        ``"error"`` (e = −log q), ``"ones"`` (what evolves under cross-entropy), and two nulls:
        ``"signs"`` (e with random signs) and ``"random"`` (Gaussian). Both have the norm of e.
    seed : int
        Of the batches, the random start vectors and the shuffled targets.
    dtype, device : str
    normalize : str
        ``"mean"`` for M = J Jᵀ/T, ``"sum"`` for J Jᵀ.
    targets : str
        ``"text"``, or ``"shuffled"``: the targets permuted within each batch, a null model.
    split : str or None
        Part of the corpus; default ``"heldout"`` for source texts and ``"all"`` for any other.
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
            raise ValueError(
                f"steps = {self.steps} exceeds T = batch_size x length = {rows}; "
                "lower steps or enlarge the batch"
            )
        one_of("dtype", self.dtype, DTYPES)
        one_of("normalize", self.normalize, ("mean", "sum"))
        one_of("targets", self.targets, TARGETS)
        one_of("split", self.split or "all", corpora.SPLITS)
        if not self.starts or set(self.starts) - set(STARTS):
            raise ValueError(
                f"starts are {self.starts}: expected one or more of {', '.join(STARTS)}"
            )

    @property
    def part(self) -> str:
        """The split that is measured."""
        return self.split or corpora.default_split(self.corpus)

    @property
    def measurement(self) -> Measurement:
        """What is done with every batch."""
        return Measurement(
            self.steps, self.starts, self.seed, self.device, self.normalize, self.targets
        )

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
    """Spectra of one checkpoint on one batch.

    Attributes
    ----------
    fingerprint : str
        Hash of the checkpoint's weights.
    loss : float
        Mean of e over the batch, nats per token.
    rows : int
        T.
    tridiagonals : dict of str to Tridiagonal
        Start vector to Lanczos matrix.
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
    spec : RunSpec
    root : Path
        Folder of the per-batch files, of this run and of all others.
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
        seen = np.concatenate(
            [measure.nodes[measure.nodes > measure.floor] for measure in measures]
        )
        if not (seen.size and seen.max() > 0):
            raise ValueError(
                "no eigenvalue stands above the rounding floor: the operator is zero to precision"
            )
        return LogShells.spanning(float(seen.min()), float(seen.max()), ratio=ratio)

    def to_json(self) -> dict[str, Any]:
        """The spec and every batch, plain lists and numbers."""
        batches = {r: [b.to_json() for b in several] for r, several in self.results.items()}
        return {"spec": asdict(self.spec), "revisions": batches}

    def _of(self, revision: str) -> tuple[BatchResult, ...]:
        if revision not in self.results:
            raise ValueError(
                f"no revision {revision!r} in this run; it has {', '.join(self.results)}"
            )
        return self.results[revision]
