"""Linear programs: their transposes and fused forms against dense matrices, block products, and the probe of what is folded."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from grsd.spectrum import NTK, Outputs, TokenLogProb
from grsd.spectrum.operator import factored, own_positions
from grsd.spectrum.programs.program import Program
from grsd.spectrum.programs.record import CrossEntropy, Unrecordable, record
from grsd.spectrum.programs.simplify import absorb, simplify
from grsd.spectrum.programs.transpose import TRANSPOSES, transpose
from tests.cases import CASES, dense, gpt2, gpt_neox

aten = torch.ops.aten
CPU = torch.device("cpu")
G = torch.Generator().manual_seed(0)
C = torch.randn(4, 6, generator=G, dtype=torch.float64)
W = torch.randn(6, 3, generator=G, dtype=torch.float64)
B = torch.randn(2, 6, 3, generator=G, dtype=torch.float64)
Q = torch.softmax(C, 1)


def matrix(program: Program) -> Tensor:
    """The map as a matrix, a column for every element of every input."""
    shapes = [program.kinds[slot] for slot in program.inputs]
    columns = []
    for k, (shape, dtype) in enumerate(shapes):
        size = torch.Size(shape).numel()
        for j in range(size):
            inputs = [torch.zeros(s, dtype=d) for s, d in shapes]
            inputs[k] = torch.eye(size, dtype=dtype)[j].reshape(shape)
            columns.append(torch.cat([y.reshape(-1) for y in program.run(*inputs)]))
    return torch.stack(columns, 1)


def rotate(x: Tensor) -> Tensor:
    """Half of the axis turned, as rotary embeddings do."""
    head, tail = x[:, :4], x[:, 4:]
    turned = torch.cat((-head[:, 2:], head[:, :2]), 1)
    return torch.cat((head * C[:, :4] + turned * C[:, :4].flip(0), tail), 1)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda x: x.view(2, 12).unsqueeze(1).squeeze().reshape(4, 6) * 2,
    "transpose": lambda x: x.transpose(0, 1).t() + x.view(4, 2, 3).permute(2, 0, 1).reshape(4, 6),
    "scale": lambda x: -(x * C) / (C + 3) - x.mul(0.5) / 4 + torch.add(x, x * C, alpha=2),
    "broadcast": lambda x: x[:, :1] * C + x.sum(0) * C[:1] + x.sum(1, keepdim=True).expand(4, 6),
    "products": lambda x: (x @ W) @ W.T + torch.mm(C @ C.T, x),
    "scaled": lambda x: (x * 0.5).view(4, 6) @ W + ((x * 3.0) @ W) * 2.0 + (x * 0.5)[:, :3],
    "batched": lambda x: (
        torch.bmm(x.view(2, 2, 6), B) + torch.bmm(B.mT @ B, x.view(2, 2, 6)[:, :, :3].mT).mT
    ),
    "slices": lambda x: (
        torch.cat((x[:, 4:], x[:, :4]), 1) + x[:, ::2].repeat(1, 2) + x.select(1, 2)[:, None]
    ),
    "rotary": rotate,
    "softmax": lambda x: aten._softmax_backward_data(x, Q, 1, torch.float64),
    "precision": lambda x: (x.float() * 3).double(),
    "unknown": lambda x: x[torch.tensor([0, 2, 2])] + torch.cumsum(x, 0)[1:],
    "in place": lambda x: torch.zeros(5, 6, dtype=torch.float64).index_add(
        0, torch.tensor([0, 3, 3, 1]), x
    ),
    "same twice": lambda x: x.view(24)[:12].view(2, 6) + x.view(24)[12:].view(2, 6) + (x + x)[:2],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_transposes_and_fused_forms_are_the_same_matrix(name: str) -> None:
    function = OPERATIONS[name]
    program, _, missing = record(lambda x: [function(x)], [torch.zeros(4, 6, dtype=torch.float64)])
    assert not missing
    truth = torch.autograd.functional.jacobian(
        function, torch.zeros(4, 6, dtype=torch.float64)
    ).reshape(-1, 24)
    back = transpose(program, CPU)
    # float32 on the way rounds at 6e-8; otherwise sums of at most 24 terms
    near = {"rtol": 1e-6, "atol": 1e-6} if name == "precision" else {"rtol": 1e-13, "atol": 1e-13}
    for form in (program, simplify(program), simplify(absorb(program))):
        assert torch.allclose(matrix(form), truth, **near)
    for form in (back, simplify(back)):
        assert torch.allclose(matrix(form), truth.T, **near)


def test_a_wrong_transpose_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TRANSPOSES, aten.mul.Tensor, lambda w, node, g, kinds: [(node.args[0].index, g)]
    )
    program, _, _ = record(lambda x: [x * C], [torch.zeros(4, 6, dtype=torch.float64)])
    assert not torch.allclose(matrix(transpose(program, CPU)), matrix(program).T)


def test_inputs_stay() -> None:
    program, _, _ = record(lambda x: [x * C + x], [torch.zeros(4, 6, dtype=torch.float64)])
    x = torch.randn(4, 6, dtype=torch.float64)
    kept = x.clone()
    simplify(program).run(x)
    assert torch.equal(x, kept)


def test_an_input_without_effect_is_refused() -> None:
    x = torch.zeros(3)
    program, _, _ = record(lambda a, b: [a * 2], [x, x.clone()])
    with pytest.raises(Unrecordable, match="no effect"):
        transpose(program, CPU)


def test_fusing_makes_the_programs_of_a_decoder_short() -> None:
    M = NTK(*gpt_neox(), method="factored")
    assert M._factored is not None and M._factored.forward is not None
    names = [getattr(node.func, "__name__", str(node.func)) for node in M._factored.forward.nodes]
    # what is left to add is added into a product, and rotary halves are joined, not summed from zeros
    assert (
        "addmm" in {name.strip("_") for name in names}
        and "mm" not in names[1:]
        and "slice_backward.default" not in names
    )


def test_loss_of_every_token() -> None:
    """The same bits as torch's, so that rows of the two engines can be compared; the gradient is q − onehot(y)."""
    logits = torch.randn(7, 11, dtype=torch.float32, requires_grad=True)
    target = torch.arange(7)
    found = CrossEntropy.apply(logits, target)  # type: ignore[no-untyped-call]
    assert torch.equal(found, functional.cross_entropy(logits, target, reduction="none"))
    u = torch.randn(7)
    gamma = torch.softmax(logits.detach(), 1) - functional.one_hot(target, 11)
    # exp of a difference of numbers below 10: some ten roundings of 6e-8
    assert torch.allclose(torch.autograd.grad(found, logits, u)[0], u[:, None] * gamma, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_block_product_equals_its_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    M = NTK(*CASES[name](), method="factored")
    F = M._factored
    assert F is not None
    U = torch.randn(M.shape[0], 7, dtype=torch.float64)
    columns = torch.stack([F(u) for u in U.unbind(1)], 1)
    # the same sums, in another order
    assert (
        torch.linalg.norm(F.block(U) - columns) < 1e-13 * torch.linalg.norm(columns) and F._batched
    )
    monkeypatch.setattr(factored, "BLOCK_BYTES", 3 * F._column_bytes)
    assert torch.linalg.norm(F.block(U) - columns) < 1e-13 * torch.linalg.norm(columns)
    assert F.block(U[:, :0]).shape == (M.shape[0], 0)


def test_block_product_of_what_takes_no_batch() -> None:
    M = NTK(*gpt2(), method="factored")
    F = M._factored
    assert F is not None and F.forward is not None
    U = torch.randn(M.shape[0], 3, dtype=torch.float64)
    columns = torch.stack([F(u) for u in U.unbind(1)], 1)

    consume = F.forward.consume

    def refuses(inputs: list[Tensor]) -> list[Tensor]:
        if torch._C._functorch.is_batchedtensor(inputs[0]):
            raise RuntimeError("no batching rule")
        return consume(inputs)

    F.forward.consume = refuses  # type: ignore[method-assign]
    assert torch.equal(F.block(U), columns) and not F._batched


class Mixing(nn.Module):
    """Rows that a fixed matrix mixes: only what comes after it is own-position."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 5), nn.Linear(5, 1)
        self.register_buffer("mixing", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.mixing @ self.before(x))).squeeze(-1)


def test_a_layer_that_a_wrong_rule_would_fold_is_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model, x = Mixing().double(), torch.randn(6, 4, dtype=torch.float64)
    J = NTK(model, x, Outputs()).jacobian()

    def folded() -> tuple[set[str], float]:
        M = NTK(model, x, Outputs(), normalize="sum", method="factored")
        names = {row.layer for row in M.plan().rows if row.association == "folded into T × T"}
        return names, float(torch.linalg.norm(M.to_dense() - J @ J.T) / torch.linalg.norm(J @ J.T))

    right = folded()
    assert "after.weight, after.bias" in right[0] and right[1] < 1e-13
    # a product with the rows on the other side
    monkeypatch.setitem(own_positions.SEPARATE, aten.mm.default, lambda node, front, ndim: True)
    assert folded() == right
    # the control: nobody asks the model, and the layer before the mixing is folded
    monkeypatch.setattr(factored, "refuse", lambda *arguments: None)
    names, gap = folded()
    assert "before.weight, before.bias" in names and gap > 0.1


@pytest.mark.parametrize("terms", [512, 50304])
def test_a_large_product_is_compared_by_the_rounding_of_its_terms(terms: int) -> None:
    generator = torch.Generator().manual_seed(terms)
    a, b = torch.randn(2, terms, generator=generator), torch.randn(terms, 8, generator=generator)
    b[-1] -= (a[0] @ b) / a[0, -1]  # row 0 cancels: what is left is rounding
    order = torch.randperm(terms, generator=generator)
    assert own_positions.same_product(a, b, a[:, order] @ b[order])
    assert own_positions.same_product(a, b, (a.double() @ b.double()).float())
    other = a + 0.1 * torch.randn(2, terms, generator=generator)  # a tenth of another row mixed in
    assert not own_positions.same_product(a, b, other @ b)


def test_a_large_head_is_folded() -> None:
    torch.manual_seed(0)
    model, tokens = (
        nn.Sequential(nn.Embedding(50304, 48), nn.Linear(48, 50304)),
        torch.randint(0, 50304, (4, 8)),
    )
    plan = NTK(model, tokens, TokenLogProb(tokens), method="factored").plan()
    assert {row.layer for row in plan.rows if row.association == "folded into T × T"} >= {
        "1.weight, 1.bias"
    }


class Decoder(nn.Module):
    """A small language model from parts that the architectures differ in."""

    def __init__(
        self, width: int, depth: int, bias: bool, norm: str, activation: str, tie: bool, mix: str
    ) -> None:
        super().__init__()
        make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.table = nn.Embedding(11, width)
        self.norms = nn.ModuleList([make(width) for _ in range(2 * depth)])
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width, bias=bias) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Linear(width, 2 * width, bias=bias) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Linear(2 * width, width, bias=bias) for _ in range(depth)])
        self.head = nn.Linear(width, 11, bias=False)
        if tie:
            self.head.weight = self.table.weight
        self.activation = {"gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh}[
            activation
        ]
        self.mix = mix

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for k, (qkv, up, down) in enumerate(zip(self.qkv, self.up, self.down, strict=True)):
            q, key, v = qkv(self.norms[2 * k](x)).chunk(3, -1)
            if self.mix == "attention":
                x = x + functional.scaled_dot_product_attention(q, key, v, is_causal=True)
            else:  # a running sum, and a gate
                x = x + torch.cumsum(key * v, 1) * torch.sigmoid(q)
            x = x + down(self.activation(up(self.norms[2 * k + 1](x))))
        return self.head(x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 6),
    depth=st.integers(1, 2),
    bias=st.booleans(),
    norm=st.sampled_from(["layer", "rms"]),
    activation=st.sampled_from(["gelu", "silu", "tanh"]),
    tie=st.booleans(),
    mix=st.sampled_from(["attention", "sum"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    frozen=st.integers(0, 9),
    training=st.booleans(),
    left_out=st.booleans(),
)
def test_random_decoders_against_the_dense_jacobian(
    width: int,
    depth: int,
    bias: bool,
    norm: str,
    activation: str,
    tie: bool,
    mix: str,
    shape: tuple[int, int],
    frozen: int,
    training: bool,
    left_out: bool,
) -> None:
    torch.manual_seed(width + depth)
    model = Decoder(width, depth, bias, norm, activation, tie, mix).double().train(training)
    for p in list(model.parameters())[frozen::4]:
        p.requires_grad_(False)
    tokens = torch.randint(0, 11, (shape[0], shape[1] + 1))
    targets = tokens[:, 1:].clone()
    if left_out and targets.numel() > 1:
        targets[0, 0] = -100
    state = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    M = NTK(model, tokens[:, :-1], TokenLogProb(targets), normalize="sum", method="factored")
    truth = dense(model, tokens[:, :-1], TokenLogProb(targets))
    # sums of some hundred products through at most two blocks; norms of one or two features divide by small variances
    assert torch.linalg.norm(M.to_dense() - truth) <= 1e-10 * torch.linalg.norm(truth) + 1e-13
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert (
        flags == [(p.requires_grad, p.grad) for p in model.parameters()]
        and model.training == training
    )


class Overwriting(nn.Linear):
    """Uses its own weight in place, with or without a graph."""

    graph = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.graph):
            self.weight.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize("graph", [True, False])
def test_a_parameter_that_is_used_in_place_is_refused_and_unchanged(graph: bool) -> None:
    model = Overwriting(3, 2).double()
    model.graph = graph
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="changes the parameter"):
        NTK(model, torch.ones(4, 3, dtype=torch.float64), Outputs())
    assert torch.equal(model.weight, before)


class Saturated(nn.Module):
    """An infinite activation that the outputs do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).exp()
        return torch.tanh(self.second(hidden))


