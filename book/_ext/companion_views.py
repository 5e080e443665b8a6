"""What a reader sees of the ledger: claim cards, the box at the head of a chapter, the scoreboard. Nodes in, nodes out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from docutils import nodes
from sphinx.builders import Builder
from sphinx.util.nodes import make_refnode

from grsd import claims

# no emphasis by single asterisks: the ledger writes adjoints as J*
_LETTER = r"A-Za-z\u00c0-\u017f\u1e00-\u1effΑ-ω\u0300-\u036f"  # with what stands over a letter
_MARKUP = re.compile(
    r"\$(?P<math>[^$]+)\$|`(?P<literal>[^`]+)`|\*\*(?P<strong>[^*]+)\*\*"
    rf"|(?<=[{_LETTER}‖∂∑∏)])_(?P<letter>[A-Za-z0-9Α-ω∅])(?![A-Za-z0-9_])"
    r"|(?<=∂)_(?P<derivative>[a-zΑ-ω])"  # ∂_tA
    rf"|(?<=[{_LETTER}‖∂∑∏)])_\{{(?P<braced>[^{{}}]+)\}}"  # J_{≤α}
    rf"|(?<=(?<![A-Za-z])[{_LETTER}])_(?P<word>[A-Za-z]{{2,5}}|[0-9]{{2}})(?![A-Za-z0-9_])"  # λ_max, but not match_rms
    rf"|(?<=[{_LETTER}0-9₀-₉‖)\]}}])\^(?:"
    r"(?P<layer>\([lmℓk]\))"  # M^(ℓ): its brackets are part of the notation
    r"|\((?P<power>(?:[^()]|\((?:[^()]|\([^()]*\))*\))+)\)"  # t^(−c0(p+1))
    r"|\{(?P<set>[^{}]+)\}"
    r"|(?P<short>[−-]?(?:[0-9]+(?:\.[0-9]+)?|[A-Za-zΑ-ω][0-9]?(?![A-Za-z])|[⊥+∗])))"  # t^−1.5, t^c0
)
_NODES = {"math": nodes.math, "literal": nodes.literal, "strong": nodes.strong}
_NODES |= dict.fromkeys(("letter", "derivative", "braced", "word"), nodes.subscript)
_NODES |= dict.fromkeys(("layer", "power", "set", "short"), nodes.superscript)


@dataclass(frozen=True)
class Linker:
    """Links from the page being written; a chapter that is not in the book yet is named, not linked."""

    builder: Builder
    docname: str
    found: Collection[str]
    claims_page: str = ""

    def chapter(self, claim: claims.Claim) -> nodes.Node:
        target, name = docname(claim), claim.chapter
        return (
            self._to(target, "", nodes.Text(name))
            if target in self.found
            else nodes.literal(name, name)
        )

    def check(self, claim: claims.Claim) -> nodes.Node:
        """To the cell that records the claim, not to the top of its chapter."""
        target, name = docname(claim), nodes.Text("the check")
        return (
            self._to(target, check_anchor(claim.id), name)
            if target in self.found
            else self.chapter(claim)
        )

    def claim(self, claim_id: str, child: nodes.Node | None = None) -> nodes.Node:
        text = child or nodes.literal(claim_id, claim_id)
        return self._to(self.claims_page, anchor(claim_id), text) if self.claims_page else text

    def _to(self, target: str, fragment: str, child: nodes.Node) -> nodes.reference:
        return make_refnode(self.builder, self.docname, target, fragment, child)


def docname(claim: claims.Claim) -> str:
    """Sphinx's name of the page that settles a claim: the ledger's ``spectrum/operator`` is ``book/spectrum/operator``."""
    return f"book/{claim.chapter}"


def anchor(claim_id: str) -> str:
    """HTML id of a claim's card on the claims page."""
    return f"claim-{nodes.make_id(claim_id)}"


def check_anchor(claim_id: str) -> str:
    """HTML id of the cell that records a claim in its chapter."""
    return f"check-{nodes.make_id(claim_id)}"


class Fold(nodes.General, nodes.Element):
    """What a click opens: a `FoldHead` and what stands below it; `data` becomes attributes of the tag."""


class FoldHead(nodes.General, nodes.TextElement):
    """The line of a `Fold` that is always seen."""


def visit_fold(self: Any, node: Fold) -> None:
    data = {f"data-{name}": value for name, value in node.get("data", {}).items()}
    self.body.append(self.starttag(node, "details", **data))


def depart_fold(self: Any, _node: Fold) -> None:
    self.body.append("</details>\n")


def visit_head(self: Any, node: FoldHead) -> None:
    self.body.append(self.starttag(node, "summary", ""))


def depart_head(self: Any, _node: FoldHead) -> None:
    self.body.append("</summary>\n")


