"""A corpus and a suite small enough that every test of the laboratory takes well under a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grsd.lab.checkpoints import suites
from grsd.lab.data import corpora
from tests.lab.cases import RECIPE, TINY, write_texts


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bitwise comparisons hold for a fixed number of threads; subprocesses of the tests use one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> corpora.Corpus:
    return corpora.files(texts / "*.txt", vocab_size=300, cache=tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def suite(corpus: corpora.Corpus, tmp_path_factory: pytest.TempPathFactory) -> suites.Suite:
    return suites.train(TINY, corpus, cache=tmp_path_factory.mktemp("suite"), **RECIPE)
