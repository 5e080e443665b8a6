"""What the chapters on the second paper define: equation (17), bins, one field, spirals and the gain model.

The pages check these at their own parameters; here they are held at others, or more tightly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import expm

from grsd.dynamics.drift import edge_flux
from grsd.dynamics.flow import integrate
from grsd.renorm.diagnostics.couplings import normalized, planted
from grsd.renorm.theorems.closed_forms import BalancedModes, balanced_eigenvalue, parallel_modes
from grsd.renorm.theorems.jacobian import Coefficients, correlation_rate

from .chapter_code import definitions

PROOF = definitions("renorm/proof.md", "printed_17", "corrected_17")
COUPLINGS = definitions("renorm/couplings.md", "binned")
PAIRS = definitions("renorm/couplings.md", "generator")
POWER = definitions(
    "renorm/power-law.md",
    *("field_ratio", "look", "Spirals", "spiral", "Gain", "gain_network", "gain_rate"),
    *("lower_root", "pair_energies", "spiral_velocity", "side_by_side"),
)
BALANCE = definitions("renorm/envelopes.md", "WeakBalance", "weak_balance")
binned, field_ratio, look = COUPLINGS.binned, POWER.field_ratio, POWER.look


# --- Equation (17) ------------------------------------------------------------------------------


def test_printed_17_does_not_exist_for_other_shapes_and_the_corrected_one_does() -> None:
    """Coefficients on function space, n = 6, beside blocks of p = 4: C is 4 × 4, a coefficient 6 × 6."""
    rng = np.random.default_rng(3)
    blocks = [rng.standard_normal((6, 4)) for _ in range(3)]
    parts = [
        {p: rng.standard_normal((6, 6)) for p in range(3) if abs(p - block) <= 1}
        for block in range(3)
    ]
    with pytest.raises(ValueError, match=r"\(4,4\) and \(6,6\) not aligned"):
        PROOF.printed_17(parts, blocks)
    # so it is the order that is refused, not the blocks or the coefficients
    none = np.zeros(3)
    rates = Coefficients("left", 1, parts, none, none, np.zeros(3, int)).rates(blocks)
    truth = np.array(correlation_rate(blocks, rates))
    corrected = np.array(PROOF.corrected_17("left", parts, blocks))
    assert np.linalg.norm(corrected - truth) < 1e-12 * np.linalg.norm(truth)
    # the coefficients transposed make another motion
    turned = [{p: part.T for p, part in row.items()} for row in parts]
    other = np.array(PROOF.corrected_17("left", turned, blocks))
    assert np.linalg.norm(other - truth) > 0.1 * np.linalg.norm(truth)


# --- The paper's bins ---------------------------------------------------------------------------


def r2(values: np.ndarray) -> float:
    """Share of the variance of log K̂ that j − i explains, on diagonals of two cells or more."""
    i, j = np.nonzero(np.triu(~np.isnan(values)))
    logs, d = np.log(values[i, j]), j - i
    several = np.bincount(d)[d] > 1
    rest = logs - (np.bincount(d, logs) / np.maximum(np.bincount(d), 1))[d]
    return 1 - float((rest[several] ** 2).sum() / ((logs - logs.mean())[several] ** 2).sum())


def test_a_toeplitz_kernel_has_no_spread_and_its_omega_has() -> None:
    """Evenly spaced s, one mode per bin: E Ω² = b(Δ) e^{−2s̄}/(4 sinh²(Δ/2)) spreads like −2s̄ along every diagonal."""
    n, step = 60, 0.2
    s = step * np.arange(n) + step / 2
    squares = np.exp(-np.abs(s[:, None] - s))
    free = ~np.eye(n, dtype=bool)
    lam = np.exp(s)
    gaps = np.where(free, lam - lam[:, None], 1) ** 2
    values, rms = binned(s, squares, step)
    assert rms < 1e-12
    assert r2(values) > 1 - 1e-12
    values, rms = binned(s, np.where(free, squares / gaps, 0), step)
    # diagonal d holds n − d cells whose s̄ are spaced by `step`: variance of −2 s̄ is 4 step² ((n − d)² − 1)/12
    lengths = np.arange(n - 1, 1, -1, dtype=np.float64)
    closed = math.sqrt(float((lengths * 4 * step**2 * (lengths**2 - 1) / 12).sum() / lengths.sum()))
    assert rms == pytest.approx(closed, rel=1e-9) and closed > 1
    assert r2(values) < 0.9
    normal = np.where(free, squares * np.outer(lam, lam) / gaps, 0)
    assert binned(s, normal, step)[1] < 1e-10


def test_noise_of_a_cell_falls_with_its_pairs() -> None:
    rms = []
    for n in (64, 256):
        lam = np.exp(np.sort(np.random.default_rng(1).normal(0.0, 2.0, n)))
        squares = normalized(lam, planted(lam, seed=2)) ** 2
        rms.append(binned(np.log(lam), squares, 1.0, least=4)[1])
    assert rms[1] < 0.6 * rms[0]


# --- One field ----------------------------------------------------------------------------------


def ratios(modes: BalancedModes, a: float = 1.5, t: float = 1.2) -> np.ndarray:
    now, later = ((modes.eigenvalues(x), modes.velocities(x)) for x in (t, t / a))
    return np.asarray(field_ratio(*now, *later, a))


def test_field_ratio_is_one_for_one_field_and_scatters_where_v_is_no_function_of_lambda() -> None:
    y = np.geomspace(1e-2, 3, 4000)
    # linear interpolation over steps of 0.14 %
    np.testing.assert_allclose(ratios(BalancedModes.scale_free(y, 0.1)), 1.0, atol=1e-4)
    # λ(2y − λ): the ratio is (2y − aλ)/(a(2y − λ)), which is near 1/a for small λ
    assert abs(np.median(ratios(BalancedModes.common_target(0.01 * y))) - 1 / 1.5) < 0.02
    assert np.std(ratios(BalancedModes.random(200, seed=0))) > 0.3


# --- Two velocities -----------------------------------------------------------------------------

STEP = (lambda x: x / (x + 1), lambda x: 1 / (1 + x) ** 2)  # a soft edge at λ = 1 and its slope


def test_parallel_modes_drift_and_do_not_turn() -> None:
    problem = parallel_modes([1.0, 2.0], [0.1, 0.2])
    balance = BALANCE.weak_balance(look(problem, problem.theta), *STEP)
    assert balance.rotation == pytest.approx(0, abs=1e-15) and balance.drift > 0.01


def test_the_spiral_turns_and_does_not_drift() -> None:
    p, q, beta = 0.8, 0.5, 1.5
    problem = POWER.spiral(p, q, beta, radius=2.0)
    frame = np.array([[p**2, p * q], [p * q, q**2 + beta]])
    values = np.linalg.eigvalsh(frame)
    path = integrate(problem, [0.0, 1.0, 2.5], rtol=1e-12, atol=1e-14, estimate=False)
    for t, theta in zip(path.times, path.thetas, strict=True):
        m = look(problem, theta)
        np.testing.assert_allclose(m.eigenvalues, values, rtol=1e-12)
        assert np.abs(m.rates).max() < 1e-12
        assert np.isclose(abs(m.coupling[0, 1]), p * q, rtol=1e-10)
        e = problem.error(theta).numpy()
        assert np.isclose(np.sqrt((e**2).mean()), 2 * np.exp(-(p**2) * t), rtol=1e-9)
        balance = BALANCE.weak_balance(m, *STEP)
        assert abs(balance.rotation) > 0.1 * balance.energy and abs(balance.drift) < 1e-12
        # every energy decays like e^{−2p²t}, so the flux is known without any eigenvector
        left = balance.dissipation - 2 * p**2 * balance.energy
        assert np.isclose(balance.rotation, left, rtol=1e-8)


@pytest.mark.parametrize("kind", ["one rate", "one flux"])
def test_spirals_side_by_side_pass_energy_by_rotation_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two families: Ω is the same for every pair and F/E is not, or the other way round."""
    scales, ratio, flux_per_energy = np.geomspace(0.5, 5, 8), 2.5, 0.01
    monkeypatch.setitem(POWER.spiral_velocity.__globals__, "r_", ratio)  # the page's own is 2
    half = flux_per_energy / 2
    omega = np.full(8, 0.1) if kind == "one rate" else np.sqrt(half * ((ratio - 1) * scales - half))
    problem = POWER.side_by_side(scales, omega)
    path = integrate(problem, [0.0, 0.05, 0.4], rtol=1e-11, atol=1e-14, estimate=False)
    expected = np.sort(np.concatenate([scales, ratio * scales]))
    for t, theta in zip(path.times, path.thetas, strict=True):
        m = look(problem, theta)
        np.testing.assert_allclose(m.eigenvalues, expected, rtol=1e-10)
        assert np.abs(m.rates).max() < 1e-12
        turning = np.sort(np.abs(m.coupling)[np.abs(m.coupling) > 1e-12])
        # the rate of every pair, and nothing else turns
        np.testing.assert_allclose(turning, np.sort(np.repeat(omega, 2)), rtol=1e-9)
        energies = np.sort(np.concatenate(POWER.pair_energies(scales, omega, t)))
        np.testing.assert_allclose(
            np.sort(0.5 * m.coefficients**2), energies, rtol=1e-6, atol=1e-12
        )
        for a in (0.8, 2.0, 5.0):
            flux = edge_flux(m, [a], 8)
            step = lambda x, a=a: x**8 / (x**8 + a**8)  # noqa: E731
            slope = lambda x, a=a: 8 * x**7 * a**8 / (x**8 + a**8) ** 2  # noqa: E731
            closed = POWER.spiral_velocity(scales, omega, step, slope, t)
            assert flux.kato[0] / flux.energy[0] == pytest.approx(closed, rel=1e-7)
    passed = 2 * (POWER.lower_root(scales, omega) - scales)
    if kind == "one flux":
        np.testing.assert_allclose(passed, flux_per_energy, rtol=1e-12)
    else:
        assert passed.max() > 9 * passed.min()


