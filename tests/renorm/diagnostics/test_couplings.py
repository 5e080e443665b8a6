"""D4 against Kato's formulas, other regressions, closed forms of its noise, a null and planted violations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from scipy.stats import ortho_group
from sklearn.linear_model import GammaRegressor

from grsd.dynamics.modes import instant, modes
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import mlp
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.couplings import NOISE, normalized, omega, planted, shift_invariance


def spectrum(n: int = 64, seed: int = 0, skewed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.exp(np.sort(rng.exponential(2.0, n) if skewed else rng.normal(0.0, 2.0, n)))


def from_normalized(lam: np.ndarray, normal: np.ndarray) -> np.ndarray:
    return normal * np.sqrt(np.outer(lam, lam))


def symmetric(n: int, seed: int) -> np.ndarray:
    draw = np.triu(np.random.default_rng(seed).standard_normal((n, n)))
    return draw + np.triu(draw, 1).T


# --- Identities -------------------------------------------------------------------------------------------------------


def test_omega_and_the_diagonal_are_those_of_kato() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(24, *shape, generator=g, dtype=torch.float64) for shape in ((3,), ()))
    problem = Problem(mlp([3, 16, 1], seed=2), x, y)
    found = modes(*instant(problem, problem.theta))
    normal = normalized(found.eigenvalues, found.matrix)
    # one division and one sinh apart; eigenvalues 1e-12 of the largest lose nothing, for both use the same numbers
    scale = np.abs(found.coupling).max()
    assert np.abs(omega(found.eigenvalues, normal) - found.coupling).max() < 1e-12 * scale
    gap = (omega(found.eigenvalues, normal) - found.coupling) / np.where(
        found.coupling == 0, 1, found.coupling
    )
    assert (
        np.abs(gap).max() < 1e-9
    )  # λ_v − λ_u cancels where eigenvalues are close, 2 sinh does too
    np.testing.assert_allclose(np.diagonal(normal), found.rates / found.eigenvalues, rtol=1e-12)
    np.testing.assert_array_equal(np.diagonal(omega(found.eigenvalues, normal)), 0)


def test_units_do_not_matter() -> None:
    lam = spectrum()
    x = planted(lam, seed=1)
    one, other = shift_invariance(lam, x), shift_invariance(7 * lam, 7 * 3 * x)
    for name in ("slope", "slope_error", "rms", "floor", "noise"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9)


# --- The regression ---------------------------------------------------------------------------------------------------


def _pairs(lam: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log X̃², |Δ| and s̄ of the pairs of the 10–90 % window, written out."""
    n = len(lam)
    rows = [
        (
            math.log(x[u, v] ** 2 / (lam[u] * lam[v])),
            math.log(lam[v] / lam[u]),
            0.5 * math.log(lam[u] * lam[v]),
        )
        for u in range(round(0.1 * n), round(0.9 * n))
        for v in range(u + 1, round(0.9 * n))
    ]
    y, distance, place = np.array(rows).T
    knots = np.quantile(distance, np.linspace(0, 1, couplings.KNOTS + 1))
    base = BSpline.design_matrix(
        distance, np.concatenate([[knots[0]] * 3, knots, [knots[-1]] * 3]), 3
    ).toarray()
    return y, base, place, distance


def test_slope_and_rms_are_those_of_one_least_squares_problem() -> None:
    lam = spectrum(40, 3)
    x = planted(lam, slope=0.5, bump=1.0, seed=4)
    y, base, place, _ = _pairs(lam, x)
    found = shift_invariance(lam, x)
    with_line = np.linalg.lstsq(np.column_stack([base, place]), y, rcond=None)[0]
    assert found.slope == pytest.approx(with_line[-1], rel=1e-9)

    def explained(columns: list[np.ndarray]) -> float:
        design = np.column_stack(columns)
        fit = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return float(((y - fit) ** 2).sum())

    gained = explained([base]) - explained([base, place, place**2])
    assert found.rms == pytest.approx(math.sqrt(gained / len(y)), rel=1e-8)
    assert found.pairs == len(y) and found.modes == 32


