"""Lanczos: from products M v to a small tridiagonal matrix that knows a start vector's measure.

The measure made from it is in :mod:`grsd.spectrum.measure`. Two recurrences live here: full
reorthogonalisation, which the book uses, and Algorithm 1 of 2512.10427 as printed, which is kept to
show what it does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grsd import checks
from grsd.spectrum.measure import Tridiagonal
from grsd.spectrum.operator.base import Operator
from grsd.spectrum.operator.batches import NTKBatches

BREAKDOWN = 8.0  # in units of eps |M|: the products of an exhausted space leave 2 to 5 of them
# q_jᵀ M q_k − q_kᵀ M q_j may be (SKEW + √T) eps |M|, sums of T terms: a fifth of it was the most
# in matrices and networks, T to 1500, in float64, float32, float16 and bfloat16
SKEW = 8.0


class Recurrence(NamedTuple):
    """All steps of the recurrence, and what they say about M.

    Attributes
    ----------
    alphas, betas : (..., steps) float64.
    skew : (..., steps) float64, the largest |q_jᵀ M q_k − q_kᵀ M q_j| with j < k; 0 if not seen.
    basis : (..., steps, T), the vectors q_k as rows.
    """

    alphas: NDArray
    betas: NDArray
    skew: NDArray
    basis: Tensor


def lanczos(M: Operator, start: Tensor, steps: int, *, reorthogonalize: bool = True) -> Tridiagonal:
    """Run `steps` Lanczos steps on M (an `NTK` or a square tensor) from `start`.

    Parameters
    ----------
    M
        Symmetric, real. Definite or not: what is known of its sign is its attribute `semidefinite`.
    start
        (T,), dtype and device of M. Not normalised: its square norm is the mass of the measure.
    steps
        m, between 1 and T. Fewer are returned where the Krylov space is exhausted.
    reorthogonalize
        True: every new vector is orthogonalised twice against all earlier ones by classical
        Gram–Schmidt, which is right to rounding, and the recurrence ends at β ≤ 8 eps |M|, the
        rounding of a product. False: Algorithm 1 of 2512.10427 as printed, which ends at β = 0.

    Raises
    ------
    ValueError
        Shapes, types or devices that do not fit; a matrix that is not real; a start vector that is
        zero or not finite; a product that is not finite; with reorthogonalisation, a matrix whose
        asymmetry on the Krylov space exceeds (8 + √T) eps |M|.

    Notes
    -----
    Cost: m products, 8 m² T further operations, m T numbers of memory. No step waits for the
    device, but a product of an `NTK` does, once, to see that its model is unchanged. Vectors and
    products are scaled by powers of two, so that T_m scales with M, and the mass with the start,
    exactly. Source: 2512.10427, appendix B; "twice is enough": Parlett 1998, section 6.9.
    """
    return krylov_space(M, start, steps, reorthogonalize)[0]


def krylov_space(
    M: Operator, start: Tensor, steps: int, reorthogonalize: bool = True
) -> tuple[Tridiagonal, Tensor]:
    """Return what `lanczos` returns and the m vectors of its basis as rows, (m, T)."""
    size = _size(M, start, steps)
    units, masses = _units(start[None], M)
    made = recurrence(M, units[0], steps, reorthogonalize)
    tri = tridiagonal(made, M, float(masses[0]), size, reorthogonalize)
    return tri, made.basis[: tri.steps]


def lanczos_batches(M: NTKBatches, starts: Tensor, steps: int) -> list[Tridiagonal]:
    """Run Lanczos with full reorthogonalisation on every batch at once, from `starts` (G, T).

    One `Tridiagonal` a batch, as `lanczos` would give it. Cost: m products, 8 m² T operations a
    batch and G m T numbers.
    """
    size = _size(M, starts, steps)
    units, masses = _units(starts, M)
    made = recurrence(M, units, steps)
    return [
        tridiagonal(Recurrence(*one), M, float(mass), size)
        for *one, mass in zip(*made, masses, strict=True)
    ]


def _size(M: Operator, start: Tensor, steps: int) -> int:
    """Return T once start vectors and steps are what M takes."""
    shape = tuple(M.shape)
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"Lanczos takes a square matrix, and M is {shape}")
    if not M.dtype.is_floating_point:
        raise ValueError(
            f"M is {M.dtype}: Lanczos takes real floating-point numbers. Convert integers "
            "(M.double()); of a complex Hermitian A + iB take [[A, -B], [B, A]]"
        )
    if start.shape != shape[:-1] or start.dtype != M.dtype or start.device != M.device:
        raise ValueError(
            f"M is {shape} {M.dtype} on {M.device}; start vectors must be "
            f"{shape[:-1]}, and not {tuple(start.shape)} {start.dtype} on {start.device}"
        )
    size = int(shape[-1])
    checks.between("steps", steps, 1, size, why=f"steps lie between 1 and T = {size}")
    return size


def _units(starts: Tensor, M: Operator) -> tuple[Tensor, NDArray]:
    """Return unit vectors (G, T) and the masses (G,) of starts of any finite scale."""
    scaled, scale = _scaled(starts.to("cpu", torch.float64))
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    lengths = (norms * scale).flatten().numpy()
    if bad := [k for k, norm in enumerate(lengths) if not 0 < norm < np.inf]:
        which = "the start vector" if len(lengths) == 1 else f"the start vector of batch {bad[0]}"
        raise ValueError(f"{which} has norm {lengths[bad[0]]}; it must be finite and not zero")
    masses = lengths**2 * float(getattr(M, "inner_weight", 1.0))
    if bad := [k for k, mass in enumerate(masses) if not 0 < mass < np.inf]:
        raise ValueError(
            f"the square of the start vector's norm {lengths[bad[0]]:.3g} is no float64: scale the "
            "start vector, and the weights back"
        )
    return (scaled / norms).to(starts.device, starts.dtype), masses


def _scaled(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return w / s and s (..., 1), the power of two that takes each largest entry to [1, 2).

    s is 1 for a vector that is zero or not finite. Nothing rounds but what falls below the range.
    """
    peak = w.abs().amax(-1, keepdim=True)
    wide = peak.to(torch.promote_types(peak.dtype, torch.float32))
    power = (wide / (2 * torch.frexp(wide).mantissa)).to(peak.dtype)  # exact, and in range
    scale = torch.where((peak > 0) & torch.isfinite(peak), power, torch.ones_like(peak))
    return w / scale, scale


