"""Three numerical routes through ∂ₜε + ∂_λ(vε) = −2λε for any drift v = (λ/t) H(λt).

`characteristics` follows densities and needs ∂_λv, as the closed form of :mod:`grsd.dynamics.transport` does. `particles` follows lumps
of energy and does not; `finite_volume` moves energy between fixed cells. These two share no step with that derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

from grsd.dynamics.transport import CovariantDrift, Spectrum

__all__ = [
    "Characteristics",
    "FiniteVolume",
    "Particles",
    "characteristics",
    "finite_volume",
    "fitted_exponent",
    "particles",
]

Array = NDArray[np.float64]
WINDOW = (
    1e-14,
    1e3,
)  # eigenvalues; wide enough for three decades of time from t0 = 1 and a cutoff near 1


@dataclass(frozen=True)
class Characteristics:
    """Densities along moving points: times (K,), positions (K, N) ascending, densities (K, N)."""

    times: Array
    positions: Array
    densities: Array

    @property
    def loss(self) -> Array:
        """∫ε dλ over the points, (K,), by the trapezoidal rule in log λ."""
        s, h = np.log(self.positions), self.positions * self.densities
        found: Array = np.sum(0.5 * np.diff(s, axis=1) * (h[:, 1:] + h[:, :-1]), axis=1)
        return found


@dataclass(frozen=True)
class Particles:
    """Lumps of energy: times (K,), positions (K, N), energies (K, N)."""

    times: Array
    positions: Array
    energies: Array

    @property
    def loss(self) -> Array:
        found: Array = self.energies.sum(axis=1)
        return found


@dataclass(frozen=True)
class FiniteVolume:
    """Energies of fixed cells.

    Attributes
    ----------
    times : (K,)
    edges : (n+1,), eigenvalues, equally spaced in log λ.
    energies : (K, n), ∫ε dλ over each cell.
    escaped : (K,), energy that has left through either end of the grid (it dissipates no further).
    dissipated : (K,), energy that the damping has taken.
    """

    times: Array
    edges: Array
    energies: Array
    escaped: Array
    dissipated: Array

    @property
    def loss(self) -> Array:
        found: Array = self.energies.sum(axis=1)
        return found

    @property
    def budget(self) -> Array:
        """Relative defect of energy + escaped + dissipated against the energy at the start, (K,): rounding only."""
        total = self.loss + self.escaped + self.dissipated
        found: Array = np.abs(total / total[0] - 1.0)
        return found

    @property
    def centers(self) -> Array:
        return np.sqrt(self.edges[1:] * self.edges[:-1])


def characteristics(
    eps0: Spectrum,
    drift: CovariantDrift | float,
    times: ArrayLike,
    *,
    window: tuple[float, float] = WINDOW,
    count: int = 800,
    dissipation: bool = True,
    divergence: bool = True,
    rtol: float = 1e-9,
) -> Characteristics:
    """Integrate d log λ/d log t = H and d log ε/d log t = −2λt − t∂_λv from points spaced evenly in log λ (DOP853).

    Parameters
    ----------
    times : (K,) ascending, the first is t0.
    dissipation : False drops −2λε.
    divergence : False drops −∂_λv: equation (10) of 2512.10427 as printed.
    """
    rule, when, u = _drift(drift), _checked(times), _points(window, count)
    start = _positive(eps0, u)
    first = np.concatenate([np.log(u), np.log(np.where(start > 0.0, start, 1.0))])

    def rate(tau: float, state: Array) -> Array:
        x = np.exp(state[: u.size] + tau)
        change = np.zeros_like(x)
        if dissipation:
            change -= 2.0 * x
        if divergence:
            change -= rule.divergence(x)
        return np.concatenate([rule.speed(x), change])

    tau = np.log(when)
    done = solve_ivp(
        rate, (tau[0], tau[-1]), first, method="DOP853", t_eval=tau, rtol=rtol, atol=rtol
    )
    if not done.success:
        raise ValueError(
            f"the characteristics could not be followed to t = {when[-1]}: {done.message}"
        )
    logs = done.y.T
    return Characteristics(
        when, np.exp(logs[:, : u.size]), np.where(start > 0.0, np.exp(logs[:, u.size :]), 0.0)
    )


def particles(
    eps0: Spectrum,
    drift: CovariantDrift | float,
    times: ArrayLike,
    *,
    window: tuple[float, float] = WINDOW,
    count: int = 4000,
    seed: int = 0,
    dissipation: bool = True,
    step: float = 0.05,
) -> Particles:
    """Move lumps of energy by v and let each decay at the rate 2λ; nothing else (fourth-order Runge–Kutta in log t).

    One lump is drawn at random from each of `count` equal strata of log λ and carries the energy of its stratum, ε0(u) u Δlog u.
    The Jacobian of the flow is never computed: where lumps spread out, the density falls.
    """
    rule, when = _drift(drift), _checked(times)
    low, high = _window(window)
    if count < 2:
        raise ValueError(f"count = {count}; expected at least two particles")
    if not 0.0 < step <= 0.2:
        raise ValueError(f"step = {step} in log t; expected 0 < step ≤ 0.2")
    width = math.log(high / low) / count
    draw = np.random.default_rng(seed).random(count)
    s = math.log(low) + width * (np.arange(count) + draw)
    energy = _positive(eps0, np.exp(s)) * np.exp(s) * width
    decay = np.zeros(count)

    def rate(tau: float, place: Array) -> tuple[Array, Array]:
        x = np.exp(place + tau)
        return rule.speed(x), 2.0 * x if dissipation else np.zeros_like(x)

    taus, places, energies = np.log(when), [np.exp(s)], [energy]
    for before, after in pairwise(taus):
        steps = math.ceil((after - before) / step)
        d = (after - before) / steps
        for k in range(steps):
            tau = before + k * d
            v1, w1 = rate(tau, s)
            v2, w2 = rate(tau + d / 2, s + d / 2 * v1)
            v3, w3 = rate(tau + d / 2, s + d / 2 * v2)
            v4, w4 = rate(tau + d, s + d * v3)
            s = s + d / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
            decay = decay + d / 6 * (w1 + 2 * w2 + 2 * w3 + w4)
        places.append(np.exp(s))
        energies.append(energy * np.exp(-decay))
    return Particles(when, np.array(places), np.array(energies))


def finite_volume(
    eps0: Spectrum,
    drift: CovariantDrift | float,
    times: ArrayLike,
    *,
    window: tuple[float, float] = WINDOW,
    cells: int = 800,
    cfl: float = 0.45,
    dissipation: bool = True,
) -> FiniteVolume:
    """Conservative finite volumes in log λ and log t: second order, van Leer's limiter, Heun's step, exact damping (Strang).

    With s = log λ, τ = log t and h = λε, (7) reads ∂_τh + ∂_s(Hh) = −2λt h. What leaves one cell enters its neighbour, so that the
    budget closes to rounding. Nothing enters through the ends.

    Parameters
    ----------
    cfl : float in (0, ½], cells that a signal may cross in one step; beyond ½ the limited scheme may go negative.
    """
    rule, when = _drift(drift), _checked(times)
    low, high = _window(window)
    if not 0.0 < cfl <= 0.5:
        raise ValueError(
            f"cfl = {cfl}: a signal may cross at most half a cell per step; use 0 < cfl ≤ 0.5"
        )
    if cells < 8:
        raise ValueError(f"cells = {cells}; expected at least 8")
    s = np.linspace(math.log(low), math.log(high), cells + 1)
    ds, faces, middles = s[1] - s[0], np.exp(s), np.exp(0.5 * (s[1:] + s[:-1]))
    h = _cell_energies(eps0, s) / ds
    fastest = float(np.abs(rule.speed(np.geomspace(low * when[0], high * when[-1], 2000))).max())
    longest = min(2.0 * ds, cfl * ds / fastest) if fastest > 0.0 else math.inf

    def flux(values: Array, tau: float) -> Array:
        H = rule.speed(faces * math.exp(tau))
        padded = np.concatenate([[0.0, 0.0], values, [0.0, 0.0]])
        a, b = padded[1:-1] - padded[:-2], padded[2:] - padded[1:-1]
        alike = np.sign(a) * np.sign(b) > 0.0
        tilt = np.where(
            alike, 2.0 * a * (b / np.where(alike, a + b, 1.0)), 0.0
        )  # van Leer; no product to underflow
        left, right = padded[1:-1] + 0.5 * tilt, padded[1:-1] - 0.5 * tilt
        return np.where(H > 0.0, H * left[:-1], H * right[1:])

    taus, kept, escaped, dissipated = np.log(when), [h * ds], [0.0], [0.0]
    out = lost = 0.0
    for before, after in pairwise(taus):
        steps = max(1, math.ceil((after - before) / longest))
        d = (after - before) / steps
        for k in range(steps):
            tau = before + k * d
            times3 = np.exp([tau, tau + d / 2, tau + d])
            if dissipation:
                damped = h * np.exp(-2.0 * middles * (times3[1] - times3[0]))
                lost, h = lost + float(np.sum(h - damped)) * ds, damped
            if fastest > 0.0:
                first = flux(h, tau)
                second = flux(h - d / ds * np.diff(first), tau + d)
                mean = 0.5 * (first + second)
                h = h - d / ds * np.diff(mean)
                out += d * float(mean[-1] - mean[0])
            if dissipation:
                damped = h * np.exp(-2.0 * middles * (times3[2] - times3[1]))
                lost, h = lost + float(np.sum(h - damped)) * ds, damped
        kept.append(h * ds)
        escaped.append(out)
        dissipated.append(lost)
    return FiniteVolume(when, faces, np.array(kept), np.array(escaped), np.array(dissipated))


def fitted_exponent(times: ArrayLike, loss: ArrayLike, *, after: float = 0.0) -> float:
    """Return s of the least-squares line log L = const − s log t over t > after; at least three points of positive loss."""
    t, L = np.asarray(times, float), np.asarray(loss, float)
    chosen = t > after
    if t.shape != L.shape or np.count_nonzero(chosen) < 3 or np.any(L[chosen] <= 0.0):
        raise ValueError(
            f"{np.count_nonzero(chosen)} points after t = {after}; expected three or more with positive loss"
        )
    return -float(np.polyfit(np.log(t[chosen]), np.log(L[chosen]), 1)[0])


def _drift(drift: CovariantDrift | float) -> CovariantDrift:
    return drift if isinstance(drift, CovariantDrift) else CovariantDrift.linear(float(drift))


def _checked(times: ArrayLike) -> Array:
    when = np.asarray(times, float)
    if (
        when.ndim != 1
        or when.size < 2
        or not np.isfinite(when).all()
        or when[0] <= 0.0
        or np.any(np.diff(when) <= 0.0)
    ):
        raise ValueError(
            f"times {times!r} must be ascending, positive and at least two; the first is t0"
        )
    return when


def _window(window: tuple[float, float]) -> tuple[float, float]:
    low, high = window
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"the window [{low}, {high}] holds no mass; give 0 < low < high < ∞")
    return float(low), float(high)


def _points(window: tuple[float, float], count: int) -> Array:
    low, high = _window(window)
    if count < 3:
        raise ValueError(f"count = {count}; expected at least three points")
    return np.geomspace(low, high, count)


def _positive(eps0: Spectrum, u: Array) -> Array:
    found = np.asarray(eps0(u), float)
    if found.shape != u.shape or not np.isfinite(found).all() or np.any(found < 0.0):
        raise ValueError("ε0 must return one finite density ≥ 0 for every eigenvalue")
    if not np.any(found > 0.0):
        raise ValueError(
            f"ε0 has no mass at the eigenvalues from {u[0]:.3g} to {u[-1]:.3g}; widen the window"
        )
    return found


def _cell_energies(eps0: Spectrum, s: Array) -> Array:
    nodes, weights = np.polynomial.legendre.leggauss(4)
    half = 0.5 * np.diff(s)[:, None]
    points = np.exp(0.5 * (s[1:] + s[:-1])[:, None] + half * nodes)
    values = _positive(eps0, points.ravel()).reshape(points.shape)
    found: Array = np.sum(half * weights * points * values, axis=1)
    return found
