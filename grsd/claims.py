"""The ledger of claims: what is stated, what holds instead, and the evidence a run recorded.

The ledger is YAML, one file per room in `grsd/data/claims`. A chapter checks a claim with visible
assertions and then calls `record`; the book's claims page is made from `load` and `evidence`, and a
claim that `missing` still lists fails the build.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from grsd import __version__, checks
from grsd.results import atomic_write, dumps
from grsd.scale import evidence_dir, scale, site


class Verdict(NamedTuple):
    """How a verdict is shown, and what it says."""

    symbol: str  # one character of text, never an emoji, and never the only carrier of the meaning
    word: str
    meaning: str


VERDICTS: dict[str, Verdict] = {
    name: Verdict(symbol, name.replace("-", " "), meaning)
    for name, symbol, meaning in (
        ("holds", "✓", "True as stated, and checked here."),
        ("holds-if", "✓*", "True under an assumption that the paper leaves out; we state it."),
        (
            "corrected",
            "≠",
            "A slip: the printed statement was measured to fail, the corrected one to hold.",
        ),
        ("refuted", "✗", "False: a counterexample is shown."),
        ("empty", "∅", "True, but it holds of everything and so says nothing."),
        ("reproduced", "↻", "An experiment of the paper, run again with the same outcome."),
        ("not-reproduced", "↛", "An experiment of the paper, run again with another outcome."),
        ("not-discriminating", "≈", "Seen, but a null model without the effect gives the same."),
        ("untested", "?", "Not checked here; the reason is given."),
    )
}

PAPERS: dict[str, str] = {
    "origin": "Renormalizable Spectral-Shell Dynamics (arXiv:2512.10427)",
    "renorm": "When Does Learning Renormalize? (arXiv:2512.18209)",
    "mup": "Spectral Condition for Width-Depth μP (arXiv:2603.00541)",
    "grsd": "this book",
}
OWN = "grsd"  # this book's own statements are checked as the papers' are, and counted apart

# A number that a check produced, a short text, or several of either under names of their own.
Value = float | int | str
Measured = Value | dict[str, Value]

_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_CHAPTER = re.compile(r"[a-z0-9-]+(?:/[a-z0-9-]+)+")
_AUDIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+'/()-]*")  # C54, L1.3, T1+, III/C2, A.3.5


@dataclass(frozen=True)
class Claim:
    """One entry of the ledger; mathematics in its texts is TeX between dollars."""

    id: str  #: "<paper>.<slug>", never reused for another statement
    paper: str  #: a key of `PAPERS`
    locator: str  #: where in the paper the statement stands
    statement: str  #: what the paper says, in our words
    verdict: str  #: a key of `VERDICTS`
    corrected: str = ""  #: what holds instead; required for "corrected" and "refuted"
    assumption: str = ""  #: what must be added ("holds-if"), or why a claim is "untested"
    chapter: str = ""  #: page of the book that settles it, "room/page"; empty only if untested
    audit: tuple[str, ...] = ()  #: row ids of the prior audit
    measured: str = ""  #: what the chapter measures
    bound: str = ""  #: the rule that the measured numbers must satisfy, in words

    def __post_init__(self) -> None:
        if fault := next(self._faults(), None):
            raise ValueError(f"claim {self.id!r}: {fault}")

    @property
    def name(self) -> str:
        """What the claim is called in a list: the words of its id."""
        return self.id.partition(".")[2].replace("-", " ")

    def _faults(self) -> Iterator[str]:
        """What is wrong, in words, first things first; a rule may rely on those above it."""
        texts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "audit"}
        for name, value in texts.items():
            if not isinstance(value, str):
                yield f"{name} is {value!r}; expected text"
        for name, known in (("paper", PAPERS), ("verdict", VERDICTS)):
            if texts[name] not in known:
                yield f"unknown {name} {texts[name]!r}; expected one of {', '.join(known)}"
        paper, _, slug = self.id.partition(".")
        if paper != self.paper or not _ID.fullmatch(slug):
            yield f"its id must read '{self.paper}.some-words' in lower case"
        if self.chapter and not _CHAPTER.fullmatch(self.chapter):
            yield f"chapter {self.chapter!r} must read 'room/page', without 'book' and ending"
        rows = self.audit if isinstance(self.audit, tuple) else (None,)
        if not all(isinstance(row, str) and _AUDIT.fullmatch(row) for row in rows):
            yield f"audit is {self.audit!r}; expected a list of row ids such as C54"
        needed = ["locator", "statement"]
        if self.verdict != "untested":
            needed += ["chapter", "measured", "bound"]
        if self.verdict in ("corrected", "refuted"):
            needed.append("corrected")
        if self.verdict in ("holds-if", "untested"):
            needed.append("assumption")
        for name in needed:
            if not texts[name].strip():
                yield f"{name} is empty; the verdict {self.verdict!r} needs it"


@dataclass(frozen=True)
class Evidence:
    """What a run found for one claim; id, verdict and chapter as in the ledger of that time."""

    id: str
    verdict: str
    chapter: str
    measured: Measured  #: the numbers of the check
    bound: Measured | None  #: what they were compared with
    note: str  #: one sentence for the reader of the claims page
    scale: str  #: `GRSD_SCALE`
    version: str  #: of grsd
    date: str  #: UTC time of the record

    def _repr_markdown_(self) -> str:
        """One line under the cell that ends with a record; the numbers are on the claims page."""
        return f"Recorded: `{self.id}`, {self.verdict}."


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"the key {key!r} stands twice in one entry {node.start_mark}")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Iterator[Claim]:
    """The claims of one file."""
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as a ledger: {error}") from error
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not isinstance(entries, list):
            raise ValueError(f"{path.name} holds {entry!r}; expected a list of claims with fields")
        filled = {name: value for name, value in entry.items() if value is not None}
        for name, value in filled.items():
            if isinstance(value, str):
                filled[name] = value.strip()
        if isinstance(filled.get("audit"), list):
            filled["audit"] = tuple(filled["audit"])
        try:
            yield Claim(**filled)
        except TypeError as error:  # a field that is missing or unknown
            raise ValueError(f"{path.name}: claim {entry.get('id')!r}: {error}") from error


def _load(place: Path) -> list[Claim]:
    paths = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    if not paths or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"no ledger at {place}; expected a YAML file or a folder of them")
    home: dict[str, str] = {}
    claims: list[Claim] = []
    for path in paths:
        for claim in _read(path):
            if claim.id in home:
                raise ValueError(
                    f"{path.name}: the id {claim.id!r} stands already in {home[claim.id]}"
                )
            home[claim.id] = path.name
            claims.append(claim)
    return claims


@cache
def _packaged() -> tuple[Claim, ...]:
    return tuple(_load(Path(__file__).parent / "data" / "claims"))


def load(path: str | os.PathLike[str] | None = None) -> list[Claim]:
    """Every claim of a YAML file or a folder of them, by default the package's own ledger.

    Raises ValueError, which quotes the fault, on an unknown verdict, field or paper, an id given
    twice, or a missing field.
    """
    return list(_packaged()) if path is None else _load(Path(path))


def find(claim_id: str) -> Claim:
    """The claim of this id; a ValueError names the nearest ids when there is none."""
    ids = {claim.id: claim for claim in load()}
    if claim_id in ids:
        return ids[claim_id]
    near = get_close_matches(str(claim_id), ids, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"the ledger has no claim {claim_id!r}{hint}")


def link(chapter: str, text: str = "") -> str:
    """A Markdown link to a chapter: within the book, or to its published page from a notebook."""
    name = text or chapter.rpartition("/")[2]
    return f"[{name}]({site()}/book/{chapter}.html)" if site() else f"[{name}](../{chapter}.md)"


def bullets(*ids: str) -> str:
    """Claims as a Markdown list: verdict, place, chapter, statement, and what holds instead."""

    def escaped(text: str) -> str:
        """Brackets and lines that Markdown would read; what stands between dollars is TeX."""
        parts = text.split("$")
        parts[::2] = [part.replace("_", r"\_").replace("[", r"\[") for part in parts[::2]]
        return "$".join(parts)

    lines = []
    for claim in map(find, ids):
        verdict, more = VERDICTS[claim.verdict], claim.assumption or claim.corrected
        lead = "Needs" if claim.assumption else "Note" if claim.verdict == "holds" else "Instead"
        line = f"- {verdict.symbol} **{verdict.word}** · {escaped(claim.locator)}"
        line += f" · {link(claim.chapter)}" if claim.chapter else ""
        line += f". {escaped(claim.statement)}" + (f" *{lead}:* {escaped(more)}" if more else "")
        lines.append(line)
    return "\n".join(lines)


def _value(value: Any, where: str) -> Value:
    """A number or text that can settle a claim."""
    if hasattr(value, "item"):
        value = value.item()  # a numpy or torch scalar
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where} is empty text")
        return value
    if not isinstance(value, int | float):
        wanted = "a number, a text or a dict of them"
        raise TypeError(f"{where} is a {type(value).__name__}; expected {wanted}")
    checks.finite(where, value, "a number that is not finite settles nothing")
    return int(value) if isinstance(value, int) else value


def _measured(value: Any, where: str) -> Measured:
    if not isinstance(value, Mapping):
        return _value(value, where)
    if not value:
        raise ValueError(f"{where} is an empty dict")
    return {str(key): _value(item, f"{where}[{key!r}]") for key, item in value.items()}


def record(
    claim_id: str,
    *,
    measured: Measured,
    bound: Measured | None = None,
    note: str = "",
    verdict: str | None = None,
) -> Evidence:
    """Record what a check found for a claim; call it after the assertions.

    The evidence is written, whole or not at all, as `<evidence_dir()>/<claim_id>.json`.

    Parameters
    ----------
    measured, bound : number, text, or dict of them
        What was found, finite, and what it was compared with. Numpy and torch scalars are numbers.
    note : str
        One sentence for the claims page.
    verdict : str, optional
        What the check concluded. A ValueError if it is not the ledger's, or that is untested.
    """
    claim = find(claim_id)
    if claim.verdict == "untested":
        raise ValueError(f"{claim_id!r} is untested in the ledger; give it a verdict first")
    if verdict not in (None, claim.verdict):
        told = f"the check concludes {verdict!r}, but the ledger says {claim.verdict!r}"
        raise ValueError(f"{claim_id!r}: {told}; correct whichever is wrong")
    made = Evidence(
        id=claim.id,
        verdict=claim.verdict,
        chapter=claim.chapter,
        measured=_measured(measured, f"{claim_id}: measured"),
        bound=None if bound is None else _measured(bound, f"{claim_id}: bound"),
        note=note.strip(),
        scale=scale(),
        version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    atomic_write(_path(claim.id), dumps(asdict(made), where=claim_id, sort_keys=False))
    return made


def _path(claim_id: str) -> Path:
    return evidence_dir() / f"{claim_id}.json"


def evidence(claim_id: str) -> Evidence | None:
    """The evidence recorded for a claim, or None. A damaged file is a ValueError.

    Evidence under another verdict than the ledger's present one counts as none: the check that made
    it settled something else.
    """
    claim = find(claim_id)
    path = _path(claim.id)
    if not path.is_file():
        return None
    try:
        recorded = Evidence(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged ({error}); run its chapter again") from error
    return recorded if (recorded.id, recorded.verdict) == (claim.id, claim.verdict) else None


def missing() -> list[Claim]:
    """Claims with a verdict other than untested for which no evidence is recorded."""
    return [claim for claim in load() if claim.verdict != "untested" and evidence(claim.id) is None]
