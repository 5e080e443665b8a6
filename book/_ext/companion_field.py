"""The page "Works on": the stored result of the experiment ``field`` as a table, its reasons, and where it comes from.

Directives: ``{field-table}``, ``{field-reasons}``, ``{field-origin}``. They read `grsd.results` and nothing else; a reason is
numbered in the order in which the table meets it, names of modules and numbers in it aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from grsd import results

RESULT = "field"
SIGNS = {"exact": "✓", "refused": "R", "absent": "–", "wrong": "✗", "raw": "✗"}
FORMS = {"auto": "default form", "graph": "graph form", "": ""}
OWN = "the model itself fails"  # how an absent cell begins that the model, not the setting, is to blame for
KINDS = {
    "decoder": "Decoders",
    "mixture": "Mixtures of experts",
    "recurrent": "Recurrent and state-space models",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder–decoders",
    "vision": "Vision",
}


def canonical(reason: str) -> str:
    """A reason without the names of modules and the numbers of one case."""
    return re.sub(r"\d+(?:\.\d+)?(?:e-?\d+)?", "n", re.sub(r"'[\w.]+'", "'…'", reason))


def shown(data: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Reason → its words, the cells, and the forms: of what is refused, of faults, and of models that fail by themselves."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in data["rows"].items():
        for setting, cell in row["cells"].items():
            for form, number in cell.get("reasons", {}).items():
                words = data["reasons"][number]
                if cell["status"] == "absent" and not words.startswith(OWN):
                    continue
                entry = found.setdefault(canonical(words), {"words": [words]})
                entry.setdefault(name, []).append(setting)
                entry.setdefault("forms", []).append(form)
    return found


def table(data: Mapping[str, Any]) -> nodes.table:
    """Architectures against settings; the last column is the largest difference, in units of ε of its arithmetic."""
    settings = [name for name, _ in data["settings"]]
    numbers = {words: str(k) for k, words in enumerate(shown(data), 1)}
    group = nodes.tgroup(cols=len(settings) + 2)
    group.extend(nodes.colspec(colwidth=1) for _ in range(len(settings) + 2))
    heads = ["", *settings, "largest / ε"]
    group += nodes.thead("", nodes.row("", *(_entry(head) for head in heads)))
    body = nodes.tbody()
    for kind, title in KINDS.items():
        rows = {name: row for name, row in data["rows"].items() if row["kind"] == kind}
        if rows:
            head = nodes.entry("", nodes.paragraph("", "", nodes.strong("", title)))
            head["morecols"], head["classes"] = len(settings) + 1, ["field-kind"]
            body += nodes.row("", head)
        for name, row in rows.items():
            cells = [_cell(data, row["cells"][setting], numbers) for setting in settings]
            body += nodes.row("", _entry(name), *cells, _entry(largest(row)))
    group += body
    return nodes.table("", group, classes=["field-table"])


def largest(row: Mapping[str, Any]) -> str:
    """The largest difference of a row's exact cells, in units of the ε of each cell."""
    found = [c["difference"] / c["eps"] for c in row["cells"].values() if c["status"] == "exact"]
    return f"{max(found):.1f}" if found else "–"


def _entry(*children: nodes.Node | str, kind: str = "") -> nodes.entry:
    parts = [nodes.Text(child) if isinstance(child, str) else child for child in children]
    return nodes.entry(
        "", nodes.paragraph("", "", *parts), classes=[f"field-{kind}"] if kind else []
    )


def _cell(
    data: Mapping[str, Any], cell: Mapping[str, Any], numbers: Mapping[str, str]
) -> nodes.entry:
    said = [canonical(data["reasons"][k]) for k in cell.get("reasons", {}).values()]
    marks = ",".join(dict.fromkeys(numbers[words] for words in said if words in numbers))
    status = cell["status"]
    sign: list[nodes.Node | str] = [SIGNS[status]]
    if marks:
        sign.append(nodes.superscript("", marks))
    return _entry(*sign, kind="fault" if status in ("wrong", "raw") else status)


def reasons(data: Mapping[str, Any]) -> nodes.Element:
    """A numbered list: the words, and which cells they were said in."""
    items = nodes.enumerated_list(enumtype="arabic", suffix=".")
    for entry in shown(data).values():
        forms = {FORMS[form] for form in entry["forms"]}
        which = f" ({forms.pop()} only)" if len(forms) == 1 and "" not in forms else ""
        places = {k: v for k, v in entry.items() if k not in ("words", "forms")}
        where = "; ".join(f"{name}: {', '.join(dict.fromkeys(at))}" for name, at in places.items())
        item = nodes.list_item("", nodes.paragraph("", entry["words"][0] + which))
        item += nodes.paragraph("", where, classes=["field-where"])
        items += item
    return items if len(items) else nodes.paragraph("", "Nothing is refused.")


def origin(result: results.Result) -> nodes.paragraph:
    """Counts, date and versions."""
    cells = [c["status"] for row in result.data["rows"].values() for c in row["cells"].values()]
    words = {"exact": "exact", "refused": "refused", "wrong": "wrong", "raw": "raw errors"}
    counts = ", ".join(f"{cells.count(key)} {word}" for key, word in words.items())
    made = result.provenance
    kept = ("torch", "transformers", "grsd")
    versions = ", ".join(f"{k} {made['versions'][k]}" for k in kept if k in made["versions"])
    return nodes.paragraph(
        "",
        f"{len(result.data['rows'])} architectures in {len(result.data['settings'])} settings: {counts}, and "
        f"{cells.count('absent')} cells that do not exist. Measured {made['date'][:10]} with {versions}.",
    )


class FieldDirective(SphinxDirective):
    """One part of the page, by the directive's own name."""

    def run(self) -> list[nodes.Node]:
        result = results.load(RESULT)
        if self.name == "field-origin":
            return [origin(result)]
        if self.name == "field-settings":
            return [_definitions(result.data["settings"])]
        return [table(result.data) if self.name == "field-table" else reasons(result.data)]


def _definitions(settings: Sequence[Sequence[str]]) -> nodes.paragraph:
    """The settings with what they are, in one paragraph."""
    paragraph = nodes.paragraph()
    for k, (name, words) in enumerate(settings):
        paragraph += [nodes.strong("", name), nodes.Text(f" {words}")]
        paragraph += nodes.Text("; " if k + 1 < len(settings) else ".")
    return paragraph


def setup(app: Sphinx) -> None:
    """Register the directives."""
    for name in ("field-table", "field-reasons", "field-settings", "field-origin"):
        app.add_directive(name, FieldDirective)
