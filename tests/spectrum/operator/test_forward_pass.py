"""The pass that is differentiated is the model's function: checkpointed parts, hooks on what is saved, noise, caches."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from grsd.spectrum import NTK, NTKBatches, NTKShards, Outputs, TokenLogProb
from grsd.spectrum.operator.forward_pass import states
from tests.cases import dense
from tests.spectrum.operator.test_outside import Net, draw, weight

# Every form of M on a whole batch, as a dense matrix.
FORMS: dict[str, Callable[..., Tensor]] = {
    "auto": lambda *case: NTK(*case, normalize="sum").to_dense(),
    "factored": lambda *case: NTK(*case, normalize="sum", method="factored").to_dense(),
    "graph": lambda *case: NTK(*case, normalize="sum", method="graph").to_dense(),
    "batches": lambda *case: lockstep(NTKBatches(*case, normalize="sum", batches=1)),
    "shards": lambda *case: NTKShards(case[0], [case[1:]], normalize="sum").to_dense(),
    "shards anew": lambda *case: NTKShards(
        case[0], [case[1:]], normalize="sum", hold=False
    ).to_dense(),
}
EXACT = 1e-12  # sums of at most 1e3 terms in some tens of operations, in float64
every_form = pytest.mark.parametrize("form", FORMS)


def lockstep(M: NTKBatches) -> Tensor:
    units = torch.eye(M.outputs.numel(), dtype=M.dtype)
    return torch.stack([(M @ unit[None])[0] for unit in units], 1)


def gap(form: str, truth: Tensor, *case: Any) -> float:
    found = FORMS[form](*case)
    return float((found.double() - truth).norm() / truth.norm())


def three(kept: Callable[..., Tensor]) -> nn.Module:
    """Three layers, of which `kept(function, x)` runs the second."""
    torch.manual_seed(0)
    parts = {"a": nn.Linear(3, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 2)}
    middle = lambda net, x: kept(lambda t: torch.tanh(net.b(t)), net.a(x))  # noqa: E731
    return Net(lambda net, x: net.c(middle(net, x)), **parts).double()


def written(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return function(x)


def nested(function: Callable[..., Tensor], x: Tensor, inner: bool = False) -> Tensor:
    again = lambda t: checkpoint(function, t.sin(), use_reentrant=inner)  # noqa: E731
    return checkpoint(again, x, use_reentrant=not inner)


def selective(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    contexts = partial(
        create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE
    )
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


def sequential(function: Callable[..., Tensor], x: Tensor, kind: bool = False) -> Tensor:
    return checkpoint_sequential([function, torch.sin], 2, x, use_reentrant=kind)


def rounded(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.detach().bfloat16(), lambda t: t.double()):
        return function(x)


def on_cpu(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    with save_on_cpu():
        return function(x)


KEPT: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "hooks": (partial(checkpoint, use_reentrant=False), written),
    "reentrant": (partial(checkpoint, use_reentrant=True), written),
    "generator not kept": (
        partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
        written,
    ),
    "nested": (nested, lambda f, x: f(x.sin())),
    "nested, the other way": (partial(nested, inner=True), lambda f, x: f(x.sin())),
    "selective": (selective, written),
    "sequential": (sequential, lambda f, x: f(x).sin()),
    "sequential, reentrant": (partial(sequential, kind=True), lambda f, x: f(x).sin()),
    "rounded": (rounded, written),
    "save_on_cpu": (on_cpu, written),
}


@every_form
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_for_the_backward_pass_is_no_part_of_the_function(
    name: str, frozen: bool, form: str
) -> None:
    model, plain = (three(kept) for kept in KEPT[name])
    for net in (model, plain):
        net.a.requires_grad_(not frozen)  # type: ignore[union-attr]
    truth = dense(plain, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


@every_form
@pytest.mark.parametrize("kind", [False, True])
def test_the_first_part_of_a_network_under_checkpointing(kind: bool, form: str) -> None:
    """Reentrant, torch gives the parameters of this part no gradient; the function has one."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = Net(
        lambda net, x: net.last(checkpoint(net.first, x, use_reentrant=kind)),
        first=plain[:2],
        last=plain[2],
    )
    truth = dense(plain, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


@every_form
@pytest.mark.parametrize("kind", CheckpointImpl)
def test_a_wrapper_of_modules(kind: CheckpointImpl, form: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = copy.deepcopy(plain)
    model[0] = checkpoint_wrapper(model[0], checkpoint_impl=kind)
    truth = dense(plain, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


@every_form
@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_in_training_with_checkpointed_blocks(
    name: str, kind: bool, form: str
) -> None:
    torch.manual_seed(0)
    if name == "gpt2":
        sizes: Any = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
        drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        plain: Any = GPT2LMHeadModel(GPT2Config(vocab_size=11, **sizes, **drop))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        plain = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **heads))
    plain = plain.double().train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    text = torch.arange(10).view(2, 5) % 7
    # the norms of Llama round at 6e-8
    bound = EXACT if name == "gpt2" else 1e-6
    truth = dense(plain, text, TokenLogProb(text))
    assert gap(form, truth, model, text, TokenLogProb(text)) < bound


def test_a_checkpointed_part_of_a_compiled_module() -> None:
    model, plain = three(partial(checkpoint, use_reentrant=False)), three(written)
    compiled = torch.compile(model, backend="eager")
    truth = dense(plain, draw(4, 3), Outputs())
    for form in FORMS:
        assert gap(form, truth, compiled, draw(4, 3), Outputs()) < EXACT


def test_hooks_that_were_there_before_the_pass_rest_during_it() -> None:
    truth = dense(three(written), draw(4, 3), Outputs())
    packed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(1)
        return t.detach().bfloat16()

    with saved_tensors_hooks(pack, lambda t: t.double()):
        # the matrix is made outside: its products are no forward pass
        M = NTK(three(written), draw(4, 3), Outputs(), normalize="sum")
        assert not packed
        three(written)(draw(4, 3))
        assert packed
    assert float((M.to_dense() - truth).norm() / truth.norm()) < EXACT


@pytest.mark.parametrize("kind", [False, True])
def test_checkpointing_elsewhere_goes_on(kind: bool) -> None:
    """A pass of another thread, begun while ours runs, still recomputes; and so does one after it."""
    other = three(partial(checkpoint, use_reentrant=kind))
    calls: list[int] = []
    other.b.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]

    def train() -> None:
        other(draw(4, 3)).sum().backward()

    def forward(net: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return net.a(x)

    NTK(Net(forward, a=nn.Linear(3, 2)).double(), draw(4, 3), Outputs())
    assert len(calls) == 2
    train()
    assert len(calls) == 4


# Noise


def counted(net: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return net.a(x + torch.randn(x.shape, generator=generator, dtype=x.dtype))


def reseeded(net: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return net.a(x + torch.randn_like(x))


OWN = torch.Generator().manual_seed(0)
NOISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "randn_like": lambda net, x: net.a(x + torch.randn_like(x)),
    "bernoulli": lambda net, x: net.a(x * torch.bernoulli(torch.full_like(x, 0.5))),
    "in place": lambda net, x: net.a(x + torch.empty_like(x).uniform_()),
    "multinomial": lambda net, x: net.a(x[torch.multinomial(torch.ones(4), 4)]),
    "gumbel": lambda net, x: functional.gumbel_softmax(net.a(x)),
    "rrelu": lambda net, x: functional.rrelu(net.a(x), training=True),
    "own generator": lambda net, x: net.a(x + torch.randn(x.shape, generator=OWN, dtype=x.dtype)),
    "random": lambda net, x: net.a(x) * random.random(),
    "numpy": lambda net, x: net.a(x) * float(np.random.rand()),  # noqa: NPY002
}


@every_form
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NOISE)
def test_noise_is_refused(name: str, mode: str, form: str) -> None:
    torch.manual_seed(0)
    model = Net(NOISE[name], a=nn.Linear(3, 2)).double().train(mode == "train")
    before = states()
    with pytest.raises(ValueError, match=r"draws random numbers.*outside"):
        FORMS[form](model, draw(4, 3), Outputs())
    assert states() == before


@every_form
@pytest.mark.parametrize(
    "drop",
    [
        lambda h: functional.dropout(h, 0.3),
        lambda h: functional.alpha_dropout(h, 0.3, training=True),
        lambda h: functional.feature_alpha_dropout(h, 0.3, training=True),
        lambda h: functional.scaled_dot_product_attention(h, h, h, None, 0.3),
    ],
)
def test_dropout_that_is_no_module_is_refused(drop: Any, form: str) -> None:
    model = Net(lambda net, x: drop(net.a(x)), a=nn.Linear(3, 2)).double().eval()
    with pytest.raises(ValueError, match=r"dropout is active \(p = 0.3\)"):
        FORMS[form](model, draw(4, 3), Outputs())


@every_form
@pytest.mark.parametrize("forward", [counted, reseeded])
def test_numbers_that_are_the_same_in_each_pass_are_no_noise(forward: Any, form: str) -> None:
    model = Net(forward, a=nn.Linear(3, 2)).double().eval()
    truth = dense(model, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


@every_form
def test_a_draw_that_has_no_effect_is_taken_in_eval_mode(form: str) -> None:
    """As of layer drop, which draws and then looks whether it trains."""

    def forward(net: Any, x: Tensor) -> Tensor:
        drop = torch.rand([]) < 0.5 and net.training
        return net.a(x) * (1.0 - float(drop))

    model = Net(forward, a=nn.Linear(3, 2)).double().eval()
    truth = dense(model, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        FORMS[form](model.train(), draw(4, 3), Outputs())


# What a pass does to parameters


def in_place(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.a.weight.mul_(1.1)
    return net.a(x)


def by_data(net: Any, x: Tensor) -> Tensor:
    net.a.weight.data[0] += 1
    return net.a(x)


def toggled(net: Any, x: Tensor) -> Tensor:
    net.a.weight.requires_grad_(False)
    return net.a(x)


def unset(net: Any, x: Tensor) -> Tensor:
    net.a.weight.requires_grad = False
    return net.a(x)


@every_form
@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (in_place, r"shape \(2, 3\) in place \(mul_\)"),
        (by_data, r"shape \(2, 3\) in place"),
        (toggled, "set it before"),
        (unset, "set it before"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_pass_that_changes_parameters_is_refused(
    forward: Any, words: str, frozen: bool, form: str
) -> None:
    model = Net(forward, a=nn.Linear(3, 2), b=nn.Linear(2, 2)).double()
    if frozen and forward in (toggled, unset):
        return  # nothing is changed
    model.a.weight.requires_grad_(not frozen)  # type: ignore[union-attr]
    before = model.a.weight.clone()  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match=words):
        FORMS[form](model, draw(4, 3), Outputs())
    assert torch.equal(before, model.a.weight)  # type: ignore[arg-type]


# Inputs, layouts, masks


@every_form
def test_a_cache_among_the_inputs_is_left_as_found(form: str) -> None:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **heads)).double().eval()
    text = torch.arange(12).view(2, 6) % 7
    whole = model(text[:, :3], use_cache=True)  # with its graph, as it comes
    assert whole.past_key_values.layers[0].keys.requires_grad
    inputs = {"input_ids": text[:, 3:], "past_key_values": whole.past_key_values}
    observable = TokenLogProb(text[:, 3:])
    with torch.no_grad():
        constant = model(text[:, :3], use_cache=True).past_key_values
    truth = dense(model, {"input_ids": text[:, 3:], "past_key_values": constant}, observable)
    for _ in range(2):
        assert gap(form, truth, model, inputs, observable) < 1e-6  # norms in float32
    assert whole.past_key_values.get_seq_length() == 3


@every_form
def test_tables_with_sparse_gradients(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Linear(3, 1)).double()
    plain = copy.deepcopy(model)
    plain[0].sparse = False  # type: ignore[assignment]
    tokens = torch.tensor([[0, 1, 1], [2, 3, 0]])
    truth = dense(plain, tokens, Outputs())
    assert gap(form, truth, model, tokens, Outputs()) < EXACT
    J = NTK(model, tokens, Outputs()).jacobian()
    assert float((J @ J.T - truth).norm() / truth.norm()) < EXACT


@every_form
def test_a_weight_with_one_axis(form: str) -> None:
    model = Net(lambda net, x: functional.linear(x, net.w), w=weight(3))
    truth = dense(model.double(), draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT


@every_form
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_of_attention_without_a_key_have_no_gradient(kind: str, form: str) -> None:
    """torch gives 0 for such a row, and NaN for its gradient; what other rows have is the truth."""
    torch.manual_seed(0)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[0] = False  # a padded row
    given = mask if kind == "bool" else torch.zeros(4, 4).double().masked_fill(~mask, -torch.inf)

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.a(x).chunk(3, -1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
        return net.c(out + x)

    def plain(net: Any, x: Tensor) -> Tensor:
        q, k, v = net.a(x).chunk(3, -1)
        scores = (q @ k.mT / 2).masked_fill(~mask, -1e300)
        return net.c(scores.softmax(-1) @ v * mask.any(-1)[:, None] + x)

    parts = {"a": nn.Linear(4, 12), "c": nn.Linear(4, 1)}
    x = draw(2, 4, 4)
    truth = dense(Net(plain, **parts).double(), x, Outputs())
    assert gap(form, truth, Net(forward, **parts), x, Outputs()) < EXACT


@every_form
@pytest.mark.parametrize("blocks", [1, 2])
def test_padding_that_makes_nan_is_refused_with_the_remedy(blocks: int, form: str) -> None:
    """Eager masks in float64 overflow to -inf. With one block the rows are finite, and their gradients are not."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": blocks}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1}
    text, mask = torch.arange(10).view(2, 5) % 7, torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    inputs = {"input_ids": text, "attention_mask": mask}
    observable = TokenLogProb(text.masked_fill(mask == 0, -100))
    for kind in ("eager", "sdpa"):
        config = LlamaConfig(vocab_size=11, **sizes, **heads, attn_implementation=kind)
        model = LlamaForCausalLM(config).double().eval()
        if kind == "sdpa":
            truth = dense(model, inputs, observable)
            assert gap(form, truth, model, inputs, observable) < 1e-6  # norms in float32
            continue
        finite = torch.isfinite(observable.rows(model(**inputs).logits))
        assert bool(finite.all()) == (blocks == 1)
        with pytest.raises(ValueError, match=r"not finite.*\"sdpa\".*pad on the right"):
            FORMS[form](model, inputs, observable)


@every_form
def test_gradients_that_are_not_finite_are_refused_at_the_latest_in_a_product(form: str) -> None:
    """√0 has the derivative ∞, which ReLU cuts off in one pass; linear programs have ∞ · 0."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.b(net.a(x).relu().sqrt()), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    with pytest.raises(ValueError, match="gradients are not finite although the outputs are"):
        FORMS[form](model.double(), draw(4, 3), Outputs())


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    """One process, as a cluster."""
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["fully_shard", "tensor parallel", "FSDP"])
def test_models_in_pieces_are_refused_by_name(kind: str, mesh: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    words = "parameter '0.weight' is a DTensor.*full_state_dict"
    if kind == "fully_shard":
        fully_shard(model[0], mesh=mesh)
    elif kind == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    else:  # needs an accelerator: a class of this name stands for it
        model, words = type("FullyShardedDataParallel", (nn.Sequential,), {})(model), "full_state"
    for form in FORMS:
        with pytest.raises(ValueError, match=words):
            FORMS[form](model, draw(4, 3), Outputs())


@every_form
def test_a_module_at_two_places_keeps_its_parameters(form: str) -> None:
    """Frozen parameters and buffers are replaced during a pass, and put back once."""
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    model = nn.Sequential(again, nn.Tanh(), again, nn.Linear(3, 2)).double().eval()
    before = [id(x) for x in (*model.parameters(), *model.buffers())]
    truth = dense(model, draw(4, 3), Outputs())
    assert gap(form, truth, model, draw(4, 3), Outputs()) < EXACT
    assert [id(x) for x in (*model.parameters(), *model.buffers())] == before
