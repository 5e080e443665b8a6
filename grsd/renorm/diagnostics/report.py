"""How a report is read: one table and one figure. What is measured is in :mod:`grsd.renorm.diagnostics.conditions`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grsd.figures import Table, look, panels
from grsd.renorm.diagnostics import couplings
from grsd.renorm.diagnostics.bandedness import Bandedness
from grsd.renorm.diagnostics.coherence import Coherence, Size
from grsd.renorm.diagnostics.collapse import Collapse, Roughness

__all__ = ["Instant", "Report", "draw", "table"]

COLUMNS = ("diagnostic", "first time", "last time", "what the condition wants")


@dataclass(frozen=True)
class Instant:
    """What was measured at one time; None where it was not, and the report's notes say why.

    Attributes
    ----------
    time : float
    size : Size, D3.
    rank : int or None, eigenvalues of M above rounding, out of T.
    shift : Shift or None, D4.
    roughness : Roughness or None, D6.
    bandedness : Bandedness or None, D1; at the first and the last time.
    coherence : Coherence or None, D2; at the first and the last time.
    """

    time: float
    size: Size
    rank: int | None
    shift: couplings.Shift | None
    roughness: Roughness | None
    bandedness: Bandedness | None
    coherence: Coherence | None


@dataclass(frozen=True)
class Report:
    """The diagnostics of one model along one path.

    Attributes
    ----------
    blocks : tuple of str, in the order of depth.
    sizes : tuple of int, parameters of each block.
    rows, samples : int, T rows from n samples.
    instants : tuple of Instant
    collapse : Collapse or None, D5, over all times after the first.
    notes : tuple of str, what changes meaning for this model and what could not be measured.
    passes : int, forward passes spent.
    """

    blocks: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: int
    samples: int
    instants: tuple[Instant, ...]
    collapse: Collapse | None
    notes: tuple[str, ...]
    passes: int

    def table(self) -> Table:
        """Return one row a diagnostic: first time, last time, and what the condition would want."""
        return table(self)

    def draw(self, figure: Figure) -> Figure:
        """Draw tails, coherence, sizes and speeds into an empty figure of about 9 by 6 inches."""
        return draw(self, figure)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists; what does not exist is None."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


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


def _number(value: float, error: float | None = None) -> str:
    if not np.isfinite(value):
        return "–"
    text = f"{value:.3g}"
    return text if not error else f"{text} ± {error:.1g}"


def table(report: Report) -> Table:
    """Return the report as a table; "–" stands for what could not be measured."""
    first, last = report.instants[0], report.instants[-1]
    rows: list[tuple[str, str, str, str]] = []

    def add(name: str, wanted: str, read: Any) -> None:
        cells = []
        for instant in (first, last):
            try:
                cells.append(read(instant))
            except (AttributeError, IndexError, TypeError):  # the diagnostic is None there
                cells.append("–")
        rows.append((name, *cells, wanted))

    count = len(report.blocks)
    for band in sorted({0, 1, min(2, count - 1)}):
        add(
            f"D1 tail B({band}), all blocks",
            f"0 beyond the band; no locality: {_unlocal(last, band)}",
            lambda i, k=band: _number(i.bandedness.pooled[k], i.bandedness.pooled_error[k]),
        )
        add(
            f"D1 tail B({band}), worst block",
            "0 beyond the band",
            lambda i, k=band: _number(i.bandedness.worst[k]),
        )
    add("D1 scalar residual, all blocks", "0", lambda i: _scalar(i))
    add(
        "D1 right residual, K = 0, worst",
        "0, if not empty",
        lambda i: _number(np.nanmax(i.bandedness.right.residual[:, 0])),
    )
    add(
        "D1 its coefficient ‖B‖, worst",
        "bounded",
        lambda i: _number(np.nanmax(i.bandedness.right.coefficient[:, 0])),
    )
    add(
        "D1 blocks for which it is empty",
        "none",
        lambda i: f"{int(i.bandedness.right.vacuous[:, 0].sum())} of {count}",
    )
    add("D2 neighbours, normalised", "any", lambda i: _number(i.coherence.by_distance(True)[1]))
    add(
        "D2 farthest pair, normalised",
        "0 as the depth grows; 1: same direction",
        lambda i: _number(i.coherence.by_distance(True)[-1]),
    )
    add("D2 Σ u_k", "bounded as the depth grows", lambda i: _number(i.coherence.total))
    add(
        "D3 ‖J‖",
        f"bounded; largest {_number(max(i.size.jacobian for i in report.instants))}",
        lambda i: _number(i.size.jacobian),
    )
    add(
        "D3 ‖J̇‖",
        f"bounded; largest {_number(max(i.size.rate for i in report.instants))}",
        lambda i: _number(i.size.rate),
    )
    add(
        "D4 slope per nat",
        "0 within its error",
        lambda i: _number(i.shift.slope, i.shift.slope_error),
    )
    add(
        "D4 rms, nats",
        "its floor",
        lambda i: f"{_number(i.shift.rms)} (floor {_number(i.shift.floor)})",
    )
    found = report.collapse
    along = "–" if found is None else _number(found.value, found.error)
    wanted = (
        "0" if found is None else f"0; {_number(found.null, found.null_error)} without relation"
    )
    rows.append(("D5 collapse, along the path", "", along, wanted))
    add(
        "D6 roughness (of ranks)",
        "0; 1 without relation",
        lambda i: (
            f"{_number(i.roughness.value)} ({_number(i.roughness.ranks)}), noise ± {_number(i.roughness.null_error)}"
        ),
    )
    return Table(COLUMNS, rows)


def _unlocal(instant: Instant, band: int) -> str:
    return "–" if instant.bandedness is None else _number(float(instant.bandedness.unlocal[band]))


def _scalar(instant: Instant) -> str:
    if instant.bandedness is None:
        return "–"
    values = instant.bandedness.scalar[:, -1]
    return f"{_number(float(np.nanmin(values)))} to {_number(float(np.nanmax(values)))}"


def draw(report: Report, figure: Figure) -> Figure:
    """Draw (a) tails, (b) coherence by distance, (c) sizes along the path, (d) slope of D4 and roughness along the path."""
    axes = figure.subplots(2, 2)
    tails, overlaps, sizes, fields = axes.ravel()
    ends = (
        (report.instants[0], report.instants[-1]) if len(report.instants) > 1 else report.instants
    )
    for index, instant in enumerate(ends):
        label = f"t = {instant.time:.3g}"
        if (band := instant.bandedness) is not None:
            reach = np.arange(len(band.pooled))
            tails.errorbar(
                reach,
                band.pooled,
                yerr=2 * band.pooled_error,
                label=label,
                capsize=2,
                **look(index),
            )
            if index == len(ends) - 1:
                tails.plot(
                    reach,
                    band.unlocal,
                    color="0.4",
                    linestyle=":",
                    marker="",
                    label=f"no locality, {label}",
                )
        if (overlap := instant.coherence) is not None:
            values = overlap.by_distance(True)
            overlaps.plot(np.arange(1, len(values)), values[1:], label=label, **look(index))
    tails.set(xlabel="distance K (blocks)", ylabel="tail B(K)", ylim=(0, None))
    overlaps.set(
        xlabel="distance |l − m| (blocks)", ylabel="largest normalised coherence", ylim=(0, 1.05)
    )
    for ax in (tails, overlaps):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    times = [instant.time for instant in report.instants]
    sizes.plot(times, [i.size.jacobian for i in report.instants], label=r"$\|J\|$", **look(0))
    sizes.plot(
        times, [i.size.rate for i in report.instants], label=r"$\|\dot J\|$ (per time)", **look(1)
    )
    sizes.set(xlabel="time", ylabel="operator norm", yscale="log")
    shifts = [
        (i.time, i.shift.slope, i.shift.slope_error) for i in report.instants if i.shift is not None
    ]
    if shifts:
        place, slope, error = np.array(shifts).T
        fields.errorbar(
            place, slope, yerr=2 * error, label="D4 slope per nat", capsize=2, **look(0)
        )
    rough = [(i.time, i.roughness.ranks) for i in report.instants if i.roughness is not None]
    if rough:
        fields.plot(*np.array(rough).T, label="D6 roughness of ranks", **look(1))
    fields.axhline(0, color="0.4", linewidth=0.8)
    fields.set(xlabel="time", ylabel="0 is what the paper states")
    for ax in axes.ravel():
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    panels(axes.ravel())
    return figure
