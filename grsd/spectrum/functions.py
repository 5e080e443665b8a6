"""Functions of an operator by Lanczos: Ritz pairs, f(M) u, the frozen flow exp(−tM) u, traces.

All are read off the small matrix T_m and the basis of one Krylov space; M is only multiplied. What
T_m says about the measure of a start vector is in :mod:`grsd.spectrum.measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from grsd import checks
from grsd.spectrum.lanczos import krylov_space, lanczos
from grsd.spectrum.measure import Tridiagonal, eigen_first, with_node
from grsd.spectrum.operator.base import Operator
from grsd.statistics import Interval, mean, standard_error

Array = NDArray[np.float64]
Function = Callable[[Array], ArrayLike]
ROUNDING = 4.0  # in eps: what a product, and a sum over the basis, are right to


class Ritz(NamedTuple):
    """Approximate eigenpairs from a Krylov space.

    Attributes
    ----------
    values : (m,) float64, ascending.
    vectors : (T, m), orthonormal columns, in the dtype of M.
    residuals : (m,) float64, |M y − θ y| = β_m |s_mi|, and the rounding of a product: an eigenvalue
        of M lies within it of θ.
    """

    values: Array
    vectors: Tensor
    residuals: Array


class Applied(NamedTuple):
    """f(M) u and what it may be wrong by, in the Euclidean norm.

    Attributes
    ----------
    value : (T,), or (T, k) for k functions or times.
    error : float64, () or (k,).
    """

    value: Tensor
    error: Any


def ritz(M: Operator, start: Tensor, steps: int) -> Ritz:
    """Return the Ritz pairs of M in the Krylov space of `start`, (T,), after `steps` products.

    The Ritz value θ_i and vector y_i = Qᵀ s_i have the residual β_m |s_mi|, and for a symmetric M
    some eigenvalue lies within the residual of θ_i. Errors and cost as for `lanczos`, and m² T
    operations. Source: Parlett 1998, section 13.2.
    """
    tri, basis = krylov_space(M, start, steps)
    values, small = _eigen(tri)
    rounding = ROUNDING * tri.eps * float(np.abs(values).max())
    return Ritz(values, _combine(basis, small), tri.residual * np.abs(small[-1]) + rounding)


def apply(f: Function, M: Operator, u: Tensor, steps: int) -> Applied:
    """Return f(M) u ≈ |u| Q f(T_m) e₁ for u of shape (T,), exact for polynomials of degree < m.

    `f` takes the Ritz values (m,) and returns (m,), or (k, m) for k functions at once: one Krylov
    space serves all. Where M is known to be semidefinite it sees no negative value. The error is an
    estimate and no bound: the distance between the results of m and of m − 1 steps (of m = 1: their
    size). For exp(−tM) `evolve` has a bound.

    Cost: m products. ValueError where f is not finite, and as for `lanczos`. Source: Golub and
    Meurant, Matrices, Moments and Quadrature, chapter 3.
    """
    tri, basis = krylov_space(M, u, steps)
    now, before = _coefficients(f, tri), np.zeros(0)
    if tri.steps > 1:
        before = _coefficients(f, _shortened(tri))
    last = now.copy()
    last[..., : before.shape[-1]] -= before
    length = _length(u)
    open_ended = tri.residual > 0.0 and not tri.exhausted
    error = np.linalg.norm(last, axis=-1) * open_ended
    error = error + ROUNDING * tri.eps * np.linalg.norm(now, axis=-1)
    return Applied(_combine(basis, (length * now).T), length * error)


def evolve(M: Operator, u: Tensor, times: ArrayLike, steps: int) -> Applied:
    """Return exp(−tM) u, the flow of a frozen operator, at all `times` ≥ 0 from one Krylov space.

    `times` of shape () or (k,) give values (T,) or (T, k), and for a semidefinite M a bound of each
    error, which is proved up to the rounding that it names:

        |exp(−tM) u − Q exp(−tT_m) e₁ |u|| ≤ |u| β_m t |φ₁(−tT_m)|_{m1} + 4 eps (1 + t|T_m|) |u|.

    The residual of the approximation in y′ = −My is β_m [exp(−tT_m)]_{m1} |u| q_{m+1}; that entry
    keeps its sign, exp(−sM) does not expand, and the integral over time is the φ₁ of the bound,
    φ₁(z) = (eᶻ − 1)/z. At β_m = 0 nothing is left but rounding. `error` is never above 2|u|.

    Cost: m products for all times. ValueError for negative times, for Ritz values below zero by
    more than rounding (there is no bound; `apply` takes any sign), and as for `lanczos`.
    Source: Saad 1992, SIAM J. Numer. Anal. 29, section 4; Gallopoulos and Saad 1992.
    """
    t = checks.at_least("times", checks.finite("times", np.asarray(times, float)), 0.0)
    if t.ndim > 1:
        raise ValueError(f"times have shape () or (k,), got {t.shape}")
    tri, basis = krylov_space(M, u, steps)
    values, small = _eigen(tri)
    scale = float(np.abs(values).max())
    if values[0] < -ROUNDING * tri.steps * tri.eps * scale:
        raise ValueError(
            f"M has a Ritz value {values[0]:.4g} below zero, so exp(−tM) grows and its error has "
            "no bound: use apply(lambda x: np.exp(-t * x), M, u, steps)"
        )
    values = np.maximum(values, 0.0)
    # exp(−tθ), and its integral over time, (1 − exp(−tθ))/θ
    x = np.multiply.outer(t, values)
    grown = np.where(x > 0, -np.expm1(-x) / np.where(x > 0, values, 1.0), t[..., None])
    left = tri.residual * np.abs((grown * small[0] * small[-1]).sum(-1))
    length = _length(u)
    rounding = ROUNDING * tri.eps * (1.0 + t * scale)
    coefficients = length * (np.exp(-x) * small[0]) @ small.T
    return Applied(_combine(basis, coefficients.T), length * np.minimum(left + rounding, 2.0))


@dataclass(frozen=True)
class TraceEstimate:
    """tr f(M) by stochastic Lanczos quadrature.

    Attributes
    ----------
    interval : mean over the probes, with its 95 % interval, and the quadrature's part in it.
    standard_error : float, of the mean over the probes.
    quadrature : float, what the quadrature adds to the error, mean over the probes.
    """

    interval: Interval
    standard_error: float
    quadrature: float

    @property
    def value(self) -> float:
        return self.interval.value


def trace(f: Function, M: Operator, *, samples: int, seed: int, steps: int) -> TraceEstimate:
    """Estimate tr f(M) from `samples` ≥ 2 vectors of random signs, z: E zᵀ f(M) z = tr f(M).

    Every zᵀ f(M) z is a Gauss quadrature of `steps` nodes. Of a semidefinite M the quadrature with
    one more node at λ = 0 (Gauss–Radau) lies on the other side of the truth where the derivatives
    of f alternate in sign on λ > 0, as those of exp(−tλ), 1/(λ + σ), log(λ + σ) and √λ do: the
    distance of the two bounds the error there. It is an estimate for other f; for an M of unknown
    sign it is the distance between `steps` and one step fewer.

    `interval` is Student's 95 % interval over the probes, widened on both sides by the quadrature's
    part. For log det(M + σ1) see `log_determinant`.

    Cost: samples · steps products. ValueError where f is not finite at a node or at 0, and as for
    `lanczos`. Source: Ubaru, Chen and Saad 2017; Golub and Meurant, chapter 6.
    """
    checks.whole("samples", samples, 2, why="one sample has no standard error")
    size, generator = int(M.shape[0]), torch.Generator().manual_seed(seed)
    gauss, other = [], []
    for _ in range(samples):
        signs = 2 * torch.randint(0, 2, (size,), generator=generator) - 1
        tri = lanczos(M, signs.to(M.device, M.dtype), steps)
        pair = _two_quadratures(f, tri)
        gauss.append(size * pair[0])
        other.append(size * pair[1])
    one, apart = mean(gauss), float(np.mean(np.abs(np.subtract(gauss, other))))
    widened = one._replace(low=one.low - apart, high=one.high + apart)
    return TraceEstimate(widened, float(standard_error(gauss)), apart)


def log_determinant(
    M: Operator, shift: float, *, samples: int, seed: int, steps: int
) -> TraceEstimate:
    """Estimate log det(M + shift · 1) of a semidefinite M, shift > 0; arguments as for `trace`."""
    checks.positive("shift", shift)
    return trace(lambda x: np.log(x + shift), M, samples=samples, seed=seed, steps=steps)


def _two_quadratures(f: Function, tri: Tridiagonal) -> tuple[float, float]:
    """Return the Gauss quadrature of f and one to compare with, for a measure of mass 1."""

    def integral(diagonal: Array, off: Array) -> float:
        nodes, weights = eigen_first(diagonal, off)
        return float(weights @ _values(f, nodes, tri.semidefinite))

    gauss = integral(tri.alphas, tri.betas)
    if tri.semidefinite:
        extended = with_node(tri, 0.0)
        return gauss, gauss if extended is None else integral(*extended)
    if tri.residual == 0.0 or tri.exhausted:
        return gauss, gauss
    return gauss, integral(tri.alphas[:-1], tri.betas[:-1]) if tri.steps > 1 else 0.0


def _values(f: Function, nodes: Array, semidefinite: bool) -> Array:
    """Return f at the nodes, (..., m), finite."""
    points = np.maximum(nodes, 0.0) if semidefinite else nodes
    with np.errstate(all="ignore"):
        values = np.asarray(f(points), float)
    if values.shape[-1:] != points.shape:
        raise ValueError(
            f"f of {points.size} nodes must give {points.size} numbers (in its last axis), and "
            f"gives shape {values.shape}"
        )
    if not np.isfinite(values).all():
        at = points[~np.isfinite(values).reshape(-1, points.size).all(0)][0]
        raise ValueError(f"f is not finite at λ = {at:.4g}, which the spectrum may hold")
    return values


def _eigen(tri: Tridiagonal) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors, (m, m) as columns, of T_m."""
    if tri.steps == 1:
        return tri.alphas.copy(), np.ones((1, 1))
    power = int(np.frexp(max(np.abs(tri.alphas).max(), tri.betas.max()))[1])
    values, vectors = eigh_tridiagonal(np.ldexp(tri.alphas, -power), np.ldexp(tri.betas, -power))
    return np.ldexp(values, power), vectors


def _coefficients(f: Function, tri: Tridiagonal) -> Array:
    """Return f(T_m) e₁, (..., m)."""
    values, vectors = _eigen(tri)
    return (_values(f, values, tri.semidefinite) * vectors[0]) @ vectors.T


def _shortened(tri: Tridiagonal) -> Tridiagonal:
    return Tridiagonal(
        tri.alphas[:-1], tri.betas[:-1], tri.mass, 0.0, tri.eps, semidefinite=tri.semidefinite
    )


def _length(u: Tensor) -> float:
    return float(torch.linalg.vector_norm(u.to("cpu", torch.float64)))


def _combine(basis: Tensor, coefficients: Array) -> Tensor:
    """Return Σ_k c_k q_k, (T,) or (T, ...), for coefficients (m,) or (m, ...)."""
    c = torch.from_numpy(np.ascontiguousarray(coefficients)).to(basis.device, basis.dtype)
    return basis.T @ c
