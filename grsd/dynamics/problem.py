"""A network on fixed data as functions of one flat parameter vector: outputs, error, Jacobian, M and Ṁ, in float64.

What moves it is in :mod:`grsd.dynamics.flow`, which also gives these names to its readers.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd.spectrum.operator.ntk import refuse_dropout

__all__ = ["Problem", "Vector", "kinks_of"]

Vector = Tensor | np.ndarray

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
            raise ValueError(
                f"targets have shape {tuple(targets.shape)}; expected one number for each of {n} inputs"
            )
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
            raise ValueError(
                "the outputs carry no gradient: was the model's forward run under no_grad or detached?"
            )
        kinks = kinks_of(found)
        # One random cotangent tells whether row i depends on sample i alone, which makes J n times cheaper.
        u = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
            theta.device
        )
        (whole,) = torch.autograd.grad(found.reshape(n), theta, u)
        self._rowwise = True
        try:
            rows = self.jacobian(self.theta).T @ u
            self._rowwise = bool(
                torch.allclose(rows, whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))
            )
        except (
            RuntimeError,
            ValueError,
            IndexError,
        ):  # vmap meets an operation without a batching rule, or needs a batch
            self._rowwise = False
        return kinks

    def _forward(self, theta: Tensor, inputs: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in self._shapes.values()])
        parameters = {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
            out: Tensor = functional_call(self._model, parameters, (inputs,))
        return out

    def _output(self, theta: Tensor) -> Tensor:
        return self._forward(theta, self.inputs).reshape(self.samples)

    def _theta(self, theta: Vector) -> Tensor:
        found = torch.as_tensor(theta, dtype=torch.float64, device=self.theta.device)
        if found.shape != self.theta.shape:
            raise ValueError(
                f"θ has shape {tuple(found.shape)}; this network has {tuple(self.theta.shape)}"
            )
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

    def kernel_rate(
        self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False
    ) -> Tensor:
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

            found: Tensor = vmap(row)(
                torch.eye(self.samples, dtype=torch.float64, device=theta.device)
            )
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
        u = torch.randn(
            self.samples, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).to(theta.device)

        def pulled(at: Tensor) -> Tensor:
            found: Tensor = vjp(self._output, at)[1](u)[0]
            return found

        wide = 1e-3 * float(1 + theta.abs().max()) / max(float(along.abs().max()), 1e-300)
        found, size = u @ self._jacobian_rate(theta, along), float(pulled(theta).abs().max())
        for h in (
            wide,
            wide / 8,
            wide / 64,
        ):  # deep networks bend within the wide step; a wrong derivative is wrong at every step
            near, far = (
                pulled(theta + k * h * along) - pulled(theta - k * h * along) for k in (1, 2)
            )
            expected = (8 * near - far) / (12 * h)
            # the quotient's own error: h⁴ times a fifth derivative, and 1e-16/h of the gradient
            scale = float(expected.abs().max()) + 1e-9 * size / h
            gap = float((expected - found).abs().max()) / scale
            if gap <= 1e-4:
                break
        else:
            raise ArithmeticError(
                f"the second derivative of this model by autodiff is off by {gap:.2g} from a difference quotient: an "
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

    def _jacobian_rate(self, theta: Tensor, along: Tensor) -> Tensor:
        return torch.zeros_like(self._j0)

    def _check_curvature(self, theta: Tensor, along: Tensor) -> None:
        """Zero is known without a difference quotient."""

    def velocity(self, theta: Vector, step: float = 0.0) -> Tensor:
        e = self.error(theta)
        if step != 0:  # L + (η/4)‖∇L‖² has the gradient −Jᵀ(1 + (η/2)M)e/n
            e = e + step / 2 * self._j0 @ (self._j0.T @ e) / self.samples
        return self._j0.T @ e / self.samples

    def kernel_rate(
        self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False
    ) -> Tensor:
        return self._j0.new_zeros(self.samples, self.samples)

    def on(self, inputs: Tensor, targets: Tensor) -> Problem:
        return _Linearized(self._parent.on(inputs, targets), self.theta)


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.T) / 2


def kinks_of(output: Tensor) -> tuple[str, ...]:
    """Return the names of the operations behind `output` that have no continuous second derivative (see `KINKS`), sorted."""
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
