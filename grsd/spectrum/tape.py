"""Linear programs: a computation that is linear in its inputs, recorded once and run again without autograd.

A backward pass is linear in the vector that starts it. `record` watches one pass at the level of ATen operations and
keeps those that depend on the inputs; everything else (weights, activations, derivatives of activations) is a constant
that is evaluated once. `Program.transpose` records the backward pass of the program itself, which is the transposed map.
What the programs are for is in :mod:`grsd.spectrum.factored`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

SHADOW = 1e9  # FLOPs, some 20 ms of a CPU: below, real arithmetic is cheaper than what shape inference for a few hundred operations costs
# derivative at x times the incoming gradient: with constant x the derivative is evaluated once
POINTWISE = frozenset(
    getattr(aten, name).default
    for name in (
        "gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward elu_backward softplus_backward "
        "leaky_relu_backward hardtanh_backward hardswish_backward hardsigmoid_backward mish_backward log_sigmoid_backward"
    ).split()
    if hasattr(aten, name)
)
# dx = P (w ⊙ g) with P symmetric: the position of w in the call, and whether it runs over channels (axis 1)
NORMS = {
    aten.native_layer_norm_backward.default: (5, False),
    aten.native_group_norm_backward.default: (4, True),
    aten.native_batch_norm_backward.default: (2, True),
}
if hasattr(aten, "_fused_rms_norm_backward"):
    NORMS[aten._fused_rms_norm_backward.default] = (4, False)


# of a tensor they take the shape alone
SHAPES = frozenset(
    getattr(aten, name).default
    for name in "new_zeros zeros_like new_empty empty_like new_ones ones_like new_full full_like new_empty_strided".split()
)


class Unrecordable(RuntimeError):
    """The pass does something that a linear program cannot repeat."""


@dataclass(frozen=True)
class Slot:
    """The place of a value in a program."""

    index: int


@dataclass(frozen=True)
class Node:
    """One operation: `func(*args, **kwargs)`, where a Slot stands for a value; results go to the slots `outs`."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    flops: int = 0

    def sources(self) -> list[int]:
        """Return the slots that the node reads."""
        return [leaf.index for leaf in _leaves(self.args, self.kwargs) if isinstance(leaf, Slot)]


