"""The pages as sources: what a chapter must have, and that everything a page points at exists.

What Sphinx itself finds under ``-W -n`` (roles, equation and citation targets) is left to the build.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import jupytext
import pytest
import yaml

from grsd import claims
from grsd.cli import main

from .conftest import ROOT

BOOK = ROOT / "book"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
LISTED = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in BOOK.rglob("*.md"))
NAMES = [name for name in LISTED if name.startswith("book/names/")]  # the reference pages
CHAPTERS = [
    name for name in LISTED if len(Path(name).parts) > 2 and name not in NAMES
]  # book/<room>/<page>.md

SHOWN, LONGEST = 15, 30  # code cells that are not folded, and lines in one


def ledger_ids(chapter: str) -> list[str]:
    return [claim.id for claim in claims.load() if f"book/{claim.chapter}.md" == chapter]


def set_up(source: str, page: str) -> str:
    """What is wrong with a first cell: one import line of grsd.chapter, `start` with the page's name; warnings may be silenced."""
    body = ast.parse(source).body
    names = [ast.unparse(node) for node in body]
    if not names or not names[0].startswith("from grsd.chapter import "):
        return "the first code cell does not open with: from grsd.chapter import …, start"
    if len(names) < 2 or not names[1].startswith(f"start('{page}'"):
        return f'behind the import stands start("{page}", …)'
    silenced = len(body) in (2, 4) and all("warnings" in name for name in names[2:])
    return "" if silenced else "behind start() nothing else is set up"


def faults(text: str, wanted: list[str], page: str) -> list[str]:
    """What a chapter lacks: claim box, first cell, records, assertions, closing sections, exercise with a folded solution."""
    notebook = jupytext.reads(text, fmt="md:myst")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found: list[str] = []
    box = re.search(r"^```\{claim-box\}((?:\s+[\w.-]+)+)\s*\n```", text, re.M)
    boxed = box.group(1).split() if box else []
    if sorted(boxed) != sorted(wanted):
        found.append(f"claim box: {sorted(set(boxed) ^ set(wanted))} differ from the ledger")
    found += opening_faults(text)
    if not code or "hide-cell" not in code[0].metadata.get("tags", []):
        found.append("first cell: it is not hidden")
    elif fault := set_up(code[0].source, page):
        found.append(f"first cell: {fault}")
    source = "\n".join(cell.source for cell in code)
    visible = [
        cell.source
        for cell in code
        if not {"hide-cell", "hide-input"} & set(cell.metadata.get("tags", []))
    ]
    if len(visible) > SHOWN:
        found.append(f"cells: {len(visible)} are shown; fold what is over {SHOWN}")
    for cell in visible:
        if (lines := len(cell.splitlines())) > LONGEST:
            found.append(f"cells: one has {lines} lines, more than {LONGEST}")
    if not any("assert " in cell for cell in visible):
        found.append("check: no visible assertion")
    if "claims.record(" not in source:
        found.append("check: nothing is recorded")
    found += [f"check: {name} is not recorded" for name in wanted if name not in source]
    for heading in ("Check", "Summary", "What would change"):
        if not re.search(rf"^#+ .*{heading}", text, re.M):
            found.append(f"section: no heading with {heading!r}")
    if not re.search(r"^`{3,}\{exercise", text, re.M):
        found.append("exercise: none")
    solutions = re.findall(r"^`{3,}\{solution(?:-start)?\}[^\n]*\n((?::[^\n]*\n)*)", text, re.M)
    if not solutions or any("dropdown" not in options for options in solutions):
        found.append("exercise: a solution is missing or not folded")
    forbidden = {"skip-execution", "raises-exception", "remove-cell"}
    found += [
        f"cell: tag {tag}"
        for cell in code
        for tag in forbidden & set(cell.metadata.get("tags", []))
    ]
    found += ["cell: stored outputs" for cell in code if cell.get("outputs")]
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        words = below.source if below is not None and below.cell_type == "markdown" else ""
        if (
            cell.cell_type == "code"
            and shows_table(cell.source)
            and not re.match(r"\*[^*\s]", words)
        ):
            found.append(f"caption: none in emphasis below {cell.source.splitlines()[-1]!r}")
    return found


