"""A recurrent network unrolled in time: a copy of its parameters a step, and their Jacobians.

A `Cell` is one step; `Unrolled` runs it over a sequence with a copy of θ in each step, J^(l) =
∂(y_1 … y_T)/∂θ_l. The tied network has J = Σ_l J^(l), so its M = JJᵀ is not Σ_l J^(l)J^(l)ᵀ.
Reverse mode through the unrolled graph, float64; sums over steps, not means, as in the paper: θ̇ =
Jᵀe. What is done with the blocks is in :mod:`grsd.renorm.theorems.jacobian`. Source: 2512.18209,
Proposition 2 and appendix A.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.func import jacrev, jvp

from grsd import checks

__all__ = ["Cell", "Unrolled", "diagonal_cell", "gated_cell"]

Array = NDArray[np.float64]
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cell:
    """One step of a recurrence and its readout: (h_t, y_t) = step(θ, h_{t−1}, u_t), y_t = C h_t."""

    step: Step  # θ (p,), h (d,), u (m,) → h (d,), y (o,); PyTorch, with two derivatives
    theta: Tensor  # (p,) float64. Its last o·d entries are C, row by row
    states: int  # d
    inputs: int  # m
    outputs: int  # o

    def at(self, theta: ArrayLike | Tensor) -> Cell:
        """Return the same cell with other parameters (p,)."""
        moved = torch.as_tensor(theta, dtype=torch.float64)
        return replace(self, theta=checks.shape("θ", moved, tuple(self.theta.shape)))


def _drawn(
    sizes: tuple[int, int, int], decay: float, seed: int, matrices: str
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Normal matrices of variance 1/columns, raveled, with their shapes; "C" is (o, d)."""
    states, inputs, outputs = checks.at_least("states, inputs, outputs", sizes, 1)
    checks.between("decay", decay, 0, 1, "()", "a stable recurrence has ρ in (0, 1)")
    shapes = [(outputs, states) if name == "C" else (states, inputs) for name in matrices]
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.randn(rows * columns, generator=generator, dtype=torch.float64) / columns**0.5
        for rows, columns in shapes
    ]
    return draws, shapes


def diagonal_cell(
    states: int, *, inputs: int = 1, outputs: int = 1, decay: float, seed: int
) -> Cell:
    """Return a diagonal state-space model, h_t = a∘h_{t−1} + B u_t, y_t = C h_t.

    θ = (a, B, C). `decay` is ρ in (0, 1), the largest |a|; the entries of a lie evenly in [ρ/2, ρ],
    so that ‖Aᵏ‖ = ρᵏ. B and C are normal with variances 1/m and 1/d.
    """
    drawn, shapes = _drawn((states, inputs, outputs), decay, seed, "BC")

    def step(theta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = _parts(theta, [(states,), *shapes])
        h = a * h + b @ u
        return h, c @ h

    a = decay * torch.linspace(1.0, 0.5, states, dtype=torch.float64)
    return Cell(step, torch.cat([a, *drawn]), states, inputs, outputs)


def gated_cell(states: int, *, inputs: int = 1, outputs: int = 1, decay: float, seed: int) -> Cell:
    """Return a recurrence whose decay depends on the input, h_t = ρσ(w + V u_t)∘h_{t−1} + B u_t.

    θ = (w, V, B, C). As in RWKV the propagator is diagonal and its norm is below ρᵏ whatever θ is.
    """
    drawn, shapes = _drawn((states, inputs, outputs), decay, seed, "VBC")

    def step(theta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        w, v, b, c = _parts(theta, [(states,), *shapes])
        h = decay * torch.sigmoid(w + v @ u) * h + b @ u
        return h, c @ h

    w = torch.full((states,), 2.0, dtype=torch.float64)
    return Cell(step, torch.cat([w, *drawn]), states, inputs, outputs)


def _parts(theta: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [x.view(shape) for x, shape in zip(torch.split(theta, sizes), shapes, strict=True)]


class Unrolled:
    """A cell run over u_1 … u_T, (T, m), T ≥ 2, from h = 0, with a copy of θ in every step.

    Attributes
    ----------
    steps : int, T.
    rows : int, N = T·o: the outputs, step after step.
    """

    def __init__(self, cell: Cell, inputs: ArrayLike | Tensor) -> None:
        self.cell, self.inputs = cell, torch.as_tensor(inputs, dtype=torch.float64)
        checks.shape("inputs", self.inputs, ("steps", cell.inputs))
        self.steps = len(self.inputs)
        self.rows = self.steps * cell.outputs
        why = "a recurrence needs two or more to have copies that differ"
        checks.at_least("number of steps", self.steps, 2, why)
        checks.finite("inputs", self.inputs)
        checks.finite("θ", cell.theta)

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
        by_row: Tensor = jacrev(lambda at: self._run(at)[1])(copies)  # (N, T, p)
        return by_row.transpose(0, 1)

    def output(self) -> Array:
        """Return y_1 … y_T, (N,)."""
        return self._run(self._tied())[1].numpy()

    def states(self) -> Array:
        """Return h_1 … h_T, (T, d)."""
        return self._run(self._tied())[0].numpy()

    def copies(self) -> Array:
        """Return J^(1) … J^(T), (T, N, p): step l moves outputs from l on. Cost: N gradients."""
        return self._jacobian(self._tied()).numpy()

    def velocity(self, error: ArrayLike, *, tied: bool = True) -> Array:
        """Return θ̇ of every copy, (T, p), under gradient flow of ½‖e‖², e = target − output, (N,).

        `tied`: all copies move along Σ_m J^(m)ᵀe, as shared weights do; else copy m along its own
        J^(m)ᵀe.
        """
        e = checks.shape("error", np.asarray(error, dtype=np.float64), (self.rows,))
        own: Array = np.einsum("lnp,n->lp", self.copies(), e)
        return np.broadcast_to(own.sum(0), own.shape).copy() if tied else own

    def rates(self, velocity: ArrayLike) -> Array:
        """Return J̇^(1) … J̇^(T), (T, N, p), when copy m moves along `velocity[m]`, (T, p).

        Exact, by forward over reverse mode.
        """
        at = self._tied()
        along = torch.as_tensor(np.asarray(velocity, dtype=np.float64))
        checks.shape("velocity", along, tuple(at.shape))
        return jvp(self._jacobian, (at,), (along,))[1].detach().numpy()

    def row_tail(self, rates: ArrayLike, band: int) -> Array:
        """Return the operator norm of the rows of J̇^(l) after step l + K, (T,)."""
        moved = np.asarray(rates, dtype=np.float64)
        beyond = [m[(i + band + 1) * self.cell.outputs :] for i, m in enumerate(moved)]
        return np.array([np.linalg.norm(rows, 2) if rows.size else 0.0 for rows in beyond])
