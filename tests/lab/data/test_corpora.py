from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grsd.lab.checkpoints import suites
from grsd.lab.data import corpora, library
from tests.lab.cases import write_texts

EMBEDDED = "765f1e3529133245"  # of the tokens at 2048 entries, measured before the text was shipped


def test_targets_are_the_next_tokens_and_windows_do_not_repeat(corpus: corpora.Corpus) -> None:
    count = corpus.windows(16) // 2
    pairs = list(corpus.batches(count, 2, 16, seed=3))
    stream = corpus.part("train").astype(np.int64)
    position = {tuple(stream[k * 16 : k * 16 + 17]): k for k in range(corpus.windows(16))}
    seen = []
    for inputs, targets in pairs:
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (
            2,
            16,
        )
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        seen += [position[(*x.tolist(), int(y[-1]))] for x, y in zip(inputs, targets, strict=True)]
    assert len(seen) == 2 * count == len(set(seen))


def test_batches_depend_on_seed_and_index_only(corpus: corpora.Corpus) -> None:
    few, many = list(corpus.batches(2, 2, 16, seed=0)), list(corpus.batches(5, 2, 16, seed=0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(few, many, strict=False))
    other = list(corpus.batches(2, 2, 16, seed=1))
    assert not torch.equal(few[0][0], other[0][0])


def test_windows_are_drawn_anew_when_they_run_out(corpus: corpora.Corpus) -> None:
    per_epoch = corpus.windows(16) // 2
    pairs = [x for x, _ in corpus.batches(2 * per_epoch, 2, 16, seed=0)]
    first, second = torch.cat(pairs[:per_epoch]), torch.cat(pairs[per_epoch:])
    assert not torch.equal(first, second)


def test_held_out_documents_are_whole_and_not_trained_on(
    texts: Path, corpus: corpora.Corpus
) -> None:
    documents = {p.read_text() for p in texts.glob("*.txt")}
    trained, held = (
        {
            d
            for d in corpus.tokenizer.decode(corpus.part(s).astype(int)).split(corpora.END_OF_TEXT)
            if d
        }
        for s in ("train", "heldout")
    )
    assert not trained & held
    assert trained | held == documents
    assert len(held) == 1  # a twentieth of 25, rounded


def test_equal_documents_are_kept_once(tmp_path: Path) -> None:
    once = corpora.from_texts("a", ["one text", "another text"], vocab_size=260)
    twice = corpora.from_texts("b", ["one text", "another text", "one text", "  "], vocab_size=260)
    assert once.fingerprint == twice.fingerprint


def test_cached_corpus_is_the_same_and_a_damaged_one_is_rebuilt(
    texts: Path, tmp_path: Path
) -> None:
    made = corpora.files(texts / "*.txt", vocab_size=300, cache=tmp_path)
    cached = corpora.files(texts / "*.txt", vocab_size=300, cache=tmp_path)
    assert cached.fingerprint == made.fingerprint and np.array_equal(cached.tokens, made.tokens)
    (array,) = tmp_path.rglob("tokens.npz")
    array.write_bytes(array.read_bytes()[:-10])
    rebuilt = corpora.files(texts / "*.txt", vocab_size=300, cache=tmp_path)
    assert rebuilt.fingerprint == made.fingerprint
    again = np.load(next(tmp_path.rglob("tokens.npz")), allow_pickle=False)
    assert np.array_equal(again["tokens"], made.tokens)


def test_a_changed_text_is_another_corpus(tmp_path: Path) -> None:
    paths = write_texts(tmp_path / "t", 4)
    before = corpora.files(tmp_path / "t" / "*.txt", vocab_size=300)
    paths[0].write_text("something else altogether")
    after = corpora.files(tmp_path / "t" / "*.txt", vocab_size=300)
    assert before.fingerprint != after.fingerprint


def test_fingerprint_does_not_depend_on_the_folder(
    texts: Path, corpus: corpora.Corpus, tmp_path: Path
) -> None:
    write_texts(tmp_path / "elsewhere")
    moved = corpora.files(tmp_path / "elsewhere" / "*.txt", vocab_size=300)
    assert moved.fingerprint == corpus.fingerprint


def test_own_tokenizer_gives_the_same_tokens(texts: Path, corpus: corpora.Corpus) -> None:
    again = corpora.files(texts / "*.txt", tokenizer=corpus.tokenizer)
    assert again.fingerprint == corpus.fingerprint
    assert (
        corpora.files(texts / "*.txt", tokenizer=corpus.tokenizer).fingerprint == corpus.fingerprint
    )  # from the cache


def test_two_processes_at_once_leave_one_whole_corpus(texts: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from grsd.lab import corpora; sys.stdin.readline();"
        f"print(corpora.files({str(texts / '*.txt')!r}, vocab_size=300, cache={str(tmp_path)!r}).fingerprint)"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for process in several:  # both are held at the door, then let go together
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=120)[0].strip() for process in several]
    assert found[0] == found[1] != ""
    assert len([path for path in (tmp_path / "corpora").iterdir() if path.is_dir()]) == 1