def shows_table(source: str) -> bool:
    """Whether a cell ends in a table: a call of `Table` or of a function named after one."""
    last = ast.parse(source).body[-1:]
    if not last or not isinstance(last[0], ast.Expr) or not isinstance(last[0].value, ast.Call):
        return False
    return re.fullmatch(r"(.*\.)?(\w+_)?[Tt]able", ast.unparse(last[0].value.func)) is not None


def opening_faults(text: str) -> list[str]:
    """A chapter opens with words, then the picture that answers it if it draws one, then its claims."""
    opening = (
        text.partition("\n# ")[2].partition("\n")[2].partition("```{code-cell}")[0].lstrip("\n")
    )
    found = [] if opening[:1].strip(":`") else ["opening: the question does not come first"]
    drawn = re.findall(r"^    name: (fig-[\w-]+)$", text, re.M)
    answers = re.findall(r"^```\{answer\} (\S+)\n```$", opening, re.M)
    if len(answers) != bool(drawn) or not set(answers) <= set(drawn):
        found.append(f"opening: its answer is {answers}; the page draws {drawn}")
    if answers and not 0 < opening.find("{answer}") < opening.find("{claim-box}"):
        found.append("opening: the answer stands behind the claims")
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_every_part(chapter: str) -> None:
    page = Path(chapter).relative_to("book").with_suffix("").as_posix()
    assert faults((ROOT / chapter).read_text(), ledger_ids(chapter), page) == []


GOOD = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A chapter

What is asked?

```{answer} fig-small
```

```{claim-box} origin.kl-identity
```

```{code-cell} ipython3
:tags: [hide-cell]

from grsd.chapter import claims, start
start("room/page", threads=1)
```

## Check

```{code-cell} ipython3
assert gap < bound
found = claims.record("origin.kl-identity", measured=gap, bound=bound)
```

```{code-cell} ipython3
---
mystnb:
  figure:
    name: fig-small
---
```

```{code-cell} ipython3
figures.Table(["gap"], [[gap]])
```
*The gap.*

## What would change this verdict

```{exercise} A task
:label: ex-a
```

```{solution} ex-a
:label: sol-a
:class: dropdown
```

