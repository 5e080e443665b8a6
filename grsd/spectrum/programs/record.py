"""Recording: one backward pass is watched at the level of ATen operations and becomes a linear program.

`record` keeps the operations that depend on the inputs; everything else (weights, activations, derivatives of activations)
is a constant that is evaluated once. The programs are in :mod:`grsd.spectrum.programs.program`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils.flop_counter import flop_registry

from grsd.spectrum.programs.program import (
    NORMS,
    Kind,
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

# derivative at x times the incoming gradient: with constant x the derivative is evaluated once
POINTWISE = frozenset(
    getattr(aten, name).default
    for name in (
        "gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward elu_backward softplus_backward "
        "leaky_relu_backward hardtanh_backward hardswish_backward hardsigmoid_backward mish_backward log_sigmoid_backward"
    ).split()
    if hasattr(aten, name)
)
# of a tensor they take the shape alone
SHAPES = frozenset(
    getattr(aten, name).default
    for name in "new_zeros zeros_like new_empty empty_like new_ones ones_like new_full full_like new_empty_strided".split()
)


# operations whose arithmetic can be left out → shape of the result
EXPENSIVE: dict[Any, Callable[..., tuple[int, ...]]] = {
    aten.mm.default: lambda a, b: (a.shape[0], b.shape[1]),
    aten.bmm.default: lambda a, b: (*a.shape[:2], b.shape[2]),
    aten.mul.Tensor: lambda a, b: _broadcast(a, b),
    aten.add.Tensor: lambda a, b: _broadcast(a, b),
    aten._softmax_backward_data.default: lambda g, *rest: tuple(g.shape),
    aten.slice_backward.default: lambda g, shape, *rest: tuple(shape),
}


class Unrecordable(RuntimeError):
    """The pass does something that a linear program cannot repeat."""


def record(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    region: Region | None = None,
) -> tuple[Program, dict[int, Tensor], list[int]]:
    """Run `function(*inputs)`, linear in its inputs, and record it.

    Parameters
    ----------
    region
        Says of every operation whether its value will be read. The arithmetic of the others is left out, and their values
        are memory that nothing was written to.

    Returns
    -------
    program
        Its outputs are those results that depend on the inputs.
    values : dict
        The value of every slot in this run.
    missing : list of int
        Positions of the results that are None or do not depend on the inputs.
    """
    tape = _Tape(region)
    entries = [tape.enter(x) for x in inputs]
    with tape:
        results = function(*inputs)
    places = [None if r is None else tape.slot(r) for r in results]
    missing = [k for k, place in enumerate(places) if place is None]
    program = Program(tape.nodes, entries, [p for p in places if p is not None], tape.kinds)
    return program, tape.values, missing


class Region(Protocol):
    """Follows a program while it is recorded; `rows` holds the slots whose values are read."""

    rows: dict[int, Rows]

    def reads(self, node: Node, kinds: dict[int, Kind]) -> bool:
        """Say whether the values that the node makes will be read."""
        ...


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the inputs through every ATen operation. Values are kept alive so that their identities stay unique."""

    def __init__(self, region: Region | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.values: dict[int, Tensor] = {}
        self.kinds: dict[int, Kind] = {}
        self._region = region
        self._slots: dict[int, int] = {}
        self._written: set[int] = (
            set()
        )  # storages of constants that received a value that depends on the inputs

    def enter(self, x: Tensor) -> int:
        if (
            x.is_complex()
        ):  # transposes are written for real values; a complex one has a conjugate in it
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
        leaves = [x for x in leaves_of(args, kwargs) if isinstance(x, Tensor)]
        slots = self._slots
        followed = [x for x in leaves if id(x) in slots]
        if self._written and any(
            id(x) not in slots and x.untyped_storage().data_ptr() in self._written for x in leaves
        ):
            raise Unrecordable(
                f"{func} reads a tensor that was written in place through another view"
            )
        if not followed or func in SHAPES:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        alone = not any(x is not args[0] for x in followed)
        if func is aten.detach.default:
            func = aten.alias.default  # the same for values, and transparent to the transpose
        elif alone and func in POINTWISE:
            func, args, kwargs = aten.mul.Tensor, (args[0], _derivative(func, args, kwargs)), {}
        norm = alone and func in NORMS and not kwargs and not any(args[-1][1:])
        if self._region is not None and not kwargs and (norm or func in EXPENSIVE):
            shape = tuple(args[0].shape) if norm else EXPENSIVE[func](*args)
            if all(x.dtype == followed[0].dtype for x in leaves):
                return self._perhaps(func, args, shape, norm)
        result = func(*args, **kwargs)
        if norm:
            self._emit(pullback, (args[0], func, tuple(args[1:])), {}, result[:1])
            return result
        outs = (
            (result,)
            if isinstance(result, Tensor)
            else tuple(result)
            if isinstance(result, (tuple, list))
            else ()
        )
        if not outs or not all(isinstance(x, Tensor) or x is None for x in outs):
            raise Unrecordable(f"{func} turns a vector into {type(result).__name__}")
        self._emit(func, args, kwargs, outs, _flops(func, args, kwargs, result))
        return result

    def _perhaps(self, func: Any, args: Any, shape: tuple[int, ...], norm: bool) -> Any:
        """Record an operation, and carry it out if its value will be read."""
        slot, like = len(self.values), next(x for x in leaves_of(args) if isinstance(x, Tensor))
        self.kinds[slot] = (shape, like.dtype)
        kept = (pullback, (args[0], func, tuple(args[1:]))) if norm else (func, args)
        result = like.new_empty(shape)
        node = Node(
            kept[0], self._refer(tuple(kept[1])), {}, (slot,), _flops(func, args, {}, result)
        )
        self.nodes.append(node)
        assert self._region is not None
        if self._region.reads(node, self.kinds):
            result = func(*args)[0] if norm else func(*args)
        self.values[slot] = result
        self._slots[id(result)] = slot
        return (result, *[None] * (len(args[-1]) - 1)) if norm else result

    def fixed(self, g: Tensor, rows: Tensor) -> Tensor:
        """Record row i of `rows`, (T, k), times g_i. `rows` now belongs to the tape."""
        slot, source = self._slots[id(g)], Slot(self._slots[id(g)])
        own = self._region.rows.get(slot) if self._region is not None else None
        with _disable_current_modes():
            if (
                own is not None and own.positions is None
            ):  # g = u ⊙ g(1): the value at u = 1 is there without a copy
                rows, source = rows.mul_(g[:, None]), Slot(0)
                value = rows.view_as(rows)
            else:
                value = g[:, None] * rows
        self._emit(spread, (source, Rows(len(rows)), rows), {}, (value,))
        return value

    def _emit(
        self, func: Any, args: Any, kwargs: Any, outs: Sequence[Tensor | None], flops: int = 0
    ) -> None:
        args, kwargs = self._refer(args), self._refer(kwargs)
        self._append(
            Node(
                func,
                tuple(args),
                kwargs,
                tuple(-1 - len(self.values) if x is None else self.enter(x) for x in outs),
                flops,
            )
        )

    def _append(self, node: Node) -> None:
        self.nodes.append(node)
        if self._region is not None:
            self._region.reads(node, self.kinds)

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation that writes into its first argument as one on a copy of that argument."""
        target, slot = args[0], self._slots.get(id(args[0]))
        if any(
            a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[1:]
        ):
            raise Unrecordable(f"{func} writes into more than its first argument")
        storage = target.untyped_storage().data_ptr()
        current = set(self._slots.values()) - {slot}
        if any(self.values[k].untyped_storage().data_ptr() == storage for k in current) or (
            slot is None and target._is_view()
        ):
            raise Unrecordable(f"{func} writes into a view")
        source = target.clone() if slot is None else Slot(slot)
        rest, settings, kwargs = self._refer(args[1:]), kwargs, self._refer(kwargs)
        copy = self.enter(target)
        self._append(Node(aten.clone.default, (source,), {}, (copy,)))
        result = func(*args, **settings)
        after = self.enter(target)
        self._written.add(storage)
        self._append(Node(func, (Slot(copy), *rest), kwargs, (after,)))
        return result

    def _refer(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            slot = self._slots.get(id(x))
            return x.detach() if slot is None else Slot(slot)
        return rebuild(self._refer, x)


def current() -> _Tape | None:
    """Return the tape that is recording in this thread."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, _Tape) else None


def _broadcast(a: Any, b: Any) -> tuple[int, ...]:
    """Return the shape of a ∘ b; torch's own function for it costs more than the operation."""
    first, second = tuple(a.shape), tuple(getattr(b, "shape", ()))
    short, long = sorted((first, second), key=len)
    short = (1,) * (len(long) - len(short)) + short
    return tuple(m if n == 1 else n for n, m in zip(short, long, strict=True))


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = flop_registry.get(func.overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0


def _derivative(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the derivative of a pointwise function."""
    result: Tensor = func(torch.ones_like(args[0]), *args[1:], **kwargs)
    return result
