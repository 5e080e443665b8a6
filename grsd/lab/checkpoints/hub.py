"""Checkpoints in Hugging Face format: files that are whole, fingerprints, loading, downloads.

Weights are read from safetensors files, or where there are none from ``pytorch_model.bin`` by an
unpickler that knows tensors only: no code that comes with a checkpoint is run. What cannot be
trusted is refused by name. Names are turned into folders in `grsd.lab.checkpoints.opened`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from grsd.lab.checkpoints.revisions import in_order
from grsd.lab.nets.models import quiet

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PICKLED = ["pytorch_model*.bin"]
_FORMATS = ("model.safetensors", "pytorch_model.bin")  # the first that is there, as transformers
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_AGAIN = "download or train it again"
# buffers that old versions of transformers stored and the model makes itself, beside those that
# transformers passes over
_RECOMPUTED = re.compile(
    r"attn(\.attention)?\.(masked_)?bias$|attn\.causal_mask$|rotary_emb\.(cos|sin)_cached$|"
    r"embed_positions\.weights$"
)


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; RuntimeError otherwise."""
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        have = "cpu" + (f", cuda (x{gpus})" if gpus else "")
        message = f"no device {str(device)!r} on this machine; there is: {have}"
        raise RuntimeError(message) from error
    return where


def check_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, each readable to its end, or ValueError."""
    if not (folder / "config.json").is_file():
        what = "so it is no checkpoint in Hugging Face format"
        raise ValueError(f"{folder} holds no config.json, {what}")
    for name in _FORMATS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            stored_tensors([folder / name])
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise ValueError(
        f"{folder / _FORMATS[0]} is missing, and so is {_FORMATS[1]}, so the checkpoint is "
        f"incomplete; {_AGAIN}"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, which must hold just the weights that it lists."""
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(name) for name in listed.values()})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error
    files = [index.parent / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is no file beside it")
        if not file.is_file():
            raise ValueError(f"{file} is missing, so the checkpoint is incomplete; {_AGAIN}")
    if differ := sorted(set(listed) ^ set(stored_tensors(files))):
        what = f"{len(differ)} weights ({differ[0]}, …) are not in both"
        raise ValueError(f"{index} and its files disagree: {what}; {_AGAIN}")
    return files


def stored_tensors(files: Iterable[Path]) -> dict[str, str]:
    """Name → dtype of every tensor of weight files; ValueError when one is damaged or no weights.

    Only heads are read, of files in an old format of torch all.
    """
    from safetensors import SafetensorError, safe_open

    dtypes: dict[str, str] = {}
    for file in files:
        if file.suffix == ".bin":
            tensors = _unpickled(file)
            dtypes |= {k: str(v.dtype).removeprefix("torch.") for k, v in tensors.items()}
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                dtypes |= {k: opened.get_slice(k).get_dtype() for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            found = f"{file.stat().st_size} bytes; {error}"
            raise ValueError(f"{file} is truncated or damaged ({found}); {_AGAIN}") from error
    return dtypes


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, by an unpickler that makes tensors and calls nothing else."""
    mmap = zipfile.is_zipfile(file)  # files of torch before 1.6 are no archives
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a damaged or malicious stream leads to
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            what = f"asks for {asked[1]}, and a file of weights needs tensors only: nothing was run"
            raise ValueError(f"{file} {what}") from error
        found = f"{file.stat().st_size} bytes; {type(error).__name__}"
        raise ValueError(f"{file} is truncated or damaged ({found}); {_AGAIN}") from error
    tensors = state.items() if isinstance(state, dict) else [("", state)]
    if strange := [k for k, v in tensors if not (k and isinstance(v, torch.Tensor))]:
        what = f"holds {str(strange[0])!r}, which is no tensor"
        raise ValueError(f"{file} {what}: expected the state dict of a model, a tensor a name")
    return dict(tensors)


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and the configuration, without what changes from save to save."""
    lasting = {k: v for k, v in _configuration(folder).items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    for file in check_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def stored_as(folder: Path) -> dict[str, int]:
    """How many tensors are stored in which dtype."""
    return dict(Counter(stored_tensors(check_files(folder)).values()))


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(raw).__name__}, not an object")
    return raw


def build(folder: Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The network of a checkpoint, on the CPU, in eval mode; a wrong weight is named."""
    # what the configuration says of itself, before anything is loaded
    config, said = folder / "config.json", _configuration(folder)
    if "auto_map" in said:
        raise ValueError(f"{config} asks for code of its own (auto_map), which is never run")
    if said.get("is_encoder_decoder"):
        what = "is an encoder-decoder, whose decoder alone is no language model"
        raise ValueError(f"{folder} {what}; causal decoders are measured")
    if method := (said.get("quantization_config") or {}).get("quant_method"):
        what = f"is quantized ({method}), and its integers have no gradient"
        raise ValueError(f"{folder} {what}; dequantize it and save it in a floating dtype")
    files = check_files(folder)
    pickled = files[0].suffix == ".bin"
    options = {"use_safetensors": not pickled, "weights_only": True, "local_files_only": True}
    model = loaded(folder, files[0], folder, dtype, attention, **options)
    kinds = stored_tensors(files)
    for name, _ in model.named_parameters():
        if re.match(r"(?i)u?int|[iu]\d|bool", kind := kinds.get(name, "")):
            what = f"is stored as {kind}, without the scale that would make it a weight"
            raise ValueError(f"{files[0]}: {name} {what}; dequantize it and save it")
    return model


def loaded(
    what: Path, file: Path, folder: Path, dtype: torch.dtype, attention: str | None, **options: Any
) -> Any:
    """A causal language model of transformers in eval mode, with every weight of its file in it.

    `what` and `file` name it in messages; `folder` and `options` go to ``from_pretrained``.
    """
    from transformers import AutoModelForCausalLM

    # its many kinds of failure are one sentence; not all models have the attention that computes
    # in float64, and no grouped product of experts does
    double = dtype == torch.float64
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                attn_implementation=attention or ("sdpa" if double else "eager"),
                experts_implementation="eager" if double else None,
                output_loading_info=True,
                **options,
            )
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError) as error:
        if double and attention is None and "scaled_dot_product_attention" in str(error):
            return loaded(what, file, folder, dtype, "eager", **options)
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise ValueError(f"{what} cannot be loaded as a causal language model: {why}") from error

    # transformers only warns of what follows
    if absent := sorted(report["missing_keys"]):
        said = f"lacks {len(absent)} weights of the model ({absent[0]}, …)"
        raise ValueError(f"{file} {said}; it would start from random ones")
    if misshapen := sorted(str(key[0]) for key in report.get("mismatched_keys", ())):
        said = f"{misshapen[0]} does not have the shape that the configuration says"
        raise ValueError(f"{file}: {said}")
    if unused := sorted(k for k in report["unexpected_keys"] if not _RECOMPUTED.search(k)):
        said = f"holds {len(unused)} weights that {type(model).__name__} does not use"
        more = ", …" if len(unused) > 1 else ""
        why = "so the configuration is not that of these weights; mend config.json"
        raise ValueError(f"{file} {said} ({unused[0]}{more}), {why}")
    # nor does it of a head that it unties, or of a weight that is not finite
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", False) and head is not None
    if tied and head.weight is not embedding.weight:
        said = "holds an output layer that differs from the embedding"
        mend = "set tie_word_embeddings to false in config.json if the head is its own"
        raise ValueError(f"{file} {said}, and the configuration ties the two; {mend}")
    for name, weight in model.named_parameters():
        if count := int((~torch.isfinite(weight)).sum()):
            raise ValueError(f"{what}: the weight {name} has {count} values that are not finite")
    return model.requires_grad_(True).eval()


def check_causal(model: Any, name: object) -> None:
    """Refuse a model whose logits are not over its vocabulary, or see later tokens; ValueError.

    Of 16 tokens the later half is exchanged, and the earlier rows must stay, to rounding; and
    their derivative by the later embeddings must be zero, which tells in coarse arithmetic as well.
    The same tokens once more must give the same logits: a model may draw noise that no generator of
    torch shows. Cost: three forward passes and one backward pass over 16 tokens.
    """
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 0
    length = min(16, context) if context > 1 else 16
    half, device = length // 2, next(model.parameters()).device
    ids = (torch.arange(2 * length, device=device) * 7 + 3) % text.vocab_size
    one, later = ids[None, :length], ids[None, length + half :]
    seen: list[torch.Tensor] = []

    def cut(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    # two texts that differ in their later half, the first with a graph from its embeddings on
    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with torch.enable_grad():
            first = model(input_ids=one, use_cache=False).logits
        with torch.no_grad():
            second = model(input_ids=torch.cat([one[:, :half], later], 1), use_cache=False).logits
            again = model(input_ids=one, use_cache=False).logits
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(model).__name__} does not run on token ids alone ({error})"
        raise ValueError(f"{name} is no language model: {why}") from error
    finally:
        hook.remove()
    if first.shape != (1, length, text.vocab_size):
        what = f"logits of shape {tuple(first.shape)} for {length} tokens"
        raise ValueError(
            f"{name} is no language model: {type(model).__name__} gives {what}, not one row a "
            f"token over the {text.vocab_size} entries of its vocabulary"
        )

    # experts that tokens share round differently; a derivative that must be zero does not
    (slopes,) = torch.autograd.grad(first[:, :half].float().pow(2).sum(), seen[0])
    slopes = slopes.reshape(length, -1).abs()  # also where the batch is the second axis
    ahead, own = float(slopes[half:].max()), float(slopes[:half].max())
    first = first.detach()
    moved, scale = float((first - second)[:, :half].abs().max()), float(first.abs().max())
    roundings = min(64 * torch.finfo(first.dtype).eps, 2**-5)
    if not (apart := float((first - again).abs().max())) <= roundings * scale:
        raise ValueError(
            f"two passes of {name} over the same {length} tokens give logits that differ by "
            f"{apart:.2g}: {type(model).__name__} draws at random or counts its calls, so it has "
            "no Jacobian; take that out of its forward pass"
        )
    if not (moved <= roundings * scale and ahead <= 1e-5 * own):
        family = " (a decoder of this family says is_decoder in its config.json)"
        raise ValueError(
            f"{name} is not causal: in {type(model).__name__} later tokens change the logits of "
            f"earlier positions, by {moved:.2g} in a text of {length} tokens, so these "
            "predict no next token; a causal decoder is needed"
            + family
            * (getattr(text, "is_decoder", None) is False)
        )


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer comes with a checkpoint."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer that comes with a checkpoint, or None; ValueError when it is damaged."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ValueError(f"the tokenizer in {folder} is damaged: {error}") from error


def download(name: str, revision: str) -> Path:
    """Folder of a checkpoint of the hub, in the cache of huggingface_hub or downloaded to it."""
    from huggingface_hub import errors, list_repo_refs, snapshot_download

    # what each failure of the hub means for the one who asked
    command = f"hf download {name} --revision {revision} --local-dir FOLDER"
    get = f"on a machine with network run '{command}' and pass the folder"
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
        if not list(path.glob("*.safetensors")):  # many revisions of Pythia hold pickles only
            wanted = [*_WANTED, *_PICKLED]
            path = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        what = "is gated on the hub: log in and accept its terms first"
        raise RuntimeError(f"{name} {what}") from error
    except errors.RevisionNotFoundError as error:
        try:
            refs = list_repo_refs(name)
            have = ", ".join(ref.name for ref in [*refs.branches, *refs.tags][:200])
        except Exception:  # the listing only improves the message
            have = "unknown, since the list could not be read"
        raise ValueError(f"{name} has no revision {revision!r}; it has {have}") from error
    except errors.RepositoryNotFoundError as error:
        what = "neither a suite, nor a folder, nor on the hub"
        raise ValueError(f"unknown model {name!r}: {what}") from error
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        what = f"cannot reach the hub for {name!r}, revision {revision!r}, and it is not in the"
        raise RuntimeError(f"{what} local cache; {get}") from error
    except Exception as error:
        # connection errors of the HTTP client, whichever it is
        kind = type(error).__name__
        if "connect" in kind.lower() or "timeout" in kind.lower():
            raise RuntimeError(f"no network for {name!r} ({kind}); {get}") from error
        raise ValueError(f"cannot load {name!r}, revision {revision!r}: {error}") from error
    return path


def branches(name: str) -> list[str]:
    """Revisions of a model on the hub in their order; RuntimeError if the list cannot be read."""
    from huggingface_hub import list_repo_refs

    try:
        return in_order(branch.name for branch in list_repo_refs(name).branches)
    except Exception as error:  # the HTTP client's own errors among them
        what = f"cannot list the revisions of {name!r} on the hub ({type(error).__name__})"
        raise RuntimeError(what) from error
