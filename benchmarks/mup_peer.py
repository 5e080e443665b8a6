"""`grsd.mup` against microsoft/mup on networks of growing width: the same training, to rounding.

    python benchmarks/mup_peer.py                      # prints
    python benchmarks/mup_peer.py --out FOLDER         # and stores the result "mup-peer"

mup is width-only and has Adam and SGD. The networks are a residual MLP with biases, and the kinds of mup's own repository as they are written there: an MLP and a
CNN in one Sequential, a ResNet of four stages, a Transformer. Each is trained by both from the same weights, in float64: by mup with its `MuReadout` and `MuAdamW`
or `MuSGD`, by `grsd.mup` on a plain `nn.Linear` head with a plan's multipliers and groups. Depth is that of the base, so that the plan
scales nothing with it. What is compared: the largest difference of any weight after training over the largest change. Two controls must differ: a plan without its
learning rates, and one without its multipliers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
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
    def __init__(self, width: int, head: type[nn.Linear]) -> None:
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


def mlp(width: int, head: type[nn.Linear]) -> nn.Module:
    """mup/test/models.py, with batch norms."""
    first, second = nn.Linear(5, width), nn.Linear(width, width)
    norms = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
    return nn.Sequential(
        first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), head(width, 3)
    ).double()


def cnn(width: int, head: type[nn.Linear]) -> nn.Module:
    """mup/test/models.py, on smaller images: widths n, 2n, then 16n and 10n."""
    n = width // 8
    return nn.Sequential(
        *(nn.Conv2d(3, n, 3), nn.ReLU(), nn.Conv2d(n, 2 * n, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(2 * n * 4, 16 * n), nn.ReLU(), nn.Linear(16 * n, 10 * n), nn.ReLU()),
        head(10 * n, 3),
    ).double()


class Stage(nn.Module):
    """A basic block of examples/ResNet, with its shortcut where the width or the size changes."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        changed = [nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Sequential(*(changed if stride > 1 or into != out else []))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """examples/ResNet with two blocks in each of three stages."""

    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        n = width // 8
        self.conv1, self.bn1 = nn.Conv2d(3, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)
        self.layer1 = nn.Sequential(Stage(n, n, 1), Stage(n, n, 1))
        self.layer2 = nn.Sequential(Stage(n, 2 * n, 2), Stage(2 * n, 2 * n, 1))
        self.layer3 = nn.Sequential(Stage(2 * n, 4 * n, 2), Stage(4 * n, 4 * n, 1))
        self.linear = head(4 * n, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.linear(self.layer3(self.layer2(self.layer1(h))).mean((2, 3)))
        return out


class Transformer(nn.Module):
    """examples/Transformer with heads of one dimension: an embedding, torch's encoder, a decoder."""

    def __init__(self, width: int, head: type[nn.Linear]) -> None:
        super().__init__()
        self.encoder = nn.Embedding(7, width)
        layer = nn.TransformerEncoderLayer(width, width // 16, 2 * width, 0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = head(width, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 3).long().clamp_max(6)
        out: Tensor = self.decoder(self.transformer_encoder(self.encoder(tokens)).mean(1))
        return out


IMAGE = (16, 3, 6, 6)
#: name → (width, class of the head) → net, and the shape of a batch
NETS: dict[str, tuple[Callable[[int, type[nn.Linear]], nn.Module], tuple[int, ...]]] = {
    "residual MLP": (Residual, (16, 5)),
    "MLP": (mlp, (16, 5)),
    "CNN": (cnn, IMAGE),
    "ResNet": (ResNet, IMAGE),
    "Transformer": (Transformer, (16, 5)),
}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...], steps: int
) -> list[float]:
    """Return the losses; the batch is fixed."""
    g = torch.Generator().manual_seed(1)
    x, y = (torch.randn(size, generator=g, dtype=torch.float64) for size in (shape, (16, 3)))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def by_peer(
    net: str, start: dict[str, Tensor], width: int, name: str, settings: dict[str, Any], steps: int
) -> tuple[nn.Module, list[float]]:
    build, shape = NETS[net]
    model = build(width, peer.MuReadout)
    base, delta = build(BASE, peer.MuReadout), build(2 * BASE, peer.MuReadout)
    peer.set_base_shapes(model, base, delta=delta, rescale_params=False)
    model.load_state_dict(start)
    make = {"adamw": peer.MuAdamW, "sgd": peer.MuSGD}[name]
    return model, train(model, make(model.parameters(), **settings), shape, steps)


def by_grsd(
    net: str,
    start: dict[str, Tensor],
    width: int,
    name: str,
    settings: dict[str, Any],
    steps: int,
    without: str = "",
) -> tuple[nn.Module, list[float]]:
    build, shape = NETS[net]
    model = build(width, nn.Linear)
    model.load_state_dict(start)
    plan = mup.plan(model, base=build(BASE, nn.Linear), optimizer=name)
    if without == "rates":
        plan = replace(plan, entries=tuple(replace(e, lr=1.0) for e in plan))
    if without != "multipliers":
        plan.attach(model)
    more = {name: {"momentum": settings["momentum"]}} if "momentum" in settings else None
    optimizer = plan.make_optimizer(
        model, lr=settings["lr"], weight_decay=settings["weight_decay"], options=more
    )
    return model, train(model, optimizer, shape, steps)


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
    for net, name, width in itertools.product(NETS, every, asked.widths):
        if width == BASE and net != "residual MLP":
            continue  # at one width nothing but a stack tells the roles
        torch.manual_seed(0)
        build, settings = NETS[net][0], every[name]
        model = build(width, nn.Linear)
        start = build(BASE, nn.Linear)
        mup.plan(model, base=start, optimizer=name).initialize_(model, seed=0)
        drawn = {n: p.detach().clone() for n, p in model.state_dict().items()}
        theirs, losses = by_peer(net, drawn, width, name, settings, asked.steps)
        row: dict[str, Any] = {
            "net": net,
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
            ours, mine = by_grsd(net, drawn, width, name, settings, asked.steps, without)
            row[key] = difference(theirs, ours, drawn)
            if not without:
                row["loss difference"] = abs(mine[-1] - losses[-1])
        print(row, flush=True)
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
