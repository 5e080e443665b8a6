"""The loss of every token as one operation, so that set-up reads the logits twice and makes one other matrix of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grsd.spectrum.programs.record import current

BLOCK = 2**21  # elements that are worked on at once: a few MB, which stay in a cache


class CrossEntropy(torch.autograd.Function):
    """−log q(y_i) of logits (T, V) and targets (T,), the same numbers as `torch.nn.functional.cross_entropy`.

    The gradient is Γ u with the fixed rows Γ_i = q_i − onehot(y_i). A tape records it as such; nothing of size T × V is
    kept but the logits themselves.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        found = [
            torch.log_softmax(logits[k], 1).gather(1, target[k, None])[:, 0]
            for k in _blocks(logits)
        ]
        result = -torch.cat(found)
        ctx.save_for_backward(logits, target, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, target, loss = ctx.saved_tensors
        at = target[:, None]
        shift = logits.gather(1, at) + loss[:, None]  # log Σ exp
        gamma = torch.empty_like(logits)
        for k in _blocks(logits):
            torch.sub(logits[k], shift[k], out=gamma[k]).exp_()
        gamma.scatter_add_(1, at, gamma.new_full((1, 1), -1).expand(len(at), 1))
        tape = current()
        return (
            gamma.mul_(g[:, None]) if tape is None or tape.slot(g) is None else tape.fixed(g, gamma)
        ), None


def _blocks(logits: Tensor) -> list[slice]:
    step = max(1, BLOCK // max(1, logits.shape[1]))
    return [slice(k, k + step) for k in range(0, len(logits), step)]
