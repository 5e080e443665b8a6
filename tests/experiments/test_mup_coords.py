"""The experiment mup-coords: its pieces, one of them trained by hand, its slopes by another route, and runs that diverge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from grsd import mup, results
from grsd.experiments import mup_coords
from grsd.experiments.engine import find, parameters, run
from grsd.mup.coordcheck import FLAT
from grsd.mup.registry import OPTIMIZERS

SMALL: dict[str, Any] = {
    "widths": (16, 32, 64),
    "depths": (2, 4, 8),
    "base_width": 16,
    "base_depth": 2,
    "seeds": 2,
    "steps": 3,
    "samples": 8,
    "slow_width": 32,
}
ROUNDING = 5e-4  # four significant digits are stored


def asked(*names: str, **more: Any) -> mup_coords.Parameters:
    return mup_coords.Parameters(**{**SMALL, "optimizers": names, **more})


def test_pieces_cover_both_axes_and_hold_the_base_once() -> None:
    pieces = mup_coords.pieces(asked("adamw", "shampoo", "soap_sqrt"))
    counts = {
        (name, kind): sorted(
            (*p["size"], p["seed"])
            for p in pieces
            if (p["optimizer"], p["parametrization"]) == (name, kind)
        )
        for name in ("adamw", "shampoo", "soap_sqrt")
        for kind in ("mup", "sp")
    }
    every = [(16, 2), (16, 4), (16, 8), (32, 2), (64, 2)]
    assert (
        counts["adamw", "mup"]
        == counts["adamw", "sp"]
        == [(*size, s) for size in every for s in (0, 1)]
    )
    assert counts["shampoo", "sp"] == [
        (*size, s) for size in every[:-1] for s in (0, 1)
    ]  # slow: narrow only
    assert counts["soap_sqrt", "mup"] == counts["shampoo", "sp"] and counts["soap_sqrt", "sp"] == []
    assert {p["lr"] for p in pieces if p["optimizer"] == "adamw"} == {OPTIMIZERS["adamw"].rate}


@pytest.mark.parametrize("parametrization", ["mup", "sp"])
def test_one_piece_is_one_run_of_a_coordinate_check(parametrization: Any) -> None:
    p = asked("muon_kimi")
    direct = mup.coord_check(
        mup_coords.factory,
        mup_coords.batch(p.samples),
        widths=(16, 32),
        depths=(4,),
        base=(16, 2),
        optimizer="muon_kimi",
        lr=2.0**-9,
        steps=p.steps,
        seeds=(0, 1),
        parametrization=parametrization,
    )
    found = {
        (*piece["size"], piece["seed"]): mup_coords.measure(piece)
        for piece in mup_coords.pieces(p)
        if piece["parametrization"] == parametrization
        and piece["size"] in ([16, 2], [32, 2], [16, 4])
    }
    assert len(found) == len(direct.runs) == 6
    for r in direct.runs:
        one = found[r.width, r.depth, r.seed]
        assert one["features"] == pytest.approx(r.features, rel=ROUNDING)
        assert one["losses"] == pytest.approx(r.losses, rel=ROUNDING)


def test_a_piece_at_the_base_is_plain_training() -> None:
    """At the base all factors are 1: torch's own SGD on the same weights, the logistic loss and the norm written out."""
    p = asked("sgd")
    (piece,) = [
        x
        for x in mup_coords.pieces(p)
        if x["size"] == [16, 2] and x["seed"] == 1 and x["parametrization"] == "mup"
    ]
    found = mup_coords.measure(piece)

    net: Any = mup_coords.factory(16, 2)
    mup.plan(net, base=mup_coords.factory(16, 2), optimizer="sgd").initialize_(net, seed=1)
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(p.samples, 16, generator=generator),
        torch.randn(p.samples, generator=generator).sign(),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=piece["lr"])
    features, losses = [], []
    for _ in range(p.steps + 1):
        h = net.read(x)
        for block in net.blocks:
            h = block(h)
        f = net.head(h).squeeze(1)
        loss = torch.log(1 + torch.exp(-f * y)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        features.append(h.detach().double().numpy())
        losses.append(float(loss.detach()))
    moved = [math.sqrt(np.mean((h - features[0]) ** 2)) for h in features]
    assert moved[-1] > 1e-3  # something was trained
    assert found["losses"] == pytest.approx(losses, rel=ROUNDING)
    # a change of 1e-3 between float32 features of size 1 has lost three of seven digits
    assert found["features"] == pytest.approx(moved, rel=2 * ROUNDING)


def test_hidden_alone_is_plain_training_of_the_hidden_matrices() -> None:
    """At the base, by the rule and by the wrong rule: torch's SGD, given these matrices and nothing else."""
    p = asked("sgd", trained="hidden")
    pieces = [x for x in mup_coords.pieces(p) if x["size"] == [16, 2] and x["seed"] == 1]
    assert [x["parametrization"] for x in pieces] == ["mup", "wrong"]
    net: Any = mup_coords.factory(16, 2)
    mup.plan(net, base=mup_coords.factory(16, 2), optimizer="sgd").initialize_(net, seed=1)
    loss, first, moved = mup_coords.batch(p.samples), None, []
    optimizer = torch.optim.SGD(
        [q for q in net.blocks.parameters() if q.ndim == 2], lr=pieces[0]["lr"]
    )
    x = torch.randn(p.samples, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(p.steps + 1):
        h = net.read(x)
        for block in net.blocks:
            h = block(h)
        first = h.detach() if first is None else first
        moved.append(float((h.detach() - first).double().square().mean().sqrt()))
        net.zero_grad()
        loss(net).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert moved[-1] > 1e-3
    for piece in pieces:
        # a change of 1e-3 between float32 features of size 1 has lost three of seven digits
        assert mup_coords.measure(piece)["features"] == pytest.approx(moved, rel=2 * ROUNDING)


def test_hidden_alone_leaves_the_rest_and_misses_by_the_powers_that_it_is_given() -> None:
    kinds = {
        "rule": mup_coords.hidden_alone("adamw"),
        "wrong": mup_coords.hidden_alone("adamw", 1.0, -0.5),
    }
    runs = {
        kind: mup.coord_check(
            mup_coords.factory,
            mup_coords.batch(8),
            widths=(32,),
            depths=(8,),
            base=(16, 2),
            optimizer="adamw",
            lr=1e-3,
            steps=1,
            seeds=(0,),
            make_plan=make,
        ).runs
        for kind, make in kinds.items()
    }
    for right, wrong in zip(runs["rule"], runs["wrong"], strict=True):
        assert set(right.updates) == set(wrong.updates) == {"hidden"}  # nothing else has moved
        factor = (right.width / 16) * (right.depth / 2) ** -0.5
        # Adam's first step is η sign ∇: a float32 weight of size ¼ and a step of 1e-3 have lost two of seven digits
        assert wrong.updates["hidden"] / right.updates["hidden"] == pytest.approx(factor, rel=1e-4)


def test_hidden_alone_has_a_wrong_rule_for_every_optimizer_but_soap() -> None:
    pieces = mup_coords.pieces(asked(*mup_coords.checked(), trained="hidden"))
    assert {p["optimizer"] for p in pieces if p["parametrization"] == "wrong"} == set(
        mup_coords.checked()
    ) - {"soap"}
    assert {p["parametrization"] for p in pieces} == {"mup", "wrong"}
    with pytest.raises(ValueError, match=r"trained is 'none'; expected one of all, hidden"):
        asked("adamw", trained="none")


def test_hidden_alone_tells_a_wrong_rule_of_a_matrix_optimizer(tmp_path: Path) -> None:
    sizes = {
        "widths": (32, 64, 128),
        "depths": (4, 8, 16),
        "base_width": 32,
        "base_depth": 4,
        "trained": "hidden",
    }
    outcome = run(find("mup-coords"), asked("muon_kimi", **sizes), cache=tmp_path)
    good, bad = outcome.data["checks"]
    for axis, off in zip(("width", "depth"), bad["off"], strict=True):
        assert abs(good["slopes"][axis][-1][0]) < FLAT < abs(bad["slopes"][axis][-1][0])
        assert bad["slopes"][axis][-1][0] - good["slopes"][axis][-1][0] == pytest.approx(
            off, abs=0.1
        )
    assert good["off"] == [0.0, 0.0] and outcome.data["trained"] == "hidden"


def planted(
    p: mup_coords.Parameters, width: float, depth: float, noise: float
) -> list[dict[str, Any]]:
    """Features t · width^a · depth^b with noise, of every piece."""
    rng = np.random.default_rng(3)
    return [
        {
            "features": [
                float(
                    0.1
                    * t
                    * (piece["size"][0] / 16) ** width
                    * (piece["size"][1] / 2) ** depth
                    * math.exp(noise * z)
                )
                for t, z in enumerate(rng.standard_normal(p.steps + 1))
            ],
            "losses": [0.7] * (p.steps + 1),
        }
        for piece in mup_coords.pieces(p)
    ]


def test_slopes_are_those_of_another_fit() -> None:
    p = asked("adamw", "lion")
    pieces, data = mup_coords.pieces(p), planted(p, 0.5, -1.0, 0.2)
    exact = mup_coords.reduce(p, pieces, planted(p, 0.5, -1.0, 0.0))["checks"]
    for check in exact:
        assert [s[0] for s in check["slopes"]["width"]] == [0.5] * 3 and [
            s[0] for s in check["slopes"]["depth"]
        ] == [-1.0] * 3
        assert check["base change"] == pytest.approx([0.3, 0.3]) and (
            check["diverged"],
            check["runs"],
        ) == (0, 10)
    for check in mup_coords.reduce(p, pieces, data)["checks"]:
        assert check["widths"] == [16, 32, 64] and check["depths"] == [2, 4, 8]
        for place, axis in enumerate(("width", "depth")):
            for step in range(1, p.steps + 1):
                rows = [
                    (math.log(piece["size"][place]), math.log(one["features"][step]))
                    for piece, one in zip(pieces, data, strict=True)
                    if (piece["optimizer"], piece["parametrization"])
                    == (check["optimizer"], check["parametrization"])
                    and piece["size"][1 - place] == (2, 16)[place]
                ]
                x, y = np.array(rows).T
                (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
                half = stats.t(len(rows) - 2).ppf(0.975) * math.sqrt(covariance[0, 0])
                # four decimals are stored
                assert check["slopes"][axis][step - 1] == pytest.approx(
                    [slope, slope - half, slope + half], abs=6e-5
                )


def test_what_diverged_is_null_and_counted_and_left_out_of_the_fit() -> None:
    p = asked("sgd")
    piece = {**mup_coords.pieces(p)[0], "lr": 1e30}
    lost = mup_coords.measure(piece)
    assert lost["features"][0] == 0 and lost["features"][-1] is None and lost["losses"][-1] is None
    assert results.dumps(lost)  # finite numbers and nulls only

    pieces, data = mup_coords.pieces(p), planted(p, 0.5, 0.0, 0.0)
    for piece, one in zip(pieces, data, strict=True):
        if piece["parametrization"] == "sp" and piece["size"][0] > 16:
            one["features"][2:] = [None, None]
    mu, sp = mup_coords.reduce(p, pieces, data)["checks"]
    assert (mu["diverged"], sp["diverged"], sp["runs"]) == (0, 4, 10)
    assert sp["slopes"]["width"][0][0] == 0.5 and sp["slopes"]["width"][1:] == [None, None]
    assert sp["slopes"]["depth"][2][0] == 0.0 and mu["slopes"]["width"][2][0] == 0.5
    columns, rows = mup_coords.table({"checks": [mu, sp]})
    assert rows[1] == ["sgd", "sp", "–", "+0.00 [+0.00, +0.00]", "4 of 10"] and len(rows[0]) == len(
        columns
    )


def test_the_experiment_finds_what_scales_and_what_does_not(tmp_path: Path) -> None:
    sizes = {"widths": (32, 64, 128), "depths": (4, 8, 16), "base_width": 32, "base_depth": 4}
    outcome = run(find("mup-coords"), asked("adamw", **sizes), cache=tmp_path)
    good, bad = outcome.data["checks"]
    for axis in ("width", "depth"):
        assert (
            abs(good["slopes"][axis][-1][0]) < FLAT < bad["slopes"][axis][-1][1]
        )  # SP: its whole interval
    assert results.dumps(outcome.data) and outcome.data["steps"] == 3
    assert [row[:2] for row in mup_coords.table(outcome.data)[1]] == [
        ["adamw", "mup"],
        ["adamw", "sp"],
    ]


def test_parameters_are_checked_and_a_gpu_enlarges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="optimizer is 'adam'; expected one of sgd, adamw, "):
        mup_coords.Parameters(optimizers=("adam",))
    with pytest.raises(ValueError, match="sizes, seeds and steps is 0"):
        mup_coords.Parameters(seeds=0)
    experiment = find("mup-coords")
    assert parameters(experiment, ["optimizers=sgd,lion", "widths=8,16"]).widths == (8, 16)
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    large = parameters(experiment)
    assert max(large.widths) == 2048 and large.seeds == 8 and large.device == "cuda"


def test_net_and_batch_go_to_the_device_of_the_piece() -> None:
    (piece, *_) = mup_coords.pieces(asked("sgd", device="quantum"))
    with pytest.raises(RuntimeError, match="quantum"):
        mup_coords.measure(piece)
    with pytest.raises(RuntimeError, match="quantum"):
        mup_coords.batch(8, device="quantum")
    net = mup_coords.factory(16, 2).to("meta")
    assert mup_coords.batch(8, device="meta")(net).device.type == "meta"
