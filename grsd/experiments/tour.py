"""The experiment ``tour``: the conditions of 2512.18209, and shell profiles, of one small network per family on digits.

One piece is one network on one draw of data: gradient flow until the loss has fallen to `level` of its first value, the
diagnostics D1–D6 of :mod:`grsd.renorm.diagnostics.conditions` along that path, and the shell energies at both ends beside their nulls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from grsd import statistics
from grsd.dynamics import flow
from grsd.dynamics.modes import Modes, instant, modes
from grsd.dynamics.problem import Problem
from grsd.experiments.engine import Experiment, Piece, rounded
from grsd.lab.data import images
from grsd.lab.nets import architectures, models
from grsd.renorm.diagnostics import (
    bandedness,
    block_matrices,
    blocks,
    coherence,
    collapse,
    conditions,
    couplings,
    splitting,
)
from grsd.spectrum import shells
from grsd.spectrum.measure import SpectralMeasure
from grsd.spectrum.nulls import frozen_kernel

__all__ = ["EXPERIMENT", "FAMILIES", "Family", "Parameters", "model", "profiles", "relax"]

CLASSES = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))  # even or odd
SHELLS = shells.LogShells(
    np.power(2.0, np.arange(-20, 9))
)  # of λ, 1/time: from rounding to the largest outlier seen
STEPS = 5  # times before the end of the path at which its modes are taken too: t∗/2, t∗/4, …
OCTAVES = 48  # doublings of the time after which a flow is given up
DRAWS = 200  # random errors that a single profile is compared with
ENDS = ("start", "end")


@dataclass(frozen=True)
class Family:
    """A family of networks: (width, depth, seed) → network on images (n, 1, 8, 8), and its blocks in the order of depth."""

    make: Callable[[int, int, int], nn.Module]
    split: Callable[[int], splitting.Split] = lambda depth: "auto"


def _mlp(width: int, depth: int, seed: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), models.mlp([64] + [width] * (depth + 1) + [1], seed=seed))


def _cnn(width: int, depth: int, seed: int) -> nn.Module:
    return models.conv_net((1,) + (width // 2,) * (depth + 1), 1, seed=seed)


def _res_mlp(width: int, depth: int, seed: int) -> nn.Module:
    epsilon = 1 / math.sqrt(max(depth, 1))
    return architectures.res_mlp(
        inputs=64, width=width, depth=depth, epsilon=epsilon, bias=True, seed=seed
    )


def _resnet(width: int, depth: int, seed: int) -> nn.Module:
    return architectures.res_conv(
        width=width // 2, depth=depth, epsilon=1 / math.sqrt(max(depth, 1)), seed=seed
    )


def _transformer(width: int, depth: int, seed: int) -> nn.Module:
    return architectures.transformer(width=width, depth=depth, seed=seed)


def _ssm(width: int, depth: int, seed: int) -> nn.Module:
    return architectures.ssm(
        width=width, depth=depth, epsilon=1 / math.sqrt(max(depth, 1)), seed=seed
    )


def _mixer(width: int, depth: int, seed: int) -> nn.Module:
    return architectures.mixer(width=width, depth=depth, seed=seed)


# Depth + 2 blocks each: what reads, the stack, what reads out. Convolutional nets have half the width. ε = 1/√depth where nothing
# normalises the residual stream, 1 where a layer norm does.
FAMILIES: dict[str, Family] = {
    "MLP": Family(_mlp),
    "CNN": Family(
        _cnn, lambda d: [["0", "1"], *(str(2 * k + 1) for k in range(1, d + 1)), str(2 * d + 5)]
    ),
    "ResMLP": Family(_res_mlp),
    "ResNet": Family(_resnet),
    "transformer": Family(_transformer),
    "SSM": Family(_ssm),
    "MLP-Mixer": Family(_mixer),
}


@dataclass(frozen=True)
class Parameters:
    """Attributes: see the fields' comments. Sizes and seeds only; the method is that of the module."""

    families: tuple[str, ...] = tuple(FAMILIES)  # keys of FAMILIES
    widths: tuple[int, ...] = (
        12,
    )  # of the residual stream; half of it, in channels, for the convolutional nets
    depth: int = 3  # blocks between the first and the last
    samples: int = 40  # n, half of them even digits
    level: float = (
        0.3  # share of the first loss at which the path ends; 1 for the initialisation alone
    )
    seeds: int = 16  # seeds 0, 1, …; each draws its own net and its own data
    probes: int = 16  # of D1; 0 for all rows
    rtol: float = 1e-5
    cifar: str = ""  # folder of CIFAR-10's binary files: airplane against automobile, means of 4 × 4 pixels, instead of digits
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise ValueError(f"unknown family {name!r}: expected one of {', '.join(FAMILIES)}")
        if (
            not self.families
            or not self.widths
            or min(self.widths) < 4
            or any(w % 4 for w in self.widths)
        ):
            raise ValueError(
                f"families {self.families} and widths {self.widths}: expected widths that are multiples of 4"
            )
        if self.depth < 1 or self.samples < 24 or self.seeds < 2:
            raise ValueError(
                f"depth {self.depth}, samples {self.samples}, seeds {self.seeds}: expected 1, 24 and 2 or more"
            )
        if not 0 < self.level <= 1:
            raise ValueError(f"level is {self.level}; a share of the first loss lies in (0, 1]")


