"""The page on Pythia's own checkpoints, its cells run against a hub whose revisions hold pickles only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file

from grsd.cli import main
from grsd.experiments import protocol
from grsd.lab.checkpoints import suites
from grsd.lab.data import corpora
from grsd.lab.runs import spectra
from tests.lab.cases import RECIPE, TINY

PAGE = Path(__file__).resolve().parents[2] / "book/pythia.md"
NAME = protocol.SMALL.models[0]


@pytest.fixture
def hub(corpus: corpora.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five revisions in the cache of huggingface_hub, weights in pytorch_model.bin; no network."""
    suite = suites.train(TINY, corpus, cache=tmp_path / "suite", **RECIPE)
    trained = [path for _, path in sorted((p.stat().st_mtime, p) for p in suite.root.glob("step*"))]
    repo = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    for k, revision in enumerate(protocol.SMALL.revisions):
        commit = f"{k}" * 40
        (repo / "refs" / revision).write_text(commit)
        snapshot = repo / "snapshots" / commit
        shutil.copytree(trained[min(k, len(trained) - 1)], snapshot)
        weights = snapshot / "model.safetensors"
        torch.save(load_file(weights), snapshot / "pytorch_model.bin")
        weights.unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    small = replace(protocol.SMALL, batches=2, batch_size=2, length=16, steps=8)
    monkeypatch.setattr(protocol, "SMALL", small)
    monkeypatch.setitem(protocol.PROTOCOLS, small.name, small)
    return repo


def run(cells: list[str]) -> dict[str, object]:
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, PAGE.name, "exec"), names)
    return names


def test_the_page_measures_what_the_hub_holds_and_goes_on_after_a_stop(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = [c.source for c in jupytext.read(PAGE).cells if c.cell_type == "code"]
    assert len(code) == 3
    monkeypatch.setenv("GRSD_DEVICE", "cpu")

    # the machine goes away during the second checkpoint
    whole, calls = spectra.measure, []

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(spectra, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run(code[:2])

    # what was measured is not measured again
    counted: list[int] = []

    def counts(*arguments: object) -> object:
        counted.append(1)
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(spectra, "measure", counts)
    names = run(code)
    first = len(counted)
    assert first > 0
    cells = names["cells"]
    assert isinstance(cells, list)
    kinds = {(cell.revision, cell.start, cell.targets) for cell in cells}
    last = protocol.SMALL.last
    wanted = {(r, s, "text") for r in protocol.SMALL.revisions for s in protocol.TRACKED}
    wanted |= {(last, "signs", "text"), (last, "error", "shuffled")}
    assert wanted <= kinds
    assert len([cell for cell in cells if cell.start == protocol.FROZEN]) == 4
    figure = plt.gcf()
    assert [len(ax.get_lines()) > 0 for ax in figure.axes] == [True] * 3
    plt.close("all")
    run(code)
    plt.close("all")
    assert len(counted) == first and calls[:1] == [1]


def test_the_small_form_is_a_flag(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_DEVICE", "cpu")
    done = CliRunner().invoke(main, ["protocol", "pythia", "--small"])
    assert done.exit_code == 0 and "step8000" in done.stdout, done.stderr
    refused = CliRunner().invoke(main, ["protocol", "mini", "--small"])
    assert refused.exit_code == 2 and "'mini-small'" in refused.stderr
