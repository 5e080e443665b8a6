"""The experiment soap-epsilon: its ε against singular values by NumPy, its bound, and the growth that it must see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grsd.experiments import soap_epsilon
from grsd.experiments.engine import find, run

SMALL: dict[str, Any] = {
    "widths": (16, 32, 64, 128),
    "depths": (2, 4),
    "base_width": 16,
    "base_depth": 2,
    "seeds": 2,
    "shares": (0.0, 1e-2),
    "steps": 5,
    "samples": 8,
}


def test_sigma_is_the_largest_singular_value() -> None:
    piece = soap_epsilon.pieces(soap_epsilon.Parameters(**SMALL))[0]
    loss = soap_epsilon.linear(8)
    model, made = soap_epsilon.prepared(piece, (32, 2))
    found = soap_epsilon.largest(model, made, loss)
    model.zero_grad()
    loss(model).backward()
    tops: dict[str, list[float]] = {}
    for p, e in made.matched(model):
        if p.ndim == 2 and p.grad is not None:
            values = np.linalg.svd(p.grad.double().numpy(), compute_uv=False)
            tops.setdefault(e.role, []).append(float(values[0]))
    for role, sizes in tops.items():
        assert found[role] == pytest.approx(float(np.exp(np.mean(np.log(sizes)))), rel=1e-5)


def test_epsilon_bounds_the_update_and_without_it_updates_grow(tmp_path: Path) -> None:
    """‖A‖₂ ≤ ‖M‖_F / (ε √(1 − β₂^t)): with ε = c σ at most √(stable rank)/c; the constant ε is
    far below, and lets the norm grow with the width by half a power or more."""
    p = soap_epsilon.Parameters(**SMALL)
    data = run(find("soap-epsilon"), p, cache=tmp_path).data
    rows = {(e["share"], e["axis"], e["what"]): e["steps"] for e in data["exponents"]}
    constant, relative = (rows[c, "n", "updates"][-1][0] for c in (0.0, 1e-2))
    assert constant > 0.5 > relative + 0.2
    # the library's first step moves no matrix
    assert all(r["updates"][0] == 0 for r in data["runs"]) and rows[0.0, "n", "updates"][0] is None
    # eight samples: gradients have rank 8 at most, and may grow over the five steps
    for r in data["runs"]:
        if r["share"]:
            assert max(r["updates"]) < 4 * 8**0.5 / r["share"]
    assert len(data["runs"]) == 2 * 2 * 5


def test_the_rule_changes_epsilon_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """At four times width and twice depth: r_n^(−1/2) = ½ outside the stack, 1/r_L = ½ in it."""
    seen: dict[str, float] = {}
    step = torch.optim.Optimizer.zero_grad

    def watch(self: Any, *args: Any, **more: Any) -> None:
        for group in self.param_groups:
            seen[group["role"]] = group["eps"]
        step(self, *args, **more)

    p = soap_epsilon.Parameters(**{**SMALL, "steps": 1})
    piece = {**soap_epsilon.pieces(p)[0], "share": 1e-2, "n": 64, "L": 4}
    base = {**piece, "n": 16, "L": 2}
    monkeypatch.setattr("grsd.mup.combined.Combined.zero_grad", watch)
    large, small = [], []
    for one, kept in ((piece, large), (base, small)):
        soap_epsilon.measure(one)
        kept.append(dict(seen))
    for role in ("input", "hidden", "output"):
        assert large[0][role] == pytest.approx(0.5 * small[0][role], rel=1e-6)
