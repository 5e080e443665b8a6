"""The conditions of 2512.18209 for your model, in one call: `report(model, data, path)`.

It runs D1 (:mod:`grsd.renorm.diagnostics.bandedness`), D2 and D3 (:mod:`grsd.renorm.diagnostics.coherence`), D4 (:mod:`grsd.renorm.diagnostics.couplings`), D5 and D6
(:mod:`grsd.renorm.diagnostics.collapse`) on an unmodified model and says what could not be measured and why. How its numbers are shown is in
:mod:`grsd.renorm.diagnostics.report`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from grsd.dynamics.flow import Path
from grsd.dynamics.problem import Problem
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.bandedness import bandedness
from grsd.renorm.diagnostics.block_matrices import Grams, grams
from grsd.renorm.diagnostics.blocks import Blocks, State
from grsd.renorm.diagnostics.coherence import coherence, size
from grsd.renorm.diagnostics.collapse import Collapse, Roughness, collapse, roughness
from grsd.renorm.diagnostics.report import Instant, Report
from grsd.renorm.diagnostics.splitting import Split
from grsd.spectrum.observables import Observable, Outputs
from grsd.spectrum.operator.base import Inputs

__all__ = ["Instant", "Report", "report"]

Snapshots = Sequence[tuple[float, State]]
Along = Literal["flow", "path"]


def report(
    model: nn.Module | Problem,
    data: tuple[Inputs, Observable | Tensor] | None = None,
    path: Path | Snapshots | None = None,
    *,
    split: Split = "auto",
    probes: int | None = 16,
    instants: int = 6,
    rows: int = 512,
    along: Along = "flow",
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Measure D1–D6 of a model along a path.

    Parameters
    ----------
    model : nn.Module or Problem
        Any module, in eval mode; nothing in it is changed. A `grsd.dynamics.Problem` carries its own data.
    data : (inputs, observable), for a module
        As for `grsd.spectrum.NTK`; a tensor of targets stands for `Outputs(targets)`. Language models: `TokenLogProb(next_tokens)`.
    path : Path, list of (time, state), or None
        A flow of `grsd.dynamics`, or snapshots of the parameters (state dicts, or flat vectors of the trainable ones) with the
        times at which they were taken: for gradient descent τ = Σ η, see Remark 1 of the paper. None: the model as it is.
    split : "auto", "layers" or a list
        The blocks, as in :func:`grsd.renorm.diagnostics.splitting.split_parameters`.
    probes : int or None
        Random output vectors for D1, or None for all T rows.
    instants : int
        At most so many times of the path, evenly spread, the first and the last among them.
    rows : int
        Up to so many rows T × T matrices are formed. Beyond, D2 and D3 iterate and D4–D6 are left out.
    along : "flow" or "path"
        θ̇ of J̇, Ṁ and ṡ: that of gradient flow at the snapshot, which is what the paper's statements are about, or the difference
        quotient of the snapshots, which is what an optimizer did.
    seed : int
    progress : callable, optional
        Called as progress(done, total, what).

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Fewer than two blocks, outputs that do not depend on the parameters, snapshots that do not fit the model, times that do
        not ascend, `along="path"` without two times.

    Notes
    -----
    Cost with T rows, L blocks, K instants and q probes: K (5 + 10 T) + 2 q (4 + 6 L) forward passes when T × T matrices are formed.
    """
    if probes is not None and probes < 2:
        raise ValueError(
            f"probes is {probes}: two or more are needed for a standard error, or None for the exact value"
        )
    base, states = _start(model, data, path, split)
    if along not in ("flow", "path"):
        raise ValueError(f'along is {along!r}; expected "flow" or "path"')
    if instants < 1:
        raise ValueError(f"instants is {instants}; at least one is needed")
    chosen = sorted(
        set(
            np.linspace(0, len(states) - 1, min(instants, len(states))).round().astype(int).tolist()
        )
    )
    if along == "path" and len(states) < 2:
        raise ValueError(
            'along="path" needs two snapshots or more: a path of one point has no direction'
        )
    notes = _notes(base, along)
    dense = base.size <= rows
    if not dense:
        notes.append(
            f"T = {base.size} rows exceed {rows}: D2 and D3 were iterated; D4 to D6 and the right-operator reading of D1 need T × T "
            f"matrices (rows={base.size}, or a smaller batch)"
        )
    found: list[Instant] = []
    speeds: list[tuple[float, np.ndarray, np.ndarray]] = []
    passes = base.passes
    for place, index in enumerate(chosen):
        time, state = states[index]
        if progress is not None:
            progress(place, len(chosen), f"t = {time:.4g}")
        blocks = base.at(state, _direction(base, states, index) if along == "path" else None)
        if place == 0:
            gap = blocks.rate_gap(seed)
            if gap > (1e-3 if blocks.dtype == torch.float64 else 0.1) and not blocks.kinks:
                notes.append(
                    f"J̇ by autodiff and by a difference quotient differ by {gap:.2g}: an operation of this model may have no or a "
                    "wrong second derivative, or part of it runs in lower precision; D1 and D3 to D6 rest on J̇"
                )
        matrices = grams(blocks) if dense else None
        ends = place in (0, len(chosen) - 1)
        band = None
        if ends:
            local = partial(bandedness, blocks, probes=probes, grams=matrices, seed=seed)
            band = _told(notes, "D1", time, local)
        overlap = coherence(blocks, grams=matrices) if ends else None
        instant, speed = _spectrum(matrices, time, notes)
        found.append(Instant(time, size(blocks, grams=matrices), *instant, band, overlap))
        if speed is not None:
            speeds.append((time, *speed))
        passes += blocks.passes
    if progress is not None:
        progress(len(chosen), len(chosen), "done")
    return Report(
        blocks=base.names,
        sizes=base.sizes,
        rows=base.size,
        samples=base.samples,
        instants=tuple(found),
        collapse=_along(speeds, found[0].time, notes),
        notes=tuple(dict.fromkeys(notes)),
        passes=passes,
    )


