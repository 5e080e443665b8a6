"""Text as token arrays: the embedded corpus, local files, hub data sets, and the batches cut from them.

Nothing here downloads unless the caller names a `hub:` corpus. The embedded corpus is the source text of the
running Python's own standard library, so a fresh machine has a few million tokens of real text without network.
Models are trained on these batches in `grsd.lab.checkpoints.suites` and measured on them in `grsd.lab.runs.run`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grsd import results

END_OF_TEXT = "<|endoftext|>"
HELDOUT_FRACTION = 0.05
SPLITS = ("train", "heldout", "all")
SOURCES = ("embedded", "installed")  # corpora that are the source text on this machine
_FORMAT = 1
# Folders of the standard library that are not its text: tests, installed packages, character tables, bundled wheels.
_EXCLUDED = frozenset(
    "site-packages dist-packages test tests idle_test lib-dynload __pycache__ ensurepip encodings".split()
)


@dataclass(frozen=True)
class Corpus:
    """Tokens of many documents, the training documents first.

    Attributes
    ----------
    name : str
        What the caller asked for, e.g. ``"embedded"``.
    tokens : ndarray of uint16 or int32, shape (N,)
        All documents, each followed by the end-of-text token (where the tokenizer has one).
    boundary : int
        ``tokens[:boundary]`` are the training documents, ``tokens[boundary:]`` the held-out ones. Whole documents
        are held out, and equal documents are kept once, so the two parts share none.
    vocab_size : int
        Number of entries of the tokenizer.
    fingerprint : str
        SHA-256 over the tokens and the boundary: two corpora with one fingerprint give the same batches.
    tokenizer : object
        The transformers tokenizer that made the tokens.
    """

    name: str
    tokens: np.ndarray[Any, np.dtype[Any]] = field(repr=False, compare=False)
    boundary: int
    vocab_size: int
    fingerprint: str
    tokenizer: Any = field(repr=False, compare=False)

    def part(self, split: str = "train") -> np.ndarray[Any, np.dtype[Any]]:
        """Tokens of ``split``: ``"train"``, ``"heldout"`` or ``"all"``."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
        if split == "all":
            return self.tokens
        return self.tokens[: self.boundary] if split == "train" else self.tokens[self.boundary :]

    def windows(self, length: int, split: str = "train") -> int:
        """Number of disjoint windows of ``length`` tokens (each with the token that follows) in ``split``."""
        return max(0, (len(self.part(split)) - 1) // length)

    def batches(
        self, count: int, batch_size: int, length: int, seed: int, split: str = "train"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield ``count`` pairs ``(inputs, targets)``, each int64 of shape (batch_size, length).

        ``targets[b, t]`` is the token after ``inputs[b, t]``. The split is cut into disjoint windows, which are
        visited in an order drawn from ``seed``: no window repeats before all were used, and batch number i does not
        depend on ``count``. When the windows run out, a new order is drawn.

        Raises
        ------
        ValueError
            Sizes below one, an unknown split, or a split too short for one batch.
        """
        for what, value in (("batch_size", batch_size), ("length", length)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        available = self.windows(length, split)
        if available < batch_size:
            raise ValueError(
                f"corpus {self.name!r} is too short: its {split!r} part has {len(self.part(split))} tokens, "
                f"{available} windows of {length}, and one batch needs {batch_size}; "
                "take a smaller batch size or length, another split, or more text"
            )
        return self._batches(count, batch_size, length, seed, split, available)

    def _batches(
        self, count: int, batch_size: int, length: int, seed: int, split: str, available: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        tokens = self.part(split)
        generator = np.random.default_rng(seed)
        per_epoch = available // batch_size
        order = np.empty(0, dtype=np.int64)
        span = np.arange(length + 1)
        for index in range(count):
            turn = index % per_epoch
            if turn == 0:
                order = generator.permutation(available)
            starts = order[turn * batch_size : (turn + 1) * batch_size] * length
            block = torch.from_numpy(tokens[starts[:, None] + span].astype(np.int64))
            yield block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when a token does not exist in a model with ``vocab_size`` entries."""
        largest = int(self.tokens.max())
        if largest >= vocab_size:
            raise ValueError(
                f"the corpus {self.name!r} does not fit the model: its tokenizer gives ids up to {largest}, "
                f"the model's vocabulary has {vocab_size}; tokenize the text with the model's own tokenizer"
            )


def standard_library() -> list[Path]:
    """The .py files of the running Python's standard library, without tests and character tables, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def wanted(path: Path) -> bool:
        *folders, name = path.relative_to(root).parts
        skipped = any(f in _EXCLUDED or f.startswith("config-") for f in folders)
        return not skipped and not name.startswith(
            "_sysconfigdata"
        )  # the latter is generated on the machine

    return sorted(
        (p for p in root.rglob("*.py") if wanted(p)), key=lambda p: p.relative_to(root).as_posix()
    )


def embedded(
    vocab_size: int = 2048, cache: Path | str | None = None, *, tokenizer: Any = None
) -> Corpus:
    """The source text of Python's standard library, about 3.3 million tokens at 2048 entries (Python 3.11).

    Parameters
    ----------
    vocab_size : int
        Entries of the byte-level BPE that is trained on the text (seconds). Ignored when ``tokenizer`` is given.
    cache : path, optional
        Folder for the token array; default `grsd.results.cache_dir`. The text itself is read each time, and the
        cached tokens are used only when it is unchanged.
    tokenizer : optional
        A transformers tokenizer to use in place of the trained one, e.g. that of the model to be measured.

    Raises
    ------
    ValueError
        No source text (a Python without .py files), or ``vocab_size`` below the 257 a byte-level BPE needs.
    """
    return _source_text("embedded", standard_library(), vocab_size, cache, tokenizer)


def installed(
    vocab_size: int = 32768, cache: Path | str | None = None, *, tokenizer: Any = None
) -> Corpus:
    """The embedded corpus and the source text of every installed Python package: another text on every machine.

    With a deep-learning environment this is 50 to 100 million tokens, enough for the larger sizes of
    `grsd.lab.checkpoints.suites`; its fingerprint says which text it was. Parameters and errors as for `embedded`.
    """
    folders = sorted({sysconfig.get_paths()[key] for key in ("purelib", "platlib")})
    packages = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    return _source_text("installed", standard_library() + packages, vocab_size, cache, tokenizer)


def _source_text(
    name: str, paths: list[Path], vocab_size: int, cache: Path | str | None, tokenizer: Any
) -> Corpus:
    texts = [path.read_bytes().decode("utf-8", errors="replace") for path in paths]
    if sum(map(len, texts)) < 100_000:
        raise ValueError(
            "this Python carries no source text of its standard library; pass text files of your own as the corpus"
        )
    return from_texts(name, texts, tokenizer=tokenizer, vocab_size=vocab_size, cache=cache)


def files(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Any = None,
    *,
    vocab_size: int = 2048,
    cache: Path | str | None = None,
) -> Corpus:
    """Local text files (UTF-8), given by path or glob pattern; one document per file.

    Parameters
    ----------
    paths : path or sequence of paths
        Each may be a file or a pattern such as ``"notes/**/*.txt"``.
    tokenizer : optional
        A transformers tokenizer; without one a byte-level BPE of ``vocab_size`` entries is trained on the text.

    Raises
    ------
    FileNotFoundError
        No file matches.
    ValueError
        A file is not UTF-8 text, or all of them are empty.
    """
    asked = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found: set[str] = set()
    for item in asked:
        if not (matches := _matches(item)):
            raise FileNotFoundError(
                f"no text file matches {str(item)!r}; give a file or a pattern in quotes"
            )
        found.update(matches)
    texts = []
    for path in sorted(found):
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
            ) from error
    name = ",".join(str(item) for item in asked)
    return from_texts(name, texts, tokenizer=tokenizer, vocab_size=vocab_size, cache=cache)


def hub(
    name: str,
    config: str | None = None,
    split: str = "train",
    *,
    tokenizer: Any = None,
    column: str = "text",
    documents: int = 2000,
    vocab_size: int = 2048,
    cache: Path | str | None = None,
) -> Corpus:
    """The first ``documents`` documents of a data set on the Hugging Face hub (or of a local data-set folder).

    Needs the optional package ``datasets`` and, unless the data set is already cached, network.

    Raises
    ------
    RuntimeError
        ``datasets`` is missing, or the data set cannot be reached.
    ValueError
        The data set has no column ``column``, or its documents are empty.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise RuntimeError(
            f"the corpus 'hub:{name}' needs the package datasets: pip install datasets, or pass text files"
        ) from error
    try:
        stream = load_dataset(name, config, split=split, streaming=True)
        columns = list(next(iter(stream)).keys())
        texts = []
        if column in columns:
            for row in stream:
                texts.append(str(row[column]))
                if len(texts) >= documents:
                    break
    except StopIteration:
        raise ValueError(f"the data set {name!r}, split {split!r}, is empty") from None
    except Exception as error:  # datasets raises anything from OSError to its own classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"cannot read the data set {name!r} (config {config!r}, split {split!r}): {reason}; check the name, or "
            "without network download it elsewhere and pass its text files as the corpus"
        ) from error
    if column not in columns:
        raise ValueError(
            f"the data set {name!r} has no column {column!r}; it has {', '.join(columns)}"
        )
    label = ":".join(["hub", name, *([config] if config else []), split])
    return from_texts(label, texts, tokenizer=tokenizer, vocab_size=vocab_size, cache=cache)


def open_corpus(spec: str, tokenizer: Any = None, *, cache: Path | str | None = None) -> Corpus:
    """The corpus a command line names: ``embedded[:VOCAB]``, ``installed[:VOCAB]``, a path or pattern, or
    ``hub:NAME[:config[:split]]``.

    ``VOCAB`` is the size of the tokenizer that is trained on the source text; with ``tokenizer`` it has no effect.

    Raises
    ------
    ValueError
        An unknown name; the errors of `embedded`, `files` and `hub` otherwise.
    """
    name, _, size = spec.partition(":")
    if name in SOURCES:
        if size and not size.isdecimal():
            raise ValueError(
                f"corpus {spec!r} is not of the form {name}[:VOCAB], such as {name}:4096"
            )
        make = embedded if name == "embedded" else installed
        return (
            make(cache=cache, tokenizer=tokenizer)
            if not size
            else make(int(size), cache, tokenizer=tokenizer)
        )
    if spec.startswith("hub:"):
        parts = spec[4:].split(":")
        if not parts[0] or len(parts) > 3:
            raise ValueError(f"corpus {spec!r} is not of the form hub:NAME[:config[:split]]")
        config = parts[1] if len(parts) > 1 and parts[1] else None
        split = parts[2] if len(parts) > 2 and parts[2] else "train"
        return hub(parts[0], config, split, tokenizer=tokenizer, cache=cache)
    if not spec.strip():
        raise ValueError(
            "the corpus has an empty name; expected embedded, a text file or pattern, or hub:NAME"
        )
    if os.path.isdir(os.path.expanduser(spec)):
        raise ValueError(
            f"the corpus {spec!r} is a folder; name its text files by a pattern in quotes, such as '{spec.rstrip('/')}/*.txt'"
        )
    if not _matches(spec):
        raise ValueError(
            f"unknown corpus {spec!r}: expected 'embedded', an existing text file or pattern, "
            "or 'hub:NAME[:config[:split]]'"
        )
    return files(spec, tokenizer, cache=cache)


def _matches(pattern: str | Path) -> list[str]:
    return [
        m for m in glob.glob(os.path.expanduser(str(pattern)), recursive=True) if os.path.isfile(m)
    ]


def from_texts(
    name: str,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    vocab_size: int = 2048,
    cache: Path | str | None = None,
) -> Corpus:
    """Tokenize documents into a `Corpus`, cached by content.

    Equal documents are kept once; the rest is ordered as given. The twentieth part of the documents with the largest
    SHA-256 (at least one, when there are two or more) is held out. Two processes that build the same corpus at once
    do not disturb each other: each writes a folder of its own, and the first rename wins.
    """
    digests: dict[str, str] = {}
    for text in texts:
        if text.strip():
            digests.setdefault(
                hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest(), text
            )
    if not digests:
        raise ValueError(f"the corpus {name!r} is empty: no document holds any text")
    held = 0 if len(digests) < 2 else max(1, round(HELDOUT_FRACTION * len(digests)))
    heldout = set(sorted(digests)[len(digests) - held :])
    ordered = [d for d in digests if d not in heldout] + [d for d in digests if d in heldout]

    if tokenizer is None and vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 (256 bytes and the end of text), got {vocab_size}"
        )
    backend = None if tokenizer is None else getattr(tokenizer, "backend_tokenizer", None)
    maker = (
        f"bpe-{vocab_size}"
        if tokenizer is None
        else (backend.to_str() if backend is not None else None)
    )
    key = None
    if maker is not None:
        content = json.dumps([_FORMAT, maker, ordered, len(heldout)])
        key = hashlib.sha256(content.encode()).hexdigest()
    folder = None if key is None else _root(cache) / f"{_slug(name)}-{key[:16]}"
    if folder is not None and (hit := _read(name, folder, tokenizer)) is not None:
        return hit

    documents = [digests[d] for d in ordered]
    made = tokenizer if tokenizer is not None else _train_tokenizer(documents, vocab_size)
    pieces = _encode(made, documents)
    boundary = sum(map(len, pieces[: len(pieces) - held])) if held else sum(map(len, pieces))
    ids = np.concatenate(pieces)
    tokens = ids.astype(np.uint16 if int(ids.max()) < 2**16 else np.int32)
    if folder is None:
        return _corpus(name, tokens, boundary, made)
    _write(folder, tokens, boundary, made if tokenizer is None else None)
    return _corpus(name, tokens, boundary, made)


