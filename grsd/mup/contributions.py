"""What the branches of a model and its head contribute, with the multipliers of a plan and without.

A plan knows the ends of residual branches by name. Here it is measured what they add to the stream:
an end that no pattern matches, and a norm behind an end, which takes the factor back, are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grsd.figures import Table
from grsd.mup.norms import rms_norm
from grsd.mup.roles import Multiplier, bare_modules, stack_of

TOLERANCE = 0.1  # of a contribution, relative to the wanted one
PAST = 1e-3  # share of what a block adds that may pass no multiplier: rounding in float32
PROBE = 0.25  # root mean square of what an end gives in a probe; the stream's is 1


@dataclass(frozen=True)
class Contribution:
    """One measured number, as a multiple of what it is without the plan or in the base model."""

    place: str  #: a block of the stack, the end of a branch, a head, an embedding
    what: str
    wanted: float
    measured: float  #: NaN where there was nothing to measure
    remedy: str = ""  #: what to do where the two differ
    tolerance: float = TOLERANCE  #: relative to what is wanted

    @property
    def right(self) -> bool:
        """Whether the two agree; what could not be measured is not right."""
        return abs(self.measured - self.wanted) <= self.tolerance * self.wanted

    def __str__(self) -> str:
        if math.isnan(self.measured):
            return f"{self.place}: nothing to measure; it is zero, or not called in the pass"
        beside = "in the base model" if self.what == "reads" else "without the plan"
        many = f"{self.measured:.3g} times what it {self.what} {beside}"
        return f"{self.place} {self.what} {many}, not {self.wanted:.3g}: {self.remedy}"


@dataclass(frozen=True)
class Verification:
    """What every block, every end of a branch and the head contribute under a plan."""

    rows: tuple[Contribution, ...]

    @property
    def complete(self) -> bool:
        """Whether all that was measured is as the plan wants it."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Contribution, ...]:
        return tuple(row for row in self.rows if not row.right)

    def __str__(self) -> str:
        rows = [[r.place, r.what, f"{r.wanted:.3g}", f"{r.measured:.3g}"] for r in self.rows]
        columns = ["place", "contribution", "wanted", "measured"]
        return "\n".join([str(Table(columns, rows)), *map(str, self.wrong)])


class Multiply:
    """A forward hook (on outputs) or pre-hook (on inputs) that multiplies tensors by a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        value = inputs if output is None else output
        if isinstance(value, tuple):
            return (value[0] * self.factor, *value[1:])
        return value * self.factor


def multiplying(module: nn.Module) -> list[Multiply]:
    """Return the multipliers that a module carries."""
    every = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in every if isinstance(hook, Multiply)]


def call(model: nn.Module, batch: Any) -> None:
    """Call the model on a tensor, keywords or arguments, or a function on the model."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    elif callable(batch):
        batch(model)
    else:
        model(batch)


def tensor(result: Any) -> Tensor:
    """Return the tensor of a result: itself, its logits, or the first that it holds."""
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = result.values() if isinstance(result, Mapping) else result
    return next(value for value in values if isinstance(value, Tensor))


def repeated(model: nn.Module) -> list[str]:
    """Return the blocks of the stack that are a module which stands in it before."""
    (stack, depth), modules = stack_of(model, required=False), bare_modules(model)
    return [name for name in (f"{stack}.{i}" for i in range(depth) if stack) if name not in modules]


def measure(
    model: nn.Module,
    batch: Any,
    multipliers: Sequence[Multiplier],
    r_n: float = 1.0,
    base: nn.Module | None = None,
    embedded: float = 1.0,
) -> Verification:
    """Return what the blocks and heads of a model contribute; it carries its multipliers.

    `embedded` is what the base's embeddings lack, a factor of the user.

    In all passes every block reads one stream, that of the model without multipliers at root mean
    square 1, and its branches end in what they end in there, so that a contribution is exactly α
    where all that is added passes α. Cost: six forward passes, and two for each end of a branch.
    """
    if twice := repeated(model):
        raise ValueError(
            f"{twice[0]!r} is a module that stands in the stack before: what each of its passes "
            "adds cannot be told apart; verify a model whose blocks are modules of their own"
        )
    stack, depth = stack_of(model, required=False)
    blocks = [f"{stack}.{i}" for i in range(depth) if stack]
    ends = {name: [m for m in multipliers if m.module.startswith(f"{name}.")] for name in blocks}
    inside = [m for several in ends.values() for m in several]
    heads = [m for m in multipliers if m.side == "input"]
    rows = []
    with _observed(model, batch, blocks, inside, heads) as seen:
        # the streams as they are, then at size 1
        seen.run({})
        seen.streams = {name: seen.read[name] / _rms(seen.read[name]) for name in blocks}
        whole = seen.run({})
        seen.ends = {m.module: seen.gave[m.module] for m in inside if m.module in seen.gave}
        # every block without and with its multipliers
        none = {m.module: 0.0 for m in inside}
        scaled, bare = seen.run({m.module: m.factor for m in inside}), seen.run(none)
        for name in filter(ends.get, blocks):
            ratio, past = (_ratio(x, whole, seen.streams, name) for x in (scaled, bare))
            # a branch that passes no multiplier is wrong, however little it adds at the start
            allowed = 0.0 if past > PAST and ends[name][0].factor != 1 else TOLERANCE
            alpha = ends[name][0].factor
            rows.append(Contribution(name, "adds", alpha, ratio, MISSED, allowed))
        # every end alone, with noise in its place, far above the ε of a norm that follows
        noise = torch.Generator().manual_seed(0)
        for name, x in seen.ends.items():
            seen.ends[name] = PROBE * torch.randn(x.shape, generator=noise).to(x)
        for j in range(max(map(len, ends.values()), default=0)):
            alone = {name: several[j] for name, several in ends.items() if len(several) > j}
            full = seen.run(none | {m.module: 1.0 for m in alone.values()})
            part = seen.run(none | {m.module: m.factor for m in alone.values()})
            for name, m in alone.items():
                ratio = _ratio(part, full, bare, name) if m.module in seen.ends else math.nan
                rows.append(Contribution(m.module, "adds", m.factor, ratio, UNDONE))
        # the head, apart from its bias
        for m in heads:
            zero, part = seen.run({m.module: 0.0}), seen.run({m.module: m.factor})
            ratio = _ratio(part, seen.run({}), zero, "")
            rows.append(Contribution(m.module, "gives", m.factor, ratio, HEAD))
        # what enters the stack and the head, beside the base model
        seen.streams, seen.ends = {}, {}
        if base is not None and r_n != 1:
            seen.run({m.module: m.factor for m in multipliers})
            alike = heads if stack_of(base, required=False)[1] == depth else []
            rows += _sizes(seen.read, base, batch, blocks[:1], alike, r_n, embedded)
    return Verification(tuple(rows))


