"""Products of near-identity matrices: closed forms against sampling, other formulations and extended precision."""

from __future__ import annotations

import itertools
import math
import warnings

import mpmath as mp
import numpy as np
import pytest
import sympy as sp
import torch
from scipy import integrate, special, stats

from grsd.experiments import engine
from grsd.experiments import products as product_experiment
from grsd.renorm.diagnostics import couplings
from grsd.renorm.theorems import increments, products
from grsd.renorm.theorems.increments import Ensemble, Increments
from grsd.renorm.theorems.products import Bulk


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def axis(count: int, n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)[:1].expand(count, n)


# --- Ensembles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", increments.KINDS)
def test_acting_on_a_vector_has_the_law_of_the_matrix(kind: str) -> None:
    law, count = Ensemble(kind, 5), 20_000
    u = torch.randn(5, dtype=torch.float64, generator=seeded(1))
    u = u / u.norm()
    direct = law.matrices(count, seeded(2)) @ u
    short = law.act(u.expand(count, 5), seeded(3))
    probe = torch.linspace(-1, 1, 5, dtype=torch.float64)
    # four directions and the length: p above 1e-4 in five tests passes by chance in all but 5e-4 of the seeds
    for read in (lambda x: x @ u, lambda x: x @ probe, lambda x: x[:, 0], lambda x: x.norm(dim=1)):
        # rounded: uᵀGu is zero for antisymmetric G
        assert (
            stats.ks_2samp(read(direct).numpy().round(12), read(short).numpy().round(12)).pvalue
            > 1e-4
        )
    shifted = Ensemble(kind, 5, torch.outer(probe, u))
    difference = shifted.act(u.expand(4, 5), seeded(4)) - law.act(u.expand(4, 5), seeded(4))
    torch.testing.assert_close(difference, probe.expand(4, 5), atol=1e-14, rtol=0)


def test_ensembles_say_whether_they_are_isotropic_and_refuse_what_they_are_not() -> None:
    assert Ensemble("symmetric", 4).isotropic
    assert Ensemble("ginibre", 3, 2 * torch.eye(3, dtype=torch.float64)).isotropic
    assert not Ensemble(
        "ginibre", 3, torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    ).isotropic
    with pytest.raises(ValueError, match="ensemble is 'wishart'"):
        Ensemble("wishart", 4)
    with pytest.raises(ValueError, match="n is 1"):
        Ensemble("ginibre", 1)
    with pytest.raises(ValueError, match=r"mean has shape \(3, 3\)"):
        Ensemble("ginibre", 4, torch.eye(3))
    for epsilon in (0.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="0 < ε < 1"):
            products.layers(Ensemble("ginibre", 4), epsilon, 2, seeded(0))
    with pytest.raises(ValueError, match="length 1"):
        increments.chain(Ensemble("ginibre", 4), 0.1, 2 * axis(3, 4), [1], seeded(0))
    with pytest.raises(ValueError, match="ascending"):
        increments.chain(Ensemble("ginibre", 4), 0.1, axis(3, 4), [2, 1], seeded(0))


# --- Increments --------------------------------------------------------------------------------------------------------------


