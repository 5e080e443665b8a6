"""Print a built book as one PDF, with an outline of its parts and chapters.

    python tools/pdf.py _build/cpu/_build/html _build/cpu/_build/grsd.pdf

Every page of `_toc.yml` is opened in headless Chromium, its formulas are set, the cards of the
claims page are opened, and what would be printed is joined. A page whose formulas did not set stops
the run.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path

import yaml
from audit import Browser
from pypdf import PdfReader, PdfWriter

ROOT = Path(__file__).parents[1]
UNSET = """[...document.querySelectorAll("span.math, div.math")]
  .filter((m) => !m.querySelector("mjx-container")).map((m) => m.textContent.slice(0, 60))"""
OPEN = 'document.querySelectorAll(".claim-card").forEach((card) => { card.open = true; })'
PAPER = {"paperWidth": 8.27, "paperHeight": 11.69, "marginTop": 0.7, "marginBottom": 0.7}  # A4


def parts(toc: Path) -> list[tuple[str, list[str]]]:
    """(name of a part, its pages without ending), the front page first."""
    read = yaml.safe_load(toc.read_text(encoding="utf-8"))
    named = [(p["caption"], [c["file"] for c in p["chapters"]]) for p in read.get("parts", [])]
    found = [("", [read["root"]]), *named]
    return [(name, [file.removesuffix(".md") for file in files]) for name, files in found]


def printed(browser: Browser, page: Path) -> PdfReader:
    """One page of the book as Chromium prints it."""
    browser.open(page.as_uri())
    if unset := browser.run(UNSET):
        raise SystemExit(
            f"pdf: {page.name} has {len(unset)} formulas that are not set: {unset[:3]}"
        )
    browser.run(OPEN)
    data = browser.call("Page.printToPDF", printBackground=True, **PAPER)["data"]
    return PdfReader(io.BytesIO(base64.b64decode(data)))


def book(html: Path, toc: Path, browser: Browser) -> PdfWriter:
    """All pages in the order of the contents; parts and titles become the outline."""
    out = PdfWriter()
    for name, pages in parts(toc):
        above = None
        for page in pages:
            start = len(out.pages)
            out.append(printed(browser, html / f"{page}.html"), import_outline=False)
            title = browser.run(
                'document.querySelector("h1")?.firstChild.textContent || document.title'
            )
            if name and above is None:
                above = out.add_outline_item(title=name, page_number=start)
            out.add_outline_item(title=str(title).strip(), page_number=start, parent=above)
    out.add_metadata({"/Title": "grsd: a companion to three papers on training dynamics"})
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("html", type=Path, help="folder of the built book")
    parser.add_argument("pdf", type=Path, help="file to write")
    asked = parser.parse_args()
    browser = Browser()
    try:
        made = book(asked.html.resolve(), ROOT / "_toc.yml", browser)
    finally:
        browser.close()
    made.compress_identical_objects()
    made.write(str(asked.pdf))
    print(f"{asked.pdf}: {len(made.pages)} pages, {asked.pdf.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
