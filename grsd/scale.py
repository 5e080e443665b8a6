"""How large an experiment is, where it runs, and where the package keeps what it must keep.

The only module that reads the environment: `GRSD_SCALE`, `GRSD_DEVICE`, `GRSD_CACHE`,
`GRSD_EVIDENCE` and `GRSD_SITE`. A scale changes sizes and nothing else; no code path may depend on
it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

Scale = Literal["cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("cpu", "gpu")

T = TypeVar("T")


def scale() -> Scale:
    """The scale asked for with `GRSD_SCALE`; "cpu" when the variable is unset or empty."""
    value = os.environ.get("GRSD_SCALE", "").strip().lower() or "cpu"
    if value not in SCALES:
        raise ValueError(f"GRSD_SCALE is {value!r}; set it to 'cpu' or 'gpu', or leave it unset")
    return value


def pick(*, cpu: T, gpu: T) -> T:
    """The value for the current scale: a size, a count or a width, never a choice of method."""
    return cpu if scale() == "cpu" else gpu


def device() -> str:
    """Where large work runs: what `GRSD_DEVICE` names, else "cuda" when there is one, else "cpu".

    ValueError for a name that torch does not know and for a device that this machine lacks. Small
    float64 theory does not ask: it stays on the CPU, where float64 is fast.
    """
    import torch  # here: `grsd doctor` must run without it

    value = os.environ.get("GRSD_DEVICE", "").strip().lower()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not value:
        return "cuda" if gpus else "cpu"
    try:
        named = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"GRSD_DEVICE is {value!r}; set it to 'cpu' or 'cuda'") from error
    if named.type == "cuda" and (named.index or 0) >= gpus:
        have = ", ".join(["cpu", *(f"cuda:{i}" for i in range(gpus))])
        raise ValueError(f"GRSD_DEVICE is {value!r}, but this machine has {have}")
    return value


def _folder(variable: str) -> Path | None:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser().absolute() if value else None


def cache_dir(given: Path | str | None = None) -> Path:
    """Folder for suites, corpora and runs: the one given, `GRSD_CACHE`, or the user's cache folder.

    It may not exist yet. What the environment names is made absolute.
    """
    if given is not None:
        return Path(given)
    return _folder("GRSD_CACHE") or (_folder("XDG_CACHE_HOME") or Path.home() / ".cache") / "grsd"


def evidence_dir() -> Path:
    """Folder where claims record their evidence: `GRSD_EVIDENCE`, else a folder in the cache."""
    return _folder("GRSD_EVIDENCE") or cache_dir() / "evidence"


def site() -> str:
    """Address of the published book that a notebook belongs to (`GRSD_SITE`); empty in a build."""
    return os.environ.get("GRSD_SITE", "").strip().rstrip("/")
