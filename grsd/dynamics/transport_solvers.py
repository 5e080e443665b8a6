"""Two numerical routes through ∂ₜε + ∂_λ(vε) = −2λε for any drift v = (λ/t) H(λt).

`particles` follows lumps of energy, `finite_volume` moves energy between fixed cells. Neither
shares a step with the derivation of the closed form in :mod:`grsd.dynamics.transport`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grsd import checks
from grsd.dynamics.transport import CovariantDrift, Spectrum, panels_of

__all__ = ["FiniteVolume", "Particles", "finite_volume", "fitted_exponent", "particles"]

Array = NDArray[np.float64]
Drift = CovariantDrift | float
Window = tuple[float, float]
WINDOW = (1e-14, 1e3)  # wide enough for three decades of time from t0 = 1 and a cutoff near 1


@dataclass(frozen=True)
class Particles:
    """Lumps of energy: times (K,), positions (K, N), energies (K, N)."""

    times: Array
    positions: Array
    energies: Array

    @property
    def loss(self) -> Array:
        return self.energies.sum(axis=1)


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
        return self.energies.sum(axis=1)

    @property
    def budget(self) -> Array:
        """Relative defect of energy + escaped + dissipated against the start, (K,): rounding."""
        total = self.loss + self.escaped + self.dissipated
        return np.abs(total / total[0] - 1.0)

    @property
    def centers(self) -> Array:
        return np.sqrt(self.edges[1:] * self.edges[:-1])


def particles(
    eps0: Spectrum,
    drift: Drift,
    times: ArrayLike,
    *,
    window: Window = WINDOW,
    count: int = 4000,
    seed: int = 0,
    dissipation: bool = True,
    step: float = 0.05,
) -> Particles:
    """Move lumps of energy by v and let each decay at the rate 2λ; nothing else.

    One lump is drawn at random from each of `count` equal strata of log λ and carries its energy,
    ε0(u) u Δlog u. No Jacobian is computed: where lumps spread out, the density falls. Fourth-order
    Runge–Kutta with `step` in log t.
    """
    rule, when = _drift(drift), _instants(times)
    low, high = _bounds(window)
    checks.at_least("count", count, 2, "expected at least two particles")
    checks.between("step", step, 0.0, 0.2, "(]", "expected 0 < step ≤ 0.2 in log t")
    # one lump a stratum, at random inside it
    width = math.log(high / low) / count
    draw = np.random.default_rng(seed).random(count)
    s = math.log(low) + width * (np.arange(count) + draw)
    energy = _positive(eps0, np.exp(s)) * np.exp(s) * width
    decay = np.zeros(count)

    def rate(tau: float, place: Array) -> tuple[Array, Array]:
        x = np.exp(place + tau)
        return rule.speed(x), 2.0 * x if dissipation else np.zeros_like(x)

    places, energies = [np.exp(s)], [energy]
    for before, after in pairwise(np.log(when)):
        steps = math.ceil((after - before) / step)
        d = (after - before) / steps
        for k in range(steps):
            # Runge and Kutta's step for log λ and for the logarithm of what is left
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
    drift: Drift,
    times: ArrayLike,
    *,
    window: Window = WINDOW,
    cells: int = 800,
    cfl: float = 0.45,
    dissipation: bool = True,
) -> FiniteVolume:
    """Conservative finite volumes in log λ and log t, second order.

    With s = log λ, τ = log t and h = λε, (7) reads ∂_τh + ∂_s(Hh) = −2λt h: van Leer's limiter,
    Heun's step, exact damping (Strang). What leaves a cell enters its neighbour; nothing enters
    through the ends. `cfl` in (0, ½] is how many cells a signal may cross in one step: beyond ½ the
    limited scheme may go negative.
    """
    rule, when = _drift(drift), _instants(times)
    low, high = _bounds(window)
    checks.between("cfl", cfl, 0.0, 0.5, "(]", "a signal may cross at most half a cell per step")
    checks.at_least("cells", cells, 8)
    s = np.linspace(math.log(low), math.log(high), cells + 1)
    ds, faces, middles = s[1] - s[0], np.exp(s), np.exp(0.5 * (s[1:] + s[:-1]))
    h = _cell_energies(eps0, s) / ds
    # the step: what the fastest signal allows, and no more than two cells of log t
    fastest = float(np.abs(rule.speed(np.geomspace(low * when[0], high * when[-1], 2000))).max())
    longest = min(2.0 * ds, cfl * ds / fastest) if fastest > 0.0 else math.inf

    def flux(values: Array, tau: float) -> Array:
        H = rule.speed(faces * math.exp(tau))
        padded = np.concatenate([[0.0, 0.0], values, [0.0, 0.0]])
        a, b = padded[1:-1] - padded[:-2], padded[2:] - padded[1:-1]
        alike = np.sign(a) * np.sign(b) > 0.0
        # van Leer's slope 2ab/(a + b), without a product that may underflow
        tilt = np.where(alike, 2.0 * a * (b / np.where(alike, a + b, 1.0)), 0.0)
        left, right = padded[1:-1] + 0.5 * tilt, padded[1:-1] - 0.5 * tilt
        return np.where(H > 0.0, H * left[:-1], H * right[1:])

    def damped(values: Array, span: float) -> tuple[Array, float]:
        rest = values * np.exp(-2.0 * middles * span)
        return rest, float(np.sum(values - rest)) * ds

    kept, escaped, dissipated = [h * ds], [0.0], [0.0]
    out = lost = 0.0
    for before, after in pairwise(np.log(when)):
        steps = max(1, math.ceil((after - before) / longest))
        d = (after - before) / steps
        for k in range(steps):
            # half of the damping, a Heun step of the drift, the other half
            tau = before + k * d
            begin, middle, end = np.exp([tau, tau + d / 2, tau + d])
            if dissipation:
                h, taken = damped(h, middle - begin)
                lost += taken
            if fastest > 0.0:
                first = flux(h, tau)
                second = flux(h - d / ds * np.diff(first), tau + d)
                mean = 0.5 * (first + second)
                h = h - d / ds * np.diff(mean)
                out += d * float(mean[-1] - mean[0])
            if dissipation:
                h, taken = damped(h, end - middle)
                lost += taken
        kept.append(h * ds)
        escaped.append(out)
        dissipated.append(lost)
    return FiniteVolume(when, faces, np.array(kept), np.array(escaped), np.array(dissipated))


def fitted_exponent(times: ArrayLike, loss: ArrayLike, *, after: float = 0.0) -> float:
    """Return s of the least-squares line log L = const − s log t over t > after."""
    t, L = np.asarray(times, float), np.asarray(loss, float)
    chosen = t > after
    if t.shape != L.shape or np.count_nonzero(chosen) < 3 or np.any(L[chosen] <= 0.0):
        count = np.count_nonzero(chosen)
        raise ValueError(f"{count} points after t = {after}; expected three or more, positive loss")
    return -float(np.polyfit(np.log(t[chosen]), np.log(L[chosen]), 1)[0])


def _drift(drift: Drift) -> CovariantDrift:
    return drift if isinstance(drift, CovariantDrift) else CovariantDrift.linear(float(drift))


def _instants(times: ArrayLike) -> Array:
    why = "expected two or more in ascending order, positive; the first is t0"
    return checks.positive("times", checks.ascending("times", times, 2, why), why)


def _bounds(window: Window) -> Window:
    low, high = window
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"the window [{low}, {high}] holds no mass; give 0 < low < high < ∞")
    return float(low), float(high)


def _positive(eps0: Spectrum, u: Array) -> Array:
    values = np.asarray(eps0(u), float)
    checks.at_least("ε0", checks.shape("ε0", values, u.shape), 0, "expected a density ≥ 0")
    if not np.any(values > 0.0):
        raise ValueError(
            f"ε0 has no mass at the eigenvalues from {u.min():.3g} to {u.max():.3g}; widen that"
        )
    return values


def _cell_energies(eps0: Spectrum, s: Array) -> Array:
    nodes, weights = panels_of(s[0], s[-1], s.size - 1, 4)
    points = np.exp(nodes)
    return np.sum(weights * points * _positive(eps0, points.ravel()).reshape(points.shape), axis=1)
