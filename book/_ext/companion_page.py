"""What every page has besides its text: facts under a chapter's title, the answer's picture, anchors of checks, a footer.

Directives: ``{answer} fig-label`` shows a figure that a later cell of the page draws, so that a chapter opens with its answer;
``{cite-this}`` prints ``CITATION.cff`` as BibTeX; ``{interactive} name`` leaves room for a script of ``book/_assets``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import companion_views
import yaml
from companion_reader import git
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from grsd import __version__, claims

logger = logging.getLogger(__name__)

WORDS = 220  # a minute, for prose
FORMULA = 12  # seconds for a displayed formula
CODE = 3  # seconds for a line of code that is shown
SMALL = 150_000  # bytes of a drawing; compressed about a fifth
BEFORE = 3  # pages named as read before
RECORDED = re.compile(r"record\w*\(\s*[\"']([a-z]+\.[a-z0-9-]+)[\"']")


class Answer(nodes.General, nodes.Element):
    """Placeholder for a copy of the figure ``label`` of the same page."""


class AnswerDirective(SphinxDirective):
    """The picture that answers the chapter's question, drawn by a cell further down."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        node = Answer("", label=self.arguments[0])
        self.set_source_info(node)
        return [node]


class InteractiveDirective(SphinxDirective):
    """Room for a figure that a script draws; without scripts the static figure above it stands alone."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [nodes.container(classes=["interactive", f"interactive-{self.arguments[0]}"])]


class CiteDirective(SphinxDirective):
    """The entries of ``CITATION.cff``: the book, and the papers that it examines."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "CITATION.cff"
        self.env.note_dependency(str(path))
        cff = yaml.safe_load(path.read_text(encoding="utf-8"))
        mine = self.env.app.companion_repository  # type: ignore[attr-defined]
        text = "\n\n".join(entries(cff, mine.site if mine else ""))
        return [nodes.literal_block(text, text, language="bibtex")]


def entries(cff: Mapping[str, Any], address: str) -> list[str]:
    """BibTeX of a citation file: first the software, under its version, then its references."""
    software = _entry("software", f"grsd{cff['date-released'].year}", cff, cff["date-released"])
    software |= {"version": str(cff["version"]), "license": str(cff["license"])}
    software |= {"url": address} if address else {}
    found = [_bibtex(software)]
    for record in cff.get("references", []):
        number = record["identifiers"][0]["value"].removeprefix("arXiv:")
        key = f"{record['authors'][0]['family-names']}{number.replace('.', '')}"
        fields = _entry("misc", key, record, record["year"])
        fields |= {"eprint": number, "archiveprefix": "arXiv", "url": record["url"]}
        found.append(_bibtex(fields))
    return found


def _entry(kind: str, key: str, record: Mapping[str, Any], when: Any) -> dict[str, str]:
    names = [a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in record["authors"]]
    quoted = [f"{{{name}}}" if "," not in name else name for name in names]
    title = record["title"].replace("μ", r"{$\mu$}")
    out = {"@": f"{kind}{{{key}", "author": " and ".join(quoted), "title": f"{{{title}}}"}
    out["year"] = str(getattr(when, "year", when))
    return out | ({"date": when.isoformat()} if hasattr(when, "isoformat") else {})


def _bibtex(fields: dict[str, str]) -> str:
    head = fields.pop("@")
    return f"@{head},\n" + "".join(f"  {k} = {{{v}}},\n" for k, v in fields.items()) + "}"


# --- While pages are read ------------------------------------------------------------------------------------------------


def chapters(env: BuildEnvironment) -> list[str]:
    """Pages with code, in the order of the table of contents."""
    found: list[str] = []
    for below in env.toctree_includes.get(env.config.root_doc, []):
        found += [below] if "kernelspec" in env.metadata.get(below, {}) else []
    return found


def store(env: BuildEnvironment) -> dict[str, dict[str, Any]]:
    """What was counted on each page: minutes to read, and pages that it leads back to."""
    if not hasattr(env, "companion_facts"):
        env.companion_facts = {}  # type: ignore[attr-defined]
    return env.companion_facts  # type: ignore[attr-defined,no-any-return]


def read(app: Sphinx, doctree: nodes.document) -> None:
    """Count a page, and give the cells that record a claim an anchor."""
    env = app.env
    anchor_checks(doctree)
    keep_small_drawings(app, doctree)
    here = env.docname
    named: Counter[str] = Counter()
    for xref in doctree.findall(addnodes.pending_xref):
        if xref.get("reftype") == "doc":
            named[env.relfn2path(xref["reftarget"] + ".md", here)[0].removesuffix(".md")] += 1
    store(env)[here] = {"minutes": minutes(doctree), "named": named}


def anchor_checks(doctree: nodes.document) -> None:
    """The id of `companion_views.check_anchor` on the cell that records a claim, or that last names it."""
    cells = [node for node in doctree.findall(nodes.container) if "cell" in node["classes"]]
    source = [_source(cell) for cell in cells]
    for name in sorted({c.id for c in claims.load()}):
        naming = [
            k for k, text in enumerate(source) if re.search(rf"[\"']{re.escape(name)}[\"']", text)
        ]
        recording = [k for k in naming if "record(" in source[k]]
        directly = [k for k in recording if name in RECORDED.findall(source[k])]
        if naming:
            cells[(directly or recording or naming)[-1]]["ids"].append(
                companion_views.check_anchor(name)
            )


