"""Recording: one backward pass is watched at the level of ATen operations and becomes a program.

`record` keeps the operations that depend on the inputs; everything else (weights, activations,
their derivatives) is a constant that is evaluated once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils.flop_counter import flop_registry

from grsd.spectrum.programs.program import (
    NORMS,
    Kinds,
    Node,
    Program,
    Rows,
    Slot,
    leaves_of,
    pullback,
    rebuild,
    spread,
)

aten = torch.ops.aten


def _named(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name).default for name in names.split() if hasattr(aten, name))


# derivative at x times the incoming gradient: with constant x the derivative is evaluated once
POINTWISE = _named(
    "gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward elu_backward "
    "softplus_backward leaky_relu_backward hardtanh_backward hardswish_backward "
    "hardsigmoid_backward mish_backward log_sigmoid_backward"
)
# of a tensor they take the shape alone
SHAPES = _named(
    "new_zeros zeros_like new_empty empty_like new_ones ones_like new_full full_like "
    "new_empty_strided"
)
# their arithmetic is left out where nobody reads it: products, and what has its arguments' shape
PRODUCTS = {aten.mm.default, aten.bmm.default}
ALIKE = {aten.mul.Tensor, aten.add.Tensor, aten._softmax_backward_data.default}
BLOCK = 2**21  # elements of the logits that are worked on at once: a few MB, which stay in a cache


class Unrecordable(RuntimeError):
    """The pass does something that a linear program cannot repeat."""


class Region(Protocol):
    """Follows a program while it is recorded; `rows` holds the slots whose values are read."""

    rows: dict[int, Rows]

    def reads(self, node: Node, kinds: Kinds) -> bool:
        """Say whether the values that the node makes will be read."""
        ...


def record(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    region: Region | None = None,
) -> tuple[Program, dict[int, Tensor], list[int]]:
    """Run `function(*inputs)`, linear in its inputs, and record it.

    The outputs of the program are those results that depend on the inputs. With it come the value
    of every slot in this run, and the positions of the other results. `region` says of every
    operation whether its value will be read: most arithmetic that nobody reads is left out (a
    quarter of a forward and backward pass), and the values after it are arbitrary.
    """
    tape = _Tape(region)
    entries = [tape.enter(x) for x in inputs]
    with tape:
        results = function(*inputs)
    places = [None if r is None else tape.slot(r) for r in results]
    missing = [k for k, place in enumerate(places) if place is None]
    program = Program(tape.nodes, entries, [p for p in places if p is not None], tape.kinds)
    return program, tape.values, missing


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the inputs through every ATen operation; values live on, so identities are unique."""

    def __init__(self, region: Region | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.values: dict[int, Tensor] = {}
        self.kinds: Kinds = {}
        self._region = region
        self._slots: dict[int, int] = {}
        # storages of constants that received a value that depends on the inputs
        self._written: set[int] = set()

    def enter(self, x: Tensor) -> int:
        if x.is_complex():  # a transpose of complex values would need a conjugate
            raise Unrecordable("the backward pass goes through complex numbers")
        index = len(self.values)
        self.values[index] = x
        self.kinds[index] = (tuple(x.shape), x.dtype)
        self._slots[id(x)] = index
        return index

    def slot(self, x: Tensor) -> int | None:
        return self._slots.get(id(x))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        slots = self._slots
        tensors = [x for x in leaves_of(args, kwargs) if isinstance(x, Tensor)]
        followed = [x for x in tensors if id(x) in slots]
        # Writing through a view that is not followed would be missed.
        if self._written and any(
            id(x) not in slots and x.untyped_storage().data_ptr() in self._written for x in tensors
        ):
            raise Unrecordable(
                f"{func} reads a tensor that was written in place through another view"
            )
        if not followed or func in SHAPES:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        # Linear operations with constants that are known now: a derivative, a whole norm.
        alone = all(x is args[0] for x in followed)
        if func is aten.detach.default:
            func = aten.alias.default  # the same for values, and transparent to the transpose
        elif alone and func in POINTWISE:
            derivative = func(torch.ones_like(args[0]), *args[1:], **kwargs)
            func, args, kwargs = aten.mul.Tensor, (args[0], derivative), {}
            tensors = list(args)
        elif alone and func in NORMS and not kwargs and not any(args[-1][1:]):
            gradient = self._perhaps(pullback, (args[0], func, tuple(args[1:])), args[0].shape)
            return gradient, *[None] * (len(args[-1]) - 1)
        # Arithmetic that may be left out, and all else.
        if func in PRODUCTS:
            return self._perhaps(func, args, (*args[0].shape[:-1], args[1].shape[-1]))
        if func in ALIKE and not kwargs and all(_same(x, args[0]) for x in tensors):
            return self._perhaps(func, args, args[0].shape)
        result = func(*args, **kwargs)
        outs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if not outs or not all(isinstance(x, Tensor) or x is None for x in outs):
            raise Unrecordable(f"{func} turns a vector into {type(result).__name__}")
        self._emit(func, args, kwargs, outs, _flops(func, args, kwargs, result))
        return result

    def fixed(self, g: Tensor, rows: Tensor) -> Tensor:
        """Record row i of `rows`, (T, k), times g_i. `rows` now belongs to the tape."""
        slot, source = self._slots[id(g)], Slot(self._slots[id(g)])
        own = self._region.rows.get(slot) if self._region is not None else None
        with _disable_current_modes():
            if own is not None and own.positions is None:
                # g = u ⊙ g(1): the value at u = 1 is there without a copy
                rows, source = rows.mul_(g[:, None]), Slot(0)
                value = rows.view_as(rows)
            else:
                value = g[:, None] * rows
        self._emit(spread, (source, Rows(len(rows)), rows), {}, (value,))
        return value

    def _perhaps(self, func: Any, args: Any, shape: Sequence[int]) -> Tensor:
        """Record an operation with a result of this shape; carry it out if that will be read."""
        slot, result = len(self.values), args[0].new_empty(shape)
        if self._emit(func, args, {}, (result,), _flops(func, args, {}, result)):
            del self._slots[id(result)]  # another tensor may get its identity
            result = self.values[slot] = func(*args)
            self._slots[id(result)] = slot
        return result

    def _emit(
        self, func: Any, args: Any, kwargs: Any, outs: Sequence[Tensor | None], flops: int = 0
    ) -> bool:
        args, kwargs = tuple(self._refer(args)), self._refer(kwargs)
        made = tuple(-1 - len(self.values) if x is None else self.enter(x) for x in outs)
        return self._append(Node(func, args, kwargs, made, flops))

    def _append(self, node: Node) -> bool:
        """Append the node, and say whether its value will be read."""
        self.nodes.append(node)
        return self._region is None or self._region.reads(node, self.kinds)

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation that writes into its first argument as one on a copy of it."""
        target, slot = args[0], self._slots.get(id(args[0]))
        others = func._schema.arguments[1:]
        if any(a.alias_info is not None and a.alias_info.is_write for a in others):
            raise Unrecordable(f"{func} writes into more than its first argument")
        storage = target.untyped_storage().data_ptr()
        current = set(self._slots.values()) - {slot}
        shared = any(self.values[k].untyped_storage().data_ptr() == storage for k in current)
        if shared or (slot is None and target._is_view()):
            raise Unrecordable(f"{func} writes into a view")
        source = target.clone() if slot is None else Slot(slot)
        rest, settings = self._refer(args[1:]), self._refer(kwargs)
        copy = self.enter(target)
        self._append(Node(aten.clone.default, (source,), {}, (copy,)))
        result = func(*args, **kwargs)
        after = self.enter(target)
        self._written.add(storage)
        self._append(Node(func, (Slot(copy), *rest), settings, (after,)))
        return result

    def _refer(self, x: Any) -> Any:
        """Put slots where a tree has followed tensors."""
        if isinstance(x, Tensor):
            slot = self._slots.get(id(x))
            return x.detach() if slot is None else Slot(slot)
        return rebuild(self._refer, x)


def _same(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = flop_registry.get(getattr(func, "overloadpacket", None))
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


class CrossEntropy(torch.autograd.Function):
    """−log q(y_i), the numbers of `functional.cross_entropy`, of logits (T, V) and targets (T,).

    One operation, so that set-up reads the logits twice and makes one other matrix of their size.
    The gradient is Γ u with the fixed rows Γ_i = q_i − onehot(y_i), and is recorded as such.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        picked = [
            torch.log_softmax(logits[block], 1).gather(1, target[block, None])[:, 0]
            for block in _blocks(logits)
        ]
        loss = -torch.cat(picked)
        ctx.save_for_backward(logits, target, loss)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, target, loss = ctx.saved_tensors
        at = target[:, None]
        log_normaliser = logits.gather(1, at) + loss[:, None]
        gamma = torch.empty_like(logits)
        for block in _blocks(logits):
            torch.sub(logits[block], log_normaliser[block], out=gamma[block]).exp_()
        gamma.scatter_add_(1, at, gamma.new_full((1, 1), -1).expand(len(at), 1))
        tape = _get_current_dispatch_mode()
        if isinstance(tape, _Tape) and tape.slot(g) is not None:
            return tape.fixed(g, gamma), None
        return gamma.mul_(g[:, None]), None


def _blocks(logits: Tensor) -> list[slice]:
    step = max(1, BLOCK // max(1, logits.shape[1]))
    return [slice(k, k + step) for k in range(0, len(logits), step)]
