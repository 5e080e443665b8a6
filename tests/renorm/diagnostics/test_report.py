"""`conditions.report` on networks, flows and unmodified language models, and what it says where it cannot measure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from grsd.dynamics import modes
from grsd.dynamics.flow import integrate
from grsd.dynamics.problem import Problem
from grsd.lab.nets.models import gpt2, gpt_neox, mlp
from grsd.lab.nets.planted import TiedNet, smooth_task
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.bandedness import bandedness
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.coherence import block_coherence, size
from grsd.renorm.diagnostics.collapse import collapse, roughness
from grsd.renorm.diagnostics.conditions import Report, report
from grsd.spectrum import Outputs, TokenLogProb

X, Y = smooth_task(32, 5, seed=1)
IDS = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
DATA = IDS[:, :-1], TokenLogProb(IDS[:, 1:])


def _flow() -> tuple[Problem, Report]:
    problem = Problem(mlp([5, 8, 8, 1], seed=2), X, Y)
    path = integrate(problem, [0.0, 0.5, 1.0, 2.0], rtol=1e-8, estimate=False)
    return problem, report(problem, None, path, probes=None)


def _training(
    model: nn.Module, steps: int = 4, rate: float = 0.05
) -> list[tuple[float, dict[str, Tensor]]]:
    """Snapshots of plain gradient descent, taken as a reader would take them."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=rate), []
    for step in range(steps + 1):
        found.append(
            (step * rate, {name: value.clone() for name, value in model.state_dict().items()})
        )
        loss = -DATA[1].rows(model(DATA[0]).logits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def test_report_of_a_flow_is_made_of_the_single_diagnostics() -> None:
    problem, found = _flow()
    path = integrate(problem, [0.0, 0.5, 1.0, 2.0], rtol=1e-8, estimate=False)
    times, values, speeds = [], [], []
    for theta, instant in zip(path.thetas, found.instants, strict=True):
        one = modes.modes(
            *modes.instant(problem, theta)
        )  # by another route: the dense Jacobian of the problem
        shift = couplings.shift_invariance(one.eigenvalues, one.matrix)
        assert instant.shift is not None and instant.roughness is not None
        assert instant.shift.slope == pytest.approx(
            shift.slope, rel=1e-4
        )  # eigenvectors near the floor differ
        held = one.eigenvalues > 100 * 32 * np.finfo(float).eps * one.eigenvalues[-1]
        assert instant.rank == held.sum()
        speed = one.rates[held] / one.eigenvalues[held]
        assert instant.roughness.value == pytest.approx(
            roughness(one.eigenvalues[held], speed).value, rel=1e-4
        )
        times.append(instant.time)
        values.append(one.eigenvalues[held])
        speeds.append(speed)
    count = min(map(len, values[1:]))
    expected = collapse(
        times[1:], [v[-count:] for v in values[1:]], [v[-count:] for v in speeds[1:]]
    )
    assert found.collapse is not None and found.collapse.value == pytest.approx(
        expected.value, rel=1e-4
    )
    last = Blocks.of(problem, path.thetas[-1])
    band, overlap, sizes = (
        found.instants[-1].bandedness,
        found.instants[-1].coherence,
        found.instants[-1].size,
    )
    assert band is not None and overlap is not None and band.right is not None
    np.testing.assert_allclose(band.tails, bandedness(last).tails, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(overlap.norms, block_coherence(last).norms, rtol=1e-7)
    assert sizes.rate == pytest.approx(size(last).rate, rel=1e-8)
    assert found.instants[1].bandedness is None and found.instants[1].coherence is None


def test_d5_counts_time_as_the_path_does() -> None:
    """Three instants with times that do not start at 0, by the closed form of λ and ṡ: none is left out."""
    problem = Problem(mlp([5, 8, 8, 1], seed=2), X, Y)
    path = integrate(problem, [0.0, 0.5, 1.0], rtol=1e-8, estimate=False)
    fields = [modes.modes(*modes.instant(problem, theta)) for theta in path.thetas]
    held = min(
        int((one.eigenvalues > 100 * 32 * 2.3e-16 * one.eigenvalues[-1]).sum()) for one in fields
    )
    lam = np.array([one.eigenvalues[-held:] for one in fields])
    speeds = np.array([one.rates[-held:] for one in fields]) / lam
    for times, kept in (([3.6, 4.1, 4.6], 3), ([0.0, 0.5, 1.0], 2), ([-1.0, 0.2, 7.0], 2)):
        snapshots = [
            (t, torch.as_tensor(theta)) for t, theta in zip(times, path.thetas, strict=True)
        ]
        found = report(problem, None, snapshots, probes=2)
        expected = collapse(times[-kept:], lam[-kept:], speeds[-kept:])
        assert found.collapse is not None
        assert found.collapse.value == pytest.approx(expected.value, rel=1e-4)
        said = [note for note in found.notes if note.startswith("D5 counts time as the path does")]
        assert len(said) == (kept < 3)
        assert ("D5 collapse, 1 of 3 times ≤ 0 left out" in str(found.table())) == (kept < 3)


def test_d7_of_the_report_is_that_of_the_modes_and_of_random_directions() -> None:
    problem, found = _flow()
    theta = integrate(problem, [0.0, 0.5, 1.0, 2.0], rtol=1e-8, estimate=False).thetas[-1]
    one = modes.modes(*modes.instant(problem, theta))
    held = one.eigenvalues > 100 * 32 * np.finfo(float).eps * one.eigenvalues[-1]
    last = found.instants[-1]
    assert last.separability is not None and len(last.random) == len(found.instants[0].random) == 3
    speeds = one.rates[held] / one.eigenvalues[held]
    assert last.separability.variation == pytest.approx(
        speeds.std(ddof=1) / abs(speeds.mean()), rel=1e-4
    )
    line = np.polyfit(np.log(one.eigenvalues[held]), np.log(np.abs(one.rates[held])), 1)
    assert last.separability.exponent == pytest.approx(line[0], rel=1e-4)
    assert not found.instants[1].random
    # along one direction Ṁ is the difference quotient of the dense kernel; parameters come by blocks
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for p in mlp([5, 8, 8, 1], seed=2).parameters()
    ]
    moved = 1e-5 * torch.cat([draw.reshape(-1) for draw in draws])
    here = torch.as_tensor(theta)
    rate = (problem.kernel(here + moved) - problem.kernel(here - moved)).numpy() / 2e-5
    speed = (np.diag(one.vectors.T @ rate @ one.vectors) / 32)[held] / one.eigenvalues[held]
    # step 1e-5 squared, and rounding 1e-11 of λ_max over the least λ
    assert last.random[0].variation == pytest.approx(
        speed.std(ddof=1) / abs(speed.mean()), rel=1e-2
    )
    rows = {row[0]: row for row in found.table().rows}
    low, high = (pick(one.variation for one in last.random) for pick in (min, max))
    assert f"random directions {low:.3g} to {high:.3g}" in rows["D7 variation of ṡ"][3]
    assert rows["D7 t times the mean of ṡ"][1] == "–"  # t = 0
    assert rows["D7 t times the mean of ṡ"][2].startswith(f"{2 * speeds.mean():.3g}")


def test_worst_is_the_worst_and_not_the_pool() -> None:
    _, found = _flow()
    band = found.instants[-1].bandedness
    assert band is not None and band.right is not None
    rows = {row[0]: row for row in found.table().rows}
    for k in (0, 1):
        tails = band.tails[:, k].max()
        assert f"{tails:.3g}" != f"{band.pooled[k]:.3g}"
        assert rows[f"D1 tail B({k}), worst block"][2] == f"{tails:.3g}"
        assert rows[f"D1 tail B({k}), all blocks"][2] == f"{band.pooled[k]:.3g}"
    worst = band.right.coefficient[:, 0].max()
    assert worst > 1.02 * np.mean(band.right.coefficient[:, 0])
    assert rows["D1 its coefficient ‖B‖, worst"][2] == f"{worst:.3g}"


@pytest.mark.parametrize("make", [gpt2, gpt_neox])
def test_report_of_an_unmodified_language_model(make: object) -> None:
    model = make(seed=0, layers=2)  # type: ignore[operator]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    snapshots = _training(make(seed=0, layers=2))  # type: ignore[operator]
    ticks: list[tuple[int, int]] = []
    found = report(
        model,
        DATA,
        snapshots,
        instants=3,
        probes=4,
        progress=lambda done, of, _: ticks.append((done, of)),
    )
    assert [i.time for i in found.instants] == [snapshots[k][0] for k in (0, 2, 4)]
    assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)] and found.rows == 24 and found.passes > 0
    assert all(
        i.size.jacobian > 0 and i.shift is not None and i.roughness is not None
        for i in found.instants
    )
    assert found.collapse is not None and found.instants[-1].bandedness is not None
    assert not any("differ" in note for note in found.notes)
    assert any("weights enter more than once" in note for note in found.notes) == (make is gpt2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = str(found.table())
    assert (
        all(
            name in text
            for name in ("D1 tail B(0)", "D1 right", "D2", "D3", "D4 slope", "D5", "D6", "D7")
        )
        and "nan" not in text
    )
    again = json.loads(json.dumps(found.to_json()))
    assert again["instants"][0]["size"]["jacobian"] == found.instants[0].size.jacobian
    figure = found.draw(Figure(figsize=(9, 6)))
    assert len(figure.axes) == 4 and all(ax.lines or ax.containers for ax in figure.axes)


def test_many_rows_are_iterated() -> None:
    model = gpt2(seed=0, layers=2)
    data = IDS[:1, :-1], TokenLogProb(IDS[:1, 1:])
    dense, iterated = report(model, data, probes=4), report(model, data, probes=4, rows=8)
    a, b = dense.instants[0], iterated.instants[0]
    assert (
        a.coherence is not None
        and b.coherence is not None
        and a.bandedness is not None
        and b.bandedness is not None
    )
    np.testing.assert_allclose(b.coherence.norms, a.coherence.norms, rtol=1e-7)
    assert b.size.rate == pytest.approx(a.size.rate, rel=1e-7)
    np.testing.assert_array_equal(b.bandedness.pooled, a.bandedness.pooled)
    assert (
        a.bandedness.right is not None
        and b.bandedness.right is None
        and b.shift is None
        and b.rank is None
    )
    assert any("T = 12 rows exceed 8" in note for note in iterated.notes)


def test_a_path_of_one_point_is_handled() -> None:
    problem = Problem(mlp([5, 8, 8, 1], seed=2), X, Y)
    for path in (None, [(0.0, problem.theta)]):
        found = report(problem, None, path)
        assert len(found.instants) == 1 and found.collapse is None
        assert any(note.startswith("D5 needs two times after 0, got 0") for note in found.notes)
        assert found.instants[0].shift is not None and "D5 collapse" in str(found.table())
        found.draw(Figure(figsize=(9, 6)))


def test_motion_of_the_optimizer_can_be_asked_for() -> None:
    # plain gradient descent moves along the flow to first order in its step
    snapshots = _training(gpt2(seed=0, layers=2), steps=1, rate=1e-5)
    flow, path = (
        report(gpt2(seed=0, layers=2), DATA, snapshots, probes=4, instants=1, along=a)
        for a in ("flow", "path")
    )
    assert path.instants[0].size.rate == pytest.approx(flow.instants[0].size.rate, rel=1e-3)
    faster = [(t / 10, state) for t, state in snapshots]
    other = report(gpt2(seed=0, layers=2), DATA, faster, probes=4, instants=1, along="path")
    assert other.instants[0].size.rate == pytest.approx(10 * path.instants[0].size.rate, rel=1e-9)
    assert any("difference quotient of the snapshots" in note for note in path.notes)


def test_shared_weights_kinks_and_rank_are_said() -> None:
    tied = report(Problem(TiedNet(5, 8, 3, seed=1), X, Y), probes=4)
    assert any(
        "blocks.0.weight (3 times)" in note and "|l − m| is no distance" in note
        for note in tied.notes
    )
    kinked = report(mlp([5, 8, 8, 1], "relu", seed=1), (X, Y[:, None]), probes=4)
    assert any(note.startswith("relu: M(t) jumps") for note in kinked.notes)
    twice = torch.cat([X[:16], X[:16]])
    repeated = report(
        mlp([5, 8, 8, 1], seed=1), (twice, Outputs(torch.cat([Y[:16], Y[:16]])[:, None])), probes=4
    )
    assert repeated.instants[0].rank == 16
    assert any(
        "M has rank 16 of 32 at t = 0" in note and "rank-deficient" in note
        for note in repeated.notes
    )
    single = report(
        mlp([5, 8, 8, 1], dtype=torch.float32, seed=1), (X.float(), Y.float()[:, None]), probes=4
    )
    assert any("products in float32" in note for note in single.notes)


def test_no_motion_is_said() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = mlp([5, 1], seed=1), mlp([5, 1], seed=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x**2)  # type: ignore[no-any-return]

    found = report(Sum(), (X, Y[:, None]))
    assert found.instants[0].bandedness is None and found.instants[0].size.rate == 0.0
    assert found.instants[0].shift is None and found.instants[0].roughness is None
    assert any("J̇ = 0" in note for note in found.notes) and any(
        "no mode moves" in note for note in found.notes
    )
    assert "–" in str(found.table())


def test_too_few_rows_for_the_spectrum_are_said() -> None:
    found = report(mlp([5, 8, 1], seed=1), (X[:6], Y[:6, None]), probes=4)
    assert found.instants[0].shift is None and found.instants[0].roughness is None
    assert any("D4 at t = 0" in note and "needs 16 or more" in note for note in found.notes)
    assert any("modes is 6" in note for note in found.notes)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp([5, 4], seed=1), mlp([4, 1], seed=2)

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.b(self.a(x)) + 1  # type: ignore[no-any-return]


def test_bad_input_is_refused_with_a_sentence() -> None:
    net, problem = mlp([5, 8, 1], seed=1), Problem(mlp([5, 8, 1], seed=1), X, Y)
    theta = problem.theta
    with pytest.raises(ValueError, match="J = 0"):
        report(Detached(), (X, Y[:, None]))
    with pytest.raises(ValueError, match="1 block with trainable parameters"):
        report(mlp([5, 1], seed=1), (X, Y[:, None]))
    with pytest.raises(ValueError, match=r"a module needs data=\(inputs, observable\)"):
        report(net)
    with pytest.raises(ValueError, match="carries its own inputs and targets"):
        report(problem, (X, Outputs(Y)))
    with pytest.raises(ValueError, match=r"must ascend and be finite, got \[1.0, 0.5\]"):
        report(problem, None, [(1.0, theta), (0.5, theta)])
    with pytest.raises(ValueError, match=r"must ascend and be finite, got \[\]"):
        report(problem, None, [])
    with pytest.raises(ValueError, match="a path of one point has no direction"):
        report(problem, along="path")
    with pytest.raises(ValueError, match="along is 'adam'"):
        report(problem, along="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has 57 trainable parameters"):
        report(problem, None, [(0.0, theta[:-1])])
    with pytest.raises(ValueError, match="probes is 1"):
        report(problem, probes=1)
    with pytest.raises(ValueError, match="instants is 0"):
        report(problem, instants=0)
