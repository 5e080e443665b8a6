"""Alignment of weights, updates and features: closed forms of random matrices, autograd on one sample at a time, planted cancellation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grsd.lab.nets.architectures import res_mlp
from grsd.mup.alignment import (
    Observed,
    contributions,
    observe,
    stable_activation,
    step,
    submultiplicative,
)


def case() -> tuple[nn.Module, Tensor, Tensor]:
    model = res_mlp(inputs=5, width=8, depth=2, activation="relu", seed=1)
    G = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=G, dtype=torch.float64)
    return model, x, torch.randn(6, generator=G, dtype=torch.float64)


def names(model: nn.Module) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [linear[0], linear[1], linear[-2]]


def test_observed_gradients_are_those_of_autograd() -> None:
    """Of the batch, and of one sample alone; a hook that scales the layer's output belongs to δ."""
    model, x, y = case()
    chosen = names(model)
    for handle in (
        None,
        model.get_submodule(chosen[-1]).register_forward_hook(lambda m, a, out: 0.3 * out),
    ):

        def losses(m: nn.Module) -> Tensor:
            return (m(x).reshape(-1) - y) ** 2

        found = observe(model, losses, chosen)
        model.zero_grad()
        losses(model).mean().backward()
        for name in chosen:
            wanted = model.get_submodule(name).weight.grad
            assert torch.allclose(
                found[name].gradient(), wanted, rtol=1e-12, atol=1e-13
            )  # sums of six products
        model.zero_grad()
        losses(model)[2].backward()
        for name in chosen:
            assert torch.allclose(
                found[name].one(2), model.get_submodule(name).weight.grad, rtol=1e-12, atol=1e-13
            )
        if handle is not None:
            handle.remove()


def test_batch_of_one_is_aligned_and_equal_samples_add_up() -> None:
    G = torch.Generator().manual_seed(3)
    W = torch.randn(4, 6, generator=G, dtype=torch.float64)
    a, d = (
        torch.randn(1, 6, generator=G, dtype=torch.float64),
        torch.randn(1, 4, generator=G, dtype=torch.float64),
    )
    alone = Observed(W, a, d)
    assert alone.alignment() == pytest.approx(1, abs=1e-12)
    assert alone.batch_norm_ratio() == pytest.approx(
        1, abs=1e-12
    ) and alone.own_share() == pytest.approx(1)
    same = Observed(W, a.repeat(5, 1), d.repeat(5, 1))
    assert same.batch_norm_ratio() == pytest.approx(
        1, abs=1e-12
    ) and same.own_share() == pytest.approx(5)
    # the violation: two samples that ask for opposite updates
    opposed = Observed(W, a.repeat(2, 1), torch.cat((d, -d)))
    assert opposed.batch_norm_ratio() < 1e-12


def test_unrelated_samples_cancel_like_a_random_walk() -> None:
    """Independent δ and orthogonal inputs: the mean of B rank-one matrices has norm 1/B of one; equal inputs leave B^(−1/2)."""
    G = torch.Generator().manual_seed(4)
    B, n = 16, 400
    W = torch.zeros(n, n, dtype=torch.float64)
    D = torch.randn(B, n, generator=G, dtype=torch.float64)
    apart = Observed(W, torch.eye(n, dtype=torch.float64)[:B], D)
    # ‖D‖₂/(B·mean‖d‖) = (√n + √B)/(B√n) up to fluctuations of order n^(−1/6)
    assert apart.batch_norm_ratio() == pytest.approx((1 + math.sqrt(B / n)) / B, rel=0.1)
    together = Observed(W, torch.ones(B, n, dtype=torch.float64), D)
    assert together.batch_norm_ratio() == pytest.approx(B**-0.5, rel=0.1)


