"""The balance of sharp shells over a span of time, with every passage of an eigenvalue over an edge located.

Between two passages equation (2) of 2512.10427 holds; at each of them a shell loses ½ g_u² to its neighbour. A `Motion` says
where M, Ṁ and e are at given times: the flow of a network, or matrices written down.
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

from grsd.dynamics.balance import shell_balance
from grsd.dynamics.flow import Problem, Vector
from grsd.dynamics.modes import Modes, modes
from grsd.spectrum.shells import LogShells

__all__ = ["Crossing", "IntegratedBalance", "Motion", "instants", "integrated_balance", "moving"]

Array = NDArray[np.float64]
Instants = tuple[Array, Array, Array]
Motion = Callable[
    [Array], Instants
]  # times (k,) ↦ M (k, n, n), Ṁ (k, n, n), e (k, n), of a network or written down


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
    shells : LogShells
    start, stop : float
    before, after : (N+3,), energies at the two ends.
    dissipated : (N+3,), ∫ D_α dt.
    exchanged : (N+3, N+3), ∫ F_{β→α} dt.
    crossings : tuple of Crossing, in order of time.
    error : float, the quadrature's own estimate of its largest error.
    """

    shells: LogShells
    start: float
    stop: float
    before: Array
    after: Array
    dissipated: Array
    exchanged: Array
    crossings: tuple[Crossing, ...]
    error: float

    @property
    def carried(self) -> Array:
        """Energy of modes that entered each cell by crossing an edge, less that of modes that left it, (N+3,)."""
        found = np.zeros(len(self.before))
        for c in self.crossings:
            found[c.target] += c.energy
            found[c.source] -= c.energy
        return found

    @property
    def printed_residual(self) -> Array:
        """What equations (2) and (3) leave unexplained: E_α(stop) − E_α(start) − ∫(2) dt, (N+3,)."""
        found: Array = self.after - self.before + self.dissipated - self.exchanged.sum(axis=1)
        return found

    @property
    def residual(self) -> Array:
        """What is still unexplained once the crossings are counted, (N+3,): 0 but for rounding and `error`."""
        return self.printed_residual - self.carried


def moving(
    problem: Problem,
    stop: float,
    *,
    start: Vector | None = None,
    rtol: float = 1e-13,
    atol: float = 1e-15,
) -> Motion:
    """Follow gradient flow from time 0 to `stop`, and return times ↦ (M, Ṁ, e) with dense output between the steps.

    Parameters
    ----------
    problem : Problem
    stop : float, > 0
    start : (P,), optional
        θ at time 0; by default `problem.theta`.
    rtol, atol : float
        Tolerances of SciPy's DOP853. What the path lacks in accuracy appears in the residual of the balance.

    Raises
    ------
    ValueError
        If the network has kinks (Ṁ does not exist there), or the integrator fails.

    Notes
    -----
    Many times in one call are much cheaper than many calls: the Jacobians are batched, 64 at a time.
    """
    _refuse_kinks(problem)
    first = (problem.theta if start is None else torch.as_tensor(start)).detach().cpu().numpy()
    done = solve_ivp(
        lambda _, theta: problem.velocity(theta).cpu().numpy(),
        (0.0, float(stop)),
        first,
        method="DOP853",
        dense_output=True,
        rtol=rtol,
        atol=atol,
    )
    if not done.success:
        raise ValueError(f"the flow stopped at t = {done.t[-1]:.4g}: {done.message}")
    return lambda times: instants(problem, done.sol(times).T)


def _refuse_kinks(problem: Problem) -> None:
    if problem.kinks:
        raise ValueError(
            f"this network uses {', '.join(problem.kinks)}: M(t) jumps, and no balance with Ṁ integrates over a jump. "
            "Use a smooth activation"
        )


