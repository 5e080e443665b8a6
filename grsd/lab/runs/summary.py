"""What a run says: a summary that JSON can hold, the same as text, and a figure.

Used by the command line; the chapters of the book draw their own figures from `RunResult`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grsd import figures
from grsd.lab.runs.run import RunResult
from grsd.spectrum import LogShells, statistics


def summary(run: RunResult, shells: LogShells) -> dict[str, Any]:
    """Mean profiles of every revision and start vector on ``shells``; a number that does not exist is None.

    Returns
    -------
    dict
        ``model``, ``spec``, ``edges`` (n+1,) and ``profiles``: one entry per revision and start vector with energies,
        standard errors and intervals (n,), the energy outside the edges and in the kernel, the mean loss in nats per
        token, and the statistics of the profile (None when the edges miss the spectrum).
    """
    profiles = []
    for revision in run.revisions:
        loss = float(run.losses(revision).mean())
        for start in run.spec.starts:
            mean = run.average(revision, start, shells)
            entry: dict[str, Any] = {
                "revision": revision,
                "start": start,
                "loss": loss,
                "total": mean.total,
            }
            for name in ("energies", "sem", "lower", "upper"):
                entry[name] = getattr(mean, name).tolist()
            for name in ("below", "above", "kernel", "floor", "batches"):
                entry[name] = getattr(mean, name)
            found = asdict(statistics(mean)) if mean.energies.sum() > 0 else None
            entry["statistics"] = found and {
                k: v if math.isfinite(v) else None for k, v in found.items()
            }
            profiles.append(entry)
    spec = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(run.spec).items()}
    return {
        "model": run.spec.model,
        "spec": spec,
        "edges": shells.edges.tolist(),
        "profiles": profiles,
    }


def text(data: dict[str, Any]) -> str:
    """A `summary` as tables for a terminal: a shell a line, peak and frontier below."""
    edges = data["edges"]
    lines: list[str] = []
    for entry in data["profiles"]:
        where = f"{data['model']} {entry['revision']}, start vector {entry['start']}"
        lines += [
            "",
            f"{where}, {entry['batches']} batches, loss {number(entry['loss'], 4)} nats per token",
        ]
        total = entry["total"]
        seen = [
            i for i, e in enumerate(entry["energies"]) if e > 0 or entry["upper"][i] > 1e-3 * total
        ]
        rows = []
        for i in range(seen[0], seen[-1] + 1) if seen else ():
            values = [number(entry[k][i]) for k in ("energies", "sem", "lower", "upper")]
            rows.append([f"{number(edges[i])} to {number(edges[i + 1])}", *values])
        lines += table(["eigenvalue", "energy", "std. error", "at least", "at most"], rows)
        found = entry["statistics"]
        if found is None:
            lines.append("no energy in any shell: the edges miss the spectrum")
        else:
            lines.append(
                f"peak {number(found['peak'])} (between {number(found['peak_low'])} and {number(found['peak_high'])}), "
                f"frontier {number(found['frontier'])}, {'one peak' if found['unimodal'] else 'more than one peak'}"
            )
        outside, kernel = (
            100 * x / total for x in (entry["below"] + entry["above"], entry["kernel"])
        )
        lines.append(
            f"energy {number(total, 4)}; outside the edges {outside:.2g} %, in the kernel {kernel:.2g} %"
        )
    return "\n".join(lines[1:])


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
            label = f"{revision}, {start}"
            figures.shell_profile(
                ax, run.average(revision, start, shells), label=label, index=index
            )
        ax.set_title(run.spec.model)
        ax.legend(fontsize=7)
        figure.savefig(path, format="png")


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for one that does not exist."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a table with aligned columns."""
    cells = [list(columns), *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
