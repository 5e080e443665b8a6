"""A recurrent network unrolled in time: one copy of the shared parameters per step, and the Jacobian of every copy.

A `Cell` is one step; `Unrolled` runs it over a sequence with a copy of θ in each step, J^(l) = ∂(y_1 … y_T)/∂θ_l. The tied
network has J = Σ_l J^(l), so its M = JJᵀ is not Σ_l J^(l)J^(l)ᵀ. Reverse mode through the unrolled graph, float64; sums over
steps, not means, as in the paper: θ̇ = Jᵀe.

Source: 2512.18209, Proposition 2 and appendix A.1. What is done with the blocks is in :mod:`grsd.renorm.theorems.jacobian`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import lambertw
from torch import Tensor
from torch.func import jacrev, jvp

from grsd.renorm.theorems.jacobian import Coefficients

__all__ = [
    "Cell",
    "Unrolled",
    "diagonal_cell",
    "gated_cell",
    "interaction_range",
    "path_tail",
    "readout_coefficients",
]

Array = NDArray[np.float64]
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence with a linear readout, (h_t, y_t) = step(θ, h_{t−1}, u_t) and y_t = C h_t.

    Attributes
    ----------
    step : callable
        θ (p,), h (d,), u (m,) → h (d,), y (o,); of PyTorch operations that have two derivatives.
    theta : Tensor, (p,) float64. Its last o·d entries are C, row by row.
    states, inputs, outputs : int, d, m and o.
    """

    step: Step
    theta: Tensor
    states: int
    inputs: int
    outputs: int

    def at(self, theta: ArrayLike | Tensor) -> Cell:
        """Return the same cell with other parameters (p,)."""
        found = torch.as_tensor(theta, dtype=torch.float64)
        if found.shape != self.theta.shape:
            raise ValueError(
                f"θ has shape {tuple(found.shape)}; this cell has {tuple(self.theta.shape)}"
            )
        return replace(self, theta=found)


def _sizes(states: int, inputs: int, outputs: int, decay: float) -> torch.Generator:
    if min(states, inputs, outputs) < 1:
        raise ValueError(
            f"a cell needs a state, an input and an output; got {states}, {inputs}, {outputs}"
        )
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay!r}; a stable recurrence has ρ in (0, 1)")
    return torch.Generator()


