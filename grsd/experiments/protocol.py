"""Section 7 of 2512.10427 as runs: its measurements, each with the controls it lacks.

A protocol is data: which nets, which checkpoints, how many batches. `train` trains what is missing,
and `measure` runs every cell through `grsd.lab.runs.run` (so a killed protocol resumes) and returns
one averaged profile per cell. The chapter on language models shows the cells of a protocol that ran
on the reader's machine beside those of a stored one that ran on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grsd.checks import one_of
from grsd.lab.checkpoints import suites
from grsd.lab.checkpoints.opened import open_model
from grsd.lab.runs import RunResult, RunSpec, shell_run
from grsd.spectrum import AveragedProfile, LogShells, ShellProfile, average, nulls, statistics

# One octave each at whole powers of two, wide enough for every net: the same in all cells.
SHELLS = LogShells(np.power(2.0, np.arange(-24, 15)))
TRACKED = ("error", "ones", "random")  # start vectors at every checkpoint of a followed model
FROZEN = "frozen"  # a cell's start when it is the null of no transport: see `_decayed`


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes
    ----------
    models : names in `suites.MINI`, by size; each is measured untrained and at its last checkpoint.
        Of a published suite (`training_steps` is 0) names on the hub, which come as they are
    followed : those that are followed over `revisions` from three start vectors; at the end with
        random signs and with shuffled targets too
    batches, batch_size, length, steps : as in `run.RunSpec`; the paper has 50 batches of 4 × 128
    sweep : batch sizes at which the last checkpoint of each followed model is measured again
    """

    name: str
    models: tuple[str, ...]
    followed: tuple[str, ...]
    training_steps: int
    revisions: tuple[str, ...]
    batches: int
    batch_size: int
    length: int
    steps: int
    sweep: tuple[int, ...]
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.published:
            return
        for model in (*self.models, *self.followed):
            one_of("model", model, suites.MINI)
        steps = {f"step{s}" for s in suites.checkpoint_steps(self.training_steps)}
        absent = [r for r in self.revisions if r not in steps]
        if absent or not self.revisions:
            count = self.training_steps
            raise ValueError(f"revisions {absent} are no checkpoints of {count} steps")

    @property
    def published(self) -> bool:
        return self.training_steps == 0

    @property
    def last(self) -> str:
        return self.revisions[-1]

    def corpus(self, model: str) -> str:
        """The text of a model: its own, of a published one the text that this package carries."""
        return "embedded" if self.published else suites.MINI[model].corpus

    def runs(self) -> Iterator[RunSpec]:
        """Every run of the protocol, in the order in which it is made."""
        shared = ("batches", "batch_size", "length", "steps", "seed", "device")
        same = {name: getattr(self, name) for name in shared}
        base = RunSpec(self.models[0], (self.last,), **same)
        for model in self.models:
            here = replace(base, model=model, corpus=self.corpus(model))
            if model not in self.followed:
                yield replace(here, revisions=self.revisions[:1], starts=("error",))
                yield replace(here, starts=("error", "ones"))
                continue
            yield replace(here, revisions=self.revisions, starts=TRACKED)
            yield replace(here, starts=("signs",))
            yield replace(here, targets="shuffled", starts=("error",))
            for size in self.sweep:
                fewer = max(2, math.ceil(self.batches * self.batch_size / size))
                depth = min(self.steps, size * self.length)
                yield replace(here, batches=fewer, batch_size=size, steps=depth, starts=("error",))


MINI = Protocol(
    name="mini",
    models=("mini-0.4m", "mini-1.3m", "mini-4.2m"),
    followed=("mini-1.3m",),
    training_steps=512,
    revisions=tuple(f"step{s}" for s in (0, 16, 64, 128, 256, 512)),
    batches=5,
    batch_size=2,
    length=128,
    steps=50,
    sweep=(1, 4, 8),
)
PYTHIA = Protocol(
    name="pythia-shapes",
    models=("pythia-14m", "pythia-70m"),
    followed=("pythia-14m", "pythia-70m"),
    training_steps=8000,
    revisions=tuple(f"step{s}" for s in (0, 8, 64, 256, 512, 1000, 2000, 4000, 8000)),
    batches=50,
    batch_size=4,
    length=128,
    steps=100,
    sweep=(1, 2, 8, 16),
    device="cuda",
)
# The paper's own checkpoints (its figures 1 to 3) with the controls; step 0 is the untrained null.
PUBLISHED = Protocol(
    name="pythia",
    models=("EleutherAI/pythia-70m", "EleutherAI/pythia-410m"),
    followed=("EleutherAI/pythia-70m", "EleutherAI/pythia-410m"),
    training_steps=0,
    revisions=tuple(f"step{s}" for s in (0, 1000, 2000, 4000, 8000)),
    batches=50,
    batch_size=4,
    length=128,
    steps=100,
    sweep=(1, 2, 8, 16),
)
SMALL = replace(
    PUBLISHED,
    name="pythia-small",
    models=PUBLISHED.models[:1],
    followed=PUBLISHED.models[:1],
    batches=16,
    sweep=(),
)

PROTOCOLS = {p.name: p for p in (MINI, PYTHIA, PUBLISHED, SMALL)}


@dataclass(frozen=True)
class Cell:
    """One averaged profile with what it was measured on.

    Attributes
    ----------
    start : as in `runs.STARTS`, or ``"frozen"``: e at the checkpoint before, decayed in place to
        the energy of this one
    rows, steps : T and m
    loss, loss_sem : nats per token, mean over batches and its standard error
    ones_share : share of the energy ½⟨e, e⟩ that the constant vector carries, ⟨e⟩²/⟨e²⟩
    top : largest Ritz value, mean over batches like `ones_share`
    profile : on `SHELLS`
    medians, frontiers : per batch the λ below which 50 % and 99 % of its energy lies
    """

    model: str
    revision: str
    start: str
    targets: str
    rows: int
    steps: int
    loss: float
    loss_sem: float
    ones_share: float
    top: float
    profile: AveragedProfile
    medians: tuple[float, ...]
    frontiers: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "profile": self.profile.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cell:
        lists = {key: tuple(record[key]) for key in ("medians", "frontiers")}
        return cls(**{**record, **lists, "profile": AveragedProfile.from_json(record["profile"])})


