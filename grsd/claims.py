"""The ledger of claims: what the papers and this book state, what holds instead, and the evidence a run recorded.

The ledger is YAML, one file per room in `grsd/data/claims`. A chapter checks a claim with visible
assertions and then calls `record`; the book's claims page is made from `load` and `evidence`, and a
claim that `missing` still lists fails the build.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from grsd import __version__
from grsd.results import atomic_write, dumps
from grsd.scale import evidence_dir, scale

__all__ = [
    "OWN",
    "PAPERS",
    "VERDICTS",
    "Claim",
    "Evidence",
    "Verdict",
    "bullets",
    "evidence",
    "evidence_dir",
    "find",
    "load",
    "missing",
    "record",
]


class Verdict(NamedTuple):
    """How a verdict is shown, and what it says."""

    symbol: str  # one character of text, never an emoji, and never the only carrier of the meaning
    word: str
    meaning: str


VERDICTS: dict[str, Verdict] = {
    "holds": Verdict("✓", "holds", "True as stated, and checked here."),
    "holds-if": Verdict(
        "✓*", "holds if", "True under an assumption that the paper leaves out; we state it."
    ),
    "corrected": Verdict(
        "≠",
        "corrected",
        "A slip: the printed statement was measured to fail, the corrected one to hold.",
    ),
    "refuted": Verdict("✗", "refuted", "False: a counterexample is shown."),
    "empty": Verdict("∅", "empty", "True, but it holds of everything and so says nothing."),
    "reproduced": Verdict(
        "↻", "reproduced", "An experiment of the paper, run again with the same outcome."
    ),
    "not-reproduced": Verdict(
        "↛", "not reproduced", "An experiment of the paper, run again with another outcome."
    ),
    "not-discriminating": Verdict(
        "≈", "not discriminating", "Seen, but a null model without the effect gives the same."
    ),
    "untested": Verdict("?", "untested", "Not checked here; the reason is given."),
}

PAPERS: dict[str, str] = {
    "origin": "Renormalizable Spectral-Shell Dynamics (arXiv:2512.10427)",
    "renorm": "When Does Learning Renormalize? (arXiv:2512.18209)",
    "mup": "Spectral Condition for Width-Depth μP (arXiv:2603.00541)",
    "grsd": "this book",
}
OWN = (
    "grsd"  # this book's own statements are checked as the papers' are, and counted apart from them
)

# A number that a check produced, a short text, or several of either under names of their own.
Value = float | int | str
Measured = Value | dict[str, Value]

_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_CHAPTER = re.compile(r"[a-z0-9-]+(?:/[a-z0-9-]+)+")
_AUDIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+'/()-]*")  # C54, L1.3, T1+, III/C2, A.3.5


@dataclass(frozen=True)
class Claim:
    """One entry of the ledger.

    Attributes
    ----------
    id : str
        "<paper>.<slug>", never reused for another statement.
    paper, locator : str
        A key of `PAPERS`, and where in it the statement stands.
    statement : str
        What the paper says, in our words.
    verdict : str
        A key of `VERDICTS`.
    corrected : str
        What holds instead. Required for "corrected" and "refuted".
    assumption : str
        What must be added ("holds-if"), or why a claim is "untested".
    chapter : str
        Page of the book that settles it, as "room/page"; empty only for an untested claim.
    audit : tuple of str
        Row ids of the prior audit.
    measured : str
        What the chapter measures.
    bound : str
        The rule that the measured numbers must satisfy, in words.
    """

    id: str
    paper: str
    locator: str
    statement: str
    verdict: str
    corrected: str = ""
    assumption: str = ""
    chapter: str = ""
    audit: tuple[str, ...] = ()
    measured: str = ""
    bound: str = ""

    def __post_init__(self) -> None:
        def reject(why: str) -> None:
            raise ValueError(f"claim {self.id!r}: {why}")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "audit" and not isinstance(value, str):
                reject(f"{field.name} is {value!r}; expected text")
        if self.paper not in PAPERS:
            reject(f"unknown paper {self.paper!r}; expected one of {', '.join(PAPERS)}")
        prefix, _, slug = self.id.partition(".")
        if prefix != self.paper or not _ID.fullmatch(slug):
            reject(f"its id must read '{self.paper}.some-words' in lower case")
        if self.verdict not in VERDICTS:
            reject(f"unknown verdict {self.verdict!r}; expected one of {', '.join(VERDICTS)}")
        for name in ("locator", "statement"):
            if not getattr(self, name).strip():
                reject(f"{name} is empty")
        if self.verdict in ("corrected", "refuted") and not self.corrected.strip():
            reject(f"verdict {self.verdict!r} needs the field 'corrected': what holds instead")
        if self.verdict in ("holds-if", "untested") and not self.assumption.strip():
            reject(
                f"verdict {self.verdict!r} needs the field 'assumption': what is assumed, or why untested"
            )
        if self.verdict != "untested":
            for name in ("chapter", "measured", "bound"):
                if not getattr(self, name).strip():
                    reject(f"{name} is empty; only an untested claim may leave it so")
        if self.chapter and not _CHAPTER.fullmatch(self.chapter):
            reject(
                f"chapter {self.chapter!r} must read 'room/page', without folder 'book' and ending"
            )
        if not isinstance(self.audit, tuple) or not all(
            isinstance(row, str) and _AUDIT.fullmatch(row) for row in self.audit
        ):
            reject(f"audit is {self.audit!r}; expected a list of row ids such as C54")


@dataclass(frozen=True)
class Evidence:
    """What a run found for one claim.

    Attributes
    ----------
    id, verdict, chapter : str
        As in the ledger when it was recorded.
    measured : float, int, str or dict
        The numbers of the check.
    bound : float, int, str, dict or None
        What they were compared with.
    note : str
        One sentence for the reader of the claims page.
    scale, version, date : str
        `GRSD_SCALE`, the version of grsd, and the UTC time of the record.
    """

    id: str
    verdict: str
    chapter: str
    measured: Measured
    bound: Measured | None
    note: str
    scale: str
    version: str
    date: str

    def _repr_markdown_(self) -> str:
        """One line under the cell that ends with a record; the numbers are on the claims page."""
        return f"Recorded: `{self.id}`, {self.verdict}."


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not a silent replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice in one entry {key_node.start_mark}")
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _parse(path: Path) -> list[Claim]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read as a ledger: {error}") from error
    if not isinstance(raw, list):
        raise ValueError(f"{path.name} holds {type(raw).__name__}, expected a list of claims")
    known = {field.name for field in fields(Claim)}
    required = {"id", "paper", "locator", "statement", "verdict"}
    claims = []
    for index, entry in enumerate(raw):
        if not isinstance(entry, dict):
            raise ValueError(f"{path.name}: entry {index + 1} is {entry!r}, expected fields")
        name = entry.get("id", f"number {index + 1}")
        absent, foreign = sorted(required - set(entry)), sorted(map(str, set(entry) - known))
        if absent:
            raise ValueError(f"{path.name}: claim {name!r} lacks {', '.join(absent)}")
        if foreign:
            raise ValueError(f"{path.name}: claim {name!r} has unknown fields {', '.join(foreign)}")
        filled = {key: value for key, value in entry.items() if value is not None}
        audit = filled.pop("audit", [])
        if not isinstance(audit, list):
            raise ValueError(
                f"{path.name}: claim {name!r}: audit is {audit!r}, expected a list of row ids"
            )
        texts = {
            key: value.strip() if isinstance(value, str) else value for key, value in filled.items()
        }
        claims.append(Claim(audit=tuple(audit), **texts))
    return claims


@cache
def _packaged() -> tuple[Claim, ...]:
    return tuple(_load(Path(__file__).parent / "data" / "claims"))


def _load(place: Path) -> list[Claim]:
    paths = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
    if not paths or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"no ledger at {place}; expected a YAML file or a folder of them")
    claims: list[Claim] = []
    home: dict[str, str] = {}
    for path in paths:
        for claim in _parse(path):
            if claim.id in home:
                raise ValueError(
                    f"{path.name}: the id {claim.id!r} stands already in {home[claim.id]}"
                )
            home[claim.id] = path.name
            claims.append(claim)
    return claims


def load(path: str | os.PathLike[str] | None = None) -> list[Claim]:
    """Every claim of the ledger, in the order of its files.

    Parameters
    ----------
    path : path, optional
        A YAML file or a folder of them; by default the ledger that ships with the package.

    Raises
    ------
    ValueError
        On an unknown verdict, field or paper, an id given twice, or a missing field; the message quotes it.
    """
    return list(_packaged()) if path is None else _load(Path(path))


def find(claim_id: str) -> Claim:
    """The claim of this id.

    Raises
    ------
    ValueError
        If the ledger has none; the message names the nearest ids.
    """
    for claim in load():
        if claim.id == claim_id:
            return claim
    near = get_close_matches(str(claim_id), [claim.id for claim in load()], n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"the ledger has no claim {claim_id!r}{hint}")


def _number(value: Any, where: str) -> Value:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where} is empty text")
        return value
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()  # a numpy or torch scalar
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{where} is {value!r}; a claim is not settled by a number that is not finite"
            )
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}; expected a number, a text or a dict of them"
    )


def _measured(value: Any, where: str) -> Measured:
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{where} is an empty dict")
        return {str(key): _number(item, f"{where}[{key!r}]") for key, item in value.items()}
    return _number(value, where)


def bullets(*ids: str) -> str:
    """Return claims as a Markdown list for a page of some room: verdict, place, chapter, statement, and what holds instead.

    Raises
    ------
    ValueError
        If the ledger has no claim of one of these ids.
    """
    lines = []
    for claim in map(find, ids):
        verdict, more = VERDICTS[claim.verdict], claim.assumption or claim.corrected
        lead = "Needs" if claim.assumption else "Note" if claim.verdict == "holds" else "Instead"
        page = f" · [{claim.chapter.split('/')[1]}](../{claim.chapter}.md)" if claim.chapter else ""
        place, statement, more = (
            text.replace("_", r"\_").replace("[", r"\[")
            for text in (claim.locator, claim.statement, more)
        )
        lines.append(
            f"- {verdict.symbol} **{verdict.word}** · {place}{page}. {statement}"
            + (f" *{lead}:* {more}" if more else "")
        )
    return "\n".join(lines)


def record(
    claim_id: str,
    *,
    measured: Measured,
    bound: Measured | None = None,
    note: str = "",
    verdict: str | None = None,
) -> Evidence:
    """Record what a check found for a claim; call it after the assertions.

    Parameters
    ----------
    claim_id : str
        Id in the ledger.
    measured, bound : number, text, or dict of them
        What was found, and what it was compared with. Numpy and torch scalars are taken as numbers.
    note : str
        One sentence for the claims page.
    verdict : str, optional
        What the check concluded; it must be the ledger's verdict.

    Returns
    -------
    Evidence
        Also written, whole or not at all, as `<evidence_dir()>/<claim_id>.json`.

    Raises
    ------
    ValueError
        If the ledger has no such claim or calls it untested, a number is not finite, or `verdict` differs
        from the ledger's.
    """
    claim = find(claim_id)
    if claim.verdict == "untested":
        raise ValueError(
            f"{claim_id!r} is untested in the ledger: give it a verdict before its evidence"
        )
    if verdict is not None and verdict != claim.verdict:
        raise ValueError(
            f"{claim_id!r}: the check concludes {verdict!r}, but the ledger says {claim.verdict!r}; "
            "correct whichever is wrong"
        )
    found = Evidence(
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
    atomic_write(
        evidence_dir() / f"{claim.id}.json", dumps(asdict(found), where=claim_id, sort_keys=False)
    )
    return found


def evidence(claim_id: str) -> Evidence | None:
    """The evidence recorded for a claim, or None when there is none.

    Evidence that was recorded under another verdict than the ledger's present one counts as none: the
    check that made it settled something else.

    Raises
    ------
    ValueError
        If the ledger has no such claim, or the file is damaged.
    """
    claim = find(claim_id)
    path = evidence_dir() / f"{claim.id}.json"
    if not path.is_file():
        return None
    try:
        found = Evidence(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the evidence file {path.name} is damaged ({error}); run its chapter again"
        ) from error
    return found if found.id == claim.id and found.verdict == claim.verdict else None


def missing() -> list[Claim]:
    """Claims with a verdict other than untested for which no evidence is recorded."""
    return [claim for claim in load() if claim.verdict != "untested" and evidence(claim.id) is None]
