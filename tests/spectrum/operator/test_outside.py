"""Models as they are found outside: each product is the dense Jacobian's, or is refused with a sentence that says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM, ViTConfig, ViTForImageClassification

from grsd.spectrum import NTK, ClassLogits, NTKBatches, NTKShards, Outputs, TokenLogProb
from grsd.spectrum.observables import Observable
from tests.cases import dense

Made = tuple[nn.Module, Any, Observable]


class Net(nn.Module):
    """A forward pass written as a function of the module and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def gap(M: Any, truth: Tensor) -> float:
    """Relative distance of a dense form, and of single products, to the truth."""
    columns = [M @ unit for unit in torch.eye(len(truth), dtype=M.dtype).unbind(1)]
    found = (M.to_dense(), torch.stack(columns, 1))
    return max(float((x.double() - truth).norm() / truth.norm()) for x in found)


def experts(net: Any, x: Tensor) -> Tensor:
    """Two experts a token by a router, added where their tokens are; some experts have none."""
    chance, place = net.router(x).softmax(-1).topk(2, -1)
    out = torch.zeros_like(x)
    for k, expert in enumerate(net.experts):
        token, slot = torch.where(place == k)
        out.index_add_(0, token, expert(x[token]) * chance[token, slot, None])
    return net.out((x + out).cumsum(0))


def mixture() -> Made:
    parts = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4)) for _ in range(9)
    )
    return (
        Net(experts, router=nn.Linear(4, 9), experts=parts, out=nn.Linear(4, 2)),
        draw(3, 4),
        Outputs(),
    )


def adapter() -> Made:
    """A frozen layer with a trained low-rank change, added in place."""

    def forward(net: Any, x: Tensor) -> Tensor:
        out = net.base(x)
        out += net.up(net.down(x)) * 0.5
        return net.out(out.tanh())

    parts = {
        "base": nn.Linear(4, 6).requires_grad_(False),
        "down": nn.Linear(4, 2),
        "up": nn.Linear(2, 6),
    }
    return Net(forward, **parts, out=nn.Linear(6, 1)), draw(2, 3, 4), Outputs()


def recurrent(cell: type[nn.RNNBase]) -> Made:
    rnn = cell(3, 4, 2, batch_first=True, bidirectional=True)  # type: ignore[call-arg]
    return (
        Net(lambda net, x: net.out(net.rnn(x)[0]), rnn=rnn, out=nn.Linear(8, 1)),
        draw(2, 4, 3),
        Outputs(),
    )


def transformer() -> Made:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(8, 1)), draw(2, 4, 8), Outputs()


def upsampling() -> Made:
    layers = (
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2),
        nn.InstanceNorm2d(8, affine=True),
        nn.PixelShuffle(2),
        nn.Tanh(),
    )
    return (
        nn.Sequential(*layers, nn.Conv2d(2, 1, 4, stride=5), nn.Flatten()),
        draw(2, 4, 3, 3),
        Outputs(),
    )


def unbatched() -> Made:
    """Three channels and three outputs a row: gradients of the kernel have as many rows as the outputs."""
    layers = (
        nn.Conv1d(2, 3, 2, padding="same"),
        nn.Tanh(),
        nn.Conv1d(3, 3, 2, padding="same"),
        nn.Flatten(0),
    )
    return nn.Sequential(*layers), draw(2, 3), Outputs()


def even_kernel() -> Made:
    """The second kernel keeps its ordinary gradient, (3, 3, 2), in a network whose three samples do not mix."""
    layers = (
        nn.Conv1d(2, 3, 2),
        nn.Tanh(),
        nn.Conv1d(3, 3, 2, padding="same"),
        nn.Tanh(),
        nn.Conv1d(3, 1, 4),
    )
    return nn.Sequential(*layers, nn.Flatten(0)), draw(3, 2, 5), Outputs()


def keywords() -> Made:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.mm(x, mat2=net.w) + torch.add(
            torch.matmul(input=x, other=net.w), other=net.g, alpha=2
        )

    return Net(forward, w=weight(3, 2), g=weight(2)), draw(5, 3), Outputs()


