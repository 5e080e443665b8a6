"""The mini-Pythia suite: GPT-NeoX nets trained on a corpus, with checkpoints at steps 0, 1, 2, 4, … as in Pythia.

A suite is a folder with one subfolder per checkpoint, each in Hugging Face format, so `grsd.lab.checkpoints.hub` loads it by the
code path that loads the published models. Its place in the cache is the hash of what determines the numbers: sizes,
the corpus fingerprint, hyperparameters, seed, precision; never a path or a device.

Training that was killed resumes from the last checkpoint with the same numbers: `progress.safetensors` holds both
moments of AdamW and the losses so far, and is replaced in one rename after each checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd import results
from grsd.lab.data import corpora
from grsd.lab.data.corpora import Corpus
from grsd.lab.nets.models import quiet

_FORMAT = 1
_PROGRESS = "progress.safetensors"
HELDOUT_BATCHES = 4
Progress = Callable[[int, int, float], None]  # (step, steps, loss)


@dataclass(frozen=True)
class Preset:
    """Shape of one net: GPT-NeoX with rotary attention on a quarter of each head and parallel residuals, untied."""

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

        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
            hidden_act="gelu",
            tie_word_embeddings=False,
            use_parallel_residual=True,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters: 2 V h for the untied embeddings, 12 h² + 13 h per layer, 2 h for the last norm."""
        h = self.hidden
        return 2 * self.vocab_size * h + self.layers * (12 * h * h + 13 * h) + 2 * h


# The mini sizes share one shape family (head size 16 to 32, V = 2048); learning rates fall with width as in Pythia.
# The last two have Pythia's own shapes and learning rates, for runs on an accelerator.
_LARGE: dict[str, Any] = {"corpus": "installed:32768", "batch_size": 128, "precision": "bfloat16"}
MINI: dict[str, Preset] = {
    "mini-0.4m": Preset("mini-0.4m", hidden=64, layers=3, heads=4, vocab_size=2048, lr=4e-3),
    "mini-1.3m": Preset("mini-1.3m", hidden=128, layers=4, heads=4, vocab_size=2048, lr=3e-3),
    "mini-4.2m": Preset("mini-4.2m", hidden=256, layers=4, heads=8, vocab_size=2048, lr=2e-3),
    "pythia-14m": Preset(
        "pythia-14m", hidden=128, layers=6, heads=4, vocab_size=50304, lr=1e-3, **_LARGE
    ),
    "pythia-70m": Preset(
        "pythia-70m", hidden=512, layers=6, heads=8, vocab_size=50304, lr=1e-3, **_LARGE
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How a net is trained. The defaults are Pythia's, but for a warm-up of 32 steps and a flat rate after it.

    Pythia warms up over 1430 steps and then decays by a cosine to a tenth over 143 000; within 512 steps that cosine
    is flat to 4e-5, so ``"constant"`` is its short-run form. It also makes a short run a prefix of a longer one.
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
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(
                f"unknown precision {self.precision!r}: expected 'float32' or 'bfloat16'"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if self.batch_size < 1 or self.length < 2:
            raise ValueError(
                f"a batch needs at least 1 x 2 tokens, got {self.batch_size} x {self.length}"
            )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update number ``step`` (from 0) of ``steps``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        turn = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, turn)))


@dataclass(frozen=True)
class Suite:
    """A folder of checkpoints.

    Attributes
    ----------
    size : Preset
    root : Path
    steps : int
        Updates made; the revisions are those up to it.
    """

    size: Preset
    root: Path
    steps: int

    @property
    def revisions(self) -> tuple[str, ...]:
        """``("step0", "step1", "step2", "step4", …)``, in training order."""
        return tuple(f"step{s}" for s in checkpoint_steps(self.steps))

    def path(self, revision: str) -> Path:
        """Folder of one checkpoint, in Hugging Face format."""
        if revision not in self.revisions:
            raise ValueError(
                f"{self.size.name} has no revision {revision!r}; it has {', '.join(self.revisions)}"
            )
        return self.root / revision

    def training(self) -> dict[str, Any]:
        """Hyperparameters, and the curves ``loss`` (steps,) and ``heldout`` (revision → nats per token)."""
        found: dict[str, Any] = json.loads((self.root / "training.json").read_text())
        found["loss"] = found["loss"][: self.steps]
        found["heldout"] = {r: found["heldout"][r] for r in self.revisions if r in found["heldout"]}
        return found

    @property
    def complete(self) -> bool:
        """Whether every checkpoint up to ``steps`` is there."""
        return all((self.root / r / "model.safetensors").is_file() for r in self.revisions)


