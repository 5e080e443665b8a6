"""How the forward pass that makes J is run: as the model's function is written, and watched.

Under `as_written` no part is recomputed and nothing that a graph saves is changed on its way. A
`Guard` sees every call of torch in the pass. `states` tell whether random numbers were drawn.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Signature, getclosurevars, isfunction, signature
from threading import get_ident
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointFunction

IN_PLACE = frozenset(
    name
    for name in dir(Tensor)
    if (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")
    or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__")
)
# getters and setters of a tensor as a mode sees them
NODE = vars(torch._C.TensorBase)["grad_fn"].__get__
SETS_GRADIENT = (Tensor.requires_grad_, vars(torch._C.TensorBase)["requires_grad"].__set__)
HOOKS = (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, *_, **__):  # type: ignore[no-untyped-def]
    ...


FORMS: dict[Any, Signature] = {
    functional.scaled_dot_product_attention: signature(_attention),
    functional.dropout: signature(functional.dropout),
    functional.dropout1d: signature(functional.dropout1d),
    functional.dropout2d: signature(functional.dropout2d),
    functional.dropout3d: signature(functional.dropout3d),
    functional.alpha_dropout: signature(functional.alpha_dropout),
    functional.feature_alpha_dropout: signature(functional.feature_alpha_dropout),
    functional.embedding: signature(functional.embedding),
    functional.embedding_bag: signature(functional.embedding_bag),
}


def transformed() -> bool:
    """Say whether a call is inside a transformation of `torch.func` or has forward tangents."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _plain(x: Any) -> bool:
    """Say whether this is a tensor in memory, and no wrapper of others."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and x.numel() > 0
        and not is_traceable_wrapper_subclass(x)
    )


class Guard(TorchFunctionMode):
    """Refuses calls of a forward pass after which J is not its Jacobian.

    Attributes
    ----------
    generators : whether the model drew from a `torch.Generator` of its own.
    nodes : whether the model took hold of a node of its graph, where it may change gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators = self.nodes = False
        self._guarded: dict[int, Tensor] = {}

    def protect(self, parameters: Iterable[Tensor]) -> None:
        """Let the pass change none of these."""
        self._guarded = {p.untyped_storage().data_ptr(): p for p in parameters if _plain(p)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.look(func, args, kwargs or {})
        return func(*args, **kwargs)

    def look(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Raise ValueError for a call that is refused; return its arguments, in a dense layout."""
        first: Any = args[0] if args else None
        name = getattr(func, "__name__", "")
        # What changes parameters, or their gradients, or cannot be seen again.
        if name in IN_PLACE and (changed := self._parameter(first)) is not None:
            raise ValueError(
                f"the forward pass changes the parameter of shape {tuple(changed.shape)} in place "
                f"({name}): move that update out of the forward pass, or work on a copy"
            )
        if func in HOOKS and not _only_looks(args[1:]):
            raise ValueError(
                f"the forward pass registers a hook ({name}) on a tensor of shape "
                f"{tuple(first.shape)}: it may change gradients on their way, so that they give no "
                "Jacobian. Take the hook out of the model"
            )
        if func in SETS_GRADIENT and self._parameter(first) is not None:
            wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            if wanted != first.requires_grad:
                raise ValueError(
                    f"the forward pass sets requires_grad of the parameter of shape "
                    f"{tuple(first.shape)} to {wanted}: set it before, or use its detach()"
                )
        self.nodes |= func == NODE
        self.generators |= any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values()))
        return self._settings(func, args, kwargs) if func in FORMS else (args, kwargs)

    def _parameter(self, x: Any) -> Tensor | None:
        """Return the guarded parameter that `x` is, or shares its memory with."""
        if transformed() or not _plain(x):
            return next((p for p in self._guarded.values() if p is x), None)
        return self._guarded.get(x.untyped_storage().data_ptr())

    def _settings(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Refuse active dropout, and ask for dense gradients of tables."""
        try:
            bound = FORMS[func].bind(*args, **kwargs)
        except TypeError:  # the call itself will say what is wrong
            return args, kwargs
        bound.apply_defaults()
        given = bound.arguments
        if given.get("sparse"):
            given["sparse"] = False
            return bound.args, bound.kwargs
        rate = given.get("dropout_p", given.get("p", 0.0) if given.get("training") else 0.0)
        if rate > 0:
            raise ValueError(
                f"dropout is active (p = {rate}): each pass would see another network. "
                "Call model.eval() first"
            )
        return args, kwargs


def call(
    model: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Run the model with `values` in the places of its parameters and buffers of these names.

    What is tied stays tied, and the model is left as it was. `torch.func.functional_call` leaves
    the values in a module that the model holds under two names.
    """
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    placed = {id(named[name]): value for name, value in values.items() if name in named}
    tables: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({k: placed[id(x)] for k, x in table.items() if id(x) in placed})
        return model(*args, **(kwargs or {}))
    finally:
        for table, found in zip(tables, before, strict=True):
            table.clear()
            table.update(found)


@contextmanager
def as_written() -> Iterator[None]:
    """Run the parts under `torch.utils.checkpoint` in this thread as if there were none.

    They are recomputed in a backward pass by hooks on what a graph saves, or (`use_reentrant`) by
    an autograd.Function that does not show its parameters. Neither is part of the model's function;
    nor are other hooks on saved tensors (`save_on_cpu`, quantising ones), which are left out too.
    One thread at a time may be inside; the others are not touched.
    """
    thread, hooks, reentrant = get_ident(), saved_tensors_hooks, cast(Any, CheckpointFunction)
    apply = reentrant.apply
    push, pop = hooks.__enter__, hooks.__exit__

    def entered(self: saved_tensors_hooks) -> None:
        return None if get_ident() == thread else push(self)

    def left(self: saved_tensors_hooks, *why: object) -> None:
        return None if get_ident() == thread else pop(self, *why)

    def applied(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        here = get_ident() == thread
        return function(*args) if here else apply(function, preserve, *args)

    # Hooks that were pushed before the pass rest as well.
    engine: Any = torch._C._autograd
    resting: list[Any] = []
    while (pair := engine._top_saved_tensors_default_hooks(True)) is not None:
        resting.append(pair)
        engine._pop_saved_tensors_default_hooks()
    try:
        hooks.__enter__, hooks.__exit__ = entered, left  # type: ignore[method-assign]
        reentrant.apply = staticmethod(applied)
        # A push that does not come by the class is an error.
        with disable_saved_tensors_hooks(
            "the forward pass pushes hooks on saved tensors past the class "
            "torch.autograd.graph.saved_tensors_hooks: take them out of the model"
        ):
            yield
    finally:
        hooks.__enter__, hooks.__exit__ = push, pop  # type: ignore[method-assign]
        del reentrant.apply  # the inherited one
        for pair in reversed(resting):
            engine._push_saved_tensors_default_hooks(*pair)


def states() -> dict[str, Any]:
    """Return the states of the generators of random numbers that any code may draw from."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (it is the global one)
    found: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": (name, np.asarray(keys).tobytes(), *rest),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["torch.cuda"] = [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return found


@contextmanager
def same_generators() -> Iterator[None]:
    """Put the generators back as they were found."""
    ready: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if ready else ()):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)  # noqa: NPY002


def refuse_noise(drawn: list[str], training: bool, rows: Tensor, run: Callable[[], Tensor]) -> None:
    """Raise ValueError if random numbers may reach the rows: in training, or if passes differ."""
    with torch.no_grad():
        if not training and torch.equal(run(), rows):
            return
    raise ValueError(
        f"the forward pass draws random numbers ({', '.join(drawn)}): each pass would see another "
        "network. Call model.eval() first, or draw them outside and pass them as inputs"
    )


class _Detaching(TorchFunctionMode):
    """Tensors in a deep copy are constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def copy_of(x: Any) -> Any:
    """Return a copy of a part of the inputs that a model may write to: a tensor, a cache, …"""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if callable(x):
        return x
    with _Detaching():
        return copy.deepcopy(x)


def _only_looks(hooks: Sequence[Any]) -> bool:
    """Say whether a hook is one of torch's `ModuleTracker`: `FlopCounterMode` registers them."""
    closures = [getclosurevars(hook).nonlocals for hook in hooks if isfunction(hook)]
    inside = [getattr(c.get("fn"), "__module__", "") for c in closures]
    return inside == ["torch.utils.module_tracker"]
