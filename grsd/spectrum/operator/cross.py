"""The kernel between two batches, C = J′ Jᵀ, factored as M is: C = J′_ε K J_εᵀ.

J_εᵀ is the recorded backward pass of one batch, J′_ε that of the other, transposed. K joins the
uses of a parameter in one batch to its uses in the other: a layer's δ becomes a change of the same
layer's output there, A′(Aᵀδ) or (A′Aᵀ)δ. What M folds into a T × T matrix, C folds into a T′ × T
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from grsd.spectrum.operator.algebra import check_vector
from grsd.spectrum.operator.base import Plan, PlanRow
from grsd.spectrum.operator.double_backward import Retained
from grsd.spectrum.operator.factored import FOLD_LIMIT, Entrances, Factored, Placed, shares_of
from grsd.spectrum.operator.factors import Form, Use, Vectors, accumulate, gradient, matrix
from grsd.spectrum.operator.own_positions import total_between
from grsd.spectrum.operator.precision import unmixed
from grsd.spectrum.operator.rules import Embedding, Linear, is_bias
from grsd.spectrum.programs.program import Kinds, Program, Rows

Pair = tuple[
    Use, int, Use, int
]  # a use of one parameter, its slot, and the same in the other batch


class Side(Factored):
    """One batch: where its parameters enter, and the passes down to them once `compile` is called.

    Attributes
    ----------
    placed : number of a parameter → its uses and the slots of their δ.
    own : slots whose values are own-position, and `fixed` their values at u = 1.
    kinds : shapes and dtypes of δ by slot.
    """

    def _build(self, placed: Placed, own: dict[int, Rows], values: Vectors) -> set[int]:
        slots = {slot for uses in placed.values() for _, slot in uses}
        self.placed, self.own = placed, {slot: own[slot] for slot in slots & own.keys()}
        self.fixed = {slot: values[slot].detach() for slot in self.own}
        return set()

    def _compile(
        self, adjoint: Program, values: Vectors, own: dict[int, Rows], start: Tensor
    ) -> None:
        self.kinds: Kinds = adjoint.kinds
        self._kept: Any = (adjoint, values, own, start)

    def compile(self, slots: set[int]) -> None:
        """Make the passes between the rows and these δ."""
        self.slots = sorted(slots)
        super()._compile(*self._kept)
        self._kept = None

    def folded_head(self, use: Use, slot: int) -> bool:
        """Whether output i reaches the head's output at its own position alone."""
        rows = self.own.get(slot)
        return rows is not None and rows.front(use.shape) == len(use.shape) - 1


@dataclass(frozen=True)
class Piece:
    """A part of K: from δ at `sources` of one batch to changes at `targets` of the other.

    None stands for the rows themselves: u as a source, C u as a target.
    """

    sources: tuple[int | None, ...]
    targets: tuple[int | None, ...]
    run: Callable[..., Sequence[Tensor]]


