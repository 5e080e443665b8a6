"""The experiment ``drift``: how the drift of the error spectrum of two-layer nets, and its spread, change with size.

One piece is one net on one data set: gradient flow, energies and fluxes at every time and edge, loss exponents. A result
holds one target and one series: n and h grow together, h grows at fixed data, or γ is held fixed.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from grsd import statistics
from grsd.dynamics import drift, flow, modes, transport
from grsd.dynamics.problem import Problem
from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.experiments import two_layer_forms
from grsd.experiments.engine import Experiment, Piece, rounded
from grsd.lab.data.functions import TARGETS, data
from grsd.lab.nets import models

__all__ = ["EDGES", "EXPERIMENT", "TARGETS", "Parameters", "data", "exponents", "follow", "problem"]

EDGES = np.power(
    2.0, np.arange(-18, 2)
)  # of λ, in 1/time: two decades below what t = 1000 can learn, up to 2
ORDERS = {"1": 1.0, "4": 4.0, "sharp": math.inf}
PARTS: tuple[drift.Part, ...] = ("advective", "kato", "total")
REFERENCE = 128  # width at which `gamma` is quoted


@dataclass(frozen=True)
class Parameters:
    """Attributes: see the fields' comments. Sizes and seeds only; the method is that of the module."""

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
        if self.target not in TARGETS:
            raise ValueError(
                f"unknown target {self.target!r}: expected one of {', '.join(TARGETS)}"
            )
        if self.scaling not in ("mean-field", "ntk"):
            raise ValueError(f"scaling is {self.scaling!r}; expected mean-field or ntk")
        if (
            not self.sizes
            or min(self.sizes) < 4
            or min(self.widths, default=1) < 1
            or self.inputs < 2
        ):
            raise ValueError(
                f"sizes {self.sizes}, widths {self.widths}, inputs {self.inputs}: too small or empty"
            )
        if self.seeds < 2:
            raise ValueError(f"seeds is {self.seeds}; a spread needs two or more")
        if not 0.1 < self.after < self.until or self.points < 12:
            raise ValueError(
                f"need 0.1 < after < until and points ≥ 12, got {self.after}, {self.until} and {self.points}"
            )


def problem(
    target: str,
    samples: int,
    gamma: float,
    *,
    seed: int,
    width: int | None = None,
    data_seed: int | None = None,
    inputs: int = 2,
    activation: str = "tanh",
    gain: float = 1.0,
    device: str = "cpu",
) -> two_layer_forms.TwoLayerProblem:
    """Return a two-layer net of width h (by default n) on one of the `TARGETS`; γ is that of `models.two_layer`."""
    x, y = data(target, samples, seed if data_seed is None else data_seed, inputs)
    net = models.two_layer(inputs, width or samples, gamma, activation, seed=seed, gain=gain).to(
        device
    )
    return two_layer_forms.TwoLayerProblem(net, x.to(device), y.to(device))


def follow(
    at: Problem, until: float = 1000.0, points: int = 25, rtol: float = 1e-7
) -> tuple[flow.Path, list[modes.Modes]]:
    """Integrate gradient flow and return the path at 0 and at times even in log t from 0.1, with its modes.

    The modes leave out time 0: `path.times[1:]` are theirs.
    """
    times = np.append(0.0, np.geomspace(0.1, until, points))
    path = flow.integrate(at, times, rtol=rtol, atol=1e-2 * rtol, estimate=False)
    return path, [modes.modes(*modes.instant(at, theta)) for theta in path.thetas[1:]]


def pieces(p: Parameters) -> list[Piece]:
    """One piece per size, width and seed."""
    found = []
    pairs = product(p.sizes, p.widths) if p.widths else ((n, n) for n in p.sizes)
    for n, h in pairs:
        for seed in range(p.seeds):
            gamma = p.gamma * (math.sqrt(h / REFERENCE) if p.scaling == "mean-field" else 1.0)
            left = {
                k: v
                for k, v in asdict(p).items()
                if k not in ("sizes", "widths", "seeds", "scaling")
            }
            data_seed = seed if p.data_seed < 0 else p.data_seed
            found.append(
                {**left, "n": n, "h": h, "gamma": gamma, "seed": seed, "data_seed": data_seed}
            )
    return found


