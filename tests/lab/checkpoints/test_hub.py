from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    RobertaConfig,
    XLNetConfig,
)

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
    before = hub.fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9.9"}))
    assert hub.fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    assert hub.fingerprint(folder) != before
    (folder / "config.json").write_text(json.dumps(config))
    _edit(folder, gpt_neox__final_layer_norm__bias=torch.ones(16))
    assert hub.fingerprint(folder) != before


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
    monkeypatch.setitem(suites.MINI, "mini-test", replace(TINY, name="mini-test"))
    monkeypatch.setattr(corpora, "embedded", lambda *_, **__: corpus)
    with pytest.raises(ValueError, match="not trained yet; run: grsd suite --size mini-test"):
        opened.load("mini-test")
    suites.train("mini-test", corpus, steps=1)
    assert (
        opened.load("mini-test").revision == "step1"
        and opened.load("mini-test", "step0").name == "mini-test"
    )
    assert opened.open_model("mini-test").revisions == ["step0", "step1"]
    with pytest.raises(ValueError, match=r"step2'.*longer training.*--size mini-test --steps N"):
        opened.load("mini-test", "step2")


def test_the_seed_of_a_mini_suite_is_part_of_its_name(
    corpus: corpora.Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(suites.MINI, "mini-test", replace(TINY, name="mini-test"))
    monkeypatch.setattr(corpora, "embedded", lambda *_, **__: corpus)
    with pytest.raises(ValueError, match="run: grsd suite --size mini-test --seed 3"):
        opened.load("mini-test@3")
    for seed in (0, 3):
        suites.train("mini-test", corpus, steps=1, seed=seed)
    other, first = opened.load("mini-test@3"), opened.load("mini-test@0")
    assert other.name == "mini-test@3" and other.fingerprint != first.fingerprint
    assert first.fingerprint == opened.load("mini-test").fingerprint
    # trained with that seed, and not only called so
    own = suites.build(TINY, seed=3)
    begun = opened.load("mini-test@3", "step0").model
    for a, b in zip(begun.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("mini-test@", "mini-test@x", "mini-test@-1", "mini-test@1.5"):
        with pytest.raises(ValueError, match=f"{name}' names no seed"):
            opened.open_model(name)


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


class _Runs:
    """Pickled, it says: call this."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _as_pickle(folder: Path, parts: int = 1, **more: Any) -> None:
    """Turn a checkpoint into what many revisions on the hub are: pytorch_model.bin, whole or in parts."""
    weights: dict[str, Any] = load_file(folder / "model.safetensors") | more
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    where = {name: f"pytorch_model-{k % parts}.bin" for k, name in enumerate(weights)}
    for part in set(where.values()):
        torch.save({k: v for k, v in weights.items() if where[k] == part}, folder / part)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("parts", [1, 3])
def test_pickled_weights_are_read_as_tensors(folder: Path, parts: int) -> None:
    expected = opened.load(folder)
    _as_pickle(folder, parts)
    found = opened.load(folder)
    for (name, a), b in zip(
        found.model.named_parameters(), expected.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert found.fingerprint != expected.fingerprint  # of the bytes as stored
    checkpoint = opened.open_model(folder).checkpoint()
    count = sum(1 for _ in expected.model.parameters())
    assert checkpoint.provenance()["tensors"] == {"float32": count}


def test_a_pickle_that_calls_something_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = _Runs(marker)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for copy, count in ((whole, 1), (parts, 2)):
        shutil.copytree(folder, copy)
        _as_pickle(copy, count, evil=evil)
        with pytest.raises(
            ValueError, match=r"pytorch_model.*\.bin asks for \S+, .*tensors only: nothing was run"
        ):
            opened.load(copy)
        assert not marker.exists()
    torch.load(whole / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the planted call is real

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        opened.load(folder)


def test_pickles_that_are_no_state_dict_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, and so is pytorch_model"):
        (folder / "model.safetensors").rename(folder / "kept")
        opened.load(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    _as_pickle(folder)
    file = folder / "pytorch_model.bin"
    torch.save({"model": weights}, file)
    with pytest.raises(ValueError, match="holds 'model', which is no tensor"):
        opened.load(folder)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="which is no tensor"):
        opened.load(folder)
    torch.save(weights, file, _use_new_zipfile_serialization=False)  # torch before 1.6
    opened.load(folder)
    raw = file.read_bytes()
    for size in (0, 10, len(raw) - 100):
        file.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=rf"truncated or damaged \({size} bytes"):
            opened.load(folder)


def _stock(tmp_path: Path, model: Any) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def _llama(**changes: Any) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 61}
    config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape | changes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_weights_that_the_model_does_not_use_are_refused(tmp_path: Path) -> None:
    """Attention biases in the file, of which config.json says nothing: the logits would differ."""
    model = _llama(attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    folder = _stock(tmp_path, model)
    opened.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(
        ValueError, match=r"holds 8 weights .*does not use \(model\.layers\.0\.self"
    ):
        opened.load(folder)
    _as_pickle(folder)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds 8 weights"):
        opened.load(folder)


def test_buffers_that_the_model_makes_itself_are_passed_over(folder: Path, tmp_path: Path) -> None:
    """Old versions of transformers stored masks and rotary tables."""
    mask = torch.ones(1, 1, 8, 8).tril().bool()
    _edit(
        folder,
        gpt_neox__layers__0__attention__bias=mask,
        gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9),
        gpt_neox__layers__0__attention__rotary_emb__inv_freq=torch.ones(2),
    )
    opened.load(folder)
    for k, (config, buffers) in enumerate(
        (
            (
                GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61),
                {"transformer__h__0__attn__bias": mask.to(torch.uint8)}
                | {"transformer__h__0__attn__masked_bias": torch.tensor(-1e4)},
            ),
            (
                GPTNeoConfig(
                    hidden_size=16,
                    num_layers=1,
                    num_heads=2,
                    vocab_size=61,
                    attention_types=[[["global"], 1]],
                ),
                {"transformer__h__0__attn__attention__bias": mask}
                | {"transformer__h__0__attn__attention__masked_bias": torch.tensor(-1e9)},
            ),
            (
                GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=61, rotary_dim=4),
                {"transformer__h__0__attn__bias": mask}
                | {"transformer__h__0__attn__masked_bias": torch.tensor(-1e9)},
            ),
            (
                _llama().config,
                {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
                | {"model__layers__0__self_attn__rotary_emb__cos_cached": torch.ones(1, 1, 8, 8)},
            ),
        )
    ):
        old = _stock(tmp_path / str(k), AutoModelForCausalLM.from_config(config))
        _edit(old, **buffers)
        opened.load(old)


def test_a_head_that_differs_from_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    folder = _stock(tmp_path, _llama(tie_word_embeddings=True))
    weight = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    _edit(folder, lm_head__weight=weight.clone())  # equal: the same model
    model: Any = opened.load(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _edit(folder, lm_head__weight=weight + 1e-3)
    with pytest.raises(ValueError, match="output layer that differs from the embedding"):
        opened.load(folder)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = _stock(tmp_path, _llama())
    name = "model.layers.0.mlp.up_proj.weight"
    _edit(folder, **{name: torch.ones(32, 16, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf"{name} is stored as I8, without the scale"):
        opened.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized \(gptq\).*dequantize it"):
        opened.load(folder)


def test_mixed_dtypes_are_widened_and_named(tmp_path: Path) -> None:
    folder = _stock(tmp_path, _llama())
    name = "model.layers.0.mlp.up_proj.weight"
    half = load_file(folder / "model.safetensors")[name].bfloat16()
    _edit(folder, **{name: half})
    loaded = opened.load(folder, dtype=torch.float64)
    assert torch.equal(loaded.model.get_parameter(name), half.double())
    tensors = opened.open_model(folder).checkpoint().provenance()["tensors"]
    assert tensors["BF16"] == 1 and tensors["F32"] > 10


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    _llama().save_pretrained(tmp_path, max_shard_size="5KB")
    index = tmp_path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    listed = dict(said["weight_map"])
    for change, words in (
        ({"model.extra": next(iter(listed.values()))}, "disagree: 1 weights .model.extra"),
        ({"model.norm.weight": "../elsewhere.safetensors"}, "which is no file beside it"),
        ({"model.norm.weight": "model-9.safetensors"}, "is missing, so the checkpoint is incom"),
    ):
        index.write_text(json.dumps(said | {"weight_map": listed | change}))
        with pytest.raises(ValueError, match=words):
            opened.load(tmp_path)
    index.write_text(json.dumps(said))
    sharded = opened.load(tmp_path)
    _llama().save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    assert opened.load(tmp_path).fingerprint != sharded.fingerprint  # the file that is loaded


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "vocab_size": 61}
HEADS: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_later_tokens_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    xlnet = XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=61)
    prefix = Gemma3TextConfig(**SMALL, **HEADS, sliding_window=4, use_bidirectional_attention=True)
    for k, config in enumerate((BertConfig(**SMALL), RobertaConfig(**SMALL), xlnet, prefix)):
        if config is xlnet and dtype is torch.bfloat16:
            continue  # which its own code does not know
        folder = _stock(tmp_path / str(k), AutoModelForCausalLM.from_config(config))
        with pytest.raises(ValueError, match=r"is not causal: in .*later tokens change the logits"):
            opened.load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_pass(dtype: torch.dtype) -> None:
    """The null: windows, experts, state spaces, and an encoder's family as a decoder."""
    for config in (
        BertConfig(**SMALL, is_decoder=True),
        MistralConfig(**SMALL, **HEADS, sliding_window=4),
        Gemma2Config(**SMALL, **HEADS, sliding_window=4),
        MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
        MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=61, state_size=4),
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=61),
    ):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        hub.check_causal(model.eval(), config.model_type)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, **HEADS, sliding_window=4),
        MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=61, state_size=4),
        MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_float64_of_models_without_its_kernels(config: Any, tmp_path: Path) -> None:
    """No attention, or no product of experts, that transformers chooses by itself computes in float64."""
    folder = _stock(tmp_path, AutoModelForCausalLM.from_config(config))
    narrow, wide = (opened.load(folder, dtype=d).model for d in (torch.float32, torch.float64))
    ids = torch.arange(20)[None]
    a, b = (net(input_ids=ids, use_cache=False).logits for net in (narrow, wide))
    assert all(p.dtype == torch.float64 for p in wide.parameters())
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)  # float32 rounding


