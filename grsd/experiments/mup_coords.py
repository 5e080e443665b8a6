"""The experiment ``mup-coords``: coordinate checks of every optimizer, in μP and in standard
parametrization, over width and depth.

With ``trained=hidden`` the hidden matrices alone are trained, by the rule and by a wrong one: a
check of all parameters together does not tell the two apart when other roles move the features
more. One piece is one model, trained for a few steps on one batch (`grsd.mup.coord_check` at one
size). Kept are the change of the features after every step and the losses; slopes are fitted when
the result is made. The network is a residual MLP with ReLU and biases, and the loss is logistic:
bounded slopes, but at small widths outputs are not small, ∂ℓ/∂f depends on them, and runs scatter
from seed to seed (SGD's most; a loss that is linear in the output has no such scatter).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, grouped
from grsd.experiments.residual_mlp import INPUTS, factory
from grsd.mup.coordcheck import coord_check, fit_slope, sizes_along
from grsd.mup.planning import Plan, plan
from grsd.mup.registry import OPTIMIZERS, row

SCHEMES = {"all": ("mup", "sp"), "hidden": ("mup", "wrong")}
"""What is trained → the ways to set the rates that are compared."""


def checked() -> tuple[str, ...]:
    """Return the optimizers that coordinate checks have a rate for."""
    return tuple(name for name, known in OPTIMIZERS.items() if known.rate is not None)


def slow() -> tuple[str, ...]:
    """Return those whose every step needs many decompositions."""
    return tuple(name for name in checked() if OPTIMIZERS[name].slow)


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    optimizers: tuple[str, ...] = field(default_factory=checked)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (4, 8, 16, 32)
    base_width: int = 64
    base_depth: int = 4
    seeds: int = 3
    steps: int = 8
    samples: int = 32
    slow: tuple[str, ...] = field(default_factory=slow)  # widths up to slow_width
    slow_width: int = 256
    trained: str = "all"  # or "hidden": these matrices alone, by the rule and by the row's mistake
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.one_of("trained", self.trained, SCHEMES)
        for name in self.optimizers:
            checks.one_of("optimizer", name, checked())
        sizes = (*self.widths, *self.depths, self.base_width, self.base_depth)
        checks.at_least("least of sizes, seeds and steps", min(*sizes, self.seeds, self.steps), 1)


def hidden_alone(
    optimizer: str, width: float = 0.0, depth: float = 0.0
) -> Callable[[nn.Module, nn.Module], Plan]:
    """Return (model, base) → plan: hidden matrices alone have a rate, times r_n^width r_L^depth."""

    def make(model: nn.Module, base: nn.Module) -> Plan:
        right = plan(model, base=base, optimizer=optimizer)
        factor = float(right.r_n**width * right.r_L**depth)
        rates = ((e, e.lr * factor if e.role == "hidden" else 0.0) for e in right)
        return replace(right, entries=tuple(replace(e, lr=rate) for e, rate in rates))

    return make


def batch(samples: int, seed: int = 0, device: str = "cpu") -> Callable[[nn.Module], Tensor]:
    """Return model → mean of log(1 + e^(−f y)) on a batch of Gaussian inputs and random signs y."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, INPUTS, generator=generator).to(device)
    y = torch.randn(samples, generator=generator).sign().to(device)

    def loss(model: nn.Module) -> Tensor:
        return functional.softplus(-model(x).reshape(-1) * y).mean()

    return loss


def pieces(p: Parameters) -> list[Piece]:
    """One piece per optimizer, parametrization, size and seed."""
    listed: list[Piece] = []
    for name in p.optimizers:
        known = row(name)
        shared = {name: getattr(p, name) for name in ("steps", "samples", "trained", "device")}
        shared |= {"optimizer": name, "lr": known.rate, "base": [p.base_width, p.base_depth]}
        widths = [w for w in p.widths if name not in p.slow or w <= p.slow_width]
        sizes = sizes_along(widths, p.depths, (p.base_width, p.base_depth))
        for parametrization in SCHEMES[p.trained]:
            if parametrization == "sp" and known.variant_of is not None:
                continue  # it differs from the other in its rule alone
            if parametrization == "wrong" and known.mistake is None:
                continue
            listed += [
                {**shared, "parametrization": parametrization, "size": list(size), "seed": seed}
                for size in sizes
                for seed in range(p.seeds)
            ]
    return listed


