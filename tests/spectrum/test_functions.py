"""Functions of an operator against dense eigendecompositions, and errors that hold and say something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

from grsd.spectrum import NTK, apply, evolve, log_determinant, ritz, trace
from tests.cases import mlp
from tests.spectrum.test_lanczos import with_spectrum


class Known(Tensor):
    """A matrix that says that it is semidefinite."""

    semidefinite = True


def semidefinite(size: int, seed: int) -> tuple[Tensor, Tensor]:
    eigenvalues = 10 ** np.random.default_rng(seed).uniform(-3, 1, size)
    M, start, _ = with_spectrum(eigenvalues, seed)
    return M.as_subclass(Known), start


@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_residuals_of_ritz_pairs_are_true_and_bound_the_distance_to_an_eigenvalue(
    steps: int,
) -> None:
    M, start, _ = with_spectrum(np.random.default_rng(0).normal(size=60), seed=1)
    values, vectors, residuals = ritz(M, start, steps)
    assert torch.linalg.norm(vectors.T @ vectors - torch.eye(steps)) < 1e-13 * steps
    true = torch.linalg.vector_norm(M @ vectors - vectors * torch.tensor(values), dim=0).numpy()
    assert np.abs(true - residuals).max() < 1e-13 * 3  # rounding of products, in |M| of 3
    spectrum = np.linalg.eigvalsh(M.numpy())
    distance = np.abs(spectrum - values[:, None]).min(axis=1)
    assert (distance <= residuals).all()
    if steps == 30:  # it is no excuse: the top pair has converged
        assert residuals[-1] < 1e-3 < residuals.max()


def test_functions_of_a_matrix_are_those_of_its_eigenvalues() -> None:
    M, u, _ = with_spectrum(np.random.default_rng(2).uniform(-1, 2, 40), seed=2)
    values, V = torch.linalg.eigh(M)
    for f in (np.cos, lambda x: x**3, lambda x: np.stack([np.exp(x), 1 / (x + 3)])):
        weights = torch.tensor(np.asarray(f(values.numpy())))
        truth = ((weights * (V.T @ u)) @ V.T).mT if weights.ndim > 1 else V @ (weights * (V.T @ u))
        for steps in (5, 12, 40):
            value, error = apply(f, M, u, steps)
            assert value.shape == truth.shape
            wrong = torch.linalg.vector_norm(value - truth, dim=0).numpy()
            if steps == 40:
                assert (wrong < 1e-12 * float(torch.linalg.vector_norm(truth))).all()
            # an estimate from one step more: it is of the size of what the step before was wrong by
            assert (wrong <= 3 * error + 1e-12 * float(torch.linalg.vector_norm(truth))).all()
            assert (error < 100 * wrong + 1e-12 * float(torch.linalg.vector_norm(truth))).all()
    cube = apply(lambda x: x**3, M, u, 4)  # degree below m: exact
    assert torch.linalg.vector_norm(cube.value - M @ (M @ (M @ u))) < 1e-13 * 8 * u.norm()


def test_the_bound_of_the_frozen_flow_holds_and_is_not_vacuous() -> None:
    times = np.array([0.0, 0.01, 0.1, 1.0, 10.0, 1e3, 1e6])
    tight = 0
    for seed in range(10):
        M, u = semidefinite(50, seed)
        truth = np.stack([expm(-t * M.numpy()) @ u.numpy() for t in times], axis=1)
        for steps in (1, 3, 8, 16, 50):
            value, error = evolve(M, u, times, steps)
            wrong = np.linalg.norm(value.numpy() - truth, axis=0)
            slack = 1e-13 * float(u.norm())  # of expm itself
            assert (wrong <= error + slack).all()
            assert (error <= 2 * float(u.norm())).all()
            real = wrong > 1e-10 * float(u.norm())  # beyond rounding
            tight += int((error[real] < 30 * wrong[real]).sum()) if steps == 8 else 0
            assert error[0] < 1e-14 * float(u.norm())
            if steps == 16:  # short times converge beyond all orders
                assert error[1] < 1e-12 * float(u.norm())
    assert tight >= 20  # of the 60 at 8 steps: within a factor of 30 of the truth
    one = evolve(M, u, 1.0, 16)
    assert one.value.shape == u.shape and np.ndim(one.error) == 0


def test_the_frozen_flow_of_a_network_is_that_of_its_dense_kernel() -> None:
    model, x, observable = mlp()
    M = NTK(model, x, observable)
    D, times = M.to_dense(), np.array([0.1, 1.0, 10.0])
    value, error = evolve(M, M.error, times, M.shape[0])
    for k, t in enumerate(times):
        truth = torch.linalg.matrix_exp(-t * D) @ M.error
        assert torch.linalg.vector_norm(value[:, k] - truth) <= error[k] + 1e-14 * M.error.norm()
    single = NTK(model.float(), x.float(), observable)
    rough = evolve(single, single.error, times, 24)
    assert torch.linalg.vector_norm(rough.value.double() - value, dim=0).numpy() == pytest.approx(
        np.zeros(3),
        abs=float(rough.error.max() + 1e-5),  # J itself is in float32
    )


def test_of_95_percent_intervals_of_a_trace_95_percent_hold_it() -> None:
    M, _ = semidefinite(40, 3)
    values = np.linalg.eigvalsh(M.numpy())
    cases = {
        "log": (lambda x: np.log(x + 0.01), np.log(values + 0.01).sum()),
        "inverse": (lambda x: 1 / (x + 0.5), (1 / (values + 0.5)).sum()),
    }
    for f, truth in cases.values():
        found = [trace(f, M, samples=8, seed=seed, steps=12) for seed in range(120)]
        share = np.mean([one.interval.contains(truth) for one in found])
        assert 0.90 <= share <= 0.98
        # the probes are what limits it, and the control: without their spread few would hold
        assert all(one.quadrature < one.standard_error for one in found)
        alone = [abs(one.value - truth) <= one.quadrature for one in found]
        assert np.mean(alone) < 0.2


def test_gauss_and_radau_are_on_both_sides_of_the_truth() -> None:
    from grsd.spectrum import lanczos
    from grsd.spectrum.functions import _two_quadratures

    M, u = semidefinite(40, 4)
    values, V = torch.linalg.eigh(M.as_subclass(Tensor))
    weights = ((V.T @ u) ** 2).numpy() / float(u @ u)
    alternating = {
        "log": lambda x: np.log(x + 0.01),
        "inverse": lambda x: 1 / (x + 0.1),
        "exp": lambda x: np.exp(-x),
        "root": np.sqrt,
    }
    for f in alternating.values():
        truth = float(weights @ f(values.numpy()))
        for steps in (1, 2, 5, 10):
            low, high = sorted(_two_quadratures(f, lanczos(M, u, steps)))
            assert low <= truth <= high and high > low


def test_log_determinant_is_that_of_the_dense_matrix() -> None:
    model, x, observable = mlp()
    M = NTK(model, x, observable)
    D = M.to_dense()
    truth = float(torch.logdet(D + 0.1 * torch.eye(len(D))))
    found = log_determinant(M, 0.1, samples=200, seed=0, steps=20)
    assert found.interval.contains(truth) and found.interval.half < 0.2 * abs(truth)
    # of a diagonal matrix signs are exact: every zᵀ f z is the trace
    exact = trace(np.log, torch.diag(torch.arange(1.0, 9.0).double()), samples=2, seed=0, steps=8)
    assert exact.value == pytest.approx(np.log(np.arange(1, 9)).sum(), rel=1e-12)
    assert exact.standard_error < 1e-12


def test_wrong_use_is_refused() -> None:
    M, u, _ = with_spectrum(np.array([-1.0, 0.5, 2.0]), seed=3)
    with pytest.raises(ValueError, match="below zero, so exp"):
        evolve(M, u, 1.0, 3)
    with pytest.raises(ValueError, match="times"):
        evolve(M, u, -1.0, 3)
    with pytest.raises(ValueError, match=r"times have shape \(\) or \(k,\), got \(1, 1\)"):
        evolve(M, u, [[1.0]], 3)
    with pytest.raises(ValueError, match="f is not finite at λ = -1"):
        apply(np.log, M, u, 3)
    with pytest.raises(ValueError, match="f of 3 nodes must give 3 numbers"):
        apply(lambda x: x[:1], M, u, 3)
    with pytest.raises(ValueError, match="samples is 1"):
        trace(np.exp, M, samples=1, seed=0, steps=2)
    with pytest.raises(ValueError, match="shift"):
        log_determinant(M, 0.0, samples=2, seed=0, steps=2)
