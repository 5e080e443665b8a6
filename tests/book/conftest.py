"""A small book in a temporary folder, built in this process with the real configuration and extension."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from grsd import claims  # noqa: E402

CHAPTER = "spectrum/cross-entropy"  # a chapter of the real ledger: kernels read the real one
IDS = [claim.id for claim in claims.load() if claim.chapter == CHAPTER]

HEADER = """---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""
SETUP = """```{code-cell} ipython3
:tags: [hide-cell]

from grsd.chapter import claims
import os, pathlib
runs = pathlib.Path(os.environ["COUNT_RUNS"])
runs.write_text(runs.read_text() + "ran\\n" if runs.exists() else "ran\\n")
```

"""


def chapter(
    recorded: list[str] = IDS, boxed: list[str] = IDS, measured: float = 0.125, extra: str = ""
) -> str:
    """Text of a chapter that shows `boxed` claims and records `recorded` ones."""
    cell = f"for name in {recorded!r}:\n    found = claims.record(name, measured={measured}, bound=1.0)"
    return (
        f"{HEADER}# A chapter\n\n```{{claim-box}} {' '.join(boxed)}\n```\n\n{SETUP}"
        f"```{{code-cell}} ipython3\n{cell}\n```\n\n{extra}\n"
    )


@dataclass
class Book:
    """Sources and output of one small book."""

    root: Path
    builds: Callable[[Path, str, dict[str, object]], tuple[int, str]]
    overrides: dict[str, object] = field(default_factory=dict)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self, builder: str = "html", **overrides: object) -> tuple[int, str]:
        """Exit status (0: no warning) and what was logged, as ``jupyter-book build -W -n --keep-going`` gives them."""
        return self.builds(self.root, builder, self.overrides | overrides)

    def html(self, page: str) -> str:
        return (self.root / "_build" / "html" / f"{page}.html").read_text()

    @property
    def runs(self) -> int:
        """How often the chapter was executed."""
        counter = self.root / "runs.txt"
        return counter.read_text().count("ran") if counter.exists() else 0


def _build(root: Path, builder: str, overrides: dict[str, object]) -> tuple[int, str]:
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from jupyter_book.sphinx import build_sphinx

    log = StringIO()
    with redirect_stdout(log), redirect_stderr(log):
        status = build_sphinx(
            root,
            root / "_build" / builder,
            path_config=root / "_config.yml",
            confoverrides={
                "external_toc_path": str(root / "_toc.yml"),
                "nitpicky": True,
                "latex_individualpages": False,
                **overrides,
            },
            noconfig=True,
            builder=builder,
            warningiserror=True,
            keep_going=True,
        )
    return (status if isinstance(status, int) else 1), log.getvalue()


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Book:
    """Front page, one chapter, claims page; every image has a text, every claim its evidence: nothing to warn of."""
    monkeypatch.setenv("GRSD_EVIDENCE", str(tmp_path / "evidence"))
    monkeypatch.setenv("GRSD_SCALE", "cpu")
    monkeypatch.setenv("COUNT_RUNS", str(tmp_path / "runs.txt"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("GRSD_REPOSITORY", raising=False)
    small = Book(tmp_path, _build)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    for folder in ("_ext", "_assets"):
        (tmp_path / "book" / folder).mkdir(parents=True)
    shutil.copy(ROOT / "book" / "_assets" / "companion.css", tmp_path / "book" / "_assets")
    shutil.copy(ROOT / "book" / "references.bib", tmp_path / "book")
    small.write("grsd/module.py", "value = 1\n")
    small.write(
        "_toc.yml",
        f"format: jb-book\nroot: book/index.md\nchapters:\n  - file: book/{CHAPTER}.md\n  - file: book/claims.md\n",
    )
    small.write("book/index.md", "# Front\n\nInline $x^2$.\n\n```{scoreboard}\n```\n")
    small.write("book/claims.md", "# Claims\n\n```{claims}\n:paper: origin\n```\n")
    small.write(f"book/{CHAPTER}.md", chapter())
    return small
