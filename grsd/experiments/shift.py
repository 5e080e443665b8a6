"""The experiment ``shift``: log-shift invariance of the couplings (D4) against the depth of tanh networks.

One piece is one network on its own data, at initialisation or where gradient descent has brought the loss down to a given
share: the slope and rms of `grsd.renorm.diagnostics.couplings` along gradient flow and along a random direction, by three statistics, and
the same for a null and two violations drawn on the network's own spectrum. A result holds one family over all its depths.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.optimize import isotonic_regression

from grsd import statistics
from grsd.dynamics import modes
from grsd.experiments import tanh_stack
from grsd.experiments.engine import Experiment, Piece, rounded
from grsd.experiments.tanh_stack import TanhStack
from grsd.lab.data import functions
from grsd.lab.nets import architectures, models
from grsd.renorm.diagnostics import couplings

__all__ = ["EXPERIMENT", "Parameters", "crossing", "network", "step_size"]

VELOCITIES = ("flow", "random")
CONTROLS: dict[str, dict[str, float]] = {
    "null": {},
    "tilted": {"slope": 0.3},
    "bump": {"bump": 3.0},
}
PARTS: dict[str, float | None] = {
    "all": None,
    "first": 0.0,
    "middle": 0.5,
    "late": 0.75,
}  # the last has rank ≤ width
VARIANTS: dict[str, dict[str, Any]] = {
    "log": {},
    "square": {"statistic": "square"},
    "classes": {"smooth": "classes"},
    "narrow": {"window": (0.2, 0.8)},
}


@dataclass(frozen=True)
class Parameters:
    """Attributes: see the fields' comments. Sizes and seeds only; the method is that of the module."""

    family: str = "residual"  # or "plain"
    epsilon: float = 0.3  # ε at depth 1
    scaling: str = "fixed"  # ε at every depth; or "sqrt": ε/√L, or "inverse": ε/L
    depths: tuple[int, ...] = (
        4,
        9,
        16,
        25,
        40,
        64,
        100,
        144,
    )  # L, blocks (hidden layers of a plain network)
    samples: int = 64  # N
    width: int = 16
    inputs: int = 16
    layers: int = 1  # matrices in a residual branch
    target: str = "wave"  # a key of functions.TARGETS
    remaining: float = 1.0  # measure where the loss has this share of its first value
    part: str = "all"  # of M: "all", or M^(ℓ) of the "first" block, or at 1/2 ("middle") or 3/4 ("late") of the depth
    seeds: int = 48  # seeds 0, 1, …; each draws its own network and its own data
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.family not in ("residual", "plain"):
            raise ValueError(f"family is {self.family!r}; expected residual or plain")
        step_size(self.epsilon, self.scaling, 1)
        if not self.depths or min(self.depths) < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths are {self.depths}; expected ascending numbers of at least 1")
        if self.samples < 32 or self.width < 1 or self.inputs < 2:
            raise ValueError(
                f"samples {self.samples}, width {self.width}, inputs {self.inputs}: too small; the windows need 32 samples or more"
            )
        if self.seeds < 2:
            raise ValueError(f"seeds is {self.seeds}; a standard error needs two or more")
        if self.part not in PARTS or (self.part != "all" and self.family == "plain"):
            raise ValueError(
                f"part is {self.part!r}; expected one of {', '.join(PARTS)}, and all for plain networks"
            )
        if not 0 < self.remaining <= 1:
            raise ValueError(
                f"remaining is {self.remaining}; expected a share of the first loss, 0 < remaining ≤ 1"
            )


def step_size(epsilon: float, scaling: str, depth: int) -> float:
    """Return ε at one depth under a scaling rule: "fixed" ε, "sqrt" ε/√L, "inverse" ε/L."""
    rules = {"fixed": 1.0, "sqrt": 1 / math.sqrt(depth), "inverse": 1 / depth}
    if scaling not in rules:
        raise ValueError(f"scaling is {scaling!r}; expected one of {', '.join(rules)}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon is {epsilon}; it must be positive")
    return epsilon * rules[scaling]


