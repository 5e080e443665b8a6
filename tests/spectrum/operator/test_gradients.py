"""Gradients that are changed on their way are refused with the name of what changes them; right ones are taken."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.nn.utils import parametrizations, parametrize, skip_init
from torch.utils.flop_counter import FlopCounterMode

from grsd.spectrum import NTK, Outputs
from tests.cases import dense
from tests.spectrum.operator.test_forward_pass import EXACT, FORMS, every_form, gap
from tests.spectrum.operator.test_outside import Net, draw


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


MASK = torch.tensor([1.0, 0, 1], dtype=torch.float64)
# What registers, and what the refusal names.
HOOKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "mask": (lambda m: m[0].weight.register_hook(lambda g: g * MASK), "'0.weight'"),
    "constant": (lambda m: m[2].bias.register_hook(lambda g: g + 1), "'2.bias'"),
    "log": (lambda m: m[0].weight.register_hook(lambda g: None), "'0.weight'"),
    "after accumulation": (
        lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2)),
        "'0.weight'",
    ),
    "module": (
        lambda m: m[1].register_full_backward_hook(lambda _, given, out: (given[0] * 2,)),
        "'1'",
    ),
    "module, before": (
        lambda m: m[1].register_full_backward_pre_hook(lambda _, out: (out[0] * 2,)),
        "'1'",
    ),
    "module, the old kind": (lambda m: m[0].register_backward_hook(lambda *_: None), "'0'"),
    "whole model": (lambda m: m.register_full_backward_hook(lambda *_: None), "'Sequential'"),
    "every module": (
        lambda m: register_module_full_backward_hook(lambda _, given, out: (given[0],)),
        "all modules",
    ),
}


@every_form
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_gradients_are_refused_by_name(name: str, form: str) -> None:
    model, (register, words) = network(), HOOKS[name]
    handle = register(model)
    try:
        with pytest.raises(ValueError, match=rf"{words}.*remove\(\)"):
            FORMS[form](model, draw(4, 3), Outputs())
    finally:
        handle.remove()
    truth = dense(network(), draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


def test_a_hook_on_a_parameter_outside_j_is_no_obstacle() -> None:
    model = network()
    model[0].weight.register_hook(lambda g: g * MASK)
    M = NTK(model, draw(4, 3), Outputs(), normalize="sum", parameters=["2.weight", "2.bias"])
    model[0].requires_grad_(False)
    truth = dense(model, draw(4, 3), Outputs())
    assert float((M.to_dense() - truth).norm() / truth.norm()) < EXACT


def on_activation(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h.register_hook(lambda g: g * 2)
    return net.b(h.tanh())


def on_weight(net: Any, x: Tensor) -> Tensor:
    net.a.weight.register_hook(lambda g: g * 2)
    return net.b(net.a(x).tanh())


def on_node(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h.grad_fn.register_prehook(lambda gs: (gs[0] * 2,))
    return net.b(h.tanh())


def several(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    torch.autograd.graph.register_multi_grad_hook((h,), lambda gs: None)
    return net.b(h.tanh())


@every_form
@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (on_activation, r"registers a hook.*shape \(4, 4\).*Take the hook out"),
        (on_weight, r"registers a hook.*shape \(4, 3\).*Take the hook out"),
        (on_node, "a hook on grad_fn.*take it out"),
        (several, "registers a hook.*Take the hook out"),
    ],
)
def test_hooks_of_the_forward_pass_are_refused(forward: Any, words: str, form: str) -> None:
    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=words):
        FORMS[form](model, draw(4, 3), Outputs())
    assert not model.a.weight._backward_hooks  # type: ignore[union-attr]


@every_form
def test_operations_may_be_counted(form: str) -> None:
    """`FlopCounterMode` hangs hooks on activations, to know in which module a pass is; they only look."""
    model, x = network(), draw(4, 3)
    truth = dense(model, x, Outputs())
    with FlopCounterMode(display=False) as counter:
        assert gap(form, truth, model, x, Outputs()) < EXACT
    assert counter.get_total_flops() > 0


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * ctx.factor, None


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g


class Recomputed(torch.autograd.Function):
    """A checkpoint by hand, which does not show its parameters to autograd."""

    @staticmethod
    def forward(ctx, function, x):  # type: ignore[no-untyped-def]
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(x), g)
        return None, x.grad


class Squared(torch.autograd.Function):
    """x W² with its true derivatives, recomputed from what is saved."""

    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x @ w**2

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        return g @ (w**2).mT, (x.mT @ g) * 2 * w


SURROGATES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "scaling": (lambda net, x: net.b(Scaled.apply(net.a(x), 1.5).tanh()), "Scaled"),
    "scaling at the end": (lambda net, x: Scaled.apply(net.b(net.a(x).tanh()), 2.0), "Scaled"),
    "reversal": (lambda net, x: net.b(Scaled.apply(net.a(x), -1.0).tanh()), "Scaled"),
    "straight through": (lambda net, x: net.b(Straight.apply(net.a(x)).tanh()), "Straight"),
    "recomputed": (
        lambda net, x: net.b(Recomputed.apply(lambda t: net.a(t).tanh(), x * net.c)),
        "Recomputed",
    ),
}


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SURROGATES)
def test_gradients_that_are_no_derivatives_are_refused(
    name: str, dtype: torch.dtype, form: str
) -> None:
    torch.manual_seed(0)
    forward, words = SURROGATES[name]
    c = nn.Parameter(torch.ones(3))
    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=c).to(dtype)
    with pytest.raises(ValueError, match=f"{words}: the gradients are not.*take it out"):
        FORMS[form](model, draw(4, 3).to(dtype), Outputs())
    assert all(p.grad is None for p in model.parameters())


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kinks", [False, True])
def test_right_gradients_by_hand_are_taken(kinks: bool, dtype: torch.dtype, form: str) -> None:
    torch.manual_seed(0)
    act = nn.ReLU() if kinks else nn.Tanh()
    parts = {"a": nn.Linear(3, 64), "b": nn.Linear(64, 2), "w": nn.Parameter(torch.randn(64, 64))}

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(act(Squared.apply(act(net.a(x)), net.w)))

    model = Net(forward, **parts).to(dtype)
    truth = dense(copy.deepcopy(model).double(), draw(8, 3), Outputs())
    bound = EXACT if dtype == torch.float64 else 1e-4  # some tens of roundings at 6e-8
    assert gap(form, truth, model, draw(8, 3).to(dtype), Outputs()) < bound


def test_gradients_by_hand_in_half_precision_are_refused_with_the_remedy() -> None:
    model = Net(lambda net, x: Scaled.apply(net.a(x), 1.0), a=nn.Linear(3, 2)).bfloat16()
    with pytest.raises(ValueError, match=r"Scaled.*float32 or float64.*torch.bfloat16"):
        NTK(model, draw(4, 3).bfloat16(), Outputs())


# What is part of the function


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def parametrized() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def spectral() -> Any:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 2)).train()


def orthogonal() -> Any:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))


def tied() -> Any:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model


def hooked() -> Any:
    """A forward hook that changes the output, and one that changes the input."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda _, args, out: out * 2 + args[0])
    model[2].register_forward_pre_hook(lambda _, args: (args[0] ** 2,))
    return model


