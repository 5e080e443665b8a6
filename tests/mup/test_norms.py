"""RMS norms against singular values, the maximum over vectors, and the law of large random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grsd.mup.norms import random_norm, rms_norm, rms_operator_norm, spectral_norm


def matrix(
    n_out: int, n_in: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_vector_of_ones_has_norm_one_at_every_width() -> None:
    assert all(float(rms_norm(torch.ones(3, n))[1]) == 1.0 for n in (1, 4, 1024))


@pytest.mark.parametrize("shape", [(40, 40), (7, 300), (300, 7), (1, 64), (64, 1)])
def test_the_operator_norm_is_the_largest_gain_of_rms_norms(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    found = rms_operator_norm(W)
    best = torch.from_numpy(np.linalg.svd(W.numpy())[2][0])
    assert float(rms_norm(W @ best) / rms_norm(best)) == pytest.approx(found, rel=1e-12)  # attained
    others = matrix(200, shape[1], seed=1)
    assert float((rms_norm(others @ W.T) / rms_norm(others)).max()) <= found * (
        1 + 1e-12
    )  # and never exceeded


@pytest.mark.parametrize("spectrum", ["random", "clustered", "isolated", "low rank"])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_the_iteration_agrees_with_singular_values(shape: tuple[int, int], spectrum: str) -> None:
    W = matrix(*shape)
    if spectrum != "random":
        u, s, vt = torch.linalg.svd(W, full_matrices=False)
        s = {
            "clustered": 1.0 - 1e-3 * torch.arange(len(s), dtype=W.dtype),
            "isolated": torch.cat([torch.tensor([50.0], dtype=W.dtype), s[1:]]),
            "low rank": s * (torch.arange(len(s)) < 3),
        }[spectrum]
        W = u * s @ vt
    exact = float(torch.linalg.matrix_norm(W, ord=2))
    for seed in range(3):
        assert spectral_norm(W, dense=0, seed=seed) == pytest.approx(exact, rel=1e-4)


def test_a_matrix_of_signs_of_rank_one_is_measured_exactly() -> None:
    # in whole numbers the second residual is exactly zero, where the iteration must not return its first estimate
    u, v = (matrix(size, 1, seed=size).sign() for size in (64, 96))
    for seed in range(5):
        assert spectral_norm(u @ v.T, dense=0, seed=seed) == pytest.approx(
            math.sqrt(64 * 96), rel=1e-12
        )


def test_a_loose_iteration_is_seen_to_be_loose() -> None:
    W = matrix(300, 300)
    exact = float(torch.linalg.matrix_norm(W, ord=2))
    loose = spectral_norm(W, dense=0, tolerance=1.0)
    assert (
        1e-3 < 1 - loose / exact < 0.5
    )  # from below, and off by more than the tolerance of the other tests


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-23, 1e30, 1e170, 1e300])
def test_norms_do_not_know_the_scale(scale: float) -> None:
    """Both ways of the operator norm, and of vectors whose squares are no numbers of their type."""
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for x in (W, W.float()):
        if not 1e-36 < scale < 1e36 and x.dtype == torch.float32:
            continue
        eps = torch.finfo(x.dtype).eps
        for dense in (10, 10**4):
            plain, moved = (spectral_norm(y, dense=dense) for y in (x, x * scale))
            assert abs(moved / scale - plain) < (3e-4 if dense == 10 else 100 * eps) * plain
        ratio = rms_norm(x * scale).double() / scale / rms_norm(x).double()
        assert float((ratio - 1).abs().max()) < 10 * eps
    assert float(rms_norm(torch.zeros(3))) == 0.0 == spectral_norm(torch.zeros(3, 2))
    assert math.isnan(float(rms_norm(torch.tensor([math.nan, 1.0]))))
    assert float(rms_norm(torch.tensor([math.inf, 1.0]))) == math.inf


def test_half_precision_is_measured_in_single() -> None:
    W = matrix(64, 64)
    assert rms_operator_norm(W.bfloat16()) == pytest.approx(rms_operator_norm(W), rel=2**-8)


@pytest.mark.parametrize("shape", [(400, 400), (1600, 100), (100, 1600)])
def test_random_matrices_follow_the_law(shape: tuple[int, int]) -> None:
    # the largest singular value fluctuates and is biased by O(n^-2/3) relative to its limit (Tracy-Widom)
    found = rms_operator_norm(0.3 * matrix(*shape))
    assert found == pytest.approx(random_norm(*shape, 0.3), rel=2 * min(shape) ** (-2 / 3))


def test_a_wrong_norm_is_told_apart() -> None:
    W = matrix(1600, 100)
    assert float(torch.linalg.matrix_norm(W)) / math.sqrt(W.numel()) < 0.9 * rms_operator_norm(
        W
    ) / math.sqrt(100)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a matrix with entries, got shape \(3, 4, 5\)"):
        rms_operator_norm(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"the matrix\[0, 1\] is nan; values that are not finite"):
        rms_operator_norm(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"at least one entry, got shape \(\)"):
        rms_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"std is -1\.0; it must be at least 0"):
        random_norm(3, 3, -1.0)
    assert rms_operator_norm(torch.zeros(3, 4)) == spectral_norm(torch.zeros(3, 4), dense=0) == 0.0
