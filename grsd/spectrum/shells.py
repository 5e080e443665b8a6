"""Logarithmic shells of the λ axis, and the profile of energy over them.

A profile never loses mass: what lies below or above the edges and what lies in the kernel of M is reported beside the
shells. Statistics of a profile (peak, frontier, unimodality) carry the profile's intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SHOULDER = 0.01  # what stands lower than this share of the peak is no second peak
FRONTIER = 0.99  # the frontier is the λ below which this share of the energy in the shells lies


@dataclass(frozen=True)
class LogShells:
    """Shells S_α = [λ_α, λ_{α+1}) between n+1 ascending positive edges."""

    edges: Array  # (n+1,)

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges, float)
        if edges.ndim != 1 or edges.size < 2:
            raise ValueError(f"shells need at least two edges, got {edges.tolist()}")
        if not np.isfinite(edges).all() or edges[0] <= 0 or (np.diff(edges) <= 0).any():
            raise ValueError(f"edges must be positive, finite and ascending, got {edges.tolist()}")
        object.__setattr__(self, "edges", edges)

    @classmethod
    def spanning(cls, lo: float, hi: float, *, ratio: float = 2.0) -> LogShells:
        """Return shells of width log `ratio` with edges at whole powers of `ratio`, so that [lo, hi] lies inside.

        Edges at whole powers make the shells of different batches, checkpoints and models the same ones.
        """
        if not (np.isfinite(ratio) and ratio > 1):
            raise ValueError(f"ratio must be a finite number above 1, got {ratio}")
        if not (np.isfinite(lo) and np.isfinite(hi) and 0 < lo <= hi):
            raise ValueError(f"shells span 0 < lo <= hi < inf, got lo = {lo}, hi = {hi}")
        first = int(np.floor(np.log(lo) / np.log(ratio)))
        last = int(np.floor(np.log(hi) / np.log(ratio))) + 1
        return cls(np.power(ratio, np.arange(first, last + 1, dtype=float)))

    def __len__(self) -> int:
        return int(self.edges.size) - 1

    @property
    def centers(self) -> Array:
        """Geometric centres, (n,)."""
        return np.sqrt(self.edges[1:] * self.edges[:-1])


@dataclass(frozen=True)
class Binned:
    """What a profile and an average of profiles share: energy per shell with an interval, and what no shell holds."""

    shells: LogShells
    energies: Array
    lower: Array
    upper: Array
    below: float
    above: float
    kernel: float
    floor: float

    @property
    def total(self) -> float:
        """½ ⟨e, e⟩: all shells, and what lies outside them and in the kernel."""
        return float(self.energies.sum()) + self.below + self.above + self.kernel

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers (edges for the shells, None for NaN)."""
        record: dict[str, Any] = {"edges": self.shells.edges.tolist()}
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            record[field.name] = (
                [None if np.isnan(x) else float(x) for x in value] if np.ndim(value) else value
            )
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild what `to_json` wrote."""
        values: dict[str, Any] = {"shells": LogShells(np.asarray(record["edges"], float))}
        for field in fields(cls)[1:]:
            value = record[field.name]
            values[field.name] = np.array(value, float) if isinstance(value, list) else value
        return cls(**values)


@dataclass(frozen=True)
class ShellProfile(Binned):
    """Energy E_α = ½ Σ_{u in S_α} g_u² per shell, with an interval for each.

    Attributes
    ----------
    energies, lower, upper : (n,), the quadrature value and its Chebyshev–Markov–Stieltjes interval.
    below, above : float, energy of nodes under the first and over the last edge.
    kernel : float, energy of nodes at or under `floor`, which cannot be told from ker M.
    floor : float, rounding floor on the λ axis.
    minima : (n,), the smallest energy of a single node in the shell (NaN where there is none), as 2512.10427 Figure 1.
    counts : (n,), how many nodes lie in the shell.
    """

    minima: Array
    counts: Array


@dataclass(frozen=True)
class AveragedProfile(Binned):
    """Mean of profiles over independent batches on the same shells.

    Attributes
    ----------
    energies : (n,), mean over batches.  sem : (n,), standard error of that mean (0 for one batch).
    lower, upper : (n,), mean quadrature interval widened by two standard errors.
    below, above, kernel : float, means.  floor : float, the largest of the batches.  batches : int.
    """

    sem: Array
    batches: int


def average(profiles: Sequence[ShellProfile]) -> AveragedProfile:
    """Average profiles of independent batches. All must be on the same shells."""
    if not profiles:
        raise ValueError("no profile to average")
    edges = profiles[0].shells.edges
    if any(
        p.shells.edges.shape != edges.shape or (p.shells.edges != edges).any() for p in profiles
    ):
        raise ValueError(
            "profiles on different shells cannot be averaged; bin them with the same LogShells"
        )
    energies = np.stack([p.energies for p in profiles])
    count = len(profiles)
    sem = (
        energies.std(axis=0, ddof=1) / np.sqrt(count)
        if count > 1
        else np.zeros(len(profiles[0].shells))
    )
    return AveragedProfile(
        shells=profiles[0].shells,
        energies=energies.mean(axis=0),
        sem=sem,
        lower=np.maximum(np.mean([p.lower for p in profiles], axis=0) - 2 * sem, 0.0),
        upper=np.mean([p.upper for p in profiles], axis=0) + 2 * sem,
        below=float(np.mean([p.below for p in profiles])),
        above=float(np.mean([p.above for p in profiles])),
        kernel=float(np.mean([p.kernel for p in profiles])),
        floor=max(p.floor for p in profiles),
        batches=count,
    )


@dataclass(frozen=True)
class ProfileStatistics:
    """Where a profile stands, and whether it has one peak.

    Attributes
    ----------
    peak : float, centre of the shell with the most energy.
    peak_low, peak_high : float, outer edges of all shells that may hold the peak, given the intervals.
    median, frontier : float, λ below which 50 % and 99 % of the energy in the shells lies (log-linear inside a shell).
    dip : float, the deepest valley: the largest min(E_i, E_k)/E_j with i < j < k, at least 1; 1 for one peak. Shoulders
        under 1 % of the peak's energy make no valley.
    unimodal : bool, no such valley survives the intervals: nowhere min(lower_i, lower_k) > upper_j.
    slope : float, d log E / d log λ on the low side: least squares from the first shell with energy to the peak
        (NaN with fewer than three shells there).
    """

    peak: float
    peak_low: float
    peak_high: float
    median: float
    frontier: float
    dip: float
    unimodal: bool
    slope: float


def statistics(profile: ShellProfile | AveragedProfile) -> ProfileStatistics:
    """Return peak, frontier, unimodality and low-side slope of a profile, with its own intervals."""
    e, edges, centers = profile.energies, profile.shells.edges, profile.shells.centers
    if not e.sum() > 0:
        raise ValueError(
            "no energy in any shell: the edges miss the spectrum, see below, above and kernel"
        )
    top = int(e.argmax())
    may = np.flatnonzero(profile.upper >= profile.lower.max())
    rising = np.flatnonzero(e[: top + 1] > 0)
    slope = (
        float(np.polyfit(np.log(centers[rising]), np.log(e[rising]), 1)[0])
        if rising.size >= 3
        else float("nan")
    )
    return ProfileStatistics(
        peak=float(centers[top]),
        peak_low=float(edges[may[0]]),
        peak_high=float(edges[may[-1] + 1]),
        median=_quantile(e, edges, 0.5),
        frontier=_quantile(e, edges, FRONTIER),
        dip=_valley(e, e, SHOULDER * e.max()),
        unimodal=_valley(profile.lower, profile.upper, SHOULDER * e.max()) <= 1.0,
        slope=slope,
    )


def _quantile(energies: Array, edges: Array, share: float) -> float:
    """Return the λ below which `share` of the energy lies, with the energy of a shell spread evenly over log λ."""
    cumulative = np.concatenate([[0.0], np.cumsum(energies)]) / energies.sum()
    place = int(np.searchsorted(cumulative, share))
    inside = (share - cumulative[place - 1]) / (cumulative[place] - cumulative[place - 1])
    return float(edges[place - 1] * (edges[place] / edges[place - 1]) ** inside)


def _valley(shoulders: Array, floor: Array, least: float) -> float:
    """Return max over i < j < k of min(shoulders_i, shoulders_k) / floor_j where that min is at least `least`; or 1."""
    left = np.maximum.accumulate(shoulders)[:-2]
    right = np.maximum.accumulate(shoulders[::-1])[::-1][2:]
    walls, bottom = np.minimum(left, right), floor[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(walls >= least, walls / bottom, 1.0)
    return float(max(1.0, ratio.max(initial=1.0)))
