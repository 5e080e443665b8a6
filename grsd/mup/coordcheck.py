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
from torch import Tensor, nn
from torch.optim import Optimizer

from grsd import checks, statistics
from grsd.mup.combined import backward
from grsd.mup.contributions import Verification, repeated, tensor
from grsd.mup.initial import Initial
from grsd.mup.monitoring import geometric_means, typical_norm
from grsd.mup.norms import rms_norm
from grsd.mup.planning import Plan, plan, unscaled
from grsd.mup.registry import row
from grsd.mup.roles import bare_modules, bare_parameters, stack_of, unnumbered
from grsd.mup.rules import MATRICES, rule, update_norm, weight_norm
from grsd.spectrum.operator.ntk import refuse_dropout

Factory = Callable[[int, int], nn.Module]
Loss = Callable[[nn.Module], Tensor]
Size = tuple[int, int]  # width, depth
Label = tuple[int, int, int]  # width, depth, seed
FLAT = 0.25  # what finite sizes leave of an exact exponent: slopes inside ±FLAT of it pass


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
    outputs: tuple[float, ...]  #: (steps+1,), the same as `features` of the model's output
    weights: dict[str, float]  #: role → α ‖W‖_R before training (RMS norm for biases)
    updates: dict[str, float]  #: role → α ‖ΔW‖_R of the first step
    modules: dict[str, tuple[float, float]]  #: parameter → its two norms, α ‖W‖_R and α ‖ΔW‖_R


@dataclass(frozen=True)
class Slope:
    """An exponent fitted over sizes and seeds, with its 95 % interval and count of points."""

    value: float
    low: float
    high: float
    points: int

    def against(self, wanted: float = 0.0) -> Literal["inside", "outside", "undecided"]:
        """Say where the whole interval lies: inside ±FLAT of an exponent, outside, or neither."""
        if self.low > wanted + FLAT or self.high < wanted - FLAT:
            return "outside"
        within = wanted - FLAT <= self.low and self.high <= wanted + FLAT
        return "inside" if within else "undecided"

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

    The verdict is "flat" when the intervals of all slopes, of features and of the output, lie
    inside ±FLAT; "not flat" when one lies outside; "undecided" otherwise, "diverged" when a run
    left the numbers, and "not fitted" when no axis has two sizes.
    """

    runs: tuple[Run, ...]
    optimizer: str
    parametrization: str
    slopes: dict[str, Slope]  #: axis → slope of ‖Δh_L‖_R after the last step, with two sizes
    first: dict[str, Slope]  #: the same after the first step
    output_slopes: dict[str, Slope]  #: as `slopes`, of the model's output
    verdict: str
    findings: tuple[Finding, ...]  #: conditions that the measured norms break
    #: what branches and heads of the largest sizes contribute, where μP is not flat
    contributions: tuple[Verification, ...] = ()

    @property
    def diagnosis(self) -> str:
        """The verdict in words: which layer, which norm, which condition, which contribution."""
        lines = [f"{self.optimizer}, {self.parametrization}: {self.verdict}"]
        for what, slopes in (("features", self.slopes), ("the output", self.output_slopes)):
            lines += [
                f"  change of {what} against {axis}: {slope}, {slope.against()}"
                for axis, slope in slopes.items()
            ]
        lines += [f"  {finding}" for finding in self.findings]
        # what the blocks and the head add, measured
        lines += dict.fromkeys(f"  {one}" for found in self.contributions for one in found.wrong)
        if self.contributions and all(found.complete for found in self.contributions):
            lines += ["  every block and the head contribute what the plan says at the start"]
        if self.verdict == "undecided":
            lines += ["  undecided: more sizes or seeds make the intervals narrower"]
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
    branch_ends: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    make_plan: Callable[[nn.Module, nn.Module], Plan] | None = None,
    **more: Any,
) -> CoordCheck:
    """Train models of several widths and depths for some steps, and fit exponents.

    Widths are at the base's depth, depths at the base's width. Cost: for each size and seed steps +
    1 forward-plus-backward passes, and two norms for each matrix.

    Parameters
    ----------
    factory : (width, depth) → model, with residual blocks in one `nn.ModuleList`, without dropout.
        Its output is a tensor, or has one as its logits or first.
    loss : model → scalar loss on a fixed batch, from one call of the model.
    base : (width, depth) whose hyperparameters are given; it may be among the sizes.
    optimizer, other, k, branch_ends, roles : as `grsd.mup.planning`.
    lr, and `more` : base values, as `Plan.make_optimizer`.
    parametrization : "mup", or "sp": variance 1/fan-in for every matrix, one learning rate, and no
        multipliers.
    make_plan : (model, base model) → Plan, in place of `grsd.mup.planning`: for a rule to be
        tested.
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
    named: dict[str, Any] = {**who, "branch_ends": branch_ends, "roles": roles}

    def prepared(size: Size, seed: int) -> tuple[nn.Module, Plan]:
        model = factory(*size)
        made = make_plan(model, start) if make_plan else plan(model, base=start, **named)
        made = _standard(made) if parametrization == "sp" else made
        made.initialize_(model, seed=seed)
        return model, made

    trained = []
    for size in sizes:
        for seed in seeds:
            # weights, multipliers and rates by the plan
            model, made = prepared(size, seed)
            made.attach(model)
            stepper = made.make_optimizer(model, lr=lr, **more)
            trained.append((_run(model, made, stepper, loss, (*size, seed), steps), made))
    # matrices of another shape, such as one key head, have norms of their own
    apart = {unnumbered(e.name) for _, made in trained for e in made if e.shaped}
    runs = [_by_role(run, made, apart) for run, made in trained]
    check = _judge(runs, base, parametrization, **who)
    if check.verdict in ("flat", "not fitted") or not made.multipliers:
        return check
    # what does not pass is looked at: contributions at the largest width and at the largest depth
    found = []
    for size in dict.fromkeys((max(sizes), max(sizes, key=lambda one: one[1]))):
        model, made = prepared(size, seeds[0])
        # passes of one block cannot be told apart, and the slopes stand without them
        if not repeated(model):
            found.append(made.verify(model, loss, base=start))
    return replace(check, contributions=tuple(found))


