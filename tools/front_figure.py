"""Draw the front page's figure from the stored result `protocol-mini`: book/_assets/profile.svg.

    grsd protocol mini --output grsd/data/results/protocol-mini.json    # measure it again
    python tools/front_figure.py

Left, the profile of the error of the trained net beside three null models. Right, the same net at
batches of four sizes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from grsd import figures, results
from grsd.experiments.protocol import MINI, Cell, pick

TARGET = Path(__file__).parents[1] / "book" / "_assets" / "profile.svg"


def main() -> None:
    stored = results.load("protocol-mini")
    cells = [Cell.from_json(record) for record in stored.data["cells"]]
    model, last, rows = MINI.followed[0], MINI.last, MINI.batch_size * MINI.length
    trained = {"model": model, "revision": last, "targets": "text", "rows": rows}
    shown = {
        "error e = −log q": pick(cells, **trained, start="error"),
        "null: constant 1": pick(cells, **trained, start="ones"),
        "null: untrained weights": pick(cells, **{**trained, "revision": "step0"}, start="error"),
        "null: random vector": pick(cells, **trained, start="random"),
    }
    sizes = [
        c
        for c in cells
        if (c.model, c.revision, c.start, c.targets) == (model, last, "error", "text")
    ]

    figures.style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
    figures.panels(axes)
    for index, (name, cell) in enumerate(shown.items()):
        figures.shell_profile(
            axes[0],
            cell.profile,
            label=name,
            index=index,
            scale=1 / cell.profile.total,
            remainder=False,
        )
    for index, cell in enumerate(sorted(sizes, key=lambda c: c.rows)):
        label = f"e, T = {cell.rows} tokens"
        figures.shell_profile(
            axes[1],
            cell.profile,
            label=label,
            index=index,
            scale=1 / cell.profile.total,
            remainder=False,
        )
    for ax in axes:
        ax.set_ylim(1e-4, 1)
        ax.set_xlim(2**-11, 2**6)
        ax.set_ylabel("share of the energy per octave")
        ax.legend(loc="upper left", fontsize=8)
    date = stored.provenance["date"][:10]
    figure.suptitle(
        f"GPT-NeoX, 1.3 M parameters, trained on Python's standard library; measured {date}",
        fontsize=9,
    )
    plt.rcParams["svg.hashsalt"] = "grsd"  # the same picture is the same file
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
