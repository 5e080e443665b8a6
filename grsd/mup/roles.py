"""Where the parameters of a model stand: inside the residual stack, before it or after it, and which of their sides grow.

What `grsd.mup.planning` reads off two sizes of one architecture: the stack and its depth, each parameter's partner in the base model, its role, and
the modules whose inputs or outputs get a multiplier. Names are those of the bare model, whatever wraps it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from grsd.mup.rules import ROLES, rule

__all__ = [
    "BRANCH_ENDS",
    "FUSED",
    "Layout",
    "Multiplier",
    "partner",
    "plain",
    "split_of",
    "stack_of",
    "tied",
    "width_ratio",
]

Side = Literal["input", "output"]
Fused = Mapping[str, int | tuple[int, int] | Literal["heads"]]

BRANCH_ENDS = (
    "*.attn.c_proj", "*.mlp.c_proj",  # GPT-2
    "*.attention.dense", "*.mlp.dense_4h_to_h",  # GPT-NeoX
    "*.self_attn.o_proj", "*.mlp.down_proj",  # Llama and its kin
    "*.branch_end",  # grsd.lab.nets.models
)  # fmt: skip
"""Layers whose output is added to the residual stream, as patterns of module names; `plan(..., branch_ends=)` names others."""

FUSED: Fused = {
    "*.attn.c_attn.weight": 3,  # GPT-2: Q, K, V one after another
    "*.attention.query_key_value.weight": "heads",  # GPT-NeoX: Q, K, V of one head after another
    "*.in_proj_weight": 3,  # nn.MultiheadAttention: Q, K, V one after another
}
"""Matrices that hold several, which a matrix optimizer must treat one by one."""


class Multiplier(NamedTuple):
    """A factor on what enters or leaves a module."""

    module: str
    factor: float
    side: Side  # a head's input, so that its bias is left alone; the whole output of a branch, its bias included


@dataclass(frozen=True)
class Layout:
    """Where a parameter stands: in which module, inside the residual stack or before or after it.

    Attributes
    ----------
    modules, names : the model's modules by name, and its parameters' names in order.
    stack : name of the residual stack.
    compared : bool, a base model of another width says which sides grow; otherwise the position in the model does.
    roles : pattern of names → role, what the user says.
    """

    modules: Mapping[str, nn.Module]
    names: Sequence[str]
    stack: str
    compared: bool
    roles: Mapping[str, str]

    def role(self, name: str, p: Tensor, partner: Tensor) -> str:
        for pattern, role in self.roles.items():
            if fnmatch.fnmatchcase(name, pattern):
                if role not in ROLES:
                    raise ValueError(
                        f"roles[{pattern!r}] is {role!r}; there are {', '.join(ROLES)}"
                    )
                return role
        module = self.modules[name.rpartition(".")[0]]
        inside = name.startswith(self.stack + ".")
        if p.ndim < 2:
            grows = p.ndim == 1 and self._grows(
                p, partner, 0, name
            )  # a number that stands alone does not
            return "hidden_bias" if inside else "input_bias" if grows else "output_bias"
        if isinstance(module, nn.Embedding):
            return "input"
        rows, columns = (1, 0) if type(module).__name__ == "Conv1D" else (0, 1)
        out, into = (self._grows(p, partner, axis, name) for axis in (rows, columns))
        if inside and out and into:
            return "hidden"
        if (
            not inside
            and out != into
            and not isinstance(module, nn.Linear)
            and type(module).__name__ != "Conv1D"
        ):
            raise ValueError(
                f"cannot tell the role of {name!r}, a matrix {tuple(p.shape)} of a {type(module).__name__} and not of an nn.Linear or "
                f"nn.Embedding, so which side is the input is not known; say roles={{{name!r}: 'input'}}, or 'output'"
            )
        if not inside and out != into:
            return "input" if out else "output"
        where = "inside" if inside else "outside"
        sides = "both sides" if out and into else "one side" if out or into else "no side"
        raise ValueError(
            f"cannot tell the role of {name!r}, a matrix {where} the stack {self.stack!r} of which {sides} grow with the width "
            f"({tuple(partner.shape)} → {tuple(p.shape)}); say roles={{{name!r}: 'hidden'}}, or 'input' or 'output'"
        )

    def _grows(self, p: Tensor, partner: Tensor, axis: int, name: str) -> bool:
        if self.compared:
            return p.shape[axis] != partner.shape[axis]
        # without a second width: what comes before the stack takes inputs in, what comes after puts outputs out
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
        self,
        assigned: Mapping[str, str],
        branch_ends: Sequence[str],
        k: int,
        r_n: float,
        r_L: float,
    ) -> tuple[Multiplier, ...]:
        found = []
        for name, module in self.modules.items():
            inside = name.startswith(self.stack + ".")
            if inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in branch_ends):
                parent = name.rpartition(".")[0]
                if isinstance(self.modules[parent], nn.MultiheadAttention):
                    raise ValueError(
                        f"{name!r} is used by nn.MultiheadAttention without being called, so that a factor on its output would have no "
                        f"effect; name the attention itself, {parent!r}, as the end of the branch"
                    )
                found.append(
                    Multiplier(name, rule("adamw", "hidden", k).multiplier.at(r_n, r_L), "output")
                )
            elif heads := [
                n
                for n, role in assigned.items()
                if role == "output" and n.rpartition(".")[0] == name
            ]:
                if any(module.children()):
                    raise ValueError(
                        f"the output weight {heads[0]!r} stands in {name or 'the model itself'!r}, which holds other layers: a factor on its "
                        "input would act on them too; make it the weight of an nn.Linear of its own"
                    )
                found.append(
                    Multiplier(name, rule("adamw", "output", k).multiplier.at(r_n, r_L), "input")
                )
        if not any(m.side == "output" for m in found):
            raise ValueError(
                f"no end of a residual branch found in {self.stack!r}: name the layers whose output is added to the stream, "
                "e.g. branch_ends=['*.mlp.down_proj']"
            )
        if not any(m.side == "input" for m in found):
            raise ValueError(
                "no output layer found: name its weight, e.g. roles={'head.weight': 'output'} (at equal widths, and without a base "
                "model, what is registered before the stack counts as input and what comes after as output)"
            )
        return tuple(found)


def unmatched(patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    """Refuse a pattern that no name matches: a slip of the pen would change the plan without a word."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{what} has the pattern {pattern!r}, which matches none of {len(names)} names, such as {names[-1]!r}"
            )


