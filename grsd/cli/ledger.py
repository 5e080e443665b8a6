"""`grsd claims` and `grsd results`: the verdicts, and the stored results behind the figures."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from grsd import results as stored
from grsd.claims import VERDICTS, Claim
from grsd.cli import common
from grsd.cli.common import emit, json_option, main, table
from grsd.cli.plain import plain


@main.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--paper", help="origin, renorm, mup, or grsd for this book's own.")
@click.option("--verdict", help="holds, corrected, refuted, not-discriminating, ...")
@click.option("--missing", is_flag=True, help="Only claims whose evidence no run has recorded yet.")
@json_option
def claims(
    ids: tuple[str, ...], paper: str | None, verdict: str | None, missing: bool, as_json: bool
) -> None:
    """List the ledger, or show the claims of these IDs in full.

    What the papers state, the verdict, and whether this machine has the evidence."""
    from grsd import claims as ledger
    from grsd.checks import one_of

    if paper is not None:
        one_of("paper", paper, ledger.PAPERS)
    if verdict is not None:
        one_of("verdict", verdict, ledger.VERDICTS)
    listed = ledger.missing() if missing else ledger.load()
    if ids:
        wanted = [ledger.find(id).id for id in ids]  # an unknown one is refused, with near ones
        listed = [claim for claim in listed if claim.id in wanted]
    chosen = [c for c in listed if paper in (None, c.paper) and verdict in (None, c.verdict)]
    recorded = {claim.id: ledger.evidence(claim.id) for claim in chosen}
    if as_json:
        found = {id: asdict(one) if one else None for id, one in recorded.items()}
        emit({"claims": [{**asdict(claim), "evidence": found[claim.id]} for claim in chosen]})
        return
    if ids:
        for claim in chosen:
            click.echo(_card(claim) + "\n")
        return
    rows = []
    for claim in chosen:
        word = ledger.VERDICTS[claim.verdict]
        evidence = "recorded" if recorded[claim.id] else "-"
        where = claim.locator, claim.chapter or "-"
        rows.append([f"{word.symbol} {word.word}", claim.id, *where, evidence])
    table(["verdict", "claim", "where", "chapter", "evidence"], rows)
    click.echo(f"{len(chosen)} claims")


def _card(claim: Claim) -> str:
    """A claim in full, its formulas as Unicode."""
    verdict = VERDICTS[claim.verdict]
    lines = [f"{verdict.symbol} {verdict.word} · {claim.id} · {plain(claim.locator)}"]
    texts = {
        "stated": claim.statement,
        "instead": claim.corrected,
        "why" if claim.verdict == "untested" else "needs": claim.assumption,
        "measured": claim.measured,
        "bound": claim.bound,
        "chapter": claim.chapter,
    }
    for name, text in texts.items():
        if text:
            lead = f"  {name + ':':<10}"
            lines += textwrap.wrap(plain(text), 96, initial_indent=lead, subsequent_indent=" " * 12)
    return "\n".join(lines)


@main.group(cls=click.Group)
def results() -> None:
    """Stored results: list them, show one, compute one again."""


@results.command("list")
@json_option
def list_results(as_json: bool) -> None:
    """List the results that ship with the package."""
    every = [stored.load(name) for name in stored.available()]
    if as_json:
        keys = ("command", "date")
        emit({"results": [{"id": r.id, **{k: r.provenance[k] for k in keys}} for r in every]})
        return
    table(["result", "date", "command"], [[r.id, r.provenance["date"], _command(r)] for r in every])


def _command(result: stored.Result) -> str:
    words = result.provenance["command"]
    return " ".join(words if words[:1] == ["make"] else ["grsd", *words])


@results.command("show")
@click.argument("id")
@json_option
def show(id: str, as_json: bool) -> None:
    """Show result ID: its data and where it came from."""
    result = stored.load(id)
    if as_json:
        emit(asdict(result))
        return
    origin = result.provenance
    click.echo(f"{result.id}: {_command(result)}")
    click.echo(f"made {origin['date']} at revision {origin['revision']}")
    click.echo(json.dumps(result.data, indent=1, ensure_ascii=False))


@results.command("recompute")
@click.argument("id")
@common.file_option("--output", "Where to write the new result (.json) [nowhere].")
@json_option
def recompute(id: str, output: str | None, as_json: bool) -> None:
    """Run the command of result ID again and say how far the numbers differ."""
    old = stored.load(id)
    argv = list(old.provenance["command"])
    if not argv or argv[0] not in ("shells", "protocol", "experiment"):
        by = "not by grsd shells, protocol or experiment; run that by hand"
        raise ValueError(f"result {id!r} is made by {argv!r}, {by}")
    target = common.output_file(output)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"{old.id}.json"
        again = [*argv, "--no-resume", "--output", str(draft)]
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            main.main(again, prog_name="grsd", standalone_mode=False)
        if not draft.is_file():  # the failure was reported by the command itself
            click.get_current_context().exit(2)
        new = stored.load(old.id, folder)
    difference = stored.largest_difference(old.data, new.data)
    common.keep(target, lambda name: stored.Result(name, new.data, new.provenance))
    if as_json:
        said = {"id": id, "command": argv, "largest_relative_difference": difference}
        emit({**said, "data": new.data})
    elif difference is None:
        click.echo(f"{id}: recomputed, but its shape differs from what is stored")
    else:
        click.echo(f"{id}: recomputed; the largest relative difference is {difference:.2g}")
