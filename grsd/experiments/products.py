"""The experiment ``products``: singular values of ∏(I + εG) and the couplings of its training, against width, depth and t = ε²L.

A piece is one product. Pieces of the kind ``spectrum`` grow one product to the largest t and read it at all of them; pieces of the kind
``training`` take the kernel of independent layer updates and its dependence on absolute position.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from grsd.experiments.engine import Experiment, Piece, rounded
from grsd.renorm.diagnostics import couplings
from grsd.renorm.theorems import increments, products
from grsd.renorm.theorems.increments import Ensemble

__all__ = ["EXPERIMENT", "Parameters", "central_gap"]

BINS = 48  # of the histogram of s over the support of the limit law
STACKS = ("residual", "fixed", "plain")
NEAR = 3.0  # nats on either side of the middle: a window that does not grow with the spectrum


@dataclass(frozen=True)
class Parameters:
    """Attributes: see the fields' comments. Sizes and seeds only; the method is that of the module."""

    sizes: tuple[int, ...] = (32, 64, 128, 256)  # n of the spectra
    epsilon: float = 0.1  # ε of the spectra
    times: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # t = ε²L
    widths: tuple[int, ...] = (64, 128)  # n of the training kernels
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # L of the training kernels
    time: float = 1.0  # t of the stack `residual`, ε = √(t/L)
    fixed: float = 0.5  # ε of the stack `fixed`
    plain_depth: int = 4  # the stack `plain`, ∏ G, is followed to this L: beyond, its singular values leave float64
    seeds: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds is {self.seeds}; a standard error needs two or more")
        if (
            min(self.sizes, default=0) < 8
            or min(self.widths, default=0) < 32
            or min(self.depths, default=0) < 1
        ):
            raise ValueError(
                f"sizes {self.sizes}, widths {self.widths}, depths {self.depths}: too small or empty"
            )
        if (
            not self.times
            or list(self.times) != sorted(set(self.times))
            or self.times[0] < self.epsilon**2
        ):
            raise ValueError(
                f"times are {self.times}; expected ascending values of at least ε² = {self.epsilon**2:.3g}"
            )
        for value in (self.epsilon, self.fixed):
            increments.step(value)


def pieces(p: Parameters) -> list[Piece]:
    """One spectrum per size and seed; one training kernel per stack, width, depth and seed."""
    found: list[Piece] = []
    for n, seed in product(p.sizes, range(p.seeds)):
        times = list(p.times)
        found.append(
            {
                "kind": "spectrum",
                "n": n,
                "epsilon": p.epsilon,
                "times": times,
                "seed": seed,
                "device": p.device,
            }
        )
    for stack, n, depth, seed in product(STACKS, p.widths, p.depths, range(p.seeds)):
        epsilon = {"residual": math.sqrt(p.time / depth), "fixed": p.fixed, "plain": 0.0}[stack]
        if (stack == "plain" and depth > p.plain_depth) or (stack == "residual" and epsilon >= 1):
            continue
        shape = {"stack": stack, "n": n, "depth": depth, "epsilon": epsilon}
        found.append({"kind": "training", **shape, "seed": seed, "device": p.device})
    return found


def central_gap(s: np.ndarray, t: float) -> float:
    """n · spacing/2t in the middle third of an ascending spectrum; 1/(2t · density at 0) in the limit, 1 for equal Lyapunov spacing."""
    low, high = len(s) // 3, len(s) - len(s) // 3 - 1
    return float((s[high] - s[low]) / (high - low)) * len(s) / (2 * t)


