"""A 100-step shell profile of the largest mini net, in units of one forward plus backward of the same batch.

    python benchmarks/shell_profile.py            # needs the suite; `make bench` trains it

Goal of the project's second issue: under 160 (F+B) for mini-4.2m, T = 512 = 4 × 128, m = 100, set-up included.
The two engines and F+B are measured in turn, in one process, and the medians of the ratios are printed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from grsd.lab import corpora, hub, suites
from grsd.spectrum import NTK, LogShells, TokenLogProb, lanczos

STEPS, REPEATS, MODEL = 100, 3, "mini-4.2m"


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    corpus = corpora.of_suite(MODEL)
    suite = suites.locate(MODEL, corpus)
    if not suite.complete:
        sys.exit(f"{MODEL} is not trained yet; run: grsd suite --size {MODEL}")
    model = hub.load(suite.path(suite.revisions[-1])).model
    inputs, targets = next(iter(corpus.batches(1, 4, 128, 0, "heldout")))

    def forward_backward() -> None:
        for _ in range(5):
            logits = model(input_ids=inputs, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            model.zero_grad(set_to_none=True)

    def profile(method: Any) -> None:
        M = NTK(model, {"input_ids": inputs, "use_cache": False}, TokenLogProb(targets), method=method)
        measure = lanczos(M, M.error, STEPS).measure()
        measure.shells(LogShells.spanning(measure.nodes[0], measure.nodes[-1]))

    forward_backward()
    ratios: dict[str, list[float]] = {"factored": [], "graph": []}
    for _ in range(REPEATS):
        unit = timed(forward_backward) / 5
        for method, found in ratios.items():
            found.append(timed(lambda method=method: profile(method)) / unit)
    print(f"{MODEL}, T = 512, m = {STEPS}, {torch.get_num_threads()} threads")
    for method, found in ratios.items():
        print(f"{method:>10}: {statistics.median(found):6.1f} (F+B)   [{min(found):.1f}, {max(found):.1f}]")


if __name__ == "__main__":
    main()
