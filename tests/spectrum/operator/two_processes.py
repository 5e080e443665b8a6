"""What each of two processes does in the tests of `shards`: run as a program with rank, size, rendezvous file, output file."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from grsd.spectrum import NTKShards, Outputs, lanczos, micro_batches
from tests.cases import CASES

SILENCE = 3.0  # seconds until a process that does not arrive is given up


def failure(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, size: int, meeting: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    for name in CASES:
        model, x, observable = CASES[name]()
        pieces = micro_batches(x, observable, 2)[rank]  # 3 and 4 of the 7 images: unequal shards
        M = NTKShards(model, micro_batches(*pieces, 1), processes=True)
        u = torch.randn(M.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tri = lanczos(M, u, 6)
        found[name] = {
            "product": M @ u,
            "block": M @ torch.stack([u, -u], 1),
            "error": M.error,
            "outputs": M.outputs,
        }
        found[name] |= {
            "alphas": tri.alphas,
            "betas": tri.betas,
            "mass": tri.mass,
            "shape": M.shape,
            "local": M.local,
        }
        found[name] |= {"weight": M.inner_weight, "plan": str(M.plan())}

    # a layer that only one of the processes uses
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) if float(x[0, 0]) > 0 else self.second(x)

    torch.manual_seed(2)
    model, x = Either().double(), torch.randn(6, 3, dtype=torch.float64).abs()
    sign = 1.0 if rank == 0 else -1.0
    found["x"] = x
    found["either"] = NTKShards(
        model, [(sign * x, Outputs())], processes=True, normalize="sum"
    ).to_dense()

    # failures that all processes hear of, after which they can go on
    broken = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1 if rank else 0.0)).double()
    found["one fails"] = failure(lambda: NTKShards(broken, [(x, Outputs())], processes=True))
    found["no parts"] = failure(
        lambda: NTKShards(model, [(x, Outputs())] if rank else [], processes=True)
    )
    torch.manual_seed(rank)
    found["other weights"] = failure(
        lambda: NTKShards(nn.Linear(3, 1).double(), [(x, Outputs())], processes=True)
    )

    # a process that does not arrive, and one that dies
    torch.manual_seed(2)
    few = distributed.new_group(timeout=timedelta(seconds=SILENCE))
    assert isinstance(few, distributed.ProcessGroup)
    ones = torch.ones(12, dtype=torch.float64)
    apart = NTKShards(nn.Linear(3, 1).double(), [(x, Outputs())], processes=few)
    whole = NTKShards(nn.Linear(3, 1).double(), [(x, Outputs())], processes=True)
    if rank == 0:
        begun = time.monotonic()
        found["silent"] = failure(lambda: apart @ ones), time.monotonic() - begun
    distributed.barrier()
    if rank == 1:
        torch.save(found, output)
        os._exit(1)
    begun = time.monotonic()
    found["dead"] = failure(lambda: whole @ ones), time.monotonic() - begun
    torch.save(found, output)
    os._exit(0)  # the group is broken, and would be waited for


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
