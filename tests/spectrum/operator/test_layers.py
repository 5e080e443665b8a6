"""Layers of M against blocks of the dense Jacobian, and J_εᵀ u against leaves that hooks put into the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grsd.spectrum import NTK, Outputs, lanczos
from grsd.spectrum.observables import raw_output
from grsd.spectrum.operator.layers import coherence
from tests.cases import CASES, gpt2, gpt_neox, jacobian, mlp


def of_layer(found: dict[str, Tensor], layer: str) -> Tensor:
    """J^(ℓ): a tied matrix has the name of the first of its modules."""
    return torch.cat(
        [b for name, b in found.items() if name.rpartition(".")[0] == layer.partition(" + ")[0]],
        dim=1,
    )


@pytest.mark.parametrize("name", CASES)
def test_layers_are_blocks_of_the_jacobian_and_sum_to_m(name: str) -> None:
    model, x, observable = case = CASES[name]()
    M, found = NTK(model, x, observable, normalize="sum"), jacobian(*case)
    u = torch.randn(M.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total, whole = torch.zeros_like(u), M @ u
    for layer in M.layers():
        one, J = M.layer(layer), of_layer(found, layer)
        expected = J @ (J.T @ u)
        # sums of up to a few thousand products round at 1e-16 each; the issue asks for 1e-12
        assert (
            torch.linalg.norm(one @ u - expected)
            < 1e-12 * torch.linalg.matrix_norm(J, 2) ** 2 * u.norm()
        )
        assert (one.shape, one.dtype, one.eps, one.inner_weight) == (
            M.shape,
            M.dtype,
            M.eps,
            M.inner_weight,
        )
        assert torch.equal(one.outputs, M.outputs)
        total += one @ u
    assert torch.linalg.norm(total - whole) < 1e-12 * torch.linalg.norm(whole)
    # the control: without one layer the sum is another operator
    assert torch.linalg.norm(
        total - M.layer(M.layers()[-1]) @ u - whole
    ) > 1e-6 * torch.linalg.norm(whole)


@pytest.mark.parametrize("name", CASES)
def test_vjp_and_jvp_of_a_layer(name: str) -> None:
    M, found = NTK(*CASES[name](), normalize="sum"), jacobian(*CASES[name]())
    layer = M.layers()[1]
    one, J = M.layer(layer), of_layer(found, layer)
    u = torch.randn(M.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    back = torch.cat([g.flatten() for g in one.vjp(u)])
    assert torch.linalg.norm(back - u @ J) < 1e-12 * torch.linalg.norm(u @ J)
    assert (
        torch.linalg.norm(one.jvp(one.vjp(u)) - J @ (u @ J))
        < 1e-12 * torch.linalg.matrix_norm(J, 2) ** 2 * u.norm()
    )


def test_lanczos_and_dense_form_of_a_layer() -> None:
    M = NTK(*gpt_neox()).layer("gpt_neox.layers.0.mlp.dense_h_to_4h")
    dense = M.to_dense()
    nodes = lanczos(M, torch.ones(18, dtype=torch.float64), 18).measure().nodes
    eigenvalues = torch.linalg.eigvalsh((dense + dense.T) / 2)
    assert abs(nodes[-1] - float(eigenvalues[-1])) < 1e-12 * float(eigenvalues[-1])


def test_a_block_is_the_sum_of_its_layers() -> None:
    M = NTK(*gpt_neox())
    inside = [layer for layer in M.layers() if layer.startswith("gpt_neox.layers.1.")]
    assert len(inside) == 6
    u = torch.randn(18, dtype=torch.float64)
    block = M.layer("gpt_neox.layers.1") @ u
    assert torch.linalg.norm(
        block - sum(M.layer(layer) @ u for layer in inside)
    ) < 1e-12 * torch.linalg.norm(block)


def test_tied_matrix_is_one_layer_with_its_cross_terms() -> None:
    """The table and the head apart lose the cross terms, which is why asking for one of them is refused."""
    model, x, observable = case = gpt_neox(tie=True)
    M = NTK(model, x, observable, normalize="sum")
    assert M.layers()[0] == "gpt_neox.embed_in + lm_head"
    J = jacobian(*case)["gpt_neox.embed_in.weight"]
    untied = gpt_neox()[0]
    untied.load_state_dict(model.state_dict())
    apart = NTK(untied, x, observable, normalize="sum")
    u = torch.randn(18, dtype=torch.float64)
    joint = M.layer("gpt_neox.embed_in + lm_head") @ u
    assert torch.linalg.norm(joint - J @ (J.T @ u)) < 1e-12 * torch.linalg.norm(joint)
    lost = apart.layer("gpt_neox.embed_in") @ u + apart.layer("lm_head") @ u
    assert torch.linalg.norm(lost - joint) > 1e-3 * torch.linalg.norm(joint)
    with pytest.raises(
        ValueError, match=r"cross terms and belong to the layer 'gpt_neox.embed_in \+ lm_head'"
    ):
        M.layer("gpt_neox")


def test_only_what_is_trained_and_used_is_a_layer() -> None:
    model, x, observable = mlp()
    model[0].requires_grad_(False)
    model[1].register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    M = NTK(model, x, observable)
    assert M.layers() == ["2", "4"]
    with pytest.raises(
        ValueError, match="no layer or module '0' has parameters that reach the outputs"
    ):
        M.layer("0")
    with pytest.raises(ValueError, match="near it: "):
        M.layer("1")


def test_a_model_that_holds_its_own_parameters() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    M = NTK(nn.Linear(3, 1).double(), x, Outputs(), normalize="sum")
    assert M.layers() == ["(model)"]
    assert torch.allclose(M.layer("(model)").to_dense(), x @ x.T + 1)


@pytest.mark.parametrize("name", CASES)
def test_output_gradients_are_those_of_leaves_on_the_outputs(name: str) -> None:
    model, x, observable = CASES[name]()
    M = NTK(model, x, observable, normalize="sum")
    u = torch.randn(M.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = M.output_gradients(u)
    leaves: dict[str, Tensor] = {}

    def perturb(name: str, output: Tensor) -> Tensor:
        leaves[name] = torch.zeros_like(output, requires_grad=True)
        return output + leaves[name]

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: perturb(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.GroupNorm | nn.Embedding | nn.Conv2d)
        or type(module).__name__ == "Conv1D"
    ]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (observable.rows(raw_output(model(x))) * u).sum().backward()
    for hook in hooks:
        hook.remove()
    assert {part for layer in found for part in layer.split(" + ")} == set(leaves)
    for layer, deltas in found.items():
        owners = layer.split(" + ")
        assert len(deltas) == len(owners)  # one a use
        for owner, delta in zip(owners, deltas, strict=True):
            truth = leaves[owner].grad
            assert truth is not None
            assert torch.linalg.norm(delta.view(truth.shape) - truth) < 1e-12 * torch.linalg.norm(
                truth
            )


def test_coherence_is_the_norm_of_the_overlap() -> None:
    model, x, observable = case = gpt_neox()
    M, found = NTK(model, x, observable), jacobian(*case)
    pairs = [
        ("gpt_neox.embed_in", "lm_head"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.final_layer_norm"),
    ]
    for first, second in pairs:
        overlap = of_layer(found, first).T @ of_layer(found, second) / M.samples
        truth = float(torch.linalg.matrix_norm(overlap, 2))
        measured = coherence(M.layer(first), M.layer(second), rtol=1e-9)
        # the Ritz value lies below the square by at most the residual, 1e-9 of it
        assert truth * (1 - 1e-9) <= measured <= truth * (1 + 1e-12)
        # the bound by the norms of the two, which two layers with equal singular vectors would reach, is not it
        assert (
            measured
            < 0.9
            * coherence(M.layer(first), M.layer(first)) ** 0.5
            * coherence(M.layer(second), M.layer(second)) ** 0.5
        )


def test_coherence_of_orthogonal_layers_is_zero() -> None:
    left, right = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    left[:3, :3], right[3:, 3:] = torch.eye(3), torch.eye(3)
    assert coherence(left, right) == 0.0
    assert coherence(left, left) == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"\(6, 6\) .* \(5, 5\)"):
        coherence(left, torch.eye(5, dtype=torch.float64))
    spread = torch.diag(torch.linspace(0.99, 1, 200, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="raise steps or rtol"):
        coherence(spread, spread, steps=3)


def test_a_changed_model_is_refused() -> None:
    model, x, observable = gpt2()
    M = NTK(model, x, observable)
    M.output_gradients(M.error)
    with torch.no_grad():
        model.transformer.ln_f.weight += 0.1
    with pytest.raises(RuntimeError, match="make a new NTK"):
        M.layer("transformer.wpe")
    with pytest.raises(RuntimeError, match="make a new NTK"):
        M.output_gradients(M.error)
    again = NTK(model, x, observable)
    with pytest.raises(
        ValueError, match=r"'transformer.ln_9' has .* near it: \['transformer.ln_f'"
    ):
        again.layer("transformer.ln_9")
    with pytest.raises(ValueError, match=r"\(18,\), got \(17,\)"):
        again.output_gradients(torch.ones(17, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"parameters \['absent'\] are none"):
        NTK(model, x, observable, parameters=["absent"])