def diagonal_cell(
    states: int, *, inputs: int = 1, outputs: int = 1, decay: float, seed: int
) -> Cell:
    """Return a diagonal linear state-space model, h_t = a∘h_{t−1} + B u_t, y_t = C h_t, with θ = (a, B, C).

    Parameters
    ----------
    states, inputs, outputs : int
    decay : float
        ρ in (0, 1): the largest |a|; the entries of a lie evenly in [ρ/2, ρ], so that ‖Aᵏ‖ = ρᵏ.
    seed : int
        Of B and C: normal with variances 1/m and 1/d.

    Raises
    ------
    ValueError
        A decay outside (0, 1), or a size below 1.
    """
    generator = _sizes(states, inputs, outputs, decay).manual_seed(seed)
    a = decay * torch.linspace(1.0, 0.5, states, dtype=torch.float64)
    b = torch.randn(states * inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    c = torch.randn(outputs * states, generator=generator, dtype=torch.float64) / states**0.5

    def step(theta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = torch.split(theta, [states, states * inputs, outputs * states])
        h = a * h + b.view(states, inputs) @ u
        return h, c.view(outputs, states) @ h

    return Cell(step, torch.cat([a, b, c]), states, inputs, outputs)


def gated_cell(states: int, *, inputs: int = 1, outputs: int = 1, decay: float, seed: int) -> Cell:
    """Return a recurrence whose decay depends on the input, h_t = ρσ(w + V u_t)∘h_{t−1} + B u_t, with θ = (w, V, B, C).

    As in RWKV the propagator is diagonal and its norm is below ρᵏ whatever θ is. Arguments and errors as `diagonal_cell`.
    """
    generator = _sizes(states, inputs, outputs, decay).manual_seed(seed)
    normal = [
        torch.randn(count, generator=generator, dtype=torch.float64) * scale
        for count, scale in (
            (states * inputs, inputs**-0.5),
            (states * inputs, inputs**-0.5),
            (outputs * states, states**-0.5),
        )
    ]

    def step(theta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        w, v, b, c = torch.split(
            theta, [states, states * inputs, states * inputs, outputs * states]
        )
        h = decay * torch.sigmoid(w + v.view(states, inputs) @ u) * h + b.view(states, inputs) @ u
        return h, c.view(outputs, states) @ h

    w = torch.full((states,), 2.0, dtype=torch.float64)
    return Cell(step, torch.cat([w, *normal]), states, inputs, outputs)


class Unrolled:
    """A cell run over one sequence, from h = 0, with a copy of its parameters in every step.

    Parameters
    ----------
    cell : Cell
    inputs : (T, m), u_1 … u_T; T ≥ 2.

    Attributes
    ----------
    steps : int, T.
    rows : int, N = T·o: the outputs, step after step.

    Raises
    ------
    ValueError
        Fewer than two steps, inputs of another width, values that are not finite.
    """

    def __init__(self, cell: Cell, inputs: ArrayLike | Tensor) -> None:
        found = torch.as_tensor(inputs, dtype=torch.float64)
        if found.ndim != 2 or found.shape[1] != cell.inputs:
            raise ValueError(
                f"inputs have shape {tuple(found.shape)}; expected (steps, {cell.inputs})"
            )
        if len(found) < 2:
            raise ValueError(
                f"{len(found)} step(s): a recurrence needs two or more to have copies that differ"
            )
        if not (torch.isfinite(found).all() and torch.isfinite(cell.theta).all()):
            raise ValueError("inputs or parameters are not finite")
        self.cell, self.inputs = cell, found
        self.steps, self.rows = len(found), len(found) * cell.outputs

    def _run(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros(self.cell.states, dtype=torch.float64)
        states, outputs = [], []
        for theta, u in zip(copies, self.inputs, strict=True):
            h, y = self.cell.step(theta, h, u)
            states.append(h)
            outputs.append(y)
        return torch.stack(states), torch.cat(outputs)

    def _tied(self) -> Tensor:
        return self.cell.theta.expand(self.steps, -1).clone()

    def _jacobian(self, copies: Tensor) -> Tensor:
        found: Tensor = jacrev(lambda at: self._run(at)[1])(copies)  # (N, T, p)
        return found.transpose(0, 1)

    def output(self) -> Array:
        """Return y_1 … y_T, (N,)."""
        return self._run(self._tied())[1].numpy()

    def states(self) -> Array:
        """Return h_1 … h_T, (T, d)."""
        return self._run(self._tied())[0].numpy()

    def copies(self) -> Array:
        """Return J^(1) … J^(T), (T, N, p): the copy of step l moves the outputs from step l on. Cost: N backward passes."""
        return self._jacobian(self._tied()).numpy()

    def velocity(self, error: ArrayLike, *, tied: bool = True) -> Array:
        """Return θ̇ of every copy under gradient flow of ½‖e‖², (T, p).

        Parameters
        ----------
        error : (N,), e = target − output.
        tied : bool
            True: all copies move along Σ_m J^(m)ᵀe, as shared weights do. False: copy m moves along its own J^(m)ᵀe.
        """
        e = np.asarray(error, dtype=np.float64)
        if e.shape != (self.rows,):
            raise ValueError(
                f"error has shape {e.shape}; expected ({self.rows},), one number per output of every step"
            )
        own: Array = np.einsum("lnp,n->lp", self.copies(), e)
        return np.broadcast_to(own.sum(0), own.shape).copy() if tied else own

    def rates(self, velocity: ArrayLike) -> Array:
        """Return J̇^(1) … J̇^(T), (T, N, p), when copy m moves along `velocity[m]`, (T, p). Exact, by forward over reverse mode."""
        along = torch.as_tensor(np.asarray(velocity, dtype=np.float64))
        at = self._tied()
        if along.shape != at.shape:
            raise ValueError(
                f"velocity has shape {tuple(along.shape)}; expected {tuple(at.shape)}, one row per step"
            )
        moved = jvp(self._jacobian, (at,), (along,))[1]
        found: Array = moved.detach().numpy()
        return found

    def row_tail(self, rates: ArrayLike, band: int) -> Array:
        """Return the operator norm of the rows of J̇^(l) after step l + K, (T,)."""
        moved = np.asarray(rates, dtype=np.float64)
        after = [(i + band + 1) * self.cell.outputs for i in range(self.steps)]
        return np.array(
            [
                np.linalg.norm(m[a:], 2) if a < self.rows else 0.0
                for m, a in zip(moved, after, strict=True)
            ]
        )


def readout_coefficients(unrolled: Unrolled, rates: ArrayLike, *, band: int) -> Coefficients:
    """Return right coefficients that reproduce the rows l … l + K of J̇^(l) by the readout of the copies there.

    The readout of copy t moves y_t alone, by h_t: so B_tl = (I ⊗ h_t/‖h_t‖²) · (rows of step t of J̇^(l)), and ‖B_tl‖ is the norm of
    those rows over ‖h_t‖. What is left of J̇^(l) is its row tail.

    Parameters
    ----------
    unrolled : Unrolled
    rates : (T, N, p)
        From :meth:`Unrolled.rates`.
    band : int, K ≥ 0.

    Raises
    ------
    ValueError
        If some h_t is 0 (its readout then moves nothing), or the band is negative.
    """
    if int(band) != band or band < 0:
        raise ValueError(f"band is {band!r}; expected a whole number from 0")
    moved, h = np.asarray(rates, dtype=np.float64), unrolled.states()
    lengths = np.linalg.norm(h, axis=1)
    if (lengths == 0).any():
        raise ValueError(
            f"h is 0 in step {int(np.argmin(lengths))}: the readout of that copy moves no output"
        )
    o, p = unrolled.cell.outputs, moved.shape[2]
    parts: list[dict[int, Array]] = []
    for i in range(unrolled.steps):
        row = {}
        for t in range(i, min(i + band, unrolled.steps - 1) + 1):
            row[t] = np.zeros((p, p))
            row[t][-o * unrolled.cell.states :] = (
                np.kron(np.eye(o), h[t][:, None] / lengths[t] ** 2) @ moved[i, t * o : (t + 1) * o]
            )
        parts.append(row)
    tail = unrolled.row_tail(moved, int(band))
    rest = np.array([np.linalg.norm(m[(i + band + 1) * o :]) for i, m in enumerate(moved)])
    size = np.maximum(np.linalg.norm(moved, axis=(1, 2)), np.finfo(float).tiny)
    ranks = np.array([len(row) * o for row in parts])
    return Coefficients("right", int(band), parts, rest / size, tail, ranks)


def _rho(rho: float) -> float:
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho!r}; a decaying path has ρ in (0, 1)")
    return float(rho)


def path_tail(band: int, rho: float) -> float:
    """Return Σ_{k>K} (1+k)ρᵏ: the derivative of Aᵏ has k places to act on, so paths count k times. Total: K = −1."""
    r = _rho(rho)
    return float(r ** (band + 1) * ((band + 2) * (1 - r) + r) / (1 - r) ** 2)


def interaction_range(delta: float, rho: float, *, relative: bool = False) -> int:
    """Return the smallest K ≥ 0 with Σ_{k>K} (1+k)ρᵏ ≤ δ, or ≤ δ times the whole sum if `relative`.

    Absolute: K = O((log 1/δ + log 1/(1−ρ))/(1−ρ)). Relative: K = O(log(1/δ)/(1−ρ)), the form of equation (8).

    Raises
    ------
    ValueError
        If δ is not positive or ρ not in (0, 1).

    Notes
    -----
    With x = K + 1 + 1/(1−ρ) the tail is δ where xρˣ = δ(1−ρ)ρ^{1/(1−ρ)}: Lambert's function, branch −1.
    """
    r = _rho(rho)
    if not delta > 0:
        raise ValueError(f"delta is {delta!r}; expected a positive tolerance")
    goal = delta * path_tail(-1, r) if relative else delta
    if path_tail(0, r) <= goal:
        return 0
    mu = -np.log(r)
    x = float(lambertw(-mu * goal * (1 - r) * r ** (1 / (1 - r)), -1).real) / -mu
    band = max(int(np.ceil(x - 1 - 1 / (1 - r))) - 1, 0)  # one below, against rounding
    while path_tail(band, r) > goal:
        band += 1
    return band
