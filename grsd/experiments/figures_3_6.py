"""The experiment ``figures-3-6``: assumptions F.1 to F.3 of 2603.00541 at the paper's own size.

Equation (38) with Table 4 for SGD: α = 1, 1/L, 1/n, rates n, L, n times the base's, σ² = 2 at the
base; two classes of CIFAR-10, flattened; full-batch gradient descent on the binary cross-entropy,
read at 0, T/2 and T. One piece is one net. Beside the ratio of assumption F.1 stands the least that
it could have been, and beside the paper's rate a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded, shared
from grsd.lab.data import archive
from grsd.mup.alignment import observe, stable_activation, step
from grsd.mup.planning import Plan, plan

CLASSES = (0, 1)  # airplanes, automobiles
VARIANCE = 2.0  # σ² of the base


class Block(nn.Module):
    """h + φ(W⁽²⁾ φ(W⁽¹⁾ h)), φ = ReLU; the multiplier is a plan's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.branch_end = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.branch_end(torch.relu(self.first(h))))


class Net(nn.Module):
    """Equation (38): (B, d₀) → (B,)."""

    def __init__(self, inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.read = nn.Linear(inputs, width, bias=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1, bias=False)

    def stream(self, x: Tensor) -> list[Tensor]:
        """Return h₀, …, h_L, (B, n) each."""
        stream = [torch.relu(self.read(x))]
        for block in self.blocks:
            stream.append(block(stream[-1]))
        return stream

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stream(x)[-1])[:, 0]
        return logits


def build(inputs: int, width: int, depth: int, seed: int) -> tuple[Net, Plan]:
    """Return a net with the paper's initial values and multipliers, and its plan."""
    model = Net(inputs, width, depth)
    made = plan(model, r_n=width, r_L=depth, optimizer="sgd", other="sgd")
    std = VARIANCE**0.5
    made.initialize_(
        model, seed=seed, std={"input": std / inputs**0.5, "hidden": std, "output": std}
    )
    made.attach(model)
    return model, made


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the defaults are the paper's, but for the seeds and the second rate."""

    images: str = "cifar10_subset.npz"  # or a folder; see grsd.lab.data.archive
    depths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    width: int = 256
    samples: int = 200
    steps: int = 200
    rates: tuple[float, ...] = (0.001, 0.03)  # η of the base; the paper's first
    largest: int = 16  # depth up to which the rates after the first are run
    seeds: int = 1  # of weights; the images stay

    def __post_init__(self) -> None:
        checks.at_least("sizes and seeds", min(*self.depths, self.width, self.seeds), 1)
        checks.positive("rates", self.rates)
        checks.at_least("steps", self.steps, 2)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per rate, depth and seed."""
    kept = shared(p, "images", "depths", "rates", "largest", "seeds")
    kept |= {"images": p.images, "sha256": archive.fingerprint(p.images)}
    return [
        {**kept, "rate": rate, "L": depth, "seed": seed}
        for seed in range(p.seeds)
        for rate in p.rates
        for depth in p.depths
        if rate == p.rates[0] or depth <= p.largest
    ]


@lru_cache(maxsize=1)
def data(images: str, samples: int) -> tuple[Tensor, Tensor]:
    """Return inputs (B, d₀), float32, and targets 0 or 1."""
    drawn = archive.two_classes(archive.find(images), CLASSES, samples, seed=0)
    return drawn.inputs.flatten(1).float(), (drawn.targets.float() + 1) / 2


def measure(piece: Piece) -> Data:
    """Train one net and read it at the start, in the middle and at the end."""
    x, y = data(piece["images"], piece["samples"])
    depth, steps = piece["L"], piece["steps"]
    model, made = build(x.shape[1], piece["width"], depth, piece["seed"])
    optimizer = made.make_optimizer(model, lr=piece["rate"])

    def losses(net: nn.Module) -> Tensor:
        return binary_cross_entropy_with_logits(net(x), y, reduction="none")

    # what is looked at: the input, and the first, the middle and the last block
    looked = {"first": 0, "middle": depth // 2, "last": depth - 1}
    layers = {"input": "read"} | {
        f"{where}, {which}": f"blocks.{at}.{name}"
        for where, at in looked.items()
        for which, name in (("W1", "first"), ("W2", "branch_end"))
    }

    def weights() -> dict[str, Tensor]:
        return {k: model.get_parameter(f"{n}.weight").detach().clone() for k, n in layers.items()}

    @torch.no_grad()
    def features() -> dict[str, Tensor]:
        stream = model.stream(x)
        return {"h0": stream[0]} | {where: stream[at + 1] for where, at in looked.items()}

    def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> Data:
        pairs = {k: step(before[k].squeeze(), after[k].squeeze()) for k in before}
        return {k: [s.ratio, s.floor, s.cosine] for k, s in pairs.items()}

    def flat(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: h.flatten() for k, h in given.items()}

    start, start_features, reads = weights(), features(), []
    for t in range(steps + 1):
        seen = t in (0, steps // 2, steps)
        if seen:
            before, h, found = weights(), features(), observe(model, losses, layers.values())
            with torch.no_grad():
                stream = model.stream(x)
                z = {
                    where: model.get_submodule(f"blocks.{at}.first")(stream[at])
                    for where, at in looked.items()
                }
        # one step of gradient descent
        optimizer.zero_grad()
        loss = losses(model).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if seen:
            reads.append(
                {
                    "t": t,
                    "loss": float(loss.detach()),
                    "weights": compare(before, weights()),
                    "features": compare(flat(h), flat(features())),
                    "relu": {k: stable_activation(v, torch.relu(v)) for k, v in z.items()},
                    "own": {k: found[n].own_share() for k, n in layers.items()},
                    "norms": {k: found[n].batch_norm_ratio() for k, n in layers.items()},
                }
            )
    whole = {
        "weights": compare(start, weights()),
        "features": compare(flat(start_features), flat(features())),
    }
    return {"reads": reads, "whole": whole}


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Keep every run, with the name and the sum of the images."""
    source = {"name": p.images, "sha256": listed[0]["sha256"]}
    runs = [
        {**{name: piece[name] for name in ("rate", "L", "seed")}, **one}
        for piece, one in zip(listed, measured, strict=True)
    ]
    return {"images": source, "runs": rounded(runs, 5)}


