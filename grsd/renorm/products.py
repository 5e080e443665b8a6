"""Products P = J_L ⋯ J₁ of layers J = I + εG: their singular values, and two kinds of coupling between them.

With λ = σ² and s = log λ, the spectrum depends on ε and L through t = ε²L alone once ε is small and n large: `Bulk` is that law. The coupling
X̃ = φᵀṀφ/√(λ_uλ_v) of M = PPᵀ has one kernel when a layer is added (`depth_kernel`) and another when all layers change
(`training_kernel`). Single vectors are in :mod:`grsd.renorm.increments`. Source: 2512.18209, section 4 and appendix A.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate, optimize
from scipy.linalg import lapack
from torch import Tensor

from grsd.renorm.increments import Ensemble, step

__all__ = ["Bulk", "Training", "depth_kernel", "graded", "layers", "lyapunov", "lyapunov_exponents", "training_kernel"]


def layers(ensemble: Ensemble, epsilon: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw J_1 … J_L = I + εG_ℓ, (count, n, n)."""
    step(epsilon)
    eye = torch.eye(ensemble.n, dtype=torch.float64, device=generator.device)
    return eye + epsilon * ensemble.matrices(count, generator)


class _Graded:
    """P = Q D T with Q orthogonal, D diagonal and descending, T well conditioned: no singular value is lost beside a larger one."""

    def __init__(self, like: Tensor) -> None:
        n = like.shape[-1]
        self.q = torch.eye(n, dtype=like.dtype, device=like.device)
        self.logs = torch.zeros(n, dtype=like.dtype, device=like.device)
        self.t = self.q.clone()
        self.volumes = self.logs.clone()  # Σ log |R_kk| without pivoting would be the Lyapunov sums

    def apply(self, matrix: Tensor) -> None:
        top = self.logs.max()
        scaled = (matrix @ self.q) * torch.exp(self.logs - top)
        order = torch.argsort(scaled.norm(dim=0), descending=True)  # pivoting by column length, once per step
        self.q, r = torch.linalg.qr(scaled[:, order])
        size = r.diagonal().abs()
        self.t = (r / size[:, None]) @ self.t[order]
        self.logs = size.log() + top

    def singular(self) -> np.ndarray:
        """log σ, descending: one-sided Jacobi on D T, whose relative accuracy does not depend on the spread of D."""
        logs, t = self.logs.cpu().numpy(), self.t.cpu().numpy()
        top = float(logs.max())
        found = lapack.dgejsv(np.asfortranarray(t.T * np.exp(logs - top)), joba=2, jobu=3, jobv=3)
        sva, work, info = found[0], found[3], found[5]
        if info != 0:
            raise ArithmeticError(f"one-sided Jacobi ended with code {info}")
        result: np.ndarray = np.log(sva * work[0] / work[1]) + top
        return np.sort(result)[::-1]


def graded(matrices: Iterable[Tensor], every: int = 8) -> np.ndarray:
    """Return s_u = log λ_u = 2 log σ_u of the product of `matrices`, ascending, (n,), first factor rightmost.

    Parameters
    ----------
    matrices : iterable of Tensor (n, n) float64
        J_1, J_2, …
    every : int
        Factors between two QR steps; their product must keep more than half of its digits.

    Notes
    -----
    Every singular value is relatively accurate, where the SVD of the product itself loses those below 1e−16 of the largest. Cost: a
    matrix product per factor, a QR per `every`, one Jacobi SVD.
    """
    if every < 1:
        raise ValueError(f"every is {every}; expected one factor or more between two QR steps")
    state: _Graded | None = None
    pending: Tensor | None = None
    waiting = 0
    for matrix in matrices:
        state = state or _Graded(matrix)
        pending, waiting = (matrix if pending is None else matrix @ pending), waiting + 1
        if waiting == every:
            state.apply(pending)
            pending, waiting = None, 0
    if state is None:
        raise ValueError("a product of no matrix has no singular values to report")
    if pending is not None:
        state.apply(pending)
    return 2 * state.singular()[::-1]


