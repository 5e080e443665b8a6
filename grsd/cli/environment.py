"""`grsd doctor`: what is installed, what is missing, and where files are kept."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

import click

from grsd import __version__, check_environment
from grsd.cli.common import emit, json_option, main, say
from grsd.scale import cache_dir, evidence_dir, scale


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and where files are kept. Needs no network.

    Exit code 1 when a required package is missing or too old.
    """
    # what can be said without torch, which may be what is missing
    wanted = check_environment(verbose=False)
    cache = cache_dir()
    parent = next(p for p in [cache, *cache.parents] if p.exists())
    report: dict[str, Any] = {
        "grsd": __version__,
        "python": platform.python_version(),
        "missing": wanted,
        "scale": scale(),
        "cache": {
            "folder": str(cache),
            "writable": parent.is_dir() and os.access(parent, os.W_OK),
            "free_gb": round(shutil.disk_usage(parent).free / 1e9, 1),
        },
        "evidence": str(evidence_dir()),
        "optional": {name: _version(name) for name in ("datasets", "gguf", "jupyter-book")},
        "torch": None,
        "threads": None,
        "devices": [],
        "suites": _suites(cache / "suites"),
    }
    # torch, its threads and its devices
    if util.find_spec("torch") is not None:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(gpus))]
        threads = torch.get_num_threads()
        report |= {"torch": torch.__version__, "threads": threads, "devices": devices}
    # one object, or one line for each fact
    if as_json:
        emit(report)
    else:
        for name, value in _rows(report).items():
            click.echo(f"{name:<12} {value}")
        if wanted:
            say("grsd: install what is missing: pip install " + " ".join(f"'{w}'" for w in wanted))
    if wanted:
        click.get_current_context().exit(1)


def _rows(report: dict[str, Any]) -> dict[str, str]:
    place, optional, missing = report["cache"], report["optional"], report["missing"]
    torch = f"{report['torch']}, {report['threads']} threads" if report["torch"] else "missing"
    suites = [f"{name} ({n} checkpoints)" for name, n in report["suites"].items()]
    refused = "" if place["writable"] else ", CANNOT BE WRITTEN: set GRSD_CACHE"
    hub, book = optional["datasets"], optional["jupyter-book"]
    return {
        "grsd": report["grsd"],
        "python": report["python"],
        "torch": torch,
        "devices": ", ".join(report["devices"]) or "none",
        "scale": f"{report['scale']} (GRSD_SCALE)",
        "cache": f"{place['folder']} ({place['free_gb']} GB free{refused})",
        "suites": ", ".join(suites) or "none yet: grsd suite",
        "hub corpora": f"datasets {hub}" if hub else "no: pip install datasets",
        "book": f"jupyter-book {book}" if book else "no: make book installs it",
        "required": "MISSING " + ", ".join(missing) if missing else "all present",
    }


def _suites(folder: Path) -> dict[str, int]:
    """Name and key of every suite → its number of checkpoints."""
    roots = sorted(path for path in folder.glob("*/*") if path.is_dir())
    checkpoints = {root: len(list(root.glob("step*/config.json"))) for root in roots}
    return {f"{root.parent.name}-{root.name[:12]}": n for root, n in checkpoints.items()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