def checkpoint_steps(steps: int) -> list[int]:
    """Pythia's checkpoint steps up to ``steps``: 0, powers of two to 512, 1000, 2000, 4000, 8000; and ``steps``."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    grid = [0, *(2**k for k in range(10)), 1000, 2000, 4000, 8000]
    return sorted({s for s in grid if s <= steps} | {steps})


def build(size: Preset, seed: int, device: str = "cpu") -> nn.Module:
    """An untrained net of this size, float32, with Pythia's initialisation.

    Weights are normal with variance 2/(5 h); those that write to the residual stream have standard deviation
    2/(L sqrt(h)); biases 0, norm gains 1 (GPT-NeoX, ``small_init`` and ``wang_init``).
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(
        devices=[]
    ):  # transformers draws its own initial values from the global generator
        model = AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            inward = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            std = (
                2 / (size.layers * math.sqrt(size.hidden))
                if inward
                else math.sqrt(2 / (5 * size.hidden))
            )
            weight.normal_(0.0, std, generator=generator)
    module: nn.Module = model.to(device)
    return module.eval()


def of_suite(size: str, *, cache: Path | str | None = None) -> Corpus:
    """The corpus that a size of `MINI` is trained on."""
    if size not in MINI:
        raise ValueError(f"unknown size {size!r}: expected one of {', '.join(MINI)}")
    return corpora.open_corpus(MINI[size].corpus, cache=cache)


def locate(
    size: Preset | str,
    corpus: Corpus,
    *,
    steps: int = 512,
    cache: Path | str | None = None,
    **recipe: Any,
) -> Suite:
    """Where `train` with the same arguments keeps its suite, whether or not it is there yet."""
    size, made = _resolve(size, recipe)
    shape = {
        k: v for k, v in asdict(size).items() if k not in ("corpus", "batch_size", "precision")
    }  # said below
    content = [_FORMAT, shape, asdict(made), corpus.fingerprint]
    if made.schedule == "cosine":
        content.append(steps)
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    root = (
        (Path(cache) if cache is not None else results.cache_dir())
        / "suites"
        / f"{size.name}-{key[:12]}"
    )
    return Suite(size, root, steps)


def _resolve(size: Preset | str, recipe: dict[str, Any]) -> tuple[Preset, Recipe]:
    if isinstance(size, str):
        if size not in MINI:
            raise ValueError(f"unknown size {size!r}: expected one of {', '.join(MINI)}")
        size = MINI[size]
    return size, Recipe(
        **{"lr": size.lr, "batch_size": size.batch_size, "precision": size.precision, **recipe}
    )


def train(
    size: Preset | str,
    corpus: Corpus,
    *,
    steps: int = 512,
    device: str = "cpu",
    cache: Path | str | None = None,
    progress: Progress | None = None,
    **recipe: Any,
) -> Suite:
    """Train one net on ``corpus`` and keep its checkpoints; return at once when they are there already.

    Parameters
    ----------
    size : Preset or str
        A shape, or a name in `MINI`.
    corpus : Corpus
        Its training part is used, in an order drawn from ``seed``.
    steps : int
        Updates. Checkpoints stand at 0, 1, 2, 4, …, 512, 1000, 2000, 4000, 8000 and at ``steps``.
    device : str
        Recorded in ``training.json``, not part of the cache key: devices and thread counts differ in rounding only.
    cache : path, optional
        Default `grsd.results.cache_dir`.
    progress : callable, optional
        Called with (step, steps, loss) after each update.
    **recipe
        Fields of `Recipe`: ``lr``, ``batch_size=16``, ``length=128``, ``seed=0``, ``schedule``, ``precision``, …

    Raises
    ------
    ValueError
        An unknown size, a corpus whose ids do not fit, a corpus shorter than a batch.
    FloatingPointError
        The loss is not finite.

    Notes
    -----
    Cost: ``steps`` forward and backward passes, and 17 small held-out passes. With an unchanged number of threads a
    run that was killed and resumed equals an uninterrupted one bit for bit.
    """
    from filelock import FileLock

    suite = locate(size, corpus, steps=steps, cache=cache, **recipe)
    size, made = _resolve(size, recipe)
    corpus.check_vocabulary(size.vocab_size)
    corpus.batches(
        1, made.batch_size, made.length, made.seed
    )  # a corpus that is too short fails here
    suite.root.mkdir(parents=True, exist_ok=True)
    with FileLock(suite.root / ".lock"):  # a second process waits and finds the work done
        if not (suite.complete and (suite.root / "training.json").is_file()):
            _train(suite, made, corpus, torch.device(device), progress)
    return suite


