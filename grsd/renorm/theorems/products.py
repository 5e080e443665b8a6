"""Products P = J_L ⋯ J₁ of layers J = I + εG: singular values, and couplings between them.

With λ = σ² and s = log λ, the spectrum depends on ε and L through t = ε²L alone once ε is small and
n large: `Bulk` is that law. The coupling X̃ = φᵀṀφ/√(λ_uλ_v) of M = PPᵀ has one kernel when a layer
is added (`depth_kernel`) and another when all layers change (`training_kernel`). Single vectors are
in :mod:`grsd.renorm.theorems.increments`. Source: 2512.18209, section 4 and appendix A.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import optimize
from scipy.linalg import lapack
from torch import Tensor

from grsd import checks, statistics
from grsd.renorm.theorems.increments import Ensemble, step

__all__ = [
    "Bulk",
    "Graded",
    "Training",
    "depth_kernel",
    "graded",
    "layers",
    "lyapunov",
    "lyapunov_exponents",
    "training_kernel",
]


def layers(ensemble: Ensemble, epsilon: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw J_1 … J_L = I + εG_ℓ, (count, n, n)."""
    eye = torch.eye(ensemble.n, dtype=torch.float64, device=generator.device)
    return eye + step(epsilon) * ensemble.matrices(count, generator)


class Graded:
    """A growing product P = Q D T with Q orthogonal, D diagonal and descending, T well conditioned.

    No singular value is lost beside a larger one, where the SVD of P itself loses those below 1e−16
    of the largest. `every` factors are multiplied between two QR steps; their product must keep
    more than half of its digits. Cost: a matrix product per factor, a QR per `every` factors, one
    Jacobi SVD on the CPU per `spectrum`.
    """

    def __init__(self, every: int = 8) -> None:
        self.every = checks.whole("every", every, 1)
        self._pending: Tensor | None = None  # product of the factors since the last QR step
        self._waiting = 0  # their number
        self._parts: tuple[Tensor, Tensor, Tensor] | None = None  # Q, log D, T

    def apply(self, matrix: Tensor) -> None:
        """Multiply from the left by the next factor, (n, n) float64."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype != torch.float64:
            raise ValueError(
                f"factor {tuple(matrix.shape)} {matrix.dtype}; expected (n, n) in float64"
            )
        self._pending = matrix if self._pending is None else matrix @ self._pending
        self._waiting += 1
        if self._waiting == self.every:
            self._absorb(self._pending)

    def _absorb(self, pending: Tensor) -> None:
        if self._parts is None:
            eye = torch.eye(len(pending), dtype=pending.dtype, device=pending.device)
            self._parts = (eye, torch.zeros_like(pending[0]), eye)
        q, logs, t = self._parts
        # Q′ D′ R′ of the pending factors times Q D, relative to the largest entry of D; R′ goes
        # into T
        top = logs.max()
        scaled = (pending @ q) * torch.exp(logs - top)
        order = torch.argsort(scaled.norm(dim=0), descending=True)  # pivoting once per step
        q, r = torch.linalg.qr(scaled[:, order])
        size = r.diagonal().abs()
        self._parts = (q, size.log() + top, (r / size[:, None]) @ t[order])
        self._pending, self._waiting = None, 0

    def spectrum(self) -> np.ndarray:
        """Return s = log λ = 2 log σ of the product so far, ascending, (n,)."""
        if self._pending is not None:
            self._absorb(self._pending)
        if self._parts is None:
            raise ValueError("a product of no matrix has no singular values to report")
        logs, t = (part.cpu().numpy() for part in self._parts[1:])
        top = float(logs.max())
        # one-sided Jacobi on Tᵀ D: its relative accuracy does not depend on the spread of D
        product = np.asfortranarray(t.T * np.exp(logs - top))
        sva, _, _, work, _, info = lapack.dgejsv(product, joba=2, jobu=3, jobv=3)
        if info != 0:
            raise ArithmeticError(f"one-sided Jacobi ended with code {info}")
        return np.sort(2 * (np.log(sva * work[0] / work[1]) + top))


def graded(matrices: Iterable[Tensor], every: int = 8) -> np.ndarray:
    """Return s_u = 2 log σ_u of ⋯ J_2 J_1, ascending, (n,), for J_1, J_2, …; see `Graded`."""
    product = Graded(every)
    for matrix in matrices:
        product.apply(matrix)
    return product.spectrum()


def lyapunov(matrices: Iterable[Tensor], skip: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean growth per layer of each log σ_k and its standard error, descending, (n,).

    The diagonal of R in J_ℓ Q_{ℓ−1} = Q_ℓ R_ℓ, averaged over the layers after the first `skip`. For
    an isotropic law the diagonals of different layers are independent, which the standard error
    assumes.
    """
    rows: list[Tensor] = []
    q: Tensor | None = None
    for index, matrix in enumerate(matrices):
        q, r = torch.linalg.qr(matrix if q is None else matrix @ q)
        if index >= skip:
            rows.append(r.diagonal().abs().log())
    why = "layers after the first: an average with an error needs two or more"
    checks.at_least(f"number of layers but {skip}", len(rows), 2, why)
    logs = torch.stack(rows).cpu().numpy()
    return logs.mean(axis=0), statistics.standard_error(logs)


