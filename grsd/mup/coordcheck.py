"""Coordinate check: do features move alike at every width and depth; if not, what is broken?

Each model is trained for a few steps; what is fitted is the slope of log ‖Δh_L‖_R against log size.
The diagnosis looks at what the features are made of: α‖W‖_R and α‖ΔW‖_R of every role, which the
spectral condition fixes one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grsd import checks, statistics
from grsd.mup.initial import Initial
from grsd.mup.norms import DENSE, rms_norm, rms_operator_norm
from grsd.mup.optimizers import backward, pieces
from grsd.mup.planning import Entry, Plan, plan, unscaled
from grsd.mup.registry import row
from grsd.mup.roles import bare_modules, bare_parameters, stack_of, tables
from grsd.mup.rules import MATRICES, rule, update_norm, weight_norm
from grsd.spectrum.operator.ntk import refuse_dropout

Factory = Callable[[int, int], nn.Module]
Loss = Callable[[nn.Module], Tensor]
Size = tuple[int, int]  # width, depth
Label = tuple[int, int, int]  # width, depth, seed
FLAT = 0.25  # |slope| up to which a check passes: what finite sizes leave of an exact 0


@dataclass(frozen=True)
class Run:
    """One model, trained for a few steps on one batch; norms that are not finite are kept.

    Norms by role are geometric means over its tensors. Initial ones of input and output matrices
    are divided by 1 + √(d/n), d their fixed side: what a Gaussian matrix of finite width n has
    above its limit.
    """

    width: int
    depth: int
    seed: int
    features: tuple[float, ...]  #: (steps+1,), ‖h_L(t) − h_L(0)‖_R, root mean square over the batch
    losses: tuple[float, ...]  #: (steps+1,)
    weights: dict[str, float]  #: role → α ‖W‖_R before training (RMS norm for biases)
    updates: dict[str, float]  #: role → α ‖ΔW‖_R of the first step
    outputs: tuple[float, ...] = ()  #: (steps+1,), the same as `features` of the model's output


@dataclass(frozen=True)
class Slope:
    """An exponent fitted over sizes and seeds, with its 95 % interval and count of points."""

    value: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Finding:
    """One quantity whose exponent is not what the condition asks for."""

    role: str
    quantity: str  #: "initial norm" or "update norm"
    axis: str
    measured: Slope
    wanted: float
    condition: str

    def __str__(self) -> str:
        return (
            f"{self.condition} is broken: the {self.quantity} of {self.role} goes like "
            f"{self.axis}^{self.measured.value:+.2f} instead of {self.axis}^{self.wanted:+.2f}"
        )


@dataclass(frozen=True)
class CoordCheck:
    """The runs, what was fitted, and what it means.

    The verdict is "flat", "not flat", "diverged" when a run left the numbers, or "not fitted" when
    no axis has two sizes.
    """

    runs: tuple[Run, ...]
    optimizer: str
    parametrization: str
    slopes: dict[str, Slope]  #: axis → slope of ‖Δh_L‖_R after the last step, with two sizes
    first: dict[str, Slope]  #: the same after the first step
    verdict: str
    findings: tuple[Finding, ...]  #: conditions that the measured norms break
    output_slopes: dict[str, Slope]  #: as `slopes`, of the model's output; empty without `outputs`

    @property
    def diagnosis(self) -> str:
        """The verdict in words: which layer, which norm, which condition."""
        lines = [f"{self.optimizer}, {self.parametrization}: {self.verdict}"]
        lines += [f"  change of features against {x}: {slope}" for x, slope in self.slopes.items()]
        lines += [f"  {finding}" for finding in self.findings]
        if self.verdict == "not flat" and not self.findings:
            lines += [
                "  every norm of the first step is as the condition asks: what breaks comes",
                "  after it (alignment, or later steps); compare `first` with `slopes`",
            ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.diagnosis


def coord_check(
    factory: Factory,
    loss: Loss,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    base: Size,
    optimizer: str,
    other: str = "adamw",
    lr: float,
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    parametrization: Literal["mup", "sp"] = "mup",
    k: int = 2,
    make_plan: Callable[[nn.Module, nn.Module], Plan] | None = None,
    outputs: Loss | None = None,
    **more: Any,
) -> CoordCheck:
    """Train models of several widths and depths for some steps, and fit exponents.

    Widths are at the base's depth, depths at the base's width. Cost: for each size and seed steps +
    1 forward-plus-backward passes, and two norms for each matrix.

    Parameters
    ----------
    factory : (width, depth) → model, with residual blocks in one `nn.ModuleList`, without dropout.
    loss : model → scalar loss on a fixed batch.
    base : (width, depth) whose hyperparameters are given; it may be among the sizes.
    optimizer, other, k : as `grsd.mup.planning`.
    lr, and `more` : base values, as `Plan.make_optimizer`.
    parametrization : "mup", or "sp": variance 1/fan-in for every matrix, one learning rate, and no
        multipliers.
    make_plan : (model, base model) → Plan, in place of `grsd.mup.planning`: for roles of your own,
        or a rule to be tested.
    outputs : model → its output on the batch, samples in rows; by default not recorded.
    """
    checks.one_of("parametrization", parametrization, ("mup", "sp"))
    sizes = sizes_along(widths, depths, base)
    if steps < 1 or not seeds or not sizes or min(min(s) for s in (*sizes, base)) < 1:
        raise ValueError(
            f"need steps ≥ 1, a seed and positive sizes; got {steps}, {tuple(seeds)}, {sizes}, "
            f"base {base}"
        )
    # every size and seed is a run of its own, with the plan that leads from the base to it
    start = factory(*base)
    refuse_dropout(start)
    who: dict[str, Any] = {"optimizer": optimizer, "other": other, "k": k}
    runs = []
    for size in sizes:
        for seed in seeds:
            model = factory(*size)
            made = make_plan(model, start) if make_plan else plan(model, base=start, **who)
            if parametrization == "sp":
                made = _standard(made)
            # weights, multipliers and rates by the plan
            made.initialize_(model, seed=seed)
            made.attach(model)
            stepper = made.make_optimizer(model, lr=lr, **more)
            runs.append(_run(model, made, stepper, loss, outputs, (*size, seed), steps))
    return _judge(runs, base, parametrization, **who)


def sizes_along(widths: Iterable[int], depths: Iterable[int], base: Size) -> list[Size]:
    """Return widths at the base's depth, then depths at its width, each size once."""
    return list(dict.fromkeys([*((w, base[1]) for w in widths), *((base[0], d) for d in depths)]))


