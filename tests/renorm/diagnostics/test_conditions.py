"""D1, D2, D3, D5, D6: each against a dense oracle or a closed form, with a null that it must pass and violations that it must catch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import gpt2, mlp
from grsd.lab.nets.planted import GroupedNets, NeighbourChain, SumOfNets, smooth_task
from grsd.renorm.diagnostics.bandedness import bandedness
from grsd.renorm.diagnostics.block_matrices import block_matrices
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.coherence import block_coherence, size
from grsd.renorm.diagnostics.collapse import collapse, roughness
from grsd.renorm.theorems.jacobian import coefficients
from grsd.spectrum import TokenLogProb

X, Y = smooth_task(20, 5, seed=1)


def _blocks(net: nn.Module, samples: int = 20) -> Blocks:
    return Blocks.of(Problem(net, X[:samples], Y[:samples]))


# ---- D1


def test_tails_of_nets_that_are_known() -> None:
    sums = bandedness(_blocks(SumOfNets(5, 6, 4, seed=1)))
    assert not sums.tails.any() and np.array_equal(sums.parts, np.eye(4))  # no block moves another
    chain = bandedness(_blocks(NeighbourChain(5, 6, 5, seed=1)))
    assert np.all(chain.tails[:, 0] > 0.1) and not chain.tails[:, 1:].any()
    linear = bandedness(_blocks(mlp([5, 6, 6, 6, 1], "identity", seed=1)))
    # linear in every block by itself, so G_ll = 0 and all the motion comes from others; the ends move each other
    np.testing.assert_allclose(linear.tails[:, 0], 1.0, rtol=1e-12)
    assert (
        not np.diag(linear.parts).any() and linear.tails[0, 2] > 0.05 and linear.tails[-1, 2] > 0.05
    )


def test_exact_tails_are_those_of_the_dense_pieces() -> None:
    blocks = _blocks(mlp([5, 6, 7, 6, 1], seed=2))
    found, pieces, rate = bandedness(blocks), blocks.rate_pieces(), blocks.rate()
    count = len(blocks)
    for i in range(count):
        for K in range(count):
            far = [pieces[m][i] for m in range(count) if abs(m - i) > K]
            tail = sum(far, torch.zeros_like(rate[i]))
            assert found.tails[i, K] == pytest.approx(
                float(tail.norm() / rate[i].norm()), rel=1e-12
            )
        assert found.norms[i] == pytest.approx(float(rate[i].norm()) / math.sqrt(20), rel=1e-12)
    assert found.probes == 0 and not found.tails_error.any()
    top = found.norms**2 @ found.tails**2
    np.testing.assert_allclose(found.pooled, np.sqrt(top / (found.norms**2).sum()), rtol=1e-12)


def test_line_of_no_locality() -> None:
    def line(net: nn.Module) -> tuple[np.ndarray, np.ndarray]:
        found = bandedness(_blocks(net))
        return found.pooled, found.unlocal

    pooled, unlocal = line(SumOfNets(5, 6, 4, seed=1))
    assert not pooled.any() and not unlocal.any()  # nothing is owed to others at any distance
    pooled, unlocal = line(NeighbourChain(5, 6, 5, seed=1))
    assert pooled[1] == 0 < 0.3 < unlocal[1]
    # f = g(Σ_l c_l θ_l · x): every block is moved in the same mixture, up to the factor c_l; nothing depends on distance
    pooled, unlocal = line(Mixed(torch.tensor([1.0, 0.2, 0.5, 0.1], dtype=torch.float64)))
    np.testing.assert_allclose(pooled, unlocal, rtol=1e-9)
    assert (
        pooled[0] < 0.8 and pooled[2] < 0.2
    )  # and yet the tail is small, because the fast blocks are near each other


@pytest.mark.parametrize("count", [2, 5, 10])
def test_line_of_no_locality_has_no_bias_where_no_block_moves_itself(count: int) -> None:
    """f = Σ_{l<m} (θ_l·x)(θ_m·x), all θ alike: G_ll = 0, and all others weigh the same."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(mlp([5, 1], seed=0, bias=False) for _ in range(count))

        def forward(self, x: Tensor) -> Tensor:
            each = torch.stack([block(x) for block in self.blocks])
            return (each.sum(0) ** 2 - (each**2).sum(0)) / 2  # type: ignore[no-any-return]

    found = bandedness(_blocks(Pairs()))
    assert not np.diag(found.parts).any() and found.pooled[0] == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(found.unlocal, found.pooled, rtol=1e-9, atol=1e-12)


