"""`grsd.mup` against microsoft/mup on a network of growing width: the same training, to rounding.

    python benchmarks/mup_peer.py                      # prints
    python benchmarks/mup_peer.py --out FOLDER         # and stores the result "mup-peer"

mup is width-only and has Adam and SGD. A residual MLP with biases is trained by both from the same weights, in float64: by mup with its
`MuReadout` and `MuAdamW` or `MuSGD`, by `grsd.mup` on a plain `nn.Linear` head with a plan's multipliers and groups. Depth is that of the base, so that the plan
scales nothing with it. What is compared: the largest difference of any weight after training over the largest change. Two controls must differ: a plan without its
learning rates, and one without its multipliers.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import mup as peer
import torch
from torch import Tensor, nn

from grsd import mup, results

RESULT = "mup-peer"
BASE, DEPTH = 32, 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.branch_end = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch_end(torch.relu(self.first(h)))


class Residual(nn.Module):
    def __init__(self, width: int, head: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.read = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))
        self.head = head(width, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Return the losses; the batch is fixed."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(16, size, generator=g, dtype=torch.float64) for size in (5, 3))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def by_peer(
    start: dict[str, Tensor], width: int, name: str, settings: dict[str, Any], steps: int
) -> tuple[nn.Module, list[float]]:
    model = Residual(width, peer.MuReadout)
    peer.set_base_shapes(
        model,
        Residual(BASE, peer.MuReadout),
        delta=Residual(2 * BASE, peer.MuReadout),
        rescale_params=False,
    )
    model.load_state_dict(start)
    make = {"adamw": peer.MuAdamW, "sgd": peer.MuSGD}[name]
    return model, train(model, make(model.parameters(), **settings), steps)


def by_grsd(
    start: dict[str, Tensor],
    width: int,
    name: str,
    settings: dict[str, Any],
    steps: int,
    without: str = "",
) -> tuple[nn.Module, list[float]]:
    model = Residual(width)
    model.load_state_dict(start)
    plan = mup.plan(model, base=Residual(BASE), optimizer=name)
    if without == "rates":
        plan = replace(plan, entries=tuple(replace(e, lr=1.0) for e in plan))
    if without != "multipliers":
        plan.attach(model)
    more = {name: {"momentum": settings["momentum"]}} if "momentum" in settings else None
    optimizer = plan.make_optimizer(
        model, lr=settings["lr"], weight_decay=settings["weight_decay"], options=more
    )
    return model, train(model, optimizer, steps)


def difference(a: nn.Module, b: nn.Module, start: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight over the largest change of one."""
    theirs = dict(b.named_parameters())
    gap = max(float((p - theirs[n]).detach().abs().max()) for n, p in a.named_parameters())
    return gap / max(float((p.detach() - start[n]).abs().max()) for n, p in a.named_parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 96, 256])
    parser.add_argument("--out", type=Path, help="folder of the stored result")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    every = {
        "adamw": {"lr": 0.01, "weight_decay": 0.1},
        "sgd": {"lr": 0.005, "weight_decay": 0.01, "momentum": 0.9},
    }
    rows = []
    for name, settings in every.items():
        for width in asked.widths:
            torch.manual_seed(0)
            model = Residual(width)
            mup.plan(model, base=Residual(BASE), optimizer=name).initialize_(model, seed=0)
            start = {n: p.detach().clone() for n, p in model.state_dict().items()}
            theirs, losses = by_peer(start, width, name, settings, asked.steps)
            row: dict[str, Any] = {
                "optimizer": name,
                "width": width,
                "first loss": losses[0],
                "last loss": losses[-1],
            }
            for key, without in (
                ("difference", ""),
                ("without rates", "rates"),
                ("without multipliers", "multipliers"),
            ):
                ours, mine = by_grsd(start, width, name, settings, asked.steps, without)
                row[key] = difference(theirs, ours, start)
                if not without:
                    row["loss difference"] = abs(mine[-1] - losses[-1])
            print(row)
            rows.append(row)
    for row in rows:
        assert row["difference"] < 1e-9, row  # thirty steps of rounding at 1e-16
        assert (
            row["width"] == BASE or min(row["without rates"], row["without multipliers"]) > 1e-3
        ), row
    if asked.out is not None:
        versions = {"mup": metadata.version("mup")}
        origin = results.provenance(
            ["make", "bench"],
            {"steps": asked.steps, "base": BASE, "depth": DEPTH, "compared": versions},
            [0],
        )
        results.save(results.Result(RESULT, {"rows": rows}, origin), asked.out)


if __name__ == "__main__":
    main()
