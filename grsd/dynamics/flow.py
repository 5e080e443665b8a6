"""Gradient flow, gradient descent and heavy ball of a network on fixed data, in float64.

A `Problem` is the network as functions of one flat parameter vector; `integrate` and `descend` move it and return a
`Path`. What the path means mode by mode is in :mod:`grsd.dynamics.modes`.

Conventions: e = target − output, ⟨u, v⟩ = (1/n) Σ u v, L = ½⟨e, e⟩, M = J Jᵀ/n, θ̇ = Jᵀe/n = −∇L, so that ė = −M e.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd.spectrum.ntk import refuse_dropout

__all__ = ["Path", "Problem", "around", "central", "descend", "effective_time", "integrate", "orbit_gap"]

Vector = Tensor | np.ndarray
Schedule = Callable[[float], float]

# Nodes of the autograd graph whose function has no continuous second derivative: M(t) or Ṁ(t) jumps where they kink.
KINKS = (
    "Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold", "Hardtanh", "Hardsigmoid", "Hardswish",
    "Hardshrink", "Softshrink", "Elu", "Celu", "Abs", "Clamp", "ClampMin", "ClampMax", "Maximum", "Minimum", "Max",
    "Min", "Amax", "Amin", "MaxPool", "AdaptiveMaxPool", "FractionalMaxPool", "Topk", "Sort", "Median", "Sign",
    "Round", "Floor", "Ceil", "Trunc",
)  # fmt: skip


class Problem:
    """A network on fixed data, in float64, as functions of a flat parameter vector.

    Parameters
    ----------
    model : nn.Module
        Any module with one number per sample: its output on `inputs` has shape (n,) or (n, 1). It is copied and the copy
        converted to float64; the original is not touched. Parameters that require no gradient stay fixed.
    inputs : Tensor, (n, ...)
        Given to the model whole. Floating inputs are converted to float64.
    targets : Tensor, (n,) or (n, 1)

    Attributes
    ----------
    theta : Tensor, (P,) float64. The parameters as found, in the order of `model.parameters()`.
    samples : int, n.
    kinks : tuple of str. Operations of the forward pass without a continuous second derivative (ReLU, hardtanh, max, ...);
        where it is not empty, M(t) jumps or bends and Ṁ does not exist at those times.

    Raises
    ------
    ValueError
        More than one number per sample, shapes that do not fit, active dropout, batch statistics in training mode, no
        trainable parameter, values that are not finite.
    TypeError
        Complex parameters or targets.

    Notes
    -----
    Every method takes θ as a tensor or an array (P,) and returns float64 tensors on the model's device. Source:
    2512.10427, section 2.2, with J∗ = Jᵀ/n the adjoint in L² of the empirical measure.
    """

    theta: Tensor
    samples: int
    kinks: tuple[str, ...]

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        refuse_dropout(model)
        for name, module in model.named_modules():
            if getattr(module, "track_running_stats", False) and module.training:
                raise ValueError(
                    f"{name!r} uses the statistics of the batch and updates buffers: call model.eval() first"
                )
        named = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("no parameter of the model requires a gradient, so nothing can move")
        if any(p.is_complex() for _, p in named) or targets.is_complex():
            raise TypeError("complex parameters or targets: the flow here is that of real numbers")
        self._model = copy.deepcopy(model).to(torch.float64)
        for p in self._model.parameters():
            p.requires_grad_(False)
        self._shapes = {name: p.shape for name, p in named}
        self.theta = torch.cat([p.reshape(-1).to(torch.float64) for _, p in named])
        self._set_data(inputs, targets)

    def _set_data(self, inputs: Tensor, targets: Tensor) -> None:
        floating = inputs.is_floating_point()
        self.inputs = inputs.detach().to(self.theta.device, torch.float64 if floating else None)
        targets = targets.detach().to(self.theta.device, torch.float64)
        n = len(self.inputs)
        if targets.shape not in ((n,), (n, 1)):
            raise ValueError(f"targets have shape {tuple(targets.shape)}; expected one number for each of {n} inputs")
        self.targets = targets.reshape(n)
        self.samples = n
        self._curvature_checked = False
        self.kinks = self._probe()

    def _probe(self) -> tuple[str, ...]:
        """Run the model once: check its output, list its kinks, and find out whether samples mix."""
        theta = self.theta.clone().requires_grad_(True)
        with torch.enable_grad():
            found = self._forward(theta, self.inputs)
        n = self.samples
        if found.shape not in ((n,), (n, 1)):
            raise ValueError(
                f"the model gives shape {tuple(found.shape)} for {n} inputs; the flow here is that of one number per "
                "sample, (n,) or (n, 1): wrap the model so that it returns the output you mean"
            )
        if not (torch.isfinite(found).all() and torch.isfinite(self.targets).all()):
            raise ValueError("outputs or targets are not finite; check the model and the data")
        if not found.requires_grad:
            raise ValueError("the outputs carry no gradient: was the model's forward run under no_grad or detached?")
        kinks = _kinks(found)
        # One random cotangent tells whether row i depends on sample i alone, which makes J n times cheaper.
        u = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(theta.device)
        (whole,) = torch.autograd.grad(found.reshape(n), theta, u)
        self._rowwise = True
        try:
            rows = self.jacobian(self.theta).T @ u
            self._rowwise = bool(torch.allclose(rows, whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max())))
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # vmap meets an operation without a batching rule, or needs a batch
            self._rowwise = False
        return kinks

    def _forward(self, theta: Tensor, inputs: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in self._shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
            out: Tensor = functional_call(self._model, parameters, (inputs,))
        return out

    def _output(self, theta: Tensor) -> Tensor:
        return self._forward(theta, self.inputs).reshape(self.samples)

    def _theta(self, theta: Vector) -> Tensor:
        found = torch.as_tensor(theta, dtype=torch.float64, device=self.theta.device)
        if found.shape != self.theta.shape:
            raise ValueError(f"θ has shape {tuple(found.shape)}; this network has {tuple(self.theta.shape)}")
        return found

    def output(self, theta: Vector) -> Tensor:
        """Return f(θ), (n,). Cost: one forward pass."""
        return self._output(self._theta(theta))

    def error(self, theta: Vector) -> Tensor:
        """Return e = target − f(θ), (n,). Cost: one forward pass."""
        return self.targets - self.output(theta)

    def loss(self, theta: Vector) -> float:
        """Return L = ½⟨e, e⟩ = Σ e²/2n. Cost: one forward pass."""
        return 0.5 * float(self.error(theta).square().mean())

    def velocity(self, theta: Vector, step: float = 0.0) -> Tensor:
        """Return θ̇ = Jᵀe/n = −∇L, (P,). Cost: one forward and one backward pass.

        With `step` = η > 0: −∇(L + (η/4)‖∇L‖²), the flow that gradient descent of that step follows to O(η²), at twice the cost
        (backward error analysis; Barrett and Dherin, arXiv:2009.11162).
        """
        at = self._theta(theta).detach().requires_grad_(True)
        with torch.enable_grad():
            loss = 0.5 * (self.targets - self._output(at)).square().mean()
            (gradient,) = torch.autograd.grad(loss, at, create_graph=step != 0)
            if step != 0:
                (bend,) = torch.autograd.grad(gradient.square().sum(), at)
                gradient = gradient.detach() + step / 4 * bend
        return -gradient

    def _jacobian(self, theta: Tensor) -> Tensor:
        if not self._rowwise:
            found: Tensor = jacrev(self._output)(theta)
            return found

        def one(theta: Tensor, x: Tensor) -> Tensor:
            return self._forward(theta, x.unsqueeze(0)).reshape(())

        rows: Tensor = vmap(grad(one), in_dims=(None, 0))(theta, self.inputs)
        return rows

    def jacobian(self, theta: Vector) -> Tensor:
        """Return J = ∂f/∂θ, (n, P). Cost: n backward passes of one sample (of the whole batch if samples mix)."""
        return self._jacobian(self._theta(theta)).detach()

    def kernel(self, theta: Vector) -> Tensor:
        """Return M = J Jᵀ/n, (n, n), symmetric. Cost: a Jacobian."""
        j = self.jacobian(theta)
        return _symmetric(j @ j.T) / self.samples

    def kernel_rate(self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False) -> Tensor:
        """Return Ṁ = (J̇ Jᵀ + J J̇ᵀ)/n along θ̇ (or `direction`), (n, n), by autodiff of the Jacobian.

        Exact up to rounding: no difference quotient enters. Cost: about three Jacobians.

        Parameters
        ----------
        theta : (P,)
        direction : (P,), optional
            By default `velocity(theta)`, the direction of gradient flow.
        piecewise : bool
            Allow networks with kinks. The result is then the derivative between two kinks; it knows nothing of the jumps.

        Raises
        ------
        ValueError
            If the network has kinks and `piecewise` was not asked for.
        ArithmeticError
            If a difference quotient, taken once per problem, says that autodiff is wrong.
        """
        if self.kinks and not piecewise:
            raise ValueError(
                f"this network uses {', '.join(self.kinks)}: M(t) jumps or bends where a sample crosses the kink, so Ṁ does "
                "not exist there. Use a smooth activation, or piecewise=True for the derivative between two kinks"
            )
        at = self._theta(theta)
        along = self.velocity(at) if direction is None else self._theta(direction)
        if not self.kinks:
            self._check_curvature(at, along)
        half = self._jacobian_rate(at, along).detach() @ self.jacobian(at).T / self.samples
        return half + half.T

    def _jacobian_rate(self, theta: Tensor, along: Tensor) -> Tensor:
        """d/ds J(θ + s·along) at s = 0, (n, P): row i is ∇(∇f_i · along), reverse mode twice.

        Forward mode over reverse mode would cost less, and is wrong for layer and batch normalisation: PyTorch's second
        forward derivative of both drops the motion of the statistics (its issues 196699 and 196700).
        """
        if not self._rowwise:

            def row(u: Tensor) -> Tensor:
                slope: Tensor = grad(lambda at: vjp(self._output, at)[1](u)[0] @ along)(theta)
                return slope

            found: Tensor = vmap(row)(torch.eye(self.samples, dtype=torch.float64, device=theta.device))
            return found

        def one(at: Tensor, x: Tensor) -> Tensor:
            return self._forward(at, x.unsqueeze(0)).reshape(())

        def curvature(at: Tensor, x: Tensor) -> Tensor:
            slope: Tensor = grad(lambda moved: grad(one)(moved, x) @ along)(at)
            return slope

        rows: Tensor = vmap(curvature, in_dims=(None, 0))(theta, self.inputs)
        return rows

    def _check_curvature(self, theta: Tensor, along: Tensor) -> None:
        """Compare uᵀJ̇ with a difference quotient, once per problem: some operations have wrong second derivatives."""
        if self._curvature_checked:
            return
        u = torch.randn(self.samples, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(theta.device)

        def pulled(at: Tensor) -> Tensor:
            found: Tensor = vjp(self._output, at)[1](u)[0]
            return found

        h = 1e-3 * float(1 + theta.abs().max()) / max(float(along.abs().max()), 1e-300)
        near, far = (pulled(theta + k * h * along) - pulled(theta - k * h * along) for k in (1, 2))
        expected, found = (8 * near - far) / (12 * h), u @ self._jacobian_rate(theta, along)
        # the quotient's own error: h⁴ times a fifth derivative, and 1e-16/h of the gradient
        scale = float(expected.abs().max()) + 1e-9 * float(pulled(theta).abs().max()) / h
        gap = float((expected - found).abs().max())
        if gap > 1e-4 * scale:
            raise ArithmeticError(
                f"the second derivative of this model by autodiff is off by {gap / scale:.2g} from a difference quotient: an "
                "operation in it has a wrong or no second derivative. Replace it by plain tensor operations"
            )
        self._curvature_checked = True

    def on(self, inputs: Tensor, targets: Tensor) -> Problem:
        """Return the same network on other data, e.g. a test set; θ is shared."""
        other = copy.copy(self)
        other._set_data(inputs, targets)
        return other

    def linearized(self, theta: Vector) -> Problem:
        """Return the model f(θ₀) + J(θ₀)(θ − θ₀), whose kernel does not move: M(t) = M(θ₀), Ṁ = 0."""
        return _Linearized(self, self._theta(theta))


class _Linearized(Problem):
    """A network replaced by its tangent at θ₀."""

    def __init__(self, parent: Problem, theta: Tensor) -> None:
        self._parent = parent
        self.theta, self.inputs, self.targets, self.samples = (
            theta.detach(),
            parent.inputs,
            parent.targets,
            parent.samples,
        )
        self.kinks = ()
        self._f0, self._j0 = parent.output(theta).detach(), parent.jacobian(theta)

    def _output(self, theta: Tensor) -> Tensor:
        return self._f0 + self._j0 @ (theta - self.theta)

    def _jacobian(self, theta: Tensor) -> Tensor:
        return self._j0 + 0.0 * theta

    def velocity(self, theta: Vector, step: float = 0.0) -> Tensor:
        e = self.error(theta)
        if step != 0:  # L + (η/4)‖∇L‖² has the gradient −Jᵀ(1 + (η/2)M)e/n
            e = e + step / 2 * self._j0 @ (self._j0.T @ e) / self.samples
        return self._j0.T @ e / self.samples

    def kernel_rate(self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False) -> Tensor:
        return self._j0.new_zeros(self.samples, self.samples)

    def on(self, inputs: Tensor, targets: Tensor) -> Problem:
        return _Linearized(self._parent.on(inputs, targets), self.theta)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.T) / 2


def _kinks(output: Tensor) -> tuple[str, ...]:
    """Names of the non-smooth nodes in the graph of `output`, sorted."""
    seen, todo, found = set(), [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().partition("Backward")[0]
        if name in KINKS or "MaxPool" in name:
            found.add(name.lower())
        todo.extend(parent for parent, _ in node.next_functions)
    return tuple(sorted(found))


@dataclass(frozen=True)
class Path:
    """A trajectory of parameters.

    Attributes
    ----------
    times : (K,) float64. Time of the flow; for gradient descent the effective time τ = Σ η.
    thetas : (K, P) float64.
    losses : (K,) float64, L = ½⟨e, e⟩.
    error : float. For the flow: estimated global error, the largest ‖θ − θ′‖₂ over `times` against a second run with a
        hundredfold looser tolerance (so it bounds the looser run); nan if that run was not asked for. For descent: 0, the
        iterates are what they are.
    identity : float. For the flow: the largest |L(t) − L(0) + ∫‖θ̇‖²|/L(0), which would be 0; nan for descent.
    problem : Problem
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
    problem : Problem
    times : (K,)
        Monotone, ascending or descending (the flow run backwards); the path starts at `times[0]`.
    rtol, atol : float
        Local tolerances of SciPy's `solve_ivp`, per parameter.
    start : (P,), optional
        θ at `times[0]`; by default `problem.theta`.
    schedule : callable, optional
        η(t) > 0.
    step : float
        Follow `problem.velocity(theta, step)` instead: the flow nearest to gradient descent of that step. `Path.identity` then
        belongs to the modified loss and is nan.
    method : str
        Any explicit method of `solve_ivp`; DOP853 by default.
    estimate : bool
        Run again with a hundredfold looser tolerance (about half the cost of the first run) for `Path.error`.
    limit : int
        Evaluations of the velocity, after which the run is given up: the flow is too stiff for an explicit method (about
        2 λ_max t are needed), or it slides along a kink of a network that is not smooth.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        Times that are not monotone or not finite, or a flow that the integrator cannot follow.
    """
    grid = np.asarray(times, dtype=np.float64)
    steps = np.diff(grid)
    if grid.ndim != 1 or len(grid) < 2 or not np.isfinite(grid).all() or not (np.all(steps > 0) or np.all(steps < 0)):
        raise ValueError(f"times must be two or more finite numbers in strict order, got {grid!r}")
    begin = problem.theta if start is None else problem._theta(start)
    first = np.append(begin.detach().cpu().numpy(), 0.0)

    calls = 0

    def rate(t: float, state: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > limit:
            why = (
                f"every sample that crosses a kink ({', '.join(problem.kinks)}) costs many small steps, and a flow that slides along "
                "one has no solution; loosen rtol and atol, or use a smooth activation"
                if problem.kinks
                else "an explicit method needs about 2 λ_max t of them; take shorter times, or raise limit"
            )
            raise ValueError(f"{method} used {limit} evaluations to get from t = {grid[0]:.4g} to {t:.6g}: {why}")
        v = problem.velocity(state[:-1], step).cpu().numpy()
        factor = 1.0 if schedule is None else float(schedule(t))
        return np.append(factor * v, factor * (v @ v))

    def run(loosen: float) -> np.ndarray:
        nonlocal calls
        calls = 0
        done = solve_ivp(
            rate, (grid[0], grid[-1]), first, method=method, t_eval=grid, rtol=loosen * rtol, atol=loosen * atol
        )
        if not done.success or not np.isfinite(done.y).all():
            raise ValueError(f"{method} stopped at t = {done.t[-1]:.4g}: {done.message}")
        found: np.ndarray = done.y.T
        return found

    states = run(1.0)
    thetas, spent = states[:, :-1], states[:, -1]
    losses = np.array([problem.loss(theta) for theta in thetas])
    error = float("nan")
    if estimate:
        error = float(np.linalg.norm(run(100.0)[:, :-1] - thetas, axis=1).max())
    identity = float("nan")
    if step == 0:
        identity = float(np.abs(losses - losses[0] + spent).max() / max(losses[0], np.finfo(float).tiny))
    return Path(grid, thetas, losses, error, problem, identity)


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
    problem : Problem
    rate : float
        η > 0, in units of time.
    steps : int
    momentum : float
        μ in [0, 1): heavy ball. Its clock runs faster, at late times 1/(1 − μ) times; `times` does not contain this factor.
    schedule : callable, optional
        Factor of step k = 0, 1, ...
    start : (P,), optional
    every : int
        Keep every so many steps (the first and the last always).

    Returns
    -------
    Path
        `times` are the effective times τ_k = Σ_{j<k} η_j.

    Raises
    ------
    ValueError
        Arguments out of range, or a loss that diverges; the message gives ηλ_max at the start.
    """
    if not rate > 0 or steps < 1 or every < 1 or not 0 <= momentum < 1:
        raise ValueError(
            f"need rate > 0, steps ≥ 1, every ≥ 1 and 0 ≤ momentum < 1; got {rate}, {steps}, {every}, {momentum}"
        )
    theta = (problem.theta if start is None else problem._theta(start)).detach().clone()
    drift = torch.zeros_like(theta)
    initial = problem.loss(theta)
    times, thetas, losses, now = [0.0], [theta.cpu().numpy()], [initial], 0.0
    for k in range(steps):
        eta = rate * (1.0 if schedule is None else float(schedule(k)))
        drift = momentum * drift + eta * problem.velocity(theta)
        theta, now = theta + drift, now + eta
        if (k + 1) % every and k + 1 < steps:
            continue
        loss = problem.loss(theta)
        if not loss <= 1e3 * initial:
            top = eta * float(torch.linalg.eigvalsh(problem.kernel(problem.theta if start is None else start))[-1])
            limit = 2 * (1 + momentum)
            raise ValueError(
                f"the loss went from {initial:.3g} to {loss:.3g} in {k + 1} steps: ηλ_max = {top:.3g} at the start, and a step "
                f"is stable only while ηλ_max < {limit:.3g}. Take a smaller rate"
            )
        times.append(now)
        thetas.append(theta.cpu().numpy())
        losses.append(loss)
    return Path(np.array(times), np.array(thetas), np.array(losses), 0.0, problem)


