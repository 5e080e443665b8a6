"""What each diagnostic does not see: scales of outputs, loss and time, the order of units and of samples; and what it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grsd.lab.nets.models import mlp
from grsd.lab.nets.planted import smooth_task
from grsd.renorm.diagnostics.bandedness import bandedness
from grsd.renorm.diagnostics.block_matrices import block_matrices
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.coherence import block_coherence, size
from grsd.renorm.diagnostics.collapse import collapse, roughness, separability
from grsd.renorm.diagnostics.couplings import shift_invariance
from grsd.spectrum import Outputs

X, Y = smooth_task(32, 5, seed=1)


def _net(activation: str = "tanh", bias: bool = True) -> nn.Sequential:
    return mlp([5, 12, 12, 12, 1], activation, bias=bias, seed=2)  # type: ignore[arg-type]


def _blocks(net: nn.Module, x: Tensor = X, y: Tensor = Y) -> Blocks:
    return Blocks(net, x, Outputs(y[:, None]))


def _measured(blocks: Blocks) -> dict[str, np.ndarray]:
    """Every number of D1 to D4, D6 and D7 at one instant."""
    matrices = block_matrices(blocks)
    modes = matrices.modes()
    held = ~modes.in_kernel
    lam, speed = modes.eigenvalues[held], modes.rates[held] / modes.eigenvalues[held]
    band, law = bandedness(blocks, bands=(0, 1)), separability(lam, speed)
    pairs, norms = block_coherence(blocks, matrices=matrices), size(blocks, matrices=matrices)
    shift = shift_invariance(modes.eigenvalues, modes.matrix, floor=modes.floor)
    found = {
        "D1 tails": band.tails, "D1 pooled": band.pooled, "D1 unlocal": band.unlocal,
        "D1 scalar": band.scalar, "D2 normalised": pairs.normalized, "D2 norms": pairs.norms,
        "D3 jacobian": norms.jacobian, "D3 rate": norms.rate, "D3 clock": norms.clock,
        "D4 slope": shift.slope, "D4 rms": shift.rms, "D6": roughness(lam, speed).value,
        "D7 variation": law.variation, "D7 exponent": law.exponent, "D7 mean": law.mean,
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in found.items()}


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)  # type: ignore[no-any-return]


def _outputs(a: float) -> Blocks:
    split = [["net.0"], ["net.2"], ["net.4"], ["net.6"]]
    return Blocks(Scaled(_net(), a), X, Outputs(a * Y[:, None]), split=split)


def _loss(a: float) -> Blocks:
    """A factor of the loss, or 1/a of the unit of time: a times the velocity."""
    blocks = _blocks(_net())
    names = [name for members in blocks.members for name in members]
    shapes = [shape for shapes in blocks.shapes for shape in shapes]
    parts = torch.split(torch.cat(blocks.velocity), [int(np.prod(s)) for s in shapes])
    along = {n: a * w.reshape(s) for n, w, s in zip(names, parts, shapes, strict=True)}
    return blocks.at(dict(_net().named_parameters()), along)


def _units() -> Blocks:
    net, order = _net(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[2].weight.copy_(net[2].weight[order])
        net[2].bias.copy_(net[2].bias[order])
        net[4].weight.copy_(net[4].weight[:, order])
    return _blocks(net)


def _samples() -> Blocks:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    return _blocks(_net(), X[order], Y[order])


# powers of the factor 3 that a number takes; all others have 0
POWERS = {
    "outputs": {"D2 norms": 2, "D3 jacobian": 1, "D3 rate": 3, "D3 clock": 2, "D7 mean": 2},
    "loss or time": {"D3 rate": 1, "D3 clock": 1, "D7 mean": 1},
    "units": {},
    "samples": {},
}
# a combination of J^(m) entry by entry compares units of different layers by their places
SEEN = {"units": "D1 scalar"}
MOVED: dict[str, Callable[[], Blocks]] = {
    "outputs": lambda: _outputs(3.0),
    "loss or time": lambda: _loss(3.0),
    "units": _units,
    "samples": _samples,
}


@pytest.mark.parametrize("name", MOVED)
def test_scales_and_orders_change_units_alone(name: str) -> None:
    plain, moved = _measured(_blocks(_net())), _measured(MOVED[name]())
    if name in SEEN:
        assert np.abs(moved[SEEN[name]] - plain.pop(SEEN[name])).max() > 1e-4
    for what, value in plain.items():
        # eigenvectors of λ are right to n ε λ_max/λ, 1e-5 at the floor of D4; the rest to rounding
        tolerance = 1e-4 if what[:2] in ("D4", "D6", "D7") else 1e-7
        expected = value * 3.0 ** POWERS[name].get(what, 0)
        np.testing.assert_allclose(moved[what], expected, rtol=tolerance, atol=1e-7, err_msg=what)


def test_d5_sees_no_unit() -> None:
    rng, times = np.random.default_rng(0), np.geomspace(0.3, 30, 8)
    lam = np.geomspace(1e-3, 1, 40) * times[:, None] ** 0.5
    v = (np.sin(np.log(lam)) + 0.3 * rng.standard_normal(lam.shape)) / times[:, None]
    plain = collapse(times, lam, v, deals=4)
    order = rng.permutation(40)
    for other in (
        collapse(7 * times, lam / 7, v / 7, deals=4),  # time
        collapse(times / 9, 9 * lam, 9 * v, deals=4),  # outputs
        collapse(times / 3, lam, 3 * v, deals=4),  # loss
        collapse(times, lam[:, order], v[:, order], deals=4),  # names of modes
    ):
        assert other.value == pytest.approx(plain.value, rel=1e-9)
        assert other.error == pytest.approx(plain.error, rel=1e-9)


def test_layers_of_a_relu_net_rescaled_keep_the_function_and_d2_but_not_the_rest() -> None:
    found = {}
    for c in (1.0, 3.0, 10.0):
        net = _net("relu", bias=False)
        with torch.no_grad():
            net[0].weight.mul_(c)
            net[4].weight.div_(c)
        found[c] = _measured(_blocks(net))
        np.testing.assert_allclose(
            net(X).detach(), _net("relu", bias=False)(X).detach(), rtol=1e-12, atol=1e-14
        )
    plain = found[1.0]
    for c in (3.0, 10.0):
        # J^(1) becomes J^(1)/c and J^(3) becomes c J^(3): norms of pairs scale, their ratio does not
        np.testing.assert_allclose(found[c]["D2 normalised"], plain["D2 normalised"], rtol=1e-7)
        assert abs(found[c]["D1 pooled"][1] - plain["D1 pooled"][1]) > 0.02
        assert abs(found[c]["D4 slope"] - plain["D4 slope"]) > 0.02
    rates = [float(found[c]["D3 rate"]) for c in (1.0, 3.0, 10.0)]
    assert rates[1] > 1.5 * rates[0] and rates[2] > 4 * rates[0]
    assert abs(found[10.0]["D7 variation"] / plain["D7 variation"] - 1) > 0.1
