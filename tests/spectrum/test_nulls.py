"""Null models against their closed forms, and against the thing that each is meant to destroy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grsd.spectrum import LogShells, SpectralMeasure, lanczos, nulls

from .test_lanczos import with_spectrum


def test_random_start_keeps_the_norm_and_forgets_the_direction() -> None:
    like = torch.linspace(1, 2, 4000)
    draws = [
        nulls.random_start(like, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.linalg.vector_norm(draws[0]) == pytest.approx(
        torch.linalg.vector_norm(like).item(), rel=1e-5
    )
    cosine = float(draws[0] @ like) / float(like @ like)
    assert abs(cosine) < 5 / 4000**0.5 and draws[0].dtype == like.dtype


def test_shuffled_targets_keep_frequencies_and_the_uncounted() -> None:
    targets = torch.arange(60).reshape(3, 20) % 7
    targets[1, 4:9] = -100
    out = nulls.shuffled(targets, generator=torch.Generator().manual_seed(0))
    assert out.shape == targets.shape and torch.equal(out == -100, targets == -100)
    assert torch.equal(out.flatten().sort().values, targets.flatten().sort().values)
    assert not torch.equal(out, targets)


def test_density_of_states_counts_eigenvalues() -> None:
    eigenvalues = 10.0 ** np.random.default_rng(0).uniform(-2, 1, 300)
    M, _, _ = with_spectrum(eigenvalues, seed=1)
    measures = nulls.density_of_states(
        M, probes=12, steps=150, generator=torch.Generator().manual_seed(2)
    )
    shells = LogShells.spanning(0.01, 10, ratio=4.0)
    found = nulls.counts(measures, shells)
    truth = np.histogram(eigenvalues, shells.edges)[0]
    assert found.shape == (12, len(shells)) and np.allclose(found.sum(axis=1), 300, rtol=1e-10)
    # the variance of a probe is 2 n(1 - n/T); twelve probes, four standard errors, and one count of quadrature
    assert (
        np.abs(found.mean(axis=0) - truth) < 4 * np.sqrt(2 * truth / 12) + 1 + 0.03 * truth
    ).all()
    with pytest.raises(ValueError, match="probes is 0; it must be at least 1"):
        nulls.density_of_states(M, probes=0, steps=3, generator=torch.Generator())


def test_frozen_kernel_is_the_exponential_of_the_matrix() -> None:
    eigenvalues = 10.0 ** np.random.default_rng(3).uniform(-2, 1, 60)
    M, start, _ = with_spectrum(eigenvalues, seed=4)
    shells = LogShells.spanning(0.01, 10)
    after = torch.linalg.matrix_exp(-0.7 * M) @ start
    truth = lanczos(M, after, 60).measure().shells(shells)
    full = nulls.frozen_kernel(lanczos(M, start, 60).measure(), 0.7, shells)
    assert np.allclose(full.energies, truth.energies, atol=1e-9 * truth.total)
    rough = nulls.frozen_kernel(lanczos(M, start, 10).measure(), 0.7, shells)
    assert (truth.energies >= rough.lower - 1e-9).all() and (
        truth.energies <= rough.upper + 1e-9
    ).all()
    still = nulls.frozen_kernel(lanczos(M, start, 60).measure(), 0.0, shells)
    assert not np.allclose(
        still.energies, truth.energies, rtol=0.1
    )  # the control: no time, no decay
    with pytest.raises(ValueError, match=r"time is -1\.0"):
        nulls.frozen_kernel(lanczos(M, start, 3).measure(), -1.0, shells)


def test_fit_finds_the_time() -> None:
    mu = SpectralMeasure.exact([0.0, 0.1, 1.0, 5.0], [0.5, 1.0, 2.0, 3.0])
    for time in (1e-3, 0.4, 30.0):
        energy = 0.5 * float(np.sum(mu.weights * np.exp(-2 * mu.nodes * time)))
        assert nulls.fit_frozen_kernel(mu, energy) == pytest.approx(time, rel=1e-8)
    assert nulls.fit_frozen_kernel(mu, 0.5 * mu.mass) == 0.0
    for impossible in (0.25, 4.5):  # the kernel's half energy is never lost; energy never rises
        with pytest.raises(ValueError, match=f"asked for {impossible}"):
            nulls.fit_frozen_kernel(mu, impossible)
    # an eigenvalue that is positive by rounding alone is of the kernel, too
    noisy = SpectralMeasure.exact([1e-17, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"above 0\.5"):
        nulls.fit_frozen_kernel(noisy, 0.5)


def test_random_signs_keep_every_size() -> None:
    like = torch.linspace(-1, 2, 1001, dtype=torch.float64)
    out = nulls.random_signs(like, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out.abs(), like.abs()) and out.dtype == like.dtype
    assert abs(float((out * like > 0).double().mean()) - 0.5) < 4 * 0.5 / 1001**0.5
