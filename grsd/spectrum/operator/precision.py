"""The arithmetic of a product: in which precision a pass ran, and the unit of rounding of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
# what float32 may be rounded to inside a product of matrices, or a convolution
INSIDE = {"tf32": 2.0**-11, "bf16": torch.finfo(torch.bfloat16).eps}


def mixed() -> Callable[[], AbstractContextManager[Any]]:
    """Return the autocast of this moment, as a context to enter again; nothing is cached in it."""
    kinds = [
        (device, torch.get_autocast_dtype(device))
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    ]

    @contextmanager
    def again() -> Iterator[None]:
        with unmixed(), ExitStack() as stack:
            for device, dtype in kinds:
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            yield

    return again


@contextmanager
def unmixed() -> Iterator[None]:
    """Leave autocast out: derivatives are taken in the types of the pass that they belong to."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def rounding(dtypes: set[torch.dtype], convolves: bool, device: torch.device) -> float:
    """Return the unit of the coarsest of these types, as the settings of this moment have them.

    float32 counts as TF32 or bfloat16 where PyTorch may round to these inside (by
    `torch.set_float32_matmul_precision` or ``fp32_precision``; convolutions on a GPU do by
    default). Sums of half precision may be kept in half precision; that is the same unit.
    """
    units = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.float32 in dtypes or torch.complex64 in dtypes:
        units += [INSIDE.get(name, 0.0) for name in _inside(device.type == "cuda", convolves)]
    return max(units)


def _inside(gpu: bool, convolves: bool) -> list[str]:
    """Return what float32 may be inside matrix products and convolutions."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # from torch 2.9 on, whichever way it was set
        of = (backends.cuda.matmul, backends.cudnn.conv)
        of = of if gpu else (backends.mkldnn.matmul, backends.mkldnn.conv)
        return [kind.fp32_precision for kind in of[: 1 + convolves]]
    if gpu:
        flags = (backends.cuda.matmul.allow_tf32, convolves and backends.cudnn.allow_tf32)
        return ["tf32"] * any(flags)
    return ["bf16"] * (torch.get_float32_matmul_precision() == "medium")


def of_graph(results: Sequence[Tensor]) -> tuple[set[torch.dtype], bool]:
    """Return the types of all values in the graph of `results`, and whether one is a convolution.

    What enters as a constant is left out: its rounding is that of the function, not of a product.
    """
    dtypes: set[torch.dtype] = set()
    convolves = False
    left: list[Any] = [x.grad_fn for x in results if x.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        dtypes |= {kind.dtype for kind in node._input_metadata if kind.dtype is not None}
        convolves = convolves or "Convolution" in node.name()
        new = {other for other, _ in node.next_functions if other is not None} - seen
        seen |= new
        left += new
    return {x for x in dtypes if x.is_floating_point or x.is_complex}, convolves
