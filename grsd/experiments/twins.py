"""The experiment ``twins``: log-shift invariance (D4) of residual nets and twins without skips.

One piece is one pair: a residual network and the network that has the same branches, weights and
data and no skip, read at initialisation or where Adam has brought the loss to a given share.

Chosen before the series was run, after one network of each kind had been timed: per family and
depth the mean slope, and the excess rms² − floor² of the twin less that of the residual net, pair
by pair. The abstract of 2512.18209v5 says of every cell that the first is near zero for the
residual net (`realized`: its interval within ± `NEAR`, half of the violation that D4 is tested on),
and that the second is above zero (`degraded`: its interval is). No cell is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from grsd import checks, statistics
from grsd.dynamics import modes
from grsd.dynamics.problem import Problem
from grsd.experiments import engine
from grsd.experiments.engine import Data, Experiment, Piece, Rows
from grsd.lab.data import images
from grsd.lab.nets import architectures
from grsd.renorm.diagnostics import couplings

CLASSES = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))  # even or odd digits
NEAR = 0.15  # per nat
RATE, STEPS = 0.002, 5000  # of Adam, full batch
KINDS = ("residual", "twin")

# (width, depth, seed, skip) → a net on images; ε = 1/√L where nothing normalises, 1 elsewhere
FAMILIES: dict[str, Callable[[int, int, int, bool], nn.Module]] = {
    "MLP": lambda w, d, s, skip: architectures.res_mlp(
        inputs=64, width=w, layers=1, bias=True, **_common(d, s, skip)
    ),
    "CNN": lambda w, d, s, skip: architectures.res_conv(
        width=w // 2, layers=1, **_common(d, s, skip)
    ),
    "transformer": lambda w, d, s, skip: architectures.transformer(
        width=w, depth=d, seed=s, skip=skip
    ),
}


def _common(depth: int, seed: int, skip: bool) -> dict[str, Any]:
    epsilon = 1 / math.sqrt(depth) if skip else 1.0
    return {"depth": depth, "seed": seed, "epsilon": epsilon, "skip": skip}


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    families: tuple[str, ...] = tuple(FAMILIES)  # keys of FAMILIES
    depths: tuple[int, ...] = (2, 4, 8, 16)  # L, blocks
    samples: int = 64  # N, half of them even digits
    width: int = 12  # of the residual stream; channels have half of it
    remaining: float = 1.0  # measure where the loss has this share of its first value
    seeds: int = 16  # seeds 0, 1, …; each draws its own pair and its own data

    def __post_init__(self) -> None:
        for name in self.families or ("",):
            checks.one_of("family", name, FAMILIES)
        checks.at_least("depths", checks.ascending("depths", self.depths, 1), 1)
        checks.at_least("samples", self.samples, 32, "it is too small for the windows")
        checks.one_of("width", self.width, range(4, self.width + 1, 4), "expected a multiple of 4")
        checks.at_least("seeds", self.seeds, 2, "a standard error needs two or more")
        checks.between("remaining", self.remaining, 0, 1, "(]")


def pieces(p: Parameters) -> list[Piece]:
    """One piece per family, depth and seed."""
    common = engine.shared(p, "families", "depths", "seeds")
    return [
        {**common, "family": family, "depth": depth, "seed": seed}
        for family, depth, seed in product(p.families, p.depths, range(p.seeds))
    ]


def pair(piece: Piece) -> dict[str, Problem]:
    """Return the residual net of a piece and its twin, with the same weights, on the same data."""
    x, y = images.digits(CLASSES, piece["samples"], seed=1000 + piece["seed"])
    make = FAMILIES[piece["family"]]
    sizes = (piece["width"], piece["depth"], piece["seed"])
    return {kind: Problem(make(*sizes, kind == "residual"), x, y) for kind in KINDS}


def trained(at: Problem, remaining: float) -> torch.Tensor | None:
    """Return θ where Adam's loss first has this share of its first value; None after `STEPS`."""
    theta = copy.deepcopy(at.theta).requires_grad_(True)
    adam, goal = torch.optim.Adam([theta], lr=RATE), remaining * at.loss(at.theta)
    for _ in range(STEPS):
        if at.loss(theta.detach()) <= goal:
            return theta.detach()
        theta.grad = -at.velocity(theta.detach())
        adam.step()
    return None


