"""`grsd conditions`: the four conditions of 2512.18209 as diagnostics of a language model."""

from __future__ import annotations

from typing import Any

import click

from grsd.cli import common
from grsd.cli.common import emit, main, say, shown
from grsd.cli.training import prepared

EPILOG = """\b
Examples:
  grsd conditions mini-0.4m --revision all      along training; the suite is trained if need be
  grsd conditions ./my-model --corpus 'notes/*.txt' --batch-size 4 --length 64 --png conditions.png
  grsd conditions EleutherAI/pythia-70m --revision step0 --revision step1000 --dtype float32 --json
"""
ALONG = click.Choice(["flow", "path"])


@main.command(epilog=EPILOG)
@click.argument("model")
@common.revisions_option
@shown("--corpus", "embedded", "embedded[:VOCAB], text files, or hub:NAME[...].")
@common.split_option
@shown("--batch-size", 2, "Sequences; every token is a row.")
@shown("--length", 32, "Tokens per sequence.")
@shown("--rate", 1.0, "Time of one training step, e.g. its learning rate.")
@shown("--along", "flow", "Motion of J: gradient flow, or what the checkpoints did.", type=ALONG)
@shown("--probes", 16, "Random output vectors for D1; 0: all rows, exact.", type=click.IntRange(0))
@shown("--rows", 512, "Form T x T matrices (D4 to D6) up to so many rows.", type=click.IntRange(0))
@common.seed_option("the batch and the random vectors")
@shown("--dtype", "float64", "float64, float32 or bfloat16.")
@common.device_option
@common.file_option("--png", "Draw the report into this file.")
@common.json_option
def conditions(
    model: str,
    revisions: tuple[str, ...],
    device: str,
    probes: int,
    png: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the four conditions of "When Does Learning Renormalize?" on MODEL, at one checkpoint
    or along several.

    MODEL is named as for `grsd shells`. The table says, for each diagnostic, what was found at the
    first and at the last checkpoint and what the condition wants; notes below it say what could not
    be measured and why.
    """
    from grsd.lab.runs.conditions import conditions_of

    common.check_png(png)
    where = common.device_of(device)
    opened, asked = prepared(model, revisions, where)
    with common.bar("conditions") as update:
        update(0, max(1, len(asked)), "the model is loaded")
        report = conditions_of(
            opened, asked, device=where, probes=probes or None, progress=update, **options
        )
    if png:
        from matplotlib.figure import Figure

        from grsd import figures

        figures.style()
        report.draw(Figure(figsize=(9, 6))).savefig(png)
        say(f"wrote {png}")
    if as_json:
        emit({"model": model, "revisions": asked} | report.to_json())
        return
    click.echo(str(report.table()))
    click.echo(f"{len(report.blocks)} blocks, {report.rows} rows, {report.passes} forward passes")
    for note in report.notes:
        click.echo(f"note: {note}")
