"""`grsd protocol` and `grsd experiment`: what a chapter shows, measured piece by piece."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from grsd import results as stored
from grsd.cli.common import bar, emit, json_option, main, output_id, say, table


@main.command(
    epilog="\b\nExamples:\n  grsd protocol mini\n  grsd protocol pythia-shapes --output pythia-shapes.json\n"
)
@click.argument("name")
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Use batches that were measured before.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Store the cells as a result (.json), with provenance.",
)
@json_option
def protocol(name: str, resume: bool, output: str | None, as_json: bool) -> None:
    """Train and measure what a chapter shows: `mini` (minutes on two cores) or `pythia-shapes` (a GPU, half an hour).

    Every net, checkpoint, batch size and null model of the protocol becomes one averaged profile. What was measured
    before is read from the cache, so a run that was stopped goes on where it was.
    """
    from grsd.experiments import protocol as rooms

    if name not in rooms.PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: expected one of {', '.join(rooms.PROTOCOLS)}")
    asked = rooms.PROTOCOLS[name]
    target = output_id(output) if output else None
    with bar("training") as update:
        rooms.train(
            asked, progress=lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}")
        )
    with bar(name) as update:
        cells = rooms.measure(asked, resume=resume, progress=update)
    data = {
        "protocol": asdict(asked),
        "training": rooms.curves(asked),
        "cells": [c.to_json() for c in cells],
    }
    if output and target:
        origin = stored.provenance(["protocol", name], asdict(asked), [asked.seed])
        stored.save(stored.Result(target, data, origin), Path(output).absolute().parent)
        say(f"wrote {output}")
    if as_json:
        emit(data)
        return
    table(*rooms.table(cells))


@main.command(
    epilog="\b\nExamples:\n  grsd experiment\n  grsd experiment drift --option target=wave --option sizes=64,128 "
    "--option seeds=3\n"
)
@click.argument("name", required=False)
@click.option(
    "--option",
    "options",
    multiple=True,
    help="A parameter, as NAME=VALUE; several values between commas.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Use pieces that were measured before.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False), help="Store the result (.json), with provenance."
)
@json_option
def experiment(
    name: str | None, options: tuple[str, ...], resume: bool, output: str | None, as_json: bool
) -> None:
    """Run experiment NAME, piece by piece; without a name, list the experiments and their options.

    Every piece is stored when it is done, so a run that was stopped goes on where it was. GRSD_SCALE=gpu enlarges the sizes.
    """
    from grsd.experiments import engine

    if name is None:
        found = {key: engine.find(key) for key in engine.NAMES}
        if as_json:
            emit({"experiments": {k: asdict(engine.parameters(e)) for k, e in found.items()}})
            return
        for key, one in found.items():
            click.echo(f"{key}: {one.summary}")
            table(["option", "value"], [[k, v] for k, v in asdict(engine.parameters(one)).items()])
        return
    chosen = engine.find(name)
    asked = engine.parameters(chosen, options)
    target = output_id(output) if output else None
    with bar(name) as update:
        outcome = engine.run(chosen, asked, resume=resume, progress=update)
    if output and target:
        stored.save(outcome.result(target), Path(output).absolute().parent)
        say(f"wrote {output}")
    if as_json:
        emit(outcome.data)
        return
    table(*chosen.table(outcome.data))
