"""Sphinx extension of this book: the claims of the ledger, shown with the evidence that this very build recorded.

Directives: ``{claims}`` (claims page), ``{scoreboard}`` (front page), ``{claim-box}`` (opening of a chapter). Notebooks are executed
while documents are read, so the directives only leave a placeholder; it is filled when the document tree is resolved, and the
pages that hold one are resolved again in every build.

Warnings (errors under ``-W``): a verdict whose chapter is in the book but which no run recorded, a claim box that does not match the
ledger, an image without alternative text. Neighbours: ``companion_views`` draws the nodes, ``companion_fresh`` decides what of
an earlier build may be kept, ``companion_reader`` makes the Colab buttons and the notebooks that they open, ``companion_names`` the
reference pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, ClassVar

import companion_field
import companion_fresh
import companion_names
import companion_page
import companion_reader
import companion_views
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from grsd import claims

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"}
STATUS = {"✅": "✓ ran", "❌": "✗ failed"}
WORDS = 24  # characters; an interval with its value is shorter
FEW_LINES = 4
WIDEST = 104  # columns of a printed table that fit beside both sidebars
POWER = re.compile(r"(?<=\d)\^([-−]?\d+)")
_ONE = r"[-−+±]?\d[\d,]*(?:\.\d+)?(?:e[-−+]?\d+)?"  # 3, -0.5, 1.2e-15
NUMBER = re.compile(
    rf"(?:[≤≥<>?~] ?)?(?:{_ONE}|nan)(?: ?[%×])?(?: ?± ?{_ONE}| ?\[ ?{_ONE}, ?{_ONE}\])?"
)
SHORTEST_ALT = (
    10  # characters; "a figure" or a file name says nothing to a reader who cannot see it
)


class ClaimView(nodes.General, nodes.Element):
    """Placeholder for a list of claims; attributes ``kind`` (page, scoreboard, box) and the directive's options."""


class _ClaimDirective(SphinxDirective):
    """Leave a placeholder, and remember which page holds it."""

    kind = ""

    def run(self) -> list[nodes.Node]:
        node = ClaimView(
            "", kind=self.kind, ids_wanted=" ".join(self.arguments).split(), **_plain(self.options)
        )
        self.set_source_info(node)
        pages(self.env).setdefault(self.env.docname, []).extend(node["ids_wanted"])
        return [node]


class ClaimsDirective(_ClaimDirective):
    """Every claim of the ledger in full, or those of one ``:paper:`` or one ``:room:``."""

    kind = "page"
    option_spec: ClassVar[dict[str, Any]] = {
        "paper": directives.unchanged_required,
        "room": directives.unchanged_required,
    }


class ScoreboardDirective(_ClaimDirective):
    """How many claims have which verdict: of the papers, one column each, or of the one ``:paper:`` that is named."""

    kind = "scoreboard"
    option_spec: ClassVar[dict[str, Any]] = {"paper": directives.unchanged_required}


class ClaimBoxDirective(_ClaimDirective):
    """The claims that a chapter settles, by id."""

    kind = "box"
    required_arguments = 1
    final_argument_whitespace = True


def _plain(options: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in options.items()}


def pages(env: BuildEnvironment) -> dict[str, list[str]]:
    """Pages with a placeholder, and the claim ids that their boxes name."""
    if not hasattr(env, "companion_pages"):
        env.companion_pages = {}  # type: ignore[attr-defined]
    return env.companion_pages  # type: ignore[attr-defined,no-any-return]


