"""Lanczos at any scale of matrix and start, and the matrices that it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from grsd.spectrum import NTK, NTKBatches, lanczos, lanczos_batches
from tests.cases import gpt_neox

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def symmetric(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return (draw + draw.T).to(dtype)


class Stacked:
    """Several matrices (G, T, T) as a batch of operators."""

    inner_weight = 1.0

    def __init__(self, matrices: Tensor) -> None:
        self.matrices, self.shape = matrices, matrices.shape
        self.dtype, self.device = matrices.dtype, matrices.device
        self.eps = torch.finfo(self.dtype).eps

    def __matmul__(self, u: Tensor) -> Tensor:
        return (self.matrices @ u[..., None])[..., 0]


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_powers_of_two_scale_everything_exactly(dtype: torch.dtype, reorthogonalize: bool) -> None:
    M, start = symmetric(20, 0, dtype), symmetric(20, 1, dtype)[0]
    tri = lanczos(M, start, 12, reorthogonalize=reorthogonalize)
    mu, edges = tri.measure(), np.array([-3.0, -0.5, 0.0, 0.7, 4.0])
    reach = {torch.float64: 480, torch.float16: 4}.get(dtype, 80)  # entries stay normal numbers
    for p, q in ((-reach, 0), (reach, 0), (0, -reach), (0, reach), (reach, -reach)):
        scaled = (M.double() * 2.0**p).to(dtype)
        begin = (start.double() * 2.0**q).to(dtype)
        other = lanczos(scaled, begin, 12, reorthogonalize=reorthogonalize)
        assert (other.alphas == np.ldexp(tri.alphas, p)).all()
        assert (other.betas == np.ldexp(tri.betas, p)).all()
        assert other.residual == tri.residual * 2.0**p and other.mass == tri.mass * 4.0**q
        nu = other.measure()
        assert (nu.nodes == np.ldexp(mu.nodes, p)).all()
        assert (nu.weights == mu.weights * 4.0**q).all() and nu.floor == mu.floor * 2.0**p
        for bound, at_one in zip(nu.cdf_bounds(edges * 2.0**p), mu.cdf_bounds(edges), strict=True):
            assert (bound == at_one * 4.0**q).all()


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, (1e-30, 1e-23, 1.0, 1e25, 1e36)), (torch.float64, (1e-150, 1.0, 1e150))],
)
def test_nodes_are_those_of_eigsh_at_any_scale(
    dtype: torch.dtype, scales: tuple[float, ...]
) -> None:
    plain = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64)) + 0.1 * symmetric(10, 2)
    for scale in scales:
        for length in (1e-30, 1.0, 1e30):
            M, start = (scale * plain).to(dtype), torch.full((10,), length, dtype=dtype)
            tri = lanczos(M, start, 10)
            mu = tri.measure()
            top = eigsh(M.double().numpy(), k=3, return_eigenvectors=False)
            room = 20 * torch.finfo(dtype).eps  # of |M|, a few roundings of the products
            assert tri.steps == 10 and not tri.exhausted
            assert np.abs(np.sort(top) - mu.nodes[-3:]).max() < room * top.max()
            _, vectors = np.linalg.eigh((M.double() / scale).numpy())
            energies = (vectors.T @ np.ones(10)) ** 2 * float(start[0]) ** 2
            # eigenvectors: rounding over the smallest gap, which is 0.4
            assert np.abs(mu.weights - energies).max() < 100 * room * energies.sum()
            assert mu.mass == pytest.approx(energies.sum(), rel=1e-6)


def test_a_batch_of_unequal_scales_is_its_members() -> None:
    powers, lengths = (-80, 0, 90), (1e-30, 1.0, 1e30)
    matrices = torch.stack([symmetric(12, k, torch.float32) * 2.0**p for k, p in enumerate(powers)])
    starts = torch.stack([torch.full((12,), x) for x in lengths])
    together: Any = Stacked(matrices)
    for k, tri in enumerate(lanczos_batches(together, starts, 6)):
        alone = lanczos(matrices[k], starts[k], 6)
        room = (
            100 * 2.0**-23 * np.abs(alone.alphas).max()
        )  # a stacked product sums in its own order
        assert np.abs(tri.alphas - alone.alphas).max() < room and tri.mass == alone.mass
        assert np.abs(tri.betas - alone.betas).max() < room
    model, tokens, observable = gpt_neox()
    M = NTKBatches(model, tokens, observable, batches=tokens.shape[0])
    scales = torch.tensor([2.0**400, 2.0**-400], dtype=M.dtype)[: len(M.outputs), None]
    for one, scaled in zip(
        lanczos_batches(M, M.error, 4), lanczos_batches(M, M.error * scales, 4), strict=True
    ):
        assert (one.alphas == scaled.alphas).all() and one.semidefinite


def test_what_has_no_real_measure_is_refused_at_the_door() -> None:
    one = torch.ones(4, dtype=torch.float64)
    for dtype in (torch.complex128, torch.int64, torch.bool):
        with pytest.raises(ValueError, match=f"M is {dtype}: Lanczos takes real"):
            lanczos(torch.eye(4).to(dtype), one.to(dtype), 2)
        with pytest.raises(ValueError, match=str(dtype)):
            lanczos(torch.eye(4, dtype=torch.float64), one.to(dtype), 2)
    with pytest.raises(ValueError, match=r"square matrix, and M is \(4, 3\)"):
        lanczos(torch.ones(4, 3).double(), one, 2)
    with pytest.raises(ValueError, match="norm 1e-200 is no float64"):
        lanczos(torch.eye(4).double(), torch.tensor([1e-200, 0, 0, 0], dtype=torch.float64), 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_an_asymmetric_matrix_is_refused_and_rounding_is_not(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for seed, size in enumerate((3, 20, 100)):
        M, start = symmetric(size, seed), symmetric(size, 9)[0]
        lanczos(M.to(dtype), start.to(dtype), min(size, 40))  # the null
        draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
        skew = draw - draw.T
        skew *= torch.linalg.matrix_norm(M, 2) / torch.linalg.matrix_norm(skew, 2)
        planted = M + max(100 * size**0.5 * eps, 1e-10) * skew
        with pytest.raises(ValueError, match="M is not symmetric"):
            lanczos(planted.to(dtype), start.to(dtype), min(size, 40))


@pytest.mark.parametrize("method", ["factored", "graph"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_in_low_precision_are_symmetric_enough(dtype: torch.dtype, method: Any) -> None:
    model, tokens, observable = gpt_neox(tie=True)
    M = NTK(model.to(dtype), tokens, observable, method=method)
    for seed in range(4):
        draw = torch.randn(M.shape[0], generator=torch.Generator().manual_seed(seed))
        assert lanczos(M, draw.to(dtype), M.shape[0]).semidefinite
