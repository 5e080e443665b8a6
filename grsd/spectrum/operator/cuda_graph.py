"""A product on a GPU as one launch: its kernels are captured once and replayed.

A product of a small model is a few hundred kernels of some microseconds each, which take longer to
issue than to run. They are the same for every vector, which is what a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def replayed(product: Product, example: Tensor) -> Product:
    """Return `product` captured for vectors like `example`; itself on a CPU, or if that fails.

    `product` must always run the same kernels: one that waits for the device (a boolean mask,
    `.item()`) cannot be captured. Cost: three products to capture; the graph keeps the temporaries
    of one. A call copies its vector in and its result out, so earlier results stay as they were.
    """
    if example.device.type != "cuda":
        return product
    given = torch.zeros_like(example)
    try:
        side = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(example.device))
        # kernels are chosen and workspaces made before anything is captured
        with torch.cuda.stream(side):
            for _ in range(2):
                product(given)
        torch.cuda.current_stream(example.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = product(given)
    except RuntimeError:
        torch.cuda.synchronize(example.device)
        return product

    def replay(u: Tensor) -> Tensor:
        given.copy_(u)
        graph.replay()
        return result.clone()

    return replay
