from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from grsd.lab.checkpoints import hub, opened, suites
from grsd.lab.data import corpora
from tests.lab.cases import RECIPE, TINY


@pytest.fixture
def folder(suite: suites.Suite, tmp_path: Path) -> Path:
    """A private copy of one checkpoint, to be damaged."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(suite.path("step5"), copy)
    return copy


def _edit(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    weights = {**load_file(file), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in weights.items() if v is not None}, file, metadata={"format": "pt"})


def test_loads_a_single_folder_and_a_folder_of_revisions(suite: suites.Suite, folder: Path) -> None:
    alone, last, step2 = (
        opened.load(folder),
        opened.load(suite.root),
        opened.load(suite.root, "step2"),
    )
    assert (alone.revision, last.revision, step2.revision) == ("main", "step5", "step2")
    assert alone.fingerprint == last.fingerprint != step2.fingerprint
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored.pop(
        "embed_out.weight"
    )  # as Pythia's files and transformers name it
    for name, weight in alone.model.named_parameters():
        assert torch.equal(weight, stored[name]) and weight.requires_grad
    assert not alone.model.training and alone.config._attn_implementation == "eager"
    assert alone.vocab_size == 300 and len(alone.tokenizer) == 300


def test_dtype_is_as_asked(folder: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        assert all(p.dtype == dtype for p in opened.load(folder, dtype=dtype).model.parameters())
    with pytest.raises(ValueError, match=r"floating dtype, got torch\.int64"):
        opened.load(folder, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_exist(folder: Path, dtype: torch.dtype) -> None:
    """What the operator needs of a loaded model: the derivative of a VJP with respect to its own input."""
    model = opened.load(folder, dtype=dtype, attention="eager").model
    rows = model(input_ids=torch.arange(12).reshape(2, 6), use_cache=False).logits.flatten()
    u = torch.zeros_like(rows, requires_grad=True)
    parameters = list(model.parameters())
    back = torch.autograd.grad(rows, parameters, u, create_graph=True)
    forward = torch.autograd.grad(back, u, [torch.ones_like(p) for p in parameters])
    assert bool(torch.isfinite(forward[0]).all()) and float(forward[0].abs().max()) > 0


def test_fingerprint_follows_weights_and_shape_not_the_version(folder: Path) -> None:
    before = hub.checkpoint_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert hub.checkpoint_fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert hub.checkpoint_fingerprint(folder) != before
    (folder / "config.json").write_text(json.dumps(config))
    _edit(folder, gpt_neox__final_layer_norm__bias=torch.ones(16))
    assert hub.checkpoint_fingerprint(folder) != before


def test_sharded_checkpoint_gives_the_same_model(suite: suites.Suite, tmp_path: Path) -> None:
    whole = opened.load(suite.path("step5"))
    whole.model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")  # type: ignore[operator]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    again = opened.load(tmp_path / "sharded")
    assert again.tokenizer is None
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    next((tmp_path / "sharded").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"00002.*is missing, so the checkpoint is incomplete"):
        opened.load(tmp_path / "sharded")


def test_unknown_names_list_what_is_there(
    suite: suites.Suite, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="no revision 'step3'; it has step0, step1, step2, step4, step5"
    ):
        opened.load(suite.root, "step3")
    with pytest.raises(ValueError, match="single checkpoint, so pass no revision"):
        opened.load(folder, "step3")
    with pytest.raises(ValueError, match=r"unknown model 'mini-2m': the mini suite has mini-0\.4m"):
        opened.load("mini-2m")
    with pytest.raises(ValueError, match=r"unknown model '\./nowhere/at/all'"):
        opened.load("./nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        opened.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        opened.load(folder / "model.safetensors")
    assert opened.open_model(suite.root).revisions == ["step0", "step1", "step2", "step4", "step5"]
    assert opened.open_model(folder).revisions == ["main"]


def test_mini_suite_by_name(corpus: corpora.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites.MINI, "mini-test", TINY)
    monkeypatch.setattr(corpora, "embedded", lambda *_, **__: corpus)
    with pytest.raises(ValueError, match="not trained yet; run: grsd suite --size mini-test"):
        opened.load("mini-test")
    suites.train("mini-test", corpus, steps=1)
    assert (
        opened.load("mini-test").revision == "step1"
        and opened.load("mini-test", "step0").name == "mini-test"
    )
    assert opened.open_model("mini-test").revisions == ["step0", "step1"]


def test_truncated_file_is_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 4, 0):
        file.write_bytes(raw[:size])
        with pytest.raises(
            ValueError, match=rf"model\.safetensors is truncated or damaged \({size} bytes"
        ):
            opened.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: float) -> None:
    weight = load_file(folder / "model.safetensors")["embed_out.weight"].clone()
    weight[3, 5] = value
    _edit(folder, embed_out__weight=weight)
    with pytest.raises(ValueError, match=r"lm_head\.weight has 1 values that are not finite"):
        opened.load(folder)


def test_missing_and_misshapen_weights_are_refused(folder: Path) -> None:
    _edit(folder, embed_out__weight=torch.zeros(299, 16))
    with pytest.raises(ValueError, match=r"checkpoint"):
        opened.load(folder)
    _edit(folder, embed_out__weight=None)
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model \(lm_head\.weight"):
        opened.load(folder)


def test_pickled_checkpoint_is_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        opened.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin is a pickled checkpoint; only safetensors are read"
    ):
        opened.load(folder)


def test_damaged_or_foreign_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def write(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    write(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(ValueError, match="code of its own"):
        opened.load(folder)
    write(model_type="vit")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        opened.load(folder)
    write(model_type="no-such-type")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        opened.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        opened.load(folder)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer in .* is damaged"):
        opened.load(folder)


def test_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no device 'cuda:97' on this machine; there is: cpu"):
        opened.load(folder, device="cuda:97")
    with pytest.raises(RuntimeError, match="no device 'quantum'"):
        opened.load(folder, device="quantum")


@pytest.fixture
def hub_cache(suite: suites.Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of huggingface_hub as a download leaves it, and no network."""
    root = tmp_path / "hub"
    repo = root / "models--EleutherAI--pythia-test"
    (repo / "refs").mkdir(parents=True)
    for ref, revision in (("main", "step5"), ("step2", "step2")):
        commit = f"{revision[-1]}" * 40
        (repo / "refs" / ref).write_text(commit)
        shutil.copytree(suite.path(revision), repo / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


@pytest.mark.usefixtures("hub_cache")
def test_hub_name_goes_the_same_way(suite: suites.Suite) -> None:
    for revision, step in ((None, "step5"), ("step2", "step2")):
        found, local = (
            opened.load("EleutherAI/pythia-test", revision),
            opened.load(suite.root, step),
        )
        assert found.fingerprint == local.fingerprint
        assert found.revision == (revision or "main")


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("name", "revision"), [("EleutherAI/pythia-test", "step4"), ("EleutherAI/other", None)]
)
def test_without_network_the_way_round_is_named(name: str, revision: str | None) -> None:
    with pytest.raises(
        RuntimeError,
        match=f"cannot reach the hub for '{name}'.*hf download {name} .*pass the folder",
    ):
        opened.load(name, revision)


