"""Pieces: whole or absent, checked when read, made once by several processes; and keyed by code.

What a module imports is compared with two oracles that never see a syntax tree: grimp's graph, and
the import instructions of the compiled modules together with where Python says an object is from.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import grimp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grsd
from grsd import dependencies, pieces
from grsd.pieces import MANIFEST, Store, code, imported, key

INPUTS = {"n": 3, "λ": 0.1, "sizes": (1, 2)}
CONTENT = {"alphas": [0.1, 1e-300, 3.0], "betas": [2.0, 5e-324], "label": "λ", "none": None}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", "code")


def never() -> dict[str, Any]:
    raise AssertionError("made again")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- JSON pieces ---


def test_a_piece_is_made_once_and_read_back_as_it_was_given_out(store: Store) -> None:
    assert store.read(INPUTS) is None
    made = store.get(INPUTS, lambda: CONTENT)
    assert made == store.get(INPUTS, never) == store.read(INPUTS) == CONTENT
    assert names(store.root) == {f"{key(INPUTS, 'code')}.json"}  # no lock, no draft
    assert store.get(INPUTS, lambda: {"n": 1}, resume=False) == {"n": 1} == store.read(INPUTS)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_every_float64_survives_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    store = Store(tmp_path_factory.mktemp("floats"), "code")
    given_out = store.write({}, {"values": values})["values"]
    assert list(map(float.hex, given_out)) == list(map(float.hex, values))
    read = store.read({})
    assert read is not None and list(map(float.hex, read["values"])) == list(map(float.hex, values))


def test_inputs_and_code_make_the_key_and_the_order_of_inputs_does_not() -> None:
    assert key({"a": 1, "b": 2}, "c") == key({"b": 2, "a": 1}, "c")
    several: list[dict[str, object]] = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {}]
    assert len({key(one, code) for one in several for code in ("c", "d")}) == 10


def test_a_make_that_fails_leaves_nothing_and_the_old_piece_stands(store: Store) -> None:
    def fails() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(INPUTS, fails)
    assert store.read(INPUTS) is None and not list(store.root.glob("*.json"))
    store.write(INPUTS, CONTENT)
    with pytest.raises(KeyboardInterrupt):
        store.get(INPUTS, fails, resume=False)
    assert store.get(INPUTS, never) == CONTENT


def _edited(text: str, change: Callable[[dict[str, Any]], object]) -> str:
    record = json.loads(text)
    change(record)
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _shorter(record: dict[str, Any]) -> None:
    """One step of Lanczos less, everywhere: nothing in the content contradicts itself."""
    record["content"]["alphas"].pop()
    record["content"]["betas"].pop()


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: "<html></html>",
    "other JSON": lambda text: "[1, 2]",
    "shorter": lambda text: _edited(text, _shorter),
    "a digit": lambda text: text.replace("3.0", "3.5"),
    "not a number": lambda text: text.replace("3.0", "NaN"),
    "no content": lambda text: _edited(text, lambda record: record.pop("content")),
    "no digest": lambda text: _edited(text, lambda record: record.pop("sha256")),
    "wrong digest": lambda text: _edited(text, lambda record: record.update(sha256="0" * 64)),
    "other inputs": lambda text: _edited(text, lambda record: record["inputs"].update(n=4)),
    "other code": lambda text: _edited(text, lambda record: record.update(code="another")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_piece_counts_as_absent(store: Store, damage: Callable[[str], str]) -> None:
    store.write(INPUTS, CONTENT)
    (path,) = store.root.iterdir()
    sound = path.read_text()
    assert _edited(sound, lambda record: None) == sound  # the null: rewriting is no damage
    path.write_text(damage(sound))
    assert path.read_text() != sound
    assert store.read(INPUTS) is None
    assert store.get(INPUTS, lambda: CONTENT) == CONTENT
    assert path.read_text() == sound


def test_a_sound_piece_of_other_inputs_or_code_is_not_taken_for_this_one(store: Store) -> None:
    other, later = {**INPUTS, "n": 4}, Store(store.root, "later")
    store.write(other, CONTENT)
    for where, asked in ((store, INPUTS), (later, other)):
        source = store.path(other).with_suffix(".json")
        shutil.copy(source, where.path(asked).with_suffix(".json"))
        assert where.read(asked) is None
    assert store.read(other) == CONTENT


def test_a_stopped_series_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    calls: list[int] = []

    def make(n: int, stop: bool) -> dict[str, Any]:
        calls.append(n)
        if stop and len(calls) == 4:
            raise KeyboardInterrupt
        return {"value": 0.1 * n, "powers": [(n / 7) ** k for k in range(30)]}

    def series(store: Store, stop: bool) -> list[dict[str, Any]]:
        return [store.get({"n": n}, functools.partial(make, n, stop)) for n in range(6)]

    begun, whole = Store(tmp_path / "begun", "code"), Store(tmp_path / "whole", "code")
    with pytest.raises(KeyboardInterrupt):
        series(begun, stop=True)
    resumed = series(begun, stop=False)
    assert calls == [0, 1, 2, 3, 3, 4, 5]  # what stood was not made again
    assert resumed == series(whole, stop=False)
    for path in whole.root.iterdir():
        assert (begun.root / path.name).read_bytes() == path.read_bytes()


def test_what_no_piece_can_hold_is_refused_with_its_place(store: Store) -> None:
    with pytest.raises(TypeError, match=r"must be a dict, got \[1, 2\]"):
        store.write(INPUTS, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"piece\.content\.loss is nan"):
        store.get(INPUTS, lambda: {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"inputs\[1\]\.lr is inf"):
        store.read({"lr": float("inf")})
    with pytest.raises(TypeError, match=r"inputs\[1\]\.f is a function"):
        store.get({"f": never}, never)
    assert not list(store.root.glob("*.json"))


def test_a_piece_that_cannot_be_read_for_another_reason_is_not_overwritten(store: Store) -> None:
    store.path(INPUTS).with_suffix(".json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        store.get(INPUTS, never)


# --- several processes ---


def _processes(script: str, count: int, *arguments: str) -> list[tuple[int, str]]:
    """Run a script in several processes that start together: exit codes and what they printed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{script}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for process in started:  # all have imported what they need before the first is let go
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0].strip() for process in started]
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


