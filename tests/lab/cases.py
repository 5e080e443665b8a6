"""What the tests of the laboratory share: a size that trains in a moment, and deterministic documents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from grsd.lab.checkpoints import suites

TINY = suites.Preset("tiny", hidden=16, layers=1, heads=2, vocab_size=300, lr=1e-2, positions=64)
RECIPE: dict[str, Any] = {"steps": 5, "batch_size": 2, "length": 16}


def write_texts(folder: Path, count: int = 25) -> list[Path]:
    """Documents of random words: distinct, deterministic."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        path = folder / f"doc{index:02d}.txt"
        path.write_text(
            f"{index} " + " ".join(draw.choice(words) for _ in range(120)), encoding="utf-8"
        )
        paths.append(path)
    return paths
