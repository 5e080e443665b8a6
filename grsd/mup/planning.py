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
from grsd.mup.families import BRANCH_ENDS, FAMILIES, FUSED, Family, Fused, configuration
from grsd.mup.initial import initial
from grsd.mup.plans import Entry, Plan, numbers, unscaled
from grsd.mup.registry import row
from grsd.mup.roles import compare, matching, split_of, tied, unmatched
from grsd.mup.rules import Scale, rule, shaped

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
    wd_rule: Literal["paper", "unscaled"] = "paper",
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
    wd_rule : "paper": λ as in tables 2–6; "unscaled": λ is not scaled.
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
    role (named, with what to say), a pattern that matches nothing. Models may be on the meta
    device; `Plan.verify` measures whether a plan is complete.
    """
    # the optimizers, and what is known to go wrong with them
    chosen = row(optimizer)
    if row(other).matrices_only:
        raise ValueError(
            f"other = {other!r} takes matrices only; biases and embeddings need another: 'adamw'"
        )
    checks.one_of("wd_rule", wd_rule, ("paper", "unscaled"))
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
        if wd_rule == "unscaled":
            own = replace(own, weight_decay=Scale())
        stored: dict[str, Any] = {
            "split": split,
            "transposed": p.ndim > 1 and layout.transposed(name),
            "batched": role == "hidden" and layout.batched(name, p),
        }
        kept = matching(name, family.kept) is not None
        entries.append(
            Entry(
                name=name,
                role=role,
                shape=tuple(p.shape),
                optimizer=which,
                rule=own,
                # a hidden matrix outside the stack has no depth
                **numbers(own, r_n, r_L if inside else 1.0),
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
    multipliers = layout.multipliers(assigned, ends, alpha, head, r_n)
    # a pattern of the user that matches nothing is refused
    below = [name for name in layout.modules if name.startswith(f"{layout.stack}.")]
    unmatched([] if branch_ends in (None, BRANCH_ENDS) else ends, below, "branch_ends")
    notes = [chosen.caution] if chosen.caution else []
    notes += _heads(model, base)
    if known_as and known_as not in FAMILIES and branch_ends is None:
        notes.append(
            f"{known_as!r} is no family of grsd.mup.families: measure with plan.verify(model, "
            "batch) whether the ends of its branches are all named."
        )
    return Plan(tuple(entries), multipliers, r_n, r_L, min(k, 2), shared, tuple(notes))


def _heads(model: nn.Module, base: nn.Module | None) -> list[str]:
    """Return a note where the dimension of attention heads changes."""
    sizes = []
    for m in (model, base):
        config: Any = None if m is None else configuration(m)
        heads = getattr(config, "num_attention_heads", None)
        own = getattr(config, "head_dim", None)
        sizes.append(own or (config.hidden_size // heads if heads else None))
    if None in sizes or sizes[0] == sizes[1]:
        return []
    return [
        f"The head dimension goes from {sizes[1]} to {sizes[0]}: scale attention by "
        f"√{sizes[1]}/{sizes[0]} instead of 1/√{sizes[0]}, or keep it fixed and add heads. The "
        "plan does not do it."
    ]
