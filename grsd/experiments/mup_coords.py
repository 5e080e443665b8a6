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

from grsd.experiments.engine import Experiment, Piece
from grsd.lab.nets import architectures
from grsd.mup.coordcheck import coord_check, fit_slope
from grsd.mup.planning import Plan, plan
from grsd.mup.registry import OPTIMIZERS, row

__all__ = ["EXPERIMENT", "Parameters", "batch", "factory", "hidden_alone"]

INPUTS = 16
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
    trained: str = "all"  # or "hidden": the hidden matrices alone, by the rule and by the wrong one of their rows
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.trained not in SCHEMES:
            raise ValueError(f"trained is {self.trained!r}; it can be {' or '.join(SCHEMES)}")
        unknown = [name for name in self.optimizers if name not in checked()]
        sizes = (*self.widths, *self.depths, self.base_width, self.base_depth)
        if unknown or min(*sizes, self.seeds, self.steps) < 1:
            raise ValueError(
                f"optimizers are {', '.join(checked())}, and sizes, seeds and steps are positive; "
                f"got {unknown or self}"
            )


def factory(width: int, depth: int) -> nn.Module:
    """A residual MLP with two layers a block, ReLU, biases and α_b = ¼: (B, 16) → (B, 1), float32.

    With α_b = 1 a stack of four blocks is far from its limit of depth: its features grow tenfold,
    and those of a stack of 32 with α = ⅛ do not.
    """
    return architectures.res_mlp(
        inputs=INPUTS,
        width=width,
        depth=depth,
        activation="relu",
        epsilon=0.25,
        bias=True,
        seed=0,
        dtype=torch.float32,
    )


def hidden_alone(
    optimizer: str, width: float = 0.0, depth: float = 0.0
) -> Callable[[nn.Module, nn.Module], Plan]:
    """Return (model, base) → the optimizer's plan with every rate 0 but that of the hidden
    matrices, which is times r_n^width · r_L^depth."""

    def make(model: nn.Module, base: nn.Module) -> Plan:
        right = plan(model, base=base, optimizer=optimizer)
        factor = float(right.r_n**width * right.r_L**depth)
        return replace(
            right,
            entries=tuple(
                replace(e, lr=e.lr * factor if e.role == "hidden" else 0.0) for e in right
            ),
        )

    return make


