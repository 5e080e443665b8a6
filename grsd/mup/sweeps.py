"""Sweeps of learning rate and weight decay over sizes and seeds: runs that are kept one by one, so that a killed sweep goes on.

What is read off them (`optimum`, `drift`, `regret`) is in `grsd.mup.optima` and takes arrays, so that it reads a published table as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grsd.mup.optima import Array, Drift, Optimum, Regret, drift, optimum, regret
from grsd.mup.optimizers import backward
from grsd.mup.planning import Plan, plan

__all__ = [
    "Drift",
    "Optimum",
    "Regret",
    "Sweep",
    "drift",
    "optimum",
    "regret",
    "sweep",
    "train",
    "unscaled",
]

Size = tuple[int, int]
Loss = Callable[[nn.Module, int, int], Tensor]


@dataclass(frozen=True)
class Sweep:
    """What a sweep gave.

    Attributes
    ----------
    sizes : tuple of (width, depth)
    log2_lr : ndarray (G,), sorted base rates
    weight_decays : tuple of float, base values
    seeds : tuple of int
    losses : masked array (sizes, weight decays, seeds, G)
        NaN is a run that diverged; masked is a run that was not made.
    """

    sizes: tuple[Size, ...]
    log2_lr: Array
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]
    losses: Any

    def curve(self, size: Size, weight_decay: float | None = None) -> Any:
        """Return the losses (seeds, G) of one size; with several weight decays, of the one that is asked for."""
        chosen = (
            self.weight_decays[0]
            if weight_decay is None and len(self.weight_decays) == 1
            else weight_decay
        )
        if size not in self.sizes or chosen not in self.weight_decays:
            raise ValueError(
                f"the sweep has sizes {self.sizes} and weight decays {self.weight_decays}, not {size}, {chosen}"
            )
        return self.losses[self.sizes.index(size), self.weight_decays.index(chosen)]

    def optima(self, weight_decay: float | None = None, **more: Any) -> list[Optimum]:
        """Return the best rate of every size; further arguments as `optimum`."""
        return [
            optimum(self.log2_lr, self.curve(size, weight_decay), **more) for size in self.sizes
        ]

    def drift(
        self, axis: Literal["width", "depth"], weight_decay: float | None = None, **more: Any
    ) -> Drift:
        """Return the drift along one axis; the sizes must agree on the other. Further arguments as `optimum`."""
        if len({size[axis == "width"] for size in self.sizes}) > 1:
            raise ValueError(
                f"the sizes {self.sizes} differ along both axes; a drift along {axis} needs the other fixed"
            )
        return drift(
            [size[axis == "depth"] for size in self.sizes], self.optima(weight_decay, **more)
        )

    def regret(self, weight_decay: float | None = None, **more: Any) -> Regret:
        """Return what every size pays for the best rate of the first; further arguments as `grsd.mup.optima.regret`."""
        return regret(
            self.log2_lr,
            np.ma.stack([self.curve(size, weight_decay) for size in self.sizes]),
            **more,
        )

    def __str__(self) -> str:
        lines = [("width", "depth", "λ", "log₂ η∗", "loss", "regret")]
        for decay in self.weight_decays:
            best, cost = self.optima(decay), self.regret(decay)
            for (width, depth), o, r in zip(self.sizes, best, cost.values, strict=True):
                lines.append(
                    (str(width), str(depth), f"{decay:g}", str(o), f"{o.loss:.4g}", f"{r:.3g}")
                )
        columns = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(line, columns, strict=True)).rstrip()
            for line in lines
        )


def unscaled(made: Plan) -> Plan:
    """Return the plan of standard parametrization: the base's variance, multiplier and rate at every size."""
    entries = tuple(
        replace(
            e,
            multiplier=1.0,
            std=1.0,
            lr=1.0,
            weight_decay=1.0,
            eps=e.eps and 1.0,
            clip=e.clip and 1.0,
        )
        for e in made
    )
    return replace(made, entries=entries, multipliers=())


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
    """Draw the weights, train under a plan, and return (loss, steps made); NaN and fewer steps when the run left the numbers.

    Parameters
    ----------
    model : nn.Module, changed in place
    loss : (model, seed, step) → scalar. The same seed and step must give the same batch.
    schedule : step → factor on all rates, such as `grsd.mup.schedules.cosine`
    score : model → number to be compared, called once at the end without gradients; by default the mean training loss of the last
        quarter of the steps
    clip : largest norm of the gradient
    options : further arguments of `Plan.make_optimizer` (eps, options)

    Notes
    -----
    torch's generators are seeded with `seed` for the run and put back after it.
    """
    seen: list[float] = []
    handles = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            made.initialize_(model, seed=seed)
            handles = made.attach(model)
            optimizer = made.make_optimizer(model, lr=lr, weight_decay=weight_decay, **options)
            rates = [group["lr"] for group in optimizer.param_groups]
            for step in range(steps):
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
            if score is None:
                value = math.fsum(seen[-max(1, steps // 4) :]) / max(1, steps // 4)
            else:
                with torch.no_grad():
                    value = float(score(model))
            return (value if math.isfinite(value) else math.nan), steps
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # a decomposition met infinite entries
            return math.nan, len(seen)
        finally:
            for handle in handles:
                handle.remove()


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
    store: MutableMapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    other: str = "adamw",
    k: int = 2,
    **more: Any,
) -> Sweep:
    """Train every size at every rate, weight decay and seed; keep what each run gave.

    Parameters
    ----------
    factory : (width, depth) → model, as in `coord_check`
    loss, steps, and `more` : as `train`
    base : the size whose hyperparameters `lrs` and `weight_decays` are
    parametrization : "mup", or "sp": the base's standard deviations and one rate for all (`unscaled`), the paper's SP
    make_plan : (model, base model) → Plan, in place of both: for a rule of your own
    near : run the seeds after the first only up to so many grid steps from the best rate of the seeds before, further where a seed's own
        best rate would else stand at the end of what it ran. None runs all.
    store : mapping
        Runs found here are not made again, and every finished run is put here at once (`sync` is called if there is one), so that a
        sweep that was killed goes on where it was: ``shelve.open("sweep")``, or any mapping of your own. A value is ``{"loss": float or
        None, "steps": int}``, None for a diverged run. A key names the run and a digest of its plan; it cannot see what `loss`, `score`
        and `schedule` do: take a new store when they change.
    progress : called with the key of every run that was made

    Raises
    ------
    ValueError
        Nothing to run, rates that are not positive, rates or sizes given twice, and what `plan` refuses.

    Notes
    -----
    Cost: sizes · weight decays · seeds · rates runs of `steps` steps, less with `near`.
    """
    if parametrization not in ("mup", "sp"):
        raise ValueError(f'parametrization must be "mup" or "sp", got {parametrization!r}')
    if (
        not (sizes and lrs and seeds and weight_decays)
        or steps < 1
        or (near is not None and near < 1)
    ):
        raise ValueError(
            f"need sizes, rates, seeds, weight decays, steps ≥ 1 and near ≥ 1; got {sizes}, {lrs}, {seeds}, {weight_decays}, {steps}, {near}"
        )
    if (
        min(lrs) <= 0
        or len(set(lrs)) < len(lrs)
        or len(set(sizes)) < len(sizes)
        or len(set(seeds)) < len(seeds)
    ):
        raise ValueError(
            f"rates must be positive, and rates, sizes and seeds given once; got {lrs}, {sizes}, {seeds}"
        )
    start = _built(factory, base)
    rates, decays = sorted(lrs), tuple(weight_decays)
    found = np.ma.masked_array(
        np.full((len(sizes), len(decays), len(seeds), len(rates)), math.nan), mask=True
    )
    kept: MutableMapping[str, Any] = {} if store is None else store
    for a, size in enumerate(sizes):
        for b, decay in enumerate(decays):

            def run(seed: int, lr: float, size: Size = size, decay: float = decay) -> float:
                model = _built(factory, size)
                made = (
                    make_plan(model, start)
                    if make_plan
                    else plan(model, base=start, optimizer=optimizer, other=other, k=k)
                )
                made = unscaled(made) if parametrization == "sp" and make_plan is None else made
                key = _key(made, (size, parametrization, optimizer, lr, decay, seed, steps), more)
                if key not in kept:
                    value, done = train(
                        model, made, loss, seed=seed, steps=steps, lr=lr, weight_decay=decay, **more
                    )
                    kept[key] = {"loss": None if math.isnan(value) else value, "steps": done}
                    if hasattr(kept, "sync"):
                        kept.sync()
                    if progress is not None:
                        progress(key)
                value = kept[key]["loss"]
                return math.nan if value is None else float(value)

            for c, seed in enumerate(seeds):
                every = range(len(rates))
                while todo := [
                    g
                    for g in every
                    if np.ma.getmaskarray(found)[a, b, c, g] and _wanted(found[a, b], c, g, near)
                ]:
                    found[a, b, c, todo[0]] = run(seed, rates[todo[0]])
    return Sweep(tuple(sizes), np.log2(rates), decays, tuple(seeds), found)


def _built(factory: Callable[[int, int], nn.Module], size: Size) -> nn.Module:
    """Return a model; what its constructor draws is the same in every process (the base's standard deviations are read off it)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory(*size)


def _key(made: Plan, run: tuple[Any, ...], more: dict[str, Any]) -> str:
    (width, depth), parametrization, optimizer, lr, decay, seed, steps = run
    plain = {name: value for name, value in more.items() if not callable(value)}
    digest = hashlib.sha256(repr((made, sorted(plain.items()))).encode()).hexdigest()[:12]
    return f"{optimizer} {parametrization} {width}x{depth} lr={lr!r} wd={decay!r} seed={seed} steps={steps} {digest}"


def _wanted(found: Any, row: int, column: int, near: int | None) -> bool:
    """Return whether a seed is to be run at a rate: all of the first seed, then what is near the best, then what brackets its own."""
    if near is None or row == 0:
        return True
    best, own = _lowest(found[:row]), _lowest(found[row : row + 1])
    return (
        best is None or abs(column - best) <= near or (own is not None and abs(column - own) == 1)
    )


def _lowest(rows: Any) -> int | None:
    """Return the rate of the smallest mean loss, over the runs that did not diverge."""
    means = np.ma.masked_invalid(rows).mean(axis=0).filled(np.inf)
    return int(np.argmin(means)) if np.isfinite(means).any() else None