def measure(piece: Piece) -> Data:
    """D4 of both nets and of a null on the spectrum of each; None if one did not learn, or bends so
    that its second derivative cannot be checked."""
    data: Data = {}
    for kind, at in pair(piece).items():
        theta = at.theta if piece["remaining"] == 1 else trained(at, piece["remaining"])
        try:
            seen = None if theta is None else modes.modes(*modes.instant(at, theta))
        except ArithmeticError:
            seen = None
        if seen is None:
            return {**dict.fromkeys(KINDS), "failed": kind}
        lam = seen.eigenvalues.clip(min=seen.eigenvalues[-1] * 1e-300)
        null = couplings.planted(lam, seed=1000 * piece["seed"] + piece["depth"])
        read = (
            couplings.shift_invariance(seen.eigenvalues, seen.matrix),
            couplings.shift_invariance(lam, null),
        )
        data[kind], data[f"{kind} null"] = (
            {key: getattr(one, key) for key in ("slope", "slope_error", "rms", "floor", "span")}
            for one in read
        )
    return data


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Per family and depth: both nets with their nulls, the paired difference, and what it says."""
    groups = []
    for (family, depth), members in engine.grouped(listed, measured, "family", "depth").items():
        pairs = [one for one in members if one[KINDS[0]] is not None]
        failed = [one["failed"] for one in members if "failed" in one]
        group: Data = {"family": family, "depth": depth, "pairs": len(pairs), "failed": failed}
        if len(pairs) > 1:
            group |= _group(pairs)
        groups.append(group)
    return engine.rounded({"groups": groups}, 4)


def _group(pairs: list[Data]) -> Data:
    group: Data = {}
    excess = {}
    for kind in (*KINDS, *(f"{kind} null" for kind in KINDS)):
        rows = [one[kind] for one in pairs]
        squares = {key: np.array([row[key] for row in rows]) ** 2 for key in ("rms", "floor")}
        excess[kind] = squares["rms"] - squares["floor"]
        group[kind] = {
            "slope": statistics.mean([row["slope"] for row in rows]),
            "slopes": [row["slope"] for row in rows],
            "excess2": statistics.mean(excess[kind]),
            **{key: math.sqrt(float(values.mean())) for key, values in squares.items()},
            "span": float(np.mean([row["span"] for row in rows])),
        }
    gap = statistics.mean(excess["twin"] - excess["residual"])
    slope = group["residual"]["slope"]
    near = slope.low > -NEAR and slope.high < NEAR
    return {**group, "gap": gap, "realized": int(near), "degraded": int(gap.low > 0)}


def table(result: Data) -> Rows:
    """Per family and depth: slope and rms of both nets, the paired difference, and the answers."""
    columns = ["family", "L", "pairs"]
    for kind in KINDS:
        columns += [f"{kind}: slope", "rms (floor)", "span"]
    columns += ["excess, twin − residual", "near 0", "twin farther"]
    rows: list[list[object]] = []
    for g in result["groups"]:
        row: list[object] = [g["family"], g["depth"], g["pairs"]]
        for one in (g[kind] for kind in KINDS if kind in g):
            row += [str(statistics.Interval(*one["slope"]))]
            row += [f"{one['rms']:.2f} ({one['floor']:.2f})", f"{one['span']:.1f}"]
        if "gap" in g:
            row.append(str(statistics.Interval(*g["gap"])))
            row += ["yes" if g[key] else "no" for key in ("realized", "degraded")]
        rows.append(row + ["–"] * (len(columns) - len(row)))
    return columns, rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"seeds": 64})
