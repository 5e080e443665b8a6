"""The factored product against the dense Jacobian, over layers, ties, frozen subsets and random networks."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from grsd.spectrum import NTK, ClassLogits, Outputs, TokenLogProb
from grsd.spectrum.observables import Observable, raw_output
from grsd.spectrum.operator import factored, trace
from grsd.spectrum.operator.base import Plan
from grsd.spectrum.operator.factors import Factor, Use, accumulate
from grsd.spectrum.programs.record import CrossEntropy
from tests.cases import CASES, Case, dense, gpt2, gpt_neox

V = 23


def rules(M: NTK) -> set[str]:
    return {row.association for row in M.plan().rows}


def check(
    model: nn.Module, x: Tensor, observable: Observable, seed: int = 0, relative: float = 1e-12
) -> NTK:
    """Compare the factored product with the dense matrix; return the operator."""
    torch.manual_seed(seed)
    truth = dense(model, x, observable)
    M = NTK(model, x, observable, normalize="sum", method="factored")
    assert M.method == "factored"
    u = torch.randn(M.shape[0], dtype=torch.float64)
    # sums of up to a few thousand products round at 1e-16 each: 1e-13; random signs can cancel a decade of M u
    assert torch.linalg.norm(M @ u - truth @ u) <= relative * torch.linalg.norm(
        truth, 2
    ) * torch.linalg.norm(u)
    return M


class Nothing:
    """A factor that adds zero where another one added K δ."""

    def __init__(self, factor: Factor) -> None:
        self.slots = factor.slots

    def add(self, deltas: dict[int, Tensor], out: dict[int, Tensor]) -> None:
        for slot in self.slots:
            accumulate(out, slot, torch.zeros_like(deltas[slot]))


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_and_the_retained_graph(name: str) -> None:
    model, x, observable = CASES[name]()
    M = check(model, x, observable)
    graph = NTK(model, x, observable, normalize="sum", method="graph")
    u = torch.randn(M.shape[0], dtype=torch.float64)
    assert torch.linalg.norm(M @ u - graph @ u) < 1e-12 * torch.linalg.norm(graph @ u)
    assert graph.plan().method == "graph" and "factored" in str(M.plan())
    # the control: without one of its factors the product is another one
    assert M._factored is not None
    M._factored._factors[0] = Nothing(M._factored._factors[0])
    assert torch.linalg.norm(M @ u - graph @ u) > 1e-6 * torch.linalg.norm(graph @ u)


def llama(exact: bool = True) -> Case:
    """Grouped-query attention, gated MLP. `exact`: transformers' RMSNorm, which computes in float32, is replaced by torch's."""
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(0, V, (2, 10))
    model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if exact and type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(name, nn.RMSNorm(16, eps=1e-6))
    return model.double().eval(), tokens[:, :-1], TokenLogProb(tokens[:, 1:])


@pytest.mark.parametrize("exact", [True, False])
def test_llama_rms_gains_and_shared_gram(exact: bool) -> None:
    model, x, observable = llama(exact)
    # with a norm in float32 both sides round at 6e-8, and agree to a few of it
    M = check(model, x, observable, relative=1e-12 if exact else 1e-6)
    grams = {id(f.gram) for f in M._factored._factors if hasattr(f, "gram")}  # type: ignore[union-attr]
    layers = [row for row in M.plan().rows if row.association == "(A Aᵀ + b 1 1ᵀ) δ"]
    # q, k, v of a block read one tensor, and so do gate and up: 5 projections, 2 Grams; o and down have their own
    assert len(layers) > len(grams)
    assert not any("plain" in row.rule for row in M.plan().rows)


def test_the_tail_of_a_decoder_is_folded() -> None:
    model, x, observable = gpt_neox()
    folded = [
        row.layer for row in check(model, x, observable).plan().rows if "folded" in row.association
    ]
    text = " ".join(folded)
    assert all(
        name in text
        for name in ("lm_head", "final_layer_norm", "layers.1.mlp", "layers.1.attention.dense")
    )
    # the null: what reaches other positions through attention stays
    assert not any(name in text for name in ("embed_in", "layers.0", "layers.1.attention.query"))


@pytest.mark.parametrize(("first", "whole"), [(0, True), (1, False)])
def test_a_slice_of_everything_does_not_end_what_is_folded(first: int, whole: bool) -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.read(x))
            return self.head(torch.ops.aten.slice.Tensor(h, 1, first, 2**62))  # type: ignore[no-any-return]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    M = check(Sliced(), x, TokenLogProb(torch.randint(3, (2, 4 - first), generator=generator)))
    folded = {row.layer.split(".")[0] for row in M.plan().rows if "folded" in row.association}
    assert "head" in folded and ("read" in folded) == whole


def test_uncounted_tokens() -> None:
    model, x, observable = gpt_neox(tie=True)
    assert isinstance(observable, TokenLogProb)
    targets = observable.targets.clone()
    targets[0, 2:5] = targets[1, -1] = -100
    M = check(model, x, TokenLogProb(targets))
    assert any("folded" in rule for rule in rules(M)) and M.shape == (14, 14)


@pytest.mark.parametrize("case", [gpt2, gpt_neox, llama])
def test_frozen_subsets(case: object) -> None:
    model, x, observable = case()  # type: ignore[operator]
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 3 == 1)
    check(model, x, observable)


def test_float32_within_1e_5() -> None:
    for case in (gpt2, gpt_neox, llama):
        model, x, observable = case()
        truth = dense(model, x, observable)
        M = NTK(copy.deepcopy(model).float(), x, observable, normalize="sum", method="factored")
        u = torch.randn(M.shape[0], dtype=torch.float32)
        # two passes through a few layers with sums of at most 1e3 terms: under 100 roundings of 6e-8
        assert torch.linalg.norm((M @ u).double() - truth @ u.double()) < 1e-5 * torch.linalg.norm(
            truth @ u.double()
        )


class Reused(nn.Module):
    """One matrix four times: recurrence, a transposed product, a gain, and a power that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(5, 5))
        self.gain = nn.Parameter(torch.randn(5))
        self.base = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(functional.linear(x, self.weight, self.gain))
        return (x @ self.weight + self.gain) * self.gain + self.base**2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(6, 2, batch_first=True)
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x, x, x, need_weights=False)[0]).squeeze(-1)