def _off(optimizer: str, parametrization: str) -> tuple[float, float]:
    """Return the exponents by which the hidden rate is wrong."""
    return (row(optimizer).mistake if parametrization == "wrong" else None) or (0.0, 0.0)


def measure(piece: Piece) -> Data:
    """Train one model; an entry that is not finite is stored as null."""
    optimizer, parametrization = piece["optimizer"], piece["parametrization"]
    (width, depth), base = piece["size"], (piece["base"][0], piece["base"][1])
    off = _off(optimizer, parametrization)
    check = coord_check(
        lambda n, blocks: factory(n, blocks).to(piece["device"]),
        batch(piece["samples"], device=piece["device"]),
        widths=(width,) if depth == base[1] else (),
        depths=(depth,) if depth != base[1] else (),
        base=base,
        optimizer=optimizer,
        lr=piece["lr"],
        steps=piece["steps"],
        seeds=(piece["seed"],),
        parametrization="sp" if parametrization == "sp" else "mup",
        options={optimizer: row(optimizer).options},
        make_plan=hidden_alone(optimizer, *off) if piece["trained"] == "hidden" else None,
    )
    run = next(r for r in check.runs if (r.width, r.depth) == (width, depth))
    series = {"features": run.features, "losses": run.losses}
    return {
        name: [float(f"{v:.4g}") if math.isfinite(v) else None for v in values]
        for name, values in series.items()
    }


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Slopes of log ‖Δh_L‖_R against log size after every step, and how many runs diverged."""
    series = [{"run": (a["size"], b["features"])} for a, b in zip(listed, measured, strict=True)]
    base = [p.base_width, p.base_depth]
    results = []
    groups = grouped(listed, series, "optimizer", "parametrization")
    for (name, parametrization), members in groups.items():
        runs = [one["run"] for one in members]
        # the runs along each axis: those of the base's size on the other
        along = [[run for run in runs if run[0][1 - place] == base[1 - place]] for place in (0, 1)]
        results.append(
            {
                "optimizer": name,
                "parametrization": parametrization,
                "lr": row(name).rate,
                "off": list(_off(name, parametrization)),
                "widths": sorted({size[0] for size, _ in along[0]}),
                "depths": sorted({size[1] for size, _ in along[1]}),
                "slopes": {
                    axis: [
                        _slope([(size[place], f[step]) for size, f in along[place]])
                        for step in range(1, p.steps + 1)
                    ]
                    for place, axis in enumerate(("width", "depth"))
                },
                "base change": [f[-1] for size, f in runs if size == base],
                "diverged": sum(None in f for _, f in runs),
                "runs": len(runs),
            }
        )
    return {"steps": p.steps, "trained": p.trained, "checks": results}


def _slope(points: list[tuple[int, float | None]]) -> list[float] | None:
    """Return slope, low and high end; None without an interval."""
    fit = fit_slope([(n, math.nan if y is None else y) for n, y in points])
    if fit is None or not math.isfinite(fit.high):
        return None
    return [round(v, 4) for v in (fit.value, fit.low, fit.high)]


def table(result: Data) -> Rows:
    """The slopes after the last step."""

    def shown(fit: list[float] | None) -> str:
        return "–" if fit is None else f"{fit[0]:+.2f} [{fit[1]:+.2f}, {fit[2]:+.2f}]"

    rows: list[list[object]] = []
    for c in result["checks"]:
        slopes = [shown(c["slopes"][axis][-1]) for axis in ("width", "depth")]
        diverged = f"{c['diverged']} of {c['runs']}"
        rows.append([c["optimizer"], c["parametrization"], *slopes, diverged])
    return ["optimizer", "parametrization", "width", "depth", "diverged"], rows


GPU: dict[str, Any] = {"widths": (128, 256, 512, 1024, 2048), "depths": (4, 8, 16, 32, 64)}
GPU |= {"slow_width": 1024, "seeds": 8, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
