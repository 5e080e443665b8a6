"""The experiment ``transfer``: U-curves of small GPTs over width and depth, under standard and μ parametrization.

One piece is one curve: one size under one scheme, every learning rate, and the seeds. Text is the help text that comes with Python
(`pydoc_data.topics`), byte by byte, so that a fresh machine needs no download.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from grsd.experiments.engine import Experiment, Piece, rounded
from grsd.lab.data.help_text import VOCABULARY, text
from grsd.mup import optima, optimizers, roles, rules, schedules, sweeps

__all__ = ["EXPERIMENT", "GPT", "SCHEMES", "Parameters", "losses"]

SCHEMES = ("sp", "mup", "k1")
"""Standard parametrization; μP for blocks of two or more layers; the rules for blocks of one, on the same net."""
CEILING = math.log(VOCABULARY)  # loss of a uniform guess: a run that ends above it diverged
TEST = 4096  # bytes of the held-out part that a run is scored on


class _Block(nn.Module):
    """Attention and feed-forward, each added to the stream; `branch_end` is the layer that ends a branch."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict(
            {
                "qkv": nn.Linear(width, 3 * width, bias=False),
                "branch_end": nn.Linear(width, width, bias=False),
            }
        )
        self.feed = nn.ModuleDict(
            {
                "first": nn.Linear(width, 4 * width, bias=False),
                "branch_end": nn.Linear(4 * width, width, bias=False),
            }
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, elementwise_affine=False) if norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = (
            self.attention["qkv"](self.norms[0](h)).view(batch, length, 3, self.heads, -1).unbind(2)
        )
        mixed = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        h = h + self.attention["branch_end"](mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = h + self.feed["branch_end"](
            nn.functional.gelu(self.feed["first"](self.norms[1](h)))
        )
        return out


class GPT(nn.Module):
    """A pre-norm GPT without biases or gains: token ids (B, T) → logits (B, T, V).

    Weights are normal with standard deviation `std` wherever they stand; heads have a fixed dimension, so that width adds heads.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        vocabulary: int = VOCABULARY,
        length: int = 64,
        head: int = 16,
        norm: bool = True,
        std: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % head or width < head or depth < 1:
            raise ValueError(
                f"the width must be a multiple of the head dimension {head}, got {width} (depth {depth})"
            )
        with torch.random.fork_rng(devices=[]):  # torch draws values that are overwritten below
            self.tokens = nn.Embedding(vocabulary, width)
            self.places = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(_Block(width, width // head, norm) for _ in range(depth))
            self.norm = nn.LayerNorm(width, elementwise_affine=False) if norm else nn.Identity()
            self.read_out = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.read_out(self.norm(h))
        return logits


@dataclass(frozen=True)
class Parameters:
    """Attributes: see the fields' comments. One result holds one axis, one optimizer, and nets with or without LayerNorm."""

    axis: str = "width"  # or "depth": what `sizes` are; the other size is that of the base
    optimizer: str = "muon_kimi"  # of hidden matrices; AdamW for the rest, at the same base rate
    norm: str = "layer"  # or "none"
    schemes: tuple[str, ...] = ("sp", "mup")
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    base_width: int = 32
    base_depth: int = 2
    rates: tuple[int, ...] = (-8, -7, -6, -5, -4, -3, -2)  # log₂ of the base rates
    seeds: int = 3  # seeds 0, 1, … of weights and batches
    near: int = 1  # seeds after the first run only so many rates from the best, and further to bracket their own best
    steps: int = 40  # a tenth is warm-up, then a cosine to a tenth
    batch: int = 8
    length: int = 64  # bytes
    head: int = 16  # dimension of a head
    std: float = 0.05  # of the base's weights
    clip: float = 1.0  # of the gradient's norm
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.axis not in ("width", "depth") or self.norm not in ("layer", "none"):
            raise ValueError(
                f"axis is {self.axis!r} (width or depth) and norm is {self.norm!r} (layer or none)"
            )
        unknown = [s for s in self.schemes if s not in SCHEMES]
        if unknown or not self.schemes:
            raise ValueError(f"schemes are {self.schemes}; expected some of {', '.join(SCHEMES)}")
        if self.optimizer not in rules.OPTIMIZERS:
            raise ValueError(
                f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(rules.OPTIMIZERS)}"
            )
        if (
            len(set(self.sizes)) < 2
            or min(self.sizes) < 1
            or len(set(self.rates)) < 3
            or self.seeds < 1
        ):
            raise ValueError(
                f"need two sizes, three rates and a seed; got {self.sizes}, {self.rates} and {self.seeds} seeds"
            )


