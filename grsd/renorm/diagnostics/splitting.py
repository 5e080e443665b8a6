"""Which parameters make up which block: the stack of a model in the order of its depth.

`split_parameters` finds the stack of a model that was not written for this purpose. What is
measured on the blocks starts in :mod:`grsd.renorm.diagnostics.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from grsd.spectrum.operator.layers import by_layer

__all__ = ["Split", "entrances", "split_parameters"]

Names = tuple[str, ...]
Split = Literal["auto", "layers"] | Sequence[Sequence[str] | str] | Mapping[str, Sequence[str]]


def split_parameters(
    model: nn.Module, names: Sequence[str], how: Split = "auto"
) -> dict[str, Names]:
    """Return block → names of its parameters, in the order of depth.

    Parameters
    ----------
    names : sequence of str
        The parameters to split, as in `model.named_parameters()`, which counts a shared one once,
        under its first name.
    how : "auto", "layers", a list or a mapping
        ``"auto"``: every entry of a ModuleList is a block (the stack of a transformer or a residual
        net); so is every entry of a Sequential, where an entry that is itself one of the two is
        opened. What lies between them makes one block a gap: the embedding before, the readout
        after. A model without either, or whose stack has one entry, goes by ``"layers"``: every
        module that holds parameters is a block. A list gives the blocks themselves, each a name or
        several: of parameters, or of modules, which stand for all parameters below them. A mapping
        does so too, and gives them titles.

    Raises
    ------
    ValueError
        Fewer than two blocks; a name that matches nothing, a parameter named twice or not at all.
    """
    if isinstance(how, str) and how not in ("auto", "layers"):
        raise ValueError(
            f'split is {how!r}: expected "auto", "layers" or a list of module or parameter names'
        )
    blocks = _given(names, how) if not isinstance(how, str) else {}
    if how == "auto":
        blocks = _stack(model, set(names))
    if how == "layers" or (how == "auto" and len(blocks) < 2):
        chosen = set(names)
        parameters = [p for name, p in model.named_parameters() if name in chosen]
        blocks = {layer: tuple(own) for layer, own in by_layer(model, parameters).items()}
    if len(blocks) < 2:
        raise ValueError(
            f"{len(blocks)} block with trainable parameters ({', '.join(blocks)}): locality and "
            'coherence compare blocks, so two or more are needed; split="layers" or a list of '
            "names makes smaller ones"
        )
    return blocks


def _given(
    names: Sequence[str], how: Sequence[Sequence[str] | str] | Mapping[str, Sequence[str]]
) -> dict[str, Names]:
    if isinstance(how, Mapping):
        entries = [(title, tuple(parts)) for title, parts in how.items()]
    else:
        listed = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in how]
        entries = [(" + ".join(parts), parts) for parts in listed]
    owner: dict[str, str] = {}  # parameter → title of its block
    for title, parts in entries:
        for part in parts:
            below = [name for name in names if name == part or name.startswith(f"{part}.")]
            if not below:
                raise ValueError(
                    f"no trainable parameter is called {part!r} or lies below a module of that name"
                )
            for name in below:
                if name in owner:
                    raise ValueError(
                        f"parameter {name!r} is in the blocks {owner[name]!r} and {title!r}; it "
                        "can be in one"
                    )
                owner[name] = title
    if missing := [name for name in names if name not in owner]:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no block, e.g. {missing[0]!r}: name a "
            "block for them, or freeze them"
        )
    return {title: tuple(name for name in owner if owner[name] == title) for title, _ in entries}


def _stack(model: nn.Module, chosen: set[str]) -> dict[str, Names]:
    """Group what `_walk` yields; what lies between two entries of a stack is one block."""
    blocks: list[tuple[str, list[str]]] = []
    taken: set[str] = set()
    stacked = in_gap = False
    for title, below, is_entry in _walk("", model):
        own = [name for name in below if name in chosen - taken]
        taken.update(own)
        if not own:
            continue
        stacked = stacked or is_entry
        if in_gap and not is_entry:
            before, members = blocks.pop()
            title, own = f"{before} + {title}", members + own
        blocks.append((title, own))
        in_gap = not is_entry
    return {title: tuple(own) for title, own in blocks} if stacked else {}


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, list[str], bool]]:
    """Yield (name, parameters below it, is an entry of a stack) in the order of registration."""
    prefix = f"{path}." if path else ""
    is_stack = isinstance(module, (nn.ModuleList, nn.Sequential))
    own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    if own and not is_stack:
        yield path or "(model)", own, False
    for key, child in module.named_children():
        opened = isinstance(child, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and isinstance(child, nn.Sequential)
        )
        if is_stack and not opened:
            below = [f"{prefix}{key}.{name}" for name, _ in child.named_parameters()]
            yield prefix + key, below, True
        else:
            yield from _walk(prefix + key, child)


def entrances(rows: Tensor, leaves: dict[str, Tensor]) -> dict[str, int]:
    """Return how often each leaf enters the graph of `rows`: from 2 on its uses share one value."""
    index = {id(leaf): name for name, leaf in leaves.items()}
    counts = dict.fromkeys(leaves, 0)
    # each edge of the graph that ends in a leaf is one use
    seen, todo = set(), [rows.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            held = getattr(following, "variable", None)
            if held is None:
                todo.append(following)
            elif id(held) in index:
                counts[index[id(held)]] += 1
    return counts
