"""The way from a page to a notebook that runs elsewhere: Colab buttons, and the reader notebooks behind them.

The repository's address is read from the checkout (``GRSD_REPOSITORY``, else the git remote ``origin``), never from the sources: a
fork gets its own buttons, a checkout without a GitHub remote builds a book without them.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.console import bold
from sphinx_tojupyter.builders.jupyter import JupyterBuilder
from sphinx_tojupyter.writers.jupyter import JupyterWriter
from sphinx_tojupyter.writers.translate_all import JupyterTranslator

PUBLISHED = "gh-pages"  # the branch that publish.yml writes: pages at its root, notebooks under `notebooks/`
SETUP = "from grsd.chapter import"  # how the first cell of a chapter begins
BOOTSTRAP = """\
# Installs the package of this notebook's edition where it is missing; touches neither torch nor numpy.
import importlib.util, os, subprocess, sys
os.environ.setdefault("GRSD_SITE", "{site}")  # where links between chapters lead
if importlib.util.find_spec("grsd") is None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "{address}"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install grsd: {{done.stderr or done.stdout}}")

"""

_GITHUB = re.compile(
    r"^(?:(?:https?|ssh|git)://(?:[^/@]*@)?github\.com(?::\d+)?/|(?:[^/@]+@)?github\.com:|)"
    r"(?P<owner>[A-Za-z0-9][A-Za-z0-9-]*)/(?P<name>[A-Za-z0-9._-]+?)(?:\.git)?/?$"
)


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub."""

    owner: str
    name: str

    @property
    def url(self) -> str:
        return f"https://github.com/{self.owner}/{self.name}"

    @property
    def site(self) -> str:
        """Where GitHub Pages serves the published branch."""
        return f"https://{self.owner.lower()}.github.io/{self.name}"

    def colab(self, docname: str) -> str:
        """Colab's address of a page's published notebook."""
        path = f"{self.owner}/{self.name}/blob/{PUBLISHED}/notebooks/{docname}.ipynb"
        return f"https://colab.research.google.com/github/{path}"


def parse(address: str) -> Repository | None:
    """The GitHub repository of an address (https, ssh, ``git@github.com:owner/name`` or ``owner/name``), or None.

    Credentials in the address are dropped. A path on this machine and another host give None.
    """
    found = _GITHUB.match(address.strip())
    return Repository(found["owner"], found["name"]) if found else None


def git(root: Path, *arguments: str) -> str:
    """Output of a git command in the checkout; empty when it fails or git is absent."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def repository(root: Path) -> Repository | None:
    """Where this checkout is published: ``GRSD_REPOSITORY`` when set (empty: nowhere), else the remote ``origin``.

    A remote must name github.com; the short form ``owner/name`` is read in the variable only, since as a remote it is a path.
    """
    chosen = os.environ.get("GRSD_REPOSITORY")
    if chosen is not None:
        if chosen.strip() and parse(chosen) is None:
            raise ValueError(
                f"GRSD_REPOSITORY is {chosen!r}; expected owner/name or an address at github.com"
            )
        return parse(chosen) if chosen.strip() else None
    remote = git(root, "remote", "get-url", "origin")
    return parse(remote) if "github.com" in remote else None


def configure(app: Sphinx, config: Config) -> None:
    """Give the theme the repository's address and the buttons that need one.

    They cannot stand in ``_config.yml``: jupyter-book refuses a button there without an address beside it.
    """
    mine = repository(Path(app.srcdir))
    app.companion_repository = mine  # type: ignore[attr-defined]
    if mine:
        config.html_theme_options |= {
            "repository_url": mine.url,
            "use_repository_button": True,
            "use_issues_button": True,
        }


def buttons(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Replace the theme's launch group (it points at the source file) by one button to the published notebook."""
    mine = app.companion_repository  # type: ignore[attr-defined]
    kept = [
        button
        for button in context.get("header_buttons", [])
        if button.get("label") != "launch-buttons"
    ]
    if mine and "kernelspec" in app.env.metadata.get(pagename, {}):
        kept.insert(
            0,
            {
                "type": "link",
                "text": "Colab",
                "tooltip": "Run this chapter on Colab",
                "icon": "fas fa-rocket",
                "url": mine.colab(pagename),
                "label": "colab-button",
            },
        )
    context["header_buttons"] = kept


def publishable(notebook: Any, address: str, site: str = "") -> Any:
    """A reader's notebook: no build date, no outputs, and the address to install ``grsd`` from in its setup cell.

    Cell ids are numbered, so that an unchanged chapter is published as the same file.
    """
    notebook.metadata.pop("date", None)
    notebook.metadata.kernelspec["language"] = "python"
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position}"
        if cell.cell_type == "code":
            cell.metadata.pop("hide-output", None)
            cell.outputs, cell.execution_count = [], None
            if cell.source.startswith(SETUP):
                cell.metadata.update(cellView="form", jupyter={"source_hidden": True})
                if address:
                    cell.source = BOOTSTRAP.format(address=address, site=site) + cell.source
    return notebook