def recurrence(M: Operator, units: Tensor, steps: int, reorthogonalize: bool = True) -> Recurrence:
    """Return all steps from unit vectors (..., T) at once.

    No step waits for the device: a start whose Krylov space is exhausted goes on with rounding
    noise, which `tridiagonal` cuts off.
    """
    lead, size = units.shape[:-1], units.shape[-1]
    basis = units.new_zeros((*lead, steps, size))
    # of step k, in units of scales[k], the power of two by which its product is divided
    alphas, betas, skew, scales = (units.new_zeros((*lead, steps)) for _ in range(4))
    tiny = torch.finfo(units.dtype).tiny
    basis[..., 0, :] = units
    for k in range(steps):
        product, scale = _scaled(M @ basis[..., k, :])
        w, scales[..., k] = product[..., None], scale[..., 0]
        last = betas[..., k - 1] * (scales[..., k - 1] / scales[..., k]) if k else None
        if reorthogonalize:
            # the first sweep takes out β_{k−1} q_{k−1} + α_k q_k, the second what rounding left
            seen = basis[..., : k + 1, :]
            inner = seen @ w
            alphas[..., k] = inner[..., k, 0]
            w = w - seen.mT @ inner
            w = w - seen.mT @ (seen @ w)
            if last is not None:  # q_jᵀ M q_k is β_{k−1} for j = k − 1, and 0 before
                inner[..., k - 1, 0] -= last
                skew[..., k] = inner[..., :k, 0].abs().amax(-1)
        else:
            # three terms, as printed
            if last is not None:
                w = w - last[..., None, None] * basis[..., k - 1, :, None]
            alphas[..., k] = (basis[..., k, None, :] @ w)[..., 0, 0]
            w = w - alphas[..., k, None, None] * basis[..., k, :, None]
        betas[..., k] = torch.linalg.vector_norm(w, dim=(-2, -1))
        if k + 1 < steps:
            basis[..., k + 1, :] = w[..., 0] / betas[..., k, None].clamp_min(tiny)
    a, b, c, s = (x.to("cpu", torch.float64).numpy() for x in (alphas, betas, skew, scales))
    return Recurrence(a * s, b * s, c * s, basis)


def tridiagonal(
    made: Recurrence, M: Operator, mass: float, size: int, reorthogonalized: bool = True
) -> Tridiagonal:
    """Return the part of one `recurrence` that stands above rounding; `size` is T."""
    alphas, betas, skew, _ = made
    eps = float(getattr(M, "eps", torch.finfo(M.dtype).eps))
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
    if not (worst := float(skew[:used].max())) <= (SKEW + size**0.5) * eps * scale:
        raise ValueError(
            f"M is not symmetric: qᵀMp and pᵀMq of two Lanczos vectors differ by {worst:.3g}, for "
            f"|M| of at least {scale:.3g} and products that are right to {eps:.2g}. Pass a "
            "symmetric operator (for H J Jᵀ: grsd.spectrum.GGN), or give it the `eps` that it has"
        )
    return Tridiagonal(
        alphas=alphas[:used],
        betas=betas[: used - 1],
        mass=mass,
        residual=0.0 if reorthogonalized and used == size else float(betas[used - 1]),
        eps=eps,
        reorthogonalized=reorthogonalized,
        exhausted=used < alphas.size,
        semidefinite=bool(getattr(M, "semidefinite", False)),
    )
