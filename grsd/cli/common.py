"""What the commands share: failures, options, JSON and tables, progress, files to write.

A failure is one sentence on stderr and exit code 2; that of the package itself says so.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from grsd import __version__
from grsd import results as stored
from grsd.scale import cache_dir, device

FAILURES = (ValueError, TypeError, RuntimeError, OSError, MemoryError, ArithmeticError, ImportError)
Command = TypeVar("Command", bound=Callable[..., Any])
Progress = Callable[[int, int, str], None]  # (done, in all, what)
RESUMED = ("shells", "suite", "protocol", "experiment")  # these keep what they have finished
TICK = 30.0  # seconds between lines of progress, while something gets done
PATIENCE = 120.0  # the same, while nothing does
DRAFT = object()  # the context's object of a command whose result another one reads and deletes
FOUND = 0.05  # seconds; a piece that took less was found, and says nothing of the others


class Group(click.Group):
    """Failures are one sentence on stderr and exit code 2, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # both are RuntimeErrors
            raise
        except click.UsageError as error:
            if "extra argument" not in error.message:
                raise
            # a pattern that the shell has expanded
            hint = f"{error.message}; a pattern such as 'notes/*.txt' must stand in quotes"
            raise click.UsageError(hint, error.ctx) from None
        except KeyboardInterrupt:
            kept = "what was finished is kept: the same command goes on from there"
            nothing = "this command keeps nothing of an unfinished run"
            say(f"grsd: stopped; {kept if ctx.invoked_subcommand in RESUMED else nothing}")
            ctx.exit(130)
        except Exception as error:
            if ctx.find_root().params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            sentence = " ".join(_said(error).split()) or type(error).__name__
            if not isinstance(error, FAILURES):
                where = "this is a fault of grsd or of the model's code; grsd --debug ... shows it"
                sentence = f"{type(error).__name__}: {sentence} ({where})"
            click.echo(f"grsd: {sentence}", err=True)
            ctx.exit(2)


def _said(error: BaseException) -> str:
    """The failure in words; of the system's own with the file and, in our folder, what to do."""
    if not isinstance(error, OSError) or not error.strerror or not error.filename:
        return str(error)
    ours = str(error.filename).startswith(str(cache_dir()))
    advice = "; set GRSD_CACHE to a folder that can be written" if ours else ""
    return f"cannot use {error.filename}: {error.strerror}{advice}"


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(__version__, prog_name="grsd")
def main(debug: bool) -> None:
    """Where the error of a network lives in the spectrum of its tangent kernel.

    Start with `grsd doctor`, then `grsd shells mini-0.4m`. Every command takes --json; files go to
    the folder named by GRSD_CACHE (default ~/.cache/grsd).
    """


def shown(name: str, default: Any, help: str, **options: Any) -> Callable[[Command], Command]:
    """An option whose default stands in its help."""
    return click.option(name, default=default, show_default=True, help=help, **options)


JSON = "Print one JSON object on stdout."
REVISION = "Checkpoint, e.g. step512; repeat, or 'all' [the last]."
SPLIT = "Part of the corpus [heldout if embedded]."
json_option = click.option("--json", "as_json", is_flag=True, help=JSON)
device_option = shown("--device", "auto", "cpu, cuda, cuda:1, ...")
revisions_option = click.option("--revision", "revisions", multiple=True, help=REVISION)
split_option = click.option("--split", type=click.Choice(["train", "heldout", "all"]), help=SPLIT)


def file_option(name: str, help: str) -> Callable[[Command], Command]:
    return click.option(name, type=click.Path(dir_okay=False), help=help)


def resume_option(what: str) -> Callable[[Command], Command]:
    return shown("--resume/--no-resume", True, f"Use {what} that were measured before.")


def seed_option(of: str) -> Callable[[Command], Command]:
    return shown("--seed", 0, f"Of {of}.", type=click.IntRange(0))


def emit(value: Any) -> None:
    click.echo(stored.dumps(value), nl=False)


