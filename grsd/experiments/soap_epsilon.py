"""The experiment ``soap-epsilon``: exponents of SOAP's hidden updates and features for three sizes
of ε.

SOAP divides a rotated gradient entry by entry. Where ε is far below the small entries of that
gradient, all of them become signs; where ε is a share c of its largest singular value, the small
ones stay small, and ‖A‖ ≤ ‖G‖_F / (c ‖G‖₂). One piece is one residual MLP (that of ``mup-coords``)
trained by the printed rule of SOAP, with ε constant or ε = c σ: σ is the largest singular value of
the base's first gradient in the same role, times 1/r_L for hidden matrices and r_n^(−1/2) for the
others. The loss is linear in the output, so that ∂ℓ/∂f has one size at every size of the net.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded, shared
from grsd.experiments.residual_mlp import INPUTS, factory
from grsd.mup.coordcheck import fit_slope, sizes_along
from grsd.mup.monitoring import geometric_means
from grsd.mup.norms import rms_norm, spectral_norm
from grsd.mup.planning import Plan, plan
from grsd.mup.registry import row

ABSOLUTE = 1e-8  # the library's own ε, for a share of 0


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (4, 8, 16, 32)
    base_width: int = 64
    base_depth: int = 4
    shares: tuple[float, ...] = (0.0, 1e-4, 1e-2)  # c; 0 is ε = 1e-8 at every size
    seeds: int = 3
    steps: int = 8
    samples: int = 32

    def __post_init__(self) -> None:
        sizes = (*self.widths, *self.depths, self.base_width, self.base_depth, self.seeds)
        checks.at_least("least of sizes, seeds and steps", min(*sizes, self.steps), 1)
        checks.at_least("shares", self.shares, 0.0)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per share, size and seed."""
    common = shared(p, "widths", "depths", "shares", "seeds")
    return [
        {**common, "share": share, "n": width, "L": depth, "seed": seed}
        for width, depth in sizes_along(p.widths, p.depths, (p.base_width, p.base_depth))
        for share in p.shares
        for seed in range(p.seeds)
    ]


def linear(samples: int) -> Callable[[nn.Module], Tensor]:
    """Return model → −mean of f y on a batch of Gaussian inputs and random signs y."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, INPUTS, generator=generator)
    y = torch.randn(samples, generator=generator).sign()
    return lambda model: -(model(x).reshape(-1) * y).mean()


def prepared(piece: Piece, size: tuple[int, int]) -> tuple[nn.Module, Plan]:
    """Return a net of one size with the weights of the seed and the multipliers of its plan."""
    base = factory(piece["base_width"], piece["base_depth"])
    model = factory(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caution about SOAP is what is measured here
        made = plan(model, base=base, optimizer="soap")
    made.initialize_(model, seed=piece["seed"])
    made.attach(model)
    return model, made


def largest(model: nn.Module, made: Plan, loss: Callable[[nn.Module], Tensor]) -> dict[str, float]:
    """Return role → largest singular value of the first gradient, geometric mean over matrices."""
    model.zero_grad()
    loss(model).backward()  # type: ignore[no-untyped-call]
    return geometric_means(
        [
            (e.role, spectral_norm(p.grad))
            for p, e in made.matched(model)
            if p.grad is not None and p.ndim == 2
        ]
    )


def measure(piece: Piece) -> Data:
    """Train one net; of every step, ‖A‖_R of the hidden matrices and the change of features."""
    loss, share = linear(piece["samples"]), piece["share"]
    sigma = largest(*prepared(piece, (piece["base_width"], piece["base_depth"])), loss)
    model, made = prepared(piece, (piece["n"], piece["L"]))
    own = largest(model, made, loss)
    # ε by role: a share of the base's σ, by the rule
    r_n, r_L = made.r_n, made.r_L
    rule = {"input": r_n**-0.5, "hidden": 1 / r_L, "output": r_n**-0.5}
    lr = row("soap").rate
    assert lr is not None
    optimizer = made.make_optimizer(model, lr=lr, options={"soap": {"weight_decay": 0.0}})
    role = dict(made.matched(model))
    for group in optimizer.param_groups:
        e = role[group["params"][0]]
        if e.role in rule:
            group["eps"] = share * sigma[e.role] * rule[e.role] if share else ABSOLUTE
    hidden = [(p, lr * e.lr) for p, e in role.items() if e.role == "hidden"]
    seen: list[Tensor] = []
    last: nn.Module = model.get_submodule("blocks")[-1]  # type: ignore[index]
    last.register_forward_hook(lambda module, inputs, out: seen.append(out.detach().double()))
    updates = []
    for _ in range(piece["steps"]):
        optimizer.zero_grad()
        loss(model).backward()  # type: ignore[no-untyped-call]
        before = [p.detach().clone() for p, _ in hidden]
        optimizer.step()
        steps = zip(hidden, before, strict=True)
        norms = [spectral_norm((old - p.detach()) / rate) for (p, rate), old in steps]
        updates.append(geometric_means([("", size) for size in norms]).get("", 0.0))
    loss(model)
    change = [float(rms_norm(h - seen[0]).square().mean().sqrt()) for h in seen[1:]]
    return {"updates": updates, "change": change, "sigma": own}


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Every run, and the exponents of the updates and the features after every step."""
    runs = [
        {**{name: piece[name] for name in ("share", "n", "L", "seed")}, **one}
        for piece, one in zip(listed, measured, strict=True)
    ]
    data: Data = {"runs": rounded(runs, 5), "steps": p.steps}
    base = {"n": p.base_width, "L": p.base_depth}

    def fitted(points: list[tuple[float, float]]) -> list[float] | None:
        fit = fit_slope(points)
        if fit is None or not math.isfinite(fit.high):
            return None
        return [round(v, 4) for v in (fit.value, fit.low, fit.high)]

    def along(axis: str, share: float) -> list[Data]:
        other = {"n": "L", "L": "n"}[axis]
        return [r for r in data["runs"] if r["share"] == share and r[other] == base[other]]

    # the exponent of every step, along each axis through the base
    data["exponents"] = [
        {"share": share, "axis": axis, "what": what}
        | {
            "steps": [
                fitted([(r[axis], r[what][t]) for r in along(axis, share)]) for t in range(p.steps)
            ]
        }
        for share in p.shares
        for axis in ("n", "L")
        for what in ("updates", "change")
    ]
    # what the rule of ε rests on: σ of the first gradient by role
    data["sigma"] = {
        role: {
            axis: fitted([(r[axis], r["sigma"][role]) for r in along(axis, p.shares[0])])
            for axis in ("n", "L")
        }
        for role in ("input", "hidden", "output")
    }
    return data


def table(result: Data) -> Rows:
    """The exponents after the second and the last step: the library's first moves no matrix."""
    rows: list[list[object]] = []
    for one in result["exponents"]:
        ends = [one["steps"][t] for t in (1, -1)]
        shown = ["–" if f is None else f"{f[0]:+.2f} [{f[1]:+.2f}, {f[2]:+.2f}]" for f in ends]
        rows.append([one["share"], one["axis"], one["what"], *shown])
    return ["c", "size", "of", "second step", "last step"], rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"seeds": 8})