def test_the_series_of_the_moments_follow_from_the_expansion_of_the_logarithm() -> None:
    e, g, r, n = sp.symbols("epsilon g r n", positive=True)
    delta = sp.series(sp.log((1 + e * g) ** 2 + e**2 * r**2) / 2, e, 0, 5).removeO()

    def expectation(poly: sp.Expr) -> sp.Expr:  # g ~ N(0, 1/n), n r² ~ χ² with n − 1 degrees
        total = sp.Integer(0)
        for (i, j), c in sp.Poly(sp.expand(poly), g, r).terms():
            chi = sp.prod([(n - 1 + 2 * k) / n for k in range(j // 2)])
            total += (
                0 if i % 2 or j % 2 else c * sp.factorial2(i - 1) / n ** sp.Rational(i, 2) * chi
            )
        return sp.simplify(total)

    mean = expectation(delta)
    truncated = sp.series(sp.expand(delta**2), e, 0, 5).removeO()
    variance = sp.series(expectation(truncated) - mean**2, e, 0, 5).removeO()
    for width, epsilon in ((7, 0.2), (64, 0.05)):
        found = Increments(width, epsilon).series
        at = {n: width, e: sp.Float(epsilon, 30)}
        assert found[0] == pytest.approx(float(mean.subs(at)), rel=1e-12)
        assert found[1] == pytest.approx(float(variance.subs(at)), rel=1e-12)


@pytest.mark.parametrize(("n", "epsilon"), [(3, 0.25), (30, 0.2)])
def test_exact_moments_are_the_integrals_over_the_two_components(n: int, epsilon: float) -> None:
    g, wg = special.roots_hermite(80)
    q, wq = special.roots_genlaguerre(80, (n - 1) / 2 - 1)  # n r²/2
    weight = np.outer(wg, wq) / (wg.sum() * wq.sum())
    along = 1 + epsilon * g * math.sqrt(2 / n)
    delta = 0.5 * np.log(along[:, None] ** 2 + epsilon**2 * 2 * q / n)
    moments = [float((weight * delta**k).sum()) for k in (1, 2)]
    mean, variance = Increments(n, epsilon).exact
    assert mean == pytest.approx(
        moments[0], abs=1e-7
    )  # the logarithm's branch point is 1/ε standard deviations · √n away
    assert variance == pytest.approx(moments[1] - moments[0] ** 2, abs=1e-7)


def test_in_the_plane_the_mean_is_an_exponential_integral() -> None:
    # log|u + z| is harmonic: E δ = E log⁺|εGu| = ½ E₁(1/ε²)
    assert Increments(2, 0.4).exact[0] == pytest.approx(
        0.5 * float(special.exp1(1 / 0.16)), rel=1e-6
    )


def test_sampled_moments_agree_and_a_wrong_width_is_seen() -> None:
    m, n, eps = 60_000, 20, 0.3
    found = increments.moments(
        increments.chain(Ensemble("ginibre", n), eps, axis(m, n), [1], seeded(5)).growth[0]
    )
    mean, variance = Increments(n, eps).exact
    assert abs(found.mean - mean) < 4.5 * found.mean_error
    assert abs(found.variance - variance) < 4.5 * found.variance_error
    assert found.variance_error == pytest.approx(
        variance * math.sqrt(2 / m), rel=0.1
    )  # nearly Gaussian
    assert abs(found.variance - Increments(2 * n, eps).exact[1]) > 50 * found.variance_error
    draws = Increments(n, eps).total(1)
    assert found.second == pytest.approx(variance + mean**2, rel=0.03)
    assert draws.mass.sum() == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="number of samples is 1"):
        increments.moments(torch.ones(1))


@pytest.mark.parametrize(("n", "epsilon"), [(2, 0.9), (9, 0.5), (64, 0.3)])
def test_the_law_of_a_step_is_the_integral_of_its_density(n: int, epsilon: float) -> None:
    kappa, order = mp.mpf(n) / mp.mpf(epsilon) ** 2, mp.mpf(n) / 2 - 1

    def density(x: mp.mpf) -> mp.mpf:  # of non-central χ², by its Bessel function
        return (
            mp.exp(-(mp.sqrt(x) - mp.sqrt(kappa)) ** 2 / 2) * mp.exp(-mp.sqrt(x * kappa))
            * (x / kappa) ** (order / 2) * mp.besseli(order, mp.sqrt(kappa * x)) / 2
        )  # fmt: skip

    mean, variance = Increments(n, epsilon).exact
    delta = mean + math.sqrt(variance) * np.array([-3.0, -1.0, 0.3, 2.5])
    with mp.workdps(25):
        ends = [mp.mpf(0), *(kappa * mp.exp(2 * mp.mpf(one)) for one in delta)]
        wanted = np.cumsum([float(mp.quad(density, pair)) for pair in itertools.pairwise(ends)])
    assert np.abs(Increments(n, epsilon).cdf(delta) - wanted).max() < 1e-13


def test_ten_thousand_layers_overflow_nothing() -> None:
    # SciPy 1.16.3's ncx2.cdf raises OverflowError on these edges, which reach 375 standard deviations of one step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law = Increments(64, 0.3).total(10_000)
        far = Increments(2, 0.9).cdf(np.array([-1e4, -50.0, 0.0, 50.0, 1e4]))
    assert law.mass.sum() == pytest.approx(1, abs=1e-12)
    one = Increments(64, 0.3).total(1)  # `edgeworth` has the skewness to leading order in ε only
    skewness = float(one.mass @ (one.edges - (one.edges[1] - one.edges[0]) / 2) ** 3) / one.sigma**3
    edgeworth = abs(skewness) / (6 * math.sqrt(2 * math.pi * 10_000))
    assert law.kolmogorov == pytest.approx(edgeworth, rel=0.01)  # to 1/√L
    assert far[[0, 1, 3, 4]].tolist() == [0, 0, 1, 1] and 0 < far[2] < 1


def test_antisymmetric_layers_have_no_variance_at_second_order() -> None:
    variance = {}
    for eps in (0.2, 0.1):
        run = increments.chain(Ensemble("antisymmetric", 10), eps, axis(20_000, 10), [1], seeded(6))
        variance[eps] = increments.moments(run.growth[0]).variance
    # δ = ½ log(1 + ε²r²), 10 r² ~ χ²₉: ε⁴ · 18/400 (1 − 2ε²E(r⁴·r²-type terms) …); the correction is below 10 % here
    assert variance[0.1] == pytest.approx(1e-4 * 18 / 400, rel=0.1)
    assert 13 < variance[0.2] / variance[0.1] < 17


def test_sums_by_convolution_agree_with_sampling_and_with_the_variance() -> None:
    n, eps, layers, m = 4, 0.4, 2, 40_000
    law = Increments(n, eps).total(layers)
    centres = law.edges - 0.5 * (law.edges[1] - law.edges[0])
    assert float(law.mass @ centres) == pytest.approx(0, abs=1e-6)
    # rounding to cells of σ/64 adds dx²/12 per increment: 2e-5
    assert float(law.mass @ centres**2) == pytest.approx(law.sigma**2, rel=5e-5)
    sums = (
        increments.chain(Ensemble("ginibre", n), eps, axis(m, n), [layers], seeded(7))
        .growth[0]
        .numpy()
    )
    sums = sums - layers * Increments(n, eps).exact[0]
    ks = stats.kstest(sums, lambda x: np.interp(x, law.edges, np.cumsum(law.mass))).statistic
    assert ks < 1.63 / math.sqrt(m)
    assert stats.kstest(sums, stats.norm(scale=law.sigma).cdf).statistic > 1.63 / math.sqrt(
        m
    )  # skewness is seen


def test_kolmogorov_distances_fall_like_the_edgeworth_term() -> None:
    law = Increments(16, 0.1)
    for layers in (4, 64, 1024):
        assert law.total(layers).kolmogorov == pytest.approx(law.edgeworth(layers), rel=0.02)
    assert law.total(64).kolmogorov > 2.9 * Increments(16, 0.1 / 3).total(64).kolmogorov
    with pytest.raises(ValueError, match="layers is 0"):
        law.total(0)


def test_flatness_takes_the_square_of_shift_over_tolerance() -> None:
    law = Increments(8, 0.3)
    depth = 0.5**2 / (2 * math.pi * law.exact[1] * 0.05**2)  # small η
    normal = 2 * stats.norm.cdf(0.5 / (2 * math.sqrt(law.exact[1] * depth))) - 1
    assert normal == pytest.approx(0.05, rel=0.01)  # the next order is η²π/12 of it
    assert law.total(round(depth)).shift(0.5) == pytest.approx(normal, rel=0.02)
    assert law.total(round(depth / 4)).shift(0.5) == pytest.approx(2 * normal, rel=0.02)


# --- Directions --------------------------------------------------------------------------------------------------------------


def test_the_harmonics_of_one_step_are_averages_of_gegenbauer_polynomials() -> None:
    m = 200_000
    for n, eps in ((5, 0.6), (40, 0.3)):
        law = Increments(n, eps)
        cos = (
            increments.chain(Ensemble("ginibre", n), eps, axis(m, n), [1], seeded(8))
            .directions[0][:, 0]
            .numpy()
        )
        for k in (1, 2, 3):
            sample = special.eval_gegenbauer(k, n / 2 - 1, cos) / special.eval_gegenbauer(
                k, n / 2 - 1, 1.0
            )
            assert abs(sample.mean() - law.harmonic(k)) < 4.5 * sample.std() / math.sqrt(m)
    small = Increments(12, 0.02)
    k = np.arange(1, 6)
    np.testing.assert_allclose(1 - small.harmonic(k), 0.02**2 * k * (k + 10) / 24, rtol=0.02)
    near = [
        Increments(10, eps).harmonic(np.arange(1, 9)) for eps in (0.28, 0.29)
    ]  # the two branches meet at κ/2 = 60
    np.testing.assert_allclose(near[0], near[1], rtol=0.2)
    x, kk = 10 / 0.28**2 / 2, np.arange(1.0, 9.0)
    direct = [
        float(mp.hyp1f1(j / 2, 5 + j, -x) * x ** (j / 2) * mp.gamma((10 + j) / 2) / mp.gamma(5 + j))
        for j in kk
    ]
    np.testing.assert_allclose(near[0], direct, rtol=1e-12)


def test_the_distance_to_uniform_agrees_with_sampling() -> None:
    n, eps, layers, m = 8, 0.3, 30, 20_000
    law = Increments(n, eps)
    run = increments.chain(Ensemble("ginibre", n), eps, axis(m, n), [layers], seeded(9))
    overlap = run.directions[0][:, 0].numpy()
    assert abs(overlap.mean() - law.overlap(layers)) < 4.5 * overlap.std() / math.sqrt(m)
    uniform = stats.beta((n - 1) / 2, (n - 1) / 2, loc=-1, scale=2)
    # the densities cross once, so that Kolmogorov's distance is total variation; 1.63/√m at 1 %
    assert abs(
        stats.kstest(overlap, uniform.cdf).statistic - law.mixing(layers)
    ) < 1.63 / math.sqrt(m)
    assert law.mixing(10 * layers) < 0.01 * law.mixing(layers)
    with pytest.raises(ValueError, match="too far from mixed"):
        Increments(400, 0.1).mixing(10)
    with pytest.raises(ValueError, match="n is 2"):
        Increments(2, 0.1).mixing(1000)


def test_mixing_takes_log_n() -> None:
    times = {n: Increments(n, 0.05).mixing_time(0.01) for n in (256, 2048)}
    assert times[2048] - times[256] == pytest.approx(math.log(8), abs=0.1)
    for n, t in times.items():
        assert t == pytest.approx(math.log(n) + 2 * math.log(100) - math.log(2 * math.pi), abs=0.1)
        assert Increments(n, 0.05).mixing(round(t / 0.0025)) == pytest.approx(0.01, rel=0.01)
    assert Increments(8, 0.05).mixing_time(0.85) < 1
    with pytest.raises(ValueError, match="eta is 1"):
        Increments(8, 0.05).mixing_time(1)


# --- Spectra -----------------------------------------------------------------------------------------------------------------


def test_graded_products_keep_singular_values_that_float64_loses() -> None:
    n, count = 6, 60
    matrices = products.layers(Ensemble("ginibre", n), 0.9, count, seeded(11))
    with mp.workdps(60):
        product = mp.eye(n)
        for matrix in matrices:
            product = mp.matrix(matrix.tolist()) * product
        exact = np.array(
            [float(2 * mp.log(value)) for value in mp.svd_r(product, compute_uv=False)]
        )[::-1]
    found = products.graded(matrices, every=4)
    # relative accuracy of every σ: a few roundings per factor
    np.testing.assert_allclose(found, exact, atol=1e-11)
    plain = torch.eye(n, dtype=torch.float64)
    for matrix in matrices:
        plain = matrix @ plain
    lost = 2 * torch.linalg.svdvals(plain).log().flip(0).numpy()
    assert (
        exact[-1] - exact[0] > 72 and np.abs(lost - exact).max() > 1e-3
    )  # the control: beyond 1e-16 nothing is left
    with pytest.raises(ValueError, match="every is 0"):
        products.Graded(0)
    with pytest.raises(ValueError, match="no matrix"):
        products.graded([])
    with pytest.raises(ValueError, match=r"expected \(n, n\) in float64"):
        products.graded([torch.eye(3)])


def test_a_graded_product_can_be_read_on_its_way() -> None:
    matrices = products.layers(Ensemble("rank_one", 9), 0.5, 21, seeded(12))
    run = products.Graded(every=4)
    for index, matrix in enumerate(matrices, start=1):
        run.apply(matrix)
        if index in (3, 10, 21):
            svd = torch.linalg.svdvals(
                torch.linalg.multi_dot(
                    [torch.eye(9, dtype=torch.float64), *matrices[:index].flip(0)]
                )
            )
            np.testing.assert_allclose(run.spectrum(), 2 * svd.log().flip(0).numpy(), atol=1e-12)


@pytest.mark.parametrize("t", [0.05, 1.0, 6.0])
def test_the_limit_law_has_the_moments_of_the_free_product(t: float) -> None:
    bulk = Bulk(t)
    s = np.linspace(-bulk.edge, bulk.edge, 40_001)
    rho = bulk.density(s)
    moment = [float(integrate.trapezoid(rho * np.exp(k * s), s)) for k in (0, 1, 2, -1)]
    # E λ = e^t, E λ² = (1 + 2t)e^{2t}; the law is symmetric in s; linear interpolation on 4000 points
    expected = [1.0, math.exp(t), (1 + 2 * t) * math.exp(2 * t), math.exp(t)]
    np.testing.assert_allclose(moment, expected, rtol=1e-4)
    assert float(bulk.density(np.array(0.0))) == pytest.approx(bulk.centre, rel=1e-6)
    assert float(bulk.density(np.array(1.01 * bulk.edge))) == 0
    for at in (
        0.3,
        0.8,
    ):  # the defining equation, by Newton from nowhere: log ψ − log(1 + ψ) − t(1 + 2ψ) = −s
        z = mp.findroot(
            lambda z, at=at: mp.log(z) - mp.log(1 + z) - t * (1 + 2 * z) + at * bulk.edge,
            mp.mpc(
                -0.5 + at * 0.5 * math.sqrt(1 + 2 / t), math.pi * bulk.centre * math.sqrt(1 - at**2)
            ),
        )
        assert float(bulk.density(np.array(at * bulk.edge))) == pytest.approx(
            abs(float(z.imag)) / math.pi, rel=1e-4
        )


def test_large_products_follow_the_limit_law_and_not_that_of_another_time() -> None:
    t, eps, n = 2.0, 0.2, 80
    spectra = [
        products.graded(products.layers(Ensemble("ginibre", n), eps, 50, seeded(s)))
        for s in (13, 14, 15)
    ]
    s = np.sort(np.concatenate(spectra))

    def distance(time: float) -> float:
        grid = np.linspace(-12, 12, 4001)
        cdf = np.cumsum(Bulk(time).density(grid)) * (grid[1] - grid[0])
        return float(np.abs(np.interp(s, grid, cdf) - (np.arange(len(s)) + 0.5) / len(s)).max())

    assert distance(t) < 0.03  # eigenvalues repel: far below 1.36/√240 = 0.09
    assert distance(1.5) > 0.045
    flat = Bulk(20.0)
    assert flat.flatness(4.0) == pytest.approx(16 / (2 * 20.0**3), rel=0.35)
    assert Bulk(0.2).flatness(2.0) > 0.3
    with pytest.raises(ValueError, match="t is 0"):
        Bulk(0)


def test_lyapunov_exponents_are_equally_spaced_and_start_at_the_mean_increment() -> None:
    n, eps = 3, 0.15
    assert products.lyapunov_exponents(n, eps)[0] == pytest.approx(
        Increments(n, eps).series[0], rel=0.02
    )
    matrices = products.layers(Ensemble("ginibre", n), eps, 60_000, seeded(16))
    r = (
        torch.linalg.qr(matrices)[1].diagonal(dim1=1, dim2=2).abs().log()
    )  # isotropic: one layer is enough
    gap = r.mean(0).numpy() - products.lyapunov_exponents(n, eps)
    assert np.all(np.abs(gap) < 4.5 * r.std(0).numpy() / math.sqrt(60_000) + eps**4)
    mean, error = products.lyapunov(matrices[:4000], skip=10)
    assert np.all(np.abs(mean - products.lyapunov_exponents(n, eps)) < 4.5 * error + eps**4)
    determinant = torch.linalg.slogdet(matrices[10:4000])[1].mean()
    assert mean.sum() == pytest.approx(float(determinant), abs=1e-12)
    with pytest.raises(ValueError, match="two or more"):
        products.lyapunov(matrices[:3], skip=2)


# --- Couplings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", increments.KINDS)
def test_the_depth_kernel_is_the_mean_square_of_one_more_layer(kind: str) -> None:
    n, m, eps = 6, 20_000, 0.1
    s = torch.linspace(-2, 2, n, dtype=torch.float64)
    phi = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded(17)))[0]
    M = phi @ torch.diag(s.exp()) @ phi.mT
    G = Ensemble(kind, n).matrices(m, seeded(18))
    X = eps * (phi.mT @ (G @ M + M @ G.mT) @ phi) / torch.exp((s[:, None] + s[None, :]) / 2)
    u, v = np.triu_indices(n, 1)
    square = X.square().numpy()[:, u, v]
    kernel = products.depth_kernel((s[None, :] - s[:, None]).numpy(), Ensemble(kind, n), eps)[u, v]
    assert np.all(np.abs(square.mean(0) - kernel) < 4.5 * square.std(0) / math.sqrt(m))
    with pytest.raises(ValueError, match="has a mean"):
        products.depth_kernel(np.zeros(2), Ensemble(kind, n, torch.eye(n)), eps)