def remembered() -> Made:
    core = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
    forward = lambda net, x: net.out(checkpoint(net.core, net.first(x), use_reentrant=False))  # noqa: E731
    return (
        Net(forward, first=nn.Linear(3, 4), core=core, out=nn.Linear(4, 1)),
        draw(5, 3),
        Outputs(),
    )


def normed() -> Made:
    return (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)),
        draw(6, 4),
        Outputs(),
    )


def borrowed() -> Made:
    """The parameters of one network plus those of the module, by functional_call."""

    def forward(net: Any, x: Tensor) -> Tensor:
        values = {
            name: p + change
            for (name, p), change in zip(net.net.named_parameters(), net.changes, strict=True)
        }
        result: Tensor = torch.func.functional_call(net.net, values, (x,))
        return result

    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    changes = nn.ParameterList([weight(*p.shape) for p in inner.parameters()])
    return Net(forward, net=inner, changes=changes), draw(5, 3), Outputs()


def vision() -> Made:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return (
        ViTForImageClassification(config).eval(),
        {"pixel_values": draw(2, 3, 8, 8)},
        ClassLogits(torch.tensor([4, 1])),
    )


MODELS: dict[str, Callable[[], Made]] = {
    "mixture of experts": mixture,
    "adapter": adapter,
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "encoder layer": transformer,
    "upsampling": upsampling,
    "unbatched convolution": unbatched,
    "kernel of even size": even_kernel,
    "arguments by name": keywords,
    "checkpoint": remembered,
    "weight_norm": normed,
    "functional_call": borrowed,
    "ViT": vision,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_from_outside_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model, inputs, observable = MODELS[name]()
    model = model.double()
    truth = dense(model, inputs, observable)
    # sums of at most 1e3 terms in some tens of operations: 1e-14; products with single unit vectors do not cancel
    assert gap(NTK(model, inputs, observable, normalize="sum"), truth) < 1e-12


def energy(net: Any, x: Tensor) -> Tensor:
    """A force: the gradient of an energy, which depends on the weights a second time."""
    x = x.requires_grad_()
    total = net.b(net.a(x).tanh()).sum()
    return torch.autograd.grad(total, x, create_graph=True)[0].sum(1)


def transformed(net: Any, x: Tensor) -> Tensor:
    """The same by torch.func."""
    return torch.func.vmap(torch.func.grad(lambda z: net.b(net.a(z).tanh()).sum()))(x).sum(1)


def tangent(net: Any, x: Tensor) -> Tensor:
    """The same in forward mode: the directional derivative along ones is the sum of the gradient."""
    with forward_ad.dual_level():
        out = net.b(net.a(forward_ad.make_dual(x, torch.ones_like(x))).tanh())
        return forward_ad.unpack_dual(out).tangent[:, 0]


@pytest.mark.parametrize(
    ("function", "method"),
    [(energy, "graph"), (transformed, "factored"), (tangent, "factored")],
    ids=["energy", "transformed", "tangent"],
)
def test_a_forward_pass_that_differentiates(function: Callable[..., Tensor], method: str) -> None:
    torch.manual_seed(0)
    model = Net(function, a=nn.Linear(3, 6), b=nn.Linear(6, 1)).double()
    x = draw(4, 3)
    truth = dense(model, x, Outputs())
    M = NTK(model, x, Outputs(), normalize="sum")
    assert M.method == method and gap(M, truth) < 1e-12
    shards = NTKShards(model, [(x[:3], Outputs()), (x[3:], Outputs())], normalize="sum")
    assert gap(shards, truth) < 1e-12
    if method == "graph":
        for refused in (
            lambda: NTK(model, x, Outputs(), method="factored"),
            lambda: NTKBatches(model, x, Outputs(), batches=2),
        ):
            with pytest.raises(ValueError, match="differentiates on its own"):
                refused()


def test_complex_numbers_between_real_ones() -> None:
    """A product with a complex matrix has a conjugate in its transpose."""
    torch.manual_seed(0)
    matrix = torch.complex(draw(6, 6, seed=2), draw(6, 6, seed=3))

    def forward(net: Any, x: Tensor) -> Tensor:
        z = torch.complex(net.a(x), net.b(x)) @ matrix
        return net.out(torch.view_as_real(z).flatten(1).tanh())

    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(4, 6), out=nn.Linear(12, 2)).double()
    M = NTK(model, draw(3, 4), Outputs(), normalize="sum")
    assert M.method == "graph" and "complex numbers" in str(M.plan())
    assert gap(M, dense(model, draw(3, 4), Outputs())) < 1e-12


