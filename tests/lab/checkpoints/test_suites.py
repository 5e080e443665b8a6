from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grsd import pieces
from grsd.lab.checkpoints import hub, opened, suites
from grsd.lab.data import corpora
from tests.lab.cases import RECIPE, TINY


@pytest.mark.parametrize(
    ("name", "millions"), [("mini-0.4m", 0.4), ("mini-1.3m", 1.3), ("mini-4.2m", 4.2)]
)
def test_parameter_counts(name: str, millions: float) -> None:
    size = suites.MINI[name]
    counted = sum(p.numel() for p in suites.build(size, seed=0).parameters())
    assert counted == size.parameters
    assert round(counted / 1e6, 1) == millions


def test_pythia_70m_has_the_published_count() -> None:
    # Pythia, table 1 (Biderman et al. 2023): 70,426,624 parameters, of which 18,915,328 are not embeddings
    size = suites.MINI["pythia-70m"]
    assert size.parameters == 70_426_624
    assert size.parameters - 2 * size.vocab_size * size.hidden == 18_915_328


def test_initialisation_is_that_of_gpt_neox() -> None:
    size = suites.MINI["mini-1.3m"]
    weights = dict(suites.build(size, seed=0).named_parameters())
    for name, std in [
        ("gpt_neox.embed_in.weight", math.sqrt(2 / (5 * 128))),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", math.sqrt(2 / (5 * 128))),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h.weight", 2 / (4 * math.sqrt(128))),
        ("gpt_neox.layers.1.attention.dense.weight", 2 / (4 * math.sqrt(128))),
    ]:
        n = weights[name].numel()
        # the sample standard deviation of n normals has relative standard error 1/sqrt(2n); five of them
        assert abs(float(weights[name].detach().std()) / std - 1) < 5 / math.sqrt(2 * n)
    assert float(weights["gpt_neox.layers.0.attention.dense.bias"].detach().abs().max()) == 0


def test_checkpoint_steps_are_pythias() -> None:
    assert suites.checkpoint_steps(512) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert suites.checkpoint_steps(8000)[-4:] == [1000, 2000, 4000, 8000]
    assert suites.checkpoint_steps(5) == [0, 1, 2, 4, 5]
    assert suites.checkpoint_steps(0) == [0]


