"""The source text of Python 3.11.7's standard library, shipped with the package: one text anywhere.

What models are trained on must not depend on the Python that runs. `tools/library_text.py` makes
the archive; Python's licence lies in it.
"""

from __future__ import annotations

import hashlib
import tarfile
from functools import lru_cache
from pathlib import Path

VERSION = "3.11.7"
ARCHIVE = Path(__file__).parents[2] / "data" / "text" / f"python-{VERSION}.tar.xz"
SHA256 = "6c6e63f873f6d998ba6f472b404bd18fad8202004162c05ba80a1068341bf136"
LICENCE = "LICENSE.txt"


def digest() -> str:
    """SHA-256 of the archive."""
    return hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()


@lru_cache(maxsize=1)
def files() -> dict[str, bytes]:
    """Return path → bytes of the 607 source files, sorted by path. Cost: a second, once.

    Raises ValueError when the archive is not the one that this version of grsd was made with.
    """
    if digest() != SHA256:
        raise ValueError(f"{ARCHIVE} is damaged: its SHA-256 is {digest()}; install grsd again")
    with tarfile.open(ARCHIVE) as tar:
        members = [(m.name, tar.extractfile(m)) for m in tar if m.name != LICENCE]
        return {name: held.read() for name, held in members if held is not None}
