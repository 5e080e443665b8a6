"""The experiment ``transfer``: U-curves of small GPTs over width and depth, under SP and μP.

One piece is one curve: one size under one scheme, every learning rate, and the seeds. Text is the
help text of Python 3.11.7, byte by byte, which ships with the package; or any corpus that a command
line names (files, or a data set on the hub), as byte-level BPE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded, shared
from grsd.lab.data import corpora, help_text
from grsd.mup import optima, schedules, sweeps
from grsd.mup.registry import OPTIMIZERS

SCHEMES = ("sp", "mup", "k1")
"""Standard parametrization; μP for blocks of two or more layers; the rules for blocks of one."""
HELP = "help"  # the text that ships
TEST = 4096  # tokens of the held-out part that a run is scored on


@lru_cache(maxsize=2)
def _words(text: str) -> help_text.Text:
    """Return a text by its name: its bytes, or the tokens of a corpus."""
    if text == HELP:
        return help_text.text()
    corpus = corpora.open_corpus(text)
    ids = torch.from_numpy(corpus.tokens.astype(np.int64))
    return help_text.split(ids, corpus.vocab_size, corpus.fingerprint)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _norm(width: int, norm: bool) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False) if norm else nn.Identity()


class _Block(nn.Module):
    """Attention and feed-forward, each added to the stream; `branch_end` ends a branch."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads = heads
        attention = {"qkv": _linear(width, 3 * width), "branch_end": _linear(width, width)}
        feed = {"first": _linear(width, 4 * width), "branch_end": _linear(4 * width, width)}
        self.attention, self.feed = nn.ModuleDict(attention), nn.ModuleDict(feed)
        self.norms = nn.ModuleList(_norm(width, norm) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = self.attention["qkv"](self.norms[0](h)).view(batch, length, 3, self.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.attention["branch_end"](mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.feed["branch_end"](gelu(self.feed["first"](self.norms[1](h))))


class GPT(nn.Module):
    """A pre-norm GPT without biases or gains: token ids (B, T) → logits (B, T, V).

    Weights are normal with standard deviation `std` wherever they stand; heads have a fixed
    dimension, so that width adds heads.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        vocabulary: int = help_text.VOCABULARY,
        length: int = 64,
        head: int = 16,
        norm: bool = True,
        std: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        why = f"it must be a multiple of the head dimension {head}"
        checks.one_of("width", width, range(head, width + 1, head), why)
        checks.at_least("depth", depth, 1)
        with torch.random.fork_rng(devices=[]):  # torch draws values that are overwritten below
            self.tokens = nn.Embedding(vocabulary, width)
            self.places = nn.Embedding(length, width)
            self.blocks = nn.ModuleList(_Block(width, width // head, norm) for _ in range(depth))
            self.norm = _norm(width, norm)
            self.read_out = _linear(width, vocabulary)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.read_out(self.norm(h))


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds. A result holds one axis, one optimizer, nets with or without LayerNorm."""

    axis: str = "width"  # or "depth": what `sizes` are; the other size is that of the base
    optimizer: str = "muon_kimi"  # of hidden matrices; AdamW for the rest, at the same base rate
    norm: str = "layer"  # or "none"
    schemes: tuple[str, ...] = ("sp", "mup")
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    base_width: int = 32
    base_depth: int = 2
    rates: tuple[int, ...] = (-8, -7, -6, -5, -4, -3, -2)  # log₂ of the base rates
    seeds: int = 3  # seeds 0, 1, … of weights and batches
    near: int = 1  # later seeds run only so many rates from the best, more to bracket their own
    text: str = HELP  # or a corpus, as `grsd.lab.data.corpora.open_corpus` takes it
    steps: int = 40  # a tenth is warm-up, then a cosine to a tenth
    batch: int = 8
    length: int = 64  # bytes, or tokens
    head: int = 16  # dimension of a head
    std: float = 0.05  # of the base's weights
    clip: float = 1.0  # of the gradient's norm
    stack: int = 1  # runs of one size that are trained as one program
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.one_of("axis", self.axis, ("width", "depth"))
        checks.one_of("norm", self.norm, ("layer", "none"))
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        for scheme in self.schemes or ("",):
            checks.one_of("scheme", scheme, SCHEMES)
        checks.at_least("sizes", min(self.sizes, default=0), 1)
        checks.at_least("number of sizes", len(set(self.sizes)), 2)
        checks.at_least("number of rates", len(set(self.rates)), 3)
        checks.at_least("seeds", self.seeds, 1)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per curve, small sizes first; at the base's size all schemes are one, `base`."""
    words = _words(p.text)
    common = {**shared(p, "axis", "schemes", "sizes"), "fingerprint": words.fingerprint}
    common |= {
        "vocabulary": words.vocabulary,
        "rates": list(p.rates),
        "seeds": list(range(p.seeds)),
    }
    listed: list[Piece] = []
    for size in sorted(p.sizes):
        width, depth = (size, p.base_depth) if p.axis == "width" else (p.base_width, size)
        at_base = (width, depth) == (p.base_width, p.base_depth)
        for scheme in ("base",) if at_base else p.schemes:
            listed.append({**common, "width": width, "depth": depth, "scheme": scheme})
    return listed


def measure(piece: Piece) -> Data:
    """Sweep one curve: [seed, log₂ η, held-out loss] of every run, None for one that diverged."""
    words, scheme, device = _words(piece["text"]), piece["scheme"], piece["device"]
    steps, batch, length = piece["steps"], piece["batch"], piece["length"]
    shape: dict[str, Any] = {name: piece[name] for name in ("vocabulary", "length", "head", "std")}

    # the loss of a training step depends on seed and step alone; the score is held out
    def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs.to(device)).flatten(0, 1), targets.to(device).flatten())

    def draw(seed: int, step: int) -> tuple[Tensor, Tensor]:
        return words.batch(seed, step, batch, length)

    def factory(width: int, depth: int) -> nn.Module:
        return GPT(width, depth, norm=piece["norm"] == "layer", **shape).to(device)

    # one curve: every rate for the first seed, the others near its best
    test = words.test(TEST // length, length)
    adamw = piece["optimizer"] == "adamw" or OPTIMIZERS[piece["optimizer"]].matrices_only
    swept = sweeps.sweep(
        factory,
        mean_loss,
        draw,
        sizes=[(piece["width"], piece["depth"])],
        base=(piece["base_width"], piece["base_depth"]),
        lrs=[2.0**rate for rate in piece["rates"]],
        parametrization="sp" if scheme == "sp" else "mup",
        k=1 if scheme == "k1" else 2,
        score=lambda model: float(mean_loss(model, *test)),
        schedule=schedules.cosine(steps, warmup=steps // 10, floor=0.1),
        eps=1e-16,
        options={"adamw": {"betas": (0.9, 0.95)}} if adamw else None,
        **{name: piece[name] for name in ("seeds", "steps", "optimizer", "near", "clip", "stack")},
    )
    # the runs that were made, with None for one that diverged
    runs = []
    for seed, row in zip(swept.seeds, swept.losses[0, 0], strict=True):
        ran = ~np.ma.getmaskarray(row)
        for rate, value in zip(np.array(swept.log2_lr)[ran], np.ma.getdata(row)[ran], strict=True):
            runs.append([seed, float(rate), float(value) if math.isfinite(value) else None])
    return {"runs": runs}


def losses(data: Data, scheme: str) -> tuple[list[int], list[float], Any]:
    """Return sizes, log₂ rates and losses (sizes, seeds, rates) of one scheme of a result: NaN
    where a run diverged, masked where none was."""
    checks.one_of("scheme", scheme, sorted({c["scheme"] for c in data["curves"]}))
    chosen = [c for c in data["curves"] if c["scheme"] in (scheme, "base")]
    rates = sorted({run[1] for c in chosen for run in c["runs"]})
    seeds = sorted({run[0] for c in chosen for run in c["runs"]})
    shape = (len(chosen), len(seeds), len(rates))
    values = np.ma.masked_array(np.full(shape, math.nan), mask=True)
    for k, curve in enumerate(chosen):
        for seed, rate, value in curve["runs"]:
            at = k, seeds.index(seed), rates.index(rate)
            values[at] = math.nan if value is None else value
    return [c["size"] for c in chosen], rates, values


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """All runs; per scheme the best rates, their drift, and the regret of keeping the base's."""
    curves = [
        {"scheme": piece["scheme"], "size": piece[p.axis], "runs": one["runs"]}
        for piece, one in zip(listed, measured, strict=True)
    ]
    text = {name: listed[0][name] for name in ("fingerprint", "vocabulary")}
    data: Data = {"axis": p.axis, "text": text, "curves": curves}
    guess = math.log(text["vocabulary"])
    data["schemes"] = {scheme: _summary(guess, *losses(data, scheme)) for scheme in p.schemes}
    return rounded(data, 6)


def _summary(guess: float, sizes: list[int], rates: list[float], table: Any) -> Data:
    # a run that ends above the loss of a uniform guess diverged
    best = [optima.optimum(rates, one, ceiling=guess) for one in table]
    cost = optima.regret(rates, table, ceiling=guess)
    slope = optima.drift(sizes, best)
    return {
        "sizes": sizes,
        "optima": [_known(o, "value", "low", "high", "loss", "bound", "cliff") for o in best],
        "drift": _known(slope, "value", "low", "high", "bound", "scatter"),
        "regret": [v if math.isfinite(v) else None for v in cost.values.tolist()],
    }


def _known(one: object, *names: str) -> Data:
    """The named fields, without those that are not finite numbers."""
    values = {name: getattr(one, name) for name in names}
    return {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}


def table(result: Data) -> Rows:
    """One row per scheme and size."""
    columns = ["scheme", result["axis"], "log2 rate", "95 %", "loss", "regret"]
    rows: list[list[object]] = []
    for scheme, one in result["schemes"].items():
        for k, (size, best) in enumerate(zip(one["sizes"], one["optima"], strict=True)):
            names = ("value", "low", "high", "loss")
            value, low, high, loss = (best.get(name, math.nan) for name in names)
            cost = one["regret"][k]
            row = [scheme, size, f"{best['bound']} {value:.2f}".strip(), f"{low:.2f} to {high:.2f}"]
            row += [f"{loss:.3f}", "diverged" if cost is None else f"{cost:.3f}"]
            rows.append([*row, _shown(one["drift"]) if k == 0 else ""])
    return [*columns, "drift per doubling"], rows


def _shown(drift: Data) -> str:
    value, low, high = (drift.get(name, math.nan) for name in ("value", "low", "high"))
    return f"{drift['bound']} {value:+.2f} [{low:+.2f}, {high:+.2f}]"


GPU = {"sizes": (128, 256, 512, 1024), "base_width": 128, "base_depth": 4, "head": 64}
GPU |= {"steps": 300, "batch": 64, "length": 256, "std": 0.02, "stack": 4, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
