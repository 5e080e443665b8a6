"""The settings of the field table: what is done to a tiny model of transformers before M is asked.

A setting turns an architecture into a `Case`: the model as a user has it, and a copy that none of
this has touched, of which the dense Jacobian is taken. Where a setting does not exist for an
architecture, it raises `Absent` with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grsd.lab.nets import tiny
from grsd.spectrum import ClassLogits, TokenLogProb
from grsd.spectrum.observables import IGNORE, Observable

PADS, RANK = 2, 2
LINEAR = ("Linear", "Conv1D", "FalconLinear")  # layers that a wrapper can stand for
Context = Callable[[], AbstractContextManager[Any]]


class Absent(Exception):
    """The setting does not exist for this architecture; the message says why."""


@dataclass
class Case:
    """One cell before it is measured.

    Attributes
    ----------
    model : as the user has it.
    plain : the same function of the same parameters, for plain autograd.
    inputs, observable : of the operator.
    context : under which the forward pass, the operator and its products run.
    after : what happens between the operator and its first product.
    """

    model: Any
    plain: nn.Module
    inputs: dict[str, Tensor]
    observable: Observable
    context: Context = nullcontext
    after: Callable[[], None] | None = None


@dataclass
class Wish:
    """What a setting asks of a model before it is made."""

    dtype: torch.dtype | None = None
    attention: str | None = None
    drop: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


Change = Callable[[Case, tiny.Architecture], None]


@dataclass(frozen=True)
class Setting:
    """A column of the table: what it is, how the model is made, what changes it."""

    words: str
    wish: Wish
    change: Change | None = None


SETTINGS: dict[str, Setting] = {}


def _setting(name: str, words: str, **wish: Any) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        SETTINGS[name] = Setting(words, Wish(**wish), change)
        return change

    return register


def prepare(architecture: str, setting: str) -> Case:
    """Return the case of one cell, or raise `Absent`."""
    row, wanted = tiny.ARCHITECTURES[architecture], SETTINGS[setting]
    wish = wanted.wish
    config = tiny.configuration(architecture, drop=wish.drop)
    for name, value in wish.config.items():
        if not hasattr(config, name):
            raise Absent(f"its configuration has no {name}")
        setattr(config, name, value)
    dtype = wish.dtype or row.dtype
    if wish.dtype is None and wish.attention == "sdpa" and not _fused(config, row.kind):
        raise Absent("it has no such attention")
    model = tiny.network(config, row.kind, dtype, wish.attention)
    inputs, targets = tiny.batch(row.kind)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    vision = row.kind == "vision"
    observable = ClassLogits(targets) if vision else TokenLogProb(targets)
    case = Case(model, model, inputs, observable)
    if wanted.change is not None:
        wanted.change(case, row)
    if case.plain is case.model:
        case.plain = copy.deepcopy(case.model)
    return case


def _fused(config: Any, kind: tiny.Kind) -> bool:
    model: Any = tiny.network(copy.deepcopy(config), kind)
    return bool(model.config._attn_implementation == "sdpa")


SETTINGS["eager"] = Setting("evaluation, eager attention", Wish(attention="eager"))
SETTINGS["sdpa"] = Setting("evaluation, fused attention", Wish(attention="sdpa"))
SETTINGS["float32"] = Setting("float32", Wish(torch.float32))
SETTINGS["bfloat16"] = Setting("bfloat16", Wish(torch.bfloat16))


@_setting("autocast", "float32 under autocast to bfloat16", dtype=torch.float32)
def _autocast(case: Case, row: tiny.Architecture) -> None:
    case.context = lambda: torch.autocast("cpu", torch.bfloat16)


@_setting("train", "training mode, all dropout rates zero")
def _train(case: Case, row: tiny.Architecture) -> None:
    case.model.train()


@_setting("dropout", "training mode, every dropout rate of the configuration 0.1", drop=0.1)
def _dropout(case: Case, row: tiny.Architecture) -> None:
    name = case.model.config.model_type
    case.model.train()
    case.plain = tiny.network(tiny.configuration(name), row.kind, row.dtype).train()
    with torch.no_grad():
        outputs = [model(**case.inputs).logits for model in (case.model, case.plain)]
    if torch.equal(*outputs):
        raise Absent("it has no dropout")


def _checkpointed(case: Case, reentrant: bool) -> None:
    if not case.model.supports_gradient_checkpointing:
        raise Absent("it does not support checkpointing")
    case.model.train()
    case.plain = copy.deepcopy(case.model)
    try:
        case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    except ValueError as error:
        raise Absent(str(error)) from None


@_setting("checkpoint", "training mode, gradient checkpointing, use_reentrant=False")
def _checkpoint(case: Case, row: tiny.Architecture) -> None:
    _checkpointed(case, reentrant=False)


@_setting("reentrant", "training mode, gradient checkpointing, use_reentrant=True")
def _reentrant(case: Case, row: tiny.Architecture) -> None:
    _checkpointed(case, reentrant=True)


def _masked(case: Case, row: tiny.Architecture, left: bool) -> None:
    if row.kind == "vision":
        raise Absent("images are not padded")
    mask = torch.ones_like(case.inputs["input_ids"])
    pads = slice(0, PADS) if left else slice(-PADS, None)
    mask[0, pads] = 0
    case.inputs["attention_mask"] = mask
    case.inputs["input_ids"][0, pads] = 0
    if row.kind != "encoder-decoder":
        case.observable = _without(case.observable, mask == 0)


def _without(observable: Any, dropped: Tensor) -> Observable:
    return TokenLogProb(observable.targets.masked_fill(dropped, IGNORE))


@_setting("left", "two tokens of padding on the left of one text, masked, not counted")
def _left(case: Case, row: tiny.Architecture) -> None:
    _masked(case, row, left=True)


@_setting("right", "two tokens of padding on the right of one text, masked, not counted")
def _right(case: Case, row: tiny.Architecture) -> None:
    _masked(case, row, left=False)


@_setting("ignored", "targets −100 at some tokens")
def _ignored(case: Case, row: tiny.Architecture) -> None:
    if row.kind == "vision":
        raise Absent("every image has a class")
    targets: Tensor = case.observable.targets  # type: ignore[attr-defined]
    dropped = torch.arange(targets.numel()).reshape(targets.shape) % 3 == 1
    case.observable = _without(case.observable, dropped)


@_setting("frozen", "input embeddings frozen")
def _frozen(case: Case, row: tiny.Architecture) -> None:
    try:
        case.model.get_input_embeddings().requires_grad_(False)
    except (AttributeError, NotImplementedError):
        raise Absent("transformers names no input embeddings of it") from None


class LowRank(nn.Module):
    """A frozen linear layer with a trained change of low rank: base(x) + (x Aᵀ) Bᵀ."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.change = LowRankChange(base)

    @property
    def weight(self) -> Tensor:
        merged: Tensor = self.change(self.base.weight)
        return merged

    @property
    def bias(self) -> Any:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        B, A = self.change.B, self.change.A
        out: Tensor = self.base(x)
        # a Conv1D of transformers holds its weight as (in, out)
        added = x @ A.T @ B.T if isinstance(self.base, nn.Linear) else x @ B @ A
        return out + added


