"""A protocol on a tiny net: its cells are the runs' own numbers, its null is a matrix exponential, nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from grsd import results
from grsd.cli import main
from grsd.experiments import protocol
from grsd.experiments.protocol import SHELLS, Cell, Protocol, pick
from grsd.lab.checkpoints import suites
from grsd.lab.data import corpora
from grsd.lab.runs import shell_run
from grsd.spectrum import SpectralMeasure
from tests.lab.cases import TINY

SMALL = Protocol(
    name="small",
    models=("mini-0.4m", "mini-1.3m"),
    followed=("mini-0.4m",),
    training_steps=4,
    revisions=("step0", "step4"),
    batches=2,
    batch_size=2,
    length=16,
    steps=8,
    sweep=(1,),
)


@pytest.fixture
def small(corpus: corpora.Corpus, monkeypatch: pytest.MonkeyPatch) -> Protocol:
    sizes = {"mini-0.4m": TINY, "mini-1.3m": replace(TINY, name="other", hidden=24)}
    monkeypatch.setattr(suites, "MINI", sizes)
    monkeypatch.setattr(suites, "of_suite", lambda *_, **__: corpus)
    monkeypatch.setitem(protocol.PROTOCOLS, "small", SMALL)
    return SMALL


def test_cells_are_the_numbers_of_the_runs(small: Protocol, corpus: corpora.Corpus) -> None:
    protocol.train(small)
    cells = protocol.measure(small)
    # followed: 2 checkpoints x 3 starts, 1 null of decay, signs, shuffled, one sweep; other: untrained e, then e and 1
    assert len(cells) == 6 + 1 + 1 + 1 + 1 + 3
    spec = next(iter(small.runs()))
    run = shell_run(spec, corpus=corpus)
    cell = pick(cells, model="mini-0.4m", revision="step4", start="random", targets="text", rows=32)
    truth = run.average("step4", "random", SHELLS)
    assert (cell.profile.energies == truth.energies).all() and (cell.profile.sem == truth.sem).all()
    assert cell.loss == pytest.approx(run.losses("step4").mean()) and cell.profile.batches == 2
    e2 = np.array([mu.mass for mu in run.measures("step4")])
    assert cell.ones_share == pytest.approx(np.mean(run.losses("step4") ** 2 / e2))
    signs = pick(cells, model="mini-0.4m", start="signs")
    assert signs.ones_share == pytest.approx(cell.ones_share, rel=1e-6)
    assert cell.profile.total == pytest.approx(
        0.5 * e2.mean(), rel=1e-6
    )  # float32 mass: no energy is lost by binning


def test_decay_in_place_keeps_the_modes_and_meets_the_energy() -> None:
    before = SpectralMeasure.exact([0.1, 1.0, 3.0], [1.0, 2.0, 3.0])
    after = SpectralMeasure.exact([0.2, 2.0, 6.0], [0.9, 1.0, 0.4])

    class Run:
        def measures(self, revision: str) -> list[SpectralMeasure]:
            return [before if revision == "a" else after]

    (found,) = protocol._decayed(Run(), "a", "b")  # type: ignore[arg-type]
    assert found.total == pytest.approx(0.5 * after.mass, rel=1e-6)
    occupied = np.flatnonzero(found.energies)
    assert (occupied == np.flatnonzero(before.shells(SHELLS).energies)).all()  # no mode moved
    assert (
        occupied != np.flatnonzero(after.shells(SHELLS).energies)
    ).any()  # the control: the true ones did
    (kept,) = protocol._decayed(Run(), "b", "a")  # type: ignore[arg-type]
    assert kept.total == pytest.approx(
        0.5 * after.mass, rel=1e-6
    )  # energy cannot rise: the null stays as it was


def test_json_round_trip_and_command_line(small: Protocol, tmp_path: Path) -> None:
    target = tmp_path / "small-run.json"
    done = CliRunner().invoke(main, ["protocol", "small", "--output", str(target), "--json"])
    assert done.exit_code == 0, done.output
    stored = results.load("small-run", tmp_path)
    assert stored.provenance["command"] == ["protocol", "small"]
    cells = [Cell.from_json(record) for record in stored.data["cells"]]
    again = [json.loads(json.dumps(c.to_json())) for c in cells]
    assert again == stored.data["cells"]
    assert stored.data["training"]["mini-0.4m"]["parameters"] == TINY.parameters


def test_unknown_protocol_is_refused() -> None:
    done = CliRunner().invoke(main, ["protocol", "huge"])
    assert done.exit_code == 2 and "'huge'" in done.output and "mini" in done.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ("mini-9t",)}, "mini-9t"),
        ({"revisions": ("step3",)}, r"\['step3'\] are no checkpoints of 512 steps"),
        ({"revisions": ()}, "no checkpoints"),
    ],
)
def test_bad_protocols_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(protocol.MINI, **changes)


def test_pick_wants_exactly_one() -> None:
    with pytest.raises(ValueError, match="0 cells have"):
        pick([], model="tiny")
