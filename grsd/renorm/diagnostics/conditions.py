"""The conditions of 2512.18209 for your model, in one call: `report(model, data, path)`.

It runs D1 (:mod:`~grsd.renorm.diagnostics.bandedness`), D2 and D3
(:mod:`~grsd.renorm.diagnostics.coherence`), D4 (:mod:`~grsd.renorm.diagnostics.couplings`), D5 to
D7 (:mod:`~grsd.renorm.diagnostics.collapse`) on an unmodified model and says what could not be
measured and why. How its numbers are shown is in :mod:`grsd.renorm.diagnostics.report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from grsd import checks
from grsd.dynamics.flow import Path
from grsd.dynamics.problem import Problem
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.bandedness import bandedness, check_probes
from grsd.renorm.diagnostics.block_matrices import BlockMatrices, block_matrices
from grsd.renorm.diagnostics.blocks import Blocks, State
from grsd.renorm.diagnostics.coherence import block_coherence, size
from grsd.renorm.diagnostics.collapse import (
    Collapse,
    Roughness,
    Separability,
    collapse,
    roughness,
    separability,
)
from grsd.renorm.diagnostics.report import Instant, Report
from grsd.renorm.diagnostics.splitting import Split
from grsd.spectrum.observables import Observable, Outputs
from grsd.spectrum.operator.base import Inputs

__all__ = ["Instant", "Report", "report"]

T = TypeVar("T")
Data = tuple[Inputs, Observable | Tensor]
Snapshots = Sequence[tuple[float, State]]
Along = Literal["flow", "path"]
Speeds = tuple[float, np.ndarray, np.ndarray]  # time, λ and ṡ of the modes outside ker M
Progress = Callable[[int, int, str], None]

DIRECTIONS = 3  # random ones, which D7 is compared with


def report(
    model: nn.Module | Problem,
    data: Data | None = None,
    path: Path | Snapshots | None = None,
    *,
    split: Split = "auto",
    probes: int | None = 16,
    instants: int = 6,
    rows: int = 512,
    along: Along = "flow",
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Measure D1–D7 of a model along a path.

    Parameters
    ----------
    model : nn.Module or Problem
        Any module, in eval mode; nothing in it is changed. A `Problem` carries its own data.
    data : (inputs, observable), for a module
        As for `grsd.spectrum.NTK`; a tensor of targets stands for `Outputs(targets)`. Language
        models: `TokenLogProb(next_tokens)`.
    path : Path, list of (time, state), or None
        A flow of `grsd.dynamics`, or snapshots of the parameters (state dicts, or flat vectors of
        the trainable ones) with their ascending times since the start of training: for gradient
        descent τ = Σ η, see Remark 1 of the paper. D5 takes these times as they are and leaves out
        those at or before 0. None: the model as it is.
    split : as in :func:`grsd.renorm.diagnostics.splitting.split_parameters`
    probes : int or None
        Random output vectors for D1, or None for all T rows.
    instants : int
        At most so many times of the path, evenly spread, the first and the last among them.
    rows : int
        Up to so many rows T × T matrices are formed. Beyond, D2 and D3 iterate and D4–D6 are left
        out.
    along : "flow" or "path"
        θ̇ of J̇, Ṁ and ṡ: that of gradient flow at the snapshot, which is what the paper's
        statements are about, or the difference quotient of the snapshots, which is what an
        optimizer did.
    progress : called as progress(done, total, what)

    Notes
    -----
    Cost with T rows, L blocks, K instants and q probes: (K + 6)(5 + 10 T) + 2 q (4 + 6 L) forward
    passes when T × T matrices are formed.
    """
    check_probes(probes)
    base, states = _start(model, data, path, split)
    checks.one_of("along", along, ("flow", "path"))
    checks.at_least("instants", instants, 1, "at least one is needed")
    if along == "path" and len(states) < 2:
        raise ValueError(
            'along="path" needs two snapshots or more: a path of one point has no direction'
        )
    notes = _notes(base, along)
    if base.size > rows:
        notes.append(
            f"T = {base.size} rows exceed {rows}: D2 and D3 were iterated; D4 to D7 and the "
            f"right-operator reading of D1 need T × T matrices (rows={base.size}, or a smaller "
            "batch)"
        )
    # the chosen times, evenly spread, both ends among them
    spread = np.linspace(0, len(states) - 1, min(instants, len(states))).round().astype(int)
    chosen = sorted(set(spread.tolist()))
    measured: list[Instant] = []
    speeds: list[Speeds] = []
    for place, index in enumerate(chosen):
        time, state = states[index]
        if progress is not None:
            progress(place, len(chosen), f"t = {time:.4g}")
        # J, J̇ and the matrices of this instant
        blocks = base.at(state, _direction(base, states, index) if along == "path" else None)
        if place == 0:
            notes += _curvature(blocks, seed)
        matrices = block_matrices(blocks) if base.size <= rows else None
        # D4, D6, D7, where the spectrum is known; D1 and D2, the dear ones, at both ends only; D3
        rank, shift, rough, law, speed = _spectral(matrices, time, notes)
        band = overlap = None
        random: tuple[Separability, ...] = ()
        if place in (0, len(chosen) - 1):
            if law is not None:
                random = _random_directions(base, state, seed)
            band = _told(
                notes, "D1", time, bandedness, blocks, probes=probes, matrices=matrices, seed=seed
            )
            overlap = block_coherence(blocks, matrices=matrices)
        sizes = size(blocks, matrices=matrices)
        measured.append(Instant(time, sizes, rank, shift, rough, law, random, band, overlap))
        speeds += speed
        base.passes += blocks.passes
    if progress is not None:
        progress(len(chosen), len(chosen), "done")
    return Report(
        blocks=base.names,
        sizes=base.sizes,
        rows=base.size,
        samples=base.samples,
        instants=tuple(measured),
        collapse=_collapse(speeds, notes),
        notes=tuple(dict.fromkeys(notes)),
        passes=base.passes,
    )


