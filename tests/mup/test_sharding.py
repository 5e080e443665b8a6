"""Two gloo processes: plan, initial values, steps, norms and checkpoints under FSDP2 and tensor parallel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SINGLE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def both(commands: list[list[str]], **environment: str) -> list[str]:
    """Run two commands at once; return what they print."""
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=SINGLE | environment,
        )
        for command in commands
    ]
    ended = [one.communicate() for one in running]
    for one, (_, errors) in zip(running, ended, strict=True):
        assert one.returncode == 0, errors[-2000:]
    return [out for out, _ in ended]


def test_sharded_models_are_planned_and_trained_as_the_whole(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("sharded_worker.py")
    both([[sys.executable, str(worker), str(rank), str(tmp_path)] for rank in (0, 1)])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8
    # the order of a sum over processes moves a gradient by some eps = 2e-16; Newton–Schulz carries that by
    # at most 3.4445⁵ = 485 in each of three steps, a fourth root near its floor by as much again
    bound = {name: 1e-10 if "shampoo" in name else 3 * 485 * 4 * 2.2e-16 for name in found}
    for name, gaps in found.items():
        assert gaps["another plan"] == gaps["initial values"] == 0.0, name
        assert gaps["after steps"] < bound[name] and gaps["norms"] < bound[name], (name, gaps)
        assert gaps["moved"] > 1e-3, name  # it trained
    resumed = {name: gaps["from a checkpoint"] for name, gaps in found.items() if len(gaps) > 5}
    assert resumed == {"fsdp muon_kimi": 0.0, "fsdp shampoo": 0.0}  # bit for bit


def script() -> str:
    """Return the page's script for a sharded run."""
    page = (ROOT / "book" / "mup" / "use-it.md").read_text()
    found = re.search(r"```py\n(# train_sharded\.py\n.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_pages_sharded_script_gives_the_losses_of_one_process(tmp_path: Path) -> None:
    """Run in two processes as torchrun does, and in one: the same batch, halved, has the same losses."""
    path = tmp_path / "train_sharded.py"
    path.write_text(script())
    losses = []
    for size in (1, 2):
        commands = [
            ["env", f"RANK={k}", f"LOCAL_RANK={k}", f"WORLD_SIZE={size}", sys.executable, str(path)]
            for k in range(size)
        ]
        out = both(commands, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29400 + os.getpid() % 500))
        losses.append([float(x) for x in re.findall(r"loss (\S+)", out[0])])
        assert "loss" not in "".join(out[1:])  # one process speaks
    assert len(losses[0]) >= 3 and losses[0][-1] < losses[0][0]
    # float32: a sum in another order, 1e-7, carried by Newton–Schulz (485) in every step
    torch.testing.assert_close(
        torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-7 * 485 * 10, atol=0
    )
