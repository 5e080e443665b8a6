"""Balances of shells against closed forms, differences along the flow, dense functional calculus, and planted faults."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import jvp

from grsd.dynamics.balance import cumulative_flux, resolvent_energy, resolvent_flux, shell_balance
from grsd.dynamics.crossings import Instants, instants, integrated_balance, moving
from grsd.dynamics.drift import edge_flux
from grsd.dynamics.modes import instant, modes
from grsd.dynamics.problem import Problem
from grsd.spectrum import LogShells

EPS = float(np.finfo(float).eps)


class Wave(nn.Module):
    """f(x) = Σ_j a_j tanh(w_j x)/√h: small enough for dense checks, and it moves its kernel."""

    def __init__(
        self, width: int, inputs: int, seed: int, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(width, generator=g, dtype=torch.float64))
        self.w = nn.Parameter(torch.randn(width, inputs, generator=g, dtype=torch.float64))
        self.activation = activation or nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x @ self.w.T) @ self.a / len(self.a) ** 0.5


def problem(samples: int = 10, width: int = 8, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(samples, 2, generator=g, dtype=torch.float64)
    return Problem(Wave(width, 2, seed), x, torch.sin(2 * x[:, 0]) + x[:, 0] * x[:, 1])


def random_instant(
    n: int, seed: int, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A PSD matrix with eigenvalues over three decades, a symmetric rate, an error."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = 10 ** rng.uniform(-3, 0, n)
    if rank is not None:
        values[rank:] = 0.0
    M = (q * values) @ q.T
    rate = rng.normal(size=(n, n))
    return (M + M.T) / 2, rate + rate.T, rng.normal(size=n)


SHELLS = LogShells(np.array([1e-2, 5e-2, 0.2, 0.6]))


def test_shells_hold_all_of_the_error_and_the_kernel_is_one_of_them() -> None:
    M, rate, error = random_instant(12, 0, rank=7)
    found = shell_balance(modes(M, rate, error, floor=1e-12), SHELLS)
    assert found.energies.sum() == pytest.approx(0.5 * np.mean(error**2), rel=1e-13)
    assert found.counts[0] == 5 and found.counts.sum() == 12
    values, vectors = np.linalg.eigh(M)
    null = vectors[:, values < 1e-12]
    assert found.energies[0] == pytest.approx(0.5 * ((null.T @ error) ** 2).sum() / 12, rel=1e-12)


def test_dissipation_and_exchange_are_the_sums_of_the_paper() -> None:
    M, rate, error = random_instant(9, 1)
    read = modes(M, rate, error)
    found = shell_balance(read, SHELLS)
    lam, g, omega = read.eigenvalues, read.coefficients, read.coupling  # omega[u, v] = Ω_{v→u}
    edges = [-np.inf, *SHELLS.edges, np.inf]
    sets = [[u for u in range(9) if a <= lam[u] < b] for a, b in pairwise(edges)]
    for a, alpha in enumerate(sets, start=1):
        assert found.dissipation[a] == pytest.approx(
            sum(lam[u] * g[u] ** 2 for u in alpha), rel=1e-13, abs=1e-16
        )
        for b, beta in enumerate(sets, start=1):
            flux = -sum(g[v] * g[u] * omega[u, v] for u in alpha for v in beta)
            assert found.exchange[a, b] == pytest.approx(flux, rel=1e-10, abs=1e-11)


@pytest.mark.parametrize("seed", range(5))
def test_internal_coupling_cancels_and_exchange_is_antisymmetric(seed: int) -> None:
    read = modes(*random_instant(30, seed))
    found = shell_balance(read, SHELLS)
    scale = np.abs(np.outer(read.coefficients, read.coefficients) * read.coupling).sum()
    # a sum of n² terms of either sign: n² roundings of the sum of their sizes
    assert np.abs(np.diagonal(found.exchange)).max() < 900 * EPS * scale
    assert np.abs(found.exchange + found.exchange.T).max() < 900 * EPS * scale
    assert abs(found.exchange.sum()) < 900 * EPS * scale
    assert np.abs(found.exchange).max() > 1e-3  # and there is something to cancel
    wrong = np.abs(read.coupling)  # a symmetric coupling: Proposition 1 fails for it
    assert read.coefficients**2 @ wrong @ read.coefficients**2 > 1e-3


def test_any_antisymmetric_exchange_gives_a_net_flux_of_the_form_of_definition_4_1() -> None:
    rng = np.random.default_rng(0)
    f = rng.normal(size=(50, 7, 7))
    f = f - f.swapaxes(-1, -2)
    j = cumulative_flux(f)
    assert np.abs(np.diff(j, axis=-1) - f.sum(axis=-1)[..., 1:]).max() < 1e-13  # 49 terms of size 1
    assert np.abs(j[..., 0] - f.sum(axis=-1)[..., 0]).max() < 1e-13
    symmetric = np.abs(f)  # the null: no such form
    assert (
        np.abs(np.diff(cumulative_flux(symmetric), axis=-1) - symmetric.sum(axis=-1)[..., 1:]).max()
        > 0.1
    )


def test_rate_is_the_derivative_between_two_crossings_and_leak_that_of_the_kernel() -> None:
    net = problem(samples=10, width=2)  # 6 parameters: the kernel of M has 4 dimensions at least
    motion = moving(net, 1.0)
    t, h = 0.5, 1e-2
    steps = np.arange(-4, 5)
    weights = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280]) / h
    looks = [modes(*now) for now in zip(*motion(t + h * steps), strict=True)]
    top = looks[4].eigenvalues
    shells = LogShells(
        np.sqrt(top[[4, 6]] * top[[5, 7]])
    )  # between two eigenvalues, so that none crosses
    balances = [shell_balance(look, shells) for look in looks]
    energies = np.stack([b.energies for b in balances])
    assert len({tuple(b.counts) for b in balances}) == 1
    difference = weights @ energies
    # error of the stencil h⁸ E⁽⁹⁾/630 with h = 0.01, and rounding 2.2e-16 E/h: both below 1e-11 here
    assert np.abs(difference - balances[4].rate).max() < 1e-10
    assert difference[0] == pytest.approx(balances[4].leak, rel=1e-7)
    assert abs(balances[4].leak) > 1e-6


def test_an_eigenvalue_at_an_edge_lies_in_the_shell_above_it() -> None:
    values = np.array([0.0, 1e-3, 0.05, 0.2, 0.6])
    shells = LogShells(np.array([0.05, 0.2, 0.6]))
    found = shell_balance(modes(np.diag(values), np.eye(5), np.ones(5)), shells)
    assert found.counts.tolist() == [1, 1, 1, 1, 1]  # ker M, below, two shells, above
    assert found.dissipation == pytest.approx(values / 5, rel=1e-14)


def test_repeated_eigenvalues_inside_a_shell_are_harmless_and_across_an_edge_refused() -> None:
    _, rate, error = random_instant(6, 3)
    M = np.diag([0.1, 0.1, 0.3, 0.3, 0.3, 0.9])
    found = shell_balance(modes(M, rate, error), SHELLS)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]
    q = np.eye(6)
    q[:2, :2] = turned  # another basis of the same eigenspace
    again = shell_balance(modes(q @ M @ q.T, q @ rate @ q.T, q @ error), SHELLS)
    assert np.abs(found.exchange - again.exchange).max() < 1e-13
    M[1, 1] = 0.1 * (1 + 2 * EPS)
    with pytest.raises(ValueError, match=r"an edge separates the eigenvalues 0.1"):
        shell_balance(modes(M, rate, error), LogShells(np.array([0.01, 0.1 * (1 + EPS), 0.2])))


def logistic(times: np.ndarray, start: float = 0.02) -> Instants:
    """Two independent pairs of parameters a = b with f = ab, one-hot inputs: ḟ = λe, λ = 2f/n, e = y − f, in closed form."""
    y = np.array([1.0, 0.5])
    f = y * start / (start + (y - start) * np.exp(-np.outer(times, y)))  # n = 2: ḟ = f(y − f)
    eye = np.eye(2)
    return f[:, :, None] * eye, (f * (y - f))[:, :, None] * eye, y - f


def test_crossings_of_the_diagonal_network_are_those_of_the_closed_form() -> None:
    shells = LogShells(np.array([0.01, 0.1, 0.3, 2.0]))
    times = np.linspace(0, 12, 7)  # coarse on purpose
    found = integrated_balance(logistic, shells, times)
    expected = []
    for y in (1.0, 0.5):
        for edge in (0.1, 0.3):
            t = np.log((y - 0.02) * edge / (0.02 * (y - edge))) / y  # f(t) = edge
            expected.append((t, edge, 0.25 * (y - edge) ** 2))  # ½ g², g = e/√2
    assert len(found.crossings) == 4 and all(c.upward for c in found.crossings)
    for crossing, (t, edge, energy) in zip(found.crossings, sorted(expected), strict=True):
        assert crossing.time == pytest.approx(t, abs=1e-13)
        assert crossing.edge == edge and crossing.energy == pytest.approx(energy, abs=1e-13)
    assert np.abs(found.exchanged).max() < 1e-15  # Ω ≡ 0
    assert np.abs(found.residual).max() < 1e-12
    # the printed law lets no energy in: it misses what the closed form carries
    into = sum(e for _, edge, e in expected if edge == 0.1) - sum(
        e for _, edge, e in expected if edge == 0.3
    )
    assert found.printed_residual[3] == pytest.approx(into, abs=1e-12)


def test_a_visit_between_two_looks_is_found() -> None:
    """λ₁ rises over the edge and returns between two samples: both passages, equal energies."""

    def motion(t: np.ndarray) -> Instants:
        level, rate = 1.0 - 4 * (t - 0.5) ** 2, -8 * (t - 0.5)
        M, turn = np.zeros((len(t), 2, 2)), np.zeros((len(t), 2, 2))
        M[:, 0, 0], M[:, 1, 1], turn[:, 0, 0] = level + 1, 0.5, rate
        damp = np.exp(-(2 * t - 4 / 3 * ((t - 0.5) ** 3 + 0.125)))  # ė = −λe
        return M, turn, np.stack([damp, np.exp(-0.5 * t)], axis=1)

    found = integrated_balance(motion, LogShells(np.array([0.1, 1.9, 4.0])), [0.0, 1.0])
    assert [c.upward for c in found.crossings] == [True, False]
    # 2 − 4(t − ½)² = 1.9 at t = ½ ± √0.1/2
    assert [c.time for c in found.crossings] == pytest.approx(
        [0.5 - 0.1**0.5 / 2, 0.5 + 0.1**0.5 / 2], abs=1e-12
    )
    assert np.abs(found.residual).max() < 1e-12


@pytest.fixture(scope="module")
def trained() -> tuple[Problem, LogShells, np.ndarray]:
    net = problem(samples=8, width=8, seed=3)
    return net, LogShells.spanning(1e-4, 4.0, ratio=3.0), np.linspace(0, 6, 40)


def test_the_full_law_closes_on_a_network_and_the_printed_one_does_not(
    trained: tuple[Problem, LogShells, np.ndarray],
) -> None:
    net, shells, times = trained
    motion = moving(net, times[-1])
    found = integrated_balance(motion, shells, times)
    assert len(found.crossings) >= 4
    assert np.abs(found.residual).max() < 1e-11
    assert np.abs(found.printed_residual).max() > 1e-2
    assert found.after.sum() - found.before.sum() == pytest.approx(
        -found.dissipated.sum(), abs=1e-12
    )
    # carried energy is handed on, neither made nor lost
    assert abs(found.carried.sum()) < 1e-15

    def wrong(t: np.ndarray) -> Instants:  # Ṁ one per cent too large: the same test must see it
        M, rate, error = motion(t)
        return M, 1.01 * rate, error

    assert np.abs(integrated_balance(wrong, shells, times).residual).max() > 1e-5


@pytest.mark.parametrize("kind", ["tanh", "layer norm", "linearized"])
def test_batched_instants_are_single_ones(kind: str) -> None:
    net = problem()
    if kind == "layer norm":  # forward mode over reverse mode is wrong there, without a word
        torch.manual_seed(0)
        normed = nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1))
        net = Problem(normed, net.inputs, net.targets)
    if kind == "linearized":
        net = net.linearized(net.theta)
    thetas = torch.stack([net.theta, 1.1 * net.theta])
    for k, parts in enumerate(zip(*instants(net, thetas), strict=True)):
        for one, other in zip(parts, instant(net, thetas[k]), strict=True):
            assert np.abs(one - other).max() < 1e-13


def dense(M: np.ndarray, error: np.ndarray, edge: float, power: int) -> float:
    values, vectors = np.linalg.eigh(M)
    g = vectors.T @ error / np.sqrt(len(error))
    return float(0.5 * (g**2 * values**power / (values**power + edge**power)).sum())


@pytest.mark.parametrize("power", [1, 2, 3, 4, 8])
def test_soft_energies_are_those_of_the_functional_calculus(power: int) -> None:
    M, rate, error = random_instant(12, 4, rank=9)
    edges = [1e-3, 0.05, 1.0, 30.0]
    soft = resolvent_energy(torch.tensor(M), torch.tensor(error), edges, power=power).numpy()
    assert soft == pytest.approx([dense(M, error, a, power) for a in edges], abs=1e-13)
    flux = resolvent_flux(M, rate, error, edges, power=power)
    assert flux.above == pytest.approx(soft, abs=1e-15)
    assert flux.above + flux.below == pytest.approx(np.full(4, 0.5 * np.mean(error**2)), rel=1e-13)
    assert flux.dissipation_above + flux.dissipation_below == pytest.approx(
        np.full(4, error @ M @ error / 12), rel=1e-13
    )


@pytest.mark.parametrize("power", [1, 2, 4, 8])
def test_three_routes_to_the_rate_of_a_soft_energy_agree(power: int) -> None:
    """Forward autodiff of linear solves, the analytic flux without eigenvectors, and Daleckii–Krein with them."""
    M, rate, error = random_instant(12, 5)
    edges = np.geomspace(1e-3, 1.0, 7)
    m, r, e = (torch.tensor(a) for a in (M, rate, error))
    left = jvp(lambda x, y: resolvent_energy(x, y, edges, power=power), (m, e), (r, -m @ e))[
        1
    ].numpy()
    flux, split = (
        resolvent_flux(m, r, e, edges, power=power),
        edge_flux(modes(M, rate, error), edges, power),
    )
    scale = np.abs(left).max()
    # condition λ_max/a of at most 1e3, times p roots: 1e3 · 8 · 2e-16, with room for n = 12 sums
    assert np.abs(left - (flux.total - flux.dissipation_above)).max() < 1e-11 * scale
    assert np.abs(flux.total - split.advective - split.kato).max() < 1e-11 * scale
    assert (
        np.abs(split.kato - flux.dissipation_above - left).max() > 1e-2 * scale
    )  # without the crossing term


def test_matrix_powers_lose_the_digits_that_rotated_resolvents_keep() -> None:
    values = np.geomspace(1e-5, 1, 16)
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
    M, error = (q * values) @ q.T, q.sum(axis=1)
    M = (M + M.T) / 2
    a, p = 1e-4, 4
    B = np.linalg.matrix_power(M / a, p)
    plain = 0.5 * np.mean(error * (B @ np.linalg.solve(B + np.eye(16), error)))
    ours = float(resolvent_energy(torch.tensor(M), torch.tensor(error), [a], power=p)[0])
    exact = float(0.5 / 16 * (values**p / (values**p + a**p)).sum())
    assert abs(ours - exact) < 1e-11 < 1e-6 < abs(plain - exact)


def test_flux_is_positive_where_eigenvalues_rise_and_vanishes_where_nothing_moves() -> None:
    M, error = np.diag([0.1, 0.4]), np.array([1.0, 2.0])
    up = resolvent_flux(M, np.diag([0.0, 3.0]), error, [0.2])
    # ½ σ'(λ) λ̇ g² with σ' = a/(λ + a)², g² = e²/2
    assert up.total[0] == pytest.approx(0.5 * 0.2 / 0.36 * 3.0 * 2.0, rel=1e-13)
    assert resolvent_flux(M, np.zeros((2, 2)), error, [0.2]).total[0] == 0.0
    same = resolvent_flux(0.3 * np.eye(2), np.ones((2, 2)), error, [0.2])  # one eigenvalue twice
    assert same.total[0] == pytest.approx(0.5 * 0.2 / 0.25 * (1 + 2) ** 2 / 2, rel=1e-13)


def test_soft_flux_is_the_rate_of_the_energy_below_an_edge() -> None:
    net = problem()
    motion = moving(net, 1.0)
    h, edges = 1e-2, np.array([0.01, 0.1, 1.0])
    weights = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 0, 4 / 5, -1 / 5, 4 / 105, -1 / 280]) / h
    looks = [
        resolvent_flux(*now, edges) for now in zip(*motion(0.5 + h * np.arange(-4, 5)), strict=True)
    ]
    difference = weights @ np.stack([look.below for look in looks])
    assert np.abs(difference - (-looks[4].total - looks[4].dissipation_below)).max() < 1e-10
    assert (
        np.abs(difference - (looks[4].total - looks[4].dissipation_below)).max() > 1e-3
    )  # the other sign


SQUARE = torch.eye(3, dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: resolvent_energy(SQUARE.float(), ONES, [1.0]), TypeError, "M is torch.float32"),
        (
            lambda: resolvent_energy(SQUARE, ONES.float(), [1.0]),
            TypeError,
            "error is torch.float32",
        ),
        (
            lambda: resolvent_energy(SQUARE, ONES[:2], [1.0]),
            ValueError,
            r"M has shape \(3, 3\); expected \(2, 2\)",
        ),
        (
            lambda: resolvent_energy(SQUARE, ONES, [2.0, 1.0]),
            ValueError,
            r"1.0 after 2.0; .* ascending",
        ),
        (lambda: resolvent_energy(SQUARE, ONES, [0.0]), ValueError, "positive"),
        (lambda: resolvent_energy(SQUARE, ONES, []), ValueError, "ascending"),
        (lambda: resolvent_energy(SQUARE, ONES, [1.0], power=0), ValueError, "power is 0"),
        (
            lambda: resolvent_flux(SQUARE, SQUARE[:2], ONES, [1.0]),
            ValueError,
            r"rate has shape \(2, 3\); expected \(3, 3\)",
        ),
        (lambda: cumulative_flux(np.ones((3, 2))), ValueError, r"shape \(3, 2\)"),
        (lambda: LogShells(np.array([1.0, 0.5])), ValueError, "ascending"),
        (
            lambda: shell_balance(modes(*random_instant(5, 0)), LogShells(np.array([10.0, 20.0]))),
            ValueError,
            "no eigenvalue lies between the edges 10 and 20",
        ),
        (lambda: integrated_balance(logistic, SHELLS, [1.0, 0.0]), ValueError, "ascending order"),
        (lambda: integrated_balance(logistic, SHELLS, [1.0]), ValueError, "two or more"),
        (
            lambda: moving(Problem(Wave(3, 2, 0, nn.ReLU()), torch.ones(4, 2), torch.ones(4)), 1.0),
            ValueError,
            "relu: M\\(t\\) jumps",
        ),
    ],
)
def test_refused_with_a_sentence(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]


def test_a_kernel_that_changes_its_dimension_is_refused() -> None:
    def motion(t: np.ndarray) -> Instants:
        M = np.zeros((len(t), 2, 2))
        M[:, 0, 0], M[:, 1, 1] = 0.5, np.where(t < 0.5, 0.0, 0.1)
        return M, np.zeros_like(M), np.ones((len(t), 2))

    with pytest.raises(ValueError, match=r"kernel of M has \[0, 1\] dimensions"):
        integrated_balance(motion, SHELLS, [0.0, 1.0])
