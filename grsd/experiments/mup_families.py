"""The experiment ``mup-families``: contributions and coordinate checks of every family of plans.

All at tiny sizes. One piece is one family of `grsd.mup.families` under one optimizer: what its
blocks and its head contribute with the plan, as multiples of what they contribute without
(`Plan.verify`), and the slopes of a coordinate check. A family that plans refuse has the reason in
their place.

Embeddings are multiplied by `embedding` in the coordinate check. With transformers' deviation of
0.02 the stream would start far below what the first branches add; their sum falls like 1/√L, and so
would everything behind the next norm, until depths that no tiny model has (Mamba 2 and Qwen3-MoE
were "not flat" for that reason alone). The rules want a stream that starts at a fixed size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup.coordcheck import coord_check
from grsd.mup.families import FAMILIES
from grsd.mup.planning import plan
from grsd.mup.registry import row


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    optimizers: tuple[str, ...] = ("adamw",)
    rates: tuple[float, ...] = (2.0**-7,)
    widths: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (2, 4, 8)
    seeds: int = 4
    steps: int = 3
    batch_size: int = 8
    length: int = 32
    embedding: float = 25.0

    def __post_init__(self) -> None:
        for name in self.optimizers:
            row(name)
        checks.at_least("rates", len(self.rates), len(self.optimizers), "one for each optimizer")
        sizes = (*self.widths, *self.depths, self.seeds, self.steps, self.batch_size, self.length)
        checks.at_least("least of sizes, seeds and steps", min(sizes), 1)
        checks.positive("embedding", self.embedding)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per family and optimizer."""
    shared = {name: getattr(p, name) for name in ("seeds", "steps", "batch_size", "length")}
    shared |= {"widths": list(p.widths), "depths": list(p.depths), "embedding": p.embedding}
    return [
        {**shared, "family": family, "optimizer": optimizer, "lr": lr}
        for family in FAMILIES
        for optimizer, lr in zip(p.optimizers, p.rates, strict=False)
    ]


def measure(piece: Piece) -> Data:
    """Measure the contributions at the largest sizes, then train."""
    family, optimizer = piece["family"], piece["optimizer"]
    if FAMILIES[family].refused:
        return {"refused": FAMILIES[family].refused}
    config = stock.configuration(family)
    factory = stock.factory(config, positions=piece["length"])
    size, length = piece["batch_size"], piece["length"]
    loss = stock.images(config, size) or help_text.next_byte(size, length)
    widths, depths = piece["widths"], piece["depths"]
    # contributions, at the largest width and at the largest depth
    base = factory(widths[0], depths[0])
    rows: list[Any] = []
    for width, depth in ((widths[-1], depths[0]), (widths[-1], depths[-1])):
        model = factory(width, depth)
        made = plan(model, base=base, optimizer=optimizer)
        made.initialize_(model, seed=0)
        rows += made.verify(model, loss, base=base).rows
    departures = [abs(r.measured / r.wanted - 1) for r in rows if r.what != "reads"]
    # and how the features' change goes with the sizes when all of them are trained
    # images have no table that could be multiplied; their patches are read at a fixed size
    own = {} if stock.images(config, size) else {"input": piece["embedding"]}
    check = coord_check(
        factory,
        loss,
        widths=widths,
        depths=depths,
        base=(widths[0], depths[0]),
        optimizer=optimizer,
        lr=piece["lr"],
        steps=piece["steps"],
        seeds=range(piece["seeds"]),
        make_plan=lambda model, start: plan(
            model, base=start, optimizer=optimizer, multipliers=own
        ),
    )
    slopes = {"features": check.slopes, "output": check.output_slopes}
    return {
        "refused": "",
        "departure": float(f"{max(departures):.3g}"),
        "reads": [float(f"{r.measured:.3g}") for r in rows if r.what == "reads"],
        "complete": all(r.right for r in rows),
        "verdict": check.verdict,
        "findings": [str(f) for f in check.findings],
        "slopes": {
            f"{what}, {axis}": [_finite(v) for v in (s.value, s.low, s.high)]
            for what, by_axis in slopes.items()
            for axis, s in by_axis.items()
        },
    }


def _finite(value: float) -> float | None:
    """Return a number as a result can hold it; two points have no interval."""
    return round(value, 3) if math.isfinite(value) else None


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Every family under every optimizer."""
    kept = ("family", "optimizer", "lr")
    return {
        "families": [
            {**{name: piece[name] for name in kept}, **data}
            for piece, data in zip(listed, measured, strict=True)
        ]
    }


def table(result: Data) -> Rows:
    """The largest departure from 1/r_L or 1/r_n, and the slopes after the last step."""
    rows: list[list[object]] = []
    for one in result["families"]:
        if one["refused"]:
            rows.append([one["family"], one["optimizer"], "refused", "–", "–", "–"])
            continue
        slopes: dict[str, Any] = one["slopes"]
        shown = [
            "–" if None in v else f"{v[0]:+.2f} [{v[1]:+.2f}, {v[2]:+.2f}]"
            for v in (slopes["features, width"], slopes["features, depth"])
        ]
        right = f"{100 * one['departure']:.1f} %"
        rows.append([one["family"], one["optimizer"], right, *shown, one["verdict"]])
    columns = ["family", "optimizer", "contributions off by", "width", "depth", "verdict"]
    return columns, rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"seeds": 8})
