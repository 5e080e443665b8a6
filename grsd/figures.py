"""How figures look, and the one figure that every room draws: a shell-energy profile.

Colours are those of Okabe and Ito, told apart by readers with any colour vision, and every line
also has a marker and a dash pattern of its own. Backgrounds are opaque white, so that a dark page
shows them legibly. The caller makes the axes; only `style` imports matplotlib. Here too: `Table`,
the one maker of text tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe & Ito (2008), "Color Universal Design".
PALETTE: dict[str, str] = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
# Yellow stays out of the line colours: on white its contrast is 1.3 to 1, too little for a line.
SEQUENCE: tuple[str, ...] = tuple(value for name, value in PALETTE.items() if name != "yellow")
MARKERS: tuple[str, ...] = ("o", "s", "^", "D", "v", "P", "X")
LINESTYLES: tuple[Any, ...] = ("-", "--", "-.", ":")
LINESTYLES += ((0, (5, 1, 1, 1, 1, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def style() -> None:
    """Set matplotlib's defaults for the book; call it once in a chapter's setup cell."""
    import matplotlib
    from cycler import cycler

    cycle = cycler(color=SEQUENCE) + cycler(marker=MARKERS) + cycler(linestyle=LINESTYLES)
    matplotlib.rcParams.update(
        {
            "figure.figsize": (6.4, 3.8),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "savefig.dpi": 150,
            "axes.facecolor": "white",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycle,
            "grid.color": "#d9d9d9",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
            "legend.frameon": True,
            "legend.framealpha": 0.9,
            "legend.fontsize": 9,
            "font.size": 10,
            "svg.hashsalt": "grsd",  # equal figures give equal files
        }
    )


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line style number `index` of the cycle, as keywords for `Axes.plot`."""
    cycle = {"color": SEQUENCE, "marker": MARKERS, "linestyle": LINESTYLES}
    return {name: values[index % len(values)] for name, values in cycle.items()}


def panels(axes: Iterable[Axes]) -> None:
    """Letter the axes (a), (b), ... in their order."""
    for index, ax in enumerate(axes):
        ax.set_title(f"({chr(ord('a') + index)})", loc="left", fontsize=10, fontweight="bold")


def shell_profile(
    ax: Axes,
    profile: Any,
    *,
    label: str | None = None,
    index: int | None = None,
    scale: float = 1.0,
    interval: bool = True,
    floor: bool = True,
    remainder: bool = True,
    **line: Any,
) -> Line2D:
    """Draw shell energies against the shells' centres, on logarithmic axes, and return their line.

    A shell of zero energy has no point on a logarithmic axis; if its upper bound is positive, that
    is drawn as a small downward arrowhead. Axes without labels get them, with units.

    Parameters
    ----------
    profile : object
        With `shells.centers` (n,), `shells.edges` (n+1,) and `energies` (n,). Optional: `lower` and
        `upper` (n,), `floor` (an eigenvalue, below which rounding decides), `below`, `above` and
        `kernel` (energies that no shell holds).
    index : int, optional
        Number in the cycle of colours, markers and line styles; by default the axes' own next one.
    scale : float
        Factor on every energy, e.g. 1 / total to compare shapes.
    interval, floor, remainder : bool
        Draw a bar [lower, upper] per shell; shade the eigenvalues below `profile.floor`; add the
        share of energy outside the edges and in ker M to the label.
    **line
        For `Axes.plot`; it overrides what `index` chose.
    """
    centers = np.asarray(profile.shells.centers, dtype=np.float64)
    energies = _values(profile, "energies", len(centers))
    if energies is None:
        raise ValueError(f"{type(profile).__name__} has no energies; is it a profile?")
    if not np.all(np.isfinite(energies)) or np.any(energies < 0):
        raise ValueError(f"shell energies must be finite and not negative; got {energies.min()!r}")
    lower, upper = (_values(profile, name, len(centers)) for name in ("lower", "upper"))

    # the energies, with gaps where a shell holds none
    ax.set_xscale("log")
    ax.set_yscale("log", nonpositive="clip")
    if remainder and label is not None and (words := _remainder(profile, energies)):
        label = f"{label} ({words})"
    looks = {**({} if index is None else look(index)), **line}
    positive = energies > 0
    (drawn,) = ax.plot(centers, scale * np.where(positive, energies, np.nan), label=label, **looks)
    color = drawn.get_color()

    if interval and lower is not None and upper is not None and np.any(positive):
        # a lower bound may be 0 or 1e-300; a bar ends a factor 10 under the smallest drawn point
        bottom = 0.1 * float(energies[positive].min())
        low, high = np.maximum(lower, bottom), np.maximum(upper, energies)
        bars: dict[str, Any] = {"colors": color, "alpha": 0.55, "linewidth": 1.2}
        ax.vlines(centers[positive], scale * low[positive], scale * high[positive], **bars)
        limits = ~positive & (upper > bottom)
        arrows: dict[str, Any] = {"color": color, "marker": 7, "linestyle": "none", "markersize": 5}
        ax.plot(centers[limits], scale * upper[limits], **arrows)
    # what lies under the rounding floor is shaded, and axes without a name get one
    rounding = getattr(profile, "floor", None)
    first = float(np.asarray(profile.shells.edges)[0])
    if floor and rounding is not None and rounding > first:
        _shade(ax, first, float(rounding))
    if not ax.get_xlabel():
        ax.set_xlabel(r"eigenvalue $\lambda$ of $M$ (1/time)")
    if not ax.get_ylabel():
        ax.set_ylabel(r"shell energy $E_\alpha$" + ("" if scale == 1.0 else " (scaled)"))
    return drawn