def test_learning_rate_warms_up_then_stays_or_decays() -> None:
    flat = suites.Recipe(lr=1.0, warmup=4)
    assert [flat.rate(s, 100) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = suites.Recipe(lr=1.0, warmup=4, schedule="cosine")
    assert cosine.rate(4, 100) == pytest.approx(1.0) and cosine.rate(100, 100) == pytest.approx(0.1)
    assert cosine.rate(52, 100) == pytest.approx(0.55)


def test_first_update_is_that_of_adamw_written_out(
    corpus: corpora.Corpus, suite: suites.Suite
) -> None:
    """step1 from step0 by the formula: p ← p(1 − lr·wd) − lr·g/(|g| + eps), since m̂ = g and v̂ = g² at step one."""
    loaded = opened.load(suite.path("step0"))
    inputs, targets = next(corpus.batches(1, 2, 16, 0))
    logits = loaded.model(input_ids=inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    norm = math.sqrt(
        sum(float((p.grad**2).sum()) for p in loaded.model.parameters() if p.grad is not None)
    )
    shrink = min(1.0, 1.0 / (norm + 1e-6))  # gradient clipping
    after, rate = dict(opened.load(suite.path("step1")).model.named_parameters()), TINY.lr / 32
    for name, p in loaded.model.named_parameters():
        assert p.grad is not None
        g = shrink * p.grad
        decay = 0.1 if p.ndim >= 2 else 0.0
        expected = p.detach() * (1 - rate * decay) - rate * g / (g.abs() + 1e-8)
        # training runs fused attention, this test the eager one: gradients agree to float32 rounding, which g/(|g|+eps)
        # turns into an error of order rate where |g| itself is rounding, so those entries are left out
        clear = g.abs() > 1e-5
        torch.testing.assert_close(
            after[name].detach()[clear], expected[clear], rtol=1e-4, atol=1e-2 * rate
        )


def test_training_lowers_the_loss(corpus: corpora.Corpus, tmp_path: Path) -> None:
    made = suites.train(TINY, corpus, steps=40, batch_size=4, length=32, warmup=4, cache=tmp_path)
    record = made.training()
    assert len(record["loss"]) == 40
    assert abs(record["loss"][0] - math.log(300)) < 0.5  # an untrained net knows nothing
    assert record["loss"][-1] < record["loss"][0] - 1.0
    assert record["parameters"] == TINY.parameters


def test_folders_are_in_hugging_face_format(suite: suites.Suite) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert suite.revisions == ("step0", "step1", "step2", "step4", "step5") and suite.complete
    model = AutoModelForCausalLM.from_pretrained(suite.path("step4"))
    assert type(model).__name__ == "GPTNeoXForCausalLM" and not model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(suite.path("step4"))
    assert tokenizer.decode(tokenizer.encode("alpha beta")) == "alpha beta"
    assert sorted(
        p.name
        for p in suite.path("step4").iterdir()
        if "token" not in p.name and p.name != "generation_config.json"
    ) == ["config.json", "model.safetensors"]


def _weights(made: suites.Suite) -> dict[str, bytes]:
    return {r: (made.path(r) / "model.safetensors").read_bytes() for r in made.revisions}


def test_same_arguments_same_bytes_and_another_seed_differs(
    corpus: corpora.Corpus, suite: suites.Suite, tmp_path: Path
) -> None:
    again = suites.train(TINY, corpus, cache=tmp_path, **RECIPE)
    assert (
        again.root != suite.root and again.root.name == suite.root.name
    )  # keyed by content, not by folder
    assert _weights(again) == _weights(suite)
    other = suites.locate(TINY, corpus, cache=tmp_path, seed=1, **RECIPE)
    assert other.root != again.root


def test_finished_suite_is_not_trained_again(corpus: corpora.Corpus, suite: suites.Suite) -> None:
    called: list[int] = []
    cache = suite.root.parents[2]
    again = suites.train(
        TINY, corpus, cache=cache, progress=lambda s, n, x: called.append(s), **RECIPE
    )
    assert again == suite and not called


def test_short_run_is_a_prefix_of_a_longer_one(
    corpus: corpora.Corpus, suite: suites.Suite, tmp_path: Path
) -> None:
    short = suites.train(TINY, corpus, cache=tmp_path, **{**RECIPE, "steps": 2})
    steps: list[int] = []
    longer = suites.train(
        TINY, corpus, cache=tmp_path, progress=lambda s, n, x: steps.append(s), **RECIPE
    )
    assert longer.root == short.root and steps == [3, 4, 5]  # it went on from step2
    assert _weights(longer) == _weights(suite)
    assert longer.training()["loss"] == suite.training()["loss"]
    third = suites.train(TINY, corpus, cache=tmp_path, **{**RECIPE, "steps": 3})
    assert (
        len(third.training()["loss"]) == 3 and len(longer.training()["loss"]) == 5
    )  # the longer record stays


KILLED = """
import os, signal, sys
from grsd.lab.data import corpora
from grsd.lab.checkpoints import suites
target, texts, cache = sys.argv[1:]
corpus = corpora.files(texts, vocab_size=300, cache=cache)
size = suites.Preset("tiny", hidden=16, layers=1, heads=2, vocab_size=300, lr=1e-2, positions=64)
def dying(call):
    def wrapped(source, destination, **rest):
        if str(destination).endswith(target):
            dying.count -= 1
            if dying.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(source, destination, **rest)
    return wrapped
dying.count = 3 if target == "progress.safetensors" else 1
os.rename, os.replace = dying(os.rename), dying(os.replace)
suites.train(size, corpus, steps=5, batch_size=2, length=16, cache=cache)
"""


@pytest.mark.parametrize("target", ["step2", "progress.safetensors"])
def test_killed_training_resumes_to_the_same_numbers(
    target: str, texts: Path, corpus: corpora.Corpus, suite: suites.Suite, tmp_path: Path
) -> None:
    """SIGKILL just before a checkpoint is put in place, and between a checkpoint and the optimizer's state."""
    argv = [sys.executable, "-c", KILLED, target, str(texts / "*.txt"), str(tmp_path)]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    begun = suites.locate(TINY, corpus, cache=tmp_path, **RECIPE)
    assert begun.root.is_dir() and not begun.complete
    for folder in begun.root.glob("step*"):
        hub.check_files(folder)  # whatever is there is whole
    steps: list[int] = []
    resumed = suites.train(
        TINY, corpus, cache=tmp_path, progress=lambda s, n, x: steps.append(s), **RECIPE
    )
    assert steps == [2, 3, 4, 5]  # the state of step 1 was the last that stood
    assert _weights(resumed) == _weights(suite)
    assert resumed.training()["loss"] == suite.training()["loss"]
    assert resumed.training()["heldout"] == suite.training()["heldout"]
    assert not list(resumed.root.glob(".draft-*"))


def test_damaged_state_starts_over(
    corpus: corpora.Corpus, suite: suites.Suite, tmp_path: Path
) -> None:
    first = suites.train(TINY, corpus, cache=tmp_path, **{**RECIPE, "steps": 2})
    state = first.root / "progress.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    again = suites.train(TINY, corpus, cache=tmp_path, **RECIPE)
    assert _weights(again) == _weights(suite)
    assert not list(again.root.rglob("*.pt")) and not list(again.root.rglob("*.bin"))


def test_bad_arguments_are_quoted(
    corpus: corpora.Corpus, suite: suites.Suite, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"size is 'mini-9m'.*mini-1\.3m"):
        suites.train("mini-9m", corpus)
    small = suites.Preset("small", 16, 1, 2, vocab_size=100, lr=1e-2)
    with pytest.raises(ValueError, match=r"vocabulary has 100"):
        suites.train(small, corpus, cache=tmp_path)
    with pytest.raises(ValueError, match="too short"):
        suites.train(TINY, corpus, batch_size=4000, cache=tmp_path)
    with pytest.raises(ValueError, match="schedule 'linear'"):
        suites.train(TINY, corpus, schedule="linear", cache=tmp_path)
    with pytest.raises(ValueError, match="lr must be positive"):
        suites.train(TINY, corpus, lr=math.nan, cache=tmp_path)
    with pytest.raises(ValueError, match="no revision 'step3'; it has step0, step1"):
        suite.path("step3")
    with pytest.raises(ValueError, match="-1"):
        suites.checkpoint_steps(-1)


def test_the_code_in_a_suites_key_is_what_trains_and_no_more(
    corpus: corpora.Corpus, suite: suites.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes of training would be repeated for a change of any other module."""
    trains = {"grsd.lab.checkpoints.training", "grsd.lab.data.windows"}
    behind = set().union(*map(pieces.imported, trains))
    packages = {"grsd", "grsd.lab", "grsd.lab.checkpoints", "grsd.lab.data"}
    assert behind == trains | packages
    monkeypatch.setattr(pieces, "code", lambda *parts: f"{sorted(p.__name__ for p in parts)}")
    named = suites.locate(TINY, corpus, cache=suite.root.parents[2], **RECIPE).root
    assert named.parent == suite.root.parent and named != suite.root


def test_training_json_names_no_path(suite: suites.Suite) -> None:
    text = (suite.root / "training.json").read_text()
    assert str(suite.root.parents[2]) not in text
    assert json.loads(text)["corpus"]["fingerprint"]
