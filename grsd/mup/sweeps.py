"""Sweeps of learning rate and weight decay over sizes and seeds, kept run by run.

What is read off them (`optimum`, `drift`, `regret`) is in `grsd.mup.optima`, which reads a
published table as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grsd import checks
from grsd.figures import Table
from grsd.mup.combined import backward
from grsd.mup.optima import Array, Drift, Optimum, Regret, drift, optimum, regret
from grsd.mup.planning import Plan, plan, unscaled
from grsd.pieces import Store, code

Size = tuple[int, int]
Loss = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True)
class Sweep:
    """What a sweep gave; NaN is a run that diverged, and masked is one that was not made."""

    sizes: tuple[Size, ...]  #: (width, depth) of each
    log2_lr: Array  #: (G,), sorted base rates
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: Any  #: masked array (sizes, weight decays, seeds, G)

    def curve(self, size: Size, weight_decay: float | None = None) -> Any:
        """Return the losses (seeds, G) of one size and, of several, one weight decay."""
        if weight_decay is None and len(self.weight_decays) == 1:
            (weight_decay,) = self.weight_decays
        if size not in self.sizes or weight_decay not in self.weight_decays:
            raise ValueError(
                f"the sweep has sizes {self.sizes} and weight decays {self.weight_decays}, not "
                f"{size}, {weight_decay}"
            )
        return self.losses[self.sizes.index(size), self.weight_decays.index(weight_decay)]

    def optima(self, weight_decay: float | None = None, **more: Any) -> list[Optimum]:
        """Return the best rate of every size; further arguments as `optimum`."""
        curves = (self.curve(size, weight_decay) for size in self.sizes)
        return [optimum(self.log2_lr, curve, **more) for curve in curves]

    def drift(
        self, axis: Literal["width", "depth"], weight_decay: float | None = None, **more: Any
    ) -> Drift:
        """Return the drift along one axis, the other being fixed; more as `optimum`."""
        if len({size[axis == "width"] for size in self.sizes}) > 1:
            raise ValueError(
                f"the sizes {self.sizes} differ along both axes; a drift along {axis} needs the "
                "other fixed"
            )
        sizes = [size[axis == "depth"] for size in self.sizes]
        return drift(sizes, self.optima(weight_decay, **more))

    def regret(self, weight_decay: float | None = None, **more: Any) -> Regret:
        """Return what every size pays for the best rate of the first; more as `optima.regret`."""
        curves = np.ma.stack([self.curve(size, weight_decay) for size in self.sizes])
        return regret(self.log2_lr, curves, **more)

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = []
        for decay in self.weight_decays:
            best, cost = self.optima(decay), self.regret(decay)
            for size, o, r in zip(self.sizes, best, cost.values, strict=True):
                rows.append((*size, f"{decay:g}", o, f"{o.loss:.4g}", f"{r:.3g}"))
        return str(Table(["width", "depth", "λ", "log₂ η∗", "loss", "regret"], rows))


def train(
    model: nn.Module,
    made: Plan,
    loss: Loss,
    *,
    seed: int,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    clip: float | None = None,
    **options: Any,
) -> tuple[float, int]:
    """Draw the weights, train under a plan, return (loss, steps made); NaN if the run diverged.

    torch's generators are seeded with `seed` for the run and put back after it.

    Parameters
    ----------
    loss : (model, seed, step) → scalar. The same seed and step must give the same batch.
    schedule : step → factor on all rates, such as `grsd.mup.schedules.cosine`
    score : model → number to be compared, called once at the end without gradients; by default the
        mean training loss of the last quarter of the steps
    clip : largest norm of the gradient
    options : as `Plan.make_optimizer`
    """
    seen: list[float] = []
    with torch.random.fork_rng(), ExitStack() as hooks:
        torch.manual_seed(seed)
        try:
            made.initialize_(model, seed=seed)
            for handle in made.attach(model):
                hooks.callback(handle.remove)
            optimizer = made.make_optimizer(model, lr=lr, weight_decay=weight_decay, **options)
            rates = [group["lr"] for group in optimizer.param_groups]
            for step in range(steps):
                # every group by one factor: a schedule keeps the plan's ratios
                factor = 1.0 if schedule is None else schedule(step)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                optimizer.zero_grad()
                now = loss(model, seed, step)
                seen.append(float(now.detach()))
                if not math.isfinite(seen[-1]):
                    return math.nan, step
                backward(now, optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            # the number that is compared
            last = max(1, steps // 4)
            with torch.no_grad():
                value = float(score(model)) if score else math.fsum(seen[-last:]) / last
            return (value if math.isfinite(value) else math.nan), steps
        # a decomposition met infinite entries
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return math.nan, len(seen)


def sweep(
    factory: Callable[[int, int], nn.Module],
    loss: Loss,
    *,
    sizes: Sequence[Size],
    base: Size,
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    optimizer: str,
    weight_decays: Sequence[float] = (0.0,),
    parametrization: Literal["mup", "sp"] = "mup",
    make_plan: Callable[[nn.Module, nn.Module], Plan] | None = None,
    near: int | None = None,
    store: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    other: str = "adamw",
    k: int = 2,
    **more: Any,
) -> Sweep:
    """Train every size at every rate, weight decay and seed, one run each; keep what it gave.

    Parameters
    ----------
    factory, other, k : as in `coord_check`
    loss, steps, and `more` : as `train`
    base : the size whose hyperparameters `lrs` and `weight_decays` are
    parametrization : "mup", or "sp": the base's standard deviations and one rate for all
        (`unscaled`), the paper's SP
    make_plan : (model, base model) → Plan, in place of both: for a rule of your own
    near : run the seeds after the first only up to so many grid steps from the best rate of the
        seeds before, further where a seed's own best rate would else stand at the end of what it
        ran. None runs all.
    store : a folder. Every finished run is kept there at once (`grsd.pieces`), and runs found there
        are not made again, so that a sweep that was killed goes on where it was. A run is known by
        its plan, its settings and the code of this module; what `loss`, `score` and `schedule` do
        cannot be seen: take a new folder when they change.
    progress : called with a description of every run that was made
    """
    checks.one_of("parametrization", parametrization, ("mup", "sp"))
    checks.positive("lrs", lrs)
    checks.whole("steps", steps, 1)
    if near is not None:
        checks.whole("near", near, 1)
    lists = {"sizes": sizes, "lrs": lrs, "seeds": seeds, "weight_decays": weight_decays}
    for name, given in lists.items():
        if not len(given) or len(set(given)) < len(given):
            raise ValueError(f"need {name}, each given once; got {given}")
    start = _built(factory, base)
    who: dict[str, Any] = {"optimizer": optimizer, "other": other, "k": k}
    kept = None if store is None else Store(Path(store), code(__name__))

    def run(size: Size, decay: float, seed: int, lr: float) -> float:
        """Make one run, or find it in the store."""
        model = _built(factory, size)
        made = make_plan(model, start) if make_plan else plan(model, base=start, **who)
        if parametrization == "sp" and not make_plan:
            made = unscaled(made)
        # what a run is known by in the store
        inputs = {
            "optimizer": optimizer,
            "parametrization": parametrization,
            "size": list(size),
            "lr": float(lr),
            "weight decay": float(decay),
            "seed": int(seed),
            "steps": steps,
            "plan": _digest(made, more),
        }

        def make() -> dict[str, Any]:
            value, done = train(
                model, made, loss, seed=seed, steps=steps, lr=lr, weight_decay=decay, **more
            )
            return {"loss": None if math.isnan(value) else value, "steps": done}

        content = None if kept is None else kept.read(inputs)
        if content is None:
            content = make() if kept is None else kept.get(inputs, make)
            if progress is not None:
                progress(", ".join(f"{name} {value}" for name, value in inputs.items()))
        return math.nan if content["loss"] is None else float(content["loss"])

    # every size and weight decay; masked is what was not run
    rates, decays = sorted(lrs), tuple(weight_decays)
    shape = (len(sizes), len(decays), len(seeds), len(rates))
    losses = np.ma.masked_array(np.full(shape, math.nan), mask=True)
    for a, size in enumerate(sizes):
        for b, decay in enumerate(decays):
            for c, seed in enumerate(seeds):
                # one run at a time: which rates a seed needs depends on what it gave so far
                while todo := _wanted(losses[a, b], c, near):
                    losses[a, b, c, todo[0]] = run(size, decay, seed, rates[todo[0]])
    return Sweep(tuple(sizes), np.log2(rates), decays, tuple(seeds), losses)


def _built(factory: Callable[[int, int], nn.Module], size: Size) -> nn.Module:
    """Return a model whose constructor draws the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory(*size)


def _digest(made: Plan, more: dict[str, Any]) -> str:
    """Return what a plan and the arguments of `train` that are no functions are, in short."""
    plain = sorted((name, value) for name, value in more.items() if not callable(value))
    return hashlib.sha256(repr((made, plain)).encode()).hexdigest()[:12]


def _wanted(losses: Any, seed: int, near: int | None) -> list[int]:
    """Return the rates to be run: all of the first seed, near the best, bracketing its own."""
    missing = [int(g) for g in np.flatnonzero(np.ma.getmaskarray(losses)[seed])]
    if near is None or seed == 0:
        return missing
    best, own = _lowest(losses[:seed]), _lowest(losses[seed : seed + 1])
    if best is None:
        return missing
    return [g for g in missing if abs(g - best) <= near or (own is not None and abs(g - own) == 1)]


def _lowest(rows: Any) -> int | None:
    """Return the rate of the smallest mean loss, over the runs that did not diverge."""
    means = np.ma.masked_invalid(rows).mean(axis=0).filled(np.inf)
    return int(np.argmin(means)) if np.isfinite(means).any() else None