def model(family: str, width: int = 12, depth: int = 3, *, seed: int) -> nn.Module:
    """Return a network of one of the `FAMILIES`: (n, 1, 8, 8) → (n, 1), float64."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family].make(width, depth, seed)


def data(samples: int, *, seed: int, cifar: str = "") -> images.Images:
    """Return even against odd digits, (n, 1, 8, 8); or two classes of CIFAR-10, grey and as means of 4 × 4 pixels."""
    if not cifar:
        return images.digits(CLASSES, samples, seed=seed)
    x, y = images.cifar(cifar, (0, 1), samples, seed=seed)
    small = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)
    return images.Images((small - small.mean()) / small.std(correction=0), y)


def relax(problem: Problem, level: float, rtol: float = 1e-5, steps: int = STEPS) -> flow.Path:
    """Follow gradient flow until the loss has fallen to `level` of its first value, and return the path at a few times.

    The path ends at the first of the times λ_max(0)⁻¹ 2^(k/4)/32 with a loss at or below `level`, t∗; its others are 0 and
    t∗/2, t∗/4, … as far as `steps` goes. `Path.identity` is the largest over its pieces.

    Raises
    ------
    ValueError
        If the loss is not there after `OCTAVES` doublings of the time.
    """
    start = 1 / float(torch.linalg.eigvalsh(problem.kernel(problem.theta))[-1]) / 32
    thetas, losses, times = [problem.theta.cpu().numpy()], [problem.loss(problem.theta)], [0.0]
    worst = 0.0
    for octave in range(OCTAVES):
        ahead = start * 2.0 ** (octave + np.arange(4) / 4)
        grid = np.concatenate([times[-1:], ahead])
        piece = flow.integrate(
            problem,
            grid,
            rtol=rtol,
            atol=1e-2 * rtol,
            start=thetas[-1],
            method="RK45",
            estimate=False,
        )
        worst = max(worst, piece.identity * piece.losses[0] / losses[0])
        thetas += list(piece.thetas[1:])
        losses += list(piece.losses[1:])
        times += list(ahead)
        below = np.flatnonzero(np.array(losses) <= level * losses[0])
        if len(below):
            last = int(below[0])
            chosen = [0, *[k for k in range(last - 4 * steps, last + 1, 4) if k > 0]]
            return flow.Path(
                np.array(times)[chosen],
                np.array(thetas)[chosen],
                np.array(losses)[chosen],
                math.nan,
                problem,
                worst,
            )
    raise ValueError(
        f"the loss is {losses[-1] / losses[0]:.3g} of its first value at t = {times[-1]:.3g}, not {level}"
    )


def profiles(found: Modes, permuted: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Return shell energies at one instant as shares of ½⟨e, e⟩ on `SHELLS`, and how deep their valleys are.

    ``error``: E_α/E. ``count``: n_α/n, what a random error would have on average. ``permuted``: the same with the error of the
    permuted targets, `permuted` (n,) holding its g_u. ``dip``: the deepest valley of the error's profile in shells of two
    octaves, as `shells.statistics`; ``rank``: the share of random errors whose valley is at least as deep.
    """
    rng = np.random.default_rng(seed)
    lam, g = np.clip(found.eigenvalues, 0.0, None), found.coefficients
    coarse = shells.LogShells(SHELLS.edges[::2])

    def profile(energies: np.ndarray, on: shells.LogShells = SHELLS) -> shells.ShellProfile:
        return SpectralMeasure.exact(lam, 2 * energies / energies.sum()).shells(on)

    def dip(energies: np.ndarray) -> float:
        return min(
            shells.statistics(profile(energies, coarse)).dip, 1e6
        )  # an empty shell makes it infinite

    own = dip(g**2)
    drawn = [dip(rng.standard_normal(len(g)) ** 2) for _ in range(DRAWS)]
    kinds = {"error": g**2, "count": np.ones(len(g)), "permuted": permuted**2}
    return {
        **{name: profile(energies).energies for name, energies in kinds.items()},
        "kernel": profile(g**2).kernel,
        "dip": own,
        "rank": float(np.mean(np.array(drawn) >= own)),
        "random": float(np.median(drawn)),
    }