## Summary
"""


def test_a_complete_chapter_has_no_fault() -> None:
    assert faults(GOOD, ["origin.kl-identity"], "room/page") == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("{claim-box} origin.kl-identity", "{claim-box} origin.kl-half-square", "claim box"),
        ("{claim-box} origin.kl-identity", "{note}", "claim box"),
        ("What is asked?\n", "", "opening: the question"),
        ("*The gap.*", "The gap.", "caption: none"),
        ("{answer} fig-small", "{answer} fig-other", "opening: its answer"),
        ("```{answer} fig-small\n```\n", "", "opening: its answer"),
        ("name: fig-small", "tags: []", "opening: its answer"),
        ("from grsd.chapter import", "import", "first cell: the first code cell does not open"),
        (":tags: [hide-cell]\n", "", "first cell: it is not hidden"),
        ('start("room/page", threads=1)\n', "", "first cell: behind the import"),
        ('start("room/page"', 'start("room/other"', "first cell: behind the import"),
        ("assert gap < bound\n", "assert gap < bound\n" * 30, "cells: one has 31 lines"),
        ("## Summary", "```{code-cell} ipython3\n1\n```\n" * 13 + "## Summary", "cells: 16"),
        ("threads=1)\n", "threads=1)\nimport numpy as np\n", "first cell: behind start()"),
        ("assert gap < bound\n", "", "check: no visible assertion"),
        (
            'found = claims.record("origin.kl-identity", measured=gap, bound=bound)\n',
            "",
            "check: nothing is recorded",
        ),
        ("## What would change this verdict", "## Something else", "section"),
        ("## Summary", "", "section"),
        ("```{exercise}", "```{note}", "exercise: none"),
        (":class: dropdown", "", "exercise: a solution"),
        ("assert gap", "assert gap", ""),
        (":tags: [hide-cell]", ":tags: [hide-cell, skip-execution]", "cell: tag"),
    ],
)
def test_each_missing_part_is_a_fault(old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    found = faults(GOOD.replace(old, new), ["origin.kl-identity"], "room/page")
    assert any(complaint in fault for fault in found) if complaint else found == []


# --- Table of contents -------------------------------------------------------------------------------------------------


def test_the_table_of_contents_names_every_page_with_its_ending() -> None:
    assert sorted(LISTED) == PAGES


def test_every_chapter_of_the_ledger_is_in_the_book() -> None:
    named = {f"book/{claim.chapter}.md" for claim in claims.load() if claim.chapter}
    assert named and named <= set(LISTED), sorted(named - set(LISTED))


def test_every_row_of_the_audit_of_the_first_paper_has_a_claim() -> None:
    rows = {
        row for claim in claims.load() if claim.paper in ("origin", "grsd") for row in claim.audit
    }
    assert {f"C{number}" for number in range(1, 69)} <= rows


SECOND = """B0 B1 B2 C1 C2 C3 C3xT2 C4 T1 T1+ T3 I.a(14) I.a(15)-(16) I.a(17) I.a(19) I.a(20)-(21) I.a(22) I.b II L1.1 L1.2 L1.3 L1.4 L1+ L1sv III/C2 R1 4.1 T2
A.3.2 A.3.2' A.3.3a A.3.3b A.3.4 A.3.5 A.3.6 P1 P1' P2 P2' 6.x 6.2/T2 misc Box D1 D2 D3 D4 D5 D6 CE1 CE2 CE3 CE4 CE5""".split()
THIRD = """S1.C3.1 S1.B1 S1.B2 S1.B3 S1.table1 S1.table2 S1.table3 S1.table4 S1.table5 S1.table6 S1.D1 S1.D2 S1.D3 S1.D4 S1.D5 S1.D6 S1.D7 S1.D8 S1.D9 S1.D10 S1.D11 S1.D12 S1.k1
S4.width-SP S4.width-muP S4.depth-LN S4.lower-loss S4.no-LN-SP S4.no-LN-muP S4.v2-k1 S4.v2-wd S4.noise S5.A.mup S5.A.sp-width S5.A.sp-depth S5.A.soap S5.B
S5.C.E1 S5.C.E2 S5.C.F1 S5.C.F2 S5.C.F3""".split()


@pytest.mark.parametrize(("paper", "rows"), [("renorm", SECOND), ("mup", THIRD)])
def test_every_row_of_the_other_audits_has_a_claim(paper: str, rows: list[str]) -> None:
    found = {
        row for claim in claims.load() if claim.paper in (paper, "grsd") for row in claim.audit
    }
    assert sorted(set(rows) - found) == []


# --- What pages point at -----------------------------------------------------------------------------------------------


