"""What the benchmarks share: models of given shapes, interleaved timing in units of F+B, bytes alive, the stored result."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from grsd import results
from grsd.experiments.benchmark_tables import RESULT

OTHERS = ("curvlinops-for-pytorch", "cola-ml", "linear-operator")
# hidden, layers, heads, vocabulary
SHAPES = {
    "tiny": (32, 2, 2, 64),
    "h256": (256, 4, 8, 2048),
    "70m": (512, 6, 8, 50304),
    "h1024": (1024, 4, 8, 50304),
    "410m": (1024, 24, 16, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "6.9b": (4096, 32, 32, 50432),
}
# deep, narrow and tied, with grouped keys: the configuration of a published model
LLAMA: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    }
}


def build(
    shape: str, batch: int, length: int, dtype: torch.dtype, device: str
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model with random weights, GPT-NeoX or Llama, tokens (batch, length) and next tokens."""
    torch.manual_seed(0)
    if shape in LLAMA:
        published = LlamaConfig(**LLAMA[shape], attn_implementation="eager")
        drawn = torch.randint(0, published.vocab_size, (batch, length + 1), device=device)
        net = LlamaForCausalLM(published).to(device, dtype).eval()
        return net, drawn[:, :-1], drawn[:, 1:]
    hidden, layers, heads, vocabulary = SHAPES[shape]
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, length),
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(0, vocabulary, (batch, length + 1), device=device)
    return GPTNeoXForCausalLM(config).to(device, dtype).eval(), tokens[:, :-1], tokens[:, 1:]


def forward_backward(model: nn.Module, tokens: Tensor, targets: Tensor) -> Callable[[], Any]:
    """Return the unit of every ratio: one forward and one backward pass of the mean loss, to all parameters."""
    parameters = list(model.parameters())

    def run() -> Any:
        loss = functional.cross_entropy(
            model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten()
        )
        return torch.autograd.grad(loss, parameters)

    return run


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it and alive at once: `now`, and at `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in _stored((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for x in _stored(result):
            key = x.untyped_storage().data_ptr()
            if key in self.live:
                self.live[key][0] += 1
            elif key not in known:
                self.live[key] = [1, x.untyped_storage().nbytes()]
                self.now += self.live[key][1]
                self.most = max(self.most, self.now)
            else:
                continue
            weakref.finalize(x, self._release, key)
        return result

    def _release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


def _stored(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree that have a storage; the zeros of forward-mode differentiation have none."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and not x._is_zerotensor()]


def interleaved(
    calls: Sequence[tuple[str, Callable[[], Any]]], repeats: int, device: str = "cpu", warm: int = 1
) -> dict[str, list[float]]:
    """Return seconds of every call, one number a round; `warm` rounds before are not counted.

    A name may stand in the round more than once: what must be known best (F+B, the product) is measured between the others,
    and its number is the median of the round.
    """
    seconds: dict[str, list[float]] = {name: [] for name, _ in calls}
    for k in range(repeats + warm):
        found: dict[str, list[float]] = {name: [] for name in seconds}
        for name, call in calls:
            if device != "cpu":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - begun)
        if k >= warm:
            for name, times in found.items():
                seconds[name].append(statistics.median(times))
    return seconds


def ratios(times: list[float], unit: list[float]) -> dict[str, float]:
    """Return median, lowest and highest of the ratios of two calls of the same round."""
    found = [a / b for a, b in zip(times, unit, strict=True)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument(
        "--out", type=Path, help="folder of the stored result; what was measured is merged into it"
    )
    return parser


def store(section: str, name: str, row: Mapping[str, Any], asked: argparse.Namespace) -> None:
    """Merge `row` into data[section][name] of the stored result, with the revision and date of this run."""
    if asked.out is None:
        return
    known = RESULT in results.available(asked.out)
    data = dict(results.load(RESULT, asked.out).data) if known else {}
    versions = {package: metadata.version(package) for package in OTHERS if _installed(package)}
    origin = results.provenance(
        ["make", "bench"], {"threads": torch.get_num_threads(), "compared": versions}, [0]
    )
    made = {"revision": origin["revision"], "date": datetime.now(UTC).isoformat(timespec="minutes")}
    entry = {**data.get(section, {}).get(name, {}), **row}
    entry["made"] = {**entry.get("made", {}), **dict.fromkeys(row, made)}
    data[section] = {**data.get(section, {}), name: entry}
    results.save(results.Result(RESULT, data, origin), asked.out)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        print(f"{package} is not installed: left out", file=sys.stderr)
        return False
    return True
