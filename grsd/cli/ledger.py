"""`grsd claims` and `grsd results`: the verdicts, and the stored results behind the figures."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from grsd import results as stored
from grsd.cli.common import emit, json_option, main, output_id, table


@main.command()
@click.option("--paper", help="origin, renorm, mup, or grsd for this book's own.")
@click.option("--verdict", help="holds, corrected, refuted, not-discriminating, ...")
@click.option("--missing", is_flag=True, help="Only claims whose evidence no run has recorded yet.")
@json_option
def claims(paper: str | None, verdict: str | None, missing: bool, as_json: bool) -> None:
    """List the ledger: what the papers state, the verdict, and whether this machine has the evidence."""
    from grsd import claims as ledger

    if paper is not None and paper not in ledger.PAPERS:
        raise ValueError(f"unknown paper {paper!r}: expected one of {', '.join(ledger.PAPERS)}")
    if verdict is not None and verdict not in ledger.VERDICTS:
        raise ValueError(
            f"unknown verdict {verdict!r}: expected one of {', '.join(ledger.VERDICTS)}"
        )
    listed = ledger.missing() if missing else ledger.load()
    chosen = [c for c in listed if paper in (None, c.paper) and verdict in (None, c.verdict)]
    recorded = {c.id: ledger.evidence(c.id) for c in chosen}
    if as_json:
        found = [
            {**asdict(c), "evidence": asdict(e) if (e := recorded[c.id]) else None} for c in chosen
        ]
        emit({"claims": found})
        return
    rows = []
    for claim in chosen:
        shown = ledger.VERDICTS[claim.verdict]
        evidence = "recorded" if recorded[claim.id] else "-"
        rows.append(
            [
                f"{shown.symbol} {shown.word}",
                claim.id,
                claim.locator,
                claim.chapter or "-",
                evidence,
            ]
        )
    table(["verdict", "claim", "where", "chapter", "evidence"], rows)
    click.echo(f"{len(chosen)} claims")


@main.group(cls=click.Group)
def results() -> None:
    """Stored results: list them, show one, compute one again."""


@results.command("list")
@json_option
def list_results(as_json: bool) -> None:
    """List the results that ship with the package."""
    found = [stored.load(name) for name in stored.available()]
    if as_json:
        emit(
            {
                "results": [
                    {"id": r.id, **{k: r.provenance[k] for k in ("command", "date")}} for r in found
                ]
            }
        )
        return
    table(["result", "date", "command"], [[r.id, r.provenance["date"], _command(r)] for r in found])


def _command(result: stored.Result) -> str:
    words = result.provenance["command"]
    return " ".join(words if words[:1] == ["make"] else ["grsd", *words])


@results.command("show")
@click.argument("id")
@json_option
def show(id: str, as_json: bool) -> None:
    """Show result ID: its data and where it came from."""
    found = stored.load(id)
    if as_json:
        emit(asdict(found))
        return
    origin = found.provenance
    click.echo(
        f"{found.id}: {_command(found)}\nmade {origin['date']} at revision {origin['revision']}"
    )
    click.echo(json.dumps(found.data, indent=1, ensure_ascii=False))


@results.command("recompute")
@click.argument("id")
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Where to write the new result (.json) [nowhere].",
)
@json_option
def recompute(id: str, output: str | None, as_json: bool) -> None:
    """Run the command of result ID again and say how far the numbers differ."""
    old = stored.load(id)
    argv = list(old.provenance["command"])
    if not argv or argv[0] not in ("shells", "protocol", "experiment"):
        raise ValueError(
            f"result {id!r} is made by {argv!r}, not by grsd shells, protocol or experiment; run that by hand"
        )
    if output is not None:
        output_id(output)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"{old.id}.json"
        with open(os.devnull, "w") as quiet, redirected(quiet):
            main.main(
                [*argv, "--no-resume", "--output", str(draft)],
                prog_name="grsd",
                standalone_mode=False,
            )
        if not draft.is_file():  # the failure was reported by the command itself
            click.get_current_context().exit(2)
        new = stored.load(old.id, folder)
    difference = stored.largest_difference(old.data, new.data)
    if output is not None:
        stored.save(
            stored.Result(output_id(output), new.data, new.provenance),
            Path(output).absolute().parent,
        )
    if as_json:
        emit(
            {"id": id, "command": argv, "largest_relative_difference": difference, "data": new.data}
        )
    elif difference is None:
        click.echo(f"{id}: recomputed, but its shape differs from what is stored")
    else:
        click.echo(f"{id}: recomputed; the largest relative difference is {difference:.2g}")


@contextmanager
def redirected(stream: Any) -> Iterator[None]:
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before
