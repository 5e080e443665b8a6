"""The ledger: every audit row is in it, faults are refused by name, evidence is what a run recorded."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.mathtext import MathTextParser

from grsd import claims
from grsd.claims import VERDICTS, Claim, evidence, find, load, missing, record

GOOD = {
    "id": "origin.example",
    "paper": "origin",
    "locator": "§1",
    "statement": "Something.",
    "verdict": "holds",
    "chapter": "spectrum/operator",
    "audit": ["C1"],
    "measured": "a number",
    "bound": "below 1",
}


@pytest.fixture(autouse=True)
def _own_evidence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRSD_EVIDENCE", str(tmp_path / "evidence"))
    monkeypatch.setenv("GRSD_SCALE", "cpu")


def ledger(tmp_path: Path, *entries: dict[str, object], name: str = "room.yaml") -> Path:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(list(entries), allow_unicode=True), encoding="utf-8")
    return path


def test_every_audit_row_of_the_spectrum_room_has_a_claim_with_a_chapter() -> None:
    rows = {row for claim in load() if claim.chapter.startswith("spectrum/") for row in claim.audit}
    assert rows == {f"C{number}" for number in range(54, 67)}


def test_every_chapter_of_the_room_settles_a_claim() -> None:
    chapters = {claim.chapter for claim in load() if claim.chapter.startswith("spectrum/")}
    pages = (Path(__file__).parents[1] / "book/spectrum").glob("*.md")
    assert chapters == {f"spectrum/{page.stem}" for page in pages}


def test_the_four_empirical_facts_stand_apart() -> None:
    facts = [claim for claim in load() if claim.id.startswith("origin.fact-")]
    for roman in ("(i)", "(ii)", "(iii)", "(iv)"):
        assert any(f"§7.6 {roman};" in claim.locator for claim in facts), roman


def texts(claim: Claim) -> list[str]:
    return [
        claim.locator,
        claim.statement,
        claim.corrected,
        claim.assumption,
        claim.measured,
        claim.bound,
    ]


def unset(text: str) -> list[str]:
    """Mathematics outside dollars: signs of Unicode that are only read as formulas, carets, indices."""
    prose = re.sub(r"\$[^$]*\$|`[^`]*`|μP|\(Δ2\)", " ", unicodedata.normalize("NFD", text))
    words = re.sub(r"[A-Za-z]{2,}_[a-z]+_[a-z]+", " ", prose)  # match_rms_adamw
    return re.findall(
        r"[α-ωΑ-Ω∂∇∫√∏∞‖⟨⟩≤≥≪≫∝→±½²³₀-₉⁰-⁹∗ᵀ\u0300-\u036f]|[\^_*]|\b[\d.]+e-\d", words
    )


def test_the_mathematics_of_the_ledger_is_tex_that_parses() -> None:
    parser = MathTextParser("path")
    formulas = {
        formula for c in load() for text in texts(c) for formula in re.findall(r"\$([^$]*)\$", text)
    }
    assert len(formulas) > 500
    for formula in formulas:
        # what mathtext spells otherwise
        known = formula.replace(r"\tfrac12", r"\frac{1}{2}")
        parser.parse("$" + re.sub(r"\\(le|ge)(?![a-z])", r"\\\1q ", known) + "$")


def test_no_mathematics_stands_outside_dollars() -> None:
    for claim in load():
        for text in texts(claim):
            assert text.count("$") % 2 == 0, claim.id
            assert unset(text) == [], f"{claim.id}: {text}"


@pytest.mark.parametrize("text", ["λ_max", "t^2", "J∗", "below 1e-12", "a_b", "M ≥ 0", "ṡ", "x²"])
def test_mathematics_outside_dollars_is_found(text: str) -> None:
    assert unset(f"Before {text} after")
    assert unset("$" + text + "$ of μP in `match_rms`, match_rms_adamw, within 3 %, −0.5") == []


def test_verdicts_are_those_of_the_book_and_tell_apart_by_symbol_and_word() -> None:
    assert set(VERDICTS) == {
        *("holds", "holds-if", "corrected", "refuted", "empty", "reproduced", "not-reproduced"),
        *("not-discriminating", "untested"),
    }
    assert len({verdict.symbol for verdict in VERDICTS.values()}) == len(VERDICTS)
    assert len({verdict.word for verdict in VERDICTS.values()}) == len(VERDICTS)
    assert all(verdict.meaning.endswith(".") for verdict in VERDICTS.values())


def test_a_good_entry_is_read_and_a_folder_is_read_in_order(tmp_path: Path) -> None:
    path = ledger(tmp_path, GOOD, name="b.yaml")
    assert load(path) == [Claim(**{**GOOD, "audit": ("C1",)})]
    ledger(tmp_path, {**GOOD, "id": "origin.first"}, name="a.yaml")
    assert [claim.id for claim in load(tmp_path)] == ["origin.first", "origin.example"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "true"}, "unknown verdict 'true'"),
        ({"paper": "other"}, "unknown paper 'other'"),
        ({"id": "renorm.example"}, "'origin.some-words'"),
        ({"id": "origin.Bad Name"}, "'origin.some-words'"),
        ({"locator": " "}, "locator is empty"),
        ({"statement": None}, "statement"),
        ({"chapter": "book/spectrum/operator.md"}, "'room/page'"),
        ({"chapter": ""}, "chapter is empty"),
        ({"measured": ""}, "measured is empty"),
        ({"bound": None}, "bound is empty"),
        ({"verdict": "corrected"}, "corrected is empty"),
        ({"verdict": "refuted"}, "corrected is empty"),
        ({"verdict": "holds-if"}, "assumption is empty"),
        ({"verdict": "untested"}, "assumption is empty"),
        ({"audit": "C54"}, "audit is 'C54'"),
        ({"audit": ["row 3"]}, "row 3"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"statement": 3}, "statement is 3"),
    ],
)
def test_a_planted_fault_is_refused_and_quoted(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        load(ledger(tmp_path, {**GOOD, **change}))


@pytest.mark.parametrize("field", ["id", "paper", "locator", "statement", "verdict"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"missing .* '{field}'"):
        load(ledger(tmp_path, {key: value for key, value in GOOD.items() if key != field}))


def test_an_id_given_twice_is_refused_within_and_across_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'origin\.example' stands already in room\.yaml"):
        load(ledger(tmp_path, GOOD, GOOD))
    ledger(tmp_path, GOOD)
    ledger(tmp_path, GOOD, name="second.yaml")
    with pytest.raises(ValueError, match=r"second\.yaml"):
        load(tmp_path)


def test_a_key_given_twice_in_one_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "room.yaml"
    path.write_text("- {id: origin.a, id: origin.b}\n")
    with pytest.raises(ValueError, match="'id' stands twice"):
        load(path)


@pytest.mark.parametrize(
    "text", ["a: 1\n", "- just text\n", "- [unclosed\n", "!!python/object:os.x {}\n"]
)
def test_a_file_that_is_no_ledger_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "room.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"room\.yaml"):
        load(path)


def test_an_absent_ledger_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_an_untested_claim_needs_a_reason_but_no_chapter(tmp_path: Path) -> None:
    entry = {
        **GOOD,
        "verdict": "untested",
        "assumption": "needs a week",
        "chapter": "",
        "measured": None,
    }
    assert load(ledger(tmp_path, entry))[0].chapter == ""


def test_evidence_comes_back_as_recorded() -> None:
    assert evidence("origin.kl-identity") is None
    found = record(
        "origin.kl-identity", measured={"gap": 1e-16, "n": 3}, bound=1e-12, note=" A note. "
    )
    assert evidence("origin.kl-identity") == found
    assert (found.measured, found.bound, found.note) == ({"gap": 1e-16, "n": 3}, 1e-12, "A note.")
    assert (found.verdict, found.chapter, found.scale) == ("holds", "spectrum/cross-entropy", "cpu")
    assert (
        found._repr_markdown_() == "Recorded: `origin.kl-identity`, holds."
    )  # what a cell that ends with it shows


def test_evidence_keeps_the_order_in_which_it_was_given() -> None:
    """The claims page lists T = 32, 128, 512 as the chapter does, not in the order of the alphabet."""
    measured = {f"T = {size}": float(size) for size in (32, 128, 512)}
    claims.record("origin.token-count", measured=measured)
    found = claims.evidence("origin.token-count")
    assert found is not None and isinstance(found.measured, dict)
    assert list(found.measured) == list(measured)


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    found = record("origin.kl-identity", measured=np.float64(0.25), bound={"t": torch.tensor(2.0)})
    assert found.measured == 0.25 and found.bound == {"t": 2.0}
    assert record("origin.kl-identity", measured=np.bool_(True)).measured == 1


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), np.float64("nan"), {"a": 1.0, "b": float("-inf")}, {}, "", " "],
)
def test_evidence_that_settles_nothing_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="measured"):
        record("origin.kl-identity", measured=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bound"):
        record("origin.kl-identity", measured=1.0, bound=bad)  # type: ignore[arg-type]
    assert evidence("origin.kl-identity") is None


@pytest.mark.parametrize("bad", [None, [1.0], np.ones(2), torch.ones(3)])
def test_evidence_of_another_kind_is_refused(bad: object) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        record("origin.kl-identity", measured=bad)  # type: ignore[arg-type]
    assert evidence("origin.kl-identity") is None


def test_an_unknown_claim_is_refused_with_a_hint() -> None:
    for call in (find, evidence, lambda name: record(name, measured=1.0)):
        with pytest.raises(
            ValueError, match=r"'origin\.kl-identiti'.*did you mean origin\.kl-identity"
        ):
            call("origin.kl-identiti")


def test_a_check_that_concludes_otherwise_than_the_ledger_fails() -> None:
    with pytest.raises(ValueError, match=r"concludes 'refuted'.*ledger says 'holds'"):
        record("origin.kl-identity", measured=1.0, verdict="refuted")
    assert record("origin.kl-identity", measured=1.0, verdict="holds").verdict == "holds"


def test_missing_shrinks_by_what_is_recorded() -> None:
    before = missing()
    assert {claim.id for claim in before} == {
        claim.id for claim in load() if claim.verdict != "untested"
    }
    record("origin.kl-identity", measured=1.0)
    assert {claim.id for claim in before} - {claim.id for claim in missing()} == {
        "origin.kl-identity"
    }


def test_evidence_for_an_older_verdict_does_not_count(tmp_path: Path) -> None:
    record("origin.kl-identity", measured=1.0)
    path = tmp_path / "evidence" / "origin.kl-identity.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "verdict": "refuted"}))
    assert evidence("origin.kl-identity") is None
    assert "origin.kl-identity" in {claim.id for claim in missing()}


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"id": "origin.kl-identity", "extra": 1}'])
def test_a_damaged_evidence_file_is_an_error_not_an_absence(text: str, tmp_path: Path) -> None:
    record("origin.kl-identity", measured=1.0)
    (tmp_path / "evidence" / "origin.kl-identity.json").write_text(text)
    with pytest.raises(ValueError, match=r"origin\.kl-identity\.json is damaged"):
        evidence("origin.kl-identity")


def test_an_untested_claim_takes_no_evidence_and_is_not_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    untested = [replace(find("origin.kl-identity"), verdict="untested", assumption="no time")]
    monkeypatch.setattr(claims, "load", lambda path=None: untested)
    assert missing() == []
    with pytest.raises(ValueError, match="untested"):
        record("origin.kl-identity", measured=1.0)


def test_bullets_say_verdict_place_and_what_holds_instead() -> None:
    text = claims.bullets("origin.loss-exponent", "origin.model-and-data-scaling")
    first, second = text.splitlines()
    found = claims.find("origin.loss-exponent")
    assert claims.VERDICTS[found.verdict].word in first and found.corrected.split()[0] in first
    assert f"(../{found.chapter}.md)" in first and "Needs" in second
    shown = claims.bullets("renorm.step-two")  # outside of dollars a bracket would begin a link
    assert r"V[\varepsilon]" in shown and r"\[" not in shown
    with pytest.raises(ValueError, match="no claim"):
        claims.bullets("origin.nothing")
