from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grsd import pieces
from grsd.lab.checkpoints import opened, suites
from grsd.lab.data import corpora
from grsd.lab.runs import RunResult, RunSpec, shell_run, spectra
from grsd.spectrum import LogShells, TokenLogProb
from tests.cases import dense


@pytest.fixture
def spec(suite: suites.Suite, texts: Path) -> RunSpec:
    return RunSpec(
        str(suite.root),
        ("step0", "step5"),
        str(texts / "*.txt"),
        batches=3,
        batch_size=2,
        length=8,
        steps=6,
        starts=("error", "ones", "random"),
    )


def _numbers(run: RunResult) -> dict[str, Any]:
    found = run.to_json()["revisions"]
    return {
        r: [{k: v for k, v in b.items() if k != "provenance"} for b in several]
        for r, several in found.items()
    }


def _dense(spec: RunSpec, revision: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """J Jᵀ/T and e of one batch, by one backward pass per token: nothing of the operator is used."""
    loaded = opened.load(spec.model, revision, dtype=torch.float64)
    text = corpora.open_corpus(spec.corpus, loaded.tokenizer)
    inputs, targets = list(
        text.batches(index + 1, spec.batch_size, spec.length, spec.seed, spec.part)
    )[index]
    logq = torch.log_softmax(loaded.model(input_ids=inputs, use_cache=False).logits, -1)
    rows = logq.gather(-1, targets[..., None]).flatten()
    asked = {"input_ids": inputs, "use_cache": False}
    M = dense(loaded.model, asked, TokenLogProb(targets)) / len(rows)
    return M.numpy(), -rows.detach().numpy()


def test_spectra_are_those_of_the_dense_operator(spec: RunSpec) -> None:
    spec = replace(spec, batches=2, steps=16, dtype="float64", starts=("error", "ones"))
    run = shell_run(spec)
    for revision in spec.revisions:
        M, e = _dense(spec, revision, 1)
        eigenvalues, vectors = np.linalg.eigh(M)
        for start, vector in (("error", e), ("ones", np.ones_like(e))):
            mu = run.measures(revision, start)[1]
            # m = T steps know every eigenvalue; Lanczos and eigh are each right to some T eps |M|
            close = 1e-10 * eigenvalues[-1]
            np.testing.assert_allclose(mu.nodes, eigenvalues, atol=close)
            np.testing.assert_allclose(mu.mass, vector @ vector / len(vector), rtol=1e-12)
            g = (vectors.T @ vector) ** 2 / len(vector)
            for k in (1, 2, 3):
                np.testing.assert_allclose(
                    np.sum(mu.weights * mu.nodes**k), np.sum(g * eigenvalues**k), rtol=1e-10
                )
        assert run.losses(revision)[1] == pytest.approx(e.mean(), rel=1e-12)


def test_profiles_lose_nothing_and_average(spec: RunSpec) -> None:
    run = shell_run(spec)
    shells = run.common_shells(2.0)
    for revision in run.revisions:
        for start in spec.starts:
            profiles = run.profiles(revision, start, shells)
            assert len(profiles) == 3
            for profile, tri in zip(profiles, run.tridiagonals(revision, start), strict=True):
                assert profile.below == profile.above == 0  # the edges span every spectrum
                assert profile.total == pytest.approx(tri.mass / 2, rel=1e-12)
            mean = run.average(revision, start, shells)
            np.testing.assert_allclose(
                mean.energies, np.mean([p.energies for p in profiles], axis=0), rtol=1e-12
            )
    far = run.profiles("step5", "error", LogShells.spanning(1e9, 1e10))[0]
    assert far.energies.sum() == 0 and far.below + far.kernel == pytest.approx(far.total)


def test_null_starts_have_the_mass_of_the_error_and_do_not_depend_on_each_other(
    spec: RunSpec,
) -> None:
    run = shell_run(replace(spec, starts=("error", "signs", "random")))
    for start in ("signs", "random"):
        for error, null in zip(
            run.tridiagonals("step5", "error"), run.tridiagonals("step5", start), strict=True
        ):
            assert null.mass == pytest.approx(error.mass, rel=1e-5)  # float32 norms
            assert not np.array_equal(null.alphas, error.alphas)
        alone = shell_run(replace(spec, starts=(start,)))
        assert np.array_equal(
            alone.tridiagonals("step5", start)[2].alphas, run.tridiagonals("step5", start)[2].alphas
        )


def test_sum_is_rows_times_mean(spec: RunSpec) -> None:
    spec = replace(spec, dtype="float64", revisions=("step5",), starts=("error",), batches=1)
    mean = shell_run(spec).tridiagonals("step5")[0]
    whole = shell_run(replace(spec, normalize="sum")).tridiagonals("step5")[0]
    np.testing.assert_allclose(whole.alphas, 16 * mean.alphas, rtol=1e-9)
    assert whole.mass == pytest.approx(16 * mean.mass)


def test_shuffled_targets_raise_the_loss_of_a_trained_model(
    corpus: corpora.Corpus, texts: Path, tmp_path: Path
) -> None:
    size = suites.Preset(
        "tiny", hidden=16, layers=1, heads=2, vocab_size=300, lr=1e-2, positions=64
    )
    made = suites.train(size, corpus, steps=60, batch_size=8, length=32, warmup=4, cache=tmp_path)
    spec = RunSpec(
        str(made.root),
        ("step0", "step60"),
        str(texts / "*.txt"),
        batches=2,
        batch_size=4,
        length=16,
        steps=4,
    )
    text, null = shell_run(spec), shell_run(replace(spec, targets="shuffled"))
    assert (
        null.losses("step60") > text.losses("step60")
    ).all()  # a model that reads its input loses by the shuffle
    assert len(list(null.root.iterdir())) == 8  # no file serves both


def test_same_spec_same_numbers_from_files_or_anew(spec: RunSpec, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    first = shell_run(spec, progress=lambda *a: calls.append(a))
    assert [c[:2] for c in calls] == [(k, 6) for k in range(1, 7)]
    stamps = {p: p.stat().st_mtime_ns for p in first.root.iterdir()}
    assert len(stamps) == 6
    cached = shell_run(spec)
    assert {p: p.stat().st_mtime_ns for p in first.root.iterdir()} == stamps
    anew = shell_run(spec, resume=False)
    elsewhere = shell_run(spec, cache=tmp_path / "other")
    assert _numbers(first) == _numbers(cached) == _numbers(anew) == _numbers(elsewhere)
    assert {p.name for p in elsewhere.root.iterdir()} == {p.name for p in first.root.iterdir()}


def test_more_batches_and_revisions_reuse_the_files(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = shell_run(replace(spec, batches=2, revisions=("step5",)))
    measured: list[tuple[str, int]] = []
    real = pieces.Store.write

    def counting(store: pieces.Store, inputs: Any, content: dict[str, Any]) -> dict[str, Any]:
        measured.append((content["revision"], content["batch"]))
        return real(store, inputs, content)

    monkeypatch.setattr(pieces.Store, "write", counting)
    many = shell_run(spec)
    assert measured == [("step0", 0), ("step0", 1), ("step0", 2), ("step5", 2)]
    assert _numbers(many)["step5"][:2] == _numbers(few)["step5"]


def test_batches_in_lock_step_have_the_numbers_of_one_at_a_time(
    spec: RunSpec, tmp_path: Path
) -> None:
    spec = replace(spec, dtype="float64", starts=("error", "ones", "random"))
    alone = shell_run(spec, memory=0, cache=tmp_path / "alone")
    together = shell_run(spec, cache=tmp_path / "together")
    assert alone.group is not None and alone.group.batches == 1
    assert together.group is not None and together.group.batches == 3
    assert together.results["step0"][0].provenance["lockstep"]["batches"] == 3
    assert shell_run(spec, cache=tmp_path / "together").group is None  # nothing was left to measure
    for revision in spec.revisions:
        np.testing.assert_allclose(alone.losses(revision), together.losses(revision), rtol=1e-13)
        for start in spec.starts:
            pairs = zip(
                alone.tridiagonals(revision, start),
                together.tridiagonals(revision, start),
                strict=True,
            )
            for one, other in pairs:
                # six steps of Lanczos amplify the rounding of a product, 1e-15, by less than 1e4
                np.testing.assert_allclose(
                    one.alphas, other.alphas, rtol=1e-11, atol=1e-11 * one.alphas[0]
                )
                np.testing.assert_allclose(
                    one.betas, other.betas, rtol=1e-11, atol=1e-11 * one.alphas[0]
                )
                assert one.mass == pytest.approx(other.mass, rel=1e-13)


def test_a_group_that_lost_one_file_is_measured_whole_and_writes_that_file_alone(
    spec: RunSpec,
) -> None:
    first = shell_run(spec)
    kept, lost = sorted(first.root.iterdir())[0], sorted(first.root.iterdir())[1]
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    assert _numbers(shell_run(spec)) == _numbers(
        first
    )  # bit for bit: the batches that go together are the same
    assert kept.stat().st_mtime_ns == stamp


def test_equal_weights_under_two_names_are_measured_once(
    spec: RunSpec, suite: suites.Suite, tmp_path: Path
) -> None:
    import shutil

    for name in ("step1", "step2"):
        shutil.copytree(suite.path("step5"), tmp_path / "twice" / name)
    run = shell_run(replace(spec, model=str(tmp_path / "twice"), revisions=("step1", "step2")))
    assert (
        run.losses("step1").tolist() == run.losses("step2").tolist()
        and len(list(run.root.iterdir())) == 3
    )


def test_changed_weights_are_measured_again(
    spec: RunSpec, suite: suites.Suite, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(suite.path("step5"), tmp_path / "model")
    spec = replace(spec, model=str(tmp_path / "model"), revisions=())
    before = shell_run(spec)
    file = tmp_path / "model" / "model.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    after = shell_run(spec)
    assert before.losses("main")[0] != after.losses("main")[0]


def test_damaged_file_is_measured_again(spec: RunSpec) -> None:
    first = shell_run(spec)
    path = sorted(first.root.iterdir())[0]
    path.write_text(path.read_text()[:50])
    assert _numbers(shell_run(spec)) == _numbers(first)
    whole = path.read_text()
    for change in (
        lambda record: record["tridiagonals"]["error"]["alphas"].pop(),
        lambda record: record["tridiagonals"]["error"].update(mass=-1.0),
        lambda record: record["tridiagonals"]["error"]["betas"].__setitem__(0, float("nan")),
        lambda record: record.update(loss=None),
        lambda record: record.update(loss=record["loss"] + 1),
    ):
        record = json.loads(whole)
        change(record["content"])
        path.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        assert _numbers(shell_run(spec)) == _numbers(first)


def test_a_batch_cut_consistently_to_fewer_steps_is_measured_again(spec: RunSpec) -> None:
    """Each matrix would pass for one of four steps instead of six."""
    first = shell_run(spec)
    path = sorted(first.root.iterdir())[0]
    record = json.loads(path.read_text())
    for matrix in record["content"]["tridiagonals"].values():
        matrix["alphas"], matrix["betas"] = matrix["alphas"][:4], matrix["betas"][:3]
    path.write_text(json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert _numbers(shell_run(spec)) == _numbers(first)


def test_a_batch_is_keyed_by_the_code_that_measures_and_loads(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def other(*modules: Any) -> str:
        asked.append(tuple(module.__name__ for module in modules))
        return "another code"

    first = shell_run(spec)
    monkeypatch.setattr(pieces, "code", other)
    again = shell_run(spec)
    parts = ("grsd.lab.runs.spectra", "grsd.lab.checkpoints.hub")
    assert asked[-1] == parts
    assert len(list(again.root.iterdir())) == 12 and again.group is not None
    assert _numbers(again) == _numbers(first)
    behind = pieces.imported(parts[0]) | pieces.imported(parts[1])
    assert {"grsd.spectrum.nulls", "grsd.spectrum.lanczos", "grsd.lab.nets.models"} <= behind
    assert not {"grsd.spectrum.operator.shards", "grsd.lab.checkpoints.suites"} & behind


KILLED = """
import os, signal, sys
from grsd.lab.runs import RunResult, RunSpec, shell_run, spectra
how, model, texts, cache = sys.argv[1:]
spec = RunSpec(model, ("step0", "step5"), texts, batches=3, batch_size=2, length=8, steps=6,
                    starts=("error", "ones", "random"))
real = os.replace
def dying(source, destination):
    if "/runs/" in str(destination):
        dying.count += 1
        if dying.count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    real(source, destination)
dying.count = 0
if how == "itself":
    os.replace = dying
shell_run(spec, cache=cache)
"""


@pytest.mark.parametrize("how", ["itself", "from outside"])
def test_killed_run_resumes_to_the_same_numbers(
    how: str, spec: RunSpec, suite: suites.Suite, texts: Path, tmp_path: Path
) -> None:
    """SIGKILL between writing a batch and putting it in place, and from outside once the first batch is there."""
    reference = _numbers(shell_run(spec, cache=tmp_path / "whole"))
    cache = tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, how, str(suite.root), spec.corpus, str(cache)]
    child = subprocess.Popen(
        argv, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    if how == "from outside":
        while child.poll() is None and not list(cache.glob("runs/*.json")):
            time.sleep(0.01)
        child.kill()  # wherever it is by now; a child that was faster has left a whole run
    child.communicate(timeout=240)
    assert child.returncode in ((-signal.SIGKILL,) if how == "itself" else (-signal.SIGKILL, 0))
    left = list(cache.glob("runs/*.json"))
    assert left if how == "from outside" else len(left) == 1
    stamps = {p: p.stat().st_mtime_ns for p in left}
    resumed = shell_run(spec, cache=cache)
    assert _numbers(resumed) == reference  # bit for bit
    assert all(
        p.stat().st_mtime_ns == t for p, t in stamps.items()
    )  # finished batches were not measured again


def test_what_is_opened_already_is_not_opened_again(
    spec: RunSpec, corpus: corpora.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened.open_model(spec.model)
    reference = _numbers(shell_run(spec, resume=False))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a name was resolved twice")

    monkeypatch.setattr("grsd.lab.runs.run.open_model", refuse)
    monkeypatch.setattr(corpora, "open_corpus", refuse)
    assert _numbers(shell_run(spec, resume=False, model=model, corpus=corpus)) == reference


BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 1, "length": 1, "steps": 1}, "T = batch_size x length is 1; raise length"),
    ({"steps": 17}, "steps = 17 exceeds T = batch_size x length = 16"),
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"batches": -1}, "batches is -1; it must be at least 1"),
    ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, float64, bfloat16"),
    ({"normalize": "none"}, "normalize is 'none'"),
    ({"targets": "random"}, "targets is 'random'"),
    ({"starts": ()}, "expected one or more of error, ones, signs, random"),
    ({"starts": ("error", "delta")}, "'delta'"),
    ({"revisions": ("step0", "step0")}, "twice: step0, step0"),
    ({"split": "test"}, "split is 'test'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_specs_are_refused_at_the_door(
    spec: RunSpec, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(spec, **changes)


def test_unknown_revision_fails_before_any_work(spec: RunSpec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no revision 'step3'; it has step0"):
        shell_run(replace(spec, revisions=("step0", "step3")), cache=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_what_does_not_fit_is_refused(spec: RunSpec, texts: Path, corpus: corpora.Corpus) -> None:
    foreign = corpora.files(texts / "*.txt", vocab_size=340)
    with pytest.raises(ValueError, match=r"ids up to 3\d\d, the model's vocabulary has 300"):
        shell_run(spec, corpus=foreign)
    with pytest.raises(ValueError, match="length = 65 exceeds the model's context of 64"):
        shell_run(replace(spec, length=65))
    with pytest.raises(ValueError, match="unknown corpus"):
        shell_run(replace(spec, corpus="nowhere.txt"))
    with pytest.raises(ValueError, match="no start vector 'delta' in this run"):
        shell_run(spec).tridiagonals("step0", "delta")
    with pytest.raises(ValueError, match="no revision 'step9' in this run"):
        shell_run(spec).losses("step9")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_names_the_knob(
    spec: RunSpec, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(spectra, "lanczos", exhausted)
    monkeypatch.setattr(spectra, "lanczos_batches", exhausted)
    with pytest.raises(
        MemoryError, match="T = 2 x 8 rows in float32: lower --batch-size first, then --length"
    ):
        shell_run(spec)


def test_other_failures_are_not_called_memory(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("derivative is not implemented")

    monkeypatch.setattr(spectra, "lanczos_batches", broken)
    with pytest.raises(RuntimeError, match="derivative"):
        shell_run(spec)


def test_provenance_says_how_to_repeat(spec: RunSpec) -> None:
    run = shell_run(spec)
    origin = run.results["step0"][0].provenance
    assert origin["command"][:2] == ["shells", spec.model] and origin["seeds"] == [0]
    assert math.isfinite(run.results["step0"][0].loss)
    assert json.loads(json.dumps(run.to_json()))["spec"]["batches"] == 3
