"""The experiment ``frozen-features``: shells of the error in nets whose features stand still.

Two nulls for what is said of checkpoints: here nothing is learned below the head, so that whatever
a profile does is done by the loss. *flow*: the features of a net of the mini suite on one held-out
batch, and its head under the exact gradient flow of the cross-entropy of that batch, for which
λ ∝ t⁻² in the end. *head*: a net with random features whose head alone is trained, on the text and
with the recipe of the suite.

With features h_i, residuals δ_i and T tokens both operators are known in closed form: on the
weights that are trained M_ij = ⟨h_i, h_j⟩⟨δ_i, δ_j⟩/T, and K is (h hᵀ/T) ⊗ 1 on the logits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded
from grsd.lab.checkpoints import suites
from grsd.lab.checkpoints.opened import open_model
from grsd.lab.checkpoints.training import Recipe, Training
from grsd.spectrum import LogShells, SpectralMeasure, nulls, statistics

SHELLS = LogShells(np.power(2.0, np.arange(-24, 15)))  # as in `grsd.experiments.protocol`
RTOL, ATOL = 1e-6, 1e-8  # of the flow, on the weights of the head


@dataclass(frozen=True)
class Parameters:
    """Which net, on which batches, and when it is looked at.

    `times` are those of the flow, from the features of `revision`; `steps` those of the trained
    head. A batch has `size` sequences of `length` tokens, as in the experiment `published`.
    """

    model: str = "mini-1.3m"
    revision: str = "step16"
    times: tuple[float, ...] = (0.0, 1.0, 4.0, 16.0, 64.0, 256.0)
    steps: tuple[int, ...] = (0, 16, 64, 128, 256, 512)
    size: int = 2
    length: int = 128
    batches: int = 3
    seeds: int = 1

    def __post_init__(self) -> None:
        checks.one_of("model", self.model, suites.MINI)
        checks.ascending("times", self.times, 2)
        checks.ascending("steps", self.steps, 2)
        checks.at_least("times", self.times[0], 0)
        checks.at_least("steps", self.steps[0], 0)
        checks.at_least("size", self.size, 1)
        checks.at_least("length", self.length, 2)
        checks.at_least("batches", self.batches, 1)
        checks.at_least("seeds", self.seeds, 1)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per seed for the trained head, and one per seed and batch for the flow."""
    try:
        weights = open_model(p.model).checkpoint(p.revision).fingerprint
    except ValueError:  # not trained yet: `measure` says what to do
        weights = ""
    shared = {"model": p.model, "size": p.size, "length": p.length, "seeds": p.seeds}
    flow = {"kind": "flow", "weights": weights, "at": list(p.times)}
    head = {"kind": "head", "batches": p.batches, "at": list(p.steps)}
    listed: list[Piece] = [
        shared | flow | {"revision": p.revision, "seed": seed, "batch": batch}
        for seed, batch in itertools.product(range(p.seeds), range(p.batches))
    ]
    return listed + [shared | head | {"seed": seed} for seed in range(p.seeds)]


def measure(piece: Piece) -> Data:
    """Under ``moments`` what `spectra` says at every time or step, batch by batch."""
    return _flow(piece) if piece["kind"] == "flow" else _head(piece)


def _batches(piece: Piece, count: int) -> list[tuple[Tensor, Tensor]]:
    corpus = suites.of_suite(piece["model"])
    every = corpus.batches(count, piece["size"], piece["length"], piece["seed"], "heldout")
    return list(every)


