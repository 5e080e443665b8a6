"""Predicted against measured exponents: of α‖W‖_R, of the first update, of the gradient that ε and ρ are compared with.

`grsd.mup.rules` says what the spectral condition asks for if weights, gradients and updates have the sizes that the derivation gives them. Here those
sizes are measured, role by role, on models of several widths and depths, and every fitted exponent is set beside its prediction. The last
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

from grsd.mup.coordcheck import Factory, Loss, Slope, fit_slope
from grsd.mup.norms import rms_norm, rms_operator_norm
from grsd.mup.optimizers import pieces
from grsd.mup.planning import Entry, Plan, plan
from grsd.mup.registry import assemble, row
from grsd.mup.roles import tables
from grsd.mup.rules import (
    MATRICES,
    OPTIMIZERS,
    ROLES,
    Rule,
    Scale,
    gradient_norm,
    rule,
    sizes,
    update_norm,
    weight_norm,
)
from grsd.mup.scales import HALF
from grsd.spectrum.operator.ntk import refuse_dropout

__all__ = [
    "QUANTITIES",
    "Exponent",
    "Sizes",
    "UpdateAudit",
    "audit_update_norms",
    "measure_sizes",
    "summarize",
]

QUANTITIES = ("weight", "gradient", "update", "condition")
"""α‖W‖_R of the initial weights, root mean square of ∇W, ‖A‖_R of the first update ΔW = −ηA, and α η ‖A‖_R."""


@dataclass(frozen=True)
class Sizes:
    """Norms of one model, by role: geometric means over the tensors that were looked at. What is not finite is kept.

    Attributes
    ----------
    width, depth, seed : int
    weights : role → ‖W‖_R before training (RMS norm of a bias); a role of zeros is left out.
    gradients : role → root mean square entry of ∇W.
    updates : optimizer → role → ‖A‖_R.
    """

    width: int
    depth: int
    seed: int
    weights: dict[str, float]
    gradients: dict[str, float]
    updates: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Exponent:
    """One exponent: measured, predicted, and whether they agree.

    Attributes
    ----------
    quantity : one of `QUANTITIES`; "weight" and "gradient" do not depend on the optimizer, which is then "".
    axis : "width" or "depth".
    """

    optimizer: str
    role: str
    quantity: str
    axis: str
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
        return f"{name}{self.role}: {self.quantity} ∝ {self.axis}^{self.measured} {verb} {self.wanted:+.2f} ± {self.tolerance:g}"


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
    base: tuple[int, int],
    optimizers: Sequence[str],
    k: int = 2,
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: float | Callable[[str, str, str], float] = 0.1,
    rules: Mapping[tuple[str, str], Rule] | None = None,
    blocks: int = 2,
    roles: Mapping[str, str] | None = None,
) -> UpdateAudit:
    """Measure the exponents of one step at several widths (at the base's depth) and depths (at the base's width).

    Parameters
    ----------
    factory, loss, widths, depths, base, k, seeds : as `grsd.mup.coord_check`. Exponents are stated for a ∂ℓ/∂f of fixed size: give a
        loss that is linear in the output, or contamination by f₀ = O(n^-½) shows.
    optimizers : names of `grsd.mup.rules.OPTIMIZERS`. Matrix optimizers are given all matrices, as in the tables.
    tolerance : float, or (role, quantity, axis) → float
        Of an exponent; finite sizes leave about 0.1 of an exact value.
    rules : mapping, optional
        (optimizer, role) → Rule, in place of the table: a rule to be tried.
    blocks : int
        Residual blocks that are looked at, evenly spread, the first and the last among them.
    roles : as `grsd.mup.planning`.

    Returns
    -------
    UpdateAudit

    Raises
    ------
    ValueError
        Active dropout, sizes that are empty or not positive, an unknown optimizer, and what `plan` refuses.

    Notes
    -----
    Cost: one forward-plus-backward pass for each size and seed, and for each matrix and optimizer one step and one norm.
    """
    measured = []
    for width, depth in dict.fromkeys(
        [*((w, base[1]) for w in widths), *((base[0], d) for d in depths)]
    ):
        for seed in seeds:
            settings: dict[str, Any] = {
                "base": base,
                "optimizers": optimizers,
                "k": k,
                "blocks": blocks,
                "roles": roles,
            }
            measured.append(
                measure_sizes(factory, loss, width=width, depth=depth, seed=seed, **settings)
            )
    return summarize(
        measured, base=base, optimizers=optimizers, k=k, tolerance=tolerance, rules=rules
    )


def measure_sizes(
    factory: Factory,
    loss: Loss,
    *,
    width: int,
    depth: int,
    seed: int,
    base: tuple[int, int],
    optimizers: Sequence[str],
    k: int = 2,
    blocks: int = 2,
    roles: Mapping[str, str] | None = None,
) -> Sizes:
    """Return the norms of one model under μP's multipliers and variances. Arguments: `audit_update_norms`."""
    if min(width, depth, blocks, *base) < 1:
        raise ValueError(
            f"need positive sizes, got width {width}, depth {depth}, base {base}, blocks {blocks}"
        )
    unknown = [name for name in optimizers if name not in OPTIMIZERS]
    if unknown:
        raise ValueError(
            f"no rule for the optimizer {unknown[0]!r}; there are {', '.join(OPTIMIZERS)}"
        )
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
    chosen, rows = _spread(made, blocks), tables(model)
    tensors = {e.name: (p.detach(), p.grad) for p, e in made.matched(model) if e.name in chosen}
    held = [
        (e, *tensors[e.name])
        for e in made.entries
        if e.name in chosen and tensors[e.name][1] is not None
    ]
    gradients = _means(
        [(e.role, float(G.square().mean().sqrt())) for e, _, G in held if G is not None]
    )
    updates = {}
    for name in optimizers:
        takes = MATRICES if OPTIMIZERS[name].matrices_only else ROLES
        asked = [(e, W, G) for e, W, G in held if e.role in takes and G is not None]
        of = [(e, W, G) for e, W, G in asked if bool(torch.isfinite(G).all())]
        lost = [(e.role, math.nan) for e, _, G in asked if not bool(torch.isfinite(G).all())]
        steps = zip(of, _step(name, of), strict=True)
        updates[name] = _means(
            [*((e.role, n) for (e, *_), A in steps for n in _norms(A, e, rows)), *lost]
        )
    weights = _means([(e.role, n) for e, W, _ in held for n in _norms(W, e, rows)])
    return Sizes(width, depth, seed, weights, gradients, updates)


