"""Attention in a plan: the dimension of a head, and scores that keep their size when it grows.

Queries and keys that have learned are aligned, so that their product grows like the dimension d and
not like √d: scores are divided by d, and at the base's dimension d_b by √d_b as they were
(2203.03466, section 2.1). With a model's own 1/√d that is a factor √(d_b/d).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grsd.mup.families import Family, Split
from grsd.mup.roles import Layout, matching

# what queries come from: norms behind the projection, projections, and what is fused with others
_QUERIES = (
    ("*.q_norm", "*.q_layernorm"),
    ("*.q_proj", "*.query", "*.wq", "*.to_q", "*.q_lin"),
    ("*.c_attn", "*.query_key_value", "*.qkv_proj", "*.qkv", "*.Wqkv"),
)


class Attention(NamedTuple):
    """A factor on the scores of one attention: on its own scaling, or on its queries."""

    module: str
    factor: float
    queries: Split | None = None  #: how the outputs of the module are fused, the first are queries


class Scaled:
    """The handle of an attention whose attribute `scaling` was multiplied."""

    def __init__(self, module: Any, factor: float) -> None:
        self.module, self.own = module, module.scaling
        module.scaling = self.own * factor

    def remove(self) -> None:
        """Give the attention its own scaling again."""
        self.module.scaling = self.own


class MultiplyQueries:
    """A forward hook that multiplies the queries among fused outputs."""

    def __init__(self, factor: float, split: Split) -> None:
        self.factor, self.split = factor, split

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.split == 1:
            return output * self.factor
        sizes = self.split
        if isinstance(sizes, int):
            sizes = (output.shape[-1] // sizes,) * sizes
        parts = output.reshape(*output.shape[:-1], -1, sum(sizes))
        first, rest = parts[..., : sizes[0]], parts[..., sizes[0] :]
        return torch.cat([first * self.factor, rest], -1).flatten(-2)


def head_dimension(model: nn.Module) -> int | None:
    """Return the dimension of a head, by a configuration or a module's own fields; None if unknown.

    Fields are those of transformers, of nanoGPT (n_head, n_embd) and of `nn.MultiheadAttention`.
    """
    for one in _described(model):
        heads = getattr(one, "num_attention_heads", None) or getattr(one, "n_head", None)
        if isinstance(one, nn.MultiheadAttention):
            heads = one.num_heads
        width: Any = next(filter(None, (getattr(one, n, None) for n in _WIDTHS)), None)
        own: Any = getattr(one, "head_dim", None)
        if isinstance(heads, int) and heads > 0 and isinstance(own or width, int):
            return int(own or width // heads)
    return None


_WIDTHS = ("hidden_size", "n_embd", "embed_dim")


def _described(model: nn.Module) -> Iterator[Any]:
    """Yield what may tell the dimension of a head: configurations first, then modules."""
    modules = list(model.modules())
    yield from (config for m in modules if (config := getattr(m, "config", None)) is not None)
    yield from modules


def attention(
    model: nn.Module,
    base: nn.Module | None,
    layout: Layout,
    there: Mapping[str, nn.Module],
    twin: Mapping[str, str],
    family: Family,
    splits: Mapping[str, Split],
    tuned: float,
) -> tuple[tuple[Attention, ...], list[str]]:
    """Return the factors on attention, and notes on what was done or could not be.

    `there` are the base's modules, `twin` the names of a block's in it, `splits` those of fused
    matrices by module, `tuned` a factor of the user's.
    """
    now, before = (None if m is None else head_dimension(m) for m in (model, base))
    grown = 1.0 if now is None or before is None else before / now
    if grown == tuned == 1.0:
        return (), []
    inside = {n: m for n, m in layout.modules.items() if layout.block(n) is not None}
    found: list[Attention] = []
    # attentions of transformers multiply by an attribute of theirs
    for name, module in inside.items():
        own: Any = getattr(module, "scaling", None)
        if isinstance(own, float) and own > 0 and "attention" in type(module).__name__.lower():
            first: Any = there.get(twin.get(name, name), module)
            found.append(Attention(name, tuned * grown * first.scaling / own))
    if not found:
        # elsewhere their queries are multiplied; what divides the scores by √d stays
        factor = tuned * (grown if family.unscaled else grown**0.5)
        for patterns in _QUERIES:
            named = [name for name in inside if matching(name, patterns)]
            fused = patterns is _QUERIES[-1]
            if named and (not fused or all(splits.get(n, 1) != 1 for n in named)):
                found = [Attention(n, factor, splits.get(n, 1)) for n in named]
                break
    # say what was done, or what to do
    change = f"The head dimension goes from {before} to {now}" if grown != 1 else "Attention"
    if found:
        factors = ", ".join(sorted({f"{one.factor:.4g}" for one in found}))
        return tuple(found), [f"{change}: scores of {len(found)} attentions × {factors}."]
    wanted = (
        f"scale attention by √{before}/{now} instead of 1/√{now}, or keep it fixed and add heads"
    )
    if grown == 1:
        wanted = f"multiply its scores by {tuned:g}"
    return (), [f"{change}: {wanted}. No attention was recognised; the plan does not do it."]
