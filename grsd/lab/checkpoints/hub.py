"""Load a checkpoint: one code path for the mini suite, local folders, and models on the Hugging Face hub.

Weights are read from safetensors files only, and no code that comes with a checkpoint is run. What cannot be trusted
is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grsd.lab.checkpoints import suites
from grsd.lab.data import corpora
from grsd.lab.nets.models import quiet

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_CONVERT = (
    "only safetensors are read, since unpickling runs code. Convert it on a machine you trust "
    "(AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)) and pass the folder, or name a revision that "
    "has safetensors, such as refs/pr/N of a conversion request"
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured.

    Attributes
    ----------
    model : nn.Module
        In eval mode; called with token ids (B, L) it gives an output with ``logits`` (B, L, V).
    tokenizer : object or None
        None when the checkpoint carries none.
    name, revision : str
        What was asked for; the revision is ``"main"`` for a folder without revisions.
    config : object
        The transformers configuration.
    fingerprint : str
        SHA-256 over the weights as stored and the configuration.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    name: str
    revision: str
    config: Any = field(repr=False)
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """Number of entries of the output layer."""
        return int(self.config.vocab_size)

    def check_fit(self, corpus: corpora.Corpus, length: int) -> None:
        """Refuse a text whose tokens or length the model cannot take, with ValueError."""
        if self.tokenizer is None and corpus.vocab_size > self.vocab_size:
            raise ValueError(
                f"{self.name} carries no tokenizer, and the one made for the corpus {corpus.name!r} has {corpus.vocab_size} entries for a "
                f"vocabulary of {self.vocab_size}; put the model's tokenizer.json into its folder"
            )
        corpus.check_vocabulary(self.vocab_size)
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and length > context:
            raise ValueError(
                f"length = {length} exceeds the model's context of {context} tokens; lower length"
            )


def load(
    model: str | Path,
    revision: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str | None = None,
    cache: Path | str | None = None,
) -> Loaded:
    """Load one checkpoint.

    Parameters
    ----------
    model : str or Path
        A mini-suite name (``"mini-1.3m"``, trained before with `grsd suite`), a folder in Hugging Face format, a
        folder of such folders (one per revision), or a name on the hub (``"EleutherAI/pythia-70m"``).
    revision : str, optional
        ``"step1000"``. Without it the last checkpoint of a suite, or the hub's ``main``.
    dtype : torch.dtype
        Floating dtype of the weights.
    device : str or torch.device
    attention : str, optional
        Implementation in transformers. Default ``"eager"``, which has a second derivative everywhere; in float64
        ``"sdpa"``, because the eager one computes its softmax in float32. The operator of `grsd.spectrum` selects the
        mathematical backend of the latter by itself.
    cache : path, optional
        Where the mini suite is looked for; default `grsd.results.cache_dir`.

    Raises
    ------
    ValueError
        Unknown model or revision (the message lists those there are), or a checkpoint that is truncated, incomplete,
        not finite, pickled, or of an architecture that needs its own code; the file is named.
    RuntimeError
        The hub cannot be reached, or the device does not exist.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    where = check_device(device)
    folder, found = resolve(model, revision, cache=cache)
    files = check_files(folder)
    fingerprint = checkpoint_fingerprint(folder)
    net = _build(folder, files, dtype, attention or ("sdpa" if dtype == torch.float64 else "eager"))
    return Loaded(
        net.to(where).eval(), tokenizer_of(folder), str(model), found, net.config, fingerprint
    )


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it."""
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        have = "cpu" + (
            f", cuda (x{torch.cuda.device_count()})" if torch.cuda.is_available() else ""
        )
        raise RuntimeError(
            f"no device {str(device)!r} on this machine; there is: {have}"
        ) from error
    return where


def resolve(
    model: str | Path, revision: str | None = None, *, cache: Path | str | None = None
) -> tuple[Path, str]:
    """Folder of a checkpoint and the name of its revision, downloading it when it is on the hub.

    Raises
    ------
    ValueError, RuntimeError
        As `load`.
    """
    return resolve_all(model, [revision], cache=cache)[0]


def resolve_all(
    model: str | Path, revisions: Sequence[str | None], *, cache: Path | str | None = None
) -> list[tuple[Path, str]]:
    """`resolve` for several revisions of one model."""
    name = str(model)
    if name not in suites.MINI:
        return [_resolve(name, revision) for revision in revisions]
    root = suites.locate(name, suites.of_suite(name, cache=cache), cache=cache).root
    if not revisions_in(root):
        raise ValueError(f"the suite {name} is not trained yet; run: grsd suite --size {name}")
    return [_pick(root, revision, name) for revision in revisions]


def _resolve(name: str, revision: str | None) -> tuple[Path, str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _pick(path, revision, name)
    if path.is_file():
        raise ValueError(
            f"{name} is a file; pass the folder that holds config.json and model.safetensors"
        )
    if (
        re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
        and not name.startswith((".", "/"))
        and "--" not in name
    ):
        if "/" not in name and name.startswith(("mini", "step")):
            raise ValueError(f"unknown model {name!r}: the mini suite has {', '.join(suites.MINI)}")
        return _download(name, revision)
    raise ValueError(
        f"unknown model {name!r}: expected one of {', '.join(suites.MINI)}, an existing folder, "
        "or a name on the hub such as EleutherAI/pythia-70m"
    )


def revisions_in(root: Path) -> list[str]:
    """Names of the checkpoint folders under ``root``, by training step, then by name."""
    if not root.is_dir():
        return []
    names = [
        p.name
        for p in root.iterdir()
        if not p.name.startswith(".") and (p / "config.json").is_file()
    ]

    def order(name: str) -> tuple[bool, int, str]:
        step = re.fullmatch(r"step[-_]?(\d+)", name)
        return (step is None, int(step.group(1)) if step else 0, name)

    return sorted(names, key=order)


def _pick(root: Path, revision: str | None, name: str) -> tuple[Path, str]:
    have = revisions_in(root)
    if revision is not None and revision in have:
        return root / revision, revision
    if revision in (None, "main") and (root / "config.json").is_file():
        return root, "main"
    if revision is None and have:
        steps = [r for r in have if r.startswith("step")]
        return root / (steps or have)[-1], (steps or have)[-1]
    if have:
        raise ValueError(f"{name} has no revision {revision!r}; it has {', '.join(have)}")
    if (root / "config.json").is_file():
        raise ValueError(
            f"{name} has no revision {revision!r}: it is a single checkpoint, so pass no revision"
        )
    raise ValueError(
        f"the folder {name} holds no checkpoint: expected config.json and model.safetensors in it"
    )


def _download(name: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import list_repo_refs, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = revision or "main"
    try:
        folder = snapshot_download(name, revision=asked, allow_patterns=_WANTED)
    except GatedRepoError as error:
        raise RuntimeError(
            f"{name} is gated on the hub: log in and accept its terms first"
        ) from error
    except RevisionNotFoundError as error:
        try:
            refs = list_repo_refs(name)
            have = ", ".join(r.name for r in [*refs.branches, *refs.tags][:200])
        except Exception:  # the listing only improves the message
            have = "unknown, since the list could not be read"
        raise ValueError(f"{name} has no revision {asked!r}; it has {have}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"unknown model {name!r}: neither one of {', '.join(suites.MINI)}, nor a folder, nor on the hub"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"cannot reach the hub for {name!r}, revision {asked!r}, and it is not in the local cache; on a machine "
            f"with network run 'hf download {name} --revision {asked} --local-dir FOLDER' and pass the folder"
        ) from error
    except Exception as error:  # connection errors of the HTTP client, whichever it is
        if "connect" in type(error).__name__.lower() or "timeout" in type(error).__name__.lower():
            raise RuntimeError(
                f"no network for {name!r} ({type(error).__name__}); on a machine with network run "
                f"'hf download {name} --revision {asked} --local-dir FOLDER' and pass the folder"
            ) from error
        raise ValueError(f"cannot load {name!r}, revision {asked!r}: {error}") from error
    path = Path(folder)
    if not list(path.glob("*.safetensors")):
        raise ValueError(
            f"{name}, revision {asked!r}, has no safetensors (many Pythia revisions hold only "
            f"pytorch_model.bin); {_CONVERT}"
        )
    return path, asked


def check_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each readable to its end; ValueError names the one that is not."""
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json, so it is no checkpoint in Hugging Face format"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error}") from error
        files = [folder / n for n in names]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
            if pickled:
                raise ValueError(f"{folder / pickled[0]} is a pickled checkpoint; {_CONVERT}")
            raise ValueError(
                f"{file} is missing, so the checkpoint is incomplete; download or train it again"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            size = file.stat().st_size
            raise ValueError(
                f"{file} is truncated or damaged ({size} bytes; {error}); download or train it again"
            ) from error
    return files


def checkpoint_fingerprint(folder: Path) -> str:
    """SHA-256 over the safetensors files and the configuration, without what changes from save to save."""
    digest = hashlib.sha256()
    config = _raw_config(folder)
    digest.update(
        json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True).encode()
    )
    for file in check_files(folder):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(
            f"{folder / 'config.json'} is damaged: it holds a {type(raw).__name__}, not an object"
        )
    return raw