def pieces(p: Parameters) -> list[Piece]:
    """One piece per curve, small sizes first. At the base's size all schemes are one, called base."""
    found: list[Piece] = []
    shared = {k: v for k, v in asdict(p).items() if k not in ("axis", "schemes", "sizes", "seeds")}
    for size in sorted(p.sizes):
        width, depth = (size, p.base_depth) if p.axis == "width" else (p.base_width, size)
        at_base = (width, depth) == (p.base_width, p.base_depth)
        for scheme in ("base",) if at_base else p.schemes:
            piece = {
                **shared,
                "width": width,
                "depth": depth,
                "scheme": scheme,
                "seeds": list(range(p.seeds)),
            }
            found.append({**piece, "rates": list(p.rates), "text": text().fingerprint})
    return found


def measure(piece: Piece) -> dict[str, Any]:
    """Sweep one curve: [seed, log₂ η, held-out loss] of every run, None for one that diverged."""
    found = text()
    batch, length, device = piece["batch"], piece["length"], piece["device"]

    def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs.to(device)).flatten(0, 1), targets.to(device).flatten())

    def loss(model: nn.Module, seed: int, step: int) -> Tensor:
        return mean_loss(model, *found.batch(seed, step, batch, length))

    def factory(width: int, depth: int) -> nn.Module:
        shape = {
            "length": length,
            "head": piece["head"],
            "norm": piece["norm"] == "layer",
            "std": piece["std"],
        }
        return GPT(width, depth, **shape).to(device)

    test = found.test(TEST // length, length)
    scheme: str = piece["scheme"]
    adamw = piece["optimizer"] == "adamw" or rules.OPTIMIZERS[piece["optimizer"]].matrices_only
    result = sweeps.sweep(
        factory,
        loss,
        sizes=[(piece["width"], piece["depth"])],
        base=(piece["base_width"], piece["base_depth"]),
        lrs=[2.0**rate for rate in piece["rates"]],
        seeds=piece["seeds"],
        steps=piece["steps"],
        optimizer=piece["optimizer"],
        parametrization="sp" if scheme == "sp" else "mup",
        near=piece["near"],
        k=1 if scheme == "k1" else 2,
        score=lambda model: float(mean_loss(model, *test)),
        schedule=schedules.cosine(piece["steps"], warmup=piece["steps"] // 10, floor=0.1),
        clip=piece["clip"],
        eps=1e-16,
        options={"adamw": {"betas": (0.9, 0.95)}} if adamw else None,
    )
    runs = []
    for seed, row in zip(result.seeds, result.losses[0, 0], strict=True):
        for rate, value, missing in zip(
            result.log2_lr, np.ma.getdata(row), np.ma.getmaskarray(row), strict=True
        ):
            if not missing:
                runs.append([seed, float(rate), float(value) if math.isfinite(value) else None])
    return {"runs": runs}


def losses(data: dict[str, Any], scheme: str) -> tuple[list[int], list[float], Any]:
    """Return sizes, log₂ rates and losses (sizes, seeds, rates) of one scheme of a result, NaN where a run diverged, masked where none was.

    Raises
    ------
    ValueError
        A scheme that the result does not have.
    """
    chosen = [c for c in data["curves"] if c["scheme"] in (scheme, "base")]
    if not any(c["scheme"] == scheme for c in chosen):
        raise ValueError(
            f"the result has no scheme {scheme!r}; it has {sorted({c['scheme'] for c in data['curves']})}"
        )
    rates = sorted({run[1] for c in chosen for run in c["runs"]})
    seeds = sorted({run[0] for c in chosen for run in c["runs"]})
    table = np.full((len(chosen), len(seeds), len(rates)), math.nan)
    missing = np.ones(table.shape, dtype=bool)
    for k, curve in enumerate(chosen):
        for seed, rate, value in curve["runs"]:
            at = k, seeds.index(seed), rates.index(rate)
            missing[at] = False
            table[at] = math.nan if value is None else value
    return [c["size"] for c in chosen], rates, np.ma.masked_array(table, mask=missing)


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs; per scheme the best rate of every size, its drift per doubling and the regret of carrying the base's rate over."""
    found: dict[str, Any] = {
        "axis": p.axis,
        "text": listed[0]["text"],
        "curves": [
            {"scheme": piece["scheme"], "size": piece[p.axis], "runs": one["runs"]}
            for piece, one in zip(listed, measured, strict=True)
        ],
    }
    found["schemes"] = {scheme: _summary(*losses(found, scheme)) for scheme in p.schemes}
    kept: dict[str, Any] = rounded(found, 6)
    return kept


def _summary(sizes: list[int], rates: list[float], table: Any) -> dict[str, Any]:
    best = [optima.optimum(rates, one, ceiling=CEILING) for one in table]
    slope = optima.drift(sizes, best)
    cost = optima.regret(rates, table, ceiling=CEILING)
    return {
        "sizes": sizes,
        "optima": [_known(o, "value", "low", "high", "loss", "bound", "cliff") for o in best],
        "drift": _known(slope, "value", "low", "high", "bound", "scatter"),
        "regret": [v if math.isfinite(v) else None for v in cost.values.tolist()],
    }


def _known(found: object, *names: str) -> dict[str, Any]:
    """The named fields, without those that are not finite numbers."""
    values = {name: getattr(found, name) for name in names}
    return {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """One row per scheme and size."""
    columns = [
        "scheme",
        result["axis"],
        "log2 rate",
        "95 %",
        "loss",
        "regret",
        "drift per doubling",
    ]
    rows: list[list[object]] = []
    for scheme, found in result["schemes"].items():
        d = found["drift"]
        drift = f"{d['bound']} {d.get('value', math.nan):+.2f} [{d.get('low', math.nan):+.2f}, {d.get('high', math.nan):+.2f}]"
        for k, (size, o) in enumerate(zip(found["sizes"], found["optima"], strict=True)):
            interval = f"{o.get('low', math.nan):.2f} to {o.get('high', math.nan):.2f}"
            cost = found["regret"][k]
            shown = [
                f"{o['bound']} {o.get('value', math.nan):.2f}".strip(),
                interval,
                f"{o.get('loss', math.nan):.3f}",
            ]
            rows.append(
                [
                    scheme,
                    size,
                    *shown,
                    "diverged" if cost is None else f"{cost:.3f}",
                    drift if k == 0 else "",
                ]
            )
    return columns, rows


EXPERIMENT = Experiment(
    name="transfer",
    summary="U-curves of small GPTs over width and depth, standard against μ parametrization",
    parameters=Parameters,
    pieces=pieces,
    measure=measure,
    reduce=reduce,
    table=table,
    seeds=lambda p: range(p.seeds),
    sources=(
        sweeps,
        sys.modules["grsd.mup.planning"],
        roles,
        optimizers,
        rules,
        sys.modules[__name__],
    ),
    gpu={
        "sizes": (128, 256, 512, 1024),
        "base_width": 128,
        "base_depth": 4,
        "head": 64,
        "steps": 300,
        "batch": 64,
        "length": 256,
        "std": 0.02,
        "device": "cuda",
    },
)