class Bag(nn.Module):
    """Padding tokens, and no mixing of positions, so that table and head are folded together with their cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 6, padding_idx=3)
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.inner(self.table(x))), self.table.weight)


def test_repeated_uses_have_their_cross_terms() -> None:
    torch.manual_seed(6)
    M = check(Reused().double(), torch.randn(7, 5, dtype=torch.float64), Outputs())
    assert "joint, through its gradient" in rules(M)


def test_tied_table_with_padding_and_own_positions() -> None:
    torch.manual_seed(7)
    tokens = torch.randint(0, V, (3, 8))
    tokens[0, :3] = 3
    M = check(Bag().double(), tokens[:, :-1], TokenLogProb(tokens[:, 1:]))
    assert "folded into T × T" in rules(M)


def test_parameters_that_no_rule_knows_are_added() -> None:
    torch.manual_seed(8)
    M = check(Attention().double(), torch.randn(2, 5, 6, dtype=torch.float64), Outputs())
    assert any(row.rule == "plain" for row in M.plan().rows)


def test_a_network_with_one_output_is_one_matrix() -> None:
    """Rows do not mix anywhere, so that no pass is left; a closed form for a linear model: X Xᵀ + 1 1ᵀ."""
    x = torch.randn(9, 4, dtype=torch.float64)
    M = check(nn.Linear(4, 1).double(), x, Outputs())
    assert rules(M) == {"folded into T × T"}
    assert torch.allclose(M.to_dense(), x @ x.T + 1, rtol=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_and_norms(training: bool) -> None:
    torch.manual_seed(9)
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding="same"),
        nn.GroupNorm(3, 6),
        nn.MaxPool2d(2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 2),
        nn.SiLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    x = torch.randn(6, 4, 9, 8, dtype=torch.float64)
    model = model.double()
    model(x)
    M = check(model.train(training), x, ClassLogits(torch.arange(6) % 3))
    assert not any(row.rule == "plain" for row in M.plan().rows)


def test_after_training_steps() -> None:
    model, x, observable = gpt_neox()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        observable.error(observable.rows(raw_output(model(x)))).mean().backward()
        optimizer.step()
    M = check(model, x, observable)
    optimizer.step()
    with pytest.raises(RuntimeError, match="make a new NTK after every training step"):
        M @ torch.ones(M.shape[0], dtype=torch.float64)


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    bias=st.booleans(),
    norm=st.sampled_from([None, nn.LayerNorm, nn.RMSNorm]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    batch=st.integers(1, 12),
    outputs=st.integers(1, 3),
    repeat=st.booleans(),
    frozen=st.integers(0, 5),
)
def test_random_networks(
    widths: list[int],
    bias: bool,
    norm: type[nn.Module] | None,
    activation: str,
    batch: int,
    outputs: int,
    repeat: bool,
    frozen: int,
) -> None:
    torch.manual_seed(batch)
    layers: list[nn.Module] = []
    before = 4
    for width in widths:
        layers += [nn.Linear(before, width, bias=bias), ACTIVATIONS[activation]()]
        if norm is not None:
            layers.append(norm(width, eps=1e-3))  # type: ignore[call-arg]
        if repeat:
            again = nn.Linear(width, width, bias=bias)
            layers += [again, nn.Tanh(), again]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, outputs, bias=bias)).double()
    for p in list(model.parameters())[frozen::6][:1]:
        p.requires_grad_(False)
    if any(p.requires_grad for p in model.parameters()):
        check(model, torch.randn(batch, 4, dtype=torch.float64), Outputs(), seed=1)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2]),
    layers=st.integers(1, 2),
    tie=st.booleans(),
    parallel=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
)
def test_random_decoders(
    heads: int, layers: int, tie: bool, parallel: bool, shape: tuple[int, int]
) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(layers)
    config = GPTNeoXConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=12,
        max_position_embeddings=16,
        tie_word_embeddings=tie,
        use_parallel_residual=parallel,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(0, V, (shape[0], shape[1] + 1))
    check(GPTNeoXForCausalLM(config).double().eval(), tokens[:, :-1], TokenLogProb(tokens[:, 1:]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    stages=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    norm=st.sampled_from([None, "group", "batch"]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    training=st.booleans(),
    batch=st.integers(2, 5),
    frozen=st.integers(0, 7),
)
def test_random_convolutions(
    stages: list[tuple[int, int, int, bool]],
    norm: str | None,
    activation: str,
    training: bool,
    batch: int,
    frozen: int,
) -> None:
    """Kernel, channels, stride, groups, bias, norm, pooling; batch norm in training mode mixes the samples."""
    torch.manual_seed(batch)
    layers: list[nn.Module] = []
    before = 2
    for kernel, half, stride, grouped in stages:
        width = 2 * half
        groups = 2 if grouped else 1
        layers.append(
            nn.Conv2d(before, width, kernel, stride, kernel // 2, groups=groups, bias=not grouped)
        )
        if norm is not None:
            layers.append(
                nn.GroupNorm(2, width, eps=1e-2)
                if norm == "group"
                else nn.BatchNorm2d(width, eps=1e-2)
            )
        layers.append(ACTIVATIONS[activation]())
        before = width
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, 2)
    ).double()
    list(model.parameters())[frozen % 3].requires_grad_(frozen > 3)
    check(
        model.train(training), torch.randn(batch, 2, 6, 5, dtype=torch.float64), Outputs(), seed=2
    )


def test_the_loss_of_every_token_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of size tokens × vocabulary is left when the head is folded, and the product is right when it is not."""
    torch.manual_seed(9)
    V = 97  # a size that nothing else has
    model = nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, V)).double()
    tokens = torch.randint(0, V, (2, 8))
    observable = TokenLogProb(tokens[:, 1:])
    applied: list[int] = []
    apply = CrossEntropy.apply
    monkeypatch.setattr(CrossEntropy, "apply", lambda *args: applied.append(1) or apply(*args))
    M = check(model, tokens[:, :-1], observable)
    assert applied and "folded into T × T" in rules(M)

    def large() -> int:
        gc.collect()
        return sum(
            type(x) is Tensor and x.ndim > 1 and x.shape[-1] == V and x.numel() == 14 * V
            for x in gc.get_objects()
        )

    assert large() == 0
    monkeypatch.setattr(factored, "FOLD_LIMIT", 13)
    M = check(model, tokens[:, :-1], observable)
    assert (
        "folded into T × T" not in rules(M) and large() > 0
    )  # the control: without folding it must be kept


