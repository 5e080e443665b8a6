"""Learning-rate schedules that keep the ratios between the groups of a plan.

A schedule must multiply every group by one factor: `LambdaLR` and all that multiply do. Two of
torch's take absolute rates, and with one number for all groups they erase the ratios:
`OneCycleLR(max_lr=...)` (give it `relative(optimizer, peak)`) and `CosineAnnealingLR(eta_min=...)`
(use `LambdaLR` with `cosine`). `base_lr` refuses an optimizer whose groups have lost their ratios.

`Budget` carries the base's values to another batch size and another number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch.optim import Optimizer

from grsd import checks
from grsd.mup.registry import row


class Budget(NamedTuple):
    """Factors on base values at κ times the batch size and h times the number of tokens.

    Where noise rules the gradients, training is a diffusion whose time is the number of samples. It
    stays the same for SGD when η grows like κ (1706.02677; 2102.12470), and for updates that do not
    know the gradient's scale (Adam, signs, orthogonal ones) when η grows like √κ and ε, beside a
    gradient, falls like 1/√κ (2205.10287, for Adam and RMSProp; the same argument holds for any
    update of degree 0). Weights are an average over the last 1/(ηλ) steps; as a share of the run it
    stays when ηλ goes like κ/h (2405.13698). η itself is not changed with h: there is no theory,
    and fits of h^−0.32 (2409.19913) are for one family of models and schedules.
    """

    lr: float
    weight_decay: float  #: on λ, which is multiplied by η
    decay: float  #: on η λ, the decay of a step
    eps: float
    batch: float

    @classmethod
    def of(cls, optimizer: str, batch: float = 1.0, horizon: float = 1.0) -> Budget:
        """Return the factors of an optimizer of the tables, at κ = `batch` and h = `horizon`."""
        checks.positive("batch", batch)
        checks.positive("horizon", horizon)
        known = row(optimizer)
        rate = batch if known.kind == "gradient" else math.sqrt(batch)
        # ε is compared with an entry of the gradient's noise, or with its square
        eps = {"entry": batch**-0.5, "norm": batch**-0.5, "square": 1 / batch, None: 1.0}[known.eps]
        return cls(rate, batch / horizon / rate, batch / horizon, eps, batch)

    def beta(self, beta: float) -> float:
        """Return a coefficient of averages that reach back as many samples: 1 − κ (1 − β)."""
        found = 1 - self.batch * (1 - beta)
        if not 0 <= found < 1:
            raise ValueError(
                f"β = {beta:g} at {self.batch:g} times the batch would be {found:.3g}: the average "
                "reaches back less than one batch; keep it, or choose a smaller batch"
            )
        return found


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
