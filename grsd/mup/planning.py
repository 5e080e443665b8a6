"""From two sizes of one architecture to a plan: the role of every parameter, and its multiplier, variance, η, λ and ε.

`plan` compares a model with a base model of the same architecture. A parameter's role follows from where it is (inside the residual
stack or outside) and from which of its sides grow. Nothing of the plan lives on tensors: it is a table of names and numbers,
so saving, compiling and wrapping the model leave it alone.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grsd.mup.optimizers import assemble
from grsd.mup.roles import (
    BRANCH_ENDS,
    FUSED,
    Fused,
    Layout,
    Multiplier,
    partner,
    plain,
    split_of,
    stack_of,
    tied,
    unmatched,
    width_ratio,
)
from grsd.mup.rules import OPTIMIZERS, ROLES, Rule, Scale, rule

__all__ = ["BRANCH_ENDS", "FUSED", "Entry", "Plan", "plan"]

WeightDecay = Literal["paper", "unscaled"]


@dataclass(frozen=True)
class Entry:
    """One parameter's line of the plan. Every number is a factor on the base value.

    Attributes
    ----------
    name : the parameter (tied ones under their first name).
    role : one of `grsd.mup.rules.ROLES`.
    shape : tuple of int.
    optimizer : the optimizer that gets it.
    rule : Rule, the exponents of (r_n, r_L).
    multiplier, std, lr, weight_decay, eps, clip : the rule at this model's ratios; the last two None without a rule.
    split : how a matrix is fused along its outputs: parts, or (blocks, parts) when parts alternate in blocks.
    transposed : bool, stored (n_in, n_out).
    std_base : float or None, standard deviation of the base model's values; None for a plan without a base model.
    mean_base : float, their mean (1 for a norm's gain).
    block : the residual block that holds it; None outside the stack.
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
    std_base: float | None
    mean_base: float
    split: int | tuple[int, int] = 1
    transposed: bool = False
    clip: float | None = None
    block: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to do with a model so that the base model's hyperparameters hold for it.

    Attributes
    ----------
    entries : tuple of Entry, in the order of `model.named_parameters()`.
    multipliers : tuple of Multiplier, one for each head and each end of a residual branch.
    r_n, r_L : float, width and depth ratio to the base model.
    k : layers per residual block, 1 or 2 (2 stands for more).
    tied : groups of names that share one tensor.
    notes : what the plan leaves to the reader.
    """

    entries: tuple[Entry, ...]
    multipliers: tuple[Multiplier, ...]
    r_n: float
    r_L: float
    k: int
    tied: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"the plan has no parameter {name!r}")

    def table(self) -> str:
        """Return the plan laid out as the paper's tables: a row for every hyperparameter, a column for every role and optimizer.

        A cell is the factor on the base value, as a formula and, where it is not 1, as a number.
        """
        seen: dict[tuple[str, str], list[Entry]] = {}
        for entry in sorted(self.entries, key=lambda e: ROLES.index(e.role)):
            seen.setdefault((entry.role, entry.optimizer), []).append(entry)
        columns = [["", "optimizer", "tensors", *(words for words, _ in _ROWS)]]
        for (role, optimizer), group in seen.items():
            e = group[0]
            values = (e.multiplier, e.std**2, e.lr, e.weight_decay, e.eps, e.clip)
            cells = [
                _cell(get(e.rule), value) for (_, get), value in zip(_ROWS, values, strict=True)
            ]
            columns.append([_HEADS[role], optimizer, str(len(group)), *cells])
        rows = [row for row in zip(*columns, strict=True) if any(cell != "–" for cell in row[1:])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head = f"width ratio r_n = {self.r_n:g}, depth ratio r_L = {self.r_L:g}, k {'= 1' if self.k == 1 else '≥ 2'}"
        body = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([head, *body, *self.notes])

    def __str__(self) -> str:
        return self.table()

    def initialize_(
        self, model: nn.Module, *, seed: int, std: Mapping[str, float] | None = None
    ) -> None:
        """Draw the weights again: normal with the base model's standard deviation times √(variance factor), at the base's mean.

        Tensors that are constant in the base model (zero biases, gains of one) are set to that constant.

        Parameters
        ----------
        std : mapping, optional
            Role → σ_b, in place of the base model's. A plan without a base model needs one for every role with drawn weights.

        Raises
        ------
        ValueError
            A plan without a base model, and no `std` for a role.
        """
        generator = torch.Generator().manual_seed(seed)
        given = std or {}
        for entry in self.entries:
            if entry.std_base is None and entry.role not in given:
                raise ValueError(
                    f"the plan was made from ratios and does not know the base's initial values of {entry.name!r}: "
                    f"give std={{{entry.role!r}: …}}, or make the plan with base="
                )
        with torch.no_grad():
            for parameter, entry in self._matched(model):
                size = given.get(entry.role, entry.std_base or 0.0)
                parameter.fill_(entry.mean_base)
                if size > 0:
                    noise = torch.randn(entry.shape, generator=generator, dtype=torch.float32)
                    parameter.add_((size * entry.std * noise).to(parameter))

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Multiply by forward hooks; return their handles (`handle.remove()` takes one off).

        `torch.compile` by default reuses a graph for a model of the same class whose hooks differ, and would so give it the multipliers
        of another plan; this method makes it look at hooks (`torch._dynamo.config.skip_nnmodule_hook_guards = False`).
        """
        tracer: Any = importlib.import_module("torch._dynamo.config")
        tracer.skip_nnmodule_hook_guards = False
        self._matched(model)
        for name, module in model.named_modules():
            if any(
                isinstance(h, _Multiply)
                for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            ):
                raise ValueError(
                    f"{name!r} already carries a multiplier; remove the hooks of the earlier plan first"
                )
        modules = {plain(name): module for name, module in model.named_modules()}
        handles = []
        for name, factor, side in self.multipliers:
            hook = _Multiply(factor)
            module = modules[name]
            handles.append(
                module.register_forward_hook(hook)
                if side == "output"
                else module.register_forward_pre_hook(hook)
            )
        return handles

    def fold_(self, model: nn.Module) -> Plan:
        """Multiply the multipliers into the weights instead, and return the plan whose η, λ and ε make the same training.

        With W' = αW: a normalised update needs η' = αη and λ' = λ/α (AdamW: ε' = ε/α), a gradient step η' = α²η, λ' = λ/α².

        Raises
        ------
        ValueError
            A weight that is used elsewhere too (tied embeddings): it would be scaled there as well. A branch that does not end in a
            linear layer of its own (a container, `nn.MultiheadAttention`): there is no weight to fold into.
        """
        matched = {entry.name: parameter for parameter, entry in self._matched(model)}
        shared = {name for group in self.tied for name in group}
        changed: dict[str, float] = {}
        modules = {plain(name): module for name, module in model.named_modules()}
        for module, factor, side in self.multipliers:
            if any(modules[module].children()) or not hasattr(modules[module], "weight"):
                raise ValueError(
                    f"{module!r} is a {type(modules[module]).__name__} and no linear layer, so its factor {factor:g} cannot be folded into one "
                    "weight; name the branch's last linear layer in branch_ends, or use attach()"
                )
            for local, p in modules[module].named_parameters(recurse=False):
                if side == "input" and p.ndim < 2:
                    continue
                name = f"{module}.{local}"
                if name in shared:
                    raise ValueError(
                        f"{name!r} shares its tensor with another layer, which folding would scale too; use attach()"
                    )
                changed[name] = factor
        entries = []
        with torch.no_grad():
            for entry in self.entries:
                if entry.name not in changed:
                    entries.append(entry)
                    continue
                factor = changed[entry.name]
                matched[entry.name].mul_(factor)
                gradient = OPTIMIZERS[entry.optimizer].kind == "gradient"
                power = factor**2 if gradient else factor
                entries.append(
                    replace(
                        entry,
                        multiplier=1.0,
                        std=entry.std * factor,
                        mean_base=entry.mean_base * factor,
                        lr=entry.lr * power,
                        weight_decay=entry.weight_decay / power,
                        eps=None if entry.eps is None else entry.eps / factor,
                    )
                )
        return replace(self, entries=tuple(entries), multipliers=())

    def param_groups(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, eps: float | None = None
    ) -> dict[str, list[dict[str, Any]]]:
        """Return optimizer name → parameter groups with `lr`, `weight_decay`, `eps` of this model from the base values.

        Groups carry `role` and `mup_lr`, the factor on η, so that a scheduler that scales every group's `lr` keeps their ratios.
        """
        if not lr > 0 or not math.isfinite(lr):
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        made: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
        for parameter, entry in self._matched(model):
            if not parameter.requires_grad:
                continue
            key = (
                entry.role,
                entry.lr,
                entry.weight_decay,
                entry.eps,
                entry.clip,
                entry.split,
                entry.transposed,
            )
            fresh: dict[str, Any] = {
                "params": [],
                "role": entry.role,
                "mup_lr": entry.lr,
                "lr": lr * entry.lr,
            }
            fresh["weight_decay"] = weight_decay * entry.weight_decay
            if OPTIMIZERS[entry.optimizer].matrices_only:
                fresh |= {"split": entry.split, "transposed": entry.transposed}
            if entry.clip is not None:
                fresh["mup_clip"] = entry.clip
            if eps is not None:
                fresh["eps"] = eps * (1.0 if entry.eps is None else entry.eps)
            made.setdefault(entry.optimizer, {}).setdefault(key, fresh)["params"].append(parameter)
        return {name: list(groups.values()) for name, groups in made.items()}

    def make_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        eps: float | None = None,
        options: dict[str, dict[str, Any]] | None = None,
    ) -> torch.optim.Optimizer:
        """Return one optimizer for the model; several are combined, and a scheduler drives all of their groups.

        Parameters
        ----------
        lr, weight_decay, eps : base values, those of the base model.
        options : optimizer name → further arguments, e.g. ``{"adamw": {"betas": (0.9, 0.95)}}``.

        Raises
        ------
        ImportError
            Lion, SOAP or Sophia without `pytorch_optimizer`.
        """
        return assemble(
            self.param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps), lr, options
        )

    def _matched(self, model: nn.Module) -> list[tuple[Tensor, Entry]]:
        """Return (parameter, entry) pairs; wrappers that prefix names (compile, DDP, FSDP) are seen through."""
        found = {plain(name): parameter for name, parameter in model.named_parameters()}
        missing = [e.name for e in self.entries if e.name not in found]
        if missing or len(found) != len(self.entries):
            other = missing or sorted(set(found) - {e.name for e in self.entries})
            raise ValueError(
                f"the plan was made for another model: {other[0]!r} and {len(other) - 1} more do not match"
            )
        for e in self.entries:
            if tuple(found[e.name].shape) != e.shape:
                raise ValueError(
                    f"{e.name!r} has shape {tuple(found[e.name].shape)}; the plan was made for {e.shape}"
                )
        return [(found[e.name], e) for e in self.entries]