def lyapunov(matrices: Iterable[Tensor], skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean growth per layer of each log σ_k, descending k = 1 … n, and its standard error, (n,) each.

    The diagonal of R in J_ℓ Q_{ℓ−1} = Q_ℓ R_ℓ, averaged over the layers after the first `skip`. For an isotropic law the diagonals of different
    layers are independent, which the standard error assumes.
    """
    rows: list[Tensor] = []
    q: Tensor | None = None
    for index, matrix in enumerate(matrices):
        q = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) if q is None else q
        q, r = torch.linalg.qr(matrix @ q)
        if index >= skip:
            rows.append(r.diagonal().abs().log())
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} layers after the first {skip}; an average with an error needs two or more")
    logs = torch.stack(rows).cpu().numpy()
    return logs.mean(axis=0), logs.std(axis=0, ddof=1) / math.sqrt(len(logs))


def lyapunov_exponents(n: int, epsilon: float) -> np.ndarray:
    """Lyapunov exponents ε²(n − 2k)/2n of ∏(I + εG), k = 1 … n, G of independent N(0, 1/n) entries, to order ε².

    Equally spaced, by ε²/n. The first k add up to ε²k(n − k − 1)/2n, the growth of the log volume of k vectors. They are those of the limit
    L → ∞; at finite t the spectrum is `Bulk`.
    """
    k = np.arange(1, n + 1)
    return epsilon**2 * (n - 2 * k) / (2 * n)


@dataclass(frozen=True)
class Bulk:
    """The law of s = log λ of ∏(I + εG) at t = ε²L, in the limit of small ε and then large n, for Gaussian G.

    It is the free positive multiplicative Brownian motion of Biane (1997). Its S-transform is exp(−t(1 + 2z)), so that
    ψ(w) = ∫ wλ/(1 − wλ) dμ obeys  log ψ − log(1 + ψ) − t(1 + 2ψ) = log w, and the density of s is Im ψ(e^{−s} + i0)/π.

    Parameters
    ----------
    t : float
        ε²L, positive.
    """

    t: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.t) and self.t > 0):
            raise ValueError(f"t is {self.t}; expected ε²L > 0")

    @property
    def edge(self) -> float:
        """The support of s is [−edge, edge]: √(t² + 2t) + 2 arsinh √(t/2); t + 1 + log 2t at large t. log‖P‖ = edge/2."""
        return math.sqrt(self.t**2 + 2 * self.t) + 2 * math.asinh(math.sqrt(self.t / 2))

    @property
    def centre(self) -> float:
        """The density at s = 0: y/π with cot(ty) = 2y; 1/2(t + 2) at large t."""
        t = self.t
        y = optimize.brentq(lambda y: math.cos(t * y) - 2 * y * math.sin(t * y), 0, math.pi / (2 * t), xtol=1e-15)
        return float(y) / math.pi

    def density(self, s: np.ndarray) -> np.ndarray:
        """Density of s, per nat, of unit mass; 0 outside the support.

        Along the support ψ = −½ + x + iy; eliminating the angle leaves one equation for y at given x, and s follows from it.
        """
        wanted = np.abs(np.atleast_1d(np.asarray(s, dtype=np.float64)))
        x_edge = 0.5 * math.sqrt(1 + 2 / self.t)
        x = x_edge * (1 - np.linspace(1, 0, 4000) ** 2)
        y = np.array([self._height(one) for one in x])
        place = 2 * self.t * x + 0.5 * np.log(((x + 0.5) ** 2 + y**2) / ((x - 0.5) ** 2 + y**2))
        found: np.ndarray = np.interp(wanted, place, y / math.pi, right=0.0)
        return found

    def _height(self, x: float) -> float:
        """The y > 0 with arg ψ − arg(1 + ψ) = 2ty at ψ = −½ + x + iy, 0 at the edge."""

        def gap(y: float) -> float:
            return math.atan2(y, x - 0.5) - math.atan2(y, x + 0.5) - 2 * self.t * y

        high = math.pi / (2 * self.t) + 1
        low = 1e-12
        return float(optimize.brentq(gap, low, high, xtol=1e-14)) if gap(low) > 0 else 0.0

    def flatness(self, window: float) -> float:
        """Largest relative change of the density over |s| ≤ window/2; about (window/t)²/2t at large t."""
        return float(1 - self.density(np.array([window / 2]))[0] / self.centre)

    def mass(self) -> float:
        """∫ density, which is 1."""
        return float(2 * integrate.quad(lambda s: float(self.density(np.array([s]))[0]), 0, self.edge, limit=50)[0])


def depth_kernel(distance: np.ndarray, ensemble: Ensemble, epsilon: float) -> np.ndarray:
    """E X̃_uv² of one more layer, for u ≠ v at the log distance Δ = s_v − s_u: a function of Δ, whatever the layers before it.

    Adding J = I + εG turns M into M + ε(GM + MGᵀ) + O(ε²), and φ_uᵀ(GM + MGᵀ)φ_v/√(λ_uλ_v) = g_uv e^{Δ/2} + g_vu e^{−Δ/2} with
    g = φᵀGφ. For an isotropic law of zero mean E g_uv² = a and E g_uv g_vu = b are the same for all pairs: 2ε²(a cosh Δ + b). Here a = 1/n
    and b = 0, 1/n, −1/n for ``ginibre``, ``symmetric`` and ``antisymmetric``; a = 1/n², b = 0 for ``rank_one``.

    Raises
    ------
    ValueError
        An ensemble with a mean: its couplings depend on which vectors the φ are.
    """
    step(epsilon)
    if ensemble.mean is not None:
        raise ValueError("G has a mean, so its couplings depend on the eigenvectors and not on Δ alone; take mean=None")
    n = ensemble.n
    a = 1 / n**2 if ensemble.kind == "rank_one" else 1 / n
    b = {"symmetric": 1 / n, "antisymmetric": -1 / n}.get(ensemble.kind, 0.0)
    found: np.ndarray = 2 * epsilon**2 * (a * np.cosh(np.asarray(distance, dtype=np.float64)) + b)
    return found


class Training(NamedTuple):
    """Expected squared couplings when every layer of a product changes independently."""

    s: np.ndarray  # (n,), log λ ascending
    kernel: np.ndarray  # (n, n), E X̃_uv² given the layers, in units of the variance of an entry of J̇

    @property
    def couplings(self) -> np.ndarray:
        """√kernel · √(λ_uλ_v), (n, n): what `grsd.renorm.couplings.shift_invariance` takes as X, free of sampling noise."""
        found: np.ndarray = np.sqrt(self.kernel) * np.exp((self.s[:, None] + self.s[None, :]) / 2)
        return found


def training_kernel(matrices: Tensor) -> Training:
    """Return E X̃_uv² over independent updates J̇_ℓ with independent entries of zero mean and variance 1, given J_1 … J_L.

    With P = ΦΣVᵀ, A_ℓ = (J_L ⋯ J_{ℓ+1})ᵀΦ and B_ℓ = J_{ℓ−1} ⋯ J_1 V,

        E X̃_uv² = Σ_ℓ |a_ℓu|²|b_ℓv|²/λ_u + |a_ℓv|²|b_ℓu|²/λ_v + 2 (a_ℓu·a_ℓv)(b_ℓu·b_ℓv)/√(λ_uλ_v).

    No update is drawn. Multiplying every layer by c^{1/L} shifts s by 2 log c and multiplies this by c^{−2/L}: one layer of L is missing in
    every term.

    Parameters
    ----------
    matrices : Tensor (L, n, n) float64

    Raises
    ------
    ValueError
        Shapes that do not fit, or a product whose smallest singular value is rounding.

    Notes
    -----
    Cost: 5 L matrix products and one SVD.
    """
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or len(matrices) < 1:
        raise ValueError(f"matrices have shape {tuple(matrices.shape)}; expected (L, n, n) with L ≥ 1")
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    phi, sigma, vt = torch.linalg.svd(product)
    phi, sigma, v = phi.flip(1), sigma.flip(0), vt.mT.flip(1)  # ascending
    if float(sigma[0]) < 1e3 * len(sigma) * torch.finfo(sigma.dtype).eps * float(sigma[-1]):
        raise ValueError(
            f"the singular values span {float(sigma[-1] / sigma[0]):.1g}: the smallest are rounding; take fewer layers"
        )
    after = [phi]
    for matrix in matrices.flip(0)[:-1]:
        after.append(matrix.mT @ after[-1])
    b = v
    kernel = torch.zeros_like(product)
    for matrix, a in zip(matrices, reversed(after), strict=True):
        a = a / sigma
        aa, bb = a.mT @ a, b.mT @ b
        mixed = torch.outer(aa.diagonal(), bb.diagonal())
        kernel += mixed + mixed.mT + 2 * aa * bb
        b = matrix @ b
    return Training(2 * sigma.log().cpu().numpy(), kernel.cpu().numpy())
