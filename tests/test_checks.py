"""Checks by name: what each refuses, in which words, and what it gives back."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from grsd import checks

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: checks.finite("c0", math.nan), "c0 is nan; values that are not finite"),
    (lambda: checks.finite("W", [[1.0, 2.0], [3.0, -math.inf]]), "W[1, 1] is -inf; "),
    (lambda: checks.finite("z", np.array([1j, complex(0, math.inf)])), "z[1] is infj; "),
    (lambda: checks.positive("epsilon", -1), "epsilon is -1; it must be positive"),
    (lambda: checks.positive("epsilon", 0.0), "epsilon is 0.0; "),
    (lambda: checks.positive("lr", math.inf), "lr is inf; it must be positive and finite"),
    (lambda: checks.positive("lr", math.nan, "a rate is needed"), "lr is nan; a rate is needed"),
    (lambda: checks.positive("edges", (1, 2, 0, -1)), "edges[2] is 0; "),
    (lambda: checks.positive("x", np.float64(-0.5)), "x is -0.5; "),
    (lambda: checks.at_least("seeds", 1, 2), "seeds is 1; it must be at least 2"),
    (lambda: checks.at_least("bands", (0, 1, -1), 0), "bands[2] is -1; it must be at least 0"),
    (lambda: checks.at_least("noise", math.inf, 0), "noise is inf; "),
    (lambda: checks.at_least("noise", math.nan, 0), "noise is nan; "),
    (lambda: checks.between("level", 0.0, 0, 1, "(]"), "level is 0.0; expected 0 < level ≤ 1"),
    (lambda: checks.between("beta", 1.0, 0, 1, "[)"), "beta is 1.0; expected 0 ≤ beta < 1"),
    (lambda: checks.between("rho", 1, 0, 1, "()"), "rho is 1; expected 0 < rho < 1"),
    (lambda: checks.between("rho", 0, 0, 1, "()"), "rho is 0; "),
    (lambda: checks.between("k", 7, 1, 6), "k is 7; expected 1 ≤ k ≤ 6"),
    (lambda: checks.between("k", math.nan, 1, 6), "k is nan; "),
    (lambda: checks.between("p", math.inf, -1, math.inf, "()"), "p is inf; expected -1 < p < inf"),
    (lambda: checks.whole("band", 0.5), "band is 0.5; expected a whole number from 0"),
    (lambda: checks.whole("band", -1), "band is -1; "),
    (lambda: checks.whole("width", 0, 1), "width is 0; expected a whole number from 1"),
    (lambda: checks.whole("width", True), "width is True; "),
    (lambda: checks.whole("width", "8"), "width is '8'; "),
    (lambda: checks.whole("width", None, why="say how wide"), "width is None; say how wide"),
    (lambda: checks.whole("width", math.inf), "width is inf; "),
    (lambda: checks.whole("width", math.nan), "width is nan; "),
    (
        lambda: checks.one_of("part", "sum", ("kato", "total")),
        "part is 'sum'; expected one of kato, ",
    ),
    (lambda: checks.one_of("order", 3, {1: "", 2: ""}), "order is 3; expected one of 1, 2"),
    (lambda: checks.one_of("part", "sum", iter("ab")), "part is 'sum'; expected one of a, b"),
    (lambda: checks.ascending("t", [0.0, 2.0, 1.0, 0.0]), "t[2] is 1.0 after 2.0; expected 2 or "),
    (lambda: checks.ascending("t", [1, 1]), "t[1] is 1.0 after 1.0; "),
    (lambda: checks.ascending("t", [1.0]), "t has shape (1,); expected 2 or more in ascending"),
    (lambda: checks.ascending("t", [], 1), "t has shape (0,); expected 1 or more"),
    (lambda: checks.ascending("t", [[1.0, 2.0]]), "t has shape (1, 2); "),
    (lambda: checks.ascending("t", [[1.0], [2.0]]), "t has shape (2, 1); "),
    (lambda: checks.ascending("t", 1.0), "t has shape (); "),
    (lambda: checks.ascending("t", [0.0, math.nan]), "t[1] is nan; "),
    (lambda: checks.ascending("t", [0, 1], 3, "three are needed"), "(2,); three are needed"),
    (lambda: checks.shape("M", np.ones((2, 3)), ("n", "n")), "M has shape (2, 3); expected (n, n)"),
    (lambda: checks.shape("M", np.ones((3, 2)), ("n", "n")), "M has shape (3, 2); "),
    (lambda: checks.shape("u", np.ones(3), (4,)), "u has shape (3,); expected (4,)"),
    (lambda: checks.shape("u", np.ones((3, 1)), (3,)), "u has shape (3, 1); expected (3,)"),
    (lambda: checks.shape("u", 1.0, ("n",)), "u has shape (); expected (n,)"),
    (lambda: checks.shape("x", torch.ones(2, 3), ("m", 4), "rows of 4"), "(2, 3); rows of 4"),
    (lambda: checks.at_least("seed", -(2**70), 0), f"seed is {-(2**70)}; "),
    (lambda: checks.positive("p", torch.tensor([[1.0, -2.0]])), "p[0, 1] is -2.0; "),
    (lambda: checks.finite("p", torch.tensor(math.nan, dtype=torch.bfloat16)), "p is nan; "),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_a_refusal_quotes_the_value_and_says_what_is_expected(
    call: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    "value",
    [
        2,
        0.5,
        2**70,
        Fraction(1, 3),
        [1, 2],
        (0.5, 3.0),
        (),
        np.float32(0.1),
        np.array([[1e-300, 1e300]]),
        torch.tensor(2.0, requires_grad=True),
        torch.ones(3, dtype=torch.bfloat16),
        torch.arange(1, 4),
    ],
    ids=str,
)
def test_what_passes_is_given_back_as_it_came(value: Any) -> None:
    assert checks.finite("x", value) is value
    assert checks.positive("x", value) is value
    assert checks.at_least("x", value, 0) is value
    assert checks.between("x", value, 0, math.inf, "()") is value
    assert (
        checks.shape("x", value, ("n",) * np.ndim(value) if np.ndim(value) < 2 else ("m", "n"))
        is value
    )


def test_ends_belong_to_closed_intervals_only() -> None:
    for ends, passing in (("[]", {0, 1, 2}), ("(]", {1, 2}), ("[)", {0, 1}), ("()", {1})):
        for k in (0, 1, 2):
            if k in passing:
                assert checks.between("k", k, 0, 2, ends) == k
            else:
                with pytest.raises(ValueError, match=f"k is {k}; "):
                    checks.between("k", k, 0, 2, ends)
    assert checks.at_least("k", 2, 2) == 2 and checks.between("k", 2, 2, 2) == 2


def test_whole_numbers_become_int() -> None:
    for given in (3, 3.0, np.int64(3), np.float32(3)):
        found = checks.whole("k", given, 3)
        assert found == 3 and type(found) is int


def test_ascending_values_become_a_vector_of_float64() -> None:
    for given in (
        [1, 2, 4],
        (1.0, 2.0, 4.0),
        np.array([1, 2, 4], np.float32),
        torch.tensor([1, 2, 4]),
    ):
        found = checks.ascending("t", given)
        assert found.dtype == np.float64 and found.tolist() == [1.0, 2.0, 4.0]
    assert checks.ascending("t", [5], 1).tolist() == [5.0]


def test_words_in_a_shape_stand_for_any_size_but_one() -> None:
    x = np.ones((4, 2, 2))
    assert checks.shape("x", x, ("L", "n", "n")) is x
    assert checks.shape("x", x, (4, "n", "m")) is x
    assert checks.shape("x", np.ones((0, 3)), ("n", 3)).shape == (0, 3)
    with pytest.raises(ValueError, match=re.escape("x has shape (4, 2, 2); expected (n, n, m)")):
        checks.shape("x", x, ("n", "n", "m"))


def test_one_of_takes_any_collection_and_type() -> None:
    assert checks.one_of("order", math.inf, (1, 2, math.inf)) == math.inf
    assert checks.one_of("size", "a", {"a": 1}) == "a"
    assert checks.one_of("x", None, [None, "auto"]) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_are_checked_where_they_are() -> None:
    x = torch.tensor([1.0, -2.0], device="cuda")
    assert checks.finite("x", x) is x
    with pytest.raises(ValueError, match=re.escape("x[1] is -2.0; it must be positive")):
        checks.positive("x", x)


def test_torch_is_not_imported() -> None:
    code = "import sys, grsd.checks as c; c.positive('x', [1.0]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
