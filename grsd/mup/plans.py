"""A plan: every parameter's role, multiplier, variance, η, λ and ε, and what a model does with it.

Nothing of it lives on tensors: it is a table of names and numbers, so that saving, compiling and
wrapping the model leave it alone. `grsd.mup.planning` makes it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grsd import checks
from grsd.figures import Table
from grsd.mup import contributions
from grsd.mup.contributions import Multiply, Verification, multiplying
from grsd.mup.families import Split
from grsd.mup.initial import Initial
from grsd.mup.norms import DENSE, rms_norm, rms_operator_norm
from grsd.mup.optimizers import pieces
from grsd.mup.registry import INITIAL, assemble, row
from grsd.mup.roles import Multiplier, bare_modules, bare_parameters
from grsd.mup.rules import MATRICES, ROLES, Rule, Scale


@dataclass(frozen=True)
class Entry:
    """One parameter's line of the plan; a tied one stands under its first name.

    The numbers are factors on base values: the rule at this model's ratios, None where it has none.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    optimizer: str
    rule: Rule
    multiplier: float
    std: float
    lr: float
    weight_decay: float
    eps: float | None
    #: what the base model's values are drawn from, part by part; None if that is not known, ()
    #: where the model's own stay
    initial: tuple[Initial, ...] | None
    split: Split = 1  #: equal parts fused along outputs, or sizes of parts that come again
    transposed: bool = False  #: stored (n_in, n_out)
    batched: bool = False  #: several matrices, one for each index of the first axis
    rates: tuple[float, ...] = ()  #: factors on η of fused parts that grow by ratios of their own
    shaped: bool = False  #: a hidden matrix whose sides do not grow like r_n, both
    clip: float | None = None
    block: int | None = None  #: the residual block that holds it; None outside the stack

    @property
    def layout(self) -> dict[str, Any]:
        """How the matrix is stored, as `grsd.mup.optimizers.pieces` and groups take it."""
        return {name: getattr(self, name) for name in ("split", "transposed", "batched", "rates")}

    @property
    def fan_in(self) -> int:
        """The inputs of a matrix."""
        shape = self.shape[1:] if self.batched else self.shape
        return shape[0] if self.transposed else math.prod(shape[1:])


