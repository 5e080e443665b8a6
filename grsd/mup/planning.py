"""From two sizes of one architecture to a plan: the role of every parameter, and what follows from
it.

`plan` compares a model with a base model of the same architecture. A parameter's role follows from
where it is (inside the residual stack or outside) and from which of its sides grow.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from grsd import checks
from grsd.mup.attention import attention
from grsd.mup.families import BRANCH_ENDS, FAMILIES, FUSED, SEVERAL, Family, Fused, configuration
from grsd.mup.initial import initial
from grsd.mup.plans import Entry, Plan, numbers, unscaled
from grsd.mup.registry import row
from grsd.mup.roles import (
    Layout,
    bare_modules,
    compare,
    matching,
    split_of,
    stack_of,
    tied,
    unmatched,
    unnumbered,
)
from grsd.mup.rules import Rule, Scale, rule, scale, shaped

__all__ = ["BRANCH_ENDS", "FUSED", "Entry", "Plan", "plan", "unscaled"]


def plan(
    model: nn.Module,
    *,
    base: nn.Module | None = None,
    r_n: float | None = None,
    r_L: float | None = None,
    optimizer: str,
    other: str = "adamw",
    k: int = 2,
    wd_rule: Literal["paper", "unscaled", "independent"] = "paper",
    eps_rule: Literal["paper", "completep", "unscaled"] = "paper",
    multipliers: Mapping[str, float] | None = None,
    roles: Mapping[str, str] | None = None,
    branch_ends: Sequence[str] | None = None,
    fused: Fused | None = None,
) -> Plan:
    """Compare a model with its base and return the plan; warn of an optimizer whose rule is known
    to fail.

    Parameters
    ----------
    model, base : one architecture at two sizes; at the same size every factor is 1.
    r_n, r_L : width and depth ratio, in place of a base model. Roles then follow from the position
        alone, and `Plan.initialize_` needs the base's standard deviations.
    optimizer : one of `grsd.mup.rules.OPTIMIZERS`, for hidden matrices and all that it can take.
    other : for what `optimizer` cannot take or the paper does not give it: with a matrix optimizer,
        everything but hidden matrices.
    k : layers per residual branch; 1 gives the rules of condition B.1.
    wd_rule : "paper": λ as in tables 2–6; "unscaled": λ is not scaled; "independent": the decay of
        a step is λ itself, not η λ, in every group (1711.05101; a schedule of η still scales it).
    eps_rule : "paper": ε as in tables 2–6, that of CompleteP's equation 40; "completep": ε/(r_n
        r_L) in every group, as its public code had it at first; "unscaled": ε is not scaled.
    multipliers : "input", "hidden", "output" or "attention" → a factor of your own on embeddings,
        residual branches, head or attention scores, beside the rule's; tuned at the base.
    roles : pattern of parameter names → role, for those that cannot be told from shapes. Patterns
        are tried in order.
    branch_ends : patterns of the modules whose output is added to the residual stream; they get the
        block's multiplier. By default those of the model's family in `grsd.mup.families`, else
        `BRANCH_ENDS`; behind a norm, it is the norm that ends the branch.
    fused : pattern of parameter names → how they are fused along their outputs: k equal parts, or a
        tuple of sizes that come again and again. By default those of the family, else `FUSED`.

    Inside the stack, matrices may grow by ratios of their own (rounded feed-forward widths, a fixed
    number of key heads); `grsd.mup.rules.shaped` says what follows. Refused is what would make a
    wrong plan: another architecture, ratios that differ outside the stack, a parameter without a
    role (named, with what to say), a pattern that matches nothing. At the base's depth a model
    needs no stack. Models may be on the meta device; `Plan.verify` measures whether a plan is
    complete.
    """
    # the optimizers, and what is known to go wrong with them
    chosen = row(optimizer)
    if row(other).matrices_only:
        raise ValueError(
            f"other = {other!r} takes matrices only; biases and embeddings need another: 'adamw'"
        )
    checks.one_of("wd_rule", wd_rule, ("paper", "unscaled", "independent"))
    checks.one_of("eps_rule", eps_rule, ("paper", "completep", "unscaled"))
    own_factors = {"input": 1.0, "hidden": 1.0, "output": 1.0, "attention": 1.0}
    for place, factor in (multipliers or {}).items():
        checks.one_of("a place of multipliers", place, tuple(own_factors))
        own_factors[place] = checks.positive(f"multipliers[{place!r}]", factor)
    if chosen.caution:
        warnings.warn(chosen.caution, stacklevel=2)

    # what is known of the family; what the user says comes first
    config = configuration(model)
    known_as = getattr(config, "model_type", "")
    family = FAMILIES.get(known_as, Family(BRANCH_ENDS, FUSED))
    if family.refused:
        raise ValueError(f"no plan for the family {known_as!r}: {family.refused}")
    ends = family.branch_ends if branch_ends is None else branch_ends
    fusing = family.fused if fused is None else fused

    # every parameter's partner in the base model (without one: itself), the ratios, and the roles
    layout, pairs, r_n, r_L = compare(model, base, r_n, r_L)
    said = {**(roles or {}), **family.roles}
    layout = replace(layout, roles=said, backwards=family.transposed)
    base_config = config if base is None else configuration(base)
    every = list(pairs)
    unmatched(roles or {}, every, "roles")
    unmatched(fused or {}, every, "fused")
    assigned = {name: layout.role(name, p, q) for name, (p, q) in pairs.items()}

    # one entry for every tensor; in the other places of a tied one its rule must be the same
    shared = tied(model)
    twins = {names[0]: names[1:] for names in shared}
    entries = []
    for name in layout.names:
        role, (p, q) = assigned[name], pairs[name]
        which = optimizer if role == "hidden" or not chosen.matrices_only else other
        own = rule(which, role, k)
        for twin in twins.get(name, ()):
            second = rule(which, assigned[twin], k)
            if (own.lr, own.weight_decay, own.eps) != (second.lr, second.weight_decay, second.eps):
                raise ValueError(
                    f"{name!r} and {twin!r} are one tensor in the roles {role} and "
                    f"{assigned[twin]}, whose rules differ under {which}; untie them or choose "
                    "another optimizer"
                )
        inside = layout.block(name) is not None
        splits = fusing if role == "hidden" else {}
        split, there = (split_of(name, splits, c) for c in (config, base_config))
        rates: tuple[float, ...] = ()
        growth = []
        if role == "hidden":
            # fused parts may grow by ratios of their own: one key head beside n queries
            growth = layout.growth(name, p, q, r_n, split, there)
            first, *others = (shaped(which, own, *one) for one in growth)
            if any(rest.lr != first.lr for rest in others):
                rates = tuple((one.lr / first.lr).at(r_n, 1.0) for one in (first, *others))
            own = first
        own = _chosen(own, wd_rule, eps_rule)
        stored: dict[str, Any] = {
            "split": split,
            "transposed": p.ndim > 1 and layout.transposed(name),
            "batched": role == "hidden" and layout.batched(name, p),
        }
        # a hidden matrix outside the stack has no depth, but for that code's ε
        figures = numbers(own, r_n, r_L if inside else 1.0, own_factors.get(role, 1.0))
        if eps_rule == "completep" and own.eps is not None:
            figures["eps"] = own.eps.at(r_n, r_L)
        kept = matching(name, family.kept) is not None
        entries.append(
            Entry(
                name=name,
                role=role,
                shape=tuple(p.shape),
                optimizer=which,
                rule=own,
                **figures,
                table=layout.table(name, role, p, q),
                initial=()
                if kept
                else initial(layout.owner(name), q, {**stored, "split": there}, base is not None),
                block=layout.block(name),
                rates=rates,
                shaped=any(abs(power - 1) > 0.1 for one in growth for power in one),
                **stored,
            )
        )
    # factors on the ends of branches and on heads, which are the same for every optimizer
    alpha, head = (rule(other, role, k).multiplier.at(r_n, r_L) for role in ("hidden", "output"))
    alpha, head = alpha * own_factors["hidden"], head * own_factors["output"]
    factors = layout.multipliers(assigned, ends, alpha, head, r_n, own_factors["input"])
    # a pattern of the user that matches nothing is refused
    below = [name for name in layout.modules if name.startswith(f"{layout.stack}.")]
    unmatched([] if branch_ends in (None, BRANCH_ENDS) else ends, below, "branch_ends")
    notes = [chosen.caution] if chosen.caution else []
    # attention, where heads grow or the user says so
    parts = {e.name.rpartition(".")[0]: e.split for e in entries if e.name.endswith("weight")}
    scores, said_of_scores = attention(
        model, base, layout, *_twins(layout, base), family, parts, own_factors["attention"]
    )
    notes += said_of_scores
    if known_as and known_as not in FAMILIES and branch_ends is None:
        notes.append(
            f"{known_as!r} is no family of grsd.mup.families: measure with plan.verify(model, "
            "batch) whether the ends of its branches are all named."
        )
    # what names alone suggest, of a model whose family says nothing
    whole = [e for e in entries if e.split == 1 and row(e.optimizer).matrices_only]
    doubtful = [e.name for e in whole if matching(e.name, SEVERAL)]
    if doubtful and known_as not in FAMILIES and fused is None:
        notes.append(
            f"By their names, {unnumbered(doubtful[0])!r} may be several matrices in one, which "
            f"{optimizer} takes as one: say fused={{pattern: sizes}}."
        )
    return Plan(
        tuple(entries),
        factors,
        r_n,
        r_L,
        min(k, 2),
        shared,
        tuple(notes),
        attention=scores,
        embedded=own_factors["input"],
        independent=wd_rule == "independent",
    )


def _chosen(own: Rule, wd_rule: str, eps_rule: str) -> Rule:
    """Return the rule of a parameter with λ and ε as the user wants them."""
    if wd_rule == "unscaled":
        own = replace(own, weight_decay=Scale())
    elif wd_rule == "independent":
        # the decay of a step, η λ, has no factor
        own = replace(own, weight_decay=Scale() / own.lr)
    if own.eps is not None and eps_rule != "paper":
        own = replace(own, eps=scale(-1, -1) if eps_rule == "completep" else Scale())
    return own


def _twins(layout: Layout, base: nn.Module | None) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the base's modules, and module in the stack → name of the one beside it there."""
    if base is None:
        return {}, {}
    depth = stack_of(base, required=False)[1]
    twins = {}
    for name in layout.modules:
        if (block := layout.block(name)) is not None:
            rest = name.removeprefix(f"{layout.stack}.{block}")
            twins[name] = f"{layout.stack}.{block % depth}{rest}"
    return bare_modules(base), twins
