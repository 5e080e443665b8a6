"""`grsd new-chapter`: a page, its line in the contents and an entry of the ledger, which pass every
check."""

from __future__ import annotations

import re
from pathlib import Path

import click

from grsd import claims
from grsd.cli.common import main
from grsd.results import atomic_write

NAME = re.compile(r"([a-z]+)/([a-z0-9]+(?:-[a-z0-9]+)*)")
ENTRY = """
- id: {claim}
  paper: grsd
  locator: >-
    {title}, section "Check"
  statement: >-
    The Gauss quadrature of $m$ Lanczos steps has the first $2m$ moments of the start vector's
    spectral measure.
  verdict: holds
  chapter: {room}/{page}
  measured: >-
    relative gap of the first $2m$ moments of a planted measure, and of the next one, which nothing
    promises
  bound: below $10^{{-12}}$; above $10^{{-11}}$
"""


@main.command("new-chapter")
@click.argument("name")
@click.option("--title", help="Heading of the page; by default made of its name.")
def new_chapter(name: str, title: str | None) -> None:
    """Write the chapter NAME ("room/page") into this checkout, ready to be changed.

    Adds book/NAME.md, its line in _toc.yml and an example entry in the ledger. The page has every
    part that the tests ask of a chapter.
    """
    # a name of a room that the ledger has, and a page that is not there yet
    root = checkout(Path.cwd())
    match = NAME.fullmatch(name)
    rooms = sorted(p.stem for p in (root / "grsd/data/claims").glob("*.yaml"))
    if match is None or match[1] not in rooms:
        expected = "', '".join(f"{room}/some-words" for room in rooms)
        raise ValueError(f"a chapter is named '{expected}' in lower case, not {name!r}")
    room, page = match.groups()
    target, ledger = root / f"book/{name}.md", root / f"grsd/data/claims/{room}.yaml"
    if target.exists():
        raise ValueError(f"book/{name}.md exists; choose another name")

    # the page goes last in its room, before the scoreboard where the room has one
    toc = (root / "_toc.yml").read_text(encoding="utf-8")
    lines = [line for line in toc.splitlines() if f"book/{room}/" in line]
    if not lines:
        raise ValueError(f"_toc.yml has no page of book/{room}; add the room first")
    before = next((line for line in lines if "scoreboard" in line), None)
    new = re.sub(r"book/\S+", f"book/{name}.md", lines[-1])
    old = before or lines[-1]
    toc = toc.replace(old, f"{new}\n{old}" if before else f"{old}\n{new}")

    # the template with the names filled in, and its entry behind the others of the room
    words = {"claim": f"grsd.{page}", "label": f"{room}-{page}", "page": page, "room": room}
    words["title"] = title or page.replace("-", " ").capitalize()
    if words["claim"] in {claim.id for claim in claims.load(ledger.parent)}:
        raise ValueError(f"the ledger has {words['claim']} already; choose another name")
    template = (Path(__file__).parents[1] / "data/chapter.md").read_text(encoding="utf-8")
    text = template.format(**words)
    entries = ledger.read_text(encoding="utf-8").rstrip("\n") + "\n" + ENTRY.format(**words)
    for path, made in ((target, text), (root / "_toc.yml", toc), (ledger, entries)):
        atomic_write(path, made)
    click.echo(f"wrote book/{name}.md, its line in _toc.yml and {words['claim']} in the ledger")
    click.echo(f"check it: python -m pytest tests/book/test_pages.py -k {page}; make book")


def checkout(folder: Path) -> Path:
    """The checkout around a folder; ValueError when there is none."""
    for root in (folder, *folder.parents):
        if (root / "_toc.yml").is_file() and (root / "grsd/data/claims").is_dir():
            return root
    raise ValueError(f"{folder} is in no checkout of grsd: there is no _toc.yml above it")
