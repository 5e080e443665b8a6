"""Learning-rate schedules that keep the ratios between the groups of a plan.

A schedule must multiply every group by one factor: `LambdaLR` and all that multiply do. Two of
torch's take absolute rates, and with one number for all groups they erase the ratios:
`OneCycleLR(max_lr=...)` (give it `relative(optimizer, peak)`) and `CosineAnnealingLR(eta_min=...)`
(use `LambdaLR` with `cosine`). `base_lr` refuses an optimizer whose groups have lost their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer


def relative(optimizer: Optimizer, lr: float) -> list[float]:
    """Return the rate of every group for the base rate `lr`: `OneCycleLR`'s ``max_lr``.

    Momentum is not part of a plan: `OneCycleLR` needs ``cycle_momentum=False`` with several
    optimizers combined.
    """
    return [lr * factor for factor in _factors(optimizer)]


def base_lr(optimizer: Optimizer) -> float:
    """Return the base model's rate that the groups' rates stand for; NaN when all are 0.

    Groups that disagree, to rounding, are refused: something set rates without their factors.
    """
    rates = [g["lr"] / f for g, f in zip(optimizer.param_groups, _factors(optimizer), strict=True)]
    low, high = min(rates), max(rates)
    if high - low > 1e-9 * high:  # a schedule multiplies and divides some thousand times
        worst = optimizer.param_groups[rates.index(high)]
        raise ValueError(
            f"the groups' learning rates stand for base rates between {low:.3g} and {high:.3g} "
            f"(role {worst['role']!r}): a schedule set them to absolute values; use LambdaLR with "
            "grsd.mup.schedules.cosine, or OneCycleLR with relative(optimizer, max_lr)"
        )
    return float(high) if high > 0 else math.nan


def cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """Return step → factor for `LambdaLR`: a linear warm-up from 1/warmup, then half a cosine.

    It ends at `floor`, a share of the peak and no absolute rate, which it keeps after `steps`.
    """
    if not 0 <= warmup < steps or not 0 <= floor <= 1:
        raise ValueError(
            f"need 0 ≤ warmup < steps and a floor in [0, 1], got {warmup}, {steps} and {floor}"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / (steps - warmup), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _factors(optimizer: Optimizer) -> list[float]:
    if any("mup_lr" not in g for g in optimizer.param_groups):
        raise ValueError(
            "a parameter group has no 'mup_lr': make the optimizer with Plan.make_optimizer or "
            "Plan.param_groups"
        )
    return [float(g["mup_lr"]) for g in optimizer.param_groups]
