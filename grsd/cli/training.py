"""`grsd suite`: train the mini-Pythia suite, or find it in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from grsd.cli import common
from grsd.cli.common import emit, main, say, shown, table

if TYPE_CHECKING:
    from grsd.lab.checkpoints.opened import Model
    from grsd.lab.checkpoints.suites import Suite
    from grsd.lab.data.corpora import Corpus

EPILOG = "\b\nExamples:\n  grsd suite\n  grsd suite --size mini-0.4m --steps 128\n"
SIZES = ("mini-0.4m", "mini-1.3m", "mini-4.2m")
SIZE = f"{', '.join(SIZES)}; repeat for several [all three]."
CORPUS = "embedded[:VOCAB], text files, or hub:NAME[:config[:split]] [of the size]."


@main.command(epilog=EPILOG)
@click.option("--size", "sizes", multiple=True, help=SIZE)
@shown("--steps", 512, "Updates; checkpoints at 0, 1, 2, 4, ..., 512, 1000, ...")
@click.option("--corpus", help=CORPUS)
@click.option("--batch-size", type=int, help="Sequences per update [of the size].")
@shown("--length", 128, "Tokens per sequence.")
@click.option("--lr", type=float, help="Peak learning rate [of the size].")
@common.seed_option("the initial weights and the order of the text")
@shown("--schedule", "constant", "constant or cosine, after the warm-up.")
@common.device_option
@common.json_option
def suite(
    sizes: tuple[str, ...],
    steps: int,
    corpus: str | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the mini-Pythia suite (minutes on two cores), or find it in the cache.

    A run that was stopped goes on where it was. Commands that take a model know
    the suite of another seed as mini-0.4m@1.
    """
    from grsd.checks import one_of
    from grsd.lab.checkpoints import hub, suites
    from grsd.lab.data import corpora
    from grsd.lab.runs.summary import number

    names = sizes or SIZES
    for name in names:
        one_of("size", name, suites.MINI)
    where = str(hub.check_device(common.device_of(device)))
    recipe = {key: value for key, value in options.items() if value is not None}
    listed, rows = [], []
    for name in names:
        text = suites.of_suite(name) if corpus is None else corpora.open_corpus(corpus)
        made = trained(name, text, where, steps=steps, **recipe)
        record = made.training()
        loss = record["loss"][-1] if record["loss"] else None
        heldout, parameters = record["heldout"].get(made.revisions[-1]), made.size.parameters
        one = {"size": name, "parameters": parameters, "steps": steps, "folder": str(made.root)}
        one |= {"revisions": list(made.revisions), "loss": loss, "heldout": heldout}
        listed.append({**one, "corpus": {"name": text.name, "tokens": len(text.tokens)}})
        losses = number(loss), number(heldout)
        rows.append([name, parameters, len(made.revisions), *losses, str(made.root)])
    if as_json:
        emit({"suites": listed})
    else:
        table(["size", "parameters", "checkpoints", "loss", "held-out", "folder"], rows)


def trained(name: str, text: Corpus, device: str, **recipe: Any) -> Suite:
    """A mini suite, trained now if it is not there."""
    from grsd.lab.checkpoints import suites

    ready = suites.locate(name, text, **recipe)
    if not ready.complete:
        say(f"training {ready.name} for {ready.steps} steps on {device}")
    with common.bar(name) as update:
        return suites.train(name, text, device=device, progress=common.losses(update), **recipe)


def prepared(model: str, revisions: Sequence[str], device: str) -> tuple[Model, list[str]]:
    """Open a model, and list the revisions that are asked for, some or "all".

    A mini suite that is not there yet is trained first. A note says when there is no tokenizer.
    """
    from grsd.lab.checkpoints import hub, opened, suites

    hub.check_device(device)
    named = [name for name in revisions if name != "all"]
    opening = opened.open_model(model)
    if (suite := opening.suite) is not None:
        wanted = suite.revisions if not revisions or "all" in revisions else named
        if not (suite.complete or set(wanted) <= set(opened.revisions_in(suite.root))):
            size = suite.size.name
            trained(size, suites.of_suite(size), device, seed=suite.seed)
    else:
        one = opening.checkpoint(next(iter(named), None))
        if not one.reader.has_tokenizer(one.path):
            say(
                f"note: {one.path} carries no tokenizer, so one is trained on the corpus: its "
                "tokens are not those that a trained model knows; put the model's tokenizer.json "
                "into it"
            )
    asked = opening.revisions if "all" in revisions else named
    if len(asked) > 1:
        for same in opening.equal(asked):
            say(f"note: {' and '.join(same)} of {model} have the same weights")
    return opening, asked
