"""One product M u against the usual routes, its set-up, its memory, and a 100-step profile, in units of F+B.

    python benchmarks/products.py --shape 70m                           # prints
    python benchmarks/products.py --shape 70m --parts time --out FOLDER  # merges one part into the stored result

F+B is one forward and one backward pass of the same model on the same batch. All routes run in turn in one process; a ratio
is that of two calls of one round, and the table shows the median round with the lowest and the highest. Random weights of a
GPT-NeoX or Llama shape, T = 4 × 128 tokens. A library that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    LLAMA,
    SHAPES,
    Peak,
    arguments,
    build,
    forward_backward,
    interleaved,
    ratios,
    store,
)
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from grsd.spectrum import NTK, TokenLogProb, lanczos

Product = Callable[[Tensor], Tensor]
PARTS = ("time", "memory", "profile")
aten = torch.ops.aten
# products that add into their result in place, which torch's counter does not know: shapes → operations
IN_PLACE = dict.fromkeys(
    (aten.addmm_, aten.baddbmm_), shape_wrapper(lambda c, a, b, **_: 2 * math.prod(a) * b[-1])
)


class Rows(nn.Module):
    """The model with its observable: tokens (batch, length) → one number per token, (batch, length)."""

    def __init__(self, model: nn.Module, observable: TokenLogProb) -> None:
        super().__init__()
        self.model, self.observable = model, observable

    def forward(self, tokens: Tensor) -> Tensor:
        return self.observable.rows(self.model(tokens, use_cache=False).logits).view(tokens.shape)


def functional_product(rows: Rows, tokens: Tensor) -> Product:
    """Return u → J(Jᵀu) by `torch.func`: both halves run the model again."""
    parameters = {name: p.detach() for name, p in rows.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(rows, values, (tokens,)).reshape(-1)
        return result

    def product(u: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            _, back = vjp(outputs, parameters)
            result: Tensor = jvp(outputs, (parameters,), back(u))[1]
        return result

    return product


def curvlinops_product(rows: Rows, tokens: Tensor) -> Product:
    """Return u → J @ J.adjoint() @ u by curvlinops."""
    from curvlinops import JacobianLinearOperator

    J = JacobianLinearOperator(
        rows, list(rows.parameters()), [(tokens, tokens)], check_deterministic=False
    )
    M = J @ J.adjoint()
    return lambda u: M @ u


def cola_product(rows: Rows, tokens: Tensor) -> Product:
    """Return u → J @ J.T @ u by CoLA, whose Jacobian is that of a function of one flat vector."""
    from cola.ops import Jacobian

    named = dict(rows.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def outputs(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {name: part.view(p.shape) for (name, p), part in parts}
        result: Tensor = functional_call(rows, values, (tokens,)).reshape(-1)
        return result

    J = Jacobian(outputs, torch.cat([p.detach().reshape(-1) for p in named.values()]))
    M = J @ J.T

    def product(u: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            result: Tensor = M @ u
        return result

    return product


def routes(
    asked: argparse.Namespace, model: nn.Module, tokens: Tensor, observable: TokenLogProb
) -> dict[str, Callable[[], Product]]:
    """Return how each route to the product is set up."""
    rows = Rows(model, observable)
    made: dict[str, Callable[[], Product]] = {
        "factored": lambda: NTK(model, tokens, observable, normalize="sum").__matmul__,
        "retained": lambda: (
            NTK(model, tokens, observable, normalize="sum", method="graph").__matmul__
        ),
        "torch.func": lambda: functional_product(rows, tokens),
        "curvlinops": lambda: curvlinops_product(rows, tokens),
        "CoLA": lambda: cola_product(rows, tokens),
    }
    return {name: make for name, make in made.items() if name in ("factored", *asked.against)}


def prepared(made: dict[str, Callable[[], Product]]) -> dict[str, Product]:
    products = {}
    for name, make in made.items():
        try:
            products[name] = make()
        except ImportError as failure:
            print(f"{name} is left out: {failure}", file=sys.stderr)
    return products


def timing(asked: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Return ratios to F+B, ratios to the factored product, relative differences and FLOPs."""
    dtype = getattr(torch, asked.dtype)
    model, tokens, targets = build(shape, asked.batch, asked.length, dtype, "cpu")
    observable = TokenLogProb(targets)
    made = routes(asked, model, tokens, observable)
    products = prepared(made)
    unit = forward_backward(model, tokens, targets)
    u = torch.randn(targets.numel(), dtype=dtype, generator=torch.Generator().manual_seed(1))
    reference = products["factored"](u)
    difference = {
        name: float(
            torch.linalg.vector_norm(product(u) - reference) / torch.linalg.vector_norm(reference)
        )
        for name, product in products.items()
        if name != "factored"
    }
    # sums in another order, and the softmax of transformers' attention is float32 in a float64 model too; a route that
    # computes another matrix is off by order one
    limit = 100 * torch.finfo(torch.float32).eps
    for name, gap in difference.items():
        if not gap < limit:
            raise ArithmeticError(
                f"{name} and the factored product differ by {gap:.2g} on {shape}, more than {limit:.2g}"
            )
    calls: dict[str, Callable[[], Any]] = {
        name: lambda product=product: product(u) for name, product in products.items()
    }
    often = [("F+B", unit), ("factored", calls.pop("factored"))]
    square = torch.randn(2048, 2048, dtype=dtype)
    round_ = [*often, ("set-up", made["factored"]), ("matrix product", lambda: square @ square)]
    for k, other in enumerate(calls.items()):
        round_ += [other, *often] if k % 2 else [other]
    seconds = interleaved(round_, asked.repeats, warm=0)  # the differences above were the warm-up
    counted = {"F+B": unit, "product": lambda: products["factored"](u), "set-up": made["factored"]}
    flops = {name: operations(call) for name, call in counted.items()}
    plan = NTK(model, tokens, observable, normalize="sum").plan()
    passes = sum(row.flops for row in plan.rows if row.rule == "pass")
    return {
        "settings": {
            "T": targets.numel(),
            "dtype": asked.dtype,
            "threads": asked.threads,
            "rounds": asked.repeats,
        },
        "ratio": {
            name: ratios(times, seconds["F+B"])
            for name, times in seconds.items()
            if name not in ("F+B", "matrix product")
        },
        "slower": {
            name: ratios(seconds[name], seconds["factored"])
            for name in products
            if name != "factored"
        },
        "difference": difference,
        "flops": {
            "product / (F+B)": flops["product"] / flops["F+B"],
            "set-up / (F+B)": flops["set-up"] / flops["F+B"],
            "passes / (F+B)": passes / flops["F+B"],
            "planned / (F+B)": plan.flops / flops["F+B"],
        },
        # the time that the operations alone would take at the rate of one large matrix product, in units of F+B
        "ceiling": {
            name: ratios(
                [s * flops[name] / (2 * 2048**3) for s in seconds["matrix product"]], seconds["F+B"]
            )
            for name in flops
        },
    }


