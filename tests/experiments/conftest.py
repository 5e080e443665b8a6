"""Experiments take the tiny corpus and suite of the laboratory's tests."""

from tests.lab.conftest import _cache, _one_thread, corpus, suite, texts

__all__ = ["_cache", "_one_thread", "corpus", "suite", "texts"]