class CrossKernel:
    """The (T′, T) matrix C = J′ Jᵀ of products between two batches, made by `NTK.cross`.

    C @ u takes (T,) or (T, k) to the other batch; C.T @ v goes back, v @ C as well.

    Attributes
    ----------
    outputs : (T′,), f′ at the other batch, detached.
    shape, dtype, device, eps : of the matrix and of its products.
    inner_weight : that of the operator it was made from, and a factor of C: 1/n of *its* samples
        for "mean". Along the flow of squared error on that batch ḟ′ = C e, and ė′ = −C e.
    method : "factored" or "graph".

    Notes
    -----
    Set-up: that of both batches. A product: one pass down one batch and one pass up the other, and
    K between; `plan` has the FLOPs, at most twice those of M on as many rows. With "graph" a VJP on
    one retained graph and a JVP on the other.
    """

    def __init__(
        self,
        first: Side | Retained,
        second: Side | Retained,
        outputs: tuple[Tensor, Tensor],
        settings: dict[str, Any],
    ) -> None:
        self._sides, self._outputs, self._settings = (first, second), outputs, settings
        self.outputs, self.device = outputs[1], outputs[1].device
        self.shape = (outputs[1].numel(), outputs[0].numel())
        self.dtype: torch.dtype = outputs[1].dtype
        self.eps: float = settings["eps"]
        self.inner_weight: float = settings["inner_weight"]
        factored = isinstance(first, Side) and isinstance(second, Side)
        self.method = "factored" if factored else "graph"
        self._share: Tensor | None = None
        self._pieces: list[Piece] = []
        self._rows: list[PlanRow] = []
        if isinstance(first, Side) and isinstance(second, Side):
            with unmixed():
                self._join(first, second)

    @property
    def T(self) -> CrossKernel:
        """Cᵀ, (T, T′), from the same passes; its `outputs` are those of the first batch."""
        return CrossKernel(self._sides[1], self._sides[0], self._outputs[::-1], self._settings)

    def plan(self) -> Plan:
        """Return what a product does, as `NTK.plan`."""
        if self.method == "graph":
            why = "VJP on one batch, JVP on the other; not counted"
            return Plan("graph", (PlanRow("all parameters", "retained graphs", why, 0, 0),))
        return Plan("factored", tuple(self._rows))

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return C u, (T′,) or (T′, k), for u of shape (T,) or (T, k). Cost: a product a column."""
        check_vector("C", self, u, (self.shape[1], *u.shape[1:2]))
        if u.ndim == 2:
            columns = [self @ column for column in u.unbind(1)]
            return torch.stack(columns, 1) if columns else u.new_empty(self.shape[0], 0)
        self._settings["unchanged"]()
        first, second = self._sides
        if isinstance(first, Retained) and isinstance(second, Retained):
            v = first.vjp(u)
            shapes = second.parameters
            given = {k: v[k] if k in v else torch.zeros_like(shapes[k]) for k in second.used}
            return second.jvp(given) * self.inner_weight
        with torch.no_grad(), unmixed():
            return self._product(u) * self.inner_weight

    def __rmatmul__(self, v: Tensor) -> Tensor:
        """Return v C for v of shape (T′,), or (k, T′)."""
        return self.T @ v if v.ndim == 1 else (self.T @ v.T).T

    def to_dense(self) -> Tensor:
        """Return C, (T′, T), by the smaller number of products."""
        if self.shape[0] < self.shape[1]:
            return (self.T @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).T
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def __repr__(self) -> str:
        return f"CrossKernel({self.shape}, method={self.method!r}, {self.dtype}, {self.device})"

    def _product(self, u: Tensor) -> Tensor:
        first, second = self._sides
        assert isinstance(first, Side) and isinstance(second, Side)
        result = u.new_zeros(self.shape[0]) if self._share is None else self._share @ u
        deltas: dict[int | None, Tensor] = {None: u}
        if first.adjoint is not None:
            deltas |= dict(zip(first.slots, first.adjoint.run(u), strict=True))
        changes: Vectors = {}
        for piece in self._pieces:
            made = piece.run(*[deltas[slot] for slot in piece.sources])
            for target, value in zip(piece.targets, made, strict=True):
                if target is None:
                    result = result + value
                else:
                    shape, dtype = second.kinds[target]
                    accumulate(changes, target, value.reshape(shape).to(dtype))
        if second.forward is None:
            return result
        ordered = [changes.pop(s) if s in changes else self._zeros(s) for s in second.slots]
        return result + second.forward.consume(ordered)[0]

    def _zeros(self, slot: int) -> Tensor:
        shape, dtype = self._sides[1].kinds[slot]  # type: ignore[union-attr]
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _join(self, first: Side, second: Side) -> None:
        """Choose the form of K for every parameter that both batches use, and make the passes."""
        groups: dict[tuple[int, int], list[Pair]] = {}
        for k in sorted(first.placed.keys() & second.placed.keys()):
            pairs = self._entrances(first, second, k)
            for pair in pairs:
                groups.setdefault((pair[1], pair[3]), []).append(pair)
        self._fold(first, second, groups)
        for pairs in groups.values():
            self._blocks(second, pairs)
        # the passes reach as far as something is wanted
        ends = [piece.sources for piece in self._pieces], [piece.targets for piece in self._pieces]
        for side, slots in zip((first, second), ends, strict=True):
            if side._kept is not None:
                side.compile({slot for each in slots for slot in each if slot is not None})
        passes = (("(J_εᵀ)", first.adjoint), ("(J′_ε)", second.forward))
        for name, program in passes:
            if program is not None:
                self._rows.append(PlanRow(name, "pass", "recorded program", program.flops, 0))

    def _entrances(self, first: Side, second: Side, k: int) -> list[Pair]:
        """Return the pairs of uses that meet alone; add pieces for all other terms."""
        here, there = first.placed[k], second.placed[k]
        if len(here) == len(there) == 1:
            return [(*here[0], *there[0])]
        ties = _tie(here), _tie(there)
        if ties[0] is None or ties[1] is None:
            self._through(here, there)
            return []
        # Embedding and head: each meets itself, and the cross terms are added.
        (head, hs), (table, ts) = ties[0]
        (head2, hs2), (table2, ts2) = ties[1]
        self._pieces.append(_head_to_table(first, head, hs, table2, ts2))
        self._pieces.append(_table_to_head(second, table, ts, head2, hs2))
        tokens, others = table.tensor.numel(), table2.tensor.numel()
        width = head.tensor.shape[-1]
        rows = head.tensor.numel() // width, head2.tensor.numel() // width
        flops = 2 * width * (rows[0] * others + rows[1] * tokens)
        self._note([head, table], Form("cross terms of table and head", flops))
        return [(head, hs, head2, hs2), (table, ts, table2, ts2)]

    def _fold(self, first: Side, second: Side, groups: dict[tuple[int, int], list[Pair]]) -> None:
        """Make one T′ × T matrix of what M folds and both batches can; take it from `groups`."""
        if max(self.shape) > FOLD_LIMIT:
            return
        chosen: list[Any] = []
        for slots, pairs in [*groups.items()]:
            slot, slot2 = slots
            known = [(a.number, a.name) in self._settings["folded"] for a, *_ in pairs]
            wanted = all(known) and all(type(a) is type(b) for a, _, b, _ in pairs)
            if not wanted or slot not in first.own or slot2 not in second.own:
                continue
            uses, uses2 = [a for a, *_ in pairs], [b for _, _, b, _ in pairs]
            left = shares_of(uses, first.fixed[slot], first.own[slot])
            right = shares_of(uses2, second.fixed[slot2], second.own[slot2])
            if left is None or right is None or len(left) != len(right):
                continue
            chosen += zip(right, left, strict=True)
            del groups[slots]
            self._note(uses, Form("folded into T′ × T", 0))
        if chosen:
            self._share = total_between(chosen, self.dtype)
            costs = 2 * self._share.numel(), self._share.nbytes
            self._rows.append(
                PlanRow("(own positions)", "share of C", "folded into T′ × T", *costs)
            )

    def _blocks(self, second: Side, pairs: list[Pair]) -> None:
        """Add the pieces of uses with one δ on either side; biases go with linear layers."""
        _, slot, _, slot2 = pairs[0]
        shape, dtype = second.kinds[slot2]
        width = shape[-1] if shape else 1
        linear = [(a, b) for a, _, b, _ in pairs if isinstance(a, Linear) and isinstance(b, Linear)]
        shifts = [(a, b) for a, _, b, _ in pairs if is_bias(a, width) and is_bias(b, width)]
        joined = [*linear, *shifts] if linear else []
        if linear:
            inputs = [matrix(a.tensor).to(dtype) for a, _ in linear]
            inputs2 = [matrix(b.tensor).to(dtype) for _, b in linear]
            run, form = self._linear(inputs, inputs2, len(joined) - len(linear), width)
            self._pieces.append(Piece((slot,), (slot2,), run))
            self._note([a for a, _ in joined], form)
        for a, _, b, _ in pairs:
            if any(a is done for done, _ in joined):
                continue
            if isinstance(a, Embedding) and isinstance(b, Embedding):
                self._pieces.append(_tokens(a, slot, b, slot2))
                self._note([a], Form("sum over equal tokens", a.flops // 4 + b.flops // 4))
            else:
                self._through([(a, slot)], [(b, slot2)])

    def _linear(
        self, inputs: list[Tensor], inputs2: list[Tensor], biases: int, width: int
    ) -> tuple[Callable[[Tensor], list[Tensor]], Form]:
        """Return δ → (Σ A′Aᵀ + b 1 1ᵀ) δ, by a cached matrix where that pays, or as A′(Aᵀδ)."""
        a, b = (torch.cat(x, 1) if len(x) > 1 else x[0] for x in (inputs, inputs2))
        n, n2, fan_in = len(a), len(b), a.shape[1]
        cached, span = 2 * n * n2 * width, 2 * (n + n2) * fan_in * width
        made = 2 * n * n2 * fan_in
        pays = made / (span - cached) if cached < span else None
        if pays is not None and pays <= self._settings["products"]:
            block = (b @ a.T).add_(biases)
            form = Form("(A′Aᵀ + b 1 1ᵀ) δ", cached, block.nbytes, made, pays)
            return lambda delta: [block @ delta.reshape(n, width)], form

        def apart(delta: Tensor) -> list[Tensor]:
            rows = delta.reshape(n, width)
            value = b @ (a.T @ rows)
            return [value + biases * rows.sum(0) if biases else value]

        return apart, Form("A′ (Aᵀ δ) + b 1 (1ᵀ δ)", span, a.nbytes + b.nbytes, 0, pays)

    def _through(self, here: Entrances, there: Entrances) -> None:
        """Add a parameter through its gradient, summed over its uses, with all cross terms."""
        uses, uses2 = [use for use, _ in here], [use for use, _ in there]

        def run(*deltas: Tensor) -> list[Tensor]:
            total = gradient(uses, deltas)
            return [use.change(total) for use in uses2]

        slots, slots2 = tuple(slot for _, slot in here), tuple(slot for _, slot in there)
        self._pieces.append(Piece(slots, slots2, run))
        flops = sum(use.flops for use in (*uses, *uses2)) // 2
        self._note(uses, Form("through its gradient", flops))

    def _note(self, uses: Sequence[Use], form: Form) -> None:
        names = ", ".join(dict.fromkeys(self._settings["names"][use.number] for use in uses))
        rules = " + ".join(dict.fromkeys(use.name for use in uses))
        self._rows.append(PlanRow(names, rules, *astuple(form)))


def _tie(uses: Entrances) -> tuple[tuple[Linear, int], tuple[Embedding, int]] | None:
    """Return head and embedding of a matrix that is used as both, and in no other way."""
    tables = [(use, slot) for use, slot in uses if isinstance(use, Embedding)]
    heads = [(u, slot) for u, slot in uses if isinstance(u, Linear) and not u.transposed]
    if len(uses) == 2 and len(heads) == len(tables) == 1:
        return heads[0], tables[0]
    return None


def _tokens(a: Embedding, slot: int, b: Embedding, slot2: int) -> Piece:
    """K δ sums rows of δ over equal tokens, and gives them to each of the other batch."""
    tokens, others = a.tensor.reshape(-1), b.tensor.reshape(-1)
    distinct, index = torch.unique(torch.cat([tokens, others]), return_inverse=True)
    enter, leave = index[: len(tokens)], index[len(tokens) :]

    def run(delta: Tensor) -> list[Tensor]:
        rows = matrix(delta)
        rows = rows * a.kept(rows.dtype)
        sums = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, enter, rows)
        return [sums[leave] * b.kept(rows.dtype)]

    return Piece((slot,), (slot2,), run)


def _head_to_table(side: Side, head: Linear, hs: int, table: Embedding, ts: int) -> Piece:
    """δ_z of one batch goes to s′_j = Σ_i δ_z[i, t′_j] a_i of the other."""
    tokens = table.tensor.reshape(-1)
    if side.folded_head(head, hs):  # there δ_z is u ⊙ Γ, of which Γ[:, t′] is needed
        rows = side.own[hs]
        a = rows.pick(matrix(head.tensor))
        fixed = rows.pick(side.fixed[hs])[:, tokens]
        return Piece(
            (None,),
            (ts,),
            lambda u: [(fixed.T @ (u[:, None] * a).to(fixed.dtype)) * table.kept(fixed.dtype)],
        )
    whole = matrix(head.tensor)
    return Piece(
        (hs,),
        (ts,),
        lambda dz: [(matrix(dz)[:, tokens].T @ whole.to(dz.dtype)) * table.kept(dz.dtype)],
    )


def _table_to_head(side: Side, table: Embedding, ts: int, head: Linear, hs: int) -> Piece:
    """δ_s goes to z′[i, v] = Σ_{j: t_j = v} a′_i · δ_s,j of the other batch, that of `side`."""
    tokens = table.tensor.reshape(-1)
    if side.folded_head(head, hs):  # whose rows are those of Γ′ z′
        rows = side.own[hs]
        a = rows.pick(matrix(head.tensor))
        fixed = rows.pick(side.fixed[hs])[:, tokens]

        def folded(delta: Tensor) -> list[Tensor]:
            entering = (matrix(delta) * table.kept(delta.dtype)).to(fixed.dtype)
            return [(a * (fixed @ entering)).sum(1)]

        return Piece((ts,), (None,), folded)
    whole = matrix(head.tensor)

    def spread(delta: Tensor) -> list[Tensor]:
        inner = whole.to(delta.dtype) @ (matrix(delta) * table.kept(delta.dtype)).T
        z = inner.new_zeros(len(whole), side.kinds[hs][0][-1])
        return [z.index_add_(1, tokens, inner)]

    return Piece((ts,), (hs,), spread)