# --- Coherent pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.5, 3.0), (2.0, 2.4)])
def test_a_locked_pair_has_the_identity_and_noise_loosens_it(low: float, high: float) -> None:
    """Ω² = f(gap − f) of the amplitudes' slow solution, found by an eigenvector and not by energies."""
    omega = 0.1
    values, vectors = np.linalg.eig(np.array([[-low, -omega], [omega, -high]]))
    slow = vectors[:, np.argmax(values)]
    f = omega * slow[1] / slow[0]
    assert omega**2 == pytest.approx(f * (high - low - f), rel=1e-12)
    # the closed system of energies agrees with it where there is no noise, up to e^{−gap t}
    pair = expm(60 * PAIRS.generator(low, high, omega, 0.0)) @ np.array([0.5, 0.2, 0.1])
    assert omega * pair[2] / (2 * pair[0]) == pytest.approx(f, rel=1e-6)
    noisy = expm(6 * PAIRS.generator(low, high, omega, 500.0)) @ np.array([0.5, 0.2, 0.0])
    assert omega * noisy[2] / (noisy[0] - noisy[1]) == pytest.approx(2 * omega**2 / 500, rel=0.02)


# --- The gain model -----------------------------------------------------------------------------


@pytest.mark.parametrize("y1", [2.0, 0.0])
def test_the_gain_network_moves_all_its_modes_alike(y1: float) -> None:
    """Any s₁: λ = 2s₁²q is a balanced mode of target s₁y₁, so that the page's rate, for s₁ = 1, serves."""
    s, q0 = np.geomspace(0.8, 0.01, 6), 0.05
    alike = (s[0] * y1, s[0] ** 2 * q0)
    problem = POWER.gain_network(s, y1, q0)
    path = integrate(problem, [0.0, 1.0, 3.0], rtol=1e-12, atol=1e-15, estimate=False)
    for t, theta in zip(path.times, path.thetas, strict=True):
        m = look(problem, theta)
        gain = balanced_eigenvalue(t, alike[0], 2 * alike[1]) / (2 * s[0] ** 2)
        window = slice(None, -1)  # all but the first mode of Φ, which has the largest λ
        np.testing.assert_allclose(m.eigenvalues[window], (gain * s**2)[:0:-1], rtol=1e-9)
        rate = float(POWER.gain_rate(t, *alike))
        np.testing.assert_allclose(m.rates / m.eigenvalues, np.full(6, rate), rtol=1e-9)
        # the rate for s₁ = 1 at the target and start as they are is another
        assert abs(float(POWER.gain_rate(t, y1, q0)) / rate - 1) > 0.01
    if y1 == 0:
        t, lag = np.array([0.0, 1.0, 1e3]), 1 / (2 * alike[1])
        np.testing.assert_allclose((t + lag) * POWER.gain_rate(t, *alike), -1, rtol=1e-12)
        # without the lag it is far from −1
        assert abs(float(POWER.gain_rate(1.0, *alike)) + 1) > 0.9
