"""The extension on a small book: each detector meets a case it must catch and a null it must pass."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import companion_fresh
import companion_reader
import companion_views
import nbformat
import pytest
from bs4 import BeautifulSoup

from grsd import claims

from .conftest import CHAPTER, HEADER, IDS, SETUP, Book, chapter

CODE = """```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-small
    caption: A small figure.
%s
---
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
```
"""
STATIC = {"nb_execution_mode": "off"}


def card(page: str, claim_id: str) -> str:
    found = BeautifulSoup(page, "html.parser").find(id=companion_views.anchor(claim_id))
    assert found is not None, f"no card for {claim_id}"
    return found.get_text(" ", strip=True)


# --- The views -----------------------------------------------------------------------------------------------------------


def test_the_pages_show_what_the_build_recorded_and_nothing_else_is_run_again(book: Book) -> None:
    status, log = book.build()
    assert status == 0, log
    page = book.html("book/claims")
    for claim in [claim for claim in claims.load() if claim.paper == "origin"]:
        symbol, word, _ = claims.VERDICTS[claim.verdict]
        text = card(page, claim.id)
        assert symbol in text and word in text, (
            "the verdict is shown by symbol and word, not by colour alone"
        )
        assert ("0.125" in text) == (claim.id in IDS), (
            "only the claims of the chapter that ran have a number"
        )
    box = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser").find(class_="claim-box")
    assert box is not None and all(name in box.get_text() for name in IDS)
    board = BeautifulSoup(book.html("book/index"), "html.parser").find("table", class_="scoreboard")
    assert board is not None
    rows = [
        [cell.get_text(" ", strip=True) for cell in row.find_all("td")]
        for row in board.find_all("tr")[1:-1]
    ]
    for verdict, (symbol, word, meaning) in claims.VERDICTS.items():
        count = sum(claim.verdict == verdict and claim.paper == "origin" for claim in claims.load())
        shown = [int(row[1]) for row in rows if row[0] == f"{symbol} {word} {meaning}"]
        given = any(
            claim.verdict == verdict and claim.paper != claims.OWN for claim in claims.load()
        )
        assert shown == ([count] if given else [])
    # a second build runs nothing, and still fills the pages
    assert book.runs == 1
    status, log = book.build()
    assert status == 0, log
    assert book.runs == 1
    assert "0.125" in card(book.html("book/claims"), IDS[0])


def test_the_books_own_claims_have_a_scoreboard_of_their_own(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    papers = [claim for claim in claims.load() if claim.paper != claims.OWN]
    own = replace(
        papers[0],
        id="grsd.example",
        paper=claims.OWN,
        chapter="",
        verdict="untested",
        assumption="planted",
    )
    monkeypatch.setattr(claims, "load", lambda: [*papers, own])
    book.write(
        "book/index.md", "# Front\n\n```{scoreboard}\n```\n\n```{scoreboard}\n:paper: grsd\n```\n"
    )
    book.build(**STATIC)
    boards = BeautifulSoup(book.html("book/index"), "html.parser").find_all(
        "table", class_="scoreboard"
    )
    totals = [
        [int(cell.get_text()) for cell in board.find_all("tr")[-1].find_all("td")[1:]]
        for board in boards
    ]
    assert totals[0][-1] == len(papers) and totals[1] == [1]
    assert (
        "this book" in boards[1].find("thead").get_text()
        and "this book" not in boards[0].get_text()
    )


def test_mathematics_is_served_from_the_book_itself(book: Book) -> None:
    _, log = book.build(**STATIC)
    sources = [
        tag["src"]
        for tag in BeautifulSoup(book.html("book/index"), "html.parser").find_all(
            "script", src=True
        )
    ]
    assert any("mathjax/tex-chtml.js" in source for source in sources), log
    assert (book.root / "_build/html/_static/mathjax/tex-chtml.js").is_file()
    assert (book.root / "_build/html/_static/mathjax/input/tex/extensions/boldsymbol.js").is_file()
    remote = [source for source in sources if source.startswith(("http", "//"))]
    assert not remote, f"scripts from the network: {remote}"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("plain J J* and (J*)*", ["Text"]),
        ("$x_i$ and `batch_size`", ["math", "Text", "literal"]),
        ("E_α grows with batch_size", ["Text", "subscript", "Text"]),
        ("J_{≤α} at ηλ_max and ∇L_te, not match_rms", ["Text", "subscript"] * 3 + ["Text"]),
        ("⟨φ̇_v, Ċ_lm⟩ in ‖A‖_R and ∂_tA", ["Text", "subscript"] * 4 + ["Text"]),
        (
            "t^(−c0(p+1)), r_n^(−1/2), t^c0",
            ["Text", "superscript", "Text", "subscript", "superscript", "Text", "superscript"],
        ),
        ("J^(l)∗J^(m), λ^p dλ, (t/t0)^(1+c0)", ["Text", "superscript"] * 4),
        ("a ^ b, x^ y", ["Text"]),
        ("**not** so", ["strong", "Text"]),
    ],
)
def test_ledger_text_is_marked_up_and_adjoints_are_not_emphasis(
    text: str, kinds: list[str]
) -> None:
    assert [type(node).__name__ for node in companion_views.inline(text)] == kinds


@pytest.mark.parametrize(
    ("measured", "bound", "shown"),
    [
        (3e-15, 1e-12, "Measured in this build: 3e-15; compared with 1e-12"),
        (3e-15, None, "Measured in this build: 3e-15"),
        (
            {"gap": 0.5, "error": 2},
            {"gap": 0.1},
            "Measured in this build:  gap: 0.5 (compared with 0.1) error: 2",
        ),
        (
            {"gap": 0.5},
            {"other": 1.0},
            "Measured in this build:  gap: 0.5 Compared with: other = 1",
        ),
        ({"gap": 0.5}, "rounding", "Measured in this build:  gap: 0.5 Compared with: rounding"),
    ],
)
def test_every_number_of_the_evidence_is_shown(
    measured: claims.Measured, bound: claims.Measured | None, shown: str
) -> None:
    drawn = companion_views._measured(measured, bound)
    assert " ".join(node.astext().replace("\n\n", " ") for node in drawn) == shown


# --- Evidence ------------------------------------------------------------------------------------------------------------


def test_a_verdict_without_evidence_fails_the_build_and_keeps_failing(book: Book) -> None:
    book.write(f"book/{CHAPTER}.md", chapter(recorded=IDS[1:]))
    for _ in range(
        2
    ):  # the second build must not pass because pages that warned are not visited again
        status, log = book.build()
        assert status != 0
        assert f"claim {IDS[0]!r} has the verdict" in log
        assert not any(f"claim {name!r} has the verdict" in log for name in IDS[1:])
    assert "No run of this build recorded evidence" in card(book.html("book/claims"), IDS[0])


def test_a_build_that_warned_warns_again(book: Book) -> None:
    book.write(
        "book/lone.md", "# Lone\n\n```{nowhere}\n```\n"
    )  # Sphinx warns when it reads this, and it reads it once
    book.write("_toc.yml", (book.root / "_toc.yml").read_text() + "  - file: book/lone.md\n")
    for _ in range(2):
        status, log = book.build()
        assert status != 0
        assert "nowhere" in log


def test_an_untested_claim_needs_no_evidence(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    untested = [replace(claim, verdict="untested", assumption="not yet") for claim in claims.load()]
    monkeypatch.setattr(claims, "load", lambda path=None: untested)
    status, log = book.build(**STATIC)
    assert status == 0, log


def test_a_changed_package_discards_the_cached_run(book: Book) -> None:
    assert book.build()[0] == 0
    book.write("grsd/module.py", "value = 2\n")
    assert book.build()[0] == 0
    assert book.runs == 2


def test_a_page_does_not_take_over_the_run_of_another(book: Book) -> None:
    """The cache of notebooks keys on code alone: the same cells under another name would find it."""
    contents = (book.root / "_toc.yml").read_text()
    for name in ("one", "two"):
        book.write(f"book/{name}.md", f"{HEADER}# Lone\n\n{SETUP}")
        book.write("_toc.yml", f"{contents}  - file: book/{name}.md\n")
        assert book.build()[0] == 0
        (book.root / f"book/{name}.md").unlink()
        book.write("grsd/module.py", "value = 2\n")
    assert book.runs == 4  # two pages, before and after the package changed


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_chapters_run_side_by_side(book: Book) -> None:
    """Each waits until the other has begun: one after another, the first would give up."""
    meet = """```{{code-cell}} ipython3
import pathlib, time
pathlib.Path("{own}.began").touch()
for _ in range(600):
    if pathlib.Path("{other}.began").exists():
        break
    time.sleep(0.1)
else:
    raise RuntimeError("alone")
```
"""
    first, second = meet.format(own="a", other="b"), meet.format(own="b", other="a")
    book.write(f"book/{CHAPTER}.md", chapter(extra=first))
    book.write("book/spectrum/other.md", f"{HEADER}# Other\n\n{second}")
    toc = book.root / "_toc.yml"
    toc.write_text(toc.read_text() + "  - file: book/spectrum/other.md\n")
    status, log = book.build()
    assert status == 0, log
    assert book.runs == 1


def test_prose_may_change_without_a_run_and_code_may_not(book: Book) -> None:
    page = f"book/{CHAPTER}.md"
    assert book.build()[0] == 0
    book.write(page, chapter(extra="A sentence."))
    assert book.build()[0] == 0
    assert book.runs == 1, "prose alone must not cost a run"
    book.write(page, chapter(measured=0.375))
    assert book.build()[0] == 0
    assert book.runs == 2
    assert "0.375" in card(book.html("book/claims"), IDS[0])
    book.write(
        page, chapter()
    )  # the cache of notebooks still knows this code, but its evidence is gone
    assert book.build()[0] == 0
    assert book.runs == 3
    assert "0.125" in card(book.html("book/claims"), IDS[0])


@pytest.mark.parametrize("harm", ["delete", "damage"])
def test_lost_or_damaged_evidence_is_recorded_again(book: Book, harm: str) -> None:
    assert book.build()[0] == 0
    path = book.root / "evidence" / f"{IDS[0]}.json"
    path.unlink() if harm == "delete" else path.write_text("{")
    status, log = book.build()
    assert status == 0, log
    assert book.runs == 2


def test_evidence_that_this_build_did_not_make_does_not_count(book: Book) -> None:
    for name in IDS:  # as a test run or an earlier version of the code might have left it
        claims.record(name, measured=7.5)
    book.write(f"book/{CHAPTER}.md", chapter(recorded=[]))
    status, log = book.build()
    assert status != 0
    assert all(f"claim {name!r} has the verdict" in log for name in IDS)


def test_the_scale_is_part_of_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grsd").mkdir()
    (tmp_path / "grsd" / "module.py").write_text("value = 1\n")
    monkeypatch.setenv("GRSD_SCALE", "cpu")
    small = companion_fresh.code_fingerprint(tmp_path)
    (tmp_path / "grsd" / "__pycache__").mkdir()
    (tmp_path / "grsd" / "__pycache__" / "module.pyc").write_bytes(b"x")
    assert companion_fresh.code_fingerprint(tmp_path) == small, "byte code is not code"
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    assert companion_fresh.code_fingerprint(tmp_path) != small


# --- Boxes and images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxed", "complaint"),
    [
        (
            [*IDS, "origin.no-such-claim"],
            "claim-box names 'origin.no-such-claim', which is not in the ledger",
        ),
        (IDS[1:], f"claim {IDS[0]!r} belongs to this chapter but its claim-box does not name it"),
        (
            [*IDS, "origin.stochastic-lanczos"],
            "claim-box names 'origin.stochastic-lanczos', whose chapter is",
        ),
    ],
)
def test_a_box_at_odds_with_the_ledger_is_reported(
    book: Book, boxed: list[str], complaint: str
) -> None:
    book.write(f"book/{CHAPTER}.md", chapter(boxed=boxed))
    status, log = book.build(**STATIC)
    assert status != 0
    assert complaint in log


def test_images_need_words(book: Book) -> None:
    book.write(
        "book/_assets/dot.svg", '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    )
    page = f"book/{CHAPTER}.md"
    good = "  image:\n    alt: A line that rises from one to two."
    figure = "```{figure} ../_assets/dot.svg\n%s\nA caption.\n```\n"
    book.write(
        page, chapter(extra=CODE % good + figure % ":alt: An empty square of nine pixels.\n")
    )
    status, log = book.build()
    assert status == 0, log
    for harm in (CODE % "", figure % "", figure % ":alt: dot.svg\n", figure % ":alt: figure\n"):
        book.write(page, chapter(extra=harm))
        status, log = book.build()
        assert status != 0
        assert log.count("has no alternative text") == 1, log


def test_sentences_and_long_lines_may_break_and_numbers_and_printed_tables_that_fit_may_not(
    book: Book,
) -> None:
    words = "a sentence that is longer than an interval"
    show = "from grsd.figures import Table\nTable(['what', 'value', 'why'], [['gap', '-0.79 [-1.01, -0.72]', 'WORDS']])"
    cells = [
        show.replace("WORDS", words),
        "print('x' * 300)",
        "for k in range(9):\n    print(f'{k:8d}' * 10)",  # fits beside both sidebars
        "for k in range(9):\n    print(f'{k:9d}' * 20)",  # does not
    ]
    blocks = [f"```{{code-cell}} ipython3\n{cell}\n```" for cell in cells]
    blocks[0] += "\n*A gap with its interval, and why.*"  # the build asks every table for a caption
    extra = "\n\n".join(blocks)
    book.write(f"book/{CHAPTER}.md", chapter(extra=extra))
    status, log = book.build()
    assert status == 0, log
    page = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser")
    broken = {cell.get_text(strip=True) for cell in page.find_all("td", class_="words")}
    assert broken == {words}
    long = [block.get_text() for block in page.find_all("div", class_="long-lines")]
    assert any("x" * 300 in text for text in long) and any(" " * 8 + "8" in text for text in long)
    assert not any(("       8" * 10 + "\n") in f"{text}\n" for text in long)


# --- Buttons and reader notebooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://github.com/someone/fork.git", "someone/fork"),
        ("https://user:secret@github.com/someone/fork", "someone/fork"),
        ("git@github.com:someone/fork.git", "someone/fork"),
        ("ssh://git@github.com:22/someone/my.fork/", "someone/my.fork"),
        ("someone/fork", "someone/fork"),
        ("https://gitlab.com/someone/fork.git", None),
        ("https://github.com.elsewhere.net/someone/fork", None),
        ("/srv/git/fork.git", None),
        ("../someone/fork", None),
    ],
)
def test_addresses(address: str, expected: str | None) -> None:
    found = companion_reader.parse(address)
    assert (f"{found.owner}/{found.name}" if found else None) == expected


def remote(root: Path, address: str) -> None:
    for command in (["init", "-q"], ["remote", "add", "origin", address]):
        subprocess.run(["git", "-C", str(root), *command], check=True)


def links(page: str) -> list[str]:
    return [tag["href"] for tag in BeautifulSoup(page, "html.parser").find_all("a", href=True)]


def test_a_checkout_with_a_remote_has_its_own_buttons(book: Book) -> None:
    remote(book.root, "git@github.com:someone/fork.git")
    book.build(**STATIC)
    found = links(book.html(f"book/{CHAPTER}"))
    wanted = f"https://colab.research.google.com/github/someone/fork/blob/gh-pages/notebooks/book/{CHAPTER}.ipynb"
    assert wanted in found
    assert "https://github.com/someone/fork" in found
    assert not any("colab" in link for link in links(book.html("book/index"))), (
        "a page without code has nothing to run"
    )


@pytest.mark.parametrize("address", ["", "/srv/git/someone/fork", "someone/fork"])
def test_a_checkout_without_a_github_remote_has_none(book: Book, address: str) -> None:
    if address:
        remote(book.root, address)
    _, log = book.build(**STATIC)
    found = links(book.html(f"book/{CHAPTER}"))
    assert not any("colab" in link or "github.com" in link for link in found), log


def test_the_variable_overrides_the_remote(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    remote(book.root, "git@github.com:someone/fork.git")
    monkeypatch.setenv("GRSD_REPOSITORY", "other/home")
    assert str(companion_reader.repository(book.root)) == str(
        companion_reader.Repository("other", "home")
    )
    monkeypatch.setenv("GRSD_REPOSITORY", "")
    assert companion_reader.repository(book.root) is None
    monkeypatch.setenv("GRSD_REPOSITORY", "not an address")
    with pytest.raises(ValueError, match="'not an address'"):
        companion_reader.repository(book.root)


TABLE = """| name | what |
|---|---|
| `code` | $x^2$ and **bold** |

