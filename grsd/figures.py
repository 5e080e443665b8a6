"""How figures look, and the one figure that every room draws: a shell-energy profile.

Colours are those of Okabe and Ito, told apart by readers with any colour vision, and every line also has a
marker and a dash pattern of its own. Backgrounds are opaque white, so that a dark page shows them legibly.
This module imports matplotlib but no pyplot: the caller makes the axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

__all__ = [
    "LINESTYLES",
    "MARKERS",
    "PALETTE",
    "SEQUENCE",
    "Table",
    "look",
    "panels",
    "shell_profile",
    "style",
]

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
LINESTYLES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
)


class Shells(Protocol):
    """What a profile's shells must offer: `edges` (n+1,) and `centers` (n,), ascending and positive."""

    @property
    def edges(self) -> Any: ...
    @property
    def centers(self) -> Any: ...


def style() -> None:
    """Set matplotlib's defaults for the book; call it once in a chapter's setup cell."""
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
            "axes.prop_cycle": cycler(color=SEQUENCE)
            + cycler(marker=MARKERS)
            + cycler(linestyle=LINESTYLES),
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
    return {
        "color": SEQUENCE[index % len(SEQUENCE)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINESTYLES[index % len(LINESTYLES)],
    }


def panels(axes: Iterable[Axes]) -> None:
    """Letter the axes (a), (b), ... in their order."""
    for index, ax in enumerate(axes):
        ax.set_title(f"({chr(ord('a') + index)})", loc="left", fontsize=10, fontweight="bold")


def _fraction(value: float, total: float) -> str:
    share = 100.0 * value / total
    return "0 %" if share == 0 else "<0.1 %" if share < 0.1 else f"{share:.1f} %"


def _remainder(profile: Any, energies: np.ndarray) -> str:
    """The mass that no shell holds, in words; empty when the profile does not carry it."""
    parts = {
        name: float(value)
        for name in ("below", "above", "kernel")
        if (value := getattr(profile, name, None)) is not None
    }
    total = float(energies.sum()) + sum(parts.values())
    if not parts or total <= 0:
        return ""
    outside = parts.get("below", 0.0) + parts.get("above", 0.0)
    words = f"outside {_fraction(outside, total)}"
    return words + (f", ker {_fraction(parts['kernel'], total)}" if "kernel" in parts else "")


def _array(profile: Any, name: str, count: int) -> np.ndarray | None:
    value = getattr(profile, name, None)
    if value is None:
        return None
    found: np.ndarray = np.asarray(value, dtype=np.float64)
    if found.shape != (count,):
        raise ValueError(
            f"profile.{name} has shape {found.shape}, expected ({count},): one number per shell"
        )
    return found


def _shade(ax: Axes, left: float, right: float) -> None:
    """Shade [left, right]; several profiles on one axes share one shade, as wide as the widest."""
    for patch in [patch for patch in ax.patches if patch.get_gid() == "floor"]:
        (x0, _), (x1, _) = patch.get_path().get_extents(patch.get_patch_transform()).get_points()
        left, right = min(left, float(x0)), max(right, float(x1))
        patch.remove()
    ax.axvspan(left, right, color="0.5", alpha=0.15, linewidth=0, zorder=0, gid="floor")


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
    """Draw shell energies against the shells' centres, on logarithmic axes.

    Parameters
    ----------
    ax : Axes
        Drawn into; labelled with units when it has no labels yet.
    profile : object
        With `shells.centers` (n,), `shells.edges` (n+1,) and `energies` (n,). Optional: `lower` and `upper` (n,),
        `floor` (an eigenvalue, below which rounding decides), `below`, `above` and `kernel` (energies that no shell
        holds).
    label : str, optional
        Name in the legend.
    index : int, optional
        Number in the cycle of colours, markers and line styles; by default the axes' own next one.
    scale : float
        Factor on every energy, e.g. 1 / total to compare shapes.
    interval : bool
        Draw a bar [lower, upper] per shell.
    floor : bool
        Shade the eigenvalues below `profile.floor`.
    remainder : bool
        Add the share of energy outside the edges and in ker M to the label.
    **line
        For `Axes.plot`; it overrides what `index` chose.

    Returns
    -------
    Line2D
        The line of the profile. A shell of zero energy has no point on a logarithmic axis; if its upper
        bound is positive, that is drawn as a small downward arrowhead.

    Raises
    ------
    ValueError
        If the arrays do not fit the shells, or an energy is negative or not finite.
    """
    centers = np.asarray(profile.shells.centers, dtype=np.float64)
    count = len(centers)
    energies = _array(profile, "energies", count)
    if energies is None:
        raise ValueError(f"{type(profile).__name__} has no energies; is it a profile?")
    if not np.all(np.isfinite(energies)) or np.any(energies < 0):
        raise ValueError(
            f"shell energies must be finite and not negative; found {energies.min()!r}"
        )
    lower, upper = _array(profile, "lower", count), _array(profile, "upper", count)

    ax.set_xscale("log")
    ax.set_yscale("log", nonpositive="clip")
    name = label
    if remainder and label is not None and (words := _remainder(profile, energies)):
        name = f"{label} ({words})"
    looks = {**({} if index is None else look(index)), **line}
    heights = scale * np.where(energies > 0, energies, np.nan)
    (drawn,) = ax.plot(centers, heights, label=name, **looks)
    color = drawn.get_color()

    if interval and lower is not None and upper is not None and np.any(energies > 0):
        seen = energies > 0
        # A lower bound may be 0 or 1e-300; a bar ends a factor 10 under the smallest drawn point.
        bottom = 0.1 * float(energies[seen].min())
        ax.vlines(
            centers[seen],
            scale * np.clip(lower[seen], bottom, None),
            scale * np.maximum(upper[seen], energies[seen]),
            colors=color,
            alpha=0.55,
            linewidth=1.2,
        )
        limits = ~seen & (upper > bottom)
        ax.plot(
            centers[limits],
            scale * upper[limits],
            color=color,
            marker=7,
            linestyle="none",
            markersize=5,
        )
    value = getattr(profile, "floor", None)
    first = float(np.asarray(profile.shells.edges)[0])
    if floor and value is not None and float(value) > first:
        _shade(ax, first, float(value))
    if not ax.get_xlabel():
        ax.set_xlabel(r"eigenvalue $\lambda$ of $M$ (1/time)")
    if not ax.get_ylabel():
        ax.set_ylabel(r"shell energy $E_\alpha$" + ("" if scale == 1.0 else " (scaled)"))
    return drawn


@dataclass(frozen=True)
class Table:
    """A small table that a notebook shows as Markdown and a terminal as text.

    Attributes
    ----------
    columns : sequence of str
        Headings; may hold mathematics between dollar signs.
    rows : sequence of sequences
        Cells; floats are shown with four significant digits, everything else as `str` gives it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {tuple(row)!r} has {len(row)} cells, expected {len(self.columns)}"
                )

    @staticmethod
    def _cell(value: object) -> str:
        if isinstance(value, (float, np.floating)):
            return f"{value:.4g}"
        # a bar ends a cell: outside mathematics it is escaped, inside, where an escaped one would lose its backslash, it gets a name
        texts = re.split(r"(\$[^$]*\$)", str(value))
        return "".join(
            text.replace(r"\|", r"\Vert{}").replace("|", r"\vert{}")
            if i % 2
            else re.sub(r"(?<!\\)\|", r"\|", text)
            for i, text in enumerate(texts)
        )

    def _lines(self) -> list[str]:
        head = "| " + " | ".join(map(self._cell, self.columns)) + " |"
        rule = "|" + "---|" * len(self.columns)
        return [head, rule, *("| " + " | ".join(map(self._cell, row)) + " |" for row in self.rows)]

    def _repr_markdown_(self) -> str:
        return "\n".join(self._lines())

    def __str__(self) -> str:
        return "\n".join(self._lines())