def summarize(
    measured: Sequence[Sizes],
    *,
    base: tuple[int, int],
    optimizers: Sequence[str],
    k: int = 2,
    tolerance: float | Callable[[str, str, str], float] = 0.1,
    rules: Mapping[tuple[str, str], Rule] | None = None,
) -> UpdateAudit:
    """Fit the exponents of sizes that were measured before. Arguments: `audit_update_norms`."""
    axes = {
        "width": [s for s in measured if s.depth == base[1]],
        "depth": [s for s in measured if s.width == base[0]],
    }
    found: list[Exponent] = []

    def add(
        optimizer: str, role: str, quantity: str, wanted: Scale, value: Callable[[Sizes], float]
    ) -> None:
        for axis, target in (("width", wanted.n), ("depth", wanted.L)):
            slope = fit_slope([(float(getattr(s, axis)), value(s)) for s in axes[axis]])
            if slope is not None:
                allowed = tolerance(role, quantity, axis) if callable(tolerance) else tolerance
                found.append(
                    Exponent(optimizer, role, quantity, axis, slope, float(target), allowed)
                )

    for role in ROLES:
        table = rule("adamw", role, k)
        out, into = sizes(role)
        rms = gradient_norm(role, k) / (out * into) ** HALF
        norm = table.multiplier * weight_norm(role, table.variance)
        at = _factor(table.multiplier, base)
        add(
            "",
            role,
            "weight",
            norm,
            lambda s, role=role, at=at: s.weights.get(role, math.nan) * at(s),  # type: ignore[misc]
        )
        add("", role, "gradient", rms, lambda s, role=role: s.gradients.get(role, math.nan))  # type: ignore[misc]
    for name in optimizers:
        for role in MATRICES if OPTIMIZERS[name].matrices_only else ROLES:
            right = rule(name, role, k)
            tried = (rules or {}).get((name, role), right)
            size = update_norm(name, role, k)
            at = _factor(tried.multiplier * tried.lr, base)
            get = lambda s, name=name, role=role: s.updates[name].get(role, math.nan)  # noqa: E731
            add(name, role, "update", size, get)
            add(
                name,
                role,
                "condition",
                right.multiplier * right.lr * size,
                lambda s, get=get, at=at: get(s) * at(s),  # type: ignore[misc]
            )
    return UpdateAudit(tuple(measured), tuple(found))


def _factor(of: Scale, base: tuple[int, int]) -> Callable[[Sizes], float]:
    return lambda s: of.at(s.width / base[0], s.depth / base[1])


def _spread(made: Plan, blocks: int) -> set[str]:
    """Return the names outside the stack, and those of at most so many blocks, evenly spread."""
    depth = 1 + max((e.block for e in made.entries if e.block is not None), default=-1)
    kept = {round(i) for i in np.linspace(0, depth - 1, min(blocks, depth))} if depth else set()
    return {e.name for e in made.entries if e.block is None or e.block in kept}


def _step(name: str, held: Sequence[tuple[Entry, Tensor, Tensor]]) -> list[Tensor]:
    """Return A of ΔW = −ηA for every tensor: one step of the optimizer itself, without decay, on copies."""
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
            group |= {"split": entry.split, "transposed": entry.transposed}
        groups.append(group)
    optimizer = assemble({name: groups}, known.first_lr, {name: known.exact})
    before = [q.detach().clone() for q in copies]
    known.first(optimizer)
    return [(b - q.detach()) / known.first_lr for b, q in zip(before, copies, strict=True)]


def _norms(x: Tensor, entry: Entry, rows: set[str]) -> list[float]:
    """Return ‖·‖_R of a matrix, of each of its parts when several are fused, of a vector, or of a table's largest row; NaN of what is not finite."""
    if not bool(torch.isfinite(x).all()):
        return [math.nan]
    if entry.name in rows:
        return [float(rms_norm(x).max())]
    if entry.role not in MATRICES:
        return [float(rms_norm(x.reshape(-1)))]
    group = {"split": entry.split, "transposed": entry.transposed}
    parts = pieces(x, group) if x.ndim == 2 else [x.flatten(1)]
    return [rms_operator_norm(part.reshape(-1, part.shape[-1]), dense=1 << 14) for part in parts]


def _means(found: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the geometric mean of each role, without zeros."""
    logs: dict[str, list[float]] = {}
    for role, size in found:
        if size > 0 or math.isnan(size):
            logs.setdefault(role, []).append(math.log(size))
    return {role: math.exp(float(np.mean(values))) for role, values in logs.items()}