def test_embedded_text_is_the_standard_library_without_machine_files() -> None:
    names = [*library.files()]
    assert names == sorted(names) and {"argparse.py", "abc.py", "json/decoder.py"} <= set(names)
    assert not any("_sysconfigdata" in n for n in names)
    assert not any({"site-packages", "test", "encodings"} & set(n.split("/")) for n in names)


def test_embedded_text_is_that_of_its_python_and_does_not_depend_on_the_one_that_runs() -> None:
    own = Path(os.__file__).parent
    same = [
        raw == (own / n).read_bytes() for n, raw in library.files().items() if (own / n).exists()
    ]
    # most files of the next versions are other ones; of the version itself all are the same
    assert all(same) if platform.python_version() == library.VERSION else not all(same)
    assert corpora.embedded().fingerprint.startswith(EMBEDDED)


def test_a_damaged_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / library.ARCHIVE.name
    damaged.write_bytes(library.ARCHIVE.read_bytes()[:-1])
    monkeypatch.setattr(library, "ARCHIVE", damaged)
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged.*install grsd again"):
        library.files.__wrapped__()


@pytest.fixture
def little_library(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {n: library.files()[n] for n in ("argparse.py", "ast.py", "inspect.py", "abc.py")}
    monkeypatch.setattr(library, "files", lambda: few)


@pytest.mark.usefixtures("little_library")
def test_tokenizer_is_byte_level_and_loses_nothing() -> None:
    made = corpora.embedded(vocab_size=300)
    documents = made.tokenizer.decode(made.tokens.astype(int)).split(corpora.END_OF_TEXT)[:-1]
    digests = {hashlib.sha256(d.encode()).hexdigest() for d in documents}
    assert digests == {hashlib.sha256(raw).hexdigest() for raw in library.files().values()}
    assert made.tokens.dtype == np.uint16 and made.vocab_size == 300


@pytest.mark.usefixtures("little_library")
def test_vocabulary_of_the_embedded_corpus_and_of_a_suite() -> None:
    assert corpora.open_corpus("embedded:400").vocab_size == 400
    assert suites.of_suite("mini-0.4m").fingerprint == corpora.embedded().fingerprint
    with pytest.raises(ValueError, match="'embedded:many' is not of the form"):
        corpora.open_corpus("embedded:many")
    with pytest.raises(ValueError, match=r"size is 'mini-2m'"):
        suites.of_suite("mini-2m")


def test_unknown_corpus_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"unknown corpus 'no/such\*\.txt'.*embedded"):
        corpora.open_corpus("no/such*.txt")
    with pytest.raises(ValueError, match="hub:NAME"):
        corpora.open_corpus("hub:")
    with pytest.raises(ValueError, match="empty name"):
        corpora.open_corpus(" ")


def test_empty_and_binary_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="is empty"):
        corpora.open_corpus(str(tmp_path / "empty.txt"))
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.txt is not UTF-8"):
        corpora.open_corpus(str(tmp_path / "image.txt"))


def test_text_shorter_than_a_batch(corpus: corpora.Corpus) -> None:
    tokens = len(corpus.part("heldout"))
    with pytest.raises(ValueError, match=f"too short: its 'heldout' part has {tokens} tokens"):
        corpus.batches(1, 100, 64, seed=0, split="heldout")
    single = corpora.from_texts("one", ["just one document of text"], vocab_size=260)
    with pytest.raises(ValueError, match="'heldout' part has 0 tokens"):
        single.batches(1, 1, 2, seed=0, split="heldout")


@pytest.mark.parametrize(
    ("size", "length", "split"), [(0, 4, "train"), (1, 0, "train"), (1, 4, "test")]
)
def test_bad_batches(corpus: corpora.Corpus, size: int, length: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"at least 1|split is 'test'"):
        corpus.batches(1, size, length, seed=0, split=split)


def test_vocabulary_that_does_not_fit_quotes_both_numbers(corpus: corpora.Corpus) -> None:
    corpus.check_vocabulary(300)
    largest = int(corpus.tokens.max())
    with pytest.raises(ValueError, match=f"ids up to {largest}, the model's vocabulary has 200"):
        corpus.check_vocabulary(200)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 257"):
        corpora.from_texts("a", ["text"], vocab_size=256)


def test_hub_corpus_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match="pip install datasets"):
        corpora.open_corpus("hub:some/thing")


def test_hub_corpus_reads_config_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool
    ) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": f"document number {i} of many"} for i in range(5)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    made = corpora.open_corpus("hub:some/thing:plain:validation")
    assert asked == [("some/thing", "plain", "validation", True)]
    assert "document number 3 of many" in made.tokenizer.decode(made.tokens.astype(int))
    with pytest.raises(ValueError, match="no column 'body'; it has text"):
        corpora.hub("some/thing", column="body")


def test_hub_corpus_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        RuntimeError,
        match=r"cannot read the data set 'some/thing'.*Couldn't reach.*without network",
    ):
        corpora.hub("some/thing")
