"""Batches of equal windows cut from one long array of tokens. A suite is keyed by this code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["batches", "count_windows"]

Tokens = np.ndarray[Any, np.dtype[Any]]


def count_windows(tokens: Tokens, length: int) -> int:
    """Number of disjoint windows of ``length`` tokens, each with the token that follows."""
    return max(0, (len(tokens) - 1) // length)


def batches(
    tokens: Tokens, count: int, batch_size: int, length: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets), int64 (batch_size, length) each, as `Corpus.batches`."""
    generator = np.random.default_rng(seed)
    available, span = count_windows(tokens, length), np.arange(length + 1)
    per_epoch = available // batch_size
    order = np.empty(0, dtype=np.int64)
    for index in range(count):
        turn = index % per_epoch
        if turn == 0:  # a new epoch visits all windows in an order of its own
            order = generator.permutation(available)
        starts = order[turn * batch_size : (turn + 1) * batch_size] * length
        block = torch.from_numpy(tokens[starts[:, None] + span].astype(np.int64))
        yield block[:, :-1].contiguous(), block[:, 1:].contiguous()
