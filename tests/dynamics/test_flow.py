"""Flow, steps and their clocks, against closed forms, other integrators and difference quotients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor, nn

from grsd.dynamics.flow import around, central, descend, effective_time, integrate
from grsd.dynamics.problem import Problem
from grsd.lab.nets.architectures import res_mlp
from grsd.lab.nets.models import mlp


def data(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return x, torch.sin(2 * x @ torch.randn(3, generator=g, dtype=torch.float64))


def tanh(n: int = 12, seed: int = 0) -> Problem:
    return Problem(mlp([3, 8, 1], seed=seed), *data(n))


class MixesSamples(nn.Module):
    """Row i depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h - h.mean(0)).squeeze(-1)


class LayerNormByHand(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return (
            c * torch.rsqrt(c.square().mean(-1, keepdim=True) + self.eps) * self.weight + self.bias
        )


class WrongCurvature(torch.autograd.Function):
    """sin, whose gradient is right and whose second derivative autograd takes for 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(torch.cos(inputs[0]).detach())

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def,override]
        (slope,) = ctx.saved_tensors
        return g * slope.detach()


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(WrongCurvature.apply(self.first(x)))
        return out


def normed() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 1))
    norm = net[1]
    assert isinstance(norm, nn.LayerNorm)
    return net, nn.Sequential(net[0], LayerNormByHand(norm), net[2], net[3])


def quotient(problem: Problem) -> Tensor:
    """Ṁ by a fourth-order difference of the kernel along θ̇; its error is about 1e-11."""
    v, h = problem.velocity(problem.theta), 1e-3
    near, far = (
        problem.kernel(problem.theta + k * h * v) - problem.kernel(problem.theta - k * h * v)
        for k in (1, 2)
    )
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("model", ["tanh", "normed", "normed by hand", "mixes"])
def test_the_kernel_rate_is_the_derivative_of_the_kernel(model: str) -> None:
    nets = {"tanh": mlp([3, 8, 1], seed=0), "mixes": MixesSamples()}
    nets["normed"], nets["normed by hand"] = normed()
    problem = Problem(nets[model], *data())
    rate = problem.kernel_rate(problem.theta)
    assert float((rate - quotient(problem)).abs().max() / rate.abs().max()) < 1e-8


def test_a_layer_norm_and_its_formula_have_one_rate() -> None:
    one, other = (Problem(net, *data()) for net in normed())
    torch.testing.assert_close(
        one.kernel_rate(one.theta), other.kernel_rate(other.theta), rtol=1e-10, atol=1e-12
    )


def test_a_wrong_second_derivative_is_noticed() -> None:
    problem = Problem(Wrong(), *data())
    with pytest.raises(ArithmeticError, match="off by"):
        problem.kernel_rate(problem.theta)


def test_a_deep_network_is_not_taken_for_a_wrong_second_derivative() -> None:
    """A hundred tanh blocks bend within the first, wide step of the check."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, *shape, generator=g, dtype=torch.float64) for shape in ((8,), ()))
    net = res_mlp(inputs=8, width=16, depth=100, layers=1, activation="tanh", epsilon=0.3, seed=0)
    problem = Problem(net, x, y)
    v, h = (
        problem.velocity(problem.theta),
        1e-7,
    )  # rounding: 1e-16/1e-7 of M; curvature: h⁴ of a fast network
    rate = problem.kernel_rate(problem.theta)
    near, far = (
        problem.kernel(problem.theta + k * h * v) - problem.kernel(problem.theta - k * h * v)
        for k in (1, 2)
    )
    assert float((rate - (8 * near - far) / (12 * h)).abs().max() / rate.abs().max()) < 1e-5


@pytest.mark.parametrize("net", [mlp([3, 8, 1], seed=1), MixesSamples(), normed()[0]])
def test_the_jacobian_is_that_of_the_outputs(net: nn.Module) -> None:
    problem = Problem(net, *data())
    expected = torch.autograd.functional.jacobian(problem.output, problem.theta)
    torch.testing.assert_close(problem.jacobian(problem.theta), expected, rtol=1e-12, atol=1e-14)
    left = torch.func.jvp(problem.output, (problem.theta,), (problem.velocity(problem.theta),))[1]
    right = problem.kernel(problem.theta) @ problem.error(problem.theta)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)  # ḟ = M e


