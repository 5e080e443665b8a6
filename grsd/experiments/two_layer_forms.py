"""The two-layer net of `grsd.lab.nets.models` in closed form: output, kernel, and kernel rate.

`TwoLayerProblem` is a `grsd.dynamics.problem.Problem` whose quantities are written out, which makes
n of several hundred affordable: no Jacobian of size n × P exists. The tests compare every one of
them with autodiff.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grsd.dynamics.problem import Problem, Vector
from grsd.lab.nets.models import TwoLayer


def _tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(z)
    slope = 1 - t * t
    return t, slope, -2 * t * slope


def _softplus(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(z)
    return torch.nn.functional.softplus(z), s, s * (1 - s)


# φ, φ' and φ'' of the activations that have all three everywhere
Derivatives = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
SMOOTH: dict[str, Derivatives] = {"Tanh": _tanh, "Softplus": _softplus}


class TwoLayerProblem(Problem):
    """A two-layer net on fixed data, inputs (n, d) and targets (n,), without autodiff.

    With z_ij = w_j · x̃_i, Φ = φ(z), Ψ = a φ'(z) and G = X̃ X̃ᵀ (n, n),

        n h M = Φ Φᵀ + G ∘ Ψ Ψᵀ,     n h Ṁ = Φ̇ Φᵀ + Φ Φ̇ᵀ + G ∘ (Ψ̇ Ψᵀ + Ψ Ψ̇ᵀ),

    where Φ̇ = φ'(z) ż, Ψ̇ = ȧ φ'(z) + a φ''(z) ż, ż = X̃ ẇᵀ, and (ȧ, ẇ) = γ δ̇.

    Notes
    -----
    θ is the displacement δ: first `outer` (h,), then `inner` (h, d + 1) row by row. Tensors stay on
    the model's device. Cost: `velocity` n h (d + 3) operations and n h activations; `kernel` 2 and
    `kernel_rate` 2 products of size n × h × n.
    """

    def __init__(self, model: TwoLayer, inputs: Tensor, targets: Tensor) -> None:
        name, columns = type(model.activation).__name__, model.inner_start.shape[1]
        if name not in SMOOTH:
            known = f"one of {', '.join(SMOOTH).lower()}, or use Problem"
            what = "has no closed form with a second derivative here"
            raise ValueError(f"the activation {name} {what}; expected {known}")
        if inputs.shape[1:] != (columns - 1,) or targets.shape != inputs.shape[:1]:
            given = f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}"
            why = f"do not fit a net of {columns - 1} inputs: expected (n, d) and (n,)"
            raise ValueError(f"{given} {why}")
        self._phi, self.gamma, self.width = SMOOTH[name], model.gamma, model.width
        self._a0 = model.outer_start.to(torch.float64)
        self._w0 = model.inner_start.to(torch.float64)
        with torch.no_grad():
            self.theta = torch.cat([model.outer, model.inner.reshape(-1)]).to(torch.float64)
        self._net = model
        self._set_data(inputs, targets)

    def _set_data(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs = inputs.detach().to(self.theta.device, torch.float64)
        self.targets = targets.detach().to(self.theta.device, torch.float64)
        self.samples, self.kinks = len(inputs), ()
        self._x = TwoLayer.augmented(self.inputs)
        self._gram = self._x @ self._x.T
        self._start = self._phi(self._x @ self._w0.T)[0] @ self._a0

    def _moves(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """γδ as (h,) and (h, d + 1)."""
        h = self.width
        return self.gamma * theta[:h], self.gamma * theta[h:].view(h, -1)

    def _features(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a (h,), and φ, φ' and φ'' of z, each (n, h)."""
        outer, inner = self._moves(theta)
        return self._a0 + outer, *self._phi(self._x @ (self._w0 + inner).T)

    def _output(self, theta: Tensor) -> Tensor:
        a, phi, _, _ = self._features(theta)
        moved = phi @ a - self._start
        return moved / (self.gamma * math.sqrt(self.width))

    def velocity(self, theta: Vector, step: float = 0.0) -> Tensor:
        """Return θ̇ = Jᵀe/n = −∇L, (P,); with `step` as in `Problem.velocity`, by autodiff."""
        if step != 0:
            return self.autodiff().velocity(theta, step)
        a, phi, slope, _ = self._features(self._theta(theta))
        scale = math.sqrt(self.width)
        e = self.targets - (phi @ a - self._start) / (self.gamma * scale)
        back = a[:, None] * ((slope * e[:, None]).T @ self._x)
        return torch.cat([phi.T @ e, back.reshape(-1)]) / (scale * self.samples)

    def _jacobian(self, theta: Tensor) -> Tensor:
        a, phi, slope, _ = self._features(theta)
        inner = (a * slope)[:, :, None] * self._x[:, None, :]
        return torch.cat([phi, inner.reshape(self.samples, -1)], dim=1) / math.sqrt(self.width)

    def kernel(self, theta: Vector) -> Tensor:
        """Return M = J Jᵀ/n, (n, n)."""
        a, phi, slope, _ = self._features(self._theta(theta))
        psi = a * slope
        return (phi @ phi.T + self._gram * (psi @ psi.T)) / (self.width * self.samples)

    def kernel_rate(
        self, theta: Vector, direction: Vector | None = None, *, piecewise: bool = False
    ) -> Tensor:
        """Return Ṁ along θ̇ (or `direction`), (n, n)."""
        at = self._theta(theta)
        along = self.velocity(at) if direction is None else self._theta(direction)
        phi, psi, phi_dot, psi_dot = self._rates(at, along)
        half = phi_dot @ phi.T + self._gram * (psi_dot @ psi.T)
        half = half / (self.width * self.samples)
        return half + half.T

    def _rates(self, at: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Φ, Ψ, Φ̇ and Ψ̇, each (n, h), when θ moves with velocity `along`."""
        a_dot, w_dot = self._moves(along)
        a, phi, slope, bend = self._features(at)
        z_dot = self._x @ w_dot.T
        return phi, a * slope, slope * z_dot, a_dot * slope + a * bend * z_dot

    def speed(self, theta: Vector) -> float:
        """Return ‖J̇‖/(√n ‖θ̇‖) along gradient flow, in the operator norm.

        How fast singular values can move per parameter length. From
        h J̇ J̇ᵀ = Φ̇ Φ̇ᵀ + G ∘ Ψ̇ Ψ̇ᵀ. Cost: two products of size n × h × n and one eigenproblem.
        """
        at = self._theta(theta)
        v = self.velocity(at)
        _, _, phi_dot, psi_dot = self._rates(at, v)
        square = phi_dot @ phi_dot.T + self._gram * (psi_dot @ psi_dot.T)
        square = square / (self.width * self.samples)
        return math.sqrt(float(torch.linalg.eigvalsh(square)[-1])) / float(v.norm())

    def autodiff(self) -> Problem:
        """Return the same problem with every quantity from automatic differentiation."""
        return Problem(self._net, self.inputs, self.targets)
