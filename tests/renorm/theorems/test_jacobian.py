"""Cross-operators, coefficients and the envelope against differences, dense algebra, closed forms and other integrators."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from grsd.dynamics.balance import cumulative_flux
from grsd.dynamics.flow import central
from grsd.renorm.theorems.envelope import banded_process, comparison, envelope, gronwall
from grsd.renorm.theorems.jacobian import (
    Coefficients,
    coefficients,
    correlation_rate,
    correlations,
    flux_by_distance,
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
def test_corrected_17_is_the_derivative(kind: str, n: int) -> None:
    blocks, rates, found = planted(kind, count=5, n=n, size=4, band=1, seed=1)
    assert gap([found.rates(blocks)], [rates]) < 1e-14
    assert gap(found.correlation_rate(blocks), differences(blocks, rates)) < 1e-12


def test_printed_17_needs_commuting_coefficients() -> None:
    """Square blocks, n = p, where the printed products exist: right for scalars, far off for operators on either side."""
    for kind in KINDS:
        blocks, rates, found = planted(kind, count=6, n=4, size=4, band=1, seed=2)
        printed = gap(found.printed_rate(blocks), correlation_rate(blocks, rates))
        assert printed < 1e-12 if kind == "scalar" else printed > 0.5


def test_printed_17_does_not_exist_for_other_shapes() -> None:
    blocks, _, found = planted("left", count=3, n=6, size=4, band=1, seed=3)
    with pytest.raises(ValueError, match="no meaning for these blocks: C is 4 × 4"):
        found.printed_rate(blocks)


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
    assert gap(found.correlation_rate(blocks), correlation_rate(blocks, rates)) < 1e-12


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


@pytest.mark.parametrize("decreasing", [False, True])
@pytest.mark.parametrize("band", [0, 1, 3])
def test_comparison_against_an_integrator(band: int, decreasing: bool) -> None:
    """The right side is written here as the sentence of the docstring, and integrated."""
    u = 1.0 / (1 + np.arange(30.0)) ** 2
    u[7] = 0.5  # not monotone: the majorant matters

    def rate(_: float, y: np.ndarray) -> list[float]:
        if decreasing:
            return [2 * 0.4 * y[max(k - band, 0)] for k in range(len(y))]
        return [
            2 * 0.4 * sum(y[m] for m in range(len(y)) if abs(m - k) <= band) for k in range(len(y))
        ]

    begin = [max(u[k:]) for k in range(len(u))] if decreasing else u
    expected = solve_ivp(rate, (0, 1.5), begin, rtol=1e-11, atol=1e-13).y[:, -1]
    found = comparison(u, band=band, row_sum=0.4, time=1.5, decreasing=decreasing)
    np.testing.assert_allclose(found, expected, rtol=1e-8)  # rtol of the integrator over ~100 steps


def test_sum_of_the_decreasing_comparison_in_closed_form() -> None:
    """Σ y = e^τ (S + Kτ y_0), τ = 2C_A t; the start has compact support and the tail beyond 200 is τ^40/40!."""
    u = np.zeros(200)
    u[:5] = [3.0, 2.0, 2.0, 1.0, 0.5]
    for band in (0, 1, 4):
        tau = 2 * 0.7 * 1.2
        found = comparison(u, band=band, row_sum=0.7, time=1.2, decreasing=True).sum()
        assert found == pytest.approx(np.exp(tau) * (u.sum() + band * tau * u[0]), rel=1e-12)


def process(seed: int, band: int) -> tuple[np.ndarray, list[np.ndarray], float]:
    rng = np.random.default_rng(seed)
    decay = 1 / (1 + np.arange(6.0))
    found = banded_process(
        rng.standard_normal((6, 8, 2)) * decay[:, None, None],
        np.linspace(0, 1, 6),
        band=band,
        row_sum=0.8,
        seed=100 + seed,
    )
    return found.times, [envelope(list(blocks)) for blocks in found.blocks], found.row_sum


@pytest.mark.parametrize("band", [0, 1, 2])
def test_banded_processes_stay_below_both_comparisons(band: int) -> None:
    for seed in range(4):
        times, profiles, row_sum = process(seed, band)
        for t, u in zip(times, profiles, strict=True):
            for decreasing in (False, True):
                y = comparison(
                    profiles[0], band=band, row_sum=row_sum, time=t, decreasing=decreasing
                )
                assert (u <= y * (1 + 1e-9)).all()


def test_the_process_is_banded_and_its_row_sum_is_a_bound() -> None:
    """Recovered from differences of the path alone: no coefficient beyond K, row sums at most C_A at all times, close to it once."""
    rng = np.random.default_rng(0)
    h, sums = 0.01, []
    for t in np.linspace(0.1, 3.0, 8):
        grid = np.concatenate([[0.0], t + h * np.arange(-4, 5)])
        path = banded_process(
            rng.standard_normal((4, 24, 2)), grid, band=1, row_sum=0.8, seed=3
        ).blocks[1:]
        found = coefficients(list(path[4]), list(central(path, h)), band=1)
        assert found.residuals.max() < 1e-8
        sums.append(max(sum(np.linalg.norm(b, 2) for b in row.values()) for row in found.parts))
    assert max(sums) <= 0.8 * (1 + 1e-8) and max(sums) > 0.4


def test_a_wrong_row_sum_is_caught() -> None:
    """Parallel blocks that all feed each other: u_k = e^{2C_A t} meets the bound, and a tenth less of C_A breaks it."""
    ones, near = np.ones((5, 1, 1)), np.abs(np.subtract.outer(np.arange(5), np.arange(5))) <= 1
    parts = [{p: np.asarray(0.6 / near[i].sum()) for p in range(5) if near[i, p]} for i in range(5)]
    found = Coefficients("scalar", 1, parts, np.zeros(5), np.zeros(5), np.zeros(5, int))
    assert found.row_sum == pytest.approx(0.6)
    done = solve_ivp(
        lambda _, y: np.ravel(found.rates(list(y.reshape(5, 1, 1)))),
        (0, 1),
        ones.ravel(),
        rtol=1e-12,
        atol=1e-14,
    )
    u = envelope(list(done.y[:, -1].reshape(5, 1, 1)))
    np.testing.assert_allclose(u, np.exp(1.2), rtol=1e-10)
    right, low = (
        comparison(np.ones(5), band=1, row_sum=row_sum, time=1.0, decreasing=True)
        for row_sum in (0.6, 0.54)
    )
    np.testing.assert_allclose(right, u, rtol=1e-10)
    assert (low < u).all()


@pytest.mark.parametrize("rho", [0.5, 1.0, 1.5])
def test_gronwall_is_attained_away_from_the_ends(rho: float) -> None:
    """A single spike at 60 of 120: to reach an end takes 30 bands, 0.6^30/30! of the mass. There the bound is an equality."""
    u = np.zeros(120)
    u[60] = 2.0
    found = gronwall(u, band=2, row_sum=0.3, time=1.0, rho=rho)
    assert found.rate == pytest.approx(0.6 * (1 + rho + 1 / rho + rho**2 + 1 / rho**2), rel=1e-14)
    y = comparison(u, band=2, row_sum=0.3, time=1.0)
    assert float(np.sum(rho ** np.arange(120.0) * y)) == pytest.approx(found.bound, rel=1e-10)
    # a spike at the end loses the half that would leave the line
    edge = gronwall(u[60:], band=2, row_sum=0.3, time=1.0, rho=rho).bound
    assert (
        np.sum(rho ** np.arange(60.0) * comparison(u[60:], band=2, row_sum=0.3, time=1.0))
        < 0.8 * edge
    )


def test_flux_by_distance() -> None:
    rng = np.random.default_rng(10)
    a = rng.standard_normal((6, 6))
    exchange = a - a.T
    np.testing.assert_allclose(
        flux_by_distance(exchange).sum(1), cumulative_flux(exchange), atol=1e-14
    )
    far = np.zeros((6, 6))
    far[0, 4], far[4, 0] = 2.0, -2.0
    found = flux_by_distance(far)
    np.testing.assert_array_equal(found[:4, 4], 2.0)  # all four edges between them carry it
    assert np.count_nonzero(found) == 4


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
        (lambda: comparison([-1.0], band=0, row_sum=1, time=1), "not negative"),
        (lambda: comparison([1.0], band=0.5, row_sum=1, time=1), "band is 0.5"),  # type: ignore[arg-type]
        (lambda: comparison([1.0], band=0, row_sum=-1, time=1), "row_sum is -1"),
        (lambda: gronwall([1.0], band=0, row_sum=1, time=1, rho=0), "rho is 0"),
        (lambda: banded_process(J, [0, 1], band=0, row_sum=1, seed=0), r"shape \(3, 2\)"),
        (lambda: banded_process(J[None], [0], band=0, row_sum=1, seed=0), "two or more ascending"),
        (lambda: flux_by_distance(J), "one row and one column per cell"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