def test_the_model_is_left_alone_and_may_be_float32() -> None:
    net = mlp([3, 8, 1], seed=0, dtype=torch.float32)
    before = [p.clone() for p in net.parameters()]
    problem = Problem(net, *data())
    integrate(problem, [0, 0.5], estimate=False)
    assert all(
        p.dtype == torch.float32 and torch.equal(p, q)
        for p, q in zip(net.parameters(), before, strict=True)
    )
    assert problem.output(problem.theta).dtype == torch.float64


def test_a_frozen_kernel_flows_as_the_matrix_exponential_and_states_its_error() -> None:
    frozen = tanh().linearized(tanh().theta)
    path = integrate(frozen, [0, 0.7, 2.0])
    M, e = frozen.kernel(frozen.theta).numpy(), frozen.error(frozen.theta).numpy()
    found = np.array([frozen.error(theta).numpy() for theta in path.thetas])
    for k, t in enumerate(path.times):
        np.testing.assert_allclose(found[k], expm(-t * M) @ e, atol=1e-9)
    assert path.error < 1e-7 and path.identity < 1e-9
    loose = integrate(frozen, [0, 2.0], rtol=1e-4, atol=1e-5)
    true = np.abs(frozen.error(loose.thetas[-1]).numpy() - expm(-2 * M) @ e).max()
    assert true < 10 * loose.error  # the stated error is that of a hundredfold looser run
    assert loose.error > 100 * path.error  # and it notices looser tolerances


def test_other_methods_reach_the_same_point() -> None:
    problem = tanh()
    end = integrate(problem, [0, 2], estimate=False).thetas[-1]
    for method in ("RK45", "LSODA"):
        other = integrate(
            problem, [0, 2], method=method, rtol=1e-10, atol=1e-12, estimate=False
        ).thetas[-1]
        assert np.abs(other - end).max() < 1e-8


def test_the_flow_runs_backwards() -> None:
    problem = tanh()
    there = integrate(problem, [0, 1], estimate=False).thetas[-1]
    back = integrate(problem, [1, 0], start=there, estimate=False).thetas[-1]
    np.testing.assert_allclose(back, problem.theta.numpy(), atol=1e-8)


def test_a_schedule_is_a_change_of_time() -> None:
    problem, t = tanh(), np.array([0.0, 1.0, 2.0])
    tau = effective_time(lambda s: 1 / (1 + s), t)
    np.testing.assert_allclose(tau, np.log1p(t), atol=1e-12)
    scheduled = integrate(
        problem, t, schedule=lambda s: 1 / (1 + s), rtol=1e-12, atol=1e-14, estimate=False
    )
    plain = integrate(problem, tau, rtol=1e-12, atol=1e-14, estimate=False)
    assert np.abs(scheduled.thetas - plain.thetas).max() < 1e-9
    wrong = integrate(problem, t, rtol=1e-12, atol=1e-14, estimate=False)
    assert np.abs(scheduled.thetas - wrong.thetas).max() > 1e-3


def test_descent_is_first_order_to_the_flow_and_second_to_the_modified_one() -> None:
    problem = tanh()
    gaps = []
    for steps in (100, 200):
        end = problem.output(descend(problem, 1 / steps, steps).thetas[-1])
        for step in (0.0, 1 / steps):
            flow = integrate(problem, [0, 1], step=step, rtol=1e-12, atol=1e-14, estimate=False)
            gaps.append(float((end - problem.output(flow.thetas[-1])).norm()))
    assert abs(gaps[0] / gaps[2] - 2) < 0.1 and abs(gaps[1] / gaps[3] - 4) < 0.4


def test_descent_and_heavy_ball_of_a_frozen_kernel_have_their_closed_forms() -> None:
    frozen = tanh().linearized(tanh().theta)
    M, e = frozen.kernel(frozen.theta).numpy(), frozen.error(frozen.theta).numpy()
    found = frozen.error(descend(frozen, 0.1, 20, schedule=lambda k: 1 + k).thetas[-1]).numpy()
    expected = e
    for k in range(20):
        expected = expected - 0.1 * (1 + k) * M @ expected
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    found = frozen.error(descend(frozen, 0.1, 30, momentum=0.8).thetas[-1]).numpy()
    now, before = e, e
    for _ in range(30):
        now, before = 1.8 * now - 0.1 * M @ now - 0.8 * before, now
    np.testing.assert_allclose(found, now, atol=1e-12)