def test_encoder_decoders_are_refused_before_they_are_read(tmp_path: Path) -> None:
    sizes = {"decoder_layers": 1, "encoder_layers": 1, "vocab_size": 61, "d_model": 16}
    heads = {"decoder_attention_heads": 2, "encoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, decoder_ffn_dim=16, encoder_ffn_dim=16)
    folder = _stock(tmp_path, BartForConditionalGeneration(config))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        opened.load(folder)


def test_outputs_that_are_not_over_the_vocabulary_are_refused() -> None:
    model = _llama()
    model.lm_head = torch.nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"no language model: .*logits of shape \(1, 16, 5\)"):
        hub.check_causal(model, "planted")
    model.forward = lambda input_ids, use_cache: input_ids
    with pytest.raises(ValueError, match="does not run on token ids alone"):
        hub.check_causal(model, "planted")


@pytest.mark.parametrize("kind", ["a generator of its own", "a counter of calls"])
def test_a_model_that_is_another_at_every_call_is_refused(kind: str) -> None:
    model = _llama()
    hub.check_causal(model, "null")
    own, calls = np.random.default_rng(0), iter(range(100))

    def shaken(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-3 * (own.random() if "generator" in kind else next(calls)))

    model.model.layers[0].mlp.register_forward_hook(shaken)
    with pytest.raises(ValueError, match="two passes of planted over the same 16 tokens"):
        hub.check_causal(model, "planted")


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


def test_hub_revision_with_pickles_only(
    suite: suites.Suite, hub_cache: Path, tmp_path: Path
) -> None:
    """As many revisions of Pythia: read as tensors; a planted call is not run."""
    expected = opened.load(suite.root).model
    (snapshot,) = (p.parent for p in hub_cache.rglob("model.safetensors") if "5" * 40 in str(p))
    _as_pickle(snapshot)
    found = opened.load("EleutherAI/pythia-test").model
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.save({"evil": _Runs(tmp_path / "ran")}, snapshot / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing was run"):
        opened.load("EleutherAI/pythia-test")
    assert not (tmp_path / "ran").exists()


def test_pickles_are_downloaded_only_where_there_is_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(*_: object, allow_patterns: list[str], **__: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    opened.load("a/b")
    assert len(asked) == 1 and not any("bin" in pattern for pattern in asked[0])
    _as_pickle(folder)
    opened.load("a/b")
    assert len(asked) == 3 and "pytorch_model*.bin" in asked[2]


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