def test_the_square_statistic_is_a_gamma_regression() -> None:
    lam = spectrum(40, 5)
    x = planted(lam, slope=0.5, seed=6)
    y, base, place, _ = _pairs(lam, x)
    line = place - base @ np.linalg.lstsq(base, place, rcond=None)[0]
    bend = (
        place**2
        - np.column_stack([base, line])
        @ np.linalg.lstsq(np.column_stack([base, line]), place**2, rcond=None)[0]
    )
    design = np.column_stack([base, line, bend])
    other = GammaRegressor(
        alpha=0, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    other.fit(design / np.linalg.norm(design, axis=0), np.exp(y))
    slope = other.coef_[-2] / np.linalg.norm(line)
    assert shift_invariance(lam, x, statistic="square").slope == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    "kernel", [lambda d: -2 * d, lambda d: -np.log1p(d**2), lambda d: np.log(2 * np.cosh(d))]
)
def test_splines_see_no_position_in_a_kernel_and_classes_do(
    kernel: Callable[[np.ndarray], np.ndarray],
) -> None:
    """No noise, and a window that keeps the sparse end of the spectrum: whatever is found is the method's own bias."""
    lam = spectrum(64, 0, skewed=True)
    s = np.log(lam)
    x = from_normalized(lam, np.exp(0.5 * kernel(np.abs(s[:, None] - s))))
    spline, classes = (
        shift_invariance(lam, x, smooth=how, window=(0, 1)) for how in ("spline", "classes")
    )
    assert abs(spline.slope) < 1e-3 and spline.rms < 2e-3
    assert abs(classes.slope) > 0.03 and classes.rms > 10 * spline.rms


# --- Noise ------------------------------------------------------------------------------------------------------------


def test_noise_and_floor_have_their_closed_forms() -> None:
    spectra = [spectrum(64, seed) for seed in range(40)]
    found = shift_invariance(spectra, [planted(lam, seed=100 + k) for k, lam in enumerate(spectra)])
    pairs = found.pairs
    assert pairs == 51 * 50 // 2 or pairs == 52 * 51 // 2
    # Standard deviation of log χ²₁ from 40 × 1275 draws; its fourth moment makes the relative error about 0.5 %.
    assert found.noise == pytest.approx(NOISE, rel=0.02)
    # √2 · noise/√pairs; taking the larger of two variances raises it by a few per cent
    assert math.pi / math.sqrt(pairs) < found.floor < 1.15 * math.pi / math.sqrt(pairs)
    # rms² of 40 nets is π²/pairs · χ²₈₀/80: within 3 · √(2/80) of it
    assert found.rms**2 == pytest.approx(math.pi**2 / pairs, rel=3 * math.sqrt(2 / 80))
    assert found.excess < found.floor


@pytest.mark.parametrize("shared", [0.0, 1.5])
def test_the_error_of_one_network_is_the_scatter_of_many(shared: float) -> None:
    """`shared`: every mode has a strength of its own, so that pairs which share a mode vary together."""
    lam, rng = spectrum(), np.random.default_rng(0)
    found = []
    for seed in range(200):
        strength = np.exp(shared * rng.standard_normal(len(lam)) / 2)
        found.append(shift_invariance(lam, planted(lam, seed=seed) * np.outer(strength, strength)))
    scatter = float(np.std([one.slope for one in found], ddof=1))
    claimed = math.sqrt(float(np.mean([one.slope_error**2 for one in found])))
    # 200 draws give the scatter to 5 %. The sandwich is known to be low when few modes carry the line, and high by the maximum.
    assert 0.8 < claimed / scatter < 1.25
    naive = found[0].noise / (found[0].deviation * math.sqrt(found[0].pairs))
    assert (naive < 0.6 * scatter) == (shared > 0)


def test_several_networks_give_the_scatter_over_networks() -> None:
    spectra = [spectrum(40, seed) for seed in range(5)]
    draws = [planted(lam, slope=0.2, seed=k) for k, lam in enumerate(spectra)]
    found = shift_invariance(spectra, draws)
    slopes = [shift_invariance(lam, x).slope for lam, x in zip(spectra, draws, strict=True)]
    assert found.nets == 5 and found.slope == pytest.approx(np.mean(slopes))
    assert found.slope_error == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(5))
    assert found.score == pytest.approx(found.slope / found.slope_error)
    assert shift_invariance(np.array(spectra), np.array(draws)).slope == pytest.approx(found.slope)
    assert shift_invariance(spectra[:1], draws[:1]).nets == 1


# --- The null and what must be caught -----------------------------------------------------------------------------------


def test_the_null_passes_the_slope_is_recovered_and_the_bump_needs_the_rms() -> None:
    """12 draws on spectra of 64 modes: the controls of the audit."""
    spectra = [spectrum(64, seed) for seed in range(12)]

    def read(**violation: float) -> couplings.Shift:
        return shift_invariance(
            spectra, [planted(lam, seed=50 + k, **violation) for k, lam in enumerate(spectra)]
        )

    null, tilted, bump = read(), read(slope=0.3), read(bump=3.0)
    assert abs(null.score) < 2 and null.rms < 1.3 * null.floor
    assert (
        abs(tilted.slope - 0.3) < 2 * tilted.slope_error
        and tilted.score > 5
        and tilted.rms > 2 * tilted.floor
    )
    assert abs(bump.score) < 3 and bump.rms > 5 * bump.floor