class Pullback(torch.autograd.Function):
    """g → P (w ⊙ g), the backward pass of a normalisation, as one kernel; its transpose is v → w ⊙ P v."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
        ctx.func, ctx.rest = func, args
        result: Tensor = func(g, *args)[0]
        return result

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        place, channels = NORMS[ctx.func]
        weight, plain = ctx.rest[place - 1], list(ctx.rest)
        plain[place - 1] = None
        g = ctx.func(v.contiguous(), *plain)[0]
        if weight is not None:
            g = g * (weight.reshape(-1, *[1] * (g.ndim - 2)) if channels else weight)
        return g, None, None


def pullback(g: Tensor, func: Any, args: tuple[Any, ...]) -> Tensor:
    """Call `Pullback`; a function of its own so that a program can name it."""
    result: Tensor = Pullback.apply(g, func, args)  # type: ignore[no-untyped-call]
    return result


class Program:
    """A recorded linear map. `run(*inputs)` returns the outputs; no gradient is recorded unless an input asks for it."""

    def __init__(self, nodes: Sequence[Node], inputs: Sequence[int], outputs: Sequence[int]) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.nodes = _reachable(nodes, self.outputs)
        last: dict[int, int] = {}
        for k, node in enumerate(self.nodes):
            last.update(dict.fromkeys(node.sources(), k))
            for out in node.outs:
                last.setdefault(out, k)
        dead: list[list[int]] = [[] for _ in self.nodes]
        for slot, k in last.items():
            if slot not in self.outputs:
                dead[k].append(slot)
        self._steps = [_compile(node, tuple(d)) for node, d in zip(self.nodes, dead, strict=True)]

    @property
    def flops(self) -> int:
        """Multiplications and additions in matrix products and convolutions of one run."""
        return sum(node.flops for node in self.nodes)

    def constants(self) -> int:
        """Return the bytes of the distinct tensors that the program holds (weights included)."""
        held: dict[int, int] = {}
        for node in self.nodes:
            for leaf in _leaves(node.args, node.kwargs):
                if isinstance(leaf, Tensor):
                    held[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return sum(held.values())

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Return the outputs at `inputs`. Cost: the recorded operations; temporaries are freed after their last use."""
        return self.consume(list(inputs))

    def consume(self, inputs: list[Tensor]) -> list[Tensor]:
        """As `run`, and empty the list, so that an input is freed after its last use."""
        values: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        inputs.clear()
        for func, args, kwargs, holes, outs, dead in self._steps:
            call = list(args)
            for k, slot in holes:
                call[k] = values[slot] if type(slot) is int else _fill(slot, values)
            result = func(*call, **kwargs) if not kwargs else func(*call, **_fill(kwargs, values))
            if len(outs) == 1:
                values[outs[0]] = result[0] if type(result) is tuple else result
            else:
                values.update(zip(outs, result, strict=True))
            del call, result
            for slot in dead:
                del values[slot]
        return [values[slot] for slot in self.outputs]

    def transpose(self, *inputs: Tensor) -> Program:
        """Return the transposed map, from one vector per output to one per input; `inputs` only lend their shapes.

        Cost: one run of each; of a program that is large for a CPU, no arithmetic: the vectors then live on the meta
        device while the program's backward pass is recorded, next to constants that are real.
        """
        shadow = self.flops > SHADOW and all(x.device.type == "cpu" for x in inputs)
        starts = [x.detach().to("meta" if shadow else x.device, copy=True).requires_grad_() for x in inputs]
        with torch.enable_grad(), _Tape() if shadow else nullcontext():
            results = self.run(*starts)
        seeds = [torch.empty_like(x) for x in results]

        def backward(*seeds: Tensor) -> Sequence[Tensor | None]:
            return torch.autograd.grad(results, starts, seeds, allow_unused=True)

        program, _, missing = record(backward, seeds)
        if missing:
            raise Unrecordable("an input of the program has no effect on its outputs")
        return program


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
    program = Program(tape.nodes, entries, [p for p in places if p is not None])
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
        leaves = [x for x in _leaves(args, kwargs) if isinstance(x, Tensor)]
        if any(x.is_meta for x in leaves):
            return self._dispatch(func, args, kwargs, leaves, _on_meta)
        return self._dispatch(func, args, kwargs, leaves, _as_it_is)

    def _dispatch(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], call: Callable[..., Any]) -> Any:
        followed = [x for x in leaves if id(x) in self._slots]
        if self._written and any(
            id(x) not in self._slots and x.untyped_storage().data_ptr() in self._written for x in leaves
        ):
            raise Unrecordable(f"{func} reads a tensor that was written in place through another view")
        if not followed or func in SHAPES:
            return call(func, args, kwargs)
        if func._schema.is_mutable:
            return self._in_place(func, args, kwargs, call)
        alone = not any(x is not args[0] for x in followed)
        if func is aten.detach.default:
            func = aten.alias.default  # the same for values, and transparent to the transpose
        elif alone and func in POINTWISE:
            func, args, kwargs = aten.mul.Tensor, (args[0], _derivative(func, args, kwargs)), {}
        result = call(func, args, kwargs)
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

    def _in_place(self, func: Any, args: Any, kwargs: Any, call: Callable[..., Any]) -> Any:
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
        result = call(func, args, kwargs)
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
        return _rebuild(self._refer, x)


def _as_it_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out an operation on shapes alone."""
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return func(*_to_meta(args), **_to_meta(kwargs))


def _to_meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else _rebuild(_to_meta, x)


def _derivative(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the derivative of a pointwise function, on the device of its saved tensor."""
    saved = next((x for x in args[1:] if isinstance(x, Tensor)), args[0])
    result: Tensor = func(torch.ones_like(args[0], device=saved.device), *args[1:], **kwargs)
    return result


def _rebuild(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to what a tuple, list or dict holds; return anything else as it is."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([function(branch) for branch in tree])
    if isinstance(tree, dict):
        return {key: function(branch) for key, branch in tree.items()}
    return tree


def _leaves(args: Any, kwargs: dict[str, Any] | None = None) -> list[Any]:
    found: list[Any] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, (tuple, list)):
            found.extend(_leaves(x))
        else:
            found.append(x)
    return found


def _reachable(nodes: Sequence[Node], outputs: Sequence[int]) -> list[Node]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outs):
            wanted.update(node.sources())
            kept.append(node)
    return kept[::-1]


def _compile(node: Node, dead: tuple[int, ...]) -> tuple[Any, ...]:
    holes: list[tuple[int, Any]] = []
    for k, arg in enumerate(node.args):
        if isinstance(arg, Slot):
            holes.append((k, arg.index))
        elif isinstance(arg, (tuple, list)) and any(isinstance(leaf, Slot) for leaf in _leaves(arg)):
            holes.append((k, arg))
    return node.func, node.args, node.kwargs, holes, node.outs, dead


def _fill(tree: Any, values: dict[int, Any]) -> Any:
    if isinstance(tree, Slot):
        return values[tree.index]
    return _rebuild(lambda branch: _fill(branch, values), tree)
