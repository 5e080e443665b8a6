"""How much memory an operator takes: the peak of building it and of a product.

A peak is measured, not modelled: on a GPU by the allocator, on a CPU by following the storages that
operations make. That of one batch says how many batches may go in lock-step
(:mod:`grsd.spectrum.operator.batches`).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made under it: those alive (`now`), the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in _stored((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _stored(result):
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._seen or key in known or x.is_meta:
                continue
            self._seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._release, key, size)
        return result

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _stored(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree that have a storage; zeros of forward mode have none."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not x._is_zerotensor()]


def peak(function: Callable[[], object], device: torch.device | str) -> int:
    """Return the most bytes that `function()` holds at once beyond what was held before.

    Cost: one call; on a CPU some 10 µs more for every operation. What runs inside compiled code on
    a CPU is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    storages = Storages()
    with storages:
        function()
    return storages.most


def bytes_of(text: str) -> int:
    """Return the bytes that a size such as "512M", "4G", "1.5G" or "0" means (decimal units)."""
    size = re.fullmatch(r"(\d+\.?\d*|\.\d+)([KMGT]?)B?", text.strip().upper())
    if size is None:
        do = "write 512M or 4G (0 measures one batch at a time)"
        raise ValueError(f"{text!r} is not a size of memory; {do}")
    return int(float(size[1]) * _UNITS[size[2]])