def plan(
    model: nn.Module,
    *,
    base: nn.Module | None = None,
    r_n: float | None = None,
    r_L: float | None = None,
    optimizer: str,
    other: str = "adamw",
    k: int = 2,
    wd_rule: WeightDecay = "paper",
    roles: Mapping[str, str] | None = None,
    branch_ends: Sequence[str] = BRANCH_ENDS,
    fused: Fused | None = None,
) -> Plan:
    """Compare a model with its base and return the plan.

    Parameters
    ----------
    model, base : nn.Module
        One architecture at two sizes. They may be the same size; ratios are then 1 and every factor is 1.
    r_n, r_L : float
        Width and depth ratio, in place of a base model. Roles then follow from the position alone, and `Plan.initialize_` needs
        the base's standard deviations.
    optimizer : str
        One of `grsd.mup.rules.OPTIMIZERS`, for hidden matrices and all that it can take.
    other : str
        For what `optimizer` cannot take or the paper does not give it: with a matrix optimizer, everything but hidden matrices.
    k : int
        Layers per residual branch; 1 gives the rules of condition B.1.
    wd_rule : str
        "paper": λ as in tables 2–6; "unscaled": λ is not scaled.
    fused : mapping
        Pattern of parameter names → `Entry.split`, for matrices that hold several. "heads" stands for (heads of the model, 3).
    roles : mapping, optional
        Pattern of parameter names → role, for those that cannot be told from shapes. Patterns are tried in order.
    branch_ends : patterns of module names
        Layers whose output is added to the residual stream; they get the block's multiplier.

    Raises
    ------
    ValueError
        Another architecture, ratios that differ from layer to layer or are not positive, both a base and ratios, a parameter without
        a role (named, with what to say), a tensor in two roles whose rules differ, no residual stack, no branch end, a pattern that matches
        nothing.

    Warns
    -----
    UserWarning
        For an optimizer whose rule is known to fail: see `grsd.mup.rules.Optimizer.caution`.
    """
    for name in (optimizer, other):
        if name not in OPTIMIZERS:
            raise ValueError(
                f"no rule for the optimizer {name!r}; there are {', '.join(OPTIMIZERS)}"
            )
    if OPTIMIZERS[other].matrices_only:
        raise ValueError(
            f"other = {other!r} takes matrices only; biases and embeddings need a vector optimizer: 'adamw'"
        )
    if wd_rule not in ("paper", "unscaled"):
        raise ValueError(f'wd_rule must be "paper" or "unscaled", got {wd_rule!r}')
    if (base is None) == (r_n is None and r_L is None):
        raise ValueError(
            "give either base=, a model of the same architecture, or the ratios r_n= and r_L="
        )
    caution = OPTIMIZERS[optimizer].caution
    if caution:
        warnings.warn(caution, stacklevel=2)
    stack, depth = stack_of(model)
    every = [plain(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    unmatched([*(roles or {})], every, "roles")
    unmatched([pattern for pattern in fused or {} if pattern not in FUSED], every, "fused")
    parameters = {plain(name): p for name, p in model.named_parameters()}
    shared = tied(model)
    names = [*parameters, *(name for group in shared for name in group[1:])]
    if base is None:
        r_n, r_L = (1.0 if r is None else float(r) for r in (r_n, r_L))
        Scale().at(r_n, r_L)  # refuses what is no ratio
        pairs: dict[str, Tensor] = {
            name: parameters[next((g[0] for g in shared if name in g), name)] for name in names
        }
        compared = False
    else:
        base_stack, base_depth = stack_of(base)
        if stack != base_stack:
            raise ValueError(
                f"the residual stacks differ: {stack!r} here, {base_stack!r} in the base model"
            )
        base_parameters = {
            plain(name): p for name, p in base.named_parameters(remove_duplicate=False)
        }
        pairs = {name: partner(name, base_parameters, stack, base_depth) for name in names}
        r_n, r_L = (
            width_ratio({name: (p, pairs[name]) for name, p in parameters.items()}),
            depth / base_depth,
        )
        compared = r_n != 1.0
    layout = Layout(
        {plain(name): m for name, m in model.named_modules()},
        list(parameters),
        stack,
        compared,
        roles or {},
    )

    owner = {name: group[0] for group in shared for name in group}
    assigned = {
        name: layout.role(name, parameters[owner.get(name, name)], pairs[name]) for name in names
    }
    entries = []
    for name, p in parameters.items():
        role = assigned[name]
        which = optimizer if role == "hidden" or not OPTIMIZERS[optimizer].matrices_only else other
        found = rule(which, role, k)
        for twin in next((group for group in shared if group[0] == name), ())[1:]:
            second = rule(which, assigned[twin], k)
            if (found.lr, found.weight_decay, found.eps) != (
                second.lr,
                second.weight_decay,
                second.eps,
            ):
                raise ValueError(
                    f"{name!r} and {twin!r} are one tensor in the roles {role} and {assigned[twin]}, whose rules differ under "
                    f"{which}; untie them or choose another optimizer"
                )
        if wd_rule == "unscaled":
            found = replace(found, weight_decay=Scale())
        values = pairs[name].detach().double()
        constant = bool((values == values.flatten()[0]).all())
        std_base = (
            0.0 if constant else float(values.square().mean().sqrt()) if base is not None else None
        )
        entries.append(
            Entry(
                name=name,
                role=role,
                shape=tuple(p.shape),
                optimizer=which,
                rule=found,
                multiplier=found.multiplier.at(r_n, r_L),
                std=math.sqrt(found.variance.at(r_n, r_L)),
                lr=found.lr.at(r_n, r_L),
                weight_decay=found.weight_decay.at(r_n, r_L),
                eps=None if found.eps is None else found.eps.at(r_n, r_L),
                std_base=std_base,
                mean_base=float(values.flatten()[0]) if constant else 0.0,
                split=split_of(name, model, FUSED if fused is None else fused)
                if role == "hidden"
                else 1,
                transposed=p.ndim == 2
                and type(layout.modules[name.rpartition(".")[0]]).__name__ == "Conv1D",
                clip=None if found.clip is None else found.clip.at(r_n, r_L),
                block=int(name.removeprefix(f"{stack}.").partition(".")[0])
                if name.startswith(f"{stack}.")
                else None,
            )
        )
    multipliers = layout.multipliers(assigned, branch_ends, k, r_n, r_L)
    below = [name for name in layout.modules if name.startswith(f"{stack}.")]
    unmatched(
        [pattern for pattern in branch_ends if pattern not in BRANCH_ENDS], below, "branch_ends"
    )
    notes = (*((caution,) if caution else ()), *_heads(model, base))
    return Plan(tuple(entries), multipliers, r_n, r_L, min(k, 2), shared, notes)


class _Multiply:
    """A forward hook (on outputs) or pre-hook (on inputs) that multiplies tensors by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        value = inputs if output is None else output
        if isinstance(value, tuple):
            return (value[0] * self.factor, *value[1:])
        return value * self.factor


def _heads(model: nn.Module, base: nn.Module | None) -> tuple[str, ...]:
    sizes = []
    for m in (model, base):
        config: Any = getattr(m, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        sizes.append(
            getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
        )
    if None in sizes or sizes[0] == sizes[1]:
        return ()
    return (
        f"The head dimension goes from {sizes[1]} to {sizes[0]}: scale attention by √{sizes[1]}/{sizes[0]} instead of "
        f"1/√{sizes[0]}, or keep it fixed and add heads. The plan does not do it.",
    )


_HEADS: dict[str, str] = {
    role: role.replace("_bias", " biases") if role.endswith("bias") else f"{role} weights"
    for role in ROLES
}
_ROWS: tuple[tuple[str, Callable[[Rule], Scale | None]], ...] = (
    ("block multiplier α", lambda r: r.multiplier),
    ("initial variance σ²", lambda r: r.variance),
    ("learning rate η", lambda r: r.lr),
    ("weight decay λ", lambda r: r.weight_decay),
    ("stabilizer ε", lambda r: r.eps),
    ("clipping ρ", lambda r: r.clip),
)


def _cell(scale: Scale | None, value: float | None) -> str:
    if scale is None or value is None:
        return "–"
    return str(scale) if str(scale) == "1" else f"{scale} = {value:.4g}"
