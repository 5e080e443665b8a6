"""Every family against a property or a formula that does not share its code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from grsd.lab.nets import architectures
from grsd.lab.nets.architectures import (
    Norm,
    ResidualNet,
    mixer,
    res_conv,
    res_mlp,
    ssm,
    transformer,
)

FAMILIES: dict[str, Callable[..., ResidualNet]] = {
    "res_mlp": partial(res_mlp, inputs=64, width=6, depth=2),
    "res_mlp, one layer": partial(res_mlp, inputs=64, width=6, depth=2, layers=1, bias=True),
    "res_conv": partial(res_conv, width=5, depth=2),
    "transformer": partial(transformer, width=6, depth=2),
    "ssm": partial(ssm, width=6, depth=2, states=4),
    "mixer": partial(mixer, width=6, depth=2, hidden=7),
}
# Sums of at most a few hundred float64 terms of order 1, a few layers deep: 1e3 roundings of 2e-16.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def images(n: int = 3, side: int = 8, seed: int = 5) -> Tensor:
    return torch.randn(
        n, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_shape_dtype_mode_and_seed(name: str) -> None:
    make, x = FAMILIES[name], images()
    state = torch.random.get_rng_state()
    first, same, other = make(seed=0), make(seed=0), make(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    assert not first.training and all(p.dtype == torch.float64 for p in first.parameters())
    with torch.no_grad():
        y = [net(x) for net in (first, same, other)]
    assert y[0].shape == (3, 1) and torch.equal(y[0], y[1]) and not torch.equal(y[0], y[2])
    assert make(seed=0, outputs=4)(x).shape == (3, 4)
    single = make(seed=0, dtype=torch.float32)(x.float())
    assert single.dtype == torch.float32 and torch.allclose(
        single.double(), y[0], rtol=1e-4, atol=1e-5
    )
    assert (
        sum(name.endswith("branch_end") for name, _ in first.named_modules())
        >= len(first.blocks)
        == 2
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_without_epsilon_the_blocks_are_the_identity(name: str) -> None:
    net, x = FAMILIES[name](seed=0, epsilon=0.0), images()
    assert torch.equal(net(x), net.head(net.pool(net.read(x))))
    assert not torch.allclose(FAMILIES[name](seed=0, epsilon=0.1)(x), net(x))


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_do_not_mix_and_every_parameter_counts(name: str) -> None:
    """Two biases are invisible. That of keys adds one number to all scores of a query, which softmax removes; the last one of
    token mixing adds one number to all channels of a token, which every later norm removes.
    """
    invisible = ("key.bias", "tokens.inner.branch_end.bias")
    net, x = FAMILIES[name](seed=0), images()
    assert torch.allclose(net(x)[1:2], net(x[1:2]), **CLOSE)
    net(x).sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None
        size = float(p.grad.abs().max())
        assert size < 1e-13 if key.endswith(invisible) else size > 1e-6, key


def test_weights_have_variance_one_over_fan_in() -> None:
    net = res_mlp(inputs=50, width=200, depth=2, seed=0)
    first = net.blocks[1].branch.first.weight  # type: ignore[union-attr, operator]
    # 200 · 200 draws: their variance has relative standard error √(2/40000) = 0.7 %
    assert abs(200 * float(first.detach().var()) - 1) < 0.03  # type: ignore[operator, arg-type]
    assert abs(50 * float(net.read.weight.detach().var()) - 1) < 0.06  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("layers", [1, 2])
def test_res_mlp_is_its_formula(layers: int) -> None:
    net = res_mlp(inputs=64, width=6, depth=2, layers=layers, epsilon=0.3, seed=3)
    w = [p.detach() for p in net.parameters()]
    h = images().reshape(3, 64) @ w[0].T
    for l in range(2):  # noqa: E741
        if layers == 1:
            h = h + 0.3 * torch.tanh(h) @ w[1 + l].T
        else:
            h = h + 0.3 * torch.tanh(h @ w[1 + 2 * l].T) @ w[2 + 2 * l].T
    assert torch.allclose(net(images()), h @ w[-1].T, **CLOSE)


def test_linear_res_mlp_is_a_product_of_matrices() -> None:
    net = res_mlp(inputs=64, width=6, depth=3, layers=1, activation="linear", epsilon=0.3, seed=3)
    w = [p.detach() for p in net.parameters()]
    whole = w[-1]
    for middle in reversed(w[1:-1]):
        whole = whole @ (torch.eye(6, dtype=torch.float64) + 0.3 * middle)
    assert torch.allclose(net(images()), images().reshape(3, 64) @ (whole @ w[0]).T, **CLOSE)


def test_res_conv_on_a_torus_ignores_shifts() -> None:
    x = images()
    shifted = x.roll((3, 2), (-2, -1))
    torus, plane = (res_conv(width=5, depth=2, circular=c, seed=0) for c in (True, False))
    assert torch.allclose(torus(shifted), torus(x), **CLOSE)
    assert (plane(shifted) - plane(x)).abs().max() > 1e-4  # zeros around the image are a place
    assert plane(images(side=11)).shape == (3, 1)


def test_transformer_block_is_that_of_pytorch() -> None:
    width = 6
    net = transformer(width=width, depth=1, heads=3, seed=2)
    block = net.blocks[0]
    with torch.random.fork_rng(devices=[]):
        theirs = nn.TransformerEncoderLayer(
            width,
            3,
            width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        ).eval()
    ours = dict(block.named_parameters())
    joined = {
        f"self_attn.in_proj_{k}": torch.cat(
            [ours[f"attention.{r}.{k}"] for r in ("query", "key", "value")]
        )
        for k in ("weight", "bias")
    }
    names = {
        "norm1": "attention.norm", "self_attn.out_proj": "attention.branch_end", "norm2": "mlp.norm",
        "linear1": "mlp.first", "linear2": "mlp.branch_end",
    }  # fmt: skip
    theirs.load_state_dict(
        joined
        | {f"{a}.{k}": ours[f"{b}.{k}"] for a, b in names.items() for k in ("weight", "bias")}
    )
    tokens = net.read(images())
    assert torch.allclose(block(tokens), theirs(tokens), **CLOSE)


def test_transformer_without_positions_ignores_the_order_of_patches() -> None:
    x = images()
    swapped = torch.cat([x[..., 4:, :], x[..., :4, :]], dim=-2)  # whole patches move, none is cut
    blind, seeing = (transformer(width=6, depth=2, positions=p, seed=0) for p in (False, True))
    assert torch.allclose(blind(swapped), blind(x), **CLOSE)
    assert (seeing(swapped) - seeing(x)).abs().max() > 1e-3
    pixels = transformer(width=6, depth=1, patch=1, positions=False, seed=0)
    assert torch.allclose(pixels(x.transpose(-1, -2)), pixels(x), **CLOSE)


def test_ssm_is_its_recurrence() -> None:
    net = ssm(width=6, depth=2, states=4, epsilon=0.7, decays=(0.3, 0.9), seed=1)
    x = images()
    h = [net.read(row.unsqueeze(-2))[:, 0] for row in x.unbind(-2)]
    for block in net.blocks:
        layer = block.recurrence
        a, state, out = torch.sigmoid(layer.decay), torch.zeros(3, 4, dtype=torch.float64), []  # type: ignore[arg-type]
        for now in h:
            state = a * state + layer.first(now)  # type: ignore[operator]
            out.append(now + 0.7 * layer.branch_end(torch.tanh(state)))  # type: ignore[operator]
        h = out
    assert torch.allclose(net(x), net.head(h[-1]), **CLOSE)
    a = torch.sigmoid(net.blocks[0].recurrence.decay)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(a, torch.linspace(0.3, 0.9, 4, dtype=torch.float64), **CLOSE)


def test_ssm_forgets_what_lies_far_back() -> None:
    """With a ≤ ρ in one block, the first row reaches the last output through ρ^(T−1) only."""
    x, long = images(), torch.zeros(3, 1, 24, 8, dtype=torch.float64)
    long[:, :, -8:] = x
    net = ssm(width=6, depth=1, decays=(0.2, 0.2), activation="linear", bias=False, seed=1)
    moved = long.clone()
    moved[:, :, 0] += 1.0
    effect = (net(moved) - net(long)).abs().max()
    assert 0 < effect < 100 * 0.2**23  # 100: three random 6 × 6 maps and a sum of eight ones


def test_mixer_commutes_with_permutations_of_its_tokens() -> None:
    """Permuting the patches changes nothing once the token-mixing weights are permuted with them."""
    net, x = mixer(width=6, depth=2, hidden=7, seed=0), images()
    swapped = torch.cat([x[..., 4:, :], x[..., :4, :]], dim=-2)
    order = torch.arange(16).roll(
        8
    )  # patches row by row: half of them change place with the other half
    moved = {}
    for key, p in net.named_parameters():
        into, out = key.endswith("tokens.inner.first.weight"), "tokens.inner.branch_end" in key
        moved[key] = p[:, order] if into else p[order] if out else p
    assert torch.allclose(functional_call(net, moved, (swapped,)), net(x), **CLOSE)
    assert (net(swapped) - net(x)).abs().max() > 1e-3


def test_mixer_is_its_formula() -> None:
    net, x = mixer(width=6, depth=1, hidden=7, epsilon=0.4, seed=0), images()
    p = {key.removeprefix("blocks.0."): value for key, value in net.named_parameters()}
    patches = torch.stack(
        [
            x[:, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
            for i in range(4)
            for j in range(4)
        ],
        1,
    )

    def norm(h: Tensor, key: str) -> Tensor:
        return nn.functional.layer_norm(h, (6,), p[f"{key}.weight"], p[f"{key}.bias"])

    def two(h: Tensor, key: str) -> Tensor:
        inner = nn.functional.gelu(h @ p[f"{key}.first.weight"].T + p[f"{key}.first.bias"])
        return inner @ p[f"{key}.branch_end.weight"].T + p[f"{key}.branch_end.bias"]

    h = patches @ p["read.linear.weight"].T + p["read.linear.bias"]
    h = h + 0.4 * torch.einsum(
        "nkt->ntk", two(torch.einsum("ntk->nkt", norm(h, "tokens.norm")), "tokens.inner")
    )
    h = h + 0.4 * two(norm(h, "channels.norm"), "channels")
    assert torch.allclose(
        net(x), norm(h.mean(1), "pool.norm") @ p["head.weight"].T + p["head.bias"], **CLOSE
    )


def test_norm_is_layer_norm_and_differentiates_twice_in_either_mode() -> None:
    x, along = images().reshape(24, 8), images(seed=6).reshape(24, 8)
    ours, theirs = Norm(8, dtype=torch.float64), nn.LayerNorm(8, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), **CLOSE)

    def slope(at: Tensor) -> Tensor:
        found: Tensor = grad(lambda h: (torch.tanh(ours(h)) * along).sum())(at)
        return found

    _, forward = jvp(slope, (x,), (along,))
    backward = grad(lambda at: (slope(at) * along).sum())(x)  # the Hessian is symmetric
    assert torch.allclose(forward, backward, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: res_mlp(inputs=0, width=4, depth=1, seed=0), "inputs is 0"),
        (lambda: res_mlp(inputs=4, width=4, depth=-1, seed=0), "depth is -1"),
        (lambda: res_mlp(inputs=4, width=2.5, depth=1, seed=0), "width is 2.5"),  # type: ignore[arg-type]
        (lambda: res_mlp(inputs=4, width=4, depth=1, layers=3, seed=0), "layers is 3"),
        (
            lambda: res_mlp(inputs=4, width=4, depth=1, activation="swish", seed=0),
            "'swish'.*linear",
        ),
        (lambda: res_mlp(inputs=4, width=4, depth=1, epsilon=-0.1, seed=0), "epsilon is -0.1"),
        (
            lambda: res_mlp(inputs=4, width=4, depth=1, epsilon=float("nan"), seed=0),
            "epsilon is nan",
        ),
        (lambda: res_conv(width=4, depth=1, kernel=4, seed=0), "kernel is 4"),
        (lambda: transformer(width=6, depth=1, heads=4, seed=0), "heads 4 width 6"),
        (lambda: transformer(width=6, depth=1, patch=3, seed=0), "patch 3 must divide side 8"),
        (lambda: mixer(width=6, depth=1, patch=3, seed=0), "patch 3 must divide side 8"),
        (lambda: mixer(width=6, depth=1, hidden=0, seed=0), "hidden is 0"),
        (lambda: ssm(width=6, depth=1, decays=(0.5, 1.0), seed=0), r"decays are \(0.5, 1.0\)"),
    ],
)
def test_bad_arguments_are_quoted(make: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_depth_zero_is_allowed() -> None:
    assert len(architectures.res_mlp(inputs=64, width=4, depth=0, seed=0).blocks) == 0