def measure(piece: Piece) -> dict[str, Any]:
    """Follow one net and return its fields c(t, edge), their summaries at three orders of edge, and its loss exponents."""
    names = ("seed", "data_seed", "inputs", "activation", "gain", "device")
    at = problem(
        piece["target"],
        piece["n"],
        piece["gamma"],
        width=piece["h"],
        **{k: piece[k] for k in names},
    )
    path, instants = follow(at, piece["until"], piece["points"], piece["rtol"])
    times, after = path.times[1:], piece["after"]
    drifts = {name: drift.Drift.of(instants, times, EDGES, order) for name, order in ORDERS.items()}
    soft = drifts["1"]
    summaries = {
        name: {part: d.summary(part, after) for part in PARTS} for name, d in drifts.items()
    }
    late = times >= after * (1 - 1e-9)
    fit = drifts["sharp"].power_law("advective", after)
    return {
        "times": times,
        "losses": path.losses[1:],
        "identity": path.identity,
        "weights": soft.weights(after)[late],
        "fields": {part: soft.c(part)[late] for part in PARTS},
        "summaries": summaries,
        "ratio": {name: _ratios(d, after) for name, d in drifts.items()},
        "velocity": fit._asdict(),
        "upward": _upward(drifts["sharp"], after),
        "exponents": exponents(path, instants, after),
        "correlation": soft.correlation(after),
        "regime": _regime(soft, after),
    }


def _regime(d: drift.Drift, after: float) -> dict[str, float]:
    """Share of the energy where |v| > 2λ², and the median over time of |c| at the edge nearest to 1/2t, both for the total."""
    late = np.flatnonzero(d.times >= after * (1 - 1e-9))
    at = [int(np.abs(np.log(2 * d.edges * d.times[k])).argmin()) for k in late]
    fast = float(d.weights(after)[d.regime("total") > 1].sum())
    return {"share": fast, "frontier": float(np.median(np.abs(d.c("total")[late, at])))}


def _upward(d: drift.Drift, after: float) -> float:
    """Share of the octaves with at least 1 % of their time's energy whose eigenvalues move up."""
    share = d.energy / d.energy.sum(axis=1, keepdims=True)
    cells = (d.times[:, None] >= after * (1 - 1e-9)) & (share >= 0.01)
    return float((d.c("advective")[cells] > 0).mean())


def _ratios(d: drift.Drift, after: float) -> dict[str, float]:
    """|Kato|/|advective| over the cells with at least 1 % of their time's energy: median and 90th percentile."""
    share = d.energy / d.energy.sum(axis=1, keepdims=True)
    cells = (d.times[:, None] >= after * (1 - 1e-9)) & (share >= 0.01) & (d.advective != 0)
    ratio = np.abs(d.kato[cells] / d.advective[cells])
    return {"median": float(np.median(ratio)), "tail": float(np.quantile(ratio, 0.9))}


def exponents(
    path: flow.Path, instants: list[modes.Modes], after: float = 10.0
) -> dict[str, float]:
    """Return loss exponents from `after` on: the one measured, and those of models that know less.

    ``frozen``: the kernel of the first time for ever; it stands for p + 1 in the formulas. ``still``: the same from `after` on.
    ``formula_…`` is (1 + c)(p + 1) and ``printed_…`` is (1 + c)p + 1, with c the mean of the advective or of the total drift.
    ``model_…`` starts from the spectrum measured at `after` and moves it with that constant c; ``model_printed_…`` does so by
    equation (13) as printed.
    """
    times, least = path.times[1:], after * (1 - 1e-9)
    lead = int(np.flatnonzero(times >= least)[0])

    def model(found: modes.Modes, c0: float, start: float) -> tuple[float, float]:
        window = times[times >= start]
        both = drift.constant_drift_loss(
            found.eigenvalues.clip(min=0), 0.5 * found.coefficients**2, c0, start, window
        )
        corrected, printed = (fitted_exponent(window, loss, after=least) for loss in both)
        return corrected, printed

    soft = drift.Drift.of(instants, times, EDGES)
    frozen = model(instants[0], 0.0, float(times[0]))[0]
    found = {"measured": fitted_exponent(times, path.losses[1:], after=least), "frozen": frozen}
    found["still"] = model(instants[lead], 0.0, float(times[lead]))[0]
    parts: tuple[drift.Part, ...] = ("advective", "total")
    for part in parts:
        c = max(soft.summary(part, after)["mean"], -0.9)  # the formulas need c > −1
        found[f"formula_{part}"], found[f"printed_{part}"] = transport.loss_exponent(c, frozen - 1)
        found[f"model_{part}"], found[f"model_printed_{part}"] = model(
            instants[lead], c, float(times[lead])
        )
    return found


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs without their fields; per size the means over seeds with intervals; trends with size."""
    groups, deviations = [], []
    sizes = sorted({(piece["n"], piece["h"]) for piece in listed})
    for n, h in sizes:
        chosen = [i for i, piece in enumerate(listed) if (piece["n"], piece["h"]) == (n, h)]
        group, rows = _group([measured[i] for i in chosen])
        groups.append({"n": n, "h": h, "gamma": listed[chosen[0]]["gamma"], **group})
        deviations += [{"n": n, "h": h, **row} for row in rows]
    runs = [
        {
            "n": piece["n"],
            "h": piece["h"],
            "seed": piece["seed"],
            **{k: v for k, v in one.items() if k not in _FIELDS},
        }
        for piece, one in zip(listed, measured, strict=True)
    ]
    axis = "n" if len({n for n, _ in sizes}) > 1 else "h"
    found: dict[str, Any] = rounded(
        {
            "edges": EDGES,
            "times": [t for t in measured[0]["times"] if t >= p.after * (1 - 1e-9)][
                ::2
            ],  # of the fields
            "axis": axis,
            "runs": runs,
            "groups": groups,
            "trends": _trends(axis, runs, deviations) if len(sizes) > 1 else {},
        }
    )
    return found


_FIELDS = ("times", "weights", "fields", "losses")


def _group(members: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Statistics over the seeds of one size, and how far each seed's field lies from the mean field."""
    w = np.mean([one["weights"] for one in members], axis=0)
    count = len(members)
    found: dict[str, Any] = {"weights": w[::2]}
    rows: list[dict[str, float]] = [{} for _ in members]
    for part in PARTS:
        field = np.array([one["fields"][part] for one in members])
        mean = field.mean(axis=0)
        off = np.sqrt((w * (field - mean) ** 2).sum(axis=(1, 2)) * count / (count - 1))
        for row, value in zip(rows, off, strict=True):
            row[part] = float(value)
        centre = float((w * mean).sum())
        found[part] = {
            "mean": statistics.mean([one["summaries"]["1"][part]["mean"] for one in members]),
            "spread": statistics.mean([one["summaries"]["1"][part]["spread"] for one in members]),
            "seed_sd": float(np.sqrt((w * field.var(axis=0, ddof=1)).sum())),
            "field_sd": float(np.sqrt((w * (mean - centre) ** 2).sum())),
        }
        found[part]["field"] = mean[::2]
    found["cancelled"] = statistics.mean([_cancelled(one) for one in members])
    found["negative"] = statistics.mean(
        [one["summaries"]["1"]["total"]["negative"] for one in members]
    )
    found["correlation"] = statistics.mean([one["correlation"] for one in members])
    found["exponents"] = {
        name: statistics.mean([m["exponents"][name] for m in members])
        for name in members[0]["exponents"]
    }
    return found, rows


