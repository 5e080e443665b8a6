"""The reference pages: every module that a chapter imports stands there, and every command with the help that it prints."""

from __future__ import annotations

import ast
import importlib
import re

import click
import companion_names
import jupytext
import pytest
from click.testing import CliRunner
from docutils.core import publish_doctree
from docutils.utils import Reporter

from grsd.cli import main
from grsd.experiments import engine

from .conftest import ROOT
from .test_pages import CHAPTERS, NAMES

DOCUMENTED = {
    module
    for page in NAMES
    for module in re.findall(r"^\.\. automodule:: (\S+)", (ROOT / page).read_text(), re.M)
}
INSIDE = {"grsd.experiments.benchmark_tables"}  # reads this project's own benchmark


def homes(source: str) -> set[str]:
    """Return the modules of grsd in which the names that a text imports are written down."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "grsd":
            for alias in node.names:
                try:
                    found.add(importlib.import_module(f"{node.module}.{alias.name}").__name__)
                except ModuleNotFoundError:
                    home = str(
                        getattr(
                            getattr(importlib.import_module(node.module), alias.name),
                            "__module__",
                            "",
                        )
                    )
                    found.add(home if home.startswith("grsd.") else node.module)
    return found - {"grsd.mup"}  # the room itself, imported for `mup.plan` and `mup.coord_check`


def test_every_module_that_a_chapter_imports_stands_on_a_reference_page() -> None:
    used: set[str] = set()
    for chapter in CHAPTERS:
        for cell in jupytext.read(ROOT / chapter).cells:
            if cell.cell_type == "code":
                used |= homes(re.sub(r"^[%!].*$", "", cell.source, flags=re.M))
    assert len(used) > 40
    # an experiment's options are printed by `grsd experiment`
    shown = {engine.find(name).parameters.__module__ for name in engine.NAMES}
    assert used - shown - INSIDE - DOCUMENTED == set()
    for module in DOCUMENTED:
        assert importlib.import_module(module).__doc__


def test_every_experiment_stands_on_the_page_that_makes_it_again() -> None:
    page = (ROOT / "book/reproduce.md").read_text()
    table = page.partition("| `grsd experiment` |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == sorted(engine.NAMES)


def test_an_import_is_traced_to_the_module_that_writes_the_name_down() -> None:
    assert homes("from grsd.spectrum import NTK\nfrom grsd import claims\nimport math") == {
        "grsd.spectrum.operator.ntk",
        "grsd.claims",
    }


def test_every_command_has_a_section_with_the_help_that_it_prints() -> None:
    found = dict(companion_names.helps(main, "grsd"))
    below = {f"grsd {name}" for name in main.commands}
    nested = {
        f"grsd {group} {name}"
        for group, c in main.commands.items()
        if isinstance(c, click.Group)
        for name in c.commands
    }
    assert set(found) == {"grsd"} | below | nested and nested
    for line, text in found.items():
        printed = CliRunner().invoke(main, [*line.split()[1:], "--help"], prog_name="grsd")
        assert printed.exit_code == 0
        options = re.compile(r"--[a-z][a-z-]+")
        assert set(options.findall(text)) == set(options.findall(printed.output)), line
        assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize("handled", [False, True])
def test_bars_of_a_docstring_stay_bars(handled: bool) -> None:
    lines = ["The size |x| of a number, and |y|."]
    if handled:
        companion_names.without_substitutions(None, "function", "f", None, None, lines)  # type: ignore[arg-type]
    tree = publish_doctree(
        "\n".join(lines), settings_overrides={"report_level": Reporter.SEVERE_LEVEL}
    )
    broken = [node for node in tree.findall() if node.tagname == "problematic"]
    assert bool(broken) != handled
    if handled:
        assert tree.astext() == "The size |x| of a number, and |y|."


def test_attributes_that_share_a_line_get_a_field_each() -> None:
    lines = [
        ":ivar r_n, r_L:",
        ":vartype r_n, r_L: float, ratios",
        ":ivar k: layers, 1 or 2",
        "A sentence, with: a colon",
    ]
    companion_names.one_by_one(None, "class", "Plan", None, None, lines)  # type: ignore[arg-type]
    assert lines == [
        ":ivar r_n:",
        ":ivar r_L:",
        ":vartype r_n: float, ratios",
        ":vartype r_L: float, ratios",
        ":ivar k: layers, 1 or 2",
        "A sentence, with: a colon",
    ]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("x : Tensor (n, d)", ["x : Tensor (n, d)"]),
        ("gap : float, energy per nat", ["gap : float", "    energy per nat"]),
        ("a, b : dimension d of one input, and h", ["a, b", "    dimension d of one input, and h"]),
        ("steps : int, optional", ["steps : int, optional"]),
        ("nodes : (m,) float64, in rising order", ["nodes : (m,) float64", "    in rising order"]),
        ("sizes : tuple of int or list of int", ["sizes : tuple of int or list of int"]),
        ("Words : not a field of names.", ["Words", "    not a field of names."]),
        ("No field here: a sentence.", ["No field here: a sentence."]),
    ],
)
def test_what_is_no_type_leaves_the_slot_of_types(written: str, shown: list[str]) -> None:
    lines = [written]
    companion_names.words_below_types(None, "", "", None, None, lines)  # type: ignore[arg-type]
    assert lines == shown
