"""The experiment ``scheduled``: loss exponents under η ∝ k^c₀ on image kernels and a lazy net.

A schedule on a model whose kernel stands still is the drift v = c₀λ/t, so that c₀ is known, and the
exponent p + 1 of the initial energy can be read off the spectrum before any training: both sides of
(1 + c₀)(p + 1) are measured. One piece is one kernel on one pair of classes of CIFAR-10; the pairs
share no image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from grsd import checks, statistics
from grsd.dynamics.flow import descend
from grsd.dynamics.transport_solvers import fitted_exponent
from grsd.experiments.engine import Data, Experiment, Piece, Rows, grouped, rounded, shared
from grsd.experiments.two_layer_forms import TwoLayerProblem
from grsd.lab.data import archive
from grsd.lab.nets import models

NET, LAYERS = "net", 3
KERNELS = ("laplace", "gauss", "ntk", NET)
POINTS, TERMS = 40, 60  # of a fit; of the series of log(1 − ηλ), whose rest is below 2^−60
SAFE = 0.5  # largest ηλ_max


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    images: str = "cifar10_subset.npz"  # or a folder; see grsd.lab.data.archive
    kernels: tuple[str, ...] = KERNELS
    drifts: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0)  # c₀
    samples: int = 1200  # n of the kernels, half of each class
    first: int = 5  # the window of eigenvalues runs from this one …
    share: int = 8  # … to the (n/share)-th
    net_samples: int = 300  # n of the net
    pool: int = 4  # the net sees means over squares of so many pixels
    width: int = 128
    gamma: float = 0.02  # how far from lazy
    seeds: int = 5  # seed k is the pair of classes 2k and 2k + 1

    def __post_init__(self) -> None:
        for kernel in self.kernels:
            checks.one_of("kernels", kernel, KERNELS)
        checks.between("drifts", np.array(self.drifts), -1, np.inf, "()")
        checks.between("seeds", self.seeds, 2, 5, "[]", "there are five pairs of classes")
        small = min(self.samples, self.net_samples) // self.share
        checks.at_least("n/share", small, 2 * self.first, "the window needs more eigenvalues")


def pieces(p: Parameters) -> list[Piece]:
    """One piece per kernel and pair of classes."""
    kept = shared(p, "kernels", "drifts", "seeds")
    kept |= {"drifts": list(p.drifts), "sha256": archive.fingerprint(p.images)}
    listed = product(p.kernels, range(p.seeds))
    return [{**kept, "kernel": kernel, "seed": seed} for kernel, seed in listed]


def kernel_matrix(kernel: str, x: Tensor) -> Tensor:
    """Return K (n, n) of inputs (n, d).

    exp(−r/r̄) and exp(−r²/2r̄²) with the median distance r̄, or the neural tangent kernel of an
    infinitely wide ReLU net of three layers without biases, by Cho and Saul's arccosines.
    """
    gram = x @ x.T / x.shape[1]
    if kernel == "ntk":
        tangent = gram.clone()
        for _ in range(LAYERS - 1):
            size = gram.diagonal().sqrt()
            cosine = (gram / torch.outer(size, size)).clamp(-1, 1)
            left = math.pi - torch.arccos(cosine)
            rise = (1 - cosine**2).clamp(min=0).sqrt() + cosine * left
            gram = torch.outer(size, size) * rise / math.pi
            tangent = gram + tangent * left / math.pi
        return tangent
    square = gram.diagonal()
    r2 = (square[:, None] + square - 2 * gram).clamp(min=0)
    scale = r2[~torch.eye(len(x), dtype=torch.bool)].median()
    return torch.exp(-r2 / (2 * scale) if kernel == "gauss" else -(r2 / scale).sqrt())


def steps_of(c0: float, top: float, clock: tuple[float, float]) -> tuple[float, np.ndarray]:
    """Return η₁ of η_k = η₁ k^c₀ and the steps at which Σ η lies evenly in log between two values.

    η₁ is as large as ηλ_max ≤ ½ allows at every step until then.
    """
    eta, last = SAFE / top, clock[1]
    if c0 > 0:  # η is largest at the end: η₁ K^c₀ λ_max = ½ with η₁ K^(1 + c₀)/(1 + c₀) = τ
        count = (1 + c0) * last * top / SAFE
        eta = SAFE / top / count**c0
    ends = [((1 + c0) * tau / eta) ** (1 / (1 + c0)) for tau in clock]
    return eta, np.unique(np.geomspace(max(ends[0], 1.0), ends[1], POINTS).round().astype(int))


def descended(
    lam: np.ndarray, energy: np.ndarray, c0: float, eta: float, k: np.ndarray
) -> np.ndarray:
    """Return the loss of gradient descent with η₁ j^c₀ after k steps (ascending), mode by mode.

    log Π (1 − η_j λ) = −Σ_m λ^m/m Σ_j η_j^m, which costs no product of steps and modes.
    """
    logs, losses, order = np.zeros_like(lam), [], np.arange(1, TERMS + 1)
    powers = np.power(lam[:, None], order) / order
    for before, after in pairwise([0, *k.tolist()]):
        for start in range(before, after, 1 << 16):
            rates = eta * np.arange(start + 1, min(start + (1 << 16), after) + 1) ** float(c0)
            sums = np.array([(rates**m).sum() for m in order])
            logs -= powers @ sums
        losses.append(float(energy @ np.exp(2 * logs)))
    return np.array(losses)


def trained(net: TwoLayerProblem, c0: float, eta: float, k: np.ndarray) -> np.ndarray:
    """Return the loss of gradient descent of the net itself with η₁ j^c₀ after k steps."""
    theta, losses = None, []
    for before, after in pairwise([0, *k.tolist()]):
        path = descend(
            net,
            eta,
            after - before,
            schedule=partial(_factor, before, c0),
            start=theta,
            every=after - before,
        )
        theta = path.thetas[-1]
        losses.append(float(path.losses[-1]))
    return np.array(losses)


def _factor(before: int, c0: float, j: int) -> float:
    """j + 1 more steps after so many: the step's number to the power c₀."""
    return float((before + j + 1) ** c0)