def test_tightness_of_random_and_of_planted_weights() -> None:
    """A Gaussian matrix keeps 1/(1 + √(n_in/n_out)) of its bound; rank one keeps a cosine of order n^(−1/2)."""
    G = torch.Generator().manual_seed(5)
    for n_in, n_out in ((300, 300), (200, 800)):
        W = torch.randn(n_out, n_in, generator=G, dtype=torch.float64)
        h = torch.randn(20, n_in, generator=G, dtype=torch.float64)
        # the mean over 20 vectors scatters by √(1/(2·20·n)), the spectral norm by n^(−2/3): under 5 %
        assert submultiplicative(h, W) == pytest.approx(1 / (1 + math.sqrt(n_in / n_out)), rel=0.05)
    square = torch.randn(300, 300, generator=G, dtype=torch.float64)
    h = torch.randn(20, 300, generator=G, dtype=torch.float64)
    thin = torch.outer(square[0], square[1])
    assert submultiplicative(h, thin) < 0.15 < submultiplicative(h, square)
    assert submultiplicative(torch.linalg.svd(square).Vh[:1], square) == pytest.approx(1, abs=1e-3)


def test_steps_and_their_floor() -> None:
    W = torch.eye(3, dtype=torch.float64)
    against = step(W, 0.4 * W)
    assert (against.ratio, against.floor, against.cosine) == pytest.approx(
        (0.4 / 1.6, 0.4 / 1.6, -1.0)
    )
    along = step(W, 1.5 * W)
    assert (along.ratio, along.size) == pytest.approx((1.0, 0.5))
    tiny = step(
        W, W - 1e-5 * W
    )  # as opposed as can be, and yet near 1: the ratio cannot fail at this size
    assert tiny.cosine == pytest.approx(-1) and tiny.ratio > 0.9999 and tiny.floor > 0.9999
    vector = step(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert vector.ratio == pytest.approx(3 / 9)


def test_contributions_add_up_for_small_changes_and_cancel_when_planted() -> None:
    model, x, _ = case()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    G = torch.Generator().manual_seed(6)
    changes = [
        {name: 1e-6 * torch.randn(p.shape, generator=G, dtype=p.dtype)}
        for name, p in before.items()
    ]

    def features(m: nn.Module) -> Tensor:
        return m(x)

    terms = contributions(model, changes, features)
    everything = contributions(
        model, [{k: v for group in changes for k, v in group.items()}], features
    )[0]
    # second-order terms are 1e-6 of the first
    assert torch.linalg.norm(terms.sum(0) - everything) < 1e-4 * torch.linalg.norm(everything)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    head = list(before)[-1]
    opposed = contributions(
        model,
        [{head: torch.ones_like(before[head])}, {head: -torch.ones_like(before[head])}],
        features,
    )
    assert torch.linalg.norm(opposed.sum(0)) < 1e-12 * torch.linalg.norm(opposed[0])


def test_relu_keeps_a_root_of_one_half() -> None:
    z = torch.randn(50, 2000, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # E φ² = ½ E z²; the mean over 1e5 numbers scatters by 0.3 %
    assert stable_activation(z, functional.relu(z)) == pytest.approx(math.sqrt(0.5), rel=0.01)
    assert stable_activation(z, z) == pytest.approx(1)


def test_what_cannot_be_observed() -> None:
    model, x, y = case()
    losses = lambda m: (m(x).reshape(-1) - y) ** 2  # noqa: E731
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        observe(model, losses, ["blocks"])
    with pytest.raises(
        ValueError, match=r"losses has shape \(1, 1\); they must give one number a sample"
    ):
        observe(model, lambda m: losses(m).mean()[None, None], ["read"])
    with pytest.raises(ValueError, match="expected one call"):
        observe(model, lambda m: losses(m) + losses(m), ["read"])
    with pytest.raises(ValueError, match="both must be positive"):
        step(torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="one shape"):
        step(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="no parameter"):
        contributions(model, [{"missing": y}], lambda m: m(x))
    with pytest.raises(ValueError, match="no sample has a gradient"):
        Observed(torch.eye(2), torch.zeros(3, 2), torch.ones(3, 2)).own_share()
