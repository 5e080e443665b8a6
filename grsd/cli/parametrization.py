"""`grsd mup-check`: the coordinate check of a model's architecture, with a verdict and a diagnosis."""

from __future__ import annotations

import math
from typing import Any

import click

from grsd.cli.common import emit, json_option, main, table

EPILOG = """\b
Examples:
  grsd mup-check gpt2 --optimizer adamw --lr 0.004
  grsd mup-check ./my-model --widths 128,256,512 --depths 2,4,8 --base 128,2 --optimizer muon_kimi
  grsd mup-check gpt_neox --sp                 the control: one learning rate for all sizes, no multipliers
Exit code 1 when the check is not flat.
"""


class Sizes(click.ParamType):
    """Whole numbers between commas."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers between commas", param, ctx)


@main.command("mup-check", epilog=EPILOG)
@click.argument("model")
@click.option(
    "--widths",
    type=Sizes(),
    default="64,128,256",
    show_default=True,
    help="Hidden sizes, at the base's depth.",
)
@click.option(
    "--depths",
    type=Sizes(),
    default="2,4,8",
    show_default=True,
    help="Numbers of blocks, at the base's width.",
)
@click.option(
    "--base",
    type=Sizes(),
    default="64,2",
    show_default=True,
    help="WIDTH,DEPTH that the learning rate is for.",
)
@click.option(
    "--optimizer",
    default="muon_kimi",
    show_default=True,
    help="Of the hidden matrices; an unknown name lists all.",
)
@click.option(
    "--other", default="adamw", show_default=True, help="Of what a matrix optimizer cannot take."
)
@click.option("--lr", default=2.0**-6, show_default=True, help="Base learning rate.")
@click.option(
    "--steps", type=click.IntRange(1), default=4, show_default=True, help="Updates of every model."
)
@click.option("--seeds", default=2, show_default=True, help="Initial weights of every size.")
@click.option(
    "--layers",
    default=2,
    show_default=True,
    help="k, layers of a residual branch: 1, or 2 for more.",
)
@click.option("--batch-size", default=8, show_default=True, help="Sequences in the batch.")
@click.option("--length", default=64, show_default=True, help="Bytes of a sequence.")
@click.option("--sp", is_flag=True, help="Standard parametrization instead: the control.")
@json_option
@click.pass_context
def mup_check(
    ctx: click.Context,
    model: str,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    base: tuple[int, ...],
    optimizer: str,
    other: str,
    lr: float,
    steps: int,
    seeds: int,
    layers: int,
    batch_size: int,
    length: int,
    sp: bool,
    as_json: bool,
) -> None:
    """Train MODEL's architecture for a few steps at several widths and depths, and say whether its features move alike.

    MODEL is a folder or hub name with a transformers configuration (weights are not read), or a family: gpt2, gpt_neox,
    llama. The text is Python's own help, byte by byte. Findings name the role, the norm and the condition that it breaks.
    """
    from grsd import mup
    from grsd.lab.nets import stock

    if len(base) != 2:
        raise ValueError(f"--base {','.join(map(str, base))}: expected WIDTH,DEPTH")
    if length < 1 or batch_size < 1 or seeds < 1:
        raise ValueError(
            f"--length {length}, --batch-size {batch_size} and --seeds {seeds} must be positive"
        )
    if len(set(widths)) < 2 and len(set(depths)) < 2:
        raise ValueError(
            f"two widths or two depths are needed to compare, got --widths {widths} and --depths {depths}"
        )
    factory = stock.factory(stock.configuration(model), positions=length)
    largest = factory(max((*widths, base[0])), max((*depths, base[1])))
    plan = mup.plan(
        largest, base=factory(base[0], base[1]), optimizer=optimizer, other=other, k=layers
    )
    found = mup.coord_check(
        factory,
        stock.next_byte(batch_size, length),
        widths=widths,
        depths=depths,
        base=(base[0], base[1]),
        optimizer=optimizer,
        other=other,
        lr=lr,
        steps=steps,
        seeds=range(seeds),
        k=layers,
        parametrization="sp" if sp else "mup",
    )
    if as_json:
        slopes, first = (
            # two points give a slope and no interval: null
            {
                axis: [v if math.isfinite(v) else None for v in (s.value, s.low, s.high)]
                for axis, s in fitted.items()
            }
            for fitted in (found.slopes, found.first)
        )
        findings = [
            {
                "role": f.role,
                "quantity": f.quantity,
                "axis": f.axis,
                "measured": f.measured.value,
                "wanted": f.wanted,
            }
            | {"condition": f.condition}
            for f in found.findings
        ]
        emit(
            {
                "model": model,
                "optimizer": optimizer,
                "parametrization": found.parametrization,
                "verdict": found.verdict,
            }
            | {"slopes": slopes, "first": first, "findings": findings, "plan": plan.table()}
        )
    else:
        if not sp:
            click.echo(f"the largest model's plan:\n{plan.table()}\n")
        sizes = sorted({(r.width, r.depth) for r in found.runs})
        rows = []
        for width, depth in sizes:
            runs = [r for r in found.runs if (r.width, r.depth) == (width, depth)]
            mean = [sum(r.features[k] for r in runs) / len(runs) for k in (1, -1)]
            rows.append([width, depth, f"{mean[0]:.3g}", f"{mean[1]:.3g}"])
        table(["width", "depth", "change of features, step 1", f"step {steps}"], rows)
        click.echo(str(found))
    ctx.exit(0 if found.verdict == "flat" else 1)
