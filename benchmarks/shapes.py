"""M u, set-up and a 100-step profile on the Pythia shapes with random weights, in units of one forward plus backward.

    python benchmarks/shapes.py --device cuda --tf32 --shapes 70m 410m 1.4b 6.9b --out grsd/data/results
    python benchmarks/shapes.py --shapes tiny                       # the same road at small size, on a CPU

Every row is measured in one process: F+B, set-up, product and Lanczos of the same model on the same batch of 4 × 128
tokens. Absolute times are written for GPUs only. The README's rows are "not measured" until a run with --out fills them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, build

from grsd import results
from grsd.experiments.benchmark_tables import RESULT_GPU
from grsd.spectrum import NTK, TokenLogProb, lanczos


def median_time(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the median seconds of `work` after two calls that are not counted."""
    times = []
    for k in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if k >= 2:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(name: str, device: str, tf32: bool, steps: int, check: bool) -> dict[str, Any]:
    """Return the row of one shape."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    model, inputs, targets = build(name, 4, 128, torch.float32, device)

    def forward_backward() -> None:
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        model.zero_grad(set_to_none=True)

    unit = median_time(forward_backward, device, 5)
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def make() -> NTK:
        return NTK(model, {"input_ids": inputs, "use_cache": False}, TokenLogProb(targets))

    setup = median_time(make, device, 1)
    M = make()
    u = M.error
    product = median_time(lambda: M @ u, device, 20)
    profile = median_time(lambda: lanczos(M, u, steps), device, 1)
    row: dict[str, Any] = {
        "shape": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tf32": tf32,
        "setup / (F+B)": setup / unit,
        "M u / (F+B)": product / unit,
        f"{steps} steps / (F+B)": profile / unit,
        "method": M.method,
        "captured": device == "cuda" and M._product is not M._factored,
        "plan_gflop": M.plan().flops / 1e9,
    }
    if device == "cuda":
        row |= {
            "F+B (ms)": 1e3 * unit,
            "setup (ms)": 1e3 * setup,
            "M u (ms)": 1e3 * product,
            f"{steps} steps (s)": profile,
            "50 batches (s)": 50 * (setup + profile),
            "TFLOP/s": M.plan().flops / product / 1e12,
            "peak beyond weights (MB)": (torch.cuda.max_memory_allocated() - held) / 1e6,
        }
    if check:
        plain = NTK(
            model, {"input_ids": inputs, "use_cache": False}, TokenLogProb(targets), method="graph"
        )
        truth = plain @ u
        row["graph M u / (F+B)"] = median_time(lambda: plain @ u, device, 5) / unit
        row["relative difference"] = float(
            torch.linalg.norm(M @ u - truth) / torch.linalg.norm(truth)
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["70m"], choices=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tf32", action="store_true", help="also measure with TF32 products")
    parser.add_argument(
        "--check", nargs="*", default=["tiny", "70m"], help="shapes compared with the plain form"
    )
    parser.add_argument("--out", type=Path, help="folder of the stored result")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in asked.shapes:
        for tf32 in (False, True) if asked.tf32 else (False,):
            try:
                rows.append(measure(name, asked.device, tf32, asked.steps, name in asked.check))
            except torch.OutOfMemoryError as failure:
                rows.append(
                    {"shape": name, "tf32": tf32, "not measured": str(failure).splitlines()[0]}
                )
            gc.collect()
            if asked.device == "cuda":
                torch.cuda.empty_cache()
            print(
                *(
                    f"{k}: {v:.4g}" if isinstance(v, float) else f"{k}: {v}"
                    for k, v in rows[-1].items()
                ),
                sep=" | ",
                flush=True,
            )
            if asked.out is not None:
                origin = results.provenance(
                    ["make", "bench-gpu"], {"steps": asked.steps, "batch": [4, 128]}, [0, 1]
                )
                results.save(results.Result(RESULT_GPU, {"rows": rows}, origin), asked.out)


if __name__ == "__main__":
    main()
