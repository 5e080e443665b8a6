"""The experiment ``tour``: the conditions of 2512.18209 and shell profiles of small networks.

One piece is one network of one family on one draw of digits: gradient flow until the loss has
fallen to `level` of its first value, the diagnostics D1–D7 of `grsd.renorm.diagnostics.conditions`
along that path, and the shell energies at both ends beside their nulls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from grsd import checks, statistics
from grsd.dynamics import flow
from grsd.dynamics.modes import Modes, instant, modes
from grsd.dynamics.problem import Problem
from grsd.experiments import engine
from grsd.experiments.engine import Data, Experiment, Piece, Rows
from grsd.lab.data import images
from grsd.lab.nets import architectures, models
from grsd.renorm.diagnostics import collapse, conditions, couplings, splitting
from grsd.renorm.diagnostics.report import Instant
from grsd.spectrum import shells
from grsd.spectrum.measure import SpectralMeasure
from grsd.spectrum.nulls import frozen_kernel

CLASSES = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))  # even or odd
# of λ, 1/time: from rounding to the largest outlier seen
SHELLS = shells.LogShells(np.power(2.0, np.arange(-20, 9)))
STEPS = 5  # times before the end of the path at which its modes are taken too: t∗/2, t∗/4, …
OCTAVES = 48  # doublings of the time after which a flow is given up
DRAWS = 200  # random errors that a single profile is compared with
DEEPEST = 1e6  # an empty shell makes a dip infinite
ENDS = ("start", "end")


@dataclass(frozen=True)
class Family:
    """(width, depth, seed) → network on images (n, 1, 8, 8), and its blocks in order of depth."""

    make: Callable[[int, int, int], nn.Module]
    split: Callable[[int], splitting.Split] = lambda depth: "auto"


def _epsilon(depth: int) -> float:
    """ε where nothing normalises the residual stream; it is 1 where a layer norm does."""
    return 1 / math.sqrt(max(depth, 1))


# Depth + 2 blocks each: what reads, the stack, what reads out. Channels are half the width.
FAMILIES: dict[str, Family] = {
    "MLP": Family(
        lambda w, d, s: nn.Sequential(nn.Flatten(), models.mlp([64] + [w] * (d + 1) + [1], seed=s))
    ),
    "CNN": Family(
        lambda w, d, s: models.conv_net((1,) + (w // 2,) * (d + 1), 1, seed=s),
        lambda d: [["0", "1"], *(str(2 * k + 1) for k in range(1, d + 1)), str(2 * d + 5)],
    ),
    "ResMLP": Family(
        lambda w, d, s: architectures.res_mlp(
            inputs=64, width=w, depth=d, epsilon=_epsilon(d), bias=True, seed=s
        )
    ),
    "ResNet": Family(
        lambda w, d, s: architectures.res_conv(width=w // 2, depth=d, epsilon=_epsilon(d), seed=s)
    ),
    "transformer": Family(lambda w, d, s: architectures.transformer(width=w, depth=d, seed=s)),
    "SSM": Family(lambda w, d, s: architectures.ssm(width=w, depth=d, epsilon=_epsilon(d), seed=s)),
    "MLP-Mixer": Family(lambda w, d, s: architectures.mixer(width=w, depth=d, seed=s)),
}


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    families: tuple[str, ...] = tuple(FAMILIES)  # keys of FAMILIES
    widths: tuple[int, ...] = (12,)  # of the residual stream; channels have half of it
    depth: int = 3  # blocks between the first and the last
    samples: int = 40  # n, half of them even digits
    level: float = 0.3  # share of the first loss at which the path ends; 1 for initialisation alone
    seeds: int = 16  # seeds 0, 1, …; each draws its own net and its own data
    probes: int = 16  # of D1; 0 for all rows
    rtol: float = 1e-5
    cifar: str = ""  # folder of CIFAR-10's binary files, to be used instead of digits
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in self.families or ("",):
            checks.one_of("family", name, FAMILIES)
        for width in self.widths or (0,):
            checks.one_of("width", width, range(4, width + 1, 4), "expected a multiple of 4")
        checks.at_least("depth", self.depth, 1)
        checks.at_least("samples", self.samples, 24)
        checks.at_least("seeds", self.seeds, 2)
        checks.between("level", self.level, 0, 1, "(]", "a share of the first loss lies in (0, 1]")


def model(family: str, width: int = 12, depth: int = 3, *, seed: int) -> nn.Module:
    """Return a network of one of the `FAMILIES`: (n, 1, 8, 8) → (n, 1), float64."""
    return FAMILIES[checks.one_of("family", family, FAMILIES)].make(width, depth, seed)


def data(samples: int, *, seed: int, cifar: str = "") -> images.Images:
    """Return even against odd digits, (n, 1, 8, 8), or two classes of CIFAR-10 made as small."""
    if not cifar:
        return images.digits(CLASSES, samples, seed=seed)
    x, y = images.cifar(cifar, (0, 1), samples, seed=seed)
    small = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)
    return images.Images((small - small.mean()) / small.std(correction=0), y)


def relax(problem: Problem, level: float, rtol: float = 1e-5) -> flow.Path:
    """Follow gradient flow until the loss has fallen to `level` of its first value.

    The path that is returned ends at the first of the times λ_max(0)⁻¹ 2^(k/4)/32 with a loss at or
    below `level`, t∗; its others are 0 and t∗/2, t∗/4, …, `STEPS` of them. `Path.identity` is the
    largest over its pieces. A ValueError says so if the loss is not there after `OCTAVES`
    doublings of the time.
    """
    start = 1 / float(torch.linalg.eigvalsh(problem.kernel(problem.theta))[-1]) / 32
    thetas, losses, times = [problem.theta.cpu().numpy()], [problem.loss(problem.theta)], [0.0]
    worst = 0.0
    options: dict[str, Any] = {"rtol": rtol, "atol": 1e-2 * rtol, "method": "RK45"}
    for octave in range(OCTAVES):
        # four times an octave, from where the last piece ended
        ahead = start * 2.0 ** (octave + np.arange(4) / 4)
        grid = np.concatenate([times[-1:], ahead])
        piece = flow.integrate(problem, grid, start=thetas[-1], estimate=False, **options)
        worst = max(worst, piece.identity * piece.losses[0] / losses[0])
        thetas += list(piece.thetas[1:])
        losses += list(piece.losses[1:])
        times += list(ahead)
        below = np.flatnonzero(np.array(losses) <= level * losses[0])
        if len(below):
            # every fourth time before the last is a halving
            last = int(below[0])
            chosen = [0, *[k for k in range(last - 4 * STEPS, last + 1, 4) if k > 0]]
            t, theta, loss = (np.array(values)[chosen] for values in (times, thetas, losses))
            return flow.Path(t, theta, loss, math.nan, problem, worst)
    reached = f"{losses[-1] / losses[0]:.3g} of its first value"
    raise ValueError(f"the loss is {reached} at t = {times[-1]:.3g}, not {level}")


def profiles(at: Modes, permuted: np.ndarray, *, seed: int) -> Data:
    """Return shell energies at one instant as shares of ½⟨e, e⟩ on `SHELLS`, and their valleys.

    ``error``: E_α/E. ``count``: n_α/n, what a random error would have on average. ``permuted``: the
    same with the error of the permuted targets, `permuted` (n,) holding its g_u. ``dip``: the
    deepest valley of the error's profile in shells of two octaves, as `shells.statistics`;
    ``rank``: the share of random errors whose valley is at least as deep.
    """
    rng = np.random.default_rng(seed)
    lam, g = np.clip(at.eigenvalues, 0.0, None), at.coefficients
    coarse = shells.LogShells(SHELLS.edges[::2])

    def profile(energies: np.ndarray, on: shells.LogShells = SHELLS) -> shells.ShellProfile:
        return SpectralMeasure.exact(lam, 2 * energies / energies.sum()).shells(on)

    def dip(energies: np.ndarray) -> float:
        return min(shells.statistics(profile(energies, coarse)).dip, DEEPEST)

    own = dip(g**2)
    drawn = [dip(rng.standard_normal(len(g)) ** 2) for _ in range(DRAWS)]
    kinds = {"error": g**2, "count": np.ones(len(g)), "permuted": permuted**2}
    rank, random = float(np.mean(np.array(drawn) >= own)), float(np.median(drawn))
    valleys = {"kernel": profile(g**2).kernel, "dip": own, "rank": rank, "random": random}
    return {**{name: profile(energies).energies for name, energies in kinds.items()}, **valleys}


def pieces(p: Parameters) -> list[Piece]:
    """One piece per family, width and seed."""
    common = engine.shared(p, "families", "widths", "seeds")
    return [
        {**common, "family": family, "width": width, "n": p.samples, "seed": seed}
        for family, width, seed in product(p.families, p.widths, range(p.seeds))
    ]


def measure(piece: Piece) -> Data:
    """Train one network to `level` and measure D1–D7 and the shell profiles along the way."""
    seed, family = piece["seed"], piece["family"]
    x, y = data(piece["samples"], seed=1000 + seed, cifar=piece["cifar"])
    net = model(family, piece["width"], piece["depth"], seed=seed).to(piece["device"])
    at = Problem(net, x.to(piece["device"]), y.to(piece["device"]))
    if piece["level"] < 1:
        path = relax(at, piece["level"], piece["rtol"])
        ends = [0, len(path.times) - 1]
    else:
        theta, loss = at.theta.cpu().numpy(), at.loss(at.theta)
        path = flow.Path(np.zeros(1), theta[None], np.array([loss]), 0.0, at, 0.0)
        ends = [0]

    # the diagnostics at both ends
    split = FAMILIES[family].split(piece["depth"])
    snapshots = [(float(path.times[k]), torch.as_tensor(path.thetas[k])) for k in ends]
    told = conditions.report(at, path=snapshots, split=split, probes=piece["probes"] or None)

    # the profiles at both ends, of the error and of the error of permuted targets
    instants = [modes(*instant(at, theta)) for theta in path.thetas]
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(
        at.theta.device
    )
    shown = {}
    for end, k in zip(ENDS, ends, strict=False):
        other = (at.targets[order] - at.output(path.thetas[k])).cpu().numpy()
        shown[end] = profiles(instants[k], instants[k].vectors.T @ other / len(other), seed=seed)
    if len(ends) > 1:  # what the kernel of the start, frozen, predicts for the end
        lam, g = np.clip(instants[0].eigenvalues, 0.0, None), instants[0].coefficients
        frozen = frozen_kernel(SpectralMeasure.exact(lam, g**2), float(path.times[-1]), SHELLS)
        shown["end"]["frozen"] = frozen.energies / frozen.total
    return {
        "parameters": len(at.theta),
        "blocks": list(told.blocks),
        "loss": path.losses[-1] / path.losses[0],
        "time": float(path.times[-1]),
        "identity": path.identity,
        "ends": [_instant(one) for one in told.instants],
        "along": _along(path, instants),
        "profiles": shown,
        "notes": [note for note in told.notes if not note.startswith("D5")],
    }


def _along(path: flow.Path, instants: list[Modes]) -> Data:
    """D3, D4, D6 and D7 at every time of the path, and D5 over the times after 0."""
    floor = 100 * len(instants[0].eigenvalues) * np.finfo(float).eps  # as `shift_invariance`
    held = min(int((one.eigenvalues > floor * one.eigenvalues[-1]).sum()) for one in instants)
    lam = np.array([one.eigenvalues[-held:] for one in instants])
    speeds = np.array([one.rates[-held:] for one in instants]) / lam
    shifts = [couplings.shift_invariance(one.eigenvalues, one.matrix) for one in instants]
    laws = [collapse.separability(a, v) for a, v in zip(lam, speeds, strict=True)]
    along: Data = {
        "times": path.times,
        "losses": path.losses / path.losses[0],
        "jacobian": [math.sqrt(one.eigenvalues[-1]) for one in instants],
        "slope": [one.slope for one in shifts],
        "ranks": [collapse.roughness(a, v).ranks for a, v in zip(lam, speeds, strict=True)],
        "variation": [law.variation for law in laws],
        "exponent": [law.exponent for law in laws],
        "pace": [t * law.mean for t, law in zip(path.times, laws, strict=True)],
        "modes": held,
    }
    if len(instants) > 2:
        fifth = collapse.collapse(path.times[1:], lam[1:], speeds[1:])
        along |= {"collapse": fifth.value, "collapse_null": fifth.null}
    return along


def _instant(one: Instant) -> Data:
    """What is kept of one instant; a diagnostic that does not exist there is left out."""
    band, pairs = one.bandedness, one.coherence
    kept: Data = {"time": one.time, **_named(one.size, "jacobian", "rate", "clock")}
    if one.shift is not None:
        kept |= _named(one.shift, "slope", "rms", "floor")
    if one.roughness is not None:
        kept["ranks"] = one.roughness.ranks
    if one.separability is not None:
        kept |= _named(one.separability, "variation", "exponent")
    if one.random:  # along random directions of the parameters
        kept["random"] = [law.variation for law in one.random]
        kept["random_exponent"] = [law.exponent for law in one.random]
    if band is not None and band.right is not None:
        kept |= {"tails": band.pooled[:-1], "unlocal": band.unlocal[:-1]}
        kept["scalar_own"] = np.nanmean(band.scalar[:, 0])
        kept["scalar_all"] = np.nanmean(band.scalar[:, -1])
        kept["vacuous"] = band.right.vacuous[:, 0].mean()
        kept["coefficient"] = np.nanmedian(band.right.coefficient[:, 0])
        kept["right"] = np.nanmax(band.right.residual[:, 0])
    if pairs is not None:
        values = pairs.normalized
        kept["coherence"] = [np.nanmean(np.diagonal(values, k)) for k in range(1, len(values))]
        kept["overlap"] = np.nanmean(values[np.triu_indices(len(values), 1)])
        kept["total"] = pairs.total
    return engine.rounded(kept, 8)


def _named(one: object, *names: str) -> Data:
    return {name: getattr(one, name) for name in names}


SCALARS = ["jacobian", "rate", "clock", "slope", "rms", "floor", "ranks", "scalar_own"]
SCALARS += ["scalar_all", "vacuous", "coefficient", "right", "overlap", "total"]


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Per family and width: means over seeds with intervals, tracks along the path, profiles."""
    groups = [
        {"family": family, "width": width, **_group(members)}
        for (family, width), members in engine.grouped(listed, measured, "family", "width").items()
    ]
    return engine.rounded({"edges": SHELLS.edges, "groups": groups}, 3)


