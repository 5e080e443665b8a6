"""ARCHITECTURE.md and its picture are what the code is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "tools/architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "grsd", tmp_path / "grsd", ignore=shutil.ignore_patterns("__pycache__", "*.json")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_page_and_the_picture_are_made_from_the_code(tool: ModuleType) -> None:
    text = (ROOT / tool.PAGE).read_text(encoding="utf-8")
    assert tool.page(ROOT, text) == text, "run: python tools/architecture.py"
    drawn = (ROOT / tool.PICTURE).read_text(encoding="utf-8")
    assert tool.picture(ROOT) == drawn, "run: python tools/architecture.py"


def test_every_module_says_in_one_sentence_what_it_is(tool: ModuleType) -> None:
    silent = [name for name, path in tool.modules(ROOT).items() if not tool.sentence(path)]
    assert silent == ["grsd.__main__"] or silent == []


@pytest.mark.parametrize(
    "change", ["a module", "an import", "an import by dots", "a rule", "a summary"]
)
def test_a_change_of_the_code_changes_what_is_made(
    change: str, tool: ModuleType, copy: Path
) -> None:
    text = (ROOT / tool.PAGE).read_text(encoding="utf-8")
    before = tool.page(copy, text), tool.picture(copy)
    if change == "a module":
        (copy / "grsd/dynamics/extra.py").write_text('"""An extra."""\n', encoding="utf-8")
    elif change == "an import":
        path = copy / "grsd/mup/norms.py"
        path.write_text(path.read_text() + "\nimport grsd.dynamics.flow\n", encoding="utf-8")
    elif change == "an import by dots":
        path = copy / "grsd/mup/norms.py"
        path.write_text(path.read_text() + "\nfrom ..dynamics import flow\n", encoding="utf-8")
    elif change == "a rule":
        path = copy / "pyproject.toml"
        path.write_text(path.read_text().replace('  "renorm | mup",', '  "renorm", "mup",'))
    else:
        path = copy / "grsd/mup/norms.py"
        path.write_text(path.read_text().replace('"""', '"""Otherwise. ', 1), encoding="utf-8")
    after = tool.page(copy, text), tool.picture(copy)
    assert after[0] != before[0]
    assert after[1] != before[1] or change == "a summary"


def test_the_road_of_the_data_is_read_from_the_annotations(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stations = ["Corpus", "batch", "NTK", "Tridiagonal", "SpectralMeasure", "ShellProfile"]
    assert tool.road() == stations
    turned = (*tool.STEPS[:4], tool.STEPS[5])  # a step left out: shells of a Lanczos matrix
    monkeypatch.setattr(tool, "STEPS", turned)
    with pytest.raises(RuntimeError, match="not Tridiagonal"):
        tool.road()
