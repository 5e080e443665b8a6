"""The experiment ``mup-norms``: sizes of weights, gradients and first updates of residual MLPs of
many widths and depths.

One piece is one net: `grsd.mup.audit.measure_sizes` under μP's multipliers and variances, on one
sample and a loss that is linear in the output, so that ∂ℓ/∂f has one size everywhere. The stored
result holds the sizes; the exponents are fitted when it is read (`audit`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded
from grsd.lab.nets import architectures
from grsd.mup import audit as audits
from grsd.mup.audit import Sizes, UpdateAudit
from grsd.mup.coordcheck import sizes_along
from grsd.mup.registry import OPTIMIZERS, row


def distinct() -> tuple[str, ...]:
    """Return the optimizers whose first step is that of no other."""
    return tuple(name for name, known in OPTIMIZERS.items() if known.variant_of is None)


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # at depth `base_depth`
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)  # at width `base_width`
    base_width: int = 64
    base_depth: int = 4
    seeds: int = 3
    blocks: int = 2  # looked at
    layers: tuple[int, ...] = (2, 1)  # k, of a residual branch
    activation: str = "relu"
    optimizers: tuple[str, ...] = field(default_factory=distinct)
    slow_width: int = 256  # up to which SSO and SOAP are run: they need many decompositions
    slow_seeds: int = 2  # of widths above slow_width
    device: str = "cpu"

    def __post_init__(self) -> None:
        sizes = (*self.widths, *self.depths, self.base_width, self.base_depth)
        checks.at_least("least of sizes, seeds, blocks", min(*sizes, self.seeds, self.blocks), 1)
        for name in self.optimizers:
            checks.one_of("optimizer", name, OPTIMIZERS)
        for layers in self.layers:
            checks.one_of("layers", layers, (1, 2))


def network(
    k: int, activation: str = "relu", base_depth: int = 4
) -> Callable[[int, int], nn.Module]:
    """Return (width, depth) → residual MLP with biases, four inputs and one output, and base
    multiplier α_b = 1/base_depth.

    Four inputs, because ‖W₀‖_R ∝ √n + √d₀ is only then near its limit at width 64; α_b so that the
    stack's gain ∏(1 + α²…) is near its limit at the base's depth.
    """
    how: dict[str, Any] = {"activation": activation, "epsilon": 1 / base_depth, "bias": True}
    how |= {"inputs": 4, "layers": k, "seed": 0}
    return lambda width, depth: architectures.res_mlp(width=width, depth=depth, **how)


def one_sample(model: nn.Module) -> Tensor:
    """Return −f(x) at one fixed x, on the model's device: ∂ℓ/∂f is −1 at every size."""
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -model(x.to(next(model.parameters()).device)).sum()


def pieces(p: Parameters) -> list[Piece]:
    """One piece per k, size and seed."""
    listed: list[Piece] = []
    cases = sizes_along(p.widths, p.depths, (p.base_width, p.base_depth))
    settings = {name: getattr(p, name) for name in ("blocks", "activation", "device")}
    settings["base"] = [p.base_width, p.base_depth]
    for k in p.layers:
        for n, depth in cases:
            wide = n > p.slow_width
            chosen = [name for name in p.optimizers if not (wide and row(name).slow == 2)]
            listed += [
                {"k": k, "n": n, "L": depth, "seed": seed, "optimizers": chosen, **settings}
                for seed in range(min(p.seeds, p.slow_seeds) if wide else p.seeds)
            ]
    return listed


def measure(piece: Piece) -> Data:
    """Return the sizes of one net."""
    make = network(piece["k"], piece["activation"], piece["base"][1])
    norms = audits.measure_sizes(
        lambda width, depth: make(width, depth).to(piece["device"]),
        one_sample,
        width=piece["n"],
        depth=piece["L"],
        base=tuple(piece["base"]),
        **{name: piece[name] for name in ("seed", "optimizers", "k", "blocks")},
    )
    return {"weights": norms.weights, "gradients": norms.gradients, "updates": norms.updates}


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Lay the sizes out as series over the pieces of one k; what a piece has not is −1."""
    by_k: dict[str, Any] = {}
    for k in p.layers:
        rows = [(a, _flat(b)) for a, b in zip(listed, measured, strict=True) if a["k"] == k]
        names = dict.fromkeys(name for _, one in rows for name in one if "output_bias" not in name)
        series = {name: rounded([one.get(name, -1.0) for _, one in rows], 4) for name in names}
        nets = [[piece["n"], piece["L"], piece["seed"]] for piece, _ in rows]
        by_k[str(k)] = {"pieces": nets, "series": series}
    base = [p.base_width, p.base_depth]
    return {"base": base, "optimizers": list(p.optimizers), "k": by_k}


def _flat(one: dict[str, Any]) -> dict[str, float]:
    """Return "weights/hidden", "updates/sgd/hidden" and so on → size."""
    kinds = {"weights": one["weights"], "gradients": one["gradients"]}
    kinds |= {f"updates/{name}": by_role for name, by_role in one["updates"].items()}
    return {f"{kind}/{role}": v for kind, by_role in kinds.items() for role, v in by_role.items()}


def sizes(data: dict[str, Any], k: int) -> list[Sizes]:
    """Return the sizes of a stored result."""
    if str(k) not in data["k"]:
        raise ValueError(f"the result has no k = {k}; it has {', '.join(data['k'])}")
    held = data["k"][str(k)]
    nets = []
    for i, (n, depth, seed) in enumerate(held["pieces"]):
        net = Sizes(n, depth, seed, {}, {}, {name: {} for name in data["optimizers"]})
        for name, values in held["series"].items():
            kind, *optimizer, role = name.split("/")
            by_role = net.updates[optimizer[0]] if optimizer else getattr(net, kind)
            if values[i] > 0:
                by_role[role] = values[i]
        nets.append(net)
    return nets


def audit(data: dict[str, Any], k: int = 2, **more: Any) -> UpdateAudit:
    """Return the exponents of a stored result; `more` as in `grsd.mup.audit.summarize`."""
    how = {"base": tuple(data["base"]), "optimizers": data["optimizers"], "k": k}
    return audits.summarize(sizes(data, k), **how, **more)


def table(data: Data) -> Rows:
    """Per k, optimizer and role: exponents of the first update against their predictions."""
    columns = ["k", "optimizer", "role", "width", "predicted", "depth", "predicted"]
    rows: list[list[object]] = []
    for k in map(int, data["k"]):
        exponents = audit(data, k)
        for e in exponents.exponents:
            if e.quantity == "update" and e.axis == "width" and e.role != "output_bias":
                both = (e, exponents[e.optimizer, e.role, "update", "depth"])
                ends = [end for x in both for end in (str(x.measured), x.wanted)]
                rows.append([k, e.optimizer, e.role, *ends])
    return columns, rows


GPU: dict[str, Any] = {"widths": (64, 256, 1024, 4096), "depths": (4, 16, 64, 256)}
GPU |= {"slow_width": 1024, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
