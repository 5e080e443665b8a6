"""The reference pages: docstrings as reStructuredText, and the help of every command of the command line.

Directive: ``{commands}``, a section for each command of `grsd` with what ``--help`` prints. The names of the package are drawn by
Sphinx's autodoc; the docstrings write absolute values and sets with bars, which would be substitutions there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from grsd.cli import main

WIDTH = 76  # characters of a line of help: a page without a scroll bar


class CommandsDirective(SphinxDirective):
    """What ``--help`` prints, command by command."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for name, text in helps(main, "grsd"):
            section = nodes.section(
                ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)]
            )
            section += nodes.title(name, name)
            section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def helps(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (command line, help) of a command and of all below it."""
    context = click.Context(
        command,
        info_name=name.rpartition(" ")[2],
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
    )
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from helps(found, f"{name} {below}", context)


_TYPE = (
    r"(?:(?:tuple|list|sequence|dict|array|set)s? of [\w.]+|int|float|bool|str|bytes|None|Path|slice|callable|mapping|tuple"
    r"|list|dict|sequence|(?:[a-z]+\.)*[A-Z]\w+|\"\w+\"|`[^`]+`)"
)
_SHAPE = r"\([^)]*\)(?: \w+\d+)?"  # (n, k), (m,) float64
SLOT = re.compile(
    rf"({_TYPE}(?:(?: or |, ){_TYPE})*(?:,? {_SHAPE})?(?:, optional)?|{_SHAPE})(?:[,;:.] (.*))?"
)


def words_below_types(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Leave types and shapes behind the colon of a parameter; what else stands there begins its description."""
    found: list[str] = []
    for line in lines:
        field = re.match(r"( *)([\w*]+(?:, [\w*]+)*) : (.+)", line)
        if field is None:
            found.append(line)
            continue
        indent, names, said = field.groups()
        slot = SLOT.fullmatch(said)
        found.append(f"{indent}{names} : {slot[1]}" if slot else f"{indent}{names}")
        rest = slot[2] if slot else said
        found += [f"{indent}    {rest}"] if rest else []
    lines[:] = found


def without_substitutions(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Write bars so that they stay bars."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def one_by_one(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]
) -> None:
    """Give each of several attributes that share a line of a docstring a field of its own; Sphinx knows one name a field."""
    found: list[str] = []
    for line in lines:
        field = re.match(r":(ivar|vartype) ([\w\\]+(?:, [\w\\]+)+):(.*)", line)
        if field is None:
            found.append(line)
        else:
            *names, last = field[2].split(", ")
            found += [
                f":{field[1]} {name}:{field[3] if field[1] == 'vartype' else ''}" for name in names
            ]
            found.append(f":{field[1]} {last}:{field[3]}")
    lines[:] = found


def setup(app: Sphinx) -> None:
    app.add_directive("commands", CommandsDirective)
    app.connect("autodoc-process-docstring", words_below_types, priority=100)  # before napoleon
    for handler in (one_by_one, without_substitutions):
        app.connect(
            "autodoc-process-docstring", handler, priority=900
        )  # after napoleon has read the sections
