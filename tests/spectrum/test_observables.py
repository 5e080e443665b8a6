"""Observables against torch's own loss functions, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax

from grsd.spectrum import (
    NTK,
    BinaryLogits,
    ClassLogits,
    NTKShards,
    Outputs,
    TokenLogProb,
    micro_batches,
)
from grsd.spectrum.observables import IGNORE, raw_output
from tests.cases import gpt_neox

BATCH, LENGTH, VOCABULARY = 3, 5, 11
# A log-softmax over 11 classes in another order of operations: some ten roundings of 2.2e-16 of numbers below 30.
ROUNDING = 1e-13


def draw(seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V) and targets (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(
        BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64
    )
    return logits, torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


class Returns(nn.Module):
    """A model whose logits are a parameter, wrapped as asked."""

    def __init__(self, logits: Tensor, wrap=lambda z: z) -> None:
        super().__init__()
        self.logits, self.wrap = nn.Parameter(logits.clone()), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.logits)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_token_error_is_torch_cross_entropy_without_reduction(seed: int) -> None:
    logits, targets = draw(seed)
    observable = TokenLogProb(targets)
    rows = observable.rows(logits)
    truth = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert rows.shape == (BATCH * LENGTH,)
    assert (observable.error(rows) - truth).abs().max() < ROUNDING
    # the test sees a shift by one token, the classic mistake with language models
    assert (observable.error(rows) - truth.roll(1)).abs().max() > 0.1


def test_token_error_is_the_divergence_from_a_one_hot_target() -> None:
    logits, targets = draw()
    hot = torch.zeros_like(logits).scatter_(-1, targets[..., None], 1.0)
    divergence = kl_div(log_softmax(logits, -1), hot, reduction="none").sum(-1).flatten()
    observable = TokenLogProb(targets)
    assert (observable.error(observable.rows(logits)) - divergence).abs().max() < ROUNDING


def test_ignored_tokens_give_no_row_as_torch_ignores_them() -> None:
    logits, targets = draw()
    targets[0, 0] = targets[1, 3] = targets[2, 4] = IGNORE
    observable = TokenLogProb(targets)
    rows = observable.rows(logits)
    full = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE
    )
    assert rows.numel() == targets.numel() - 3 == observable.samples(rows)
    assert (observable.error(rows) - full[targets.flatten() != IGNORE]).abs().max() < ROUNDING
    # torch's mean divides by the counted tokens, as `samples` does, and not by all of them
    mean = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert abs(observable.error(rows).sum() / observable.samples(rows) - mean) < ROUNDING
    assert abs(observable.error(rows).sum() / targets.numel() - mean) > 0.1


def test_gradients_do_not_reach_ignored_tokens() -> None:
    logits, targets = draw()
    targets[1] = IGNORE
    logits.requires_grad_()
    TokenLogProb(targets).rows(logits).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("shift", [800.0, -800.0])
def test_log_probabilities_do_not_overflow(shift: float) -> None:
    logits, targets = draw()
    plain, moved = (TokenLogProb(targets).rows(z) for z in (logits, logits + shift))
    # numbers of size 800 carry 2.3e-13 in their last place
    assert (plain - moved).abs().max() < 20 * 2.3e-13
    assert not torch.isfinite(
        torch.log((logits + shift).exp() / (logits + shift).exp().sum(-1, keepdim=True))
    ).all()


def test_a_certain_and_wrong_token_has_its_finite_error() -> None:
    logits = torch.tensor([[[1000.0, 0.0], [1000.0, 0.0]]], dtype=torch.float64)
    observable = TokenLogProb(torch.tensor([[1, 0]]))
    assert observable.error(observable.rows(logits)).tolist() == [1000.0, 0.0]


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_class_error_is_minus_the_gradient_of_the_summed_cross_entropy(seed: int) -> None:
    logits, targets = draw(seed)
    observable = ClassLogits(targets)
    logits.requires_grad_()
    cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert logits.grad is not None
    error = observable.error(observable.rows(logits).detach())
    assert (error + logits.grad.flatten()).abs().max() < ROUNDING
    assert (error - logits.grad.flatten()).abs().max() > 0.1  # the sign is seen
    assert (
        error.reshape(-1, VOCABULARY).sum(-1).abs().max() < ROUNDING
    )  # onehot and softmax both sum to one


def test_class_error_of_one_sample_in_closed_form() -> None:
    error = ClassLogits(torch.tensor([0])).error(
        torch.tensor([0.0, 0.0, torch.log(torch.tensor(2.0))])
    )
    assert torch.allclose(error, torch.tensor([0.75, -0.25, -0.5]))


def test_class_rows_and_samples_count_logits_and_samples() -> None:
    logits, targets = draw()
    observable = ClassLogits(targets)
    rows = observable.rows(logits)
    assert torch.equal(rows.reshape(logits.shape), logits)
    assert observable.samples(rows) == BATCH * LENGTH != rows.numel()


def test_ignored_class_is_refused_with_the_remedy() -> None:
    logits, targets = draw()
    targets[0, 1] = IGNORE
    with pytest.raises(ValueError, match=r"drop those with target -100"):
        ClassLogits(targets).rows(logits)


# --- regression -----------------------------------------------------------------------------------


def test_regression_error_is_target_minus_output_and_minus_the_gradient_of_half_the_square() -> (
    None
):
    outputs, targets = draw()[0].requires_grad_(), draw(7)[0]
    observable = Outputs(targets)
    rows = observable.rows(outputs)
    (0.5 * (outputs - targets).square().sum()).backward()
    assert outputs.grad is not None
    assert torch.equal(observable.error(rows.detach()), -outputs.grad.flatten())
    assert observable.samples(rows) == BATCH


def test_regression_without_targets_has_an_operator_but_no_error() -> None:
    rows = Outputs().rows(draw()[0])
    assert Outputs().samples(draw()[0]) == Outputs(draw()[0]).samples(rows) == BATCH
    with pytest.raises(ValueError, match=r"without targets"):
        Outputs().error(rows)


def test_regression_takes_targets_of_another_dtype_in_that_of_the_rows() -> None:
    rows = torch.zeros(4, dtype=torch.float64)
    error = Outputs(torch.arange(4, dtype=torch.float32)).error(rows)
    assert error.dtype == torch.float64
    assert error.tolist() == [0.0, 1.0, 2.0, 3.0]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [TokenLogProb, ClassLogits])
@pytest.mark.parametrize(
    ("value", "quoted"), [(VOCABULARY, "11 classes"), (10**6, "1000000"), (-1, "-1"), (-99, "-99")]
)
def test_a_target_outside_the_vocabulary_is_quoted(make, value: int, quoted: str) -> None:
    logits, targets = draw()
    targets[2, 1] = value
    with pytest.raises(ValueError, match=quoted):
        make(targets).rows(logits)
    targets[2, 1] = VOCABULARY - 1  # the last class itself is accepted
    assert make(targets).rows(logits).numel() > 0


@pytest.mark.parametrize("make", [TokenLogProb, ClassLogits])
@pytest.mark.parametrize(
    "shape", [(BATCH, LENGTH - 1), (BATCH * LENGTH,), (BATCH, LENGTH, VOCABULARY), (LENGTH, BATCH)]
)
def test_targets_of_another_shape_are_refused(make, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"targets have shape .* logits need \(3, 5\)"):
        make(torch.zeros(shape, dtype=torch.int64)).rows(draw()[0])


def test_regression_targets_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outputs need \(3, 5, 11\)"):
        Outputs(torch.zeros(BATCH, LENGTH)).rows(draw()[0])


@pytest.mark.parametrize("make", [TokenLogProb, ClassLogits])
def test_a_batch_in_which_nothing_counts_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"all 15 are -100"):
        make(torch.full((BATCH, LENGTH), IGNORE)).rows(draw()[0])


@pytest.mark.parametrize("make", [TokenLogProb, ClassLogits])
def test_logits_without_a_class_axis_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"\(4,\)"):
        make(torch.zeros((), dtype=torch.int64)).rows(torch.zeros(4))


def test_an_output_without_a_batch_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"single number"):
        Outputs().rows(torch.tensor(1.0))


# --- what a model may return ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda z: z, lambda z: (z, "cache"), lambda z: SimpleNamespace(logits=z, loss=None)]
)
def test_the_three_kinds_of_output_give_the_same_rows(wrap) -> None:
    logits, targets = draw()
    M = NTK(Returns(logits, wrap), torch.zeros(1), TokenLogProb(targets))
    truth = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert (M.error - truth).abs().max() < ROUNDING


@pytest.mark.parametrize(
    "output", [{"logits": 1}, None, SimpleNamespace(logits=[1.0]), (), ("text",)]
)
def test_anything_else_is_refused_by_its_type(output) -> None:
    with pytest.raises(TypeError, match=type(output).__name__):
        raw_output(output)


# --- the operators that the observables make ------------------------------------------------------


def test_the_two_operators_of_cross_entropy_are_related_by_the_residual() -> None:
    """With the logits themselves as parameters K = I/n, so M = Γ Γᵀ/n = diag(‖δ‖²)/n: a closed form for both."""
    logits, targets = draw()
    count = BATCH * LENGTH
    M = NTK(Returns(logits), torch.zeros(1), TokenLogProb(targets))
    K = NTK(Returns(logits), torch.zeros(1), ClassLogits(targets))
    assert (
        K.to_dense() - torch.eye(count * VOCABULARY, dtype=torch.float64) / count
    ).abs().max() < 1e-15
    residual = K.error.reshape(count, VOCABULARY).square().sum(-1)
    assert (M.to_dense() - torch.diag(residual) / count).abs().max() < ROUNDING
    assert (M.to_dense() - torch.eye(count, dtype=torch.float64) / count).abs().max() > 0.01


def test_the_rate_of_the_loss_is_the_same_from_both_operators() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, labels = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 4
    gradient = torch.autograd.grad(cross_entropy(model(x), labels), list(model.parameters()))
    rate = float(sum(g.square().sum() for g in gradient))
    M, K = NTK(model, x, TokenLogProb(labels)), NTK(model, x, ClassLogits(labels))
    one = torch.ones_like(M.error)
    for operator, start in ((M, one), (K, K.error)):
        # a sum of 20 to 80 terms in another order: some 1e-15
        assert abs(operator.inner_weight * float(start @ (operator @ start)) / rate - 1) < 1e-13
    assert (
        abs(M.inner_weight * float(M.error @ (M @ M.error)) / rate - 1) > 0.1
    )  # e is not what drives


# --- one logit, other ignored labels, other integers ------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 3)])
def test_the_error_of_one_logit_is_the_gradient_of_torch_binary_cross_entropy(
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 2, shape, generator=generator)
    soft = torch.rand(shape, generator=generator, dtype=torch.float64)
    for y in (labels, labels.bool(), labels.int(), soft):
        observable = BinaryLogits(y)
        rows = observable.rows(f)
        loss = binary_cross_entropy_with_logits(f, y.to(f))
        gradient = torch.autograd.grad(loss, f)[0].flatten()
        truth = -observable.samples(rows) * gradient
        assert (observable.error(rows) - truth).abs().max() < ROUNDING
    if shape == (7, 1):  # the usual head, with targets that have no such axis
        squeezed = BinaryLogits(labels[:, 0])
        assert torch.equal(squeezed.error(squeezed.rows(f)), BinaryLogits(labels).error(f[:, 0]))
    with pytest.raises(ValueError, match=r"targets run from -1 to 1; .*take \(y \+ 1\) / 2"):
        BinaryLogits(2 * labels - 1).rows(f)
    with pytest.raises(ValueError, match=r"targets have shape \(2,\)"):
        BinaryLogits(labels.flatten()[:2]).rows(f)


def test_the_law_of_the_binary_error_along_the_flow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(0, 2, (9,))
    M = NTK(model, x, BinaryLogits(y))
    assert M.samples == 9 and M.shape == (9, 9)
    sigma = torch.sigmoid(M.outputs)
    predicted = -sigma * (1 - sigma) * (M @ M.error)
    loss = binary_cross_entropy_with_logits(model(x)[:, 0], y.double())
    downhill = [-g for g in torch.autograd.grad(loss, [*model.parameters()])]
    h, errors = 1e-6, []
    for sign in (1, -1):
        moved = {
            name: p + sign * h * d
            for (name, p), d in zip(model.named_parameters(), downhill, strict=True)
        }
        errors.append(BinaryLogits(y).error(torch.func.functional_call(model, moved, x)[:, 0]))
    rate = (errors[0] - errors[1]) / (2 * h)
    assert (rate - predicted).norm() < 1e-8 * rate.norm()  # h² and rounding over h


def test_other_ignored_labels_and_integers_give_the_same_rows() -> None:
    logits, targets = draw()
    dropped = targets.clone()
    dropped[0, :2], padded = IGNORE, targets.clone()
    padded[0, :2] = 0  # a padding token that is a token of the vocabulary
    padded[padded == 0] = -1
    dropped[targets == 0] = IGNORE
    one, other = TokenLogProb(dropped), TokenLogProb(padded, ignore_index=-1)
    assert torch.equal(one.rows(logits), other.rows(logits))
    # a label inside the vocabulary counts for nothing where it is named
    inside = TokenLogProb(targets, ignore_index=int(targets[0, 0]))
    count = int((targets != targets[0, 0]).sum())
    assert inside.rows(logits).numel() == count < targets.numel()
    with pytest.raises(ValueError, match="targets run from -1"):
        TokenLogProb(padded).rows(logits)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(
            TokenLogProb(targets.to(dtype)).rows(logits), TokenLogProb(targets).rows(logits)
        )
        classes = ClassLogits(targets.to(dtype))
        rows = classes.rows(logits)
        assert torch.equal(classes.error(rows), ClassLogits(targets).error(rows))
    for kind in (TokenLogProb, ClassLogits):
        with pytest.raises(TypeError, match=r"targets are torch\.float64; class indices are"):
            kind(targets.double())
        with pytest.raises(TypeError, match="targets are list"):
            kind([1, 2])


def test_an_ignored_label_reaches_operators_and_their_parts() -> None:
    model, tokens, observable = gpt_neox()
    targets = observable.targets.clone()
    targets[:, :3] = 0
    ignored = TokenLogProb(targets, ignore_index=0)
    plain = TokenLogProb(targets.masked_fill(targets == 0, IGNORE))
    M, truth = NTK(model, tokens, ignored), NTK(model, tokens, plain)
    assert torch.equal(M.to_dense(), truth.to_dense())
    parts = NTKShards(model, micro_batches(tokens, ignored, 2))
    assert (parts.to_dense() - truth.to_dense()).norm() < 1e-13 * truth.to_dense().norm()
