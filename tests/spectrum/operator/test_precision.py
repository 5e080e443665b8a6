"""`eps` is that of the coarsest arithmetic of a product, in every form, and the intervals that are made with it hold."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from grsd.spectrum import NTK, NTKBatches, NTKShards, Outputs, TokenLogProb, lanczos
from tests.cases import dense, mlp

HALF, SINGLE, DOUBLE = (torch.finfo(x).eps for x in (torch.bfloat16, torch.float32, torch.float64))
VOCABULARY, ROWS = 23, 7


def llama() -> tuple[nn.Module, Tensor, TokenLogProb]:
    """Two equal sentences; norms and softmax are computed in float32 whatever the model is in."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    text = torch.randint(0, VOCABULARY, (1, ROWS + 1)).repeat(2, 1)
    return LlamaForCausalLM(config).double().eval(), text[:, :-1], TokenLogProb(text[:, 1:])


def forms(model: nn.Module, x: Any, observable: Any, batches: int = 2) -> dict[str, Any]:
    return {
        "factored": NTK(model, x, observable, method="factored"),
        "graph": NTK(model, x, observable, method="graph"),
        "batches": NTKBatches(model, x, observable, batches=batches),
        "shards": NTKShards(model, [(x, observable)]),
        "made anew": NTKShards(model, [(x, observable)], hold=False),
    }


def test_a_part_in_single_precision_is_counted_by_every_form() -> None:
    for name, M in forms(*llama()).items():
        assert M.eps == SINGLE, name
    # the null: a table in single precision is a constant, and so is a frozen trunk
    model, x, observable = mlp()
    model[0].float().requires_grad_(False)
    table = torch.rand(5, dtype=torch.float32)
    net = Tabled(model, table)
    for name, M in forms(net.double(), x, observable, batches=3).items():
        assert M.eps == DOUBLE, name


