"""A product on a GPU as one launch: its kernels are captured once and replayed.

A product of a small model is a few hundred kernels of some microseconds each, so that issuing them takes longer than
running them. The kernels are the same for every vector, which is what a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def replayed(product: Product, example: Tensor) -> Product:
    """Return `product` captured for vectors like `example`; `product` itself on a CPU, or if it cannot be captured.

    Parameters
    ----------
    product
        A function of one tensor that always runs the same kernels. One that waits for the device (a boolean mask, `.item()`)
        cannot be captured.
    example
        A vector of the shape, dtype and device of all later ones.

    Notes
    -----
    Cost: three products to capture; the graph keeps one product's temporaries. Each call copies the vector in and the result
    out, so results of earlier calls stay as they were.
    """
    if example.device.type != "cuda":
        return product
    given = torch.zeros_like(example)
    try:
        side = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(
            side
        ):  # kernels are chosen and workspaces made before anything is captured
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
