"""Where the parameters of a model stand in its residual stack, and which of their sides grow.

What `grsd.mup.planning` reads off two sizes of one architecture: the stack and its depth, each
parameter's partner in the base model, its role, and the modules that get a multiplier. Names are
those of the bare model, whatever wraps it. What names alone can say of a model family is a row of
`grsd.mup.families.FAMILIES`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from grsd import checks
from grsd.mup.families import Fused, Split
from grsd.mup.scales import ROLES, Scale


class Multiplier(NamedTuple):
    """A factor on what enters a head, so that its bias is left alone, or leaves another module."""

    module: str
    factor: float
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Layout:
    """Where a parameter stands: in which module, inside the stack or before or after it."""

    modules: Mapping[str, nn.Module]
    names: Sequence[str]  #: of the parameters, in order
    stack: str
    compared: bool  #: a base of another width says which sides grow; else the position does
    roles: Mapping[str, str]  #: pattern of names → role, of the user, then of the family
    deep: bool = True  #: the depth may differ from the base's; else a stack asks for nothing
    backwards: tuple[str, ...] = ()  #: patterns of experts that are stored (experts, n_in, n_out)

    def owner(self, name: str) -> nn.Module:
        """Return the module that holds a parameter."""
        return self._owners[name.rpartition(".")[0]]

    @cached_property
    def _owners(self) -> dict[str, nn.Module]:
        return bare_modules(self.modules[""], tied=True)

    def transposed(self, name: str) -> bool:
        """Whether a matrix is stored (n_in, n_out)."""
        return is_conv1d(self.owner(name)) or matching(name, self.backwards) is not None

    def batched(self, name: str, p: Tensor) -> bool:
        """Whether three axes are those of several matrices; those of a convolution are of one."""
        return p.ndim == 3 and not isinstance(self.owner(name), _ConvNd)

    def axes(self, name: str, p: Tensor) -> tuple[int, int]:
        """Return which axes of a matrix are its outputs and its inputs."""
        first = int(self.batched(name, p))
        return (first + 1, first) if self.transposed(name) else (first, first + 1)

    def table(self, name: str, role: str, p: Tensor, partner: Tensor) -> bool:
        """Whether rows of it are added to the stream: an embedding, or positions without a layer.

        A parameter without a layer, such as ViT's (1, T, n), has the width along its last axis.
        """
        if isinstance(self.owner(name), nn.Embedding):
            return True
        layer = isinstance(self.owner(name), nn.Linear | _ConvNd) or is_conv1d(self.owner(name))
        wide = not self.compared or p.shape[-1:] != partner.shape[-1:]
        return role == "input" and p.ndim > 1 and not layer and wide

    def growth(
        self, name: str, p: Tensor, partner: Tensor, r_n: float, split: Split, there: Split
    ) -> list[tuple[Fraction, Fraction]]:
        """Return the powers of r_n by which outputs and inputs of a matrix grow, part by part.

        They are 1 as a rule; key heads whose number is fixed have 0, a rounded width almost 1.
        """
        if not self.compared:
            return [(Fraction(1), Fraction(1))]
        out, into = (p.shape[axis] / partner.shape[axis] for axis in self.axes(name, p))
        ratios = [out]
        if isinstance(split, tuple) and isinstance(there, tuple):
            # sizes of parts come again and again, here and in the base model
            ratios = [
                out * sum(there) / sum(split) * a / b for a, b in zip(split, there, strict=True)
            ]

        def power(ratio: float) -> Fraction:
            return Fraction(math.log(ratio) / math.log(r_n)).limit_denominator(1000)

        return [(power(ratio), power(into)) for ratio in ratios]

    def block(self, name: str) -> int | None:
        """Return which residual block holds a parameter or module, None outside the stack."""
        inside = name.startswith(f"{self.stack}.")
        return int(name.removeprefix(f"{self.stack}.").partition(".")[0]) if inside else None

    def role(self, name: str, p: Tensor, partner: Tensor) -> str:
        """Return a parameter's role: what the user says, where it stands, which sides grow."""
        # what the user says comes first
        if pattern := matching(name, self.roles):
            return checks.one_of(f"roles[{pattern!r}]", self.roles[pattern], ROLES)
        owner, inside = self.owner(name), self.block(name) is not None
        if p.ndim < 2:
            # a number that stands alone does not grow
            grows = p.ndim == 1 and self._grows(p, partner, 0, name)
            return "hidden_bias" if inside else "input_bias" if grows else "output_bias"
        if isinstance(owner, nn.Embedding):
            return "input"
        # of a matrix it is the sides that grow; in a layer it is known which are which
        out, into = (self._grows(p, partner, axis, name) for axis in self.axes(name, p))
        layer = isinstance(owner, nn.Linear | _ConvNd) or self.transposed(name)
        if (inside and (layer or (out and into))) or (layer and out and into and not self.deep):
            return "hidden"
        if not inside and out != into:
            if layer:
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
        alpha: float,
        head: float,
        r_n: float,
        embed: float = 1.0,
    ) -> tuple[Multiplier, ...]:
        """Return the factor `alpha` at every end of a residual branch, and `head` at every head.

        What reads the input gets `embed` where it is not 1; embeddings that their module multiplies
        by √width (Gemma's) get 1/√r_n.
        """
        inputs = {n.rpartition(".")[0] for n, role in assigned.items() if role == "input"}
        heads = {n.rpartition(".")[0]: n for n, role in assigned.items() if role == "output"}
        factors: list[Multiplier] = []
        # ends of branches are named by the patterns, heads by the role of their weight
        for name, module in self.modules.items():
            if self.block(name) is not None and matching(name, branch_ends):
                parent = name.rpartition(".")[0]
                if isinstance(self.modules[parent], nn.MultiheadAttention):
                    raise ValueError(
                        f"{name!r} is used by nn.MultiheadAttention without being called, so a "
                        f"factor on it has no effect; name the attention itself, {parent!r}"
                    )
                factors.append(Multiplier(name, alpha, "output"))
            elif isinstance(module, nn.Embedding) and _scaled(module):
                factors.append(Multiplier(name, embed * r_n**-0.5, "output"))
            elif name in inputs and embed != 1:
                if any(module.children()):
                    raise ValueError(
                        f"an input weight stands in {name or 'the model itself'!r}, whose output "
                        "is not its own; make it the weight of a layer of its own"
                    )
                factors.append(Multiplier(name, embed, "output"))
            elif name in heads:
                if any(module.children()):
                    where = name or "the model itself"
                    raise ValueError(
                        f"the output weight {heads[name]!r} stands in {where!r}, whose input other "
                        "layers read too; make it the weight of an nn.Linear of its own"
                    )
                factors.append(Multiplier(name, head, "input"))
        # a model without either would be planned wrongly
        ends = any(m.side == "output" and self.block(m.module) is not None for m in factors)
        if self.deep and not ends:
            raise ValueError(
                f"no end of a residual branch found in {self.stack!r}: name the layers whose "
                "output is added to the stream, e.g. branch_ends=['*.mlp.down_proj']"
            )
        if not any(m.side == "input" for m in factors):
            raise ValueError(
                "no output layer found: name its weight, e.g. roles={'head.weight': 'output'} (at "
                "one width what stands before the stack counts as input, what comes after as "
                "output)"
            )
        return tuple(factors)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' layer that is stored (n_in, n_out), sharded or not."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def split_of(name: str, fused: Fused, config: Any) -> Split:
    """Return how a matrix is fused along its outputs: equal parts, or sizes in turn."""
    pattern = matching(name, fused)
    split = fused[pattern] if pattern else 1
    return split(config) if callable(split) else split


