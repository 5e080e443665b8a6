"""Cross-operators, coefficients and the envelope against differences and dense algebra."""

from __future__ import annotations

import numpy as np
import pytest

from grsd.dynamics.flow import central
from grsd.renorm.theorems.jacobian import (
    Coefficients,
    coefficients,
    correlation_rate,
    correlations,
    envelope,
)

KINDS = ("right", "scalar", "left")


def planted(
    kind: str, *, count: int, n: int, size: int, band: int, seed: int
) -> tuple[list, list, Coefficients]:
    """Random blocks, random coefficients of one kind, and the rates that these make, by plain matrix products."""
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal((n, size)) for _ in range(count)]
    shape = {"right": (size, size), "left": (n, n), "scalar": ()}[kind]
    near = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) <= band
    parts = [
        {p: np.asarray(rng.standard_normal(shape)) for p in range(count) if near[i, p]}
        for i in range(count)
    ]
    act = {"right": lambda a, j: j @ a, "left": lambda a, j: a @ j, "scalar": lambda a, j: a * j}[
        kind
    ]
    rates = [sum(act(a, blocks[p]) for p, a in row.items()) for row in parts]
    empty = np.zeros(count)
    return blocks, rates, Coefficients(kind, band, parts, empty, empty, np.zeros(count, int))


def flat(rows: list) -> np.ndarray:
    return np.concatenate([block.ravel() for row in rows for block in row])


def gap(found: list, expected: list) -> float:
    return float(np.linalg.norm(flat(found) - flat(expected)) / np.linalg.norm(flat(expected)))


def differences(blocks: list, rates: list, h: float = 0.1) -> list:
    """Ċ from C along the straight path J + tJ̇, which is quadratic in t: an order-8 difference has no error but rounding."""
    values = [
        flat(correlations([j + k * h * r for j, r in zip(blocks, rates, strict=True)]))
        for k in range(-4, 5)
    ]
    return [[central(np.array(values), h)]]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 5, 3)])
def test_product_rule(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    blocks, rates = ([rng.standard_normal((6, p)) for p in sizes] for _ in range(2))
    assert gap(correlation_rate(blocks, rates), differences(blocks, rates)) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4, 7])
def test_rates_are_those_of_the_coefficients(kind: str, n: int) -> None:
    blocks, rates, found = planted(kind, count=5, n=n, size=4, band=1, seed=1)
    assert gap([found.rates(blocks)], [rates]) < 1e-14


@pytest.mark.parametrize(
    ("kind", "n", "size"), [("right", 30, 4), ("scalar", 5, 4), ("left", 3, 12)]
)
def test_coefficients_are_recovered(kind: str, n: int, size: int) -> None:
    """Sizes at which the system determines them: right n ≥ (2K+1)p, left p ≥ (2K+1)n, scalar np ≥ 2K+1."""
    blocks, rates, truth = planted(kind, count=5, n=n, size=size, band=1, seed=4)
    found = coefficients(blocks, rates, band=1, kind=kind)
    assert found.residuals.max() < 1e-12
    assert found.row_sum == pytest.approx(truth.row_sum, rel=1e-10)
    for row, expected in zip(found.parts, truth.parts, strict=True):
        assert row.keys() == expected.keys()
        for p in row:
            np.testing.assert_allclose(row[p], expected[p], atol=1e-10)


def test_coefficients_of_blocks_of_different_sizes() -> None:
    rng = np.random.default_rng(5)
    blocks = [rng.standard_normal((12, p)) for p in (2, 3, 4)]
    rates = [
        blocks[1] @ rng.standard_normal((3, 2)),
        blocks[1] @ rng.standard_normal((3, 3)),
        blocks[1] @ np.ones((3, 4)),
    ]
    found = coefficients(blocks, rates, band=1)
    assert found.residuals.max() < 1e-13
    assert gap([found.rates(blocks)], [rates]) < 1e-12


def test_a_term_from_further_away_is_caught() -> None:
    """One block moves along a block at distance 2: K = 1 leaves what the projector leaves, K = 2 leaves nothing."""
    rng = np.random.default_rng(6)
    blocks = [rng.standard_normal((20, 2)) for _ in range(5)]
    rates = [0.5 * j for j in blocks]
    rates[0] = rates[0] + blocks[2] @ np.array([[1.0, 2.0], [0.0, 1.0]])
    near = np.hstack(blocks[:2])
    left = rates[0] - near @ np.linalg.pinv(near) @ rates[0]
    found = coefficients(blocks, rates, band=1)
    assert found.remainders[0] == pytest.approx(np.linalg.norm(left, 2), rel=1e-12)
    assert found.residuals[0] == pytest.approx(
        np.linalg.norm(left) / np.linalg.norm(rates[0]), rel=1e-12
    )
    assert found.residuals[0] > 0.3 and found.residuals[1:].max() < 1e-13
    assert coefficients(blocks, rates, band=2).residuals.max() < 1e-13


def test_right_coefficients_are_vacuous_at_full_row_rank() -> None:
    rng = np.random.default_rng(7)
    blocks, rates = ([rng.standard_normal((3, 5)) for _ in range(4)] for _ in range(2))
    found = coefficients(blocks, rates, band=0)
    assert found.residuals.max() < 1e-13 and (found.ranks == 3).all()
    scalar = coefficients(blocks, rates, band=3, kind="scalar")
    assert scalar.residuals.min() > 0.5  # the same rates, unrelated to the blocks


def test_scalar_remainder_is_an_operator_norm() -> None:
    rng = np.random.default_rng(8)
    block, rate = rng.standard_normal((2, 4, 3))
    found = coefficients([block], [rate], band=0, kind="scalar")
    a = np.vdot(block, rate) / np.vdot(block, block)
    assert float(found.parts[0][0]) == pytest.approx(a, rel=1e-12)
    assert found.remainders[0] == pytest.approx(np.linalg.norm(rate - a * block, 2), rel=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_envelope(size: int) -> None:
    rng = np.random.default_rng(9)
    blocks = [rng.standard_normal((4, size)) for _ in range(5)]
    expected = [
        max(
            np.linalg.svd(blocks[i].T @ blocks[j])[1][0]
            for i in range(5)
            for j in range(5)
            if abs(i - j) == k
        )
        for k in range(5)
    ]
    np.testing.assert_allclose(envelope(blocks), expected, rtol=1e-12)


J = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: correlations([]), "blocks is empty"),
        (
            lambda: correlations([J, np.ones((4, 2))]),
            r"blocks\[1\] has shape \(4, 2\); expected \(3",
        ),
        (lambda: correlations([J * np.nan]), "not finite"),
        (lambda: correlation_rate([J], [np.ones((3, 1))]), "they must agree"),
        (lambda: coefficients([J], [J], band=-1), "band is -1"),
        (lambda: coefficients([J], [J], band=0, kind="middle"), "kind is 'middle'"),  # type: ignore[arg-type]
        (
            lambda: coefficients([J, J[:, :1]], [J, J[:, :1]], band=0, kind="scalar"),
            r"\[1, 2\] parameters",
        ),
        (
            lambda: coefficients([J], [J], band=0).rates([J, J]),
            "2 blocks for the coefficients of 1",
        ),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