def _train(
    suite: Suite, recipe: Recipe, corpus: Corpus, device: torch.device, progress: Progress | None
) -> None:
    model, optimizer, losses, heldout = _resume(suite, recipe, device)
    due = set(checkpoint_steps(suite.steps))
    longer = _recorded_steps(suite.root) > suite.steps  # a longer run was here: its record stays
    begun, first = time.monotonic(), len(losses)

    def keep(step: int) -> None:
        heldout[f"step{step}"] = _heldout_loss(model, corpus, recipe, device)
        _save_revision(suite, model, corpus, step)
        if longer:
            return
        _save_progress(suite, model, optimizer, losses, heldout)
        record = {
            "size": asdict(suite.size),
            "parameters": suite.size.parameters,
            "recipe": asdict(recipe),
            "device": device.type,
            "corpus": {
                "name": corpus.name,
                "fingerprint": corpus.fingerprint,
                "tokens": len(corpus.tokens),
            },
            "loss": losses,
            "heldout": heldout,
            "seconds_per_step": (time.monotonic() - begun) / (step - first)
            if step > first
            else None,
        }
        results.atomic_write(suite.root / "training.json", json.dumps(record))

    if not losses:
        keep(0)
    stream = corpus.batches(suite.steps, recipe.batch_size, recipe.length, recipe.seed)
    for step, (inputs, targets) in enumerate(stream):
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, suite.steps)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = _loss(model, inputs.to(device), targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip, error_if_nonfinite=True)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"{suite.size.name}: the loss is {losses[-1]} at step {step}; lower lr"
            )
        if step + 1 in due:
            keep(step + 1)
        if progress is not None:
            progress(step + 1, suite.steps, losses[-1])
    if first == suite.steps > 0:  # killed after the last update
        keep(suite.steps)


def _recorded_steps(root: Path) -> int:
    try:
        return len(json.loads((root / "training.json").read_text())["loss"])
    except (OSError, ValueError, KeyError):
        return -1


def _loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _heldout_loss(
    model: nn.Module, corpus: Corpus, recipe: Recipe, device: torch.device
) -> float | None:
    """Mean loss in nats per token on the first held-out batches; None when the corpus holds out too little."""
    if corpus.windows(recipe.length, "heldout") < recipe.batch_size:
        return None
    model.eval()
    batches = corpus.batches(
        HELDOUT_BATCHES, recipe.batch_size, recipe.length, recipe.seed, "heldout"
    )
    with torch.no_grad():
        found = [float(_loss(model, x.to(device), y.to(device))) for x, y in batches]
    return sum(found) / len(found)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, as in GPT-NeoX."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)


def _save_revision(suite: Suite, model: nn.Module, corpus: Corpus, step: int) -> None:
    """Write one checkpoint folder in one rename. A folder that is there already was written whole."""
    target = suite.root / f"step{step}"
    if (target / "model.safetensors").is_file():
        return
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=suite.root))
    try:
        with quiet():
            model.save_pretrained(draft)  # type: ignore[operator]
        corpus.tokenizer.save_pretrained(draft)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_progress(
    suite: Suite,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    heldout: dict[str, float | None],
) -> None:
    from safetensors.torch import save

    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, weight in model.named_parameters():
        state = optimizer.state.get(weight)
        tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
        if state:
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = state[key].detach().cpu().contiguous()
    results.atomic_write(
        suite.root / _PROGRESS, save(tensors, metadata={"heldout": json.dumps(heldout)})
    )


def _resume(
    suite: Suite, recipe: Recipe, device: torch.device
) -> tuple[nn.Module, torch.optim.AdamW, list[float], dict[str, float | None]]:
    """The net and optimizer as the last complete checkpoint left them, or untrained ones."""
    from safetensors import SafetensorError, safe_open

    for leftover in suite.root.glob(".draft-*"):  # the lock is held: no living process owns one
        shutil.rmtree(leftover, ignore_errors=True)
    model = build(suite.size, recipe.seed, str(device))
    optimizer = _optimizer(model, recipe)
    path = suite.root / _PROGRESS
    if not path.is_file():
        return model, optimizer, [], {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            heldout: dict[str, float | None] = json.loads(file.metadata()["heldout"])
            losses: list[float] = file.get_tensor("losses").tolist()
            if len(losses) > suite.steps:
                raise KeyError("a longer run was here")
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    if losses:
                        optimizer.state[weight] = {
                            "step": torch.tensor(float(len(losses))),
                            "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                            "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
                        }
    except (SafetensorError, KeyError, ValueError, OSError):
        # unreadable, or from a longer run than the one asked for: the numbers are the same from the start
        fresh = build(suite.size, recipe.seed, str(device))
        return fresh, _optimizer(fresh, recipe), [], {}
    return model, optimizer, losses, heldout