def _root(cache: Path | str | None) -> Path:
    return (Path(cache) if cache is not None else results.cache_dir()) / "corpora"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")[-32:] or "corpus"


def _corpus(
    name: str, tokens: np.ndarray[Any, np.dtype[Any]], boundary: int, tokenizer: Any
) -> Corpus:
    tokens.setflags(write=False)
    digest = hashlib.sha256(f"{boundary} ".encode() + tokens.astype("<i4").tobytes()).hexdigest()
    return Corpus(name, tokens, boundary, len(tokenizer), digest, tokenizer)


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

    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _encode(tokenizer: Any, documents: list[str]) -> list[np.ndarray[Any, np.dtype[Any]]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encoded = [e.ids for e in backend.encode_batch(documents, add_special_tokens=False)]
    else:
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return [np.asarray([*ids, *end], dtype=np.int64) for ids in encoded]


def _write(
    folder: Path, tokens: np.ndarray[Any, np.dtype[Any]], boundary: int, tokenizer: Any
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        np.save(draft / "tokens.npy", tokens, allow_pickle=False)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.save(str(draft / "tokenizer.json"))
        meta = {
            "boundary": boundary,
            "tokens": len(tokens),
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }
        (draft / "corpus.json").write_text(json.dumps(meta))
        if folder.exists() and _tokens(folder) is None:  # damaged from outside: replace it
            shutil.rmtree(folder, ignore_errors=True)
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise
        # another process finished the same folder first; its content is the same
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _tokens(folder: Path) -> tuple[np.ndarray[Any, np.dtype[Any]], int] | None:
    """The cached tokens and boundary, or None when they are absent or do not match their own record."""
    try:
        meta = json.loads((folder / "corpus.json").read_text())
        tokens = np.load(folder / "tokens.npy", allow_pickle=False)
        intact = hashlib.sha256(tokens.tobytes()).hexdigest() == meta["sha256"]
        return (tokens, int(meta["boundary"])) if intact else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _read(name: str, folder: Path, tokenizer: Any) -> Corpus | None:
    cached = _tokens(folder)
    if cached is None:
        return None
    if tokenizer is None:
        from tokenizers import Tokenizer

        tokenizer = _wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return _corpus(name, *cached, tokenizer)
