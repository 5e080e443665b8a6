"""Text as token arrays: the embedded corpus, local files, hub data sets; their batches.

Nothing here downloads unless the caller names a `hub:` corpus. The embedded corpus is the source
text of one Python's standard library (:mod:`grsd.lab.data.library`), the same on every machine: a
few million tokens of real text without network. Models are trained on these batches in
`grsd.lab.checkpoints.suites` and measured on them in `grsd.lab.runs.run`.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from grsd import pieces, scale
from grsd.checks import at_least, one_of
from grsd.lab.data import library, windows
from grsd.lab.data.windows import Tokens

END_OF_TEXT = "<|endoftext|>"
HELDOUT_FRACTION = 0.05
DOCUMENTS = 2000  # of a data set on the hub that are read
SPLITS = ("train", "heldout", "all")
SOURCES = ("embedded", "installed")  # corpora that are source text


@dataclass(frozen=True)
class Corpus:
    """Tokens of many documents, the training documents first.

    Attributes
    ----------
    tokens : (N,) uint16 or int32
        All documents, each followed by the end-of-text token (where the tokenizer has one).
    boundary
        ``tokens[:boundary]`` are the training documents, ``tokens[boundary:]`` the held-out ones.
        Whole documents are held out, and equal ones are kept once, so the two parts share none.
    fingerprint
        SHA-256 over the tokens and the boundary: equal ones give the same batches.
    tokenizer
        The transformers tokenizer that made the tokens; it has ``vocab_size`` entries.
    """

    name: str
    tokens: Tokens = field(repr=False, compare=False)
    boundary: int
    vocab_size: int
    fingerprint: str
    tokenizer: Any = field(repr=False, compare=False)

    def part(self, split: str = "train") -> Tokens:
        """Tokens of ``split``: ``"train"``, ``"heldout"`` or ``"all"``."""
        if one_of("split", split, SPLITS) == "all":
            return self.tokens
        return self.tokens[: self.boundary] if split == "train" else self.tokens[self.boundary :]

    def windows(self, length: int, split: str = "train") -> int:
        """Number of disjoint windows of ``length`` tokens, each with the token that follows."""
        return windows.count_windows(self.part(split), length)

    def batches(
        self, count: int, batch_size: int, length: int, seed: int, split: str = "train"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``count`` pairs ``(inputs, targets)``, each int64 of shape (batch_size, length).

        ``targets[b, t]`` is the token after ``inputs[b, t]``. The split is cut into disjoint
        windows, which are visited in an order drawn from ``seed``: no window repeats before all
        were used, and batch number i does not depend on ``count``. When they run out, a new order
        is drawn. A split too short for one batch is refused at the call.
        """
        tokens = self.part(split)
        if min(batch_size, length) < 1 or count < 0:
            sizes = f"{count} batches of {batch_size} x {length} tokens"
            raise ValueError(f"{sizes}: batch size and length must be at least 1, the count 0")
        available = windows.count_windows(tokens, length)
        if available < batch_size:
            has = f"{len(tokens)} tokens, {available} windows of {length}"
            raise ValueError(
                f"corpus {self.name!r} is too short: its {split!r} part has {has}, and one batch "
                f"needs {batch_size}; take a smaller batch size or length, another split, or more "
                "text"
            )
        return windows.batches(tokens, count, batch_size, length, seed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when a token does not exist in a model with ``vocab_size`` entries."""
        largest = int(self.tokens.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the corpus {self.name!r} does not fit the model: its tokenizer gives ids up to "
                f"{largest}, the model's vocabulary has {vocab_size}; tokenize the text with the "
                "model's own tokenizer"
            )


class How(TypedDict, total=False):
    """How text becomes tokens: options that every corpus passes to `from_texts`."""

    tokenizer: Any
    vocab_size: int
    cache: Path | str | None


def embedded(**how: Unpack[How]) -> Corpus:
    """The text of Python 3.11.7's standard library, 3.3 million tokens at 2048 entries.

    A byte-level BPE of ``vocab_size`` entries (2048, or 257 and more) is trained on the text, in
    seconds, unless a transformers ``tokenizer`` is given, e.g. that of the model to be measured.
    The text is read each time; the tokens in ``cache`` (default `grsd.scale.cache_dir`) are used
    when it is unchanged.
    """
    return from_texts("embedded", map(_decoded, library.files().values()), **how)


def installed(**how: Unpack[How]) -> Corpus:
    """The embedded corpus and the text of every installed package: another on every machine.

    With a deep-learning environment this is 50 to 100 million tokens, enough for the larger sizes
    of `grsd.lab.checkpoints.suites`; its fingerprint says which text it was. The tokenizer has
    32768 entries, the rest is as for `embedded`.
    """
    folders = sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")})
    packages = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    how.setdefault("vocab_size", 32768)
    texts = [*library.files().values(), *(path.read_bytes() for path in packages)]
    return from_texts("installed", map(_decoded, texts), **how)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")


def files(paths: str | Path | Sequence[str | Path], **how: Unpack[How]) -> Corpus:
    """Local text files (UTF-8) by path or pattern (``"notes/**/*.txt"``), one document each.

    Without a ``tokenizer`` one of ``vocab_size`` entries is trained on the text, as by `embedded`.
    """
    asked = [paths] if isinstance(paths, (str, Path)) else list(paths)
    matching: set[str] = set()
    for item in asked:
        if not (matches := _matches(item)):
            wanted = "give a file or a pattern in quotes"
            raise FileNotFoundError(f"no text file matches {str(item)!r}; {wanted}")
        matching.update(matches)
    texts = []
    for path in sorted(matching):
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start}"
            raise ValueError(f"{path} is not UTF-8 text ({where})") from error
    return from_texts(",".join(map(str, asked)), texts, **how)


def hub(
    name: str, config: str = "", split: str = "train", *, column: str = "text", **how: Unpack[How]
) -> Corpus:
    """The first 2000 documents of a data set on the Hugging Face hub, or of a local folder of one.

    Needs the optional package ``datasets`` and, unless the data set is already cached, network:
    RuntimeError says which of them is missing.
    """
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        do = "pip install datasets, or pass text files"
        raise RuntimeError(f"the corpus 'hub:{name}' needs the package datasets: {do}") from error
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        columns = list(next(iter(stream)).keys())
        rows = islice(stream, DOCUMENTS) if column in columns else ()
        texts = [str(row[column]) for row in rows]
    except StopIteration:
        raise ValueError(f"the data set {name!r}, split {split!r}, is empty") from None
    except Exception as error:  # datasets raises anything from OSError to its own classes
        lines = [line for line in str(error).splitlines() if line.strip()]
        what = f"cannot read the data set {name!r} (config {config or None!r}, split {split!r})"
        raise RuntimeError(
            f"{what}: {lines[0] if lines else type(error).__name__}; check the name, or without "
            "network download it elsewhere and pass its text files as the corpus"
        ) from error
    if column not in columns:
        has = ", ".join(columns)
        raise ValueError(f"the data set {name!r} has no column {column!r}; it has {has}")
    return from_texts(":".join(filter(None, ["hub", name, config, split])), texts, **how)


def open_corpus(spec: str, tokenizer: Any = None, *, cache: Path | str | None = None) -> Corpus:
    """The corpus a command line names; ValueError for an unknown name.

    ``embedded[:VOCAB]``, ``installed[:VOCAB]``, a path or pattern, or
    ``hub:NAME[:config[:split]]``. ``VOCAB`` is the size of the tokenizer that is trained on the
    text, without effect if one is given.
    """
    name, _, size = spec.partition(":")
    if name in SOURCES:
        if size and not size.isdecimal():
            form = f"{name}[:VOCAB], such as {name}:4096"
            raise ValueError(f"corpus {spec!r} is not of the form {form}")
        how: How = {"cache": cache, "tokenizer": tokenizer}
        if size:
            how["vocab_size"] = int(size)
        return embedded(**how) if name == "embedded" else installed(**how)
    if name == "hub":
        dataset, config, split, *more = [*spec.split(":")[1:], "", ""]
        if not dataset or len(more) > 2:
            raise ValueError(f"corpus {spec!r} is not of the form hub:NAME[:config[:split]]")
        return hub(dataset, config, split or "train", tokenizer=tokenizer, cache=cache)
    if not spec.strip():
        wanted = "embedded, a text file or pattern, or hub:NAME"
        raise ValueError(f"the corpus has an empty name; expected {wanted}")
    if os.path.isdir(os.path.expanduser(spec)):
        do = f"name its text files by a pattern in quotes, such as '{spec.rstrip('/')}/*.txt'"
        raise ValueError(f"the corpus {spec!r} is a folder; {do}")
    if not _matches(spec):
        known = "'embedded', an existing text file or pattern, or 'hub:NAME[:config[:split]]'"
        raise ValueError(f"unknown corpus {spec!r}: expected {known}")
    return files(spec, tokenizer=tokenizer, cache=cache)


def default_split(spec: str) -> str:
    """The part that models are measured on: of a source text what they were not trained on."""
    return "heldout" if spec.partition(":")[0] in SOURCES else "all"


def _matches(pattern: str | Path) -> list[str]:
    paths = glob.glob(os.path.expanduser(str(pattern)), recursive=True)
    return [path for path in paths if os.path.isfile(path)]


def from_texts(
    name: str,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    vocab_size: int = 2048,
    cache: Path | str | None = None,
) -> Corpus:
    """Tokenize documents into a `Corpus`, cached by content.

    Equal documents are kept once; the rest is ordered as given. The twentieth part of the documents
    with the largest SHA-256 (at least one, when there are two or more) is held out.
    """
    # documents by their digest, which also says who is held out
    by_digest: dict[str, str] = {}
    for text in filter(str.strip, texts):
        by_digest.setdefault(_sha256(text), text)
    if not by_digest:
        raise ValueError(f"the corpus {name!r} is empty: no document holds any text")
    held = 0 if len(by_digest) < 2 else max(1, round(HELDOUT_FRACTION * len(by_digest)))
    heldout = set(sorted(by_digest)[len(by_digest) - held :])
    ordered = sorted(by_digest, key=heldout.__contains__)  # stable: the held-out ones come last

    def encoded() -> tuple[Tokens, int, Any]:
        """Tokens, the boundary between the two parts, and the tokenizer."""
        documents = [by_digest[digest] for digest in ordered]
        made = tokenizer if tokenizer is not None else _train_tokenizer(documents, vocab_size)
        ids = _encode(made, documents)
        tokens = np.concatenate(ids)
        small = np.uint16 if int(tokens.max()) < 2**16 else np.int32
        return tokens.astype(small), sum(map(len, ids[: len(ids) - held])), made

    def make(folder: Path) -> None:
        tokens, boundary, made = encoded()
        np.savez(folder / "tokens.npz", tokens=tokens, boundary=boundary)
        if tokenizer is None:
            made.backend_tokenizer.save(str(folder / "tokenizer.json"))

    # what names the tokens: the tokenizer and the documents
    if tokenizer is None:
        why = "it must be at least 257 (256 bytes and the end of text)"
        maker = f"bpe-{at_least('vocab_size', vocab_size, 257, why)}"
    elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        maker = f"{tokenizer.eos_token_id} {backend.to_str()}"
    else:  # what such a tokenizer does cannot be named, so it is asked every time
        return _corpus(name, *encoded())
    inputs = {"tokenizer": _sha256(maker), "documents": _sha256(" ".join(ordered)), "held": held}
    base = scale.cache_dir(cache)
    folder = pieces.Store(base / "corpora", pieces.code(from_texts)).folder(inputs, make)
    with np.load(folder / "tokens.npz", allow_pickle=False) as stored:
        tokens, boundary = stored["tokens"], int(stored["boundary"])
    if tokenizer is None:
        from tokenizers import Tokenizer

        tokenizer = _wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return _corpus(name, tokens, boundary, tokenizer)


def _sha256(text: str | bytes) -> str:
    raw = text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text
    return hashlib.sha256(raw).hexdigest()


def _corpus(name: str, tokens: Tokens, boundary: int, tokenizer: Any) -> Corpus:
    tokens.setflags(write=False)
    fingerprint = _sha256(f"{boundary} ".encode() + tokens.astype("<i4").tobytes())
    return Corpus(name, tokens, boundary, len(tokenizer), fingerprint, tokenizer)


def _train_tokenizer(documents: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return _wrap(bpe)


def _wrap(bpe: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    end = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **end)


def _encode(tokenizer: Any, documents: list[str]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Token ids of every document, with the end of text behind it, where there is one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encoded = [e.ids for e in backend.encode_batch(documents, add_special_tokens=False)]
    else:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [np.asarray([*ids, *end], dtype=np.int64) for ids in encoded]
