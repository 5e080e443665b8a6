"""Exponents of one step: the rules' predictions hold on small networks, and every kind of wrong prediction is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd.mup import audit, audit_update_norms
from grsd.mup.audit import UpdateAudit, measure_sizes, summarize
from grsd.mup.rules import OPTIMIZERS, rule, scale

from .test_planning import Block, gpt2

X = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Small(nn.Module):
    """Equation (2) with biases: few inputs and α_b = 1/4, so that small sizes are near their limits."""

    def __init__(self, width: int, depth: int, k: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Scaled(width, k) for _ in range(depth))
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0.0, p.shape[1] ** -0.5 if p.ndim == 2 else 0.1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


class Scaled(Block):
    def __init__(self, width: int, k: int) -> None:
        super().__init__(width)
        if k == 1:
            del self.first
        self.k = k

    def forward(self, h: Tensor) -> Tensor:
        inner = torch.relu(self.first(h)) if self.k == 2 else torch.relu(h)
        return h + 0.25 * self.branch_end(inner)


def loss(model: nn.Module) -> Tensor:
    found: Tensor = -model(X).sum()
    return found


SETTINGS: dict[str, Any] = {
    "widths": (32, 64, 128),
    "depths": (4, 8, 16),
    "base": (64, 4),
    "seeds": tuple(range(6)),
}
NAMES = (
    "sgd",
    "adamw",
    "lion",
    "sophia",
    "muon",
    "muon_keller",
    "muon_kimi",
    "shampoo",
    "soap",
    "sso",
)


@pytest.fixture(scope="module")
def measured() -> UpdateAudit:
    return audit_update_norms(Small, loss, optimizers=NAMES, **SETTINGS)


def test_exponents_are_the_predicted_ones(measured: UpdateAudit) -> None:
    assert {e.quantity for e in measured.exponents} == set(audit.QUANTITIES)
    assert len(measured.exponents) == 6 * 2 * 2 + (4 * 6 + 6 * 3) * 2 * 2
    gradient = [e for e in measured.exponents if e.quantity == "gradient" or e.optimizer == "sgd"]
    others = [e for e in measured.exponents if e not in gradient]
    assert all(e.holds for e in others), [str(e) for e in others if not e.holds]
    assert all(abs(e.measured.value - e.wanted) < 0.25 for e in gradient), [
        str(e) for e in gradient
    ]


def test_orthogonal_and_sign_updates_have_exact_sizes() -> None:
    seen = measure_sizes(Small, loss, width=48, depth=5, seed=0, base=(48, 5), optimizers=NAMES)
    for name, sizes in (("muon", (3 / 48, 1, 48)), ("muon_keller", (1, 1, 48)), ("sso", (1, 1, 1))):
        for role, size in zip(("input", "hidden", "output"), sizes, strict=True):
            # U Vᵀ has the norm √(n_in/n_out); Keller's factor is √(n_out/n_in) for the input; SSO's R takes it back
            found = seen.updates[name][role]
            if (
                name == "sso"
            ):  # beside RΦ the retraction moves W by ⟨u₁v₁ᵀ, Φ⟩ W, which is not 0 for a gradient of rank one
                assert 0.9 < found < 2
            else:
                assert found == pytest.approx(size**0.5, rel=1e-9)
    kimi = {r: 0.2 * 48**0.5 * seen.updates["muon"][r] for r in ("input", "hidden", "output")}
    assert seen.updates["muon_kimi"] == pytest.approx(kimi, rel=1e-9)
    assert seen.updates["lion"]["input_bias"] == pytest.approx(
        seen.updates["adamw"]["input_bias"], rel=1e-6
    )
    assert seen.updates["shampoo"] == pytest.approx(
        seen.updates["muon"], rel=1e-3
    )  # rank one: a quarter power of rounding
    assert seen.updates["soap"] == pytest.approx(seen.updates["muon"], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "role", "wrong", "axis"),
    [
        ("muon", "hidden", scale("-1/2"), "width"),  # Kimi's rule for the bare update
        ("muon_kimi", "hidden", scale(), "width"),  # the bare rule for Kimi's update
        (
            "muon_keller",
            "input",
            scale("1/2"),
            "width",
        ),  # torch.optim.Muon with the paper's row of table 3
        (
            "adamw",
            "hidden",
            scale(-1, -1),
            "depth",
        ),  # a depth factor that the condition does not ask for
        ("sgd", "hidden", scale(), "depth"),  # table 4 without r_L
        ("sso", "output", scale(), "width"),
    ],
)
def test_a_wrong_rule_is_flagged_and_nothing_else(
    measured: UpdateAudit, name: str, role: str, wrong: Any, axis: str
) -> None:
    tried = {(name, role): replace(rule(name, role), lr=wrong)}
    settings = {"base": SETTINGS["base"], "optimizers": [name], "tolerance": 0.25}
    bad = summarize(measured.sizes, rules=tried, **settings)
    assert [(e.role, e.quantity, e.axis) for e in bad.failures] == [(role, "condition", axis)]
    assert summarize(measured.sizes, **settings).failures == ()
    assert "1 outside" in str(bad) and f"{name}, {role}: condition ∝ {axis}^" in str(bad)


def test_a_wrong_derivation_is_flagged(measured: UpdateAudit) -> None:
    # the sizes of one optimizer under the name of another: what the update's own exponent catches
    swapped = [replace(s, updates={"muon": s.updates["muon_kimi"]}) for s in measured.sizes]
    found = summarize(swapped, base=SETTINGS["base"], optimizers=["muon"])
    assert {(e.role, e.quantity, e.axis) for e in found.failures} == {
        (role, quantity, "width")
        for role in ("input", "hidden", "output")
        for quantity in ("update", "condition")
    }


def test_one_layer_blocks_have_their_own_exponents() -> None:
    factory: Callable[[int, int], nn.Module] = lambda n, depth: Small(n, depth, 1)  # noqa: E731
    found = audit_update_norms(
        factory, loss, optimizers=["sgd", "adamw", "muon"], k=1, tolerance=0.25, **SETTINGS
    )
    assert found.failures == () and found["", "hidden", "weight", "depth"].wanted == -0.5
    assert found["", "hidden", "gradient", "depth"].measured.value == pytest.approx(-0.5, abs=0.2)
    as_two = summarize(
        found.sizes, base=(64, 4), optimizers=["sgd", "adamw", "muon"], tolerance=0.25
    )
    assert ("hidden", "gradient", "depth") in {
        (e.role, e.quantity, e.axis) for e in as_two.failures
    }


def test_a_stock_transformer_with_fused_and_transposed_weights_is_audited() -> None:
    tokens = torch.arange(12).reshape(1, 12) % 61

    def language(model: nn.Module) -> Tensor:
        found: Tensor = model(tokens).logits.sum()
        return found

    found = audit_update_norms(
        gpt2,
        language,
        widths=(16, 32, 64),
        depths=(),
        base=(16, 2),
        optimizers=["muon", "adamw"],
        seeds=(0,),
    )
    # exact for U Vᵀ, whatever the model: the parts of Q, K, V are measured one by one
    assert found["muon", "hidden", "update", "width"].measured.value == pytest.approx(
        0.0, abs=0.35
    )  # MLP shapes 4 : 1
    sizes = [s.updates["muon"]["hidden"] for s in found.sizes]
    assert max(sizes) / min(sizes) < 1 + 1e-6


class Dropping(Small):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__(width, depth)
        self.drop = nn.Dropout(0.5)


def test_bad_input_is_refused() -> None:
    settings: dict[str, Any] = {
        "width": 16,
        "depth": 2,
        "seed": 0,
        "base": (16, 2),
        "optimizers": ["sgd"],
    }
    with pytest.raises(ValueError, match="dropout 'drop' is active"):
        measure_sizes(Dropping, loss, **settings)
    with pytest.raises(ValueError, match="no rule for the optimizer 'adam'"):
        measure_sizes(Small, loss, **{**settings, "optimizers": ["adam"]})
    with pytest.raises(
        ValueError, match=r"width, depth, base and blocks\[0\] is 0; it must be at least 1"
    ):
        measure_sizes(Small, loss, **{**settings, "width": 0})
    with pytest.raises(KeyError, match="the audit has no exponent"):
        summarize([], base=(16, 2), optimizers=[])["sgd", "hidden", "update", "width"]
    seen = measure_sizes(
        Small, lambda m: loss(m) * float("nan"), **settings
    )  # a diverged model is data
    assert seen.updates["sgd"]["hidden"] != seen.updates["sgd"]["hidden"]
    assert set(OPTIMIZERS) >= set(NAMES)


def test_a_table_is_measured_by_its_rows() -> None:
    """A token meets one row of an embedding: its norm does not grow with the width, that of the whole matrix does."""
    G = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (4, 8), generator=G)

    class Tokens(nn.Module):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__()
            self.table = nn.Embedding(40, width)
            self.blocks = nn.ModuleList(nn.Sequential() for _ in range(depth))
            for block in self.blocks:
                block.branch_end = nn.Linear(width, width)  # type: ignore[assignment]
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x).mean(1)
            for block in self.blocks:
                h = h + block.branch_end(torch.relu(h))  # type: ignore[operator]
            out: Tensor = self.head(h)
            return out

    found = audit_update_norms(
        Tokens,
        lambda m: m(tokens).mean(),
        widths=(64, 128, 256),
        depths=(),
        base=(64, 2),
        optimizers=("adamw",),
        k=1,
        seeds=(0, 1),
    )
    (weight,) = [
        e for e in found.exponents if (e.role, e.quantity, e.axis) == ("input", "weight", "width")
    ]
    # the largest of 40 rows of √n-many numbers is within a few per cent of 1 at every width
    assert abs(weight.measured.value) < 0.05
    assert not [e for e in found.failures if e.role == "input" and e.quantity != "gradient"]
