"""The experiment ``dilation``: how much of a net's feature learning is a schedule of its own.

If every eigenvalue moves with v = λ a(t), the loss is that of the frozen kernel at the time ∫s,
s = exp ∫a: feature learning would be a learning-rate schedule. One piece is one two-layer net: how
much of the advective drift c(λ, t) depends on t alone, and how its loss compares with that of the
frozen kernel and of the dilated one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from grsd import checks, statistics
from grsd.dynamics import drift
from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.experiments.engine import (
    Data,
    Experiment,
    Piece,
    Rows,
    grouped,
    intervals,
    rounded,
    shared,
)
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

CURVES = ("measured", "frozen", "dilated")


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    targets: tuple[str, ...] = ("wave", "product", "quadrant", "step")
    sizes: tuple[int, ...] = (64, 128)  # n = h
    gamma: float = 4.0  # γ at width 128; γ/√h is kept
    seeds: int = 6
    until: float = 1000.0
    after: float = 10.0  # statistics are taken over [after, until]
    points: int = 33  # times, evenly in log t from 0.1
    rtol: float = 1e-7

    def __post_init__(self) -> None:
        for target in self.targets:
            checks.one_of("targets", target, TARGETS)
        checks.at_least("seeds", self.seeds, 2, "an interval needs two or more")
        checks.between("after", self.after, 0.1, self.until, "()")


def pieces(p: Parameters) -> list[Piece]:
    """One piece per target, size and seed."""
    kept = shared(p, "targets", "sizes", "gamma", "seeds")
    listed = []
    for target, n, seed in product(p.targets, p.sizes, range(p.seeds)):
        gamma = p.gamma * math.sqrt(n / REFERENCE)
        listed.append({**kept, "target": target, "n": n, "gamma": gamma, "seed": seed})
    return listed


def dilation(times: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return s = exp ∫ c dlog t and the clock ∫ s dt from the first time on, (K,) each.

    c is linear in log t between the times; s is taken as a power of t there, exact for constant c.
    """
    log_t = np.log(times)
    steps = 0.5 * (c[1:] + c[:-1]) * np.diff(log_t)
    log_s = np.concatenate([[0.0], np.cumsum(steps)])
    # ∫ t^m dt over a segment, with m + 1 the slope of log(s t)
    top = log_s + log_t
    rise = np.diff(top)
    mean = np.where(np.abs(rise) < 1e-12, 1.0, np.expm1(rise) / np.where(rise == 0, 1.0, rise))
    return np.exp(log_s), np.concatenate(
        [[0.0], np.cumsum(np.exp(top[:-1]) * mean * np.diff(log_t))]
    )


