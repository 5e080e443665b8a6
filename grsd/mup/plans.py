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
from grsd.mup.attention import Attention, MultiplyQueries, Scaled
from grsd.mup.contributions import Multiply, Verification, multiplying
from grsd.mup.families import Split
from grsd.mup.initial import Initial
from grsd.mup.optimizers import pieces
from grsd.mup.registry import INITIAL, assemble, row
from grsd.mup.roles import Multiplier, bare_modules, bare_parameters, is_conv1d
from grsd.mup.rules import ROLES, Rule, Scale
from grsd.mup.schedules import Budget
from grsd.mup.sharding import drawable, mesh_of, put

NO_DECAY = ("gains", "biases", "embeddings")
"""What is usually trained without weight decay."""


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
    table: bool = False  #: rows that are added to the stream: their norms are what a token meets
    clip: float | None = None
    block: int | None = None  #: the residual block that holds it; None outside the stack

    @property
    def layout(self) -> dict[str, Any]:
        """How the matrix is stored, as `grsd.mup.optimizers.pieces` and groups take it."""
        return {name: getattr(self, name) for name in ("split", "transposed", "batched", "rates")}

    @property
    def kind(self) -> str:
        """What `no_decay` calls it: an embedding, a bias, a gain (any vector), or none."""
        if self.table:
            return "embeddings"
        vector = self.role.endswith("bias") or len(self.shape) < 2
        return ("biases" if self.name.endswith("bias") else "gains") if vector else "weights"

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
    attention: tuple[Attention, ...] = ()  #: factors on scores, where heads grow
    embedded: float = 1.0  #: the user's factor on embeddings
    independent: bool = False  #: weight decay is that of a step, not multiplied by η

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
        A sharded model gets what the whole one would: every process draws alike, and keeps its own.
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
                if not drawn:
                    continue
                full = drawable(parameter)
                apart = pieces(full, entry.layout) if len(drawn) > 1 else [full]
                for part, one in zip(apart, drawn, strict=False):
                    one.draw_(part, entry.std, generator)
                put(parameter, full)

    def attach(self, model: nn.Module) -> list[RemovableHandle | Scaled]:
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
        # attention first: by its own scaling, or by its queries
        handles: list[RemovableHandle | Scaled] = []
        for name, factor, queries in self.attention:
            if queries is None:
                handles.append(Scaled(modules[name], factor))
            else:
                hook = MultiplyQueries(factor, queries)
                handles.append(modules[name].register_forward_hook(hook))
        # one hook a multiplier, on what enters a head or leaves a branch
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
            return contributions.measure(
                model, batch, self.multipliers, self.r_n, base, self.embedded
            )
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
            if not isinstance(end, nn.Linear) and not is_conv1d(end):
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
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float | Mapping[str, float] | None = None,
        other_ratio: float = 1.0,
        no_decay: Sequence[str] = (),
        batch: float = 1.0,
        horizon: float = 1.0,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return optimizer name → parameter groups of this model from the base values.

        Groups carry `role` and `mup_lr`, the factor on η, so that a scheduler that scales every
        group's `lr` keeps their ratios. The arguments are those of `make_optimizer`.
        """
        checks.positive("lr", lr)
        checks.at_least("weight_decay", weight_decay, 0)
        checks.positive("other_ratio", other_ratio)
        used = {e.optimizer for e in self}
        for name in eps if isinstance(eps, Mapping) else ():
            checks.one_of("an optimizer of eps", name, tuple(sorted(used)))
        for kind in no_decay:
            checks.one_of("no_decay", kind, NO_DECAY)
        first = next((e.optimizer for e in self if e.role == "hidden"), None)
        groups: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        for parameter, e in self.matched(model):
            if not parameter.requires_grad:
                continue
            # numbers of the base at this batch and horizon, then the plan's factors
            budget = Budget.of(e.optimizer, batch, horizon)
            rate = e.lr * budget.lr * (1.0 if e.optimizer == first else other_ratio)
            decay = weight_decay * e.weight_decay * budget.weight_decay
            if self.independent:
                # a step's decay is η λ: e.weight_decay is 1/e.lr, and the rest goes here
                decay = weight_decay * budget.decay / (lr * rate)
            # parameters whose numbers agree, on the same devices, share a group
            decay = 0.0 if e.kind in no_decay else decay
            key = (e.role, rate, decay, e.eps, e.clip, *e.layout.values(), mesh_of(parameter))
            group = groups.setdefault(e.optimizer, {}).setdefault(key, {"params": []})
            group["params"].append(parameter)
            group |= {"role": e.role, "mup_lr": rate, "lr": lr * rate, "weight_decay": decay}
            # what some optimizers alone ask for
            if row(e.optimizer).matrices_only:
                group |= e.layout
            if e.clip is not None:
                group["mup_clip"] = e.clip
            stabilizer = eps.get(e.optimizer) if isinstance(eps, Mapping) else eps
            if stabilizer is not None:
                group["eps"] = stabilizer * budget.eps * (1.0 if e.eps is None else e.eps)
        return {name: list(by_key.values()) for name, by_key in groups.items()}

    def make_optimizer(
        self,
        model: nn.Module,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        **base: Any,
    ) -> torch.optim.Optimizer:
        """Return one optimizer for the model; a scheduler drives all of its groups.

        Lion, SOAP and Sophia need `pytorch_optimizer`.

        Parameters
        ----------
        lr, weight_decay, eps : of the base model; of ε one for all, or one by optimizer: SOAP
            compares its own with a norm, AdamW with an entry of the gradient.
        options : further arguments by optimizer, ``{"adamw": {"betas": (0.9, 0.95)}}``.
        other_ratio : the rate of what steps the rest, over that of hidden matrices at the base: the
            experiments of 2603.00541 have 0.1 for AdamW beside Muon, and 2 beside Shampoo.
        no_decay : kinds of parameters without decay; the usual ones are `NO_DECAY`.
        batch, horizon : batch size and number of tokens over those that the base's values were
            tuned at; `grsd.mup.schedules.Budget` has the rules and their sources.
        """
        groups = self.param_groups(model, **base)
        return assemble(groups, base["lr"], options)

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
    return replace(made, entries=entries, multipliers=(), attention=(), embedded=1.0)


def numbers(rule: Rule, r_n: float, r_L: float, own: float = 1.0) -> dict[str, Any]:
    """Return the numbers of an entry: its rule at the ratios, and √ of the variance's factor.

    `own` is a factor of the user on the multiplier.
    """
    scales = {one.name: getattr(rule, one.name) for one in fields(rule)}
    numbers: dict[str, Any] = {n: None if s is None else s.at(r_n, r_L) for n, s in scales.items()}
    numbers["multiplier"] *= own
    return numbers | {"std": math.sqrt(numbers.pop("variance"))}


def _folded(e: Entry, factor: float) -> Entry:
    """Return the entry of a weight that its multiplier was multiplied into."""
    known = row(e.optimizer)
    power = factor**2 if known.kind == "gradient" else factor
    return replace(
        e,
        multiplier=1.0,
        std=e.std * factor,
        initial=e.initial and tuple(one._replace(mean=one.mean * factor) for one in e.initial),
        lr=e.lr * power,
        weight_decay=e.weight_decay / power,
        eps=None if e.eps is None else e.eps / factor ** (2 if known.eps == "square" else 1),
    )


# of a table, in the order of a rule's fields
_NAMES = "block multiplier α, initial variance σ², learning rate η, weight decay λ, stabilizer ε"
_ROWS = (*_NAMES.split(", "), "clipping ρ")


def _cell(scale: Scale | None, value: float | None) -> str:
    if scale is None or value is None:
        return "–"
    if str(scale) == "1":
        return f"{value:.4g}"
    return f"{scale} = {value:.4g}"