def statistics() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).train()


def without_gradient() -> Any:
    def forward(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = net.a(x).abs()
        return net.b(x) * scale

    return Net(forward, a=nn.Linear(4, 3), b=nn.Linear(4, 3))


def unused() -> Any:
    """A part with weights that nobody has set, and that nobody uses."""
    model = Net(lambda net, x: net.a(x), a=nn.Linear(4, 2), b=skip_init(nn.Linear, 4, 4))
    model.b.weight.data.fill_(torch.nan)  # type: ignore[union-attr, operator]
    return model


def called() -> Any:
    """A call of the inner network with parameters that the outer one makes."""

    def forward(net: Any, x: Tensor) -> Tensor:
        values = {"weight": net.w.sin(), "bias": net.a.bias}
        result: Tensor = torch.func.functional_call(net.a, values, (x,))
        return result

    return Net(forward, a=nn.Linear(4, 3), w=nn.Parameter(torch.randn(3, 4)))


PARTS = [
    parametrized, spectral, orthogonal, tied, hooked, statistics, without_gradient, unused, called,
]  # fmt: skip


@every_form
@pytest.mark.parametrize("make", PARTS)
def test_what_is_part_of_the_function_is_exact(make: Callable[[], Any], form: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    before = copy.deepcopy(model.state_dict())
    truth = dense(model, draw(5, 4), Outputs())
    try:
        assert gap(form, truth, model, draw(5, 4), Outputs()) < EXACT
    except ValueError as refusal:
        # these two know parameters by their uses in a pass that can be recorded
        assert form in ("batches", "factored")
        assert re.search('method="auto"|make one NTK', str(refusal))
    after = model.state_dict()
    assert all(torch.equal(after[k], x) or k.startswith("b.") for k, x in before.items())
