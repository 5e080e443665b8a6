"""Tensors that are spread over processes: FSDP2's and tensor parallel's `DTensor`.

What is entrywise (momentum, AdamW, decay) torch does on the shards. What needs the whole matrix,
such as an orthogonal factor or a norm, is computed on the gathered one, by every process alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(x: Tensor) -> Tensor:
    """Return a tensor's global value: itself, or the gathered one (all processes must call)."""
    gather: Any = getattr(x, "full_tensor", None)
    value: Tensor = x if gather is None else gather()
    return value


def put(x: Tensor, value: Tensor) -> None:
    """Copy a global value, the same on every process, into a tensor, without communication."""
    if mesh_of(x) is None:
        if x is not value:
            x.copy_(value)
        return
    # imported where a model is sharded: torch.distributed may be absent
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = x
    own = value.to(device=sharded.to_local().device, dtype=x.dtype)
    mesh, placements = sharded.device_mesh, sharded.placements
    x.copy_(distribute_tensor(own, mesh, placements, src_data_rank=None))


def mesh_of(x: Tensor) -> Any:
    """Return the mesh of processes that a tensor is spread over, None for one that is not."""
    return getattr(x, "device_mesh", None)


def drawable(x: Tensor) -> Tensor:
    """Return a tensor of the global shape to be filled: x itself, or a buffer for `put`."""
    if mesh_of(x) is None:
        return x
    local: Any = x
    return torch.empty(x.shape, dtype=x.dtype, device=local.to_local().device)
