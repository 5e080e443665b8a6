"""`grsd claims` and `grsd results`: the verdicts, and the stored results behind the figures."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from grsd import results as stored
from grsd.claims import VERDICTS, Claim
from grsd.cli import common
from grsd.cli.common import emit, json_option, main, table
from grsd.cli.plain import plain

MADE_BY = ("shells", "protocol", "experiment")  # commands that `recompute` can run
QUICK = 60  # seconds
SAME = 1e-4  # ten units of the last of five digits


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
    """Stored results: list them, show one, compute one again, or all that are quick."""


@results.command("list")
@json_option
def list_results(as_json: bool) -> None:
    """List the results that ship with the package, and how long each took."""
    every = [stored.load(name) for name in stored.available()]
    if as_json:
        keys = ("command", "date")
        emit({"results": [{"id": r.id, **{k: r.provenance[k] for k in keys}} for r in every]})
        return
    rows = [[r.id, r.provenance["date"], _seconds(r), _command(r)] for r in every]
    table(["result", "date", "took", "command"], rows)


def _command(result: stored.Result) -> str:
    words = result.provenance["command"]
    return " ".join(words if words[:1] == ["make"] else ["grsd", *words])


def _seconds(result: stored.Result) -> str:
    seconds = result.provenance.get("seconds")
    return "not timed" if seconds is None else common.duration(seconds)


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
    click.echo(f"made {origin['date']} at revision {origin['revision']}; took {_seconds(result)}")
    click.echo(json.dumps(result.data, indent=1, ensure_ascii=False))


@results.command("manifest")
def write_manifest() -> None:
    """Write the manifest of the results that ship: SHA-256, command, revision and duration."""
    path = stored.packaged_dir().parent / stored.MANIFEST
    stored.atomic_write(path, stored.dumps(stored.manifest()))
    click.echo(f"{stored.MANIFEST}: {len(stored.manifest())} results")


def _again(old: stored.Result) -> tuple[stored.Result, float | None]:
    """Run a result's own command from nothing: the new result, timed, and how far it differs."""
    argv = list(old.provenance["command"])
    if not argv or argv[0] not in MADE_BY:
        by = f"not by grsd {', '.join(MADE_BY)}; run that by hand"
        raise ValueError(f"result {old.id!r} is made by {argv!r}, {by}")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"{old.id}.json"
        again = [*argv, "--no-resume", "--output", str(draft)]
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            main.main(again, prog_name="grsd", standalone_mode=False, obj=common.DRAFT)
        if not draft.is_file():  # the failure was reported by the command itself
            click.get_current_context().exit(2)
        new = stored.load(old.id, folder)
    origin = new.provenance | {"seconds": round(time.perf_counter() - begun, 1)}
    difference = stored.largest_difference(old.data, new.data)
    return stored.Result(old.id, new.data, origin), difference


@results.command("recompute")
@click.argument("id")
@common.file_option("--output", "Where to write the new result (.json) [nowhere].")
@json_option
def recompute(id: str, output: str | None, as_json: bool) -> None:
    """Run the command of result ID again and say how far the numbers differ."""
    target = common.output_file(output)
    new, difference = _again(stored.load(id))
    common.keep(target, lambda name: stored.Result(name, new.data, new.provenance))
    if as_json:
        said = {"id": id, "command": new.provenance["command"]}
        emit({**said, "largest_relative_difference": difference, "data": new.data})
    elif difference is None:
        click.echo(f"{id}: recomputed, but its shape differs from what is stored")
    else:
        took = f"in {_seconds(new)}; the largest relative difference is {difference:.2g}"
        click.echo(f"{id}: recomputed {took}")


@results.command("verify")
@click.option("--quick", is_flag=True, help=f"Only those that took under {QUICK} s.")
def verify(quick: bool) -> None:
    """Compute every stored result again and compare; exit code 1 if one differs.

    Stored numbers have five digits; a difference above ten units of the last one counts.
    """
    bad = 0
    for old in (stored.load(name) for name in stored.available()):
        seconds = old.provenance.get("seconds")
        late = quick and (seconds is None or seconds >= QUICK)
        if late or old.provenance["command"][0] not in MADE_BY:
            click.echo(f"{old.id}: skipped, made by `{_command(old)}`, {_seconds(old)}")
            continue
        new, difference = _again(old)
        same = difference is not None and difference <= SAME
        bad += not same
        what = "another shape" if difference is None else f"difference {difference:.2g}"
        click.echo(f"{old.id}: {'same' if same else 'DIFFERS'}, {what}, {_seconds(new)}")
    if bad:
        click.get_current_context().exit(1)