ONCE = """
import os, time
from pathlib import Path
from grsd.pieces import Store
root, how = Path(sys.argv[1]), sys.argv[2]
store = Store(root / "store", "code")
print("ready", flush=True); sys.stdin.readline()
def work():
    with (root / "log").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
    return {"by": os.getpid()}
def fill(folder):
    (folder / "by").write_text(str(work()["by"]))
if how == "get":
    print(store.get({}, work)["by"])
elif how == "folder":
    print((store.folder({}, fill) / "by").read_text())
else:
    with store.locked({"group": 2}):
        if store.read({"n": 0}) is None:
            done = work()
            for n in range(2):
                store.write({"n": n}, done)
    print(store.read({"n": 1})["by"])
"""


@pytest.mark.parametrize("how", ["get", "folder", "locked"])
def test_two_processes_that_ask_at_once_make_it_once(how: str, tmp_path: Path) -> None:
    found = _processes(ONCE, 2, str(tmp_path), how)
    (worker,) = (tmp_path / "log").read_text().split()
    assert found == [(0, worker), (0, worker)]
    assert not list((tmp_path / "store").glob(".*"))


KILLED = """
import os, signal
from pathlib import Path
from grsd.pieces import Store
store = Store(Path(sys.argv[1]), "code")
print("ready", flush=True); sys.stdin.readline()
def fill(folder):
    (folder / "part").write_text("begun")
real = os.replace
def dying(source, destination):
    if str(destination).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, destination)
os.replace = dying
store.get({}, lambda: {"n": 1})
store.folder({}, fill)
"""