def pieces(p: Parameters) -> list[Piece]:
    """One piece per family, width and seed."""
    left = {k: v for k, v in asdict(p).items() if k not in ("families", "widths", "seeds")}
    return [
        {**left, "family": family, "width": width, "n": p.samples, "seed": seed}
        for family, width, seed in product(p.families, p.widths, range(p.seeds))
    ]


def measure(piece: Piece) -> dict[str, Any]:
    """Train one network to `level` and measure D1–D6 and the shell profiles along the way."""
    seed = piece["seed"]
    x, y = data(piece["samples"], seed=1000 + seed, cifar=piece["cifar"])
    net = model(piece["family"], piece["width"], piece["depth"], seed=seed).to(piece["device"])
    at = Problem(net, x.to(piece["device"]), y.to(piece["device"]))
    path = flow.Path(
        np.zeros(1), at.theta.cpu().numpy()[None], np.array([at.loss(at.theta)]), 0.0, at, 0.0
    )
    if piece["level"] < 1:
        path = relax(at, piece["level"], piece["rtol"])
    ends = [0, len(path.times) - 1] if len(path.times) > 1 else [0]
    split = FAMILIES[piece["family"]].split(piece["depth"])
    snapshots = [(float(path.times[k]), torch.as_tensor(path.thetas[k])) for k in ends]
    found = conditions.report(at, path=snapshots, split=split, probes=piece["probes"] or None)
    instants = [modes(*instant(at, theta)) for theta in path.thetas]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(
        at.theta.device
    )
    shown = {}
    for end, k in zip(ENDS, ends, strict=False):
        other = (at.targets[order] - at.output(path.thetas[k])).cpu().numpy()
        shown[end] = profiles(instants[k], instants[k].vectors.T @ other / len(other), seed=seed)
    if len(ends) > 1:
        first = instants[0]
        exact = SpectralMeasure.exact(np.clip(first.eigenvalues, 0.0, None), first.coefficients**2)
        frozen = frozen_kernel(exact, float(path.times[-1]), SHELLS)
        shown["end"]["frozen"] = frozen.energies / frozen.total
    return {
        "parameters": len(at.theta),
        "blocks": list(found.blocks),
        "loss": path.losses[-1] / path.losses[0],
        "time": float(path.times[-1]),
        "identity": path.identity,
        "ends": [_instant(one) for one in found.instants],
        "along": _along(path, instants),
        "profiles": shown,
        "notes": [note for note in found.notes if not note.startswith("D5")],
    }