def measure(piece: Piece) -> dict[str, Any]:
    """Follow one product."""
    generator = torch.Generator(piece["device"]).manual_seed(1000 * piece["n"] + piece["seed"])
    law = Ensemble("ginibre", piece["n"])
    if piece["kind"] == "training":
        stack = (
            law.matrices(piece["depth"], generator)
            if piece["stack"] == "plain"
            else products.layers(law, piece["epsilon"], piece["depth"], generator)
        )
        kernel = products.training_kernel(stack)
        found = {
            f"whole_{k}": v for k, v in _position(kernel.s, kernel.couplings, (0.1, 0.9)).items()
        }
        near = np.abs(kernel.s - np.median(kernel.s)) < NEAR
        if near.sum() >= couplings.LEAST:
            cut = _position(kernel.s[near], kernel.couplings[np.ix_(near, near)], (0.0, 1.0))
            found |= {f"near_{k}": v for k, v in cut.items()}
        return found
    run, done = products.Graded(), 0
    read: dict[str, list[Any]] = {"log_norm": [], "low": [], "gap": [], "counts": []}
    for t in piece["times"]:
        until = round(t / piece["epsilon"] ** 2)
        for _ in range(done, until):
            run.apply(products.layers(law, piece["epsilon"], 1, generator)[0])
        done = until
        s = run.spectrum()
        edge = products.Bulk(t).edge
        read["log_norm"].append(float(s[-1]) / 2)
        read["low"].append(float(s[0]) / 2)
        read["gap"].append(central_gap(s, t))
        read["counts"].append(np.histogram(s, np.linspace(-edge, edge, BINS + 1))[0].tolist())
    return read


def _position(s: np.ndarray, x: np.ndarray, window: tuple[float, float]) -> dict[str, float]:
    """Slope and rms of log E X̃² against position. The eigenvectors are those of P, so that no λ in float64 is too small: floor 0."""
    shift = couplings.shift_invariance(np.exp(s), x, window=window, floor=0.0)
    return {"slope": shift.slope, "rms": shift.rms, "span": shift.span}


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with standard errors, beside the limit law."""
    spectra = []
    for n in p.sizes:
        runs = [
            m
            for piece, m in zip(listed, measured, strict=True)
            if piece["kind"] == "spectrum" and piece["n"] == n
        ]
        for i, t in enumerate(p.times):
            bulk = products.Bulk(t)
            row: dict[str, Any] = {
                "n": n,
                "t": t,
                "limit_log_norm": bulk.edge / 2,
                "limit_gap": 1 / (2 * t * bulk.centre),
            }
            for name in ("log_norm", "low", "gap"):
                row[name], row[f"{name}_error"] = _mean([run[name][i] for run in runs])
            if n == max(p.sizes):
                counts = np.sum([run["counts"][i] for run in runs], axis=0)
                row["density"] = counts / (len(runs) * n) / (2 * bulk.edge / BINS)
            spectra.append(row)
    training = []
    keys = sorted(
        {(q["stack"], q["n"], q["depth"], q["epsilon"]) for q in listed if q["kind"] == "training"}
    )
    for stack, n, depth, epsilon in keys:
        chosen = [
            m
            for q, m in zip(listed, measured, strict=True)
            if q["kind"] == "training" and (q["stack"], q["n"], q["depth"]) == (stack, n, depth)
        ]
        row = {"stack": stack, "n": n, "depth": depth, "epsilon": epsilon}
        for name in chosen[0]:
            if all(name in m for m in chosen):
                row[name], row[f"{name}_error"] = _mean([m[name] for m in chosen])
        training.append(row)
    found: dict[str, Any] = rounded({"spectra": spectra, "training": training})
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Norms and central gaps of every product, with the limit law."""
    columns = ["n", "t", "log‖P‖", "± se", "limit", "gap · n/2t", "± se", "limit"]
    rows: list[list[object]] = [
        [
            r["n"],
            r["t"],
            *(
                f"{r[k]:.4g}"
                for k in (
                    "log_norm",
                    "log_norm_error",
                    "limit_log_norm",
                    "gap",
                    "gap_error",
                    "limit_gap",
                )
            ),
        ]
        for r in result["spectra"]
    ]
    return columns, rows


EXPERIMENT = Experiment(
    name="products",
    summary="singular values of products of near-identity matrices, and the couplings of their training",
    parameters=Parameters,
    pieces=pieces,
    measure=measure,
    reduce=reduce,
    table=table,
    seeds=lambda p: range(p.seeds),
    sources=(couplings, increments, products, sys.modules[__name__]),
    gpu={"sizes": (256, 512, 1024), "widths": (256, 512), "seeds": 32, "device": "cuda"},
)
