"""One layer I + εG at a time: what it does to the length and to the direction of a vector.

`Ensemble` is a law of G. `Increments` holds what is exact for Gaussian G: the moments of δ = log|(I
+ εG)u|, the law of a sum of them, and the mixing of the direction. `chain` follows vectors through
many layers. Singular values of whole products are in :mod:`grsd.renorm.theorems.products`. Source:
2512.18209, appendices A.3.2 to A.3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

from grsd import checks, statistics

__all__ = [
    "KINDS",
    "Chain",
    "Ensemble",
    "Increments",
    "Moments",
    "SumLaw",
    "chain",
    "moments",
    "step",
]

KINDS = ("ginibre", "symmetric", "antisymmetric", "rank_one")
DIRECTION = "a direction needs two or more dimensions"


def step(epsilon: float) -> float:
    """Return ε if it is a near-identity step, 0 < ε < 1; the paper asks for a small one."""
    return checks.between("epsilon", epsilon, 0, 1, "()", "a layer I + εG needs 0 < ε < 1")


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Ensemble:
    """A law of the matrix G (n, n), float64, n ≥ 2.

    Parameters
    ----------
    kind : str
        With B of independent N(0, 1/n) entries: ``ginibre`` B; ``symmetric`` (B + Bᵀ)/√2;
        ``antisymmetric`` (B − Bᵀ)/√2, whose layer keeps lengths to first order in ε; ``rank_one`` a
        bᵀ with independent uniform unit vectors, so that |G| = 1. Each law is the same in every
        orthonormal basis.
    mean : Tensor (n, n), optional
        Added to G. The law is then not the same in every basis, unless it is a multiple of I.
    """

    kind: str
    n: int
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        checks.one_of("ensemble", self.kind, KINDS)
        checks.at_least("n", self.n, 2, DIRECTION)
        if self.mean is not None:
            checks.shape("mean", self.mean, (self.n, self.n))

    @property
    def isotropic(self) -> bool:
        """Whether QGQᵀ has the law of G for every orthogonal Q."""
        if self.mean is None:
            return True
        eye = torch.eye(self.n, dtype=self.mean.dtype)
        return bool(torch.equal(self.mean, self.mean[0, 0] * eye))

    def matrices(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw G, (count, n, n), on the generator's device."""
        if self.kind == "rank_one":
            a, b = _unit(_normal((2, count, self.n), generator))
            drawn = a[:, :, None] * b[:, None, :]
        else:
            drawn = _normal((count, self.n, self.n), generator) / math.sqrt(self.n)
            if self.kind != "ginibre":
                sign = 1.0 if self.kind == "symmetric" else -1.0
                drawn = (drawn + sign * drawn.mT) / math.sqrt(2)
        return drawn if self.mean is None else drawn + self.mean.to(drawn)

    def act(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return G u, a G of its own per unit row of u (m, n), by the law of G u; O(mn)."""
        z = _normal(tuple(u.shape), generator)
        if self.kind == "rank_one":
            b = _normal(tuple(u.shape), generator)
            weight = (b * u).sum(-1, keepdim=True) / b.norm(dim=-1, keepdim=True)
            moved = _unit(z) * weight
        else:
            # uᵀGu has variance 1/n, 2/n, 0; the part across u is N(0, 1/n) in all three,
            # independent
            factor = {"ginibre": 0.0, "symmetric": math.sqrt(2) - 1, "antisymmetric": -1.0}
            along = factor[self.kind] * (z * u).sum(-1, keepdim=True) * u
            moved = (z + along) / math.sqrt(self.n)
        return moved if self.mean is None else moved + u @ self.mean.to(moved).mT


class Moments(NamedTuple):
    """Moments of δ from independent draws."""

    mean: float
    mean_error: float  # standard error
    variance: float
    variance_error: float  # standard error, from the fourth moment
    second: float  # E δ²
    third: float  # E|δ|³


def moments(draws: Tensor) -> Moments:
    """Return the moments of independent draws of δ, (m,), with standard errors."""
    x = np.asarray(draws.detach().cpu().numpy(), dtype=np.float64)
    error = float(statistics.standard_error(checks.shape("draws", x, ("m",))))
    mean, variance = float(x.mean()), float(x.var(ddof=1))
    fourth = float(((x - mean) ** 4).mean())
    variance_error = math.sqrt(max(fourth - variance**2, 0.0) / len(x))
    second, third = float((x**2).mean()), float((np.abs(x) ** 3).mean())
    return Moments(mean, error, variance, variance_error, second, third)


class SumLaw(NamedTuple):
    """The law of S_L = Σ(δ − E δ) for independent increments, on cells of equal width."""

    edges: np.ndarray  # (m,), right edges of the cells
    mass: np.ndarray  # (m,)
    sigma: float  # √(L Var δ)

    @property
    def kolmogorov(self) -> float:
        """sup |P(S_L/σ√L ≤ x) − Φ(x)|, the left side of the Berry–Esseen bound."""
        return float(np.abs(np.cumsum(self.mass) - stats.norm.cdf(self.edges / self.sigma)).max())

    def shift(self, tau: float) -> float:
        """Total variation between S_L and S_L + τ, to the rounding of τ to whole cells."""
        beside = np.zeros(round(abs(tau) / (self.edges[1] - self.edges[0])))
        moved = np.concatenate([self.mass, beside]) - np.concatenate([beside, self.mass])
        return float(0.5 * np.abs(moved).sum())


@dataclass(frozen=True)
class Increments:
    """What is exact for one layer I + εG with G of independent N(0, 1/n) entries, n ≥ 2, 0 < ε < 1.

    (n/ε²)|(I + εG)u|² is non-central χ² with n degrees of freedom and non-centrality n/ε², for
    every unit vector u.
    """

    n: int
    epsilon: float

    def __post_init__(self) -> None:
        checks.at_least("n", self.n, 2, DIRECTION)
        step(self.epsilon)

    @property
    def _kappa(self) -> float:
        return self.n / self.epsilon**2

    @cached_property
    def _mixture(self) -> tuple[np.ndarray, np.ndarray]:
        """K and its Poisson weights, as far as float64 sees them: X ~ χ² with n + 2K degrees."""
        low, high = stats.poisson.ppf([1e-17, 1 - 1e-16], self._kappa / 2)
        k = np.arange(max(low, 0), high + 1)
        w = stats.poisson.pmf(k, self._kappa / 2)
        return k, w / w.sum()

    @cached_property
    def exact(self) -> tuple[float, float]:
        """E δ and Var δ: δ = ½ log(ε²X/n), X ~ χ² with n + 2K degrees, K ~ Poisson(n/2ε²)."""
        k, w = self._mixture
        level = special.digamma(self.n / 2 + k)
        mean = float(w @ level)
        spread = float(w @ (special.polygamma(1, self.n / 2 + k) + (level - mean) ** 2))
        return 0.5 * (math.log(2 / self._kappa) + mean), 0.25 * spread

    @property
    def series(self) -> tuple[float, float]:
        """E δ = ε²(n−2)/2n − ε⁴(n−2)(n−4)/4n², Var δ = (ε²/n)(1 − ε²(3/2 − 4/n)), to O(ε⁶)."""
        n, e2 = self.n, self.epsilon**2
        mean = e2 * (n - 2) / (2 * n) - e2**2 * (n - 2) * (n - 4) / (4 * n * n)
        return mean, e2 / n * (1 - e2 * (1.5 - 4 / n))

    @property
    def skewness(self) -> float:
        """Of δ, to leading order: −3ε/√n."""
        return -3 * self.epsilon / math.sqrt(self.n)

    def edgeworth(self, layers: int) -> float:
        """First-order Kolmogorov distance of S_L/σ√L to the normal law: |skewness|/(6√(2πL))."""
        return abs(self.skewness) / (6 * math.sqrt(2 * math.pi * layers))

    def cdf(self, delta: np.ndarray) -> np.ndarray:
        """P(δ ≤ delta), by the mixture; `scipy.stats.ncx2` overflows far from the mean.

        Beyond the three bounds what is left is below 1e-20: √X is 1-Lipschitz in a Gaussian vector
        and at least √κ − |one Gaussian|, and P(X ≤ x) ≤ (x/2)^(n/2)/Γ(n/2 + 1).
        """
        delta = np.asarray(delta, dtype=np.float64)
        root, kappa = np.sqrt(self._kappa) * np.exp(np.minimum(delta, 300)), self._kappa
        low = max(math.sqrt(kappa) - 10, math.exp(-50 / self.n))
        inside = (root > low) & (root < math.sqrt(kappa + self.n) + 10)
        below = (root > low).astype(np.float64)
        k, w = self._mixture
        below[inside] = special.gammainc(self.n / 2 + k, root[inside, None] ** 2 / 2) @ w
        return below

    def total(self, layers: int, cells: int = 64) -> SumLaw:
        """The law of S_L by convolution, `cells` to a standard deviation of one δ; no sampling."""
        most = (2**22 // (10 * cells)) ** 2
        checks.between("layers", layers, 1, most)
        mean, var = self.exact
        dx, reach = math.sqrt(var) / cells, math.ceil(10 * math.sqrt(layers)) * cells
        edges = (np.arange(-reach - 1, reach + 1) + 0.5) * dx
        cdf = self.cdf(edges + mean)
        # cell j of the transform holds δ − E δ = j dx, negative ones at the end
        size = 2 ** math.ceil(math.log2(4 * reach))
        place = (np.arange(len(edges)) - reach - 1) % size
        one = np.zeros(size)
        one[place] = np.diff(cdf, prepend=0.0)
        mass = np.fft.irfft(np.fft.rfft(one) ** layers, size)
        return SumLaw(edges, mass[place].clip(min=0), math.sqrt(layers * var))

    # --- Direction

    def harmonic(self, degree: np.ndarray | int) -> np.ndarray:
        """a_k = E P_k(u₁·u₀), P_k Gegenbauer of the sphere, P_k(1) = 1; E P_k(u_L·u₀) = a_k^L.

        a_k = (κ/2)^(k/2) Γ((n+k)/2)/Γ(n/2+k) ₁F₁(k/2; n/2+k; −κ/2) = 1 − ε²k(k+n−2)/2n + O(ε⁴), κ =
        n/ε².
        """
        k, x = np.asarray(degree, dtype=np.float64), self._kappa / 2
        if x > 60:  # ₂F₀, asymptotic in 2/κ; its smallest term is below rounding here
            value, term = np.ones_like(k), np.ones_like(k)
            for j in range(40):
                term = term * (k / 2 + j) * (1 - (self.n + k) / 2 + j) / ((j + 1) * x)
                value = value + term
                if np.abs(term).max() < 1e-17:
                    return value
        log = k / 2 * math.log(x) + special.gammaln((self.n + k) / 2)
        log -= special.gammaln(self.n / 2 + k)
        return np.exp(log) * special.hyp1f1(k / 2, self.n / 2 + k, -x)

    def overlap(self, layers: int) -> float:
        """E u_L·u₀ = a₁^L, about exp(−t(1 − 1/n)/2) with t = ε²L."""
        return float(self.harmonic(1) ** layers)

    def mixing(self, layers: int, points: int = 4001) -> float:
        """Total variation between the law of u_L, given u₀, and the uniform one, for n ≥ 3.

        About √n e^(−t/2)/√(2π) once that is small. The law of u_L has the density Σ_k d_k a_k^L
        P_k(u_L·u₀) on the sphere, d_k the number of harmonics of degree k. After so few layers that
        n a₁^(2L) > 16 the sum loses its digits and is refused; the distance is above 0.9 there.
        """
        n = self.n
        checks.at_least("n", n, 3, "the expansion in harmonics of the sphere needs n ≥ 3")
        mass = n * self.overlap(layers) ** 2
        checks.between("n a₁^(2L)", mass, 0, 16, why="too far from mixed to sum (needs ≤ 16)")
        # angles on the sphere, with the uniform law's weight
        theta = (np.arange(points) + 0.5) * np.pi / points
        x, weight = np.cos(theta), np.exp((n - 2) * np.log(np.sin(theta)))
        weight /= weight.sum()
        # d_k a_k^L
        k = np.arange(1, 400)
        log_dim = np.log(2 * k + n - 2) + special.gammaln(k + n - 2)
        log_dim = log_dim - special.gammaln(k + 1) - special.gammaln(n - 1)
        with np.errstate(divide="ignore"):
            amplitude = np.exp(log_dim + layers * np.log(np.abs(self.harmonic(k))))
        # P_k by its recurrence, until the terms are rounding
        below, here, change = np.ones_like(x), x.copy(), np.zeros_like(x)
        for i, size in enumerate(amplitude, start=1):
            change += size * here
            below, here = here, ((2 * i + n - 2) * x * here - i * below) / (i + n - 2)
            if i > 8 and size * np.abs(here * weight).sum() < 1e-14:
                break
        return 0.5 * float(np.abs(change * weight).sum())

    def mixing_time(self, eta: float) -> float:
        """t = ε²L at which `mixing` falls to η < 0.9; about log n + 2 log(1/η) − log 2π."""
        checks.between("eta", eta, 0, 0.9, "()")
        # bisection between the first layer that can be summed and one that is surely mixed
        low = max(math.ceil(math.log(16 / self.n) / (2 * math.log(self.overlap(1)))), 1)
        high = math.ceil(4 * (math.log(self.n) + 2 * math.log(1 / eta) + 4) / self.epsilon**2)
        if self.mixing(low) <= eta:
            return low * self.epsilon**2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.mixing(middle) <= eta else (middle, high)
        return high * self.epsilon**2


class Chain(NamedTuple):
    """Directions and growth along the layers, at the recorded ones."""

    directions: Tensor  # (r, m, n), u_ℓ
    growth: Tensor  # (r, m), Σ δ up to ℓ
    last: Tensor  # (r, m), δ_ℓ


def chain(
    ensemble: Ensemble,
    epsilon: float,
    starts: Tensor,
    record: Sequence[int],
    generator: torch.Generator,
) -> Chain:
    """Follow m vectors, each through layers of its own, and keep the state at those in `record`.

    `starts` are u₀, (m, n), rows of length 1; `record` ascends from 1 on. Cost: O(mn) per layer.
    Source: 2512.18209, A.3.2.
    """
    step(epsilon)
    checks.shape("starts", starts, ("m", ensemble.n))
    off = (starts.norm(dim=1) - 1).abs()
    checks.between("length of a start less 1", off, 0, 1e-12, why="the rows must have length 1")
    checks.at_least("record", checks.ascending("record", record, 1), 1)
    u, growth = starts, torch.zeros(len(starts), dtype=starts.dtype, device=starts.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in range(1, record[-1] + 1):
        moved = u + epsilon * ensemble.act(u, generator)
        length = moved.norm(dim=1)
        u, delta = moved / length[:, None], length.log()
        growth = growth + delta
        if layer in record:
            kept.append((u, growth, delta))
    return Chain(*(torch.stack(part) for part in zip(*kept, strict=True)))
