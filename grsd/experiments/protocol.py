"""Section 7 of 2512.10427 as a list of runs: the paper's measurements, each with the controls it lacks.

A protocol is data: which nets, which checkpoints, how many batches. `measure` trains what is missing, runs every cell
through `grsd.lab.runs.run` (so a killed protocol resumes) and returns one averaged profile per cell. The chapter on language
models shows the cells of a protocol that ran on the reader's machine beside those of a stored one that ran on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grsd.lab.checkpoints import suites
from grsd.lab.runs import run
from grsd.spectrum import AveragedProfile, LogShells, ShellProfile, average, nulls, statistics

# Shells of one octave at whole powers of two, wide enough for every net of the suite: the same in all cells.
SHELLS = LogShells(np.power(2.0, np.arange(-24, 15)))
TRACKED = ("error", "ones", "random")  # start vectors at every checkpoint of a followed model
FROZEN = "frozen"  # a cell's start when it is the null of no transport: see `_decayed`


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes
    ----------
    name : str
    models : tuple of str
        Names in `suites.MINI`, by size. All are compared at their last checkpoint and untrained.
    followed : tuple of str
        The models that are followed over `revisions` from three start vectors; at the end with random signs and with
        shuffled targets too.
    training_steps : int
    revisions : tuple of str
    batches, batch_size, length, steps : int
        As in `run.RunSpec`; the paper has 50 batches of 4 × 128 tokens.
    sweep : tuple of int
        Batch sizes at which the last checkpoint of each followed model is measured again (T = batch size · length).
    device, seed
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
        unknown = [m for m in (*self.models, *self.followed) if m not in suites.MINI]
        if unknown:
            raise ValueError(f"unknown models {unknown}: expected some of {', '.join(suites.MINI)}")
        steps = {f"step{s}" for s in suites.checkpoint_steps(self.training_steps)}
        absent = [r for r in self.revisions if r not in steps]
        if absent or not self.revisions:
            raise ValueError(
                f"revisions {absent} are no checkpoints of {self.training_steps} steps"
            )

    @property
    def last(self) -> str:
        return self.revisions[-1]

    def runs(self) -> Iterator[run.RunSpec]:
        """Every run of the protocol, in the order in which it is made."""
        base = run.RunSpec(
            model=self.models[0],
            revisions=(self.last,),
            batches=self.batches,
            batch_size=self.batch_size,
            length=self.length,
            steps=self.steps,
            seed=self.seed,
            device=self.device,
        )
        for model in self.models:
            here = replace(base, model=model, corpus=suites.MINI[model].corpus)
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
    revisions=("step0", "step16", "step64", "step128", "step256", "step512"),
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
    revisions=(
        "step0",
        "step8",
        "step64",
        "step256",
        "step512",
        "step1000",
        "step2000",
        "step4000",
        "step8000",
    ),
    batches=50,
    batch_size=4,
    length=128,
    steps=100,
    sweep=(1, 2, 8, 16),
    device="cuda",
)

PROTOCOLS = {p.name: p for p in (MINI, PYTHIA)}


@dataclass(frozen=True)
class Cell:
    """One averaged profile with what it was measured on.

    Attributes
    ----------
    model, revision, start, targets : str
        `start` is as in `run.STARTS`, or ``"frozen"``: e at the checkpoint before, decayed in place to the energy of this one.
    rows, steps : int, T and m.
    loss, loss_sem : float, nats per token: mean over batches and its standard error.
    ones_share : float, share of the energy ½⟨e, e⟩ that the constant vector carries, ⟨e⟩²/⟨e²⟩ (mean over batches).
    top : float, largest Ritz value, mean over batches.
    profile : AveragedProfile, on `SHELLS`.
    medians, frontiers : tuple of float, one per batch: λ below which 50 % and 99 % of that batch's energy lies.
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
        return {**asdict(replace(self, profile=None)), "profile": self.profile.to_json()}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Cell:
        lists = {key: tuple(record[key]) for key in ("medians", "frontiers")}
        return cls(**{**record, **lists, "profile": AveragedProfile.from_json(record["profile"])})


def train(
    protocol: Protocol, *, cache: Path | str | None = None, progress: suites.Progress | None = None
) -> None:
    """Train the protocol's models, each with its own recipe; those that are there already cost nothing."""
    for model in protocol.models:
        suites.train(
            model,
            suites.of_suite(model, cache=cache),
            steps=protocol.training_steps,
            device=protocol.device,
            cache=cache,
            progress=progress,
        )


