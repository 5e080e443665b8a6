"""What the commands share: the group and its failures, JSON and tables, progress, devices.

A failure is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from grsd import __version__
from grsd import results as stored

FAILURES = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ArithmeticError, ImportError)


class Group(click.Group):
    """A group whose failures are one sentence on stderr and exit code 2, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # both are RuntimeErrors
            raise
        except FAILURES as error:
            if ctx.find_root().params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            click.echo(f"grsd: {text}", err=True)
            ctx.exit(2)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(__version__, prog_name="grsd")
def main(debug: bool) -> None:
    """Where the error of a network lives in the spectrum of its tangent kernel.

    Start with `grsd doctor`, then `grsd shells mini-0.4m`. Every command takes --json; files go to the folder
    named by GRSD_CACHE (default ~/.cache/grsd).
    """


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def emit(value: Any) -> None:
    click.echo(stored.dumps(value), nl=False)


def say(text: str) -> None:
    click.echo(text, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from grsd.lab.reports import table as lines_of

    for line in lines_of(columns, rows):
        click.echo(line)


@contextmanager
def bar(label: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on an interactive stderr, shown at step 0 or after a second; otherwise nothing."""
    from tqdm import tqdm

    shown: Any = tqdm(desc=label, file=sys.stderr, disable=quiet or not sys.stderr.isatty(), delay=1.0, leave=False)

    def update(done: int, total: int, note: str) -> None:
        shown.total = total
        shown.set_postfix_str(note, refresh=False)
        shown.update(done - shown.n)
        if done == 0:
            shown.refresh()

    try:
        yield update
    finally:
        shown.close()


def device_of(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def output_id(output: str) -> str:
    path = Path(output)
    if path.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json")
    return stored.check_id(path.stem)
