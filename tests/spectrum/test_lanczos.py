"""Lanczos against dense eigendecompositions, moments of the matrix itself, and its own claims of accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from grsd.spectrum import NTK, SpectralMeasure, Tridiagonal, lanczos
from tests.cases import gpt_neox


def with_spectrum(eigenvalues: np.ndarray, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return a dense symmetric matrix with these eigenvalues, a start vector, and its energies g²."""
    rng = np.random.default_rng(seed)
    size = eigenvalues.size
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    g = rng.normal(size=size)
    M = (Q * eigenvalues) @ Q.T
    return torch.tensor((M + M.T) / 2), torch.tensor(Q @ g), g**2


@pytest.mark.parametrize("size", [2, 17, 60])
def test_full_depth_reproduces_every_eigenvalue(size: int) -> None:
    eigenvalues = np.sort(np.random.default_rng(size).uniform(0.1, 3.0, size))
    M, start, energies = with_spectrum(eigenvalues, seed=1)
    mu = lanczos(M, start, size).measure()
    assert np.abs(mu.nodes - eigenvalues).max() < 1e-13 * size * eigenvalues[-1]
    assert (
        np.abs(mu.weights - energies).max() < 1e-8 * energies.sum()
    )  # eigenvectors: rounding over the smallest gap
    assert mu.tridiagonal is not None and mu.tridiagonal.residual == 0.0


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_first_2m_moments_are_exact(steps: int) -> None:
    eigenvalues = np.random.default_rng(3).uniform(0, 1, 80)
    M, start, _ = with_spectrum(eigenvalues, seed=2)
    moments = lanczos(M, start, steps).measure().moments(2 * steps + 1)
    truth, v = [], start.clone()
    for _ in range(2 * steps + 1):
        truth.append(float(start @ v))
        v = M @ v
    relative = np.abs(moments / np.array(truth) - 1)
    assert relative[: 2 * steps].max() < 1e-10
    assert relative[2 * steps] > 1e-10  # the next is not (it differs by about 16^-m): 2m is sharp


def test_mass_uses_the_operators_inner_product() -> None:
    case = gpt_neox()
    M = NTK(*case)
    mean, raw = lanczos(M, M.error, 5), lanczos(NTK(*case, normalize="sum"), M.error, 5)
    assert mean.mass == pytest.approx(float((M.error**2).mean()), rel=1e-14)
    assert raw.mass == pytest.approx(float((M.error**2).sum()), rel=1e-14)
    assert np.allclose(mean.alphas * M.samples, raw.alphas, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float64, 1), (torch.float64, 3), (torch.float32, 3)]
)
def test_exhausted_space_ends_the_recurrence(dtype: torch.dtype, rank: int) -> None:
    eigenvalues = np.repeat(np.array([0.0, 1.0, 3.0, 7.0])[: rank + 1], 25)
    M = torch.tensor(
        np.diag(eigenvalues)
    )  # its rank is exact, which a product Q Λ Qᵀ would spoil by rounding
    start = torch.tensor(np.random.default_rng(4).normal(size=eigenvalues.size))
    energies = start.numpy() ** 2
    tri = lanczos(M.to(dtype), start.to(dtype), 40)
    assert tri.exhausted and tri.steps == rank + 1 and tri.residual < 1e3 * torch.finfo(dtype).eps
    mu = tri.measure()
    assert np.abs(mu.nodes - np.unique(eigenvalues)).max() < 20 * torch.finfo(dtype).eps * 7
    assert (
        np.abs(mu.weights - energies.reshape(rank + 1, 25).sum(1)).max()
        < 1e3 * torch.finfo(dtype).eps * mu.mass
    )
    # the control: the rule as printed (stop at beta == 0) runs on and returns nodes that no eigenvalue explains
    printed = lanczos(M.to(dtype), start.to(dtype), 40, reorthogonalize=False)
    assert printed.steps == 40 and not printed.exhausted


def test_reorthogonalisation_removes_ghosts() -> None:
    """Well separated top eigenvalues converge early and come back as copies unless the basis is kept orthogonal."""
    eigenvalues = np.concatenate([np.linspace(0, 1, 190), 10.0 * 1.5 ** np.arange(10)])
    M, start, energies = with_spectrum(eigenvalues, seed=5)
    full, bare = (lanczos(M, start, 60, reorthogonalize=r).measure() for r in (True, False))
    top = eigenvalues[-1]

    def copies(mu: SpectralMeasure) -> int:
        return int((np.abs(mu.nodes - top) < 1e-6 * top).sum())

    assert copies(full) == 1 and copies(bare) >= 2
    assert full.weights[-1] == pytest.approx(energies[-1], rel=1e-9)


def test_float32_products_reproduce_float64_energies() -> None:
    eigenvalues = 10.0 ** np.random.default_rng(6).uniform(-3, 1, 200)
    M, start, _ = with_spectrum(eigenvalues, seed=6)
    double, single = lanczos(M, start, 80), lanczos(M.float(), start.float(), 80)
    edges = np.geomspace(0.01, 10, 10)
    exact, rough = (
        np.histogram(t.measure().nodes, edges, weights=t.measure().weights)[0]
        for t in (double, single)
    )
    # a node may cross an edge by rounding, but no energy may appear or vanish beyond float32 times the condition 1e4
    assert np.abs(exact - rough).max() < 2e-3 * double.mass


def test_json_round_trip_is_bit_exact() -> None:
    M, start, _ = with_spectrum(np.linspace(0.1, 1, 30), seed=7)
    tri = lanczos(M, start, 12)
    back = Tridiagonal.from_json(tri.to_json())
    assert (back.alphas == tri.alphas).all() and (back.betas == tri.betas).all()
    assert (back.mass, back.residual, back.exhausted) == (tri.mass, tri.residual, tri.exhausted)


def test_wrong_use_is_refused() -> None:
    M, start, _ = with_spectrum(np.linspace(0.1, 1, 6), seed=8)
    for steps in (0, 7):
        with pytest.raises(ValueError, match=f"steps is {steps}; steps lie between 1 and T = 6"):
            lanczos(M, start, steps)
    with pytest.raises(ValueError, match=r"norm 0\.0"):
        lanczos(M, torch.zeros_like(start), 2)
    with pytest.raises(ValueError, match="norm nan"):
        lanczos(M, start * float("nan"), 2)
    with pytest.raises(ValueError, match="float32"):
        lanczos(M, start.float(), 2)
    with pytest.raises(ValueError, match="not finite at Lanczos step 1"):
        lanczos(M * float("inf"), start, 3)
