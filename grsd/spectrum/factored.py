"""The exact product M u = J_ε K J_εᵀ u without parameter gradients: forward once, record, fold, multiply.

Set-up runs the model once and its backward pass once, and leaves two linear programs (:mod:`grsd.spectrum.tape`), the blocks
of K (:mod:`grsd.spectrum.factors`) and one T × T matrix (:mod:`grsd.spectrum.folding`). The graph of the model is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grsd.spectrum.factors import Factor, Gram, Grams, Span, Through, Tied, Tokens, Vectors, accumulate, matrix
from grsd.spectrum.folding import Rows, own_positions, share, unfold
from grsd.spectrum.recording import record, transpose
from grsd.spectrum.tape import Program
from grsd.spectrum.uses import Place, Trace, Use

FOLD_LIMIT = 8192  # a T × T matrix larger than this costs more than the passes that it saves


@dataclass(frozen=True)
class PlanRow:
    """One line of `NTK.plan()`: what a product does for one parameter or pass.

    Attributes
    ----------
    layer : str, names of the parameters, or the pass.
    rule : str, how the parameter enters ("rows", "gather", "scale", "shift", "conv", "plain", joined by "+").
    association : str, the form of K that is used.
    flops : int, multiplications and additions of one product.
    bytes : int, memory held for it beyond the weights.
    """

    layer: str
    rule: str
    association: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The rows of a plan; prints as a table."""

    method: str
    rows: tuple[PlanRow, ...]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "rule", "association", "MFLOP", "MB")
        body = [(r.layer, r.rule, r.association, f"{r.flops / 1e6:.3f}", f"{r.bytes / 1e6:.3f}") for r in self.rows]
        total = ("total", self.method, "", f"{self.flops / 1e6:.3f}", f"{sum(r.bytes for r in self.rows) / 1e6:.3f}")
        lines = [head, *body, total]
        widths = [max(len(line[k]) for line in lines) for k in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if k < 3 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


class Factored:
    """The product, made from a traced forward pass.

    Parameters
    ----------
    rows : Tensor, (T,), with its graph.
    trace : Trace, what was recorded during that pass.
    names : names of `trace.parameters`.

    Notes
    -----
    Set-up: one activation-only backward pass, the transposed pass of what is not folded, and the Gram matrices. A product:
    about one forward pass each for J_εᵀ and J_ε without head and last block's tail, and 2 n² out FLOPs a layer for K.
    """

    def __init__(self, rows: Tensor, trace: Trace, names: Sequence[str]) -> None:
        self._names, self._parameters = list(names), trace.parameters
        self.plan_rows: list[PlanRow] = []
        self.share: Tensor | None = None
        self._factors: list[Factor] = []
        self._folded_ties: list[FoldedTie] = []
        self._grams = Grams()
        self._size, self._dtype = rows.numel(), rows.dtype

        places: list[Place] = [*trace.places, *trace.parameters]
        start = torch.ones_like(rows.detach())
        adjoint, values, slots = _backward(rows, places, start)
        first = len(trace.places)
        by_parameter: dict[int, list[tuple[Use, int]]] = {}
        for use in trace.uses:
            if slots[use.place] is not None:
                by_parameter.setdefault(use.parameter, []).append((use, slots[use.place]))  # type: ignore[arg-type]
        for k, parameter in enumerate(trace.parameters):
            if (slot := slots[first + k]) is not None:
                by_parameter.setdefault(k, []).append((Use("plain", k, first + k, parameter.shape), slot))
        self.used = sorted(by_parameter)
        if not self.used:
            raise ValueError("no parameter of the model reaches the outputs, so J is zero")

        own = own_positions(adjoint, values, self._size) if self._size <= FOLD_LIMIT else {}
        needed = self._build(by_parameter, own, values)
        self.slots = sorted(needed)
        last = {slot: k for k, factor in enumerate(self._factors) for slot in factor.slots}
        self._done = [[slot for slot, at in last.items() if at == k] for k in range(len(self._factors))]
        self.adjoint: Program | None = None
        self.forward: Program | None = None
        if self.slots:
            self.adjoint = unfold(adjoint, values, own, self.slots)
            self.forward = transpose(self.adjoint, start)
            for name, program in (("J_εᵀ", self.adjoint), ("J_ε", self.forward)):
                self.plan_rows.append(PlanRow(f"({name})", "pass", "recorded program", program.flops, 0))

    def __call__(self, u: Tensor) -> Tensor:
        """Return J Jᵀ u for u of shape (T,)."""
        with torch.no_grad():
            result = torch.zeros_like(u) if self.share is None else self.share @ u
            if self.adjoint is not None and self.forward is not None:
                found = self.adjoint.run(u)
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
                result += self.forward.consume(seeds)[0]
            return result

    def _build(
        self, by_parameter: dict[int, list[tuple[Use, int]]], own: dict[int, Rows], values: dict[int, Tensor]
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
            block = share(single, values[slot], own[slot], self._grams) if slot in own else None
            if block is not None:
                self._fold(single, block)
            else:
                self._one_slot(slot, single, values[slot])
                needed.add(slot)
        return needed

    def _fold(self, uses: Sequence[Use], block: Tensor) -> None:
        self.share = block if self.share is None else self.share.add_(block)
        self._note(uses, "folded into T × T", 0, 0)

    def _one_slot(self, slot: int, uses: Sequence[Use], delta: Tensor) -> None:
        """Make the factors of single-use parameters with the same δ."""
        item, width = delta.element_size(), delta.shape[-1] if delta.ndim else 1
        n = delta.numel() // width
        linear = [u for u in uses if u.rule == "rows"]
        biases = [u for u in uses if u.rule == "shift" and u.spread == (width,)] if linear else []
        if linear:
            fan_in = sum(u.data.shape[-1] for u in linear if u.data is not None)
            inputs = [u.data for u in linear if u.data is not None]
            if n <= 2 * fan_in:
                self._factors.append(Gram(slot, self._grams.of(inputs, len(biases), delta.dtype)))
                self._note([*linear, *biases], "(A Aᵀ + b 1 1ᵀ) δ", 2 * n * n * width, n * n * item)
            else:
                flat = tuple(matrix(a).to(delta.dtype) for a in inputs)
                self._factors.append(Span(slot, flat, len(biases)))
                held = sum(a.numel() for a in flat) * item
                self._note([*linear, *biases], "A (Aᵀ δ) + b 1 (1ᵀ δ)", 4 * n * fan_in * width, held)
        for use in uses:
            if any(use is u for u in (*linear, *biases)):
                continue
            if use.rule == "gather":
                self._factors.append(_tokens(use, slot, delta.dtype))
                self._note([use], "sum over equal tokens", 2 * delta.numel(), 8 * n)
                continue
            shape = self._parameters[use.parameter].shape
            self._factors.append(Through((use,), (slot,), shape))
            self._note(
                [use], "through its gradient", self._passes(use), 0 if use.data is None else use.data.numel() * item
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
            a, tokens = matrix(head.data), table.data.reshape(-1)
            kept = _tokens(table, ts, a.dtype).kept
            flops = 4 * a.shape[0] * tokens.numel() * a.shape[1]
            rows = own.get(hs)
            front = None if rows is None else rows.front(head.shape)
            singles.setdefault(ts, []).append(table)
            singles.setdefault(hs, []).append(head)
            if rows is not None and front == len(head.shape) - 1 and ts not in own:
                fixed = rows.pick(values[hs])[:, tokens]
                self._folded_ties.append(FoldedTie(ts, rows.pick(a), fixed, tokens, kept))
                self._note(plain, "cross terms, head folded", flops, fixed.numel() * fixed.element_size())
                return {ts}
            self._factors.append(Tied(hs, ts, a, tokens, kept))
            self._note(plain, "cross terms of table and head", flops, 0)
            return {hs, ts}
        self._factors.append(
            Through(tuple(plain), tuple(s for _, s in uses), self._parameters[plain[0].parameter].shape)
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

    def _note(self, uses: Sequence[Use], association: str, flops: int, held: int) -> None:
        names = list(dict.fromkeys(self._names[u.parameter] for u in uses))
        rules = list(dict.fromkeys(u.rule for u in uses))
        self.plan_rows.append(PlanRow(", ".join(names), " + ".join(rules), association, flops, held))


@dataclass(frozen=True)
class FoldedTie:
    """The cross terms of embedding and folded head: δ_z = u ⊙ Γ at the head, of which Γ[:, t] is all that is needed.

    δ_s gets Γ[:, t]ᵀ (u ⊙ a); M u gets rowsum(a ⊙ (Γ[:, t] δ_s)). Cost 4 T m h FLOPs.
    """

    embedding: int
    a: Tensor  # (T, h)
    fixed: Tensor  # (T, m), Γ at the tokens of the batch
    tokens: Tensor
    kept: Tensor | float

    def add(self, u: Tensor, deltas: Vectors, out: Vectors) -> Tensor:
        delta = deltas[self.embedding]
        back = (self.fixed.T @ (u[:, None] * self.a)) * self.kept
        result = (self.a * (self.fixed @ (matrix(delta) * self.kept))).sum(1)
        accumulate(out, self.embedding, back.view(delta.shape))
        return result


def _tokens(use: Use, slot: int, dtype: torch.dtype) -> Tokens:
    assert use.data is not None
    tokens = use.data.reshape(-1)
    distinct, group = torch.unique(tokens, return_inverse=True)
    padding = use.options["padding"]
    kept: Tensor | float = 1.0 if padding is None else (tokens[:, None] != padding).to(dtype)
    return Tokens(slot, group, distinct.numel(), kept)


def _backward(
    rows: Tensor, places: Sequence[Place], start: Tensor
) -> tuple[Program, dict[int, Tensor], list[int | None]]:
    """Record the backward pass from u to every place; return it with its values and the slot of every place."""

    def backward(u: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(rows, places, u, allow_unused=True)  # type: ignore[arg-type]

    program, values, missing = record(backward, [start])
    found = iter(program.outputs)
    slots = [None if k in missing else next(found) for k in range(len(places))]
    return program, values, slots
