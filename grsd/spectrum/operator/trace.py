"""Where the parameters of a model enter its output: one record per use, made in a forward pass.

`Trace` runs the model under a torch-function mode. A call such as `F.linear(x, W, b)` with
trainable W or b is carried out with their detached values; what is kept is a record of each
(:mod:`grsd.spectrum.operator.rules`) and the place (a gradient edge) of the output. The model is
not touched, so several threads may look at one. A parameter that enters in any other way stays in
the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import Signature, signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from grsd.spectrum.operator.factors import Use
from grsd.spectrum.operator.forward_pass import Guard, transformed
from grsd.spectrum.programs.record import Unrecordable

Place = Tensor | GradientEdge
# From a call (its arguments by name, and the function as `func`): the uses of parameters in it, or
# the result of a call that has none; None where its parameters stay in the graph.
Reader = Callable[[SimpleNamespace], Sequence[Use] | Tensor | None]

DERIVATIVES = frozenset({torch.autograd.grad, Tensor.backward})
READERS: dict[Any, tuple[Reader, Signature, bool]] = {}


def reads(
    *functions: Any, form: Callable[..., Any] | None = None, always: bool = False
) -> Callable[[Reader], Reader]:
    """Register the reader of calls of `functions`; `form`: their parameters, if Python cannot tell.

    A reader sees calls with a trainable parameter among the arguments; all if `always` is set.
    """

    def register(reader: Reader) -> Reader:
        for function in functions:
            READERS[function] = (reader, signature(form or function), always)
        return reader

    return register


class Trace(Guard):
    """Records the uses of `parameters` (trainable ones) in the calls that are made under it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.uses: list[Use] = []
        self.places: list[Place] = []
        self._numbers = {id(p): k for k, p in enumerate(parameters)}
        self._kept: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.look(func, args, kwargs or {})
        if func in DERIVATIVES and kwargs.get("create_graph") and not transformed():
            raise Unrecordable("the forward pass differentiates on its own, with create_graph=True")
        # Let calls pass that no reader watches, or knows in this form.
        reader, form, always = READERS.get(func, (None, None, False))
        watched = always or self._trainable((*args, *kwargs.values()))
        if not reader or not form or not watched or not torch.is_grad_enabled() or transformed():
            return func(*args, **kwargs)
        try:
            bound = form.bind(*args, **kwargs)
        except TypeError:  # arguments that the reader does not know
            return func(*args, **kwargs)
        bound.apply_defaults()
        read = reader(SimpleNamespace(func=func, **bound.arguments))
        if isinstance(read, Tensor):
            return read
        uses = [use for use in read or () if self.has(use.parameter)]
        if read is None or len(uses) != len(self._trainable(bound.arguments.values())):
            return func(*args, **kwargs)  # a parameter has another part in the call
        # Carry the call out with detached parameters, and note where its output is.
        args = [x.detach() if self.has(x) else x for x in args]
        kwargs = {name: x.detach() if self.has(x) else x for name, x in kwargs.items()}
        return self._note(func(*args, **kwargs), uses)

    def has(self, x: Any) -> bool:
        """Say whether this is a trainable parameter."""
        return id(x) in self._numbers

    def _trainable(self, values: Iterable[Any]) -> list[Any]:
        return [x for x in values if id(x) in self._numbers]

    def _note(self, out: Tensor, uses: Sequence[Use]) -> Tensor:
        """Record the uses with the call's output, and return the output."""
        place: Place
        if out.requires_grad:
            place = get_gradient_edge(out)
        else:  # nothing trainable before this call: make its output a leaf
            place = out.detach().requires_grad_()
            out = place.clone()
        for use in uses:
            if use.data is not None:
                self._kept.append((use.data, use.data._version))
                use.data = use.data.detach()
            use.number = self._numbers[id(use.parameter)]
            use.place, use.shape = len(self.places), out.shape
            self.uses.append(use)
        self.places.append(place)
        return out

    def check_inputs(self) -> None:
        """Raise ValueError when a recorded input was overwritten later in the pass."""
        changed = sum(data._version != version for data, version in self._kept)
        if changed:
            raise ValueError(
                f"{changed} inputs of parametrised layers were overwritten in place during the "
                "forward pass: replace in-place operations (inplace=True, +=) on them, or use "
                'method="graph"'
            )
        self._kept.clear()