def inline(text: str) -> list[nodes.Node]:
    """Text of the ledger with ``$math$``, `` `code` ``, ``**strong**`` and ``E_α``, ``λ_max``, ``J_{≤α}``, ``t^(−1/2)``, ``M^(ℓ)`` as nodes."""
    out: list[nodes.Node] = []
    end = 0
    for match in _MARKUP.finditer(text):
        out += [nodes.Text(text[end : match.start()])] if match.start() > end else []
        kind = str(match.lastgroup)
        content = match.group(kind)
        # the notebook writer takes a formula's text from its child, the HTML writer from astext(): both read this one
        out.append(_NODES[kind](content, content))
        end = match.end()
    return out + ([nodes.Text(text[end:])] if end < len(text) else [])


def badge(verdict: str) -> nodes.inline:
    """Symbol and word of a verdict; the colour in the style sheet only repeats what they say."""
    symbol, word, _meaning = claims.VERDICTS[verdict]
    return nodes.inline("", f"{symbol} {word}", classes=["verdict", f"verdict-{verdict}"])


def _line(*parts: nodes.Node | str, classes: Sequence[str] = ()) -> nodes.paragraph:
    paragraph = nodes.paragraph("", classes=list(classes))
    for part in parts:
        paragraph.extend(inline(part) if isinstance(part, str) else [part])
    return paragraph


def arxiv(paper: str) -> str:
    """The identifier in a paper's title in the ledger: ``A title (arXiv:2512.10427)`` gives ``arXiv:2512.10427``."""
    found = re.search(r"arXiv:[0-9.]+", claims.PAPERS[paper])
    return found.group() if found else claims.PAPERS[paper]


def _named(name: str, *parts: nodes.Node | str) -> nodes.paragraph:
    return _line(nodes.strong("", name + ":"), nodes.Text(" "), *parts)