def say(text: str) -> None:
    click.echo(text, err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from grsd.figures import Table

    click.echo(str(Table(columns, rows)))


def leading(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before every text, such as Gemma's ``<bos>``; mostly none."""
    if tokenizer is None:
        return []
    marked, plain = (tokenizer.encode("a", add_special_tokens=flag) for flag in (True, False))
    return marked[: marked.index(plain[0])] if plain and plain[0] in marked else []


class Lines:
    """Progress where there is no terminal: lines of counts, and when the rest will be done."""

    def __init__(self, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.label, self.clock = label, clock
        self.begun = self.last = self.said = clock()
        self.done = self.total = self.new = 0
        self.measured, self.spent, self.note = 0, 0.0, ""

    def update(self, done: int, total: int, note: str) -> None:
        first, now = self.total == 0, self.clock()
        if done > self.done and now - self.last > FOUND:
            self.measured += done - self.done
            self.spent += now - self.last
        self.new += done > self.done
        self.done, self.total, self.note, self.last = done, total, note, now
        if first:
            self.begun = now
            self.say(now)

    def tick(self) -> None:
        """Say a line when something was done, or nothing was said for long."""
        now = self.clock()
        if self.total and (self.new or now - self.said >= PATIENCE):
            self.say(now)

    def say(self, now: float) -> None:
        left = ""
        if self.measured and self.done < self.total:
            each = self.spent / self.measured
            left = f", about {duration(each * (self.total - self.done))} left"
        passed = f" after {duration(now - self.begun)}{left}" if now > self.begun else ""
        say(f"{self.label}: {self.done} of {self.total}{passed} ({self.note})")
        self.said, self.new = now, 0


def duration(seconds: float) -> str:
    """Seconds in words, to two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def bar(label: str, quiet: bool = False) -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, shown at step 0 or after a second; lines elsewhere.

    Of lines there is one at the start, then at most one each half minute.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    steps: Any = tqdm(
        desc=label, file=sys.stderr, disable=quiet or not terminal, delay=1.0, leave=False
    )
    lines, ended = Lines(label), threading.Event()

    def update(done: int, total: int, note: str) -> None:
        if not (quiet or terminal):
            lines.update(done, total, note)
        steps.total = total
        steps.set_postfix_str(note, refresh=False)
        steps.update(done - steps.n)
        if done == 0:
            steps.refresh()

    # a thread speaks while one piece takes long
    def watch() -> None:
        while not ended.wait(TICK):
            steps.refresh()
            lines.tick()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield update
    finally:
        ended.set()
        steps.close()


def losses(update: Progress) -> Callable[[int, int, float], None]:
    """What a training calls with (step, steps, loss), for a bar."""
    return lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}")


def device_of(name: str) -> str:
    return device() if name == "auto" else name


def output_file(output: str | None) -> Path | None:
    """The file of --output, refused before the work if it could not be written."""
    if output is None:
        return None
    path = _target("--output", output, [".json"])
    stored.check_id(path.stem)
    return path


def keep(target: Path | None, make: Callable[[str], stored.Result]) -> None:
    """Store the result that is made of the id it gets; without a file to write, do nothing."""
    if target is not None:
        stored.save(make(target.stem), target.absolute().parent)
        if click.get_current_context().find_root().obj is not DRAFT:
            say(f"wrote {target}")


def check_png(png: str | None) -> None:
    """Refuse a picture that could not be written, before the work."""
    if png is not None:
        _target("--png", png, [".png", ".PNG"])


def _target(option: str, name: str, suffixes: Sequence[str]) -> Path:
    path, folder = Path(name), Path(name).absolute().parent
    if path.suffix not in suffixes:
        raise ValueError(f"{option} {name} must end in {suffixes[0]}")
    if not folder.is_dir():
        raise ValueError(f"{option} {name}: the folder {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        why = "no permission; name a file in another folder"
        raise ValueError(f"{option} {path} cannot be written: {why}")
    return path
