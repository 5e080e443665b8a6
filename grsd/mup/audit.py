"""Predicted against measured exponents: of α‖W‖_R, of the first update, of the gradient that ε and
ρ are compared with.

`grsd.mup.rules` says what the spectral condition asks for if weights, gradients and updates have
the sizes that the derivation gives them. Here those sizes are measured, role by role, on models of
several widths and depths, and every fitted exponent is set beside its prediction. The last
quantity, α η ‖A‖_R, is the condition itself, with the η of the table: a wrong rule shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grsd import checks
from grsd.mup.coordcheck import Factory, Loss, Size, Slope, fit_along, sizes_along
from grsd.mup.monitoring import entry_norms, geometric_means
from grsd.mup.planning import Entry, Plan, plan
from grsd.mup.registry import assemble, row
from grsd.mup.rules import ROLES, SIZES, Rule, gradient_norm, rule, update_norm, weight_norm
from grsd.mup.scales import HALF, ONE, Scale
from grsd.spectrum.operator.ntk import refuse_dropout

QUANTITIES = ("weight", "gradient", "update", "condition")
"""α‖W‖_R of the initial weights, root mean square of ∇W, ‖A‖_R of the first update ΔW = −ηA, and α
η ‖A‖_R."""
DENSE = 1 << 14  # entries up to which a singular value decomposition is taken: there are many norms
Tolerance = float | Callable[[str, str, str], float]
Rules = Mapping[tuple[str, str], Rule]


@dataclass(frozen=True)
class Sizes:
    """Norms of one model, by role: geometric means over the tensors that were looked at.

    What is not finite is kept; a role of zeros is left out.
    """

    width: int
    depth: int
    seed: int
    weights: dict[str, float]  #: role → ‖W‖_R before training (RMS norm of a bias)
    gradients: dict[str, float]  #: role → root mean square entry of ∇W
    updates: dict[str, dict[str, float]]  #: optimizer → role → ‖A‖_R


@dataclass(frozen=True)
class Exponent:
    """One exponent: measured, predicted, and whether they agree."""

    optimizer: str  #: "" for weights and gradients, in which it has no part
    role: str
    quantity: str  #: one of `QUANTITIES`
    axis: str  #: "width" or "depth"
    measured: Slope
    wanted: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Within the tolerance."""
        return abs(self.measured.value - self.wanted) <= self.tolerance

    def __str__(self) -> str:
        name = f"{self.optimizer}, " if self.optimizer else ""
        verb = "is" if self.holds else "is NOT"
        law = f"{self.quantity} ∝ {self.axis}^{self.measured}"
        return f"{name}{self.role}: {law} {verb} {self.wanted:+.2f} ± {self.tolerance:g}"


@dataclass(frozen=True)
class UpdateAudit:
    """All exponents of one audit, and the sizes that they were fitted to."""

    sizes: tuple[Sizes, ...]
    exponents: tuple[Exponent, ...]

    @property
    def failures(self) -> tuple[Exponent, ...]:
        return tuple(e for e in self.exponents if not e.holds)

    def __getitem__(self, key: tuple[str, str, str, str]) -> Exponent:
        """Return the exponent of (optimizer, role, quantity, axis)."""
        for e in self.exponents:
            if (e.optimizer, e.role, e.quantity, e.axis) == key:
                return e
        raise KeyError(f"the audit has no exponent {key!r}")

    def __str__(self) -> str:
        verdict = f"{len(self.exponents)} exponents, {len(self.failures)} outside their tolerance"
        return "\n".join([verdict, *(f"  {e}" for e in self.failures)])


def audit_update_norms(
    factory: Factory,
    loss: Loss,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    base: Size,
    optimizers: Sequence[str],
    k: int = 2,
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: Tolerance = 0.1,
    rules: Rules | None = None,
    **more: Any,
) -> UpdateAudit:
    """Measure the exponents of one step at several widths and depths.

    Cost: one forward-plus-backward pass for each size and seed, and for each matrix and optimizer
    one step and one norm.

    Parameters
    ----------
    factory, loss, widths, depths, base, k, seeds : as `grsd.mup.coord_check`. Exponents are stated
        for a ∂ℓ/∂f of fixed size: give a loss that is linear in the output, or f₀ = O(n^-½) shows.
    optimizers : names of rows. Matrix optimizers are given all matrices, as in the tables.
    tolerance : of an exponent, or (role, quantity, axis) → it; finite sizes leave about 0.1.
    rules : (optimizer, role) → Rule, in place of the table: a rule to be tried.
    more : as `measure_sizes`.
    """
    who: dict[str, Any] = {"base": base, "optimizers": optimizers, "k": k}
    measured = [
        measure_sizes(factory, loss, width=width, depth=depth, seed=seed, **who, **more)
        for width, depth in sizes_along(widths, depths, base)
        for seed in seeds
    ]
    return summarize(measured, **who, tolerance=tolerance, rules=rules)