def test_a_form_is_taken_where_its_set_up_pays() -> None:
    """Few products: no T × T matrix is made. The product is the same, and the plan says from when each form pays."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 1)).double()
    x = torch.randn(20, 200, dtype=torch.float64)
    truth, u = dense(model, x, Outputs()), torch.randn(20, dtype=torch.float64)

    def plan(products: int) -> Plan:
        M = NTK(model, x, Outputs(), normalize="sum", method="factored", products=products)
        assert torch.linalg.norm(M @ u - truth @ u) < 1e-13 * torch.linalg.norm(truth @ u)
        return M.plan()

    few, many = plan(1), plan(1000)
    folded = [row for row in many.rows if row.association == "folded into T × T"]
    assert len(folded) == 3 and many.setup > few.setup and many.flops < few.flops
    assert all(row.pays is not None and row.pays < 1000 for row in folded)
    # one product fewer than the largest number of the table, and one more
    last = max(row.pays for row in folded if row.pays is not None)
    for products, everything in ((int(last), False), (int(last) + 1, True)):
        rows = plan(products).rows
        assert (sum(row.association == "folded into T × T" for row in rows) == 3) == everything
    with pytest.raises(ValueError, match="products is 0"):
        NTK(model, x, Outputs(), products=0)


@pytest.mark.parametrize(("rows", "form"), [(56, "(A Aᵀ"), (64, "(A Aᵀ"), (80, "A (Aᵀ δ)")])
def test_of_two_forms_with_equal_operations_the_one_that_moves_less(rows: int, form: str) -> None:
    """2 n² h and 4 n h h′ FLOPs are equal at n = 2h′; there A is read twice, and A Aᵀ, as large, once."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.read = nn.Linear(32, 32), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.inner(x).tanh().cumsum(0))

    torch.manual_seed(0)
    M = check(Mixed().double(), torch.randn(rows, 32, dtype=torch.float64), Outputs())
    (row,) = [row for row in M.plan().rows if row.layer.startswith("inner.weight")]
    assert row.association.startswith(form)
    assert row.flops == (2 * rows * rows * 32 if form == "(A Aᵀ" else 4 * rows * 32 * 32)