def lyapunov_exponents(n: int, epsilon: float) -> np.ndarray:
    """Lyapunov exponents ε²(n − 2k)/2n, k = 1 … n, of ∏(I + εG), G Gaussian, to order ε².

    Equally spaced, by ε²/n. The first k add up to ε²k(n − k − 1)/2n, the growth of the log volume
    of k vectors. They are those of the limit L → ∞; at finite t the spectrum is `Bulk`.
    """
    k = np.arange(1, n + 1)
    return epsilon**2 * (n - 2 * k) / (2 * n)


@dataclass(frozen=True)
class Bulk:
    """The law of s = log λ of ∏(I + εG) at t = ε²L, for small ε, then large n, G Gaussian.

    It is the free positive multiplicative Brownian motion of Biane (1997). Its S-transform is
    exp(−t(1 + 2z)), so that ψ(w) = ∫ wλ/(1 − wλ) dμ obeys  log ψ − log(1 + ψ) − t(1 + 2ψ) = log w,
    and the density of s is Im ψ(e^{−s} + i0)/π.
    """

    t: float

    def __post_init__(self) -> None:
        checks.positive("t", self.t, "expected ε²L > 0")

    @property
    def edge(self) -> float:
        """The support of s is [−edge, edge]: √(t² + 2t) + 2 arsinh √(t/2). log‖P‖ = edge/2.

        At large t it is t + 1 + log 2t.
        """
        return math.sqrt(self.t**2 + 2 * self.t) + 2 * math.asinh(math.sqrt(self.t / 2))

    @property
    def centre(self) -> float:
        """The density at s = 0: y/π with cot(ty) = 2y; 1/2(t + 2) at large t."""

        def gap(y: float) -> float:
            return math.cos(self.t * y) - 2 * y * math.sin(self.t * y)

        return float(optimize.brentq(gap, 0, math.pi / (2 * self.t), xtol=1e-15)) / math.pi

    def density(self, s: np.ndarray) -> np.ndarray:
        """Density of s, per nat, of unit mass; 0 outside the support.

        With ψ = −½ + x + iy the argument of the equation gives x² = ¼ − y² + y/tan 2ty, its modulus
        s, for 0 < y ≤ π · `centre`.
        """
        # the curve s(y), y from the centre's height to 0, read backwards
        v = np.linspace(0, 1, 4001)[:-1]
        y = math.pi * self.centre * (1 - v**2)
        x = np.sqrt(np.maximum(0.25 - y**2 + y / np.tan(2 * self.t * y), 0))
        place = 2 * self.t * x + 0.5 * np.log(((x + 0.5) ** 2 + y**2) / ((x - 0.5) ** 2 + y**2))
        place, height = np.append(place, self.edge), np.append(y, 0) / math.pi
        return np.interp(np.abs(np.asarray(s, dtype=np.float64)), place, height, right=0.0)

    def flatness(self, window: float) -> float:
        """Largest relative change of the density over |s| ≤ window/2; at large t (window/t)²/2t."""
        return float(1 - self.density(np.array(window / 2)) / self.centre)


