"""Test loss: its exact rate for any network, and models with fixed features solved exactly.

A training sample has n points, a test sample m; conventions are those of
:mod:`grsd.dynamics.problem`. The mismatch of the two samples and the transport model of the test
loss are in the chapter on double descent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from grsd import checks
from grsd.dynamics.modes import as_array
from grsd.dynamics.problem import Problem, Vector

__all__ = ["FixedFeatures", "heldout_rate", "kernel_between"]


def kernel_between(rows: Problem, columns: Problem, theta: Vector) -> np.ndarray:
    """Return K = J_rows J_columnsᵀ, (m, n), without a factor 1/n. Cost: two Jacobians."""
    if rows.theta.shape != columns.theta.shape:
        raise ValueError(
            f"the problems have {len(rows.theta)} and {len(columns.theta)} parameters; make the "
            "second with Problem.on, so that both are the same network"
        )
    return (rows.jacobian(theta) @ columns.jacobian(theta).T).cpu().numpy()


def heldout_rate(train: Problem, test: Problem, theta: Vector) -> float:
    """Return dL_te/dt along gradient flow of the training loss, at θ.

    L̇_te = −⟨J_te∗ e_te, J_tr∗ e_tr⟩ = −e_teᵀ K_te,tr e_tr/(m n) = −∇L_te·∇L_tr holds for every
    differentiable network; its sign is free. Cost: two Jacobians. Source: replaces 2512.10427,
    sections 6.1–6.2, where test and training loss share one operator.
    """
    cross = kernel_between(test, train, theta)
    e_te, e_tr = test.error(theta).cpu().numpy(), train.error(theta).cpu().numpy()
    return -float(e_te @ cross @ e_tr) / (test.samples * train.samples)


@dataclass(frozen=True)
class FixedFeatures:
    """A model f = f₀ + Φ d, linear in d, trained from d = 0 by gradient flow: Ṁ = 0, all is exact.

    Attributes
    ----------
    train_features, test_features : (n, P) and (m, P) float64
        Φ on the two samples; the Jacobians at θ₀ for a linearised network.
    train_error, test_error : (n,) and (m,) float64
        Target minus output at d = 0.

    Notes
    -----
    With Φ_tr/√n = U diag(s) Vᵀ: λ_u = s_u², φ_u = √n U_u on the training samples, and ψ_u = Φ_te
    V_u/s_u is the same function on the test samples (its Nyström extension). Then g_u(t) = g_u(0)
    e^{−λ_u t} and e_te(t) = residual + Σ_u g_u(t) ψ_u. Cost: one singular value decomposition.
    """

    train_features: np.ndarray
    train_error: np.ndarray
    test_features: np.ndarray
    test_error: np.ndarray

    def __post_init__(self) -> None:
        columns: int | str = "P"
        for sample in ("train", "test"):
            features, error = f"{sample}_features", f"{sample}_error"
            phi = as_array(features, getattr(self, features), ("n", columns))
            e = as_array(error, getattr(self, error), (len(phi),))
            if not phi.size:
                raise ValueError(f"{features} has shape {phi.shape}: it is empty, and has no mean")
            columns = phi.shape[1]  # the same functions on both samples
            object.__setattr__(self, features, phi)
            object.__setattr__(self, error, e)
        if not self.train_features.any():
            raise ValueError("train_features are all zero: M = 0 and nothing is ever learned")

    @classmethod
    def tangent(cls, train: Problem, test: Problem, theta: Vector) -> FixedFeatures:
        """Return the network's tangent model at θ: the kernel frozen, the error as it is there."""
        parts = (train.jacobian(theta), train.error(theta), test.jacobian(theta), test.error(theta))
        return cls(*(part.detach().cpu().numpy() for part in parts))

    @cached_property
    def _svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, p = self.train_features.shape
        u, s, vt = np.linalg.svd(self.train_features / np.sqrt(n), full_matrices=False)
        keep = s > max(n, p) * np.finfo(float).eps * s[0]  # the rest is rounding: ker M
        return u[:, keep], s[keep], vt[keep]

    @property
    def eigenvalues(self) -> np.ndarray:
        """λ_u > 0 of M, (r,), descending."""
        return self._svd[1] ** 2

    @property
    def train_modes(self) -> np.ndarray:
        """φ_u on the training samples, (n, r); orthonormal in L² of that sample."""
        return self._svd[0] * np.sqrt(len(self.train_error))

    @cached_property
    def test_modes(self) -> np.ndarray:
        """ψ_u, the same functions on the test samples, (m, r)."""
        _, s, vt = self._svd
        return self.test_features @ vt.T / s

    def coefficients(self, times: np.ndarray | float = 0.0) -> np.ndarray:
        """Return g_u(t) = g_u(0) e^{−λ_u t}, (K, r); a time may be infinite."""
        t = np.atleast_1d(np.asarray(times, dtype=np.float64))
        checks.between("times", t, 0, np.inf, "[]", "times must be 0 or later")
        start = self._svd[0].T @ self.train_error / np.sqrt(len(self.train_error))
        return start * np.exp(-np.outer(t, self.eigenvalues))

    @cached_property
    def residual(self) -> np.ndarray:
        """The part of the test error that training never changes, (m,): the error at t = ∞."""
        return self.test_error - self.test_modes @ self.coefficients()[0]

    def test_errors(self, times: np.ndarray | float) -> np.ndarray:
        """Return e_te(t), (K, m)."""
        learned = self.coefficients() - self.coefficients(times)
        return self.test_error - learned @ self.test_modes.T

    def train_losses(self, times: np.ndarray | float) -> np.ndarray:
        """Return L_tr(t) = ½⟨e, e⟩, (K,); energy in ker M included."""
        start = self.coefficients()[0]
        lost = 0.5 * max(float(np.mean(self.train_error**2) - start @ start), 0.0)
        return 0.5 * (self.coefficients(times) ** 2).sum(axis=1) + lost

    def test_losses(self, times: np.ndarray | float) -> np.ndarray:
        """Return L_te(t), (K,)."""
        return 0.5 * (self.test_errors(times) ** 2).mean(axis=1)

    def test_rates(self, times: np.ndarray | float) -> np.ndarray:
        """Return dL_te/dt, (K,), exactly: −⟨e_te, Σ_u λ_u g_u ψ_u⟩."""
        falling = (self.coefficients(times) * self.eigenvalues) @ self.test_modes.T
        return -(self.test_errors(times) * falling).mean(axis=1)