def matching(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that a name matches."""
    return next((one for one in patterns if fnmatch.fnmatchcase(name, one)), None)


def unmatched(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Refuse a pattern that no name matches: a slip would change the plan without a word."""
    for pattern in patterns:
        if not any(matching(name, [pattern]) for name in names):
            raise ValueError(
                f"{what} has the pattern {pattern!r}, which matches none of {len(names)} names, "
                f"such as {names[-1]!r}"
            )


def _scaled(embedding: nn.Module) -> bool:
    """Whether an embedding multiplies its rows by the root of their length, as Gemma's does."""
    scale: Any = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    length = int(embedding.weight.shape[1])  # type: ignore[index]
    return length > 1 and math.isclose(float(scale), math.sqrt(length), rel_tol=0.01)


def plain(name: str) -> str:
    """Return a name without what compile, DataParallel, FSDP and checkpointing put in."""
    wrappers = r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)"
    return re.sub(r"^module(\.|$)", "", re.sub(wrappers, "", name).removeprefix("."))


def unnumbered(name: str) -> str:
    """Return a name with * for the number of its block, the same at every depth."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def bare_parameters(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters by bare name; with `tied`, a shared tensor under each of its names."""
    return {plain(name): p for name, p in model.named_parameters(remove_duplicate=not tied)}


def bare_modules(model: nn.Module, *, tied: bool = False) -> dict[str, nn.Module]:
    """Return the modules by bare name; with `tied`, one that stands twice under each name."""
    return {plain(name): m for name, m in model.named_modules(remove_duplicate=not tied)}