def _values(profile: Any, name: str, count: int) -> np.ndarray | None:
    value = getattr(profile, name, None)
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(
            f"profile.{name} has shape {array.shape}, expected ({count},): one number per shell"
        )
    return array


def _remainder(profile: Any, energies: np.ndarray) -> str:
    """The mass that no shell holds, in words; empty when the profile does not carry it."""
    below, above, kernel = (getattr(profile, name, None) for name in ("below", "above", "kernel"))
    negative = float(getattr(profile, "negative", 0.0))
    outside = sum(float(part or 0.0) for part in (below, above, kernel))
    total = float(energies.sum()) + outside + negative
    if (below is None and above is None and kernel is None) or total <= 0:
        return ""

    def percent(value: float) -> str:
        share = 100.0 * value / total
        return "0 %" if share == 0 else "<0.1 %" if share < 0.1 else f"{share:.1f} %"

    words = f"outside {percent(float(below or 0.0) + float(above or 0.0))}"
    words += "" if kernel is None else f", ker {percent(float(kernel))}"
    return words + (f", λ < 0 {percent(negative)}" if negative else "")


def _shade(ax: Axes, left: float, right: float) -> None:
    """Shade [left, right]; several profiles on one axes share one shade, as wide as the widest."""
    for patch in [patch for patch in ax.patches if patch.get_gid() == "floor"]:
        (x0, _), (x1, _) = patch.get_path().get_extents(patch.get_patch_transform()).get_points()
        left, right = min(left, float(x0)), max(right, float(x1))
        patch.remove()
    ax.axvspan(left, right, color="0.5", alpha=0.15, linewidth=0, zorder=0, gid="floor")


@dataclass(frozen=True)
class Table:
    """A small table that a notebook shows as Markdown and a terminal (`str`) as aligned text.

    Headings and text cells may hold mathematics between dollar signs. Floats are shown with four
    significant digits, everything else as `str` gives it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {tuple(row)!r} has {len(row)} cells, expected {len(self.columns)}"
                )

    def _cells(self) -> list[list[str]]:
        def text(value: object) -> str:
            return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)

        return [list(map(text, row)) for row in (self.columns, *self.rows)]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table as Markdown; a bar in a cell does not end it."""
        lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in self._cells()]
        return "\n".join([lines[0], "|" + "---|" * len(self.columns), *lines[1:]])

    _repr_markdown_ = markdown


def _escaped(cell: str) -> str:
    """A cell whose bars are escaped; in mathematics, where an escape is lost, they get a name."""
    parts = re.split(r"(\$[^$]*\$)", cell)
    parts[::2] = [re.sub(r"(?<!\\)\|", r"\|", text) for text in parts[::2]]
    parts[1::2] = [
        formula.replace(r"\|", r"\Vert{}").replace("|", r"\vert{}") for formula in parts[1::2]
    ]
    return "".join(parts)
