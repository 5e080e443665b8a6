"""RMS norms: of a vector ‖v‖/√dim, of a matrix the operator norm between spaces that carry it.

The norm in which the spectral condition of 2603.00541 is written: a typical entry of a vector of RMS norm 1 has size 1, whatever
its width, and ‖W v‖_R ≤ ‖W‖_R ‖v‖_R. What sizes the rules ask for is in :mod:`grsd.mup.rules`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["random_norm", "rms_norm", "rms_operator_norm", "spectral_norm"]

DENSE = 1 << 21  # entries up to which a singular value decomposition is taken


def rms_norm(v: Tensor) -> Tensor:
    """Return ‖v‖₂/√dim over the last axis: (..., n) → (...).

    Raises
    ------
    ValueError
        For a scalar or an empty last axis.
    """
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"the RMS norm needs a vector with at least one entry, got shape {tuple(v.shape)}"
        )
    norm: Tensor = torch.linalg.vector_norm(v, dim=-1) / math.sqrt(v.shape[-1])
    return norm


def spectral_norm(
    W: Tensor, *, tolerance: float = 1e-4, seed: int = 0, dense: int = DENSE
) -> float:
    """Return the largest singular value of a matrix.

    Parameters
    ----------
    W : Tensor, (n_out, n_in)
    tolerance : float
        Relative error of the power iteration (used for more than `dense` entries only); a singular value
        decomposition has none.
    seed : int
        Of the start vector.

    Returns
    -------
    float
        For large matrices the Rayleigh quotient of Lanczos on W Wᵀ in float64 coefficients, once two consecutive sizes of the
        Krylov space agree to `tolerance`/10. It approaches the norm from below.

    Raises
    ------
    ValueError
        Not a matrix, or an entry that is not finite.

    Notes
    -----
    Cost: n_in n_out min(n_in, n_out) operations, or two products with W a step; some tens of steps.
    """
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(
            f"an operator norm needs a matrix with entries, got shape {tuple(W.shape)}"
        )
    if not bool(torch.isfinite(W).all()):
        raise ValueError(f"a matrix of shape {tuple(W.shape)} holds entries that are not finite")
    W = W.detach()
    W = W.float() if W.dtype in (torch.float16, torch.bfloat16) else W
    if W.numel() <= dense:
        return float(torch.linalg.matrix_norm(W, ord=2))
    return _by_lanczos(W if W.shape[0] <= W.shape[1] else W.mT, tolerance, seed)


def rms_operator_norm(
    W: Tensor, *, tolerance: float = 1e-4, seed: int = 0, dense: int = DENSE
) -> float:
    """Return ‖W‖_R = √(n_in/n_out) ‖W‖₂ = max ‖W v‖_R / ‖v‖_R for W of shape (n_out, n_in). Arguments: `spectral_norm`.

    Source: 2603.00541, section 2.2.
    """
    found = spectral_norm(W, tolerance=tolerance, seed=seed, dense=dense)
    return math.sqrt(W.shape[1] / W.shape[0]) * found


def random_norm(n_out: int, n_in: int, std: float) -> float:
    """Return the large-size limit of ‖W‖_R for independent entries of standard deviation `std`: √(n_in/n_out) std (√n_in + √n_out).

    Source: Bai and Yin (1993); 2603.00541, section 2.
    """
    if n_out < 1 or n_in < 1 or not std >= 0.0:
        raise ValueError(f"need positive sizes and std ≥ 0, got {n_out}, {n_in}, {std}")
    return math.sqrt(n_in / n_out) * std * (math.sqrt(n_in) + math.sqrt(n_out))


def _by_lanczos(W: Tensor, tolerance: float, seed: int) -> float:
    """Return ‖W‖₂ for n_out ≤ n_in by Golub–Kahan bidiagonalisation with full reorthogonalisation on the short side."""
    rows = W.shape[0]
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, generator=generator, dtype=torch.float64).to(W)
    basis = [u / torch.linalg.vector_norm(u)]
    v, alphas, betas = W.new_zeros(W.shape[1]), [], [0.0]
    last = 0.0
    for _ in range(rows):
        v = W.mT @ basis[-1] - betas[-1] * v
        alphas.append(float(torch.linalg.vector_norm(v)))
        bidiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        bidiagonal += torch.diag(torch.tensor(betas[1:], dtype=torch.float64), 1)
        top = float(torch.linalg.matrix_norm(bidiagonal, ord=2))
        if alphas[-1] == 0.0 or abs(top - last) <= 0.1 * tolerance * top:
            return top
        last = top
        v = v / alphas[-1]
        u = W @ v - alphas[-1] * basis[-1]
        seen = torch.stack(basis)
        u = u - (seen @ u) @ seen
        u = u - (seen @ u) @ seen
        betas.append(float(torch.linalg.vector_norm(u)))
        if betas[-1] <= 1e-12 * top:
            return top
        basis.append(u / betas[-1])
    return last