def instants(problem: Problem, thetas: Tensor | Array) -> Instants:
    """Return M (k, n, n), Ṁ (k, n, n) and e (k, n) of gradient flow at k parameter vectors (k, P), as arrays.

    The same as :func:`grsd.dynamics.modes.instant` at each, in batches; Ṁ by reverse mode twice, as in `Problem.kernel_rate`.

    Raises
    ------
    ValueError
        If the network has kinks.
    ArithmeticError
        As `Problem.kernel_rate`, at the first of the parameter vectors.
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
    """Integrate the balance of every shell from the first to the last of `times`, with every crossing located.

    Parameters
    ----------
    motion : callable
        times (k,) ↦ M (k, n, n), Ṁ (k, n, n), e (k, n), e.g. from :func:`moving`.
    shells : LogShells
    times : (K,), ascending
        Where the spectrum is looked at. Between two of them an eigenvalue's position and slope decide whether it passed an
        edge; a visit shorter than that is missed, and shows in the residual.
    tolerance : float
        Absolute tolerance of the adaptive quadrature (Gauss–Kronrod, split at the crossings), in units of energy.

    Returns
    -------
    IntegratedBalance

    Raises
    ------
    ValueError
        Times that do not ascend, a kernel that changes its dimension, or as `shell_balance`.

    Notes
    -----
    Between two crossings equation (2) holds; at a crossing E_α jumps by ½ g_u². Cost: one `motion` and one dense eigenproblem
    per time, per step of a root search, and per node of the quadrature (21 a piece).
    """
    grid = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all() or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"times must be two or more finite numbers in ascending order, got {grid!r}"
        )

    def at(t: Array) -> list[Modes]:
        return [modes(*now) for now in zip(*motion(t), strict=True)]

    def integrand(t: Array) -> Array:
        found = [shell_balance(now, shells) for now in at(t[:, 0])]
        return np.stack([np.append(now.dissipation, now.exchange) for now in found])

    looks = at(grid)
    ranks = {int(look.kernel.sum()) for look in looks}
    if len(ranks) > 1:
        raise ValueError(
            f"the kernel of M has {sorted(ranks)} dimensions at different times; start or stop elsewhere"
        )
    crossings = _crossings(at, looks, grid, shells)
    inside = [[c.time] for c in crossings if grid[0] < c.time < grid[-1]]
    total = cubature(
        integrand, grid[:1], grid[-1:], rule="gk21", rtol=0.0, atol=tolerance, points=inside
    )
    count = len(shells) + 3
    return IntegratedBalance(
        shells=shells,
        start=float(grid[0]),
        stop=float(grid[-1]),
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
    """Every passage of an eigenvalue over an edge: bracketed on the grid, then found by a vectorised root search."""
    values = (
        np.stack([look.eigenvalues for look in looks])[:, None, :] - shells.edges[None, :, None]
    )  # (K, N+1, n)
    slopes = np.stack([look.rates for look in looks])[:, None, :]
    values[:, :, looks[0].kernel] = -1.0
    over = values >= 0

    def height(t: Array, u: NDArray[np.int64], edge: Array) -> Array:
        return np.array([now.eigenvalues[k] for now, k in zip(at(t), u, strict=True)]) - edge

    def slope(t: Array, u: NDArray[np.int64]) -> Array:
        return np.array([now.rates[k] for now, k in zip(at(t), u, strict=True)])

    passed = np.argwhere(over[1:] != over[:-1])
    spans = [(grid[k], grid[k + 1], number, u) for k, number, u in passed]
    nearing, leaving = slopes[:-1] * values[:-1] < 0, slopes[1:] * values[1:] > 0
    visits = np.argwhere(
        (over[1:] == over[:-1]) & nearing & leaving
    )  # towards the edge and away: was it passed twice?
    if len(visits):
        k, number, u = visits.T
        turn = find_root(slope, (grid[k], grid[k + 1]), args=(u,)).x
        twice = (height(turn, u, shells.edges[number]) >= 0) != over[k, number, u]
        for t, (i, j, w) in zip(turn[twice], visits[twice], strict=True):
            spans += [(grid[i], t, j, w), (t, grid[i + 1], j, w)]
    if not spans:
        return ()
    left, right, number, u = (np.array(column) for column in zip(*spans, strict=True))
    edge = shells.edges[number]
    times = find_root(height, (left, right), args=(u, edge)).x
    upward = height(right, u, edge) >= 0
    found = [
        Crossing(
            time=float(t), mode=int(w), edge=float(shells.edges[j]), upward=bool(up),
            energy=0.5 * float(now.coefficients[w]) ** 2,
            source=j + 1 if up else j + 2, target=j + 2 if up else j + 1,
        )
        for t, now, w, j, up in zip(times, at(times), u, number.tolist(), upward, strict=True)
    ]  # fmt: skip
    return tuple(sorted(found))
