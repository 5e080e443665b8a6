"""Where the parameters of a model stand in its residual stack, and which of their sides grow.

What `grsd.mup.planning` reads off two sizes of one architecture: the stack and its depth, each
parameter's partner in the base model, its role, and the modules that get a multiplier. Names are
those of the bare model, whatever wraps it. What names alone can say of a model family is a row of
`FAMILIES`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from grsd.mup.rules import ROLES, Scale, rule

__all__ = [
    "BRANCH_ENDS",
    "FAMILIES",
    "FUSED",
    "Family",
    "Layout",
    "Multiplier",
    "compare",
    "plain",
    "stack_of",
    "tables",
    "tied",
    "unmatched",
]

Side = Literal["input", "output"]
Fused = Mapping[str, int | tuple[int, int] | Literal["heads"]]


class Family(NamedTuple):
    """What a plan knows of a family of transformers by the names of its modules.

    Attributes
    ----------
    branch_ends : patterns of the modules whose output is added to the residual stream.
    fused : pattern of a parameter that holds several matrices → how many stand one after another,
        or "heads" for Q, K, V of one head after another.
    """

    branch_ends: tuple[str, ...]
    fused: Fused


FAMILIES: dict[str, Family] = {
    "gpt2": Family(("*.attn.c_proj", "*.mlp.c_proj"), {"*.attn.c_attn.weight": 3}),
    "gpt_neox": Family(
        ("*.attention.dense", "*.mlp.dense_4h_to_h"),
        {"*.attention.query_key_value.weight": "heads"},
    ),
    "llama": Family(("*.self_attn.o_proj", "*.mlp.down_proj"), {}),
}
"""transformers' name of a family → its row; other families may use the same names."""

BRANCH_ENDS = (*(end for f in FAMILIES.values() for end in f.branch_ends), "*.branch_end")
"""Layers whose output is added to the residual stream, as patterns of module names; `plan(...,
branch_ends=)` names others. The last is that of
`grsd.lab.nets.models`."""

FUSED: Fused = {
    **{name: split for f in FAMILIES.values() for name, split in f.fused.items()},
    "*.in_proj_weight": 3,  # nn.MultiheadAttention: Q, K, V one after another
}
"""Matrices that hold several, which a matrix optimizer must treat one by one."""


class Multiplier(NamedTuple):
    """A factor on what enters or leaves a module."""

    module: str
    factor: float
    side: Side  # a head's input, so that its bias is left alone; a branch's whole output


