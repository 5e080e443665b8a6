"""What a reader meets: the opening picture, scripts of the pages, citation, numbers in tables, facts under a title.

The scripts run in node where there is one; what they compute is compared with the package.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import Any

import companion
import companion_page
import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from docutils import nodes
from pybtex.database import parse_string
from scipy.special import gamma, gammainc

from grsd import claims, results
from grsd.dynamics import transport

from .conftest import CHAPTER, IDS, ROOT, Book, chapter

sys.path.insert(0, str(ROOT / "tools"))
import opening

ASSETS = ROOT / "book/_assets"


def in_node(script: str, expression: str) -> Any:
    """Value of an expression of a page's script."""
    if shutil.which("node") is None:
        pytest.skip("no node on this machine")
    code = f"const m = require({json.dumps(str(ASSETS / script))}); "
    done = subprocess.run(
        ["node", "-e", f"{code}console.log(JSON.stringify({expression}))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


# --- The opening picture -------------------------------------------------------------------------


def test_the_opening_picture_is_drawn_from_the_stored_result() -> None:
    drawn = (ASSETS / "opening.svg").read_text(encoding="utf-8")
    assert drawn == opening.draw(opening.profiles()), "run python tools/opening.py"
    assert "prefers-reduced-motion" in drawn and "<script" not in drawn


def test_its_bars_are_as_high_as_the_energies() -> None:
    """Read back from the picture, and compared with the file of the result, not with `profiles`."""
    drawn = BeautifulSoup((ASSETS / "opening.svg").read_text(encoding="utf-8"), "html.parser")
    raw = json.loads((ROOT / "grsd/data/results/protocol-mini.json").read_text())["data"]["cells"]
    cells = [
        c
        for c in raw
        if (c["model"], c["start"], c["targets"], c["rows"]) == ("mini-1.3m", "error", "text", 256)
    ]
    first = next(c for c in cells if c["revision"] == "step0")["profile"]
    last = next(c for c in cells if c["revision"] == "step512")["profile"]
    outline = [float(tag["height"]) for tag in drawn.find_all("rect", class_="first")]
    bars = drawn.find_all("rect", class_="bar")
    scale = [float(re.search(r"scaleY\(([\d.]+)", tag["style"])[1]) for tag in bars]  # type: ignore[index]
    final = [float(tag["height"]) * s for tag, s in zip(bars, scale, strict=True)]
    edges = np.array(first["edges"][:-1])
    shown = (edges >= 2.0**opening.FIRST) & (edges < 2.0**opening.LAST)
    most = max(max(c["profile"]["energies"]) for c in cells)
    height = opening.FLOOR - opening.TOP
    for seen, profile in ((outline, first), (final, last)):
        wanted = height * np.array(profile["energies"])[shown] / most
        assert np.abs(np.array(seen) - wanted).max() < 0.03  # printed to 0.01, scales to 1e-4
        assert np.array(profile["energies"])[~shown].sum() < 2e-3 * sum(profile["energies"])
    assert results.load("protocol-mini").data["cells"] == raw


# --- Scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c0", "p"), [(-0.5, 1.0), (0.0, 0.5), (0.5, 0.5), (1.5, -0.5)])
def test_the_sliders_show_the_loss_of_the_equation_and_of_the_printed_form(
    c0: float, p: float
) -> None:
    """Against the closed form by incomplete gamma functions, and the exponents of the package."""
    times = [1.0, 3.0, 100.0, 1000.0]
    shown = in_node("interactive.js", f"{times}.map((s) => m.loss(s, {c0}, {p}))")
    clock = np.array([2 / (1 + c0) * (s ** (1 + c0) - 1) for s in times])
    low, high = 1e-12, 10.0
    exact = [(high ** (p + 1) - low ** (p + 1)) / (p + 1)]
    for k in clock[1:]:
        ends = [gammainc(p + 1, k * end) for end in (high, low)]
        exact.append(gamma(p + 1) * k ** -(p + 1) * (ends[0] - ends[1]))
    # midpoint rule in log u with a step of 0.04, for an integrand whose width is about one
    assert shown == pytest.approx(exact, rel=2e-3)
    printed = in_node("interactive.js", f"{times}.map((s) => m.printed(s, {c0}, {p}))")
    assert np.array(printed) / np.array(shown) == pytest.approx(np.array(times) ** c0, rel=1e-12)
    right, wrong = transport.loss_exponent(c0, p)
    slopes = in_node("interactive.js", f"[m.loss, m.printed].map((f) => m.slope(f, {c0}, {p}))")
    assert slopes[1] - slopes[0] == pytest.approx(c0, abs=1e-9) == right - wrong
    if c0 >= 0:  # below, the window is too early for the power law, as the chapter says
        assert slopes == pytest.approx([-right, -wrong], abs=0.02)


def test_a_filter_keeps_what_was_asked_for() -> None:
    claim = '{"paper": "mup", "verdict": "holds", "chapter": "mup/norms", "text": "muon and norms"}'
    wanted = {
        '{"paper": "", "verdict": "", "chapter": "", "words": ""}': True,
        '{"paper": "mup", "verdict": "holds", "chapter": "mup/norms", "words": "Norms MUON"}': True,
        '{"paper": "origin", "verdict": "", "chapter": "", "words": ""}': False,
        '{"paper": "", "verdict": "refuted", "chapter": "", "words": ""}': False,
        '{"paper": "", "verdict": "", "chapter": "mup/tables", "words": ""}': False,
        '{"paper": "", "verdict": "", "chapter": "", "words": "muon lanczos"}': False,
    }
    asked = f"[{', '.join(wanted)}].map((wanted) => m.matches({claim}, wanted))"
    assert in_node("claims.js", asked) == list(wanted.values())


# --- Citation ------------------------------------------------------------------------------------


def test_the_page_prints_complete_entries() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = "\n\n".join(companion_page.entries(cff, "https://someone.github.io/grsd"))
    found = parse_string(text, "bibtex").entries
    assert len(found) == 1 + len(cff["references"])
    software = found["grsd2026"]
    assert software.type == "software"
    for name in ("title", "year", "date", "version", "url", "license"):
        assert software.fields[name], name
    for key, entry in found.items():
        assert entry.persons["author"] and entry.fields["title"] and entry.fields["year"], key
    papers = [re.search(r"arXiv:([\d.]+)", title) for title in claims.PAPERS.values()]
    numbers = {paper[1] for paper in papers if paper}
    assert {e.fields["eprint"] for e in found.values() if "eprint" in e.fields} == numbers


# --- Pages ---------------------------------------------------------------------------------------


def table(*rows: tuple[str, ...]) -> nodes.table:
    """A docutils table whose first row is its head."""
    made, group = nodes.table(), nodes.tgroup(cols=len(rows[0]))
    for part, content in ((nodes.thead(), rows[:1]), (nodes.tbody(), rows[1:])):
        for row in content:
            cells = [nodes.entry("", nodes.paragraph("", text)) for text in row]
            part += nodes.row("", *cells)
        group += part
    made += group
    return made


def test_columns_of_numbers_stand_right_with_true_signs_and_words_do_not() -> None:
    rows = [("a-b", "-1.2e-05", "r_n"), ("x 3", "–", "1"), ("c", "0.5", "about 4")]
    made = table(("name", "gap", "rule"), *rows)
    companion.align(made)
    cells = list(made.findall(nodes.entry))
    right = [cell.astext() for cell in cells if "number" in cell["classes"]]
    assert right == ["gap", "−1.2·10−5", "–", "0.5"]
    assert [node.astext() for node in made.findall(nodes.superscript)] == ["−5"]
    assert "a-b" in made.astext()
    powers = table(("from 2^-9 on", "≤ -6.00"), ("2^10", "x^2"))
    companion.align(powers)
    assert [node.astext() for node in powers.findall(nodes.superscript)] == ["−9", "10"]
    assert "x^2" in powers.astext()  # a letter's power is mathematics, which the author sets


@pytest.mark.parametrize(
    "text", ["-0.79 [-1.01, -0.72]", "1 ± 0.2", "2,048", "nan", "12 %", "≤ -6.00"]
)
def test_numbers_of_every_kind_are_known(text: str) -> None:
    assert companion.NUMBER.fullmatch(text)
    assert not companion.NUMBER.fullmatch(f"{text} nats of it")


def test_search_shows_formulas_as_text() -> None:
    raw = r"Speed \\(v = c_0\\lambda/t\\), \\[\\tfrac12 \\|e\\|^2 \\le \\log t\\] and $\\mathrm{tr} M$."
    shown = in_node("page.js", f'm.untex("{raw}")')
    squeezed = str.maketrans("", "", " ")
    wanted = "Speed v = c_0λ/t, ½‖e‖^2 ≤ log t and tr M."
    assert shown.translate(squeezed) == wanted.translate(squeezed)


CAPTIONED = """## Live: what is measured

```{code-cell} ipython3
from grsd.figures import Table
Table(["what", "gap"], [["a", -0.5]])
```

*The gap of $a$.*

```{code-cell} ipython3
Table(["what", "gap"], [["b", -0.5]])
```
*The gap.* It is negative.
"""


def test_printed_tables_have_a_number_and_a_caption(book: Book) -> None:
    book.write(f"book/{CHAPTER}.md", chapter(extra=CAPTIONED))
    status, log = book.build()
    assert status == 0, log
    page = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser")
    found = [" ".join(tag.get_text(" ").split()) for tag in page.find_all("caption")]
    assert [text.strip(" #") for text in found] == [
        "Table 1 The gap of \\(a\\) .",
        "Table 2 The gap.",
    ]
    text = page.get_text(" ")
    assert text.count("The gap") == 2 and "−0.5" in text
    assert page.find("p", string="It is negative.") is not None


def test_a_table_without_a_caption_is_reported(book: Book) -> None:
    book.write(f"book/{CHAPTER}.md", chapter(extra=CAPTIONED.replace("*The gap.*", "The gap.")))
    status, log = book.build()
    assert status and log.count("a table without a caption") == 1


def test_a_claim_leads_to_the_cell_that_records_it(book: Book) -> None:
    named = f'```{{code-cell}} ipython3\nprint("{IDS[0]} is only named here" and "{IDS[0]}")\n```\n'
    book.write(f"book/{CHAPTER}.md", chapter(extra=named))
    status, log = book.build()
    assert status == 0, log
    page = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser")
    for name in IDS:
        mark = page.find(id=companion_page.companion_views.check_anchor(name))
        assert (
            mark is not None
        )  # of several claims of a cell all but the first have a mark inside it
        cell = mark if "cell" in mark.get("class", []) else mark.find_parent(class_="cell")
        assert cell is not None and "claims.record" in cell.get_text() and name in cell.get_text()
    card = BeautifulSoup(book.html("book/claims"), "html.parser").find(
        id=companion_page.companion_views.anchor(IDS[0])
    )
    assert card is not None and card.name == "details" and card["data-verdict"]
    targets = [tag["href"] for tag in card.find_all("a", href=True)]
    assert any(
        target.endswith(f"#{cell_id}")
        for target in targets
        for cell_id in [companion_page.companion_views.check_anchor(IDS[0])]
    )
    # facts under the title, the edition at the foot, and no script that wants a live kernel
    assert re.search(r"About \d+ minutes to read, \d+ s to run", page.get_text(" ", strip=True))
    assert page.find(class_="edition") is not None and "THEBE" not in str(page)


def test_the_answer_is_the_figure_that_a_later_cell_draws(book: Book) -> None:
    drawn = """```{answer} fig-drawn
```

```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-drawn
    caption: A line that rises.
  image:
    alt: A line that rises from one to two.
---
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
```
"""
    book.write(f"book/{CHAPTER}.md", chapter(extra=drawn))
    status, log = book.build()
    assert status == 0, log
    page = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser")
    answer, figure = page.find(class_="answer"), page.find("figure")
    assert answer is not None and figure is not None
    assert answer.find("img")["src"] == figure.find("img")["src"]
    assert "A line that rises." in answer.get_text() and "Where this is drawn" in answer.get_text()
    assert figure.find("img")["src"].endswith(".svg")
    crowded = drawn.replace("[1, 2]", "list(range(2)) * 9000, 'o'")
    other = drawn.replace("} fig-drawn", "} fig-other")
    book.write(f"book/{CHAPTER}.md", chapter(extra=crowded))
    status, log = book.build()
    page = BeautifulSoup(book.html(f"book/{CHAPTER}"), "html.parser")
    assert page.find("figure").find("img")["src"].endswith(".png"), log  # type: ignore[union-attr]
    book.write(f"book/{CHAPTER}.md", chapter(extra=other))
    status, log = book.build()
    assert status != 0 and "no figure 'fig-other'" in log
