"""A network on fixed data as functions of one flat parameter vector, in float64.

Outputs, error, Jacobian, M and Ṁ; what moves the parameters is in :mod:`grsd.dynamics.flow`.

Conventions: e = target − output, ⟨u, v⟩ = (1/n) Σ u v, L = ½⟨e, e⟩, M = J Jᵀ/n, θ̇ = Jᵀe/n = −∇L,
so that ė = −M e.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd.spectrum.operator.base import refuse_dropout
from grsd.spectrum.operator.forward_pass import call

__all__ = ["Problem", "Vector", "kinks_of"]

Vector = Tensor | np.ndarray

# Nodes of the autograd graph whose function has no continuous second derivative: M(t) or Ṁ(t) jumps
# where they kink.
KINKS = frozenset(
    "Relu LeakyRelu PreluKernel RreluWithNoise Threshold Hardtanh Hardsigmoid Hardswish Hardshrink "
    "Softshrink Elu Celu Abs Clamp ClampMin ClampMax Maximum Minimum Max Min Amax Amin MaxPool "
    "AdaptiveMaxPool FractionalMaxPool Topk Sort Median Sign Round Floor Ceil Trunc".split()
)


class Problem:
    """A network on fixed data, in float64, as functions of a flat parameter vector.

    Parameters
    ----------
    model : nn.Module
        Gives one number per sample: (n,) or (n, 1). A copy is converted to float64, the original is
        not touched; parameters that require no gradient stay fixed. Active dropout, batch
        statistics in training mode and complex numbers are refused.
    inputs : Tensor, (n, ...)
        Given to the model whole. Floating inputs are converted to float64.
    targets : Tensor, (n,) or (n, 1)

    Attributes
    ----------
    theta : Tensor, (P,) float64, the parameters as found, in the order of `model.parameters()`.
    samples : int, n.
    kinks : tuple of str, operations of the forward pass without a continuous second derivative
        (ReLU, max, ...); where there are any, M(t) jumps or bends and Ṁ does not always exist.

    Notes
    -----
    Every method takes θ as a tensor or an array (P,) and returns float64 tensors on the model's
    device. Source: 2512.10427, section 2.2, with J∗ = Jᵀ/n the adjoint in L² of the samples.
    """

    theta: Tensor
    samples: int
    kinks: tuple[str, ...]

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        refuse_dropout(model)
        for name, module in model.named_modules():
            if getattr(module, "track_running_stats", False) and module.training:
                raise ValueError(
                    f"{name!r} uses the statistics of the batch: call model.eval() first"
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
        self.samples = n = len(self.inputs)
        if targets.shape not in ((n,), (n, 1)):
            shape = tuple(targets.shape)
            raise ValueError(f"targets have shape {shape}; expected one for each of {n} inputs")
        self.targets = targets.reshape(n)
        self._curvature_checked = False
        self.kinks = self._probe()

    def _probe(self) -> tuple[str, ...]:
        """Run the model once: check its output, list its kinks, find out whether samples mix."""
        theta, n = self.theta.clone().requires_grad_(True), self.samples
        with torch.enable_grad():
            output = self._forward(theta, self.inputs)
        if output.shape not in ((n,), (n, 1)):
            raise ValueError(
                f"the model gives shape {tuple(output.shape)} for {n} inputs; expected one number "
                "per sample, (n,) or (n, 1): wrap the model so that it returns the output you mean"
            )
        if not (torch.isfinite(output).all() and torch.isfinite(self.targets).all()):
            raise ValueError("outputs or targets are not finite; check the model and the data")
        if not output.requires_grad:
            raise ValueError(
                "the outputs carry no gradient: are they made under no_grad, or detached?"
            )
        kinks = kinks_of(output)
        # does row i depend on sample i alone? then J is n times cheaper; a random cotangent tells
        u = self._random(seed=0)
        (whole,) = torch.autograd.grad(output.reshape(n), theta, u)
        self._rowwise = True
        try:
            rows, least = self.jacobian(self.theta).T @ u, 1e-12 * float(whole.abs().max())
            self._rowwise = bool(torch.allclose(rows, whole, rtol=1e-9, atol=least))
        except (RuntimeError, ValueError, IndexError):
            # vmap meets an operation without a batching rule, or one that needs a batch
            self._rowwise = False
        return kinks

    def _random(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(self.samples, dtype=torch.float64, generator=generator)
        return u.to(self.theta.device)

    def _forward(self, theta: Tensor, inputs: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in self._shapes.values()])
        shaped = zip(self._shapes.items(), parts, strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in shaped}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
            output: Tensor = call(self._model, parameters, (inputs,))
            return output

    def _single(self, theta: Tensor, x: Tensor) -> Tensor:
        """f(θ) at one sample, a scalar."""
        return self._forward(theta, x.unsqueeze(0)).reshape(())

    def _output(self, theta: Tensor) -> Tensor:
        return self._forward(theta, self.inputs).reshape(self.samples)

    def _theta(self, theta: Vector) -> Tensor:
        at = torch.as_tensor(theta, dtype=torch.float64, device=self.theta.device)
        if at.shape != self.theta.shape:
            raise ValueError(
                f"θ has shape {tuple(at.shape)}; this network has {tuple(self.theta.shape)}"
            )
        return at

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

        With `step` = η > 0: −∇(L + (η/4)‖∇L‖²), the flow that gradient descent of that step follows
        to O(η²), at twice the cost (backward error analysis; Barrett and Dherin, arXiv:2009.11162).
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
            return jacrev(self._output)(theta)
        return vmap(grad(self._single), in_dims=(None, 0))(theta, self.inputs)

    def jacobian(self, theta: Vector) -> Tensor:
        """Return J = ∂f/∂θ, (n, P). Cost: n backward passes of a sample (of all if they mix)."""
        return self._jacobian(self._theta(theta)).detach()

    def kernel(self, theta: Vector) -> Tensor:
        """Return M = J Jᵀ/n, (n, n), symmetric. Cost: a Jacobian."""
        j = self.jacobian(theta)
        gram = j @ j.T
        return (gram + gram.T) / 2 / self.samples

    def kernel_rate(
        self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False
    ) -> Tensor:
        """Return Ṁ = (J̇ Jᵀ + J J̇ᵀ)/n along θ̇ (or `direction`), (n, n), by autodiff.

        A difference quotient, taken once per problem, raises an ArithmeticError where autodiff is
        wrong. `piecewise` allows kinks: the rate between two of them knows nothing of the jumps.
        Cost: about three Jacobians.
        """
        if self.kinks and not piecewise:
            raise ValueError(
                f"this network uses {', '.join(self.kinks)}: Ṁ does not exist where a sample "
                "crosses a kink. Use a smooth activation, or piecewise=True for Ṁ between kinks"
            )
        at = self._theta(theta)
        along = self.velocity(at) if direction is None else self._theta(direction)
        if not self.kinks:
            self._check_curvature(at, along)
        half = self._jacobian_rate(at, along).detach() @ self.jacobian(at).T / self.samples
        return half + half.T

    def _jacobian_rate(self, theta: Tensor, along: Tensor) -> Tensor:
        """d/ds J(θ + s·along) at s = 0, (n, P): row i is ∇(∇f_i · along), reverse mode twice.

        Forward over reverse mode costs less, and PyTorch's is wrong for layer and batch
        normalisation (its issues 196699 and 196700).
        """
        if not self._rowwise:

            def row(u: Tensor) -> Tensor:
                return grad(lambda at: vjp(self._output, at)[1](u)[0] @ along)(theta)

            return vmap(row)(torch.eye(self.samples, dtype=torch.float64, device=theta.device))

        def curvature(at: Tensor, x: Tensor) -> Tensor:
            return grad(lambda moved: grad(self._single)(moved, x) @ along)(at)

        return vmap(curvature, in_dims=(None, 0))(theta, self.inputs)

    def _check_curvature(self, theta: Tensor, along: Tensor) -> None:
        """Compare uᵀJ̇ with a difference quotient, once: some second derivatives are wrong."""
        if self._curvature_checked:
            return
        u = self._random(seed=1)

        def pulled(at: Tensor) -> Tensor:
            return vjp(self._output, at)[1](u)[0]

        rate, size = u @ self._jacobian_rate(theta, along), float(pulled(theta).abs().max())
        wide = 1e-3 * float(1 + theta.abs().max()) / max(float(along.abs().max()), 1e-300)
        # deep networks bend within the wide step; a wrong derivative is wrong at every step
        for h in (wide, wide / 8, wide / 64, wide / 512):
            near, far = (
                pulled(theta + k * h * along) - pulled(theta - k * h * along) for k in (1, 2)
            )
            quotient = (8 * near - far) / (12 * h)
            # the quotient's own error: h⁴ times a fifth derivative, and 1e-16/h of the gradient
            scale = float(quotient.abs().max()) + 1e-9 * size / h
            gap = float((quotient - rate).abs().max()) / scale
            if gap <= 1e-4:
                break
        else:
            raise ArithmeticError(
                f"the second derivative of this model is off by {gap:.2g} from a difference "
                "quotient: an operation in it has a wrong one, or none. Use plain tensor operations"
            )
        self._curvature_checked = True

    def on(self, inputs: Tensor, targets: Tensor) -> Problem:
        """Return the same network on other data, e.g. a test set; θ is shared."""
        other = copy.copy(self)
        other._set_data(inputs, targets)
        return other

    def linearized(self, theta: Vector) -> Problem:
        """Return the model f(θ₀) + J(θ₀)(θ − θ₀), whose kernel stands still: Ṁ = 0."""
        return _Linearized(self, self._theta(theta))


class _Linearized(Problem):
    """A network replaced by its tangent at θ₀."""

    def __init__(self, parent: Problem, theta: Tensor) -> None:
        self._parent, self.theta, self.kinks = parent, theta.detach(), ()
        self.inputs, self.targets, self.samples = parent.inputs, parent.targets, parent.samples
        self._f0, self._j0 = parent.output(theta).detach(), parent.jacobian(theta)
        self._curvature_checked = True  # zero is known without a difference quotient

    def _output(self, theta: Tensor) -> Tensor:
        return self._f0 + self._j0 @ (theta - self.theta)

    def _jacobian(self, theta: Tensor) -> Tensor:
        return self._j0 + 0.0 * theta

    def _jacobian_rate(self, theta: Tensor, along: Tensor) -> Tensor:
        return torch.zeros_like(self._j0)

    def velocity(self, theta: Vector, step: float = 0.0) -> Tensor:
        e = self.error(theta)
        if step != 0:  # L + (η/4)‖∇L‖² has the gradient −Jᵀ(1 + (η/2)M)e/n
            e = e + step / 2 * self._j0 @ (self._j0.T @ e) / self.samples
        return self._j0.T @ e / self.samples

    def on(self, inputs: Tensor, targets: Tensor) -> Problem:
        return _Linearized(self._parent.on(inputs, targets), self.theta)


def kinks_of(output: Tensor) -> tuple[str, ...]:
    """Return the operations behind `output` without a continuous second derivative, sorted."""
    seen, todo, kinks = set(), [output.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().partition("Backward")[0]
        if name in KINKS or "MaxPool" in name:
            kinks.add(name.lower())
        todo.extend(parent for parent, _ in node.next_functions)
    return tuple(sorted(kinks))