def test_an_operation_that_is_linear_only_as_part_of_another() -> None:
    """The backward pass of a matrix exponential takes the exponential of a matrix that holds the gradient."""
    torch.manual_seed(0)
    model = Net(
        lambda net, x: torch.matrix_exp(net.a(x).view(-1, 3, 3) / 3).flatten(1), a=nn.Linear(4, 9)
    ).double()
    M = NTK(model, draw(2, 4), Outputs(), normalize="sum")
    assert M.method == "graph" and gap(M, dense(model, draw(2, 4), Outputs())) < 1e-12


class Upcast(nn.Module):
    """A model whose logits are float32 whatever its own type, with one table for both ends, or two."""

    def __init__(self, tie: bool, mix: bool) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.mix = mix
        if tie:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + torch.tanh(self.inner(x.cumsum(1) if self.mix else x))
        return self.head(self.norm(x)).float()


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    # 30 roundings of ε each; the rows themselves are in float32
    ("dtype", "bound"),
    [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-6)],
)
def test_outputs_in_another_type_than_the_weights(
    dtype: torch.dtype, bound: float, tie: bool, mix: bool
) -> None:
    torch.manual_seed(0)
    text = torch.randint(0, 11, (3, 6))
    model, observable = Upcast(tie, mix).to(dtype), TokenLogProb(text[:, 1:])
    truth = dense(copy.deepcopy(model).double(), text[:, :-1], observable)
    M = NTK(model, text[:, :-1], observable, normalize="sum", method="factored")
    assert M.dtype == torch.float32 and M.eps == max(
        torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    )
    assert gap(M, truth) < bound
    parts = [(text[k : k + 1, :-1], TokenLogProb(text[k : k + 1, 1:])) for k in range(3)]
    assert gap(NTKShards(model, parts, normalize="sum"), truth) < bound
    batches = NTKBatches(model, text[:, :-1], observable, batches=3, normalize="sum")
    found = batches @ torch.ones(3, 5)
    blocks = torch.stack([truth[5 * k : 5 * k + 5, 5 * k : 5 * k + 5] for k in range(3)])
    assert float((found - blocks.sum(2)).norm() / blocks.sum(2).norm()) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_under_autocast_are_those_of_torch(dtype: torch.dtype) -> None:
    """Autocast runs a loss in float32: f is what the model gives, to the bit, and J what belongs to it."""
    torch.manual_seed(0)
    text = torch.randint(0, 11, (3, 6))
    parts = {"table": nn.Embedding(11, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 11)}
    model = Net(lambda net, x: net.head(net.norm(net.table(x).cumsum(1))), **parts).to(dtype)
    observable = TokenLogProb(text[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rows = observable.rows(model(text[:, :-1]))
        M = NTK(model, text[:, :-1], observable, normalize="sum", method="factored")
        truth = dense(model, text[:, :-1], observable)
        assert rows.dtype == M.dtype and torch.equal(rows, M.outputs)
        J = M.jacobian().double()
        # some ten roundings of 2^-8
        assert gap(M, truth) < 0.04 and float((J @ J.T - truth).norm() / truth.norm()) < 0.04


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.GroupNorm, nn.LayerNorm])
def test_norms_of_mixed_types_are_exact_under_autocast(norm: Any) -> None:
    """What enters is bfloat16 and the gain is float32: the pass through it has kernels of its own."""
    torch.manual_seed(0)
    size: tuple[int, ...] = {nn.BatchNorm1d: (6,), nn.GroupNorm: (2, 6), nn.LayerNorm: (5,)}[norm]
    layers = (nn.Conv1d(2, 6, 1), norm(*size), nn.Tanh(), nn.Conv1d(6, 3, 3), nn.Flatten())
    model, x = nn.Sequential(*layers).eval(), draw(3, 2, 5).float()
    with torch.autocast("cpu", torch.bfloat16):
        truth = dense(model, x, Outputs())
        M = NTK(model, x, Outputs(), normalize="sum", method="factored")
        # some ten roundings of 2^-8
        assert gap(M, truth) < 0.04


