"""Write the tables of the stored benchmarks into README.md, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

from pathlib import Path

from grsd.experiments.benchmark_tables import filled
from grsd.results import atomic_write

README = Path(__file__).resolve().parent.parent / "README.md"

if __name__ == "__main__":
    atomic_write(README, filled(README.read_text(encoding="utf-8")))
