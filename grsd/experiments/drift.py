"""The experiment ``drift``: how the drift of the error of two-layer nets changes with their size.

One piece is one net on one data set: gradient flow, energies and fluxes at every time and edge,
loss exponents. A result holds one target and one series: n and h grow together, h grows at fixed
data, or γ is held fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from grsd import checks, statistics
from grsd.dynamics import drift, flow, modes, transport
from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.experiments import engine
from grsd.experiments.engine import Data, Experiment, Piece, Rows
from grsd.experiments.two_layer_flow import (
    EDGES,
    ORDERS,
    PARTS,
    REFERENCE,
    ROUNDING,
    follow,
    problem,
)
from grsd.lab.data.functions import TARGETS


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    target: str = "wave"  # a key of TARGETS
    sizes: tuple[int, ...] = (64, 128, 256, 512)  # n, samples
    widths: tuple[int, ...] = ()  # h; empty for h = n, else every size with every width
    gamma: float = 4.0  # γ at width 128
    scaling: str = "mean-field"  # γ √(h/128), which keeps γ/√h; or "ntk": γ at every width
    seeds: int = 6  # seeds 0, 1, …; each draws its own net and, unless data_seed ≥ 0, its own data
    data_seed: int = -1
    inputs: int = 2  # d
    activation: str = "tanh"
    gain: float = 1.0
    until: float = 1000.0  # time of the flow
    after: float = 10.0  # statistics are taken over [after, until]
    points: int = 25  # times, evenly in log t from 0.1
    rtol: float = 1e-7
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.one_of("target", self.target, TARGETS)
        checks.one_of("scaling", self.scaling, ("mean-field", "ntk"))
        checks.at_least("sizes", min(self.sizes, default=0), 4)
        checks.at_least("widths", min(self.widths, default=1), 1)
        checks.at_least("inputs", self.inputs, 2)
        checks.at_least("seeds", self.seeds, 2, "a spread needs two or more")
        checks.between("after", self.after, 0.1, self.until, "()")
        checks.at_least("points", self.points, 12)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per size, width and seed."""
    common = engine.shared(p, "sizes", "widths", "seeds", "scaling")
    sizes = list(product(p.sizes, p.widths)) if p.widths else [(n, n) for n in p.sizes]
    listed = []
    for (n, h), seed in product(sizes, range(p.seeds)):
        factor = math.sqrt(h / REFERENCE) if p.scaling == "mean-field" else 1.0
        data_seed = seed if p.data_seed < 0 else p.data_seed
        size = {"n": n, "h": h, "gamma": p.gamma * factor, "seed": seed, "data_seed": data_seed}
        listed.append({**common, **size})
    return listed


def measure(piece: Piece) -> Data:
    """Follow one net: fields c(t, edge), summaries at three orders of edge, loss exponents."""
    at = problem(**piece)
    path, instants = follow(at, piece["until"], piece["points"], piece["rtol"])
    times, after = path.times[1:], piece["after"]
    late = times >= after * ROUNDING
    drifts = {name: drift.Drift.of(instants, times, EDGES, order) for name, order in ORDERS.items()}
    soft, sharp = drifts["1"], drifts["sharp"]
    return {
        "times": times,
        "losses": path.losses[1:],
        "identity": path.identity,
        "weights": soft.weights(after)[late],
        "fields": {part: soft.c(part)[late] for part in PARTS},
        "summaries": {
            k: {part: d.summary(part, after) for part in PARTS} for k, d in drifts.items()
        },
        "ratio": {name: _ratios(d, after) for name, d in drifts.items()},
        "velocity": sharp.power_law("advective", after)._asdict(),
        # share of the octaves with energy whose eigenvalues move up
        "upward": float((sharp.c("advective")[_cells(sharp, after)] > 0).mean()),
        "exponents": exponents(path, instants, after),
        "correlation": soft.correlation(after),
        "regime": _regime(soft, after),
    }


def _cells(d: drift.Drift, after: float) -> np.ndarray:
    """Times from `after` on and edges with at least 1 % of their time's energy, (T, edges)."""
    share = d.energy / d.energy.sum(axis=1, keepdims=True)
    return (d.times[:, None] >= after * ROUNDING) & (share >= 0.01)


def _ratios(d: drift.Drift, after: float) -> dict[str, float]:
    """|Kato|/|advective| over the cells with energy: median and 90th percentile."""
    cells = _cells(d, after) & (d.advective != 0)
    ratio = np.abs(d.kato[cells] / d.advective[cells])
    return {"median": float(np.median(ratio)), "tail": float(np.quantile(ratio, 0.9))}


def _regime(d: drift.Drift, after: float) -> dict[str, float]:
    """Of the total: share of the energy where |v| > 2λ², median of |c| at the edge near 1/2t."""
    late = np.flatnonzero(d.times >= after * ROUNDING)
    at = [int(np.abs(np.log(2 * d.edges * d.times[k])).argmin()) for k in late]
    fast = float(d.weights(after)[d.regime("total") > 1].sum())
    return {"share": fast, "frontier": float(np.median(np.abs(d.c("total")[late, at])))}


