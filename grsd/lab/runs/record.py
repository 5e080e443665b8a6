"""What a run is asked to measure, and what it found: plain records that JSON can hold.

How a run is carried out is in :mod:`grsd.lab.runs.run`, which has these names as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grsd import results, spectrum
from grsd.lab.data import corpora
from grsd.lab.data.corpora import Corpus
from grsd.lab.runs.spectra import Group
from grsd.spectrum import (
    AveragedProfile,
    LogShells,
    ShellProfile,
    SpectralMeasure,
    Tridiagonal,
    average,
)

_FORMAT = 1
_CODE = results.code_fingerprint(
    Path(spectrum.__file__).parent
)  # a change of the operator makes every spectrum anew
STARTS = ("error", "ones", "signs", "random")
TARGETS = ("text", "shuffled")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RunSpec:
    """What to measure.

    Attributes
    ----------
    model : str
        As `grsd.lab.checkpoints.hub.load`.
    revisions : tuple of str
        Checkpoints; empty for the model's last one.
    corpus : str
        As `grsd.lab.data.corpora.open_corpus`; tokenized with the model's tokenizer.
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
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        size = self.batch_size * self.length
        if size < 2:
            raise ValueError(
                "T = batch_size x length = 1: one token has no spectrum; raise length or batch_size"
            )
        if self.steps > size:
            raise ValueError(
                f"steps = {self.steps} exceeds T = batch_size x length = {size}; lower steps or enlarge the batch"
            )
        for name, allowed in (
            ("dtype", DTYPES),
            ("normalize", ("mean", "sum")),
            ("targets", TARGETS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        if self.split is not None and self.split not in corpora.SPLITS:
            raise ValueError(
                f"unknown split {self.split!r}: expected one of {', '.join(corpora.SPLITS)}"
            )
        if not self.starts or set(self.starts) - set(STARTS):
            raise ValueError(
                f"starts are {self.starts}: expected one or more of {', '.join(STARTS)}"
            )
        for name in ("revisions", "starts"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} name something twice: {', '.join(getattr(self, name))}")

    @property
    def part(self) -> str:
        """The split that is measured."""
        return self.split or (
            "heldout" if self.corpus.partition(":")[0] in corpora.SOURCES else "all"
        )

    def argv(self) -> list[str]:
        """The ``grsd`` command line that makes this run."""
        words = ["shells", self.model]
        for revision in self.revisions:
            words += ["--revision", revision]
        words += ["--corpus", self.corpus, *(["--split", self.split] if self.split else [])]
        for name in (
            "batches",
            "batch_size",
            "length",
            "steps",
            "seed",
            "dtype",
            "device",
            "normalize",
            "targets",
        ):
            words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        for start in self.starts:
            words += ["--start", start]
        return words

    def key(self, corpus: Corpus) -> str:
        """SHA-256 of what determines the numbers of a batch, the checkpoint aside."""
        names = (
            "batch_size",
            "length",
            "steps",
            "starts",
            "seed",
            "dtype",
            "normalize",
            "targets",
            "part",
        )
        content: dict[str, Any] = {name: getattr(self, name) for name in names}
        content |= {
            "format": _FORMAT,
            "corpus": corpus.fingerprint,
            "device": torch.device(self.device).type,
        }
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
        record = {
            k: getattr(self, k)
            for k in ("revision", "fingerprint", "batch", "loss", "rows", "provenance")
        }
        return record | {"tridiagonals": {k: t.to_json() for k, t in self.tridiagonals.items()}}

    def sane(self) -> bool:
        """Whether this can be what a run wrote: finite numbers, a T-row batch, and Lanczos matrices that fit together."""
        try:
            return (
                math.isfinite(self.loss)
                and self.rows > 0
                and all(
                    0 < len(t.alphas) == len(t.betas) + 1 <= self.rows
                    and bool(np.isfinite([t.mass, *t.alphas, *t.betas]).all())
                    and t.mass >= 0
                    for t in self.tridiagonals.values()
                )
            )
        except TypeError:
            return False

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
            raise ValueError(
                f"no start vector {start!r} in this run; it has {', '.join(self.spec.starts)}"
            )
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
            raise ValueError(
                "no eigenvalue stands above the rounding floor: the operator is zero to precision"
            )
        return LogShells.spanning(lo, hi, ratio=ratio)

    def to_json(self) -> dict[str, Any]:
        """The spec and every batch, plain lists and numbers."""
        batches = {r: [b.to_json() for b in found] for r, found in self.results.items()}
        return {"spec": asdict(self.spec), "revisions": batches}

    def _of(self, revision: str) -> tuple[BatchResult, ...]:
        if revision not in self.results:
            raise ValueError(
                f"no revision {revision!r} in this run; it has {', '.join(self.results)}"
            )
        return self.results[revision]
