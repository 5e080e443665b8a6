"""RMS norms: of a vector ‖v‖/√dim, of a matrix the operator norm between spaces that carry it.

The norm in which the spectral condition of 2603.00541 is written: a typical entry of a vector of
RMS norm 1 has size 1, whatever its width, and ‖W v‖_R ≤ ‖W‖_R ‖v‖_R. What sizes the rules ask for
is in :mod:`grsd.mup.rules`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from grsd import checks

DENSE = 1 << 21  # entries up to which a singular value decomposition is taken
KRYLOV = 12  # vectors that the iteration keeps


def scaled(x: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Return x / 2ᵏ and k, (..., 1, 1): by matrix (axes = 2) or vector (1), entries below one.

    k is such that the largest is in [1/2, 1), or 0 where all are zero; no bit of x is lost. Squares
    of what is returned neither overflow nor vanish.
    """
    top = x.abs().amax(tuple(range(-axes, 0)), keepdim=True)
    exponent = torch.frexp(top).exponent
    half = exponent // 2  # 2ᵏ itself may be no number of this type
    return torch.ldexp(torch.ldexp(x, -half), half - exponent), exponent


def rms_norm(v: Tensor) -> Tensor:
    """Return ‖v‖₂/√dim over the last axis: (..., n) → (...), at any scale."""
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"the RMS norm needs a vector with at least one entry, got shape {tuple(v.shape)}"
        )
    unit, exponent = scaled(v, 1)
    return torch.ldexp(
        torch.linalg.vector_norm(unit, dim=-1) / math.sqrt(v.shape[-1]), exponent[..., 0]
    )


def spectral_norm(
    W: Tensor, *, tolerance: float = 1e-4, seed: int = 0, dense: int = DENSE
) -> float:
    """Return the largest singular value of a matrix (n_out, n_in), at any scale.

    With more than `dense` entries it comes from ARPACK's restarted Lanczos on products in the dtype
    of W (half precision in single), started from `seed`, with a relative error of at most
    `tolerance`, from below.

    Notes
    -----
    Cost: n_in n_out min(n_in, n_out) operations, or two products with W a step; some tens of steps.
    """
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(
            f"an operator norm needs a matrix with entries, got shape {tuple(W.shape)}"
        )
    checks.finite("the matrix", W.detach())
    W = W.detach()
    W = W.float() if W.dtype in (torch.float16, torch.bfloat16) else W
    W, exponent = scaled(W, 2)
    # small: all singular values at once
    if W.numel() <= dense or min(W.shape) <= KRYLOV:
        return math.ldexp(float(torch.linalg.matrix_norm(W, ord=2)), int(exponent))
    if not bool(W.any()):
        return 0.0

    # large: restarted Lanczos, whose products run on the device of W
    def product(A: Tensor, v: Any) -> Any:
        return (A @ torch.from_numpy(np.ascontiguousarray(v)).to(A)).double().cpu().numpy()

    operator = LinearOperator(
        W.shape, lambda v: product(W, v), lambda v: product(W.mT, v), dtype=np.float64
    )
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(min(W.shape), generator=generator, dtype=torch.float64).numpy()
    top = svds(operator, 1, KRYLOV, tol=tolerance, v0=start, return_singular_vectors=False)
    return math.ldexp(float(top[0]), int(exponent))


def rms_operator_norm(W: Tensor, *, dense: int = DENSE) -> float:
    """Return ‖W‖_R = √(n_in/n_out) ‖W‖₂ = max ‖W v‖_R / ‖v‖_R (2603.00541, section 2.2)."""
    return spectral_norm(W, dense=dense) * math.sqrt(W.shape[1] / W.shape[0])


def random_norm(n_out: int, n_in: int, std: float) -> float:
    """Return the large-size limit of ‖W‖_R for independent entries of standard deviation `std`:
    √(n_in/n_out) std (√n_in + √n_out).

    Source: Bai and Yin (1993); 2603.00541, section 2.
    """
    checks.at_least("sizes", (n_out, n_in), 1)
    checks.at_least("std", std, 0.0)
    return math.sqrt(n_in / n_out) * std * (math.sqrt(n_in) + math.sqrt(n_out))