def test_the_training_kernel_is_the_mean_square_over_drawn_updates() -> None:
    n, depth, m = 5, 4, 40_000
    layers = products.layers(Ensemble("ginibre", n), 0.7, depth, seeded(19))
    P = layers[3] @ layers[2] @ layers[1] @ layers[0]
    update = torch.randn(m, depth, n, n, dtype=torch.float64, generator=seeded(20))
    rate = torch.zeros(m, n, n, dtype=torch.float64)
    for k in range(depth):
        moved = update[:, k]
        for other in range(depth):  # J_1 … J_{k−1} from the right, the rest from the left
            moved = (
                moved @ layers[k - 1 - other]
                if other < k
                else layers[other] @ moved
                if other > k
                else moved
            )
        rate += moved
    values, phi = torch.linalg.eigh(P @ P.mT)
    X = phi.mT @ (rate @ P.mT + P @ rate.mT) @ phi / torch.sqrt(values[:, None] * values)
    square = X.square().numpy()
    found = products.training_kernel(layers)
    np.testing.assert_allclose(found.s, values.log().numpy(), atol=1e-10)
    assert np.all(np.abs(square.mean(0) - found.kernel) < 4.5 * square.std(0) / math.sqrt(m))
    np.testing.assert_allclose(
        found.couplings**2 / np.exp(found.s[:, None] + found.s), found.kernel
    )


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_equal_layers_lose_one_layer_in_their_number(depth: int) -> None:
    n = 24
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded(21)))[0]
    spread = torch.linspace(-1.5, 2.0, n, dtype=torch.float64)
    found = products.training_kernel(
        (q @ torch.diag((spread / depth).exp()) @ q.T).expand(depth, n, n)
    )
    np.testing.assert_allclose(found.s, 2 * spread.numpy(), atol=1e-12)
    u, v = np.triu_indices(n, 1)
    place, distance = (found.s[u] + found.s[v]) / 2, found.s[v] - found.s[u]
    k: np.ndarray = np.arange(1, depth + 1)[:, None]
    closed = 2 * np.cosh((2 * k - 1) / (2 * depth) * distance).sum(axis=0) * np.exp(-place / depth)
    np.testing.assert_allclose(found.kernel[u, v], closed, rtol=1e-9)
    shift = couplings.shift_invariance(np.exp(found.s), found.couplings, window=(0, 1))
    assert shift.slope == pytest.approx(-1 / depth, abs=1e-4)