def train(
    protocol: Protocol, *, cache: Path | str | None = None, progress: suites.Progress | None = None
) -> None:
    """Train the protocol's models, each with its own recipe, unless they are there already."""
    for model in () if protocol.published else protocol.models:
        corpus = suites.of_suite(model, cache=cache)
        steps, device = protocol.training_steps, protocol.device
        suites.train(model, corpus, steps=steps, device=device, cache=cache, progress=progress)


def measure(
    protocol: Protocol,
    *,
    resume: bool = True,
    cache: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Cell]:
    """Run every cell of a protocol. With `resume`, batches measured before are read.

    Cost: for each followed model, revisions · batches · 4 start vectors · m products, and about as
    much again for the controls. Call `train` first.
    """
    cells: list[Cell] = []
    specs = list(protocol.runs())
    done, total = 0, sum(spec.batches * len(spec.revisions) for spec in specs)
    # to open a model or a text takes seconds
    models = {name: open_model(name, cache=cache) for name in protocol.models}
    by_text = {protocol.corpus(name): name for name in protocol.models}
    texts = (
        {}  # each with the tokenizer of its model
        if protocol.published
        else {text: suites.of_suite(name, cache=cache) for text, name in by_text.items()}
    )
    for spec in specs:

        def advance(_: int, __: int, what: str, model: str = spec.model) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total, f"{model} {what}")

        how: dict[str, Any] = {"model": models[spec.model], "corpus": texts.get(spec.corpus)}
        result = shell_run(spec, resume=resume, progress=advance, cache=cache, **how)
        for revision in result.revisions:
            for start in spec.starts:
                profiles = result.profiles(revision, start, SHELLS)
                cells.append(_cell(result, revision, start, profiles))
        for before, after in pairwise(result.revisions):  # none where a run has one checkpoint
            cells.append(_cell(result, after, FROZEN, _decayed(result, before, after)))
    return cells


def _decayed(result: RunResult, before: str, after: str) -> list[ShellProfile]:
    """Each batch's profile at `after`, had M stood still since `before` (c0 = 0)."""
    profiles = []
    for early, late in zip(result.measures(before), result.measures(after), strict=True):
        kept = 0.5 * float(early.weights[early.nodes <= early.floor].sum())
        energy = min(0.5 * late.mass, 0.5 * early.mass)  # a frozen kernel cannot gain energy
        time = nulls.fit_frozen_kernel(early, energy) if energy > kept else math.inf
        profiles.append(nulls.frozen_kernel(early, min(time, 1e6 / early.nodes[-1]), SHELLS))
    return profiles


def _cell(result: RunResult, revision: str, start: str, profiles: list[ShellProfile]) -> Cell:
    spec, losses = result.spec, result.losses(revision)
    stats = [statistics(profile) for profile in profiles]
    sized = "error" if "error" in spec.starts else "signs"  # signs leave ⟨e, e⟩ as it is
    half_square = np.array([0.5 * measure.mass for measure in result.measures(revision, sized)])
    tops = [measure.nodes[-1] for measure in result.measures(revision, spec.starts[0])]
    return Cell(
        model=spec.model,
        revision=revision,
        start=start,
        targets=spec.targets,
        rows=spec.batch_size * spec.length,
        steps=spec.steps,
        loss=float(losses.mean()),
        loss_sem=float(losses.std(ddof=1) / np.sqrt(losses.size)) if losses.size > 1 else 0.0,
        ones_share=float(np.mean(0.5 * losses**2 / half_square)),
        top=float(np.mean(tops)),
        profile=average(profiles),
        medians=tuple(one.median for one in stats),
        frontiers=tuple(one.frontier for one in stats),
    )


def curves(protocol: Protocol, *, cache: Path | str | None = None) -> dict[str, Any]:
    """Return for every model trained here its parameters, corpus, recipe and held-out losses."""
    records = {}
    for model in () if protocol.published else protocol.models:
        corpus, steps = suites.of_suite(model, cache=cache), protocol.training_steps
        record = suites.locate(model, corpus, steps=steps, cache=cache).training()
        records[model] = {k: record[k] for k in ("parameters", "corpus", "recipe", "heldout")}
    return records


def table(cells: list[Cell]) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows for a terminal: where each profile stands."""
    columns = ["model", "revision", "start", "targets", "T"]
    columns += ["loss", "energy", "median", "frontier", "one peak"]
    rows: list[list[object]] = []
    for cell in cells:
        stats = statistics(cell.profile)
        numbers = (cell.loss, cell.profile.total, stats.median, stats.frontier)
        where = [cell.model, cell.revision, cell.start, cell.targets, cell.rows]
        peak = "yes" if stats.unimodal else "no"
        rows.append([*where, *(f"{x:.4g}" for x in numbers), peak])
    return columns, rows


def pick(cells: list[Cell], **wanted: Any) -> Cell:
    """Return the one cell with these attributes: ``pick(cells, model=…, start="error")``."""
    chosen = [c for c in cells if all(getattr(c, key) == value for key, value in wanted.items())]
    if len(chosen) != 1:
        names = "model, revision, start, targets, rows"
        raise ValueError(f"{len(chosen)} cells have {wanted}; name more of {names}")
    return chosen[0]
