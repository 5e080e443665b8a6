"""The exact product M u = J_ε K J_εᵀ u without parameter gradients: forward once, record, multiply.

Set-up runs the model once and its backward pass once, and leaves two linear programs
(:mod:`grsd.spectrum.programs.program`), the blocks of K (:mod:`grsd.spectrum.operator.factors`) and
one T × T matrix (:mod:`grsd.spectrum.operator.own_positions`). The graph of the model is dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import astuple
from math import prod

import torch
from torch import Tensor

import grsd.spectrum.operator.calls  # noqa: F401  (registers its readers)
from grsd.spectrum.operator.base import PlanRow
from grsd.spectrum.operator.double_backward import MASKED
from grsd.spectrum.operator.factors import (
    Factor,
    FoldedTie,
    Form,
    Gram,
    Grams,
    Setting,
    Span,
    Through,
    Tied,
    Use,
    Vectors,
    matrix,
)
from grsd.spectrum.operator.own_positions import OwnPositions, Share, refuse, total, unfold
from grsd.spectrum.operator.precision import rounding, unmixed
from grsd.spectrum.operator.rules import MOVED_COST, Convolution, Embedding, Linear
from grsd.spectrum.operator.trace import Trace
from grsd.spectrum.programs.program import Program, Rows
from grsd.spectrum.programs.record import record
from grsd.spectrum.programs.simplify import absorb, simplify
from grsd.spectrum.programs.transpose import transpose

BLOCK_BYTES = 2**28  # what the temporaries of a block product may take
FOLD_LIMIT = 8192  # rows; a larger T × T matrix takes too much memory
# What bytes cost beside `MOVED_COST`: `spread` and `collect` of one number
BORDER_COST = 128

CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}

# number of a parameter → its uses and the slots of their δ
Entrances = list[tuple[Use, int]]
Placed = dict[int, Entrances]
Singles = dict[int, list[Use]]  # slot → uses of parameters that enter once


class Factored:
    """The product, made from a traced forward pass.

    Parameters
    ----------
    rows : (T,), with its graph.
    trace : what was recorded during that pass.
    names : of `trace.parameters`.
    groups : so many independent batches of equal size lie one after another along the first axis of
        the inputs; one does not see what another does to a parameter: M is block-diagonal.
    products : how many are expected. A form that costs more at set-up is taken if it pays in them.

    Notes
    -----
    Set-up: the backward pass of what is folded (in a decoder: head and last tail), Gram matrices,
    and no matrix products for the rest, which is recorded and transposed by rule. A product: about
    one forward pass each for J_εᵀ and J_ε without what is folded, and 2 n² out FLOPs a layer for K,
    or 4 n in out; `plan_rows` has both.
    """

    def __init__(
        self, rows: Tensor, trace: Trace, names: Sequence[str], groups: int = 1, products: int = 100
    ) -> None:
        self.groups, self._products, self._names = groups, products, list(names)
        self._parameters = trace.parameters
        self.plan_rows: list[PlanRow] = []
        self.share: Tensor | None = None
        self.folded: set[tuple[int, str]] = set()  # number and rule of what is in `share`
        self._factors: list[Factor] = []
        self._folded_ties: list[FoldedTie] = []
        self._grams = Grams()
        self._size, self._dtype = rows.numel(), rows.dtype

        # Record the backward pass from u = 1, and find what is own-position in it.
        start = torch.ones_like(rows.detach())
        region = OwnPositions(self._size)
        places = [*trace.places, *trace.parameters]

        def backward(u: Tensor) -> Sequence[Tensor | None]:
            return torch.autograd.grad(rows, places, u, allow_unused=True)  # type: ignore[arg-type]

        adjoint, values, missing = record(backward, [start], region if groups == 1 else None)
        reached = iter(adjoint.outputs)
        slots = [None if k in missing else next(reached) for k in range(len(places))]
        kinds = [adjoint.kinds[out] for node in adjoint.nodes for out in node.outs if out >= 0]
        self.dtypes = {dtype for _, dtype in kinds if dtype.is_floating_point}
        called = {getattr(node.func, "overloadpacket", None) for node in adjoint.nodes}
        own = any(isinstance(use, Convolution) for use in trace.uses)
        self.convolves = own or not called.isdisjoint(CONVOLUTIONS)
        placed = self._place(trace, slots)
        if groups > 1:
            self._check_groups(placed, adjoint, values)
            for node in adjoint.nodes:
                region.reads(node, adjoint.kinds)
        refuse(adjoint, values, region, self._size)

        # Choose the blocks of K, and fold.
        self.slots = sorted(self._build(placed, region.rows, values))
        self._check_finite()
        last = {slot: k for k, factor in enumerate(self._factors) for slot in factor.slots}
        self._done = [[s for s, at in last.items() if at == k] for k in range(len(self._factors))]

        self.adjoint: Program | None = None
        self.forward: Program | None = None
        self._batched = True
        self._compile(adjoint, values, region.rows, start)

    def _compile(
        self, adjoint: Program, values: Vectors, own: dict[int, Rows], start: Tensor
    ) -> None:
        """Make the programs of the δ that are still needed."""
        numbers = sum(prod(adjoint.kinds[slot][0]) for slot in self.slots)
        self._column_bytes = 3 * start.element_size() * numbers
        if self.slots:
            needed = absorb(unfold(adjoint, values, own, self.slots))
            self.adjoint = simplify(needed)
            self.forward = simplify(transpose(needed, start.device))
            for name, program in (("(J_εᵀ)", self.adjoint), ("(J_ε)", self.forward)):
                self.plan_rows.append(PlanRow(name, "pass", "recorded program", program.flops, 0))

    def __call__(self, u: Tensor) -> Tensor:
        """Return J Jᵀ u for u of shape (T,)."""
        with torch.no_grad(), unmixed():
            return self._product(u)

    def block(self, U: Tensor) -> Tensor:
        """Return J Jᵀ U for U of shape (T, k), to rounding `__call__` on every column.

        As many columns as `BLOCK_BYTES` holds go through the programs together; one by one where an
        operation cannot take a batch, or PyTorch batches it wrongly: a sum of the columns of U with
        random signs must become that of the results. Cost: k + 1 products, in one call of an
        operation for all.
        """
        if not U.shape[1]:
            return torch.empty_like(U)
        size = max(1, BLOCK_BYTES // max(1, self._column_bytes))
        if self._batched and size > 1 and U.shape[1] > 1:
            together = torch.func.vmap(self._product, in_dims=1, out_dims=1)
            try:
                with torch.no_grad(), unmixed(), warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)  # a loop inside vmap says so
                    parts = torch.split(U, size, dim=1)
                    result = torch.cat([together(part) for part in parts], dim=1)
                    if self._linear(U, result):
                        return result
            except (RuntimeError, UserWarning):
                pass
            self._batched = False
        return torch.stack([self(u) for u in U.unbind(1)], dim=1)

    def _linear(self, U: Tensor, result: Tensor) -> bool:
        """Say whether M (U s) is (M U) s to half the digits, for random signs s, (k,)."""
        draw = torch.rand(U.shape[1], generator=torch.Generator().manual_seed(0))
        signs = torch.where(draw < 0.5, -1.0, 1.0).to(U.device, torch.float64)
        wide = result.double()
        gap = torch.linalg.vector_norm(wide @ signs - self((U.double() @ signs).to(U)).double())
        eps = rounding({self._dtype, *self.dtypes}, self.convolves, U.device)
        return bool(gap <= eps**0.5 * torch.linalg.vector_norm(wide))

    def _product(self, u: Tensor) -> Tensor:
        # What is folded.
        if self.share is None:
            result = torch.zeros_like(u)
        else:
            result = (self.share @ u.view(self.groups, -1, 1)).view(-1)
        if self.adjoint is None or self.forward is None:
            return result
        # δ = J_εᵀ u, then K δ, block by block, then J_ε of it; a δ goes after its last use.
        deltas: Vectors = dict(zip(self.slots, self.adjoint.run(u), strict=True))
        changes: Vectors = {}
        for tie in self._folded_ties:
            result += tie.add(u, deltas, changes)
        for factor, done in zip(self._factors, self._done, strict=True):
            factor.add(deltas, changes)
            for slot in done:
                del deltas[slot]
        result += self.forward.consume([changes.pop(s) for s in self.slots])[0]
        return result

    def _place(self, trace: Trace, slots: Sequence[int | None]) -> Placed:
        """Return the uses of every parameter that reaches the outputs, known to a reader or not."""
        uses, left = [*trace.uses], len(trace.places)
        for k, parameter in enumerate(trace.parameters):
            uses.append(Use(parameter, None, k, left + k, parameter.shape))
        placed: Placed = {}
        for use in uses:
            slot = slots[use.place]
            if slot is not None:
                placed.setdefault(use.number, []).append((use, slot))
        self.used = sorted(placed)
        if not placed:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")
        return placed

    def _build(self, placed: Placed, own: dict[int, Rows], values: dict[int, Tensor]) -> set[int]:
        """Choose a form for every parameter; return the slots of δ that the passes must deliver."""
        needed: set[int] = set()
        singles: Singles = {}
        # Cross terms first; what is left enters once, alone.
        for uses in placed.values():
            if len(uses) == 1:
                singles.setdefault(uses[0][1], []).append(uses[0][0])
            else:
                needed |= self._several(uses, own, values, singles)
        # Fold what pays, and choose blocks of K for the rest.
        folded = self._fold(singles, own, values)
        for slot, single in singles.items():
            if slot in folded:
                continue
            needed.add(slot)
            at = Setting(slot, values[slot], self.groups, self._products, self._grams)
            for group, factor, form in blocks_of(single, at):
                self._factors.append(factor)
                self._note(group, form)
        return needed

    def _fold(self, singles: Singles, own: dict[int, Rows], values: Vectors) -> set[int]:
        """Make one matrix of the own-position uses for which that pays; return their slots."""
        size, chosen = self._size // self.groups, {}
        if size > FOLD_LIMIT:
            why = f"not folded: T = {size} is above {FOLD_LIMIT}"
            self.plan_rows.append(PlanRow("(own positions)", "share of M", why, 0, 0))
            return set()
        # What each slot costs once, and what it would cost in every product.
        for slot, uses in singles.items():
            shares = shares_of(uses, values[slot], own[slot]) if slot in own else None
            if shares is None:
                continue
            at = Setting(slot, values[slot], self.groups, 0, self._grams)
            saved = sum(form.flops for _, _, form in blocks_of(uses, at))
            saved += BORDER_COST * values[slot].numel()
            setup = sum(share.flops(size) for share in shares)
            if setup <= saved * self._products:
                chosen[slot] = (shares, setup, saved)
        # The matrix itself multiplies a vector in every product.
        once = sum(setup for _, setup, _ in chosen.values())
        each = sum(saved for *_, saved in chosen.values()) - MOVED_COST * self._size * size
        if not chosen or each <= 0 or once > each * self._products:
            return set()
        self.share = total(
            [x for shares, *_ in chosen.values() for x in shares], self.groups, self._dtype
        )
        for slot, (_, setup, saved) in chosen.items():
            self.folded |= {(use.number, use.name) for use in singles[slot]}
            self._note(singles[slot], Form("folded into T × T", 0, 0, setup, setup / saved))
        numbers = self.share.numel()
        costs = (2 * numbers, numbers * self.share.element_size(), 0, once / each)
        self.plan_rows.append(PlanRow("(own positions)", "share of M", "folded into T × T", *costs))
        return set(chosen)

    def _several(
        self, uses: Entrances, own: dict[int, Rows], values: Vectors, singles: Singles
    ) -> set[int]:
        """Make the factors of a parameter that enters more than once, with all cross terms."""
        plain, slots = [use for use, _ in uses], tuple(slot for _, slot in uses)
        tables = [(u, s) for u, s in uses if isinstance(u, Embedding)]
        heads = [(u, s) for u, s in uses if isinstance(u, Linear) and not u.transposed]
        if len(uses) != 2 or len(heads) != 1 or len(tables) != 1:
            self._factors.append(Through(tuple(plain), slots, self.groups))
            self._note(plain, Form("joint, through its gradient", sum(u.flops for u in plain)))
            return set(slots)
        # Embedding and head: each is treated as if it were alone, and the cross terms are added.
        (head, hs), (table, ts) = heads[0], tables[0]
        singles.setdefault(ts, []).append(table)
        singles.setdefault(hs, []).append(head)
        a, tokens = matrix(head.tensor).to(values[hs].dtype), table.tensor.reshape(-1)
        flops = 4 * a.shape[0] * tokens.numel() * a.shape[1]
        rows = own.get(hs)
        front = None if rows is None else rows.front(head.shape)
        if rows is not None and front == len(head.shape) - 1 and ts not in own:
            a = rows.pick(a.to(self._dtype))
            fixed = rows.pick(values[hs])[:, tokens].to(self._dtype)
            fixed = fixed * self._same(self._size, tokens.numel(), a)
            self._folded_ties.append(FoldedTie(ts, a, fixed, table.kept(a.dtype)))
            held = fixed.numel() * fixed.element_size()
            self._note(plain, Form("cross terms, head folded", flops, held))
            return {ts}
        same = self._same(a.shape[0], tokens.numel(), a)
        self._factors.append(Tied(hs, ts, a, tokens, table.kept(a.dtype), same))
        self._note(plain, Form("cross terms of table and head", flops))
        return {hs, ts}

    def _same(self, n: int, m: int, like: Tensor) -> Tensor | float:
        """Return the (n, m) matrix that is 1 where two rows belong to one group."""
        if self.groups == 1:
            return 1.0
        ones = like.new_ones(n // self.groups, m // self.groups)
        return torch.block_diag(*[ones] * self.groups)  # type: ignore[no-untyped-call]

    def _check_groups(self, placed: Placed, adjoint: Program, values: Vectors) -> None:
        """Raise ValueError when a parameter does not see the groups apart along the first axis.

        A backward pass from the first group alone must give zero in the others, and in the first
        what all groups give.
        """
        first = torch.zeros_like(values[0])
        first[: self._size // self.groups] = 1
        deltas = dict(zip(adjoint.outputs, adjoint.run(first), strict=True))
        for k, uses in placed.items():
            for use, slot in uses:
                delta, whole = deltas[slot], values[slot]
                length = delta.shape[0] if delta.ndim > 1 and type(use) is not Use else -1
                size = length // self.groups
                apart = size * self.groups == length and not bool(delta[size:].any())
                if apart:
                    rest = torch.linalg.vector_norm(whole[:size] - delta[:size])
                    eps = torch.finfo(delta.dtype).eps
                    apart = bool(rest <= 1e3 * eps * torch.linalg.vector_norm(whole))
                if not apart:
                    raise ValueError(
                        f"parameter {self._names[k]!r} enters without a batch axis of its own "
                        f"(rule {use.name!r}), so the batches cannot be kept apart in one pass; "
                        "make one NTK for each"
                    )

    def _check_finite(self) -> None:
        """Raise ValueError when an activation is not finite: nor is the diagonal of its A Aᵀ."""
        blocks = [f.gram for f in self._factors if isinstance(f, Gram)]
        blocks += [] if self.share is None else [self.share]
        sums = [x.diagonal(dim1=-2, dim2=-1) for x in blocks]
        sums += [f.inputs.sum(-1) for f in self._factors if isinstance(f, Span)]
        if any(not bool(torch.isfinite(x).all()) for x in sums):
            raise ValueError(
                f"activations or gradients are not finite although the outputs are. {MASKED}"
            )

    def _note(self, uses: Sequence[Use], form: Form) -> None:
        names = ", ".join(dict.fromkeys(self._names[use.number] for use in uses))
        rules = " + ".join(dict.fromkeys(use.name for use in uses))
        self.plan_rows.append(PlanRow(names, rules, *astuple(form)))


def shares_of(uses: Sequence[Use], delta: Tensor, rows: Rows) -> list[Share] | None:
    """Return the shares of M of single-use parameters with one own-position δ; None if one lacks.

    `delta` is δ at u = 1. Linear layers, embeddings and biases share one; a gain has rows of its
    own, (x̂ ⊙ δ)(x̂ ⊙ δ)ᵀ.
    """
    front = rows.front(delta.shape)
    if front is None or any(not use.rowwise(rows, front) for use in uses):
        return None
    whole, rest = Share(rows.pick(delta)), delta.shape[front:]
    met = [use.meet(whole, rows, rest) for use in uses]
    alone = [use for use, done in zip(uses, met, strict=True) if not done]
    return [whole] * any(met) + [Share(rows.pick(use.own(delta, front)), ones=1) for use in alone]


def blocks_of(uses: Sequence[Use], at: Setting) -> list[tuple[list[Use], Factor, Form]]:
    """Return the blocks of K of single-use parameters with one δ; biases go where they are free."""
    left = sorted(uses, key=lambda use: use.name == "shift")
    blocks = []
    while left:
        group = left[0].partners(left, at.width)
        blocks.append((group, *left[0].factor(group, at)))
        left = [use for use in left if use not in group]
    return blocks