def test_a_process_that_is_killed_as_it_writes_leaves_no_piece_and_no_lock(tmp_path: Path) -> None:
    store = Store(tmp_path, "code")
    for target in (f"{key({}, 'code')}.json", MANIFEST):
        ((status, _),) = _processes(KILLED, 1, str(tmp_path), target)
        assert status == -signal.SIGKILL
        assert (store.read({}) is None) == target.endswith(f"{key({}, 'code')}.json")
        assert not store.whole({})
    seen: list[str] = []
    folder = store.folder({}, lambda here: seen.append((here / "part").read_text()))
    assert seen == ["begun"] and store.whole({}) and folder == store.path({})


# --- folder pieces ---


def fill(folder: Path) -> None:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "meta.json").write_text("{}")


def no_fill(folder: Path) -> None:
    raise AssertionError("filled again")


def test_a_folder_is_filled_once_and_drafts_are_no_part_of_it(store: Store) -> None:
    def with_drafts(folder: Path) -> None:
        fill(folder)
        (folder / ".draft").mkdir()
        (folder / ".draft" / "x").write_text("x")
        (folder / "deep" / ".meta.json.abc.part").write_text("x")

    folder = store.folder(INPUTS, with_drafts)
    assert folder == store.folder(INPUTS, no_fill) == store.path(INPUTS)
    shutil.rmtree(folder / ".draft")
    (folder / "notes").write_text("added later")  # what was not made is not watched
    assert store.folder(INPUTS, no_fill) == folder
    listed = json.loads((folder / MANIFEST).read_text())["content"]["files"]
    assert set(listed) == {"deep/weights.bin", "meta.json"}
    assert not store.whole({**INPUTS, "n": 4}) and not Store(store.root, "later").whole(INPUTS)


FOLDER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / "meta.json").unlink(),
    "missing below": lambda folder: shutil.rmtree(folder / "deep"),
    "cut": lambda folder: os.truncate(folder / "deep" / "weights.bin", 2047),
    "edited": lambda folder: (folder / "deep" / "weights.bin").write_bytes(bytes(2048)),
    "longer": lambda folder: (folder / "meta.json").write_text("{}\n"),
    "cut manifest": lambda folder: os.truncate(folder / MANIFEST, 100),
    "edited manifest": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text().replace("meta.json", "deep/weights.bin")
    ),
}


@pytest.mark.parametrize("damage", FOLDER_DAMAGES.values(), ids=FOLDER_DAMAGES)
def test_a_damaged_folder_is_emptied_and_filled_anew(
    store: Store, damage: Callable[[Path], object]
) -> None:
    folder = store.folder(INPUTS, fill)
    sound = {name: (folder / name).read_bytes() for name in names(folder)}
    damage(folder)
    assert not store.whole(INPUTS)

    def anew(folder: Path) -> None:
        assert not list(folder.iterdir())
        fill(folder)

    store.folder(INPUTS, anew)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == sound


def test_a_folder_goes_on_where_an_interrupted_make_stopped(store: Store) -> None:
    def make(folder: Path, stop: int) -> None:
        for step in range(4):
            if step == stop:
                raise KeyboardInterrupt
            if not (folder / f"step{step}").exists():
                made.append(step)
                (folder / f"step{step}").write_text(str(step))

    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        store.folder(INPUTS, functools.partial(make, stop=2))
    assert not store.whole(INPUTS)
    store.folder(INPUTS, functools.partial(make, stop=-1))
    assert made == [0, 1, 2, 3] and store.whole(INPUTS)


def test_a_whole_folder_is_made_larger_when_more_is_asked_for(store: Store) -> None:
    def asked(steps: int) -> list[int]:
        made = []

        def make(folder: Path) -> None:
            for step in range(steps):
                if not (folder / f"step{step}").exists():
                    made.append(step)
                    (folder / f"step{step}").touch()
            (folder / "record").write_text(str(steps))  # a file that changes as it grows

        store.folder(INPUTS, make, enough=lambda folder: (folder / f"step{steps - 1}").exists())
        return made

    assert [asked(2), asked(4), asked(3), asked(4)] == [[0, 1], [2, 3], [], []]
    (store.path(INPUTS) / "step1").unlink()
    assert asked(4) == [0, 1, 2, 3]  # damage: nothing of it is trusted