def test_hub_revision_with_pickles_only(hub_cache: Path) -> None:
    for file in hub_cache.rglob("model.safetensors"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"has no safetensors.*pytorch_model\.bin.*save_pretrained.*refs/pr/N"
    ):
        opened.load("EleutherAI/pythia-test")


def test_unknown_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(headers={}, request=None)

    def refuse(kind: type[Exception]) -> Any:
        def snapshot_download(*_: object, **__: object) -> None:
            raise kind("no", response=answer)  # type: ignore[call-arg]

        return snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(RepositoryNotFoundError))
    with pytest.raises(ValueError, match="unknown model 'a/b'"):
        opened.load("a/b")
    branches = [SimpleNamespace(name="main"), SimpleNamespace(name="step1000")]
    refs = SimpleNamespace(branches=branches, tags=[])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse(RevisionNotFoundError))
    monkeypatch.setattr(huggingface_hub, "list_repo_refs", lambda _: refs)
    with pytest.raises(ValueError, match="no revision 'step7'; it has main, step1000"):
        opened.load("a/b", "step7")


def test_connection_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """As the HTTP client of huggingface_hub calls it, which is another package from version to version."""

    def snapshot_download(*_: object, **__: object) -> None:
        raise ConnectError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        RuntimeError, match=r"no network for 'a/b' \(ConnectError\).*pass the folder"
    ):
        opened.load("a/b")


def test_recipe_is_used(suite: suites.Suite) -> None:
    assert suite.training()["recipe"]["batch_size"] == RECIPE["batch_size"]
