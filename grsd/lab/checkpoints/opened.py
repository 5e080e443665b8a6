"""A model's name, resolved once: a mini suite, a local folder, or a model on the Hugging Face hub.

`open_model` says what a name means; its `Model` lists the revisions and hands out a `Checkpoint`,
which knows its folder, its fingerprint and its tokenizer, and loads. All three kinds of names go
through the same files and checks, those of `grsd.lab.checkpoints.hub`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd.lab.checkpoints import hub, suites
from grsd.lab.data.corpora import Corpus


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured, in eval mode.

    Called with token ids (B, L), `model` gives an output with ``logits`` (B, L, V). `tokenizer` is
    None when the checkpoint carries none; `config` is the configuration of transformers.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    revision: str
    config: Any = field(repr=False)
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """Number of entries of the output layer."""
        return int(self.config.vocab_size)

    def check_fit(self, corpus: Corpus, length: int) -> None:
        """Refuse a text whose tokens or length the model cannot take, with ValueError."""
        if self.tokenizer is None and corpus.vocab_size > self.vocab_size:
            made = f"the one made for the corpus {corpus.name!r} has {corpus.vocab_size} entries"
            raise ValueError(
                f"{self.name} carries no tokenizer, and {made} for a vocabulary of "
                f"{self.vocab_size}; put the model's tokenizer.json into its folder"
            )
        corpus.check_vocabulary(self.vocab_size)
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and length > context:
            what = f"exceeds the model's context of {context} tokens"
            raise ValueError(f"length = {length} {what}; lower length")


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face format; the revision of a single one is "main"."""

    name: str
    revision: str
    folder: Path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weights as stored and the configuration."""
        return hub.checkpoint_fingerprint(self.folder)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that comes with it, or None."""
        return hub.tokenizer_of(self.folder)

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str | None = None,
    ) -> Loaded:
        """Parameters and errors as of the function `load`."""
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype, got {dtype}")
        where = hub.check_device(device)
        attention = attention or ("sdpa" if dtype == torch.float64 else "eager")
        net = hub.build(self.folder, dtype, attention).to(where)
        return Loaded(net, self.tokenizer, self.name, self.revision, net.config, self.fingerprint)


@dataclass(frozen=True)
class Model:
    """What a name means."""

    name: str
    root: Path | None  #: a checkpoint's folder, or one of a folder per revision; None on the hub
    suite: suites.Suite | None = None  #: the mini suite of that name, trained or not

    @property
    def revisions(self) -> list[str]:
        """Checkpoints by training step, ``["main"]`` for a single one; on the hub branches."""
        if self.root is None:
            return hub.branches(self.name)
        return revisions_in(self.root) or [self.checkpoint().revision]

    def checkpoint(self, revision: str | None = None) -> Checkpoint:
        """One checkpoint, downloaded if need be; by default the last, or the hub's ``main``."""
        if self.root is not None:
            return self._in_folder(self.root, revision)
        asked = revision or "main"
        return Checkpoint(self.name, asked, hub.download(self.name, asked))

    def _in_folder(self, root: Path, revision: str | None) -> Checkpoint:
        have, single = revisions_in(root), (root / "config.json").is_file()
        if revision is not None and revision in have:
            return Checkpoint(self.name, revision, root / revision)
        if single and revision in (None, "main"):
            return Checkpoint(self.name, "main", root)
        if have and revision is None:
            last = ([name for name in have if name.startswith("step")] or have)[-1]
            return Checkpoint(self.name, last, root / last)

        # nothing fits: say what there is
        if have:
            raise ValueError(f"{self.name} has no revision {revision!r}; it has {', '.join(have)}")
        if single:
            why = "it is a single checkpoint, so pass no revision"
            raise ValueError(f"{self.name} has no revision {revision!r}: {why}")
        if self.suite is not None:
            do = f"run: grsd suite --size {self.name}"
            raise ValueError(f"the suite {self.name} is not trained yet; {do}")
        expected = "expected config.json and model.safetensors in it"
        raise ValueError(f"the folder {self.name} holds no checkpoint: {expected}")


def open_model(model: str | Path, *, cache: Path | str | None = None) -> Model:
    """Say what a name means, as at `load`. Nothing is downloaded and no weight is read."""
    name, path = str(model), Path(model).expanduser()
    if name in suites.MINI:
        suite = suites.locate(name, suites.of_suite(name, cache=cache), cache=cache)
        return Model(name, suite.root, suite)
    if path.is_dir():
        return Model(name, path)
    if path.is_file():
        holds = "the folder that holds config.json and model.safetensors"
        raise ValueError(f"{name} is a file; pass {holds}")
    sizes = ", ".join(suites.MINI)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or "--" in name:
        other = "an existing folder, or a name on the hub such as EleutherAI/pythia-70m"
        raise ValueError(f"unknown model {name!r}: expected one of {sizes}, {other}")
    if "/" not in name and name.startswith(("mini", "step")):
        raise ValueError(f"unknown model {name!r}: the mini suite has {sizes}")
    return Model(name, None)


def load(
    model: str | Path,
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    cache: Path | str | None = None,
) -> Loaded:
    """Load one checkpoint.

    Parameters
    ----------
    model
        A mini-suite name (``"mini-1.3m"``, trained before with `grsd suite`), a folder in Hugging
        Face format, a folder of such folders (one per revision), or a name on the hub
        (``"EleutherAI/pythia-70m"``).
    revision
        ``"step1000"``. Without it the last checkpoint of a suite, or the hub's ``main``.
    attention
        Implementation in transformers. Default ``"eager"``, which has a second derivative
        everywhere; in float64 ``"sdpa"``, because the eager one computes its softmax in float32.
        The operator of `grsd.spectrum` selects the mathematical backend of the latter by itself.

    Raises
    ------
    ValueError
        Unknown model or revision (the message lists those there are), or a checkpoint that is
        truncated, incomplete, not finite, pickled, or in need of code of its own; the file is
        named.
    RuntimeError
        The hub cannot be reached, or the device does not exist.
    """
    return open_model(model, cache=cache).checkpoint(revision).load(dtype, device, attention)


def revisions_in(root: Path) -> list[str]:
    """Names of the checkpoint folders under ``root``, by training step, then by name."""
    folders = root.iterdir() if root.is_dir() else ()
    names = [p.name for p in folders if p.name[0] != "." and (p / "config.json").is_file()]

    def order(name: str) -> tuple[bool, int, str]:
        step = re.fullmatch(r"step[-_]?(\d+)", name)
        return (step is None, int(step.group(1)) if step else 0, name)

    return sorted(names, key=order)
