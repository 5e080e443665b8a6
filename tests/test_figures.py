"""Figures: what a profile's drawing must show, read back from the drawing itself."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from grsd import figures
from grsd.figures import LINESTYLES, MARKERS, PALETTE, SEQUENCE, Table, look, shell_profile


@dataclass
class Profile:
    """What `shell_profile` needs, with nothing of `grsd.spectrum` (which is a higher layer)."""

    shells: Any
    energies: Any = None
    lower: Any = None
    upper: Any = None
    floor: float | None = None
    below: float | None = None
    above: float | None = None
    kernel: float | None = None


def shells(count: int = 4) -> SimpleNamespace:
    edges = 2.0 ** np.arange(count + 1)
    return SimpleNamespace(edges=edges, centers=np.sqrt(edges[1:] * edges[:-1]))


@pytest.fixture
def ax() -> Axes:
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def bars(ax: Axes) -> list[np.ndarray]:
    return [
        segment
        for item in ax.collections
        if isinstance(item, LineCollection)
        for segment in item.get_segments()
    ]


def contrast(color: str) -> float:
    """Contrast with white by the WCAG 2 formula."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 1.05 / (np.dot(channels, [0.2126, 0.7152, 0.0722]) + 0.05)


def test_the_line_is_the_energies_at_the_centres_on_log_axes(ax: Axes) -> None:
    profile = Profile(shells(), np.array([1.0, 4.0, 2.0, 0.5]))
    line = shell_profile(ax, profile, label="e")
    np.testing.assert_array_equal(line.get_xdata(), profile.shells.centers)
    np.testing.assert_array_equal(line.get_ydata(), profile.energies)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert "1/time" in ax.get_xlabel() and "energy" in ax.get_ylabel()
    assert bars(ax) == []


def test_bars_span_the_intervals_and_zero_bounds_end_in_sight(ax: Axes) -> None:
    profile = Profile(
        shells(3), np.array([1.0, 4.0, 2.0]), np.array([0.5, 3.0, 0.0]), np.array([2.0, 5.0, 6.0])
    )
    shell_profile(ax, profile)
    spans = sorted((float(bar[0][0]), float(bar[0][1]), float(bar[1][1])) for bar in bars(ax))
    np.testing.assert_allclose([span[1] for span in spans], [0.5, 3.0, 0.1])
    np.testing.assert_allclose([span[2] for span in spans], profile.upper)
    assert ax.get_ylim()[0] > 1e-3  # a bound of 0 must not stretch the axis to nothing


def test_scale_multiplies_line_and_bars_alike(ax: Axes) -> None:
    profile = Profile(shells(2), np.array([1.0, 4.0]), np.array([0.5, 3.0]), np.array([2.0, 5.0]))
    line = shell_profile(ax, profile, scale=0.1)
    np.testing.assert_allclose(line.get_ydata(), [0.1, 0.4])
    np.testing.assert_allclose(sorted(bar[1][1] for bar in bars(ax)), [0.2, 0.5])
    assert "scaled" in ax.get_ylabel()


def test_bars_span_the_interval(ax: Axes) -> None:
    profile = SimpleNamespace(
        shells=shells(2),
        energies=np.array([1.0, 4.0]),
        lower=np.array([0.75, 3.0]),
        upper=np.array([1.25, 5.0]),
    )
    line = shell_profile(ax, profile)
    np.testing.assert_array_equal(line.get_ydata(), profile.energies)
    spans = sorted((bar[0][1], bar[1][1]) for bar in bars(ax))
    np.testing.assert_allclose(spans, [(0.75, 1.25), (3.0, 5.0)])


def test_an_empty_shell_has_no_point_but_shows_its_upper_bound(ax: Axes) -> None:
    profile = Profile(shells(3), np.array([1.0, 0.0, 2.0]), np.zeros(3), np.array([1.5, 0.7, 2.5]))
    line = shell_profile(ax, profile)
    assert np.isnan(np.asarray(line.get_ydata())[1]) and np.isfinite(line.get_ydata()).sum() == 2
    np.testing.assert_allclose(np.asarray(ax.lines[1].get_ydata()), [0.7])
    assert len(bars(ax)) == 2