def test_invariant_couplings_of_another_normalisation_have_the_slope_minus_two() -> None:
    """X itself Toeplitz: log X̃² = k(Δ) − 2 s̄. Additive noise in J, J̇ = C, gives −1; noise from either side gives 0."""
    n = 64
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"X": [], "C": [], "AJ": [], "JB": []}
    spectra = [spectrum(n, seed) for seed in range(12)]
    for k, lam in enumerate(spectra):
        turn = ortho_group.rvs(n, random_state=k)
        j = np.sqrt(lam)[:, None] * turn  # φ = 1
        a, b = rng.standard_normal((2, n, n))
        for name, moved in (("C", a), ("AJ", a @ j), ("JB", j @ b)):
            found[name].append(moved @ j.T + j @ moved.T)
        found["X"].append(symmetric(n, k))
    for name, expected in (("X", -2.0), ("C", -1.0), ("AJ", 0.0), ("JB", 0.0)):
        seen = shift_invariance(spectra, found[name])
        assert abs(seen.slope - expected) < 3 * seen.slope_error, name
        assert seen.slope_error < 0.05


def test_heavy_tails_at_one_end_fool_the_logarithm_and_not_the_square() -> None:
    """E X̃² is the same everywhere; at large s̄ it sits in few large entries."""
    rng, logs, squares = np.random.default_rng(1), [], []
    for seed in range(24):
        lam = spectrum(64, seed)
        s = np.log(lam)
        share = np.where(s[:, None] + s > 0, 0.2, 1.0)
        draw = np.triu(rng.random((64, 64)))
        x = planted(lam, seed=seed) * np.where(
            draw + np.triu(draw, 1).T < share, np.sqrt(1 / share), 1e-2
        )
        logs.append(shift_invariance(lam, x))
        squares.append(shift_invariance(lam, x, statistic="square"))
    log, square = couplings.average(logs), couplings.average(squares)
    assert log.slope < -0.5 and log.score < -10
    assert abs(square.slope) < 3 * square.slope_error


# --- At the door ------------------------------------------------------------------------------------------------------


def test_zero_eigenvalues_are_left_out_and_counted() -> None:
    lam = spectrum(40, 2)
    x = planted(lam, seed=3)
    padded = np.zeros((50, 50))
    padded[10:, 10:] = x
    padded[:10] += 1e-17
    padded = (padded + padded.T) / 2
    padded[10:, 10:] = x
    found = shift_invariance(np.concatenate([np.full(10, 1e-18), lam]), padded)
    plain = shift_invariance(lam, x)
    assert found.left_out == 10 and plain.left_out == 0
    assert found.slope == plain.slope and found.rms == plain.rms


def test_repeated_eigenvalues_are_harmless() -> None:
    """Turn the basis of an eigenspace: the answer moves by no more than the noise of the pairs touched."""
    lam = spectrum(60, 4)
    lam[30] = lam[29]
    x = planted(lam, seed=5)
    turn = np.eye(60)
    turn[29:31, 29:31] = [[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]]
    one, other = shift_invariance(lam, x), shift_invariance(lam, turn.T @ x @ turn)
    assert abs(one.slope - other.slope) < one.slope_error and math.isfinite(one.rms)


def test_bad_input_is_refused_with_a_sentence() -> None:
    lam = spectrum(30)
    x = planted(lam, seed=0)
    for arguments, words in (
        ((lam[:-1], x), "do not fit"),
        ((lam[::-1], x), "must ascend"),
        ((lam, x + np.triu(x)), "not symmetric"),
        ((lam, np.where(np.eye(30), x, 0)), "exactly zero"),
        ((lam * np.nan, x), "not finite"),
        ((np.zeros(30), x), "M is zero"),
        ((np.ones(30), x), "distance 0"),
        ((lam[:18], x[:18, :18]), "14 modes in the window"),
        (([lam], [x, x]), "1 spectra and 2 matrices"),
    ):
        with pytest.raises(ValueError, match=words):
            shift_invariance(*arguments)
    for options, words in (
        ({"window": (0.9, 0.1)}, "window is"),
        ({"smooth": "bins"}, "smooth is 'bins'"),
        ({"statistic": "mean"}, "statistic is 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            shift_invariance(lam, x, **options)
    with pytest.raises(ValueError, match="has no logarithm"):
        normalized(lam - lam[0], x)
    with pytest.raises(ValueError, match="without repetitions"):
        omega(np.ones(30), x)
    with pytest.raises(ValueError, match="positive numbers"):
        planted(-lam, seed=0)
    with pytest.raises(ValueError, match="no network"):
        couplings.average([])
