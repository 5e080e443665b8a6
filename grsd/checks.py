"""Checks of arguments by name: each returns its value, or refuses it in a sentence.

It quotes the value, or the first wrong entry, and says what is expected, in the words of `why` if
given. NaN and infinity are no numbers. Tensors of PyTorch, which is not imported, are arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")


def finite(name: str, value: T, why: str = "values that are not finite are refused") -> T:
    """Refuse NaN and infinity."""
    return _every(name, value, lambda x: abs(x) < np.inf, why)


def positive(name: str, value: T, why: str = "it must be positive and finite") -> T:
    """Take 0 < value < ∞."""
    return _every(name, value, lambda x: (x > 0) & (x < np.inf), why)


def at_least(name: str, value: T, low: float, why: str = "") -> T:
    """Take low ≤ value < ∞."""
    why = why or f"it must be at least {low}"
    return _every(name, value, lambda x: (x >= low) & (x < np.inf), why)


def between(name: str, value: T, low: float, high: float, ends: str = "[]", why: str = "") -> T:
    """Take what lies in an interval; a round end, as in "(]", "[)" or "()", is not part of it."""
    first, last = ends[0] == "[", ends[1] == "]"
    why = why or f"expected {low} {'<≤'[first]} {name} {'<≤'[last]} {high}"

    def inside(x: Any) -> Any:
        return (x > low) & (x < high) | (x == low) & first | (x == high) & last

    return _every(name, value, inside, why)


def whole(name: str, value: Any, low: int = 0, why: str = "") -> int:
    """Return an int of at least `low`; 2.0 is one, True and "2" are none."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (number and value % 1 == 0 and value >= low):
        raise ValueError(f"{name} is {value!r}; {why or f'expected a whole number from {low}'}")
    return int(value)


def one_of(name: str, value: T, allowed: Iterable[Any], why: str = "") -> T:
    """Take what is among those allowed."""
    if value not in (allowed := list(allowed)):
        why = why or f"expected one of {', '.join(map(str, allowed))}"
        raise ValueError(f"{name} is {value!r}; {why}")
    return value


def ascending(name: str, values: ArrayLike, least: int = 2, why: str = "") -> NDArray[np.float64]:
    """Return a vector of `least` finite float64 numbers or more, in strictly ascending order."""
    x, why = np.asarray(values, np.float64), why or f"expected {least} or more in ascending order"
    if x.ndim != 1 or len(x) < least:
        raise ValueError(f"{name} has shape {x.shape}; {why}")
    for i in np.flatnonzero(np.diff(finite(name, x, why)) <= 0):
        raise ValueError(f"{name}[{i + 1}] is {x[i + 1]} after {x[i]}; {why}")
    return x


def shape(name: str, array: T, sizes: tuple[int | str, ...], why: str = "") -> T:
    """Take sizes where a word is any number, and the same word the same: ("n", "n") is square."""
    given: Any = array
    found = tuple(np.shape(given))
    words = dict(zip(sizes, found, strict=False))
    if found != tuple(words.get(size) if isinstance(size, str) else size for size in sizes):
        expected = str(sizes).replace("'", "")
        raise ValueError(f"{name} has shape {found}; {why or f'expected {expected}'}")
    return array


def _every(name: str, value: T, test: Callable[[Any], Any], why: str) -> T:
    x: Any = value if hasattr(value, "dtype") else np.asarray(value)
    good = test(x)
    if not (good.all() if hasattr(good, "all") else good):
        bad = np.argwhere(~np.asarray(good.cpu() if hasattr(good, "cpu") else good))[0].tolist()
        entry = x[tuple(bad)]
        shown = entry.item() if hasattr(entry, "item") else entry
        raise ValueError(f"{name}{bad or ''} is {shown!r}; {why}")
    return value