@pytest.mark.parametrize("method", ["factored", "graph"])
def test_a_compiled_model_is_run_as_it_was_written(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    calls: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(1)
        return module.forward

    compiled = torch.compile(model, backend=backend)
    M = NTK(compiled, draw(5, 3), Outputs(), normalize="sum", method=method)  # type: ignore[arg-type]
    assert not calls and gap(M, dense(model, draw(5, 3), Outputs())) < 1e-12


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g.clamp(-0.1, 0.1)


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 1))


LINE, TOKENS = draw(4, 3), torch.tensor([[0, 1, 1], [2, 3, 4]])
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "dropout of attention": (
        lambda: Net(
            lambda net, x: net.core(x, x, x)[0], core=nn.MultiheadAttention(3, 1, dropout=0.2)
        ),
        LINE,
        r"'core' is active \(p = 0.2\).*eval\(\)",
    ),
    "dropout of a recurrence": (
        lambda: Net(lambda net, x: net.core(x)[0], core=nn.GRU(3, 2, 2, dropout=0.2)),
        LINE,
        r"'core' is active \(p = 0.2\).*eval\(\)",
    ),
    "dropout of an attention core": (
        lambda: Net(
            lambda net, x: functional.scaled_dot_product_attention(net.a(x), x, x, dropout_p=0.2),
            a=nn.Linear(3, 3),
        ),
        LINE,
        r"dropout is active \(p = 0.2\)",
    ),
    "table rescaled in place": (
        lambda: nn.Embedding(5, 3, max_norm=1.0),
        TOKENS,
        "set max_norm = None",
    ),
    "gradient divided by counts": (
        lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        TOKENS,
        "Set it to False",
    ),
    "complex parameter": (
        lambda: Net(
            lambda net, x: (x * net.w).abs(), w=nn.Parameter(torch.randn(3, dtype=torch.complex128))
        ),
        LINE,
        "torch.view_as_complex in forward",
    ),
    "complex rows": (
        lambda: Net(lambda net, x: net.a(x) * 1j, a=nn.Linear(3, 1)),
        LINE,
        "the rows are complex",
    ),
    "no rows": (lambda: nn.Linear(3, 1), LINE[:0], "gives no rows"),
    "DataParallel": (lambda: nn.DataParallel(nn.Linear(3, 1)), LINE, "pass model.module"),
    "torch.jit": (
        lambda: torch.jit.script(nn.Linear(3, 1)),
        LINE,
        "pass the module that it was made from",
    ),
    "no shape yet": (lambda: nn.LazyLinear(2), LINE, "run the model once on a batch"),
    "a bag of embeddings": (bag, TOKENS, "Write nn.EmbeddingBag as nn.Embedding and a sum"),
    "clipped gradients": (
        lambda: Net(lambda net, x: Clip.apply(net.a(x)).cumsum(0), a=nn.Linear(3, 2)),
        LINE,
        "take it out of the model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_jacobian_is_refused_with_the_remedy(name: str) -> None:
    torch.manual_seed(0)
    make, inputs, words = REFUSED[name]
    model = make()
    model = model if name in ("no shape yet", "complex parameter") else model.double()
    before = copy.deepcopy(model.state_dict()) if name != "no shape yet" else {}
    with pytest.raises(ValueError, match=words):
        NTK(model, inputs, Outputs())
    assert all(torch.equal(a, model.state_dict()[k]) for k, a in before.items())


def test_experts_with_grouped_queries() -> None:
    """transformers' own: RMS norms and softmax in float32, rotary embeddings, two key heads for four queries."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=16,
        experts_implementation="eager",
    )
    text = torch.randint(0, 19, (2, 7))
    model, observable = MixtralForCausalLM(config).double().eval(), TokenLogProb(text[:, 1:])
    M = NTK(model, text[:, :-1], observable, normalize="sum")
    assert M.method == "factored" and M.eps == torch.finfo(torch.float32).eps
    # parts of a pass round at 6e-8, some of them in each of ten norms
    assert gap(M, dense(model, text[:, :-1], observable)) < 1e-6
