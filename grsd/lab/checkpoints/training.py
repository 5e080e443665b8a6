"""How a net of the mini suite is trained: its shape, its initial weights, the updates of AdamW.

Nothing is read or written here; `grsd.lab.checkpoints.suites` keeps the checkpoints, under a key
that holds the code of this module. So the module imports nothing else of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Preset", "Recipe", "Training", "build", "checkpoint_steps"]

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient and of its square, as torch calls them


@dataclass(frozen=True)
class Preset:
    """Shape of one GPT-NeoX: rotary on a quarter of each head, parallel residuals, untied."""

    name: str
    hidden: int
    layers: int
    heads: int
    vocab_size: int
    lr: float
    positions: int = 2048
    corpus: str = "embedded"  # as `corpora.open_corpus`; what `grsd suite` trains on
    batch_size: int = 16  # sequences per update, and the precision: defaults of the recipe
    precision: str = "float32"

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import GPTNeoXConfig

        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
            rope_parameters=rope,
            hidden_act="gelu",
            tie_word_embeddings=False,
            use_parallel_residual=True,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )

    @property
    def parameters(self) -> int:
        """2 V h for the untied embeddings, 12 h² + 13 h per layer, 2 h for the last norm."""
        h = self.hidden
        return 2 * self.vocab_size * h + self.layers * (12 * h * h + 13 * h) + 2 * h


@dataclass(frozen=True)
class Recipe:
    """How a net is trained: as Pythia, but for a warm-up of 32 steps and a flat rate after it.

    Pythia warms up over 1430 steps and then decays by a cosine to a tenth over 143 000; within 512
    steps that cosine is flat to 4e-5, so ``"constant"`` is its short-run form. It also makes a
    short run a prefix of a longer one.
    """

    lr: float
    batch_size: int = 16
    length: int = 128
    seed: int = 0
    schedule: str = "constant"
    warmup: int = 32
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}: expected 'constant' or 'cosine'")
        if (precision := self.precision) not in ("float32", "bfloat16"):
            raise ValueError(f"unknown precision {precision!r}: expected 'float32' or 'bfloat16'")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if self.batch_size < 1 or self.length < 2:
            size = f"{self.batch_size} x {self.length}"
            raise ValueError(f"a batch needs at least 1 x 2 tokens, got {size}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update number ``step`` (from 0) of ``steps``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        turn = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, turn)))


def checkpoint_steps(steps: int) -> list[int]:
    """``steps`` and those of Pythia before it: 0, powers of two to 512, 1000, …, 8000."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    grid = [0, *(2**k for k in range(10)), 1000, 2000, 4000, 8000]
    return sorted({s for s in grid if s <= steps} | {steps})


def build(size: Preset, seed: int, device: str | torch.device = "cpu") -> nn.Module:
    """An untrained net of this size, float32, with Pythia's initialisation.

    Weights are normal with variance 2/(5 h); those that write to the residual stream have standard
    deviation 2/(L sqrt(h)); biases 0, norm gains 1 (GPT-NeoX, ``small_init`` and ``wang_init``).
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        model = AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    inward, other = 2 / (size.layers * math.sqrt(size.hidden)), math.sqrt(2 / (5 * size.hidden))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                writes = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
                weight.normal_(0.0, inward if writes else other, generator=generator)
    return model.to(device).eval()


class Training:
    """A net under training.

    Attributes
    ----------
    model : nn.Module
    losses : list of float
        Of the updates so far, nats per token.
    """

    def __init__(self, size: Preset, recipe: Recipe, device: torch.device) -> None:
        self.size, self.recipe, self.device = size, recipe, device
        self.model = build(size, recipe.seed, device)
        self.losses: list[float] = []
        # AdamW with decay on matrices only, as in GPT-NeoX
        parameters = list(self.model.parameters())
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps
        )

    def update(self, inputs: Tensor, targets: Tensor, steps: int) -> float:
        """Make one update of ``steps``, and return the loss before it."""
        step = len(self.losses)
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(step, steps)
        self.model.train()
        mixed = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            loss = self._loss(inputs, targets)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip = self.recipe.clip
        nn.utils.clip_grad_norm_(self.model.parameters(), clip, error_if_nonfinite=True)
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            what = f"{self.size.name}: the loss is {self.losses[-1]} at step {step}"
            raise FloatingPointError(f"{what}; lower lr")
        return self.losses[-1]

    def mean_loss(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over batches, nats per token."""
        self.model.eval()
        with torch.no_grad():
            losses = [float(self._loss(inputs, targets)) for inputs, targets in batches]
        return sum(losses) / len(losses)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs.to(self.device), use_cache=False).logits
        wanted = targets.to(self.device).flatten()
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted)

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and losses: all that the next update depends on."""
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, weight in self.model.named_parameters():
            moments = self._optimizer.state.get(weight) or {}
            parts = {"weight": weight} | {key: moments[key] for key in _MOMENTS if key in moments}
            for key, part in parts.items():
                tensors[f"{key}.{name}"] = part.detach().cpu().contiguous()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.losses = tensors["losses"].tolist()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(tensors[f"weight.{name}"])
                if self.losses:
                    moments = {key: tensors[f"{key}.{name}"].to(self.device) for key in _MOMENTS}
                    step = torch.tensor(float(len(self.losses)))
                    self._optimizer.state[weight] = {"step": step, **moments}