MISSED = "some of it passes no multiplier: name all ends of its branches in branch_ends"
UNDONE = "what follows takes the factor back: name the norm behind it in branch_ends in its place"
HEAD = "its multiplier does not act on the output: make the head a layer of its own"
GROWS = "it carries a power of the width of its own: take that out of the model"


def _sizes(
    read: Mapping[str, Tensor],
    base: nn.Module,
    batch: Any,
    first: Sequence[str],
    heads: Sequence[Multiplier],
    r_n: float,
    embedded: float,
) -> list[Contribution]:
    """Return the sizes of the streams that enter the stack and the heads, over the base's.

    Noise of finite sizes is allowed for up to a fourth root of the ratio of widths. What a head
    reads may depend on the depth, where no norm stands before it: `heads` are those of one depth.
    """
    allowed = max(TOLERANCE, max(r_n, 1 / r_n) ** 0.25 - 1)
    with _observed(base, batch, first, (), heads) as seen:
        seen.run({})
    # the stack reads what was embedded; a head behind a norm does not see the factor
    wanted = dict.fromkeys(first, embedded)
    return [
        Contribution(
            name,
            "reads",
            wanted.get(name, 1.0),
            _rms(read[name]) / _rms(seen.read[name]),
            GROWS,
            allowed,
        )
        for name in (*first, *(m.module for m in heads if embedded == 1))
    ]


def _ratio(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], zero: Mapping[str, Tensor], name: str
) -> float:
    """Return ‖a − 0‖ / ‖b − 0‖, NaN where there is nothing."""
    above, below = (float((x[name].double() - zero[name].double()).norm()) for x in (a, b))
    return above / below if below > 0 else math.nan


def _rms(x: Tensor) -> float:
    return float(rms_norm(x.double().reshape(-1)))


@dataclass
class _Observed:
    """A model under observation: what its modules read and gave, and what they are made to."""

    model: nn.Module
    batch: Any
    scales: Mapping[str, Multiply]  #: of modules with a multiplier
    read: dict[str, Tensor] = field(default_factory=dict)  #: block or head → its input
    gave: dict[str, Tensor] = field(default_factory=dict)  #: block or end → its result
    streams: dict[str, Tensor] = field(default_factory=dict)  #: block → the input to put there
    ends: dict[str, Tensor] = field(default_factory=dict)  #: end → the result to put there

    def run(self, factors: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what blocks, ends and the model ("") gave, at factors that are 1 if not given."""
        for name, scale in self.scales.items():
            scale.factor = factors.get(name, 1.0)
        self.read, self.gave = {}, {}
        call(self.model, self.batch)
        return self.gave

    def enter(self, name: str) -> Any:
        """Return a pre-hook that notes what a module reads first, and puts its stream there."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                self.read[name] = args[0]
                return (self.streams.get(name, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            self.read[name] = kwargs[first]
            return args, kwargs | {first: self.streams.get(name, kwargs[first])}

        return hook

    def leave(self, name: str) -> Any:
        """Return a hook that notes what a module gives, and puts another tensor there."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self.gave[name] = tensor(output)
            if name not in self.ends:
                return None
            put = self.ends[name]
            return put if isinstance(output, Tensor) else (put, *output[1:])

        return hook


@contextmanager
def _observed(
    model: nn.Module,
    batch: Any,
    blocks: Sequence[str],
    ends: Sequence[Multiplier],
    heads: Sequence[Multiplier],
) -> Iterator[_Observed]:
    """Put hooks on a model in evaluation mode; leave it as it was."""
    modules = bare_modules(model)
    scales = {name: hook for name, m in modules.items() for hook in multiplying(m)}
    factors, training = (
        {name: hook.factor for name, hook in scales.items()},
        [m for m in model.modules() if m.training],
    )
    seen = _Observed(model, batch, scales)
    handles = []
    # before the multipliers: what an end gives is then multiplied, what a head reads is not yet
    for name in (*blocks, *(m.module for m in heads)):
        enter = seen.enter(name)
        handles.append(
            modules[name].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        )
    for name in ("", *blocks, *(m.module for m in ends)):
        handles.append(modules[name].register_forward_hook(seen.leave(name), prepend=True))
    try:
        model.eval()
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, hook in scales.items():
            hook.factor = factors[name]
        for module in training:
            module.training = True
