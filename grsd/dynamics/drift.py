"""How fast error energy moves along the λ axis of a network: velocity v(λ, t), its two parts, and what bounds it.

Energy crosses an edge of the λ axis in two ways. An eigenvalue carries its own energy with it (advective), and
eigenvectors turn, which moves energy between eigenvalues (Kato). `edge_flux` measures both at one instant; `Drift` holds
them along a path and reduces them to c = t v/λ. The balance of shells, which needs the same fluxes, is in
`grsd.dynamics.balance`; the continuum in which c is a constant is in `grsd.dynamics.transport`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from grsd.dynamics.modes import Modes

__all__ = [
    "Drift",
    "EdgeFlux",
    "Interval",
    "PowerLaw",
    "constant_drift_loss",
    "edge_flux",
    "interval",
    "realizability",
    "trend",
]

Part = Literal["advective", "kato", "total"]
ORDERS = (1, 2, 4, 8, math.inf)


class EdgeFlux(NamedTuple):
    """Energy near each edge, and energy that crosses it upwards per unit time; one entry per edge."""

    energy: np.ndarray  # h, energy per unit of log λ: ½ Σ λ χ'(λ) g²
    advective: np.ndarray  # ½ Σ χ'(λ) λ̇ g²
    kato: np.ndarray  # ½ Σ_{u≠v} χ[λ_u, λ_v] ⟨φ_u, Ṁ φ_v⟩ g_u g_v


class Interval(NamedTuple):
    """A mean or a slope with its 95 % interval (Student's t), and the standard deviation of one sample."""

    mean: float
    low: float
    high: float
    sd: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class PowerLaw(NamedTuple):
    """|v| ∝ λ^a t^b over the selected cells: exponents, R² of log |v|, and the share of the weight that was selected."""

    a: float
    b: float
    r2: float
    selected: float


def edge_flux(found: Modes, edges: Sequence[float] | np.ndarray, order: float = 1) -> EdgeFlux:
    """Return the advective and the Kato flux of energy through edges of the λ axis at one instant, upwards positive.

    The edge at a is the smooth step χ_a(λ) = λ^k/(λ^k + a^k) of order k, a logistic function of log λ that falls from 0.85 to
    0.15 within a factor 31^{1/k}. Energy above it is E = ½⟨e, χ_a(M)e⟩, and by Daleckii and Krein

        dE/dt = −Σ χ_a λ g² + ½ Σ_u χ_a'(λ_u) λ̇_u g_u² + ½ Σ_{u≠v} χ_a[λ_u, λ_v] ⟨φ_u, Ṁ φ_v⟩ g_u g_v ,

    with the divided difference χ[λ, μ] = (χ(λ) − χ(μ))/(λ − μ), which needs no gap between eigenvalues. The second term is
    the advective flux, the third the Kato flux. For k = 1 their sum is ½ a ⟨r, Ṁ r⟩ with r = (M + a)^{-1} e.

    Parameters
    ----------
    found : Modes
    edges : (A,)
        Positive numbers, in units of λ.
    order : 1, 2, 4, 8 or inf
        `inf` is a sharp edge. Its Kato flux is Σ_{λ_u ≥ a > λ_v} g_u g_v ⟨φ_u, Ṁ φ_v⟩/(λ_u − λ_v), which grows without bound
        where two eigenvalues approach each other; its advective flux is a sum of pulses in time, so the mean of λ̇/λ over
        the octave around the edge is given instead.

    Returns
    -------
    EdgeFlux
        In units of energy, and of energy per time.

    Raises
    ------
    ValueError
        Edges that are not positive, or an order that is not one of those.

    Notes
    -----
    Cost: one product of size A × n × n. Source: chapter "From lazy to rich"; orders above 1 follow from
    (λ^k − μ^k)/(λ − μ) = Π_j (λ^{2^j} + μ^{2^j}) for k a power of two.
    """
    a = np.atleast_1d(np.asarray(edges, dtype=np.float64))
    if a.ndim != 1 or not np.all(np.isfinite(a) & (a > 0)):
        raise ValueError(f"edges must be positive numbers, got {a!r}")
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {', '.join(map(str, ORDERS))}")
    lam = np.maximum(found.eigenvalues, 0.0)[:, None]
    g = found.coefficients[:, None]
    if order == math.inf:
        return _sharp_flux(found, a)
    k = int(order)
    shared = found.matrix.copy()
    for j in range(int(math.log2(k))):
        power = found.eigenvalues.clip(min=0.0) ** (2**j)
        shared *= power[:, None] + power[None, :]
    below = 1 / (1 + (lam / a) ** k)  # 1 − χ
    half = g * below * a ** (-k / 2)
    whole = 0.5 * np.einsum("ua,ua->a", half, shared @ half)
    advective = 0.5 * np.einsum("ua,u->a", half**2, np.diagonal(shared))
    energy = 0.5 * k * (g**2 * (1 - below) * below).sum(axis=0)
    return EdgeFlux(energy, advective, whole - advective)


def _sharp_flux(found: Modes, a: np.ndarray) -> EdgeFlux:
    lam, half_square = found.eigenvalues, 0.5 * found.coefficients**2
    inside = (lam[:, None] >= a / math.sqrt(2)) & (lam[:, None] < a * math.sqrt(2))
    energy = half_square @ inside / math.log(2)
    rate = half_square * found.rates / np.where(lam > found.floor, lam, np.inf)
    gaps = lam[:, None] - lam[None, :]
    far = np.abs(gaps) > found.floor
    exchange = (
        found.coefficients[:, None]
        * found.coefficients
        * found.matrix
        / np.where(far, gaps, np.inf)
    )
    above = (lam[:, None] >= a).astype(np.float64)
    kato = np.einsum("ua,ua->a", above, exchange @ (1 - above))
    return EdgeFlux(energy, rate @ inside / math.log(2), kato)


@dataclass(frozen=True)
class Drift:
    """Energy and fluxes on a grid of times and edges along one path.

    Attributes
    ----------
    times : (K,), edges : (A,)
    energy, advective, kato : (K, A)
        As in `EdgeFlux`.
    """

    times: np.ndarray
    edges: np.ndarray
    energy: np.ndarray
    advective: np.ndarray
    kato: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.times), len(self.edges))
        for name in ("energy", "advective", "kato"):
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, expected (times, edges) = {shape}"
                )

    @classmethod
    def of(
        cls, instants: Sequence[Modes], times: np.ndarray, edges: np.ndarray, order: float = 1
    ) -> Drift:
        """Measure `edge_flux` at every instant."""
        rows = [edge_flux(found, edges, order) for found in instants]
        return cls(
            np.asarray(times, float),
            np.asarray(edges, float),
            *(np.stack(part) for part in zip(*rows, strict=True)),
        )

    def flux(self, part: Part = "total") -> np.ndarray:
        """Return the upward flux of energy, (K, A)."""
        if part not in ("advective", "kato", "total"):
            raise ValueError(f"part is {part!r}; expected advective, kato or total")
        return self.advective + self.kato if part == "total" else np.asarray(getattr(self, part))

    def c(self, part: Part = "total") -> np.ndarray:
        """Return c = t v/λ = t · flux/h, (K, A); the flow v = c₀λ/t of every mode gives c₀. 0 where there is no energy."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.times[:, None] * self.flux(part) / self.energy
        safe: np.ndarray = np.where(self.energy > 0, found, 0.0)
        return safe

    def regime(self, part: Part = "total") -> np.ndarray:
        """Return |v|/2λ², (K, A): transport against dissipation, free of the unit of time."""
        found: np.ndarray = np.abs(self.c(part)) / (2 * self.edges * self.times[:, None])
        return found

    def weights(self, after: float = 0.0, until: float = math.inf) -> np.ndarray:
        """Return the share of each time's energy at each edge, every time in the window alike; sums to 1, (K, A).

        Raises
        ------
        ValueError
            If no time lies in the window.
        """
        inside = (self.times >= after * (1 - 1e-9)) & (
            self.times <= until * (1 + 1e-9)
        )  # a grid in log t rounds
        if not inside.any():
            raise ValueError(
                f"no time lies in [{after}, {until}]; the times are {self.times[0]:.3g} … {self.times[-1]:.3g}"
            )
        total = self.energy.sum(axis=1, keepdims=True)
        share = np.where(inside[:, None], self.energy / np.where(total > 0, total, 1.0), 0.0)
        found: np.ndarray = share / share.sum()
        return found

    def summary(
        self, part: Part = "total", after: float = 0.0, until: float = math.inf
    ) -> dict[str, float]:
        """Return the weighted mean and spread (standard deviation over λ and t) of c, and the weight where c < 0."""
        w, c = self.weights(after, until), self.c(part)
        mean = float((w * c).sum())
        return {
            "mean": mean,
            "spread": math.sqrt(max(float((w * (c - mean) ** 2).sum()), 0.0)),
            "negative": float(w[c < 0].sum()),
        }

    def correlation(self, after: float = 0.0, until: float = math.inf) -> float:
        """Return the weighted correlation of the advective and the Kato part of c over λ and t; −1 when they cancel."""
        w, a, b = self.weights(after, until), self.c("advective"), self.c("kato")
        a, b = a - (w * a).sum(), b - (w * b).sum()
        scale = math.sqrt(float((w * a * a).sum()) * float((w * b * b).sum()))
        return float((w * a * b).sum()) / scale if scale > 0 else 0.0

    def power_law(
        self,
        part: Part = "advective",
        after: float = 0.0,
        until: float = math.inf,
        least: float = 1e-3,
    ) -> PowerLaw:
        """Fit log |v| = a log λ + b log t + const. over cells with v > 0 that hold at least `least` of their time's energy.

        Cells with v ≤ 0 cannot enter the fit; `selected` says how much of the weight was left in. Fits over few cells are
        refused with a ValueError.
        """
        w, v = self.weights(after, until), self.c(part) * self.edges / self.times[:, None]
        share = self.energy / np.maximum(
            self.energy.sum(axis=1, keepdims=True), np.finfo(float).tiny
        )
        chosen = (w > 0) & (share >= least) & (v > 0)
        if chosen.sum() < 6:
            raise ValueError(
                f"only {int(chosen.sum())} cells have v > 0 and energy; widen the window or lower `least`"
            )
        t, lam = np.meshgrid(np.log(self.times), np.log(self.edges), indexing="ij")
        design = np.stack([lam[chosen], t[chosen], np.ones(chosen.sum())], axis=1)
        goal = np.log(v[chosen])
        solution = np.linalg.lstsq(design, goal, rcond=None)[0]
        rest = goal - design @ solution
        r2 = 1 - float(rest @ rest) / max(
            float(((goal - goal.mean()) ** 2).sum()), np.finfo(float).tiny
        )
        return PowerLaw(float(solution[0]), float(solution[1]), r2, float(w[chosen].sum()))


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean over seeds with its 95 % interval; at least two values."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"an interval needs two or more values, got {x.tolist()!r}")
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    reach = float(stats.t.ppf(0.975, len(x) - 1)) * sd / math.sqrt(len(x))
    return Interval(mean, mean - reach, mean + reach, sd)


def trend(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Interval:
    """Return the slope of a least-squares line with its 95 % interval (`sd` is the residuals'); at least three points."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 3 or np.ptp(a) == 0:
        raise ValueError(
            f"a trend needs three or more points at different places, got x = {a.tolist()}"
        )
    line: Any = stats.linregress(a, b)
    reach = float(stats.t.ppf(0.975, len(a) - 2)) * float(line.stderr)
    slope = float(line.slope)
    residuals = b - line.intercept - slope * a
    return Interval(slope, slope - reach, slope + reach, float(residuals.std(ddof=2)))


def constant_drift_loss(
    eigenvalues: np.ndarray, energies: np.ndarray, c0: float, start: float, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of the model v = c₀λ/t for energies measured at `start`: (corrected, as printed).

    Corrected: every energy rides its characteristic λ = u (t/t₀)^{c₀} and decays, Σ E_u exp(−K u) with
    K = (2t₀/(1+c₀))((t/t₀)^{1+c₀} − 1). Printed: equation (13) of 2512.10427, ε₀(u) exp(−2λt/(1+c₀)) per unit of λ, which is
    (t/t₀)^{c₀} Σ E_u exp(−2u t₀ (t/t₀)^{1+c₀}/(1+c₀)).

    Raises
    ------
    ValueError
        If c₀ ≤ −1, where the solution has another form, or times before `start`.
    """
    u, energy, t = (np.asarray(x, dtype=np.float64) for x in (eigenvalues, energies, times))
    if not c0 > -1:
        raise ValueError(f"c0 is {c0}; this form of the solution needs c0 > −1")
    if not start > 0 or np.any(t < start):
        raise ValueError(f"start is {start}: it must be positive and no later than the times")
    grown = (t / start) ** (1 + c0)
    factor = 2 * start / (1 + c0)
    corrected = np.exp(-factor * np.outer(grown - 1, u)) @ energy
    printed = (t / start) ** c0 * (np.exp(-factor * np.outer(grown, u)) @ energy)
    return corrected, printed


def realizability(
    times: np.ndarray, losses: np.ndarray, eigenvalues: np.ndarray, speed: float
) -> float:
    """Return the largest |√λ_u(t) − √λ_u(s)| / (B √((t − s)(L(s) − L(t)))) over modes and pairs of times; ≤ 1 if B holds.

    Parameters
    ----------
    times : (K,) ascending
    losses : (K,)
    eigenvalues : (K, n)
        Of M, in ascending order in each row: ordered singular values of J/√n move no faster than J/√n does.
    speed : float
        B: bound of ‖J̇‖/(√n ‖θ̇‖) along the path, in the operator norm.

    Notes
    -----
    Along gradient flow ‖θ̇‖² = −L̇, so ∫‖θ̇‖ ≤ √((t − s)(L(s) − L(t))) by Cauchy–Schwarz. Pairs between which the loss falls by
    less than 1e-12 of L(0) are left out: their difference is rounding.
    """
    t, loss = np.asarray(times, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    sigma = np.sqrt(np.maximum(np.asarray(eigenvalues, dtype=np.float64), 0.0))
    if sigma.ndim != 2 or sigma.shape[0] != len(t) or loss.shape != t.shape:
        raise ValueError(
            f"times {t.shape}, losses {loss.shape} and eigenvalues {sigma.shape} do not fit together"
        )
    if not speed > 0:
        raise ValueError(f"speed is {speed}; B must be positive")
    worst = 0.0
    for k in range(1, len(t)):
        moved = np.abs(sigma[k] - sigma[:k]).max(axis=1)
        fallen = loss[:k] - loss[k]
        kept = fallen > 1e-12 * loss[0]
        reach = speed * np.sqrt((t[k] - t[:k])[kept] * fallen[kept])
        worst = max(worst, float((moved[kept] / reach).max(initial=0.0)))
    return worst
