"""The mini-Pythia suite: GPT-NeoX nets with checkpoints at steps 0, 1, 2, 4, … as Pythia.

A suite is a folder with one subfolder per checkpoint, each in Hugging Face format, so it is opened
by the code path that opens published models. Its place in the cache is the key of what determines
the numbers (sizes, the corpus fingerprint, the recipe, the code that trains), never a path or a
device.

Training that was killed resumes from the last checkpoint with the same numbers:
`progress.safetensors` holds both moments of AdamW and the losses so far, and is replaced in one
rename after each checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from grsd import pieces, results, scale
from grsd.checks import one_of
from grsd.lab.checkpoints import training
from grsd.lab.checkpoints.training import Preset, Recipe, Training, build, checkpoint_steps
from grsd.lab.data import corpora, windows
from grsd.lab.data.corpora import Corpus
from grsd.lab.nets.models import quiet

__all__ = ["MINI", "Preset", "Recipe", "Suite", "build", "checkpoint_steps", "locate"]
__all__ += ["named", "of_suite", "train"]

_PROGRESS, _RECORD = "progress.safetensors", "training.json"
HELDOUT_BATCHES = 4
Progress = Callable[[int, int, float], None]  # (step, steps, loss)
Fields = dict[str, Any]

# The mini sizes share one shape family (head size 16 to 32, V = 2048); learning rates fall with
# width as in Pythia. The last two have Pythia's own shapes and learning rates, for an accelerator.
_LARGE: dict[str, Any] = {"corpus": "installed:32768", "batch_size": 128, "precision": "bfloat16"}
_LARGE |= {"vocab_size": 50304, "lr": 1e-3}
MINI: dict[str, Preset] = {
    "mini-0.4m": Preset("mini-0.4m", hidden=64, layers=3, heads=4, vocab_size=2048, lr=4e-3),
    "mini-1.3m": Preset("mini-1.3m", hidden=128, layers=4, heads=4, vocab_size=2048, lr=3e-3),
    "mini-4.2m": Preset("mini-4.2m", hidden=256, layers=4, heads=8, vocab_size=2048, lr=2e-3),
    "pythia-14m": Preset("pythia-14m", hidden=128, layers=6, heads=4, **_LARGE),
    "pythia-70m": Preset("pythia-70m", hidden=512, layers=6, heads=8, **_LARGE),
}


@dataclass(frozen=True)
class Suite:
    """A folder of checkpoints."""

    size: Preset
    root: Path
    steps: int  #: updates made; the revisions are those up to it
    seed: int = 0

    @property
    def name(self) -> str:
        """As `grsd.lab.load` takes it: ``"mini-0.4m"``, with another seed ``"mini-0.4m@1"``."""
        return f"{self.size.name}@{self.seed}" if self.seed else self.size.name

    @property
    def revisions(self) -> tuple[str, ...]:
        """``("step0", "step1", "step2", "step4", …)``, in training order."""
        return tuple(f"step{s}" for s in checkpoint_steps(self.steps))

    def path(self, revision: str) -> Path:
        """Folder of one checkpoint, in Hugging Face format."""
        if revision not in self.revisions:
            has = ", ".join(self.revisions)
            raise ValueError(f"{self.size.name} has no revision {revision!r}; it has {has}")
        return self.root / revision

    def training(self) -> dict[str, Any]:
        """Hyperparameters; ``loss`` (steps,) and ``heldout`` (revision → nats per token)."""
        record: dict[str, Any] = json.loads((self.root / _RECORD).read_text())
        heldout = {r: record["heldout"][r] for r in self.revisions if r in record["heldout"]}
        return record | {"loss": record["loss"][: self.steps], "heldout": heldout}

    @property
    def complete(self) -> bool:
        """Whether every checkpoint up to ``steps`` is there."""
        return all((self.root / r / "model.safetensors").is_file() for r in self.revisions)


def named(model: str) -> tuple[str, int] | None:
    """Size and seed of ``"mini-0.4m"`` or ``"mini-0.4m@1"``; None for the name of no suite."""
    size, at, seed = model.partition("@")
    if size not in MINI:
        return None
    if at and not (seed.isascii() and seed.isdecimal()):
        raise ValueError(f"the suite {model!r} names no seed: expected {size} or {size}@1")
    return size, int(seed or 0)


def of_suite(size: str, *, cache: Path | str | None = None) -> Corpus:
    """The corpus that a size of `MINI` is trained on."""
    return corpora.open_corpus(_preset(size).corpus, cache=cache)


def _preset(size: Preset | str) -> Preset:
    if isinstance(size, Preset):
        return size
    return MINI[one_of("size", size, MINI)]


def _placed(
    named: Preset | str, corpus: Corpus, steps: int, cache: Path | str | None, recipe: Fields
) -> tuple[Suite, Recipe, pieces.Store, Fields]:
    """A suite with its recipe, the store that keeps it, and the inputs that name it there."""
    size = _preset(named)
    own = {"lr": size.lr, "batch_size": size.batch_size, "precision": size.precision}
    made = Recipe(**{**own, **recipe})
    shape = {k: v for k, v in asdict(size).items() if k != "corpus" and k not in own}
    inputs: Fields = {"shape": shape, "recipe": asdict(made), "corpus": corpus.fingerprint}
    if made.schedule == "cosine":  # only then does a long run not begin like a short one
        inputs["steps"] = steps
    folder = scale.cache_dir(cache) / "suites" / size.name
    store = pieces.Store(folder, pieces.code(training, windows))
    return Suite(size, store.path(inputs), steps, made.seed), made, store, inputs


def locate(
    size: Preset | str,
    corpus: Corpus,
    *,
    steps: int = 512,
    cache: Path | str | None = None,
    **recipe: Any,
) -> Suite:
    """Where `train` with the same arguments keeps its suite, whether or not it is there yet."""
    return _placed(size, corpus, steps, cache, recipe)[0]


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
    """Train one net on ``corpus`` and keep its checkpoints, unless they are there already.

    Parameters
    ----------
    size
        A shape, or a name in `MINI`.
    corpus
        Its training part is used, in an order drawn from ``seed``.
    steps
        Updates. Checkpoints stand at 0, 1, 2, 4, …, 512, 1000, 2000, 4000, 8000 and at ``steps``.
    device
        Recorded in ``training.json``, not part of the cache key: devices and thread counts differ
        in rounding only.
    progress
        Called with (step, steps, loss) after each update.
    **recipe
        Fields of `Recipe`: ``lr``, ``batch_size=16``, ``length=128``, ``seed=0``, ``schedule``, …

    Notes
    -----
    Cost: ``steps`` forward and backward passes, and 17 small held-out passes. With an unchanged
    number of threads a run that was killed and resumed equals an uninterrupted one bit for bit.
    A loss that is not finite raises FloatingPointError.
    """
    suite, made, store, inputs = _placed(size, corpus, steps, cache, recipe)
    corpus.check_vocabulary(suite.size.vocab_size)
    corpus.batches(1, made.batch_size, made.length, made.seed)  # refuses one that is too short

    def fill(_: Path) -> None:
        _train(suite, made, corpus, torch.device(device), progress)

    store.folder(inputs, fill, enough=lambda _: suite.complete)
    return suite


def _train(
    suite: Suite, recipe: Recipe, corpus: Corpus, device: torch.device, progress: Progress | None
) -> None:
    """Fill the folder of a suite, from where an earlier training left it."""
    from safetensors.torch import save

    for leftover in suite.root.glob(".draft-*"):  # the store is locked: no living process owns one
        shutil.rmtree(leftover, ignore_errors=True)
    # the state of an earlier training, and what is due from there
    run = Training(suite.size, recipe, device)
    heldout = _resume(run, suite)
    first, begun = len(run.losses), time.monotonic()
    due = set(checkpoint_steps(suite.steps))
    try:  # a longer run may have been here: then its state and its record stay
        longer = len(json.loads((suite.root / _RECORD).read_text())["loss"]) > suite.steps
    except FileNotFoundError:
        longer = False

    def keep(step: int) -> None:
        heldout[f"step{step}"] = _heldout_loss(run, corpus)
        _save_revision(run, suite.root / f"step{step}", corpus)
        if longer:
            return
        state = save(run.state(), metadata={"heldout": json.dumps(heldout)})
        results.atomic_write(suite.root / _PROGRESS, state)
        spent = (time.monotonic() - begun) / (step - first) if step > first else None
        text: Fields = {"name": corpus.name, "fingerprint": corpus.fingerprint}
        text["tokens"] = len(corpus.tokens)
        record: Fields = {"size": asdict(suite.size), "recipe": asdict(recipe)}
        record |= {"parameters": suite.size.parameters, "device": device.type, "corpus": text}
        record |= {"loss": run.losses, "heldout": heldout, "seconds_per_step": spent}
        results.atomic_write(suite.root / _RECORD, json.dumps(record))

    # train, keeping every checkpoint with its held-out loss
    if first in due:  # step 0; or the training was killed just before its record was written
        keep(first)
    stream = corpus.batches(suite.steps, recipe.batch_size, recipe.length, recipe.seed)
    for step, (inputs, targets) in islice(enumerate(stream, 1), first, None):
        loss = run.update(inputs, targets, suite.steps)
        if step in due:
            keep(step)
        if progress is not None:
            progress(step, suite.steps, loss)


def _heldout_loss(run: Training, corpus: Corpus) -> float | None:
    """Loss on the first held-out batches; None when the corpus holds out too little."""
    size, length, seed = run.recipe.batch_size, run.recipe.length, run.recipe.seed
    if corpus.windows(length, "heldout") < size:
        return None
    return run.mean_loss(corpus.batches(HELDOUT_BATCHES, size, length, seed, "heldout"))


def _save_revision(run: Training, target: Path, corpus: Corpus) -> None:
    """Write one checkpoint in one rename. A folder that is there already is whole."""
    if (target / "model.safetensors").is_file():
        return
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        with quiet():
            run.model.save_pretrained(draft)  # type: ignore[operator]
        corpus.tokenizer.save_pretrained(draft)
        os.rename(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _resume(run: Training, suite: Suite) -> dict[str, float | None]:
    """Put a net where an earlier training left it; return its held-out losses."""
    from safetensors import safe_open

    path = suite.root / _PROGRESS
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        heldout: dict[str, float | None] = json.loads(file.metadata()["heldout"])
    if len(tensors["losses"]) > suite.steps:
        return {}  # a longer run was here: the numbers are the same from the start
    run.restore(tensors)
    return heldout
