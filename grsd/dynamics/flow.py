"""Gradient flow, gradient descent and heavy ball of a network on fixed data, in float64.

`integrate` and `descend` move a :class:`grsd.dynamics.problem.Problem` and return a `Path`. What
the path means mode by mode is in :mod:`grsd.dynamics.modes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import quad, solve_ivp

from grsd import checks
from grsd.dynamics.problem import Problem, Vector

__all__ = ["Path", "around", "central", "descend", "effective_time", "integrate"]

Schedule = Callable[[float], float]
STENCIL = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280])


@dataclass(frozen=True)
class Path:
    """A trajectory of parameters.

    Attributes
    ----------
    times, thetas, losses : (K,), (K, P) and (K,) float64; the times of gradient descent are Σ η.
    error : float, for the flow the largest ‖θ − θ′‖₂ over `times` against a second run with a
        hundredfold looser tolerance, which it bounds; nan without that run, and 0 for descent.
    problem : Problem
    identity : float, for the flow the largest |L(t) − L(0) + ∫‖θ̇‖²|/L(0), else nan.
    """

    times: np.ndarray
    thetas: np.ndarray
    losses: np.ndarray
    error: float
    problem: Problem
    identity: float = float("nan")


def integrate(
    problem: Problem,
    times: np.ndarray | list[float],
    *,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    start: Vector | None = None,
    schedule: Schedule | None = None,
    step: float = 0.0,
    method: str = "DOP853",
    estimate: bool = True,
    limit: int = 200_000,
) -> Path:
    """Integrate gradient flow θ̇ = −∇L, or θ̇ = −η(t)∇L with a schedule, from the first of `times`.

    Parameters
    ----------
    times : (K,)
        Ascending, or descending for the flow run backwards; the path starts at `times[0]`.
    rtol, atol, method
        Local tolerances per parameter, and any explicit method, of SciPy's `solve_ivp`.
    start : (P,), optional, θ at `times[0]`; by default `problem.theta`.
    schedule : callable, optional, η(t) > 0.
    step : float
        Follow `problem.velocity(theta, step)` instead: the flow nearest to gradient descent of that
        step. `Path.identity` then belongs to the modified loss and is nan.
    estimate : bool
        Run again, at about half the cost, for `Path.error`.
    limit : int
        Evaluations of the velocity, after which the run is given up: the flow is too stiff for an
        explicit method (about 2 λ_max t are needed), or slides along a kink.
    """
    grid = np.asarray(times, dtype=np.float64)
    sign = -1.0 if grid[-1:] < grid[:1] else 1.0
    checks.ascending("times", sign * grid, 2, "expected two or more finite numbers in strict order")
    # the state is θ, and ∫‖θ̇‖² behind it
    begin = problem.theta if start is None else problem._theta(start)
    first = np.append(begin.detach().cpu().numpy(), 0.0)
    calls = 0

    def rate(t: float, state: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise ValueError(
                f"{method} used {limit} evaluations to get from t = {grid[0]:.4g} to {t:.6g}: "
                + _why_stuck(problem)
            )
        v = problem.velocity(state[:-1], step).cpu().numpy()
        factor = 1.0 if schedule is None else float(schedule(t))
        return np.append(factor * v, factor * (v @ v))

    def run(loosen: float) -> np.ndarray:
        nonlocal calls
        calls = 0
        span, tolerances = (grid[0], grid[-1]), {"rtol": loosen * rtol, "atol": loosen * atol}
        done = solve_ivp(rate, span, first, method=method, t_eval=grid, **tolerances)
        if not done.success or not np.isfinite(done.y).all():
            raise ValueError(f"{method} stopped at t = {done.t[-1]:.4g}: {done.message}")
        return done.y.T

    # along the exact flow ∫‖θ̇‖² is what the loss lost
    states = run(1.0)
    thetas, spent = states[:, :-1], states[:, -1]
    losses = np.array([problem.loss(theta) for theta in thetas])
    error = identity = float("nan")
    if estimate:
        error = float(np.linalg.norm(run(100.0)[:, :-1] - thetas, axis=1).max())
    if step == 0:
        unit = max(losses[0], np.finfo(float).tiny)
        identity = float(np.abs(losses - losses[0] + spent).max() / unit)
    return Path(grid, thetas, losses, error, problem, identity)


def _why_stuck(problem: Problem) -> str:
    if not problem.kinks:
        return "explicit methods need about 2 λ_max t of them; take shorter times, or raise limit"
    return (
        f"every sample that crosses a kink ({', '.join(problem.kinks)}) costs many small steps, "
        "and along one there is no solution; loosen rtol and atol, or use a smooth activation"
    )


def descend(
    problem: Problem,
    rate: float,
    steps: int,
    momentum: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    *,
    start: Vector | None = None,
    every: int = 1,
) -> Path:
    """Run gradient descent θ ← θ − η_k ∇L + μ (θ − θ_before), with η_k = rate · schedule(k).

    Parameters
    ----------
    rate : float
        η > 0, in units of time. A loss that diverges is refused with the ηλ_max at the start.
    momentum : float
        μ in [0, 1): heavy ball. Its clock runs faster, at late times 1/(1 − μ) times; the `times`
        of the path, τ_k = Σ_{j<k} η_j, do not contain this factor.
    schedule : callable, optional, a factor of step k = 0, 1, ...
    every : int
        Keep every so many steps (the first and the last always).
    """
    if not rate > 0 or steps < 1 or every < 1 or not 0 <= momentum < 1:
        given = f"{rate}, {steps}, {every}, {momentum}"
        raise ValueError(f"need rate > 0, steps, every ≥ 1 and 0 ≤ momentum < 1; got {given}")
    begin = (problem.theta if start is None else problem._theta(start)).detach()
    theta, drift = begin.clone(), torch.zeros_like(begin)
    initial = problem.loss(theta)
    times, thetas, losses, now = [0.0], [theta.cpu().numpy()], [initial], 0.0
    for k in range(steps):
        eta = rate * (1.0 if schedule is None else float(schedule(k)))
        # Polyak's step: without momentum, plain gradient descent
        drift = momentum * drift + eta * problem.velocity(theta)
        theta, now = theta + drift, now + eta
        if (k + 1) % every and k + 1 < steps:
            continue
        loss = problem.loss(theta)
        if not loss <= 1e3 * initial:
            top = eta * float(torch.linalg.eigvalsh(problem.kernel(begin))[-1])
            raise ValueError(
                f"the loss went from {initial:.3g} to {loss:.3g} in {k + 1} steps: ηλ_max = "
                f"{top:.3g} at the start, and a step is stable only while ηλ_max < "
                f"{2 * (1 + momentum):.3g}. Take a smaller rate"
            )
        times.append(now)
        thetas.append(theta.cpu().numpy())
        losses.append(loss)
    return Path(np.array(times), np.array(thetas), np.array(losses), 0.0, problem)


def effective_time(schedule: Schedule, t: np.ndarray | float) -> np.ndarray:
    """Return τ(t) = ∫₀ᵗ η(s) ds for every `t`, to 1e-12: θ̇ = −η(t)∇L is the flow at time τ(t)."""
    ends = np.atleast_1d(np.asarray(t, dtype=np.float64))
    tau = [quad(schedule, 0.0, end, epsabs=1e-13, epsrel=1e-13, limit=500)[0] for end in ends]
    return np.array(tau).reshape(np.shape(t))


def around(problem: Problem, theta: Vector, h: float) -> Path:
    """Return the flow through θ at the nine times −4h, …, 4h, for `central`: rtol 1e-13.

    Against stiff directions the backward half grows like exp(4 h λ_max): keep h λ_max < 1.
    """
    grid = h * np.arange(5.0)
    behind, ahead = (
        integrate(problem, times, start=theta, rtol=1e-13, atol=1e-15, estimate=False)
        for times in (-grid, grid)
    )
    times, thetas, losses = (
        np.concatenate([getattr(behind, name)[:0:-1], getattr(ahead, name)])
        for name in ("times", "thetas", "losses")
    )
    identity = max(ahead.identity, behind.identity)
    return Path(times, thetas, losses, float("nan"), problem, identity)


def central(values: np.ndarray, h: float) -> np.ndarray:
    """Return the derivative in the middle of nine equidistant values (9, ...), to O(h⁸)."""
    nine = np.asarray(values, dtype=np.float64)
    if len(nine) != 9:
        raise ValueError(f"the difference needs nine values, got {len(nine)}")
    return np.tensordot(STENCIL / h, nine, axes=1)
