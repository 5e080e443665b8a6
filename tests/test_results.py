"""Stored results: exact round trips, writes that are whole or absent, refusals that name the fault."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grsd import results
from grsd.results import Result, atomic_write, available, dumps, load, provenance, save


def made(data: dict[str, object], name: str = "a-result") -> Result:
    return Result(name, data, provenance(["shells", "mini-0.4m"], {"steps": 10}, [0, 1]))


def test_a_result_survives_the_round_trip_exactly(tmp_path: Path) -> None:
    data = {
        "energies": [0.1, 1e-300, 3.0],
        "label": "λ",
        "nested": {"n": 3, "flag": True, "none": None},
    }
    written = made(data)
    assert save(written, tmp_path) == tmp_path / "a-result.json"
    assert load("a-result", tmp_path) == written
    assert available(tmp_path) == ["a-result"]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
def test_every_float64_survives_bit_for_bit(values: list[float]) -> None:
    back = json.loads(dumps({"values": values}))["values"]
    assert np.array_equal(np.array(back, dtype=float), np.array(values, dtype=float))
    assert [np.signbit(x) for x in back] == [np.signbit(x) for x in values]


def test_arrays_and_scalars_of_numpy_and_torch_become_numbers() -> None:
    value = {
        "a": np.arange(3),
        "b": np.float64(0.5),
        "c": torch.ones(2),
        "d": torch.tensor(2),
        "e": (1, 2),
    }
    assert json.loads(dumps(value)) == {
        "a": [0, 1, 2],
        "b": 0.5,
        "c": [1.0, 1.0],
        "d": 2,
        "e": [1, 2],
    }


def test_text_does_not_depend_on_the_order_of_keys() -> None:
    assert dumps({"a": 1, "b": 2}) == dumps({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), np.array([1.0, -np.inf]), torch.tensor(np.nan)]
)
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a-result\.data\.deep.*finite"):
        save(made({"deep": bad}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{1: 2}, {"x": object()}, {"x": {1, 2}}])
def test_what_json_cannot_hold_is_refused(bad: dict[object, object]) -> None:
    with pytest.raises(TypeError):
        dumps(bad)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "A", ".hidden", "a b", "a\n"])
def test_an_id_that_could_leave_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a result"):
        made({}, name)
    with pytest.raises(ValueError, match="cannot name a result"):
        load(name, tmp_path)


def test_provenance_is_required_whole() -> None:
    partial = provenance(["suite"], {}, [])
    del partial["seeds"]
    with pytest.raises(ValueError, match="seeds"):
        Result("x", {}, partial)


def test_provenance_says_what_is_needed_and_names_no_machine() -> None:
    found = provenance(["shells", "m"], {"batches": 2, "folder": Path("rel/x")}, {"data": 3})
    assert set(found) == results.PROVENANCE_KEYS
    assert found["command"] == ["shells", "m"] and found["seeds"] == {"data": 3}
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["grsd"]
    text = json.dumps(found)
    for secret in (os.uname().nodename, str(Path.home()), str(Path.cwd()), sys.prefix):
        assert len(secret) < 3 or secret not in text


def test_a_command_given_as_one_string_is_refused() -> None:
    with pytest.raises(TypeError, match="list of its arguments"):
        provenance("shells mini", {})


def test_the_revision_tells_a_clean_checkout_from_a_changed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *author, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    package = tmp_path / "grsd"
    package.mkdir()
    module = package / "results.py"
    module.write_text("")
    monkeypatch.setattr(results, "__file__", str(module))
    assert results.revision() == "unknown"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "x")
    assert results.revision() == git("rev-parse", "HEAD")
    stored = package / "data" / "results" / "new.json"
    stored.parent.mkdir(parents=True)
    stored.write_text("{}")
    assert results.revision() == git("rev-parse", "HEAD"), "a new result changes no code"
    module.write_text("changed = 1\n")
    assert results.revision() == git("rev-parse", "HEAD") + "+changes"


def test_load_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there are: none"):
        load("nothing", tmp_path)
    save(made({}), tmp_path)
    with pytest.raises(FileNotFoundError, match="a-result"):
        load("nothing", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[1, 2]", "is not a result"),
        (lambda text: text.replace('"a-result"', '"other"'), "holds the result 'other'"),
        (lambda text: text.replace('"seeds"', '"seed"'), "lacks"),
    ],
)
def test_a_damaged_file_is_refused(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = save(made({"x": 1}), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        load("a-result", tmp_path)


def test_packaged_results_can_all_be_read() -> None:
    for name in available():
        assert load(name).id == name


def test_what_ships_was_made_from_a_committed_tree() -> None:
    edited = [n for n in available() if load(n).provenance["revision"].endswith(results.CHANGED)]
    assert not edited


def test_the_manifest_lists_what_ships() -> None:
    kept = json.loads((results.packaged_dir().parent / results.MANIFEST).read_text())
    assert kept == results.manifest(), "run: grsd results manifest"


def test_a_result_of_an_edited_tree_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "revision", lambda: "abc" + results.CHANGED)
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(results, "packaged_dir", lambda: tmp_path / "shipped")
    save(made({"x": 1}), tmp_path)  # anywhere else it is kept
    with pytest.raises(ValueError, match=r"'abc\+changes', an edited tree; commit"):
        save(made({"x": 1}), tmp_path / "shipped" / ".." / "shipped")
    assert list((tmp_path / "shipped").iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = atomic_write(tmp_path / "deep" / "file.json", "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


WRITER = """
import sys
from grsd.results import atomic_write
first = True
while True:
    for letter in b"ab":
        atomic_write(sys.argv[1], bytes([letter]) * 400_000)
        if first:
            print("ready", flush=True)
            first = False
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "value.bin"
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(0.003 * (attempt + 1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        content = target.read_bytes()
        assert len(content) == 400_000 and content in (b"a" * 400_000, b"b" * 400_000)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"a": [1.0, 2.0], "b": "x"}, {"b": "x", "a": [1.0, 2.0]}, 0.0),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 1.0]}, 0.5),  # relative to the largest of a list
        ({"a": 4.0, "b": [[1.0], [8.0]]}, {"a": 3.0, "b": [[1.0], [8.0]]}, 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([], [], 0.0),
        ({"a": 1.0}, {"b": 1.0}, None),
        ([1.0], [1.0, 2.0], None),
        ([1.0, None], [1.0, 2.0], None),
        ({"a": "x"}, {"a": "y"}, None),
        ({"a": [1.0]}, [1.0], None),
    ],
)
def test_the_largest_difference_is_relative_to_its_list_and_sees_another_shape(
    old: object, new: object, difference: float | None
) -> None:
    assert results.largest_difference(old, new) == difference