def _start(
    model: nn.Module | Problem, data: Data | None, path: Path | Snapshots | None, split: Split
) -> tuple[Blocks, list[tuple[float, State]]]:
    """The blocks of the model, and its states with their times."""
    own: State
    if isinstance(model, Problem):
        if data is not None:
            raise ValueError("a Problem carries its own inputs and targets: give data=None")
        base, own = Blocks.of(model, split=split), model.theta
    else:
        if data is None:
            raise ValueError(
                "a module needs data=(inputs, observable), e.g. (ids[:, :-1], TokenLogProb(ids[:, "
                "1:]))"
            )
        inputs, target = data
        observable = Outputs(target) if isinstance(target, Tensor) else target
        base = Blocks(model, inputs, observable, split=split)
        own = {name: p.detach() for name, p in model.named_parameters()}
    # one random pull-back tells whether J is zero
    u = torch.randn(base.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not any(bool(part.any()) for part in base.vjp(u.to(base.outputs))):
        raise ValueError(
            "J = 0: the outputs do not change with the parameters (constant outputs), so there is "
            "nothing to measure"
        )
    if path is None:
        return base, [(0.0, own)]
    pairs = zip(path.times, path.thetas, strict=True) if isinstance(path, Path) else path
    states = [(float(t), torch.as_tensor(x) if isinstance(path, Path) else x) for t, x in pairs]
    times = np.array([t for t, _ in states])
    if not len(times) or not np.isfinite(times).all() or np.any(np.diff(times) <= 0):
        raise ValueError(f"the times of the path must ascend and be finite, got {times.tolist()}")
    return base, states


def _notes(base: Blocks, along: Along) -> list[str]:
    """What changes the meaning of the numbers for this model."""
    notes = []
    if base.reused:
        listed = [f"{name} ({count} times)" for name, count in base.reused.items()]
        notes.append(
            f"weights enter more than once: {', '.join(listed[:3])}. Each is kept as one parameter "
            "in the block of its first use, so M = Σ M^(l) stays exact, but its J^(l) adds up "
            "uses at several depths: |l − m| is no distance for it, and B(K) and the decay of D2 "
            "say nothing about locality there. D3 to D7 keep their meaning"
        )
    if base.kinks:
        kinks = ", ".join(base.kinks)
        notes.append(f"{kinks}: M(t) jumps or bends at kinks; J̇ is the derivative between them")
    if base.dtype != torch.float64:
        precision = str(base.dtype).removeprefix("torch.")
        notes.append(f"products in {precision}: eigenvalues below 100 T ε λ_max are taken as zero")
    if along == "path":
        quotient = "θ̇ is the difference quotient of the snapshots, not gradient flow"
        notes.append(f"{quotient}: D3 and D5 to D7 are those of the optimizer")
    return notes


def _curvature(blocks: Blocks, seed: int) -> list[str]:
    gap = blocks.rate_gap(seed)
    if gap <= (1e-3 if blocks.dtype == torch.float64 else 0.1) or blocks.kinks:
        return []
    return [
        f"J̇ by autodiff and by a difference quotient differ by {gap:.2g}: an operation of this "
        "model may have no or a wrong second derivative, or part of it runs in lower precision; "
        "D1 and D3 to D7 rest on J̇"
    ]


def _direction(base: Blocks, states: list[tuple[float, State]], index: int) -> dict[str, Tensor]:
    """θ̇ by central differences of the snapshots, one-sided at the ends."""
    start, first = states[max(0, index - 1)]
    stop, last = states[min(len(states) - 1, index + 1)]
    a, b = base.by_name(first), base.by_name(last)
    return {name: (b[name] - a[name]) / (stop - start) for name in a}


def _told(
    notes: list[str],
    what: str,
    time: float,
    measure: Callable[..., T],
    *data: object,
    **options: object,
) -> T | None:
    """Return the measurement, or None with a note of why it does not exist."""
    try:
        return measure(*data, **options)
    except ValueError as reason:
        notes.append(f"{what} at t = {time:.4g}: {reason}")
        return None


def _spectral(
    matrices: BlockMatrices | None, time: float, notes: list[str]
) -> tuple[int | None, couplings.Shift | None, Roughness | None, Separability | None, list[Speeds]]:
    """Rank of M, D4, D6 and D7 at one instant, and what D5 needs of it."""
    if matrices is None:
        return None, None, None, None, []
    modes = matrices.modes()
    held = ~modes.in_kernel
    rank = int(held.sum())
    if not held.all():
        notes.append(
            f"M has rank {rank} of {len(held)} at t = {time:.4g} (to rounding): J is "
            "rank-deficient on these rows; D4 to D7 are about the modes outside ker M"
        )
    if not np.abs(modes.matrix).max() > 0:
        notes.append(
            f"Ṁ = 0 at t = {time:.4g}: no mode moves, so D4, D6 and D7 have nothing to measure"
        )
        return rank, None, None, None, []
    shift = _told(
        notes,
        "D4",
        time,
        couplings.shift_invariance,
        modes.eigenvalues,
        modes.matrix,
        floor=modes.floor,
    )
    lam = modes.eigenvalues[held]
    speed = modes.rates[held] / lam
    rough = _told(notes, "D6", time, roughness, lam, speed)
    law = None if rough is None else separability(lam, speed)
    return rank, shift, rough, law, [(time, lam, speed)]


def _random_directions(base: Blocks, state: State, seed: int) -> tuple[Separability, ...]:
    """D7 with Gaussian directions of the parameters instead of θ̇: the control of the flow."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(DIRECTIONS):
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for members, shapes in zip(base.members, base.shapes, strict=True)
            for name, shape in zip(members, shapes, strict=True)
        }
        moved = base.at(state, drawn)
        modes = block_matrices(moved).modes()
        base.passes += moved.passes
        lam, held = modes.eigenvalues, ~modes.in_kernel
        if np.abs(modes.matrix).max() > 0:
            found.append(separability(lam[held], modes.rates[held] / lam[held]))
    return tuple(found)


def _collapse(speeds: list[Speeds], notes: list[str]) -> Collapse | None:
    """D5 over the times after 0; the modes that all of them have, the largest ones."""
    later = [(t, lam, speed) for t, lam, speed in speeds if t > 0]
    if early := [t for t, _, _ in speeds if t <= 0]:
        listed = ", ".join(f"{t:.4g}" for t in early)
        notes.append(
            f"D5 counts time as the path does and leaves out t = {listed}: at t ≤ 0 λt has no "
            "logarithm"
        )
    if len(later) < 2:
        notes.append(
            f"D5 needs two times after 0, got {len(later)}: with fewer there is no path to collapse"
            if speeds
            else "D5 needs the modes of M"
        )
        return None
    count = min(len(lam) for _, lam, _ in later)
    times = np.array([t for t, _, _ in later])
    eigenvalues = np.stack([lam[-count:] for _, lam, _ in later])
    velocities = np.stack([speed[-count:] for _, _, speed in later])
    return _told(notes, "D5", float(times[0]), collapse, times, eigenvalues, velocities)
