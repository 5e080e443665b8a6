"""One product M u, its set-up and its memory, against the usual routes, in units of one forward and backward pass.

    python benchmarks/products.py --shape 70m --repeats 9 --threads 2

All methods run interleaved in one process, on random weights of a GPT-NeoX shape, T = 4 × 128 tokens; the table shows medians.
`--out FOLDER` writes a result file with its provenance. Methods that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from grsd.results import Result, provenance, save
from grsd.spectrum import NTK, TokenLogProb

# hidden, layers, heads, vocabulary
SHAPES = {
    "tiny": (32, 2, 2, 64),
    "h256": (256, 4, 8, 2048),
    "70m": (512, 6, 8, 50304),
    "h1024": (1024, 4, 8, 50304),
    "410m": (1024, 24, 16, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "6.9b": (4096, 32, 32, 50432),
}


def build(shape: str, batch: int, length: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model with random weights, tokens (batch, length) and next tokens."""
    hidden, layers, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, length),
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(0, vocabulary, (batch, length + 1), device=device)
    return GPTNeoXForCausalLM(config).to(device, dtype).eval(), tokens[:, :-1], tokens[:, 1:]


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                key = x.untyped_storage().data_ptr()
                if key in self.live:
                    self.live[key][0] += 1
                elif key not in known:
                    self.live[key] = [1, x.untyped_storage().nbytes()]
                    self.now += self.live[key][1]
                    self.most = max(self.most, self.now)
                else:
                    continue
                weakref.finalize(x, self._release, key)
        return result

    def _release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


def functional_product(model: nn.Module, tokens: Tensor, observable: TokenLogProb) -> Callable[[Tensor], Tensor]:
    """Return u → J(Jᵀu) by re-evaluated `torch.func` transforms."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def rows(values: dict[str, Tensor]) -> Tensor:
        return observable.rows(functional_call(model, values, (tokens,), {"use_cache": False}).logits)

    def product(u: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            _, back = vjp(rows, parameters)
            result: Tensor = jvp(rows, (parameters,), back(u))[1]
        return result

    return product


def curvlinops_product(model: nn.Module, tokens: Tensor, observable: TokenLogProb) -> Callable[[Tensor], Tensor] | None:
    """Return u → J(Jᵀu) by curvlinops, or None when it is not installed."""
    try:
        from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator
    except ImportError:
        return None

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return observable.rows(self.model(x).logits)[:, None]

    wrapped = Rows()
    settings = (wrapped, list(wrapped.parameters()), [(tokens, tokens)])
    J = JacobianLinearOperator(*settings, check_deterministic=False)
    Jt = TransposedJacobianLinearOperator(*settings, check_deterministic=False)
    return lambda u: J @ (Jt @ u)


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians in seconds, ratios to F+B, relative differences and bytes for one shape."""
    dtype = getattr(torch, options.dtype)
    model, tokens, targets = build(shape, options.batch, options.length, dtype, options.device)
    observable, parameters = TokenLogProb(targets), list(model.parameters())

    def forward_backward() -> None:
        loss = functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())
        torch.autograd.grad(loss, parameters)

    M = NTK(model, tokens, observable, normalize="sum")
    u = torch.randn(M.shape[0], dtype=dtype, device=options.device)
    calls: dict[str, Callable[[], Any]] = {
        "forward + backward": forward_backward,
        "M u, factored": lambda: M @ u,
        "set-up, factored": lambda: NTK(model, tokens, observable, normalize="sum"),
    }
    products: dict[str, Callable[[Tensor], Tensor]] = {}
    if "graph" in options.against:
        products["M u, retained double backward"] = NTK(
            model, tokens, observable, normalize="sum", method="graph"
        ).__matmul__
    if "func" in options.against:
        products["M u, torch.func vjp + jvp"] = functional_product(model, tokens, observable)
    if "curvlinops" in options.against:
        other = curvlinops_product(model, tokens, observable)
        if other is None:
            print("curvlinops is not installed: left out", file=sys.stderr)
        else:
            products["M u, curvlinops"] = other
    reference = M @ u
    differences = {}
    for name, product in products.items():
        differences[name] = float(torch.linalg.norm(product(u) - reference) / torch.linalg.norm(reference))
        calls[name] = lambda product=product: product(u)

    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            start = clock()
            call()
            if options.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    with Peak() as peak:
        M @ u
    median = {name: statistics.median(times) for name, times in seconds.items()}
    unit = median["forward + backward"]
    return {
        "shape": shape,
        "seconds": median,
        "ratio": {name: value / unit for name, value in median.items()},
        "relative_difference": differences,
        "peak_bytes_of_a_product": peak.most,
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "flops_of_a_product": M.plan().flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["h256"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--against", nargs="*", choices=("graph", "func", "curvlinops"), default=["graph", "curvlinops"]
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time, for a busy machine"
    )
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = []
    for shape in options.shape:
        row = measure(shape, options)
        data.append(row)
        print(f"\n{shape}: F + B = {row['seconds']['forward + backward']:.3f} s, T = {options.batch * options.length}")
        for name, ratio in row["ratio"].items():
            other = row["relative_difference"].get(name)
            print(f"  {name:34s} {ratio:7.3f}" + ("" if other is None else f"   differs by {other:.1e}"))
        print(f"  peak of a product / weights        {row['peak_bytes_of_a_product'] / row['weight_bytes']:7.3f}")
    if options.out is not None:
        parameters = {key: value for key, value in vars(options).items() if key != "out"}
        command = ["python", "benchmarks/products.py", *_without_folder(sys.argv[1:])]
        save(Result("benchmark-operator", {"rows": data}, provenance(command, parameters, [0])), options.out)


def _without_folder(arguments: list[str]) -> list[str]:
    """Leave `--out FOLDER` out of the recorded command: a result names no path of the machine that made it."""
    kept = [k for k, x in enumerate(arguments) if x != "--out" and (k == 0 or arguments[k - 1] != "--out")]
    return [arguments[k] for k in kept]


if __name__ == "__main__":
    main()
