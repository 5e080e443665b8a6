"""Intervals, slopes and resampling against closed forms, against SciPy, and by their coverage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from grsd.statistics import (
    Interval,
    bootstrap,
    jackknife,
    mean,
    p_value,
    percentile,
    slope,
    standard_error,
)

# 97.5 % points of Student's t in closed form: the Cauchy law, and two degrees of freedom
T1 = math.tan(0.475 * math.pi)
T2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))
NORMAL = stats.norm.ppf(0.975)


def covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([one.contains(truth) for one in intervals]))


def binomial(trials: int, share: float = 0.95) -> float:
    """Four standard errors of a share of so many trials: exceeded by chance once in 16,000."""
    return 4 * math.sqrt(share * (1 - share) / trials)


def test_an_interval_is_a_tuple_that_prints_itself_and_returns_from_json() -> None:
    found = Interval(0.71234, 0.65, 0.77, 0.1)
    assert str(found) == f"{found}" == "0.71 [0.65, 0.77]"
    assert f"{found:+.1f}" == "+0.7 [+0.7, +0.8]" and f"{found:.3g}" == "0.712 [0.65, 0.77]"
    assert found.half == pytest.approx(0.06)
    assert found.contains(0.65) and found.contains(0.77) and not found.contains(0.6499)
    assert not found.contains(math.nan)
    assert Interval(*json.loads(json.dumps(found))) == found


# --- Student's t ----------------------------------------------------------------------------------


def test_means_of_two_and_of_three_have_closed_forms() -> None:
    # s/√n is √2/√2 and 1/√3; with n in place of n − 1 the quantiles would be T2 and 3.18
    assert mean([0.0, 2.0]) == pytest.approx((1.0, 1 - T1, 1 + T1, math.sqrt(2)))
    assert mean([4, 5, 6]) == pytest.approx(
        (5.0, 5 - T2 / math.sqrt(3), 5 + T2 / math.sqrt(3), 1.0)
    )


def test_slopes_of_three_and_of_four_points_have_closed_forms() -> None:
    # residuals (1, −2, 1) are orthogonal to the line: s² = 6/1, Σ(x − x̄)² = 2
    found = slope([-1, 0, 1], [1 - 0.5, -2.0, 1 + 0.5])
    half = T1 * math.sqrt(6 / 2)
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half, math.sqrt(6)))
    # residuals (1, −1, −1, 1): s² = 4/2, Σ(x − x̄)² = 5; n − 1 would give 3.18 in place of T2
    found = slope(np.arange(4), 3 * np.arange(4) + np.array([1, -1, -1, 1]))
    half = T2 * math.sqrt(2 / 5)
    assert found == pytest.approx((3.0, 3 - half, 3 + half, math.sqrt(2)))


def test_mean_and_slope_agree_with_scipy() -> None:
    r = np.random.default_rng(0)
    for n in (3, 4, 9, 40):
        x, y = r.standard_normal((2, n)) + 0.3
        low, high = stats.ttest_1samp(y, 0.0).confidence_interval(0.95)
        assert mean(y) == pytest.approx((y.mean(), low, high, y.std(ddof=1)), rel=1e-12)
        line = stats.linregress(x, y)
        half = stats.t(n - 2).ppf(0.975) * line.stderr
        sd = math.sqrt(np.polyfit(x, y, 1, full=True)[1][0] / (n - 2))
        found = (line.slope, line.slope - half, line.slope + half, sd)
        assert slope(x, y) == pytest.approx(found, rel=1e-9)
        # SciPy's own error comes from 1 − r² and is rounding where the line fits
        assert slope(x, 2 * x + 1).half < 1e-13


@pytest.mark.parametrize("n", [3, 6])
def test_intervals_of_means_cover(n: int) -> None:
    draws = np.random.default_rng(n).standard_normal((3000, n)) + 7.0
    found = [mean(x) for x in draws]
    assert abs(covered(found, 7.0) - 0.95) < binomial(3000)
    # a wrong number of degrees of freedom, n for n − 1, would be seen where samples are few
    ratio = stats.t.ppf(0.975, n) / stats.t.ppf(0.975, n - 1)
    wrong = [
        Interval(i.value, i.value - ratio * i.half, i.value + ratio * i.half, 0) for i in found
    ]
    assert (abs(covered(wrong, 7.0) - 0.95) > binomial(3000)) == (n == 3)


def test_intervals_of_slopes_cover() -> None:
    r, x = np.random.default_rng(1), np.array([0.0, 1.0, 3.0, 4.0])
    found = [slope(x, -0.5 * x + r.standard_normal(4)) for _ in range(2000)]
    assert abs(covered(found, -0.5) - 0.95) < binomial(2000)
    ratio = stats.t.ppf(0.975, 3) / stats.t.ppf(0.975, 2)  # n − 1 for n − 2
    wrong = [
        Interval(i.value, i.value - ratio * i.half, i.value + ratio * i.half, 0) for i in found
    ]
    assert covered(wrong, -0.5) < 0.95 - binomial(2000)
    found = [slope(x, np.outer(x, np.ones(6)) + r.standard_normal((4, 6))) for _ in range(1000)]
    assert abs(covered(found, 1.0) - 0.95) < binomial(1000)


def test_samples_at_one_place_are_points_of_their_own() -> None:
    r = np.random.default_rng(2)
    x, y = r.standard_normal(5), r.standard_normal((5, 3))
    assert slope(x, y) == slope(np.repeat(x, 3), y.ravel())
    assert slope([1, 1, 2], [0.0, 1.0, 2.0]).value == pytest.approx(1.5)


def test_two_points_have_a_slope_and_no_error() -> None:
    found = slope([1, 3], [2, 8])
    assert found.value == pytest.approx(3.0) and math.isnan(found.sd)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert slope([0, 1, 2], [5, 5, 5]) == (0.0, 0.0, 0.0, 0.0)  # all equal: exact, not NaN


def test_what_diverged_is_not_hidden() -> None:
    assert all(map(math.isnan, mean([1.0, math.nan, 2.0])))
    assert math.isnan(slope([0, 1, 2], [1.0, math.nan, 2.0]).value)
    assert np.isnan(standard_error([[1.0, 1.0], [math.nan, 2.0]])).tolist() == [True, False]


def test_standard_errors_are_taken_over_the_first_axis() -> None:
    x = np.random.default_rng(3).standard_normal((7, 3, 2))
    np.testing.assert_allclose(standard_error(x), stats.sem(x, axis=0), rtol=1e-14)
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)  # √2/√2; n in place of n − 1: 0.71
    assert standard_error([5.0], alone=0.0) == 0.0
    assert standard_error(x[:1], alone=0.0).tolist() == [[0.0, 0.0]] * 3
    assert standard_error(x, alone=0.0).tolist() == standard_error(x).tolist()


def test_p_is_below_five_percent_where_the_interval_leaves_zero_out() -> None:
    draws = np.random.default_rng(4).standard_normal((200, 5)) + 0.9
    outside = [not mean(x).contains(0.0) for x in draws]
    assert [p_value(x) < 0.05 for x in draws] == outside and 20 < sum(outside) < 180
    # t = 1 at one degree of freedom leaves half of the Cauchy law outside
    assert p_value([0.0, 2.0]) == pytest.approx(0.5)
    assert p_value([0.0, 0.0]) == 1.0 and p_value([2.0, 2.0]) == 0.0


# --- Jackknife ------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(5).standard_normal((6, 4))
    value, error = jackknife(lambda a: a.mean(axis=0), x)
    np.testing.assert_allclose(value, x.mean(axis=0))
    np.testing.assert_allclose(error, standard_error(x), rtol=1e-12)
    assert jackknife(np.mean, [0.0, 2.0]) == pytest.approx((1.0, 1.0))


def test_the_jackknife_of_a_ratio_is_what_it_scatters_by() -> None:
    r = np.random.default_rng(6)

    def drawn() -> tuple[float, float]:
        bottom = 1 + r.random(40)
        top = bottom * 0.7 + 0.3 * r.standard_normal(40)
        return jackknife(lambda a, b: a.sum() / b.sum(), top, bottom)

    values, errors = np.array([drawn() for _ in range(800)]).T
    assert abs(values.mean() - 0.7) < 4 * values.std() / math.sqrt(800)
    # a standard deviation of 800 values is known to 1/√1600, the mean error better: four of them
    assert errors.mean() == pytest.approx(values.std(), rel=4 / 40)


def test_the_jackknife_leaves_the_same_group_out_of_every_sample() -> None:
    seen: list[tuple[int, ...]] = []

    def statistic(a: Any, b: Any) -> float:
        assert (b == 10 * a[:, None]).all()
        seen.append(tuple(a))
        return 0.0

    jackknife(statistic, [1, 2, 3], [[10, 10], [20, 20], [30, 30]])
    assert sorted(seen) == [(1, 2), (1, 2, 3), (1, 3), (2, 3)]
    with pytest.raises(IndexError):
        jackknife(lambda a, b: 0.0, [1, 2, 3], [1, 2])


# --- Bootstrap ------------------------------------------------------------------------------------


def test_percentiles_of_a_normal_law_are_students_interval() -> None:
    x = np.random.default_rng(7).standard_normal(5)
    normal = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    draws = x.mean() + standard_error(x) * normal
    assert percentile(x.mean(), draws, 4)[:3] == pytest.approx(mean(x)[:3], abs=1e-4)
    plain = percentile(x.mean(), draws)
    assert plain.half == pytest.approx(NORMAL * standard_error(x), rel=1e-4)
    assert plain.sd == pytest.approx(standard_error(x), rel=1e-4)


def test_percentiles_are_widened_to_each_side_and_hold_the_estimate() -> None:
    draws = np.linspace(0, 1, 1001)
    wider = T2 / NORMAL
    found = percentile(0.1, draws, 2)
    assert found[:3] == pytest.approx((0.1, 0.1 - wider * 0.075, 0.1 + wider * 0.875))
    assert percentile(2.0, draws)[:3] == pytest.approx((2.0, 0.025, 2.0))
    assert percentile(-1.0, draws, 2)[:2] == (-1.0, -1.0)


def test_draws_without_a_value_are_left_out() -> None:
    draws = np.r_[np.linspace(0, 1, 101), math.nan, math.inf]
    assert percentile(0.5, draws) == percentile(0.5, draws[:101])
    found = percentile(math.nan, draws)  # the estimate does not exist, some draws do
    assert math.isnan(found.value) and found[1:3] == pytest.approx((0.025, 0.975))
    assert all(map(math.isnan, percentile(0.5, [math.nan])[1:]))
    assert percentile(0.5, [0.5]) == (0.5, 0.5, 0.5, 0.0)
    assert percentile(0.0, [-1.0, 1.0]).sd == pytest.approx(math.sqrt(2))


def test_the_bootstrap_agrees_with_scipy() -> None:
    r = np.random.default_rng(8)
    a, b = r.exponential(size=20), 1 + r.random(12)

    def ratio(a: Any, b: Any) -> float:
        return float(a.mean() / b.mean())

    found, draws = bootstrap(ratio, a, b, draws=6000, seed=1)
    options: dict[str, Any] = {"method": "percentile", "vectorized": False, "n_resamples": 6000}
    other = stats.bootstrap((a, b), ratio, rng=np.random.default_rng(2), **options)
    assert found.value == ratio(a, b) and len(draws) == 6000
    # a 2.5 % point of 6000 normal draws is known to √(p(1 − p)/6000)/φ(1.96) standard deviations
    off = 4 * math.sqrt(2 * 0.025 * 0.975 / 6000) / stats.norm.pdf(NORMAL) * found.sd
    assert found[1:3] == pytest.approx(tuple(other.confidence_interval), abs=off)
    assert found.sd == pytest.approx(other.standard_error, rel=4 * math.sqrt(2 / 12_000))


def test_the_bootstrap_covers() -> None:
    r, n = np.random.default_rng(9), 25
    found = [bootstrap(np.mean, r.standard_normal(n), draws=300, seed=k)[0] for k in range(400)]
    # its width is 1.96 √((n − 1)/n) s/√n, so that it covers a little less than 95 %: 92.8 % here
    expected = 1 - 2 * stats.t.sf(NORMAL * math.sqrt((n - 1) / n), n - 1)
    assert 0.90 < expected < 0.98
    assert abs(covered(found, 0.0) - expected) < binomial(400, expected)


def test_every_sample_is_drawn_within_itself_and_along_its_first_axis() -> None:
    # pooled, the two would scatter by 50/√8 = 18
    found, draws = bootstrap(lambda a, b: a.mean() + b.mean(), np.zeros(4), np.full(4, 100.0))
    assert found == (100.0, 100.0, 100.0, 0.0) and len(draws) == 2000
    paired = np.array([[k, -k] for k in range(9)])
    assert bootstrap(lambda rows: rows.sum(), paired)[0] == (0.0, 0.0, 0.0, 0.0)


def test_a_bootstrap_is_repeated_by_its_seed() -> None:
    x = np.random.default_rng(10).standard_normal(9)
    one, two, other = (bootstrap(np.median, x, draws=50, seed=seed)[1] for seed in (3, 3, 4))
    assert one.tolist() == two.tolist() != other.tolist()
    # the draws are those of one call of the generator for each sample, in their order
    index = np.random.default_rng(3).integers(0, 9, (50, 9))
    assert one.tolist() == np.median(x[index], axis=1).tolist()


def test_the_share_of_draws_that_exist_is_left_to_the_caller() -> None:
    def root(x: Any) -> float:
        return float(x.mean()) if x.mean() > 0 else math.nan

    found, draws = bootstrap(root, [-1.0, 1.0], draws=400)
    # the mean of two is −1, 0 or 1 with ¼, ½, ¼
    assert abs(np.isfinite(draws).mean() - 0.25) < binomial(400, 0.25)
    assert math.isnan(found.value) and found[1:] == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean([1.0]), r"two or more values, got \[1.0\]"),
        (lambda: mean([[1.0, 2.0]]), "two or more values"),
        (lambda: p_value([]), "two or more values"),
        (lambda: standard_error([3.0]), "number of samples is 1; a standard error needs two"),
        (lambda: standard_error([], alone=0.0), "number of samples is 0"),
        (lambda: slope([1, 1, 1], [1, 2, 3]), r"two or more places, got x = \[1.0, 1.0, 1.0\]"),
        (lambda: slope([1.0], [1.0]), "two or more places"),
        (lambda: slope([], []), "two or more places"),
        (lambda: slope([1, 2], [1, 2, 3]), "two or more places"),
        (lambda: jackknife(np.mean, [1.0]), "groups is 1; a jackknife needs two or more"),
    ],
)
def test_too_few_samples_are_refused_in_a_sentence(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