def batch(samples: int, seed: int = 0, device: str = "cpu") -> Callable[[nn.Module], Tensor]:
    """Return model → mean of log(1 + e^(−f y)) on one fixed batch of Gaussian inputs and random
    signs y, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, INPUTS, generator=generator).to(device)
    y = torch.randn(samples, generator=generator).sign().to(device)

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = functional.softplus(-model(x).reshape(-1) * y).mean()
        return found

    return loss


def pieces(p: Parameters) -> list[Piece]:
    """One piece per optimizer, parametrization, size and seed."""
    found: list[Piece] = []
    for name in p.optimizers:
        widths = [w for w in p.widths if name not in p.slow or w <= p.slow_width]
        sizes = [*((w, p.base_depth) for w in widths), *((p.base_width, d) for d in p.depths)]
        for parametrization in SCHEMES[p.trained]:
            if parametrization == "sp" and OPTIMIZERS[name].variant_of is not None:
                continue  # it differs from the other in its rule alone
            if parametrization == "wrong" and OPTIMIZERS[name].mistake is None:
                continue
            for width, depth in dict.fromkeys(sizes):
                found += [
                    {
                        "optimizer": name,
                        "parametrization": parametrization,
                        "size": [width, depth],
                        "base": [p.base_width, p.base_depth],
                        "seed": seed,
                        "steps": p.steps,
                        "samples": p.samples,
                        "lr": OPTIMIZERS[name].rate,
                        "trained": p.trained,
                        "device": p.device,
                    }
                    for seed in range(p.seeds)
                ]
    return found


def measure(piece: Piece) -> dict[str, Any]:
    """Train one model; an entry that is not finite is stored as null."""
    width, depth = piece["size"]
    base = tuple(piece["base"])
    optimizer, parametrization, device = (
        piece["optimizer"],
        piece["parametrization"],
        piece["device"],
    )
    known = row(optimizer)
    off = (known.mistake if parametrization == "wrong" else None) or (0.0, 0.0)
    found = coord_check(
        lambda n, blocks: factory(n, blocks).to(device),
        batch(piece["samples"], device=device),
        widths=(width,) if depth == base[1] else (),
        depths=(depth,) if depth != base[1] else (),
        base=(base[0], base[1]),
        optimizer=optimizer,
        lr=piece["lr"],
        steps=piece["steps"],
        seeds=(piece["seed"],),
        parametrization="sp" if parametrization == "sp" else "mup",
        options={optimizer: known.options},
        make_plan=hidden_alone(optimizer, *off) if piece["trained"] == "hidden" else None,
    )
    run = next(r for r in found.runs if (r.width, r.depth) == (width, depth))
    return {
        "features": [float(f"{v:.4g}") if math.isfinite(v) else None for v in run.features],
        "losses": [float(f"{v:.4g}") if math.isfinite(v) else None for v in run.losses],
    }


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Slopes of log ‖Δh_L‖_R against log size after every step, and how many runs left the
    numbers."""
    checks = []
    for name in p.optimizers:
        for parametrization in SCHEMES[p.trained]:
            runs = [
                (piece["size"], data["features"])
                for piece, data in zip(listed, measured, strict=True)
                if (piece["optimizer"], piece["parametrization"]) == (name, parametrization)
            ]
            if not runs:
                continue
            slopes: dict[str, list[list[float] | None]] = {}
            for place, axis, other in ((0, "width", p.base_depth), (1, "depth", p.base_width)):
                slopes[axis] = []
                for step in range(1, p.steps + 1):
                    points = [
                        (float(size[place]), math.nan if f[step] is None else f[step])
                        for size, f in runs
                        if size[1 - place] == other
                    ]
                    fit = fit_slope(points)
                    slopes[axis].append(
                        None
                        if fit is None or not math.isfinite(fit.high)
                        else [round(v, 4) for v in (fit.value, fit.low, fit.high)]
                    )
            base = [f[-1] for size, f in runs if size == [p.base_width, p.base_depth]]
            checks.append(
                {
                    "optimizer": name,
                    "parametrization": parametrization,
                    "lr": OPTIMIZERS[name].rate,
                    "off": list(OPTIMIZERS[name].mistake or ())
                    if parametrization == "wrong"
                    else [0.0, 0.0],
                    "widths": sorted({size[0] for size, _ in runs if size[1] == p.base_depth}),
                    "depths": sorted({size[1] for size, _ in runs if size[0] == p.base_width}),
                    "slopes": slopes,
                    "base change": base,
                    "diverged": sum(None in f for _, f in runs),
                    "runs": len(runs),
                }
            )
    return {"steps": p.steps, "trained": p.trained, "checks": checks}


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """The slopes after the last step."""

    def shown(fit: list[float] | None) -> str:
        return "–" if fit is None else f"{fit[0]:+.2f} [{fit[1]:+.2f}, {fit[2]:+.2f}]"

    rows: list[list[object]] = [
        [
            c["optimizer"],
            c["parametrization"],
            shown(c["slopes"]["width"][-1]),
            shown(c["slopes"]["depth"][-1]),
            f"{c['diverged']} of {c['runs']}",
        ]
        for c in result["checks"]
    ]
    return ["optimizer", "parametrization", "width", "depth", "diverged"], rows


GPU = {
    "widths": (128, 256, 512, 1024, 2048),
    "depths": (4, 8, 16, 32, 64),
    "slow_width": 1024,
    "seeds": 8,
    "device": "cuda",
}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
