"""The balance of sharp shells over a span of time, with every passage over an edge located.

Between two passages equation (2) of 2512.10427 holds; at each a shell loses ½ g_u² to its
neighbour. A `Motion` gives M, Ṁ and e at given times, of a network's flow or written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import cubature, solve_ivp
from scipy.optimize.elementwise import find_root
from torch import Tensor
from torch.func import vmap

from grsd import checks
from grsd.dynamics.balance import shell_balance
from grsd.dynamics.modes import Modes, modes
from grsd.dynamics.problem import Problem
from grsd.spectrum.shells import LogShells

__all__ = ["Crossing", "IntegratedBalance", "Motion", "instants", "integrated_balance", "moving"]

Array = NDArray[np.float64]
Instants = tuple[Array, Array, Array]
Motion = Callable[[Array], Instants]  # times (k,) ↦ M (k, n, n), Ṁ (k, n, n), e (k, n)


class Crossing(NamedTuple):
    """An eigenvalue that passes an edge."""

    time: float
    mode: int  # its number in ascending order at that time
    edge: float  # λ of the edge
    upward: bool
    energy: float  # ½ g_u² at that time, which leaves one cell and enters the next
    source: int  # cell that it leaves
    target: int  # cell that it enters


@dataclass(frozen=True)
class IntegratedBalance:
    """The balance of every cell over a span of time.

    Attributes
    ----------
    before, after : (N+3,), energies at the two ends.
    dissipated : (N+3,), ∫ D_α dt.
    exchanged : (N+3, N+3), ∫ F_{β→α} dt.
    crossings : tuple of Crossing, in order of time.
    error : float, the quadrature's own estimate of its largest error.
    """

    shells: LogShells
    before: Array
    after: Array
    dissipated: Array
    exchanged: Array
    crossings: tuple[Crossing, ...]
    error: float

    @property
    def carried(self) -> Array:
        """Energy that modes brought into each cell by crossing an edge, less what left, (N+3,)."""
        carried = np.zeros(len(self.before))
        for c in self.crossings:
            carried[c.target] += c.energy
            carried[c.source] -= c.energy
        return carried

    @property
    def printed_residual(self) -> Array:
        """What (2) and (3) leave unexplained: E_α(stop) − E_α(start) − ∫(2) dt, (N+3,)."""
        return self.after - self.before + self.dissipated - self.exchanged.sum(axis=1)

    @property
    def residual(self) -> Array:
        """What is left once the crossings are counted, (N+3,): 0 but for rounding and `error`."""
        return self.printed_residual - self.carried


def moving(problem: Problem, stop: float) -> Motion:
    """Follow gradient flow from time 0 to `stop`, and return times ↦ (M, Ṁ, e), dense in time.

    By DOP853 to 1e-13 per step: what the path lacks in accuracy appears in the residual of the
    balance. Many times in one call are much cheaper than many calls: Jacobians are batched.
    """
    _refuse_kinks(problem)
    done = solve_ivp(
        lambda _, theta: problem.velocity(theta).cpu().numpy(),
        (0.0, float(stop)),
        problem.theta.detach().cpu().numpy(),
        method="DOP853",
        dense_output=True,
        rtol=1e-13,
        atol=1e-15,
    )
    if not done.success:
        raise ValueError(f"the flow stopped at t = {done.t[-1]:.4g}: {done.message}")
    return lambda times: instants(problem, done.sol(times).T)


def _refuse_kinks(problem: Problem) -> None:
    if problem.kinks:
        raise ValueError(
            f"this network uses {', '.join(problem.kinks)}: M(t) jumps, and no balance with Ṁ "
            "holds over a jump. Use a smooth activation"
        )


def instants(problem: Problem, thetas: Tensor | Array) -> Instants:
    """Return M (k, n, n), Ṁ (k, n, n), e (k, n) of gradient flow at k parameter vectors (k, P).

    The same as :func:`grsd.dynamics.modes.instant` at each, in batches, and refused where that is.
    """
    n = problem.samples
    _refuse_kinks(problem)

    def one(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, j = problem.targets - problem._output(theta), problem._jacobian(theta)
        half = problem._jacobian_rate(theta, j.T @ e / n) @ j.T / n
        return j @ j.T / n, half + half.T, e

    stacked = torch.as_tensor(thetas, dtype=torch.float64, device=problem.theta.device)
    problem._check_curvature(stacked[0], problem.velocity(stacked[0]))
    M, rate, e = (a.detach().cpu().numpy() for a in vmap(one, chunk_size=64)(stacked))
    return M, rate, e


def integrated_balance(
    motion: Motion, shells: LogShells, times: ArrayLike, *, tolerance: float = 1e-13
) -> IntegratedBalance:
    """Integrate the balance of every shell from the first to the last of `times`.

    Parameters
    ----------
    motion : Motion
        E.g. from :func:`moving`.
    times : (K,), ascending
        Where the spectrum is looked at. Between two of them an eigenvalue's position and slope say
        whether it passed an edge; a shorter visit is missed, and shows in the residual. The
        dimension of the kernel must not change.
    tolerance : float
        Absolute, of the adaptive quadrature (Gauss–Kronrod, split at the crossings), an energy.

    Notes
    -----
    Cost: one `motion` and one dense eigenproblem per time, per step of a root search, and per node
    of the quadrature (21 a piece).
    """
    grid = checks.ascending("times", times, 2, "expected two or more numbers in ascending order")

    def at(t: Array) -> list[Modes]:
        return [modes(*now) for now in zip(*motion(t), strict=True)]

    def integrand(t: Array) -> Array:
        balances = [shell_balance(now, shells) for now in at(t[:, 0])]
        return np.stack([np.append(now.dissipation, now.exchange) for now in balances])

    # the crossings first: between two of them the integrand is smooth
    looks = at(grid)
    ranks = {int(look.in_kernel.sum()) for look in looks}
    if len(ranks) > 1:
        raise ValueError(f"the kernel of M has {sorted(ranks)} dimensions at different times")
    crossings = _crossings(at, looks, grid, shells)
    # dissipation and exchange in one vector-valued quadrature, whose panels end at the crossings
    inside = [[c.time] for c in crossings if grid[0] < c.time < grid[-1]]
    total = cubature(
        integrand, grid[:1], grid[-1:], rule="gk21", rtol=0.0, atol=tolerance, points=inside
    )
    count = len(shells) + 3
    return IntegratedBalance(
        shells=shells,
        before=shell_balance(looks[0], shells).energies,
        after=shell_balance(looks[-1], shells).energies,
        dissipated=total.estimate[:count],
        exchanged=total.estimate[count:].reshape(count, count),
        crossings=crossings,
        error=float(np.max(total.error)),
    )


def _crossings(
    at: Callable[[Array], list[Modes]], looks: list[Modes], grid: Array, shells: LogShells
) -> tuple[Crossing, ...]:
    """Every passage over an edge: bracketed on the grid, then found by a vectorised root search."""

    def height(t: Array, u: NDArray[np.int64], edge: Array) -> Array:
        return np.array([now.eigenvalues[k] for now, k in zip(at(t), u, strict=True)]) - edge

    def slope(t: Array, u: NDArray[np.int64]) -> Array:
        return np.array([now.rates[k] for now, k in zip(at(t), u, strict=True)])

    # height and slope over every edge at every look, (K, N+1, n); modes of ker M never pass
    eigenvalues = np.stack([look.eigenvalues for look in looks])[:, None, :]
    heights = eigenvalues - shells.edges[None, :, None]
    heights[:, :, looks[0].in_kernel] = -1.0
    slopes, over = np.stack([look.rates for look in looks])[:, None, :], heights >= 0
    passed = np.argwhere(over[1:] != over[:-1])
    brackets = [(grid[k], grid[k + 1], j, u) for k, j, u in passed]

    # on the same side at both ends, first towards the edge and then away: was it passed twice?
    nearing, leaving = slopes[:-1] * heights[:-1] < 0, slopes[1:] * heights[1:] > 0
    visits = np.argwhere((over[1:] == over[:-1]) & nearing & leaving)
    if len(visits):
        k, number, u = visits.T
        turn = find_root(slope, (grid[k], grid[k + 1]), args=(u,)).x
        twice = (height(turn, u, shells.edges[number]) >= 0) != over[k, number, u]
        for t, (i, j, w) in zip(turn[twice], visits[twice], strict=True):
            brackets += [(grid[i], t, j, w), (t, grid[i + 1], j, w)]
    if not brackets:
        return ()

    # all roots at once, then the energy of the mode that passes
    left, right, number, u = (np.array(column) for column in zip(*brackets, strict=True))
    edges = shells.edges[number]
    times = find_root(height, (left, right), args=(u, edges)).x
    upward = height(right, u, edges) >= 0
    crossings = []
    for t, now, w, j, up in zip(times, at(times), u, number.tolist(), upward, strict=True):
        energy = 0.5 * float(now.coefficients[w]) ** 2
        source, target = (j + 1, j + 2) if up else (j + 2, j + 1)  # edge j parts these cells
        edge = float(shells.edges[j])
        crossings.append(Crossing(float(t), int(w), edge, bool(up), energy, source, target))
    return tuple(sorted(crossings))
