"""Lemma 1 of 2512.18209 as measurements: the flows of L and aL, one field against itself.

Between the flow of a loss L and that of aL everything scales exactly: λ_a(t) = aλ(at), v_a(t) =
a²v(at). That the *same* field serves both, v_a = v, is a hypothesis, (U). `between_flows` measures
the first and `field_ratio` the second. `weak_balance`, flux = rotation + drift, separates the two
velocities that the paper calls v. Closed forms are in :mod:`grsd.renorm.theorems.closed_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.drift import Drift
from grsd.dynamics.flow import integrate
from grsd.dynamics.modes import Modes, divided, instant, modes
from grsd.dynamics.problem import Problem

__all__ = [
    "BetweenFlows",
    "WeakBalance",
    "between_flows",
    "field_ratio",
    "rescaled",
    "weak_balance",
]

Array = NDArray[np.float64]
Function = Callable[[np.ndarray], np.ndarray]


class _Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


def rescaled(model: nn.Module, inputs: Tensor, targets: Tensor, a: float) -> Problem:
    """Return the network √a·f with targets √a·y: its loss is aL, its M is a·M."""
    checks.positive("a", a, "a loss can be rescaled by a positive finite number")
    root = float(np.sqrt(a))
    return Problem(_Scaled(model, root), inputs, root * targets.double())


class BetweenFlows(NamedTuple):
    """Largest departure from Lemma 1 between the flow of L at time at and that of aL at time t.

    (K,) each. All but `same` would be 0; `same` is |a − 1| if all is well.
    """

    a: float
    times: Array  # t
    parameters: Array  # |θ_a(t) − θ(at)|/|θ(at)|
    eigenvalues: Array  # |λ_a(t) − aλ(at)|, relative to the largest aλ
    velocities: Array  # |λ̇_a(t) − a²λ̇(at)|, relative to the largest a²|λ̇|
    flux: Array  # the same of v = J/ε at the edges: |v_a(aλ, t) − a²v(λ, at)|
    same: Array  # |λ_a(t) − λ(at)| relative to λ(at), as if the factor a were forgotten

    @property
    def worst(self) -> float:
        """Largest of the four residuals over all times."""
        return float(np.max([self.parameters, self.eigenvalues, self.velocities, self.flux]))


def between_flows(
    first: Problem,
    second: Problem,
    a: float,
    times: ArrayLike,
    edges: ArrayLike,
    *,
    order: float = 1,
    method: str = "RK45",
    rtol: float = 1e-12,
    atol: float = 1e-14,
) -> BetweenFlows:
    """Integrate the flow of L to times at and that of aL to times t, and compare them by Lemma 1.

    Parameters
    ----------
    first, second : Problem
        The network, and the same with the loss aL: `rescaled(model, inputs, targets, a)`.
    times : (K,), positive ascending
        Of the second flow; both start at time 0 from their own `theta`.
    edges : (A,)
        On the λ axis of the first flow; those of the second are a times as large.
    order : number
        Of the soft edges, as in `grsd.dynamics.drift.edge_flux`.
    method : str
        Of the second integration. The first is by DOP853: two runs of one method would take the
        same steps and agree about their errors.

    Notes
    -----
    Cost: two integrations and, for each time, two instants (about four Jacobians and an
    eigenproblem each). Source: 2512.18209, Lemma 1, steps 1–3.
    """
    if first.theta.shape != second.theta.shape or first.samples != second.samples:
        raise ValueError(
            f"the flows have {len(first.theta)} and {len(second.theta)} parameters, "
            f"{first.samples} and {second.samples} samples: give one network, and `rescaled` of "
            "the same"
        )
    grid, places = np.asarray(times, float), np.asarray(edges, float)
    whole = np.concatenate([[0.0], grid])
    here = integrate(first, a * whole, rtol=rtol, atol=atol, estimate=False)
    there = integrate(second, whole, rtol=rtol, atol=atol, estimate=False, method=method)
    rows = []
    for near, far in zip(here.thetas[1:], there.thetas[1:], strict=True):
        one, two = modes(*instant(first, near)), modes(*instant(second, far))
        flux, flux_a = (_flux_velocity(m, e, order) for m, e in ((one, places), (two, a * places)))
        rows.append(
            [
                np.linalg.norm(far - near) / np.linalg.norm(near),
                _relative(two.eigenvalues, a * one.eigenvalues),
                _relative(two.rates, a**2 * one.rates),
                _relative(flux_a, a**2 * flux),
                _relative(two.eigenvalues, one.eigenvalues),
            ]
        )
    return BetweenFlows(a, grid, *np.array(rows).T)


def _relative(measured: Array, expected: Array) -> float:
    scale = max(np.abs(expected).max(), np.finfo(float).tiny)
    return float(np.abs(measured - expected).max() / scale)


def _flux_velocity(at: Modes, edges: Array, order: float) -> Array:
    """v = J/ε at the edges, from c = t v/λ at t = 1."""
    return edges * Drift.of([at], np.ones(1), edges, order).c()[0]


def field_ratio(
    lam: ArrayLike, velocity: ArrayLike, later: ArrayLike, later_velocity: ArrayLike, a: float
) -> Array:
    """Return v(aλ, t/a)/(a²v(λ, t)) where aλ lies among the modes of the other time.

    It is 1 if one field serves both, (U). λ and λ̇ of one flow at time t, (n,), and the same of the
    same flow at time t/a, (m,). The field between its modes is interpolated linearly in log λ (v/λ
    is), which is exact for neither; where v is no function of λ, the numbers scatter. 0/0 is left
    out.
    """
    x, v, x2, v2 = (np.asarray(q, float) for q in (lam, velocity, later, later_velocity))
    order = np.argsort(x2)
    order = order[x2[order] > 0]
    x2, v2 = x2[order], v2[order]
    inside = (a * x >= x2[0]) & (a * x <= x2[-1]) & (v != 0)
    if not inside.any():
        raise ValueError(
            f"no a·λ lies in [{x2[0]:.3g}, {x2[-1]:.3g}], the spectrum at time t/a; take a = {a} "
            "nearer to 1"
        )
    target = a * x[inside]
    return target * np.interp(np.log(target), np.log(x2), v2 / x2) / (a**2 * v[inside])


class WeakBalance(NamedTuple):
    """d/dt ½⟨e, χ(M)e⟩ = −dissipation + rotation + drift, for one smooth χ; energy per time."""

    energy: float  # ½ Σ χ(λ_u) g_u²
    dissipation: float  # Σ λ_u χ(λ_u) g_u²
    rotation: float  # ½ Σ_{u≠v} χ[λ_u, λ_v] ⟨φ_u, Ṁφ_v⟩ g_u g_v = −Σ_{u≠v} χ(λ_u) g_u g_v Ω_{v→u}
    drift: float  # ½ Σ χ'(λ_u) λ̇_u g_u²

    @property
    def rate(self) -> float:
        """−dissipation + rotation + drift."""
        return self.rotation + self.drift - self.dissipation


def weak_balance(at: Modes, chi: Function, slope: Function) -> WeakBalance:
    """Return the balance of the energy that a smooth weight χ of λ sees: (25) in weak form.

    A rising step χ gives the energy above an edge, and then `rotation` + `drift` is the flux J
    through it; a bump gives a soft shell. By Daleckii and Krein's formula, which needs no gap
    between eigenvalues. For logistic steps the same numbers come from
    `grsd.dynamics.drift.edge_flux`. Cost: O(n²). Source: 2512.18209.
    """
    g, lam = at.coefficients, at.eigenvalues
    weight = chi(lam)
    whole = 0.5 * float(g @ divided(at, chi, slope) @ g)
    drift = 0.5 * float(np.sum(slope(lam) * at.rates * g**2))
    energy, dissipation = 0.5 * float(weight @ g**2), float(lam * weight @ g**2)
    return WeakBalance(energy, dissipation, whole - drift, drift)