def features(net: nn.Module, x: Tensor) -> Tensor:
    """What the head is given, (T, d) in float64."""
    seen: list[Tensor] = []
    head: Any = net.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net(input_ids=x, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def spectra(h: Tensor, W: Tensor, y: Tensor, generator: torch.Generator) -> Data:
    """Loss, and the exact measures of e, 1 and a random vector on M, and of δ on K.

    `h` is (T, d), `W` (V, d) and `y` (T,). Cost: two eigendecompositions of T.
    """
    T = len(h)
    logp = (h @ W.T).log_softmax(-1)
    e = -logp[torch.arange(T), y]
    delta = nn.functional.one_hot(y, len(W)) - logp.exp()
    gram = h @ h.T / T

    # M on the weights of the head, and the start vectors of the book
    values, vectors = torch.linalg.eigh(gram * (delta @ delta.T))
    starts = {"error": e, "ones": torch.ones_like(e)}
    starts["random"] = nulls.random_start(e, generator=generator)
    weights = {s: ((vectors.T @ v) ** 2 / T).tolist() for s, v in starts.items()}

    # K acts on every class alike: the share of δ in an eigenvector of h hᵀ/T, over all classes
    of_K, modes = torch.linalg.eigh(gram)
    share = (modes.T @ delta).square().sum(-1) / T
    return {
        "loss": float(e.mean()),
        "eigenvalues": values.clamp(min=0).tolist(),
        "weights": weights,
        "delta": {"eigenvalues": of_K.clamp(min=0).tolist(), "weights": share.tolist()},
    }


def _flow(piece: Piece) -> Data:
    """The exact gradient flow of the head on one batch."""
    net = open_model(piece["model"]).checkpoint(piece["revision"]).load().model
    x, y = _batches(piece, piece["batch"] + 1)[-1]
    h, targets = features(net, x), y.flatten()
    head: Any = net.get_output_embeddings()  # type: ignore[operator]
    first = head.weight.detach().double()
    hot = nn.functional.one_hot(targets, len(first)).double()

    def slope(_: float, flat: np.ndarray) -> np.ndarray:
        W = torch.as_tensor(flat).reshape(first.shape)
        change: np.ndarray = ((hot - (h @ W.T).softmax(-1)).T @ h / len(h)).numpy().ravel()
        return change

    # from one time to the next; the flow is stiff at first, when probabilities are far from 0 and 1
    moments, flat, before = [], first.numpy().ravel(), 0.0
    for time in piece["at"]:
        if time > before:
            # only the end is kept: all steps of a wide vocabulary would be gigabytes
            how: Any = {"method": "RK23", "rtol": RTOL, "atol": ATOL, "t_eval": (time,)}
            found = solve_ivp(slope, (before, time), flat, **how)
            flat, before = found.y[:, -1], time
        generator = torch.Generator().manual_seed(1000 * piece["seed"] + piece["batch"])
        W = torch.as_tensor(flat).reshape(first.shape)
        moments.append(spectra(h, W, targets, generator))
    return {"moments": [[one] for one in moments]}


def _head(piece: Piece) -> Data:
    """The head of an untrained net, trained as the suite trains all of a net."""
    size, seed = suites.MINI[piece["model"]], piece["seed"]
    corpus = suites.of_suite(piece["model"])
    recipe = Recipe(lr=size.lr, batch_size=size.batch_size, seed=seed)
    run = Training(size, recipe, torch.device("cpu"))
    run.model.requires_grad_(False)
    head: Any = run.model.get_output_embeddings()  # type: ignore[operator]
    head.requires_grad_(True)

    # the features never change
    held = [(features(run.model, x), y.flatten()) for x, y in _batches(piece, piece["batches"])]
    stream = iter(corpus.batches(piece["at"][-1], recipe.batch_size, recipe.length, seed))
    moments = []
    for step in range(piece["at"][-1] + 1):
        if step in piece["at"]:
            W, seeds = head.weight.detach().double(), range(1000 * seed, 1000 * seed + len(held))
            streams = [torch.Generator().manual_seed(one) for one in seeds]
            moments.append([spectra(h, W, y, g) for (h, y), g in zip(held, streams, strict=True)])
        if step < piece["at"][-1]:
            run.update(*next(stream), piece["at"][-1])
    return {"moments": moments}


def measure_of(one: Data, start: str = "error") -> SpectralMeasure:
    """The measure of a start vector on M, or with ``"delta"`` that of δ on K."""
    held = one["delta"] if start == "delta" else one
    weights = held["weights"] if start == "delta" else held["weights"][start]
    return SpectralMeasure.exact(held["eigenvalues"], weights, semidefinite=True)


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Per kind, seed, batch and time or step what `spectra` found, rounded to five digits."""
    rows = []
    for piece, data in zip(listed, measured, strict=True):
        for at, several in zip(piece["at"], data["moments"], strict=True):
            for k, one in enumerate(several):
                where = {"kind": piece["kind"], "seed": piece["seed"], "at": at}
                rows.append(where | {"batch": piece.get("batch", k)} | rounded(one))
    return {"moments": rows}


def table(result: Data) -> Rows:
    """Per kind and time or step, the mean over batches: loss, and medians of e, 1 and δ."""
    columns = ["null", "time or step", "batches", "loss", "median λ of e", "of 1", "of δ on K"]
    rows: list[list[object]] = []
    for kind, at in dict.fromkeys((one["kind"], one["at"]) for one in result["moments"]):
        members = [o for o in result["moments"] if (o["kind"], o["at"]) == (kind, at)]
        loss = float(np.mean([o["loss"] for o in members]))
        medians = []
        for start in ("error", "ones", "delta"):
            found = [statistics(measure_of(o, start).shells(SHELLS)).median for o in members]
            medians.append(float(np.exp(np.mean(np.log(found)))))
        rows.append([kind, at, len(members), loss, *medians])
    return columns, rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table)
