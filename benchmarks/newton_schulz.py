"""One step of Muon on the hidden matrices of a transformer: batched over equal shapes against torch.optim.Muon's loop.

    python benchmarks/newton_schulz.py --width 256 --layers 12
    python benchmarks/newton_schulz.py --out FOLDER             # and stores the result "newton-schulz"

Routes in turn in one process: `grsd.mup.optimizers.Muon` (equal shapes together) in its own dtype and in bfloat16, the same optimizer given one matrix at a time, and
`torch.optim.Muon`, which iterates in bfloat16 on every device. A ratio is that of two calls of one round, and of two routes in one dtype. Launches are counted by torch.profiler: on a GPU its kernels, on a CPU the operations that compute (views and
allocations left out).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleaved, ratios
from torch import nn
from torch.profiler import ProfilerActivity, profile

from grsd import results
from grsd.mup.optimizers import Muon

RESULT = "newton-schulz"
FREE = (  # operations that move no data
    "view", "reshape", "as_strided", "transpose", "t", "mT", "adjoint", "matrix_H", "expand", "select", "slice", "unbind", "detach", "alias", "unsqueeze", "squeeze", "permute", "narrow",
    "empty", "empty_like", "empty_strided", "resize_", "result_type", "item", "is_nonzero", "_local_scalar_dense", "to", "lift_fresh", "numpy_T", "split", "unflatten", "flatten", "_unsafe_view",
)  # fmt: skip


def matrices(width: int, layers: int, device: str) -> list[nn.Parameter]:
    """Return the hidden matrices of a transformer with Q, K, V apart: four (n, n), (4n, n) and (n, 4n) for each layer."""
    g = torch.Generator().manual_seed(0)
    shapes = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * layers
    found = []
    for shape in shapes:
        p = nn.Parameter(torch.randn(*shape, generator=g).to(device))
        p.grad = torch.randn(*shape, generator=g).to(device)
        found.append(p)
    return found


def launches(call: Callable[[], Any], device: str) -> int:
    """Return how many kernels one call launches."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=activities) as found:
        call()
    if device != "cpu":
        return sum(
            e.count for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA
        )
    leaves = (
        e
        for e in found.events()
        if e.name.startswith("aten::")
        and not any(c.name.startswith("aten::") and _computes(c.name) for c in e.cpu_children)
    )
    return sum(_computes(e.name) for e in leaves)


def _computes(name: str) -> bool:
    return name.removeprefix("aten::") not in FREE


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shared = {"lr": 1e-3, "weight_decay": 0.0}
    one, half, apart, theirs = (matrices(asked.width, asked.layers, asked.device) for _ in range(4))
    together = Muon(one, scaling="kimi", **shared)
    coarse = Muon(half, scaling="kimi", dtype=torch.bfloat16, **shared)
    singles = [Muon([p], scaling="kimi", **shared) for p in apart]
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **shared)

    def loop() -> None:
        for optimizer in singles:
            optimizer.step()

    calls: dict[str, Callable[[], Any]] = {
        "batched": together.step,
        "batched, bfloat16": coarse.step,
        "one by one": loop,
        "torch.optim.Muon": torchs.step,
    }
    for call in calls.values():
        call()  # momentum buffers exist
    counts = {name: launches(call, asked.device) for name, call in calls.items()}
    seconds = interleaved([*calls.items()], asked.repeats, asked.device)
    row: dict[str, Any] = {
        "width": asked.width,
        "layers": asked.layers,
        "matrices": len(one),
        "device": asked.device,
        "launches": counts,
    }
    row["load average"] = [round(x, 2) for x in os.getloadavg()]
    like = {
        "one by one": "batched",
        "torch.optim.Muon": "batched, bfloat16",
    }  # a route and ours in its dtype
    row["launches saved"] = {name: counts[name] / counts[ours] for name, ours in like.items()}
    row["time over batched"] = {
        name: ratios(seconds[name], seconds[ours]) for name, ours in like.items()
    }
    row["time in bfloat16 over float32"] = ratios(seconds["batched, bfloat16"], seconds["batched"])
    gap = max(
        float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(one, apart, strict=True)
    )
    assert gap < 1e-5, gap  # the same steps
    print(row)
    if asked.out is not None:
        known = (
            results.load(RESULT, asked.out).data["rows"]
            if RESULT in results.available(asked.out)
            else []
        )
        rest = [
            r
            for r in known
            if (r["width"], r["layers"], r["device"])
            != (row["width"], row["layers"], row["device"])
        ]
        origin = results.provenance(["make", "bench"], {"threads": torch.get_num_threads()}, [0])
        results.save(results.Result(RESULT, {"rows": [*rest, row]}, origin), asked.out)


if __name__ == "__main__":
    main()
