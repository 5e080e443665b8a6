"""One layer I + εG at a time: what it does to the length and to the direction of a vector, in closed form where there is one.

`Ensemble` is a law of G. `Increments` holds what is exact for Gaussian G: the moments of δ = log|(I + εG)u|, the law of a sum of
them, and the mixing of the direction. `chain` follows vectors through many layers. Singular values of whole products are in
:mod:`grsd.renorm.theorems.products`. Source: 2512.18209, appendices A.3.2 to A.3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import integrate, special, stats
from torch import Tensor

__all__ = [
    "KINDS",
    "Chain",
    "Ensemble",
    "Increments",
    "Moments",
    "SumLaw",
    "chain",
    "drift_overlap",
    "flatness_depth",
    "long_run_ratio",
    "moments",
    "step",
]

KINDS = ("ginibre", "symmetric", "antisymmetric", "rank_one")


def step(epsilon: float) -> float:
    """Return ε if it is a near-identity step, 0 < ε < 1; the paper asks for 0 < ε ≤ ε₀ with ε₀ small."""
    if not (math.isfinite(epsilon) and 0 < epsilon < 1):
        raise ValueError(f"epsilon is {epsilon}; a near-identity layer I + εG needs 0 < ε < 1")
    return float(epsilon)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Ensemble:
    """A law of the matrix G (n, n), float64.

    Parameters
    ----------
    kind : str
        With B of independent N(0, 1/n) entries: ``ginibre`` B; ``symmetric`` (B + Bᵀ)/√2; ``antisymmetric`` (B − Bᵀ)/√2, whose
        layer keeps lengths to first order in ε; ``rank_one`` a bᵀ with independent uniform unit vectors, so that |G| = 1. Each
        law is the same in every orthonormal basis.
    n : int
        Width, 2 or more.
    mean : Tensor (n, n), optional
        Added to G. The law is then not the same in every basis, unless it is a multiple of I.
    """

    kind: str
    n: int
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown ensemble {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.n < 2:
            raise ValueError(f"n is {self.n}; a direction needs two or more dimensions")
        if self.mean is not None and self.mean.shape != (self.n, self.n):
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)}; expected {(self.n, self.n)}"
            )

    @property
    def isotropic(self) -> bool:
        """Whether QGQᵀ has the law of G for every orthogonal Q."""
        if self.mean is None:
            return True
        return bool(
            torch.equal(self.mean, self.mean[0, 0] * torch.eye(self.n, dtype=self.mean.dtype))
        )

    def matrices(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw G, (count, n, n), on the generator's device."""
        if self.kind == "rank_one":
            a, b = _normal((2, count, self.n), generator)
            found = (a / a.norm(dim=-1, keepdim=True))[:, :, None] * (
                b / b.norm(dim=-1, keepdim=True)
            )[:, None, :]
        else:
            found = _normal((count, self.n, self.n), generator) / math.sqrt(self.n)
            if self.kind != "ginibre":
                sign = 1.0 if self.kind == "symmetric" else -1.0
                found = (found + sign * found.mT) / math.sqrt(2)
        shifted: Tensor = found if self.mean is None else found + self.mean.to(found)
        return shifted

    def act(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return G u for a G of its own per row of u (m, n), unit rows; O(mn), by the law of G u instead of G."""
        z = _normal(tuple(u.shape), generator)
        if self.kind == "rank_one":
            b = _normal(tuple(u.shape), generator)
            weight = (b * u).sum(-1, keepdim=True) / b.norm(dim=-1, keepdim=True)
            found = z / z.norm(dim=-1, keepdim=True) * weight
        else:
            # uᵀGu has variance 1/n, 2/n, 0; the part across u is N(0, 1/n) in all three and independent of it
            along = {"ginibre": 0.0, "symmetric": math.sqrt(2) - 1, "antisymmetric": -1.0}[
                self.kind
            ]
            found = (z + along * (z * u).sum(-1, keepdim=True) * u) / math.sqrt(self.n)
        moved: Tensor = found if self.mean is None else found + u @ self.mean.to(found).mT
        return moved


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
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"draws have shape {x.shape}; expected (m,) with m ≥ 2")
    c = x - x.mean()
    var, fourth = float(c @ c) / (len(x) - 1), float((c**4).mean())
    error = math.sqrt(max(fourth - var**2, 0.0) / len(x))
    return Moments(
        float(x.mean()),
        math.sqrt(var / len(x)),
        var,
        error,
        float((x**2).mean()),
        float((np.abs(x) ** 3).mean()),
    )


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
        cells = round(abs(tau) / (self.edges[1] - self.edges[0]))
        padded = np.concatenate([self.mass, np.zeros(cells)])
        return float(0.5 * np.abs(padded - np.concatenate([np.zeros(cells), self.mass])).sum())


@dataclass(frozen=True)
class Increments:
    """What is exact for one layer I + εG with G of independent N(0, 1/n) entries.

    (n/ε²)|(I + εG)u|² is non-central χ² with n degrees of freedom and non-centrality n/ε², for every unit vector u.

    Parameters
    ----------
    n : int
        Width.
    epsilon : float
        ε in (0, 1).
    """

    n: int
    epsilon: float

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n is {self.n}; a direction needs two or more dimensions")
        step(self.epsilon)

    @property
    def _kappa(self) -> float:
        return self.n / self.epsilon**2

    @cached_property
    def exact(self) -> tuple[float, float]:
        """E δ and Var δ: δ = ½ log(ε²X/n), and X is χ² with n + 2K degrees, K Poisson with mean n/2ε²."""
        half = self._kappa / 2
        low, high = stats.poisson.ppf([1e-17, 1 - 1e-16], half)
        k = np.arange(max(low, 0), high + 1)
        w = stats.poisson.pmf(k, half)
        w /= w.sum()
        level = special.digamma(self.n / 2 + k)
        mean = float(w @ level)
        spread = float(w @ (special.polygamma(1, self.n / 2 + k) + (level - mean) ** 2))
        return 0.5 * (math.log(2 / self._kappa) + mean), 0.25 * spread

    @property
    def series(self) -> tuple[float, float]:
        """E δ = ε²(n−2)/2n − ε⁴(n−2)(n−4)/4n² + O(ε⁶) and Var δ = (ε²/n)(1 − ε²(3/2 − 4/n)) + O(ε⁶)."""
        n, e2 = self.n, self.epsilon**2
        return e2 * (n - 2) / (2 * n) - e2**2 * (n - 2) * (n - 4) / (4 * n * n), e2 / n * (
            1 - e2 * (1.5 - 4 / n)
        )

    @property
    def skewness(self) -> float:
        """Of δ, to leading order: −3ε/√n."""
        return -3 * self.epsilon / math.sqrt(self.n)

    def edgeworth(self, layers: int) -> float:
        """First-order Kolmogorov distance of S_L/σ√L to the normal law: |skewness|/(6√(2πL))."""
        return abs(self.skewness) / (6 * math.sqrt(2 * math.pi * layers))

    def total(self, layers: int, cells: int = 64) -> SumLaw:
        """The law of S_L by convolution, with `cells` cells per standard deviation of one δ; no sampling."""
        mean, var = self.exact
        dx, reach = math.sqrt(var) / cells, math.ceil(10 * math.sqrt(layers)) * cells
        if layers < 1 or reach > 2**22:
            raise ValueError(f"layers is {layers}; expected 1 to {(2**22 // (10 * cells)) ** 2}")
        edges = (np.arange(-reach - 1, reach + 1) + 0.5) * dx
        cdf = stats.ncx2.cdf(self._kappa * np.exp(2 * (edges + mean)), self.n, self._kappa)
        one = np.diff(cdf, prepend=0.0)
        size = 2 ** math.ceil(math.log2(4 * reach))
        shifted = np.zeros(size)
        shifted[(np.arange(len(one)) - reach - 1) % size] = one  # cell j holds δ − E δ = j dx
        mass = np.fft.irfft(np.fft.rfft(shifted) ** layers, size)
        return SumLaw(
            edges,
            mass[(np.arange(len(one)) - reach - 1) % size].clip(min=0),
            math.sqrt(layers * var),
        )

    # --- Direction ----------------------------------------------------------------------------------------------------

    def harmonic(self, degree: np.ndarray | int) -> np.ndarray:
        """a_k = E P_k(u₁·u₀) with P_k(1) = 1 the Gegenbauer polynomial of the sphere; E P_k(u_L·u₀) = a_k^L exactly.

        a_k = (κ/2)^(k/2) Γ((n+k)/2)/Γ(n/2+k) ₁F₁(k/2; n/2+k; −κ/2) = 1 − ε²k(k+n−2)/2n + O(ε⁴), κ = n/ε².
        """
        k, x = np.asarray(degree, dtype=np.float64), self._kappa / 2
        if x > 60:  # ₂F₀, asymptotic in 2/κ; its smallest term is below rounding here
            found, term = np.ones_like(k), np.ones_like(k)
            for j in range(40):
                term = term * (k / 2 + j) * (1 - (self.n + k) / 2 + j) / ((j + 1) * x)
                found = found + term
                if np.abs(term).max() < 1e-17:
                    return found
        log = (
            k / 2 * math.log(x)
            + special.gammaln((self.n + k) / 2)
            - special.gammaln(self.n / 2 + k)
        )
        value: np.ndarray = np.exp(log) * special.hyp1f1(k / 2, self.n / 2 + k, -x)
        return value

    def overlap(self, layers: int) -> float:
        """E u_L·u₀ = a₁^L, about exp(−t(1 − 1/n)/2) with t = ε²L."""
        return float(self.harmonic(1) ** layers)

    def mixing(self, layers: int, points: int = 4001) -> float:
        """Total variation between the law of u_L, given u₀, and the uniform one; about √n e^(−t/2)/√(2π) once that is small.

        The law of u_L has the density Σ_k d_k a_k^L P_k(u_L·u₀) on the sphere, d_k the number of harmonics of degree k.

        Raises
        ------
        ValueError
            n < 3, or so few layers that the sum over harmonics loses its digits (n a₁^(2L) > 16; the distance is above 0.9 there).
        """
        n = self.n
        if n < 3:
            raise ValueError(f"n is {n}; the expansion in harmonics of the sphere needs n ≥ 3")
        if (mass := n * self.overlap(layers) ** 2) > 16:
            raise ValueError(
                f"n a₁^(2L) is {mass:.3g} after {layers} layers: too far from mixed to sum (needs ≤ 16)"
            )
        theta = (np.arange(points) + 0.5) * np.pi / points
        x, weight = np.cos(theta), np.exp((n - 2) * np.log(np.sin(theta)))
        weight /= weight.sum()
        k = np.arange(1, 400)
        log_dim = (
            np.log(2 * k + n - 2)
            + special.gammaln(k + n - 2)
            - special.gammaln(k + 1)
            - special.gammaln(n - 1)
        )
        with np.errstate(divide="ignore"):
            amplitude = np.exp(log_dim + layers * np.log(np.abs(self.harmonic(k))))
        below, here, change = np.ones_like(x), x.copy(), np.zeros_like(x)
        for i, size in enumerate(amplitude, start=1):
            change += size * here
            below, here = here, ((2 * i + n - 2) * x * here - i * below) / (i + n - 2)
            if i > 8 and size * np.abs(here * weight).sum() < 1e-14:
                break
        return 0.5 * float(np.abs(change * weight).sum())

    def mixing_time(self, eta: float) -> float:
        """t = ε²L at which `mixing` falls to η < 0.9; for small η about log n + 2 log(1/η) − log 2π."""
        if not 0 < eta < 0.9:
            raise ValueError(f"eta is {eta}; expected 0 < eta < 0.9")
        low = max(math.ceil(math.log(16 / self.n) / (2 * math.log(self.overlap(1)))), 1)
        high = math.ceil(4 * (math.log(self.n) + 2 * math.log(1 / eta) + 4) / self.epsilon**2)
        if self.mixing(low) <= eta:
            return low * self.epsilon**2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.mixing(middle) <= eta else (middle, high)
        return high * self.epsilon**2


def flatness_depth(tau: float, sigma: float, eta: float) -> float:
    """Layers after which a normal S_L and S_L + τ are η apart in total variation, for small η: τ²/(2πσ²η²).

    The exact distance is 2Φ(|τ|/2σ√L) − 1. For Gaussian G, σ² = ε²/n, so that L = nτ²/(2πε²η²).
    """
    if not (sigma > 0 and 0 < eta < 1):
        raise ValueError(f"sigma is {sigma} and eta {eta}; expected sigma > 0 and 0 < eta < 1")
    return tau**2 / (2 * math.pi * sigma**2 * eta**2)


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
    """Follow m vectors, each through layers of its own, and keep what is asked for.

    Parameters
    ----------
    starts : Tensor (m, n)
        u₀, rows of length 1.
    record : sequence of int
        Layers at which to keep the state, ascending.

    Notes
    -----
    Cost: O(mn) per layer. Source: 2512.18209, A.3.2.
    """
    step(epsilon)
    if starts.ndim != 2 or starts.shape[1] != ensemble.n:
        raise ValueError(f"starts have shape {tuple(starts.shape)}; expected (m, {ensemble.n})")
    if not torch.allclose(
        starts.norm(dim=1), torch.ones(len(starts), dtype=starts.dtype), atol=1e-12
    ):
        raise ValueError("the rows of starts must have length 1")
    layers = list(record)
    if not layers or layers != sorted(set(layers)) or layers[0] < 1:
        raise ValueError(f"record is {layers}; expected ascending layers from 1 on")
    u, growth = starts, torch.zeros(len(starts), dtype=starts.dtype, device=starts.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in range(1, layers[-1] + 1):
        moved = u + epsilon * ensemble.act(u, generator)
        length = moved.norm(dim=1)
        u, delta = moved / length[:, None], length.log()
        growth = growth + delta
        if layer in layers:
            kept.append((u, growth, delta))
    return Chain(*(torch.stack(part) for part in zip(*kept, strict=True)))


# --- A mean of order ε, in the limit ε → 0 at fixed t = ε²L ----------------------------------------------------------------


def drift_overlap(n: int, strength: float) -> float:
    """E u₁² in the invariant law of the direction for E G = ε c e₁e₁ᵀ, Gaussian fluctuations of variance 1/n.

    The direction is a Brownian motion on the sphere at rate 1/n in the potential −½c u₁², with invariant density exp(n c u₁²);
    E u₁² = (1/n) ₁F₁(3/2; n/2+1; nc)/₁F₁(1/2; n/2; nc). At large n it is 0 for c < 1/2 and 1 − 1/2c above.
    """
    ratio = special.hyp1f1(1.5, n / 2 + 1, n * strength) / special.hyp1f1(0.5, n / 2, n * strength)
    return float(ratio) / n


def long_run_ratio(strength: float) -> float:
    """Long-run over marginal variance of δ for n = 2, E G = ε b diag(1, −1), Gaussian fluctuations of variance 1/2.

    The angle obeys dφ = −b sin 2φ dt + dW/√2 and the growth b cos 2φ dt + dW′/√2, so that the ratio is 1 + E h′² with
    ¼h″ − b sin 2φ h′ = −(b cos 2φ − mean): one plus the share of the variance that the direction's memory adds.
    """

    def density(phi: float) -> float:
        return math.exp(2 * strength * (math.cos(2 * phi) - 1))

    def quadrature(f: Callable[[float], float], to: float = math.pi / 2) -> float:
        return float(integrate.quad(f, 0, to, epsabs=1e-12)[0])

    mass = quadrature(density)
    mean = quadrature(lambda p: strength * math.cos(2 * p) * density(p)) / mass

    def slope(phi: float) -> float:  # h′, which vanishes at 0 and π/2 by symmetry
        return (
            -4
            * quadrature(lambda p: (strength * math.cos(2 * p) - mean) * density(p), phi)
            / density(phi)
        )

    return 1 + quadrature(lambda p: slope(p) ** 2 * density(p)) / mass
