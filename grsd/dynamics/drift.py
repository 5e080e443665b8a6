"""How fast error energy moves along the λ axis of a network: velocity v(λ, t) and its two parts.

Energy crosses an edge of the λ axis in two ways. An eigenvalue carries its own energy with it
(advective), and eigenvectors turn, which moves energy between eigenvalues (Kato). `edge_flux`
measures both at one instant; `Drift` holds them along a path and reduces them to c = t v/λ, which
is a constant in the continuum of `grsd.dynamics.transport`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from grsd import checks
from grsd.dynamics.modes import Modes

__all__ = ["Drift", "EdgeFlux", "PowerLaw", "constant_drift_loss", "edge_flux"]

Part = Literal["advective", "kato", "total"]
ORDERS = (1, 2, 4, 8, math.inf)
TINY = np.finfo(float).tiny


class EdgeFlux(NamedTuple):
    """Energy near each edge, and energy that crosses it upwards per unit time."""

    energy: np.ndarray  # h, energy per unit of log λ: ½ Σ λ χ'(λ) g²
    advective: np.ndarray  # ½ Σ χ'(λ) λ̇ g²
    kato: np.ndarray  # ½ Σ_{u≠v} χ[λ_u, λ_v] ⟨φ_u, Ṁ φ_v⟩ g_u g_v


class PowerLaw(NamedTuple):
    """|v| ∝ λ^a t^b over the selected cells, the R² of log |v|, and their share of the weight."""

    a: float
    b: float
    r2: float
    selected: float


def edge_flux(at: Modes, edges: Sequence[float] | np.ndarray, order: float = 1) -> EdgeFlux:
    """Return the advective and the Kato flux of energy through edges (A,) > 0, upwards positive.

    The edge at a is the smooth step χ_a(λ) = λ^k/(λ^k + a^k) of order k, which falls from 0.85 to
    0.15 within a factor 31^{1/k}. Energy above it is E = ½⟨e, χ_a(M)e⟩, and by Daleckii and Krein

      dE/dt = −Σ χ_a λ g² + ½ Σ_u χ_a'(λ_u) λ̇_u g_u² + ½ Σ_{u≠v} χ_a[λ_u, λ_v] ⟨φ_u, Ṁ φ_v⟩ g_u g_v

    with the divided difference χ[λ, μ] = (χ(λ) − χ(μ))/(λ − μ), which needs no gap: dissipation,
    advective flux, Kato flux. For k = 1 the fluxes add up to ½ a ⟨r, Ṁ r⟩ with r = (M + a)^{-1} e.

    Parameters
    ----------
    order : 1, 2, 4, 8 or inf
        `inf` is a sharp edge. Its Kato flux is Σ_{λ_u ≥ a > λ_v} g_u g_v ⟨φ_u, Ṁ φ_v⟩/(λ_u − λ_v),
        which grows without bound where two eigenvalues approach each other; its advective flux is a
        sum of pulses in time, so the mean of λ̇/λ over the octave around the edge is given instead.

    Notes
    -----
    Cost: one product of size A × n × n. Source: chapter "From lazy to rich"; orders above 1 follow
    from (λ^k − μ^k)/(λ − μ) = Π_j (λ^{2^j} + μ^{2^j}) for k a power of two.
    """
    a = np.atleast_1d(np.asarray(edges, dtype=np.float64))
    checks.positive("edges", checks.shape("edges", a, ("A",)), "edges must be positive numbers")
    if checks.one_of("order", order, ORDERS) == math.inf:
        return _sharp_flux(at, a)
    k = int(order)
    lam, g = np.maximum(at.eigenvalues, 0.0)[:, None], at.coefficients[:, None]
    # (λ^k − μ^k)/(λ − μ) ⟨φ_u, Ṁ φ_v⟩, which all edges share
    shared = at.matrix.copy()
    for j in range(int(math.log2(k))):
        power = at.eigenvalues.clip(min=0.0) ** (2**j)
        shared *= power[:, None] + power[None, :]
    # χ_a[λ, μ] is that, times 1 − χ at both eigenvalues, over a^k
    below = 1 / (1 + (lam / a) ** k)  # 1 − χ
    half = g * below * a ** (-k / 2)
    whole = 0.5 * np.einsum("ua,ua->a", half, shared @ half)
    advective = 0.5 * np.einsum("ua,u->a", half**2, np.diagonal(shared))
    energy = 0.5 * k * (g**2 * (1 - below) * below).sum(axis=0)
    return EdgeFlux(energy, advective, whole - advective)


def _sharp_flux(at: Modes, a: np.ndarray) -> EdgeFlux:
    lam, g = at.eigenvalues, at.coefficients
    # advection over the octave around each edge; modes of the kernel do not move
    inside = (lam[:, None] >= a / math.sqrt(2)) & (lam[:, None] < a * math.sqrt(2))
    half_square = 0.5 * g**2
    energy = half_square @ inside / math.log(2)
    rate = half_square * at.rates / np.where(lam > at.floor, lam, np.inf)
    # Kato flux from every mode below to every one above
    gaps = lam[:, None] - lam[None, :]
    exchange = g[:, None] * g * at.matrix / np.where(np.abs(gaps) > at.floor, gaps, np.inf)
    above = (lam[:, None] >= a).astype(np.float64)
    kato = np.einsum("ua,ua->a", above, exchange @ (1 - above))
    return EdgeFlux(energy, rate @ inside / math.log(2), kato)


@dataclass(frozen=True)
class Drift:
    """Energy and fluxes, as in `EdgeFlux`, on a grid of times (K,) and edges (A,) along one path.

    Methods that average do so over the times from `after` on.
    """

    times: np.ndarray
    edges: np.ndarray
    energy: np.ndarray  # (K, A), as are the fluxes
    advective: np.ndarray
    kato: np.ndarray

    def __post_init__(self) -> None:
        size, why = (len(self.times), len(self.edges)), "expected (times, edges)"
        for name in ("energy", "advective", "kato"):
            checks.shape(name, getattr(self, name), size, f"{why} = {size}")

    @classmethod
    def of(
        cls, instants: Sequence[Modes], times: np.ndarray, edges: np.ndarray, order: float = 1
    ) -> Drift:
        """Measure `edge_flux` at every instant."""
        rows = zip(*(edge_flux(at, edges, order) for at in instants), strict=True)
        fields = (np.stack(part) for part in rows)
        return cls(np.asarray(times, float), np.asarray(edges, float), *fields)

    def flux(self, part: Part = "total") -> np.ndarray:
        """Return the upward flux of energy, (K, A)."""
        checks.one_of("part", part, get_args(Part))
        return self.advective + self.kato if part == "total" else np.asarray(getattr(self, part))

    def c(self, part: Part = "total") -> np.ndarray:
        """Return c = t v/λ = t · flux/h, (K, A), 0 where there is no energy.

        The flow v = c₀λ/t of every mode gives c₀.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            c = self.times[:, None] * self.flux(part) / self.energy
        return np.where(self.energy > 0, c, 0.0)

    def regime(self, part: Part = "total") -> np.ndarray:
        """Return |v|/2λ², (K, A): transport against dissipation, free of the unit of time."""
        return np.abs(self.c(part)) / (2 * self.edges * self.times[:, None])

    def weights(self, after: float = 0.0) -> np.ndarray:
        """Return the share of energy at each edge, (K, A), all times alike; sums to 1."""
        inside = self.times >= after * (1 - 1e-9)  # a grid in log t rounds
        if not inside.any():
            raise ValueError(f"no time lies in [{after}, ∞): they end at {self.times[-1]:.3g}")
        total = self.energy.sum(axis=1, keepdims=True)
        share = np.where(inside[:, None], self.energy / np.where(total > 0, total, 1.0), 0.0)
        return share / share.sum()

    def summary(self, part: Part = "total", after: float = 0.0) -> dict[str, float]:
        """Return weighted mean and spread (standard deviation) of c, and the weight of c < 0."""
        w, c = self.weights(after), self.c(part)
        mean = float((w * c).sum())
        spread = math.sqrt(max(float((w * (c - mean) ** 2).sum()), 0.0))
        return {"mean": mean, "spread": spread, "negative": float(w[c < 0].sum())}

    def correlation(self, after: float = 0.0) -> float:
        """Return the weighted correlation of the two parts of c; −1 when they cancel."""
        w, a, b = self.weights(after), self.c("advective"), self.c("kato")
        a, b = a - (w * a).sum(), b - (w * b).sum()
        scale = math.sqrt(float((w * a * a).sum()) * float((w * b * b).sum()))
        return float((w * a * b).sum()) / scale if scale > 0 else 0.0

    def power_law(self, part: Part = "advective", after: float = 0.0) -> PowerLaw:
        """Fit log |v| = a log λ + b log t + const. over cells with v > 0.

        The cells hold at least a thousandth of their time's energy; six or more are needed. Cells
        with v ≤ 0 cannot enter; `selected` says how much of the weight was left in.
        """
        w, v = self.weights(after), self.c(part) * self.edges / self.times[:, None]
        share = self.energy / np.maximum(self.energy.sum(axis=1, keepdims=True), TINY)
        chosen = (w > 0) & (share >= 1e-3) & (v > 0)
        if (cells := int(chosen.sum())) < 6:
            raise ValueError(f"only {cells} cells have v > 0 and energy; widen the window")
        # least squares in log λ, log t and a constant
        t, lam = np.meshgrid(np.log(self.times), np.log(self.edges), indexing="ij")
        design = np.stack([lam[chosen], t[chosen], np.ones(cells)], axis=1)
        goal = np.log(v[chosen])
        solution = np.linalg.lstsq(design, goal, rcond=None)[0]
        rest = goal - design @ solution
        r2 = 1 - float(rest @ rest) / max(float(((goal - goal.mean()) ** 2).sum()), TINY)
        return PowerLaw(float(solution[0]), float(solution[1]), r2, float(w[chosen].sum()))


def constant_drift_loss(
    eigenvalues: np.ndarray, energies: np.ndarray, c0: float, start: float, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss for v = c₀λ/t and energies measured at `start`: (corrected, printed).

    Corrected: Σ E_u exp(−K u) with K = (2t₀/(1+c₀))((t/t₀)^{1+c₀} − 1). Printed: equation (13) of
    2512.10427 over λ, (t/t₀)^{c₀} Σ E_u exp(−2u t₀ (t/t₀)^{1+c₀}/(1+c₀)). Both need c₀ > −1.
    """
    u, energy, t = (np.asarray(x, dtype=np.float64) for x in (eigenvalues, energies, times))
    checks.between("c0", c0, -1, np.inf, "()", "this form of the solution needs c0 > −1")
    checks.positive("start", start)
    checks.at_least("times", t, start, f"start = {start} must be no later than the times")
    grown = (t / start) ** (1 + c0)
    factor = 2 * start / (1 + c0)
    corrected = np.exp(-factor * np.outer(grown - 1, u)) @ energy
    printed = (t / start) ** c0 * (np.exp(-factor * np.outer(grown, u)) @ energy)
    return corrected, printed