def test_activations_that_are_not_finite_are_refused() -> None:
    model = Saturated().double()
    x = torch.ones(4, 3, dtype=torch.float64)
    assert NTK(model, x, Outputs()).method == "factored"
    with torch.no_grad():
        model.first.bias.fill_(1000.0)
        model.second.weight.fill_(1.0)
    with pytest.raises(ValueError, match="not finite"):
        NTK(model, x, Outputs())


def test_an_output_that_is_not_a_row_is_refused() -> None:
    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    with pytest.raises(ValueError, match="batch axis"):
        NTK(Whole(3, 2).double(), torch.ones(4, 3, dtype=torch.float64), Outputs())


def test_a_fold_that_is_too_large_is_left_to_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt_neox()
    folded = NTK(*case, method="factored").to_dense()
    monkeypatch.setattr(factored, "FOLD_LIMIT", 17)
    M = NTK(*case, method="factored")
    assert "not folded: T = 18 is above 17" in str(M.plan())
    # the same sums, in another order
    assert torch.linalg.norm(M.to_dense() - folded) < 1e-13 * torch.linalg.norm(folded)


def test_two_threads_with_different_operators_on_one_model() -> None:
    model, x, observable = gpt_neox()
    assert isinstance(observable, TokenLogProb)
    halves = [(x[k : k + 1], TokenLogProb(observable.targets[k : k + 1])) for k in range(2)]
    truth = [NTK(model, *half).to_dense() for half in halves]
    found: list[list[Tensor]] = [[], []]

    def work(k: int) -> None:
        for _ in range(4):
            M = NTK(model, *halves[k])
            found[k].append(
                torch.stack([M @ u for u in torch.eye(M.shape[0], dtype=torch.float64)], 1)
            )

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # column by column and all at once: the same sums in another order
    assert all(len(f) == 4 for f in found)
    assert all(
        torch.linalg.norm(f - t) < 1e-13 * torch.linalg.norm(t)
        for k, t in enumerate(truth)
        for f in found[k]
    )
