"""`grsd mup-check`: the coordinate check of an architecture, with a verdict and a diagnosis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import click

from grsd.cli.common import bar, emit, json_option, main, shown, table

EPILOG = """\b
Examples:
  grsd mup-check gpt2 --optimizer adamw --lr 0.004
  grsd mup-check ./my-model --widths 128,256,512 --depths 2,4,8 --base 128,2 --optimizer muon_kimi
  grsd mup-check gpt_neox --sp      the control: one learning rate for all sizes, no multipliers
  grsd mup-check ./mine --branch-ends '*.attn.out,*.ffn.out' --roles 'wpe.weight=input'
Exit code 0 when the check is flat and the plan complete, 1 otherwise.
"""


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        said = f"{text!r} is not a list of whole numbers between commas"
        raise click.BadParameter(said) from None


def patterns(text: str) -> tuple[str, ...] | None:
    """Patterns of names between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) or None


def assigned(text: str) -> dict[str, str]:
    """Pattern=role between commas."""
    pairs = [part.partition("=") for part in patterns(text) or ()]
    if wrong := [name for name, sign, role in pairs if not (name and sign and role)]:
        raise click.BadParameter(f"{wrong[0]!r} is not of the form PATTERN=ROLE")
    return {name.strip(): role.strip() for name, _, role in pairs}


NUMBERS: dict[str, Any] = {"type": sizes, "metavar": "N,N,..."}


@main.command("mup-check", epilog=EPILOG)
@click.argument("model")
@shown("--widths", "64,128,256", "Hidden sizes, at the base's depth.", **NUMBERS)
@shown("--depths", "2,4,8", "Numbers of blocks, at the base's width.", **NUMBERS)
@shown("--base", "64,2", "WIDTH,DEPTH that the learning rate is for.", **NUMBERS)
@shown("--optimizer", "muon_kimi", "Of the hidden matrices; an unknown name lists all.")
@shown("--other", "adamw", "Of what a matrix optimizer cannot take.")
@shown("--lr", 2.0**-6, "Base learning rate.")
@shown("--steps", 4, "Updates of every model.", type=click.IntRange(1))
@shown("--seeds", 2, "Initial weights of every size.")
@shown("--layers", 2, "k, layers of a residual branch: 1, or 2 for more.")
@shown("--batch-size", 8, "Sequences in the batch.")
@shown("--length", 64, "Bytes of a sequence.")
@shown("--branch-ends", "", "Modules whose output is added to the stream.", type=patterns)
@shown("--roles", "", "Roles that names and shapes do not tell.", type=assigned)
@click.option("--sp", is_flag=True, help="Standard parametrization instead: the control.")
@json_option
@click.pass_context
def mup_check(
    ctx: click.Context,
    /,
    model: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    base: tuple[int, ...],
    layers: int,
    batch_size: int,
    length: int,
    sp: bool,
    as_json: bool,
    **more: Any,
) -> None:
    """Train MODEL's architecture for a few steps at several widths and depths, and say whether its
    features move alike.

    MODEL is a folder or hub name with a transformers configuration (weights are not read), or a
    family such as gpt2, gpt_neox or llama. The text is Python's own help, byte by byte, for an
    image classifier Gaussian images. What every block and the head contribute is measured first.
    Findings name the role, the norm and the condition that it breaks.
    """
    from grsd import mup
    from grsd.lab.data import help_text
    from grsd.lab.nets import stock

    # what can be refused is refused before the work
    if len(base) != 2:
        raise ValueError(f"--base {','.join(map(str, base))}: expected WIDTH,DEPTH")
    seeds = more.pop("seeds")
    if length < 1 or batch_size < 1 or seeds < 1:
        got = f"--length {length}, --batch-size {batch_size} and --seeds {seeds}"
        raise ValueError(f"{got} must be positive")
    if len(set(widths)) < 2 and len(set(depths)) < 2:
        got = f"--widths {widths} and --depths {depths}"
        raise ValueError(f"two widths or two depths are needed to compare, got {got}")
    # the plan of the largest model, which is shown, and the check over all sizes
    config = stock.configuration(model)
    factory = stock.factory(config, positions=length)
    loss = stock.images(config, batch_size) or help_text.next_byte(batch_size, length)
    largest = factory(max((*widths, base[0])), max((*depths, base[1])))
    who = {key: more[key] for key in ("optimizer", "other", "branch_ends", "roles")}
    start = factory(base[0], base[1])
    plan = mup.plan(largest, base=start, k=layers, **who)
    plan.initialize_(largest, seed=0)
    found = plan.verify(largest, loss, base=start)
    at: dict[str, Any] = {"widths": widths, "depths": depths, "base": (base[0], base[1])}
    how = {"k": layers, "seeds": range(seeds), "parametrization": "sp" if sp else "mup", **more}
    runs = len({*((n, base[1]) for n in widths), *((base[0], k) for k in depths)}) * seeds
    with bar("mup-check") as update:
        passes = itertools.count()

        def counted(net: Any) -> Any:
            update(min(next(passes), total), total, f"forward passes of {runs} runs")
            return loss(net)

        total = runs * (more["steps"] + 1)
        check = mup.coord_check(factory, counted, **at, **how)
    # one object, or the plan, a row for each size and the verdict
    if as_json:
        kept = ("role", "quantity", "axis", "wanted", "condition")
        findings = [
            {**{k: getattr(f, k) for k in kept}, "measured": f.measured.value}
            for f in check.findings
        ]
        words = {k: getattr(check, k) for k in ("optimizer", "parametrization", "verdict")}
        slopes = {k: _intervals(getattr(check, k)) for k in ("slopes", "first", "output_slopes")}
        measured = [
            {
                "place": r.place,
                "what": r.what,
                "wanted": r.wanted,
                "right": r.right,
                "measured": r.measured if math.isfinite(r.measured) else None,
            }
            for r in found.rows
        ]
        told = {"findings": findings, "contributions": measured, "plan": plan.table()}
        emit({"model": model, **words, **slopes, **told})
    else:
        if not sp:
            click.echo(f"the largest model's plan:\n{plan.table()}\n")
            click.echo(f"{_summary(found)}\n")
        rows = []
        for size in sorted({(r.width, r.depth) for r in check.runs}):
            here = [r for r in check.runs if (r.width, r.depth) == size]
            series = [[r.features[1] for r in here], [r.features[-1] for r in here]]
            series.append([r.outputs[-1] for r in here])
            rows.append([*size, *(f"{sum(one) / len(one):.3g}" for one in series)])
        last = f"step {more['steps']}"
        table(
            ["width", "depth", "change of features, step 1", last, f"of the output, {last}"], rows
        )
        click.echo(str(check))
    ctx.exit(0 if check.verdict == "flat" and (sp or found.complete) else 1)


def _summary(found: Any) -> str:
    """Return the contributions in one line, or those that are wrong."""
    kinds: dict[tuple[str, float], list[float]] = {}
    for row in found.rows:
        kinds.setdefault((row.what, row.wanted), []).append(row.measured)
    spans = [
        f"{what} {min(values):.3g} to {max(values):.3g} (wanted {wanted:.3g})"
        for (what, wanted), values in kinds.items()
    ]
    lines = [f"contributions, measured: {'; '.join(spans)}"]
    return "\n".join([*lines, *dict.fromkeys(map(str, found.wrong))])


def _intervals(slopes: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return axis → slope and its ends; two points give a slope and no interval: null."""
    ends = {axis: (s.value, s.low, s.high) for axis, s in slopes.items()}
    return {axis: [v if math.isfinite(v) else None for v in three] for axis, three in ends.items()}
