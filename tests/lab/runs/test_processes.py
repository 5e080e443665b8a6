"""A run shared by two processes under torchrun leaves the files of a run in one, and a failure stops both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from grsd.lab.checkpoints import suites
from grsd.lab.runs import RunSpec, shell_run
from grsd.lab.runs.processes import Ranks

ROOT = Path(__file__).parents[3]


def torchrun(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in two processes on the loopback interface."""
    program = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--local-addr",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "GRSD_CACHE": str(cache),
    }
    return subprocess.run(
        [*program, "127.0.0.1", "-m", "--", "grsd", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def spec_of(suite: suites.Suite, texts: Path) -> RunSpec:
    return RunSpec(
        str(suite.root),
        ("step0", "step5"),
        str(texts / "*.txt"),
        batches=3,
        batch_size=2,
        length=8,
        steps=6,
    )


def files(root: Path) -> dict[str, Any]:
    """Name → what is in the file, without when and where it was measured."""
    found = {}
    for path in sorted(root.glob("*.json")):
        record = json.loads(path.read_text())["content"]
        record.pop("provenance")
        found[path.name] = record
    return found


def test_two_processes_leave_the_files_of_one(
    suite: suites.Suite, texts: Path, tmp_path: Path
) -> None:
    spec = spec_of(suite, texts)
    alone = shell_run(spec, memory=0, cache=tmp_path / "alone")
    shared = torchrun(tmp_path / "shared", *spec.argv(), "--memory", "0", "--json")
    assert shared.returncode == 0, shared.stderr
    folder = tmp_path / "shared" / "runs"
    assert files(folder) == files(alone.root) and len(files(folder)) == 6
    data = json.loads(shared.stdout)  # one of them prints
    assert [p["revision"] for p in data["profiles"]] == ["step0", "step0", "step5", "step5"]
    assert data["profiles"][0]["loss"] == float(alone.losses("step0").mean())
    assert shared.stderr.count("one batch at a time") == 1
    # both had a part: the processes are named in the files
    who = {
        json.loads(p.read_text())["content"]["provenance"]["process"] for p in folder.glob("*.json")
    }
    assert who == {"0 of 2", "1 of 2"}


def test_a_failure_in_one_process_stops_both(
    texts: Path, tmp_path: Path, suite: suites.Suite
) -> None:
    spec = spec_of(suite, texts)
    refused = torchrun(tmp_path, *spec.argv(), "--revision", "step9")
    assert refused.returncode != 0 and "no revision 'step9'" in refused.stderr


def test_work_is_shared_in_stretches_without_loss() -> None:
    work = list(range(7))
    for size in (1, 2, 3, 9):
        parts = [list(Ranks(rank, size).share(work)) for rank in range(size)]
        assert [item for part in parts for item in part] == work
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert asdict(Ranks()) == {"rank": 0, "size": 1} and Ranks.join() == Ranks()
    assert Ranks().from_first(lambda: 3) == 3
    with pytest.raises(ValueError, match="as it is"):
        Ranks().from_first(lambda: (_ for _ in ()).throw(ValueError("as it is")))
