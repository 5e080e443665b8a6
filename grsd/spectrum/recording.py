"""Recording: one backward pass is watched at the level of ATen operations and becomes a linear program.

`record` keeps the operations that depend on the inputs; everything else (weights, activations, derivatives of activations)
is a constant that is evaluated once. The programs are in :mod:`grsd.spectrum.tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from grsd.spectrum.tape import NORMS, Node, Program, Slot, leaves_of, pullback, rebuild

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


class Unrecordable(RuntimeError):
    """The pass does something that a linear program cannot repeat."""


def record(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor]
) -> tuple[Program, dict[int, Tensor], list[int]]:
    """Run `function(*inputs)`, linear in its inputs, and record it.

    Returns
    -------
    program
        Its outputs are those results that depend on the inputs.
    values : dict
        The value of every slot in this run.
    missing : list of int
        Positions of the results that are None or do not depend on the inputs.
    """
    tape = _Tape()
    entries = [tape.enter(x) for x in inputs]
    with tape:
        results = function(*inputs)
    places = [None if r is None else tape.slot(r) for r in results]
    missing = [k for k, place in enumerate(places) if place is None]
    kinds = {slot: (tuple(x.shape), x.dtype) for slot, x in tape.values.items()}
    program = Program(tape.nodes, entries, [p for p in places if p is not None], kinds)
    return program, tape.values, missing


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the inputs through every ATen operation. Values are kept alive so that their identities stay unique."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.values: dict[int, Tensor] = {}
        self._slots: dict[int, int] = {}
        self._written: set[int] = set()  # storages of constants that received a value that depends on the inputs

    def enter(self, x: Tensor) -> int:
        index = len(self.values)
        self.values[index] = x
        self._slots[id(x)] = index
        return index

    def slot(self, x: Tensor) -> int | None:
        return self._slots.get(id(x))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in leaves_of(args, kwargs) if isinstance(x, Tensor)]
        followed = [x for x in leaves if id(x) in self._slots]
        if self._written and any(
            id(x) not in self._slots and x.untyped_storage().data_ptr() in self._written for x in leaves
        ):
            raise Unrecordable(f"{func} reads a tensor that was written in place through another view")
        if not followed or func in SHAPES:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs)
        alone = not any(x is not args[0] for x in followed)
        if func is aten.detach.default:
            func = aten.alias.default  # the same for values, and transparent to the transpose
        elif alone and func in POINTWISE:
            func, args, kwargs = aten.mul.Tensor, (args[0], _derivative(func, args, kwargs)), {}
        result = func(*args, **kwargs)
        if alone and func in NORMS and all(x is None for x in result[1:]):
            self._emit(pullback, (args[0], func, tuple(args[1:])), {}, result[:1])
            return result
        outs = (result,) if isinstance(result, Tensor) else tuple(result) if isinstance(result, (tuple, list)) else ()
        if not outs or not all(isinstance(x, Tensor) or x is None for x in outs):
            raise Unrecordable(f"{func} turns a vector into {type(result).__name__}")
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        flops = int(count(*args, **kwargs, out_val=result)) if count is not None else 0
        self._emit(func, args, kwargs, outs, flops)
        return result

    def _emit(self, func: Any, args: Any, kwargs: Any, outs: Sequence[Tensor | None], flops: int = 0) -> None:
        args, kwargs = self._refer(args), self._refer(kwargs)
        places = tuple(-1 - len(self.values) if x is None else self.enter(x) for x in outs)
        self.nodes.append(Node(func, tuple(args), kwargs, places, flops))

    def _in_place(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation that writes into its first argument as one on a copy of that argument."""
        target, slot = args[0], self._slots.get(id(args[0]))
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments[1:]):
            raise Unrecordable(f"{func} writes into more than its first argument")
        storage = target.untyped_storage().data_ptr()
        current = set(self._slots.values()) - {slot}
        if any(self.values[k].untyped_storage().data_ptr() == storage for k in current) or (
            slot is None and target._is_view()
        ):
            raise Unrecordable(f"{func} writes into a view")
        source = target.clone() if slot is None else Slot(slot)
        copy = len(self.values)
        self.values[copy] = target
        self.nodes.append(Node(aten.clone.default, (source,), {}, (copy,)))
        rest = self._refer(args[1:])
        result = func(*args, **kwargs)
        after = len(self.values)
        self.values[after] = target
        self._slots[id(target)] = after
        self._written.add(storage)
        self.nodes.append(Node(func, (Slot(copy), *rest), self._refer(kwargs), (after,)))
        return result

    def _refer(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            slot = self._slots.get(id(x))
            return x.detach() if slot is None else Slot(slot)
        return rebuild(self._refer, x)


def _derivative(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the derivative of a pointwise function."""
    result: Tensor = func(torch.ones_like(args[0]), *args[1:], **kwargs)
    return result