def dead_links(page: str, text: str) -> list[str]:
    """Relative links, images and ``{doc}`` roles that lead nowhere."""
    folder = (ROOT / page).parent
    prose = re.sub(
        r"^(`{3,})(?:\{code-cell\}|python|sh|console|\{math\}).*?^\1", "", text, flags=re.M | re.S
    )
    prose = re.sub(r"(\${1,2})[^$]+\1", "", prose)  # V[x](s) is no link
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)", prose) if "://" not in target]
    targets += re.findall(r"^`{3,}\{(?:figure|image)\} (\S+)", prose, re.M)
    documents = [
        re.sub(r".*<(.+)>", r"\1", target) for target in re.findall(r"\{doc\}`([^`]+)`", prose)
    ]
    dead = [target for target in targets if not (folder / target).exists()]
    return dead + [name for name in documents if not (folder / f"{name}.md").is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert dead_links(page, (ROOT / page).read_text()) == []


def test_a_dead_link_is_found() -> None:
    text = "[a](nowhere.md) [b](claims.md#x) {doc}`gone` {doc}`text <claims>` [c](https://example.org)\n"
    assert dead_links("book/index.md", text) == ["nowhere.md", "gone"]


@pytest.mark.parametrize("page", PAGES)
def test_no_source_names_a_repository_or_a_machine(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.findall(r"(?:github\.com|colab\.research)[^\s)`]*", text)
    assert not re.findall(r"(?<![\w.<])/(?:home|root|tmp|opt|usr)/[\w.-]+", text)


def commands(text: str) -> list[list[str]]:
    """Lines ``$ grsd …`` of a page's console blocks, split as a shell would."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ grsd")]


def unknown_options(words: list[str]) -> list[str]:
    """Subcommands and options that the command line does not have."""
    command: click.Command = main
    while words and isinstance(command, click.Group):
        if words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return [words[0]]
        command, words = command.commands[words[0]], words[1:]
    known = {
        name for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    } | {"--help"}
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    assert [
        fault for words in commands((ROOT / page).read_text()) for fault in unknown_options(words)
    ] == []


def test_an_unknown_command_is_found() -> None:
    text = "```console\n$ grsd shells MODEL --no-such-option 3\n$ grsd nothing\n$ make book\n$ grsd shells \\\n    --help\n```\n"
    assert [unknown_options(words) for words in commands(text)] == [
        ["--no-such-option"],
        ["nothing"],
        [],
    ]


# --- Words and references ----------------------------------------------------------------------------------------------


SCRIPT = re.compile(r"^```python\n# \w+\.py$", re.MULTILINE)


def test_a_script_of_its_own_is_no_cell_of_a_notebook() -> None:
    """The reader's notebooks run every block in `python`; a file for torchrun is fenced as `py`."""
    pages = sorted((ROOT / "book").rglob("*.md"))
    assert [page.name for page in pages if SCRIPT.search(page.read_text())] == []
    assert SCRIPT.search("```python\n# train.py\nx = 1\n```")


def test_the_page_on_verdicts_explains_every_one_as_the_ledger_shows_it() -> None:
    rows = re.findall(r"^\| (.+?) \|", (BOOK / "verdicts.md").read_text(), re.M)
    assert [f"{symbol} {word}" for symbol, word, _ in claims.VERDICTS.values()] == [
        row for row in rows if row[0] not in "V-"
    ]


def test_the_bibliography_is_complete_and_every_key_is_in_it() -> None:
    entries = re.findall(
        r"^@\w+\{(\w+),(.*?)^(?=@|%|\Z)", (BOOK / "references.bib").read_text(), re.M | re.S
    )
    keys = [key for key, _ in entries]
    assert len(keys) == len(set(keys)) > 30
    for key, fields in entries:
        assert all(f"{name} = {{" in fields for name in ("author", "title", "year")), key
        assert all(
            re.fullmatch(r"\d{4}\.\d{5}", number)
            for number in re.findall(r"eprint = \{([^}]+)\}", fields)
        ), key
        year = re.search(r"year = \{(\d{4})[a-z]?\}", fields)
        assert year is not None and year[1] in key, f"{key}: the year in its key is another"
    shown = [
        tuple(re.findall(r"(?:author|year) = \{([^}]+)\}", fields)[:2]) for _, fields in entries
    ]
    assert len(set(shown)) == len(shown), (
        "two works are cited by the same authors and year: add a letter to the years"
    )
    cited = {
        key
        for page in PAGES
        for found in re.findall(r"\{cite:\w+\}`([^`]+)`", (ROOT / page).read_text())
        for key in found.split(",")
    }
    assert {key.strip() for key in cited} <= set(keys), sorted(
        {key.strip() for key in cited} - set(keys)
    )