def _group(members: list[Data]) -> Data:
    first, along = members[0], [one["along"] for one in members]
    group: Data = {k: first[k] for k in ("parameters", "blocks")}
    group["notes"] = sorted({note for one in members for note in one["notes"]})[:4]
    group |= engine.intervals(members, "loss", "time")
    group["identity"] = max(one["identity"] for one in members)
    if "collapse" in along[0]:
        group |= engine.intervals(along, "collapse", "collapse_null")
        # sup ‖J‖ along the path over ‖J(0)‖
        group["growth"] = statistics.mean([max(a["jacobian"]) / a["jacobian"][0] for a in along])
        tracks = ("losses", "jacobian", "slope", "ranks")
        group["tracks"] = {k: np.mean([a[k] for a in along], axis=0) for k in tracks}
        # (S) and (U) of every seed at every time: the variation of ṡ, and t times its mean
        group["laws"] = {k: [a[k] for a in along] for k in ("variation", "exponent", "pace")}
    for end, place in zip(ENDS, (0, -1), strict=True):
        if end in first["profiles"]:
            at = [one["ends"][place] for one in members]
            group[end] = {
                **engine.intervals(at, *SCALARS),
                "unlocal": np.mean([one["unlocal"] for one in at], axis=0),
                "slopes": [one["slope"] for one in at],
                "variation": [one["variation"] for one in at],
                "exponent": [one["exponent"] for one in at],
                "random": np.ravel([one["random"] for one in at]),
                "random_exponent": np.ravel([one["random_exponent"] for one in at]),
                "profiles": _profiles([one["profiles"][end] for one in members]),
            }
            for name in ("tails", "coherence"):
                columns = np.array([one[name] for one in at]).T
                group[end][name] = [statistics.mean(column) for column in columns]
    return group