```{prf:theorem} A name
:label: small-theorem

It holds.
```

```{exercise} A task
:label: ex-small

Do it.
```

See {doc}`../claims`.
"""


def notebook(book: Book) -> nbformat.NotebookNode:
    return nbformat.read(book.root / "_build/jupyter/book" / f"{CHAPTER}.ipynb", as_version=4)


def test_a_reader_notebook_knows_where_it_came_from(book: Book) -> None:
    good = "  image:\n    alt: A line that rises from one to two."
    book.write(f"book/{CHAPTER}.md", chapter(extra=TABLE + CODE % good))
    remote(book.root, "git@github.com:someone/fork.git")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(
        ["git", "-C", str(book.root), *identity, "commit", "-q", "--allow-empty", "-m", "first"],
        check=True,
    )
    revision = companion_reader.git(book.root, "rev-parse", "HEAD")
    status, log = book.build("jupyter")
    assert status == 0, log
    found = notebook(book)
    nbformat.validate(found)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    text = "\n".join(cell.source for cell in found.cells if cell.cell_type == "markdown")
    assert f'"git+https://github.com/someone/fork@{revision}"]' in code[0].source
    assert code[0].source.index("pip") < code[0].source.index("from grsd.chapter import")
    assert "date" not in found.metadata and not any(cell.outputs for cell in code)
    assert "| `code` | $ x^2 $ and **bold** |" in text
    assert "**Theorem 1** (A name)" in text
    assert "**Exercise 1 (A task)**" in text
    assert "**Figure 1.** A small figure." in text
    assert "https://someone.github.io/fork/book/claims.html" in text
    assert 'setdefault("GRSD_SITE", "https://someone.github.io/fork")' in code[0].source
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# A chapter"], (
        "boxes are not headings"
    )
    first = (book.root / "_build/jupyter/book" / f"{CHAPTER}.ipynb").read_bytes()
    (book.root / f"book/{CHAPTER}.md").touch()
    book.build("jupyter")
    assert (book.root / "_build/jupyter/book" / f"{CHAPTER}.ipynb").read_bytes() == first, (
        "published twice, changed nothing"
    )


def test_a_reader_notebook_has_the_mathematics_of_its_page(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = "L ∝ t^(−(1+c₀)(p+1)), J_{≤α} and E_α of $x^2$; M^(ℓ) = λ_max"
    ledger = [replace(c, statement=planted) if c.id == IDS[0] else c for c in claims.load()]
    monkeypatch.setattr(claims, "load", lambda: ledger)
    for builder in ("html", "jupyter"):
        status, log = book.build(builder)
        assert status == 0, log
    box = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser").find(class_="claim-box")
    text = "\n".join(cell.source for cell in notebook(book).cells)
    told = BeautifulSoup(text, "html.parser")
    assert box is not None
    for tag, planted_one in (("sup", "−(1+c₀)(p+1)"), ("sub", "≤α")):
        on_page = [found.get_text() for found in box.find_all(tag)]
        assert planted_one in on_page
        assert [found.get_text() for found in told.find_all(tag)] == on_page
    assert "$ x^2 $" in text


def test_a_reader_notebook_without_a_remote_is_harmless(book: Book) -> None:
    status, log = book.build("jupyter")
    assert status == 0, log
    sources = [cell.source for cell in notebook(book).cells]
    assert any(source.startswith("from grsd.chapter import") for source in sources)
    assert not any("pip" in source for source in sources)
    assert not any(".ipynb)" in source for source in sources)
    assert not (book.root / "_build/jupyter/book/index.ipynb").exists(), (
        "a page without code is no notebook"
    )


def test_warnings_fail_the_notebook_build_too(book: Book) -> None:
    book.write(
        "book/index.md", "# Front\n\n{doc}`nowhere`\n"
    )  # sphinx-tojupyter itself would exit with 0
    status, log = book.build("jupyter", **STATIC)
    assert status != 0
    assert "nowhere" in log
    assert HEADER in (book.root / f"book/{CHAPTER}.md").read_text()
