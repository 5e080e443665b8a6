"""Test loss: its exact rate for any network, models with fixed features solved exactly, and the mismatch of two samples.

The transport model of the test loss is in :mod:`grsd.dynamics.mismatch_window`. Conventions are those of :mod:`grsd.dynamics.flow`;
a training sample has n points, a test sample m.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from grsd.dynamics.flow import Problem, Vector

__all__ = [
    "FixedFeatures",
    "heldout_rate",
    "joint",
    "kernel_between",
    "mismatch",
    "rise",
    "shell_weight",
    "turning_points",
]

Array = Tensor | np.ndarray


def _array(a: Array, name: str, ndim: int) -> np.ndarray:
    found = np.asarray(a.detach().cpu().numpy() if isinstance(a, Tensor) else a)
    if found.dtype != np.float64:
        raise TypeError(
            f"{name} is {found.dtype}; test-loss identities are computed in float64, convert it first"
        )
    if found.ndim != ndim:
        raise ValueError(
            f"{name} has shape {found.shape}; expected {ndim} dimension{'s' * (ndim > 1)}"
        )
    if not found.size:
        raise ValueError(f"{name} has shape {found.shape}: it is empty, and no mean over it exists")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds values that are not finite")
    return found


# --- Any network ----------------------------------------------------------------------------------


def kernel_between(rows: Problem, columns: Problem, theta: Vector) -> np.ndarray:
    """Return K = J_rows J_columnsᵀ, (m, n), without a factor 1/n. Cost: two Jacobians."""
    if rows.theta.shape != columns.theta.shape:
        raise ValueError(
            f"the two problems have {len(rows.theta)} and {len(columns.theta)} parameters; make the second with Problem.on, "
            "so that both are the same network"
        )
    a, b = rows.jacobian(theta), columns.jacobian(theta)
    found: np.ndarray = (a @ b.T).cpu().numpy()
    return found


def heldout_rate(train: Problem, test: Problem, theta: Vector) -> float:
    """Return dL_te/dt along gradient flow of the training loss, at θ.

    L̇_te = −⟨J_te∗ e_te, J_tr∗ e_tr⟩ = −e_teᵀ K_te,tr e_tr/(m n), with m test and n training samples. It equals
    −∇L_te·∇L_tr, and holds for every differentiable network; its sign is free.

    Cost: two Jacobians. Source: replaces 2512.10427, sections 6.1–6.2, where test and training loss share one operator.
    """
    cross = kernel_between(test, train, theta)
    e_te, e_tr = test.error(theta).cpu().numpy(), train.error(theta).cpu().numpy()
    return -float(e_te @ cross @ e_tr) / (test.samples * train.samples)


def joint(train: Problem, test: Problem, theta: Vector) -> tuple[np.ndarray, np.ndarray]:
    """Return the operator A with ė = −A e on train ∪ test, and e itself; training samples come first.

    A = K P_tr, where K (n + m, n + m) is J Jᵀ over all samples and P_tr is 1/n on the training samples and 0 on the test
    samples. A is not symmetric, and no positive weights on the samples make it so unless K_te,tr = 0.

    Returns
    -------
    operator : (n + m, n + m) float64
    error : (n + m,) float64
    """
    k_tr, k_te = kernel_between(train, train, theta), kernel_between(test, train, theta)
    n, m = train.samples, test.samples
    operator = np.zeros((n + m, n + m))
    operator[:n, :n], operator[n:, :n] = k_tr / n, k_te / n
    return operator, np.concatenate(
        [train.error(theta).cpu().numpy(), test.error(theta).cpu().numpy()]
    )


# --- Fixed features: gradient flow in closed form -------------------------------------------------


@dataclass(frozen=True)
class FixedFeatures:
    """A model f = f₀ + Φ d that is linear in d, trained from d = 0 by gradient flow: Ṁ = 0, and everything is exact.

    Attributes
    ----------
    train_features, test_features : (n, P) and (m, P) float64
        Φ on the two samples; the Jacobians at θ₀ for a linearised network.
    train_error, test_error : (n,) and (m,) float64
        Target minus output at d = 0.

    Notes
    -----
    With Φ_tr/√n = U diag(s) Vᵀ: λ_u = s_u², φ_u = √n U_u on the training samples, and ψ_u = Φ_te V_u/s_u is the same
    function on the test samples (its Nyström extension). Then g_u(t) = g_u(0) e^{−λ_u t} and
    e_te(t) = residual + Σ_u g_u(t) ψ_u: the residual never moves. Cost: one singular value decomposition, when first used;
    then O(m r) per time, with r the rank.
    """

    train_features: np.ndarray
    train_error: np.ndarray
    test_features: np.ndarray
    test_error: np.ndarray

    def __post_init__(self) -> None:
        for name, ndim in (
            ("train_features", 2),
            ("train_error", 1),
            ("test_features", 2),
            ("test_error", 1),
        ):
            object.__setattr__(self, name, _array(getattr(self, name), name, ndim))
        for one, other in (("train_features", "train_error"), ("test_features", "test_error")):
            rows, entries = len(getattr(self, one)), len(getattr(self, other))
            if rows != entries:
                raise ValueError(
                    f"{one} has {rows} rows and {other} has {entries} entries; they must be the same samples"
                )
        if self.train_features.shape[1] != self.test_features.shape[1]:
            raise ValueError(
                f"{self.train_features.shape[1]} features on the training samples and {self.test_features.shape[1]} on the "
                "test samples; they must be the same functions"
            )

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
        keep = (
            s > max(n, p) * np.finfo(float).eps * s[0]
        )  # below it a singular value is rounding: ker M
        return u[:, keep], s[keep], vt[keep]

    @property
    def eigenvalues(self) -> np.ndarray:
        """λ_u > 0 of M, (r,), descending."""
        found: np.ndarray = self._svd[1] ** 2
        return found

    @property
    def train_modes(self) -> np.ndarray:
        """φ_u on the training samples, (n, r); orthonormal in L² of that sample."""
        found: np.ndarray = self._svd[0] * np.sqrt(len(self.train_error))
        return found

    @cached_property
    def test_modes(self) -> np.ndarray:
        """ψ_u, the same functions on the test samples, (m, r)."""
        _, s, vt = self._svd
        found: np.ndarray = self.test_features @ vt.T / s
        return found

    def coefficients(self, times: np.ndarray | float = 0.0) -> np.ndarray:
        """Return g_u(t) = g_u(0) e^{−λ_u t}, (K, r); a time may be infinite."""
        t = np.atleast_1d(np.asarray(times, dtype=np.float64))
        if not (t >= 0).all():
            raise ValueError(f"times must be 0 or later, got {t!r}")
        start = self._svd[0].T @ self.train_error / np.sqrt(len(self.train_error))
        found: np.ndarray = start * np.exp(-np.outer(t, self.eigenvalues))
        return found

    @cached_property
    def residual(self) -> np.ndarray:
        """The part of the test error that training never changes, (m,): the error of the limit t = ∞."""
        found: np.ndarray = self.test_error - self.test_modes @ self.coefficients()[0]
        return found

    def test_errors(self, times: np.ndarray | float) -> np.ndarray:
        """Return e_te(t), (K, m)."""
        learned = self.coefficients() - self.coefficients(times)
        found: np.ndarray = self.test_error - learned @ self.test_modes.T
        return found

    def train_losses(self, times: np.ndarray | float) -> np.ndarray:
        """Return L_tr(t) = ½⟨e, e⟩, (K,); energy in ker M included."""
        start = self.coefficients()[0]
        lost = 0.5 * max(float(np.mean(self.train_error**2) - start @ start), 0.0)
        found: np.ndarray = 0.5 * (self.coefficients(times) ** 2).sum(axis=1) + lost
        return found

    def test_losses(self, times: np.ndarray | float) -> np.ndarray:
        """Return L_te(t), (K,)."""
        found: np.ndarray = 0.5 * (self.test_errors(times) ** 2).mean(axis=1)
        return found

    def test_rates(self, times: np.ndarray | float) -> np.ndarray:
        """Return dL_te/dt, (K,), exactly: −⟨e_te, Σ_u λ_u g_u ψ_u⟩."""
        falling = (self.coefficients(times) * self.eigenvalues) @ self.test_modes.T
        found: np.ndarray = -(self.test_errors(times) * falling).mean(axis=1)
        return found


# --- Shapes of a curve ----------------------------------------------------------------------------


def rise(losses: np.ndarray) -> float:
    """Return the largest L(t)/L(s) over s ≤ t: 1 for a curve that never rises."""
    curve = _array(losses, "losses", 1)
    if not (curve > 0).all():
        raise ValueError(
            f"losses must be positive to have a ratio; the smallest is {curve.min():.3g}"
        )
    return float((curve / np.minimum.accumulate(curve)).max())


def turning_points(losses: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """Return the first value, every turning point and the last value of a curve.

    A turn counts once the curve has come back by more than `tolerance` of its value. Down–up–down has four entries.
    """
    curve = _array(losses, "losses", 1)
    found, extreme, way = [float(curve[0])], float(curve[0]), 0
    for value in map(float, curve[1:]):
        if way * (value - extreme) > 0:
            extreme = value
        elif abs(value - extreme) > tolerance * abs(extreme):
            if way:
                found.append(extreme)
            way, extreme = (1 if value > extreme else -1), value
    return np.array([*found, extreme])


# --- The mismatch of two samples ------------------------------------------------------------------


def mismatch(train_values: Array, test_values: Array) -> np.ndarray:
    """Return ⟨φ_u, Δ φ_v⟩ = (1/m) Σ_test φ_u φ_v − (1/n) Σ_train φ_u φ_v, (k, k) symmetric.

    Parameters
    ----------
    train_values, test_values : (n, k) and (m, k) float64
        Values of k functions on the two samples.

    Notes
    -----
    Source: Δ = P_te − P_tr of 2512.10427, section 6.2. For functions fixed before the samples are drawn, normalised in L² of
    the population, every diagonal entry has mean 0 and variance (E φ⁴ − 1)(1/n + 1/m), whatever its eigenvalue.
    """
    a, b = _array(train_values, "train_values", 2), _array(test_values, "test_values", 2)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{a.shape[1]} functions on the training samples and {b.shape[1]} on the test samples"
        )
    found: np.ndarray = b.T @ b / len(b) - a.T @ a / len(a)
    return found


def shell_weight(
    eigenvalues: Array, diagonal: Array, edges: Array, *, printed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse-grain the diagonal of Δ: the weight w with ½⟨e, Δe⟩ ≈ ½∫wε dλ, ε the density of ½g².

    Parameters
    ----------
    eigenvalues, diagonal : (k,) float64
        λ_u and ⟨φ_u, Δφ_u⟩.
    edges : (B + 1,) float64, ascending
        Bins [edge_b, edge_{b+1}).
    printed : bool
        The definition of 2512.10427, section 6.4: the sum over the bin, divided by its width. It counts the density of states
        twice once it is multiplied by ε. By default twice the mean over the bin; the 2 is there because ε = ½g².

    Returns
    -------
    weight : (B,) float64, zero where a bin is empty
    counts : (B,) int, modes in each bin
    """
    x, d, e = (
        _array(eigenvalues, "eigenvalues", 1),
        _array(diagonal, "diagonal", 1),
        _array(edges, "edges", 1),
    )
    if len(x) != len(d):
        raise ValueError(
            f"{len(x)} eigenvalues and {len(d)} diagonal entries; there must be one for each mode"
        )
    if len(e) < 2 or not (np.diff(e) > 0).all():
        raise ValueError(f"edges must be two or more ascending numbers, got {e!r}")
    where = np.searchsorted(e, x, side="right") - 1
    inside = (where >= 0) & (where < len(e) - 1)
    if not inside.any():
        raise ValueError(
            f"no eigenvalue lies in [{e[0]:.4g}, {e[-1]:.4g}); they span {x.min():.4g} to {x.max():.4g}"
        )
    counts = np.bincount(where[inside], minlength=len(e) - 1)
    sums = np.bincount(where[inside], weights=d[inside], minlength=len(e) - 1)
    return (sums / np.diff(e) if printed else 2 * sums / np.maximum(counts, 1)), counts