READINGS = ("F.1, weights", "F.1, features", "F.2", "F.3, own share", "F.3, norms")


def series(result: Data, rate: float, whole: bool = False) -> dict[str, Any]:
    """Return reading → (depths, smallest over layers and times of every seed, (depths, seeds)); of
    F.1 the floor too. With `whole`, W_T and h_T against the start; F.1 alone."""
    runs = [run for run in result["runs"] if run["rate"] == rate]
    depths = sorted({run["L"] for run in runs})
    checks.one_of("rate", rate, sorted({run["rate"] for run in result["runs"]}))

    def least(run: Data, kind: str, place: int | None) -> float:
        reads = [run["whole"]] if whole else run["reads"]
        values = [v for read in reads for v in read[kind].values()]
        return min(v if place is None else v[place] for v in values)

    kinds: dict[str, tuple[str, int | None]] = {}
    for what in ("weights", "features"):
        kinds |= {f"F.1, {what}": (what, 0), f"F.1, {what}, floor": (what, 1)}
    if not whole:
        kinds |= {"F.2": ("relu", None), "F.3, own share": ("own", None)}
        kinds |= {"F.3, norms": ("norms", None)}
    return {"depths": depths} | {
        name: [[least(run, *where) for run in runs if run["L"] == L] for L in depths]
        for name, where in kinds.items()
    }


def table(result: Data) -> Rows:
    """The smallest ratio of every reading at the smallest and the largest depth."""
    rows: list[list[object]] = []
    for rate in sorted({run["rate"] for run in result["runs"]}):
        for whole in (False, True):
            found = series(result, rate, whole)
            depths = found.pop("depths")
            for name, values in found.items():
                ends = [f"{min(values[k]):.4f}" for k in (0, -1)]
                rows.append([rate, "W_T, W_0" if whole else "one step", name, depths[-1], *ends])
    return ["rate", "change", "reading", "L to", "at the smallest L", "at the largest"], rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"seeds": 8})
