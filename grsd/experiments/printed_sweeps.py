"""The learning-rate and weight-decay sweeps that 2603.00541 prints, as arrays.

Tables 8 to 13 are those of version 1; the numbers from 19 on are those of version 2, retyped by
hand. The losses are the paper's, to three decimals; what is read off them here is ours.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from grsd import checks


@dataclass(frozen=True)
class PublishedSweep:
    """One printed table."""

    number: int
    parametrization: str  #: "SP", "muP" (two layers a block or more) or "muP_k1" (the rule of one)
    optimizer: str  #: the hidden matrices' and the others'
    axis: str  #: "width" or "depth"
    quantity: str  #: "lr" or "wd", what `log2` is the binary logarithm of
    layernorm: bool
    sizes: tuple[int, ...]  #: widths or depths
    log2: NDArray[np.float64]  #: (G,)
    losses: NDArray[np.float64]  #: (sizes, G), NaN where the paper prints NaN

    def row(self, size: int) -> NDArray[np.float64]:
        """Return the losses (G,) of one size."""
        checks.one_of(f"size in table {self.number}", size, self.sizes)
        return self.losses[self.sizes.index(size)]


def numbers() -> list[int]:
    """Return the numbers of the tables that are here."""
    return sorted(_rows())


def sweep(number: int) -> PublishedSweep:
    """Return one table."""
    rows = _rows()[checks.one_of("table", number, numbers())]
    sizes = sorted({int(row["size"]) for row in rows})
    grid = sorted({float(row["log2"]) for row in rows})
    losses = np.full((len(sizes), len(grid)), np.nan)
    filled = np.zeros(losses.shape, dtype=bool)
    for row in rows:
        at = sizes.index(int(row["size"])), grid.index(float(row["log2"]))
        losses[at], filled[at] = float(row["loss"]), True
    assert filled.all(), f"table {number} has holes"
    first = rows[0]
    return PublishedSweep(
        number=number,
        parametrization=first["param"],
        optimizer=first.get("optimizer", "Muon-Kimi-AdamW"),
        axis=first["axis"],
        quantity=first.get("hp", "lr"),
        layernorm=first.get("layernorm", "yes") == "yes",
        sizes=tuple(sizes),
        log2=np.array(grid),
        losses=losses,
    )


@cache
def _rows() -> dict[int, list[dict[str, str]]]:
    tables: dict[int, list[dict[str, str]]] = {}
    for name in ("mup_sweeps_v1.csv", "mup_sweeps_v2.csv"):
        text = (files("grsd") / "data" / "tables" / name).read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines()):
            row["log2"] = row.get("log2_lr") or row["log2_hp"]
            tables.setdefault(int(row.get("table") or row["table_v2"]), []).append(row)
    return tables
