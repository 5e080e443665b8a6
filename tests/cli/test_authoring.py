"""`grsd new-chapter`: what it writes passes the checks that every page passes, and runs; what it refuses it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from grsd import claims
from grsd.cli import main
from tests.book.test_pages import ROOT, faults
from tests.test_claims import texts, unset


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The contents and the ledger of this checkout, and no page."""
    shutil.copy(ROOT / "_toc.yml", tmp_path)
    shutil.copytree(ROOT / "grsd/data/claims", tmp_path / "grsd/data/claims")
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path / "book")  # any folder of the checkout
    return tmp_path


def new_chapter(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["new-chapter", *arguments])


def files(folder: Path) -> dict[str, str]:
    return {str(p): p.read_text() for p in folder.rglob("*") if p.is_file()}


def pages(folder: Path) -> list[str]:
    contents = yaml.safe_load((folder / "_toc.yml").read_text())
    return [page["file"] for part in contents["parts"] for page in part["chapters"]]


@pytest.mark.parametrize("room", ["spectrum", "dynamics", "renorm", "mup"])
def test_what_it_writes_has_every_part_of_a_chapter(room: str, copy: Path) -> None:
    before = pages(copy)
    done = new_chapter(f"{room}/my-question", "--title", "Norms: how large?")
    assert done.exit_code == 0, done.output
    page = f"book/{room}/my-question.md"
    assert faults((copy / page).read_text(), ["grsd.my-question"], f"{room}/my-question") == []
    # one line more in the contents: behind the room's other pages, before its scoreboard
    after = pages(copy)
    assert [line for line in after if line != page] == before
    place = after.index(page)
    assert room in after[place - 1]
    assert "scoreboard" in after[place + 1] or f"book/{room}/" not in after[place + 1]
    # one entry more, whose mathematics is TeX
    added = claims.load(copy / "grsd/data/claims")
    (entry,) = (claim for claim in added if claim not in claims.load())
    assert len(added) == len(claims.load()) + 1 and entry.chapter == f"{room}/my-question"
    assert entry.locator == 'Norms: how large?, section "Check"'
    assert [unset(text) for text in texts(entry)] == [[]] * 6


def test_what_it_writes_runs_and_its_check_can_fail(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert new_chapter("spectrum/my-question").exit_code == 0
    monkeypatch.setenv("GRSD_EVIDENCE", str(copy / "evidence"))
    ledger = claims.load(copy / "grsd/data/claims")
    monkeypatch.setattr(claims, "_packaged", lambda: tuple(ledger))
    text = (copy / "book/spectrum/my-question.md").read_text()
    cells = jupytext.reads(text, fmt="md:myst").cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        with plt.rc_context({"backend": "agg"}):
            exec(source, {})
            recorded = claims.evidence("grsd.my-question")
            assert recorded is not None and recorded.chapter == "spectrum/my-question"
            # one Lanczos step fewer than the check counts on
            with pytest.raises(AssertionError):
                exec(source.replace(", steps).measure()", ", steps - 1).measure()"), {})
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("spectrum/My_Question", "a chapter is named 'dynamics/some-words'"),
        ("attic/my-question", "a chapter is named 'dynamics/some-words'"),
        ("spectrum/product-identity", "the ledger has grsd.product-identity already"),
        ("mup/product-identity", "the ledger has grsd.product-identity already"),
        ("spectrum/there", "book/spectrum/there.md exists"),
    ],
)
def test_a_name_that_does_not_do_changes_nothing(name: str, said: str, copy: Path) -> None:
    (copy / "book/spectrum").mkdir()
    (copy / "book/spectrum/there.md").write_text("# There\n")
    before = files(copy)
    done = new_chapter(name)
    assert done.exit_code == 2 and said in done.output
    assert files(copy) == before


def test_outside_a_checkout_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = new_chapter("spectrum/my-question")
    assert done.exit_code == 2 and "is in no checkout of grsd" in done.output