def keep_small_drawings(app: Sphinx, doctree: nodes.document) -> None:
    """Of a figure in two formats drop the SVG where it is large, as thousands of points are."""
    for bundle in list(doctree.findall(nodes.container)):
        if bundle.get("nb_element") != "mime_bundle":
            continue
        for choice in list(bundle.children):
            if choice.get("mime_type") == "image/svg+xml" and len(bundle.children) > 1:
                files = [
                    Path(app.srcdir) / str(i["uri"]).lstrip("/")
                    for i in choice.findall(nodes.image)
                ]
                if any(f.is_file() and f.stat().st_size > SMALL for f in files):
                    bundle.remove(choice)


def _source(cell: nodes.container) -> str:
    """What stands in a cell, without what it printed."""
    for part in cell.findall(nodes.container):
        if "cell_input" in part["classes"]:
            return part.astext()
    return ""


def minutes(doctree: nodes.document) -> int:
    """Reading time: words at 220 a minute, 12 s a displayed formula, 3 s a shown line of code."""
    words = seconds = 0
    for cell in doctree.findall(nodes.container):
        folded = {"tag_hide-input", "tag_hide-cell"} & set(cell["classes"])
        if "cell" in cell["classes"] and not folded:
            seconds += CODE * len(_source(cell).splitlines())
    for text in doctree.findall(nodes.TextElement):
        if isinstance(text, nodes.math_block):
            seconds += FORMULA
        elif isinstance(text, (nodes.paragraph, nodes.title)) and not _inside_cell(text):
            words += len(text.astext().split())
    return max(1, round(words / WORDS + seconds / 60))


def _inside_cell(node: nodes.Node) -> bool:
    while node is not None:
        if "cell" in getattr(node, "attributes", {}).get("classes", []):
            return True
        node = node.parent
    return False


# --- When pages are written ----------------------------------------------------------------------------------------------


def show_facts(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Under a chapter's title: how long it takes, and what it leads back to."""
    order = chapters(app.env)
    title = next(doctree.findall(nodes.title), None)
    if app.builder.format != "html" or docname not in order or title is None:
        return
    facts = store(app.env)[docname]
    run = app.env.nb_metadata[docname].get("exec_data", {}).get("runtime")  # type: ignore[attr-defined]
    words = f"About {facts['minutes']} minutes to read" + (f", {run:.0f} s to run" if run else "")
    line = nodes.paragraph("", words, classes=["page-facts"])
    earlier = order[: order.index(docname)]
    before = [name for name, _ in facts["named"].most_common() if name in earlier][:BEFORE]
    for position, name in enumerate(sorted(before, key=order.index)):
        line += nodes.Text(" · builds on " if position == 0 else ", ")
        called = nodes.Text(app.env.titles[name].astext())
        line += make_refnode(app.builder, docname, name, "", called)
    title.parent.insert(title.parent.index(title) + 1, line)


def show_answer(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Copy the figure that the opening names; nothing where no cell ran, or where the reader runs them."""
    for place in list(doctree.findall(Answer)):
        wanted = nodes.make_id(place["label"])
        figure = next((f for f in doctree.findall(nodes.figure) if wanted in f["ids"]), None)
        if figure is None and app.config.nb_execution_mode != "off":
            message = f"no figure {place['label']!r} on this page to open it with"
            logger.warning(message, location=place, type="companion", subtype="answer")
        if figure is None or app.builder.format != "html":
            place.parent.remove(place)
            continue
        out = nodes.container(classes=["answer"])
        out += [image.deepcopy() for image in figure.findall(nodes.image)]
        for caption in figure.findall(nodes.caption):
            said = nodes.paragraph("", "", *(child.deepcopy() for child in caption.children))
            said += nodes.Text(" ")
            said += nodes.reference("", "Where this is drawn.", internal=True, refuri=f"#{wanted}")
            out += said
        place.replace_self(out)


def decorate(
    app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: Any
) -> None:
    """Version, commit and the way to cite at the foot; no script for live kernels, which this book has not."""
    revision = app.companion_revision  # type: ignore[attr-defined]
    commit = f", commit {revision}" if revision else ""
    cite = ""
    if "book/cite" in app.env.found_docs:
        cite = f' · <a href="{context["pathto"]("book/cite")}">Cite this</a>'
    context["theme_extra_footer"] = f'<p class="edition">grsd {__version__}{commit}{cite}</p>'
    kept = [s for s in context.get("script_files", []) if "thebe" not in repr_script(s)]
    context["script_files"] = kept


def repr_script(script: Any) -> str:
    """What a script tag loads or says."""
    return f"{script} {getattr(script, 'attributes', {}).get('body', '')}".lower()


def _purge(_app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    store(env).pop(docname, None)


def _merge(_app: Sphinx, env: BuildEnvironment, docnames: Any, other: BuildEnvironment) -> None:
    store(env).update({name: facts for name, facts in store(other).items() if name in docnames})


def _start(app: Sphinx) -> None:
    revision = git(Path(app.srcdir), "rev-parse", "--short=12", "HEAD")
    changed = "+" if revision and git(Path(app.srcdir), "status", "--porcelain") else ""
    app.companion_revision = revision + changed  # type: ignore[attr-defined]


def setup(app: Sphinx) -> None:
    app.add_node(Answer)
    app.add_directive("answer", AnswerDirective)
    app.add_directive("interactive", InteractiveDirective)
    app.add_directive("cite-this", CiteDirective)
    app.connect("builder-inited", _start)
    app.connect("env-purge-doc", _purge)
    app.connect("env-merge-info", _merge)
    app.connect("doctree-read", read)
    app.connect(
        "doctree-resolved", show_answer, priority=400
    )  # before alternative texts are checked
    app.connect("doctree-resolved", show_facts)
    app.connect("html-page-context", decorate, priority=950)
