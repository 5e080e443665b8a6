"""The experiment ``products``: singular values of ∏(I + εG) and the couplings of its training.

Against width, depth and t = ε²L. A piece is one product. Pieces of the kind ``spectrum`` grow one
product to the largest t and read it at all of them; pieces of the kind ``training`` take the kernel
of independent layer updates and its dependence on absolute position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from grsd import checks, statistics
from grsd.experiments.engine import Data, Experiment, Piece, Rows, grouped, rounded
from grsd.renorm.diagnostics import couplings
from grsd.renorm.theorems import increments, products
from grsd.renorm.theorems.increments import Ensemble

BINS = 48  # of the histogram of s over the support of the limit law
STACKS = ("residual", "fixed", "plain")
NEAR = 3.0  # nats on either side of the middle: a window that does not grow with the spectrum


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    sizes: tuple[int, ...] = (32, 64, 128, 256)  # n of the spectra
    epsilon: float = 0.1  # ε of the spectra
    times: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # t = ε²L
    widths: tuple[int, ...] = (64, 128)  # n of the training kernels
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # L of the training kernels
    time: float = 1.0  # t of the stack `residual`, ε = √(t/L)
    fixed: float = 0.5  # ε of the stack `fixed`
    plain_depth: int = 4  # largest L of the stack `plain`, ∏ G: deeper ones leave float64
    seeds: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        checks.at_least("seeds", self.seeds, 2, "a standard error needs two or more")
        for name, least in (("sizes", 8), ("widths", 32), ("depths", 1)):
            checks.at_least(name, min(getattr(self, name), default=0), least)
        for value in (self.epsilon, self.fixed):
            increments.step(value)
        checks.ascending("times", self.times, 1)
        why = "the least time is that of a layer, ε²"
        checks.at_least("times", self.times, self.epsilon**2, why)


def pieces(p: Parameters) -> list[Piece]:
    """One spectrum per size and seed; one training kernel per stack, width, depth and seed."""
    listed: list[Piece] = []
    path = {"kind": "spectrum", "epsilon": p.epsilon, "times": list(p.times), "device": p.device}
    for n, seed in product(p.sizes, range(p.seeds)):
        listed.append({**path, "n": n, "seed": seed})
    for stack, n, depth, seed in product(STACKS, p.widths, p.depths, range(p.seeds)):
        epsilon = {"residual": math.sqrt(p.time / depth), "fixed": p.fixed, "plain": 0.0}[stack]
        if (stack == "plain" and depth > p.plain_depth) or (stack == "residual" and epsilon >= 1):
            continue
        shape = {"stack": stack, "n": n, "depth": depth, "epsilon": epsilon}
        listed.append({"kind": "training", **shape, "seed": seed, "device": p.device})
    return listed


def central_gap(s: np.ndarray, t: float) -> float:
    """n · spacing/2t in the middle third of an ascending spectrum; 1 for equal Lyapunov spacing."""
    low, high = len(s) // 3, len(s) - len(s) // 3 - 1
    return float((s[high] - s[low]) / (high - low)) * len(s) / (2 * t)


def measure(piece: Piece) -> Data:
    """Follow one product."""
    generator = torch.Generator(piece["device"]).manual_seed(1000 * piece["n"] + piece["seed"])
    law = Ensemble("ginibre", piece["n"])
    return (_training if piece["kind"] == "training" else _spectrum)(piece, law, generator)


def _training(piece: Piece, law: Ensemble, generator: torch.Generator) -> Data:
    """The couplings against position, in the whole spectrum and near its middle."""
    if piece["stack"] == "plain":
        stack = law.matrices(piece["depth"], generator)
    else:
        stack = products.layers(law, piece["epsilon"], piece["depth"], generator)
    kernel = products.training_kernel(stack)
    s, x = kernel.s, kernel.couplings
    read = {"whole": _position(s, x, (0.1, 0.9))}
    near = np.abs(s - np.median(s)) < NEAR
    if near.sum() >= couplings.LEAST:
        read["near"] = _position(s[near], x[np.ix_(near, near)], (0.0, 1.0))
    return {f"{where}_{k}": v for where, values in read.items() for k, v in values.items()}


def _position(s: np.ndarray, x: np.ndarray, window: tuple[float, float]) -> dict[str, float]:
    """Slope and rms of log E X̃² against position."""
    # the eigenvectors are those of P, so that no λ in float64 is too small: floor 0
    shift = couplings.shift_invariance(np.exp(s), x, window=window, floor=0.0)
    return {"slope": shift.slope, "rms": shift.rms, "span": shift.span}


def _spectrum(piece: Piece, law: Ensemble, generator: torch.Generator) -> Data:
    """Ends, central gap and histogram of the singular values at every t."""
    grown, done = products.Graded(), 0
    read: dict[str, list[Any]] = {"log_norm": [], "low": [], "gap": [], "counts": []}
    for t in piece["times"]:
        until = round(t / piece["epsilon"] ** 2)
        for _ in range(done, until):
            grown.apply(products.layers(law, piece["epsilon"], 1, generator)[0])
        done = until
        s, edge = grown.spectrum(), products.Bulk(t).edge
        read["log_norm"].append(float(s[-1]) / 2)
        read["low"].append(float(s[0]) / 2)
        read["gap"].append(central_gap(s, t))
        read["counts"].append(np.histogram(s, np.linspace(-edge, edge, BINS + 1))[0].tolist())
    return read


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Means over seeds with standard errors, beside the limit law."""
    count = len(p.sizes) * p.seeds  # spectra come first
    spectra = []
    for (n,), runs in grouped(listed[:count], measured[:count], "n").items():
        for i, t in enumerate(p.times):
            bulk = products.Bulk(t)
            limit = {"limit_log_norm": bulk.edge / 2, "limit_gap": 1 / (2 * t * bulk.centre)}
            row: Data = {"n": n, "t": t, **limit}
            for name in ("log_norm", "low", "gap"):
                row |= _mean(name, [run[name][i] for run in runs])
            if n == max(p.sizes):
                counts = np.sum([run["counts"][i] for run in runs], axis=0)
                row["density"] = counts / (len(runs) * n) / (2 * bulk.edge / BINS)
            spectra.append(row)
    training = []
    keys = ("stack", "n", "depth", "epsilon")
    for place, members in sorted(grouped(listed[count:], measured[count:], *keys).items()):
        row = dict(zip(keys, place, strict=True))
        for name in members[0]:
            if all(name in one for one in members):
                row |= _mean(name, [one[name] for one in members])
        training.append(row)
    return rounded({"spectra": spectra, "training": training})


def _mean(name: str, values: list[float]) -> dict[str, float]:
    error = float(statistics.standard_error(values))
    return {name: float(np.mean(values)), f"{name}_error": error}


def table(result: Data) -> Rows:
    """Norms and central gaps of every product, with the limit law."""
    columns = ["n", "t", "log‖P‖", "± se", "limit", "gap · n/2t", "± se", "limit"]
    rows: list[list[object]] = []
    for r in result["spectra"]:
        names = [n for k in ("log_norm", "gap") for n in (k, f"{k}_error", f"limit_{k}")]
        rows.append([r["n"], r["t"], *(f"{r[name]:.4g}" for name in names)])
    return columns, rows


GPU = {"sizes": (256, 512, 1024), "widths": (256, 512), "seeds": 32, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
