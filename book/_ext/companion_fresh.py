"""What of an earlier build may be kept.

The notebook cache keys on code cells alone: change the package and the old numbers stay. So, before Sphinx opens its environment:

* the package, its data, the lock, the scale, Python or torch changed: notebook cache, evidence and document trees go;
* the extension changed, or the last build failed or was interrupted: the document trees go (else a second ``-W`` build passes,
  because pages that warned are not visited again);
* a chapter's code cells changed, or one of its claims has no evidence: that chapter's cached run and its evidence go, so that
  no evidence outlives the code that recorded it and none is missing because the run came from the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jupytext
from companion_views import docname
from jupyter_cache import get_cache
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment

from grsd import claims

STATE = "companion.json"
IGNORED = {"__pycache__", ".ipynb_checkpoints"}


def setup(app: Sphinx) -> None:
    """Connect to the first and the last event of a build."""
    app.connect("config-inited", before, priority=100)
    app.connect("env-get-outdated", reread)
    app.connect("build-finished", after)


def digest(paths: Iterable[Path], root: Path, *extra: str) -> str:
    """SHA-256 of names, contents and further strings."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for text in extra:
        sha.update(text.encode() + b"\0")
    return sha.hexdigest()


def files_under(folder: Path) -> list[Path]:
    """Files below a folder, without byte code."""
    return [path for path in folder.rglob("*") if path.is_file() and not IGNORED & set(path.parts)]


def code_fingerprint(root: Path) -> str:
    """Everything that a notebook's numbers depend on besides its own cells."""
    paths = [
        *files_under(root / "grsd"),
        *(p for p in (root / "pyproject.toml", root / "requirements.txt") if p.exists()),
    ]
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    return digest(
        paths, root, os.environ.get("GRSD_SCALE", "cpu"), platform.python_version(), torch
    )


def chapter_fingerprint(path: Path) -> str:
    """Hash of a chapter's code cells; prose and captions may change without a new run."""
    cells = jupytext.read(path).cells
    return digest([], path, *(cell.source for cell in cells if cell.cell_type == "code"))


def before(app: Sphinx, config: Config) -> None:
    """Delete what must not be kept, and note that a build is under way."""
    root, home = Path(app.srcdir), Path(app.doctreedir).parent
    cache = Path(config.nb_execution_cache_path or home / ".jupyter_cache")
    os.environ.setdefault("GRSD_EVIDENCE", str(home / "evidence"))
    evidence = Path(os.environ["GRSD_EVIDENCE"])
    home.mkdir(parents=True, exist_ok=True)
    state = _load(home / STATE)
    code = code_fingerprint(root)
    pages = digest(files_under(Path(__file__).parent), Path(__file__).parent)
    if state.get("code") != code or state.get("evidence") != str(evidence):
        shutil.rmtree(cache, ignore_errors=True)
        _drop(claims.load())
        state = {}
    if state.get("pages") != pages or not state.get("finished"):
        shutil.rmtree(app.doctreedir, ignore_errors=True)
        Path(app.doctreedir).mkdir(parents=True)
    chapters, again = _chapters(root, state.get("chapters", {}))
    _forget(cache, [root / f"{chapter}.md" for chapter in again])
    app.companion_again = again  # type: ignore[attr-defined]
    app.companion_state = {
        "code": code,
        "evidence": str(evidence),
        "pages": pages,
        "chapters": chapters,
    }  # type: ignore[attr-defined]
    (home / STATE).write_text(json.dumps(app.companion_state | {"finished": False}, indent=1))  # type: ignore[attr-defined]


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def recorded(claim: claims.Claim) -> bool:
    """Whether evidence can be read; a damaged file counts as none."""
    try:
        return claims.evidence(claim.id) is not None
    except ValueError:
        return False


def _drop(unproved: Iterable[claims.Claim]) -> None:
    """Delete the evidence of these claims, file by file: the folder may be anyone's."""
    for claim in unproved:
        (claims.evidence_dir() / f"{claim.id}.json").unlink(missing_ok=True)


def _chapters(root: Path, known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Hashes of the chapters that settle claims, and those whose evidence is stale or missing (it is deleted here)."""
    current: dict[str, str] = {}
    again: list[str] = []
    ledger = [claim for claim in claims.load() if claim.verdict != "untested"]
    for chapter in sorted({docname(claim) for claim in ledger}):
        path = root / f"{chapter}.md"
        if not path.is_file():
            continue
        current[chapter] = chapter_fingerprint(path)
        mine = [claim for claim in ledger if docname(claim) == chapter]
        if current[chapter] != known.get(chapter) or not all(map(recorded, mine)):
            again.append(chapter)
            _drop(mine)
    return current, again


def _forget(cache: Path, notebooks: list[Path]) -> None:
    """Drop the cached runs of these notebooks."""
    if not notebooks or not cache.exists():
        return
    store = get_cache(str(cache))
    for record in store.list_cache_records():
        if Path(record.uri).resolve() in {path.resolve() for path in notebooks}:
            store.remove_cache(record.pk)


def reread(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """Chapters to read, and therefore to run, again."""
    return [name for name in app.companion_again if name in env.found_docs]  # type: ignore[attr-defined]


def after(app: Sphinx, exception: Exception | None) -> None:
    """A build without a warning is one whose document trees may be kept."""
    finished = exception is None and app._warncount == 0
    state = app.companion_state | {"finished": finished}  # type: ignore[attr-defined]
    (Path(app.doctreedir).parent / STATE).write_text(json.dumps(state, indent=1))
