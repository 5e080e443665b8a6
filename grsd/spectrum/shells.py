"""Logarithmic shells of the λ axis, and the profile of energy over them.

A profile never loses mass: what lies below or above the edges or in ker M stands beside the shells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from grsd import checks
from grsd.statistics import standard_error

Array = NDArray[np.float64]
SHOULDER = 0.01  # what stands lower than this share of the peak is no second peak
FRONTIER = 0.99  # the frontier is the λ below which this share of the energy in the shells lies


@dataclass(frozen=True)
class LogShells:
    """Shells S_α = [λ_α, λ_{α+1}) between n+1 ascending positive edges."""

    edges: Array  # (n+1,)

    def __post_init__(self) -> None:
        edges = checks.ascending("edges", self.edges, 2)
        object.__setattr__(self, "edges", checks.positive("edges", edges))

    @classmethod
    def spanning(cls, lo: float, hi: float, *, ratio: float = 2.0) -> LogShells:
        """Return shells with edges at whole powers of `ratio`, [lo, hi] inside: alike for all."""
        checks.between("ratio", ratio, 1, np.inf, "()")
        if not 0 < lo <= hi < np.inf:
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
    """Energy per shell with an interval, and what no shell holds: of a profile or an average."""

    shells: LogShells
    energies: Array
    lower: Array
    upper: Array
    negative: float
    below: float
    above: float
    kernel: float
    floor: float

    @property
    def total(self) -> float:
        """½ ⟨e, e⟩: all shells, and what lies outside them and in the kernel."""
        outside = self.negative + self.below + self.above + self.kernel
        return float(self.energies.sum()) + outside

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers (edges for the shells, None for NaN)."""
        record = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        for name, value in record.items():
            if np.ndim(value):
                record[name] = [None if np.isnan(x) else float(x) for x in value]
        return {"edges": self.shells.edges.tolist(), **record}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {"shells": LogShells(np.asarray(record["edges"], float))}
        for field in fields(cls)[1:]:
            # records from before indefinite matrices were told apart have no negative row
            value = record.get(field.name, 0.0) if field.name == "negative" else record[field.name]
            values[field.name] = np.array(value, float) if isinstance(value, list) else value
        return cls(**values)


@dataclass(frozen=True)
class ShellProfile(Binned):
    """Energy E_α = ½ Σ_{u in S_α} g_u² per shell, with an interval for each.

    Attributes
    ----------
    energies, lower, upper : (n,), the quadrature value and its Chebyshev–Markov–Stieltjes interval.
    negative : float, energy of nodes below zero: of an M that is not known to be semidefinite.
    below, above : float, energy of nodes from zero to the first edge, and over the last.
    kernel, floor : float, energy of nodes within the rounding floor around λ = 0, and that floor.
    minima : (n,), the smallest energy of a node in the shell (NaN for none), as in Figure 1.
    counts : (n,), how many nodes lie in the shell.
    """

    minima: Array
    counts: Array


@dataclass(frozen=True)
class AveragedProfile(Binned):
    """Mean of profiles over independent batches on the same shells.

    Attributes
    ----------
    energies, sem : (n,), mean over batches, and the standard error of that mean (0 for one batch).
    lower, upper : (n,), mean quadrature interval widened by two standard errors.
    negative, below, above, kernel, floor : float, means, and the largest floor of the batches.
    batches : int
    """

    sem: Array
    batches: int


def average(profiles: Sequence[ShellProfile]) -> AveragedProfile:
    """Average profiles of independent batches, all on the same shells."""
    if not profiles:
        raise ValueError("no profile to average")
    shells = profiles[0].shells
    if not all(np.array_equal(p.shells.edges, shells.edges) for p in profiles):
        raise ValueError(
            "profiles on different shells have no average; bin them with one LogShells"
        )
    energies = np.stack([p.energies for p in profiles])
    sem = standard_error(energies, alone=0.0)
    means = {
        name: np.mean([getattr(p, name) for p in profiles], axis=0)
        for name in ("lower", "upper", "negative", "below", "above", "kernel")
    }
    return AveragedProfile(
        shells=shells,
        energies=energies.mean(axis=0),
        sem=sem,
        lower=np.maximum(means["lower"] - 2 * sem, 0.0),
        upper=means["upper"] + 2 * sem,
        negative=float(means["negative"]),
        below=float(means["below"]),
        above=float(means["above"]),
        kernel=float(means["kernel"]),
        floor=max(p.floor for p in profiles),
        batches=len(profiles),
    )


@dataclass(frozen=True)
class ProfileStatistics:
    """Where a profile stands, and whether it has one peak.

    Attributes
    ----------
    peak : float, centre of the shell with the most energy.
    peak_low, peak_high : float, outer edges of all shells that may hold the peak by the intervals.
    median, frontier : float, λ below which 50 % and 99 % of the energy in the shells lies, which is
        even over log λ inside a shell.
    dip : float, the deepest valley: the largest min(E_i, E_k)/E_j with i < j < k; 1 for one peak.
        Shoulders under 1 % of the peak's energy make no valley.
    unimodal : bool, no such valley survives the intervals: nowhere min(lower_i, lower_k) > upper_j.
    slope : float, d log E / d log λ by least squares from the first shell with energy to the peak
        (NaN with fewer than three).
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
    """Return peak, frontier, unimodality and low-side slope of a profile, with its intervals."""
    e, edges, centers = profile.energies, profile.shells.edges, profile.shells.centers
    if not e.sum() > 0:
        raise ValueError(
            "no energy in any shell: the edges miss the spectrum, see negative, below, above and "
            "kernel"
        )
    top = int(e.argmax())
    # any shell whose upper end reaches the highest lower end may hold the peak
    reach = min(profile.lower.max(), profile.upper.max())
    may_peak = np.flatnonzero(profile.upper >= reach)
    rising = np.flatnonzero(e[: top + 1] > 0)
    slope = float("nan")
    if rising.size >= 3:
        slope = float(np.polyfit(np.log(centers[rising]), np.log(e[rising]), 1)[0])
    return ProfileStatistics(
        peak=float(centers[top]),
        peak_low=float(edges[may_peak[0]]),
        peak_high=float(edges[may_peak[-1] + 1]),
        median=_quantile(e, edges, 0.5),
        frontier=_quantile(e, edges, FRONTIER),
        dip=_valley(e, e, SHOULDER * e.max()),
        unimodal=_valley(profile.lower, profile.upper, SHOULDER * e.max()) <= 1.0,
        slope=slope,
    )


def _quantile(energies: Array, edges: Array, share: float) -> float:
    """Return the λ below which `share` of the energy lies."""
    cumulative = np.concatenate([[0.0], np.cumsum(energies)]) / energies.sum()
    place = int(np.searchsorted(cumulative, share))
    inside = (share - cumulative[place - 1]) / (cumulative[place] - cumulative[place - 1])
    return float(edges[place - 1] * (edges[place] / edges[place - 1]) ** inside)


def _valley(shoulders: Array, floor: Array, least: float) -> float:
    """Return the largest min(shoulders_i, shoulders_k)/floor_j ≥ 1 of i < j < k, min ≥ least."""
    # the highest shoulder on either side of every inner shell
    left = np.maximum.accumulate(shoulders)[:-2]
    right = np.maximum.accumulate(shoulders[::-1])[::-1][2:]
    walls, bottom = np.minimum(left, right), floor[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(walls >= least, walls / bottom, 1.0)
    return float(max(1.0, ratio.max(initial=1.0)))
