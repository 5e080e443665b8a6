"""Arithmetic of operators against dense matrices, and what Lanczos is told about the results."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from grsd.spectrum import (
    GGN,
    NTK,
    ClassLogits,
    NTKBatches,
    NTKShards,
    Outputs,
    lanczos,
    lanczos_batches,
)
from tests.cases import dense, gpt_neox, mlp


def relative(A: torch.Tensor, B: torch.Tensor) -> float:
    return float(torch.linalg.norm(A - B) / torch.linalg.norm(B))


def test_multiples_and_sums_are_those_of_dense_matrices() -> None:
    model, x, observable = mlp()
    M, graph = NTK(model, x, observable), NTK(model, x, observable, method="graph")
    D, size = M.to_dense(), M.shape[0]
    eye = torch.eye(size, dtype=M.dtype)
    u = torch.randn(size, 3, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    for made, truth in (
        (M.T, D),
        (2 * M, 2 * D),
        (M * torch.tensor(0.5), D / 2),
        (M / 4, D / 4),
        (-M, -D),
        (M + graph, 2 * D),
        (3 * M - graph / 2, 2.5 * D),
        (M + 0.1 * eye, D + 0.1 * eye),
        (0.1 * eye + M, D + 0.1 * eye),
        (eye - M, eye - D),
        (-(2 * (M + eye)) / 2, -(D + eye)),
        (M + NTKShards(model, [(x, observable)]), 2 * D),
    ):
        assert relative(made.to_dense(), truth) < 1e-14
        assert relative(made @ u[:, 0], truth @ u[:, 0]) < 1e-14
        assert relative(u.T @ made, u.T @ truth) < 1e-14
        assert relative(u[:, 0] @ made, u[:, 0] @ truth) < 1e-14
        assert made.inner_weight == M.inner_weight
        mu = lanczos(made, M.error, size).measure()
        assert mu.mass == pytest.approx(float(M.inner_weight * (M.error**2).sum()), rel=1e-13)
        assert abs(mu.nodes[-1] - float(torch.linalg.eigvalsh(truth)[-1])) < 1e-12
        top = eigsh(made.scipy(), k=1, which="LA", return_eigenvectors=False)[0]
        assert top == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-10)


def test_layers_add_up_to_the_operator() -> None:
    M = NTK(*gpt_neox())
    layers = [M.layer(name) for name in M.layers()]
    total = sum(layers[1:], start=1.0 * layers[0])
    assert total.semidefinite and total.eps == M.eps
    assert relative(total.to_dense(), M.to_dense()) < 1e-14


def test_sign_and_accuracy_are_known_of_the_result() -> None:
    model, x, observable = mlp()
    M = NTK(model, x, observable)
    eye = torch.eye(M.shape[0], dtype=M.dtype)
    assert (2 * M).semidefinite and (M + M / 3).semidefinite
    assert not (-M).semidefinite and not (M + eye).semidefinite and not (M - M / 2).semidefinite
    assert (2 * M).eps == M.eps == (M + M).eps
    # what cancels leaves the rounding of its terms
    near = M - (1 - 1e-6) * M
    assert 1e6 * M.eps < near.eps < 1e7 * M.eps
    assert (M - M).eps == 1.0
    rounding = torch.linalg.matrix_norm(near.to_dense() - 1e-6 * M.to_dense(), 2)
    assert rounding < near.eps * 1e-6 * torch.linalg.matrix_norm(M.to_dense(), 2)
    # a part in float32 makes a sum that is right to float32
    single = NTK(model.float(), x.float(), observable)
    assert (single + single).eps == torch.finfo(torch.float32).eps


def test_what_does_not_fit_is_refused_with_both_shapes() -> None:
    model, x, observable = mlp()
    M, short = NTK(model, x, observable), NTK(model, x[:3], Outputs())
    with pytest.raises(ValueError, match=r"\(24, 24\) torch.float64 on cpu.*NTK \(6, 6\)"):
        M + short
    with pytest.raises(ValueError, match=r"Tensor \(24, 24\) torch.float32"):
        M + torch.eye(24)
    with pytest.raises(ValueError, match="one inner product"):
        M + NTK(model, x, observable, normalize="sum")
    with pytest.raises(TypeError, match=r"not by Tensor \(24, 24\); a product with vectors is M @"):
        M * torch.eye(24, dtype=torch.float64)
    with pytest.raises(ValueError, match="factor is nan"):
        M * float("nan")
    with pytest.raises(ValueError, match=r"vectors of shape \(24,\), got \(23,\)"):
        (2 * M) @ torch.ones(23, dtype=M.dtype)
    with pytest.raises(ValueError, match="is not symmetric"):
        skew = torch.triu(torch.ones(24, 24, dtype=M.dtype))
        lanczos(M + skew, M.error, 10)
    with pytest.raises(ValueError, match="NumPy has no bfloat16"):
        NTK(model.bfloat16(), x.bfloat16(), observable).scipy()


def test_the_gauss_newton_matrix_is_that_of_the_dense_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x, y = torch.randn(7, 4).double(), torch.randint(0, 5, (7,))
    K = NTK(model, x, ClassLogits(y))
    S = GGN(K)
    q = K.outputs.reshape(7, 5).softmax(-1)
    H = torch.block_diag(*[torch.diag(p) - torch.outer(p, p) for p in q])
    D = K.to_dense()
    spectrum = torch.linalg.eigvals(H @ D).real.sort().values
    assert (torch.linalg.eigvalsh(S.to_dense()) - spectrum).abs().max() < 1e-12 * spectrum[-1]
    # apart from zeros those of Jᵀ H J, the Gauss–Newton matrix of the parameters
    J = K.jacobian()
    gauss_newton = torch.linalg.eigvalsh(J.T @ H @ J * K.inner_weight)
    assert (gauss_newton[-28:] - spectrum[-28:]).abs().max() < 1e-12 * spectrum[-1]
    # w: ⟨w, S w⟩ = ⟨δ, K δ⟩, the rate of the loss; and the law of δ along the flow
    w, delta = S.error, K.error
    assert float(w @ (S @ w)) == pytest.approx(float(delta @ (K @ delta)), rel=1e-12)
    h, direction = 1e-6, J.T @ delta * K.inner_weight  # −∇L, of θ̇
    names, sizes = zip(*[(n, p.numel()) for n, p in model.named_parameters()], strict=True)
    shifted = []
    for sign in (1, -1):
        steps = dict(zip(names, torch.split(sign * h * direction, sizes), strict=True))
        moved = {n: p.detach() + steps[n].view_as(p) for n, p in model.named_parameters()}
        logits = torch.func.functional_call(model, moved, x)
        shifted.append(ClassLogits(y).error(logits.reshape(-1)))
    rate = (shifted[0] - shifted[1]) / (2 * h)
    assert relative(-S.weigh(GGN(D, q).K @ delta), rate) < 1e-8  # h² and rounding over h
    # the same from any operator over logits with given probabilities, blocks included
    assert relative(GGN(D, q).to_dense(), S.to_dense()) < 1e-13
    assert S.semidefinite and S.eps == K.eps and lanczos(S, w, 20).mass > 0
    with pytest.raises(ValueError, match="sum to 1 in every row"):
        GGN(D, 2 * q)
    with pytest.raises(ValueError, match="ClassLogits"):
        GGN(NTK(model, x, Outputs()))
    with pytest.raises(ValueError, match=r"K is \(35, 35\)"):
        GGN(D, q[:3])


def test_batches_are_multiplied_and_added_one_by_one() -> None:
    model, x, _ = mlp()
    x, y = x[:4], torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    M = NTKBatches(model, x, Outputs(y), batches=2)  # two batches of two samples: G = 2, T = 4
    square = NTKBatches(model, x, Outputs(y), batches=4)  # T = 2
    for made, size in ((M, 2), (square, 1)):
        parts = [dense(model, x[k : k + size], Outputs()) for k in range(0, 4, size)]
        D = torch.stack(parts) * made.inner_weight
        u = torch.randn(made.outputs.shape, generator=torch.Generator().manual_seed(2)).double()
        assert relative(made.to_dense(), D) < 1e-14
        assert relative((3 * made - made).to_dense(), 2 * D) < 1e-14
        assert relative(u @ made, (D @ u[..., None])[..., 0]) < 1e-14
        for tri, one in zip(lanczos_batches(2 * made, made.error, 2), D, strict=True):
            assert tri.semidefinite and tri.alphas.max() <= 2.0000001 * torch.linalg.norm(one)