@dataclass(frozen=True)
class Layout:
    """Where a parameter stands: in which module, inside the residual stack or before or after it.

    Attributes
    ----------
    modules, names : the model's modules by name, and its parameters' names in order.
    stack : name of the residual stack.
    compared : a base model of another width says which sides grow; otherwise the position in the
        model does.
    roles : pattern of names → role, what the user says.
    config : the model's, where it has one.
    """

    modules: Mapping[str, nn.Module]
    names: Sequence[str]
    stack: str
    compared: bool
    roles: Mapping[str, str]
    config: Any = None

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a parameter."""
        return self.modules[name.rpartition(".")[0]]

    def transposed(self, name: str) -> bool:
        """Whether a matrix is stored (n_in, n_out)."""
        return type(self.owner(name)).__name__ == "Conv1D"

    def block(self, name: str) -> int | None:
        """Return which residual block holds a parameter or module, None outside the stack."""
        inside = name.startswith(f"{self.stack}.")
        return int(name.removeprefix(f"{self.stack}.").partition(".")[0]) if inside else None

    def split(self, name: str, fused: Fused) -> int | tuple[int, int]:
        """Return how a matrix is fused along its outputs: parts, or (blocks, parts)."""
        split = next((s for pattern, s in fused.items() if fnmatch.fnmatchcase(name, pattern)), 1)
        return (int(self.config.num_attention_heads), 3) if split == "heads" else split

    def role(self, name: str, p: Tensor, partner: Tensor) -> str:
        """Return a parameter's role: what the user says, where it stands, which sides grow."""
        # what the user says comes first
        for pattern, role in self.roles.items():
            if fnmatch.fnmatchcase(name, pattern):
                if role not in ROLES:
                    known = ", ".join(ROLES)
                    raise ValueError(f"roles[{pattern!r}] is {role!r}; there are {known}")
                return role
        owner, inside = self.owner(name), self.block(name) is not None
        if p.ndim < 2:
            # a number that stands alone does not grow
            grows = p.ndim == 1 and self._grows(p, partner, 0, name)
            return "hidden_bias" if inside else "input_bias" if grows else "output_bias"
        if isinstance(owner, nn.Embedding):
            return "input"
        # of a matrix it is the sides that grow; in the stack both must
        rows, columns = (1, 0) if self.transposed(name) else (0, 1)
        out, into = (self._grows(p, partner, axis, name) for axis in (rows, columns))
        if inside and out and into:
            return "hidden"
        if not inside and out != into:
            if isinstance(owner, nn.Linear) or self.transposed(name):
                return "input" if out else "output"
            raise ValueError(
                f"cannot tell the role of {name!r}, a matrix {tuple(p.shape)} of a "
                f"{type(owner).__name__} and not of an nn.Linear or nn.Embedding, so which side is "
                f"the input is not known; say roles={{{name!r}: 'input'}}, or 'output'"
            )
        where = "inside" if inside else "outside"
        sides = "both sides" if out and into else "one side" if out or into else "no side"
        raise ValueError(
            f"cannot tell the role of {name!r}, a matrix {where} the stack {self.stack!r} of which "
            f"{sides} grow with the width ({tuple(partner.shape)} → {tuple(p.shape)}); say "
            f"roles={{{name!r}: 'hidden'}}, or 'input' or 'output'"
        )

    def _grows(self, p: Tensor, partner: Tensor, axis: int, name: str) -> bool:
        if self.compared:
            return p.shape[axis] != partner.shape[axis]
        if self.block(name) is not None:
            return True
        # without a second width: what comes before the stack takes inputs in, what comes after puts
        # outputs out
        first = next(i for i, other in enumerate(self.names) if self.block(other) is not None)
        before = name in self.names[:first]
        if p.ndim < 2:
            # a norm after the stack has the width too; only a head's bias has not
            owner = self.owner(name)
            matrices = [q for q in owner.parameters(recurse=False) if q.ndim == 2]
            return before or not matrices or isinstance(owner, nn.Embedding)
        return (axis == int(self.transposed(name))) == before

    def multipliers(
        self,
        assigned: Mapping[str, str],
        branch_ends: Sequence[str],
        k: int,
        r_n: float,
        r_L: float,
    ) -> tuple[Multiplier, ...]:
        """Return the factors of every end of a residual branch and of every head."""
        alpha, head = (
            rule("adamw", role, k).multiplier.at(r_n, r_L) for role in ("hidden", "output")
        )
        heads = {n.rpartition(".")[0]: n for n, role in assigned.items() if role == "output"}
        factors: list[Multiplier] = []
        for name, module in self.modules.items():
            if self.block(name) is not None and _matches(name, branch_ends):
                parent = name.rpartition(".")[0]
                if isinstance(self.modules[parent], nn.MultiheadAttention):
                    raise ValueError(
                        f"{name!r} is used by nn.MultiheadAttention without being called, so that "
                        "a factor on its output would have no effect; name the attention itself, "
                        f"{parent!r}, as the end of the branch"
                    )
                factors.append(Multiplier(name, alpha, "output"))
            elif name in heads:
                if any(module.children()):
                    raise ValueError(
                        f"the output weight {heads[name]!r} stands in "
                        f"{name or 'the model itself'!r}, which holds other layers: a factor on "
                        "its input would act on them too; make it the weight of an nn.Linear of "
                        "its own"
                    )
                factors.append(Multiplier(name, head, "input"))
        sides = {m.side for m in factors}
        if "output" not in sides:
            raise ValueError(
                f"no end of a residual branch found in {self.stack!r}: name the layers whose "
                "output is added to the stream, e.g. branch_ends=['*.mlp.down_proj']"
            )
        if "input" not in sides:
            raise ValueError(
                "no output layer found: name its weight, e.g. roles={'head.weight': 'output'} "
                "(at equal widths, and without a base model, what is registered before the stack "
                "counts as input and what comes after as output)"
            )
        return tuple(factors)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuse a pattern that no name matches: a slip would change the plan without a word."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{what} has the pattern {pattern!r}, which matches none of {len(names)} names, "
                f"such as {names[-1]!r}"
            )


