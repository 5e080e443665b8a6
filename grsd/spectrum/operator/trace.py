"""Where the parameters of a model enter its output: one record per use, made during an ordinary forward pass.

`trace` runs the model under a torch-function mode. A call such as `F.linear(x, W, b)` with trainable W or b is carried out
with their detached values; what is kept is the input and the place (a gradient edge) of the output. The model itself is not
touched, so nothing has to be put back, and several threads may look at one model. A parameter that enters in any other way
stays in the graph. What is done with the records is in :mod:`grsd.spectrum.operator.factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grsd.spectrum.programs.losses import CrossEntropy
from grsd.spectrum.programs.record import Unrecordable

Place = Tensor | GradientEdge
Parts = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Use:
    """One entrance of one parameter: output += d(call)/d(parameter).

    Attributes
    ----------
    rule : "rows" (s = a Wᵀ), "gather" (s = W[t]), "scale" (s = x̂ ⊙ w), "shift" (s = x + b) or "conv".
    parameter : int, position in the list of trainable parameters.
    place : index into `Trace.places`, the output s.
    shape : shape of s.
    data : Tensor or None, a of shape (..., in), t, x̂ broadcast to s, or the input of the convolution.
    spread : shape of the parameter when it is broadcast to s ("scale", "shift").
    options : "rows": {"transposed": W is (in, out)}; "gather": {"padding": row without a gradient or None};
        "conv": stride, padding, dilation, groups.
    """

    rule: str
    parameter: int
    place: int
    shape: torch.Size
    data: Tensor | None = None
    spread: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


IN_PLACE = frozenset(
    name
    for name in dir(Tensor)
    if (name.endswith("_") and not name.startswith("_") and name != "requires_grad_")
    or name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__")
)


DERIVATIVES = frozenset({torch.autograd.grad, Tensor.backward})


def _transformed() -> bool:
    """Say whether the call is made inside a transformation of `torch.func`, or carries forward-mode tangents."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


class Trace(TorchFunctionMode):
    """Records the uses of `parameters` (trainable ones) in the calls that are made under it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.uses: list[Use] = []
        self.places: list[Place] = []
        self._index = {id(p): k for k, p in enumerate(parameters)}
        self._kept: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and self.has(args[0]) and getattr(func, "__name__", "") in IN_PLACE:
            raise ValueError(
                f"the forward pass changes the parameter of shape {tuple(args[0].shape)} in place "
                f"({func.__name__}): move that update out of the forward pass, or work on a copy of the parameter"
            )
        if (
            func in DERIVATIVES and kwargs.get("create_graph") and not _transformed()
        ):  # it would see the detached values
            raise Unrecordable("the forward pass differentiates on its own, with create_graph=True")
        rule = RULES.get(func)
        if (
            rule is None
            or not torch.is_grad_enabled()
            or _transformed()
            or not _fits(rule, args, kwargs)
        ):
            return func(*args, **kwargs)
        result = rule(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def has(self, *tensors: Any) -> bool:
        """Say whether any of these is a trainable parameter."""
        return any(id(x) in self._index for x in tensors)

    def free(self, x: Any) -> Any:
        """Return the detached value of a trainable parameter, and anything else as it is."""
        return x.detach() if self.has(x) else x

    def note(self, out: Tensor, *uses: Parts) -> Tensor:
        """Record `uses` = (parameter, fields of Use) of the parameters that are trainable, and return the output."""
        place: Place
        if not out.requires_grad:  # nothing trainable before this call: make its output a leaf
            leaf = out.detach().requires_grad_()
            out, place = leaf.clone(), leaf
        else:
            place = get_gradient_edge(out)
        for parameter, fields in uses:
            if self.has(parameter):
                data = fields.pop("data", None)
                if data is not None:
                    self._kept.append((data, data._version))
                    data = data.detach()
                index = self._index[id(parameter)]
                self.uses.append(
                    Use(
                        parameter=index,
                        place=len(self.places),
                        shape=out.shape,
                        data=data,
                        **fields,
                    )
                )
        self.places.append(place)
        return out

    def check_inputs(self) -> None:
        """Raise ValueError when a recorded input was overwritten later in the pass."""
        changed = sum(data._version != version for data, version in self._kept)
        if changed:
            raise ValueError(
                f"{changed} inputs of parametrised layers were overwritten in place during the forward pass, so the "
                'Jacobian cannot be taken: replace in-place operations (inplace=True, +=) on them, or use method="graph"'
            )
        self._kept.clear()


# A rule has the signature of the function that it stands for, after the trace. It returns the function's result, or None
# when the call is not one that it knows; then the parameter stays in the graph.
RULES: dict[Any, Callable[..., Tensor | None]] = {}


def _fits(rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether the arguments have the names and the number that the rule knows."""
    names = rule.__code__.co_varnames[: rule.__code__.co_argcount + rule.__code__.co_kwonlyargcount]
    return len(args) < rule.__code__.co_argcount and all(name in names for name in kwargs)