def effective_time(schedule: Schedule, t: np.ndarray | float) -> np.ndarray:
    """Return τ(t) = ∫₀ᵗ η(s) ds for every entry of `t`, to 1e-12.

    With it, θ̇ = −η(t)∇L is the flow at time τ(t), exactly.
    """
    ends = np.atleast_1d(np.asarray(t, dtype=np.float64))
    found = [quad(schedule, 0.0, end, epsabs=1e-13, epsrel=1e-13, limit=500)[0] for end in ends]
    return np.array(found).reshape(np.shape(t))


def orbit_gap(path: Path, reference: Path) -> np.ndarray:
    """Return how far `path` is from the curve of `reference` when time does not count, (K,), relative to ‖e(0)‖.

    Entry k is the distance from output f(θ_k) to the nearest point of the reference's outputs, taken as a polyline: whatever is
    left after the best rescaling of time, monotone or not. Resolution: the sagitta of the polyline, so give the reference many
    times. Cost: a forward pass per time of both, and K·K′·n numbers.
    """
    points = np.array([path.problem.output(theta).cpu().numpy() for theta in path.thetas])
    curve = np.array([reference.problem.output(theta).cpu().numpy() for theta in reference.thetas])
    begin, along = curve[:-1], np.diff(curve, axis=0)
    length = np.maximum((along**2).sum(1), np.finfo(float).tiny)
    size = np.sqrt((reference.problem.error(reference.thetas[0]).cpu().numpy() ** 2).sum())
    gaps = []
    for point in points:
        share = np.clip(((point - begin) * along).sum(1) / length, 0.0, 1.0)
        gaps.append(np.sqrt(((begin + share[:, None] * along - point) ** 2).sum(1).min()) / size)
    return np.array(gaps)