def depth_kernel(distance: np.ndarray, ensemble: Ensemble, epsilon: float) -> np.ndarray:
    """E X̃_uv² of one more layer, u ≠ v, at the log distance Δ = s_v − s_u: a function of Δ alone.

    Adding J = I + εG turns M into M + ε(GM + MGᵀ) + O(ε²), and φ_uᵀ(GM + MGᵀ)φ_v/√(λ_uλ_v) = g_uv
    e^{Δ/2} + g_vu e^{−Δ/2} with g = φᵀGφ. For an isotropic law of zero mean E g_uv² = a and E g_uv
    g_vu = b are the same for all pairs: 2ε²(a cosh Δ + b), whatever the layers before it. Here a =
    1/n and b = 0, 1/n, −1/n for ``ginibre``, ``symmetric`` and ``antisymmetric``; a = 1/n², b = 0
    for ``rank_one``. An ensemble with a mean is refused: its couplings depend on which vectors the
    φ are.
    """
    step(epsilon)
    if ensemble.mean is not None:
        raise ValueError(
            "G has a mean, so its couplings depend on the eigenvectors and not on Δ alone; take "
            "mean=None"
        )
    n = ensemble.n
    a = 1 / n**2 if ensemble.kind == "rank_one" else 1 / n
    b = {"symmetric": 1 / n, "antisymmetric": -1 / n}.get(ensemble.kind, 0.0)
    return 2 * epsilon**2 * (a * np.cosh(np.asarray(distance, dtype=np.float64)) + b)


class Training(NamedTuple):
    """Expected squared couplings when every layer of a product changes independently."""

    s: np.ndarray  # (n,), log λ ascending
    kernel: np.ndarray  # (n, n), E X̃_uv² given the layers, per variance of an entry of J̇

    @property
    def couplings(self) -> np.ndarray:
        """√kernel · √(λ_uλ_v), (n, n): the X of `shift_invariance`, free of sampling noise."""
        return np.sqrt(self.kernel) * np.exp((self.s[:, None] + self.s[None, :]) / 2)


def training_kernel(matrices: Tensor) -> Training:
    """Return E X̃_uv² over independent updates J̇_ℓ, given J_1 … J_L, (L, n, n) float64.

    Their entries are independent, of zero mean and variance 1. With P = ΦΣVᵀ, A_ℓ = (J_L ⋯
    J_{ℓ+1})ᵀΦ and B_ℓ = J_{ℓ−1} ⋯ J_1 V,

        E X̃_uv² = Σ_ℓ |a_ℓu|²|b_ℓv|²/λ_u + |a_ℓv|²|b_ℓu|²/λ_v + 2 (a_ℓu·a_ℓv)(b_ℓu·b_ℓv)/√(λ_uλ_v).

    No update is drawn. Multiplying every layer by c^{1/L} shifts s by 2 log c and multiplies this
    by c^{−2/L}: one layer of L is missing in every term. Refuses a product whose smallest singular
    value is rounding. Cost: 5 L matrix products and one SVD.
    """
    checks.shape("matrices", matrices, ("L", "n", "n"))
    # the basis: singular vectors of the product
    product = matrices[0]
    for matrix in matrices[1:]:
        product = matrix @ product
    phi, sigma, vt = torch.linalg.svd(product)
    phi, sigma, v = phi.flip(1), sigma.flip(0), vt.mT.flip(1)  # ascending
    if float(sigma[0]) < 1e3 * len(sigma) * torch.finfo(sigma.dtype).eps * float(sigma[-1]):
        raise ValueError(
            f"the singular values span {float(sigma[-1] / sigma[0]):.1g}: the smallest are "
            "rounding; take fewer layers"
        )
    # A_L … A_1 backwards, then B_1 … B_L forwards beside them
    after = [phi]
    for matrix in matrices.flip(0)[:-1]:
        after.append(matrix.mT @ after[-1])
    b, kernel = v, torch.zeros_like(product)
    for matrix, a in zip(matrices, reversed(after), strict=True):
        a = a / sigma
        aa, bb = a.mT @ a, b.mT @ b
        mixed = torch.outer(aa.diagonal(), bb.diagonal())
        kernel += mixed + mixed.mT + 2 * aa * bb
        b = matrix @ b
    return Training(2 * sigma.log().cpu().numpy(), kernel.cpu().numpy())