def measure_sizes(
    factory: Factory,
    loss: Loss,
    *,
    width: int,
    depth: int,
    seed: int,
    base: Size,
    optimizers: Sequence[str],
    k: int = 2,
    blocks: int = 2,
    roles: Mapping[str, str] | None = None,
) -> Sizes:
    """Return the norms of one model under μP.

    Looked at are so many blocks, evenly spread, the first and the last among them. Roles as in
    `grsd.mup.planning`, the rest as in `audit_update_norms`.
    """
    checks.at_least("width, depth, base and blocks", (width, depth, *base, blocks), 1)
    takes = {name: row(name).takes for name in optimizers}
    # one backward pass of the model that the plan starts
    start, model = factory(*base), factory(width, depth)
    refuse_dropout(start)
    made = plan(model, base=start, optimizer="adamw", k=k, roles=roles)
    made.initialize_(model, seed=seed)
    handles = made.attach(model)
    try:
        loss(model).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    # what is looked at: some blocks, and all that is outside of them
    chosen = _spread(made, blocks)
    held = [
        (e, p.detach(), p.grad)
        for p, e in made.matched(model)
        if e.name in chosen and p.grad is not None
    ]

    def norms(x: Tensor, e: Entry) -> list[tuple[str, float]]:
        return [(e.role, norm) for norm in entry_norms(x, e, apart=True, dense=DENSE)]

    # norms of weights and gradients, and of what every optimizer makes of these
    weights = [norm for e, W, _ in held for norm in norms(W, e)]
    gradients = [(e.role, float(G.square().mean().sqrt())) for e, _, G in held]
    updates = {}
    for name in optimizers:
        # a gradient that is not finite makes no step, and its role shows NaN
        asked = [one for one in held if one[0].role in takes[name]]
        good = [one for one in asked if bool(torch.isfinite(one[2]).all())]
        sizes = [(e.role, math.nan) for e, *_ in asked if not any(e is one[0] for one in good)]
        for (e, *_), A in zip(good, _step(name, good), strict=True):
            sizes += norms(A, e)
        updates[name] = geometric_means(sizes)
    return Sizes(width, depth, seed, geometric_means(weights), geometric_means(gradients), updates)


def summarize(
    measured: Sequence[Sizes],
    *,
    base: Size,
    optimizers: Sequence[str],
    k: int = 2,
    tolerance: Tolerance = 0.1,
    rules: Rules | None = None,
) -> UpdateAudit:
    """Fit the exponents of sizes that were measured before. Arguments: `audit_update_norms`."""
    sizes = [(s.width, s.depth) for s in measured]
    exponents: list[Exponent] = []

    def add(
        name: str, role: str, quantity: str, wanted: Scale, norms: list[dict[str, float]], by: Scale
    ) -> None:
        """Fit one quantity of one role, its norms times a factor, along both axes."""
        factors = (by.at(width / base[0], depth / base[1]) for width, depth in sizes)
        values = [one.get(role, math.nan) * f for one, f in zip(norms, factors, strict=True)]
        for axis, slope in fit_along(sizes, values, base).items():
            allowed = tolerance(role, quantity, axis) if callable(tolerance) else tolerance
            target = float(wanted.n if axis == "width" else wanted.L)
            exponents.append(Exponent(name, role, quantity, axis, slope, target, allowed))

    # what no optimizer has a part in: weights and gradients
    for role in ROLES:
        table, (out, into) = rule("adamw", role, k), SIZES[role]
        alpha, entry = table.multiplier, gradient_norm(role, k) / (out * into) ** HALF
        norm = alpha * weight_norm(role, table.variance)
        add("", role, "weight", norm, [s.weights for s in measured], alpha)
        add("", role, "gradient", entry, [s.gradients for s in measured], ONE)
    # the updates, and the condition with the rate of the table, or the one that is tried
    for name in optimizers:
        for role in row(name).takes:
            right, size = rule(name, role, k), update_norm(name, role, k)
            tried = (rules or {}).get((name, role), right)
            norms = [s.updates[name] for s in measured]
            add(name, role, "update", size, norms, ONE)
            wanted, factor = right.multiplier * right.lr * size, tried.multiplier * tried.lr
            add(name, role, "condition", wanted, norms, factor)
    return UpdateAudit(tuple(measured), tuple(exponents))


def _spread(made: Plan, blocks: int) -> set[str]:
    """Return the names outside the stack, and those of at most so many blocks, evenly spread."""
    depth = 1 + max((e.block for e in made.entries if e.block is not None), default=-1)
    kept = {round(i) for i in np.linspace(0, depth - 1, min(blocks, depth))} if depth else set()
    return {e.name for e in made.entries if e.block is None or e.block in kept}


def _step(name: str, held: Sequence[tuple[Entry, Tensor, Tensor]]) -> list[Tensor]:
    """Return A of ΔW = −ηA for every tensor: one step of the optimizer itself, on copies."""
    if not held:
        return []
    known = row(name)
    copies, groups = [], []
    for entry, W, G in held:
        q = nn.Parameter(W.clone())
        q.grad = G.clone()
        copies.append(q)
        group = {"params": [q], "lr": known.first_lr, "mup_lr": 1.0, "weight_decay": 0.0}
        if known.matrices_only:
            group |= entry.layout
        groups.append(group)
    # A is what the step did, over its rate
    optimizer = assemble({name: groups}, known.first_lr, {name: known.exact})
    before = [q.detach().clone() for q in copies]
    known.first(optimizer)
    return [(b - q.detach()) / known.first_lr for b, q in zip(before, copies, strict=True)]
