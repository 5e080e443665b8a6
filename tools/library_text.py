"""Write the text that small models are trained on: the source files of a Python's standard library.

    python tools/library_text.py

The archive holds the .py files without tests, character tables, bundled wheels and what was made on
this machine, in the order of their paths and without times or owners, so that the same Python gives
the same bytes. Python's licence goes with it.
"""

from __future__ import annotations

import io
import lzma
import platform
import sysconfig
import tarfile
from pathlib import Path

from grsd.lab.data import library

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"}
EXCLUDED |= {"__pycache__", "ensurepip", "encodings"}


def paths(root: Path) -> list[Path]:
    """The .py files below `root` that are the library's own text, sorted."""

    def wanted(path: Path) -> bool:
        *folders, name = path.relative_to(root).parts
        skipped = any(f in EXCLUDED or f.startswith("config-") for f in folders)
        return not skipped and not name.startswith("_sysconfigdata")

    return sorted(filter(wanted, root.rglob("*.py")), key=lambda p: p.relative_to(root).as_posix())


def archive(root: Path) -> bytes:
    """The files as a tar, compressed by xz."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for path in [root / "LICENSE.txt", *paths(root)]:
            raw = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(root).as_posix())
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return lzma.compress(plain.getvalue(), preset=9 | lzma.PRESET_EXTREME)


if __name__ == "__main__":
    if platform.python_version() != library.VERSION:
        raise SystemExit(
            f"this is Python {platform.python_version()}; the text is of {library.VERSION}"
        )
    library.ARCHIVE.write_bytes(archive(Path(sysconfig.get_paths()["stdlib"])))
    print(library.ARCHIVE.name, library.ARCHIVE.stat().st_size, library.digest())