class Mixed(nn.Module):
    def __init__(self, scales: Tensor) -> None:
        super().__init__()
        self.scales = scales
        self.blocks = nn.ModuleList(mlp([5, 1], seed=k, bias=False) for k in range(len(scales)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(
            sum(c * block(x) for c, block in zip(self.scales, self.blocks, strict=True))
        )  # type: ignore[arg-type]


def test_probes_estimate_the_tails_with_their_error() -> None:
    blocks = _blocks(mlp([5, 6, 6, 6, 1], seed=3))
    exact = bandedness(blocks).pooled[:3]
    drawn = [bandedness(blocks, probes=12, seed=seed, bands=(0,)) for seed in range(20)]
    scores = np.array([(d.pooled[:3] - exact) / d.pooled_error[:3] for d in drawn])
    # 20 draws of a t-like score, three numbers each: its mean square is 1 up to sampling (0.2 to 0.3) and the skewness of a ratio
    assert 0.5 < float((scores**2).mean()) < 2.0
    assert float(np.abs(np.mean([d.pooled[:3] for d in drawn], axis=0) - exact).max()) < 0.02


def test_scalar_and_right_readings_are_those_of_dense_least_squares() -> None:
    blocks = _blocks(mlp([5, 5, 5, 5, 1], seed=4, bias=False))
    found = bandedness(blocks, matrices=block_matrices(blocks), bands=(0, 1, 3))
    j, rate = [a.numpy() for a in blocks.jacobian()], [a.numpy() for a in blocks.rate()]
    assert found.right is not None
    for k, band in enumerate(found.bands):
        right = coefficients(j, rate, band=band, kind="right")
        np.testing.assert_allclose(
            found.right.residual[:, k], right.residuals, atol=1e-7
        )  # squares in one, not in the other
        assert np.array_equal(found.right.rank[:, k], right.ranks)
        for i, row in enumerate(right.parts):
            whole = np.vstack([row[p] for p in sorted(row)])
            assert found.right.coefficient[i, k] == pytest.approx(
                np.linalg.norm(whole, 2), rel=1e-6
            )
        scalar = coefficients(j[:3], rate[:3], band=band, kind="scalar")  # the blocks of one shape
        np.testing.assert_allclose(found.scalar[:3, k], scalar.residuals, atol=1e-7)
    assert found.alike.tolist() == [[1, 2, 3], [1, 3, 3], [1, 2, 3], [1, 1, 1]]


class Product(nn.Module):
    """f = θ_1 θ_2 x: J^(1) = θ_2 x and J̇^(1) = θ̇_2 x, a multiple of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.tensor([c], dtype=torch.float64)) for c in (0.7, 1.3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.first * self.second * x[:, 0]


def test_scalar_reading_accepts_what_satisfies_it() -> None:
    problem = Problem(Product(), X, Y)
    blocks = Blocks.of(problem, split=["first", "second"])
    found = bandedness(blocks, matrices=block_matrices(blocks))
    assert found.right is not None
    np.testing.assert_allclose(found.scalar[:, 0], 0.0, atol=1e-7)
    np.testing.assert_allclose(found.right.residual[:, 0], 0.0, atol=1e-7)
    # rank 1 of 20, and M has no other function: neighbours span what all span
    assert found.right.full == 1 and found.right.vacuous.all()
    np.testing.assert_allclose(
        found.tails[:, 0], 1.0, rtol=1e-12
    )  # and yet each is moved by the other alone


class Readout(nn.Module):
    """Two blocks: tanh layers of more parameters than rows, and one affine in `last` features."""

    def __init__(self, last: int, outputs: int = 1) -> None:
        super().__init__()
        self.first, self.second = mlp([5, 12, last], seed=1), mlp([last, outputs], seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


def _empty(net: nn.Module, x: Tensor, y: Tensor) -> tuple[int, list[bool], list[int]]:
    blocks = Blocks.of(Problem(net, x, y), split=["first", "second"])
    right = bandedness(blocks, matrices=block_matrices(blocks), bands=(0,)).right
    assert right is not None
    return right.full, right.vacuous[:, 0].tolist(), right.rank[:, 0].tolist()


def test_membership_is_empty_where_the_neighbours_span_what_all_blocks_span() -> None:
    # 10 rows; the readout has 10 parameters, or 9: one rank short is not empty
    assert _empty(Readout(9), X[:10], Y[:10]) == (10, [True, True], [10, 10])
    assert _empty(Readout(8), X[:10], Y[:10]) == (10, [True, False], [10, 9])
    # samples given twice
    again = [0, 0, *range(1, 9), 8, 8]
    assert _empty(Readout(8), X[again], Y[again]) == (9, [True, True], [9, 9])
    assert _empty(Readout(7), X[again], Y[again]) == (9, [True, False], [9, 8])

    class Silent(Readout):
        """Zero outside a half space: 7 of the rows hold no function."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (x[:, :1] > 0)  # type: ignore[no-any-return]

    order = torch.argsort(X[:, 0])
    some = torch.cat([order[:7], order[-9:]])  # rows that stay zero, and nine that do not
    assert int((X[some, 0] > 0).sum()) == 9
    assert _empty(Silent(8), X[some], Y[some]) == (9, [True, True], [9, 9])


def test_bandedness_refuses() -> None:
    with pytest.raises(ValueError, match="J̇ = 0: the model is linear in its parameters"):
        bandedness(Blocks.of(Problem(Linear(), X, Y)))
    with pytest.raises(ValueError, match="probes is 1; two or more"):
        bandedness(_blocks(mlp([5, 6, 1], seed=0)), probes=1)
    with pytest.raises(ValueError, match=r"bands\[0\] is -1; a distance"):
        bandedness(_blocks(mlp([5, 6, 1], seed=0)), bands=(-1,))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp([5, 1], seed=1), mlp([5, 1], seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x**2)  # type: ignore[no-any-return]


def test_first_block_of_a_pair_can_stand_still() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp([5, 1], seed=1), mlp([5, 4, 1], seed=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)  # type: ignore[no-any-return]

    found = bandedness(_blocks(Half()))
    assert (
        math.isnan(found.norms[0])
        and math.isnan(found.tails[0, 0])
        and np.isfinite(found.pooled).all()
    )


# ---- D2 and D3


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp([5, 6, 7, 6, 1], seed=2),
        lambda: NeighbourChain(5, 6, 4, seed=2),
        lambda: SumOfNets(5, 6, 3, seed=2),
    ],
)
def test_coherence_and_size_are_singular_values(make: Callable[[], nn.Module]) -> None:
    blocks = _blocks(make())
    j, rate = [a.numpy() for a in blocks.jacobian()], torch.cat(blocks.rate(), 1).numpy()
    expected = np.array([[np.linalg.svd(a.T @ b, compute_uv=False)[0] for b in j] for a in j]) / 20
    whole = np.linalg.svd(np.hstack(j), compute_uv=False)[0] / math.sqrt(20)
    moved = np.linalg.svd(rate, compute_uv=False)[0] / math.sqrt(20)
    for given in (None, block_matrices(blocks)):
        found = block_coherence(blocks, matrices=given)
        np.testing.assert_allclose(
            found.norms, expected, rtol=1e-8
        )  # Lanczos to a residual of 1e-8, or T × T matrices
        sizes = size(blocks, matrices=given)
        assert sizes.jacobian == pytest.approx(whole, rel=1e-8) and sizes.rate == pytest.approx(
            moved, rel=1e-8
        )
    assert found.total == pytest.approx(
        sum(expected.diagonal(k).max() for k in range(1, len(j))), rel=1e-8
    )
    assert sizes.clock == pytest.approx(moved / whole, rel=1e-8)


