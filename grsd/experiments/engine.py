"""Experiments too long for a page: lists of independent pieces, each measured once, stored, and reduced to one result.

An `Experiment` says which parameters it has, which pieces they mean, how one piece is measured and how all of them become
the data of a `grsd.results.Result`. `run` does the rest: it parses options, skips pieces that were measured before by the
same code, and writes every new one whole or not at all. `grsd experiment NAME` is this function on the command line, and
its stored results can be recomputed by `grsd results recompute`.

To add one, write a module with a constant `EXPERIMENT` and name it in `MODULES`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from grsd import results
from grsd.scale import cache_dir, pick

__all__ = ["MODULES", "Experiment", "Outcome", "find", "parameters", "run"]

MODULES: dict[str, str] = {
    "drift": "grsd.experiments.drift",
    "mup-coords": "grsd.experiments.mup_coords",
    "mup-norms": "grsd.experiments.mup_norms",
    "products": "grsd.experiments.products",
    "shift": "grsd.experiments.shift",
    "tour": "grsd.experiments.tour",
    "transfer": "grsd.experiments.transfer",
}

Piece = dict[str, Any]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Attributes
    ----------
    name : str
    summary : str
        One line for a list.
    parameters : type
        A frozen dataclass with a default for every field; fields are int, float, str or tuples of one of them.
    pieces : callable
        Parameters → one dict of JSON values per piece, which holds everything that its measurement depends on.
    measure : callable
        One piece → its data (JSON values, finite numbers).
    reduce : callable
        (parameters, pieces, their data) → the data of the result.
    table : callable
        The result's data → columns and rows for a terminal.
    seeds : callable
        Parameters → every seed used.
    sources : tuple of modules
        The code that a piece's data depends on. A change there makes every piece anew.
    gpu : mapping
        Parameters that replace the defaults when GRSD_SCALE is gpu: sizes, never methods.
    """

    name: str
    summary: str
    parameters: type[Any]
    pieces: Callable[[Any], list[Piece]]
    measure: Callable[[Piece], dict[str, Any]]
    reduce: Callable[[Any, list[Piece], list[dict[str, Any]]], dict[str, Any]]
    table: Callable[[dict[str, Any]], tuple[list[str], list[list[object]]]]
    seeds: Callable[[Any], Sequence[int]]
    sources: tuple[ModuleType, ...]
    gpu: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The data of an experiment with the parameters and the command that make it again."""

    experiment: Experiment
    parameters: Any
    data: dict[str, Any]

    def argv(self) -> list[str]:
        """Arguments of `grsd`, complete on any scale."""
        plain = self.experiment.parameters()
        words = ["experiment", self.experiment.name]
        for one in fields(self.parameters):
            value = getattr(self.parameters, one.name)
            if value != getattr(plain, one.name) or one.name in self.experiment.gpu:
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words += ["--option", f"{one.name}={shown}"]
        return words

    def result(self, name: str) -> results.Result:
        """The outcome as a result called `name`, with its provenance."""
        seeds = self.experiment.seeds(self.parameters)
        return results.Result(
            name, self.data, results.provenance(self.argv(), asdict(self.parameters), list(seeds))
        )


def find(name: str) -> Experiment:
    """Return one experiment.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in MODULES:
        raise ValueError(f"unknown experiment {name!r}: expected one of {', '.join(MODULES)}")
    found: Experiment = importlib.import_module(MODULES[name]).EXPERIMENT
    return found


def _parse(name: str, kind: Any, text: str) -> Any:
    """`text` as a value of type `kind`: a number, a word, or several between commas."""
    args = typing.get_args(kind)
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(args[0](part.strip()) for part in text.split(",") if part.strip())
        return kind(text)
    except ValueError:
        wanted = f"{args[0].__name__}s between commas" if args else kind.__name__
        raise ValueError(f"option {name}={text!r}: expected {wanted}") from None


def parameters(experiment: Experiment, options: Sequence[str] = ()) -> Any:
    """Return the parameters that options of the form ``name=value`` mean, on the present scale.

    Raises
    ------
    ValueError
        An option that does not exist, has no ``=``, or whose value cannot be read.
    """
    kinds = typing.get_type_hints(experiment.parameters)
    chosen: dict[str, Any] = dict(pick(cpu={}, gpu=dict(experiment.gpu)))
    for option in options:
        name, sign, text = option.partition("=")
        name = name.strip().replace("-", "_")
        if not sign:
            raise ValueError(f"option {option!r} has no value; write NAME=VALUE")
        if name not in kinds:
            raise ValueError(
                f"{experiment.name} has no option {name!r}: expected one of {', '.join(kinds)}"
            )
        chosen[name] = _parse(name, kinds[name], text.strip())
    return experiment.parameters(**chosen)


def _code(experiment: Experiment) -> str:
    digest = hashlib.sha256()
    for module in experiment.sources:
        assert module.__file__ is not None
        digest.update(module.__name__.encode() + b"\0" + Path(module.__file__).read_bytes() + b"\0")
    return digest.hexdigest()


def _stored(path: Path, piece: Piece) -> dict[str, Any] | None:
    """The data of a piece that was measured before; None if there is none or the file is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("piece") != json.loads(json.dumps(piece)):
        return None
    data = record.get("data")
    return data if isinstance(data, dict) else None


def run(
    experiment: Experiment,
    asked: Any,
    *,
    resume: bool = True,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Measure every piece and reduce them to one outcome.

    Parameters
    ----------
    experiment : Experiment
    asked : object
        An instance of `experiment.parameters`.
    resume : bool
        Use pieces that the same code measured before; False measures all again and replaces them.
    cache : path, optional
        Default `grsd.results.cache_dir`.
    progress : callable, optional
        Called with (pieces done, pieces in all, description).

    Notes
    -----
    A run that was killed loses the piece it was at. Numbers go through JSON, which keeps float64 exactly, so that a resumed
    run equals an uninterrupted one bit for bit.
    """
    if not isinstance(asked, experiment.parameters):
        raise TypeError(
            f"{experiment.name} takes {experiment.parameters.__name__}, not {type(asked).__name__}"
        )
    root = (Path(cache) if cache is not None else cache_dir()) / "experiments" / experiment.name
    code, pieces, data = _code(experiment), experiment.pieces(asked), []
    for index, piece in enumerate(pieces):
        words = results.dumps({"code": code, "piece": piece})
        path = root / f"{hashlib.sha256(words.encode()).hexdigest()[:24]}.json"
        found = _stored(path, piece) if resume else None
        if found is None:
            text = results.dumps(
                {"piece": piece, "data": experiment.measure(piece)}, where=f"piece {index}"
            )
            results.atomic_write(path, text)
            found = json.loads(text)["data"]
        data.append(found)
        if progress is not None:
            progress(
                index + 1,
                len(pieces),
                " ".join(f"{k}={v}" for k, v in piece.items() if k in ("n", "seed")),
            )
    return Outcome(experiment, asked, experiment.reduce(asked, pieces, data))


def rounded(value: Any, digits: int = 5) -> Any:
    """Return `value` with every float rounded to so many significant digits: what a stored result needs to hold."""
    if isinstance(value, float):
        return value if value == 0 or not math.isfinite(value) else float(f"{value:.{digits - 1}e}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return rounded(value.tolist(), digits) if hasattr(value, "tolist") else value