def network(piece: Piece) -> TanhStack:
    """Return the network of a piece on its data: tanh, weights N(0, 1/fan-in), no bias, inputs standard normal."""
    x, y = functions.data(piece["target"], piece["samples"], piece["seed"], piece["inputs"])
    x, y = x.to(piece["device"]), y.to(piece["device"])
    sizes = {name: piece[name] for name in ("width", "depth", "seed")}
    if piece["family"] == "plain":
        return TanhStack.plain(x, y, **sizes)
    return TanhStack.residual(x, y, epsilon=piece["epsilon"], layers=piece["layers"], **sizes)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per depth and seed."""
    left = {k: v for k, v in asdict(p).items() if k not in ("depths", "seeds", "scaling")}
    return [
        {**left, "depth": depth, "epsilon": step_size(p.epsilon, p.scaling, depth), "seed": seed}
        for depth in p.depths
        for seed in range(p.seeds)
    ]


def _read(lam: np.ndarray, x: np.ndarray) -> dict[str, Any]:
    """Slope and rms by every variant; the first one in full."""
    found = {
        name: couplings.shift_invariance(lam, x, **options) for name, options in VARIANTS.items()
    }
    first = found["log"]
    kept = ("slope_error", "rms", "floor", "noise")
    return {
        "slope": {name: one.slope for name, one in found.items()},
        "square_rms": found["square"].rms,
        **{name: getattr(first, name) for name in kept},
    }


def measure(piece: Piece) -> dict[str, Any]:
    """Build (and train) one network and read its couplings, those of a random direction, and the controls on its spectrum."""
    net = network(piece)
    at = net.start if piece["remaining"] == 1 else net.descended(piece["remaining"])
    generator, error = torch.Generator().manual_seed(10_000 + piece["seed"]), net.error(at)
    noise = tuple(
        torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device) for w in at
    )
    share = PARTS[piece["part"]]
    block = None if share is None else int(share * (piece["depth"] - 1))
    found: dict[str, Any] = {}
    for name, along in (("flow", None), ("random", noise)):
        instant = modes.modes(*net.kernel_rate(at, along, block=block), error)
        found[name] = _read(instant.eigenvalues, instant.matrix)
    lam = instant.eigenvalues
    for index, (name, violation) in enumerate(CONTROLS.items()):
        seed = 1000 * piece["seed"] + 10 * piece["depth"] + index
        found[name] = _read(
            lam, couplings.planted(lam.clip(min=lam[-1] * 1e-300), seed=seed, **violation)
        )
    first = couplings.shift_invariance(lam, instant.matrix)
    found["spectrum"] = {
        "span": first.span,
        "deviation": first.deviation,
        "modes": first.modes,
        "kernel": first.left_out,
        "top": lam[-1],
        "trace": lam.sum(),
    }
    return found


def crossing(
    places: Sequence[float] | np.ndarray,
    slopes: Sequence[Sequence[float]],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Where the mean slope passes zero upwards, with a bootstrap over networks.

    Parameters
    ----------
    places : (G,) ascending and positive, e.g. ε²L
    slopes : per place the slopes of its networks
    draws, seed : int
        Of the bootstrap: networks are drawn anew within each place.

    Returns
    -------
    dict
        ``place`` (None where the means do not cross), ``low`` and ``high``, the 2.5 and 97.5 % points of those draws that cross,
        and ``share``, how many do. The means are made monotone (isotonic regression with the inverse variances as weights) and
        joined linearly in log place.
    """
    x = np.log(np.asarray(places, dtype=np.float64))
    groups = [np.asarray(one, dtype=np.float64) for one in slopes]
    if len(x) != len(groups) or len(x) < 2 or np.any(np.diff(x) <= 0) or min(map(len, groups)) < 2:
        raise ValueError(
            f"{len(x)} places and {len(groups)} groups: expected two or more ascending, with two networks each"
        )
    weights = np.array([len(one) / max(one.var(ddof=1), 1e-300) for one in groups])

    def root(means: np.ndarray) -> float:
        y = isotonic_regression(means, weights=weights).x
        k = int(np.argmax(y > 0))
        if not y[k] > 0 or k == 0:
            return math.nan
        return float(np.exp(x[k - 1] + (x[k] - x[k - 1]) * -y[k - 1] / (y[k] - y[k - 1])))

    rng = np.random.default_rng(seed)
    samples = [one[rng.integers(0, len(one), (draws, len(one)))].mean(axis=1) for one in groups]
    roots = np.array([root(means) for means in np.stack(samples, axis=1)])
    held = roots[np.isfinite(roots)]
    here = root(np.array([one.mean() for one in groups]))
    return {
        "place": here if math.isfinite(here) else None,
        "low": float(np.quantile(held, 0.025)) if len(held) else None,
        "high": float(np.quantile(held, 0.975)) if len(held) else None,
        "share": len(held) / draws,
    }