class ReaderTranslator(JupyterTranslator):
    """Notebook text with what the original loses or garbles.

    Markup inside tables, alternative text of images, captions of figures that a cell draws, titles of boxes, and links: on Colab a
    link to a neighbouring file leads nowhere, so links between pages lead to the published site.
    """

    markdown_lines: list[str]
    table_builder: Any

    def visit_entry(self, node: nodes.entry) -> None:
        self._outside, self._table = self.markdown_lines, self.table_builder
        self.markdown_lines, self.table_builder = [], None

    def depart_entry(self, node: nodes.entry) -> None:
        text = " ".join("".join(self.markdown_lines).split()).replace("|", r"\|")
        self.markdown_lines, self.table_builder = self._outside, self._table
        self.table_builder["line_pending"] += f" {text} |"

    def visit_image(self, node: nodes.image) -> None:
        super().visit_image(node)
        alt = " ".join(str(node.get("alt", "")).split()).replace("]", ")").replace("[", "(")
        if self.markdown_lines:
            self.markdown_lines[-1] = re.sub(
                r"^!\[[^\]]*\]", lambda _: f"![{alt}]", self.markdown_lines[-1]
            )

    def visit_container(self, node: nodes.container) -> None:
        if "cell_output" in node["classes"]:
            for figure in node.findall(nodes.figure):
                self._caption(figure)
            raise nodes.SkipNode

    def _caption(self, figure: nodes.figure) -> None:
        numbers = self.builder.env.toc_fignumbers.get(self.builder.docname, {}).get("figure", {})
        number = next(
            (".".join(map(str, numbers[key])) for key in figure["ids"] if key in numbers), ""
        )
        for caption in figure.findall(nodes.caption):
            self.markdown_lines.append(f"**Figure {number}.** " if number else "**Figure.** ")
            for child in caption.children:
                child.walkabout(self)
            self.add_markdown_cell()

    def visit_title(self, node: nodes.title) -> None:
        if isinstance(node.parent, (nodes.section, nodes.topic, nodes.table)):
            super().visit_title(node)
        else:  # of a box: bold, or it would become a heading of the first level
            self.markdown_lines.append("**")

    def depart_title(self, node: nodes.title) -> None:
        if isinstance(node.parent, (nodes.section, nodes.topic, nodes.table)):
            super().depart_title(node)
        else:
            self.markdown_lines.append("**\n\n")

    def visit_exercise_enumerable_node(self, node: nodes.Element) -> None:
        title = node.children[0]
        named = title.astext().strip()
        super().visit_exercise_enumerable_node(node)  # appends the number to the title
        number = str(title.children[-1])
        title.children = [nodes.Text(f"{number} {named}" if named else number)]

    def visit_proof_node(self, node: nodes.Element) -> None:
        self.add_markdown_cell()  # the text begins with "Proof." already

    def visit_subscript(self, node: nodes.subscript) -> None:
        self.markdown_lines.append("<sub>")

    def depart_subscript(self, node: nodes.subscript) -> None:
        self.markdown_lines.append("</sub>")

    def visit_superscript(self, node: nodes.superscript) -> None:
        self.markdown_lines.append("<sup>")

    def depart_superscript(self, node: nodes.superscript) -> None:
        self.markdown_lines.append("</sup>")

    def visit_reference(self, node: nodes.reference) -> None:
        if node.get("internal") and "refuri" in node:
            address = self._published(node["refuri"])
            node["internal"] = False  # already complete; the original would append .ipynb
            if not address:
                node.replace_self(list(node.children))
                for child in node.children:
                    child.walkabout(self)
                raise nodes.SkipNode
            node["refuri"] = address
        super().visit_reference(node)

    def _published(self, uri: str) -> str:
        mine = self.builder.app.companion_repository
        target, _, fragment = uri.partition("#")
        page = posixpath.normpath(posixpath.join(posixpath.dirname(self.builder.docname), target))
        return f"{mine.site}/{page}.html{'#' + fragment if fragment else ''}" if mine else ""


class ReaderWriter(JupyterWriter):
    """Writer that uses `ReaderTranslator`."""

    def _identify_translator(self, builder: Any) -> type:
        return ReaderTranslator


class ReaderNotebooks(JupyterBuilder):
    """The notebook builder without its ``exit()``, which ends the process with status 0 whatever ``-W`` found."""

    name = "jupyter"
    _writer_class = ReaderWriter

    def update_Metadata(self, docname: str, nb: Any) -> Any:
        mine = self.app.companion_repository
        revision = git(Path(self.app.srcdir), "rev-parse", "HEAD")
        address = f"git+{mine.url}@{revision}" if mine and revision else ""
        site = mine.site if mine else ""
        return publishable(super().update_Metadata(docname, nb), address, site)

    def finish(self) -> None:
        for page in sorted(self.env.found_docs):
            path = Path(self.outdir) / f"{page}.ipynb"
            if "kernelspec" in self.env.metadata.get(page, {}):
                nbformat.validate(nbformat.read(path, as_version=4))  # type: ignore[no-untyped-call]
            else:
                path.unlink(missing_ok=True)  # a page without code is read on the web
        self.logger.info(bold("reader notebooks: ") + str(self.outdir))


def setup(app: Sphinx) -> None:
    """Register the buttons and the builder (after sphinx-tojupyter, whose name it takes)."""
    app.setup_extension("sphinx_tojupyter")
    app.add_builder(ReaderNotebooks, override=True)
    app.connect("config-inited", configure, priority=100)
    app.connect("html-page-context", buttons, priority=900)