def _build(folder: Path, files: list[Path], dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    if "auto_map" in _raw_config(folder):
        raise ValueError(
            f"{folder / 'config.json'} asks for code of its own (auto_map), which is never run"
        )
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
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(
            f"{folder} cannot be loaded as a causal language model: {reason}"
        ) from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(
            f"{files[0]} lacks {len(absent)} weights of the model ({absent[0]}, …); it would start from random ones"
        )
    mismatched = sorted(str(m[0]) for m in report.get("mismatched_keys", ()))
    if mismatched:
        raise ValueError(
            f"{files[0]}: {mismatched[0]} does not have the shape that config.json says"
        )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise ValueError(
                f"{files[0].parent}: the weight {name} has {count} values that are not finite"
            )
    return model.requires_grad_(True)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer comes with a checkpoint."""
    return any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer that comes with a checkpoint, or None; ValueError when it is damaged."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ValueError(f"the tokenizer in {folder} is damaged: {error}") from error


def available(model: str | Path, *, cache: Path | str | None = None) -> list[str]:
    """Revisions of a suite, of a local folder, or of a model on the hub (its branches)."""
    name = str(model)
    if name in suites.MINI:
        root = suites.locate(name, suites.of_suite(name, cache=cache), cache=cache).root
    else:
        root = Path(name).expanduser()
    if name in suites.MINI or root.is_dir():
        if not (have := revisions_in(root)):
            _pick(root, None, name)
            return ["main"]
        return have
    from huggingface_hub import list_repo_refs

    try:
        return sorted(branch.name for branch in list_repo_refs(name).branches)
    except Exception as error:  # the HTTP client's own errors among them
        raise RuntimeError(
            f"cannot list the revisions of {name!r} on the hub ({type(error).__name__})"
        ) from error
