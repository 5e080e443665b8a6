"""The table of rules against its derivation, the paper's printed tables, and arithmetic that must hold between its cells."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from grsd.mup import rules
from grsd.mup.norms import rms_operator_norm
from grsd.mup.registry import assemble
from grsd.mup.rules import (
    MATRICES,
    OPTIMIZERS,
    ROLES,
    RULES,
    Scale,
    derive,
    rule,
    scale,
    shaped,
    update_norm,
    weight_norm,
)

H = Fraction(1, 2)

# 2603.00541, tables 1–6: optimizer → role → (η, λ) as powers of (r_n, r_L), typed from the paper and not from the package
PRINTED = {
    "muon_kimi": {
        "input": ((0, 0), (0, 0)),
        "hidden": ((-H, 0), (H, 0)),
        "output": ((0, 0), (0, 0)),
    },
    "muon": {"input": ((H, 0), (-H, 0)), "hidden": ((0, 0), (0, 0)), "output": ((H, 0), (-H, 0))},
    "shampoo": {
        "input": ((H, 0), (-H, 0)),
        "hidden": ((0, 0), (0, 0)),
        "output": ((H, 0), (-H, 0)),
    },
    "soap": {"input": ((H, 0), (-H, 0)), "hidden": ((0, 0), (0, 0)), "output": ((H, 0), (-H, 0))},
    "sgd": {
        "input": ((1, 0), (-1, 0)),
        "hidden": ((0, 1), (0, -1)),
        "output": ((1, 0), (-1, 0)),
        "input_bias": ((1, 0), (-1, 0)),
        "hidden_bias": ((1, 1), (-1, -1)),
    },
    "adamw": {
        "input": ((0, 0), (0, 0)),
        "hidden": ((-1, 0), (1, 0)),
        "output": ((0, 0), (0, 0)),
        "input_bias": ((0, 0), (0, 0)),
        "hidden_bias": ((0, 0), (0, 0)),
    },
    "sso": {"input": ((0, 0), (0, 0)), "hidden": ((0, 0), (0, 0)), "output": ((1, 0), (-1, 0))},
}
PRINTED["lion"] = PRINTED["sophia"] = PRINTED["adamw"]


def disagreements(
    table: dict[tuple[str, int], dict[rules.Role, rules.Rule]],
) -> list[tuple[str, int, str]]:
    found = []
    for (name, k), by_role in table.items():
        second = derive(name, k)
        assert set(second) == set(by_role)
        found += [(name, k, role) for role in by_role if by_role[role] != second[role]]
    return found


def test_the_table_is_what_the_condition_gives() -> None:
    assert len(RULES) == 2 * len(OPTIMIZERS) and disagreements(RULES) == []


@pytest.mark.parametrize("field", ["multiplier", "variance", "lr", "weight_decay", "eps"])
def test_a_wrong_cell_is_found(field: str) -> None:
    right = RULES["adamw", 2]["hidden"]
    wrong = replace(right, **{field: getattr(right, field) * scale(0, "1/2")})
    assert disagreements({("adamw", 2): {**RULES["adamw", 2], "hidden": wrong}}) == [
        ("adamw", 2, "hidden")
    ]


@pytest.mark.parametrize("name", sorted(PRINTED))
def test_the_table_is_the_printed_one(name: str) -> None:
    ours = {
        role: ((r.lr.n, r.lr.L), (r.weight_decay.n, r.weight_decay.L))
        for role, r in RULES[name, 2].items()
        if role != "output_bias"
    }
    assert ours == PRINTED[name]


@pytest.mark.parametrize(("name", "k"), sorted(RULES))
def test_updates_have_the_size_that_the_condition_asks_for(name: str, k: int) -> None:
    table = RULES[name, k]
    for role, r in table.items():
        change = r.lr * update_norm(name, role, k)
        inside = role in ("hidden", "hidden_bias")
        assert r.multiplier * change == (
            scale(0, -1) if inside else scale()
        )  # C2.1, C2.2, B.1, B.3
        # λ W is as large as A
        assert r.weight_decay * weight_norm(role, r.variance) == update_norm(name, role, k)
    block = table["hidden"].multiplier
    assert block == (scale(0, -1) if k == 2 else scale(0, "-1/2"))
    if k == 2:  # C2.3: both factors of a block replaced by their updates
        change = table["hidden"].lr * update_norm(name, "hidden")
        assert block * change * change == scale(0, -1)


def test_muon_rules_differ_by_the_factor_of_the_scaling() -> None:
    # 0.2 √max(n_in, n_out) is √n for every role here; √max(1, n_out/n_in) is √n for the input alone
    for role in MATRICES:
        bare, kimi, keller = (rule(name, role).lr for name in ("muon", "muon_kimi", "muon_keller"))
        assert bare / kimi == scale("1/2")
        assert bare / keller == (scale("1/2") if role == "input" else scale())


def test_a_scale_is_a_number_at_given_ratios() -> None:
    assert rule("adamw", "hidden").eps == scale(-1, -1) and str(scale(-1, "1/2")) == "√r_L/r_n"
    assert (
        str(scale(-1, -2)) == "1/(r_n r_L²)"
        and str(scale("3/2")) == "r_n^3/2"
        and str(scale("1/2", 1)) == "√r_n r_L"
    )
    assert (
        scale("-1/2", 2).at(4.0, 3.0) == pytest.approx(4.5)
        and str(Scale()) == "1"
        and Scale().at(7, 9) == 1.0
    )
    with pytest.raises(ValueError, match=r"positive and finite, got r_n = 0, r_L = 2"):
        scale(1).at(0, 2)


def test_bad_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no rule for the optimizer 'adam'; there are sgd, adamw"):
        rule("adam", "hidden")
    with pytest.raises(ValueError, match="no role 'head'"):
        rule("adamw", "head")
    with pytest.raises(ValueError, match="muon takes matrices only: give the hidden_bias"):
        rule("muon", "hidden_bias")
    with pytest.raises(ValueError, match="k = 0"):
        rule("adamw", "hidden", k=0)
    assert rule("adamw", "hidden", k=5) == rule("adamw", "hidden") and set(
        RULES["adamw", 1]
    ) == set(ROLES)


SHAPES = {  # powers of n of the outputs and inputs
    "square": (1, 1),
    "one key head": (0, 1),
    "from a fixed rank": (1, 0),
    "half": (Fraction(1, 2), 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["adamw", "muon", "muon_keller", "muon_kimi", "shampoo"])
def test_updates_of_any_shape_keep_their_size_under_the_shaped_rule(name: str, shape: str) -> None:
    """A step of the optimizer itself on a gradient of rank one, at three widths."""
    out, into = SHAPES[shape]
    sizes = []
    for n in (64, 256, 1024):
        rows, columns = int(16 * (n / 64) ** out), int(16 * (n / 64) ** into)
        generator = torch.Generator().manual_seed(0)
        g, h = (torch.randn(k, 1, generator=generator) for k in (rows, columns))
        p = torch.nn.Parameter(torch.zeros(rows, columns))
        p.grad = g @ h.mT
        known = OPTIMIZERS[name]
        optimizer = assemble({name: [{"params": [p], "mup_lr": 1.0}]}, 1.0, {name: known.exact})
        known.first(optimizer)
        own = shaped(name, rule(name, "hidden"), Fraction(out), Fraction(into))
        assert (
            own.lr * own.weight_decay == rule(name, "hidden").lr * rule(name, "hidden").weight_decay
        )
        assert own.variance.n == -into
        sizes.append(rms_operator_norm(p.detach()) * own.lr.at(n / 64, 1.0))
    # Keller's √max(1, n_out/n_in) follows its larger branch, and is 1 at the base's square
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-3)
