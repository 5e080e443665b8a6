"""What of an earlier build may be kept: runs and evidence of chapters whose stamp still holds.

The notebook cache keys on code cells alone: change the package and the old numbers stay. So every
chapter gets a stamp, a hash of all that its numbers depend on: its code cells, the package and its
data, the lock, Python, torch, the scale, and the folder of the evidence. Before a build, a chapter
whose stamp changed or whose evidence is missing loses its cached run and its evidence, and so runs
again.

Pages are always read again, from the cache where the stamp holds: pages that warned and are not
visited a second time would let a second ``-W`` build pass.
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

import jupytext
from companion_views import docname
from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.application import Sphinx
from sphinx.config import Config

from grsd import claims

STAMPS = "companion.json"


def setup(app: Sphinx) -> None:
    """Connect to the first event of a build."""
    app.connect("config-inited", before, priority=100)


def digest(words: Iterable[str | bytes]) -> str:
    """SHA-256 of several strings."""
    sha = hashlib.sha256()
    for word in words:
        sha.update(hashlib.sha256(word.encode() if isinstance(word, str) else word).digest())
    return sha.hexdigest()


def code_fingerprint(root: Path) -> str:
    """Hash of everything that a notebook's numbers depend on besides its own cells."""
    words: list[str | bytes] = [os.environ.get("GRSD_SCALE", "cpu"), platform.python_version()]
    words.append(metadata.version("torch"))
    files = [path for path in (root / "grsd").rglob("*") if "__pycache__" not in path.parts]
    for path in sorted([*files, root / "pyproject.toml", root / "requirements.txt"]):
        if path.is_file():
            words += [path.relative_to(root).as_posix(), path.read_bytes()]
    return digest(words)


def stamps(root: Path, evidence: Path) -> dict[str, str]:
    """Chapter → stamp; a page without code cells is no chapter."""
    package = code_fingerprint(root)
    chapters = {}
    for path in sorted((root / "book").rglob("*.md")):
        page = jupytext.read(path)
        off = page.metadata.get("mystnb", {}).get("execution_mode") == "off"
        cells = [c.source for c in page.cells if c.cell_type == "code"]
        if cells and not off:  # prose and captions may change without a new run
            name = path.relative_to(root).with_suffix("").as_posix()
            chapters[name] = digest([package, str(evidence), *cells])
    return chapters


def before(app: Sphinx, config: Config) -> None:
    """Forget the runs and the evidence whose stamp does not hold, and all pages."""
    root, home = Path(app.srcdir), Path(app.doctreedir).parent
    os.environ.setdefault("GRSD_EVIDENCE", str(home / "evidence"))
    shutil.rmtree(app.doctreedir, ignore_errors=True)
    Path(app.doctreedir).mkdir(parents=True)
    draw_both(home / "ipython")
    try:
        old = dict(json.loads((home / STAMPS).read_text()))
    except (OSError, ValueError):
        old = {}
    new = stamps(root, Path(os.environ["GRSD_EVIDENCE"]))
    kept = {name for name, stamp in new.items() if old.get(name) == stamp}
    settled = [claim for claim in claims.load() if claim.verdict != "untested"]
    kept -= {docname(claim) for claim in settled if not recorded(claim)}
    for claim in settled:  # file by file: the folder may be anyone's
        if docname(claim) not in kept:
            (claims.evidence_dir() / f"{claim.id}.json").unlink(missing_ok=True)
    cache = Path(config.nb_execution_cache_path or home / ".jupyter_cache")
    forget(cache, root, kept)
    if config.nb_execution_mode == "cache":
        run(cache, root, sorted(set(new) - kept), config.nb_execution_timeout)
    (home / STAMPS).write_text(json.dumps(new, indent=1))


def run(cache: Path, root: Path, names: list[str], timeout: int) -> None:
    """Run chapters side by side, one thread each, as many at once as there are cores.

    Only where two or more have no run. What fails is not kept: Sphinx runs it again and reports it.
    """
    store, paths = get_cache(str(cache)), [str((root / f"{name}.md").absolute()) for name in names]
    for path in paths:
        store.add_nb_to_project(path, read_data={"name": "myst_nb_md", "type": "plugin"})
    if len(paths) > 1 and len(store.list_unexecuted(filter_uris=paths)) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        load_executor("local-parallel", store).run_and_cache(filter_uris=paths, timeout=timeout)


def draw_both(folder: Path) -> None:
    """Let kernels draw figures as SVG and PNG; `companion_page` keeps the SVG where it is small."""
    profile = folder / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    formats = 'c.InlineBackend.figure_formats = {"png", "svg"}\n'
    (profile / "ipython_kernel_config.py").write_text(formats)
    os.environ["IPYTHONDIR"] = str(folder)


def recorded(claim: claims.Claim) -> bool:
    """Whether evidence can be read; a damaged file counts as none."""
    try:
        return claims.evidence(claim.id) is not None
    except ValueError:
        return False


def forget(cache: Path, root: Path, kept: set[str]) -> None:
    """Drop the cached runs of all notebooks but those of the chapters that are kept."""
    if cache.exists():
        paths = {(root / f"{name}.md").resolve() for name in kept}
        store = get_cache(str(cache))
        for record in store.list_cache_records():
            if Path(record.uri).resolve() not in paths:
                store.remove_cache(record.pk)