def _standard(made: Plan) -> Plan:
    """Return a plan without scaling; matrices have variance 1/fan-in, embeddings the base's."""
    entries = []
    for e in unscaled(made):
        table = e.role == "input" and len(e.shape) == 2 and any(one.std for one in e.initial or ())
        if e.role in MATRICES and not table and e.initial != ():
            e = replace(e, initial=(Initial(0.0, e.fan_in**-0.5),))
        entries.append(e)
    return replace(made, entries=tuple(entries), multipliers=())


def _run(
    model: nn.Module,
    made: Plan,
    optimizer: Optimizer,
    loss: Loss,
    outputs: Loss | None,
    label: Label,
    steps: int,
) -> Run:
    """Train, and watch what leaves the last block, and the model."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).detach().double())

    # the last block of the residual stack, whose output are the features
    stack, depth = stack_of(model)
    last, parameters = bare_modules(model)[f"{stack}.{depth - 1}"], bare_parameters(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    rows = tables(model)
    weights = _by_role(made, before, rows, gaussian=True)
    updates: dict[str, float] = {}
    features, values, losses = [], [], []
    handle = last.register_forward_hook(watch)
    try:
        for step in range(steps + 1):
            # what the model does before the step
            seen.clear()
            optimizer.zero_grad()
            now = loss(model)
            h = seen[0]
            f = None if outputs is None else outputs(model).detach().double()
            if step == 0:
                start, first = h, f
            features.append(float(rms_norm(h - start).square().mean().sqrt()))
            if f is not None and first is not None:
                values.append(float(rms_norm(f - first).square().mean().sqrt()))
            losses.append(float(now.detach()))
            if step < steps:
                backward(now, optimizer)
                optimizer.step()
            # the first update, whose norms the condition fixes
            if step == 0:
                change = {name: p.detach() - before[name] for name, p in parameters.items()}
                updates = _by_role(made, change, rows)
    finally:
        handle.remove()
    return Run(*label, tuple(features), tuple(losses), weights, updates, tuple(values))


def _by_role(
    made: Plan, tensors: Mapping[str, Tensor], rows: set[str], gaussian: bool = False
) -> dict[str, float]:
    """Return α times the typical norm of every role; of a table, that of its largest row."""
    norms = []
    for e in made:
        x = tensors[e.name]
        scale = e.multiplier
        if gaussian and x.ndim > 1 and e.role in ("input", "output") and e.name not in rows:
            fan_out, fan_in = (x.mT if e.transposed else x).flatten(1).shape
            scale /= 1 + math.sqrt(fan_in / fan_out if e.role == "input" else fan_out / fan_in)
        norms += [(e.role, size * scale) for size in entry_norms(x, e, rows)]
    return geometric_means(norms)


def entry_norms(
    x: Tensor, e: Entry, tabled: set[str], *, apart: bool = False, dense: int = DENSE
) -> list[float]:
    """Return ‖·‖_R of a vector, a table's largest row, a matrix or, `apart`, the fused ones.

    NaN stands for what is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        return [math.nan]
    if e.name in tabled:
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
    return {role: math.exp(float(np.mean(values))) for role, values in logs.items()}


