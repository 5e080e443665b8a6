"""Properties that hold whatever the numbers: ratios compose, and what is read off curves moves with the curves."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grsd import mup
from grsd.mup import Plan
from grsd.mup.optima import drift, optimum, regret
from grsd.mup.rules import OPTIMIZERS

from .test_planning import Residual, gpt2

fixed = settings(derandomize=True, deadline=None, max_examples=40)
ratios = st.tuples(*2 * [st.floats(0.125, 8.0)])
NUMBERS = ("multiplier", "std", "lr", "weight_decay", "eps", "clip")


def quiet(model: Any, **more: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SOAP's caution
        return mup.plan(model, **more)


@cache
def net(make: Any, width: int, depth: int) -> Any:
    return make(width, depth)


def assert_composed(first: Plan, second: Plan, whole: Plan) -> None:
    """Every factor of `whole` is the product of those of the two; the second has the entries."""
    steps = {e.role: e for e in first}
    for then, both in zip(second, whole, strict=True):
        for field in NUMBERS:
            one, two, product = (getattr(e, field) for e in (steps[both.role], then, both))
            if product is None:
                assert one is None and two is None
            else:  # four powers, each correct to some units in the last place
                assert one * two == pytest.approx(product, rel=1e-14)
    sides = {m.side: m.factor for m in first.multipliers}
    for then, both in zip(second.multipliers, whole.multipliers, strict=True):
        assert sides[both.side] * then.factor == pytest.approx(both.factor, rel=1e-14)


@fixed
@given(a=ratios, b=ratios, name=st.sampled_from(list(OPTIMIZERS)), k=st.sampled_from([1, 2]))
def test_ratios_compose(a: Any, b: Any, name: str, k: int) -> None:
    model = net(Residual, 8, 2)
    plans = (
        quiet(model, r_n=n, r_L=depth, optimizer=name, k=k)
        for n, depth in (a, b, (a[0] * b[0], a[1] * b[1]))
    )
    assert_composed(*plans)


sizes = st.tuples(st.sampled_from([8, 16, 24, 32]), st.sampled_from([1, 2, 3, 6]))


@pytest.mark.parametrize("make", [Residual, gpt2])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@settings(derandomize=True, deadline=None, max_examples=4)
@given(a=sizes, b=sizes, c=sizes)
def test_plans_between_models_compose(name: str, make: Any, a: Any, b: Any, c: Any) -> None:
    small, middle, large = (net(make, *size) for size in (a, b, c))
    more = {"optimizer": name, "k": 2}
    assert_composed(
        quiet(middle, base=small, **more),
        quiet(large, base=middle, **more),
        quiet(large, base=small, **more),
    )


# --- Curves -----------------------------------------------------------------------------------------------------------

GRID = np.arange(-9.0, 0.0)
curves = st.builds(  # U-curves of any steepness on the two sides, with their smallest value inside the grid
    lambda best, left, right, power: np.where(best > GRID, left, right) * abs(GRID - best) ** power,
    best=st.floats(-7.5, -1.5),
    left=st.floats(0.1, 3.0),
    right=st.floats(0.1, 3.0),
    power=st.floats(1.0, 3.0),
)


@fixed
@given(curve=curves, shift=st.floats(-20, 20), scale=st.floats(0.01, 100), up=st.floats(-5, 5))
def test_the_optimum_moves_with_the_grid_and_not_with_the_loss(
    curve: Any, shift: float, scale: float, up: float
) -> None:
    plain, moved = optimum(GRID, curve), optimum(GRID + shift, scale * curve + up)
    assert (plain.bound, plain.index) == (moved.bound, moved.index) == ("", plain.index)
    # differences of losses lose about 1e-15 · loss/difference, which scale and up may make 1e4 times as large
    assert moved.value == pytest.approx(plain.value + shift, abs=1e-9)
    assert moved.loss == pytest.approx(scale * plain.loss + up, abs=1e-9 * (1 + scale))
    assert GRID[plain.index - 1] < plain.value < GRID[plain.index + 1]


@fixed
@given(curve=curves, scale=st.floats(0.01, 100), seed=st.integers(0, 9))
def test_intervals_scale_with_the_noise_and_hold_the_value(
    curve: Any, scale: float, seed: int
) -> None:
    rows = curve + 0.01 * np.random.default_rng(seed).standard_normal((3, len(GRID)))
    plain, moved = (optimum(GRID, c * rows, noise=c * 0.01, draws=50) for c in (1.0, scale))
    if not plain.bound:
        assert plain.low <= plain.value <= plain.high
        assert (moved.low, moved.high) == pytest.approx((plain.low, plain.high), abs=1e-6)


@fixed
@given(
    slope=st.floats(-0.6, 0.6),
    at=st.floats(-5.0, -4.0),
    bend=st.floats(0.01, 10),
    unit=st.floats(0.1, 10),
    noise=st.sampled_from([0.0, 1e-3]),
)
def test_the_drift_of_planted_optima_is_the_planted_one(
    slope: float, at: float, bend: float, unit: float, noise: float
) -> None:
    doublings = np.arange(4.0)
    planted = [
        optimum(GRID, bend * (GRID - at - slope * x) ** 2, noise=noise * bend, draws=50)
        for x in doublings
    ]
    found = drift(unit * 32 * 2**doublings, planted)
    assert found.value == pytest.approx(slope, abs=1e-9) and found.bound == ""
    # without noise the interval is the value, to rounding
    assert found.scatter < 1e-9 and found.low - 1e-9 < slope < found.high + 1e-9
    # in units of four times the size the best rate moves twice as far
    assert drift(4**doublings, planted).value == pytest.approx(slope / 2, abs=1e-9)
    backwards = drift(2 ** doublings[::-1], planted)
    assert backwards.value == pytest.approx(-slope, abs=1e-9)


@fixed
@given(
    first=curves,
    second=curves,
    scale=st.floats(0.01, 100),
    ups=st.tuples(st.floats(-5, 5), st.floats(-5, 5)),
)
def test_regret_sees_differences_of_losses_alone(
    first: Any, second: Any, scale: float, ups: Any
) -> None:
    table = np.stack([first, second])
    plain, moved = regret(GRID, table), regret(GRID, scale * table + np.array(ups)[:, None])
    assert plain.values[0] == 0 <= plain.values[1] and plain.at == moved.at
    assert moved.values == pytest.approx(scale * plain.values, abs=1e-12 * (10 + scale * 100))
