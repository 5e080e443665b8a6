"""Has a model changed? Seen without a copy of it, at about a thousandth of the cost of a product.

A fused optimizer, ``p.data`` and NumPy change parameters and bump no version. What they cannot hide
is another tensor in a module, another place in memory, and other numbers.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ENTRIES = 64  # of a tensor that are compared, or up to twice as many
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Watch:
    """The modules, parameters, and tensors that are no buffer, of a model as it is now.

    `check` compares which modules and parameters there are, and of every tensor the version, place
    and layout, and some 64 entries bit by bit, evenly spread over rows and columns. It misses a
    change of other entries that bumps no version: of few rows of a large table through ``.data``,
    never a step of a dense optimizer. Buffers are not watched: the operators hold copies of them.

    Cost: about 1 µs and 64 reads a tensor; on a GPU one wait for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._tensors: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            at = f"{name}." if name else ""
            self._tables += [(at, x, dict(x)) for x in (module._parameters, module._modules) if x]
            own = {**module._parameters, **vars(module)}
            self._tensors |= {f"{at}{k}": x for k, x in own.items() if isinstance(x, Tensor)}
        self._marks = [_mark(x) for x in self._tensors.values()]
        # views of some entries of all, by size and device, in one tensor each
        self._entries: dict[Any, dict[str, Tensor]] = {}
        for name, x in self._tensors.items():
            if x.layout == torch.strided and not x.is_meta and not _wraps(x):
                some = _some(x)
                self._entries.setdefault((some.dtype, some.device), {})[name] = some
        self._values = [torch.cat([*some.values()]) for some in self._entries.values()]

    def check(self) -> None:
        """Raise RuntimeError with the name of what has changed."""
        changed = self._changed()
        if changed is not None:
            raise RuntimeError(
                f"{changed!r} of the model was changed after this operator was made; make a new "
                "NTK after every training step (what a forward pass writes to should be a buffer)"
            )

    def _changed(self) -> str | None:
        for at, table, before in self._tables:
            if len(table) != len(before) or not all(
                map(is_, map(table.get, before), before.values())
            ):
                keys = {**before, **table}
                return at + next(k for k in keys if table.get(k) is not before.get(k))
        for (name, x), mark in zip(self._tensors.items(), self._marks, strict=True):
            if _mark(x) != mark:
                return name
        for some, values in zip(self._entries.values(), self._values, strict=True):
            if not torch.equal(torch.cat([*some.values()]), values):
                parts = torch.split(values, [len(x) for x in some.values()])
                return next(
                    name
                    for (name, x), before in zip(some.items(), parts, strict=True)
                    if not torch.equal(x, before)
                )
        return None


def _wraps(x: Any) -> bool:
    return is_traceable_wrapper_subclass(x)


def _mark(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.data_ptr(), x.shape, x.stride()


def _some(x: Tensor) -> Tensor:
    """Return a view of some entries of x as integers: NaN is equal to itself."""
    x = x.detach()
    x = torch.view_as_real(x) if x.is_complex() else x
    x = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    while x.ndim != 1:  # one entry of every row where no view has all entries in one axis
        x = x.view(-1) if x.is_contiguous() else x.select(-1, 0)
    return x.view(INTEGERS[x.element_size()])[:: len(x) // ENTRIES | 1]