def fit_slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Least squares of log₂ y against log₂ x over all points that are finite and positive."""
    x, y = np.array(points, float).reshape(-1, 2).T
    good = np.isfinite(y) & (y > 0)
    if len(set(x[good])) < 2:
        return None
    line = statistics.slope(np.log2(x[good]), np.log2(y[good]))
    return Slope(line.value, line.low, line.high, int(good.sum()))


def fit_along(sizes: Iterable[Size], values: Iterable[float], base: Size) -> dict[str, Slope]:
    """Return axis → slope of the values against this size, at the base's size of the other."""
    pairs, slopes = list(zip(sizes, values, strict=True)), {}
    for place, axis in enumerate(("width", "depth")):
        slope = fit_slope([(n[place], y) for n, y in pairs if n[1 - place] == base[1 - place]])
        if slope is not None:
            slopes[axis] = slope
    return slopes


def _judge(
    runs: list[Run], base: Size, parametrization: str, optimizer: str, other: str, k: int
) -> CoordCheck:
    sizes = [(r.width, r.depth) for r in runs]
    # the verdict, from the change of features
    slopes, first = (fit_along(sizes, [r.features[i] for r in runs], base) for i in (-1, 1))
    broken = any(not math.isfinite(v) for r in runs for v in (*r.features, *r.losses))
    flat = all(abs(s.value) <= FLAT for s in slopes.values())
    verdict = (
        "diverged" if broken else "not fitted" if not slopes else "flat" if flat else "not flat"
    )

    # the findings, from the norms of every role
    findings = []
    for role in sorted({role for r in runs for role in r.updates}):
        which = optimizer if role == "hidden" or not row(optimizer).matrices_only else other
        asked = rule(which, role, k)
        norm = asked.multiplier * weight_norm(role, asked.variance)
        change = asked.multiplier * asked.lr * update_norm(which, role, k)
        for quantity, size, norms in (
            ("initial norm", norm, [r.weights for r in runs]),
            ("update norm", change, [r.updates for r in runs]),
        ):
            values = [by_role.get(role, math.nan) for by_role in norms]
            for axis, slope in fit_along(sizes, values, base).items():
                wanted = float(size.n if axis == "width" else size.L)
                # off by more than a check lets pass, and outside of the interval
                off = abs(slope.value - wanted) > FLAT
                if off and not slope.low <= wanted <= slope.high:
                    condition = _condition(role, quantity, k)
                    findings.append(Finding(role, quantity, axis, slope, wanted, condition))
    outs = fit_along(sizes, [r.outputs[-1] for r in runs], base) if runs[0].outputs else {}
    return CoordCheck(
        tuple(runs), optimizer, parametrization, slopes, first, verdict, tuple(findings), outs
    )


def _condition(role: str, quantity: str, k: int) -> str:
    """Return the name of the condition on a norm in the paper."""
    if role.endswith("bias"):
        return "B.3"
    if role == "hidden" and k == 1:
        return "B.1"
    return f"C{1 if quantity == 'initial norm' else 2}.{2 if role == 'hidden' else 1}"
