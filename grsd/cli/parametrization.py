"""`grsd mup-plan` and `mup-check`: what a plan makes of a base's values, and whether it holds.

The plan is that of an architecture; no weights are read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import click

from grsd.cli.common import Command, bar, emit, json_option, main, shown, table

PLAN_EPILOG = """\b
Examples:
  grsd mup-plan Qwen/Qwen3-8B --base 256,4 --optimizer muon_kimi --lr 0.02 --other-ratio 0.1
  grsd mup-plan ./my-model --base 128,2 --weight-decay 0.1 --no-decay gains,biases,embeddings
  grsd mup-plan llama --width 1024 --depth 16 --base 64,2 --lr 0.004 --batch 4 --horizon 20
"""
CHECK_EPILOG = """\b
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
    if wrong := [name for name, sign, value in pairs if not (name and sign and value)]:
        raise click.BadParameter(f"{wrong[0]!r} is not of the form NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def factors(text: str) -> dict[str, float]:
    """Name=number between commas."""
    try:
        return {name: float(value) for name, value in assigned(text).items()}
    except ValueError:
        raise click.BadParameter(f"{text!r} is not of the form NAME=NUMBER") from None


NUMBERS: dict[str, Any] = {"type": sizes, "metavar": "N,N,..."}


PLANNED: tuple[Callable[[Any], Any], ...] = (
    shown("--optimizer", "muon_kimi", "Of the hidden matrices; an unknown name lists all."),
    shown("--other", "adamw", "Of what a matrix optimizer cannot take."),
    shown("--other-ratio", 1.0, "Its rate over that of hidden matrices, at the base."),
    shown("--multipliers", "", "PLACE=FACTOR: input, hidden, output, attention.", type=factors),
    shown("--layers", 2, "k, layers of a residual branch: 1, or 2 for more."),
    shown("--branch-ends", "", "Modules whose output is added to the stream.", type=patterns),
    shown("--roles", "", "Roles that names and shapes do not tell.", type=assigned),
)
LISTED = {"type": patterns, "metavar": "NAME,NAME,..."}


def planned(command: Command) -> Command:
    """The options of a plan, which two commands share."""
    for option in reversed(PLANNED):
        command = option(command)
    return command


def _base(base: tuple[int, ...]) -> tuple[int, int]:
    if len(base) != 2:
        raise ValueError(f"--base {','.join(map(str, base))}: expected WIDTH,DEPTH")
    return base[0], base[1]


@main.command("mup-plan", epilog=PLAN_EPILOG)
@click.argument("model")
@shown("--width", 0, "Hidden size [the model's].", type=click.IntRange(0))
@shown("--depth", 0, "Number of blocks [the model's].", type=click.IntRange(0))
@shown("--base", "64,2", "WIDTH,DEPTH that the values are for.", **NUMBERS)
@shown("--lr", 2.0**-6, "Base learning rate.")
@shown("--weight-decay", 0.0, "Base weight decay.")
@click.option("--eps", type=float, help="Base stabilizer [the optimizer's own].")
@shown("--no-decay", "", "Kinds without decay: gains, biases, embeddings.", **LISTED)
@shown("--wd-rule", "paper", "Decay: paper, unscaled or independent.")
@shown("--eps-rule", "paper", "Stabilizer: paper, completep or unscaled.")
@shown("--batch", 1.0, "Batch size over the base's.")
@shown("--horizon", 1.0, "Number of tokens over the base's.")
@planned
@json_option
def mup_plan(
    model: str,
    width: int,
    depth: int,
    base: tuple[int, ...],
    layers: int,
    multipliers: dict[str, float],
    as_json: bool,
    no_decay: tuple[str, ...] | None,
    **more: Any,
) -> None:
    """Print the plan that takes a base's values to MODEL, and the groups of its optimizers.

    MODEL is a folder or hub name with a transformers configuration (weights are not read, and none
    are made), or a family such as gpt2 or llama. Values are those tuned at the base.
    """
    import torch

    from grsd import mup
    from grsd.lab.nets import stock

    # two models without weights, and their plan
    config = stock.configuration(model)
    positions = getattr(config, "max_position_embeddings", 128)
    vocabulary = getattr(config, "vocab_size", stock.BYTES)
    factory = stock.factory(config, vocabulary=vocabulary, positions=positions)
    size = (width or config.hidden_size, depth or config.num_hidden_layers)
    with torch.device("meta"):
        large, small = factory(*size), factory(*_base(base))
    chosen = ("optimizer", "other", "branch_ends", "roles", "wd_rule", "eps_rule")
    who = {name: more.pop(name) for name in chosen}
    plan = mup.plan(large, base=small, k=layers, multipliers=multipliers, **who)
    groups = plan.param_groups(large, no_decay=no_decay or (), **more)
    # a row for each group; what is multiplied, with one row for all blocks
    rows = [
        {
            "optimizer": name,
            "role": g["role"],
            "tensors": len(g["params"]),
            "lr": g["lr"],
            "weight_decay": g["weight_decay"],
            "eps": g.get("eps"),
        }
        for name, several in groups.items()
        for g in several
    ]
    scaled = {mup.roles.unnumbered(m.module): m.factor for m in plan.multipliers}
    if as_json:
        ratios = {"r_n": plan.r_n, "r_L": plan.r_L}
        emit({"model": model, **ratios, "plan": plan.table(), "groups": rows, "factors": scaled})
        return
    click.echo(f"{plan.table()}\n")
    table(["multiplied", "by"], [[name, f"{factor:.4g}"] for name, factor in scaled.items()])
    click.echo("")
    table(
        ["optimizer", "role", "tensors", "η", "λ", "ε"],
        [
            ["–" if v is None else f"{v:.4g}" if isinstance(v, float) else v for v in one.values()]
            for one in rows
        ],
    )


@main.command("mup-check", epilog=CHECK_EPILOG)
@click.argument("model")
@shown("--widths", "64,128,256", "Hidden sizes, at the base's depth.", **NUMBERS)
@shown("--depths", "2,4,8", "Numbers of blocks, at the base's width.", **NUMBERS)
@shown("--base", "64,2", "WIDTH,DEPTH that the learning rate is for.", **NUMBERS)
@shown("--lr", 2.0**-6, "Base learning rate.")
@shown("--steps", 4, "Updates of every model.", type=click.IntRange(1))
@shown("--seeds", 2, "Initial weights of every size.")
@shown("--batch-size", 8, "Sequences in the batch.")
@shown("--length", 64, "Bytes of a sequence.")
@planned
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
    multipliers: dict[str, float],
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
    start_size, seeds = _base(base), more.pop("seeds")
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
    start = factory(*start_size)

    def make(net: Any, beside: Any) -> mup.Plan:
        return mup.plan(net, base=beside, k=layers, multipliers=multipliers, **who)

    plan = make(largest, start)
    plan.initialize_(largest, seed=0)
    found = plan.verify(largest, loss, base=start)
    at: dict[str, Any] = {"widths": widths, "depths": depths, "base": start_size, "make_plan": make}
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
