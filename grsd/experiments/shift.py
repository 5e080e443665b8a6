"""The experiment ``shift``: log-shift invariance of the couplings (D4) against the depth of nets.

One piece is one tanh network on its own data, at initialisation or where gradient descent has
brought the loss down to a given share: the slope and rms of `grsd.renorm.diagnostics.couplings`
along gradient flow and along a random direction, by several statistics, and the same for a null and
two violations drawn on the network's own spectrum. A result holds one family over all its depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from grsd import checks, statistics
from grsd.dynamics import modes
from grsd.experiments.engine import Data, Experiment, Piece, Rows, grouped, rounded, shared
from grsd.experiments.tanh_stack import TanhStack
from grsd.lab.data import functions
from grsd.renorm.diagnostics import couplings

VELOCITIES = ("flow", "random")
# a null and two violations: the options of `couplings.planted`
CONTROLS: dict[str, dict[str, float]]
CONTROLS = {"null": {}, "tilted": {"slope": 0.3}, "bump": {"bump": 3.0}}
# of M: all, or the share of the depth at which its block stands; the last has rank ≤ width
PARTS: dict[str, float | None] = {"all": None, "first": 0.0, "middle": 0.5, "late": 0.75}
# the options of `couplings.shift_invariance`
VARIANTS: dict[str, dict[str, Any]] = {
    "log": {},
    "square": {"statistic": "square"},
    "classes": {"smooth": "classes"},
    "narrow": {"window": (0.2, 0.8)},
}


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    family: str = "residual"  # or "plain"
    epsilon: float = 0.3  # ε at depth 1
    scaling: str = "fixed"  # ε at every depth; or "sqrt": ε/√L, or "inverse": ε/L
    # L, blocks (hidden layers of a plain network)
    depths: tuple[int, ...] = (4, 9, 16, 25, 40, 64, 100, 144)
    samples: int = 64  # N
    width: int = 16
    inputs: int = 16
    layers: int = 1  # matrices in a residual branch
    target: str = "wave"  # a key of functions.TARGETS
    remaining: float = 1.0  # measure where the loss has this share of its first value
    part: str = "all"  # of M, a key of PARTS: "all", or M^(ℓ) of one block
    seeds: int = 48  # seeds 0, 1, …; each draws its own network and its own data
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.one_of("family", self.family, ("residual", "plain"))
        step_size(self.epsilon, self.scaling, 1)
        checks.at_least("depths", checks.ascending("depths", self.depths, 1), 1)
        checks.at_least("samples", self.samples, 32, "it is too small for the windows")
        checks.at_least("width", self.width, 1)
        checks.at_least("inputs", self.inputs, 2)
        checks.at_least("seeds", self.seeds, 2, "a standard error needs two or more")
        parts = PARTS if self.family == "residual" else ("all",)
        checks.one_of("part", self.part, parts, f"a {self.family} net has {', '.join(parts)}")
        checks.between("remaining", self.remaining, 0, 1, "(]")


def step_size(epsilon: float, scaling: str, depth: int) -> float:
    """Return ε at one depth under a scaling rule: "fixed" ε, "sqrt" ε/√L, "inverse" ε/L."""
    rules = {"fixed": 1.0, "sqrt": 1 / math.sqrt(depth), "inverse": 1 / depth}
    checks.one_of("scaling", scaling, rules)
    return checks.positive("epsilon", epsilon) * rules[scaling]


def network(piece: Piece) -> TanhStack:
    """Return the tanh network of a piece, with weights N(0, 1/fan-in) and no bias, on its data."""
    x, y = functions.data(piece["target"], piece["samples"], piece["seed"], piece["inputs"])
    x, y = x.to(piece["device"]), y.to(piece["device"])
    sizes = {name: piece[name] for name in ("width", "depth", "seed")}
    if piece["family"] == "plain":
        return TanhStack.plain(x, y, **sizes)
    return TanhStack.residual(x, y, epsilon=piece["epsilon"], layers=piece["layers"], **sizes)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per depth and seed."""
    common = shared(p, "depths", "seeds", "scaling")
    return [
        {**common, "depth": depth, "epsilon": step_size(p.epsilon, p.scaling, depth), "seed": seed}
        for depth in p.depths
        for seed in range(p.seeds)
    ]


def _read(lam: np.ndarray, x: np.ndarray) -> Data:
    """Slope and rms by every variant; the first one in full."""
    read = {name: couplings.shift_invariance(lam, x, **how) for name, how in VARIANTS.items()}
    kept = {name: getattr(read["log"], name) for name in ("slope_error", "rms", "floor", "noise")}
    slopes = {name: one.slope for name, one in read.items()}
    return {"slope": slopes, "square_rms": read["square"].rms, **kept}


def measure(piece: Piece) -> Data:
    """Build (and train) one network and read its couplings, random ones, and the controls."""
    net, seed, depth = network(piece), piece["seed"], piece["depth"]
    at = net.start if piece["remaining"] == 1 else net.descended(piece["remaining"])
    share = PARTS[piece["part"]]
    block = None if share is None else int(share * (depth - 1))
    generator = torch.Generator().manual_seed(10_000 + seed)
    noise = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in at]
    directions = (None, tuple(one.to(at[0].device) for one in noise))

    data: Data = {}
    for name, along in zip(VELOCITIES, directions, strict=True):
        instant = modes.modes(*net.kernel_rate(at, along, block=block), net.error(at))
        data[name] = _read(instant.eigenvalues, instant.matrix)

    # controls: couplings drawn on the same spectrum, which must have no zero
    lam = instant.eigenvalues
    held = lam.clip(min=lam[-1] * 1e-300)
    for index, (name, violation) in enumerate(CONTROLS.items()):
        drawn = couplings.planted(held, seed=1000 * seed + 10 * depth + index, **violation)
        data[name] = _read(lam, drawn)
    first = couplings.shift_invariance(lam, instant.matrix)
    spectrum = {name: getattr(first, name) for name in ("span", "deviation", "modes")}
    spectrum |= {"kernel": first.left_out, "top": lam[-1], "trace": lam.sum()}
    return {**data, "spectrum": spectrum}


