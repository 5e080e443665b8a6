"""`grsd doctor`: what is installed, what is missing, and where files are kept."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
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
        "optional": {"datasets": _version("datasets"), "jupyter-book": _version("jupyter-book")},
        "torch": None,
        "threads": None,
        "devices": [],
        "suites": {},
    }
    if util.find_spec("torch") is not None:
        import torch

        report["torch"] = torch.__version__
        report["threads"] = torch.get_num_threads()
        cuda = [
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
        report["devices"] = ["cpu", *cuda]
    suites_folder = cache / "suites"
    if suites_folder.is_dir():
        report["suites"] = {
            p.name: len(list(p.glob("step*/config.json")))
            for p in sorted(suites_folder.iterdir())
            if p.is_dir()
        }
    if as_json:
        emit(report)
    else:
        place, optional = report["cache"], report["optional"]
        rows = {
            "grsd": report["grsd"],
            "python": report["python"],
            "torch": f"{report['torch']}, {report['threads']} threads"
            if report["torch"]
            else "missing",
            "devices": ", ".join(report["devices"]) or "none",
            "scale": f"{report['scale']} (GRSD_SCALE)",
            "cache": f"{place['folder']} ({place['free_gb']} GB free{'' if place['writable'] else ', CANNOT BE WRITTEN: set GRSD_CACHE'})",
            "suites": ", ".join(f"{k} ({n} checkpoints)" for k, n in report["suites"].items())
            or "none yet: grsd suite",
            "hub corpora": f"datasets {optional['datasets']}"
            if optional["datasets"]
            else "no: pip install datasets",
            "book": f"jupyter-book {optional['jupyter-book']}"
            if optional["jupyter-book"]
            else "no: make book installs it",
            "required": "all present" if not wanted else "MISSING " + ", ".join(wanted),
        }
        for name, value in rows.items():
            click.echo(f"{name:<12} {value}")
        if wanted:
            say("grsd: install what is missing: pip install " + " ".join(f"'{w}'" for w in wanted))
    if wanted:
        click.get_current_context().exit(1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
