"""Small models with inputs and observables that several tests share, float64 and seeded, and the Jacobian oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from grsd.spectrum import ClassLogits, Outputs, TokenLogProb
from grsd.spectrum.observables import Observable, raw_output

Case = tuple[nn.Module, Tensor, Observable]
VOCABULARY = 23


def _tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = torch.randint(0, VOCABULARY, (2, 2, 9), generator=generator)
    return draw[0], draw[1]


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)
    )
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    return model.double(), x, Outputs(y)


def conv() -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 4),
    )
    return (
        model.double(),
        torch.randn(7, 3, 8, 8, dtype=torch.float64),
        ClassLogits(torch.arange(7) % 4),
    )


def gpt2() -> Case:
    """Tied embeddings, HF Conv1D layers."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    x, y = _tokens()
    return GPT2LMHeadModel(config).double().eval(), x, TokenLogProb(y)


def gpt_neox(tie: bool = False, attention: str = "sdpa") -> Case:
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        tie_word_embeddings=tie,
        attn_implementation=attention,
    )
    x, y = _tokens()
    return GPTNeoXForCausalLM(config).double().eval(), x, TokenLogProb(y)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "conv": conv,
    "gpt2-tied": gpt2,
    "gpt-neox-untied": gpt_neox,
    "gpt-neox-tied": lambda: gpt_neox(tie=True),
}


def jacobian(model: nn.Module, inputs: Any, observable: Observable) -> dict[str, Tensor]:
    """Parameter → its columns of J, (T, P_k) float64: one ordinary backward pass a row, on a copy of the model.

    No transformation of torch.func, no retained graph and no double backward: nothing of the operators is used.
    """
    model, inputs = copy.deepcopy((model, inputs))
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    rows = observable.rows(raw_output(model(*args, **(inputs if isinstance(inputs, dict) else {}))))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = [
        torch.autograd.grad(row, [*named.values()], retain_graph=True, materialize_grads=True)
        for row in rows
    ]
    columns = zip(*gradients, strict=True)
    return {
        name: torch.stack([g.reshape(-1).double() for g in column])
        for name, column in zip(named, columns, strict=True)
    }


def dense(model: nn.Module, inputs: Any, observable: Observable) -> Tensor:
    """J Jᵀ, (T, T) float64, of all parameters that require a gradient: the truth of every operator M."""
    return sum(
        (J @ J.T for J in jacobian(model, inputs, observable).values()),
        torch.zeros((), dtype=torch.float64),
    )
