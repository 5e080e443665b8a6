"""The exact product M u = J_ε K J_εᵀ u without parameter gradients: forward once, record, fold, multiply.

Set-up runs the model once and its backward pass once, and leaves two linear programs (:mod:`grsd.spectrum.programs.program`), the blocks
of K (:mod:`grsd.spectrum.operator.factors`) and one T × T matrix (:mod:`grsd.spectrum.operator.own_positions`). The graph of the model is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from grsd.spectrum.operator.factors import (
    Factor,
    FoldedTie,
    Gain,
    Gram,
    Grams,
    Span,
    Through,
    Tied,
    Tokens,
    Vectors,
    matrix,
)
from grsd.spectrum.operator.own_positions import OwnPositions, refuse, share, unfold
from grsd.spectrum.operator.plan import PlanRow
from grsd.spectrum.operator.trace import Place, Trace, Use
from grsd.spectrum.programs.program import Program, Rows
from grsd.spectrum.programs.record import record
from grsd.spectrum.programs.simplify import overwrite, simplify
from grsd.spectrum.programs.transpose import transpose

BLOCK_BYTES = 2**28  # what the temporaries of a block product may take
FOLD_LIMIT = 8192  # a T × T matrix larger than this costs more than the passes that it saves


class Factored:
    """The product, made from a traced forward pass.

    Parameters
    ----------
    rows : Tensor, (T,), with its graph.
    trace : Trace, what was recorded during that pass.
    names : names of `trace.parameters`.
    groups : the first axis of the inputs holds this many independent batches of equal size, one after another; what one
        does to a parameter is not seen by the others, so that the operator is block-diagonal.

    Notes
    -----
    Set-up: the backward pass of what is folded (in a decoder: head and last tail), Gram matrices, and no arithmetic for the
    rest, which is recorded and transposed by rule. A product: about one forward pass each for J_εᵀ and J_ε without head and
    last block's tail, and 2 n² out FLOPs a layer for K, or 4 n in out where that is less (n > 2 in); `plan_rows` has both.
    """

    def __init__(self, rows: Tensor, trace: Trace, names: Sequence[str], groups: int = 1) -> None:
        self.groups = groups
        self._names, self._parameters = list(names), trace.parameters
        self.plan_rows: list[PlanRow] = []
        self.share: Tensor | None = None
        self._factors: list[Factor] = []
        self._folded_ties: list[FoldedTie] = []
        self._grams = Grams()
        self._size, self._dtype = rows.numel(), rows.dtype

        places: list[Place] = [*trace.places, *trace.parameters]
        start = torch.ones_like(rows.detach())
        region = OwnPositions(0 if self._size // groups <= FOLD_LIMIT else None, self._size)
        adjoint, values, slots = _backward(rows, places, start, region if groups == 1 else None)
        kinds = [adjoint.kinds[out] for node in adjoint.nodes for out in node.outs if out >= 0]
        self.dtypes = {dtype for _, dtype in kinds if dtype.is_floating_point}
        first = len(trace.places)
        by_parameter: dict[int, list[tuple[Use, int]]] = {}
        for use in trace.uses:
            if slots[use.place] is not None:
                by_parameter.setdefault(use.parameter, []).append((use, slots[use.place]))  # type: ignore[arg-type]
        for k, parameter in enumerate(trace.parameters):
            if (slot := slots[first + k]) is not None:
                by_parameter.setdefault(k, []).append(
                    (Use("plain", k, first + k, parameter.shape), slot)
                )
        self.used = sorted(by_parameter)
        if not self.used:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")

        if groups > 1:
            self._check_groups(by_parameter, adjoint, start, values)
            for node in adjoint.nodes:
                region.reads(node, adjoint.kinds)
        refuse(adjoint, values, region, self._size)
        own = region.rows
        needed = self._build(by_parameter, own, values)
        self._note_share()
        self._check_finite()
        self.slots = sorted(needed)
        last = {slot: k for k, factor in enumerate(self._factors) for slot in factor.slots}
        self._done = [
            [slot for slot, at in last.items() if at == k] for k in range(len(self._factors))
        ]
        self.adjoint: Program | None = None
        self.forward: Program | None = None
        self._plain: tuple[Program | None, Program | None] = (None, None)
        self._batched = True
        self._column_bytes = (
            3 * start.element_size() * sum(prod(adjoint.kinds[slot][0]) for slot in self.slots)
        )
        if self.slots:
            raw = unfold(adjoint, values, own, self.slots)
            back, forth = self._plain = simplify(raw), simplify(transpose(raw, start.device))
            self.adjoint, self.forward = overwrite(back, owned=False), overwrite(forth, owned=True)
            for name, program in (("J_εᵀ", self.adjoint), ("J_ε", self.forward)):
                self.plan_rows.append(
                    PlanRow(f"({name})", "pass", "recorded program", program.flops, 0)
                )

    def __call__(self, u: Tensor) -> Tensor:
        """Return J Jᵀ u for u of shape (T,)."""
        with torch.no_grad():
            return self._product(u, self.adjoint, self.forward)

    def block(self, U: Tensor) -> Tensor:
        """Return J Jᵀ U for U of shape (T, k); equal to `__call__` on every column, to rounding.

        Several columns go through the programs together, as many as `BLOCK_BYTES` holds; one by one where an operation
        cannot take a batch. Cost: k products, with one call of every operation for a group of columns.
        """
        size = max(1, BLOCK_BYTES // max(1, self._column_bytes))
        if not self._batched or size == 1 or U.shape[1] < 2:
            return (
                torch.stack([self(u) for u in U.unbind(1)], dim=1)
                if U.shape[1]
                else torch.empty_like(U)
            )
        adjoint, forward = self._plain
        together = torch.func.vmap(
            lambda u: self._product(u, adjoint, forward), in_dims=1, out_dims=1
        )
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # a loop inside vmap says so
                return torch.cat([together(part) for part in U.split(size, dim=1)], dim=1)  # type: ignore[no-untyped-call]
        except (RuntimeError, UserWarning):
            self._batched = False
            return self.block(U)

    def _product(self, u: Tensor, adjoint: Program | None, forward: Program | None) -> Tensor:
        if self.share is None:
            result = torch.zeros_like(u)
        else:
            result = (self.share @ u.view(*self.share.shape[:-1], 1)).view(-1)
        if adjoint is not None and forward is not None:
            found = adjoint.run(u)
            deltas: Vectors = dict(zip(self.slots, found, strict=True))
            del found
            out: Vectors = {}
            for tie in self._folded_ties:
                result += tie.add(u, deltas, out)
            for factor, done in zip(self._factors, self._done, strict=True):
                factor.add(deltas, out)
                for slot in done:
                    del deltas[slot]
            seeds = [out.pop(s) for s in self.slots]
            result += forward.consume(seeds)[0]
        return result

    def _build(
        self,
        by_parameter: dict[int, list[tuple[Use, int]]],
        own: dict[int, Rows],
        values: dict[int, Tensor],
    ) -> set[int]:
        """Choose a form for every parameter; return the slots of δ that the passes must still deliver."""
        needed: set[int] = set()
        singles: dict[int, list[Use]] = {}
        for uses in by_parameter.values():
            if len(uses) == 1:
                singles.setdefault(uses[0][1], []).append(uses[0][0])
            else:
                needed |= self._several(uses, own, values, singles)
        for slot, single in singles.items():
            block = self._share(single, values[slot], own[slot]) if slot in own else None
            if block is not None:
                self._fold(single, block)
            else:
                self._one_slot(slot, single, values[slot])
                needed.add(slot)
        return needed

    def _check_groups(
        self,
        by_parameter: dict[int, list[tuple[Use, int]]],
        adjoint: Program,
        start: Tensor,
        values: dict[int, Tensor],
    ) -> None:
        """Raise ValueError when a parameter does not see the groups apart along the first axis of δ.

        A backward pass from the first group alone must give zero in the others, and in the first what all groups give.
        """
        first = torch.zeros_like(start)
        first[: self._size // self.groups] = 1
        found = dict(zip(adjoint.outputs, adjoint.run(first), strict=True))
        for k, uses in by_parameter.items():
            for use, slot in uses:
                delta = found[slot]
                size = (
                    delta.shape[0] // self.groups if delta.ndim > 1 and use.rule != "plain" else 0
                )
                apart = size * self.groups == (delta.shape[0] if delta.ndim else -1) and not bool(
                    delta[size:].any()
                )
                if apart:
                    rest = torch.linalg.vector_norm(values[slot][:size] - delta[:size])
                    eps = torch.finfo(delta.dtype).eps
                    apart = bool(rest <= 1e3 * eps * torch.linalg.vector_norm(values[slot]))
                if not apart:
                    raise ValueError(
                        f"parameter {self._names[k]!r} enters without a batch axis of its own (rule {use.rule!r}), so the "
                        "batches cannot be kept apart in one pass; make one NTK for each"
                    )

    def _share(self, uses: Sequence[Use], delta: Tensor, rows: Rows) -> Tensor | None:
        """Return the share of M of own-position uses: (T, T), or (groups, T / groups, T / groups)."""
        if self.groups == 1:
            return share(uses, delta, rows, self._grams)
        count, size = rows.count // self.groups, self._size // self.groups
        blocks = []
        for g in range(self.groups):
            at = (
                None
                if rows.positions is None
                else rows.positions[g * size : (g + 1) * size] - g * count
            )
            parts = [_group(use, g, self.groups) for use in uses]
            block = share(parts, delta.chunk(self.groups)[g], Rows(count, at), Grams())
            if block is None:
                return None
            blocks.append(block)
        return torch.stack(blocks)

    def _same(self, n: int, m: int, like: Tensor) -> Tensor | float:
        """Return the (n, m) matrix that is 1 where two rows belong to one group."""
        if self.groups == 1:
            return 1.0
        ones = like.new_ones(n // self.groups, m // self.groups)
        same: Tensor = torch.block_diag(*[ones] * self.groups)  # type: ignore[no-untyped-call]
        return same

    def _fold(self, uses: Sequence[Use], block: Tensor) -> None:
        block = block.to(self._dtype)
        self.share = block if self.share is None else self.share.add_(block)
        self._note(uses, "folded into T × T", 0, 0)

    def _one_slot(self, slot: int, uses: Sequence[Use], delta: Tensor) -> None:
        """Make the factors of single-use parameters with the same δ."""
        item, width = delta.element_size(), delta.shape[-1] if delta.ndim else 1
        n = delta.numel() // width
        block = n // self.groups
        linear = [u for u in uses if u.rule == "rows"]
        biases = [u for u in uses if u.rule == "shift" and u.spread == (width,)] if linear else []
        if linear:
            fan_in = sum(u.data.shape[-1] for u in linear if u.data is not None)
            inputs = [u.data for u in linear if u.data is not None]
            if block <= 2 * fan_in:
                self._factors.append(
                    Gram(slot, self._grams.of(inputs, len(biases), delta.dtype, self.groups))
                )
                self._note(
                    [*linear, *biases], "(A Aᵀ + b 1 1ᵀ) δ", 2 * n * block * width, n * block * item
                )
            else:
                flat = tuple(matrix(a).to(delta.dtype) for a in inputs)
                if self.groups > 1:
                    flat = tuple(a.view(self.groups, block, -1) for a in flat)
                self._factors.append(Span(slot, flat, len(biases)))
                held = sum(a.numel() for a in flat) * item
                self._note(
                    [*linear, *biases], "A (Aᵀ δ) + b 1 (1ᵀ δ)", 4 * n * fan_in * width, held
                )
        done = {id(u) for u in (*linear, *biases)}
        gains = [
            u for u in uses if u.rule == "scale" and u.spread == (width,) and u.data is not None
        ]
        if len(gains) == 1 and gains[0].data is not None and gains[0].data.dtype == delta.dtype:
            offsets = [
                u for u in uses if u.rule == "shift" and u.spread == (width,) and id(u) not in done
            ]
            plain = gains[0].data.reshape(self.groups, block, width)
            self._factors.append(Gain(slot, plain, len(offsets)))
            self._note(
                [gains[0], *offsets], "x̂ Σ x̂ δ + b Σ δ", 4 * delta.numel(), plain.numel() * item
            )
            done |= {id(u) for u in (gains[0], *offsets)}
        for use in uses:
            if id(use) in done:
                continue
            if use.rule == "gather":
                self._factors.append(_tokens(use, slot, delta.dtype, self.groups))
                self._note([use], "sum over equal tokens", 2 * delta.numel(), 8 * n)
                continue
            shape = self._parameters[use.parameter].shape
            self._factors.append(Through((use,), (slot,), shape, self.groups))
            self._note(
                [use],
                "through its gradient",
                self._passes(use),
                0 if use.data is None else use.data.numel() * item,
            )

    def _several(
        self,
        uses: list[tuple[Use, int]],
        own: dict[int, Rows],
        values: dict[int, Tensor],
        singles: dict[int, list[Use]],
    ) -> set[int]:
        """Make the factors of a parameter that enters more than once, with all cross terms."""
        heads = [(u, s) for u, s in uses if u.rule == "rows" and not u.options["transposed"]]
        tables = [(u, s) for u, s in uses if u.rule == "gather"]
        plain = [u for u, _ in uses]
        if len(uses) == 2 and len(heads) == len(tables) == 1:
            (head, hs), (table, ts) = heads[0], tables[0]
            assert head.data is not None and table.data is not None
            a, tokens = matrix(head.data).to(values[hs].dtype), table.data.reshape(-1)
            flops = 4 * a.shape[0] * tokens.numel() * a.shape[1]
            rows = own.get(hs)
            front = None if rows is None else rows.front(head.shape)
            singles.setdefault(ts, []).append(table)
            singles.setdefault(hs, []).append(head)
            if rows is not None and front == len(head.shape) - 1 and ts not in own:
                a = a.to(self._dtype)
                fixed = rows.pick(values[hs])[:, tokens].to(self._dtype) * self._same(
                    self._size, tokens.numel(), a
                )
                kept = _tokens(table, ts, a.dtype, 1).kept
                self._folded_ties.append(FoldedTie(ts, rows.pick(a), fixed, tokens, kept))
                self._note(
                    plain, "cross terms, head folded", flops, fixed.numel() * fixed.element_size()
                )
                return {ts}
            kept = _tokens(table, ts, a.dtype, 1).kept
            self._factors.append(
                Tied(hs, ts, a, tokens, kept, self._same(a.shape[0], tokens.numel(), a))
            )
            self._note(plain, "cross terms of table and head", flops, 0)
            return {hs, ts}
        self._factors.append(
            Through(
                tuple(plain),
                tuple(s for _, s in uses),
                self._parameters[plain[0].parameter].shape,
                self.groups,
            )
        )
        self._note(plain, "joint, through its gradient", sum(self._passes(u) for u in plain), 0)
        return {s for _, s in uses}

    def _passes(self, use: Use) -> int:
        """Return the FLOPs of one gradient and one change at a use."""
        outputs, parameter = use.shape.numel(), self._parameters[use.parameter]
        if use.rule == "rows":
            return 4 * outputs * (parameter.numel() // use.shape[-1])
        if use.rule == "conv":
            return 4 * outputs * parameter[0].numel()
        return 0 if use.rule == "plain" else 4 * outputs

    def _check_finite(self) -> None:
        """Raise ValueError when an activation is not finite: the diagonal of its A Aᵀ is not finite either."""
        blocks = [f.gram for f in self._factors if isinstance(f, Gram)]
        if self.share is not None:
            blocks.append(self.share)
        found = [x.diagonal(dim1=-2, dim2=-1) for x in blocks]
        found.extend(a.sum(-1) for f in self._factors if isinstance(f, Span) for a in f.inputs)
        if any(not bool(torch.isfinite(x).all()) for x in found):
            raise ValueError(
                "activations or their gradients are not finite although the outputs are, so M is not finite: check the "
                "checkpoint and the inputs, or use a wider dtype (model.double())"
            )

    def _note_share(self) -> None:
        if self._size // self.groups > FOLD_LIMIT:
            why = f"not folded: T = {self._size // self.groups} is above {FOLD_LIMIT}"
            self.plan_rows.append(PlanRow("(own positions)", "share of M", why, 0, 0))
        if self.share is not None:
            held, item = self.share.numel(), self.share.element_size()
            self.plan_rows.append(
                PlanRow("(own positions)", "share of M", "folded into T × T", 2 * held, held * item)
            )

    def _note(self, uses: Sequence[Use], association: str, flops: int, held: int) -> None:
        names = list(dict.fromkeys(self._names[u.parameter] for u in uses))
        rules = list(dict.fromkeys(u.rule for u in uses))
        self.plan_rows.append(
            PlanRow(", ".join(names), " + ".join(rules), association, flops, held)
        )


def _group(use: Use, g: int, groups: int) -> Use:
    """Return the use in one of several groups of equal size along the first axis."""
    data = None if use.data is None else use.data.chunk(groups)[g]
    return replace(use, data=data, shape=torch.Size((use.shape[0] // groups, *use.shape[1:])))


def _tokens(use: Use, slot: int, dtype: torch.dtype, groups: int) -> Tokens:
    assert use.data is not None
    tokens = use.data.reshape(-1)
    apart = torch.arange(groups, device=tokens.device).repeat_interleave(tokens.numel() // groups)
    distinct, group = torch.unique(tokens + apart * (int(tokens.max()) + 1), return_inverse=True)
    padding = use.options["padding"]
    kept: Tensor | float = 1.0 if padding is None else (tokens[:, None] != padding).to(dtype)
    return Tokens(slot, group, distinct.numel(), kept)


def _backward(
    rows: Tensor, places: Sequence[Place], start: Tensor, region: OwnPositions | None
) -> tuple[Program, dict[int, Tensor], list[int | None]]:
    """Record the backward pass from u to every place; return it with its values and the slot of every place."""

    def backward(u: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(rows, places, u, allow_unused=True)  # type: ignore[arg-type]

    program, values, missing = record(backward, [start], region)
    found = iter(program.outputs)
    slots = [None if k in missing else next(found) for k in range(len(places))]
    return program, values, slots