# --- what a module imports ---

TINY = {
    "__init__": "__version__ = '1'",
    "base": "VALUE = 1",
    "middle": "from tiny import base\nTWICE = 2 * base.VALUE",
    "alone": "import math\nfrom torch import nn\nfrom elsewhere.base import VALUE",
    "lazy": "def f():\n    from tiny.middle import TWICE\n    return TWICE",
    "typed": "from typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from tiny.middle import TWICE\nelse:\n    from tiny import alone",
    "not_typed": "import typing\nif not typing.TYPE_CHECKING:\n    from tiny import base\n"
    "if typing.TYPE_CHECKING:\n    from tiny import alone",
    "version": "from tiny import __version__",
    "room.__init__": "from tiny.room.inner import Name as Handed, plan\n"
    "from tiny.room import other\nfrom .plan import plan as plan\n__all__ = ['Handed']",
    "room.inner": "from ..base import VALUE\nclass Name: pass\nplan = 0",
    "room.other": "from .. import middle",
    "room.plan": "def plan(): pass",
    "room.deep.__init__": "from .leaf import Leaf\ndef own(): pass",
    "room.deep.leaf": "Leaf = 1",
    "room.deep.unseen": "Unseen = 1",
    "front": "from tiny.room import Handed\nfrom tiny.room.deep import Leaf as Front",
    "chain.__init__": "from tiny.room import Handed as Again",
    "chained": "from tiny.chain import Again",
    "attribute": "from tiny import room\nx = room.Handed()",
    "dotted": "import tiny.room\nx = tiny.room.deep.Leaf",
    "renamed": "import tiny.room as r\ndef f():\n    return r.other.middle",
    "submodule": "from tiny.room import other",
    "both": "from tiny.room import plan",
    "own": "from tiny.room.deep import own",
    "object": "from tiny import room\nlist(vars(room))",
    "effect": "import tiny.room",
    "star": "from tiny.room import *",
    "handed_on": "from tiny import room",
    "through": "from tiny import handed_on\nx = handed_on.room.other",
    "loop_a": "from tiny import loop_b",
    "loop_b": "def f():\n    from tiny import loop_a, base",
    "dynamic.__init__": "def __getattr__(name):\n    from tiny.dynamic import hidden\n"
    "    return hidden.X",
    "dynamic.hidden": "X = 1",
    "lookup": "from tiny.dynamic import anything",
    "both_ways.__init__": "from tiny.base import VALUE, OTHER\nfrom tiny import alone\n"
    "try:\n    from tiny.base import CHOICE\nexcept ImportError:\n    CHOICE = alone",
    "imported_name": "from tiny.both_ways import VALUE",
    "also_defined": "from tiny.both_ways import CHOICE",
    "wrapped.__init__": "from tiny.base import VALUE\nfrom tiny import alone\n"
    "def __getattr__(name):\n    return alone",
    "wrapper": "from tiny.wrapped import VALUE",
    "escaped": "from tiny import room\nx = room.Handed\nprint(room)",
    "escaped_top": "import tiny.room\nx = tiny.room.Handed\nprint(tiny)",
    "elsewhere": "import tiny.base\nx = tiny.room.Handed",
    "bare.part": "from tiny import base",
    "namespace": "from tiny.bare import part",
}
UNSEEN = {"object", "effect", "star", "handed_on", "through", "escaped", "escaped_top"}
ROOM = {"room", "room.inner", "room.other", "room.plan", "base", "middle"}
EXPECTED = {
    "base": set(),
    "middle": {"base"},
    "alone": set(),
    "lazy": {"middle", "base"},
    "typed": {"alone"},
    "not_typed": {"base"},
    "version": set(),
    "front": {"room", "room.inner", "base", "room.deep", "room.deep.leaf"},
    "chain": {"room", "room.inner", "base"},
    "chained": {"chain", "room", "room.inner", "base"},
    "attribute": {"room", "room.inner", "base"},
    "dotted": {"room", "room.deep", "room.deep.leaf"},
    "renamed": {"room", "room.other", "middle", "base"},
    "submodule": {"room", "room.other", "middle", "base"},
    "both": {"room", "room.inner", "base", "room.plan"},
    "own": {"room", "room.deep", "room.deep.leaf"},
    "object": ROOM,
    "effect": ROOM,
    "star": ROOM,
    "handed_on": ROOM,
    "through": ROOM | {"handed_on"},
    "loop_a": {"loop_b", "base"},
    "loop_b": {"loop_a", "base"},
    "lookup": {"dynamic", "dynamic.hidden"},
    "imported_name": {"both_ways", "base"},
    "also_defined": {"both_ways", "base", "alone"},
    "wrapper": {"wrapped", "base", "alone"},
    "escaped": ROOM,
    "escaped_top": ROOM,
    "elsewhere": {"room", "room.inner", "base"},
    "namespace": {"bare.part", "base"},
    "room.deep.unseen": {"room", "room.deep"},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    for name, text in TINY.items():
        path = tmp_path / "tiny" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return tmp_path / "tiny"


@pytest.mark.parametrize("module", EXPECTED)
def test_imports_of_every_kind_lead_to_the_modules_that_count(module: str, tiny: Path) -> None:
    found = imported(f"tiny.{module}", tiny)
    assert found == {"tiny", f"tiny.{module}", *(f"tiny.{name}" for name in EXPECTED[module])}


def _codes(root: Path, modules: set[str]) -> dict[str, str]:
    return {module: code(module, root=root) for module in modules}


def _changed(root: Path, modules: set[str], path: Path, change: Callable[[str], str]) -> set[str]:
    """The modules whose code changes as one file changes."""
    before, text = _codes(root, modules), path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    after = _codes(root, modules)
    path.write_text(text)
    assert _codes(root, modules) == before
    return {module for module in modules if after[module] != before[module]}


@pytest.mark.parametrize("module", ["base", "middle", "room.inner", "room.deep.leaf", "alone"])
def test_a_changed_line_changes_its_dependents_and_no_other(module: str, tiny: Path) -> None:
    every = {f"tiny.{name}" for name in EXPECTED}
    path = tiny / f"{module.replace('.', '/')}.py"
    dependents = {f"tiny.{name}" for name, of in EXPECTED.items() if module in {name, *of}}
    assert _changed(tiny, every, path, lambda text: f"{text}\nONE_MORE = 1\n") == dependents


@pytest.mark.parametrize(
    ("change", "dependents"),
    [
        # one more name is nothing to those who take another
        (lambda text: f"{text}from tiny.alone import nn\n", UNSEEN),
        (lambda text: text.replace("['Handed']", "[]"), UNSEEN),
        # another object under the old name, from the same module
        (
            lambda text: text.replace("Name as", "plan as"),
            UNSEEN | {"front", "chain", "chained", "attribute", "elsewhere"},
        ),
    ],
)
def test_of_a_package_that_hands_on_names_count_only_those_taken(
    change: Callable[[str], str], dependents: set[str], tiny: Path
) -> None:
    every = {f"tiny.{name}" for name in EXPECTED}
    found = _changed(tiny, every, tiny / "room" / "__init__.py", change)
    assert found == {f"tiny.{name}" for name in dependents}


def test_what_a_package_does_itself_counts_for_all_that_pass_through(tiny: Path) -> None:
    every = {f"tiny.{name}" for name in EXPECTED}
    found = _changed(tiny, every, tiny / "room" / "__init__.py", lambda text: f"{text}print()\n")
    assert found == {f"tiny.{name}" for name, of in EXPECTED.items() if "room" in of}


BEHAVIOUR = '''"""Module."""
from dataclasses import dataclass

@dataclass(frozen=True)
class A:
    """Class."""
    x: int = 1
    """Attribute."""

    def f(self, y=2):
        """Method.

        >>> A().f()
        """
        # a comment
        return f"{y + 3}" + "text"
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("frozen=True", "frozen=False"),
        ("x: int = 1", "x: int = 2"),
        ("x: int", "x: float"),
        ("y=2", "y=3"),
        ("y + 3", "y - 3"),
        ('"text"', '"Text"'),
        ("@dataclass(frozen=True)\n", ""),
        ("def f", "def g"),
    ],
)
def test_every_change_of_behaviour_changes_the_code(old: str, new: str, tmp_path: Path) -> None:
    assert _behaviour(tmp_path, BEHAVIOUR.replace(old, new)) != _behaviour(tmp_path, BEHAVIOUR)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Module."""', ""),
        ('"""Class."""', '"""A class."""'),
        ('    """Attribute."""\n', ""),
        ("Method.", "Another text."),
        ("# a comment", "# another"),
        ("\n\n@", "\n\n\n@"),
        ('"text"', "'text'"),
        ("y + 3", "(y + 3)"),
    ],
)
def test_words_and_layout_do_not_change_the_code(old: str, new: str, tmp_path: Path) -> None:
    assert old in BEHAVIOUR
    assert _behaviour(tmp_path, BEHAVIOUR.replace(old, new)) == _behaviour(tmp_path, BEHAVIOUR)


def _behaviour(folder: Path, text: str) -> str:
    root = folder / "one"
    root.mkdir(exist_ok=True)
    (root / "__init__.py").touch()
    (root / "a.py").write_text(text)
    return code("one.a", root=root)


def test_code_stands_behind_modules_functions_classes_and_data(tmp_path: Path) -> None:
    whole = code("grsd.pieces")
    for part in (pieces, key, Store, functools.partial(functools.partial(key), code="c")):
        assert code(part) == whole
    table = tmp_path / "table.csv"
    table.write_text("a,b\n")
    with_table = code(pieces, table)
    assert with_table != whole
    table.write_text("a,c\n")
    assert code(pieces, table) not in (whole, with_table)
    for stranger, name in (("grsd.nothing", "grsd.nothing"), (json.loads, "json"), (Path, "pathl")):
        with pytest.raises(ValueError, match=f"'{name}.*' is no module of the package 'grsd'"):
            code(stranger)


# --- the package itself ---


def _modules() -> dict[str, ModuleType]:
    found = pkgutil.walk_packages(grsd.__path__, "grsd.")
    every = ["grsd", *(one.name for one in found if not one.name.endswith("__main__"))]
    return {name: importlib.import_module(name) for name in every}


@functools.cache
def _oracle() -> dict[str, set[str]]:
    """Module → the modules that its imports lead to by the rules of `imported`, without packages.

    Imports and uses are read off the bytecode, from which the compiler has dropped all that stands
    under ``if False``. Where a name of a package comes from is asked of the object that is there at
    run time; for one that does not know, it is the modules that have it and do not import it.
    """
    modules = _modules()
    packages = {name for name, module in modules.items() if hasattr(module, "__path__")}
    imports = {name: list(_imports(name, module)) for name, module in modules.items()}

    def origins(package: str, name: str) -> set[str]:
        value = getattr(modules[package], name)
        if isinstance(value, ModuleType):
            return {value.__name__}
        if str(getattr(value, "__module__", "")).startswith("grsd"):
            return {value.__module__}
        return {
            other
            for other, module in modules.items()
            if vars(module).get(name) is value
            and name not in {taken for _, taken, _ in imports[other]}
        }

    def leads(origin: str, name: str | None, uses: set[str]) -> set[str]:
        if name is not None:
            below = f"{origin}.{name}"
            if below in modules and below not in packages:
                return {below}
            if below in packages:
                return set().union(*(leads(below, use, set()) for use in uses)) if uses else {below}
            return origins(origin, name) if origin in packages else {origin}
        return {origin}

    direct = {
        module: set().union(*(leads(*one) for one in found)) for module, found in imports.items()
    }
    reached: dict[str, set[str]] = {}
    for module in modules:
        seen, todo = set[str](), [module]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += direct[name]
        reached[module] = seen - packages
    return reached


def _imports(module: str, loaded: ModuleType) -> Iterator[tuple[str, str | None, set[str]]]:
    """Imports from the package in the bytecode: from where, which name, and what is used of it."""
    source = inspect.getsource(loaded).replace("if TYPE_CHECKING:", "if False:")
    blocks = [compile(source, module, "exec", dont_inherit=True)]
    for block in blocks:
        blocks += [value for value in block.co_consts if isinstance(value, CodeType)]
    listings = [
        [one for one in dis.get_instructions(block) if one.opname != "EXTENDED_ARG"]
        for block in blocks
    ]
    uses: dict[str, set[str]] = {}
    for listing in listings:
        for load, then in itertools.pairwise(listing):
            if load.opname.startswith("LOAD_") and then.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                uses.setdefault(str(load.argval), set()).add(str(then.argval))
    for listing in listings:
        for at, one in enumerate(listing):
            if one.opname != "IMPORT_NAME":
                continue
            level, names = listing[at - 2].argval, listing[at - 1].argval
            package = loaded.__package__ if level else None
            origin = importlib.util.resolve_name("." * level + one.argval, package)
            if origin.split(".")[0] != "grsd":
                continue
            if not names:  # `import grsd.a.b`, for what it registers: the module, and no name of it
                assert origin in sys.modules and not uses.get("grsd"), f"{module}: {origin}"
                yield origin, None, set()
                continue
            assert "*" not in names, f"{module}: teach the oracle this import of {origin}"
            stored = [
                after.argval
                for after in listing[at : at + 2 * len(names) + 1]
                if after.opname.startswith("STORE_")
            ]
            for name, local in zip(names, stored, strict=True):
                yield origin, name, uses.get(local, set())


def test_bytecode_and_run_time_agree_on_what_every_module_imports() -> None:
    oracle = _oracle()
    packages = {name for name, module in _modules().items() if hasattr(module, "__path__")}
    assert len(oracle) > 80
    for module in oracle.keys() - packages:
        assert imported(module) - packages == oracle[module], module


def test_grimp_knows_no_module_less() -> None:
    """Its graph goes by all that an ``__init__`` imports, so that it may only know more."""
    graph = grimp.build_graph("grsd", exclude_type_checking_imports=True, cache_dir=None)
    plain = {name for name in graph.modules if not graph.find_children(name)}
    found = {name: imported(name) & plain - {name} for name in plain}
    upstream = {name: graph.find_upstream_modules(name) & plain - {name} for name in plain}
    assert all(found[name] <= upstream[name] for name in plain)
    assert any(found[name] < upstream[name] for name in plain)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    skipped = shutil.ignore_patterns("__pycache__", "*.csv", "*.json", "*.yaml")
    return Path(shutil.copytree(dependencies.PACKAGE, tmp_path / "grsd", ignore=skipped))


def _problem(copy: Path) -> tuple[str, Path]:
    (path,) = (path for path in copy.rglob("problem.py") if path.parent.name == "dynamics")
    return ".".join(path.relative_to(copy.parent).with_suffix("").parts), path


def test_a_changed_line_of_a_real_module_changes_exactly_its_dependents(copy: Path) -> None:
    oracle, (module, path) = _oracle(), _problem(copy)
    plain = {name for name in oracle if oracle[name]}
    dependents = {name for name in plain if module in oracle[name]}
    assert {module} < dependents < plain
    changed = _changed(copy, plain, path, lambda text: f"{text}\nONE_MORE = 1\n")
    assert changed == dependents


def test_a_comment_in_a_real_module_changes_nothing(copy: Path) -> None:
    _, path = _problem(copy)
    marked = _changed(copy, set(_oracle()), path, lambda text: f'# new\n{text}\n"""New."""\n')
    assert marked == set()