def around(problem: Problem, theta: Vector, h: float) -> Path:
    """Return the flow through θ at the nine times −4h, …, 4h, for `central`: rtol 1e-13, backwards and forwards.

    Cost: two short integrations. Against stiff directions the backward half grows like exp(4 h λ_max): keep h λ_max < 1.
    """
    grid = h * np.arange(5.0)
    ahead = integrate(problem, grid, start=theta, rtol=1e-13, atol=1e-15, estimate=False)
    behind = integrate(problem, -grid, start=theta, rtol=1e-13, atol=1e-15, estimate=False)
    return Path(
        times=np.concatenate([behind.times[:0:-1], ahead.times]),
        thetas=np.concatenate([behind.thetas[:0:-1], ahead.thetas]),
        losses=np.concatenate([behind.losses[:0:-1], ahead.losses]),
        error=float("nan"),
        problem=problem,
        identity=max(ahead.identity, behind.identity),
    )


def central(values: np.ndarray, h: float) -> np.ndarray:
    """Return the derivative at the middle of nine equidistant values (9, ...) of spacing h, to O(h⁸)."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) != 9:
        raise ValueError(f"the difference needs nine values, got {len(found)}")
    weights = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280]) / h
    result: np.ndarray = np.tensordot(weights, found, axes=1)
    return result