def sizes_along(widths: Iterable[int], depths: Iterable[int], base: Size) -> list[Size]:
    """Return widths at the base's depth, then depths at its width, each size once."""
    return list(dict.fromkeys([*((w, base[1]) for w in widths), *((base[0], d) for d in depths)]))


def _standard(made: Plan) -> Plan:
    """Return a plan without scaling; matrices have variance 1/fan-in, embeddings the base's."""
    entries = []
    for e in unscaled(made):
        own = e.role == "input" and len(e.shape) == 2 and any(one.std for one in e.initial or ())
        if e.role in MATRICES and not (e.table or own) and e.initial != ():
            e = replace(e, initial=(Initial(0.0, e.fan_in**-0.5),))
        entries.append(e)
    return replace(made, entries=tuple(entries), multipliers=())


def _run(
    model: nn.Module, made: Plan, optimizer: Optimizer, loss: Loss, label: Label, steps: int
) -> Run:
    """Train, and watch what leaves the last block, and the model."""
    seen: dict[str, Tensor] = {}
    # the last block of the residual stack, whose output are the features
    stack, depth = stack_of(model)
    parameters, watched = (
        bare_parameters(model),
        {"outputs": "", "features": f"{stack}.{depth - 1}"},
    )
    before = {name: p.detach().clone() for name, p in parameters.items()}
    weights = _norms(made, before, gaussian=True)
    updates: dict[str, float] = {}
    start: dict[str, Tensor] = {}
    changes: dict[str, list[float]] = {what: [] for what in watched}
    losses = []

    def watch(what: str) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            seen[what] = tensor(out).detach().double()

        return hook

    modules = bare_modules(model, tied=True)
    handles = [modules[name].register_forward_hook(watch(what)) for what, name in watched.items()]
    try:
        for step in range(steps + 1):
            # what the model does before the step
            optimizer.zero_grad()
            now = loss(model)
            if silent := [name for what, name in watched.items() if what not in seen]:
                raise ValueError(
                    f"the block {silent[0]!r} is never called, so that what leaves it cannot be "
                    "watched; give the blocks a forward of their own"
                )
            start = start or dict(seen)
            for what, series in changes.items():
                series.append(float(rms_norm(seen[what] - start[what]).square().mean().sqrt()))
            losses.append(float(now.detach()))
            if step < steps:
                backward(now, optimizer)
                optimizer.step()
            # the first update, whose norms the condition fixes
            if step == 0:
                change = {name: p.detach() - before[name] for name, p in parameters.items()}
                updates = _norms(made, change)
    finally:
        for handle in handles:
            handle.remove()
    return Run(
        *label,
        features=tuple(changes["features"]),
        outputs=tuple(changes["outputs"]),
        losses=tuple(losses),
        weights={},
        updates={},
        modules={name: (weights[name], updates[name]) for name in weights},
    )


def _norms(made: Plan, tensors: Mapping[str, Tensor], gaussian: bool = False) -> dict[str, float]:
    """Return α times the typical norm of every parameter; of a table, that of its largest row."""
    norms = {}
    for e in made:
        x, scale = tensors[e.name], e.multiplier
        if gaussian and x.ndim > 1 and e.role in ("input", "output") and not e.table:
            fan_out, fan_in = (x.mT if e.transposed else x).flatten(1).shape
            scale /= 1 + math.sqrt(fan_in / fan_out if e.role == "input" else fan_out / fan_in)
        norms[e.name] = scale * typical_norm(x, e)
    return norms


def _by_role(run: Run, made: Plan, apart: set[str]) -> Run:
    """Return the run with its norms by role, without the matrices whose shapes grow otherwise."""
    means = [
        geometric_means(
            [(e.role, run.modules[e.name][i]) for e in made if unnumbered(e.name) not in apart]
        )
        for i in (0, 1)
    ]
    return replace(run, weights=means[0], updates=means[1])


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
    # the verdict, from the change of features and of the output
    slopes, first = (fit_along(sizes, [r.features[i] for r in runs], base) for i in (-1, 1))
    outs = fit_along(sizes, [r.outputs[-1] for r in runs], base)
    broken = any(not math.isfinite(v) for r in runs for v in (*r.features, *r.losses))
    placed = {slope.against() for slope in (*slopes.values(), *outs.values())}
    verdict = (
        "diverged"
        if broken
        else "not fitted"
        if not slopes
        else "not flat"
        if "outside" in placed
        else "undecided"
        if "undecided" in placed
        else "flat"
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
                if slope.against(wanted) == "outside":
                    condition = _condition(role, quantity, k)
                    findings.append(Finding(role, quantity, axis, slope, wanted, condition))
    return CoordCheck(
        tuple(runs), optimizer, parametrization, slopes, first, outs, verdict, tuple(findings)
    )


def _condition(role: str, quantity: str, k: int) -> str:
    """Return the name of the condition on a norm in the paper."""
    if role.endswith("bias"):
        return "B.3"
    if role == "hidden" and k == 1:
        return "B.1"
    return f"C{1 if quantity == 'initial norm' else 2}.{2 if role == 'hidden' else 1}"