def _along(path: flow.Path, instants: list[Modes]) -> dict[str, Any]:
    """D3, D4 and D6 at every time of the path, and D5 over the times after 0."""
    floor = 100 * len(instants[0].eigenvalues) * np.finfo(float).eps  # as `shift_invariance`
    held = min(int((one.eigenvalues > floor * one.eigenvalues[-1]).sum()) for one in instants)
    lam = np.array([one.eigenvalues[-held:] for one in instants])
    speeds = np.array([one.rates[-held:] for one in instants]) / lam
    found: dict[str, Any] = {
        "times": path.times,
        "losses": path.losses / path.losses[0],
        "jacobian": [math.sqrt(one.eigenvalues[-1]) for one in instants],
        "slope": [
            couplings.shift_invariance(one.eigenvalues, one.matrix).slope for one in instants
        ],
        "ranks": [collapse.roughness(a, v).ranks for a, v in zip(lam, speeds, strict=True)],
        "modes": held,
    }
    if len(instants) > 2:
        fifth = collapse.collapse(path.times[1:], lam[1:], speeds[1:])
        found |= {"collapse": fifth.value, "collapse_null": fifth.null}
    return found


def _instant(one: conditions.Instant) -> dict[str, Any]:
    """What is kept of one instant; a diagnostic that does not exist there is left out."""
    found: dict[str, Any] = {"time": one.time, "jacobian": one.size.jacobian, "rate": one.size.rate}
    found["clock"] = one.size.clock
    if one.shift is not None:
        found |= {k: getattr(one.shift, k) for k in ("slope", "rms", "floor")}
    if one.roughness is not None:
        found["ranks"] = one.roughness.ranks
    if one.bandedness is not None and one.bandedness.right is not None:
        band, right = one.bandedness, one.bandedness.right
        found |= {"tails": band.pooled[:-1], "unlocal": band.unlocal[:-1]}
        found |= {
            "scalar_own": np.nanmean(band.scalar[:, 0]),
            "scalar_all": np.nanmean(band.scalar[:, -1]),
        }
        found |= {
            "vacuous": right.vacuous[:, 0].mean(),
            "coefficient": np.nanmedian(right.coefficient[:, 0]),
        }
        found["right"] = np.nanmax(right.residual[:, 0])
    if one.coherence is not None:
        values = one.coherence.normalized
        found["coherence"] = [np.nanmean(np.diagonal(values, k)) for k in range(1, len(values))]
        found["overlap"] = np.nanmean(values[np.triu_indices(len(values), 1)])
        found["total"] = one.coherence.total
    plain: dict[str, Any] = rounded(found, 8)
    return plain


SCALARS = (
    "jacobian", "rate", "clock", "slope", "rms", "floor", "ranks", "scalar_own", "scalar_all", "vacuous", "coefficient",
    "right", "overlap", "total",
)  # fmt: skip


