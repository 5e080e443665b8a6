"""What every chapter starts with: the names that all of them use, and one call that sets the stage.

A chapter's first cell reads

    from grsd.chapter import claims, figures, np, plt, start, torch
    start("spectrum/operator", threads=1, dtype="float64")

In a published notebook, lines before it install `grsd` where it is missing (`book/_ext`).
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import util
from time import monotonic
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from grsd import __version__, check_environment, claims, figures, results
from grsd.scale import device, pick, scale, site

__all__ = ["claims", "device", "figures", "np", "pick", "plt", "progress", "start", "torch"]

# What a chapter may need beside the package, at the version that the book was built with: module ->
# what pip is asked for. Colab lacks these; a test compares them with the lock.
PINNED = {"pytorch_optimizer": "pytorch-optimizer==4.1.0"}
TIMES = "chapter-times"  # the stored result that `make colab` writes
TICK = 20.0  # seconds between lines of progress


def start(
    chapter: str,
    *,
    threads: int | None = None,
    dtype: str = "",
    needs: tuple[str, ...] = (),
    gpu: bool = False,
) -> None:
    """Set the stage of a chapter, and say in one line where it runs and how long it takes.

    Draws nothing; silences the warning of notebooks without widgets that a progress bar is missing.

    Parameters
    ----------
    chapter : str
        "room/page", under which its time is stored.
    threads : int, optional
        Threads of torch. One is right for small matrices, where threads only wait for each other.
    dtype : str
        torch's default dtype, such as "float64"; empty: unchanged.
    needs : tuple of str
        Modules of `PINNED` that are installed when missing, at the pinned version.
    gpu : bool
        Whether the chapter works on `grsd.scale.device()`; else it stays on the CPU.
    """
    for module in needs:
        install(module)
    if wanted := check_environment(verbose=False):
        print("missing or too old, install: " + " ".join(f"'{one}'" for one in wanted))
    figures.style()
    warnings.filterwarnings("ignore", message="IProgress not found")
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype:
        torch.set_default_dtype(getattr(torch, dtype))
    where = f"device {device()}" if gpu else "device cpu (float64 theory, which no GPU speeds up)"
    print(f"grsd {__version__}, {chapter}: {where}, scale {scale()}{expected(chapter)}")


def progress(what: str) -> Callable[[int, int, object], None]:
    """Called with (done, total, part), it prints how far long work is, every 20 seconds.

    Silent while the book is built at the scale of a CPU: pages keep no such lines.
    """
    heard = bool(site()) or scale() == "gpu"  # a reader's notebook, or larger sizes
    last = monotonic()

    def show(done: int, total: int, part: object) -> None:
        nonlocal last
        if heard and monotonic() - last >= TICK:
            last = monotonic()
            words = f"loss {part:.3f}" if isinstance(part, float) else part
            print(f"{what}: {done} of {total}, {words}", flush=True)

    return show


def install(module: str) -> None:
    """Install a module of `PINNED` without its dependencies if it is missing, and say so.

    A failed install is a RuntimeError with pip's own words.
    """
    if util.find_spec(module) is not None:
        return
    wanted = PINNED[module]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"pip could not install {wanted}: {(done.stderr or done.stdout).strip()}"
        )
    print(f"installed {wanted}, which was missing")


def expected(chapter: str) -> str:
    """How long a chapter takes at this scale, where the stored run of all chapters knows it."""
    times: dict[str, Any] = {}
    if TIMES in results.available():
        stored = results.load(TIMES)
        if stored.provenance["scale"] == scale():
            times = stored.data["seconds"]
    if chapter not in times:
        return ""
    minutes = math.ceil(times[chapter] / 60)
    cores = stored.provenance["hardware"]["cores"]
    return f", about {minutes} minute{'s' if minutes > 1 else ''} on {cores} CPU cores"