def measure(piece: Piece) -> Data:
    """Exponents of the spectrum, without training, and of the loss under every schedule."""
    net = piece["kernel"] == NET
    pair = (2 * piece["seed"], 2 * piece["seed"] + 1)
    n = piece["net_samples" if net else "samples"]
    drawn = archive.two_classes(archive.find(piece["images"]), pair, n, seed=piece["seed"])
    if net:
        x = torch.nn.functional.avg_pool2d(drawn.inputs, piece["pool"]).flatten(1)
        model = models.two_layer(x.shape[1], piece["width"], piece["gamma"], seed=piece["seed"])
        problem = TwoLayerProblem(model, x / x.square().mean().sqrt(), drawn.targets)
        M = problem.kernel(problem.theta)
    else:
        problem, M = None, kernel_matrix(piece["kernel"], drawn.inputs.flatten(1)) / n
    values, vectors = torch.linalg.eigh(M)
    lam = values.clamp(min=0).numpy()[::-1].copy()  # descending
    energy = 0.5 * (vectors.T @ drawn.targets).square().numpy()[::-1] / n
    # the window of eigenvalues, and the times at which they are learned
    high, low = lam[piece["first"] - 1], lam[n // piece["share"] - 1]
    clock = (0.5 / high, 0.5 / low)
    taus = np.geomspace(*clock, POINTS)
    found = {
        # what lies below the eigenvalue that has half of its energy left at τ
        "counted": [float(energy[lam <= math.log(2) / (2 * tau)].sum()) for tau in taus],
        # the training error of ridge regression with the ridge 1/τ
        "ridge": [float(energy @ (1 + lam * tau) ** -2) for tau in taus],
    }
    curves = {}
    for c0 in piece["drifts"]:
        eta, k = steps_of(c0, float(lam[0]), clock)
        run = (
            descended(lam, energy, c0, eta, k) if problem is None else trained(problem, c0, eta, k)
        )
        curves[f"{c0:g}"] = {"steps": k, "losses": run}
    ranks = np.unique(np.geomspace(piece["first"], n // piece["share"], POINTS).astype(int))
    return {
        "window": [float(high), float(low), float(lam[0])],
        "capacity": fitted_exponent(ranks, lam[ranks - 1]),
        **{name: fitted_exponent(taus, np.array(value)) for name, value in found.items()},
        "measured": {
            c0: fitted_exponent(one["steps"], one["losses"]) for c0, one in curves.items()
        },
        "curves": curves,
    }


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Means over pairs of classes with intervals; how far either formula is from the exponent."""
    groups = []
    for (kernel,), members in grouped(listed, measured, "kernel").items():
        group: Data = {"kernel": kernel, "n": p.net_samples if kernel == NET else p.samples}
        for name in ("capacity", "counted", "ridge"):
            group[name] = statistics.mean([one[name] for one in members])
        # tail energy beyond the J-th mode falls as J^−β with β = capacity · (p + 1)
        group["beta"] = statistics.mean([one["capacity"] * one["ridge"] for one in members])
        group["drifts"] = []
        for c0 in p.drifts:
            got = [one["measured"][f"{c0:g}"] for one in members]
            corrected = [(1 + c0) * one["ridge"] for one in members]
            printed = [(1 + c0) * (one["ridge"] - 1) + 1 for one in members]
            row = {"measured": got, "corrected": corrected, "printed": printed}
            row |= {
                f"off {name}": np.subtract(got, row[name]).tolist()
                for name in ("corrected", "printed")
            }
            group["drifts"].append({"c0": c0} | {k: statistics.mean(v) for k, v in row.items()})
        group["curves"] = members[0]["curves"]
        group["window"] = members[0]["window"]
        groups.append(group)
    runs = [
        {"kernel": piece["kernel"], "seed": piece["seed"]}
        | {k: v for k, v in one.items() if k not in ("curves", "window")}
        for piece, one in zip(listed, measured, strict=True)
    ]
    return rounded({"sha256": listed[0]["sha256"], "groups": groups, "runs": runs})


def table(result: Data) -> Rows:
    """Per kernel and c₀: the exponent, both formulas, and the exponents of the spectrum."""
    columns = ["kernel", "c₀", "measured", "(1+c₀)(p+1)", "(1+c₀)p+1", "p+1 ridge", "p+1 counted"]
    rows: list[list[object]] = []
    for g in result["groups"]:
        for d in g["drifts"]:
            shown = [
                f"{statistics.Interval(*d[k]):.3f}" for k in ("measured", "corrected", "printed")
            ]
            exponents = [f"{statistics.Interval(*g[k]):.3f}" for k in ("ridge", "counted")]
            rows.append([g["kernel"], d["c0"], *shown, *exponents])
    return columns, rows


GPU = {"samples": 1200, "net_samples": 1200, "width": 1024}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
