"""Experiments too long for a page: independent pieces, each measured once, reduced to one result.

An `Experiment` says which parameters it has, which pieces they mean, how one piece is measured and
how all of them become the data of a `grsd.results.Result`. `run` does the rest: pieces that were
measured before by the same code are read from the store, and every new one is kept whole or not at
all. `grsd experiment NAME` is this function on the command line; `grsd results recompute` makes its
stored results again.

To add one, write a module of this folder with a constant `EXPERIMENT`, and its name in `NAMES`. The
first paragraph of its docstring, after a colon, is its summary.
"""

from __future__ import annotations

import importlib
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from grsd import checks, results, statistics
from grsd.pieces import Store, code
from grsd.scale import cache_dir, pick

# "some-name" is the module some_name.py of this folder
NAMES = (
    "dilation",
    "drift",
    "field",
    "figures-3-6",
    "foresight",
    "frozen-features",
    "gpt2-coords",
    "mup-coords",
    "mup-families",
    "mup-norms",
    "products",
    "published",
    "scheduled",
    "shift",
    "soap-epsilon",
    "tour",
    "transfer",
    "twins",
)

Piece = dict[str, Any]  # what a measurement depends on, in JSON values
Data = dict[str, Any]  # what it found, in JSON values and finite numbers
Rows = tuple[list[str], list[list[object]]]  # columns and rows of a table
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Attributes
    ----------
    parameters
        A frozen dataclass in the experiment's module, with a default for every field; fields are
        int, float, str or tuples of one of them. `seeds` says that seeds 0, 1, … are used.
    pieces : parameters → one dict per piece
        It holds all that its measurement depends on beside the code that the module imports.
    measure : one piece → its data
    reduce : (parameters, pieces, their data) → the data of the result
    table : the result's data → columns and rows for a terminal
    gpu : parameters that replace the defaults when GRSD_SCALE is gpu: sizes, never methods
    """

    parameters: type[Any]
    pieces: Callable[[Any], list[Piece]]
    measure: Callable[[Piece], Data]
    reduce: Callable[[Any, list[Piece], list[Data]], Data]
    table: Callable[[Data], Rows]
    gpu: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The module's name, one of `NAMES`."""
        return self.parameters.__module__.rpartition(".")[2].replace("_", "-")

    @property
    def summary(self) -> str:
        """What the first paragraph of the module's docstring says after its colon."""
        paragraph = (sys.modules[self.parameters.__module__].__doc__ or "").partition("\n\n")[0]
        return " ".join(paragraph.split()).partition(": ")[2].rstrip(".")


@dataclass(frozen=True)
class Outcome:
    """The data of an experiment with the parameters and the command that make it again."""

    experiment: Experiment
    parameters: Any
    data: Data

    def argv(self) -> list[str]:
        """Arguments of `grsd`, complete on any scale."""
        default = self.experiment.parameters()
        words = ["experiment", self.experiment.name]
        for name, value in asdict(self.parameters).items():
            if value != getattr(default, name) or name in self.experiment.gpu:
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += ["--option", f"{name}={shown}"]
        return words

    def result(self, name: str) -> results.Result:
        """The outcome as a result called `name`, with its provenance."""
        seeds = list(range(self.parameters.seeds))
        origin = results.provenance(self.argv(), asdict(self.parameters), seeds)
        return results.Result(name, self.data, origin)


def find(name: str) -> Experiment:
    """Return one of the `NAMES`."""
    checks.one_of("experiment", name, NAMES)
    return importlib.import_module(f"grsd.experiments.{name.replace('-', '_')}").EXPERIMENT


def parameters(experiment: Experiment, options: Sequence[str] = ()) -> Any:
    """Return the parameters that options of the form ``name=value`` mean, on the present scale.

    Several values stand between commas. An option that does not exist, has no ``=``, or whose value
    is none of the field's type is a ValueError.
    """
    kinds = typing.get_type_hints(experiment.parameters)
    chosen = pick(cpu={}, gpu=dict(experiment.gpu))
    for option in options:
        name, sign, text = option.partition("=")
        if not sign:
            raise ValueError(f"option {option!r} has no value; write NAME=VALUE")
        name = name.strip().replace("-", "_")
        checks.one_of(f"option of {experiment.name}", name, kinds)
        several = typing.get_args(kinds[name])  # (int, ...) of tuple[int, ...]
        kind = several[0] if several else kinds[name]
        try:
            values = [kind(part.strip()) for part in text.split(",") if part.strip()]
            chosen[name] = tuple(values) if several else kind(text.strip())
        except ValueError:
            wanted = f"{kind.__name__}s between commas" if several else kind.__name__
            raise ValueError(f"option {name} is {text!r}; expected {wanted}") from None
    return experiment.parameters(**chosen)


def run(
    experiment: Experiment,
    asked: Any,
    *,
    resume: bool = True,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Measure every piece and reduce them to one outcome.

    A run that was killed loses the piece it was at. Numbers go through JSON, which keeps float64
    exactly, so that a resumed run equals an uninterrupted one bit for bit. `asked` is an instance
    of `experiment.parameters`. Without `resume` all is measured again and replaces what was there.
    `progress` is called with (pieces done, pieces in all, what of this one differs from others).
    """
    kind = experiment.parameters
    if not isinstance(asked, kind):
        raise TypeError(f"{experiment.name} takes {kind.__name__}, not {type(asked).__name__}")
    store = Store(cache_dir(cache) / "experiments" / experiment.name, code(kind))
    pieces = experiment.pieces(asked)
    named = [k for k, first in pieces[0].items() if any(p.get(k) != first for p in pieces)]
    data = []
    for done, piece in enumerate(pieces, 1):
        data.append(store.get(piece, partial(experiment.measure, piece), resume=resume))
        if progress is not None:
            words = " ".join(f"{k}={_short(piece.get(k))}" for k in named)
            progress(done, len(pieces), words)
    return Outcome(experiment, asked, experiment.reduce(asked, pieces, data))


def _short(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def shared(asked: Any, *but: str) -> Piece:
    """Return the parameters that all pieces have in common: every field but those named."""
    return {f.name: getattr(asked, f.name) for f in fields(asked) if f.name not in but}


def grouped(
    pieces: Sequence[Piece], data: Sequence[Data], *names: str
) -> dict[tuple[Any, ...], list[Data]]:
    """Return the data of pieces that are equal in the fields named, by these fields, in order."""
    groups: dict[tuple[Any, ...], list[Data]] = {}
    for piece, one in zip(pieces, data, strict=True):
        groups.setdefault(tuple(piece[name] for name in names), []).append(one)
    return groups


def intervals(members: Sequence[Data], *names: str) -> Data:
    """Return the means over members (seeds) of the numbers named, with 95 % intervals."""
    return {name: statistics.mean([one[name] for one in members]) for name in names}


def rounded(value: Any, digits: int = 5) -> Any:
    """Return `value` with every float rounded to so many digits, as a stored result holds it."""
    if isinstance(value, float):
        return value if value == 0 or not math.isfinite(value) else float(f"{value:.{digits - 1}e}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return rounded(value.tolist(), digits) if hasattr(value, "tolist") else value
