"""From two sizes of one architecture to a plan: the role of every parameter, and its multiplier, variance, η, λ and ε.

`plan` compares a model with a base model of the same architecture. A parameter's role follows from where it is (inside the residual
stack or outside) and from which of its sides grow. Nothing of the plan lives on tensors: it is a table of names and numbers,
so saving, compiling and wrapping the model leave it alone.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grsd.mup.optimizers import assemble
from grsd.mup.rules import OPTIMIZERS, ROLES, Rule, Scale, rule

__all__ = ["BRANCH_ENDS", "FUSED", "Entry", "Plan", "plan"]

BRANCH_ENDS = (
    "*.attn.c_proj", "*.mlp.c_proj",  # GPT-2
    "*.attention.dense", "*.mlp.dense_4h_to_h",  # GPT-NeoX
    "*.self_attn.o_proj", "*.mlp.down_proj",  # Llama and its kin
    "*.branch_end",  # grsd.lab.models
)  # fmt: skip
"""Layers whose output is added to the residual stream, as patterns of module names; `plan(..., branch_ends=)` names others."""

FUSED: Mapping[str, int | tuple[int, int] | Literal["heads"]] = {
    "*.attn.c_attn.weight": 3,  # GPT-2: Q, K, V one after another
    "*.attention.query_key_value.weight": "heads",  # GPT-NeoX: Q, K, V of one head after another
}
"""Matrices that hold several, which a matrix optimizer must treat one by one."""
WeightDecay = Literal["paper", "unscaled"]
Side = Literal["input", "output"]
_HALF = Fraction(1, 2)


class Multiplier(NamedTuple):
    """A factor on what enters or leaves a module."""

    module: str
    factor: float
    side: Side  # a head's input, so that its bias is left alone; the whole output of a branch, its bias included


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
    multiplier, std, lr, weight_decay, eps : the rule at this model's ratios; eps is None when the optimizer has no rule for it.
    split : how a matrix is fused along its outputs: parts, or (blocks, parts) when parts alternate in blocks.
    transposed : bool, stored (n_in, n_out).
    std_base : float, standard deviation of the base model's values.
    mean_base : float, their mean (1 for a norm's gain).
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
    std_base: float
    mean_base: float
    split: int | tuple[int, int] = 1
    transposed: bool = False


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
        """Return one line for every distinct rule: role, optimizer, how many parameters, and the factors as r_n, r_L and numbers."""
        lines = [("role", "optimizer", "tensors", "α", "σ", "η", "λ", "ε")]
        seen: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            seen.setdefault((entry.role, entry.optimizer), []).append(entry)
        for (role, optimizer), group in sorted(seen.items(), key=lambda item: ROLES.index(item[0][0])):
            e = group[0]
            cells = (
                _cell(e.rule.multiplier, e.multiplier),
                _cell(e.rule.variance**_HALF, e.std),
                _cell(e.rule.lr, e.lr),
                _cell(e.rule.weight_decay, e.weight_decay),
                "-" if e.rule.eps is None or e.eps is None else _cell(e.rule.eps, e.eps),
            )
            lines.append((role, optimizer, str(len(group)), *cells))
        widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
        head = f"width ratio r_n = {self.r_n:g}, depth ratio r_L = {self.r_L:g}, k = {self.k}"
        body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([head, *body, *self.notes])

    def __str__(self) -> str:
        return self.table()

    def initialize_(self, model: nn.Module, *, seed: int) -> None:
        """Draw the weights again: normal with the base model's standard deviation times √(variance factor), at the base's mean.

        Tensors that are constant in the base model (zero biases, gains of one) are set to that constant.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter, entry in self._matched(model):
                parameter.fill_(entry.mean_base)
                if entry.std_base > 0:
                    noise = torch.randn(entry.shape, generator=generator, dtype=torch.float32)
                    parameter.add_((entry.std_base * entry.std * noise).to(parameter))

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Multiply by forward hooks; return their handles (`handle.remove()` takes one off)."""
        self._matched(model)
        for name, module in model.named_modules():
            if any(
                isinstance(h, _Multiply) for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            ):
                raise ValueError(f"{name!r} already carries a multiplier; remove the hooks of the earlier plan first")
        modules = {_plain(name): module for name, module in model.named_modules()}
        handles = []
        for name, factor, side in self.multipliers:
            hook = _Multiply(factor)
            module = modules[name]
            handles.append(
                module.register_forward_hook(hook) if side == "output" else module.register_forward_pre_hook(hook)
            )
        return handles

    def fold_(self, model: nn.Module) -> Plan:
        """Multiply the multipliers into the weights instead, and return the plan whose η, λ and ε make the same training.

        With W' = αW: a normalised update needs η' = αη and λ' = λ/α (AdamW: ε' = ε/α), a gradient step η' = α²η, λ' = λ/α².

        Raises
        ------
        ValueError
            A weight that is used elsewhere too (tied embeddings): it would be scaled there as well.
        """
        matched = {entry.name: parameter for parameter, entry in self._matched(model)}
        shared = {name for group in self.tied for name in group}
        changed: dict[str, float] = {}
        modules = {_plain(name): module for name, module in model.named_modules()}
        for module, factor, side in self.multipliers:
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
            key = (entry.role, entry.lr, entry.weight_decay, entry.eps, entry.split, entry.transposed)
            fresh: dict[str, Any] = {"params": [], "role": entry.role, "mup_lr": entry.lr, "lr": lr * entry.lr}
            fresh["weight_decay"] = weight_decay * entry.weight_decay
            if OPTIMIZERS[entry.optimizer].matrices_only:
                fresh |= {"split": entry.split, "transposed": entry.transposed}
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
        return assemble(self.param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps), lr, options)

    def _matched(self, model: nn.Module) -> list[tuple[Tensor, Entry]]:
        """Return (parameter, entry) pairs; wrappers that prefix names (compile, DDP, FSDP) are seen through."""
        found = {_plain(name): parameter for name, parameter in model.named_parameters()}
        missing = [e.name for e in self.entries if e.name not in found]
        if missing or len(found) != len(self.entries):
            other = missing or sorted(set(found) - {e.name for e in self.entries})
            raise ValueError(
                f"the plan was made for another model: {other[0]!r} and {len(other) - 1} more do not match"
            )
        for e in self.entries:
            if tuple(found[e.name].shape) != e.shape:
                raise ValueError(f"{e.name!r} has shape {tuple(found[e.name].shape)}; the plan was made for {e.shape}")
        return [(found[e.name], e) for e in self.entries]


def plan(
    model: nn.Module,
    *,
    base: nn.Module,
    optimizer: str,
    other: str = "adamw",
    k: int = 2,
    wd_rule: WeightDecay = "paper",
    roles: Mapping[str, str] | None = None,
    branch_ends: Sequence[str] = BRANCH_ENDS,
    fused: Mapping[str, int | tuple[int, int] | Literal["heads"]] | None = None,
) -> Plan:
    """Compare a model with its base and return the plan.

    Parameters
    ----------
    model, base : nn.Module
        One architecture at two sizes. They may be the same size; ratios are then 1 and every factor is 1.
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
        Another architecture, ratios that differ from layer to layer, a parameter without a role (named, with what to say), a tensor
        in two roles whose rules differ, no residual stack, no branch end.
    """
    for name in (optimizer, other):
        if name not in OPTIMIZERS:
            raise ValueError(f"no rule for the optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    if OPTIMIZERS[other].matrices_only:
        raise ValueError(
            f"other = {other!r} takes matrices only; biases and embeddings need a vector optimizer: 'adamw'"
        )
    if wd_rule not in ("paper", "unscaled"):
        raise ValueError(f'wd_rule must be "paper" or "unscaled", got {wd_rule!r}')
    stack, depth = _stack(model)
    base_stack, base_depth = _stack(base)
    if stack != base_stack:
        raise ValueError(f"the residual stacks differ: {stack!r} here, {base_stack!r} in the base model")
    parameters = {_plain(name): p for name, p in model.named_parameters()}
    base_parameters = {_plain(name): p for name, p in base.named_parameters(remove_duplicate=False)}
    tied = _tied(model)
    names = [*parameters, *(name for group in tied for name in group[1:])]
    pairs = {name: _partner(name, base_parameters, stack, base_depth) for name in names}
    r_n, r_L = _width_ratio({name: (p, pairs[name]) for name, p in parameters.items()}), depth / base_depth
    layout = _Layout({_plain(name): m for name, m in model.named_modules()}, list(parameters), stack, r_n, roles or {})

    owner = {name: group[0] for group in tied for name in group}
    assigned = {name: layout.role(name, parameters[owner.get(name, name)], pairs[name]) for name in names}
    entries = []
    for name, p in parameters.items():
        role = assigned[name]
        which = optimizer if role == "hidden" or not OPTIMIZERS[optimizer].matrices_only else other
        found = rule(which, role, k)
        for twin in next((group for group in tied if group[0] == name), ())[1:]:
            second = rule(which, assigned[twin], k)
            if (found.lr, found.weight_decay, found.eps) != (second.lr, second.weight_decay, second.eps):
                raise ValueError(
                    f"{name!r} and {twin!r} are one tensor in the roles {role} and {assigned[twin]}, whose rules differ under "
                    f"{which}; untie them or choose another optimizer"
                )
        if wd_rule == "unscaled":
            found = replace(found, weight_decay=Scale())
        values = pairs[name].detach().double()
        constant = bool((values == values.flatten()[0]).all())
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
                std_base=0.0 if constant else float(values.square().mean().sqrt()),
                mean_base=float(values.flatten()[0]) if constant else 0.0,
                split=_split(name, model, FUSED if fused is None else fused) if role == "hidden" else 1,
                transposed=p.ndim == 2 and type(layout.modules[name.rpartition(".")[0]]).__name__ == "Conv1D",
            )
        )
    multipliers = layout.multipliers(assigned, branch_ends, k, r_L)
    return Plan(tuple(entries), multipliers, r_n, r_L, min(k, 2), tied, _notes(model, base, r_n))


@dataclass(frozen=True)
class _Layout:
    """Where a parameter stands: in which module, inside the residual stack or before or after it."""

    modules: Mapping[str, nn.Module]
    names: Sequence[str]
    stack: str
    r_n: float
    roles: Mapping[str, str]

    def role(self, name: str, p: Tensor, partner: Tensor) -> str:
        for pattern, role in self.roles.items():
            if fnmatch.fnmatchcase(name, pattern):
                if role not in ROLES:
                    raise ValueError(f"roles[{pattern!r}] is {role!r}; there are {', '.join(ROLES)}")
                return role
        module = self.modules[name.rpartition(".")[0]]
        inside = name.startswith(self.stack + ".")
        if p.ndim < 2:
            return "hidden_bias" if inside else "input_bias" if self._grows(p, partner, 0, name) else "output_bias"
        if isinstance(module, nn.Embedding):
            return "input"
        rows, columns = (1, 0) if type(module).__name__ == "Conv1D" else (0, 1)
        out, into = (self._grows(p, partner, axis, name) for axis in (rows, columns))
        if inside and out and into:
            return "hidden"
        if not inside and out != into:
            return "input" if out else "output"
        where = "inside" if inside else "outside"
        sides = "both sides" if out and into else "one side" if out or into else "no side"
        raise ValueError(
            f"cannot tell the role of {name!r}, a matrix {where} the stack {self.stack!r} of which {sides} grow with the width "
            f"({tuple(partner.shape)} → {tuple(p.shape)}); say roles={{{name!r}: 'hidden'}}, or 'input' or 'output'"
        )

    def _grows(self, p: Tensor, partner: Tensor, axis: int, name: str) -> bool:
        if self.r_n != 1.0:
            return p.shape[axis] != partner.shape[axis]
        # equal widths: what comes before the stack takes inputs in, what comes after puts outputs out
        stacked = [k for k, other in enumerate(self.names) if other.startswith(self.stack + ".")]
        if name.startswith(self.stack + "."):
            return True
        before = name in self.names and self.names.index(name) < stacked[0]
        if p.ndim < 2:  # a norm after the stack has the width too; only a head's bias has not
            return before or not any(
                q.ndim == 2 and not isinstance(self.modules[name.rpartition(".")[0]], nn.Embedding)
                for q in self.modules[name.rpartition(".")[0]].parameters(recurse=False)
            )
        transposed = type(self.modules[name.rpartition(".")[0]]).__name__ == "Conv1D"
        is_out = (axis == 1) if transposed else (axis == 0)
        return is_out if before else not is_out

    def multipliers(
        self, assigned: Mapping[str, str], branch_ends: Sequence[str], k: int, r_L: float
    ) -> tuple[Multiplier, ...]:
        found = []
        for name in self.modules:
            inside = name.startswith(self.stack + ".")
            if inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in branch_ends):
                found.append(Multiplier(name, rule("adamw", "hidden", k).multiplier.at(self.r_n, r_L), "output"))
            elif any(n.rpartition(".")[0] == name and role == "output" for n, role in assigned.items()):
                found.append(Multiplier(name, rule("adamw", "output", k).multiplier.at(self.r_n, r_L), "input"))
        if not any(m.side == "output" for m in found):
            raise ValueError(
                f"no end of a residual branch found in {self.stack!r}: name the layers whose output is added to the stream, "
                "e.g. branch_ends=['*.mlp.down_proj']"
            )
        if not any(m.side == "input" for m in found):
            raise ValueError("no output layer found: name its weight, e.g. roles={'head.weight': 'output'}")
        return tuple(found)


class _Multiply:
    """A forward hook (on outputs) or pre-hook (on inputs) that multiplies tensors by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        value = inputs if output is None else output
        if isinstance(value, tuple):
            return (value[0] * self.factor, *value[1:])
        return value * self.factor


