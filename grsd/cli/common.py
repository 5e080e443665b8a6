"""What the commands share: the group and its failures, JSON and tables, progress, devices.

A failure is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import os
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
        except click.UsageError as error:
            if "extra argument" not in error.message:
                raise
            quoted = f"{error.message}; a pattern such as 'notes/*.txt' must stand in quotes"  # or the shell expands it
            raise click.UsageError(quoted, error.ctx) from None
        except FAILURES as error:
            if ctx.find_root().params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            text = " ".join(_said(error).split()) or type(error).__name__
            click.echo(f"grsd: {text}", err=True)
            ctx.exit(2)


def _said(error: BaseException) -> str:
    """The failure in words; the system's own failures with the file and, in our folder, what to do."""
    if not isinstance(error, OSError) or not error.strerror or not error.filename:
        return str(error)
    ours = str(error.filename).startswith(str(stored.cache_dir()))
    return f"cannot use {error.filename}: {error.strerror}" + (
        "; set GRSD_CACHE to a folder that can be written" if ours else ""
    )


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(__version__, prog_name="grsd")
def main(debug: bool) -> None:
    """Where the error of a network lives in the spectrum of its tangent kernel.

    Start with `grsd doctor`, then `grsd shells mini-0.4m`. Every command takes --json; files go to the folder
    named by GRSD_CACHE (default ~/.cache/grsd).
    """


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(
        command
    )


def emit(value: Any) -> None:
    click.echo(stored.dumps(value), nl=False)


def say(text: str) -> None:
    click.echo(text, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from grsd.lab.runs.summary import table as lines_of

    for line in lines_of(columns, rows):
        click.echo(line)


@contextmanager
def bar(label: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on an interactive stderr, shown at step 0 or after a second; otherwise nothing."""
    from tqdm import tqdm

    shown: Any = tqdm(
        desc=label,
        file=sys.stderr,
        disable=quiet or not sys.stderr.isatty(),
        delay=1.0,
        leave=False,
    )

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
    if not (folder := path.absolute().parent).is_dir():
        raise ValueError(f"--output {output}: the folder {folder} does not exist")
    _check_writable("--output", path)
    return stored.check_id(path.stem)


def check_png(png: str | None) -> None:
    """Refuse a picture that could not be written, before the work."""
    if png is None:
        return
    path = Path(png)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {png} does not exist")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--png {png} must end in .png")
    _check_writable("--png", path)


def _check_writable(option: str, path: Path) -> None:
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(
            f"{option} {path} cannot be written: no permission; name a file in another folder"
        )
