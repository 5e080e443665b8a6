"""Lanczos: from products M v to a small tridiagonal matrix that knows a start vector's measure.

The measure made from it is in :mod:`grsd.spectrum.measure`. Two recurrences live here: full
reorthogonalisation, which the book uses, and Algorithm 1 of 2512.10427 as printed, which is kept to
show what it does.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grsd import checks
from grsd.spectrum.measure import Tridiagonal
from grsd.spectrum.operator.base import Operator
from grsd.spectrum.operator.batches import NTKBatches

BREAKDOWN = 8.0  # in units of eps |M|: the products of an exhausted space leave 2 to 5 of them


def lanczos(M: Operator, start: Tensor, steps: int, *, reorthogonalize: bool = True) -> Tridiagonal:
    """Run `steps` Lanczos steps on M (an `NTK` or a square tensor) from `start`.

    Parameters
    ----------
    start
        (T,), dtype and device of M. Not normalised: its square norm is the mass of the measure.
    steps
        m, between 1 and T. Fewer are returned where the Krylov space is exhausted.
    reorthogonalize
        True: every new vector is orthogonalised twice against all earlier ones by classical
        Gram–Schmidt, which is right to rounding, and the recurrence ends at β ≤ 8 eps |M|, the
        rounding of a product. False: Algorithm 1 of 2512.10427 as printed, which ends at β = 0.

    Notes
    -----
    Cost: m products, 8 m² T further operations, m T numbers of memory. No step waits for the
    device. Source: 2512.10427, appendix B; "twice is enough": Parlett 1998, section 6.9.
    """
    size = _size(M, start, steps)
    norm = float(torch.linalg.vector_norm(start))
    if not 0 < norm < np.inf:
        raise ValueError(f"the start vector has norm {norm}; it must be finite and not zero")
    alphas, betas = recurrence(M, start / norm, steps, reorthogonalize)
    eps = float(getattr(M, "eps", torch.finfo(M.dtype).eps))
    mass = norm**2 * float(getattr(M, "inner_weight", 1.0))
    return tridiagonal(alphas, betas, mass, eps, size, reorthogonalize)


def lanczos_batches(M: NTKBatches, starts: Tensor, steps: int) -> list[Tridiagonal]:
    """Run Lanczos with full reorthogonalisation on every batch at once, from `starts` (G, T).

    One `Tridiagonal` a batch, as `lanczos` would give it. Cost: m products, 8 m² T operations a
    batch and G m T numbers.
    """
    size = _size(M, starts, steps)
    norms = torch.linalg.vector_norm(starts, dim=1)
    if bad := [k for k, norm in enumerate(norms.tolist()) if not 0 < norm < np.inf]:
        raise ValueError(f"the start vectors of batches {bad} are zero or not finite")
    alphas, betas = recurrence(M, starts / norms[:, None], steps)
    masses = norms.to("cpu", torch.float64).numpy() ** 2 * M.inner_weight
    return [
        tridiagonal(a, b, float(mass), M.eps, size)
        for a, b, mass in zip(alphas, betas, masses, strict=True)
    ]


def _size(M: Operator, start: Tensor, steps: int) -> int:
    """Return T once start vectors and steps are what M takes."""
    if start.shape != M.shape[:-1] or start.dtype != M.dtype or start.device != M.device:
        raise ValueError(
            f"M is {tuple(M.shape)} {M.dtype} on {M.device}; start vectors must be "
            f"{tuple(M.shape[:-1])}, and not {tuple(start.shape)} {start.dtype} on {start.device}"
        )
    size = int(M.shape[-1])
    checks.between("steps", steps, 1, size, why=f"steps lie between 1 and T = {size}")
    return size


def recurrence(
    M: Operator, units: Tensor, steps: int, reorthogonalize: bool = True
) -> tuple[NDArray, NDArray]:
    """Return all alphas and betas, (..., steps) float64, from unit vectors (..., T) at once.

    No step waits for the device: a start whose Krylov space is exhausted goes on with rounding
    noise, which `tridiagonal` cuts off.
    """
    lead, size = units.shape[:-1], units.shape[-1]
    basis = units.new_zeros((*lead, steps, size))
    alphas, betas = units.new_zeros((*lead, steps)), units.new_zeros((*lead, steps))
    tiny = torch.finfo(units.dtype).tiny
    basis[..., 0, :] = units
    for k in range(steps):
        w = (M @ basis[..., k, :])[..., None]
        if reorthogonalize:
            # the first sweep takes out β_{k−1} q_{k−1} + α_k q_k, the second what rounding left
            seen = basis[..., : k + 1, :]
            inner = seen @ w
            alphas[..., k] = inner[..., k, 0]
            w = w - seen.mT @ inner
            w = w - seen.mT @ (seen @ w)
        else:
            # three terms, as printed
            if k > 0:
                w = w - betas[..., k - 1, None, None] * basis[..., k - 1, :, None]
            alphas[..., k] = (basis[..., k, None, :] @ w)[..., 0, 0]
            w = w - alphas[..., k, None, None] * basis[..., k, :, None]
        betas[..., k] = torch.linalg.vector_norm(w, dim=(-2, -1))
        if k + 1 < steps:
            basis[..., k + 1, :] = w[..., 0] / betas[..., k, None].clamp_min(tiny)
    a, b = (x.to("cpu", torch.float64).numpy() for x in (alphas, betas))
    return a, b


def tridiagonal(
    alphas: NDArray,
    betas: NDArray,
    mass: float,
    eps: float,
    size: int,
    reorthogonalized: bool = True,
) -> Tridiagonal:
    """Return the part of one `recurrence` that stands above rounding; `size` is T."""
    used, scale = alphas.size, 0.0
    relative = BREAKDOWN * eps if reorthogonalized else 0.0
    for k, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
        if not (np.isfinite(alpha) and np.isfinite(beta)):
            raise ValueError(f"the product with M is not finite at Lanczos step {k + 1}")
        scale = max(scale, abs(alpha))
        if beta <= relative * scale:
            used = k + 1
            break
        scale = max(scale, abs(alpha) + beta)  # Gershgorin: a bound of |M| on what was seen
    return Tridiagonal(
        alphas=alphas[:used],
        betas=betas[: used - 1],
        mass=mass,
        residual=0.0 if reorthogonalized and used == size else float(betas[used - 1]),
        eps=eps,
        reorthogonalized=reorthogonalized,
        exhausted=used < alphas.size,
    )
