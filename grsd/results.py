"""Stored results: numbers with the command, seeds, versions and hardware that made them.

A result is one JSON file. `save` writes it whole or not at all; `load` and `available` read the results
that ship with the package (`grsd/data/results`) or those of any other folder. How a result is made again
is its own `command`; running that command is the business of `grsd.lab`, one layer up.
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from grsd import __version__
from grsd.scale import cache_dir, scale

__all__ = [
    "Result",
    "atomic_write",
    "available",
    "cache_dir",
    "code_fingerprint",
    "dumps",
    "largest_difference",
    "load",
    "packaged_dir",
    "provenance",
    "save",
]

ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
PROVENANCE_KEYS = frozenset(
    {"command", "parameters", "seeds", "revision", "versions", "hardware", "scale", "date"}
)
PACKAGES = ("torch", "numpy", "scipy", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Result:
    """One stored result.

    Attributes
    ----------
    id : str
        File name without its ending: lower-case letters, digits, ".", "_" and "-".
    data : dict
        What was measured; only what JSON can hold, and finite numbers only.
    provenance : dict
        As `provenance` makes it.
    """

    id: str
    data: dict[str, Any]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        check_id(self.id)
        if not isinstance(self.data, dict):
            raise TypeError(
                f"result {self.id!r}: data is a {type(self.data).__name__}, expected a dict"
            )
        if not isinstance(self.provenance, dict):
            raise TypeError(
                f"result {self.id!r}: provenance is not a dict; make it with provenance()"
            )
        missing = sorted(PROVENANCE_KEYS - set(self.provenance))
        if missing:
            raise ValueError(
                f"result {self.id!r}: its provenance lacks {missing}; make it with provenance()"
            )


def code_fingerprint(folder: Path) -> str:
    """SHA-256 over the Python sources under `folder`: what a cached number must name when that code computed it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(
            path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0"
        )
    return digest.hexdigest()


def check_id(name: str) -> str:
    """Return `name` when it can name a result; raise ValueError otherwise."""
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a result; use lower-case letters, digits, '.', '_' and '-'"
        )
    return name


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it: numpy and torch scalars and arrays become numbers and lists."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{where} is {value!r}; only finite numbers are stored (leave the key out instead)"
            )
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
    """JSON text of `value`, ending in a newline; equal values give equal text, unless the order of keys is to be kept.

    Numbers keep full precision (float64 survives the round trip exactly). Arrays become lists.

    Raises
    ------
    ValueError
        If a number is not finite; the message names the place.
    TypeError
        If something cannot be held by JSON.
    """
    return (
        json.dumps(_plain(value, where), indent=1, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    )


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a file whole or not at all, making its folder when needed.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed, so
    that a reader, or a run that is killed at any moment, sees the old file or the new one.

    Returns
    -------
    Path
        The path written.
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
    """Git revision of the checkout this package is imported from, "+changes" when it differs from it.

    "unknown" when the package does not live in a git checkout.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--", "grsd") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
    }
    torch = sys.modules.get(
        "torch"
    )  # never imported for this: a result without torch need not load it
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["accelerator"] = torch.cuda.get_device_name()
    return found


def provenance(
    command: Sequence[str],
    parameters: Mapping[str, Any],
    seeds: Sequence[int] | Mapping[str, int] = (),
) -> dict[str, Any]:
    """What someone needs to make a result again and to judge it.

    Parameters
    ----------
    command : sequence of str
        Arguments of `grsd` that recompute the result, without "grsd" itself: ["shells", "mini-1.3m"].
    parameters : mapping
        Everything that sets the numbers and is not in the command.
    seeds : sequence or mapping of int
        Every seed used.

    Returns
    -------
    dict
        With the keys of `PROVENANCE_KEYS`. It names no user, host or path of this machine.
    """
    if isinstance(command, str):
        raise TypeError(f"command is the string {command!r}; give the list of its arguments")
    versions = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    made: dict[str, Any] = {
        "command": [str(part) for part in command],
        "parameters": dict(parameters),
        "seeds": dict(seeds) if isinstance(seeds, Mapping) else list(seeds),
        "revision": revision(),
        "versions": {"grsd": __version__, "python": platform.python_version(), **versions},
        "hardware": _hardware(),
        "scale": scale(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    plain = _plain(made, "provenance")
    assert isinstance(plain, dict)
    return plain


def packaged_dir() -> Path:
    """Folder of the results that ship with the package."""
    return Path(__file__).parent / "data" / "results"


def save(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Write `result` as `<folder>/<id>.json`, whole or not at all; an older one is replaced."""
    return atomic_write(
        Path(folder) / f"{result.id}.json", dumps(asdict(result), where=f"result {result.id}")
    )


def available(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Sorted ids of the results in `folder`, by default those that ship with the package."""
    place = packaged_dir() if folder is None else Path(folder)
    return sorted(path.stem for path in place.glob("*.json") if not path.name.startswith("."))


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Result:
    """Read one result, by default one that ships with the package.

    Raises
    ------
    FileNotFoundError
        If there is none of that name; the message lists those there are.
    ValueError
        If the file is not a result: cut off, not JSON, without provenance, or under another name.
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
        raise ValueError(
            f"{path.name} is not a result: expected an object with id, data and provenance"
        )
    if raw["id"] != name:
        raise ValueError(
            f"{path.name} holds the result {raw['id']!r}; rename the file or recompute it"
        )
    return Result(**raw)


def largest_difference(old: Any, new: Any) -> float | None:
    """Largest |a − b| / max|a| over corresponding lists of numbers; None when the shapes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        if set(old) != set(new):
            return None
        parts = [largest_difference(old[k], new[k]) for k in old]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return None
        if old and all(isinstance(x, (int, float)) for x in [*old, *new]):
            size = max(abs(x) for x in [*old, *new])
            return max(abs(a - b) for a, b in zip(old, new, strict=True)) / size if size else 0.0
        parts = [largest_difference(a, b) for a, b in zip(old, new, strict=True)]
    elif isinstance(old, (int, float)) and isinstance(new, (int, float)):
        size = max(abs(old), abs(new))
        return abs(old - new) / size if size else 0.0
    else:
        return 0.0 if old == new else None
    return None if None in parts else max((p for p in parts if p is not None), default=0.0)
