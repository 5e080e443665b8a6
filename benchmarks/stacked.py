"""Runs of one size as one program against the same runs one by one: 24 runs (three seeds, eight rates) of a residual net on digits, forty steps each.

    python benchmarks/stacked.py
    python benchmarks/stacked.py --out FOLDER       # and stores the result "stacked-runs"

Both routes are `grsd.mup.training.train`, in turn in one process; a ratio is that of two calls of one round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import arguments, interleaved, ratios
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from grsd import mup, results
from grsd.lab.data.images import digits
from grsd.lab.nets.architectures import res_mlp
from grsd.mup.training import train

RESULT = "stacked-runs"
STEPS, BATCH, F32 = 40, 64, torch.float32
RUNS = [(seed, 2.0**rate) for seed in range(3) for rate in range(-13, -5)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd", "muon_kimi"])
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data = digits(((0, 2, 4, 6, 8), (1, 3, 5, 7, 9)), samples=1600, seed=0)
    x, y = (t.float().to(asked.device) for t in (data.inputs.flatten(1), data.targets))

    def batch(seed: int, step: int) -> Sequence[Tensor]:
        chosen = torch.from_numpy(np.random.default_rng([seed, step]).choice(len(x), BATCH))
        return x[chosen], y[chosen]

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(model(inputs).flatten(), targets)

    def net(width: int) -> nn.Module:
        built = res_mlp(inputs=64, width=width, depth=2, activation="relu", seed=0, dtype=F32)
        return built.to(asked.device)

    rows = []
    for optimizer in asked.optimizers:
        for width in asked.widths:
            made = mup.plan(net(width), base=net(min(asked.widths)), optimizer=optimizer)
            ended: dict[str, list[float]] = {}

            def together(width: int = width, made: Any = made, ended: Any = ended) -> None:
                models = [net(width) for _ in RUNS]
                found = train(models, made, loss, batch, RUNS, steps=STEPS)
                ended["together"] = [value for value, _ in found]

            def singly(width: int = width, made: Any = made, ended: Any = ended) -> None:
                found = [
                    train([net(width)], made, loss, batch, [run], steps=STEPS)[0] for run in RUNS
                ]
                ended["singly"] = [value for value, _ in found]

            calls: list[tuple[str, Callable[[], None]]] = [
                ("together", together),
                ("singly", singly),
            ]
            seconds = interleaved(calls, asked.repeats, asked.device)
            gap = float(np.nanmax(np.abs(np.divide(ended["together"], ended["singly"]) - 1)))
            rows.append(
                {
                    "optimizer": optimizer,
                    "width": width,
                    "runs": len(RUNS),
                    "device": asked.device,
                    "load average": round(os.getloadavg()[0], 2),
                    "time one by one over together": ratios(seconds["singly"], seconds["together"]),
                    "largest difference of losses": gap,
                }
            )
            print(rows[-1], flush=True)
    if asked.out is not None:
        known = RESULT in results.available(asked.out)
        before = results.load(RESULT, asked.out).data["rows"] if known else []
        rest = [r for r in before if r["device"] != asked.device]
        origin = results.provenance(["make", "bench"], {"threads": asked.threads}, [0, 1, 2])
        results.save(results.Result(RESULT, {"rows": [*rest, *rows]}, origin), asked.out)


if __name__ == "__main__":
    main()
