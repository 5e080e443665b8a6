"""Lemma 1 of 2512.18209 as a measurement: the flows of L and aL side by side.

Between the flow of a loss L and that of aL everything scales exactly: λ_a(t) = aλ(at), v_a(t) =
a²v(at). `between_flows` measures that. That the *same* field serves both, v_a = v, is a hypothesis,
(U). Closed forms are in :mod:`grsd.renorm.theorems.closed_forms`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.drift import Drift
from grsd.dynamics.flow import integrate
from grsd.dynamics.modes import Modes, instant, modes
from grsd.dynamics.problem import Problem

__all__ = ["BetweenFlows", "between_flows", "rescaled"]

Array = NDArray[np.float64]


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
    # both flows from their start, and the instants of the two beside each other
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
