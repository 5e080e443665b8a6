"""Matrix optimizers against singular value decompositions, torch's Muon, and what they promise."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from grsd import mup
from grsd.mup.combined import Combined
from grsd.mup.optimizers import POLAR_EXPRESS, SSO, Muon, NorMuon, Shampoo, newton_schulz, polar

from .test_planning import Residual, gpt2, neox


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(W: Tensor, G: Tensor) -> nn.Parameter:
    p = nn.Parameter(W.clone())
    p.grad = G.clone()
    return p


@pytest.mark.parametrize("shape", [(5, 40, 40), (3, 64, 16), (3, 16, 64), (7, 9)])
def test_newton_schulz_has_the_singular_vectors_and_values_near_one(shape: tuple[int, ...]) -> None:
    G = noise(*shape)
    X = newton_schulz(G)
    u, s, vt = torch.linalg.svd(G, full_matrices=False)
    core = u.mT @ X @ vt.mT
    values = torch.diagonal(core, dim1=-2, dim2=-1)
    assert (
        float((core - torch.diag_embed(values)).abs().max()) < 1e-12
    )  # an odd polynomial turns no vector
    large = s > 1e-2 * torch.linalg.matrix_norm(G)[..., None]
    assert float(values[large].min()) > 0.6 and float(values[large].max()) < 1.3
    a, b, c = 3.4445, -4.7750, 2.0315
    x = s / torch.linalg.matrix_norm(G)[..., None]
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5  # what it does to one singular value
    torch.testing.assert_close(values, x, rtol=1e-9, atol=1e-10)


def test_bfloat16_moves_the_result_by_its_rounding_and_a_dtype_without_fractions_is_refused() -> (
    None
):
    G = noise(3, 48, 32)
    exact, coarse = newton_schulz(G), newton_schulz(G, dtype=torch.bfloat16)
    assert coarse.dtype == G.dtype
    off = torch.linalg.matrix_norm(coarse - exact, ord=2)
    # the norm of the polynomial's steps is at most 3.4445, five of them carry 2^-9 a product to below 0.2; float32 stays below 1e-4
    assert float(off.min()) > 1e-3 and float(off.max()) < 0.2
    assert (
        float(torch.linalg.matrix_norm(newton_schulz(G, dtype=torch.float32) - exact, ord=2).max())
        < 1e-4
    )
    with pytest.raises(ValueError, match=r"torch\.int64"):
        newton_schulz(G, dtype=torch.int64)


def test_a_batch_is_its_matrices_one_by_one_in_fewer_kernels() -> None:
    G = noise(12, 24, 40, dtype=torch.float32)

    def kernels(work: Any) -> tuple[Any, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = work()
        return result, sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"))  # fmt: skip

    together, few = kernels(lambda: newton_schulz(G))
    apart, many = kernels(lambda: torch.stack([newton_schulz(g) for g in G]))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert many >= 3 * few


@pytest.mark.parametrize(
    ("scaling", "adjust"), [("keller", "original"), ("kimi", "match_rms_adamw")]
)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_muon_is_torchs_where_torch_has_it(
    scaling: Any, adjust: str, shape: tuple[int, int]
) -> None:
    W = noise(*shape, dtype=torch.float32)
    fine, coarse, theirs = (nn.Parameter(W.clone()) for _ in range(3))
    a = Muon([fine], lr=0.1, scaling=scaling, weight_decay=0.1)
    b = Muon([coarse], lr=0.1, scaling=scaling, weight_decay=0.1, dtype=torch.bfloat16)
    c = torch.optim.Muon([theirs], lr=0.1, adjust_lr_fn=adjust, weight_decay=0.1)
    for k in range(3):
        for p, o in ((fine, a), (coarse, b), (theirs, c)):
            p.grad = noise(*shape, seed=k + 1, dtype=torch.float32)
            o.step()
    target = theirs.detach()
    moved = torch.linalg.matrix_norm(target - W)
    apart = [float(torch.linalg.matrix_norm(p.detach() - target) / moved) for p in (fine, coarse)]
    # torch iterates in bfloat16 (2^-8 a product); five steps of it move the result by some per cent
    assert apart[0] < 0.05
    assert apart[1] <= apart[0] / 3  # in one dtype only the order of additions is left
    bare = parameter(W, noise(*shape, seed=1, dtype=torch.float32))
    Muon([bare], lr=0.1).step()
    same = scaling == "keller" and shape[0] <= shape[1]
    first = nn.Parameter(W.clone())
    first.grad = bare.grad
    Muon([first], lr=0.1, scaling=scaling).step()
    assert torch.equal(first, bare) == same  # scalings differ, except where the factor is 1


SCALES = {
    torch.float64: (1e-300, 1e-170, 1e-23, 1e30, 1e300),
    torch.float32: (1e-37, 1e-30, 1e-23, 1e19, 1e30, 1e37),
    torch.bfloat16: (1e-37, 1e-23, 1e30),
    torch.float16: (1e-3, 1e4),
}


@pytest.mark.parametrize("dtype", SCALES)
def test_an_orthogonal_factor_does_not_know_the_scale(dtype: torch.dtype) -> None:
    """Squares of such entries underflow or overflow; scaling loses no more than the type's own rounding."""
    G = noise(3, 6, 4).to(dtype)
    eps = torch.finfo(dtype).eps
    plain = newton_schulz(G)
    for scale in SCALES[dtype]:
        # inputs rounded twice; five steps carry a rounding by at most 3.4445⁵ = 485
        moved = newton_schulz(G * scale)
        assert float((moved - plain).double().abs().max()) < 500 * eps, scale
        if dtype in (
            torch.float64,
            torch.float32,
        ):  # singular values are not computed in half precision
            far = (polar(G * scale) - polar(G)).double().abs().max()
            assert float(far) < 500 * eps, scale
    assert torch.equal(newton_schulz(G * 2.0**-6), plain)  # a power of two loses nothing
    batch = torch.cat(
        [G * SCALES[dtype][0], G * SCALES[dtype][-1], 0 * G]
    )  # each has its own scale
    assert (
        float((newton_schulz(batch)[:6] - plain.repeat(2, 1, 1)).double().abs().max()) < 500 * eps
    )
    assert not bool(newton_schulz(batch)[6:].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_smallest_numbers_of_a_type_have_a_factor(dtype: torch.dtype) -> None:
    """Subnormal entries: one, which is rank one, and a pattern of signs."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    one = torch.zeros(4, 3, dtype=dtype)
    one[2, 1] = -tiny
    signs = noise(4, 3, dtype=torch.float32).sign().to(dtype)
    assert float(polar(one.float() if dtype != torch.float32 else one)[2, 1]) == -1.0
    assert torch.equal(newton_schulz(one), newton_schulz(one.sign()))
    assert torch.equal(newton_schulz(signs * tiny), newton_schulz(signs))


@pytest.mark.parametrize("kind", [Muon, NorMuon, SSO, Shampoo])
def test_steps_of_a_momentum_that_dies_out(kind: Any) -> None:
    """After one gradient, thousands of steps without: the momentum falls below every number."""
    W = noise(6, 4, dtype=torch.float32)
    p = parameter(W, noise(6, 4, seed=1, dtype=torch.float32))
    optimizer = kind([p], lr=0.0, momentum=0.5)
    optimizer.step()
    assert p.grad is not None
    for _ in range(160):
        p.grad.zero_()
        optimizer.step()
        assert bool(p.isfinite().all())
    assert not bool(optimizer.state[p]["momentum"].any())
    if kind is Shampoo:  # knows scales: its squares underflow with the gradient
        return
    steps = []
    for scale in (1.0, 1e-23, 1e30):
        q = parameter(W, noise(6, 4, seed=1, dtype=torch.float32) * scale)
        other = kind([q], lr=0.1)
        other.step()
        steps.append(q.detach() - W)
    for step in steps[1:]:
        assert float((step - steps[0]).abs().max()) < 1e-5  # 500 roundings of 1.2e-7, times 0.1


def test_shampoo_says_that_squares_overflow() -> None:
    p = parameter(noise(6, 4, dtype=torch.float32), noise(6, 4, dtype=torch.float32) * 1e25)
    with pytest.raises(
        ValueError, match=r"squares of gradients are not finite in torch\.float32: clip"
    ):
        Shampoo([p], lr=0.1).step()


def test_exact_muon_makes_the_step_of_the_formula() -> None:
    W, G = noise(12, 20), noise(12, 20, seed=1)
    p = parameter(W, G)
    Muon([p], lr=0.3, scaling="kimi", weight_decay=0.5, exact=True).step()
    wanted = W - 0.3 * (0.2 * math.sqrt(20) * polar(G) + 0.5 * W)
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["stacked", "by head", "transposed"])
def test_a_fused_matrix_is_stepped_like_its_parts(layout: str) -> None:
    W, G = noise(3, 8, 10), noise(3, 8, 10, seed=1)  # Q, K, V of two heads with four rows each

    def fuse(x: Tensor) -> Tensor:
        if layout == "by head":
            return x.unflatten(1, (2, 4)).transpose(0, 1).reshape(24, 10)
        flat = x.reshape(24, 10)
        return flat.mT.contiguous() if layout == "transposed" else flat

    group: dict[str, Any] = {
        "split": (4, 4, 4) if layout == "by head" else 3,
        "transposed": layout == "transposed",
    }
    p = parameter(fuse(W), fuse(G))
    Muon([{"params": [p], **group}], lr=0.1, scaling="keller", exact=True).step()
    parts = [parameter(w, g) for w, g in zip(W, G, strict=True)]
    Muon(parts, lr=0.1, scaling="keller", exact=True).step()
    torch.testing.assert_close(
        p.detach(), fuse(torch.stack([q.detach() for q in parts])), rtol=1e-12, atol=1e-12
    )
    whole = parameter(fuse(W), fuse(G))
    Muon([whole], lr=0.1, scaling="keller", exact=True).step()
    assert float((whole - p).detach().abs().max()) > 1e-3  # without the split it is another step


def test_parts_of_unequal_sizes_experts_and_convolutions_are_stepped_like_matrices() -> None:
    W, G = noise(3, 12, 10), noise(3, 12, 10, seed=1)  # three experts; or 12 outputs, kernels of 30
    held: list[tuple[dict[str, Any], Tensor, Tensor, Any]] = [
        # experts, each with a part of 8 rows and two of 2
        (
            {"batched": True, "split": (8, 2, 2)},
            W,
            G,
            lambda x: [part for one in x for part in one.split((8, 2, 2))],
        ),
        ({"batched": True, "transposed": True}, W, G, lambda x: [one.mT for one in x]),
        ({}, W.mT.reshape(12, 5, 6), G.mT.reshape(12, 5, 6), lambda x: [x.reshape(12, 30)]),
        # 2 times 4 rows, then 2 times 2, in turn
        ({"split": (4, 2)}, W[0], G[0], lambda x: [x[[0, 1, 2, 3, 6, 7, 8, 9]], x[[4, 5, 10, 11]]]),
    ]
    for group, weight, gradient, cut in held:
        p = parameter(weight.contiguous(), gradient.contiguous())
        Muon([{"params": [p], **group}], lr=0.1, scaling="keller", exact=True).step()
        parts = [parameter(w, g) for w, g in zip(cut(weight), cut(gradient), strict=True)]
        Muon(parts, lr=0.1, scaling="keller", exact=True).step()
        for found, wanted in zip(cut(p.detach()), parts, strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


def test_shampoo_is_muon_at_its_first_step_and_not_after() -> None:
    W, first, second = noise(10, 14), noise(10, 14, seed=1), noise(10, 14, seed=2)
    p, q = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    a, b = Shampoo([p], lr=0.1, eps=0.0), Muon([q], lr=0.1, momentum=0.0, exact=True)
    for k, G in enumerate((first, second)):
        before = p.detach().clone()
        p.grad, q.grad = G, G
        a.step()
        b.step()
        gap = float((p - q).detach().abs().max())
        assert gap < 1e-9 if k == 0 else gap > 1e-3
    left = sum(0.05 * 0.95 ** (1 - k) * G @ G.mT for k, G in enumerate((first, second))) / (
        1 - 0.95**2
    )
    right = sum(0.05 * 0.95 ** (1 - k) * G.mT @ G for k, G in enumerate((first, second))) / (
        1 - 0.95**2
    )

    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        return (vectors * values.clamp_min(1e-300) ** -0.25) @ vectors.mT

    rank = torch.linalg.matrix_rank(right)
    assert rank == 14  # two gradients of rank 10 fill both sides
    wanted = before - 0.1 * root(left) @ second @ root(right)
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-8, atol=1e-8)


def test_sso_stays_on_its_sphere_and_moves_along_it() -> None:
    W, G = noise(12, 20), noise(12, 20, seed=1)
    p = parameter(W, G)
    o = SSO([p], lr=1e-4, momentum=0.0, exact=True, bisections=50)
    o.retract()
    R = math.sqrt(12 / 20)
    assert float(torch.linalg.matrix_norm(p.detach(), ord=2)) == pytest.approx(R, rel=1e-12)
    before = p.detach().clone()
    u, _, vt = torch.linalg.svd(before)
    o.step()
    assert float(torch.linalg.matrix_norm(p.detach(), ord=2)) == pytest.approx(R, rel=1e-12)
    step = (before - p.detach()) / 1e-4
    assert float(torch.linalg.matrix_norm(step, ord=2)) == pytest.approx(
        R, rel=1e-3
    )  # retraction: O(η)
    assert abs(float(u[:, 0] @ step @ vt[0])) < 1e-3 * R  # tangent
    assert float((step * G).sum()) > 0  # downhill
    free = parameter(before, G)
    SSO([free], lr=1e-4, momentum=0.0, exact=True, bisections=0).step()
    assert abs(float(u[:, 0] @ polar(G) @ vt[0])) > 1e-2  # what the constraint takes out
    assert float((free - p).detach().abs().max()) > 1e-6  # and it is not taken out without it


def test_combined_optimizers_are_driven_and_saved_as_one() -> None:
    model, base = Residual(32, 4), Residual(16, 2)
    plan = mup.plan(model, base=base, optimizer="muon_kimi")
    opt = plan.make_optimizer(
        model, lr=0.02, weight_decay=0.1, options={"adamw": {"betas": (0.9, 0.95)}}
    )
    assert isinstance(opt, Combined) and len(opt.optimizers) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 0.5**k)
    x = noise(6, 5, dtype=torch.float32)

    def advance(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            (model(x) - 1).square().mean().backward()
            opt.step()

    advance(model, opt, 2)
    scheduler.step()
    hidden = [
        g
        for g in opt.optimizers[0].param_groups + opt.optimizers[1].param_groups
        if g["role"] == "hidden"
    ]
    assert hidden[0]["lr"] == pytest.approx(
        0.5 * 0.02 / math.sqrt(2)
    )  # the schedule reached the group that steps
    copied = copy.deepcopy(model)
    other = plan.make_optimizer(
        copied, lr=0.02, weight_decay=0.1, options={"adamw": {"betas": (0.9, 0.95)}}
    )
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    advance(model, opt, 2)
    advance(copied, other, 2)
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="the state holds 1 groups, here are 6"):
        opt.load_state_dict({"state": {}, "param_groups": [{}]})


def pair() -> tuple[list[nn.Parameter], Combined]:
    ps = [parameter(noise(3, 3, seed=k), noise(3, 3, seed=9)) for k in range(3)]
    return ps, Combined([Muon(ps[:1], lr=0.1), torch.optim.AdamW(ps[1:2], lr=0.1)])


def test_a_group_for_combined_optimizers_goes_to_the_one_that_steps_it() -> None:
    ps, opt = pair()
    bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    bias.grad = torch.ones_like(bias)
    before = [p.detach().clone() for p in (*ps, bias)]
    with pytest.raises(ValueError, match=r"which of \['Muon', 'AdamW'\] is to step this group"):
        opt.add_param_group({"params": ps[2:]})  # a matrix, which both take
    with pytest.raises(ValueError, match=r"Say optimizer=0 … 1 in it, got 2"):
        opt.add_param_group({"params": ps[2:], "optimizer": 2})
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": ps[:1], "optimizer": 1})
    assert len(opt.param_groups) == 2
    opt.add_param_group({"params": ps[2:], "lr": 0.2, "optimizer": 0})
    opt.add_param_group({"params": bias, "lr": 0.2})  # a vector, which one of them takes
    assert [len(o.param_groups) for o in opt.optimizers] == [2, 2]
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.5)
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.1, 0.05, 0.1]
    # each is stepped as its own optimizer would alone
    own = parameter(ps[2].detach(), noise(3, 3, seed=9))
    opt.step()
    Muon([own], lr=0.1).step()
    assert torch.equal(own, ps[2])
    assert all(not torch.equal(p, x) for p, x in zip((*ps, bias), before, strict=True))
    opt.zero_grad()
    assert all(p.grad is None for p in ps)
    opt.step()  # without gradients nothing is stepped
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined([torch.optim.SGD(ps[:1], lr=0.1), torch.optim.SGD(ps[:1], lr=0.1)])


def test_combined_optimizers_take_a_closure_and_are_copied_with_their_parameters() -> None:
    ps, opt = pair()

    def closure() -> Tensor:
        opt.zero_grad(set_to_none=False)
        loss = sum((p.square().sum() for p in ps), torch.zeros(()))
        loss.backward()
        return loss

    first = opt.step(closure)
    assert bool(opt.step(closure) < first)
    copied, twin = copy.deepcopy((ps, opt))
    assert isinstance(twin, Combined) and copied[0] is not ps[0]
    for p, q in zip(ps, copied, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(ps, copied, strict=True))


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", "muon", "muon_keller", "muon_kimi", "shampoo", "sso"]
)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    torch.manual_seed(0)
    model = Residual(24, 3)
    plan = mup.plan(model, base=Residual(12, 3), optimizer=name)
    plan.attach(model)
    opt = plan.make_optimizer(model, lr=0.01)
    x = noise(16, 5, dtype=torch.float32)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0] and all(math.isfinite(v) for v in losses)


def test_stock_models_get_their_fused_weights_split() -> None:
    for make, wanted in ((gpt2, 3), (neox, (8, 8, 8))):
        model = make(32, 2)
        plan = mup.plan(model, base=make(16, 2), optimizer="muon")
        splits = {e.split for e in plan if "attn" in e.name or "query_key" in e.name} - {1}
        assert splits == {wanted}
        assert {e.transposed for e in plan if e.role == "hidden"} == {make is gpt2}
        plan.make_optimizer(model, lr=0.1)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices; a parameter has shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="split = 3 does not divide the 8 outputs"):
        Muon([{"params": [nn.Parameter(torch.zeros(8, 4))], "split": 3}])
    with pytest.raises(ValueError, match=r"lr is -1\.0; it must be finite and not negative"):
        Muon([nn.Parameter(torch.zeros(2, 2))], lr=-1.0)
    with pytest.raises(ValueError, match="scaling is 'newton'; expected one of bare, keller, kimi"):
        Muon([nn.Parameter(torch.zeros(2, 2))], scaling="newton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"radius is 0\.0; it must be positive"):
        SSO([nn.Parameter(torch.zeros(2, 2))], radius=0.0)
    with pytest.raises(ValueError, match=r"beta is 1\.0; expected 0 ≤ beta < 1"):
        Shampoo([nn.Parameter(torch.zeros(2, 2))], beta=1.0)
    with pytest.raises(ValueError, match=r"needs matrices, got shape \(4,\)"):
        newton_schulz(torch.zeros(4))
    model = Residual(16, 2)
    plan = mup.plan(model, base=model, optimizer="adamw")
    with pytest.raises(ValueError, match="options name 'muon'; this plan uses adamw"):
        plan.make_optimizer(model, lr=0.1, options={"muon": {}})
    # X ← (3X − XXᵀX)/2, whose fixed point is exact, in place of the quintic
    G = torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    assert torch.allclose(newton_schulz(G, steps=20, coefficients=(1.5, -0.5, 0.0)), polar(G))
    assert not newton_schulz(torch.zeros(2, 3, 3)).any()  # a zero gradient makes no step


def test_soap_warns_and_its_other_rule_does_not(recwarn: pytest.WarningsRecorder) -> None:
    model, base = Residual(64, 4), Residual(16, 2)
    with pytest.warns(UserWarning, match="ε is a share of the gradient's largest"):
        paper = mup.plan(model, base=base, optimizer="soap")
    assert any("eps=" in note for note in paper.notes) and "eps=" in paper.table()
    recwarn.clear()
    other = mup.plan(model, base=base, optimizer="soap_sqrt")
    assert not recwarn.list and other.notes == ()
    hidden = [[e.lr for e in plan if e.role == "hidden"] for plan in (paper, other)]
    assert set(hidden[0]) == {1.0} and set(hidden[1]) == {0.5}
    assert type(other.make_optimizer(model, lr=0.1)).__name__ == "Combined"


def test_sophia_with_a_scaled_bound_moves_as_far_and_clips_elsewhere() -> None:
    model, base = Residual(64, 4), Residual(16, 2)
    made = {}
    for name in ("sophia", "sophia_rho"):
        copied = copy.deepcopy(model)
        plan = mup.plan(copied, base=base, optimizer=name)
        opt: Any = plan.make_optimizer(copied, lr=0.01, options={name: {"p": 0.04}})
        groups = {g["role"]: g for g in opt.param_groups}
        # SophiaH clips m/h at p: where all is clipped, a step is lr · p = η
        assert groups["hidden"]["lr"] * groups["hidden"]["p"] == pytest.approx(0.01 / 4, rel=1e-12)
        assert groups["input"]["lr"] * groups["input"]["p"] == pytest.approx(0.01, rel=1e-12)
        made[name] = groups
        x = noise(6, 5, dtype=torch.float32)
        (copied(x) - 1).square().mean().backward()
        before = copied.blocks[0].first.weight.detach().clone()
        opt.step(hessian=[torch.zeros_like(p) for g in opt.param_groups for p in g["params"]])
        moved = (copied.blocks[0].first.weight.detach() - before).abs()
        assert float(moved.max()) == pytest.approx(0.01 / 4, rel=1e-3)
    assert {g["p"] for g in made["sophia"].values()} == {0.04}
    assert made["sophia_rho"]["hidden"]["p"] == pytest.approx(
        0.04 * 4 * 2
    )  # ρ ∝ r_n r_L in the stack
    assert made["sophia_rho"]["input"]["p"] == pytest.approx(0.04 * 4)  # and r_n outside


@pytest.mark.parametrize("name", ["lion", "soap_sqrt"])
def test_optimizers_of_the_library_lower_a_loss_too(name: str) -> None:
    torch.manual_seed(0)
    model = Residual(24, 3)
    plan = mup.plan(model, base=Residual(12, 3), optimizer=name)
    plan.attach(model)
    opt = plan.make_optimizer(model, lr=0.01)
    x = noise(16, 5, dtype=torch.float32)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


# --- Polar Express ----------------------------------------------------------------------------------------------------


def best_quintic(low: float, high: float) -> np.ndarray:
    """Return a, b, c of the odd quintic nearest to 1 on [low, high], by a linear program on a grid."""
    x = high * (1 - (1 - low / high) * (1 - np.cos(np.linspace(0, np.pi, 4001))) / 2)
    powers = np.stack([x, x**3, x**5], 1)
    ones = np.ones((len(x), 1))
    found = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[powers, -ones], [-powers, -ones]]),
        b_ub=np.r_[np.ones(len(x)), -np.ones(len(x))],
        bounds=[(None, None)] * 3 + [(0, None)],
        method="highs",
    )
    return np.asarray(found.x[:3])


def test_the_polar_express_is_the_composition_of_best_polynomials() -> None:
    """Greedy minimax on [10⁻³, 1] with the paper's cushion, 0.0240732743, derived anew (arXiv:2505.16932)."""
    low, high, safe = 1e-3, 1.0, 1.01
    for k, published in enumerate(POLAR_EXPRESS[:-1]):
        a, b, c = best_quintic(max(low, 0.02407327424182761 * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2 / sum(ends) * v for v in (a, b, c))  # centred on 1 again, on [low, high]
        own = np.array([a / safe, b / safe**3, c / safe**5])
        # a grid of 4001 points moves a minimax polynomial by its spacing squared, 1e-6 of the largest
        assert own == pytest.approx(np.array(published), rel=1e-4, abs=1e-4), k
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    assert POLAR_EXPRESS[-1] == (15 / 8, -10 / 8, 3 / 8)  # the limit: Newton–Schulz of order five


def test_the_polar_express_maps_singular_values_within_its_bound() -> None:
    values = np.geomspace(1e-3, 1, 400)
    u, v = (torch.linalg.qr(noise(400, 400, seed=k))[0] for k in (1, 2))
    for steps, bound in ((5, 0.2), (8, 0.01)):
        x, plain = values / np.linalg.norm(values), values / np.linalg.norm(values)
        for k in range(steps):
            a, b, c = POLAR_EXPRESS[min(k, 7)]
            x = a * x + b * x**3 + c * x**5
            plain = 3.4445 * plain - 4.7750 * plain**3 + 2.0315 * plain**5
        G = u @ torch.diag(torch.tensor(values)) @ v.mT
        X = newton_schulz(G, steps=steps, coefficients=POLAR_EXPRESS)
        found = torch.diagonal(u.mT @ X @ v).numpy()
        assert found == pytest.approx(x, abs=1e-9)
        # above the interval's lower end, 10⁻³ of the norm, all are within the bound of 1
        inside = values / np.linalg.norm(values) > 1.01e-3
        assert np.abs(x[inside] - 1).max() < bound < np.abs(plain[inside] - 1).max()


# --- NorMuon ----------------------------------------------------------------------------------------------------------


def test_normuon_is_its_algorithm_step_by_step() -> None:
    """Algorithm 1 of arXiv:2510.05491 written out with loops over rows, against the batched class."""
    W = noise(9, 5)
    p, m, v, wanted = nn.Parameter(W.clone()), torch.zeros(9, 5), torch.zeros(9), W.clone()
    m, v = m.double(), v.double()
    opt = NorMuon(
        [p], lr=0.1, scaling="kimi", weight_decay=0.2, exact=True, nesterov=False, beta2=0.9
    )
    for k in range(4):
        G = noise(9, 5, seed=k + 1)
        p.grad = G
        opt.step()
        m = 0.95 * m + 0.05 * G
        u, _, vt = torch.linalg.svd(m, full_matrices=False)
        turned = u @ vt
        rows = []
        for i in range(9):
            v[i] = 0.9 * v[i] + 0.1 * (turned[i] ** 2).mean()
            rows.append(turned[i] / v[i].sqrt())
        even = torch.stack(rows)
        rate = 0.2 * 0.1 * math.sqrt(9 * 5) / even.norm()
        wanted = wanted - 0.1 * 0.2 * wanted - rate * even
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-10, atol=1e-12)
    plain = parameter(W, noise(9, 5, seed=1))
    Muon([plain], lr=0.1, scaling="kimi", weight_decay=0.2, exact=True, nesterov=False).step()
    first = nn.Parameter(W.clone())
    first.grad = noise(9, 5, seed=1)
    NorMuon([first], lr=0.1, scaling="kimi", weight_decay=0.2, exact=True, nesterov=False).step()
    assert float((first - plain).detach().abs().max()) > 1e-3  # tall: rows of U Vᵀ differ in size


def test_the_first_step_of_normuon_has_the_norm_of_muons() -> None:
    """Of rank one, and of a wide matrix of full rank: `variant_of` rests on it."""
    wide, single = noise(6, 10, seed=2), noise(8, 1, seed=3) @ noise(1, 5, seed=4)
    for G in (wide, single):
        norms = []
        for kind in (Muon, NorMuon):
            p = parameter(torch.zeros_like(G), G)
            kind([p], lr=1.0, scaling="kimi", exact=True).step()
            norms.append(float(torch.linalg.matrix_norm(p.detach(), ord=2)))
        assert norms[0] == pytest.approx(norms[1], rel=1e-10)
    dead = noise(4, 3, seed=5)
    dead[2] = 0.0  # a neuron without gradient has no update
    p = parameter(torch.zeros(4, 3, dtype=torch.float64), dead)
    NorMuon([p], lr=1.0, exact=True).step()
    assert bool(p.isfinite().all()) and float(p[2].abs().max()) < 1e-12
