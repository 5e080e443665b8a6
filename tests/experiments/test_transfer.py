from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from grsd import results
from grsd.cli import main
from grsd.experiments import engine, transfer
from grsd.lab.data import help_text
from grsd.mup import optima

EXPERIMENT = engine.find("transfer")
TINY = [
    "sizes=16,32",
    "base_width=16",
    "rates=-9,-6,-3",
    "seeds=2",
    "steps=4",
    "batch=2",
    "length=16",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRSD_SCALE", raising=False)


def run(*more: str, **keywords: Any) -> engine.Outcome:
    return engine.run(EXPERIMENT, engine.parameters(EXPERIMENT, [*TINY, *more]), **keywords)


def test_schemes_share_the_base_and_differ_elsewhere() -> None:
    found = run("schemes=sp,mup,k1").data
    assert [(c["scheme"], c["size"]) for c in found["curves"]] == [
        ("base", 16),
        ("sp", 32),
        ("mup", 32),
        ("k1", 32),
    ]
    sizes, rates, sp = transfer.losses(found, "sp")
    _, _, mup = transfer.losses(found, "mup")
    _, _, k1 = transfer.losses(found, "k1")
    assert sizes == [16, 32] and rates == [-9.0, -6.0, -3.0] and sp.shape == (2, 2, 3)
    np.testing.assert_array_equal(sp[0], mup[0])
    assert (np.abs(sp[1] - mup[1]).compressed() > 1e-5).all()
    np.testing.assert_array_equal(mup[1], k1[1])  # at equal depth the two rules are one
    for scheme in ("sp", "mup"):
        _, _, table = transfer.losses(found, scheme)
        best = [optima.optimum(rates, one) for one in table]
        assert found["schemes"][scheme]["optima"][1]["value"] == pytest.approx(
            best[1].value, rel=1e-5
        )
    with pytest.raises(ValueError, match="scheme is 'k2'"):
        transfer.losses(found, "k2")


def test_a_corpus_of_files_is_read_as_byte_level_bpe(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten eleven twelve. " * 4000)
    found = run(f"text={text}", "seeds=1", "schemes=mup", "stack=3").data
    size = found["text"]["vocabulary"]
    assert 257 < size < 2048 and found["text"]["fingerprint"]
    first = [loss for curve in found["curves"] for _, _, loss in curve["runs"]]
    # four steps from a uniform guess over that vocabulary, the smallest rate hardly away from it
    assert len(first) == 6 and max(first) == pytest.approx(math.log(size), abs=0.2)
    with pytest.raises(ValueError, match="unknown corpus 'nowhere"):
        run("text=nowhere.txt")


def test_stacked_runs_give_the_same_curves() -> None:
    alone, stacked = (run(f"stack={n}").data["curves"] for n in (1, 6))
    for one, other in zip(alone, stacked, strict=True):
        a, b = (np.array(sorted(c["runs"])) for c in (one, other))
        np.testing.assert_array_equal(a[:, :2], b[:, :2])
        np.testing.assert_allclose(a[:, 2], b[:, 2], rtol=1e-5)  # float32, four steps


def test_along_depth_the_one_layer_rule_is_another() -> None:
    found = run(
        "axis=depth", "base_depth=2", "sizes=2,4", "schemes=mup,k1", "norm=none", "seeds=1"
    ).data
    _, _, mup = transfer.losses(found, "mup")
    _, _, k1 = transfer.losses(found, "k1")
    assert (np.abs(mup[1] - k1[1]) > 1e-5).all()


def test_a_run_that_was_interrupted_goes_on_and_is_the_same(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Stopped

    cache = tmp_path / "other"
    with pytest.raises(Stopped):
        run(cache=cache, progress=stop)
    times = {p: p.stat().st_mtime_ns for p in cache.rglob("*.json")}
    assert len(times) == 2
    resumed = run(cache=cache)
    assert resumed.data == run().data
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())


def test_diverged_runs_are_stored_as_such_and_shown() -> None:
    found = run("rates=-9,-6,120", "optimizer=sgd", "seeds=1").data
    table = transfer.losses(found, "mup")[2]
    assert np.isnan(table[..., 2]).all() and not np.ma.getmaskarray(table).any()
    assert results.dumps(found)  # finite numbers and nulls only
    columns, rows = transfer.table(found)
    assert len(rows) == 4 and all(len(row) == len(columns) for row in rows)


def test_the_command_stores_a_result_that_names_its_options(tmp_path: Path) -> None:
    target = tmp_path / "tiny.json"
    words = [part for option in TINY for part in ("--option", option)]
    done = CliRunner().invoke(main, ["experiment", "transfer", *words, "--output", str(target)])
    assert done.exit_code == 0, done.output
    assert "drift per doubling" in done.output
    again = engine.parameters(
        EXPERIMENT, results.load("tiny", tmp_path).provenance["command"][3::2]
    )
    assert again == engine.parameters(EXPERIMENT, TINY)


def test_gpu_changes_sizes_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    large = engine.parameters(EXPERIMENT)
    assert (
        large.sizes == (128, 256, 512, 1024)
        and large.steps >= 300
        and large.batch * large.length == 16384
    )
    assert len(transfer.pieces(large)) == 7


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("axis=time", "axis is 'time'"),
        ("norm=batch", "norm is 'batch'"),
        ("schemes=sp,ntp", "scheme is 'ntp'; expected one of sp, mup, k1"),
        ("optimizer=adam", "optimizer is 'adam'"),
        ("rates=-3,-2", "number of rates is 2"),
        ("sizes=16", "number of sizes is 1"),
    ],
)
def test_parameters_are_refused(option: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine.parameters(EXPERIMENT, [option])


def test_the_net_is_causal_and_drawn_from_its_seed() -> None:
    state = torch.random.get_rng_state()
    net, same = (transfer.GPT(32, 2, length=12, seed=4) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = torch.arange(12)[None] % 7
    changed = ids.clone()
    changed[0, 8:] = 5
    with torch.no_grad():
        a, b = net(ids), net(changed)
        torch.testing.assert_close(a, same(ids), rtol=0, atol=0)
    torch.testing.assert_close(
        a[:, :8], b[:, :8], rtol=0, atol=1e-6
    )  # float32 sums over a masked row
    assert float((a[:, 8:] - b[:, 8:]).abs().max()) > 1e-3
    for weight in net.parameters():
        # standard deviation of N normal values: 0.05 (1 ± 4/√(2N))
        assert float(weight.detach().std()) == pytest.approx(
            0.05, rel=4 / math.sqrt(2 * weight.numel())
        )
    with pytest.raises(
        ValueError, match="width is 24; it must be a multiple of the head dimension 16"
    ):
        transfer.GPT(24, 2)


def test_text_is_split_without_overlap_and_batches_depend_on_seed_and_step() -> None:
    text = help_text.text()
    assert int(max(text.train.max(), text.heldout.max())) < help_text.VOCABULARY
    assert len(text.heldout) / (len(text.train) + len(text.heldout)) == pytest.approx(0.1, abs=0.01)
    x, y = text.batch(1, 5, 4, 32)
    assert x.shape == y.shape == (4, 32) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, text.batch(1, 5, 4, 32)[0])
    assert not torch.equal(x, text.batch(1, 6, 4, 32)[0]) and not torch.equal(
        x, text.batch(2, 5, 4, 32)[0]
    )
    assert torch.equal(text.test(8, 32)[0], text.test(8, 32)[0])
