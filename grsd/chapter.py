"""What every chapter starts with: the names that all of them use, and one call that sets the stage.

A chapter's first cell installs `grsd` where it is missing and then reads

    from grsd.chapter import claims, figures, np, plt, start, torch
    start(threads=1, dtype="float64")
"""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch

from grsd import check_environment, claims, figures
from grsd.scale import pick

__all__ = ["claims", "figures", "np", "pick", "plt", "start", "torch"]


def start(*, threads: int | None = None, dtype: str = "") -> None:
    """Check the environment, set the figures' style and, if asked, threads and torch's dtype.

    One thread is right for small matrices, where threads only wait for each other. Installs and
    draws nothing; silences the warning of notebooks without widgets that a progress bar is missing.
    """
    check_environment()
    figures.style()
    warnings.filterwarnings("ignore", message="IProgress not found")
    if threads is not None:
        torch.set_num_threads(threads)
    if dtype:
        torch.set_default_dtype(getattr(torch, dtype))