@dataclass(frozen=True)
class Plan:
    """What to do with a model so that the base model's hyperparameters hold for it."""

    entries: tuple[Entry, ...]  #: in the order of `model.named_parameters()`
    multipliers: tuple[Multiplier, ...]  #: one for each head and each end of a residual branch
    r_n: float  #: width and depth ratio to the base model
    r_L: float
    k: int  #: layers per residual block, 1 or 2 (2 stands for more)
    tied: tuple[tuple[str, ...], ...] = ()  #: groups of names that share one tensor
    notes: tuple[str, ...] = ()  #: what the plan leaves to the reader

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"the plan has no parameter {name!r}")

    def table(self) -> str:
        """Return the plan laid out as the paper's tables, a column for every role and optimizer.

        A cell is the factor on the base value, as a formula and, where it is not 1, as a number.
        """
        seen: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in sorted(self.entries, key=lambda e: ROLES.index(e.role)):
            key = (entry.role, entry.optimizer, entry.rule, entry.lr)
            seen.setdefault(key, []).append(entry)
        # one column for every role, optimizer and rule
        columns = [["", "optimizer", "tensors", *_ROWS]]
        for (role, optimizer, rule, _), group in seen.items():
            e = group[0]
            head = role.replace("_bias", " biases") if role.endswith("bias") else f"{role} weights"
            values = (e.multiplier, e.std**2, e.lr, e.weight_decay, e.eps, e.clip)
            # the fields of a rule stand in the order of the rows
            formulas = (getattr(rule, one.name) for one in fields(rule))
            cells = list(map(_cell, formulas, values))
            columns.append([head, optimizer, str(len(group)), *cells])
        # a head that is tied has the numbers of its first name, and a multiplier of its own
        again = {name for names in self.tied for name in names[1:]}
        heads = [m for m in self.multipliers if f"{m.module}.weight" in again]
        if heads:
            cells = [_cell(INITIAL["output"][0], heads[0].factor), *["–"] * 5]
            columns.append(["output, tied", "(as input)", str(len(heads)), *cells])
        # what no column has is left out
        rows = [cells for cells in zip(*columns, strict=True) if set(cells[1:]) != {"–"}]
        k = "k = 1" if self.k == 1 else "k ≥ 2"
        title = f"width ratio r_n = {self.r_n:g}, depth ratio r_L = {self.r_L:g}, {k}"
        return "\n".join([title, str(Table(rows[0], rows[1:])), *self.notes])

    def __str__(self) -> str:
        return self.table()

    def initialize_(
        self, model: nn.Module, *, seed: int, std: Mapping[str, float] | None = None
    ) -> None:
        """Draw the weights again: as the base's, with its deviation times √(variance factor).

        What is constant in the base model (zero biases, gains of one) is set to that constant, rows
        of zeros stay zero, and what has a structure (a state space's A) stays as it is in the
        model. `std` (role → σ_b) takes the place of the base model's, or of one that was not given.
        """
        generator = torch.Generator().manual_seed(seed)
        given = std or {}
        for entry in self.entries:
            if entry.initial is None and entry.role not in given:
                raise ValueError(
                    "the plan does not know the base's initial values of "
                    f"{entry.name!r}: give std={{{entry.role!r}: …}}, or make it with a base= that "
                    "has weights"
                )
        with torch.no_grad():
            for parameter, entry in self.matched(model):
                drawn = (Initial(0.0),) if entry.initial is None else entry.initial
                if entry.role in given:
                    size = given[entry.role]
                    drawn = tuple(one._replace(std=size, noise="normal") for one in drawn)
                apart = pieces(parameter, entry.layout) if len(drawn) > 1 else [parameter]
                for part, one in zip(apart, drawn, strict=False):
                    one.draw_(part, entry.std, generator)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Multiply by forward hooks; return their handles (`handle.remove()` takes one off).

        By default `torch.compile` would give a model the graph, and so the multipliers, of another
        of its class; this makes it look at hooks (`skip_nnmodule_hook_guards = False`).
        """
        tracer: Any = importlib.import_module("torch._dynamo.config")
        tracer.skip_nnmodule_hook_guards = False
        # hooks of two plans would multiply twice
        self.matched(model)
        modules = bare_modules(model)
        for name, module in modules.items():
            if multiplying(module):
                raise ValueError(
                    f"{name!r} already carries a multiplier; remove the earlier plan's hooks first"
                )
        # one hook a multiplier, on what enters a head or leaves a branch
        handles = []
        for name, factor, side in self.multipliers:
            if side == "output":
                handles.append(modules[name].register_forward_hook(Multiply(factor)))
            else:
                handles.append(modules[name].register_forward_pre_hook(Multiply(factor)))
        return handles

    def verify(
        self, model: nn.Module, batch: Any, *, base: nn.Module | None = None
    ) -> Verification:
        """Measure what every block adds and what the head gives, and compare with the multipliers.

        `batch` is what the model is called with (a tensor, a tuple or keywords), or a function of
        the model. With `base`, the size of what enters the stack is compared too, and at the base's
        depth of what enters the head: a power of the width in the model itself shows there.
        Multipliers that are attached stay so; others are for the time of the call alone.
        """
        attached = any(multiplying(module) for module in model.modules())
        handles = [] if attached else self.attach(model)
        try:
            return contributions.measure(model, batch, self.multipliers, self.r_n, base)
        finally:
            for handle in handles:
                handle.remove()

    def fold_(self, model: nn.Module) -> Plan:
        """Multiply the multipliers into the weights, and return the plan of the same training.

        With W' = αW: a normalised update needs η' = αη and λ' = λ/α (AdamW: ε' = ε/α), a gradient
        step η' = α²η, λ' = λ/α². Refused are a weight that is used elsewhere too (tied embeddings)
        and a branch that does not end in a linear layer of its own.
        """
        matched = {entry.name: parameter for parameter, entry in self.matched(model)}
        shared = {name for group in self.tied for name in group}
        modules = bare_modules(model)
        # which parameters take which factor; nothing is changed before all of them are known
        factors: dict[str, float] = {}
        for module, factor, side in self.multipliers:
            end = modules[module]
            if not isinstance(end, nn.Linear) and type(end).__name__ != "Conv1D":
                raise ValueError(
                    f"{module!r} is a {type(end).__name__} and no linear layer to fold {factor:g} "
                    "into; name the branch's last linear layer in branch_ends, or use attach()"
                )
            for local, p in end.named_parameters(recurse=False):
                name = f"{module}.{local}"
                if side == "input" and p.ndim < 2:
                    continue
                if name in shared:
                    raise ValueError(
                        f"{name!r} shares its tensor with another layer, which folding would scale "
                        "too; use attach()"
                    )
                factors[name] = factor
        # W' = αW, and the plan's numbers with it
        with torch.no_grad():
            for name, factor in factors.items():
                matched[name].mul_(factor)
        entries = tuple(_folded(e, factors[e.name]) if e.name in factors else e for e in self)
        return replace(self, entries=entries, multipliers=())

    def param_groups(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, eps: float | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Return optimizer name → parameter groups of this model from the base values.

        Groups carry `role` and `mup_lr`, the factor on η, so that a scheduler that scales every
        group's `lr` keeps their ratios.
        """
        checks.positive("lr", lr)
        checks.at_least("weight_decay", weight_decay, 0)
        groups: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        for parameter, e in self.matched(model):
            if not parameter.requires_grad:
                continue
            key = (e.role, e.lr, e.weight_decay, e.eps, e.clip, *e.layout.values())
            # parameters whose numbers agree share a group
            group = groups.setdefault(e.optimizer, {}).setdefault(key, {"params": []})
            group["params"].append(parameter)
            group |= {"role": e.role, "mup_lr": e.lr, "lr": lr * e.lr}
            group["weight_decay"] = weight_decay * e.weight_decay
            # what some optimizers alone ask for
            if row(e.optimizer).matrices_only:
                group |= e.layout
            if e.clip is not None:
                group["mup_clip"] = e.clip
            if eps is not None:
                group["eps"] = eps * (1.0 if e.eps is None else e.eps)
        return {name: list(by_key.values()) for name, by_key in groups.items()}

    def make_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> torch.optim.Optimizer:
        """Return one optimizer for the model; a scheduler drives all of its groups.

        `lr`, `weight_decay` and `eps` are those of the base model; `options` are further arguments
        by optimizer, ``{"adamw": {"betas": (0.9, 0.95)}}``. Lion, SOAP and Sophia need
        `pytorch_optimizer`.
        """
        groups = self.param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps)
        return assemble(groups, lr, options)

    def matched(self, model: nn.Module) -> list[tuple[Tensor, Entry]]:
        """Return (parameter, entry) pairs; compile, DDP and FSDP are seen through."""
        parameters = bare_parameters(model)
        if strangers := sorted(parameters.keys() ^ {e.name for e in self.entries}):
            raise ValueError(
                f"the plan was made for another model: {strangers[0]!r} and {len(strangers) - 1} "
                "more do not match"
            )
        for e in self.entries:
            shape = tuple(parameters[e.name].shape)
            if shape != e.shape:
                raise ValueError(f"{e.name!r} has shape {shape}; the plan was made for {e.shape}")
        return [(parameters[e.name], e) for e in self.entries]


