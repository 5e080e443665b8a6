"""`grsd shells`: how the error of a model spreads over the spectrum of its tangent kernel."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from grsd import results as stored
from grsd.cli.common import bar, check_png, device_of, emit, json_option, main, output_id, say
from grsd.cli.training import prepare

EPILOG = """\b
Examples:
  grsd shells mini-0.4m                          last checkpoint, trained first if need be
  grsd shells mini-1.3m --revision step0 --revision step512 --png profile.png
  grsd shells ./my-model --corpus 'notes/*.txt' --steps 50 --batches 3
  grsd shells EleutherAI/pythia-70m --revision step1000 --corpus embedded --json
  torchrun --nproc-per-node 2 -m -- grsd shells mini-1.3m --revision all
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
    help="embedded[:VOCAB], text files, or hub:NAME[:config[:split]].",
)
@click.option(
    "--split",
    type=click.Choice(["train", "heldout", "all"]),
    help="Part of the corpus [heldout if embedded].",
)
@click.option(
    "--steps", default=100, show_default=True, help="Lanczos steps, at most batch-size x length."
)
@click.option(
    "--batches", default=5, show_default=True, help="Independent batches, for the spread."
)
@click.option("--batch-size", default=4, show_default=True, help="Sequences per batch.")
@click.option("--length", default=128, show_default=True, help="Tokens per sequence.")
@click.option(
    "--start",
    "starts",
    multiple=True,
    help="error, ones, signs, random; repeat for several [error, ones].",
)
@click.option(
    "--targets", default="text", show_default=True, help="text, or shuffled (a null model)."
)
@click.option("--normalize", default="mean", show_default=True, help="mean: J J^T / T; sum: J J^T.")
@click.option(
    "--ratio", default=2.0, show_default=True, help="Width of a shell, as a ratio of eigenvalues."
)
@click.option(
    "--range",
    "span",
    nargs=2,
    type=float,
    default=None,
    metavar="LOW HIGH",
    help="Smallest and largest edge, as eigenvalues [spans all spectra].",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the batches and the random vectors.",
)
@click.option("--dtype", default="float32", show_default=True, help="float32, float64 or bfloat16.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory beyond the weights for batches in lock-step, e.g. 4G [512M; most of a GPU]; 0: one at a time.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Use batches that were measured before.",
)
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the profiles into this file.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Write the result with its provenance to this .json file.",
)
@json_option
def shells(
    model: str,
    revisions: tuple[str, ...],
    corpus: str,
    split: str | None,
    starts: tuple[str, ...],
    ratio: float,
    span: tuple[float, float] | None,
    device: str,
    memory: str | None,
    resume: bool,
    png: str | None,
    output: str | None,
    as_json: bool,
    **numbers: Any,
) -> None:
    """Measure how the error of MODEL spreads over the spectrum of its tangent kernel.

    MODEL is a mini-suite name, a folder in Hugging Face format (or of one subfolder per revision), or a name on
    the hub; weights are read from safetensors only. The table gives, for each shell of eigenvalues, half the sum of squares of the
    start vector's components per row (for the error: nats squared) with its standard error over the batches, and the bounds that the
    Lanczos steps prove. "Peak" is the shell that holds most, "frontier" the largest eigenvalue that holds any. A run that was stopped goes on where it was. Several batches go
    through the network together as far as --memory lets them. Started by torchrun, the processes share batches and
    checkpoints (each its own GPU) and need one cache folder; the first of them prints.
    """
    from grsd.lab.checkpoints import hub
    from grsd.lab.runs import RunSpec, processes, shell_run, spectra, summary
    from grsd.spectrum import LogShells

    target = output_id(output) if output else None
    spec = RunSpec(
        model,
        tuple(r for r in revisions if r != "all"),
        corpus,
        starts=starts or ("error", "ones"),
        split=split,
        device=device_of(device),
        **numbers,
    )
    check_png(png)
    given = LogShells.spanning(*span, ratio=ratio) if span else None
    if given is None:
        LogShells.spanning(1.0, 1.0, ratio=ratio)  # refuse a bad ratio before the work
    budget = None if memory is None else spectra.bytes_of(memory)
    world = processes.Ranks.join()
    world.from_first(lambda: prepare(model, revisions, spec.device))
    if "all" in revisions:
        every = tuple(hub.available(model))
        spec = RunSpec(**{**asdict(spec), "revisions": every})
    with bar("shells", quiet=world.rank > 0) as update:
        update(0, max(1, len(spec.revisions)) * spec.batches, "first batch")
        run = shell_run(spec, resume=resume, progress=update, memory=budget, ranks=world)
    if world.rank > 0:
        return
    if run.group is not None:
        say(str(run.group))
    edges = given or run.common_shells(ratio)
    data = summary.summary(run, edges)
    if png:
        summary.draw(run, edges, png)
        say(f"wrote {png}")
    if output and target:
        extra = ["--ratio", str(ratio), *(["--range", str(span[0]), str(span[1])] if span else [])]
        origin = stored.provenance([*spec.argv(), *extra], asdict(spec), [spec.seed])
        stored.save(stored.Result(target, data, origin), Path(output).absolute().parent)
        say(f"wrote {output}")
    if as_json:
        emit(data)
    else:
        click.echo(summary.text(data))
