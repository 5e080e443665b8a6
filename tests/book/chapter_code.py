"""Functions and classes that a chapter defines, for tests that need more than the page checks."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import jupytext

BOOK = Path(__file__).parents[2] / "book"


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a cell defines or imports."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def definitions(chapter: str, *names: str) -> SimpleNamespace:
    """Run what a chapter (a path in book/) defines under these names, and the imports they need."""
    cells = jupytext.reads((BOOK / chapter).read_text(), fmt="md:myst").cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    nodes = [node for source in code for node in ast.parse(source).body]
    wanted = [node for node in nodes if _bound(node) & set(names)]
    used = {x.id for node in wanted for x in ast.walk(node) if isinstance(x, ast.Name)}
    imports = [
        node
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom) and _bound(node) & used
    ]
    namespace: dict[str, object] = {}
    exec(compile(ast.Module([*imports, *wanted], []), chapter, "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})
