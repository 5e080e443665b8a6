"""The experiment ``gpt2-coords``: a coordinate check of GPT-2 over width and depth, as in Figure
1a, b of 2603.00541.

transformers' GPT-2 with heads of dimension 64 and an untied head, Muon-Kimi for the hidden matrices
and AdamW for the rest, σ = 0.02 and biases 0 at the base, a constant rate of 2⁻⁷, gradients clipped
at 1, ten steps on one batch of eight windows. SP is the paper's: the base's σ and rate at every
size. Smaller than the paper's are the base's width and the windows; the text is bytes. One piece is
one net; kept are ‖h_L‖_R and ‖h_L(t) − h_L(0)‖_R of the last block's output after every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grsd import checks
from grsd.experiments.engine import Data, Experiment, Piece, Rows, rounded, shared
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup.coordcheck import fit_slope, sizes_along
from grsd.mup.norms import rms_norm
from grsd.mup.planning import plan, unscaled

HEAD = 64  # dimension of a head, as in the paper
SCHEMES = ("sp", "mup")


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    widths: tuple[int, ...] = (64, 128, 256, 512)  # at depth base_depth
    depths: tuple[int, ...] = (4, 8, 16, 32, 64, 128)  # at width base_width
    base_width: int = 128
    base_depth: int = 4
    seeds: int = 3
    steps: int = 10
    batch: int = 8
    length: int = 64  # bytes of a window
    rate: float = 2.0**-7  # of the base, for both optimizers
    std: float = 0.02
    device: str = "cpu"

    def __post_init__(self) -> None:
        for width in (*self.widths, self.base_width):
            checks.one_of("width", width, range(HEAD, width + 1, HEAD), f"heads have {HEAD}")
        sizes = (*self.depths, self.base_depth, self.seeds, self.steps, self.batch, self.length)
        checks.at_least("least of depths, seeds, steps and sizes", min(sizes), 1)
        checks.positive("rate and std", (self.rate, self.std))


def factory(length: int) -> Any:
    """Return (width, depth) → GPT-2 with heads of dimension 64 and a head of its own, float32."""
    config = stock.configuration("gpt2")
    config.hidden_size, config.num_attention_heads = HEAD, 1
    config.tie_word_embeddings = False
    return stock.factory(config, positions=length)


def pieces(p: Parameters) -> list[Piece]:
    """One piece per size, scheme and seed, small sizes first."""
    common = shared(p, "widths", "depths", "seeds") | {"text": help_text.text().fingerprint}
    sizes = sizes_along(p.widths, p.depths, (p.base_width, p.base_depth))
    return [
        {**common, "n": width, "L": depth, "scheme": scheme, "seed": seed}
        for width, depth in sorted(sizes, key=lambda s: s[0] ** 2 * s[1])
        for scheme in SCHEMES
        for seed in range(p.seeds)
    ]


def measure(piece: Piece) -> Data:
    """Train one net on one batch; what is not finite is null."""
    # the net under its plan, or as its own base would be trained
    build, device = factory(piece["length"]), piece["device"]
    model = build(piece["n"], piece["L"]).to(device)
    made = plan(
        model, base=build(piece["base_width"], piece["base_depth"]), optimizer="muon_kimi", k=2
    )
    made = unscaled(made) if piece["scheme"] == "sp" else made
    roles = ("input", "hidden", "output")
    made.initialize_(
        model,
        seed=piece["seed"],
        std=dict.fromkeys(roles, piece["std"]),  # type: ignore[arg-type]
    )
    made.attach(model)
    optimizer = made.make_optimizer(model, lr=piece["rate"], eps=1e-16, **_options())
    loss = help_text.next_byte(piece["batch"], piece["length"])
    # what leaves the last block
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).detach().double())

    last: nn.Module = model.transformer.h[-1]
    last.register_forward_hook(keep)
    # one pass more than there are steps: it sees what the last one changed
    losses = []
    for t in range(piece["steps"] + 1):
        optimizer.zero_grad()
        now = loss(model)
        losses.append(float(now.detach()))
        if t < piece["steps"]:
            now.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def size(h: Tensor) -> float | None:
        value = float(rms_norm(h).square().mean().sqrt())
        return value if math.isfinite(value) else None

    return {
        "norm": [size(h) for h in seen],
        "change": [size(h - seen[0]) for h in seen[1:]],
        "losses": [v if math.isfinite(v) else None for v in losses],
    }


def _options() -> dict[str, Any]:
    """Return the constants of the paper's optimizers."""
    return {
        "options": {
            "muon_kimi": {"momentum": 0.95, "nesterov": True},
            "adamw": {"betas": (0.9, 0.95)},
        }
    }


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Every run, and the slopes against both sizes after every step."""
    runs = [
        {**{name: piece[name] for name in ("n", "L", "scheme", "seed")}, **one}
        for piece, one in zip(listed, measured, strict=True)
    ]
    base = {"n": p.base_width, "L": p.base_depth}
    data: Data = {"base": base, "steps": p.steps, "runs": rounded(runs, 5)}
    data["slopes"] = {
        scheme: {
            axis: [
                _fitted([(n, y[t]) for n, _, y in along(data, scheme, axis)])
                for t in range(p.steps)
            ]
            for axis in ("n", "L")
        }
        for scheme in SCHEMES
    }
    return data


def along(data: Data, scheme: str, axis: str, what: str = "change") -> list[Any]:
    """Return (size, seed, what after every step) of the runs along one axis, "n" or "L"."""
    other = {"n": "L", "L": "n"}[axis]
    chosen = [r for r in data["runs"] if r["scheme"] == scheme and r[other] == data["base"][other]]
    return sorted((r[axis], r["seed"], r[what]) for r in chosen)


def _fitted(points: list[Any]) -> list[float] | None:
    """Return slope, low and high end; None without an interval."""
    fit = fit_slope([(n, math.nan if y is None else y) for n, y in points])
    if fit is None or not math.isfinite(fit.high):
        return None
    return [round(v, 4) for v in (fit.value, fit.low, fit.high)]


def table(result: Data) -> Rows:
    """The slopes after the first and the last step."""
    rows: list[list[object]] = []
    for scheme in SCHEMES:
        for axis in ("n", "L"):
            fits = [result["slopes"][scheme][axis][t] for t in (0, -1)]
            shown = ["–" if f is None else f"{f[0]:+.2f} [{f[1]:+.2f}, {f[2]:+.2f}]" for f in fits]
            rows.append([scheme, axis, *shown])
    return ["scheme", "size", "after one step", "after the last"], rows


GPU: dict[str, Any] = {"widths": (128, 256, 512, 1024, 2048, 4096), "base_width": 256}
GPU |= {"depths": (4, 8, 16, 32, 64, 128, 256), "length": 128, "device": "cuda"}

EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu=GPU)
