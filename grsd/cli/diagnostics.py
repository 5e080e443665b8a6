"""`grsd conditions`: the conditions of 2512.18209; `grsd model-check`: is a model read rightly."""

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
@shown("--rate", 1.0, "Time of one training step, e.g. its learning rate; counted from step 0.")
@shown("--along", "flow", "Motion of J: gradient flow, or what the checkpoints did.", type=ALONG)
@shown("--probes", 16, "Random output vectors for D1; 0: all rows, exact.", type=click.IntRange(0))
@shown("--rows", 512, "Form T x T matrices (D4 to D7) up to so many rows.", type=click.IntRange(0))
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


@main.command("model-check")
@click.argument("model")
@click.option("--revision", help="Checkpoint, e.g. step512 [the last].")
@shown("--corpus", "embedded", "embedded[:VOCAB], text files, or hub:NAME[...].")
@common.split_option
@shown("--tokens", 1024, "The first so many of the text, in one window.", type=click.IntRange(2))
@shown("--dtype", "float32", "float32, float64 or bfloat16.")
@common.device_option
@common.json_option
def model_check(
    model: str,
    revision: str | None,
    corpus: str,
    split: str | None,
    tokens: int,
    dtype: str,
    device: str,
    as_json: bool,
) -> None:
    """Say whether MODEL is read as it was trained: its loss on a text, and how it goes on.

    The loss is in nats per token, beside log V, that of a model that knows nothing. A wrong
    tokenizer, a wrong permutation or a wrong setting shows in both. What the tokenizer puts before
    a text (Gemma's <bos>) stands before this one.
    """
    import math

    import torch

    from grsd.checks import one_of
    from grsd.lab.data import corpora
    from grsd.lab.runs.record import DTYPES

    # the window, at most as long as the text and the context
    where = common.device_of(device)
    opened, _ = prepared(model, [revision] if revision else [], where)
    checkpoint = opened.checkpoint(revision)
    loaded = checkpoint.load(DTYPES[one_of("dtype", dtype, DTYPES)], where)
    text = corpora.open_corpus(corpus, loaded.tokenizer)
    window = text.part(split or corpora.default_split(corpus))[:tokens]
    loaded.check_fit(text, len(window))
    before = common.leading(loaded.tokenizer)
    ids = torch.tensor([*before, *window.tolist()], device=where)[None]

    # its loss, and 24 tokens that follow the first 16
    net: Any = loaded.model
    with torch.no_grad():
        rows = net(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
        nats = float(torch.nn.functional.cross_entropy(rows, ids[0, 1:]))
        begun = ids[:, : len(before) + min(16, len(window))]
        for _ in range(24):
            row = net(input_ids=begun, use_cache=False).logits[:, -1:]
            begun = torch.cat([begun, row.argmax(-1)], 1)
    found = {"model": model, "revision": checkpoint.revision, **checkpoint.provenance()}
    found |= {"parameters": sum(p.numel() for p in net.parameters()), "tokens": len(window)}
    found |= {"nats": nats, "uniform": math.log(loaded.vocab_size), "before": before}
    found["text"] = text.tokenizer.decode(begun[0].tolist())
    if as_json:
        emit(found)
        return
    stored = ", ".join(f"{count} {kind}" for kind, count in sorted(found["tensors"].items()))
    click.echo(f"{model} {found['revision']}: {found['parameters']:,} parameters ({stored})")
    click.echo(
        f"{nats:.4f} nats per token on the first {len(window)} tokens of {corpus}, "
        f"where no knowledge has {found['uniform']:.2f}"
        + (f"; before them {text.tokenizer.decode(before)}" if before else "")
    )
    click.echo(f"greedy, after 16 tokens: {found['text']!r}")
