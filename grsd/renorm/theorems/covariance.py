"""Lemma 1 of 2512.18209 as measurements: the flows of L and aL side by side, one field against itself, and flux = rotation + drift.

Between the flow of a loss L and that of aL everything scales exactly: λ_a(t) = aλ(at), v_a(t) = a²v(at). That the *same* field serves
both, v_a = v, is a hypothesis, (U). `between_flows` measures the first and `field_ratio` the second. `weak_balance` separates the two
velocities that the paper calls v. Closed forms are in :mod:`grsd.renorm.theorems.closed_forms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

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


class _Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.factor * self.model(x)
        return found


def rescaled(model: nn.Module, inputs: Tensor, targets: Tensor, a: float) -> Problem:
    """Return the network √a·f with targets √a·y: its loss is aL, its M is a·M, and nobody told it so.

    Raises
    ------
    ValueError
        If a is not a positive finite number.
    """
    if not (a > 0 and np.isfinite(a)):
        raise ValueError(f"a is {a}; a loss can be rescaled by a positive finite number")
    root = float(np.sqrt(a))
    return Problem(_Scaled(model, root), inputs, root * targets.to(torch.float64))


@dataclass(frozen=True)
class BetweenFlows:
    """Largest departure from Lemma 1 between the flow of L at time at and that of aL at time t, for every t; all would be 0.

    Attributes
    ----------
    a : float
    times : (K,), t.
    parameters : (K,), |θ_a(t) − θ(at)|/|θ(at)|.
    eigenvalues : (K,), |λ_a(t) − aλ(at)|, relative to the largest aλ.
    velocities : (K,), |λ̇_a(t) − a²λ̇(at)|, relative to the largest a²|λ̇|.
    flux : (K,), |v_a(aλ, t) − a²v(λ, at)| for the flux velocity v = J/ε at the edges, relative to the largest a²|v|.
    same : (K,), largest |λ_a(t) − λ(at)| relative to λ(at): what one sees when the factor a is forgotten; |a − 1| if all is well.
    """

    a: float
    times: Array
    parameters: Array
    eigenvalues: Array
    velocities: Array
    flux: Array
    same: Array

    @property
    def worst(self) -> float:
        """Largest of the four residuals over all times."""
        return float(
            max(x.max() for x in (self.parameters, self.eigenvalues, self.velocities, self.flux))
        )


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
    """Integrate the flow of L to times at and the flow of aL to times t, and compare every quantity of Lemma 1.

    Parameters
    ----------
    first, second : Problem
        The network, and the same with the loss aL: `rescaled(model, inputs, targets, a)`.
    a : float
    times : (K,), positive ascending
        Of the second flow; both start at time 0 from their own `theta`.
    edges : (A,)
        On the λ axis of the first flow; those of the second are a times as large.
    order : number
        Of the soft edges, as in `grsd.dynamics.drift.edge_flux`.
    method : str
        Of the second integration. The first is by DOP853: two runs of one method would take the same steps and agree about their errors.
    rtol, atol : float

    Returns
    -------
    BetweenFlows

    Raises
    ------
    ValueError
        If the two problems do not have equally many parameters and samples.

    Notes
    -----
    Cost: two integrations and, for each time, two instants (about four Jacobians and an eigenproblem each). Source: 2512.18209, Lemma 1,
    steps 1–3.
    """
    if first.theta.shape != second.theta.shape or first.samples != second.samples:
        raise ValueError(
            f"the flows have {len(first.theta)} and {len(second.theta)} parameters, {first.samples} and {second.samples} samples: give "
            "one network, and `rescaled` of the same"
        )
    grid, places = np.asarray(times, float), np.asarray(edges, float)
    whole = np.concatenate([[0.0], grid])
    here = integrate(first, a * whole, rtol=rtol, atol=atol, estimate=False).thetas[1:]
    there = integrate(second, whole, rtol=rtol, atol=atol, estimate=False, method=method).thetas[1:]
    rows = []
    for near, far in zip(here, there, strict=True):
        one, two = modes(*instant(first, near)), modes(*instant(second, far))
        flux, flux_a = _flux_velocity(one, places, order), _flux_velocity(two, a * places, order)
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


def _relative(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(float).tiny))


def _flux_velocity(found: Modes, edges: Array, order: float) -> Array:
    """v = J/ε at the edges, from c = t v/λ at t = 1."""
    velocity: Array = edges * Drift.of([found], np.ones(1), edges, order).c()[0]
    return velocity


def field_ratio(
    lam: ArrayLike, velocity: ArrayLike, later: ArrayLike, later_velocity: ArrayLike, a: float
) -> Array:
    """Return v(aλ, t/a)/(a²v(λ, t)) at the modes of one time whose aλ lies among those of the other: 1 if one field serves both, (U).

    Parameters
    ----------
    lam, velocity : (n,)
        λ_u and λ̇_u of one flow at time t.
    later, later_velocity : (m,)
        The same of the same flow at time t/a. The field between its modes is interpolated linearly in log λ (v/λ is), which is exact
        for neither; where v is no function of λ, the numbers scatter.
    a : float

    Returns
    -------
    (k,) ratios, k ≤ n; 0/0 is left out.

    Raises
    ------
    ValueError
        If no aλ lies between the eigenvalues of the other time.
    """
    x, v, x2, v2 = (np.asarray(q, float) for q in (lam, velocity, later, later_velocity))
    order = np.argsort(x2)
    x2, v2 = x2[order], v2[order]
    keep = x2 > 0
    x2, v2 = x2[keep], v2[keep]
    inside = (a * x >= x2[0]) & (a * x <= x2[-1]) & (v != 0)
    if not inside.any():
        raise ValueError(
            f"no a·λ lies in [{x2[0]:.3g}, {x2[-1]:.3g}], the spectrum at time t/a; take a = {a} nearer to 1"
        )
    target = a * x[inside]
    at = target * np.interp(np.log(target), np.log(x2), v2 / x2)
    ratio: Array = at / (a**2 * v[inside])
    return ratio


class WeakBalance(NamedTuple):
    """d/dt ½⟨e, χ(M)e⟩ = −dissipation + rotation + drift, for one smooth χ at one instant; energy per time."""

    energy: float  # ½ Σ χ(λ_u) g_u²
    dissipation: float  # Σ λ_u χ(λ_u) g_u²
    rotation: float  # ½ Σ_{u≠v} χ[λ_u, λ_v] ⟨φ_u, Ṁφ_v⟩ g_u g_v = −Σ_{u≠v} χ(λ_u) g_u g_v Ω_{v→u}
    drift: float  # ½ Σ χ'(λ_u) λ̇_u g_u²

    @property
    def rate(self) -> float:
        """−dissipation + rotation + drift."""
        return self.rotation + self.drift - self.dissipation


def weak_balance(
    found: Modes, chi: Callable[[np.ndarray], np.ndarray], slope: Callable[[np.ndarray], np.ndarray]
) -> WeakBalance:
    """Return the balance of the energy that a smooth weight χ of λ sees: equation (25) of 2512.18209 in weak form, with both fluxes.

    Parameters
    ----------
    found : Modes
    chi, slope : callables of λ, (n,) → (n,)
        χ and its derivative. A rising step gives the energy above an edge, and then `rotation` + `drift` is the flux J through it; a bump
        gives a soft shell.

    Notes
    -----
    By Daleckii and Krein's formula, which needs no gap between eigenvalues. For logistic steps the same numbers come from
    `grsd.dynamics.drift.edge_flux`. Cost: O(n²).
    """
    g, lam = found.coefficients, found.eigenvalues
    weight = chi(lam)
    whole = 0.5 * float(g @ divided(found, chi, slope) @ g)
    drift = 0.5 * float(np.sum(slope(lam) * found.rates * g**2))
    return WeakBalance(
        0.5 * float(np.sum(weight * g**2)), float(np.sum(lam * weight * g**2)), whole - drift, drift
    )
