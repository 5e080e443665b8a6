"""What processes that share one operator tell each other: rows, gradients, and failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


class Processes:
    """What is exchanged with the other processes of a group; alone, nothing is."""

    def __init__(self, asked: bool | distributed.ProcessGroup) -> None:
        self.group: distributed.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if asked is False:
            return
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: start with torchrun and call "
                "torch.distributed.init_process_group first, or leave out processes="
            )
        self.group = distributed.group.WORLD if asked is True else asked
        self.rank = distributed.get_rank(self.group)
        self.size = distributed.get_world_size(self.group)

    def everyone(self, local: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what every process says, in the order of their ranks."""
        said: list[dict[str, Any]] = [local] * self.size
        if self.group is not None:
            with _in_time():
                distributed.all_gather_object(said, local, group=self.group)
        return said

    def sum_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each of the tensors over all processes, in place."""
        with _in_time():
            pending = [distributed.all_reduce(x, group=self.group, async_op=True) for x in tensors]
            for work in pending:
                work.wait()

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the pieces of all processes, one after another; x is the one of this process."""
        if self.group is None:
            return x
        padded = x.new_zeros(max(counts))
        padded[: x.numel()] = x
        pieces = [torch.empty_like(padded) for _ in counts]
        with _in_time():
            distributed.all_gather(pieces, padded, group=self.group)
        return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


@contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "another process failed, or did not take part in this call in time "
            f"({str(error).splitlines()[0]})"
        ) from error


def refuse_disagreement(everyone: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError, in all processes alike, when one of them failed or has another model."""
    failed = [(k, one["failure"]) for k, one in enumerate(everyone) if one["failure"] is not None]
    if failed:
        raise RuntimeError(
            f"the operator could not be made in {len(failed)} of {len(everyone)} processes; "
            f"process {failed[0][0]}: {failed[0][1]}"
        )
    first = everyone[0]
    for k, one in enumerate(everyone):
        norms = zip(first["norms"], one["norms"], strict=False)
        # a norm may be NaN in all of them, of weights that no output depends on
        apart = any(not abs(a - b) <= 1e-6 * abs(a) and str(a) != str(b) for a, b in norms)
        if one["marks"] != first["marks"] or apart:
            raise RuntimeError(
                f"process {k} has other parameters than process 0; load the same checkpoint in "
                "all of them (random weights need one seed)"
            )