def measure(
    protocol: Protocol,
    *,
    resume: bool = True,
    cache: Path | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Cell]:
    """Run every cell of a protocol and return them. With `resume`, batches measured before are read from the cache.

    Cost: for each followed model, revisions · batches · 4 start vectors · m products, and about as much again for the
    controls. Call `train` first.
    """
    cells: list[Cell] = []
    specs = list(protocol.runs())
    total = sum(spec.batches * len(spec.revisions) for spec in specs)
    done = 0
    texts = {suites.MINI[m].corpus: m for m in protocol.models}
    opened = {
        name: suites.of_suite(model, cache=cache) for name, model in texts.items()
    }  # reading takes seconds
    for spec in specs:
        corpus = opened[spec.corpus]

        def advance(_: int, __: int, what: str, spec: run.RunSpec = spec) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total, f"{spec.model} {what}")

        result = run.shell_run(spec, resume=resume, cache=cache, corpus=corpus, progress=advance)
        for revision in result.revisions:
            for start in spec.starts:
                profiles = result.profiles(revision, start, SHELLS)
                cells.append(_cell(result, revision, start, profiles))
        for before, after in pairwise(result.revisions):  # none where a run has one checkpoint
            cells.append(_cell(result, after, FROZEN, _decayed(result, before, after)))
    return cells


def _decayed(result: run.RunResult, before: str, after: str) -> list[ShellProfile]:
    """Each batch's profile at `after` if M had stood still since `before` (c0 = 0) and only its total were known."""
    profiles = []
    for early, late in zip(result.measures(before), result.measures(after), strict=True):
        kept = 0.5 * float(early.weights[early.nodes <= early.floor].sum())
        energy = min(0.5 * late.mass, 0.5 * early.mass)  # a frozen kernel cannot gain energy
        time = nulls.fit_frozen_kernel(early, energy) if energy > kept else math.inf
        profiles.append(nulls.frozen_kernel(early, min(time, 1e6 / early.nodes[-1]), SHELLS))
    return profiles


def _cell(result: run.RunResult, revision: str, start: str, profiles: list[ShellProfile]) -> Cell:
    spec, losses = result.spec, result.losses(revision)
    stats = [statistics(p) for p in profiles]
    sized = "error" if "error" in spec.starts else "signs"  # signs leave ⟨e, e⟩ as it is
    half_square = np.array([0.5 * mu.mass for mu in result.measures(revision, sized)])
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
        top=float(np.mean([mu.nodes[-1] for mu in result.measures(revision, spec.starts[0])])),
        profile=average(profiles),
        medians=tuple(s.median for s in stats),
        frontiers=tuple(s.frontier for s in stats),
    )


def curves(protocol: Protocol, *, cache: Path | str | None = None) -> dict[str, Any]:
    """Return for every model its parameter count, corpus, recipe and held-out loss (revision → nats per token)."""
    found = {}
    for model in protocol.models:
        suite = suites.locate(
            model, suites.of_suite(model, cache=cache), steps=protocol.training_steps, cache=cache
        )
        record = suite.training()
        found[model] = {key: record[key] for key in ("parameters", "corpus", "recipe", "heldout")}
    return found


def table(cells: list[Cell]) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows for a terminal: where each profile stands."""
    columns = [
        "model",
        "revision",
        "start",
        "targets",
        "T",
        "loss",
        "energy",
        "median",
        "frontier",
        "one peak",
    ]
    rows: list[list[object]] = []
    for c in cells:
        s = statistics(c.profile)
        numbers = [f"{x:.4g}" for x in (c.loss, c.profile.total, s.median, s.frontier)]
        rows.append(
            [
                c.model,
                c.revision,
                c.start,
                c.targets,
                c.rows,
                *numbers,
                "yes" if s.unimodal else "no",
            ]
        )
    return columns, rows


def pick(cells: list[Cell], **wanted: Any) -> Cell:
    """Return the one cell with these attributes, e.g. ``pick(cells, model=…, revision=…, start="error", rows=512)``."""
    found = [c for c in cells if all(getattr(c, key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} cells have {wanted}; name more of model, revision, start, targets, rows"
        )
    return found[0]