class Counter(TorchDispatchMode):
    """FLOPs by torch's own formulas, without the hooks on modules by which `FlopCounterMode` keeps them apart: an operator that
    is made under hooks folds less."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.known = 0, {**flop_registry, **IN_PLACE}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := self.known.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(call: Callable[[], Any]) -> int:
    """Return the FLOPs of matrix products and convolutions in a call."""
    with Counter() as counter:
        call()
    return int(counter.total)


def memory(asked: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Return bytes that a product makes at once, and those held between products, in units of the weights."""
    model, tokens, targets = build(
        shape, asked.batch, asked.length, getattr(torch, asked.dtype), "cpu"
    )
    u = torch.ones(targets.numel(), dtype=getattr(torch, asked.dtype))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak, held = {}, {}
    for name, make in routes(asked, model, tokens, TokenLogProb(targets)).items():
        with Peak() as setting_up:
            product = prepared({name: make}).get(name)
        if product is None:
            continue
        held[name] = setting_up.now / weights
        product(u)  # what the first call makes and keeps is not the cost of a product
        with Peak() as running:
            product(u)
        peak[name] = running.most / weights
        del product
    return {"peak / weights": peak, "held / weights": held}


def profile(asked: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Return the time of set-up and 100 Lanczos steps, and the share of it that is not spent in products."""
    model, tokens, targets = build(
        shape, asked.batch, asked.length, getattr(torch, asked.dtype), "cpu"
    )
    observable = TokenLogProb(targets)
    inside: list[float] = []

    class Timed:
        """An operator that notes how long each product takes."""

        def __init__(self) -> None:
            self.M = NTK(model, tokens, observable)
            self.shape, self.dtype, self.device = self.M.shape, self.M.dtype, self.M.device

        def __matmul__(self, u: Tensor) -> Tensor:
            begun = time.perf_counter()
            result = self.M @ u
            inside[-1] += time.perf_counter() - begun
            return result

    recurrence: list[float] = []

    def run() -> None:
        M = Timed()
        inside.append(0.0)
        begun = time.perf_counter()
        lanczos(M, M.M.error, min(asked.steps, targets.numel())).measure()
        recurrence.append(time.perf_counter() - begun)

    unit = ("F+B", forward_backward(model, tokens, targets))
    seconds = interleaved([unit, unit, unit, ("profile", run), unit, unit], asked.profiles, warm=0)
    beyond = [1 - a / b for a, b in zip(inside, recurrence, strict=True)]
    return {
        "profile": {
            "steps": min(asked.steps, targets.numel()),
            "ratio": ratios(seconds["profile"], seconds["F+B"]),
            "beyond products": {
                "median": sorted(beyond)[len(beyond) // 2],
                "low": min(beyond),
                "high": max(beyond),
            },
        }
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", nargs="+", choices=sorted([*SHAPES, *LLAMA]), default=["h256"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--steps", type=int, default=100, help="of a profile")
    parser.add_argument("--profiles", type=int, default=3, help="repeats of a profile")
    choices = ("retained", "torch.func", "curvlinops", "CoLA")
    parser.add_argument("--against", nargs="*", choices=choices, default=choices)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for shape in asked.shape:
        for part in asked.parts:
            row = {"time": timing, "memory": memory, "profile": profile}[part](asked, shape)
            store("products", shape, row, asked)
            print(f"\n{shape}, {part}")
            for name, value in row.items():
                print(f"  {name}: {_short(value)}")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict) and set(value) == {"median", "low", "high"}:
        return f"{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, dict):
        return "".join(f"\n    {key}: {_short(item)}" for key, item in value.items())
    return str(value)


if __name__ == "__main__":
    main()