def _purge(_app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    pages(env).pop(docname, None)


def _merge(
    _app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment
) -> None:
    pages(env).update({name: ids for name, ids in pages(other).items() if name in set(docnames)})


def check_claims(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Warn of verdicts without evidence and of boxes at odds with the ledger; returns the pages to resolve again."""
    ledger = {claim.id: claim for claim in claims.load()}
    for claim in ledger.values():
        chapter = companion_views.docname(claim)
        if not claim.chapter or chapter not in env.found_docs:
            continue
        if claim.verdict != "untested" and claims.evidence(claim.id) is None:
            _warn(
                f"claim {claim.id!r} has the verdict {claim.verdict!r} but this build recorded no evidence for it; its "
                f"chapter must call claims.record({claim.id!r}, …)",
                chapter,
                "evidence",
            )
        if claim.id not in pages(env).get(chapter, []):
            _warn(
                f"claim {claim.id!r} belongs to this chapter but its claim-box does not name it",
                chapter,
                "box",
            )
    for page, ids in pages(env).items():
        for claim_id in ids:
            if claim_id not in ledger:
                _warn(f"claim-box names {claim_id!r}, which is not in the ledger", page, "box")
            elif companion_views.docname(ledger[claim_id]) != page:
                _warn(
                    f"claim-box names {claim_id!r}, whose chapter is {ledger[claim_id].chapter!r}",
                    page,
                    "box",
                )
    equations = env.get_domain("math").data["has_equations"]
    equations.update(
        dict.fromkeys(pages(env), True)
    )  # statements carry mathematics that Sphinx has not seen yet
    return sorted(pages(env))


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace every placeholder by the claims as they stand at the end of this build's notebooks."""
    link = companion_views.Linker(
        app.builder, docname, app.env.found_docs, claims_page=_claims_page(app.env)
    )
    for node in list(doctree.findall(ClaimView)):
        ledger = claims.load()
        if node["kind"] == "box":
            chosen = [claim for name in node["ids_wanted"] for claim in ledger if claim.id == name]
            node.replace_self(companion_views.box(chosen, link, app.builder.format == "html"))
        elif node["kind"] == "scoreboard":
            named = node.get("paper")
            chosen = [
                c for c in ledger if (c.paper != claims.OWN if named is None else c.paper == named)
            ]
            node.replace_self(companion_views.scoreboard(chosen))
        else:
            chosen = [
                c
                for c in ledger
                if node.get("paper", c.paper) == c.paper and _in_room(c, node.get("room"))
            ]
            node.replace_self(companion_views.page(chosen, link))


def spell_status(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Words for the emoji in myst-nb's table of executions, which many fonts lack."""
    for text in [text for text in doctree.findall(nodes.Text) if text in STATUS]:
        text.parent.replace(text, nodes.Text(STATUS[text]))


def fit(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Let sentences in a table's cells, and a few long printed lines, break; set numbers as numbers, to the right."""
    if app.builder.format != "html":
        return
    for output in doctree.findall(
        lambda node: "cell_output" in getattr(node, "attributes", {}).get("classes", [])
    ):
        for cell in output.findall(nodes.entry):
            if len(cell.astext()) > WORDS:
                cell["classes"].append("words")
        for block in output.findall(nodes.literal_block):
            lines = block.astext().splitlines()
            if len(lines) <= FEW_LINES or max(map(len, lines)) > WIDEST:
                block["classes"].append("long-lines")
    for table in doctree.findall(nodes.table):
        align(table)


def caption(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Number the tables that cells print, and set the emphasised line below one as its caption; warn where there is none."""
    if app.builder.format != "html":
        return
    chapter = app.env.toc_secnumbers.get(docname, {}).get("", ())
    printed = [t for t in doctree.findall(nodes.table) if _output(t) and not _titled(t)]
    for k, table in enumerate(printed, 1):
        number = ".".join(map(str, (*chapter, k)))
        table["ids"].append(f"table-{k}")
        said = _said(table)
        if not said:
            _warn(
                "a table without a caption; say what its columns are in an emphasised sentence below its cell",
                (docname, table.line),
                "caption",
            )
        label = nodes.inline("", f"Table {number} ", classes=["caption-number"])
        table.insert(0, nodes.title("", "", label, *said))


def _output(node: nodes.Node) -> nodes.Element | None:
    """The cell whose output a node is part of."""
    inside = False
    while node is not None:
        classes = getattr(node, "attributes", {}).get("classes", [])
        inside |= "cell_output" in classes
        if inside and "cell" in classes:
            return node  # type: ignore[return-value]
        node = node.parent
    return None


def _titled(table: nodes.table) -> bool:
    return isinstance(table.children[0], nodes.title)


def _said(table: nodes.table) -> list[nodes.Node]:
    """What is emphasised at the start of the paragraph below a table's cell; it leaves that paragraph."""
    cell = _output(table)
    assert cell is not None
    below = cell.next_node(descend=False, siblings=True)
    if isinstance(below, nodes.paragraph) and isinstance(below.children[0], nodes.emphasis):
        found = list(below.children[0].children)
        del below[0]
        if below.children and isinstance(below.children[0], nodes.Text):
            below[0] = nodes.Text(below.children[0].lstrip())
        if not below.astext():
            below.parent.remove(below)
        return found
    return []


def align(table: nodes.table) -> None:
    """Columns of numbers to the right, headings with them; every number with its true minus sign and power of ten."""
    rows = [list(row.findall(nodes.entry)) for row in table.findall(nodes.row)]
    body = [row for row in rows if row and not isinstance(row[0].parent.parent, nodes.thead)]
    for cell in (cell for row in body for cell in row if NUMBER.fullmatch(cell.astext().strip())):
        for text in list(cell.findall(nodes.Text)):
            text.parent.replace(text, signed(str(text)))
        cell["classes"].append("a-number")
    for text in [t for row in rows for cell in row for t in cell.findall(nodes.Text)]:
        if POWER.search(text) and not isinstance(text.parent, (nodes.math, nodes.literal)):
            text.parent.replace(text, raised(str(text)))
    for column in range(max(map(len, rows), default=0)):
        cells = [
            row[column]
            for row in body
            if len(row) == len(rows[0]) and row[column].astext().strip() not in "–-"
        ]
        if 2 * sum("a-number" in cell["classes"] for cell in cells) > len(cells):
            for row in rows:
                if column < len(row):
                    row[column]["classes"].append("number")


def raised(text: str) -> list[nodes.Node]:
    """``2^-9`` as 2 with a raised −9."""
    out: list[nodes.Node] = []
    for k, part in enumerate(POWER.split(text)):
        part = part.replace("-", "−") if k % 2 else part
        out += [nodes.superscript("", part) if k % 2 else nodes.Text(part)] if part else []
    return out


def signed(text: str) -> list[nodes.Node]:
    """``-1.2e-15`` as −1.2·10 with a raised −15; any other number with its minus sign alone."""
    out: list[nodes.Node] = []
    end = 0
    for found in re.finditer(r"e([-−+]?)0*(\d+)", text):
        out.append(nodes.Text(text[end : found.start()].replace("-", "−") + "·10"))
        power = ("−" if found[1] in ("-", "−") else "") + found[2]
        out.append(nodes.superscript("", power))
        end = found.end()
    return [*out, nodes.Text(text[end:].replace("-", "−"))] if end < len(text) or not out else out


def _in_room(claim: claims.Claim, room: str | None) -> bool:
    return room is None or claim.chapter.startswith(f"{room}/")


def _claims_page(env: BuildEnvironment) -> str:
    return "book/claims" if "book/claims" in env.found_docs else ""


def check_images(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Warn of every image whose alternative text is missing, a file name, or too short to say what is seen."""
    for image in doctree.findall(nodes.image):
        alt = " ".join(str(image.get("alt", "")).split())
        if len(alt) < SHORTEST_ALT or PurePosixPath(alt).suffix in IMAGE_SUFFIXES:
            _warn(
                f"image {PurePosixPath(str(image.get('uri', ''))).name!r} has no alternative text (got {alt!r}); say what is "
                "seen in it: `mystnb: image: alt:` in a code cell, `:alt:` in a figure",
                (docname, image.line),
                "alt",
            )


def _warn(message: str, location: str | tuple[str, int | None], subtype: str) -> None:
    logger.warning(message, location=location, type="companion", subtype=subtype)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register directives, checks, and the two neighbours' hooks."""
    app.add_node(ClaimView)
    for node, visit, depart in (
        (companion_views.Fold, companion_views.visit_fold, companion_views.depart_fold),
        (companion_views.FoldHead, companion_views.visit_head, companion_views.depart_head),
    ):
        app.add_node(node, html=(visit, depart))
    app.add_directive("claims", ClaimsDirective)
    app.add_directive("scoreboard", ScoreboardDirective)
    app.add_directive("claim-box", ClaimBoxDirective)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("env-updated", check_claims)
    app.connect("doctree-resolved", fill)
    app.connect("doctree-resolved", spell_status)
    app.connect("doctree-resolved", fit)
    app.connect("doctree-resolved", caption)
    app.connect("doctree-resolved", check_images)
    companion_field.setup(app)
    companion_fresh.setup(app)
    companion_names.setup(app)
    companion_page.setup(app)
    companion_reader.setup(app)
    return {
        "version": "1",
        "env_version": 1,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
