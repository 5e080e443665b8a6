"""Arithmetic of symmetric operators: transposes, multiples, sums, and the Gauss–Newton matrix.

What comes out is an operator again, of which `lanczos` knows the accuracy, the inner product and
the sign. Square tensors, which must be symmetric, may stand in a sum beside operators.
"""

from __future__ import annotations

from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from grsd import checks

ITERATIONS = 8  # of the power method; a norm to some percent is enough for the size of rounding


def check_vector(name: str, M: Any, u: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless u has this shape, and the type and device of M."""
    if tuple(u.shape) != shape:
        raise ValueError(
            f"{name} is {tuple(M.shape)}: it multiplies vectors of shape {shape}, got "
            f"{tuple(u.shape)}"
        )
    if u.dtype != M.dtype or u.device != M.device:
        raise ValueError(
            f"{name} is {M.dtype} on {M.device}, the vector is {u.dtype} on {u.device}"
        )


class Symmetric:
    """What every symmetric operator can do: M.T, u @ M, 2*M, M/2, −M, M + N, `to_dense`, `scipy`.

    A class made from it has `shape`, `dtype`, `device`, `eps`, `inner_weight`, and multiplies (T,)
    and (T, k).
    """

    shape: Any
    dtype: Any
    device: Any
    eps: Any
    inner_weight: float = 1.0
    semidefinite: bool = False

    def __matmul__(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def T(self) -> Any:
        """Itself: M is symmetric."""
        return self

    def __rmatmul__(self, u: Tensor) -> Tensor:
        """Return u M for u of shape (T,), or (k, T); of batches for (G, T)."""
        return self @ u if u.ndim == len(self.shape) - 1 else (self @ u.T).T

    def __mul__(self, factor: Any) -> Sum:
        return Sum([(_number(factor, self), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Sum:
        return self * (1 / _number(divisor, self))

    def __neg__(self) -> Sum:
        return self * -1.0

    def __add__(self, other: Any) -> Sum:
        return Sum([(1.0, self), (1.0, other)])

    __radd__ = __add__

    def __sub__(self, other: Any) -> Sum:
        return Sum([(1.0, self), (-1.0, other)])

    def __rsub__(self, other: Any) -> Sum:
        return Sum([(1.0, other), (-1.0, self)])

    def to_dense(self) -> Tensor:
        """Return M as a (T, T) matrix by T products; no (T, P) matrix is formed.

        Of G batches, (G, T, T).
        """
        units = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)
        if len(self.shape) == 2:
            return self @ units
        return torch.stack([self @ unit.expand(self.shape[:-1]) for unit in units], -1)

    def scipy(self) -> LinearOperator:
        """Return M as a `LinearOperator` on NumPy vectors (for `eigsh` and friends).

        ValueError for bfloat16, which NumPy does not have.
        """
        if self.dtype == torch.bfloat16:
            raise ValueError("NumPy has no bfloat16: make the operator of model.float()")

        def product(u: Any) -> Any:
            if np.iscomplexobj(u):  # M is real
                return product(u.real) + 1j * product(u.imag)
            return (self @ torch.as_tensor(u, dtype=self.dtype, device=self.device)).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=product, rmatvec=product, matmat=product, dtype=numpy_dtype
        )

    def _check(self, u: Tensor, shape: tuple[int, ...]) -> None:
        check_vector("M", self, u, shape)


class Sum(Symmetric):
    """Σ c_k M_k of operators of one size, type, device and inner product.

    Attributes
    ----------
    terms : pairs of c_k and M_k, sums taken apart.
    semidefinite : bool, all M_k are, and no c_k is negative.

    Raises
    ------
    ValueError
        Terms that differ in shape, type, device or inner product.

    Notes
    -----
    A product costs one of every term. `eps` of a sum in which terms cancel is larger than theirs:
    Σ |c_k| eps_k |M_k| / |Σ c_k M_k|, with norms found by 8 products each when first asked for.
    """

    def __init__(self, terms: Any) -> None:
        flat: list[tuple[float, Any]] = [
            (factor * inner, M)
            for factor, operator in terms
            for inner, M in (operator.terms if isinstance(operator, Sum) else [(1.0, operator)])
        ]
        self.terms: tuple[tuple[float, Any], ...] = tuple(flat)
        first = next(M for _, M in flat if not isinstance(M, Tensor))
        self.shape, self.dtype, self.device = tuple(first.shape), first.dtype, first.device
        self.inner_weight = first.inner_weight
        for _, M in flat:
            given = getattr(M, "shape", None), getattr(M, "dtype", None), getattr(M, "device", None)
            if given[0] is None or (tuple(given[0]), *given[1:]) != self._kind:
                raise ValueError(
                    f"operators of a sum have one shape, type and device: {_words(self._kind)}, "
                    f"and {type(M).__name__} {_words(given)}"
                )
            if getattr(M, "inner_weight", self.inner_weight) != self.inner_weight:
                raise ValueError(
                    f"operators of a sum have one inner product: its weights are "
                    f"{self.inner_weight:.6g} and {M.inner_weight:.6g} (normalize, samples)"
                )
        self.semidefinite = all(c >= 0 and getattr(M, "semidefinite", False) for c, M in flat)

    @property
    def _kind(self) -> tuple[Any, ...]:
        return self.shape, self.dtype, self.device

    @cached_property
    def eps(self) -> float:
        """Relative accuracy of a product."""
        each = [float(getattr(M, "eps", torch.finfo(self.dtype).eps)) for _, M in self.terms]
        if self.semidefinite or len(self.terms) == 1:
            return max(each)
        sizes = [abs(c) * _norm(M) for c, M in self.terms]
        whole, rounding = _norm(self), sum(e * size for e, size in zip(each, sizes, strict=True))
        return max(*each, min(1.0, rounding / whole)) if whole > 0 else 1.0

    def __matmul__(self, u: Tensor) -> Tensor:
        self._check(u, (*self.shape[:-1], *u.shape[len(self.shape) - 1 :]))
        total = torch.zeros_like(u)
        for factor, M in self.terms:
            total += factor * (M @ u)
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{c:g}*{type(M).__name__}{tuple(M.shape)}" for c, M in self.terms)


class GGN(Symmetric):
    """The Gauss–Newton matrix of softmax cross-entropy on the logits: S = Gᵀ K G with G Gᵀ = H.

    K = J Jᵀ is over all n·C logits (an `NTK` with `ClassLogits`), H = blockdiag(diag q − q qᵀ). S
    is symmetric and has the eigenvalues of H K, of √H K √H, and, apart from zeros, of the
    Gauss–Newton matrix Jᵀ H J of the parameters; G = diag(√q)(1 − √q √qᵀ) needs no matrix root.

    Parameters
    ----------
    K : operator over n·C logits.
    probabilities : (n, C), softmax of the logits; None takes it from `K.outputs` and the classes
        of its observable.

    Attributes
    ----------
    error : (n·C,), w = δ/√q for an `NTK` with `ClassLogits`: G w = δ, and shells of w in the
        eigenbasis of S dissipate the cross-entropy.

    Notes
    -----
    The law δ̇ = −H K δ is `ggn.weigh(K @ delta)`. A product costs one with K. Source: the chapter on
    cross-entropy.
    """

    def __init__(self, K: Any, probabilities: Tensor | None = None) -> None:
        self.K = K
        if probabilities is None:
            samples = getattr(getattr(K, "_observable", None), "targets", None)
            if samples is None or K.shape[0] % samples.numel() or K.shape[0] == samples.numel():
                raise ValueError(
                    "GGN takes an NTK with the observable ClassLogits(targets), or the "
                    "probabilities (n, C) of any operator over logits"
                )
            probabilities = K.outputs.reshape(samples.numel(), -1).softmax(-1)
        checks.shape("probabilities", probabilities, ("n", "C"))
        if probabilities.numel() != K.shape[0]:
            raise ValueError(
                f"K is {tuple(K.shape)}; probabilities {tuple(probabilities.shape)} are "
                f"{probabilities.numel()} numbers"
            )
        off = float((probabilities.sum(-1) - 1).abs().max())
        if not (off <= 100 * torch.finfo(K.dtype).eps and bool((probabilities >= 0).all())):
            raise ValueError(f"probabilities are ≥ 0 and sum to 1 in every row; off by {off:.3g}")
        self.probabilities, self._root = probabilities, probabilities.sqrt()
        self.shape, self.dtype, self.device = tuple(K.shape), K.dtype, K.device
        self.inner_weight = float(getattr(K, "inner_weight", 1.0))
        self.semidefinite = bool(getattr(K, "semidefinite", False))

    @property
    def eps(self) -> float:
        """Relative accuracy of a product, as of K."""
        return float(getattr(self.K, "eps", torch.finfo(self.dtype).eps))

    @property
    def error(self) -> Tensor:
        """w = δ/√q, (n·C,)."""
        return self.K.error / self._root.reshape(-1)

    def weigh(self, u: Tensor) -> Tensor:
        """Return H u for u of shape (n·C,)."""
        v, q = u.reshape(self.probabilities.shape), self.probabilities
        return (q * (v - (q * v).sum(-1, keepdim=True))).reshape(-1)

    def _project(self, u: Tensor) -> Tensor:
        """(1 − √q √qᵀ) u for u of shape (n, C, ...)."""
        root = self._root.reshape(*self._root.shape, *[1] * (u.ndim - 2))
        return u - root * (root * u).sum(1, keepdim=True)

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return S u for u of shape (T,) or (T, k)."""
        self._check(u, (*self.shape[:1], *u.shape[1:]))
        blocks = u.reshape(*self._root.shape, *u.shape[1:])
        root = self._root.reshape(*self._root.shape, *[1] * (u.ndim - 1))
        inner = self.K @ (root * self._project(blocks)).reshape(u.shape)
        return self._project(root * inner.reshape(blocks.shape)).reshape(u.shape)


def _number(value: Any, M: Any) -> float:
    """Return a real factor."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        size = getattr(value, "shape", None)
        shape = "" if size is None else f" {tuple(size)}"
        raise TypeError(
            f"M {tuple(M.shape)} is multiplied by real numbers, not by {type(value).__name__}"
            f"{shape}; a product with vectors is M @ u"
        )
    return float(checks.finite("factor", float(value)))


def _words(kind: tuple[Any, ...]) -> str:
    shape, dtype, device = kind
    return f"{None if shape is None else tuple(shape)} {dtype} on {device}"


def _norm(M: Any) -> float:
    """Return |M|, from below, by the power method from a fixed start."""
    draw = torch.randn(tuple(M.shape[:-1]), generator=torch.Generator().manual_seed(0))
    u, size = draw.to(M.device, M.dtype), 0.0
    for _ in range(ITERATIONS):
        w = M @ (u / torch.linalg.vector_norm(u))
        size = float(torch.linalg.vector_norm(w))
        if not size > 0:
            break
        u = w
    return size
