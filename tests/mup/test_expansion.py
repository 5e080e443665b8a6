"""The expansion against the change that it expands, its terms against closed forms and automatic differentiation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from grsd.mup.expansion import LinearStack, descend, expand, gradient_step, random_stack
from grsd.mup.norms import rms_norm, rms_operator_norm


def target(n: int, seed: int = 9) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("k", "bias"), list(itertools.product((1, 2, 3), (None, 0.0, 1.0))))
def test_the_terms_add_up_to_the_change(k: int, bias: float | None) -> None:
    stack = random_stack(12, 4, k, 0.3, seed=1, bias=bias)
    step = descend(
        stack, target(12), weights=0.5, biases=0.5 if bias is not None else 0.0, start=0.1, steps=2
    )
    found = expand(stack, step)
    assert found.defect < 1e-13
    terms = {(t.source, t.changed) for t in found.terms}
    subsets = [s for order in range(k + 1) for s in itertools.combinations(range(1, k + 1), order)]
    assert {c for source, c in terms if source == 0} == set(subsets)  # equation (17): every subset
    if bias is not None:  # equation (19): of b_i and the layers after it, without the unchanged
        assert {(i, c) for i, c in terms if i} == {
            (i, s) for i in range(1, k + 1) for s in subsets if s and s[0] >= i
        }
    for t in found.terms:
        assert t.size <= t.triangle * (1 + 1e-12) and t.triangle <= t.bound * (1 + 1e-12)
    missing = [t for t in found.terms if t.order != 1]
    lost = found.change - found.start - sum((t.values.sum(0) for t in missing), torch.zeros(12))
    assert float(rms_norm(lost)) > 1e-3  # without the first order it is no expansion


def test_first_order_terms_are_the_derivative_and_second_order_ones_what_is_left() -> None:
    stack = random_stack(10, 3, 2, 0.4, seed=2)
    step = gradient_step(stack, target(10), weights=1.0)
    names = [(b, i) for b in range(3) for i in range(2)]

    def last(*flat: Tensor) -> Tensor:
        blocks = tuple(tuple(flat[2 * b + i] for i in range(2)) for b in range(3))
        return LinearStack(stack.start, blocks, stack.alpha).features()[-1]

    flat = tuple(stack.blocks[b][i] for b, i in names)
    tangent = tuple(step.blocks[b][i] for b, i in names)
    _, derivative = torch.func.jvp(last, flat, tangent)
    t = 1e-4
    small = LinearStack(
        step.start * 0, tuple(tuple(t * W for W in ws) for ws in step.blocks), stack.alpha
    )
    found = expand(stack, small)
    first = sum(term.values.sum(0) for term in found.terms if term.order < 2)
    # what first-order terms leave of tΔ is O(t²)
    assert float(rms_norm(first / t - derivative) / rms_norm(derivative)) < 10 * t
    assert found.size(2) == pytest.approx(t**2 * expand(stack, step).size(2), rel=0.05)


def test_a_step_has_the_norms_and_the_directions_that_were_asked_for() -> None:
    stack = random_stack(16, 3, 2, 0.2, seed=3, bias=1.0)
    step = gradient_step(stack, target(16), weights=0.7, biases=0.3, start=0.1)
    assert all(
        rms_operator_norm(W) == pytest.approx(0.7, rel=1e-10) for ws in step.blocks for W in ws
    )
    assert all(
        float(rms_norm(b)) == pytest.approx(0.3, rel=1e-10) for bs in step.biases for b in bs
    )
    assert float(rms_norm(step.start)) == pytest.approx(0.1, rel=1e-10)
    assert all(int(torch.linalg.matrix_rank(W, rtol=1e-9)) == 1 for ws in step.blocks for W in ws)
    before, after = (float(target(16) @ s.features()[-1]) for s in (stack, stack.plus(step)))
    assert after > before  # the gradient of −⟨target, h⟩ is followed downwards
    twice = descend(stack, target(16), weights=0.7, biases=0.3, start=0.1, steps=2)
    moved = stack.plus(step)
    second = gradient_step(moved, target(16), weights=0.7, biases=0.3, start=0.1)
    torch.testing.assert_close(twice.blocks[1][0], step.blocks[1][0] + second.blocks[1][0])


def test_second_order_terms_of_the_first_step_are_a_cosine_of_independent_vectors() -> None:
    stack = random_stack(40, 5, 2, 0.2, seed=4)
    found = expand(stack, gradient_step(stack, target(40), weights=1e-4))
    term = found.of(2)[0]
    g = target(40) / 40
    h = stack.features()
    for b in reversed(range(5)):
        W1, W2 = stack.blocks[b]
        cosine = float(torch.cosine_similarity(W1 @ h[b], W2.T @ g, dim=0))
        size = 0.2 * 1e-8 * abs(cosine) * float(rms_norm(h[b]))
        assert float(rms_norm(term.values[b])) == pytest.approx(
            size, rel=1e-2
        )  # h + Δh in place of h: O(1e-4 L)
        g = g + 0.2 * W1.T @ (W2.T @ g)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="need positive sizes and a finite α, got 0"):
        random_stack(0, 2, 2, 0.1, seed=0)
    stack = random_stack(4, 2, 2, 0.1, seed=0)
    with pytest.raises(ValueError, match="other layers, blocks or biases"):
        expand(stack, random_stack(4, 3, 2, 0.1, seed=0))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        descend(stack, target(4), weights=1.0, steps=0)