def test_mass_outside_the_shells_and_in_the_kernel_is_in_the_label(ax: Axes) -> None:
    profile = Profile(shells(2), np.array([3.0, 4.0]), below=1.0, above=0.5, kernel=1.5)
    assert shell_profile(ax, profile, label="e").get_label() == "e (outside 15.0 %, ker 15.0 %)"
    tiny = Profile(shells(2), np.array([3.0, 4.0]), below=1e-9, above=0.0, kernel=0.0)
    assert shell_profile(ax, tiny, label="f").get_label() == "f (outside <0.1 %, ker 0 %)"
    assert shell_profile(ax, profile, label="g", remainder=False).get_label() == "g"
    assert shell_profile(ax, Profile(shells(2), np.ones(2)), label="h").get_label() == "h"


@pytest.mark.parametrize(("floor", "shaded"), [(4.0, True), (0.5, False), (None, False)])
def test_what_rounding_decides_is_shaded(ax: Axes, floor: float | None, shaded: bool) -> None:
    shell_profile(ax, Profile(shells(), np.ones(4), floor=floor))
    assert len(ax.patches) == shaded
    if shaded:
        box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        np.testing.assert_allclose((box.x0, box.x1), (1.0, 4.0))


def test_several_floors_share_one_shade_as_wide_as_the_widest(ax: Axes) -> None:
    for floor in (3.0, 4.0, 2.0):
        shell_profile(ax, Profile(shells(), np.ones(4), floor=floor))
    (patch,) = ax.patches
    box = patch.get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose((box.x0, box.x1), (1.0, 4.0))


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        (np.ones(3), "one number per shell"),
        (np.array([1.0, -1.0, 1.0, 1.0]), "not negative"),
        (np.array([1.0, np.nan, 1.0, 1.0]), "finite"),
        (None, "has no energies"),
    ],
)
def test_what_is_no_profile_is_refused(ax: Axes, energies: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shell_profile(ax, Profile(shells(), energies))
    assert not ax.lines


def test_labels_that_the_caller_set_stay(ax: Axes) -> None:
    ax.set_xlabel("mine")
    shell_profile(ax, Profile(shells(), np.ones(4)))
    assert ax.get_xlabel() == "mine"


def test_lines_differ_by_colour_marker_and_dash_at_once() -> None:
    assert len(SEQUENCE) == len(MARKERS) == len(LINESTYLES)
    for values in (SEQUENCE, MARKERS, LINESTYLES):
        assert len(set(map(str, values))) == len(values)
    assert look(0) == look(len(SEQUENCE)) and look(0) != look(1)


def test_every_line_colour_is_visible_on_white_and_the_one_left_out_is_not() -> None:
    assert all(contrast(color) > 2.0 for color in SEQUENCE)
    assert contrast(PALETTE["yellow"]) < 1.5


def test_style_gives_an_opaque_white_figure() -> None:
    with matplotlib.rc_context():
        figures.style()
        figure = Figure(figsize=(2, 2))
        canvas = FigureCanvasAgg(figure)
        figure.add_subplot().plot([1, 2])
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())
        assert not matplotlib.rcParams["savefig.transparent"]
    assert np.all(pixels[..., 3] == 255)
    assert tuple(pixels[0, 0, :3]) == (255, 255, 255)


def test_panels_are_lettered(ax: Axes) -> None:
    figure = Figure()
    axes = figure.subplots(1, 3)
    figures.panels(axes)
    assert [item.get_title(loc="left") for item in axes] == ["(a)", "(b)", "(c)"]


def test_a_table_is_markdown_with_four_digits() -> None:
    table = Table(["m", "|l − m|"], [[20, 0.123456], [50, "a|b"]])
    expected = [
        r"| m | \|l − m\| |",
        "|---|---|",
        "| 20 | 0.1235 |",
        r"| 50 | a\|b |",
    ]  # a bar ends no column
    assert table._repr_markdown_().splitlines() == expected
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        Table(["m", "error"], [[20]])


def test_bars_in_a_table_stay_in_their_cell() -> None:
    from markdown_it import MarkdownIt

    norm = r"$\log\|P\|$"
    table = Table(["|slope|", norm, r"a\|b"], [["of |Δ|", r"$|x|$", 1]])
    head, _, row = table._repr_markdown_().splitlines()
    assert (
        head == r"| \|slope\| | $\log\Vert{}P\Vert{}$ | a\|b |"
        and row == r"| of \|Δ\| | $\vert{}x\vert{}$ | 1 |"
    )
    shown = MarkdownIt("commonmark").enable("table").render(table._repr_markdown_())
    assert shown.count("<th>") == 3 and shown.count("<td>") == 3
    assert "<th>|slope|</th>" in shown and "<td>of |Δ|</td>" in shown  # the reader sees the bars