def exponents(
    path: flow.Path, instants: list[modes.Modes], after: float = 10.0
) -> dict[str, float]:
    """Return loss exponents from `after` on: the one measured, and those of models that know less.

    ``frozen``: the kernel of the first time for ever; it stands for p + 1 in the formulas.
    ``still``: the same from `after` on. ``formula_…`` is (1 + c)(p + 1) and ``printed_…`` is (1 +
    c)p + 1, with c the mean of the advective or of the total drift. ``model_…`` starts from the
    spectrum measured at `after` and moves it with that constant c; ``model_printed_…`` does so by
    equation (13) as printed.
    """
    times, least = path.times[1:], after * ROUNDING
    lead = int(np.flatnonzero(times >= least)[0])

    def model(k: int, c0: float) -> tuple[float, float]:
        """The exponents, corrected and as printed, of the spectrum at time k moved with c0."""
        lam, energy = instants[k].eigenvalues.clip(min=0), 0.5 * instants[k].coefficients ** 2
        window = times[times >= times[k]]
        losses = drift.constant_drift_loss(lam, energy, c0, float(times[k]), window)
        corrected, printed = (fitted_exponent(window, loss, after=least) for loss in losses)
        return corrected, printed

    soft = drift.Drift.of(instants, times, EDGES)
    frozen = model(0, 0.0)[0]
    values = {"measured": fitted_exponent(times, path.losses[1:], after=least), "frozen": frozen}
    values["still"] = model(lead, 0.0)[0]
    for part in PARTS[::2]:
        c = max(soft.summary(part, after)["mean"], -0.9)  # the formulas need c > −1
        both = transport.loss_exponent(c, frozen - 1)
        values[f"formula_{part}"], values[f"printed_{part}"] = both
        values[f"model_{part}"], values[f"model_printed_{part}"] = model(lead, c)
    return values


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Runs without their fields; per size the means over seeds with intervals; trends with size."""
    groups, deviations = [], []
    for (n, h, gamma), members in sorted(
        engine.grouped(listed, measured, "n", "h", "gamma").items()
    ):
        group, off = _group(members)
        groups.append({"n": n, "h": h, "gamma": gamma, **group})
        deviations += off
    runs = []
    for piece, one in zip(listed, measured, strict=True):
        kept = {k: v for k, v in one.items() if k not in ("times", "weights", "fields", "losses")}
        runs.append({**{k: piece[k] for k in ("n", "h", "seed")}, **kept})
    late = [t for t in measured[0]["times"] if t >= p.after * ROUNDING]
    axis = "n" if len({g["n"] for g in groups}) > 1 else "h"
    trends = _trends(axis, runs, deviations) if len(groups) > 1 else {}
    fields = {"edges": EDGES, "times": late[::2]}  # as far as they are kept
    return engine.rounded(
        {**fields, "axis": axis, "runs": runs, "groups": groups, "trends": trends}
    )


def _group(members: list[Data]) -> tuple[Data, list[dict[str, float]]]:
    """Statistics over the seeds of one size; how far each seed's field lies from the mean field."""
    w, count = np.mean([one["weights"] for one in members], axis=0), len(members)
    soft = [one["summaries"]["1"] for one in members]
    group: Data = {"weights": w[::2]}
    off: list[dict[str, float]] = [{} for _ in members]
    for part in PARTS:
        fields = np.array([one["fields"][part] for one in members])
        mean = fields.mean(axis=0)
        distances = np.sqrt((w * (fields - mean) ** 2).sum(axis=(1, 2)) * count / (count - 1))
        for row, distance in zip(off, distances, strict=True):
            row[part] = float(distance)
        centre = float((w * mean).sum())
        group[part] = {
            **engine.intervals([one[part] for one in soft], "mean", "spread"),
            "seed_sd": float(np.sqrt((w * fields.var(axis=0, ddof=1)).sum())),
            "field_sd": float(np.sqrt((w * (mean - centre) ** 2).sum())),
            "field": mean[::2],
        }
    group["cancelled"] = statistics.mean([_cancelled(one) for one in members])
    group |= engine.intervals([one["total"] for one in soft], "negative")
    group |= engine.intervals(members, "correlation")
    fitted = [one["exponents"] for one in members]
    group["exponents"] = engine.intervals(fitted, *fitted[0])
    return group, off


def _cancelled(one: Data) -> float:
    """−c_Kato/c_adv of one run: 1 when the two cancel, negative when they add."""
    soft = one["summaries"]["1"]
    return float(-soft["kato"]["mean"] / soft["advective"]["mean"])


def _trends(axis: str, runs: list[Data], deviations: list[dict[str, float]]) -> Data:
    """Slopes over all runs: of logarithms against log size (`log_…`), else per doubling."""
    values = {"cancelled": [_cancelled(run) for run in runs]}
    values["correlation"] = [run["correlation"] for run in runs]
    for part in PARTS:
        soft = [run["summaries"]["1"][part] for run in runs]
        values[f"mean_{part}"] = [one["mean"] for one in soft]
        values[f"log_spread_{part}"] = [math.log2(one["spread"]) for one in soft]
        values[f"log_seed_{part}"] = [math.log2(row[part]) for row in deviations]
    doublings = np.log2([run[axis] for run in runs])
    return {name: statistics.slope(doublings, y) for name, y in values.items()}


def table(result: Data) -> Rows:
    """Per size: c in its three parts with 95 % intervals, its spreads, and the loss exponents."""
    columns = ["n", "h", "γ", "c_adv", "c_Kato", "c_tot", "spread", "seed sd", "cancelled"]
    rows: list[list[object]] = []
    for g in result["groups"]:
        c = [str(statistics.Interval(*g[part]["mean"])) for part in PARTS]
        spreads = [f"{g['total']['spread'][0]:.2f}", f"{g['total']['seed_sd']:.2f}"]
        cancelled = str(statistics.Interval(*g["cancelled"]))
        fitted = [f"{g['exponents'][name][0]:.2f}" for name in ("measured", "frozen")]
        rows.append([g["n"], g["h"], f"{g['gamma']:.3g}", *c, *spreads, cancelled, *fitted])
    return [*columns, "exponent", "frozen"], rows


GPU = {"sizes": (2048, 4096, 8192), "seeds": 10, "points": 13, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