def reduce(p: Parameters, listed: list[Piece], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Per family and width: means over seeds with 95 % intervals at both ends, tracks along the path, mean profiles."""
    groups = []
    for family, width in product(p.families, p.widths):
        chosen = [
            i
            for i, piece in enumerate(listed)
            if (piece["family"], piece["width"]) == (family, width)
        ]
        groups.append({"family": family, "width": width, **_group([measured[i] for i in chosen])})
    found: dict[str, Any] = rounded({"edges": SHELLS.edges, "groups": groups}, 3)
    return found


def _interval(values: list[float]) -> list[float]:
    return list(statistics.mean(values))


def _group(members: list[dict[str, Any]]) -> dict[str, Any]:
    one = members[0]
    found: dict[str, Any] = {k: one[k] for k in ("parameters", "blocks")}
    found["notes"] = sorted({note for m in members for note in m["notes"]})[:4]
    found |= {k: _interval([m[k] for m in members]) for k in ("loss", "time")}
    found["identity"] = max(m["identity"] for m in members)
    if "collapse" in one["along"]:
        found |= {
            k: _interval([m["along"][k] for m in members]) for k in ("collapse", "collapse_null")
        }
        growth = [max(m["along"]["jacobian"]) / m["along"]["jacobian"][0] for m in members]
        found["growth"] = _interval(growth)  # sup ‖J‖ along the path over ‖J(0)‖
        found["tracks"] = {
            k: np.mean([m["along"][k] for m in members], axis=0)
            for k in ("losses", "jacobian", "slope", "ranks")
        }
    for end, place in zip(ENDS, (0, -1), strict=True):
        if end not in one["profiles"]:
            continue
        at = [m["ends"][place] for m in members]
        found[end] = {k: _interval([a[k] for a in at]) for k in SCALARS}
        found[end]["unlocal"] = np.mean([a["unlocal"] for a in at], axis=0)
        for name in ("tails", "coherence"):
            found[end][name] = [
                _interval(list(column)) for column in zip(*(a[name] for a in at), strict=True)
            ]
        found[end]["slopes"] = [a["slope"] for a in at]
        found[end]["profiles"] = _profiles([m["profiles"][end] for m in members])
    return found


def _profiles(members: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        k: [m[k] for m in members] for k in ("dip", "rank", "random", "kernel")
    }
    for kind in ("error", "count", "permuted", "frozen"):
        if kind in members[0]:
            each = np.array([m[kind] for m in members])
            mean, sem = each.mean(axis=0), each.std(axis=0, ddof=1) / math.sqrt(len(each))
            seen = shells.statistics(averaged(mean, sem, len(each)))
            found[kind] = {
                "mean": mean,
                "sem": sem,
                "unimodal": int(seen.unimodal),
                "dip": min(seen.dip, 1e6),
            }
            found[kind] |= {"peak": seen.peak, "frontier": seen.frontier}
    return found


def averaged(mean: np.ndarray, sem: np.ndarray, count: int) -> shells.AveragedProfile:
    """Return a mean profile over seeds on `SHELLS` as `shells.statistics` takes it, with intervals of two standard errors."""
    mean, sem = np.asarray(mean, dtype=np.float64), np.asarray(sem, dtype=np.float64)
    return shells.AveragedProfile(
        shells=SHELLS,
        energies=mean,
        lower=np.maximum(mean - 2 * sem, 0.0),
        upper=mean + 2 * sem,
        below=0.0,
        above=0.0,
        kernel=0.0,
        floor=0.0,
        sem=sem,
        batches=count,
    )


def table(result: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    """Per family and width, at both ends: D1 tail, D2 overlap, D3, D4 slope and rms, D6, and whether the mean profile has one peak."""
    columns = [
        "family",
        "width",
        "at",
        "B(1)",
        "scalar",
        "D2 overlap",
        "‖J‖",
        "‖J̇‖/‖J‖",
        "D4 slope",
        "rms (floor)",
        "D5",
        "D6",
        "one peak",
    ]
    rows: list[list[object]] = []
    for g in result["groups"]:
        for end in ENDS:
            if end in g:
                a = g[end]
                fifth = (
                    f"{g['collapse'][0]:.2f} ({g['collapse_null'][0]:.2f})" if end == "end" else "–"
                )
                words = [str(statistics.Interval(*a["tails"][1]))]
                words += [
                    str(statistics.Interval(*a[k]))
                    for k in ("scalar_all", "overlap", "jacobian", "clock", "slope")
                ]
                words += [
                    f"{a['rms'][0]:.2f} ({a['floor'][0]:.2f})",
                    fifth,
                    str(statistics.Interval(*a["ranks"])),
                ]
                rows.append(
                    [
                        g["family"],
                        g["width"],
                        end,
                        *words,
                        "yes" if a["profiles"]["error"]["unimodal"] else "no",
                    ]
                )
    return columns, rows


SOURCES = (
    architectures,
    images,
    models,
    flow,
    shells,
    bandedness,
    blocks,
    coherence,
    collapse,
    conditions,
    couplings,
    block_matrices,
)

EXPERIMENT = Experiment(
    name="tour",
    summary="D1 to D6 and shell profiles of seven families of networks on digits, before and after training",
    parameters=Parameters,
    pieces=pieces,
    measure=measure,
    reduce=reduce,
    table=table,
    seeds=lambda p: range(p.seeds),
    sources=(*SOURCES, sys.modules[__name__]),
    gpu={"widths": (64, 128), "depth": 16, "samples": 512, "seeds": 32, "device": "cuda"},
)