class Tabled(nn.Module):
    """A frozen first layer and a table in single precision, then all in double precision."""

    def __init__(self, net: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.net, self.table = net, table

    def double(self) -> Tabled:
        return self

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.net  # type: ignore[misc]
        h = first((x * self.table).float()).double()
        for layer in rest:
            h = layer(h)
        return h


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_autocast_is_that_of_the_pass_and_counted(inside: bool) -> None:
    """Made under autocast and used outside of it, or the other way round: the same numbers."""
    model, x, observable = llama()
    single, truth = copy.deepcopy(model).float(), dense(model, x, observable)
    u = torch.randn(2 * ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        made = forms(single, x, observable)
        again = {name: M @ (u.view(2, -1) if name == "batches" else u) for name, M in made.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        for name, M in made.items():
            assert M.eps == HALF and M.dtype == torch.float32, name
            assert torch.equal(M @ (u.view(2, -1) if name == "batches" else u), again[name]), name
            if name == "batches":
                continue
            found = M.to_dense().double() / M.inner_weight
            # some tens of roundings of 2⁻⁸, as in a model that is all in bfloat16
            assert (found - truth).norm() < 0.1 * truth.norm(), name
        for name in ("factored", "graph"):
            J = made[name].jacobian().double()
            assert (J @ J.T - truth).norm() < 0.1 * truth.norm()
            layer = made[name].layer("model.layers.0")
            assert layer.eps == HALF and bool((layer @ u).isfinite().all())


def test_a_product_inside_autocast_is_the_one_outside() -> None:
    model, x, observable = llama()
    u = torch.randn(2 * ROWS)
    for name, M in forms(copy.deepcopy(model).float(), x, observable).items():
        v = u.view(2, -1) if name == "batches" else u
        plain = M @ v
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(M @ v, plain) and M.eps == SINGLE, name


def test_an_optimizer_step_inside_one_autocast_context() -> None:
    """Autocast keeps its casts of weights until its context ends."""
    model, x, observable = mlp()
    single, x = copy.deepcopy(model).float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        single(x)
        NTK(single, x, observable, method="graph")
        with torch.no_grad():
            for p in single.parameters():
                p.mul_(2)
        found = NTK(single, x, observable, method="graph", normalize="sum").to_dense().double()
    truth = dense(copy.deepcopy(single).double(), x.double(), observable)
    assert (found - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize(("setting", "unit"), [("highest", SINGLE), ("medium", HALF)])
def test_float32_that_may_be_less_inside(setting: str, unit: float) -> None:
    model, x, observable = mlp()
    single, before = copy.deepcopy(model).float(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        for name, M in forms(single, x.float(), observable, batches=3).items():
            assert M.eps == unit, name
        assert NTK(model, x, observable).eps == DOUBLE
    finally:
        torch.set_float32_matmul_precision(before)


class TF32(TorchDispatchMode):
    """TF32 without a GPU: operands of matrix products rounded to ten bits of mantissa, sums in float32."""

    aten = torch.ops.aten
    operands = dict.fromkeys((aten.mm, aten.bmm, aten.mv), (0, 1))
    operands |= dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_), (1, 2))
    operands[aten.addmv] = (1, 2)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = self.operands.get(func.overloadpacket, ())
        float32 = [isinstance(a, Tensor) and a.dtype is torch.float32 for a in args]
        rounded = [ten_bits(a) if k in places and float32[k] else a for k, a in enumerate(args)]
        return func(*rounded, **(kwargs or {}))


def ten_bits(x: Tensor) -> Tensor:
    """Round half away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("method", ["factored", "graph"])
def test_the_floor_covers_the_rounding_of_tf32(method: Any) -> None:
    """Four units of 2⁻¹¹ λ_max bound what TF32 does to a product, and float32 does far less."""
    near = torch.tensor([1 + 2.0**-10, 1 + 2.0**-12], dtype=torch.float32)
    assert ten_bits(near).tolist() == [1 + 2.0**-10, 1.0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    net, x = net.append(nn.Linear(128, 1)).float(), (2 * torch.rand(96, 2) - 1).float()
    exact = dense(copy.deepcopy(net).double(), x.double(), Outputs())
    lam, vectors = torch.linalg.eigh(exact)
    u = torch.cat([vectors[:, -1:], torch.randn(96, 5, dtype=torch.float64)], 1)

    def errors(M: Any) -> Tensor:
        product = torch.stack([(M @ v.float()).double() for v in u.T], 1)
        return (product - exact @ u).norm(dim=0) / (lam[-1] * u.norm(dim=0)) / 2.0**-11

    plain = errors(NTK(net, x, Outputs(), method=method, normalize="sum"))
    with TF32():
        rounded = errors(NTK(net, x, Outputs(), method=method, normalize="sum"))
    assert plain.max() < 0.01 < rounded.max() < 4  # the null is 2⁻¹² of it


@pytest.mark.parametrize("method", ["factored", "graph"])
def test_convolutions_have_a_setting_of_their_own(method: Any) -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has no such setting for a CPU")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2), nn.Flatten())
    conv: Any = torch.backends.mkldnn.conv
    M = NTK(net, torch.randn(3, 2, 4), Outputs(), method=method)
    linear = NTK(nn.Linear(2, 1), torch.randn(3, 2), Outputs(), method=method)
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "bf16"
        assert M.eps == HALF and linear.eps == SINGLE
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize("method", ["factored", "graph"])
def test_bounds_hold_where_a_sentence_is_repeated(method: Any) -> None:
    """Half of the eigenvalues are 0, by symmetry: differences of two equal rows are in the kernel of M."""
    model, x, observable = llama()
    M = NTK(model, x, observable, method=method)
    truth = dense(model, x, observable) / M.samples
    values, vectors = torch.linalg.eigh(truth)
    assert values[ROWS - 1] < 1e-12 * values[-1] and values[ROWS] > 1e-3 * values[-1]
    edges = np.geomspace(1e-5, 1.1, 20) * float(values[-1])
    held = 0
    for seed in range(40):
        u = torch.randn(2 * ROWS, generator=torch.Generator().manual_seed(seed)).double()
        energy = (vectors.T @ u).square().numpy() / M.samples
        measure = lanczos(M, u, ROWS + 4).measure()
        # what is 0 comes out far below the floor of 4 eps: at most 0.7 eps were seen in 240 runs
        assert (
            np.abs(measure.nodes[measure.nodes < 0.5 * float(values[ROWS])]).max() < measure.floor
        )
        lower, upper = measure.cdf_bounds(edges)
        exact = np.array([energy[values.numpy() < a].sum() for a in edges])
        # masses are right to some eps of the whole
        slack = 20 * SINGLE * energy.sum()
        held += bool(((lower <= exact + slack) & (exact <= upper + slack)).all())
        kernel = energy[:ROWS].sum()
        assert abs(measure.weights[measure.in_kernel].sum() - kernel) < slack
        assert kernel > 0.05 * energy.sum()
    assert held == 40