def stack_of(model: nn.Module, *, required: bool = True) -> tuple[str, int]:
    """Return the name and length of the residual stack: the list with the most parameters.

    A list is an nn.ModuleList, or an nn.Sequential of modules of one class that have parts. Without
    one the name is "" where none is required.
    """
    named = bare_modules(model).items()
    lists = [(name, m) for name, m in named if name and _is_list(m)]
    if not lists and not required:
        return "", 1
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList of residual blocks; put the blocks into "
            "one (or into an nn.Sequential), so that depth can be read"
        )
    name, stack = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return name, len(stack)  # type: ignore[arg-type]


def _is_list(module: nn.Module) -> bool:
    """Whether a module may be the list of a model's blocks."""
    parts = list(module.children())
    alike = len({type(part) for part in parts}) == 1 and any(True for _ in parts[0].children())
    return bool(parts) and (
        isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike)
    )


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the groups of names that share one tensor."""
    groups: dict[int, list[str]] = {}
    for name, p in bare_parameters(model, tied=True).items():
        groups.setdefault(id(p), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def compare(
    model: nn.Module, base: nn.Module | None, r_n: float | None, r_L: float | None
) -> tuple[Layout, dict[str, tuple[Tensor, Tensor]], float, float]:
    """Return the model's layout, name → (tensor, the base model's), and the two ratios.

    Tied tensors stand under each of their names; block i beside block i modulo the base's depth,
    or the next that has such a tensor.
    Without a base model a tensor is its own partner.
    """
    if (base is None) == (r_n is None and r_L is None):
        raise ValueError(
            "give either base=, a model of the same architecture, or the ratios r_n= and r_L="
        )
    # without a base a tensor is its own partner, and the ratios are as given
    stack, depth = stack_of(model, required=base is None)
    names, every = list(bare_parameters(model)), bare_parameters(model, tied=True)
    pairs: dict[str, tuple[Tensor, Tensor]] = {name: (p, p) for name, p in every.items()}
    wide, deep = (1.0 if r is None else float(r) for r in (r_n, r_L))
    Scale().at(wide, deep)  # refuses what is no ratio
    if base is not None:
        base_stack, base_depth = stack_of(base, required=False)
        if stack != base_stack:
            raise ValueError(
                f"the residual stacks differ: {stack!r} here, {base_stack!r} in the base model"
            )
        # every parameter beside the base model's
        there = bare_parameters(base, tied=True)
        for name, p in every.items():
            inside = re.match(re.escape(stack) + r"\.(\d+)\.(.*)", name)
            # blocks may be of several kinds: the first at or behind its own place that has it
            places = (
                [(int(inside[1]) + j) % base_depth for j in range(base_depth)] if inside else []
            )
            twins = [f"{stack}.{place}.{inside[2]}" for place in places] if inside else [name]
            twin = next((one for one in twins if one in there), twins[0])
            if twin not in there:
                raise ValueError(
                    f"the base model has no {twin!r}, which {name!r} should be compared with: "
                    "another architecture?"
                )
            pairs[name] = p, there[twin]
        wide = _width_ratio({name: pairs[name] for name in names}, f"{stack}.")
        deep = depth / base_depth
    compared = base is not None and wide != 1.0
    if not compared:
        stack_of(model)  # at one width it is the stack that tells the roles
    return Layout(bare_modules(model), names, stack, compared, {}, deep != 1), pairs, wide, deep


def _width_ratio(pairs: Mapping[str, tuple[Tensor, Tensor]], stack: str) -> float:
    """Return the one ratio by which sides outside the stack grow; 1 when none does."""
    ratios: dict[float, str] = {}
    inside: dict[float, str] = {}
    for name, (p, q) in pairs.items():
        if p.ndim != q.ndim:
            raise ValueError(
                f"{name!r} has {p.ndim} axes here and {q.ndim} in the base model: another "
                "architecture?"
            )
        for a, b in zip(p.shape, q.shape, strict=True):
            if a != b:
                (inside if name.startswith(stack) else ratios).setdefault(a / b, name)
    # inside the stack, matrices may have shapes of their own, but then the stream must grow
    found = list((ratios or inside).items()) + ([] if ratios or not inside else [(1.0, "the rest")])
    if len(found) > 1:
        (first, one), (second, two) = found[:2]
        raise ValueError(
            f"the layers do not grow alike: {one!r} by {first:g} and {two!r} by {second:g}; scale "
            "all widths by one ratio"
        )
    return next(iter(ratios), 1.0)
