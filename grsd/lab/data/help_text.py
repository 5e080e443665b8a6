"""The help text of Python 3.11.7, byte by byte: language for small models, with no download."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grsd.lab.data import library

VOCABULARY = 128  # bytes of ASCII
BLOCK = 2048


@dataclass(frozen=True)
class Text:
    """Ids of a text, `split` into blocks of which every tenth is held out."""

    train: Tensor  #: (N,), int64
    heldout: Tensor  #: the same
    vocabulary: int
    fingerprint: str  #: SHA-256 of the whole

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, (size, length) each, that depend on seed and step alone."""
        starts = np.random.default_rng([seed, step]).integers(0, len(self.train) - length - 1, size)
        block = self.train[torch.from_numpy(starts)[:, None] + torch.arange(length + 1)]
        return block[:, :-1], block[:, 1:]

    def test(self, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Return `size` windows spread over the held-out part, always the same."""
        starts = torch.linspace(0, len(self.heldout) - length - 1, size).long()
        block = self.heldout[starts[:, None] + torch.arange(length + 1)]
        return block[:, :-1], block[:, 1:]


def split(ids: Tensor, vocabulary: int, fingerprint: str) -> Text:
    """Hold out every tenth block of 2048 ids, so that both parts hold the same mixture."""
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    held = torch.arange(len(blocks)) % 10 == 9
    return Text(blocks[~held].flatten(), blocks[held].flatten(), vocabulary, fingerprint)


@lru_cache(maxsize=1)
def text() -> Text:
    """Return the help text as bytes below 128, the same whatever Python runs."""
    raw = library.files()["pydoc_data/topics.py"]
    ids = torch.tensor([b for b in raw if b < VOCABULARY], dtype=torch.int64)
    return split(ids, VOCABULARY, hashlib.sha256(raw).hexdigest())


def next_byte(batch_size: int, length: int, seed: int = 0) -> Callable[[nn.Module], Tensor]:
    """Return model → mean cross-entropy of the next byte on one fixed batch of the text."""
    inputs, targets = text().batch(seed, 0, batch_size, length)

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())

    return loss