def _start(
    model: nn.Module | Problem,
    data: tuple[Inputs, Observable | Tensor] | None,
    path: Path | Snapshots | None,
    split: Split,
) -> tuple[Blocks, list[tuple[float, State]]]:
    """The blocks of the model, and its states with their times."""
    if isinstance(model, Problem):
        if data is not None:
            raise ValueError("a Problem carries its own inputs and targets: give data=None")
        base = Blocks.of(model, split=split)
        own: State = model.theta
    else:
        if data is None:
            raise ValueError(
                "a module needs data=(inputs, observable), e.g. (ids[:, :-1], TokenLogProb(ids[:, 1:]))"
            )
        inputs, observable = data
        target = Outputs(observable) if isinstance(observable, Tensor) else observable
        base = Blocks(model, inputs, target, split=split)
        own = {name: p.detach() for name, p in model.named_parameters()}
    u = torch.randn(base.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if not any(bool(part.any()) for part in base.vjp(u.to(base.device, base.dtype))):
        raise ValueError(
            "J = 0: the outputs do not change with the parameters (constant outputs), so there is nothing to measure"
        )
    if path is None:
        return base, [(0.0, own)]
    if isinstance(path, Path):
        states: list[tuple[float, State]] = [
            (float(t), torch.as_tensor(theta))
            for t, theta in zip(path.times, path.thetas, strict=True)
        ]
    else:
        states = [(float(t), state) for t, state in path]
    times = np.array([t for t, _ in states])
    if not len(times) or not np.isfinite(times).all() or np.any(np.diff(times) <= 0):
        raise ValueError(f"the times of the path must ascend and be finite, got {times.tolist()}")
    return base, states


def _notes(base: Blocks, along: Along) -> list[str]:
    notes = []
    if base.reused:
        listed = ", ".join(
            f"{name} ({count} times)" for name, count in list(base.reused.items())[:3]
        )
        notes.append(
            f"weights enter more than once: {listed}. Each is kept as one parameter in the block of its first use, so M = Σ M^(l) "
            "stays exact, but its J^(l) adds up uses at several depths: |l − m| is no distance for it, and B(K) and the decay of D2 "
            "say nothing about locality there. D3 to D6 keep their meaning"
        )
    if base.kinks:
        notes.append(
            f"{', '.join(base.kinks)}: M(t) jumps or bends at kinks; J̇ is the derivative between them"
        )
    if base.dtype != torch.float64:
        notes.append(
            f"products in {str(base.dtype).removeprefix('torch.')}: eigenvalues below 100 T ε λ_max are taken as zero"
        )
    if along == "path":
        notes.append(
            "θ̇ is the difference quotient of the snapshots, not gradient flow: D3 and D5 are those of the optimizer"
        )
    return notes


def _direction(base: Blocks, states: list[tuple[float, State]], index: int) -> dict[str, Tensor]:
    """θ̇ by central differences of the snapshots, one-sided at the ends."""
    before, after = max(0, index - 1), min(len(states) - 1, index + 1)
    (start, first), (stop, last) = states[before], states[after]
    a, b = base.by_name(first), base.by_name(last)
    return {name: (b[name] - a[name]) / (stop - start) for name in a}


def _told(notes: list[str], what: str, time: float, measure: Callable[[], Any]) -> Any:
    """Return the measurement, or None with a note of why it does not exist."""
    try:
        return measure()
    except ValueError as reason:
        notes.append(f"{what} at t = {time:.4g}: {reason}")
        return None


def _spectrum(
    matrices: Grams | None, time: float, notes: list[str]
) -> tuple[
    tuple[int | None, couplings.Shift | None, Roughness | None],
    tuple[np.ndarray, np.ndarray] | None,
]:
    """D4 and D6 at one instant, and (λ, ṡ) of the modes outside ker M for D5."""
    if matrices is None:
        return (None, None, None), None
    modes = matrices.modes()
    held = ~modes.in_kernel
    if not held.all():
        notes.append(
            f"M has rank {int(held.sum())} of {len(held)} at t = {time:.4g} (to rounding): J is rank-deficient on these rows; "
            "D4 to D6 are about the modes outside ker M"
        )
    lam, rates = modes.eigenvalues[held], modes.rates[held]
    if not np.abs(modes.matrix).max() > 0:
        notes.append(
            f"Ṁ = 0 at t = {time:.4g}: no mode moves, so D4 and D6 have nothing to measure"
        )
        return (int(held.sum()), None, None), None
    shift = _told(
        notes,
        "D4",
        time,
        lambda: couplings.shift_invariance(modes.eigenvalues, modes.matrix, floor=modes.floor),
    )
    rough = _told(notes, "D6", time, lambda: roughness(lam, rates / lam))
    return (int(held.sum()), shift, rough), (lam, rates / lam)


def _along(
    speeds: list[tuple[float, np.ndarray, np.ndarray]], origin: float, notes: list[str]
) -> Collapse | None:
    """D5 over the times after the first; the modes that all of them have, the largest ones."""
    later = [(t - origin, lam, v) for t, lam, v in speeds if t > origin]
    if len(later) < 2:
        notes.append(
            "D5 needs two times after the first, at which t = 0: with fewer there is no path to collapse"
            if speeds
            else "D5 needs the modes of M"
        )
        return None
    count = min(len(lam) for _, lam, _ in later)
    times = np.array([t for t, _, _ in later])
    eigenvalues = np.stack([lam[-count:] for _, lam, _ in later])
    velocities = np.stack([v[-count:] for _, _, v in later])
    result: Collapse | None = _told(
        notes, "D5", float(times[0]), lambda: collapse(times, eigenvalues, velocities)
    )
    return result
