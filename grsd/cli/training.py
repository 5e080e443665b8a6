"""`grsd suite`: train the mini-Pythia suite, or find it in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from grsd.cli.common import bar, device_of, emit, json_option, main, say, table


@main.command(epilog="\b\nExamples:\n  grsd suite\n  grsd suite --size mini-0.4m --steps 128\n")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    help="mini-0.4m, mini-1.3m, mini-4.2m; repeat for several [all three].",
)
@click.option(
    "--steps",
    default=512,
    show_default=True,
    help="Updates; checkpoints at 0, 1, 2, 4, ..., 512, 1000, ...",
)
@click.option(
    "--corpus", help="embedded[:VOCAB], text files, or hub:NAME[:config[:split]] [of the size]."
)
@click.option("--batch-size", type=int, default=None, help="Sequences per update [of the size].")
@click.option("--length", default=128, show_default=True, help="Tokens per sequence.")
@click.option("--lr", type=float, default=None, help="Peak learning rate [of the size].")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the initial weights and the order of the text.",
)
@click.option(
    "--schedule",
    default="constant",
    show_default=True,
    help="constant or cosine, after the warm-up.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@json_option
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
    from grsd.lab.checkpoints import hub, suites
    from grsd.lab.data import corpora
    from grsd.lab.runs.summary import number

    names = sizes or ("mini-0.4m", "mini-1.3m", "mini-4.2m")
    for name in names:
        if name not in suites.MINI:
            raise ValueError(f"unknown size {name!r}: expected one of {', '.join(suites.MINI)}")
    where = str(hub.check_device(device_of(device)))
    recipe: dict[str, Any] = {"length": length, "seed": seed, "schedule": schedule}
    recipe |= {
        key: value for key, value in (("lr", lr), ("batch_size", batch_size)) if value is not None
    }
    found = []
    for name in names:
        text = suites.of_suite(name) if corpus is None else corpora.open_corpus(corpus)
        made = train(name, text, steps, where, recipe)
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
        emit({"suites": found})
        return
    columns = ["size", "parameters", "checkpoints", "loss", "held-out", "folder"]
    rows = [
        [
            f["size"],
            f["parameters"],
            len(f["revisions"]),
            number(f["loss"]),
            number(f["heldout"]),
            f["folder"],
        ]
        for f in found
    ]
    table(columns, rows)


def train(name: str, text: Any, steps: int, device: str, recipe: dict[str, Any]) -> Any:
    from grsd.lab.checkpoints import suites

    ready = suites.locate(name, text, steps=steps, **recipe)
    if not ready.complete:
        say(f"training {name} for {steps} steps on {device}")
    with bar(name) as update:

        def progress(step: int, of: int, loss: float) -> None:
            update(step, of, f"loss {loss:.3f}")

        return suites.train(name, text, steps=steps, device=device, progress=progress, **recipe)


def prepare(model: str, revisions: Sequence[str], device: str) -> None:
    """Train a mini suite that is asked for and not there yet; say so when a checkpoint carries no tokenizer."""
    from grsd.lab.checkpoints import hub, suites

    if model in suites.MINI:
        text = suites.of_suite(model)
        made = suites.locate(model, text)
        have = set(hub.revisions_in(made.root))
        asked = set(made.revisions) if not revisions or "all" in revisions else set(revisions)
        if not asked <= have and not made.complete:
            train(model, text, made.steps, device, {})
        return
    folder, _ = hub.resolve(model, next((r for r in revisions if r != "all"), None))
    if not hub.has_tokenizer(folder):
        say(
            f"note: {folder} carries no tokenizer, so one is trained on the corpus: its tokens are not those that a trained model knows; "
            "put the model's tokenizer.json into the folder"
        )