def test_training_kernels_scale_and_refuse_products_that_are_rounding() -> None:
    layers = products.layers(Ensemble("ginibre", 12), 0.4, 5, seeded(22))
    one, other = products.training_kernel(layers), products.training_kernel(layers * 3 ** (1 / 5))
    np.testing.assert_allclose(other.s - one.s, 2 * math.log(3), rtol=1e-12)
    np.testing.assert_allclose(other.kernel, one.kernel * 3 ** (-2 / 5), rtol=1e-10)
    with pytest.raises(ValueError, match="smallest are rounding"):
        products.training_kernel(Ensemble("ginibre", 24).matrices(12, seeded(23)))
    with pytest.raises(ValueError, match=r"expected \(L, n, n\)"):
        products.training_kernel(torch.eye(3))


# --- The stored experiment ---------------------------------------------------------------------------------------------------


def test_the_experiment_runs_small_and_agrees_with_the_limit_law() -> None:
    experiment = engine.find("products")
    asked = product_experiment.Parameters(
        sizes=(48,), times=(0.5, 2.0), epsilon=0.25, widths=(40,), depths=(1, 4), seeds=3
    )
    listed = experiment.pieces(asked)
    data = experiment.reduce(asked, listed, [experiment.measure(piece) for piece in listed])
    for row in data["spectra"]:
        # ε² = 0.06 lowers log‖P‖ by that share, and the edge lies n^(−2/3) inside
        assert row["log_norm"] == pytest.approx(row["limit_log_norm"], rel=0.15)
        assert row["gap"] == pytest.approx(row["limit_gap"], rel=0.15)
    slopes = {(r["stack"], r["depth"]): r["whole_slope"] for r in data["training"]}
    assert slopes["plain", 1] == pytest.approx(-1, abs=1e-4)
    assert slopes["residual", 4] == pytest.approx(-0.3, abs=0.05)
    assert len(data["spectra"][-1]["density"]) == product_experiment.BINS
    assert experiment.table(data)[0][0] == "n"
    with pytest.raises(ValueError, match="seeds is 1"):
        product_experiment.Parameters(seeds=1)
    with pytest.raises(ValueError, match=r"times\[1\] is 1.0 after 2.0"):
        product_experiment.Parameters(times=(2.0, 1.0))
