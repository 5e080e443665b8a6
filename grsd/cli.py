"""The command line: `grsd doctor`, `suite`, `shells`, `protocol`, `experiment`, `claims`, `results`.

Tables go to stdout, progress and errors to stderr; `--json` turns stdout into one JSON object. A failure is one
sentence and exit code 2. Heavy imports happen inside the commands, so that `grsd doctor` works where torch does not.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

import click

from grsd import __version__, check_environment
from grsd import results as stored
from grsd.scale import cache_dir, evidence_dir, scale

_FAILURES = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ArithmeticError, ImportError)
_EPILOG_SHELLS = """\b
Examples:
  grsd shells mini-0.4m                          last checkpoint, trained first if need be
  grsd shells mini-1.3m --revision step0 --revision step512 --png profile.png
  grsd shells ./my-model --corpus 'notes/*.txt' --steps 50 --batches 3
  grsd shells EleutherAI/pythia-70m --revision step1000 --corpus embedded --json
  torchrun --nproc-per-node 2 -m -- grsd shells mini-1.3m --revision all
"""


class _Group(click.Group):
    """A group whose failures are one sentence on stderr and exit code 2, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # both are RuntimeErrors
            raise
        except _FAILURES as error:
            if ctx.find_root().params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            click.echo(f"grsd: {text}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(__version__, prog_name="grsd")
def main(debug: bool) -> None:
    """Where the error of a network lives in the spectrum of its tangent kernel.

    Start with `grsd doctor`, then `grsd shells mini-0.4m`. Every command takes --json; files go to the folder
    named by GRSD_CACHE (default ~/.cache/grsd).
    """


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def _emit(value: Any) -> None:
    click.echo(stored.dumps(value), nl=False)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from grsd.lab.reports import table

    for line in table(columns, rows):
        click.echo(line)


@contextmanager
def _bar(label: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on an interactive stderr, shown at step 0 or after a second; otherwise nothing."""
    from tqdm import tqdm

    bar: Any = tqdm(desc=label, file=sys.stderr, disable=quiet or not sys.stderr.isatty(), delay=1.0, leave=False)

    def update(done: int, total: int, note: str) -> None:
        bar.total = total
        bar.set_postfix_str(note, refresh=False)
        bar.update(done - bar.n)
        if done == 0:
            bar.refresh()

    try:
        yield update
    finally:
        bar.close()


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@main.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, what is missing, and where files are kept. Needs no network.

    Exit code 1 when a required package is missing or too old.
    """
    wanted = check_environment(verbose=False)
    cache = cache_dir()
    parent = next(p for p in [cache, *cache.parents] if p.exists())
    report: dict[str, Any] = {
        "grsd": __version__,
        "python": platform.python_version(),
        "missing": wanted,
        "scale": scale(),
        "cache": {
            "folder": str(cache),
            "writable": os.access(parent, os.W_OK),
            "free_gb": round(shutil.disk_usage(parent).free / 1e9, 1),
        },
        "evidence": str(evidence_dir()),
        "optional": {"datasets": _version("datasets"), "jupyter-book": _version("jupyter-book")},
        "torch": None,
        "threads": None,
        "devices": [],
        "suites": {},
    }
    if util.find_spec("torch") is not None:
        import torch

        report["torch"] = torch.__version__
        report["threads"] = torch.get_num_threads()
        cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
        report["devices"] = ["cpu", *cuda]
    suites_folder = cache / "suites"
    if suites_folder.is_dir():
        report["suites"] = {
            p.name: len(list(p.glob("step*/config.json"))) for p in sorted(suites_folder.iterdir()) if p.is_dir()
        }
    if as_json:
        _emit(report)
    else:
        place, optional = report["cache"], report["optional"]
        rows = {
            "grsd": report["grsd"],
            "python": report["python"],
            "torch": f"{report['torch']}, {report['threads']} threads" if report["torch"] else "missing",
            "devices": ", ".join(report["devices"]) or "none",
            "scale": f"{report['scale']} (GRSD_SCALE)",
            "cache": f"{place['folder']} ({place['free_gb']} GB free{'' if place['writable'] else ', READ-ONLY'})",
            "suites": ", ".join(f"{k} ({n} checkpoints)" for k, n in report["suites"].items())
            or "none yet: grsd suite",
            "hub corpora": f"datasets {optional['datasets']}" if optional["datasets"] else "no: pip install datasets",
            "book": f"jupyter-book {optional['jupyter-book']}"
            if optional["jupyter-book"]
            else "no: make book installs it",
            "required": "all present" if not wanted else "MISSING " + ", ".join(wanted),
        }
        for name, value in rows.items():
            click.echo(f"{name:<12} {value}")
        if wanted:
            _say("grsd: install what is missing: pip install " + " ".join(f"'{w}'" for w in wanted))
    if wanted:
        click.get_current_context().exit(1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@main.command(epilog="\b\nExamples:\n  grsd suite\n  grsd suite --size mini-0.4m --steps 128\n")
@click.option("--size", "sizes", multiple=True, help="mini-0.4m, mini-1.3m, mini-4.2m; repeat for several [all three].")
@click.option("--steps", default=512, show_default=True, help="Updates; checkpoints at 0, 1, 2, 4, ..., 512, 1000, ...")
@click.option("--corpus", help="embedded[:VOCAB], text files, or hub:NAME[:config[:split]] [of the size].")
@click.option("--batch-size", type=int, default=None, help="Sequences per update [of the size].")
@click.option("--length", default=128, show_default=True, help="Tokens per sequence.")
@click.option("--lr", type=float, default=None, help="Peak learning rate [of the size].")
@click.option("--seed", default=0, show_default=True, help="Of the initial weights and the order of the text.")
@click.option("--schedule", default="constant", show_default=True, help="constant or cosine, after the warm-up.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@_json_option
def suite(
    sizes: tuple[str, ...],
    steps: int,
    corpus: str | None,
    batch_size: int | None,
    length: int,
    lr: float | None,
    seed: int,
    schedule: str,
    device: str,
    as_json: bool,
) -> None:
    """Train the mini-Pythia suite (minutes on two cores), or find it in the cache.

    A run that was stopped goes on where it was.
    """
    from grsd.lab import corpora, hub, suites
    from grsd.lab.reports import number

    names = sizes or ("mini-0.4m", "mini-1.3m", "mini-4.2m")
    for name in names:
        if name not in suites.MINI:
            raise ValueError(f"unknown size {name!r}: expected one of {', '.join(suites.MINI)}")
    where = str(hub.check_device(_device(device)))
    recipe: dict[str, Any] = {"length": length, "seed": seed, "schedule": schedule}
    recipe |= {key: value for key, value in (("lr", lr), ("batch_size", batch_size)) if value is not None}
    found = []
    for name in names:
        text = corpora.of_suite(name) if corpus is None else corpora.open_corpus(corpus)
        made = _train(name, text, steps, where, recipe)
        record = made.training()
        found.append(
            {
                "size": name,
                "parameters": made.size.parameters,
                "steps": steps,
                "revisions": list(made.revisions),
                "loss": record["loss"][-1] if record["loss"] else None,
                "corpus": {"name": text.name, "tokens": len(text.tokens)},
                "heldout": record["heldout"].get(made.revisions[-1]),
                "folder": str(made.root),
            }
        )
    if as_json:
        _emit({"suites": found})
        return
    columns = ["size", "parameters", "checkpoints", "loss", "held-out", "folder"]
    rows = [
        [f["size"], f["parameters"], len(f["revisions"]), number(f["loss"]), number(f["heldout"]), f["folder"]]
        for f in found
    ]
    _table(columns, rows)


def _train(name: str, text: Any, steps: int, device: str, recipe: dict[str, Any]) -> Any:
    from grsd.lab import suites

    ready = suites.locate(name, text, steps=steps, **recipe)
    if not ready.complete:
        _say(f"training {name} for {steps} steps on {device}")
    with _bar(name) as update:

        def progress(step: int, of: int, loss: float) -> None:
            update(step, of, f"loss {loss:.3f}")

        return suites.train(name, text, steps=steps, device=device, progress=progress, **recipe)


@main.command(epilog=_EPILOG_SHELLS)
@click.argument("model")
@click.option("--revision", "revisions", multiple=True, help="Checkpoint, e.g. step512; repeat, or 'all' [the last].")
@click.option(
    "--corpus",
    default="embedded",
    show_default=True,
    help="embedded[:VOCAB], text files, or hub:NAME[:config[:split]].",
)
@click.option(
    "--split", type=click.Choice(["train", "heldout", "all"]), help="Part of the corpus [heldout if embedded]."
)
@click.option("--steps", default=100, show_default=True, help="Lanczos steps, at most batch-size x length.")
@click.option("--batches", default=5, show_default=True, help="Independent batches, for the spread.")
@click.option("--batch-size", default=4, show_default=True, help="Sequences per batch.")
@click.option("--length", default=128, show_default=True, help="Tokens per sequence.")
@click.option("--start", "starts", multiple=True, help="error, ones, signs, random; repeat for several [error, ones].")
@click.option("--targets", default="text", show_default=True, help="text, or shuffled (a null model).")
@click.option("--normalize", default="mean", show_default=True, help="mean: J J^T / T; sum: J J^T.")
@click.option("--ratio", default=2.0, show_default=True, help="Width of a shell, as a ratio of eigenvalues.")
@click.option(
    "--range", "span", nargs=2, type=float, default=None, help="Smallest and largest edge [spans all spectra]."
)
@click.option("--seed", default=0, show_default=True, help="Of the batches and the random vectors.")
@click.option("--dtype", default="float32", show_default=True, help="float32, float64 or bfloat16.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--memory", metavar="SIZE", help="Budget of batches in lock-step, e.g. 4G [512M; most of a GPU]; 0: no lock-step."
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use batches that were measured before.")
@click.option("--png", type=click.Path(dir_okay=False), help="Draw the profiles into this file.")
@click.option(
    "--output", type=click.Path(dir_okay=False), help="Write the result with its provenance to this .json file."
)
@_json_option
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
    the hub; weights are read from safetensors only. A run that was stopped goes on where it was. Several batches go
    through the network together as far as --memory lets them. Started by torchrun, the processes share batches and
    checkpoints (each its own GPU) and need one cache folder; the first of them prints.
    """
    from grsd.lab import hub, measuring, ranks, reports, runs
    from grsd.spectrum import LogShells

    target = _output_id(output) if output else None
    spec = runs.RunSpec(
        model,
        tuple(r for r in revisions if r != "all"),
        corpus,
        starts=starts or ("error", "ones"),
        split=split,
        device=_device(device),
        **numbers,
    )
    if png and not Path(png).absolute().parent.is_dir():
        raise ValueError(f"the folder of {png} does not exist")
    given = LogShells.spanning(*span, ratio=ratio) if span else None
    if given is None:
        LogShells.spanning(1.0, 1.0, ratio=ratio)  # refuse a bad ratio before the work
    budget = None if memory is None else measuring.bytes_of(memory)
    world = ranks.Ranks.join()
    world.from_first(lambda: _prepare(model, revisions, spec.device))
    if "all" in revisions:
        every = tuple(hub.available(model))
        spec = runs.RunSpec(**{**asdict(spec), "revisions": every})
    with _bar("shells", quiet=world.rank > 0) as update:
        update(0, max(1, len(spec.revisions)) * spec.batches, "first batch")
        run = runs.shell_run(spec, resume=resume, progress=update, memory=budget, ranks=world)
    if world.rank > 0:
        return
    if run.group is not None:
        _say(str(run.group))
    edges = given or run.common_shells(ratio)
    data = reports.summary(run, edges)
    if png:
        reports.draw(run, edges, png)
        _say(f"wrote {png}")
    if output and target:
        extra = ["--ratio", str(ratio), *(["--range", str(span[0]), str(span[1])] if span else [])]
        origin = stored.provenance([*spec.argv(), *extra], asdict(spec), [spec.seed])
        stored.save(stored.Result(target, data, origin), Path(output).absolute().parent)
        _say(f"wrote {output}")
    if as_json:
        _emit(data)
    else:
        click.echo(reports.text(data))


@main.command(epilog="\b\nExamples:\n  grsd protocol mini\n  grsd protocol pythia-shapes --output pythia-shapes.json\n")
@click.argument("name")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use batches that were measured before.")
@click.option("--output", type=click.Path(dir_okay=False), help="Store the cells as a result (.json), with provenance.")
@_json_option
def protocol(name: str, resume: bool, output: str | None, as_json: bool) -> None:
    """Train and measure what a chapter shows: `mini` (minutes on two cores) or `pythia-shapes` (a GPU, half an hour).

    Every net, checkpoint, batch size and null model of the protocol becomes one averaged profile. What was measured
    before is read from the cache, so a run that was stopped goes on where it was.
    """
    from grsd.lab import protocol as rooms

    if name not in rooms.PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}: expected one of {', '.join(rooms.PROTOCOLS)}")
    asked = rooms.PROTOCOLS[name]
    target = _output_id(output) if output else None
    with _bar("training") as update:
        rooms.train(asked, progress=lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}"))
    with _bar(name) as update:
        cells = rooms.measure(asked, resume=resume, progress=update)
    data = {"protocol": asdict(asked), "training": rooms.curves(asked), "cells": [c.to_json() for c in cells]}
    if output and target:
        origin = stored.provenance(["protocol", name], asdict(asked), [asked.seed])
        stored.save(stored.Result(target, data, origin), Path(output).absolute().parent)
        _say(f"wrote {output}")
    if as_json:
        _emit(data)
        return
    _table(*rooms.table(cells))


@main.command(
    epilog="\b\nExamples:\n  grsd experiment\n  grsd experiment drift --option target=wave --option sizes=64,128 "
    "--option seeds=3\n"
)
@click.argument("name", required=False)
@click.option("--option", "options", multiple=True, help="A parameter, as NAME=VALUE; several values between commas.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Use pieces that were measured before.")
@click.option("--output", type=click.Path(dir_okay=False), help="Store the result (.json), with provenance.")
@_json_option
def experiment(name: str | None, options: tuple[str, ...], resume: bool, output: str | None, as_json: bool) -> None:
    """Run experiment NAME, piece by piece; without a name, list the experiments and their options.

    Every piece is stored when it is done, so a run that was stopped goes on where it was. GRSD_SCALE=gpu enlarges the sizes.
    """
    from grsd.lab import experiments

    if name is None:
        found = {key: experiments.find(key) for key in experiments.MODULES}
        if as_json:
            _emit({"experiments": {k: asdict(experiments.parameters(e)) for k, e in found.items()}})
            return
        for key, one in found.items():
            click.echo(f"{key}: {one.summary}")
            _table(["option", "value"], [[k, v] for k, v in asdict(experiments.parameters(one)).items()])
        return
    chosen = experiments.find(name)
    asked = experiments.parameters(chosen, options)
    target = _output_id(output) if output else None
    with _bar(name) as update:
        outcome = experiments.run(chosen, asked, resume=resume, progress=update)
    if output and target:
        stored.save(outcome.result(target), Path(output).absolute().parent)
        _say(f"wrote {output}")
    if as_json:
        _emit(outcome.data)
        return
    _table(*chosen.table(outcome.data))


def _output_id(output: str) -> str:
    path = Path(output)
    if path.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json")
    return stored.check_id(path.stem)


def _prepare(model: str, revisions: Sequence[str], device: str) -> None:
    """Train a mini suite that is asked for and not there yet."""
    from grsd.lab import corpora, hub, suites

    if model in suites.MINI:
        text = corpora.of_suite(model)
        made = suites.locate(model, text)
        have = set(hub.revisions_in(made.root))
        asked = set(made.revisions) if not revisions or "all" in revisions else set(revisions)
        if not asked <= have and not made.complete:
            _train(model, text, made.steps, device, {})


@main.command()
@click.option("--paper", help="origin, renorm, mup, or grsd for this book's own.")
@click.option("--verdict", help="holds, corrected, refuted, not-discriminating, ...")
@click.option("--missing", is_flag=True, help="Only claims whose evidence no run has recorded yet.")
@_json_option
def claims(paper: str | None, verdict: str | None, missing: bool, as_json: bool) -> None:
    """List the ledger: what the papers state, the verdict, and whether this machine has the evidence."""
    from grsd import claims as ledger

    if paper is not None and paper not in ledger.PAPERS:
        raise ValueError(f"unknown paper {paper!r}: expected one of {', '.join(ledger.PAPERS)}")
    if verdict is not None and verdict not in ledger.VERDICTS:
        raise ValueError(f"unknown verdict {verdict!r}: expected one of {', '.join(ledger.VERDICTS)}")
    listed = ledger.missing() if missing else ledger.load()
    chosen = [c for c in listed if paper in (None, c.paper) and verdict in (None, c.verdict)]
    recorded = {c.id: ledger.evidence(c.id) for c in chosen}
    if as_json:
        found = [{**asdict(c), "evidence": asdict(e) if (e := recorded[c.id]) else None} for c in chosen]
        _emit({"claims": found})
        return
    rows = []
    for claim in chosen:
        shown = ledger.VERDICTS[claim.verdict]
        evidence = "recorded" if recorded[claim.id] else "-"
        rows.append([f"{shown.symbol} {shown.word}", claim.id, claim.locator, claim.chapter or "-", evidence])
    _table(["verdict", "claim", "where", "chapter", "evidence"], rows)
    click.echo(f"{len(chosen)} claims")


@main.group(cls=click.Group)
def results() -> None:
    """Stored results: list them, show one, compute one again."""


@results.command("list")
@_json_option
def list_results(as_json: bool) -> None:
    """List the results that ship with the package."""
    found = [stored.load(name) for name in stored.available()]
    if as_json:
        _emit({"results": [{"id": r.id, **{k: r.provenance[k] for k in ("command", "date")}} for r in found]})
        return
    _table(["result", "date", "command"], [[r.id, r.provenance["date"], _command(r)] for r in found])


def _command(result: stored.Result) -> str:
    words = result.provenance["command"]
    return " ".join(words if words[:1] == ["make"] else ["grsd", *words])


@results.command("show")
@click.argument("id")
@_json_option
def show(id: str, as_json: bool) -> None:
    """Show result ID: its data and where it came from."""
    found = stored.load(id)
    if as_json:
        _emit(asdict(found))
        return
    origin = found.provenance
    click.echo(f"{found.id}: {_command(found)}\nmade {origin['date']} at revision {origin['revision']}")
    click.echo(json.dumps(found.data, indent=1, ensure_ascii=False))


@results.command("recompute")
@click.argument("id")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to write the new result (.json) [nowhere].")
@_json_option
def recompute(id: str, output: str | None, as_json: bool) -> None:
    """Run the command of result ID again and say how far the numbers differ."""
    old = stored.load(id)
    argv = list(old.provenance["command"])
    if not argv or argv[0] not in ("shells", "protocol", "experiment"):
        raise ValueError(
            f"result {id!r} is made by {argv!r}, not by grsd shells, protocol or experiment; run that by hand"
        )
    if output is not None:
        _output_id(output)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / f"{old.id}.json"
        with open(os.devnull, "w") as quiet, _stdout(quiet):
            main.main([*argv, "--no-resume", "--output", str(draft)], prog_name="grsd", standalone_mode=False)
        if not draft.is_file():  # the failure was reported by the command itself
            click.get_current_context().exit(2)
        new = stored.load(old.id, folder)
    difference = stored.largest_difference(old.data, new.data)
    if output is not None:
        stored.save(stored.Result(_output_id(output), new.data, new.provenance), Path(output).absolute().parent)
    if as_json:
        _emit({"id": id, "command": argv, "largest_relative_difference": difference, "data": new.data})
    elif difference is None:
        click.echo(f"{id}: recomputed, but its shape differs from what is stored")
    else:
        click.echo(f"{id}: recomputed; the largest relative difference is {difference:.2g}")


@contextmanager
def _stdout(stream: Any) -> Iterator[None]:
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before
