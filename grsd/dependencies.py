"""What a module's numbers depend on: its own source, and that of all it imports from the package.

Found without running anything. Comments, docstrings and layout do not count; every other change
does. Two things are not seen: imports by a computed name, and modules that only register themselves
elsewhere when a package's ``__init__`` happens to import them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["PACKAGE", "code", "imported", "sha256"]

PACKAGE = Path(__file__).resolve().parent
Reference = tuple[str, tuple[str, ...]]  # a module, and a chain of attributes on it


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code(*parts: str | ModuleType | Callable[..., object] | Path, root: Path = PACKAGE) -> str:
    """SHA-256 of the code that stands behind modules or functions.

    Parameters
    ----------
    *parts : str, module, callable or Path
        A module, or its name; a function or class, which stands for the module that defines it; a
        data file, which counts with all its bytes.
    root : Path
        The folder of the package.

    Raises
    ------
    ValueError
        A module that is not in the package.

    Notes
    -----
    Hashed are the syntax trees, without docstrings, of the modules in `imported`, as ``ast.dump``
    writes them: another minor version of Python gives other keys. A package that is only passed
    through counts without its own imports and ``__all__``, but with the names that are taken from
    it, so that one more name in an ``__init__`` changes no key.
    """
    said: list[Any] = []
    for part in parts:
        if isinstance(part, Path):
            said.append([part.name, sha256(part)])
            continue
        full, passed, taken = _closure(_module_of(part), root)
        said.append([[name, full[name].digest] for name in sorted(full)])
        said.append([[name, passed[name].rest] for name in sorted(passed)])
        said.append(sorted(taken))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def imported(module: str, root: Path = PACKAGE) -> frozenset[str]:
    """The module and all it imports from its package, directly or not, at the top or in a function.

    Imports under ``if TYPE_CHECKING:`` are left out. A name that a package's ``__init__`` imports
    leads to the module that it comes from. A package that is used as a namespace leads to the
    attributes that are used; where they cannot be seen, to all that its ``__init__`` imports. The
    packages on the way are in the set; what else they import is not.

    Raises
    ------
    ValueError
        A module that is not in the package.
    """
    full, passed, _ = _closure(module, root)
    return frozenset(full | passed)


def _module_of(part: str | ModuleType | Callable[..., object]) -> str:
    while isinstance(part, functools.partial):
        part = part.func
    if isinstance(part, str):
        return part
    return part.__name__ if isinstance(part, ModuleType) else part.__module__


def _closure(
    module: str, root: Path
) -> tuple[dict[str, _Source], dict[str, _Source], set[tuple[str, str]]]:
    """The modules that count, the packages passed through, and what was taken from whom by name."""
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    if module not in files:
        raise ValueError(f"{module!r} is no module of the package {root.name!r} in {root.parent}")

    @functools.cache
    def source(name: str) -> _Source:
        package = files[name].name == "__init__.py"
        return _parsed(name, package, files[name].read_bytes())

    full: dict[str, _Source] = {}
    passed: dict[str, _Source] = {}
    taken: set[tuple[str, str]] = set()
    seen: set[Reference] = set()
    todo: list[Reference] = [(module, ())]
    while todo:
        name, chain = reference = todo.pop()
        if reference in seen:
            continue
        seen.add(reference)
        steps = name.split(".")
        above = [".".join(steps[:k]) for k in range(1, len(steps))]
        passed |= {package: source(package) for package in above if package in files}

        # the first attribute may be an import of that module, a module below it, or both
        here = source(name) if name in files else None
        onward: list[Reference] = []
        if chain and here is not None:
            for local, (origin, names) in here.bound:
                if local == chain[0]:
                    onward.append((origin, names + chain[1:]))
                    taken.add((f"{name}.{local}", ".".join((origin, *names))))
        if chain and (below := f"{name}.{chain[0]}") in files:
            onward.append((below, chain[1:]))
        todo += onward

        # a package counts in full for what it defines itself, and when it is used as an object
        if here is not None:
            defined = not here.stored.isdisjoint({*chain[:1], "__getattr__"})
            if not here.package or not onward or defined:
                full[name] = here
                todo += here.references
            else:
                passed[name] = here
    return full, {name: passed[name] for name in passed.keys() - full.keys()}, taken


@dataclass(frozen=True)
class _Source:
    """What one file says."""

    package: bool
    digest: str  # of its syntax tree without docstrings
    rest: str  # the same without __all__ and the imports from its own package
    bound: frozenset[tuple[str, Reference]]  # local names, and what an import binds them to
    stored: frozenset[str]  # names that it binds in any other way
    references: frozenset[Reference]  # its imports, followed as far as their use is seen


@functools.cache
def _parsed(module: str, package: bool, text: bytes) -> _Source:
    reader = _Reader(module, package)
    tree = _Strip().visit(ast.parse(text, filename=module))
    reader.visit(tree)
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    tree.body = [node for node in tree.body if not reader.hands_on(node)]
    rest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    sets = frozenset(reader.bound), frozenset(reader.stored), frozenset(reader.references())
    return _Source(package, digest, rest, *sets)


class _Strip(ast.NodeTransformer):
    """Takes out strings that stand alone, docstrings among them: they have no effect."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        value = node.value
        return None if isinstance(value, ast.Constant) and isinstance(value.value, str) else node


class _Reader(ast.NodeVisitor):
    """Collects what a module imports from its own package, and how it uses what it imported."""

    def __init__(self, module: str, package: bool) -> None:
        self.home = module.split(".")[: None if package else -1]  # relative imports start here
        self.top = module.split(".")[0]
        self.bound: set[tuple[str, Reference]] = set()
        self.stored: set[str] = set()
        self.uses: set[str] = set()  # names with all attributes behind them: "spectrum.NTK"

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return self.generic_visit(node)
        for other in node.orelse:
            self.visit(other)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == self.top:
                self.bound.add((alias.asname or alias.name, (alias.name, ())))
                if alias.asname is None:  # "import grsd.a" binds the name "grsd"
                    self.bound.add((self.top, (self.top, ())))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = self._origin(node)
        if origin.split(".")[0] == self.top:
            for alias in node.names:
                names = () if alias.name == "*" else (alias.name,)
                self.bound.add((alias.asname or alias.name, (origin, names)))

    def _origin(self, node: ast.ImportFrom) -> str:
        near = self.home[: len(self.home) - node.level + 1] if node.level else []
        return ".".join([*near, node.module] if node.module else near)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            names, inner = [inner.attr, *names], inner.value
        if isinstance(inner, ast.Name):
            self.uses.add(".".join([inner.id, *names]))
        else:
            self.visit(inner)

    def visit_Name(self, node: ast.Name) -> None:
        self.uses.add(node.id)
        if not isinstance(node.ctx, ast.Load):
            self.stored.add(node.id)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.stored.add(node.name)
        self.generic_visit(node)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _definition

    def hands_on(self, node: ast.stmt) -> bool:
        """Whether a statement only says what a package hands on."""
        if isinstance(node, ast.ImportFrom):
            return self._origin(node).split(".")[0] == self.top
        if isinstance(node, ast.Import):
            return all(alias.name.split(".")[0] == self.top for alias in node.names)
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"

    def references(self) -> Iterator[Reference]:
        """Every import with the attributes that are used of it; alone, where it is used as such."""
        for local, (origin, names) in self.bound:
            behind = [use for use in self.uses if f"{use}.".startswith(f"{local}.")]
            if not behind or any(f"{local}.".startswith(f"{use}.") for use in self.uses):
                yield origin, names
            for use in behind:
                yield origin, names + tuple(use.split(".")[local.count(".") + 1 :])
