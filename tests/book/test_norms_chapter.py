"""The expansion that the chapter on norms defines: a term for every subset, orders that are derivatives, steps of the norms asked for."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from grsd.mup.norms import rms_norm, rms_operator_norm

from .chapter_code import definitions

NAMES = ("Stack", "Term", "Expansion", "expand", "random_stack", "gradient_step", "descend")
page = definitions("mup/norms.md", *NAMES)


def target(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bias", [None, 0.0, 1.0])
def test_every_subset_has_a_term_and_their_sum_is_the_change(k: int, bias: float | None) -> None:
    stack = page.random_stack(12, 4, k, 0.3, seed=1, bias=bias)
    e = page.expand(
        stack, page.descend(stack, target(12), weights=0.5, biases=0.5, start=0.1, steps=2)
    )
    subsets = {S for j in range(k + 1) for S in combinations(range(1, k + 1), j)}
    assert {t.changed for t in e.terms if not t.source} == subsets
    assert bias is None or {(t.source, t.changed) for t in e.terms if t.source} == {
        (i, S) for i in range(1, k + 1) for S in subsets if S and S[0] >= i
    }
    assert all(t.size <= t.triangle * (1 + 1e-12) <= t.bound * (1 + 2e-12) for t in e.terms)
    assert e.defect < 1e-13 and e.size(1) > 1e-3  # without first order it is no expansion


def test_first_order_terms_are_the_derivative_and_leave_a_square() -> None:
    stack, t = page.random_stack(10, 3, 2, 0.4, seed=2), 1e-4
    step = page.gradient_step(stack, target(10), weights=1.0)

    def last(W: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = page.Stack(stack.start, W, None, stack.alpha).features()[-1]
        return out

    _, derivative = torch.func.jvp(last, (stack.W,), (step.W,))
    small = page.expand(stack, page.Stack(0 * step.start, t * step.W, None, stack.alpha))
    first = sum(term.values.sum(0) for term in small.terms if term.order < 2)
    assert rms_norm(first / t - derivative) < 10 * t * rms_norm(derivative)
    assert abs(small.size(2) / (t**2 * page.expand(stack, step).size(2)) - 1) < 0.05


def test_a_step_has_the_norms_that_were_asked_for_and_descends() -> None:
    stack = page.random_stack(16, 3, 2, 0.2, seed=3, bias=1.0)
    asked = {"weights": 0.7, "biases": 0.3, "start": 0.1}
    step = page.gradient_step(stack, target(16), **asked)
    assert all(abs(rms_operator_norm(W) / 0.7 - 1) < 1e-10 for W in step.W.flatten(0, 1))
    assert (torch.linalg.matrix_rank(step.W, rtol=1e-9) == 1).all()
    assert (rms_norm(step.b) / 0.3 - 1).abs().max() < 1e-10
    assert abs(rms_norm(step.start) / 0.1 - 1) < 1e-10
    assert target(16) @ stack.plus(step).features()[-1] > target(16) @ stack.features()[-1]
    second = page.gradient_step(stack.plus(step), target(16), **asked)
    twice = page.descend(stack, target(16), steps=2, **asked)
    torch.testing.assert_close(twice.W, step.W + second.W)
