"""Checkpoints in Hugging Face format: files that are whole, fingerprints, loading, downloads.

Weights are read from safetensors files only, and no code that comes with a checkpoint is run. What
cannot be trusted is refused by name. Names are turned into folders in
`grsd.lab.checkpoints.opened`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from grsd.lab.nets.models import quiet

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_AGAIN = "download or train it again"
_CONVERT = (
    "only safetensors are read, since unpickling runs code. Convert it on a machine you trust "
    "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)) and pass the folder, or "
    "name a revision that has safetensors, such as refs/pr/N of a conversion request"
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
    """The safetensors files of a checkpoint, each readable to its end, or ValueError."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        what = "so it is no checkpoint in Hugging Face format"
        raise ValueError(f"{folder} holds no config.json, {what}")
    files = [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error}") from error
        files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            if pickled := sorted(p for p in folder.iterdir() if p.suffix in _PICKLES):
                raise ValueError(f"{pickled[0]} is a pickled checkpoint; {_CONVERT}")
            raise ValueError(f"{file} is missing, so the checkpoint is incomplete; {_AGAIN}")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            found = f"{file.stat().st_size} bytes; {error}"
            raise ValueError(f"{file} is truncated or damaged ({found}); {_AGAIN}") from error
    return files


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over the weights and the configuration, without what changes from save to save."""
    lasting = {k: v for k, v in _configuration(folder).items() if k not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode())
    for file in check_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(raw).__name__}, not an object")
    return raw


def build(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """The network of a checkpoint, on the CPU, in eval mode; a wrong weight is named."""
    from transformers import AutoModelForCausalLM

    # nothing of the checkpoint is run: safetensors only, and no code of its own
    files = check_files(folder)
    if "auto_map" in _configuration(folder):
        config = folder / "config.json"
        raise ValueError(f"{config} asks for code of its own (auto_map), which is never run")
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation=attention,
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        why = lines[0] if lines else type(error).__name__
        raise ValueError(f"{folder} cannot be loaded as a causal language model: {why}") from error

    # transformers only warns of what follows
    if absent := sorted(report["missing_keys"]):
        what = f"lacks {len(absent)} weights of the model ({absent[0]}, …)"
        raise ValueError(f"{files[0]} {what}; it would start from random ones")
    if misshapen := sorted(str(key[0]) for key in report.get("mismatched_keys", ())):
        what = f"{misshapen[0]} does not have the shape that config.json says"
        raise ValueError(f"{files[0]}: {what}")
    for name, weight in model.named_parameters():
        if count := int((~torch.isfinite(weight)).sum()):
            raise ValueError(f"{folder}: the weight {name} has {count} values that are not finite")
    return model.requires_grad_(True).eval()


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
    # a revision may exist and hold pickles only, which are never opened
    if not list(path.glob("*.safetensors")):
        what = "has no safetensors (many Pythia revisions hold only pytorch_model.bin)"
        raise ValueError(f"{name}, revision {revision!r}, {what}; {_CONVERT}")
    return path


def branches(name: str) -> list[str]:
    """Revisions of a model on the hub; RuntimeError when the list cannot be read."""
    from huggingface_hub import list_repo_refs

    try:
        return sorted(branch.name for branch in list_repo_refs(name).branches)
    except Exception as error:  # the HTTP client's own errors among them
        what = f"cannot list the revisions of {name!r} on the hub ({type(error).__name__})"
        raise RuntimeError(what) from error