def test_coherence_is_zero_between_groups_of_samples() -> None:
    blocks, off = _blocks(GroupedNets(5, 6, 4, seed=1)), ~np.eye(4, dtype=bool)
    found = block_coherence(blocks)
    assert not found.norms[off].any() and np.diag(found.norms).min() > 0
    assert (
        block_coherence(blocks, matrices=block_matrices(blocks)).normalized[off].max() < 1e-12
    )  # eigenvectors to rounding


def test_coherence_of_one_sample_is_one() -> None:
    found = block_coherence(_blocks(mlp([5, 6, 6, 1], seed=1), samples=1))
    np.testing.assert_allclose(found.normalized, 1.0, rtol=1e-12)


def test_independent_wide_nets_are_coherent() -> None:
    wide, narrow = (_blocks(SumOfNets(5, width, 3, seed=0)) for width in (512, 16))
    off = ~np.eye(3, dtype=bool)
    high = block_coherence(wide, matrices=block_matrices(wide)).normalized[off].min()
    assert (
        high
        > 0.98
        > block_coherence(narrow, matrices=block_matrices(narrow)).normalized[off].min()
        > 0.6
    )


def test_iteration_serves_a_language_model() -> None:
    ids = torch.randint(0, 61, (1, 9), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(gpt2(seed=0, layers=2), ids[:, :-1], TokenLogProb(ids[:, 1:]))
    given = block_matrices(blocks)
    np.testing.assert_allclose(
        block_coherence(blocks).norms, block_coherence(blocks, matrices=given).norms, rtol=1e-8
    )
    one, other = size(blocks), size(blocks, matrices=given)
    assert one.jacobian == pytest.approx(other.jacobian, rel=1e-8) and one.rate == pytest.approx(
        other.rate, rel=1e-8
    )
    assert one.passes > 0 and other.passes == 0


# ---- D5 and D6


def _ensemble(
    targets: np.ndarray, starts: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """λ(t) and ṡ of balanced modes λ̇ = λ(2y − λ), ascending at every time."""
    decay = np.exp(-2 * targets * times[:, None])
    lam = starts / (decay + starts * (1 - decay) / (2 * targets))
    order = np.argsort(lam, axis=1)
    return np.take_along_axis(lam, order, 1), np.take_along_axis(2 * targets - lam, order, 1)


Q = 1.25 ** -np.arange(48.0)
TIMES = np.geomspace(0.3, 30, 12)


def test_collapse_of_a_scale_free_ensemble_and_of_others() -> None:
    free = collapse(TIMES, *_ensemble(Q, 0.02 * Q, TIMES))
    assert free.value < 0.01 and abs(free.null - 1) < 0.1
    common = collapse(
        TIMES, *_ensemble(np.ones(48), 0.02 * Q, TIMES)
    )  # one field, with a scale of its own
    assert common.value > 0.2
    drawn = np.random.default_rng(0).permutation(Q)
    other = collapse(TIMES, *_ensemble(drawn, 0.02 * Q, TIMES))  # no field at all
    assert other.value > 0.5 and other.error < 0.2


def test_collapse_of_noise_is_one_and_of_a_common_rate_no_evidence() -> None:
    rng = np.random.default_rng(1)
    lam, _ = _ensemble(Q, 0.02 * Q, TIMES)
    values = [
        collapse(TIMES, lam, rng.standard_normal(lam.shape), deals=2).value for _ in range(16)
    ]
    # variance of F: 2/528 + 2/575; the mean of 16 draws is 1 within 3 √(0.0073/16) = 0.064
    assert abs(float(np.mean(values)) - 1) < 0.065
    alike = collapse(TIMES, lam, np.tile(1 / TIMES[:, None], (1, 48)))  # v = λ/t: t ṡ = 1
    assert alike.value == 0.0 == alike.null


def test_collapse_does_not_depend_on_the_unit_of_time() -> None:
    lam, v = _ensemble(np.ones(48), 0.02 * Q, TIMES)
    one, other = collapse(TIMES, lam, v), collapse(1000 * TIMES, lam, v)
    assert other.value == pytest.approx(one.value, rel=1e-9) and other.null == pytest.approx(
        one.null, rel=1e-9
    )


def test_roughness_of_smooth_noisy_and_wild_speeds() -> None:
    lam = np.geomspace(1e-3, 1, 64)
    mixed = np.random.default_rng(0).permutation(lam)  # the order of the input does not matter
    smooth = roughness(mixed, np.log(mixed) ** 2)
    assert smooth.value < 0.01 and smooth.ranks < 0.05
    assert roughness(lam, np.full(64, 3.0)).value == 0.0
    assert roughness(lam, (-1.0) ** np.arange(64)).value == pytest.approx(2 * 63 / 64)
    wild = np.log(lam)
    wild[20] = 1e6  # one mode outweighs all others in `value`, not in `ranks`
    assert roughness(lam, wild).value > 0.9 > 0.1 > roughness(lam, wild).ranks


def test_roughness_of_noise_has_von_neumanns_law() -> None:
    rng = np.random.default_rng(2)
    drawn = [roughness(np.arange(1.0, 49.0), rng.standard_normal(48)) for _ in range(400)]
    for name in ("value", "ranks"):
        values = np.array([getattr(d, name) for d in drawn])
        assert (
            abs(values.mean() - 1) < 4 * drawn[0].null_error / 20
        )  # four standard errors of 400 draws
        assert abs(values.std() / drawn[0].null_error - 1) < 0.15  # 1/√800 = 0.035, four of them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], np.ones((2, 9)), np.ones((2, 8))), "expected"),
        (([1.0], np.ones((1, 9)), np.ones((1, 9))), "a path of one point has no time along it"),
        (([0.0, 1.0], np.ones((2, 9)), np.ones((2, 9))), r"times\[0\] is 0.0; it has no logarithm"),
        (([1.0, 2.0], np.ones((2, 7)), np.ones((2, 7))), "modes is 7"),
        (([1.0, 2.0], np.zeros((2, 9)), np.ones((2, 9))), "leave ker M out"),
        (([1.0, 2.0], np.ones((2, 9)), np.full((2, 9), np.inf)), "not finite"),
    ],
)
def test_collapse_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse(*arguments)


def test_roughness_and_bins_refuse() -> None:
    with pytest.raises(ValueError, match="modes is 5; spread or order over fewer than 8"):
        roughness(np.arange(1.0, 6.0), np.ones(5))
    with pytest.raises(ValueError, match=r"eigenvalues \(9,\) and speeds \(8,\)"):
        roughness(np.ones(9), np.ones(8))
    with pytest.raises(ValueError, match="10 bins for 18 points"):
        collapse([1.0, 2.0], np.ones((2, 9)), np.ones((2, 9)), bins=10)
