"""`grsd protocol` and `grsd experiment`: what a chapter shows, measured piece by piece."""

from __future__ import annotations

from dataclasses import asdict, replace

import click

from grsd import results as stored
from grsd.cli import common
from grsd.cli.common import emit, main, table
from grsd.scale import device

PROTOCOL_EXAMPLES = """\b
Examples:
  grsd protocol mini
  grsd protocol pythia-shapes --output pythia-shapes.json
  grsd protocol pythia --small
"""
EXPERIMENT_EXAMPLES = (
    "\b\nExamples:\n  grsd experiment\n  grsd experiment drift --option target=wave "
    "--option sizes=64,128 --option seeds=3\n"
)
OPTION = "A parameter, as NAME=VALUE; several values between commas."


@main.command(epilog=PROTOCOL_EXAMPLES)
@click.argument("name")
@click.option("--small", is_flag=True, help="The small form of a protocol that has one (pythia).")
@common.resume_option("batches")
@common.file_option("--output", "Store the cells as a result (.json), with provenance.")
@common.json_option
def protocol(name: str, small: bool, resume: bool, output: str | None, as_json: bool) -> None:
    """Train and measure what a chapter shows: `mini` (minutes on two cores),
    `pythia-shapes` (hours on a small GPU), or `pythia`: the paper's own checkpoints, from the hub.

    Every net, checkpoint, batch size and null model of the protocol becomes one averaged profile.
    What was measured before is read from the cache, so a run that was stopped goes on where it was.
    """
    from grsd.checks import one_of
    from grsd.experiments import protocol as protocols

    name = f"{name}-small" if small else name
    asked = protocols.PROTOCOLS[one_of("protocol", name, protocols.PROTOCOLS)]
    if asked.published:
        asked = replace(asked, device=device())
    target = common.output_file(output)
    with common.bar("training") as update:
        protocols.train(asked, progress=common.losses(update))
    with common.bar(name) as update:
        cells = protocols.measure(asked, resume=resume, progress=update)
    training, profiles = protocols.curves(asked), [cell.to_json() for cell in cells]
    data = {"protocol": asdict(asked), "training": training, "cells": profiles}
    origin = stored.provenance(["protocol", name], asdict(asked), [asked.seed])
    common.keep(target, lambda id: stored.Result(id, data, origin))
    if as_json:
        emit(data)
    else:
        table(*protocols.table(cells))


@main.command(epilog=EXPERIMENT_EXAMPLES)
@click.argument("name", required=False)
@click.option("--option", "options", multiple=True, help=OPTION)
@common.resume_option("pieces")
@common.file_option("--output", "Store the result (.json), with provenance.")
@common.json_option
def experiment(
    name: str | None, options: tuple[str, ...], resume: bool, output: str | None, as_json: bool
) -> None:
    """Run experiment NAME, piece by piece; without a name, list the experiments and their options.

    Every piece is stored when it is done, so a run that was stopped goes on where it was.
    GRSD_SCALE=gpu enlarges the sizes.
    """
    from grsd.experiments import engine

    if name is None:
        every = {key: engine.find(key) for key in engine.NAMES}
        defaults = {key: asdict(engine.parameters(one)) for key, one in every.items()}
        if as_json:
            emit({"experiments": defaults})
            return
        for key, one in every.items():
            click.echo(f"{key}: {one.summary}")
            table(["option", "value"], [[k, str(v)] for k, v in defaults[key].items()])
        return
    chosen = engine.find(name)
    asked, target = engine.parameters(chosen, options), common.output_file(output)
    with common.bar(name) as update:
        outcome = engine.run(chosen, asked, resume=resume, progress=update)
    common.keep(target, outcome.result)
    if as_json:
        emit(outcome.data)
    else:
        table(*chosen.table(outcome.data))