def tables(model: nn.Module) -> set[str]:
    """Return the names of the embeddings' weights: the norm that counts is that of a row, which is what a token meets."""
    return {
        f"{plain(name)}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def plain(name: str) -> str:
    """Return a name without what torch.compile, DataParallel, FSDP and activation checkpointing put in."""
    name = re.sub(
        r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)", "", name
    )
    return re.sub(r"^module(\.|$)", "", name.removeprefix("."))


def split_of(name: str, model: nn.Module, fused: Fused) -> int | tuple[int, int]:
    for pattern, split in fused.items():
        if fnmatch.fnmatchcase(name, pattern):
            config: Any = getattr(model, "config", None)
            return (int(config.num_attention_heads), 3) if split == "heads" else split
    return 1


def stack_of(model: nn.Module) -> tuple[str, int]:
    """Return the name and length of the residual stack: the ModuleList with the most parameters."""
    lists = [
        (name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    ]
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of residual blocks; put the blocks into one, so that depth can be read"
        )
    name, found = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return plain(name), len(found)


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(plain(name))
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def partner(name: str, base: Mapping[str, Tensor], stack: str, base_depth: int) -> Tensor:
    """Return the base model's tensor for a parameter; block i stands beside block i modulo the base's depth."""
    inside = re.match(re.escape(stack) + r"\.(\d+)\.(.*)", name)
    there = f"{stack}.{int(inside[1]) % base_depth}.{inside[2]}" if inside else name
    if there not in base:
        raise ValueError(
            f"the base model has no {there!r}, which {name!r} should be compared with: another architecture?"
        )
    return base[there]


def width_ratio(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    found: dict[float, str] = {}
    for name, (p, q) in pairs.items():
        if p.ndim != q.ndim:
            raise ValueError(
                f"{name!r} has {p.ndim} axes here and {q.ndim} in the base model: another architecture?"
            )
        for a, b in zip(p.shape, q.shape, strict=True):
            if a != b:
                found.setdefault(a / b, name)
    if len(found) > 1:
        (first, one), (second, two) = list(found.items())[:2]
        raise ValueError(
            f"the layers do not grow alike: {one!r} by {first:g} and {two!r} by {second:g}; scale all widths by one ratio"
        )
    return next(iter(found), 1.0)