def test_a_rule_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that no rule knows leaves its parameter in the graph; a class with a reader takes it out of there."""

    @dataclass(eq=False)
    class Divided(Use):
        """s = x / w, so that ds = −x / w² dw."""

        name = "divided"

        def gradient(self, delta: Tensor) -> Tensor:
            return -(delta * self.tensor / self.parameter**2).sum_to_size(self.parameter.shape)

        def change(self, g: Tensor) -> Tensor:
            return -self.tensor / self.parameter**2 * g

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(3, 4), nn.Parameter(torch.rand(4) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.div(torch.tanh(self.first(x)), self.weight)

    model, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    assert "plain" in {row.rule for row in check(model, x, Outputs()).plan().rows}
    monkeypatch.setattr(trace, "READERS", dict(trace.READERS))
    read = trace.reads(torch.div, form=lambda input, other: ...)
    read(lambda call: (Divided(call.other, call.input),))
    names = {row.rule for row in check(model, x, Outputs()).plan().rows}
    assert "divided" in names and "plain" not in names


def test_two_threads_on_one_model() -> None:
    model, x, observable = gpt_neox()
    truth = dense(model, x, observable)
    u = torch.randn(18, dtype=torch.float64)
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(4):
            found.append(NTK(model, x, observable, normalize="sum") @ u)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(
        torch.linalg.norm(f - truth @ u) < 1e-12 * torch.linalg.norm(truth @ u) for f in found
    )


class Noisy(nn.Module):
    """Writes into its input, and draws from the generator what it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.layer(x + 0 * torch.rand(3))


def test_inputs_generator_and_model_are_left_as_found() -> None:
    model, x = Noisy().double().eval(), torch.ones(4, 3, dtype=torch.float64)
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    M = NTK(model, x, Outputs(), method="factored")
    M @ torch.ones(8, dtype=torch.float64)
    assert torch.equal(x, torch.ones_like(x)) and torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out = self.second(hidden)
        hidden.add_(1)
        return out + hidden.sum()


def test_wrong_use_is_refused() -> None:
    x = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="overwritten in place"):
        NTK(Overwrites().double(), x, Outputs())
    with pytest.raises(ValueError, match="'fast'"):
        NTK(nn.Linear(3, 2).double(), x, Outputs(), method="fast")  # type: ignore[arg-type]

    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(x), 0.5)

    with pytest.raises(ValueError, match="dropout is active"):
        NTK(Dropping(3, 2).double(), x, Outputs())


class Reads(torch.autograd.Function):
    """A backward pass that looks at a number of the gradient: it can be differentiated, but not recorded."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * x * g if bool(torch.isfinite(g).all()) else g


class Reading(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Reads.apply(super().forward(x))  # type: ignore[no-any-return,no-untyped-call]


def test_what_cannot_be_recorded_falls_back_and_says_so() -> None:
    model, x = Reading(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be recorded"):
        NTK(model, x, Outputs(), method="factored")
    M = NTK(model, x, Outputs(), normalize="sum")
    assert M.method == "graph" and "cannot be recorded" in str(M.plan())
    truth = dense(model, x, Outputs())
    assert torch.linalg.norm(M.to_dense() - truth) < 1e-13 * torch.linalg.norm(truth)
