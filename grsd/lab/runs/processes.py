"""Processes that share the work of one run: `torchrun --nproc-per-node N -m -- grsd shells …`.

Without the `--`, torchrun takes the `--start` of `grsd shells` for one of its own options. Each
process measures its share of the batches and checkpoints and writes their files; what is found in
the cache, how much goes in one pass and who measures what is settled by the first one, before any
work. The folder of the cache must be the same for all of them. How several processes multiply by
one operator is in :mod:`grsd.spectrum.operator.shards`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
WAIT = timedelta(hours=24)  # for the slowest process; one that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run; `Ranks()` is a process of its own."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Join the processes of `torchrun` or of an initialised `torch.distributed`; else be alone.

        Each process takes the GPU of its local rank, where there is one.
        """
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
                return cls()
            if torch.cuda.is_available():
                local = int(os.environ.get("LOCAL_RANK", "0"))
                torch.cuda.set_device(local % torch.cuda.device_count())
            distributed.init_process_group("gloo", timeout=WAIT)
        return cls(distributed.get_rank(), distributed.get_world_size())

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make()` gives in the first process, or raise its failure, in all of them."""
        if self.size == 1:
            return make()
        box: list[object] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                box = [make(), None]
            except Exception as error:
                failure, box = error, [None, f"{type(error).__name__}: {error}"]
        self._sure(lambda: distributed.broadcast_object_list(box, src=0))
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise RuntimeError(f"the first process stopped: {box[1]}")
        return box[0]  # type: ignore[return-value]

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """Return this process's part: a stretch, so that few checkpoints are loaded twice."""
        count = len(work)
        return work[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def wait(self) -> None:
        """Wait until all processes are here; RuntimeError when one of them is gone."""
        if self.size > 1:
            self._sure(distributed.barrier)

    def _sure(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            who = f"process {self.rank} of {self.size} lost the others"
            why = f"one of them failed (see its own message) or did not arrive within {WAIT}"
            raise RuntimeError(f"{who}: {why}") from error