def _plain(name: str) -> str:
    """Return a name without what torch.compile, DataParallel and FSDP put in."""
    name = re.sub(r"(^|\.)(_orig_mod|_fsdp_wrapped_module)(?=\.|$)", "", name)
    return re.sub(r"^module(\.|$)", "", name.removeprefix("."))


def _split(
    name: str, model: nn.Module, fused: Mapping[str, int | tuple[int, int] | Literal["heads"]]
) -> int | tuple[int, int]:
    for pattern, split in fused.items():
        if fnmatch.fnmatchcase(name, pattern):
            config: Any = getattr(model, "config", None)
            return (int(config.num_attention_heads), 3) if split == "heads" else split
    return 1


def _stack(model: nn.Module) -> tuple[str, int]:
    """Return the name and length of the residual stack: the ModuleList with the most parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of residual blocks; put the blocks into one, so that depth can be read"
        )
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return _plain(name), len(found)


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(_plain(name))
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _partner(name: str, base: Mapping[str, Tensor], stack: str, base_depth: int) -> Tensor:
    """Return the base model's tensor for a parameter; block i stands beside block i modulo the base's depth."""
    inside = re.match(re.escape(stack) + r"\.(\d+)\.(.*)", name)
    there = f"{stack}.{int(inside[1]) % base_depth}.{inside[2]}" if inside else name
    if there not in base:
        raise ValueError(
            f"the base model has no {there!r}, which {name!r} should be compared with: another architecture?"
        )
    return base[there]


def _width_ratio(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    found: dict[float, str] = {}
    for name, (p, q) in pairs.items():
        if p.ndim != q.ndim:
            raise ValueError(f"{name!r} has {p.ndim} axes here and {q.ndim} in the base model: another architecture?")
        for a, b in zip(p.shape, q.shape, strict=True):
            if a != b:
                found.setdefault(a / b, name)
    if len(found) > 1:
        (first, one), (second, two) = list(found.items())[:2]
        raise ValueError(
            f"the layers do not grow alike: {one!r} by {first:g} and {two!r} by {second:g}; scale all widths by one ratio"
        )
    return next(iter(found), 1.0)


def _notes(model: nn.Module, base: nn.Module, r_n: float) -> tuple[str, ...]:
    sizes = []
    for m in (model, base):
        config: Any = getattr(m, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        sizes.append(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None))
    if None in sizes or sizes[0] == sizes[1]:
        return ()
    return (
        f"The head dimension goes from {sizes[1]} to {sizes[0]}: scale attention by √{sizes[1]}/{sizes[0]} instead of "
        f"1/√{sizes[0]}, or keep it fixed and add heads. The plan does not do it.",
    )


def _cell(scale: Scale, value: float) -> str:
    return str(scale) if str(scale) == "1" else f"{scale} = {value:.4g}"