def _cancelled(one: dict[str, Any]) -> float:
    """−c_Kato/c_adv of one run: 1 when the two cancel, negative when they add."""
    means = {part: one["summaries"]["1"][part]["mean"] for part in PARTS}
    return float(-means["kato"] / means["advective"])


def _trends(
    axis: str, runs: list[dict[str, Any]], deviations: list[dict[str, Any]]
) -> dict[str, Any]:
    """Slopes over all runs: of logarithms against log size (`log_…`), else per doubling of the size."""
    doublings = np.log2([run[axis] for run in runs])
    found: dict[str, Any] = {
        "cancelled": statistics.slope(doublings, [_cancelled(run) for run in runs]),
        "correlation": statistics.slope(doublings, [run["correlation"] for run in runs]),
    }
    for part in PARTS:
        summary = [run["summaries"]["1"][part] for run in runs]
        found[f"mean_{part}"] = statistics.slope(doublings, [s["mean"] for s in summary])
        found[f"log_spread_{part}"] = statistics.slope(
            doublings, np.log2([s["spread"] for s in summary])
        )
        found[f"log_seed_{part}"] = statistics.slope(
            doublings, np.log2([row[part] for row in deviations])
        )
    return found


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Per size: c in its three parts with 95 % intervals, its spreads, and the loss exponents."""
    columns = [
        "n",
        "h",
        "γ",
        "c_adv",
        "c_Kato",
        "c_tot",
        "spread",
        "seed sd",
        "cancelled",
        "exponent",
        "frozen",
    ]
    rows: list[list[object]] = []
    for g in result["groups"]:
        means = [str(statistics.Interval(*g[part]["mean"])) for part in PARTS]
        others = [
            f"{g['total']['spread'][0]:.2f}",
            f"{g['total']['seed_sd']:.2f}",
            str(statistics.Interval(*g["cancelled"])),
        ]
        exponents = [f"{g['exponents'][k][0]:.2f}" for k in ("measured", "frozen")]
        rows.append([g["n"], g["h"], f"{g['gamma']:.3g}", *means, *others, *exponents])
    return columns, rows


EXPERIMENT = Experiment(
    name="drift",
    summary="fluxes of error energy in two-layer nets, and how their spread changes with size",
    parameters=Parameters,
    pieces=pieces,
    measure=measure,
    reduce=reduce,
    table=table,
    seeds=lambda p: range(p.seeds),
    sources=(drift, flow, modes, transport, models, two_layer_forms, sys.modules[__name__]),
    gpu={"sizes": (2048, 4096, 8192), "seeds": 10, "points": 13, "device": "cuda"},
)
