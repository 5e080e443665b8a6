"""How a report of the conditions is read: one table and one figure.

What is measured is in :mod:`grsd.renorm.diagnostics.conditions`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grsd.figures import Table, look, panels
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.bandedness import Bandedness
from grsd.renorm.diagnostics.coherence import BlockCoherence, Size
from grsd.renorm.diagnostics.collapse import Collapse, Roughness, Separability

__all__ = ["Instant", "Report"]

MISSING = "–"


@dataclass(frozen=True)
class Instant:
    """What was measured at one time; None where it was not, and the report's notes say why."""

    time: float
    size: Size  # D3
    rank: int | None  # eigenvalues of M above rounding, out of T
    shift: couplings.Shift | None  # D4
    roughness: Roughness | None  # D6
    separability: Separability | None  # D7
    random: tuple[Separability, ...]  # D7 along random directions; at the first and the last time
    bandedness: Bandedness | None  # D1; at the first and the last time
    coherence: BlockCoherence | None  # D2; at the first and the last time


@dataclass(frozen=True)
class Report:
    """The diagnostics of one model along one path."""

    blocks: tuple[str, ...]  # in the order of depth
    sizes: tuple[int, ...]  # parameters of each block
    rows: int  # T
    samples: int  # n
    instants: tuple[Instant, ...]
    collapse: Collapse | None  # D5, over all times after 0
    notes: tuple[str, ...]  # what changes meaning for this model, and what could not be measured
    passes: int  # forward passes spent

    def table(self) -> Table:
        """Return one row a diagnostic: first time, last time, and what the condition would want.

        "–" stands for what could not be measured.
        """
        first, last = self.instants[0], self.instants[-1]
        bands = sorted({0, 1, min(2, len(self.blocks) - 1)})
        largest = [
            max(i.size.jacobian for i in self.instants),
            max(i.size.rate for i in self.instants),
        ]
        # the rows' names, and what the condition wants, which may quote a number
        names: list[tuple[str, str]] = []
        for k in bands:
            unlocal = MISSING if last.bandedness is None else _number(last.bandedness.unlocal[k])
            names += [
                (f"D1 tail B({k}), all blocks", f"0 beyond the band; no locality: {unlocal}"),
                (f"D1 tail B({k}), worst block", "0 beyond the band"),
            ]
        names += [
            ("D1 scalar residual, all blocks", "0"),
            ("D1 right residual, K = 0, worst", "0, if not empty"),
            ("D1 its coefficient ‖B‖, worst", "bounded"),
            ("D1 blocks for which it is empty", "none"),
            ("D2 neighbours, normalised", "any"),
            ("D2 farthest pair, normalised", "0 as the depth grows; 1: same direction"),
            ("D2 Σ u_k", "bounded as the depth grows"),
            ("D3 ‖J‖", f"bounded; largest {_number(largest[0])}"),
            ("D3 ‖J̇‖", f"bounded; largest {_number(largest[1])}"),
            ("D4 slope per nat", "0 within its error"),
            ("D4 rms, nats", "its floor"),
            ("D6 order of ṡ in λ (of ranks)", "any; 1 also where all ṡ agree up to noise"),
            ("D7 variation of ṡ", f"0; random directions {_range(last, 'variation')}"),
            ("D7 exponent of |λ̇| in λ", f"1; random directions {_range(last, 'exponent')}"),
            ("D7 t times the mean of ṡ", "one number along the path"),
        ]
        # two columns of numbers; D5 is one number for the whole path
        cells = zip(_column(first, bands), _column(last, bands), strict=True)
        rows = [(name, *pair, wanted) for (name, wanted), pair in zip(names, cells, strict=True)]
        along, wanted = MISSING, "any"
        if (found := self.collapse) is not None:
            along = _number(found.value, found.error)
            wanted = f"any; null {_number(found.null, found.null_error)}, also where all ṡ agree"
        early = sum(i.time <= 0 for i in self.instants)
        name = "D5 collapse, " + (
            f"{early} of {len(self.instants)} times ≤ 0 left out" if early else "along the path"
        )
        rows.insert(-4, (name, "", along, wanted))
        return Table(("diagnostic", "first time", "last time", "what the condition wants"), rows)

    def draw(self, figure: Figure) -> Figure:
        """Draw into an empty figure of about 9 by 6 inches.

        (a) tails, (b) coherence by distance, (c) sizes, (d) slope of D4 and variation of ṡ (D7)
        along the path.
        """
        axes = figure.subplots(2, 2)
        tails, overlaps, sizes, fields = axes.ravel()
        # what was measured at both ends, by distance between blocks
        ends = self.instants[:: max(1, len(self.instants) - 1)]
        for index, instant in enumerate(ends):
            label = f"t = {instant.time:.3g}"
            if (band := instant.bandedness) is not None:
                reach, error = np.arange(len(band.pooled)), 2 * band.pooled_error
                tails.errorbar(reach, band.pooled, error, label=label, capsize=2, **look(index))
                if instant is ends[-1]:
                    dotted = {"color": "0.4", "linestyle": ":", "marker": ""}
                    tails.plot(reach, band.unlocal, label=f"no locality, {label}", **dotted)
            if (overlap := instant.coherence) is not None:
                values = overlap.by_distance(True)
                overlaps.plot(np.arange(1, len(values)), values[1:], label=label, **look(index))
        tails.set(xlabel="distance K (blocks)", ylabel="tail B(K)", ylim=(0, None))
        overlaps.set(xlabel="distance |l − m| (blocks)", ylim=(0, 1.05))
        overlaps.set_ylabel("largest normalised coherence")
        for ax in (tails, overlaps):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))

        # what was measured at every time
        times, norms = zip(*((i.time, i.size) for i in self.instants), strict=True)
        sizes.plot(times, [n.jacobian for n in norms], label=r"$\|J\|$", **look(0))
        sizes.plot(times, [n.rate for n in norms], label=r"$\|\dot J\|$ (per time)", **look(1))
        sizes.set(xlabel="time", ylabel="operator norm", yscale="log")
        if shifts := [(i.time, i.shift) for i in self.instants if i.shift is not None]:
            place, slope, error = np.array([(t, s.slope, s.slope_error) for t, s in shifts]).T
            fields.errorbar(place, slope, 2 * error, label="D4 slope per nat", capsize=2, **look(0))
        if laws := [(i.time, i.separability) for i in self.instants if i.separability is not None]:
            place, spread, error = np.array(
                [(t, law.variation, law.variation_error) for t, law in laws]
            ).T
            fields.errorbar(
                place, spread, 2 * error, label="D7 variation of ṡ", capsize=2, **look(1)
            )
        fields.axhline(0, color="0.4", linewidth=0.8)
        fields.set(xlabel="time", ylabel="0 is what the paper states")

        for ax in axes.ravel():
            if ax.get_legend_handles_labels()[0]:
                ax.legend()
        panels(axes.ravel())
        return figure

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists; what does not exist is None."""
        return dict(_plain(asdict(self)))


def _column(instant: Instant, bands: list[int]) -> list[str]:
    """The cells of one time, in the order of the table's rows."""
    cells: list[str] = []
    # D1 to D4: sums of the blocks' motions, coherence, sizes, invariance
    if (band := instant.bandedness) is None:
        cells += [MISSING] * (2 * len(bands) + 1)
    else:
        for k in bands:
            cells += [_number(band.pooled[k], band.pooled_error[k]), _number(band.worst[k])]
        widest = band.scalar[:, -1]
        cells.append(f"{_number(np.nanmin(widest))} to {_number(np.nanmax(widest))}")
    if band is None or (right := band.right) is None:
        cells += [MISSING] * 3
    else:
        empty = int(right.vacuous[:, 0].sum())
        cells += [_number(np.nanmax(of[:, 0])) for of in (right.residual, right.coefficient)]
        cells.append(f"{empty} of {len(band.names)}")
    if (overlap := instant.coherence) is None:
        cells += [MISSING] * 3
    else:
        near, far = overlap.by_distance(True)[[1, -1]]
        cells += [_number(near), _number(far), _number(overlap.total)]
    cells += [_number(instant.size.jacobian), _number(instant.size.rate)]
    if (shift := instant.shift) is None:
        cells += [MISSING] * 2
    else:
        cells.append(_number(shift.slope, shift.slope_error))
        cells.append(f"{_number(shift.rms)} (floor {_number(shift.floor)})")
    # D5 to D7: of the eigenvalues' speeds
    if (rough := instant.roughness) is None or (law := instant.separability) is None:
        return [*cells, *[MISSING] * 4]
    noise = f"noise ± {_number(rough.null_error)}"
    cells.append(f"{_number(rough.value)} ({_number(rough.ranks)}), {noise}")
    cells.append(_number(law.variation, law.variation_error))
    cells.append(_number(law.exponent, law.exponent_error))
    t = instant.time
    return [*cells, _number(t * law.mean, t * law.mean_error) if t > 0 else MISSING]


def _range(instant: Instant, name: str) -> str:
    """Smallest and largest of a number of D7 along random directions."""
    values = [getattr(one, name) for one in instant.random]
    return f"{_number(min(values))} to {_number(max(values))}" if values else MISSING


def _number(value: float, error: float | None = None) -> str:
    if not np.isfinite(value):
        return MISSING
    return f"{value:.3g} ± {error:.1g}" if error else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