def _profiles(members: list[Data]) -> Data:
    """Single valleys, and of every kind of profile the mean with the features that it shows."""
    held: Data = {k: [one[k] for one in members] for k in ("dip", "rank", "random", "kernel")}
    for kind in ("error", "count", "permuted", "frozen"):
        if kind in members[0]:
            each = np.array([one[kind] for one in members])
            mean, sem = each.mean(axis=0), statistics.standard_error(each)
            seen = shells.statistics(averaged(mean, sem, len(each)))
            features = {"unimodal": int(seen.unimodal), "dip": min(seen.dip, DEEPEST)}
            features |= {"peak": seen.peak, "frontier": seen.frontier}
            held[kind] = {"mean": mean, "sem": sem, **features}
    return held


def averaged(mean: np.ndarray, sem: np.ndarray, count: int) -> shells.AveragedProfile:
    """Return a mean profile on `SHELLS` with intervals of two standard errors."""
    mean, sem = np.asarray(mean, dtype=np.float64), np.asarray(sem, dtype=np.float64)
    ends: Any = {"lower": np.maximum(mean - 2 * sem, 0.0), "upper": mean + 2 * sem}
    outside: Any = dict.fromkeys(("negative", "below", "above", "kernel", "floor"), 0.0)
    return shells.AveragedProfile(
        shells=SHELLS, energies=mean, **ends, **outside, sem=sem, batches=count
    )