def number(value: Any) -> str:
    """A measured value for reading: floats to four significant digits, mappings as ``name = value``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping)):
        return str(value)
    if isinstance(value, Mapping):
        return "; ".join(f"{key} = {number(item)}" for key, item in value.items())
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _evidence(claim: claims.Claim) -> list[nodes.Node]:
    lines: list[nodes.Node] = [_named("Checked", claim.measured), _named("Required", claim.bound)]
    found = claims.evidence(claim.id)
    if found is None:
        return [*lines, _line("No run of this build recorded evidence.", classes=["claim-missing"])]
    lines += _measured(found.measured, found.bound)
    return [*lines, _named("Note", found.note)] if found.note else lines


def _measured(measured: claims.Measured, bound: claims.Measured | None) -> list[nodes.Node]:
    """One line for one number; for several a list, each with its own bound where there is one under the same name."""
    if not isinstance(measured, Mapping):
        compared = f"; compared with {number(bound)}" if bound is not None else ""
        return [_named("Measured in this build", nodes.Text(number(measured) + compared))]
    bounds = bound if isinstance(bound, Mapping) else {}
    items = nodes.bullet_list(classes=["claim-numbers"])
    for name, value in measured.items():
        compared = f" (compared with {number(bounds[name])})" if name in bounds else ""
        items += nodes.list_item("", _line(f"{name}: {number(value)}{compared}"))
    rest = (
        {name: value for name, value in bounds.items() if name not in measured} if bounds else bound
    )
    out: list[nodes.Node] = [_named("Measured in this build", ""), items]
    return (
        [*out, _named("Compared with", nodes.Text(number(rest)))] if rest not in (None, {}) else out
    )


def _settled(claim: claims.Claim) -> list[nodes.Node]:
    holds = "What holds instead" if claim.verdict in ("corrected", "refuted") else "Precisely"
    fields = (
        (holds, claim.corrected),
        ("Needs" if claim.verdict != "untested" else "Why", claim.assumption),
    )
    return [_named(name, text) for name, text in fields if text]


def _tail(claim: claims.Claim, *links: nodes.Node) -> nodes.paragraph:
    """The last line of a card: its id, where to go on, rows of the prior audit."""
    parts: list[nodes.Node | str] = [nodes.literal("", claim.id)]
    for link in links:
        parts += [nodes.Text(" · "), link]
    if claim.audit:
        parts.append(nodes.Text(" · prior audit " + ", ".join(claim.audit)))
    return _line(*parts, classes=["claim-tail"])


def _head(claim: claims.Claim, *cells: Sequence[nodes.Node]) -> FoldHead:
    """Verdict and short name, then what the list adds."""
    out = FoldHead("", "", badge(claim.verdict), nodes.Text(" "))
    out += nodes.inline("", claim.name, classes=["claim-name"])
    for cell in cells:
        out += nodes.Text(" ")
        out += nodes.inline("", "", *cell, classes=["claim-where"])
    return out


def card(claim: claims.Claim, link: Linker) -> Fold:
    """One claim: a line, and on a click statement, what holds instead, evidence, where it is settled."""
    page = claim.chapter.rpartition("/")[2]
    data = {"paper": claim.paper, "verdict": claim.verdict, "chapter": claim.chapter}
    out = Fold(ids=[anchor(claim.id)], classes=["claim-card"], data=data)
    out += _head(claim, inline(claim.locator), [nodes.Text(page)])
    out += _named("Stated", claim.statement)
    out.extend(_settled(claim))
    out.extend(_evidence(claim) if claim.verdict != "untested" else [])
    links = [link.check(claim)] if claim.verdict != "untested" else []
    links += [link.chapter(claim)] if claim.chapter else [nodes.Text("no chapter yet")]
    out += _tail(claim, *links)
    return out


def page(chosen: Sequence[claims.Claim], link: Linker) -> list[nodes.Node]:
    """Cards in the order of the ledger, under a one-line count; a script adds the filters."""
    if not chosen:
        return [_line("No claim of this part has been checked yet.")]
    counts = nodes.paragraph("", f"{len(chosen)} claims: ", classes=["claim-counts"])
    present = [verdict for verdict in claims.VERDICTS if any(c.verdict == verdict for c in chosen)]
    for position, verdict in enumerate(present):
        counts += nodes.Text(", " if position else "")
        counts += badge(verdict)
        counts += nodes.Text(f" {sum(c.verdict == verdict for c in chosen)}")
    counts += nodes.Text(".")
    table = nodes.container(classes=["claim-table"])
    table.extend(card(claim, link) for claim in chosen)
    return [counts, table]


def box(chosen: Sequence[claims.Claim], link: Linker, folded: bool = True) -> nodes.admonition:
    """What a chapter settles: a line a claim, its card folded; all of it open where nothing can fold."""
    out = nodes.admonition(classes=["claim-box"])
    out += nodes.title("", "Claims settled in this chapter")
    for claim in chosen:
        where = [nodes.Text(f"{arxiv(claim.paper)}, "), *inline(claim.locator)]
        entry: nodes.Element
        if folded:
            entry = Fold(classes=["claim-entry"])
            entry += _head(claim, where)
        else:
            entry = nodes.container(classes=["claim-entry"])
            entry += _line(badge(claim.verdict), f" **{claim.name}** · ", *where)
        entry += _named("Stated", claim.statement)
        entry.extend(_settled(claim))
        more = link.claim(claim.id, nodes.Text("the numbers"))
        entry += _tail(claim, more, *([link.check(claim)] if claim.verdict != "untested" else []))
        out += entry
    return out


def scoreboard(ledger: Sequence[claims.Claim]) -> nodes.table:
    """Verdicts against papers; a verdict nobody received and a paper without claims have no row and no column.

    What a verdict says stands under its badge: a column of its own pushes the last paper off a page that has both sidebars.
    """
    papers = [paper for paper in claims.PAPERS if any(c.paper == paper for c in ledger)]
    verdicts = [verdict for verdict in claims.VERDICTS if any(c.verdict == verdict for c in ledger)]
    # a long heading may be broken after its colon
    head = [
        "Verdict",
        *(arxiv(paper).replace(":", ":\u200b") for paper in papers),
        *(["All"] if len(papers) > 1 else []),
    ]
    rows: list[list[nodes.Node]] = []
    for verdict in verdicts:
        mine = [c for c in ledger if c.verdict == verdict]
        counts = [sum(c.paper == paper for c in mine) for paper in papers] + (
            [len(mine)] if len(papers) > 1 else []
        )
        said = nodes.paragraph(
            "", "", badge(verdict), nodes.Text(" "), *inline(claims.VERDICTS[verdict][2])
        )
        rows.append([said, *(nodes.paragraph("", str(count)) for count in counts)])
    total = [sum(c.paper == paper for c in ledger) for paper in papers] + (
        [len(ledger)] if len(papers) > 1 else []
    )
    rows.append([_line("All"), *(nodes.paragraph("", str(count)) for count in total)])
    return _table(
        [nodes.paragraph("", text) for text in head], rows, widths=[60] + [14] * (len(head) - 1)
    )


def _table(
    head: Sequence[nodes.Node], rows: Sequence[Sequence[nodes.Node]], widths: Sequence[int]
) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group.extend(nodes.colspec(colwidth=width) for width in widths)
    for section, content in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for cells in content:
            section += nodes.row("", *(nodes.entry("", cell) for cell in cells))
        group += section
    table = nodes.table(classes=["scoreboard"])
    table += group
    return table