class LowRankChange(nn.Module):
    """The parametrization W + BA."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        out, into = weight.shape
        generator = torch.Generator().manual_seed(out * into)
        self.B = nn.Parameter(_normal(out, RANK, generator).to(weight))
        self.A = nn.Parameter(_normal(RANK, into, generator).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return 0.1 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that get adapters: linear ones, but the heads."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in LINEAR and module is not model.get_output_embeddings()  # type: ignore[operator]
    }
    if not found:
        raise Absent("it has no linear layer but the head")
    return found


@_setting("adapters", "low-rank adapters in wrapping modules, all else frozen")
def _adapters(case: Case, row: tiny.Architecture) -> None:
    layers = _linears(case.model.requires_grad_(False))
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(case.model.get_submodule(parent), last, LowRank(layer))


@_setting("tuned", "adapters, all else frozen, training mode, checkpointing, use_reentrant=False")
def _tuned(case: Case, row: tiny.Architecture) -> None:
    _adapters(case, row)
    _checkpointed(case, reentrant=False)


@_setting("parametrized", "low-rank adapters by parametrize, all else frozen")
def _parametrized(case: Case, row: tiny.Architecture) -> None:
    layers = _linears(case.model.requires_grad_(False))
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", LowRankChange(layer))


def _tie(case: Case, row: tiny.Architecture, tied: bool) -> None:
    table, head = case.model.get_input_embeddings(), case.model.get_output_embeddings()
    if row.kind == "vision" or table is None or head is None:
        raise Absent("it has no table and head")
    if (table.weight is head.weight) != tied:
        raise Absent(f"it cannot be {'tied' if tied else 'untied'}")


@_setting("tied", "one matrix for embedding and head", config={"tie_word_embeddings": True})
def _tied(case: Case, row: tiny.Architecture) -> None:
    _tie(case, row, tied=True)


@_setting("untied", "two matrices for them", config={"tie_word_embeddings": False})
def _untied(case: Case, row: tiny.Architecture) -> None:
    _tie(case, row, tied=False)


@_setting("compiled", "wrapped by torch.compile")
def _compiled(case: Case, row: tiny.Architecture) -> None:
    case.plain = copy.deepcopy(case.model)
    case.model = torch.compile(case.model, backend="eager")


def _step(case: Case) -> None:
    """One step of fused AdamW on −Σ f."""
    model = case.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, fused=True)
    loss: Any = -case.observable.rows(model(**case.inputs).logits).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@_setting("stepped", "a new operator after a step of fused AdamW")
def _stepped(case: Case, row: tiny.Architecture) -> None:
    plain = copy.deepcopy(case.model)
    _step(case)
    plain.load_state_dict(case.model.state_dict())
    case.plain = plain


@_setting("stale", "the old operator after a step of fused AdamW")
def _stale(case: Case, row: tiny.Architecture) -> None:
    case.plain = copy.deepcopy(case.model)
    case.after = lambda: _step(case)
