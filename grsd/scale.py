"""How large an experiment is, and where the package keeps what it must keep.

The only module that reads the environment: `GRSD_SCALE`, `GRSD_CACHE` and `GRSD_EVIDENCE`.
A scale changes sizes and nothing else; no code path may depend on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

Scale = Literal["cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("cpu", "gpu")

T = TypeVar("T")


def scale() -> Scale:
    """The scale asked for with `GRSD_SCALE`; "cpu" when the variable is unset or empty.

    Raises
    ------
    ValueError
        If `GRSD_SCALE` holds anything but "cpu" or "gpu".
    """
    value = os.environ.get("GRSD_SCALE", "").strip().lower() or "cpu"
    if value not in SCALES:
        raise ValueError(
            f"GRSD_SCALE is {value!r}; set it to 'cpu' or 'gpu', or leave it unset for 'cpu'."
        )
    return value


def pick(*, cpu: T, gpu: T) -> T:
    """The value for the current scale: a size, a count or a width, never a choice of method."""
    return cpu if scale() == "cpu" else gpu


def cache_dir() -> Path:
    """Folder for suites, corpora and runs: `GRSD_CACHE`, else the user's cache folder.

    Returns an absolute path and does not create it.
    """
    given = os.environ.get("GRSD_CACHE", "").strip()
    if given:
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base).expanduser().absolute() if base else Path.home() / ".cache") / "grsd"


def evidence_dir() -> Path:
    """Folder where claims record their evidence: `GRSD_EVIDENCE`, else a folder in the cache.

    Returns an absolute path and does not create it.
    """
    given = os.environ.get("GRSD_EVIDENCE", "").strip()
    return Path(given).expanduser().absolute() if given else cache_dir() / "evidence"
