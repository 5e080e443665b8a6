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
from grsd.mup.plans import Entry, Plan, numbers, unscaled
from grsd.mup.registry import row
from grsd.mup.roles import BRANCH_ENDS, FUSED, Fused, compare, tied, unmatched
from grsd.mup.rules import Scale, rule

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
    branch_ends: Sequence[str] = BRANCH_ENDS,
    fused: Fused = FUSED,
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
        block's multiplier.
    fused : pattern of parameter names → `Entry.split`, for matrices that hold several. "heads"
        stands for (heads of the model, 3).

    Refused is what would make a wrong plan: another architecture, ratios that differ from layer to
    layer, a parameter without a role (named, with what to say), a pattern that matches nothing.
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

    # every parameter's partner in the base model (without one: itself), the ratios, and the roles
    layout, pairs, r_n, r_L = compare(model, base, r_n, r_L, roles or {})
    every = list(pairs)
    unmatched(roles or {}, every, "roles")
    unmatched([pattern for pattern in fused if pattern not in FUSED], every, "fused")
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
        if wd_rule == "unscaled":
            own = replace(own, weight_decay=Scale())
        # initial values of the base: noise of one deviation, or a constant such as a gain's 1
        values = q.detach().double().flatten()
        constant = bool((values == values[0]).all())
        std_base = None if base is None else float(values.square().mean().sqrt())
        entries.append(
            Entry(
                name=name,
                role=role,
                shape=tuple(p.shape),
                optimizer=which,
                rule=own,
                **numbers(own, r_n, r_L),
                std_base=0.0 if constant else std_base,
                mean_base=float(values[0]) if constant else 0.0,
                split=layout.split(name, fused) if role == "hidden" else 1,
                transposed=p.ndim == 2 and layout.transposed(name),
                block=layout.block(name),
            )
        )
    # factors on the ends of branches and on heads, which are the same for every optimizer
    alpha, head = (rule(other, role, k).multiplier.at(r_n, r_L) for role in ("hidden", "output"))
    multipliers = layout.multipliers(assigned, branch_ends, alpha, head)
    # a pattern of the user that matches nothing is refused
    below = [name for name in layout.modules if name.startswith(f"{layout.stack}.")]
    unmatched([end for end in branch_ends if end not in BRANCH_ENDS], below, "branch_ends")
    notes = (*((chosen.caution,) if chosen.caution else ()), *_heads(model, base))
    return Plan(tuple(entries), multipliers, r_n, r_L, min(k, 2), shared, notes)


def _heads(model: nn.Module, base: nn.Module | None) -> tuple[str, ...]:
    """Return a note where the dimension of attention heads changes."""
    sizes = []
    for m in (model, base):
        config: Any = getattr(m, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        own = getattr(config, "head_dim", None)
        sizes.append(own or (config.hidden_size // heads if heads else None))
    if None in sizes or sizes[0] == sizes[1]:
        return ()
    return (
        f"The head dimension goes from {sizes[1]} to {sizes[0]}: scale attention by "
        f"√{sizes[1]}/{sizes[0]} instead of 1/√{sizes[0]}, or keep it fixed and add heads. The "
        "plan does not do it.",
    )
