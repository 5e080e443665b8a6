"""The printed sweeps: numbers of the paper's text, and holes that must be seen."""

from __future__ import annotations

import numpy as np
import pytest

from grsd.experiments import printed_sweeps


def test_numbers_of_the_text() -> None:
    """Entries and corners as version 1 prints them."""
    width, depth, bare = printed_sweeps.sweep(8), printed_sweeps.sweep(11), printed_sweeps.sweep(13)
    assert (width.parametrization, width.axis, width.layernorm) == ("SP", "width", True)
    assert width.sizes == (128, 256, 512, 1024, 2048, 4096) and list(width.log2) == [
        -10,
        -9,
        -8,
        -7,
        -6,
        -5,
    ]
    assert width.row(4096)[-1] == 6.552 and width.row(128)[0] == 5.127
    assert depth.sizes[-1] == 256 and depth.row(256)[2] == 3.678
    assert not bare.layernorm and np.isnan(bare.row(8)[3]) and bare.row(4)[-1] == 345.85
    second = printed_sweeps.sweep(23)
    assert (second.quantity, second.axis, second.parametrization) == ("wd", "width", "muP")
    assert (
        printed_sweeps.sweep(40).parametrization == "muP_k1"
        and printed_sweeps.sweep(40).optimizer == "Sophia"
    )


def test_all_tables_are_whole() -> None:
    counts = [printed_sweeps.sweep(n).losses.size for n in printed_sweeps.numbers()]
    assert sum(counts[:6]) == 212 and sum(counts[6:]) == 700  # as many as were retyped
    assert printed_sweeps.numbers()[:6] == [8, 9, 10, 11, 12, 13]


def test_a_hole_is_not_read_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {n: list(r) for n, r in printed_sweeps._rows().items()}
    rows[8] = rows[8][1:]
    monkeypatch.setattr(printed_sweeps, "_rows", lambda: rows)
    with pytest.raises(AssertionError, match="table 8 has holes"):
        printed_sweeps.sweep(8)


def test_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="table is 7"):
        printed_sweeps.sweep(7)
    with pytest.raises(ValueError, match="size in table 8 is 300"):
        printed_sweeps.sweep(8).row(300)
