"""What a run says: a summary that JSON can hold, the same as text, and a figure.

Used by the command line; the chapters of the book draw their own figures from `RunResult`.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grsd import figures
from grsd.figures import Table
from grsd.lab.runs.record import RunResult
from grsd.spectrum import LogShells, statistics


def summary(run: RunResult, shells: LogShells) -> dict[str, Any]:
    """Mean profiles of every revision and start; a number that does not exist is None.

    Keys are ``model``, ``spec``, ``edges`` (n+1,) and ``profiles``: per revision and start vector
    energies, standard errors and intervals (n,), the energy at negative eigenvalues, outside the
    edges and in the kernel, the mean loss in nats per token, and the profile's statistics (None
    when the edges miss it).
    """
    profiles = []
    for revision in run.revisions:
        loss = float(run.losses(revision).mean())
        for start in run.spec.starts:
            mean = run.average(revision, start, shells)
            entry: dict[str, Any] = {"revision": revision, "start": start, "loss": loss}
            for name in ("energies", "sem", "lower", "upper"):
                entry[name] = getattr(mean, name).tolist()
            for name in ("total", "negative", "below", "above", "kernel", "floor", "batches"):
                entry[name] = getattr(mean, name)
            entry["statistics"] = None
            if mean.energies.sum() > 0:
                values = asdict(statistics(mean)).items()
                entry["statistics"] = {k: v if math.isfinite(v) else None for k, v in values}
            profiles.append(entry)
    spec = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(run.spec).items()}
    edges = shells.edges.tolist()
    return {"model": run.spec.model, "spec": spec, "edges": edges, "profiles": profiles}


def text(data: dict[str, Any]) -> str:
    """A `summary` as tables for a terminal: a shell a line, peak and frontier below."""
    return "\n\n".join(_profile(data, entry) for entry in data["profiles"])


def _profile(data: dict[str, Any], entry: dict[str, Any]) -> str:
    edges, total = data["edges"], entry["total"]
    pairs = enumerate(zip(entry["energies"], entry["upper"], strict=True))
    seen = [i for i, (energy, upper) in pairs if energy > 0 or upper > 1e-3 * total]
    rows = []
    for i in range(seen[0], seen[-1] + 1) if seen else ():
        values = [number(entry[name][i]) for name in ("energies", "sem", "lower", "upper")]
        rows.append([f"{number(edges[i])} to {number(edges[i + 1])}", *values])
    shells = Table(["eigenvalue", "energy", "std. error", "at least", "at most"], rows)

    said = "no energy in any shell: the edges miss the spectrum"
    if stats := entry["statistics"]:
        names = ("peak", "peak_low", "peak_high", "frontier")
        peak, low, high, frontier = (number(stats[name]) for name in names)
        peaks = "one peak" if stats["unimodal"] else "more than one peak"
        said = f"peak {peak} (between {low} and {high}), frontier {frontier}, {peaks}"
    outside, kernel = (100 * x / total for x in (entry["below"] + entry["above"], entry["kernel"]))
    share = 100 * entry.get("negative", 0.0) / total
    negative = f", at negative eigenvalues {share:.2g} %" if share else ""
    return (
        f"{data['model']} {entry['revision']}, start vector {entry['start']}, "
        f"{entry['batches']} batches, loss {number(entry['loss'], 4)} nats per token\n"
        f"{shells}\n{said}\nenergy {number(total, 4)}; outside the edges {outside:.2g} %, "
        f"in the kernel {kernel:.2g} %{negative}"
    )


def draw(run: RunResult, shells: LogShells, path: str | Path) -> None:
    """Draw the mean profile of every revision and start vector into a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        figures.style()
        figure = Figure(figsize=(7.0, 4.5))
        ax = figure.add_subplot()
        pairs = [(revision, start) for revision in run.revisions for start in run.spec.starts]
        for index, (revision, start) in enumerate(pairs):
            mean = run.average(revision, start, shells)
            figures.shell_profile(ax, mean, label=f"{revision}, {start}", index=index)
        ax.set_title(run.spec.model)
        ax.legend(fontsize=7)
        figure.savefig(path, format="png")


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for one that does not exist."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"
