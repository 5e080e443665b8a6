"""`grsd conditions`: the four conditions of 2512.18209 as diagnostics of a language model."""

from __future__ import annotations

from typing import Any

import click

from grsd.cli.common import bar, check_png, device_of, emit, json_option, main, say, table
from grsd.cli.training import prepare

EPILOG = """\b
Examples:
  grsd conditions mini-0.4m --revision all            along training; the suite is trained first if need be
  grsd conditions ./my-model --corpus 'notes/*.txt' --batch-size 4 --length 64 --png conditions.png
  grsd conditions EleutherAI/pythia-70m --revision step0 --revision step1000 --dtype float32 --probes 8 --json
"""


@main.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--revision",
    "revisions",
    multiple=True,
    help="Checkpoint, e.g. step512; repeat, or 'all' [the last].",
)
@click.option(
    "--corpus",
    default="embedded",
    show_default=True,
    help="embedded[:VOCAB], text files, or hub:NAME[...].",
)
@click.option(
    "--split",
    type=click.Choice(["train", "heldout", "all"]),
    help="Part of the corpus [heldout if embedded].",
)
@click.option("--batch-size", default=2, show_default=True, help="Sequences; every token is a row.")
@click.option("--length", default=32, show_default=True, help="Tokens per sequence.")
@click.option(
    "--rate",
    default=1.0,
    show_default=True,
    help="Time of one training step, e.g. its learning rate.",
)
@click.option(
    "--along",
    type=click.Choice(["flow", "path"]),
    default="flow",
    show_default=True,
    help="Motion of J: gradient flow, or what the checkpoints did.",
)
@click.option(
    "--probes",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Random output vectors for D1; 0: all rows, exact.",
)
@click.option(
    "--rows",
    type=click.IntRange(0),
    default=512,
    show_default=True,
    help="Form T x T matrices (D4 to D6) up to so many rows.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the batch and the random vectors.",
)
@click.option("--dtype", default="float64", show_default=True, help="float64, float32 or bfloat16.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the report into this file.")
@json_option
def conditions(
    model: str,
    revisions: tuple[str, ...],
    device: str,
    probes: int,
    png: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the four conditions of "When Does Learning Renormalize?" on MODEL, at one checkpoint or along several.

    MODEL is named as for `grsd shells`. The table says, for each diagnostic, what was found at the first and at the last
    checkpoint and what the condition wants; notes below it say what could not be measured and why.
    """
    from grsd.lab.checkpoints import hub
    from grsd.lab.runs import conditions

    check_png(png)
    where = device_of(device)
    hub.check_device(where)
    prepare(model, revisions, where)
    asked = hub.available(model) if "all" in revisions else list(revisions)
    with bar("conditions") as update:
        found = conditions.conditions_of(
            model, asked, device=where, probes=probes or None, progress=update, **options
        )
    if png:
        from matplotlib.figure import Figure

        from grsd import figures

        figures.style()
        found.draw(Figure(figsize=(9, 6))).savefig(png)
        say(f"wrote {png}")
    if as_json:
        emit({"model": model, "revisions": asked} | found.to_json())
        return
    shown = found.table()
    table(shown.columns, shown.rows)
    click.echo(f"{len(found.blocks)} blocks, {found.rows} rows, {found.passes} forward passes")
    for note in found.notes:
        click.echo(f"note: {note}")
