"""Norms of weights and updates while a model trains, and which layer leaves the condition.

The spectral condition fixes α‖W‖_R and α‖ΔW‖_R of a layer up to constants that the base model has.
So a monitor compares each layer with its peers (the same layer of the other blocks), and with the
monitor of a base run, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grsd import checks, figures
from grsd.mup.norms import DENSE, rms_norm, rms_operator_norm
from grsd.mup.optimizers import pieces
from grsd.mup.plans import Entry, Plan
from grsd.mup.roles import unnumbered
from grsd.mup.rules import MATRICES, update_norm, weight_norm
from grsd.mup.sharding import whole

FACTOR = 2.0  # by which a norm may differ from that of its peers, or of the base's
QUANTITIES = ("weight", "update")


@dataclass(frozen=True)
class Departure:
    """A layer whose norm is not what the condition asks, at one watched step."""

    step: int
    name: str
    quantity: str  #: "weight" or "update"
    ratio: float  #: to what is wanted
    beside: str  #: "its peers" or "the base"

    def __str__(self) -> str:
        return (
            f"step {self.step}: the {self.quantity} norm of {self.name} is {self.ratio:.3g} times "
            f"that of {self.beside}"
        )


@dataclass
class Monitor:
    """What was watched: step → parameter → (α ‖W‖_R, α ‖ΔW‖_R)."""

    plan: Plan
    every: int
    base: Monitor | None = None
    factor: float = FACTOR
    log: Callable[[str], None] | None = print
    norms: dict[int, dict[str, tuple[float, float]]] = field(default_factory=dict)
    departures: list[Departure] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Stop watching; what was seen stays."""
        for handle in self._handles:
            handle.remove()

    def note(self, step: int, norms: dict[str, tuple[float, float]]) -> None:
        """Keep the norms of a step, compare them, and log a line for each role."""
        self.norms[step] = norms
        new = [*self._beside_peers(step), *self._beside_base(step)]
        self.departures += new
        if self.log is not None:
            for line in (*self._lines(step), *map(str, new)):
                self.log(line)

    def _lines(self, step: int) -> list[str]:
        found = []
        for role in dict.fromkeys(e.role for e in self.plan):
            both = [
                geometric_means(
                    [("", self.norms[step][e.name][i]) for e in self.plan if e.role == role]
                )
                for i in (0, 1)
            ]
            weight, update = (means.get("", 0.0) for means in both)
            found.append(f"step {step}: {role:11s} α‖W‖ {weight:.3g}, α‖ΔW‖ {update:.3g}")
        return found

    def _beside_peers(self, step: int) -> list[Departure]:
        """Return the layers that differ from the median of the same layer in all blocks."""
        peers: dict[str, list[str]] = {}
        for e in self.plan:
            if e.block is not None and e.role in MATRICES:
                peers.setdefault(unnumbered(e.name), []).append(e.name)
        found = []
        for names in peers.values():
            for i, quantity in enumerate(QUANTITIES):
                sizes = sorted(self.norms[step][name][i] for name in names)
                usual = sizes[(len(sizes) - 1) // 2]
                for name in names:
                    found += self._departure(step, name, quantity, usual, "its peers")
        return found

    def _beside_base(self, step: int) -> list[Departure]:
        """Return the layers that differ from the same layer of the base at this step."""
        if self.base is None or step not in self.base.norms:
            return []
        found = []
        for i, quantity in enumerate(QUANTITIES):
            # the base's norms of a layer over its blocks, and what they should be times here
            sizes = [(unnumbered(n), both[i]) for n, both in self.base.norms[step].items()]
            means = geometric_means(sizes)
            for e in self.plan:
                if e.role in MATRICES and not e.shaped:
                    usual = means.get(unnumbered(e.name), 0.0) * self._wanted(e, quantity)
                    found += self._departure(step, e.name, quantity, usual, "the base")
        return found

    def _wanted(self, e: Entry, quantity: str) -> float:
        """Return what the condition asks of a norm, as a multiple of the base's."""
        asked, k = e.rule, self.plan.k
        size = (
            asked.multiplier * weight_norm(e.role, asked.variance)
            if quantity == "weight"
            else asked.multiplier * asked.lr * update_norm(e.optimizer, e.role, k)
        )
        return size.at(self.plan.r_n, self.plan.r_L if e.block is not None else 1.0)

    def _departure(
        self, step: int, name: str, quantity: str, usual: float, beside: str
    ) -> list[Departure]:
        size = self.norms[step][name][QUANTITIES.index(quantity)]
        if usual == 0 and size == 0:
            return []
        ratio = size / usual if usual > 0 else math.inf
        if 1 / self.factor <= ratio <= self.factor:  # NaN is outside
            return []
        return [Departure(step, name, quantity, ratio, beside)]

    def __str__(self) -> str:
        rows = [[d.name, d.quantity, d.beside, f"{d.ratio:.3g}", d.step] for d in self.departures]
        if not rows:
            return f"{len(self.norms)} steps watched: every layer is within the condition"
        return str(figures.Table(["layer", "norm", "compared with", "ratio", "step"], rows))

    def draw(self, axes: Sequence[Any]) -> None:
        """Draw α‖W‖_R and α‖ΔW‖_R of every role against the step, on two axes."""
        steps = sorted(self.norms)
        for i, (ax, quantity) in enumerate(zip(axes, ("α‖W‖_R", "α‖ΔW‖_R"), strict=True)):
            for k, role in enumerate(dict.fromkeys(e.role for e in self.plan)):
                names = [e.name for e in self.plan if e.role == role]
                sizes = [
                    geometric_means([("", self.norms[s][n][i]) for n in names]).get("", math.nan)
                    for s in steps
                ]
                ax.plot(steps, sizes, label=role, **figures.look(k))
            ax.set(xlabel="step", ylabel=quantity, yscale="log")


def monitor(
    plan: Plan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    every: int = 100,
    base: Monitor | None = None,
    factor: float = FACTOR,
    log: Callable[[str], None] | None = print,
) -> Monitor:
    """Watch α‖W‖_R and α‖ΔW‖_R of every parameter at the first step and `every` so many steps.

    It hangs on the optimizer's `step`: the training loop stays as it is. What is `factor` times
    larger or smaller than at the layer's peers, or than in the monitor `base` of the base model's
    run (times what the condition asks: 1/r_L for layers of blocks), is a `Departure`. Vectors are
    logged, and not compared.

    Cost at a watched step: a copy of the weights and two norms of every matrix (`norms`); sharded
    ones are gathered. Nothing at others. Gradients play no part.
    """
    checks.whole("every", every, 1)
    checks.at_least("factor", factor, 1)
    # what the hooks share: parameters with their entries, the weights before a step, the count
    watch = Monitor(plan, every, base, factor, log)
    matched = plan.matched(model)
    before: dict[str, Tensor] = {}
    step = 0

    # before a watched step the weights are copied, behind it their norms are taken
    def enter(*_: Any) -> None:
        if step % every == 0:
            with torch.no_grad():
                before.update({e.name: whole(p.detach()).clone() for p, e in matched})

    def leave(*_: Any) -> None:
        nonlocal step
        if before:
            with torch.no_grad():
                norms = {}
                for p, e in matched:
                    change = whole(p.detach()) - before[e.name]
                    sizes = (typical_norm(before[e.name], e), typical_norm(change, e))
                    norms[e.name] = (e.multiplier * sizes[0], e.multiplier * sizes[1])
            before.clear()
            watch.note(step, norms)
        step += 1

    watch._handles += [
        optimizer.register_step_pre_hook(enter),
        optimizer.register_step_post_hook(leave),
    ]
    return watch


def entry_norms(x: Tensor, e: Entry, *, apart: bool = False, dense: int = DENSE) -> list[float]:
    """Return ‖·‖_R of a vector, a table's largest row, a matrix or, `apart`, the fused ones.

    NaN stands for what is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        return [math.nan]
    if e.table:
        return [float(rms_norm(x).max())]
    if x.ndim < 2 or e.role not in MATRICES:
        return [float(rms_norm(x.reshape(-1)))]
    parts = pieces(x, e.layout if apart else {**e.layout, "split": 1})
    return [rms_operator_norm(part.reshape(-1, part.shape[-1]), dense=dense) for part in parts]


def geometric_means(norms: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return role → geometric mean of its norms, without zeros."""
    logs: dict[str, list[float]] = {}
    for role, size in norms:
        if size > 0 or math.isnan(size):
            logs.setdefault(role, []).append(math.log(size))
    return {role: math.exp(math.fsum(values) / len(values)) for role, values in logs.items()}


def typical_norm(x: Tensor, e: Entry) -> float:
    """Return the geometric mean of the norms of a parameter's matrices; 0 where it is zero."""
    return geometric_means([("", size) for size in entry_norms(x, e)]).get("", 0.0)