def _summary(values: list[float]) -> dict[str, Any]:
    found = statistics.mean(values)
    error = found.sd / math.sqrt(len(values))
    t = found.value / error if error > 0 else 0.0
    return {
        "mean": found.value,
        "error": error,
        "low": found.low,
        "high": found.high,
        "sd": found.sd,
        "p": float(2 * stats.t.sf(abs(t), len(values) - 1)),
    }


def _group(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Per velocity and control: mean slope by every variant, quadratic means of rms and floor; slopes of single networks."""
    found: dict[str, Any] = {}
    for name in (*VELOCITIES, *CONTROLS):
        rows = [one[name] for one in members]
        square = {
            key: np.array([row[key] for row in rows]) ** 2
            for key in ("rms", "floor", "noise", "slope_error")
        }
        excess = square["rms"] - square["floor"]
        found[name] = {
            "slope": {
                variant: _summary([row["slope"][variant] for row in rows]) for variant in VARIANTS
            },
            **{key: math.sqrt(float(values.mean())) for key, values in square.items()},
            "rms_error": float(np.std([row["rms"] for row in rows], ddof=1)) / math.sqrt(len(rows)),
            "excess2": float(excess.mean()),
            "excess2_error": float(excess.std(ddof=1)) / math.sqrt(len(rows)),
        }
    for name in VELOCITIES:
        found[name]["slopes"] = [one[name]["slope"]["log"] for one in members]
        found[name]["rmses"] = [one[name]["rms"] for one in members]
    spectra = [one["spectrum"] for one in members]
    found["spectrum"] = {key: float(np.mean([one[key] for one in spectra])) for key in spectra[0]}
    return found


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Groups by depth, and where the slope crosses zero in ε²L (residual networks) or in depth (plain ones)."""
    groups = []
    for depth in p.depths:
        chosen = [i for i, piece in enumerate(listed) if piece["depth"] == depth]
        epsilon = listed[chosen[0]]["epsilon"]
        place = depth * epsilon**2 if p.family == "residual" else float(depth)
        groups.append(
            {
                "depth": depth,
                "epsilon": epsilon,
                "place": place,
                **_group([measured[i] for i in chosen]),
            }
        )
    places = np.array([g["place"] for g in groups])
    crossings: dict[str, Any] = {}
    if len(groups) > 1 and np.all(np.diff(places) > 1e-9 * places[1:]):
        for name in VELOCITIES:
            crossings[name] = crossing(places, [g[name]["slopes"] for g in groups])
    trends = {}
    if len(groups) > 1:
        for name in VELOCITIES:
            doublings = np.concatenate(
                [[math.log2(g["depth"])] * len(g[name]["slopes"]) for g in groups]
            )
            trends[name] = statistics.slope(
                doublings, np.concatenate([g[name]["slopes"] for g in groups])
            )
    found: dict[str, Any] = rounded({"groups": groups, "crossings": crossings, "trends": trends}, 4)
    return found


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Per depth: slope ± standard error and rms, along the flow and along a random direction, beside the null."""
    columns = [
        "L",
        "ε",
        "ε²L or L",
        "slope",
        "±",
        "rms",
        "random",
        "±",
        "rms",
        "null",
        "±",
        "rms",
        "tilted .3",
        "bump rms",
    ]
    rows: list[list[object]] = []
    for g in result["groups"]:
        cells = [g["depth"], f"{g['epsilon']:.3g}", f"{g['place']:.3g}"]
        for name in (*VELOCITIES, "null"):
            one = g[name]["slope"]["log"]
            cells += [f"{one['mean']:+.3f}", f"{one['error']:.3f}", f"{g[name]['rms']:.3f}"]
        rows.append(
            [*cells, f"{g['tilted']['slope']['log']['mean']:+.3f}", f"{g['bump']['rms']:.3f}"]
        )
    return columns, rows


EXPERIMENT = Experiment(
    name="shift",
    summary="log-shift invariance of the couplings against the depth of residual and plain networks",
    parameters=Parameters,
    pieces=pieces,
    measure=measure,
    reduce=reduce,
    table=table,
    seeds=lambda p: range(p.seeds),
    sources=(couplings, modes, tanh_stack, architectures, models, functions, sys.modules[__name__]),
    gpu={"samples": 2048, "width": 256, "depths": (16, 64, 256), "seeds": 32, "device": "cuda"},
)
