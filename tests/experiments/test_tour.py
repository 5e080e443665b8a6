"""The tour of architectures: its path, its blocks and its profiles against computations that do not share its code."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from grsd.cli import main
from grsd.dynamics import flow
from grsd.dynamics.modes import modes
from grsd.dynamics.problem import Problem
from grsd.experiments import engine, tour
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.spectrum import shells
from grsd.spectrum.measure import SpectralMeasure
from grsd.spectrum.nulls import frozen_kernel


def problem(family: str = "MLP", samples: int = 24, seed: int = 0) -> Problem:
    x, y = tour.data(samples, seed=1000 + seed)
    return Problem(tour.model(family, 8, 2, seed=seed), x, y)


@pytest.mark.parametrize("family", tour.FAMILIES)
def test_every_family_has_depth_plus_two_blocks_and_no_kink(family: str) -> None:
    at = problem(family)
    found = Blocks.of(at, split=tour.FAMILIES[family].split(2))
    assert (
        len(found) == 4
        and sum(found.sizes) == len(at.theta)
        and at.kinks == ()
        and not found.reused
    )


def test_the_path_ends_at_the_level_and_is_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    at = problem()
    path = tour.relax(at, 0.3, rtol=1e-6)
    assert path.times[0] == 0 and np.allclose(path.times[2:] / path.times[1:-1], 2)
    # the loss is asked for at times with the ratio 2^(1/4)
    before = flow.integrate(at, [0.0, path.times[-1] / 2**0.25], estimate=False)
    assert path.losses[-1] <= 0.3 * path.losses[0] < before.losses[-1]
    other = flow.integrate(
        at, path.times, rtol=1e-10, atol=1e-12, estimate=False
    )  # another method, tighter
    # rtol 1e-6 a step, a few hundred steps
    np.testing.assert_allclose(path.losses, other.losses, rtol=3e-4)
    assert path.identity < 1e-3
    monkeypatch.setattr(tour, "OCTAVES", 2)
    with pytest.raises(ValueError, match=r"of its first value at t = .*, not 0.3"):
        tour.relax(at, 0.3)


def test_a_linearized_net_has_the_frozen_profile_and_a_net_does_not() -> None:
    """The null of no transport: what it predicts for the end of the path is exact where the kernel does not move."""
    at = problem()
    gaps = []
    for net in (at.linearized(at.theta), at):
        path = tour.relax(net, 0.3, rtol=1e-8)
        ends = []
        for theta in path.thetas[[0, -1]]:
            kernel = net.kernel(theta)
            ends.append(modes(kernel, torch.zeros_like(kernel), net.error(theta)))
        first, last = (
            SpectralMeasure.exact(one.eigenvalues.clip(0), one.coefficients**2).shells(tour.SHELLS)
            for one in ends
        )
        exact = SpectralMeasure.exact(ends[0].eigenvalues.clip(0), ends[0].coefficients ** 2)
        frozen = frozen_kernel(exact, float(path.times[-1]), tour.SHELLS)
        assert first.total == pytest.approx(path.losses[0], rel=1e-10)
        gaps.append(float(np.abs(frozen.energies - last.energies).sum() / last.total))
    # rtol 1e-8 a step on losses; a net's eigenvalues cross edges, which moves energy between shells
    assert gaps[0] < 1e-5 < 0.05 < gaps[1]


def test_profiles_are_shares_and_random_errors_rank_anywhere() -> None:
    at = problem("SSM", 40)
    kernel = at.kernel(at.theta)
    found = modes(kernel, torch.zeros_like(kernel), at.error(at.theta))
    lam, g = found.eigenvalues, found.coefficients
    shown = tour.profiles(found, g, seed=0)
    assert shown["permuted"].tolist() == shown["error"].tolist()  # given the same coefficients
    edges = tour.SHELLS.edges
    inside = [(g[(lam >= a) & (lam < b)] ** 2).sum() / (g**2).sum() for a, b in pairwise(edges)]
    np.testing.assert_allclose(shown["error"], inside, rtol=1e-12, atol=1e-15)
    assert shown["count"].sum() == pytest.approx(1) and (shown["count"] * 40 % 1 < 1e-9).all()
    ranks = []
    for seed in range(12):
        random = np.random.default_rng(100 + seed).standard_normal(40)
        drawn = modes(kernel, torch.zeros_like(kernel), np.sqrt(1 / 40) * found.vectors @ random)
        ranks.append(tour.profiles(drawn, random, seed=seed)["rank"])
    assert (
        0.2 < np.mean(ranks) <= 1
    )  # uniform but for ties, which count as deep: standard error 0.29/√12 = 0.08
    # a planted valley between two peaks is deeper than nearly all random ones
    valley = np.where(np.abs(np.arange(40) - 20) < 8, 1e-3, 1.0)
    planted = modes(kernel, torch.zeros_like(kernel), found.vectors @ valley)
    assert tour.profiles(planted, valley, seed=0)["dip"] > 50


def test_along_a_path_the_largest_modes_are_kept_and_follow_the_law_that_was_planted() -> None:
    """ṡ = c₀/t of the 20 largest of 24 modes, wild below; the least four are missing at the start."""
    rng, times, instants = np.random.default_rng(0), np.array([0.0, 1.0, 2.0, 4.0]), []
    for k, t in enumerate(times):
        lam = np.geomspace(1e-6, 1, 24) * (1 + t) ** 0.3
        speeds = np.r_[rng.uniform(-9, 9, 4), np.full(20, 0.3 / max(t, 0.1))]
        if k == 0:
            lam[:4], speeds[:4] = 0.0, 0.0
        coupled = rng.standard_normal((24, 24)) * np.sqrt(np.outer(lam, lam))
        coupled = np.triu(coupled, 1) + np.triu(coupled, 1).T
        instants.append(modes(np.diag(lam), coupled + np.diag(lam * speeds), np.ones(24)))
    path = flow.Path(times, np.zeros((4, 1)), np.ones(4), 0.0, problem(), 0.0)
    along = tour._along(path, instants)
    assert along["modes"] == 20
    np.testing.assert_allclose(along["variation"], 0.0, atol=1e-12)
    np.testing.assert_allclose(along["exponent"], 1.0, rtol=1e-9)
    np.testing.assert_allclose(along["pace"], [0.0, 0.3, 0.3, 0.3], rtol=1e-9, atol=1e-12)
    assert along["collapse"] == along["collapse_null"] == 0.0  # no spread, no evidence
    np.testing.assert_allclose(along["jacobian"], (1 + times) ** 0.15, rtol=1e-9)


def test_an_average_has_one_peak_when_its_valley_is_within_the_errors() -> None:
    count = len(tour.SHELLS)
    mean = np.exp(-0.5 * ((np.arange(count) - 14) / 3) ** 2)
    mean[14] *= 0.8
    for sem, one in ((0.01, False), (0.2, True)):
        assert shells.statistics(tour.averaged(mean, np.full(count, sem), 8)).unimodal is one


def test_the_experiment_runs_and_its_table_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path))
    monkeypatch.delenv("GRSD_SCALE", raising=False)
    words = [
        "families=MLP,SSM",
        "widths=8",
        "depth=1",
        "samples=24",
        "seeds=2",
        "level=0.6",
        "probes=4",
    ]
    options = [part for word in words for part in ("--option", word)]
    out = tmp_path / "tour.json"
    done = CliRunner().invoke(main, ["experiment", "tour", *options, "--output", str(out)])
    assert done.exit_code == 0, done.output
    groups = json.loads(out.read_text(encoding="utf-8"))["data"]["groups"]
    assert [g["family"] for g in groups] == ["MLP", "SSM"] and all(
        g["loss"][0] <= 0.6 for g in groups
    )
    for g in groups:
        for end in tour.ENDS:
            assert 0 < g[end]["overlap"][0] <= 1 and len(g[end]["tails"]) == 2
            for kind in ("error", "count", "permuted", *(["frozen"] if end == "end" else [])):
                assert sum(g[end]["profiles"][kind]["mean"]) == pytest.approx(
                    1, abs=0.02
                )  # three digits a shell
        # ‖J‖ from the blocks and from the modes, by two codes
        for end, place in (("start", 0), ("end", -1)):
            assert g[end]["jacobian"][0] == pytest.approx(g["tracks"]["jacobian"][place], rel=0.01)
            assert g[end]["slope"][0] == pytest.approx(
                g["tracks"]["slope"][place], rel=0.01, abs=1e-3
            )
            assert g[end]["ranks"][0] == pytest.approx(g["tracks"]["ranks"][place], rel=0.01)
        # D7 by the blocks of the report and by the dense kernel of the problem
        assert np.shape(g["laws"]["variation"]) == np.shape(g["laws"]["pace"])
        for end, place in (("start", 0), ("end", -1)):
            for name in ("variation", "exponent"):
                by_modes = [one[place] for one in g["laws"][name]]
                assert g[end][name] == pytest.approx(by_modes, rel=0.01)
            assert len(g[end]["random"]) == len(g[end]["random_exponent"]) == 6
        assert g["growth"][0] >= 1 and g["tracks"]["losses"][0] == 1
    alone = engine.run(tour.EXPERIMENT, tour.Parameters(families=("MLP",), widths=(8,), depth=1, samples=24, seeds=2, level=1.0, probes=4), cache=tmp_path)  # fmt: skip
    (only,) = alone.data["groups"]
    assert "end" not in only and "collapse" not in only and "tracks" not in only
    assert only["start"]["jacobian"] == groups[0]["start"]["jacobian"]
    assert len(tour.table(alone.data)[1]) == 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"families": ("MLP", "RNN")}, "family is 'RNN'"),
        ({"widths": (6,)}, "width is 6; expected a multiple of 4"),
        ({"widths": ()}, "width is 0; expected a multiple of 4"),
        ({"samples": 8}, "samples is 8"),
        ({"seeds": 1}, "seeds is 1"),
        ({"level": 0.0}, "level is 0.0"),
    ],
)
def test_bad_parameters_are_quoted(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tour.Parameters(**given)
    with pytest.raises(ValueError, match="family is 'RNN'"):
        tour.model("RNN", seed=0)
