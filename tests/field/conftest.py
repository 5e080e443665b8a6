"""Which cells are run: a fixed sample, or all of them with --every-cell."""

from __future__ import annotations

import random

import pytest

from grsd.experiments.field_settings import SETTINGS
from grsd.lab.nets.tiny import ARCHITECTURES

KINDS = sorted({row.kind for row in ARCHITECTURES.values()})
EACH = 2  # cells of one setting in the sample


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-cell", action="store_true", help="all cells of the field table")


def sample() -> list[tuple[str, str]]:
    """`EACH` cells of every setting, of one kind of model after another, the model drawn with seed 0."""
    draw, cells = random.Random(0), []
    for k, setting in enumerate(SETTINGS):
        for kind in (KINDS[(EACH * k + j) % len(KINDS)] for j in range(EACH)):
            names = [name for name, row in ARCHITECTURES.items() if row.kind == kind]
            cells.append((draw.choice(names), setting))
    return cells


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"architecture", "setting"} <= {*metafunc.fixturenames}:
        every = [(name, setting) for name in ARCHITECTURES for setting in SETTINGS]
        chosen = every if metafunc.config.getoption("--every-cell", False) else sample()
        metafunc.parametrize(("architecture", "setting"), chosen)