def explained(
    field: np.ndarray, weights: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the share of a field's weighted variance that means over labels explain, and these."""
    _, index = np.unique(labels, return_inverse=True)
    index = index.reshape(labels.shape)
    mass = np.bincount(index.ravel(), weights.ravel())
    sums = np.bincount(index.ravel(), (weights * field).ravel())
    means = np.divide(sums, mass, out=np.zeros_like(sums), where=mass > 0)[index]
    centre = float((weights * field).sum() / weights.sum())
    whole = float((weights * (field - centre) ** 2).sum())
    return float((weights * (means - centre) ** 2).sum()) / whole if whole > 0 else 0.0, means


def shares(d: drift.Drift, part: drift.Part, after: float) -> Data:
    """What t alone, and octaves of λt alone, explain of c from `after` on; and each of the other's.

    ``t of x`` is what t explains of a field that depends on λt alone (its means over octaves), and
    ``x of t`` the reverse: as large as the shares themselves if the two could not be told apart.
    """
    late = d.times >= after * ROUNDING
    w, c = d.weights(after)[late], d.c(part)[late]
    t = np.broadcast_to(np.arange(late.sum())[:, None], c.shape)
    x = np.floor(np.log2(d.edges[None, :] * d.times[late][:, None]))
    by_t, of_t = explained(c, w, t)
    by_x, of_x = explained(c, w, x)
    return {
        "t": by_t,
        "x": by_x,
        "t of x": explained(of_x, w, t)[0],
        "x of t": explained(of_t, w, x)[0],
    }


def measure(piece: Piece) -> Data:
    """Follow one net, and ask of it what the frozen and the dilated kernel would have done."""
    keys = ("target", "n", "gamma", "seed")
    path, instants = follow(
        problem(**{k: piece[k] for k in keys}), piece["until"], piece["points"], piece["rtol"]
    )
    times, after = path.times[1:], piece["after"]
    drifts = {name: drift.Drift.of(instants, times, EDGES, order) for name, order in ORDERS.items()}
    soft, at = drifts["1"], instants[0]
    # one c a time, the mean over edges by the energy near them, and the clock that it makes
    weight = soft.weights()
    c = (weight * soft.c("advective")).sum(axis=1) / weight.sum(axis=1)
    s, clock = dilation(times, c)
    # the same initial energies under three clocks
    lam, energy = at.eigenvalues.clip(min=0), 0.5 * at.coefficients**2
    losses = {
        "measured": path.losses[1:],
        "frozen": np.exp(-2 * np.outer(times - times[0], lam)) @ energy,
        "dilated": np.exp(-2 * np.outer(clock, lam)) @ energy,
    }
    fits = {k: fitted_exponent(times, loss, after=after * ROUNDING) for k, loss in losses.items()}
    return {
        "times": times,
        "losses": losses,
        "c": c,
        "s": s,
        "shares": {k: {part: shares(d, part, after) for part in PARTS} for k, d in drifts.items()},
        "exponents": fits,
        "gain": {
            k: math.log(losses["frozen"][-1] / losses[k][-1]) for k in ("measured", "dilated")
        },
        # over half decades: equal numbers are a straight line
        "local": {k: local_exponents(times, losses[k], after) for k in ("measured", "frozen")},
        "fields": {part: soft.c(part)[times >= after * ROUNDING] for part in PARTS[::2]},
        "weights": soft.weights(after)[times >= after * ROUNDING],
    }


def local_exponents(times: np.ndarray, losses: np.ndarray, after: float) -> list[float]:
    """Return −d log L/d log t between neighbouring half decades from `after` on."""
    count = round(2 * math.log10(times[-1] / after))
    at = after * np.power(10.0, np.arange(count + 1) / 2)
    logs = np.interp(np.log(at), np.log(times), np.log(losses))
    return list(-np.diff(logs) / np.diff(np.log(at)))


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Per target and size: means over seeds with intervals, and curves of the first seed."""
    groups = []
    for (target, n), members in grouped(listed, measured, "target", "n").items():
        fits = [one["exponents"] for one in members]
        group: Data = {"target": target, "n": n, "exponents": intervals(fits, *CURVES)}
        # of the speed that a net gains over its frozen kernel: what the dilation has
        less = [[f[k] - f["frozen"] for f in fits] for k in ("measured", "dilated")]
        group["gained"], group["by dilation"] = map(statistics.mean, less)
        ends = [[one["gain"][k] for one in members] for k in ("measured", "dilated")]
        group["end gained"], group["end by dilation"] = map(statistics.mean, ends)
        group["shares"] = {
            order: {part: _mean_shares(members, order, part) for part in PARTS} for order in ORDERS
        }
        group["local"] = {
            k: [statistics.mean(x) for x in zip(*(one["local"][k] for one in members), strict=True)]
            for k in ("measured", "frozen")
        }
        group["curves"] = members[0]["losses"] | {"s": members[0]["s"]}
        if n == max(p.sizes):
            for part in PARTS[::2]:
                group[f"field {part}"] = np.mean([one["fields"][part] for one in members], axis=0)
            group["weights"] = np.mean([one["weights"] for one in members], axis=0)
        groups.append(group)
    runs = [
        {k: piece[k] for k in ("target", "n", "seed")} | {k: one[k] for k in ("exponents", "gain")}
        for piece, one in zip(listed, measured, strict=True)
    ]
    times = measured[0]["times"]
    return rounded({"times": times, "edges": EDGES, "groups": groups, "runs": runs})


def _mean_shares(members: list[Data], order: str, part: str) -> Data:
    found = [one["shares"][order][part] for one in members]
    return intervals(found, *found[0])


def table(result: Data) -> Rows:
    """Per target and size: what t and λt explain of c_adv, and the exponents of three losses."""
    columns = ["target", "n", "c_adv by t", "by λt", *CURVES]
    rows: list[list[object]] = []
    for g in result["groups"]:
        by = g["shares"]["1"]["advective"]
        shown = [*(by[k] for k in ("t", "x")), *(g["exponents"][k] for k in CURVES)]
        rows.append([g["target"], g["n"], *(str(statistics.Interval(*x)) for x in shown)])
    return columns, rows


GPU = {"sizes": (512, 1024)}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