def tables(model: nn.Module) -> set[str]:
    """Return the names of embedding weights, whose norm is that of a row: what a token meets."""
    modules = model.named_modules()
    return {f"{plain(name)}.weight" for name, m in modules if isinstance(m, nn.Embedding)}


def plain(name: str) -> str:
    """Return a name without what compile, DataParallel, FSDP and checkpointing put in."""
    wrappers = r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
    return re.sub(r"^module(\.|$)", "", re.sub(wrappers, "", name).removeprefix("."))


def stack_of(model: nn.Module) -> tuple[str, int]:
    """Return the name and length of the residual stack: the ModuleList with the most parameters."""
    modules = model.named_modules()
    lists = [(name, m) for name, m in modules if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of residual blocks; put the blocks into "
            "one, so that depth can be read"
        )
    name, stack = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return plain(name), len(stack)


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that share one tensor."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(plain(name))
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def compare(
    model: nn.Module,
    base: nn.Module | None,
    r_n: float | None,
    r_L: float | None,
    roles: Mapping[str, str],
) -> tuple[Layout, dict[str, tuple[Tensor, Tensor]], float, float]:
    """Return the model's layout, name → (tensor, the base model's), and the two ratios.

    Tied tensors stand under each of their names; block i beside block i modulo the base's depth.
    Without a base model a tensor is its own partner.
    """
    if (base is None) == (r_n is None and r_L is None):
        raise ValueError(
            "give either base=, a model of the same architecture, or the ratios r_n= and r_L="
        )
    stack, depth = stack_of(model)
    every = {plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    names = [plain(name) for name, _ in model.named_parameters()]
    modules = {plain(name): m for name, m in model.named_modules()}
    config = getattr(model, "config", None)
    if base is None:
        wide, deep = (1.0 if r is None else float(r) for r in (r_n, r_L))
        Scale().at(wide, deep)  # refuses what is no ratio
        pairs: dict[str, tuple[Tensor, Tensor]] = {name: (p, p) for name, p in every.items()}
        return Layout(modules, names, stack, False, roles, config), pairs, wide, deep
    base_stack, base_depth = stack_of(base)
    if stack != base_stack:
        raise ValueError(
            f"the residual stacks differ: {stack!r} here, {base_stack!r} in the base model"
        )
    # every parameter beside the base model's
    there = {plain(name): p for name, p in base.named_parameters(remove_duplicate=False)}
    pairs = {}
    for name, p in every.items():
        inside = re.match(re.escape(stack) + r"\.(\d+)\.(.*)", name)
        twin = f"{stack}.{int(inside[1]) % base_depth}.{inside[2]}" if inside else name
        if twin not in there:
            raise ValueError(
                f"the base model has no {twin!r}, which {name!r} should be compared with: another "
                "architecture?"
            )
        pairs[name] = p, there[twin]
    wide = _width_ratio({name: pairs[name] for name in names})
    return (
        Layout(modules, names, stack, wide != 1.0, roles, config),
        pairs,
        wide,
        depth / base_depth,
    )


def _width_ratio(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Return the one ratio by which sides grow; 1 when none does."""
    ratios: dict[float, str] = {}
    for name, (p, q) in pairs.items():
        if p.ndim != q.ndim:
            raise ValueError(
                f"{name!r} has {p.ndim} axes here and {q.ndim} in the base model: another "
                "architecture?"
            )
        for a, b in zip(p.shape, q.shape, strict=True):
            if a != b:
                ratios.setdefault(a / b, name)
    if len(ratios) > 1:
        (first, one), (second, two) = list(ratios.items())[:2]
        raise ValueError(
            f"the layers do not grow alike: {one!r} by {first:g} and {two!r} by {second:g}; scale "
            "all widths by one ratio"
        )
    return next(iter(ratios), 1.0)
