from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import processors

from grsd import results
from grsd.cli import common, main
from grsd.lab.checkpoints import opened, suites
from grsd.lab.data import corpora
from tests.lab.cases import TINY, write_texts


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts (``doc*.txt``) and a trained suite (``model/step0`` … ``step2``)."""
    root = tmp_path_factory.mktemp("place")
    write_texts(root)
    text = corpora.files(root / "*.txt", vocab_size=300, cache=root / "cache")
    made = suites.train(TINY, text, steps=2, batch_size=2, length=16, cache=root / "cache")
    made.root.rename(root / "model")
    return root


def _grsd(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def _shells(place: Path, *more: str) -> list[str]:
    small = [
        "--batches",
        "2",
        "--batch-size",
        "2",
        "--length",
        "8",
        "--steps",
        "6",
        "--device",
        "cpu",
    ]
    return ["shells", str(place / "model"), "--corpus", str(place / "*.txt"), *small, *more]


def _json(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def _refused(result: Result) -> str:
    """The one sentence of a refusal: exit code 2, nothing on stdout, no traceback."""
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("grsd: ")]
    assert "Traceback" not in result.stderr
    return line


def test_every_command_has_help_with_json() -> None:
    assert "doctor" in _grsd("--help").stdout
    for words in (
        ["doctor"],
        ["suite"],
        ["shells"],
        ["conditions"],
        ["claims"],
        ["results", "list"],
        ["results", "show"],
    ):
        shown = _grsd(*words, "--help")
        assert shown.exit_code == 0 and "--json" in shown.stdout
    assert "--json" in _grsd("results", "recompute", "--help").stdout
    assert (
        "Examples:" in _grsd("shells", "--help").stdout
        and "Examples:" in _grsd("suite", "--help").stdout
    )


def test_doctor_says_what_is_there() -> None:
    found = _json(_grsd("doctor", "--json"))
    assert (
        found["missing"] == [] and found["torch"] == torch.__version__ and "cpu" in found["devices"]
    )
    text = _grsd("doctor").stdout
    assert "all present" in text and torch.__version__ in text


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grsd.cli.environment.check_environment", lambda **_: ["scipy>=1.13"])
    shown = _grsd("doctor")
    assert shown.exit_code == 1 and "MISSING scipy>=1.13" in shown.stdout
    assert "pip install 'scipy>=1.13'" in shown.stderr
    assert json.loads(_grsd("doctor", "--json").stdout)["missing"] == ["scipy>=1.13"]


def test_shells_prints_tables_and_writes_the_picture(place: Path, tmp_path: Path) -> None:
    png = tmp_path / "profile.png"
    shown = _grsd(*_shells(place, "--revision", "step0", "--revision", "step2", "--png", str(png)))
    assert shown.exit_code == 0, shown.stderr
    for words in (
        "step0, start vector error",
        "step2, start vector ones",
        "eigenvalue",
        "peak",
        "frontier",
        "kernel",
    ):
        assert words in shown.stdout
    assert png.read_bytes().startswith(b"\x89PNG")


def test_shells_json_is_pure_and_adds_up(place: Path) -> None:
    found = _json(_grsd(*_shells(place, "--revision", "all", "--json")))
    assert [p["revision"] for p in found["profiles"]] == [
        "step0",
        "step0",
        "step1",
        "step1",
        "step2",
        "step2",
    ]
    for profile in found["profiles"]:
        inside = sum(profile["energies"])
        names = ("negative", "below", "above", "kernel")
        outside = sum(profile[name] for name in names)
        assert profile["negative"] == 0.0  # J Jᵀ has no negative eigenvalue
        assert inside + outside == pytest.approx(profile["total"])
        assert len(profile["energies"]) == len(found["edges"]) - 1
        if profile["start"] == "ones":  # ½⟨1, 1⟩ with the empirical measure
            assert profile["total"] == pytest.approx(0.5, rel=1e-6)
    last = opened.load(place / "model").revision
    assert found["spec"]["revisions"][-1] == last == "step2"


def test_edges_that_miss_the_spectrum_report_the_mass(place: Path) -> None:
    found = _json(_grsd(*_shells(place, "--range", "1e9", "1e10", "--json")))
    for profile in found["profiles"]:
        assert profile["statistics"] is None and sum(profile["energies"]) == 0
        assert profile["below"] + profile["kernel"] == pytest.approx(profile["total"])
    shown = _grsd(*_shells(place, "--range", "1e9", "1e10"))
    assert (
        "the edges miss the spectrum" in shown.stdout
        and "outside the edges 1e+02 %" in shown.stdout
    )


def test_output_can_be_recomputed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stored"
    folder.mkdir()
    made = _grsd(*_shells(place, "--output", str(folder / "tiny-shells.json")))
    assert made.exit_code == 0, made.stderr
    monkeypatch.setattr(results, "packaged_dir", lambda: folder)
    monkeypatch.setattr(results, "revision", lambda: "a" * 40)
    assert [r["id"] for r in _json(_grsd("results", "list", "--json"))["results"]] == [
        "tiny-shells"
    ]
    assert "grsd shells" in _grsd("results", "list").stdout
    assert _json(_grsd("results", "show", "tiny-shells", "--json"))["provenance"]["seeds"] == [0]
    assert "grsd shells" in _grsd("results", "show", "tiny-shells").stdout
    again = _grsd("results", "recompute", "tiny-shells", "--output", str(tmp_path / "again.json"))
    assert again.exit_code == 0 and "the largest relative difference is 0" in again.stdout
    assert results.load("again", tmp_path).data == results.load("tiny-shells", folder).data
    # no file is named but the one that stays, whose run was timed
    assert [line for line in again.stderr.splitlines() if "wrote" in line] == [
        f"wrote {tmp_path / 'again.json'}"
    ]
    assert "not timed" in _grsd("results", "list").stdout
    timed = results.load("again", tmp_path).provenance
    assert timed["seconds"] > 0
    results.save(results.Result("tiny-shells", results.load("again", tmp_path).data, timed), folder)
    assert "not timed" not in _grsd("results", "show", "tiny-shells").stdout
    same = _grsd("results", "verify", "--quick")
    assert same.exit_code == 0 and "tiny-shells: same, difference 0" in same.stdout

    stored = results.load("tiny-shells", folder)  # a planted error must be seen
    stored.data["profiles"][0]["energies"] = [
        1.1 * e for e in stored.data["profiles"][0]["energies"]
    ]
    results.save(stored, folder)
    # the largest energy of the list moved by 0.1 of what it was, so by 0.1/1.1 of the larger of the two
    found = _json(_grsd("results", "recompute", "tiny-shells", "--json"))
    assert found["largest_relative_difference"] == pytest.approx(0.1 / 1.1)
    other = _grsd("results", "verify", "--quick")
    assert other.exit_code == 1 and "tiny-shells: DIFFERS, difference 0.091" in other.stdout
    stored.provenance["seconds"] = 3600.0
    results.save(stored, folder)
    assert "skipped" in _grsd("results", "verify", "--quick").stdout

    written = _grsd("results", "manifest")
    assert written.exit_code == 0
    listed = json.loads((tmp_path / results.MANIFEST).read_text())["tiny-shells"]
    digest = hashlib.sha256((folder / "tiny-shells.json").read_bytes()).hexdigest()
    assert listed["sha256"] == digest and listed["seconds"] == 3600.0


def _conditions(place: Path, *more: str) -> list[str]:
    small = ["--batch-size", "2", "--length", "8", "--probes", "4", "--device", "cpu"]
    return ["conditions", str(place / "model"), "--corpus", str(place / "*.txt"), *small, *more]


def test_conditions_along_checkpoints(place: Path, tmp_path: Path) -> None:
    png = tmp_path / "conditions.png"
    shown = _grsd(*_conditions(place, "--revision", "all", "--rate", "0.5", "--png", str(png)))
    assert shown.exit_code == 0, shown.stderr
    for words in (
        "D1 tail B(0)",
        "D2 farthest pair",
        "D3 ‖J̇‖",
        "D5 collapse",
        "16 rows",
        "forward passes",
    ):
        assert words in shown.stdout
    assert png.read_bytes().startswith(b"\x89PNG")
    found = _json(
        _grsd(
            *_conditions(
                place, "--revision", "step2", "--revision", "step0", "--rate", "0.5", "--json"
            )
        )
    )
    assert [instant["time"] for instant in found["instants"]] == [
        0.0,
        1.0,
    ]  # ascending, step · rate
    assert found["instants"][0]["shift"] is None and any(
        "D4" in note for note in found["notes"]
    )  # 16 rows are too few
    assert found["instants"][0]["size"]["rate"] > 0 and len(found["blocks"]) == TINY.layers + 2


def test_model_check_gives_the_loss_of_the_text(place: Path) -> None:
    words = [
        "model-check",
        str(place / "model"),
        "--corpus",
        str(place / "*.txt"),
        "--tokens",
        "40",
    ]
    found = _json(_grsd(*words, "--device", "cpu", "--json"))
    loaded = opened.load(place / "model")
    text = corpora.files(place / "*.txt", tokenizer=loaded.tokenizer)
    ids = torch.tensor(text.tokens[:40].astype("int64"))
    net: Any = loaded.model
    expected = net(input_ids=ids[None], labels=ids[None]).loss  # transformers' own shift and mean
    assert found["nats"] == pytest.approx(float(expected), rel=1e-5)
    assert found["uniform"] == pytest.approx(np.log(300)) and found["revision"] == "step2"
    assert loaded.tokenizer.decode(ids[:16]) in found["text"]
    shown = _grsd(*words, "--device", "cpu").stdout
    assert "nats per token on the first 40 tokens" in shown and "greedy, after 16 tokens" in shown
    assert "length = 65 exceeds" in _refused(_grsd(*words[:-1], "65"))


def test_what_a_tokenizer_puts_first_stands_first(place: Path, tmp_path: Path) -> None:
    """As Gemma's: its loss without <bos> was 16 % above that of its makers' implementation."""
    folder = tmp_path / "marked"
    shutil.copytree(place / "model" / "step2", folder)
    marked = opened.load(folder).tokenizer
    marked._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    marked.save_pretrained(folder)
    words = ["--corpus", str(place / "*.txt"), "--tokens", "40", "--device", "cpu"]
    found = _json(_grsd("model-check", str(folder), *words, "--json"))
    loaded = opened.load(folder)
    text = corpora.files(place / "*.txt", tokenizer=loaded.tokenizer)
    ids = torch.tensor([0, *text.tokens[:40].tolist()])[None]
    net: Any = loaded.model
    assert found["before"] == [0] and found["tokens"] == 40
    assert found["nats"] == pytest.approx(float(net(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert "before them <|endoftext|>" in _grsd("model-check", str(folder), *words).stdout
    sizes = ["--steps", "2", "--batches", "1", "--batch-size", "1", "--length", "8"]
    run = _grsd("shells", str(folder), *words[:2], *sizes, "--device", "cpu")
    assert "note: the tokenizer puts <|endoftext|> before a text" in run.stderr


def test_conditions_refuses_in_one_sentence(place: Path) -> None:
    assert "the time of one step must be positive" in _refused(
        _grsd(*_conditions(place, "--rate", "0"))
    )
    assert "probes is 1" in _refused(_grsd(*_conditions(place, "--probes", "1")))
    assert "no revision 'step7'" in _refused(_grsd(*_conditions(place, "--revision", "step7")))
    assert "length = 65 exceeds the model's context of 64" in _refused(
        _grsd(*_conditions(place, "--length", "65"))
    )
    assert 'along="path" needs two snapshots' in _refused(
        _grsd(*_conditions(place, "--along", "path"))
    )
    assert "--png no/such/a.png: the folder" in _refused(
        _grsd(*_conditions(place, "--png", "no/such/a.png"))
    )


def test_suite_trains_and_finds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.MINI, "mini-test", replace(TINY, name="mini-test"))
    small = ["--steps", "2", "--batch-size", "2", "--length", "16", "--device", "cpu"]
    words = ["suite", "--size", "mini-test", "--corpus", str(place / "*.txt"), *small]
    text = corpora.files(place / "*.txt", vocab_size=300)
    monkeypatch.setattr(corpora, "open_corpus", lambda _: text)
    first = _grsd(*words, "--json")
    (made,) = _json(first)["suites"]
    assert (
        made["revisions"] == ["step0", "step1", "step2"] and made["parameters"] == TINY.parameters
    )
    assert "training mini-test for 2 steps" in first.stderr
    again = _grsd(*words)
    assert (
        again.exit_code == 0 and "training" not in again.stderr and made["folder"] in again.stdout
    )
    files = sorted(
        p.relative_to(made["folder"]) for p in Path(made["folder"]).rglob("model.safetensors")
    )
    reference = [place / "model" / f for f in files]
    assert all(
        (Path(made["folder"]) / f).read_bytes() == r.read_bytes()
        for f, r in zip(files, reference, strict=True)
    )


def test_mini_suite_is_trained_when_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpora.files(place / "*.txt", vocab_size=300)
    monkeypatch.setitem(suites.MINI, "mini-test", replace(TINY, name="mini-test"))
    monkeypatch.setattr(corpora, "open_corpus", lambda *_, **__: text)
    locate, train = suites.locate, suites.train
    short: dict[str, Any] = {"steps": 2, "batch_size": 2, "length": 16}
    monkeypatch.setattr(
        suites, "locate", lambda size, corpus, **o: locate(size, corpus, **{**o, **short})
    )
    monkeypatch.setattr(
        suites, "train", lambda size, corpus, **o: train(size, corpus, **{**o, **short})
    )
    words = [
        "shells",
        "mini-test",
        "--batches",
        "1",
        "--batch-size",
        "2",
        "--length",
        "8",
        "--steps",
        "4",
    ]
    first = _grsd(*words, "--device", "cpu", "--split", "all")
    assert (
        first.exit_code == 0
        and "training mini-test" in first.stderr
        and "mini-test step2" in first.stdout
    )
    again = _grsd(*words, "--device", "cpu", "--split", "all")
    assert again.stdout == first.stdout and "training" not in again.stderr
    # the seed of a name is the one that is trained, and the next call finds it
    words[1] = "mini-test@3"
    other = _grsd(*words, "--device", "cpu", "--split", "all")
    assert other.exit_code == 0 and "training mini-test@3" in other.stderr
    assert "mini-test@3 step2" in other.stdout
    there = suites.train("mini-test", text, seed=3, steps=2)
    assert there.name == "mini-test@3" and there.training()["recipe"]["seed"] == 3


def test_claims_are_listed_and_filtered() -> None:
    every = _json(_grsd("claims", "--json"))["claims"]
    assert every
    verdict = every[0]["verdict"]
    some = _json(_grsd("claims", "--verdict", verdict, "--paper", every[0]["paper"], "--json"))[
        "claims"
    ]
    assert some and {c["verdict"] for c in some} == {verdict}
    assert f"{len(every)} claims" in _grsd("claims").stdout
    assert len(_json(_grsd("claims", "--missing", "--json"))["claims"]) <= len(every)
    card = _grsd("claims", "origin.loss-exponent").stdout
    assert "L ∝ t^(−(1+c₀)(p+1))" in card and "corrected" in card and "$" not in card
    assert "origin.loss-exponent" in _refused(_grsd("claims", "origin.loss-exponnt"))


BAD: list[tuple[list[str], str]] = [
    (["--steps", "17"], "steps = 17 exceeds T"),
    (["--batch-size", "1", "--length", "1", "--steps", "1"], "T = batch_size x length is 1"),
    (["--revision", "step7"], "no revision 'step7'; it has step0, step1, step2"),
    (["--corpus", "nothing-here.txt"], "unknown corpus 'nothing-here.txt'"),
    (["--dtype", "int8"], "dtype is 'int8'"),
    (["--device", "cuda:97"], "no device 'cuda:97'"),
    (["--start", "delta"], "expected one or more of error, ones"),
    (["--ratio", "1"], "ratio"),
    (["--range", "2", "1"], "lo"),
    (["--png", "no/such/folder/a.png"], "--png no/such/folder/a.png: the folder"),
    (["--png", "a.jpg"], "--png a.jpg must end in .png"),
    (["--output", "result.txt"], "must end in .json"),
    (["--output", "no/such/folder/a.json"], "--output no/such/folder/a.json: the folder"),
    (
        ["--corpus", "tests"],
        "the corpus 'tests' is a folder; name its text files by a pattern in quotes, such as 'tests/*.txt'",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_sentence(place: Path, options: list[str], message: str) -> None:
    assert message in _refused(_grsd(*_shells(place, *options)))


def test_what_click_refuses_says_what_to_do(place: Path) -> None:
    for words, said in (
        (_shells(place, "--seed", "-1"), "Invalid value for '--seed': -1 is not in the range"),
        (_conditions(place, "--rows", "-1"), "Invalid value for '--rows': -1 is not in the range"),
        (
            _shells(place, "second.txt"),
            "Got unexpected extra argument (second.txt); a pattern such as 'notes/*.txt' must",
        ),
    ):
        refused = _grsd(*words)
        assert refused.exit_code == 2 and said in refused.stderr and refused.stdout == ""


def test_a_cache_that_cannot_be_written_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path / "file"))
    said = _refused(_grsd(*_shells(place)))
    assert f"cannot use {tmp_path / 'file'}" in said and "set GRSD_CACHE to a folder" in said
    assert not _json(_grsd("doctor", "--json"))["cache"]["writable"]
    monkeypatch.setenv("GRSD_CACHE", "/proc/grsd")  # a missing folder there is no missing text
    assert "unknown corpus" not in _refused(_grsd(*_shells(place)))


def test_a_checkpoint_without_a_tokenizer_is_measured_with_a_note(
    place: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(place / "model" / "step2", bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    words = _shells(place)
    words[1] = str(bare)
    said = _refused(
        _grsd(*words)
    )  # the tokenizer made for the text has more entries than this small model
    assert (
        "carries no tokenizer" in said and "put the model's tokenizer.json into its folder" in said
    )


def test_revisions_with_the_same_weights_are_noticed(place: Path, tmp_path: Path) -> None:
    """A published suite has such a pair: two names, one model."""
    root = tmp_path / "twins"
    for name, source in (("step1", "step1"), ("step2", "step2"), ("step3", "step2")):
        shutil.copytree(place / "model" / source, root / name)
    for words in (_shells(place), _conditions(place)):
        words[1] = str(root)
        shown = _grsd(*words, "--revision", "all")
        assert shown.exit_code == 0, shown.stderr
        assert f"note: step2 and step3 of {root} have the same weights" in shown.stderr
        assert "same weights" not in _grsd(*words).stderr


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Pieces of 40 s each, of which four were found at once; the clock is planted."""
    now = [0.0]
    lines = common.Lines("shells", lambda: now[0])

    def passes(seconds: float) -> None:
        for _ in range(int(seconds // 10)):
            now[0] += 10.0
            if now[0] % common.TICK == 0:
                lines.tick()

    lines.update(0, 10, "first batch")
    for k in range(4):
        lines.update(k + 1, 10, "found in the cache")
    for k in range(4, 6):
        passes(40.0)
        lines.update(k + 1, 10, f"batch {k + 1}")
    passes(300.0)  # one that takes long
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "shells: 0 of 10 (first batch)",
        "shells: 4 of 10 after 30 s (found in the cache)",
        "shells: 5 of 10 after 60 s, about 3 min left (batch 5)",
    ]
    # then nothing new: the line of the sixth, and one each two minutes
    assert said[3] == "shells: 6 of 10 after 90 s, about 3 min left (batch 6)".replace(
        "90 s", "2 min"
    )
    assert len(said) == 6


def test_every_long_command_says_that_it_has_begun(place: Path) -> None:
    commands = (
        (_shells(place, "--json"), "shells: 0 of 2"),
        (_conditions(place), "conditions: 0 of"),
    )
    for words, label in commands:
        shown = _grsd(*words)
        assert shown.exit_code == 0 and shown.stderr.startswith(label), shown.stderr
        assert label not in shown.stdout


@pytest.mark.parametrize(("resumes", "words"), [(True, "goes on from there"), (False, "nothing")])
def test_a_run_that_is_stopped_says_how_to_go_on(
    place: Path, resumes: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grsd.lab.runs.shell_run", stop)
    monkeypatch.setattr("grsd.lab.runs.conditions.conditions_of", stop)
    stopped = _grsd(*(_shells(place) if resumes else _conditions(place)))
    last = stopped.stderr.splitlines()[-1]
    assert stopped.exit_code == 130 and last.startswith("grsd: stopped; ") and words in last


def test_a_fault_of_our_own_is_a_sentence_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("grsd.lab.runs.shell_run", fail)
    said = _refused(_grsd(*_shells(place)))
    assert (
        said.startswith("grsd: KeyError: 'planted' (this is a fault of grsd") and "--debug" in said
    )
    assert isinstance(_grsd("--debug", *_shells(place)).exception, KeyError)


def test_unknown_things_are_named(tmp_path: Path) -> None:
    assert "unknown model 'mini-9m': the mini suite has mini-0.4m" in _refused(
        _grsd("shells", "mini-9m")
    )
    assert "size is 'mini-9m'" in _refused(_grsd("suite", "--size", "mini-9m"))
    assert "verdict is 'maybe'" in _refused(_grsd("claims", "--verdict", "maybe"))
    assert "paper is 'none'" in _refused(_grsd("claims", "--paper", "none"))
    assert "no result 'nothing'" in _refused(_grsd("results", "show", "nothing"))
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in _refused(_grsd("suite", "--corpus", str(tmp_path / "empty.txt")))


def test_debug_shows_the_traceback() -> None:
    shown = _grsd("--debug", "suite", "--size", "mini-9m")
    assert isinstance(shown.exception, ValueError)


def test_as_a_program(place: Path) -> None:
    """One real process: JSON alone on stdout, the same numbers as in this one, and a clean refusal."""
    program = [sys.executable, "-c", "from grsd.cli import main; main()"]
    words = _shells(place, "--json")
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    here = _json(_grsd(*words, "--no-resume"))
    for there, mine in zip(json.loads(done.stdout)["profiles"], here["profiles"], strict=True):
        # threads differ, so sums are ordered differently: float32 rounding over a hundred products
        np.testing.assert_allclose(there["total"], mine["total"], rtol=1e-5)
    refused = subprocess.run(
        [*program, "shells", "./nowhere"], capture_output=True, text=True, timeout=240
    )
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr.startswith("grsd: unknown model './nowhere'")
        and refused.stderr.count("\n") == 1
    )
