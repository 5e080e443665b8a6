"""Spectral-shell dynamics of neural networks: the operator, its shells, and a ledger of claims.

The rooms are subpackages (`grsd.spectrum`, ...); `grsd.lab` brings models and text; this top module
holds the version and the check of the environment, and imports nothing heavy.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

__version__ = "0.1.0"

# What every room needs, with the least version that the code was written against. The same floors
# stand in pyproject.toml (a test compares the two), which an uninstalled source tree cannot read.
REQUIRED: dict[str, str] = {
    "torch": "2.8",
    "numpy": "1.26",
    "scipy": "1.15",
    "matplotlib": "3.8",
    "PyYAML": "6.0",
    "click": "8.1",
    "tqdm": "4.66",
    "safetensors": "0.4.3",
    "transformers": "5.0",
    "tokenizers": "0.22.1",
    "filelock": "3.13",
}


def _release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def check_environment(*, verbose: bool = True) -> list[str]:
    """Say which required packages are missing or older than needed. Installs and upgrades nothing.

    Returns one requirement per missing or outdated package, such as "scipy>=1.15". `verbose` prints
    the findings, one line each, and a line when nothing is missing.
    """
    wanted: dict[str, str] = {}
    if sys.version_info < (3, 11):
        wanted["python>=3.11"] = f"python {sys.version.split()[0]} is older than needed"
    for name, floor in REQUIRED.items():
        try:
            version = metadata.version(name)
            if _release(version) < _release(floor):
                wanted[f"{name}>={floor}"] = f"{name} {version} is older than needed"
        except metadata.PackageNotFoundError:
            wanted[f"{name}>={floor}"] = f"{name} is missing"
    if verbose:
        lines = [f"{fault}: install '{requirement}'" for requirement, fault in wanted.items()]
        print("\n".join(lines) or f"grsd {__version__}: every required package is present")
    return list(wanted)