def table(result: Data) -> Rows:
    """Per family and width, at both ends: D1 to D7, and whether the mean profile has one peak."""
    columns = ["family", "width", "at", "B(1)", "scalar", "D2 overlap", "‖J‖", "‖J̇‖/‖J‖"]
    columns += ["D4 slope", "rms (floor)", "D5", "D6", "D7 (random)", "one peak"]
    rows: list[list[object]] = []
    for g in result["groups"]:
        for end in (end for end in ENDS if end in g):
            at = g[end]
            means = [at["tails"][1]]
            means += [at[k] for k in ("scalar_all", "overlap", "jacobian", "clock", "slope")]
            row = [g["family"], g["width"], end]
            row += [str(statistics.Interval(*one)) for one in means]
            row.append(f"{at['rms'][0]:.2f} ({at['floor'][0]:.2f})")
            fifth = [g[k][0] for k in ("collapse", "collapse_null")] if end == "end" else None
            row.append(f"{fifth[0]:.2f} ({fifth[1]:.2f})" if fifth else "–")
            row.append(str(statistics.Interval(*at["ranks"])))
            own = [np.median(at[k]) for k in ("variation", "random")]
            row.append(f"{own[0]:.2f} ({own[1]:.2f})")
            rows.append([*row, "yes" if at["profiles"]["error"]["unimodal"] else "no"])
    return columns, rows


GPU = {"widths": (64, 128), "depth": 16, "samples": 512, "seeds": 32, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
