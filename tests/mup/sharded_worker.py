"""One of two processes: plans of models under FSDP2 and tensor parallel, against the whole model.

Run by `test_sharding.py` with the arguments RANK FOLDER; rank 0 writes what differs, as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from grsd import mup
from grsd.mup.sharding import whole

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
OPTIMIZERS = ("muon_kimi", "normuon", "shampoo", "sso", "adamw", "sgd")
TOKENS = torch.arange(16).reshape(4, 4) * 7 % 11


class Block(nn.Module):
    """A gated branch whose first matrix holds two, behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.branch_end = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        out: Tensor = h + self.branch_end(torch.tanh(self.up(x)) * self.gate(x))
        return out


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 1) % 11)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()


def apart(model: nn.Module, reference: nn.Module) -> float:
    """Return the largest difference of any entry; every process must call it."""
    other = dict(reference.named_parameters())
    gaps = [
        (whole(p.detach()) - other[n].detach()).abs().max() for n, p in model.named_parameters()
    ]
    return float(torch.stack(gaps).max())


def sharded(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def parallel(model: Net) -> Net:
    mesh = init_device_mesh("cpu", (2,))
    split: Any = {
        "up": ColwiseParallel(),
        "gate": ColwiseParallel(),
        "branch_end": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, split)
    return model


def compare(kind: str, name: str) -> dict[str, float]:
    """Train the whole and the sharded model; return by how much they differ."""
    torch.manual_seed(0)
    base, reference = Net(8, 2).double(), Net(16, 4).double()
    plan = mup.plan(reference, base=base, optimizer=name)
    torch.manual_seed(5)  # other weights: initialize_ has to put the plan's there
    model = (sharded if kind == "fsdp" else parallel)(Net(16, 4).double())
    found = {"another plan": float(mup.plan(model, base=base, optimizer=name) != plan)}
    made: list[Any] = []
    for net, ids in (
        (reference, TOKENS),
        (model, TOKENS[2 * RANK :][:2] if kind == "fsdp" else TOKENS),
    ):
        plan.initialize_(net, seed=3)
        plan.attach(net)
        optimizer = plan.make_optimizer(net, lr=0.02, weight_decay=0.1)
        made.append((net, optimizer, ids, mup.monitor(plan, net, optimizer, every=1, log=None)))
    found["initial values"] = apart(model, reference)
    start = copy.deepcopy(reference)
    for net, optimizer, ids, _ in made:
        advance(net, optimizer, ids, 3)
    found |= {"after steps": apart(model, reference), "moved": apart(reference, start)}
    norms = [watch.norms[2] for *_, watch in made]
    found["norms"] = max(
        abs(a - b) for n in norms[0] for a, b in zip(norms[0][n], norms[1][n], strict=True)
    )
    if kind == "fsdp" and name in ("muon_kimi", "shampoo"):
        found["from a checkpoint"] = resumed(plan, made[1])
    return found


def resumed(plan: mup.Plan, made: Any) -> float:
    """Save model and optimizer with torch.distributed.checkpoint, load them into fresh ones, and
    return how far apart another step takes the two."""
    model, optimizer, ids, _ = made
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    place = str(FOLDER / f"checkpoint-{next(e.optimizer for e in plan if e.role == 'hidden')}")
    checkpoint.save(state, checkpoint_id=place)
    torch.manual_seed(9)
    again = sharded(Net(16, 4).double())
    plan.attach(again)
    other = plan.make_optimizer(again, lr=0.5)  # the saved rates take the place of this one
    empty = dict(zip(("model", "optimizer"), get_state_dict(again, other), strict=True))
    checkpoint.load(empty, checkpoint_id=place)
    set_state_dict(
        again, other, model_state_dict=empty["model"], optim_state_dict=empty["optimizer"]
    )
    for net, opt in ((model, optimizer), (again, other)):
        advance(net, opt, ids, 1)
    twin = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return max(
        float((whole(p.detach()) - twin[n]).abs().max()) for n, p in again.named_parameters()
    )


def main() -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=2
    )
    torch.set_num_threads(1)
    found = {
        f"{kind} {name}": compare(kind, name)
        for kind in ("fsdp", "tensor parallel")
        for name in (OPTIMIZERS if kind == "fsdp" else OPTIMIZERS[:1] + OPTIMIZERS[4:5])
    }
    if RANK == 0:
        (FOLDER / "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
