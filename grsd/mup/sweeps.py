"""Sweeps of learning rate and weight decay over sizes and seeds, kept run by run.

What is read off them (`optimum`, `drift`, `regret`) is in `grsd.mup.optima`, which reads a
published table as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from grsd import checks
from grsd.figures import Table
from grsd.mup.optima import Array, Drift, Optimum, Regret, drift, optimum, regret
from grsd.mup.planning import Plan, plan, unscaled
from grsd.mup.training import Batch, Loss, train
from grsd.pieces import Store, code

Size = tuple[int, int]


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


def sweep(
    factory: Callable[[int, int], nn.Module],
    loss: Loss,
    batch: Batch,
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
    stack: int = 1,
    **more: Any,
) -> Sweep:
    """Train every size at every rate, weight decay and seed, and keep what each run gave.

    Parameters
    ----------
    factory, other, k : as in `coord_check`
    loss, batch, steps, and `more` : as `grsd.mup.training.train`
    base : the size whose hyperparameters `lrs` and `weight_decays` are
    parametrization : "mup", or "sp": the base's standard deviations and one rate for all
        (`unscaled`), the paper's SP
    make_plan : (model, base model) → Plan, in place of both: for a rule of your own
    near : run the seeds after the first only up to so many grid steps from the best rate of the
        first, further where a seed's own best rate would else stand at the end of what it ran.
        None runs all.
    stack : train up to so many runs of one size as one program. Pays where a run alone does not
        fill the device: small models, and on a GPU.
    store : a folder. Every finished run is kept there at once (`grsd.pieces`), and runs found there
        are not made again, so that a sweep that was killed goes on where it was. A run is known by
        its plan, its settings and the code of this module; what `loss`, `batch`, `score` and
        `schedule` do cannot be seen: take a new folder when they change.
    progress : called with a description of every run that was made
    """
    checks.one_of("parametrization", parametrization, ("mup", "sp"))
    checks.positive("lrs", lrs)
    checks.whole("steps", steps, 1)
    checks.whole("stack", stack, 1)
    if near is not None:
        checks.whole("near", near, 1)
    lists = {"sizes": sizes, "lrs": lrs, "seeds": seeds, "weight_decays": weight_decays}
    for name, given in lists.items():
        if not len(given) or len(set(given)) < len(given):
            raise ValueError(f"need {name}, each given once; got {given}")
    start = _built(factory, base)
    who: dict[str, Any] = {"optimizer": optimizer, "other": other, "k": k}
    kept = None if store is None else Store(Path(store), code(__name__))

    def run(size: Size, decay: float, wanted: Sequence[tuple[int, float]]) -> list[float]:
        """Make runs of one size, each a (seed, base rate), or find them in the store."""
        made = make_plan(_built(factory, size), start) if make_plan else None
        if made is None:
            made = plan(_built(factory, size), base=start, **who)
            made = unscaled(made) if parametrization == "sp" else made
        # what a run is known by in the store
        known: dict[str, Any] = {
            "optimizer": optimizer,
            "parametrization": parametrization,
            "size": list(size),
            "weight decay": float(decay),
            "steps": steps,
            "plan": _digest(made, more),
        }
        inputs = [{**known, "seed": int(seed), "lr": float(lr)} for seed, lr in wanted]
        content = [None if kept is None else kept.read(one) for one in inputs]
        missing = [k for k, one in enumerate(content) if one is None]
        # those that are not there, together
        if missing:
            trained = train(
                [_built(factory, size) for _ in missing],
                made,
                loss,
                batch,
                [wanted[k] for k in missing],
                steps=steps,
                weight_decay=decay,
                **more,
            )
            for k, (value, done) in zip(missing, trained, strict=True):
                content[k] = one = {"loss": None if math.isnan(value) else value, "steps": done}
                if kept is not None:
                    kept.write(inputs[k], one)
                if progress is not None:
                    progress(", ".join(f"{name} {value}" for name, value in inputs[k].items()))
        losses = [found["loss"] for found in content if found is not None]
        return [math.nan if value is None else float(value) for value in losses]

    # every size and weight decay; masked is what was not run
    rates, decays = sorted(lrs), tuple(weight_decays)
    shape = (len(sizes), len(decays), len(seeds), len(rates))
    losses = np.ma.masked_array(np.full(shape, math.nan), mask=True)
    for a, size in enumerate(sizes):
        for b, decay in enumerate(decays):
            # which rates the later seeds need depends on what was run so far
            while todo := _wanted(losses[a, b], near)[:stack]:
                gave = run(size, decay, [(seeds[c], rates[g]) for c, g in todo])
                for (c, g), value in zip(todo, gave, strict=True):
                    losses[a, b, c, g] = value
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


def _wanted(losses: Any, near: int | None) -> list[tuple[int, int]]:
    """Return (seed, rate) of the runs to be made next, by place: all rates of the first seed; then
    those near its best of the others; then what brackets a seed's own best."""
    missing = [(int(c), int(g)) for c, g in np.argwhere(np.ma.getmaskarray(losses))]
    first = [(c, g) for c, g in missing if c == 0]
    if near is not None and first:
        return first
    best = _lowest(losses[:1])
    if near is None or best is None:
        return missing
    around = [(c, g) for c, g in missing if abs(g - best) <= near]
    own = {c: _lowest(losses[c : c + 1]) for c, _ in missing}
    ends = [(c, g) for c, g in missing for at in (own[c],) if at is not None and abs(g - at) == 1]
    return around or ends


def _lowest(rows: Any) -> int | None:
    """Return the rate of the smallest mean loss, over the runs that did not diverge."""
    means = np.ma.masked_invalid(rows).mean(axis=0).filled(np.inf)
    return int(np.argmin(means)) if np.isfinite(means).any() else None