def crossing(places: Sequence[float] | np.ndarray, slopes: Sequence[Sequence[float]]) -> Data:
    """Where the mean slope passes zero upwards, with a bootstrap over networks.

    The means are made monotone (isotonic regression with the inverse variances as weights) and
    joined linearly in log place. `places` ascend, e.g. ε²L; `slopes` are per place those of its
    networks, which are drawn anew within each place. Keys are ``place`` (None where the means do
    not cross), ``low`` and ``high``, the 2.5 and 97.5 % points of those draws that cross, and
    ``share``, how many do.
    """
    checks.ascending("places", places, 2, "expected two or more ascending")
    x = np.log(checks.positive("places", places))
    groups = [np.asarray(one, dtype=np.float64) for one in slopes]
    counts = [len(one) for one in groups]
    if len(counts) != len(x) or min(counts) < 2:
        raise ValueError(f"{len(x)} places have {counts} slopes; expected two or more at each")
    weights = np.array([len(one) / max(one.var(ddof=1), 1e-300) for one in groups])

    def root(*samples: np.ndarray) -> float:
        means = np.array([one.mean() for one in samples])
        y = isotonic_regression(means, weights=weights).x
        k = int(np.argmax(y > 0))
        if not y[k] > 0 or k == 0:
            return math.nan
        return float(np.exp(x[k - 1] + (x[k] - x[k - 1]) * -y[k - 1] / (y[k] - y[k - 1])))

    place, drawn = statistics.bootstrap(root, *groups)
    values = {"place": place.value, "low": place.low, "high": place.high}
    crossed = {name: v if math.isfinite(v) else None for name, v in values.items()}
    return {**crossed, "share": float(np.isfinite(drawn).mean())}


def _summary(values: list[float]) -> Data:
    mean, low, high, sd = statistics.mean(values)
    error = float(statistics.standard_error(values))
    p = statistics.p_value(values)
    return {"mean": mean, "error": error, "low": low, "high": high, "sd": sd, "p": p}


def _group(members: list[Data]) -> Data:
    """Per velocity and control: mean slope by every variant, quadratic means of rms and floor."""
    group: Data = {}
    for name in (*VELOCITIES, *CONTROLS):
        rows = [one[name] for one in members]
        kinds = ("rms", "floor", "noise", "slope_error")
        squares = {key: np.array([row[key] for row in rows]) ** 2 for key in kinds}
        excess = squares["rms"] - squares["floor"]
        group[name] = {
            "slope": {v: _summary([row["slope"][v] for row in rows]) for v in VARIANTS},
            **{key: math.sqrt(float(values.mean())) for key, values in squares.items()},
            "rms_error": float(statistics.standard_error([row["rms"] for row in rows])),
            "excess2": float(excess.mean()),
            "excess2_error": float(statistics.standard_error(excess)),
        }
        if name in VELOCITIES:  # of single networks
            group[name]["slopes"] = [row["slope"]["log"] for row in rows]
            group[name]["rmses"] = [row["rms"] for row in rows]
    spectra = [one["spectrum"] for one in members]
    group["spectrum"] = {key: float(np.mean([one[key] for one in spectra])) for key in spectra[0]}
    return group


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Groups by depth, and where the slope crosses zero: in ε²L, or the depth of plain nets."""
    groups = []
    for (depth, epsilon), members in grouped(listed, measured, "depth", "epsilon").items():
        place = depth * epsilon**2 if p.family == "residual" else float(depth)
        groups.append({"depth": depth, "epsilon": epsilon, "place": place, **_group(members)})
    places = np.array([g["place"] for g in groups])
    doublings = [math.log2(g["depth"]) for g in groups for _ in range(p.seeds)]
    crossings, trends = {}, {}
    for name in VELOCITIES if len(groups) > 1 else ():
        slopes = [g[name]["slopes"] for g in groups]
        trends[name] = statistics.slope(doublings, np.concatenate(slopes))
        if np.all(np.diff(places) > 1e-9 * places[1:]):
            crossings[name] = crossing(places, slopes)
    return rounded({"groups": groups, "crossings": crossings, "trends": trends}, 4)


def table(result: Data) -> Rows:
    """Per depth: slope ± standard error and rms, along flow and at random, beside the null."""
    columns = ["L", "ε", "ε²L or L"]
    for name in ("slope", "random", "null"):
        columns += [name, "±", "rms"]
    rows: list[list[object]] = []
    for g in result["groups"]:
        cells = [g["depth"], f"{g['epsilon']:.3g}", f"{g['place']:.3g}"]
        for name in (*VELOCITIES, "null"):
            one = g[name]["slope"]["log"]
            cells += [f"{one['mean']:+.3f}", f"{one['error']:.3f}", f"{g[name]['rms']:.3f}"]
        tilted = f"{g['tilted']['slope']['log']['mean']:+.3f}"
        rows.append([*cells, tilted, f"{g['bump']['rms']:.3f}"])
    return [*columns, "tilted .3", "bump rms"], rows


GPU = {"samples": 2048, "width": 256, "depths": (16, 64, 256), "seeds": 32, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
