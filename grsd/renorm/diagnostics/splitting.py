"""Which parameters make up which block: the stack of a model in the order of its depth.

`split_parameters` finds the stack of a model that was not written for this purpose. What is measured on the blocks starts in
:mod:`grsd.renorm.diagnostics.blocks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from grsd.spectrum.operator.layers import by_layer

__all__ = ["Split", "entrances", "split_parameters"]

Split = Literal["auto", "layers"] | Sequence[Sequence[str] | str]


def split_parameters(
    model: nn.Module, names: Sequence[str], how: Split = "auto"
) -> dict[str, tuple[str, ...]]:
    """Return block → names of its parameters, in the order of depth.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
        The parameters to split, as in `model.named_parameters()`, which counts a shared one once, under its first name.
    how : "auto", "layers" or a list
        ``"auto"``: every entry of a ModuleList is a block (the stack of a transformer or a residual net); so is every entry of a
        Sequential, where an entry that is itself one of the two is opened. What lies between them makes one block a gap: the
        embedding before, the readout after. A model without either, or whose stack has one entry, goes by ``"layers"``: every
        module that holds parameters is a block. A list gives the blocks themselves, each a name or several: of parameters, or
        of modules, which stand for all parameters below them.

    Raises
    ------
    ValueError
        Fewer than two blocks; a name that matches nothing, a parameter named twice or not at all.
    """
    if not isinstance(how, str):
        blocks = _given(names, how)
    elif how == "layers":
        blocks = {layer: tuple(found) for layer, found in _layers(model, names).items()}
    elif how == "auto":
        blocks = _stack(model, names)
        if len(blocks) < 2:
            blocks = {layer: tuple(found) for layer, found in _layers(model, names).items()}
    else:
        raise ValueError(
            f'split is {how!r}: expected "auto", "layers" or a list of module or parameter names'
        )
    if len(blocks) < 2:
        raise ValueError(
            f"{len(blocks)} block with trainable parameters ({', '.join(blocks)}): locality and coherence compare blocks, so two or "
            'more are needed; split="layers" or a list of names makes smaller ones'
        )
    return blocks


def _layers(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    chosen = set(names)
    return by_layer(model, [p for name, p in model.named_parameters() if name in chosen])


def _given(names: Sequence[str], how: Sequence[Sequence[str] | str]) -> dict[str, tuple[str, ...]]:
    blocks: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    for entry in how:
        parts = (entry,) if isinstance(entry, str) else tuple(entry)
        title = " + ".join(parts)
        found: list[str] = []
        for part in parts:
            below = [name for name in names if name == part or name.startswith(f"{part}.")]
            if not below:
                raise ValueError(
                    f"no trainable parameter is called {part!r} or lies below a module of that name"
                )
            found += below
        for name in found:
            if name in owner:
                raise ValueError(
                    f"parameter {name!r} is in the blocks {owner[name]!r} and {title!r}; it can be in one"
                )
            owner[name] = title
        blocks[title] = tuple(found)
    if missing := [name for name in names if name not in owner]:
        raise ValueError(
            f"{len(missing)} trainable parameters are in no block, e.g. {missing[0]!r}: name a block for them, or freeze them"
        )
    return blocks


def _stack(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Group by `_parts`; what lies between two entries of a stack is one block."""
    chosen = set(names)
    blocks: list[tuple[str, list[str]]] = []
    loose = False  # the last block is a gap between entries of a stack
    taken: set[str] = set()
    stacked = False
    for title, inside, entry in _parts("", model, False):
        found = [name for name in inside if name in chosen and name not in taken]
        taken.update(found)
        if not found:
            continue
        stacked = stacked or entry
        if loose and not entry:
            before, members = blocks[-1]
            blocks[-1] = (f"{before} + {title}", members + found)
        else:
            blocks.append((title, found))
        loose = not entry
    return {title: tuple(found) for title, found in blocks} if stacked else {}


def _parts(path: str, module: nn.Module, opened: bool) -> Iterable[tuple[str, list[str], bool]]:
    """Yield (name, parameters below it, is an entry of a stack) in the order of registration."""
    prefix = f"{path}." if path else ""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        for key, child in module.named_children():
            nested = isinstance(child, nn.ModuleList) or (
                isinstance(module, nn.Sequential) and isinstance(child, nn.Sequential)
            )
            if nested:
                yield from _parts(prefix + key, child, True)
            else:
                yield (
                    prefix + key,
                    [f"{prefix}{key}.{name}" for name, _ in child.named_parameters()],
                    True,
                )
        return
    own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    if own:
        yield path or "(model)", own, opened
    for key, child in module.named_children():
        yield from _parts(prefix + key, child, False)


def entrances(rows: Tensor, leaves: dict[str, Tensor]) -> dict[str, int]:
    """Return how often each leaf enters the graph of `rows`: 2 or more means that its uses share one value."""
    index = {id(leaf): name for name, leaf in leaves.items()}
    counts = dict.fromkeys(leaves, 0)
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