def _stands_for(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _rows(weight: Any, data: Tensor, transposed: bool = False) -> Parts:
    return weight, {"rule": "rows", "data": data, "options": {"transposed": transposed}}


def _shift(bias: Any, spread: tuple[int, ...] | None = None) -> Parts:
    return bias, {
        "rule": "shift",
        "spread": tuple(bias.shape) if spread is None and bias is not None else spread,
    }


def _scale(weight: Any, data: Tensor | None, spread: tuple[int, ...] | None = None) -> Parts:
    shape = tuple(weight.shape) if spread is None and weight is not None else spread
    return weight, {"rule": "scale", "data": data, "spread": shape}


@_stands_for(functional.linear)
def _linear(
    trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    if not trace.has(weight, bias) or trace.has(input):
        return None
    out = functional.linear(input, trace.free(weight), trace.free(bias))
    return trace.note(out, _rows(weight, input), _shift(bias))


@_stands_for(torch.addmm)
def _addmm(
    trace: Trace, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    if not trace.has(input, mat2) or trace.has(mat1) or beta != 1 or alpha != 1:
        return None
    out = torch.addmm(trace.free(input), mat1, trace.free(mat2))
    return trace.note(out, _rows(mat2, mat1, transposed=True), _shift(input))


@_stands_for(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
def _matmul(trace: Trace, input: Tensor, other: Tensor) -> Tensor | None:
    if not trace.has(other) or trace.has(input) or other.ndim != 2:
        return None
    return trace.note(torch.matmul(input, trace.free(other)), _rows(other, input, transposed=True))


@_stands_for(functional.embedding)
def _embedding(
    trace: Trace,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if not trace.has(weight) or max_norm is not None or scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    out = functional.embedding(input, trace.free(weight))
    return trace.note(
        out, (weight, {"rule": "gather", "data": input, "options": {"padding": padding_idx}})
    )


@_stands_for(functional.layer_norm)
def _layer_norm(
    trace: Trace,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not trace.has(weight, bias):
        return None
    with torch.no_grad():
        plain = (
            functional.layer_norm(input, normalized_shape, None, None, eps)
            if trace.has(weight)
            else None
        )
    out = functional.layer_norm(input, normalized_shape, trace.free(weight), trace.free(bias), eps)
    return trace.note(out, _scale(weight, plain), _shift(bias))


@_stands_for(functional.rms_norm)
def _rms_norm(
    trace: Trace, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor | None:
    if not trace.has(weight):
        return None
    with torch.no_grad():
        plain = functional.rms_norm(input, normalized_shape, None, eps)
    return trace.note(
        functional.rms_norm(input, normalized_shape, trace.free(weight), eps), _scale(weight, plain)
    )


@_stands_for(functional.group_norm)
def _group_norm(
    trace: Trace,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Tensor | None:
    if not trace.has(weight, bias):
        return None
    with torch.no_grad():
        plain = (
            functional.group_norm(input, num_groups, None, None, eps) if trace.has(weight) else None
        )
    out = functional.group_norm(input, num_groups, trace.free(weight), trace.free(bias), eps)
    spread = (input.shape[1], *[1] * (input.ndim - 2))
    return trace.note(out, _scale(weight, plain, spread), _shift(bias, spread))


@_stands_for(functional.batch_norm)
def _batch_norm(
    trace: Trace,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not trace.has(weight, bias):
        return None
    with torch.no_grad():
        mean, var = (None, None) if training else (running_mean, running_var)
        plain = (
            functional.batch_norm(input, mean, var, None, None, training, eps=eps)
            if trace.has(weight)
            else None
        )
    w, b = trace.free(weight), trace.free(bias)
    out = functional.batch_norm(input, running_mean, running_var, w, b, training, momentum, eps)
    spread = (input.shape[1], *[1] * (input.ndim - 2))
    return trace.note(out, _scale(weight, plain, spread), _shift(bias, spread))


@_stands_for(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _mul(trace: Trace, input: Any, other: Any) -> Tensor | None:
    weight, x = (input, other) if trace.has(input) else (other, input)
    if not trace.has(weight) or trace.has(x) or not isinstance(x, Tensor):
        return None
    out = torch.mul(x, trace.free(weight))
    return trace.note(out, _scale(weight, x)) if out.shape == x.shape else None


@_stands_for(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _add(trace: Trace, input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    bias, x = (input, other) if trace.has(input) else (other, input)
    if not trace.has(bias) or trace.has(x) or not isinstance(x, Tensor) or alpha != 1:
        return None
    out = torch.add(x, trace.free(bias))
    return trace.note(out, _shift(bias)) if out.shape == x.shape else None


def _convolution(dimensions: int, call: Any) -> None:
    def pad(size: int, dilation: int, padding: str) -> int | None:
        total = dilation * (size - 1) if padding == "same" else 0
        return None if total % 2 else total // 2

    @_stands_for(call)
    def _conv(
        trace: Trace,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if not trace.has(weight, bias) or trace.has(input) or input.ndim != dimensions + 2:
            return None

        def each(value: Any) -> tuple[int, ...]:
            return (
                tuple(value) * (dimensions // len(value))
                if isinstance(value, (tuple, list))
                else (value,) * dimensions
            )

        steps, holes = each(stride), each(dilation)
        if isinstance(padding, str):
            pads = tuple(pad(k, d, padding) for k, d in zip(weight.shape[2:], holes, strict=True))
            if None in pads:
                return None
        else:
            pads = each(padding)
        out = call(input, trace.free(weight), trace.free(bias), steps, pads, holes, groups)
        how = {"stride": steps, "padding": pads, "dilation": holes, "groups": groups}
        kernel = (weight, {"rule": "conv", "data": input, "options": how})
        return trace.note(out, kernel, _shift(bias, (weight.shape[0], *[1] * dimensions)))


for _dimensions, _call in ((1, functional.conv1d), (2, functional.conv2d), (3, functional.conv3d)):
    _convolution(_dimensions, _call)


@_stands_for(functional.scaled_dot_product_attention)
def _attention(
    trace: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> None:
    _dropout(trace, query, dropout_p)


@_stands_for(functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
@_stands_for(functional.alpha_dropout, functional.feature_alpha_dropout)
def _dropout(
    trace: Trace, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> None:
    if training and p > 0:
        raise ValueError(
            f"dropout is active (p = {p}): each pass would see another network. Call model.eval() first"
        )


@_stands_for(functional.cross_entropy)
def _cross_entropy(
    trace: Trace,
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """A loss a row, whose gradient is made in one pass over the logits and kept as fixed vectors."""
    plain = (
        weight is None
        and size_average is None
        and reduce is None
        and reduction == "none"
        and label_smoothing == 0
    )
    if not plain or input.ndim != 2 or target.dtype != torch.int64 or not input.requires_grad:
        return None
    if bool(((target < 0) | (target == ignore_index)).any()):
        return None
    result: Tensor = CrossEntropy.apply(input, target)  # type: ignore[no-untyped-call]
    return result