def test_the_modified_velocity_of_the_linearization_agrees_with_autodiff() -> None:
    problem = tanh()
    frozen = problem.linearized(problem.theta)
    theta = frozen.theta + 0.1
    plain = Problem.velocity(frozen, theta, 0.3)
    torch.testing.assert_close(frozen.velocity(theta, 0.3), plain, rtol=1e-11, atol=1e-13)
    assert float(frozen.kernel_rate(theta).abs().max()) == 0
    other = frozen.on(*data(5, seed=3))
    torch.testing.assert_close(
        other.jacobian(theta), problem.on(*data(5, seed=3)).jacobian(problem.theta)
    )


def test_divergence_names_the_step() -> None:
    problem = tanh()
    top = float(torch.linalg.eigvalsh(problem.kernel(problem.theta))[-1])
    with pytest.raises(ValueError, match=r"ηλ_max = 2\.2 at the start"):
        descend(problem.linearized(problem.theta), 2.2 / top, 500)
    descend(problem.linearized(problem.theta), 1.9 / top, 500)  # and stays quiet below 2


def test_the_stencil_is_of_order_eight_and_centred() -> None:
    errors = []
    for h in (0.4, 0.2):
        t = h * np.arange(-4.0, 5.0)
        errors.append(abs(float(central(np.sin(1 + t), h)) - np.cos(1.0)))
    assert 200 < errors[0] / errors[1] < 300  # 2⁸ = 256
    problem = tanh()
    path = around(problem, problem.theta, 0.02)
    assert np.array_equal(path.thetas[4], problem.theta.numpy()) and np.all(np.diff(path.times) > 0)
    np.testing.assert_allclose(
        central(path.thetas, 0.02), problem.velocity(problem.theta).numpy(), atol=1e-10
    )


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.LeakyReLU(), "leakyrelu"),
        (nn.ELU(), "elu"),
    ],
)
def test_kinks_are_found_and_refused_where_smoothness_is_needed(
    layer: nn.Module, name: str
) -> None:
    problem = Problem(nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 1)), *data())
    assert problem.kinks == (name,)
    with pytest.raises(ValueError, match=name):
        problem.kernel_rate(problem.theta)
    assert problem.kernel_rate(problem.theta, piecewise=True).shape == (12, 12)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Sigmoid()])
def test_smooth_networks_have_no_kinks(layer: nn.Module) -> None:
    assert Problem(nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 1)), *data()).kinks == ()


def test_a_kink_in_a_function_is_found_too() -> None:
    class Functional(MixesSamples):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.first(x)).clamp(max=1.0))

    assert Problem(Functional(), *data()).kinks == ("clamp", "relu")


def frozen_weights() -> nn.Module:
    net = mlp([3, 4, 1], seed=0)
    for p in net.parameters():
        p.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem(mlp([3, 4, 2], seed=0), *data()), "one number per"),
        (lambda: Problem(mlp([3, 4, 1], seed=0), data()[0], data()[1][:5]), "targets have shape"),
        (lambda: Problem(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), *data()), "eval"),
        (lambda: Problem(nn.Sequential(nn.Linear(3, 1), nn.Dropout()), *data()), "dropout"),
        (
            lambda: Problem(mlp([3, 4, 1], seed=0), data()[0], data()[1] * float("nan")),
            "not finite",
        ),
        (lambda: Problem(frozen_weights(), *data()), "nothing can move"),
        (lambda: tanh().loss(torch.zeros(3)), "this network has"),
        (lambda: integrate(tanh(), [0, 1, 1]), "strict order"),
        (lambda: integrate(tanh(), [0, 50], limit=50), "50 evaluations"),
        (lambda: descend(tanh(), -0.1, 5), "rate > 0"),
        (lambda: descend(tanh(), 0.1, 5, momentum=1.0), "momentum"),
        (lambda: central(np.zeros(7), 0.1), "nine"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
