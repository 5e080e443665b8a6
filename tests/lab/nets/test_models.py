from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from grsd.lab.nets import models

MAKERS: list[tuple[Callable[..., nn.Module], torch.Tensor, tuple[int, ...]]] = [
    (partial(models.mlp, [3, 5, 2]), torch.ones(4, 3, dtype=torch.float64), (4, 2)),
    (partial(models.conv_net), torch.ones(4, 1, 6, 5, dtype=torch.float64), (4, 3)),
    (partial(models.gpt2), torch.ones(2, 7, dtype=torch.int64), (2, 7, 61)),
    (partial(models.gpt_neox), torch.ones(2, 7, dtype=torch.int64), (2, 7, 61)),
]


@pytest.mark.parametrize(("make", "inputs", "shape"), MAKERS)
def test_shape_dtype_mode_and_seed(
    make: Callable[..., nn.Module], inputs: torch.Tensor, shape: tuple[int, ...]
) -> None:
    state = torch.random.get_rng_state()
    first, same, other = make(seed=0), make(seed=0), make(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert not first.training and all(p.dtype == torch.float64 for p in first.parameters())
    with torch.no_grad():
        outputs = [getattr(y, "logits", y) for y in (net(inputs) for net in (first, same, other))]
    assert outputs[0].shape == shape and outputs[0].dtype == torch.float64
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("make", [models.gpt2, models.gpt_neox])
@pytest.mark.parametrize("tie", [True, False])
def test_tying_shares_the_embedding(make: Callable[..., nn.Module], tie: bool) -> None:
    net = make(seed=0, tie=tie)
    inward, outward = net.get_input_embeddings().weight, net.get_output_embeddings().weight  # type: ignore[operator]
    assert (inward is outward) == tie


def test_bad_shapes_are_quoted() -> None:
    with pytest.raises(ValueError, match=r"\[3\]"):
        models.mlp([3], seed=0)
    with pytest.raises(ValueError, match=r"activation is 'swish'.*tanh"):
        models.mlp([3, 3, 1], "swish", seed=0)
    with pytest.raises(ValueError, match="channels"):
        models.conv_net((1,), seed=0)
