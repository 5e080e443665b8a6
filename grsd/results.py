"""Stored results: numbers with the command, seeds, versions and hardware that made them.

A result is one JSON file. `save` writes it whole or not at all; `load` and `available` read the
results that ship with the package (`grsd/data/results`) or those of any other folder. How a result
is made again is its own `command`, which `grsd results recompute` runs. What ships comes from a
committed tree (`save` refuses anything else), and `manifest` lists it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from grsd import __version__
from grsd.scale import scale

ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
PROVENANCE_KEYS = frozenset(
    {"command", "parameters", "seeds", "revision", "versions", "hardware", "scale", "date"}
)
MANIFEST = "manifest.json"  # in grsd/data: what `manifest` says of the results that ship
CHANGED = "+changes"  # behind the revision of a checkout that was edited
PACKAGES = ("torch", "numpy", "scipy", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Result:
    """One stored result."""

    id: str  #: file name without its ending, of lower-case letters, digits, ".", "_" and "-"
    data: dict[str, Any]  #: what was measured; only what JSON can hold, and finite numbers
    provenance: dict[str, Any]  #: as `provenance` makes it

    def __post_init__(self) -> None:
        check_id(self.id)
        if missing := sorted(PROVENANCE_KEYS - set(self.provenance)):
            raise ValueError(f"{self.id!r}: its provenance lacks {missing}; use provenance()")


def check_id(name: str) -> str:
    """Return `name` when it can name a result; raise ValueError otherwise."""
    if not isinstance(name, str) or not ID.fullmatch(name):
        allowed = "lower-case letters, digits, '.', '_' and '-'"
        raise ValueError(f"{name!r} cannot name a result; use {allowed}")
    return name


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it: numpy and torch scalars and arrays become numbers and lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value!r}; only finite numbers are stored")
        return float(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def dumps(value: Any, *, where: str = "value", sort_keys: bool = True) -> str:
    """JSON text of `value`, ending in a newline; equal values give equal text when keys are sorted.

    Float64 survives the round trip exactly; arrays become lists. A number that is not finite
    (ValueError) and what JSON cannot hold (TypeError) are named with their place.
    """
    plain = _plain(value, where)
    return json.dumps(plain, indent=1, sort_keys=sort_keys, ensure_ascii=False) + "\n"


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file whole or not at all, making its folder when needed, and return its path.

    The content goes to a temporary file in the same folder, is flushed to the disk and then
    renamed: a reader, or a run that is killed at any moment, sees the old file or the new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)  # mkstemp gives 0600; a shared cache must stay readable
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def revision() -> str:
    """Git revision of the package's checkout, with "+changes" if it was edited; else "unknown".

    Stored results are no part of what makes one: a new one leaves the revision as it is.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        ours = ("grsd", ":!grsd/data/results", f":!grsd/data/{MANIFEST}")
        edited = git("status", "--porcelain", "--", *ours)
        return git("rev-parse", "HEAD") + (CHANGED if edited else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _versions() -> dict[str, str]:
    versions = {"grsd": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
    }
    # torch is never imported for this: a result without torch need not load it
    if (torch := sys.modules.get("torch")) is not None:
        hardware["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            hardware["accelerator"] = torch.cuda.get_device_name()
    return hardware


def provenance(
    command: Sequence[str],
    parameters: Mapping[str, Any],
    seeds: Sequence[int] | Mapping[str, int] = (),
) -> dict[str, Any]:
    """What someone needs to make a result again and to judge it; it names no user, host or path.

    Parameters
    ----------
    command : sequence of str
        Arguments of `grsd` that recompute the result, without "grsd": ["shells", "mini-1.3m"].
    parameters : mapping
        Everything that sets the numbers and is not in the command.
    seeds : sequence or mapping of int
        Every seed used.
    """
    if isinstance(command, str):
        raise TypeError(f"command is the string {command!r}; give the list of its arguments")
    made = {
        "command": [str(part) for part in command],
        "parameters": dict(parameters),
        "seeds": dict(seeds) if isinstance(seeds, Mapping) else list(seeds),
        "revision": revision(),
        "versions": _versions(),
        "hardware": _hardware(),
        "scale": scale(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {key: _plain(value, f"provenance.{key}") for key, value in made.items()}


def packaged_dir() -> Path:
    """Folder of the results that ship with the package."""
    return Path(__file__).parent / "data" / "results"


def save(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Write `result` as `<folder>/<id>.json`, whole or not at all; an older one is replaced.

    A result that would ship with the package is refused when its tree was edited.
    """
    edited = str(result.provenance["revision"]).endswith(CHANGED)
    if edited and Path(folder).resolve() == packaged_dir().resolve():
        made = f"{result.id!r} was made at {result.provenance['revision']!r}"
        raise ValueError(f"{made}, an edited tree; commit, run it again, and store that")
    text = dumps(asdict(result), where=f"result {result.id}")
    return atomic_write(Path(folder) / f"{result.id}.json", text)


def available(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Sorted ids of the results in `folder`, by default those that ship with the package."""
    place = packaged_dir() if folder is None else Path(folder)
    return sorted(path.stem for path in place.glob("*.json") if not path.name.startswith("."))


def manifest() -> dict[str, dict[str, Any]]:
    """What ships: id -> SHA-256 of the file, command, revision, seconds (None: not timed).

    Kept beside the results in `MANIFEST`, which `grsd results manifest` writes.
    """
    listed = {}
    for name in available():
        origin = load(name).provenance
        raw = (packaged_dir() / f"{name}.json").read_bytes()
        listed[name] = {"sha256": hashlib.sha256(raw).hexdigest(), "command": origin["command"]}
        listed[name] |= {"revision": origin["revision"], "seconds": origin.get("seconds")}
    return listed


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Result:
    """Read one result, by default one that ships with the package.

    An unknown name is a FileNotFoundError that lists the known ones; a file that is cut off, no
    result, or stored under another name is a ValueError.
    """
    place = packaged_dir() if folder is None else Path(folder)
    path = place / f"{check_id(name)}.json"
    if not path.is_file():
        known = ", ".join(available(place)) or "none"
        raise FileNotFoundError(f"no result {name!r}; there are: {known}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); recompute it") from error
    if not isinstance(raw, dict) or set(raw) != {"id", "data", "provenance"}:
        raise ValueError(f"{path.name} is not a result; expected id, data and provenance")
    if raw["id"] != name:
        raise ValueError(f"{path.name} holds the result {raw['id']!r}; rename or recompute it")
    return Result(**raw)


def largest_difference(old: Any, new: Any) -> float | None:
    """Largest |a − b| / max|a| over corresponding lists of numbers; None when the shapes differ."""
    if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new):
        old, new = list(old.values()), [new[key] for key in old]
    elif isinstance(old, float | int) and isinstance(new, float | int):
        old, new = [old], [new]
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new)):
        return 0.0 if old == new else None
    if old and all(isinstance(x, float | int) for x in [*old, *new]):
        size = max(abs(x) for x in [*old, *new])
        return max(abs(a - b) for a, b in zip(old, new, strict=True)) / size if size else 0.0
    below = [largest_difference(a, b) for a, b in zip(old, new, strict=True)]
    return None if None in below else max((d for d in below if d is not None), default=0.0)