def unscaled(made: Plan) -> Plan:
    """Return the plan of standard parametrization: the base's variance and rate at every size."""
    entries = tuple(replace(e, rates=(), **numbers(e.rule, 1.0, 1.0)) for e in made)
    return replace(made, entries=entries, multipliers=())


def numbers(rule: Rule, r_n: float, r_L: float) -> dict[str, Any]:
    """Return the numbers of an entry: its rule at the ratios, and √ of the variance's factor."""
    scales = {one.name: getattr(rule, one.name) for one in fields(rule)}
    numbers: dict[str, Any] = {n: None if s is None else s.at(r_n, r_L) for n, s in scales.items()}
    return numbers | {"std": math.sqrt(numbers.pop("variance"))}


def _folded(e: Entry, factor: float) -> Entry:
    """Return the entry of a weight that its multiplier was multiplied into."""
    power = factor**2 if row(e.optimizer).kind == "gradient" else factor
    return replace(
        e,
        multiplier=1.0,
        std=e.std * factor,
        initial=e.initial and tuple(one._replace(mean=one.mean * factor) for one in e.initial),
        lr=e.lr * power,
        weight_decay=e.weight_decay / power,
        eps=None if e.eps is None else e.eps / factor,
    )


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
    return {role: math.exp(math.fsum(values) / len(values)) for role, values in logs.items()}


_ROWS = (  # of a table, in the order of a rule's fields
    "block multiplier α",
    "initial variance σ²",
    "learning rate η",
    "weight decay λ",
    "stabilizer ε",
    "clipping ρ",
)


def _cell(scale: Scale | None, value: float | None) -> str:
    if scale is None or value is None:
        return "–"
    return str(scale) if str(scale) == "1" else f"{scale} = {value:.4g}"
