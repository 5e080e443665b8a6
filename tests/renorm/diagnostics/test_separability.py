"""D7 on planted fields: told apart by a rule, intervals that hold the truth, and what D5 and D6 cannot see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from grsd.renorm.diagnostics.collapse import collapse, roughness, separability

N, DRAWS = 40, 100
LAM = np.geomspace(1e-3, 1.0, N)
Field = Callable[[np.random.Generator], np.ndarray]  # ṡ of the modes of LAM


def _law(noise: float) -> Field:
    return lambda rng: 0.7 * (1 + noise * rng.standard_normal(N))


def _other(rng: np.random.Generator) -> np.ndarray:
    """One smooth field, v = λ (1 − λ) logistic in λ, which is no power of λ, with 5 % noise."""
    return (1.1 - LAM / (LAM + 0.03)) * (1 + 0.05 * rng.standard_normal(N))


FIELDS: dict[str, Field] = {
    "law": _law(0.0),
    "law, 1 %": _law(0.01),
    "law, 5 %": _law(0.05),
    "one field": _other,
    "no field": lambda rng: rng.permutation(_other(rng)),  # the same speeds, dealt at random
}


def _reading(speeds: np.ndarray) -> str:
    """The rule: geometric means of neighbouring noises, then half of the order of no relation."""
    spread = separability(LAM, speeds).variation
    for name, least in (("law", 1e-3), ("law, 1 %", 0.022), ("law, 5 %", 0.2)):
        if spread < least:
            return name
    return "one field" if roughness(LAM, speeds).ranks < 0.5 else "no field"


@pytest.mark.parametrize("name", FIELDS)
def test_planted_fields_are_told_apart(name: str) -> None:
    rng = np.random.default_rng(7)
    assert sum(_reading(FIELDS[name](rng)) == name for _ in range(DRAWS)) >= 95


def test_the_exact_law_has_variation_zero_and_exponent_one() -> None:
    found = separability(LAM, np.full(N, -0.3))
    assert (found.variation, found.variation_error) == (0.0, 0.0)
    assert found.exponent == pytest.approx(1.0, abs=1e-12) and found.mean == pytest.approx(-0.3)
    # one part in 10^9 is seen, where D6 cannot tell it from wild speeds
    noise = np.random.default_rng(0).standard_normal(N)
    small, large = (0.7 * (1 + share * noise) for share in (1e-9, 0.3))
    assert separability(LAM, small).variation == pytest.approx(noise.std(ddof=1) * 1e-9, rel=1e-6)
    assert roughness(LAM, small).ranks == roughness(LAM, large).ranks


def test_d5_and_d6_are_blind_to_the_law() -> None:
    """v = c₀λ/t with 1 % noise reads as no relation at all; a field that is not the law reads 0."""
    rng, times = np.random.default_rng(1), np.geomspace(1, 30, 10)
    lam = LAM * times[:, None] ** 0.7
    fifth, sixth = [], []
    for _ in range(16):
        v = 0.7 / times[:, None] * (1 + 0.01 * rng.standard_normal(lam.shape))
        fifth.append(collapse(times, lam, v, deals=2).value)
        sixth.append(roughness(lam[0], v[0]).ranks)
        assert all(separability(*pair).variation < 0.022 for pair in zip(lam, v, strict=True))
    # noise against noise: variance ratio 1 with sd √(2/400 + 2/368), D6 1 with sd √(1/40); 16 draws
    assert abs(np.mean(fifth) - 1) < 3 * 0.103 / 4 and abs(np.mean(sixth) - 1) < 3 * 0.158 / 4
    assert roughness(LAM, _other(rng)).ranks < 0.2


@pytest.mark.parametrize("name", ["1 %", "5 %", "30 %", "no field"])
def test_intervals_of_planted_nulls_hold_the_truth(name: str) -> None:
    """400 draws; the binomial sd of a coverage of 95 % is 1.1 %, and the band asked for is ± 4 to 5."""
    rng, reach = np.random.default_rng(3), stats.t.ppf(0.975, N - 1)
    noise = {"1 %": 0.01, "5 %": 0.05, "30 %": 0.3}.get(name)
    # c, variation and exponent of the law from which the speeds are drawn
    truth = (1.0, 1 / np.sqrt(3) if noise is None else noise, 1.0)
    held = np.zeros(3)
    for _ in range(400):
        speeds = rng.uniform(0, 2, N) if noise is None else 1 + noise * rng.standard_normal(N)
        d = separability(LAM, speeds)
        widths = d.mean_error, d.variation_error / d.variation, d.exponent_error
        misses = d.mean - truth[0], np.log(d.variation / truth[1]), d.exponent - truth[2]
        held += np.abs(misses) <= reach * np.array(widths)
    # the mean of log|ṡ| of uniform speeds does not depend on λ: exponent 1 without any relation
    assert (held / 400 >= 0.90).all() and (held / 400 <= 0.98).all()


def test_the_jackknife_error_of_collapse_is_that_of_drawing_modes_anew() -> None:
    rng, times = np.random.default_rng(5), np.geomspace(1, 30, 4)
    values, errors = [], []
    for _ in range(200):
        s = np.sort(rng.uniform(-7, 0, 96))
        lam = np.exp(s) * times[:, None]
        speeds = (s + 2 * rng.standard_normal(96)) / times[:, None]  # one a mode: groups matter
        d = collapse(times, lam, speeds, bins=2, deals=2)
        values.append(d.value)
        errors.append(d.error)
    ratio = np.sqrt(np.mean(np.square(errors))) / np.std(values, ddof=1)
    # the sd of 200 values is known to 5 %; a jackknife of a smooth statistic to its own order 1/n
    assert 0.8 < ratio < 1.2


def test_separability_refuses_and_says_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="modes is 7; spread or order"):
        separability(np.ones(7), np.ones(7))
    with pytest.raises(ValueError, match="leave ker M out"):
        separability(np.zeros(9), np.ones(9))
    resting = separability(LAM, np.r_[0.0, np.ones(N - 1)])
    assert np.isnan(resting.exponent) and resting.variation > 0.1
    assert separability(LAM, np.tile([1.0, -1.0], N // 2)).variation == np.inf
