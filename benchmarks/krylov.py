"""The Lanczos part alone: its time beyond the products, and the same job by other libraries, with accuracy beside speed.

    python benchmarks/krylov.py                      # a matrix of known spectrum, T = 4096, m = 100, float32
    python benchmarks/krylov.py --parts share --shape h256 --batch 32   # the factored operator of a model, T = 32 × 128

The matrix is M = Q diag(λ) Qᵀ with Q two Householder reflections, so that its eigenvalues and the spectral measure of the start
vector are known. m steps make a Gauss quadrature that integrates polynomials of degree 2m − 1 exactly: the largest error
of a Chebyshev moment of lower degree is the accuracy of a route. SciPy's `eigsh` does another job, the 20 largest
eigenvalues to full accuracy; it stands here because it is what many people call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import SHAPES, arguments, interleaved, ratios, store
from numpy.typing import NDArray
from products import profile
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from grsd.spectrum import lanczos

WANTED = 20  # eigenvalues of `eigsh`
Quadrature = tuple[NDArray[np.float64], NDArray[np.float64]]  # nodes and weights, ascending


def known(size: int, seed: int) -> tuple[Tensor, Tensor, Quadrature]:
    """Return M (float64), a unit start vector, and its exact measure; eigenvalues k^−1.5."""
    g = torch.Generator().manual_seed(seed)
    eigenvalues = torch.arange(1, size + 1, dtype=torch.float64) ** -1.5
    M, start = torch.diag(eigenvalues), torch.randn(size, dtype=torch.float64, generator=g)
    start /= torch.linalg.vector_norm(start)
    weights = start**2
    for _ in range(2):
        v = torch.randn(size, dtype=torch.float64, generator=g)
        v /= torch.linalg.vector_norm(v)
        M = M - 2 * torch.outer(v, v @ M)
        M = M - 2 * torch.outer(M @ v, v)
        start = start - 2 * v * (v @ start)
    return (M + M.T) / 2, start, (eigenvalues.numpy()[::-1].copy(), weights.numpy()[::-1].copy())


def quadrature(alphas: Any, betas: Any) -> Quadrature:
    """Return the nodes and weights of a tridiagonal matrix."""
    nodes, vectors = eigh_tridiagonal(
        np.asarray(alphas, dtype=float), np.asarray(betas, dtype=float)
    )
    return nodes, vectors[0] ** 2


def moment_error(found: Quadrature, exact: Quadrature, degree: int) -> float:
    """Return the largest error of a Chebyshev moment of degree < `degree`, on [0, largest exact eigenvalue]."""
    angles = [
        np.arccos(np.clip(2 * nodes / exact[0][-1] - 1, -1, 1)) for nodes in (found[0], exact[0])
    ]
    errors = [
        abs(found[1] @ np.cos(k * angles[0]) - exact[1] @ np.cos(k * angles[1]))
        for k in range(degree)
    ]
    return float(max(errors))


def by_grsd(M: Tensor, start: Tensor, steps: int, reorthogonalize: bool = True) -> Quadrature:
    result = lanczos(M, start, steps, reorthogonalize=reorthogonalize)
    return quadrature(result.alphas, result.betas)


def by_linear_operator(M: Tensor, start: Tensor, steps: int) -> Quadrature:
    from linear_operator.utils.lanczos import lanczos_tridiag

    _, T = lanczos_tridiag(
        lambda x: M @ x,
        steps,
        dtype=M.dtype,
        device=M.device,
        matrix_shape=M.shape,
        init_vecs=start[:, None],
    )
    return quadrature(T.diagonal(), T.diagonal(1))


def by_cola(M: Tensor, start: Tensor, steps: int) -> Quadrature:
    import cola
    from cola.linalg.decompositions.lanczos import lanczos as cola_lanczos

    _, T, _ = cola_lanczos(cola.SelfAdjoint(cola.ops.Dense(M)), start, max_iters=steps)
    return quadrature(T.beta.reshape(-1), T.alpha.reshape(-1))


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """Return time in units of the products alone, accuracy, and copies of the largest eigenvalue, route by route."""
    double, start, exact = known(asked.size, 1)
    M, v, steps = double.float(), start.float(), asked.steps
    calls: dict[str, Callable[[], Quadrature]] = {
        "grsd": lambda: by_grsd(M, v, steps),
        "linear_operator": lambda: by_linear_operator(M, v, steps),
        "CoLA": lambda: by_cola(M, v, steps),
        "grsd, not reorthogonalised": lambda: by_grsd(M, v, steps, reorthogonalize=False),
    }
    found: dict[str, dict[str, Any]] = {}
    for name in list(calls):
        try:
            nodes, weights = calls[name]()
        except ImportError as failure:
            print(f"{name} is left out: {failure}")
            del calls[name]
            continue
        found[name] = {
            "steps": len(nodes),
            "moment error": moment_error((nodes, weights), exact, 2 * len(nodes)),
            "error of the 20 largest": float(
                np.abs(nodes[-WANTED:] / exact[0][-WANTED:] - 1).max()
            ),
            "copies of the largest": int((np.abs(nodes - exact[0][-1]) < 1e-3).sum()),
        }
    products = [0]

    def counted(x: Any) -> Any:
        products[0] += 1
        return (M @ torch.from_numpy(x)).numpy()

    numpy_start = v.numpy()

    def scipy_route() -> Any:
        products[0] = 0
        operator = LinearOperator(M.shape, matvec=counted, dtype=np.float32)
        return eigsh(
            operator, WANTED, which="LA", v0=numpy_start, ncv=steps, return_eigenvectors=False
        )

    top = np.sort(scipy_route())
    found["SciPy eigsh"] = {
        "steps": products[0],
        "error of the 20 largest": float(np.abs(top / exact[0][-20:] - 1).max()),
    }

    def alone() -> None:
        for _ in range(steps):
            M @ v

    every: dict[str, Callable[[], Any]] = {"products": alone, **calls, "SciPy eigsh": scipy_route}
    seconds = interleaved([*every.items()], asked.repeats)
    for name, row in found.items():
        row["time / products"] = ratios(seconds[name], seconds["products"])
    return {"T": asked.size, "m": steps, "dtype": "float32", "routes": found}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=("routes", "share"), default=["routes"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="h256")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profiles", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if "routes" in asked.parts:
        row = compare(asked)
        store("krylov", "routes", row, asked)
        for name, value in row["routes"].items():
            print(name, value)
    if "share" in asked.parts:
        row = {**profile(asked, asked.shape), "shape": asked.shape, "T": asked.batch * asked.length}
        store("krylov", "share", row, asked)
        print(row)


if __name__ == "__main__":
    main()
