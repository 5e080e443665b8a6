"""Scale and folders: what the environment may set, and what it may not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from grsd import scale as scales
from grsd.scale import cache_dir, device, evidence_dir, pick, scale

PACKAGE = Path(scales.__file__).parent
VARIABLES = ("GRSD_SCALE", "GRSD_DEVICE", "GRSD_CACHE", "GRSD_EVIDENCE", "GRSD_SITE")


def reads_environment(source: str) -> bool:
    """Whether code looks at the process environment: os.environ, os.getenv, or those names imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
            return True
        imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if {"environ", "environb", "getenv"} & set(imported):
            return True
    return False


@pytest.mark.parametrize("unset", [None, "", "  "])
def test_scale_is_cpu_when_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, unset: str | None
) -> None:
    monkeypatch.delenv("GRSD_SCALE", raising=False)
    if unset is not None:
        monkeypatch.setenv("GRSD_SCALE", unset)
    assert scale() == "cpu"
    assert pick(cpu=3, gpu=7) == 3


def test_scale_follows_the_variable_at_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRSD_SCALE", "GPU")
    assert scale() == "gpu" and pick(cpu=3, gpu=7) == 7
    monkeypatch.setenv("GRSD_SCALE", "cpu")
    assert scale() == "cpu" and pick(cpu=3, gpu=7) == 3


def test_unknown_scale_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_SCALE", "cluster")
    with pytest.raises(ValueError, match=r"'cluster'.*'cpu' or 'gpu'"):
        scale()
    with pytest.raises(ValueError, match="cluster"):
        pick(cpu=1, gpu=2)


def test_folders_follow_their_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRSD_EVIDENCE", raising=False)
    assert cache_dir() == tmp_path / "cache"
    assert evidence_dir() == tmp_path / "cache" / "evidence"
    monkeypatch.setenv("GRSD_EVIDENCE", str(tmp_path / "elsewhere"))
    assert evidence_dir() == tmp_path / "elsewhere"
    assert not (tmp_path / "cache").exists() and not (tmp_path / "elsewhere").exists()


def test_a_relative_cache_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRSD_CACHE", "here")
    assert cache_dir() == tmp_path / "here"


def test_without_variables_the_users_cache_folder_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("GRSD_CACHE", "GRSD_EVIDENCE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "grsd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "grsd"


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (2, "cuda")])
def test_large_work_runs_on_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("GRSD_DEVICE", raising=False)
    assert device() == expected
    monkeypatch.setenv("GRSD_DEVICE", " CPU ")
    assert device() == "cpu"
    monkeypatch.setenv("GRSD_DEVICE", "meta")
    assert device() == "meta"
    monkeypatch.setenv("GRSD_DEVICE", "cuda:1")
    if gpus > 1:
        assert device() == "cuda:1"
    else:
        with pytest.raises(ValueError, match="'cuda:1', but this machine has cpu"):
            device()
    monkeypatch.setenv("GRSD_DEVICE", "quantum")
    with pytest.raises(ValueError, match=r"'quantum'.*'cpu' or 'cuda'"):
        device()


def test_no_other_module_names_the_variables_of_this_one() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "scale.py"
        and any(
            isinstance(node, ast.Constant) and node.value in VARIABLES
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
        and reads_environment(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nx = os.environ['GRSD_SCALE']", True),
        ("import os\nx = os.getenv('A')", True),
        ("from os import environ\nx = environ.get('A')", True),
        ("environment = 3\nprint('os.environ')", False),
    ],
)
def test_the_detector_sees_a_planted_read(source: str, expected: bool) -> None:
    assert reads_environment(source) is expected
