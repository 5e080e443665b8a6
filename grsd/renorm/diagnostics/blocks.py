"""The Jacobian of a model in blocks J = (J^(1), …, J^(L)), and how each block moves: products, and dense for small models.

Along θ̇ = J∗e every block has J̇^(l) = Σ_m G_lm, where G_lm = d/ds J^(l) along the m-th block of θ̇. The sum is exact. (J̇^(l))ᵀu is a
Hessian product: Jᵀu with its graph, then the gradient of ⟨Jᵀu, θ̇⟩. The order matters in PyTorch 2: the gradient of Jθ̇ instead, with Jθ̇
taken as the derivative of Jᵀu by u, is wrong for layer normalisation, whose third derivative by its input is not kept.

Conventions of :mod:`grsd.dynamics`: ⟨u, v⟩ = (1/n) Σ uv and J∗ = Jᵀ/n, so ‖J‖² is the largest eigenvalue of M = J Jᵀ/n. The products
below are with J and Jᵀ themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem, kinks_of
from grsd.renorm.diagnostics.splitting import Split, entrances, split_parameters
from grsd.spectrum.observables import Observable, Outputs, TokenLogProb
from grsd.spectrum.operator.base import Inputs, forward_rows, refuse_dropout

__all__ = ["BlockKernel", "Blocks", "State"]

State = (
    Tensor | Mapping[str, Tensor]
)  # parameters: one flat vector (P,), or by name (buffers may be among them)

# A forward pass costs 1 and its backward pass 2; a backward pass through a graph of 3, 6, … costs twice that graph.
FORWARD, VJP, JVP, RATE_VJP, RATE_JVP = 1, 2, 6, 8, 18


class Blocks:
    """A model on fixed data at one instant, its parameters in L ordered blocks.

    Parameters
    ----------
    model : nn.Module
        Dropout must be inactive. It is not changed.
    inputs : Tensor, tuple or mapping
        As for `grsd.spectrum.NTK`.
    observable : Observable
        What the T rows are: `Outputs`, `ClassLogits`, `TokenLogProb`, ….
    split : "auto", "layers" or a list
        As in :func:`grsd.renorm.diagnostics.splitting.split_parameters`.
    state : Tensor (P,) or mapping, optional
        Parameters to use instead of the model's own: the trainable ones as one vector in the order of `names`, or by name (a
        `state_dict`, with its buffers).
    along : Tensor (P,) or mapping, optional
        θ̇, where it is not that of the gradient flow, e.g. a step of an optimizer divided by its time.
    drive : callable, optional
        From rows to −n ∂L/∂f, (T,), so that θ̇ = Jᵀ drive/n. By default 1 for `TokenLogProb`, whose loss is its mean, and the
        observable's error otherwise.
    trainable : sequence of str, optional
        Names of the parameters that J is taken over; by default those that require a gradient.

    Attributes
    ----------
    names : tuple of str, the L blocks in the order of depth.
    members : tuple of tuples of str, the parameters of each block.
    sizes : tuple of int, p_l.
    shapes : tuple of tuples, the parameter shapes of each block.
    outputs : Tensor (T,), f.
    samples : int, n.
    reused : dict, parameter → number of times it enters the computation, where that is more than once.
    kinks : tuple of str, operations without a continuous second derivative (ReLU, max, …): there J̇ is that between two kinks.
    passes : int, work done so far in units of one forward pass (backward 2, Hessian product 8, …).

    Raises
    ------
    ValueError
        Fewer than two blocks, active dropout, outputs that do not depend on the parameters, or a state that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        split: Split = "auto",
        state: State | None = None,
        along: State | None = None,
        drive: Callable[[Tensor], Tensor] | None = None,
        trainable: Sequence[str] | None = None,
    ) -> None:
        refuse_dropout(model)
        own = dict(model.named_parameters())
        chosen = (
            [name for name, p in own.items() if p.requires_grad]
            if trainable is None
            else list(trainable)
        )
        if not chosen:
            raise ValueError("no parameter of the model requires a gradient, so J is empty")
        blocks = split_parameters(model, chosen, split)
        self.names, self.members = tuple(blocks), tuple(blocks.values())
        self._model, self._inputs, self._observable, self._drive = model, inputs, observable, drive
        order = [name for members in self.members for name in members]
        self._order = [
            chosen.index(name) for name in order
        ]  # blocks → the order of the flat vector
        shapes = {name: own[name].shape for name in chosen}
        given_state = _by_name(state, shapes, "state")
        if unknown := sorted(given_state.keys() - model.state_dict().keys() - own.keys()):
            raise ValueError(f"state holds {unknown[0]!r}, which the model does not have")
        known = (
            own.keys() | dict(model.named_buffers()).keys()
        )  # a shared parameter under its first name only
        values = {name: p.detach() for name, p in own.items()} | {
            k: v for k, v in given_state.items() if k in known
        }
        leaves = {name: values[name].detach().clone().requires_grad_(True) for name in order}
        self.rows = forward_rows(model, inputs, observable, constant=values | leaves)
        self.outputs, self.samples = self.rows.detach(), observable.samples(self.rows.detach())
        self.kinks = kinks_of(self.rows)
        self._values = values
        self.reused = {
            name: count for name, count in entrances(self.rows, leaves).items() if count > 1
        }
        self._leaves = list(leaves.values())
        ends = [0]
        for members in self.members:
            ends.append(ends[-1] + len(members))
        self._spans = [slice(a, b) for a, b in pairwise(ends)]
        self.shapes = tuple(
            tuple(tuple(shapes[name]) for name in members) for members in self.members
        )
        self.sizes = tuple(sum(leaf.numel() for leaf in self._leaves[span]) for span in self._spans)
        self.passes = FORWARD
        self._probe = torch.zeros_like(self.outputs, requires_grad=True)
        self._pulled = self._grad(
            [self.rows], self._leaves, [self._probe], keep=True
        )  # Jᵀ probe, with its graph
        if not any(w.requires_grad for w in self._pulled):
            raise ValueError(
                "no trainable parameter reaches the outputs (constant outputs), so J is zero"
            )
        self.passes += VJP
        given = _by_name(along, shapes, "along")
        self._given_along = along is not None
        if along is None:
            self._velocity = [
                w / self.samples for w in self._grad([self.rows], self._leaves, [self.drive])
            ]
            self.passes += VJP
        else:
            self._velocity = [given[name].to(leaf) for name, leaf in leaves.items()]
        self._bent: list[Tensor] | None = None

    @classmethod
    def of(cls, problem: Problem, theta: State | None = None, *, split: Split = "auto") -> Blocks:
        """Return the blocks of a `grsd.dynamics.Problem` at θ (by default its own), with e = target − f as the drive."""
        return cls(
            problem._model,
            problem.inputs,
            Outputs(),
            split=split,
            state=problem.theta if theta is None else torch.as_tensor(theta),
            drive=lambda rows: problem.targets - rows,
            trainable=list(problem._shapes),
        )

    def at(self, state: State, along: State | None = None) -> Blocks:
        """Return the same blocks of the same model at other parameters. Cost: five forward passes."""
        return Blocks(
            self._model,
            self._inputs,
            self._observable,
            split=[list(members) for members in self.members],
            state=state,
            along=along,
            drive=self._drive,
            trainable=list(self._named_leaves()),
        )._named(self.names)

    def _named(self, names: tuple[str, ...]) -> Blocks:
        self.names = names
        return self

    def by_name(self, state: State) -> dict[str, Tensor]:
        """Return the trainable parameters of a state, by name."""
        found = _by_name(
            state, {name: leaf.shape for name, leaf in self._named_leaves().items()}, "state"
        )
        return {name: found[name] for name in self._named_leaves()}

    def _named_leaves(self) -> dict[str, Tensor]:
        """The leaves in the order of the flat vector."""
        named = dict(zip(self._flat_members, self._leaves, strict=True))
        ranked = sorted(zip(self._order, named, strict=True))
        return {name: named[name] for _, name in ranked}

    @property
    def _flat_members(self) -> list[str]:
        return [name for members in self.members for name in members]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """T, the number of rows."""
        return self.outputs.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs.dtype

    @property
    def device(self) -> torch.device:
        return self.outputs.device

    @property
    def drive(self) -> Tensor:
        """−n ∂L/∂f at the rows, (T,)."""
        if self._drive is not None:
            return self._drive(self.outputs)
        if isinstance(self._observable, TokenLogProb):
            return torch.ones_like(self.outputs)
        return self._observable.error(self.outputs)

    @property
    def velocity(self) -> tuple[Tensor, ...]:
        """θ̇ by block, each (p_l,)."""
        return self._blocked(self._velocity)

    # ---- products with J and with its rate

    def vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return J^(l)ᵀ u for every l, each (p_l,). Cost: 2 forward passes."""
        self.passes += VJP
        return self._blocked(self._grad([self.rows], self._leaves, [u]))

    def jvp(self, v: Tensor, block: int) -> Tensor:
        """Return J^(l) v for v of shape (p_l,), (T,). Cost: at most 6 forward passes."""
        self.passes += JVP
        span = self._spans[block]
        return self._grad(self._pulled[span], [self._probe], self._parts(v, block))[0]

    def jvp_all(self, v: Sequence[Tensor]) -> Tensor:
        """Return J v = Σ_l J^(l) v_l for one vector a block, (T,). Cost: 6 forward passes."""
        self.passes += JVP
        parts = [part for block, one in enumerate(v) for part in self._parts(one, block)]
        return self._grad(self._pulled, [self._probe], parts)[0]

    def rate_vjp(self, u: Tensor) -> tuple[Tensor, ...]:
        """Return (J̇^(l))ᵀ u for every l. Cost: 8 forward passes (a Hessian product)."""
        self.passes += RATE_VJP
        pulled = self._grad([self.rows], self._leaves, [u], keep=True)
        return self._blocked(self._grad(pulled, self._leaves, self._velocity))

    def pieces(self, u: Tensor) -> list[tuple[Tensor, ...]]:
        """Return G_lmᵀ u as `found[m][l]`, each (p_l,), for all m. Cost: 2 + 6 L forward passes; L·P numbers."""
        self.passes += VJP + (RATE_VJP - VJP) * len(self)
        pulled = self._grad([self.rows], self._leaves, [u], keep=True)
        return [
            self._blocked(self._grad(pulled[s], self._leaves, self._velocity[s]))
            for s in self._spans
        ]

    def rate_jvp(self, v: Sequence[Tensor]) -> Tensor:
        """Return J̇ v = Σ_l J̇^(l) v_l, (T,), for one vector a block. Cost: about 18 forward passes."""
        if self._bent is None:
            self._bent = self._grad(
                self._pulled, self._leaves, self._velocity, keep=True
            )  # J̇ᵀ probe, with its graph
            self.passes += RATE_VJP - VJP
        self.passes += RATE_JVP
        parts = [part for block, one in enumerate(v) for part in self._parts(one, block)]
        return self._grad(self._bent, [self._probe], parts)[0]

    def kernel(self, block: int | None = None) -> BlockKernel:
        """Return M^(l) = J^(l) J^(l)ᵀ/n, or M for None, as an operator on (T,) vectors. Cost: 8 forward passes a product."""
        return BlockKernel(self, block)

    def rate_gap(self, seed: int = 0) -> float:
        """Return how far J̇ᵀu by autodiff is from a difference quotient of Jᵀu, relative, for one random u: the best of three steps.

        It should be below 1e-5 in float64 and about 1e-2 in float32. More means that an operation has no second derivative, or a
        wrong one. Cost: 50 forward passes a step.
        """
        u = torch.randn(
            self.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        u = u.to(self.device, self.dtype)
        by_name = dict(zip(self._flat_members, self._velocity, strict=True))
        still = {name: torch.zeros_like(along) for name, along in by_name.items()}
        fastest = max(float(w.abs().max()) for w in self._velocity)
        largest = max(float(leaf.detach().abs().max()) for leaf in self._leaves)
        found = torch.cat(self.rate_vjp(u)).double()
        gap = float("inf")
        for share in (1e-3, 1e-4, 1e-5) if self.dtype == torch.float64 else (1e-2, 1e-3, 1e-4):
            h = share * (1 + largest) / max(fastest, 1e-300)

            def pulled(steps: float, h: float = h) -> Tensor:
                moved = {
                    name: self._values[name] + steps * h * along for name, along in by_name.items()
                }
                there = self.at(self._values | moved, still)
                gradient = torch.cat(there.vjp(u)).double()
                self.passes += there.passes
                return gradient

            near, far = (pulled(k) - pulled(-k) for k in (1, 2))
            expected = (8 * near - far) / (12 * h)
            scale = torch.maximum(expected.norm(), found.norm()).clamp(min=1e-300)
            gap = min(gap, float((expected - found).norm() / scale))
            if gap < 1e-5:
                break
        return gap

    # ---- dense, for small models

    def jacobian(self, only: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return J^(l), (T, p_l), of every block or of those in a slice. Cost: T backward passes, T·P numbers."""
        self.passes += VJP * self.size
        spans = self._spans[only]
        chosen = slice(spans[0].start, spans[-1].stop)
        parts = [self._batched(units, chosen) for units in torch.split(self._units(), 64)]
        whole = [torch.cat(column) for column in zip(*parts, strict=True)]
        return tuple(
            torch.cat(
                [g.flatten(1) for g in whole[span.start - chosen.start : span.stop - chosen.start]],
                dim=1,
            )
            for span in spans
        )

    def rate(self, only: slice = slice(None)) -> tuple[Tensor, ...]:
        """Return J̇^(l), (T, p_l), of every block or of those in a slice. Cost: T Hessian products, T·P numbers."""
        each = [self.rate_vjp(unit)[only] for unit in self._units()]
        return tuple(torch.stack(rows) for rows in zip(*each, strict=True))

    def rate_pieces(self) -> list[tuple[Tensor, ...]]:
        """Return every G_lm as `found[m][l]`, (T, p_l). Cost: T·L Hessian products, T·L·P numbers."""
        each = [self.pieces(unit) for unit in self._units()]
        return [
            tuple(torch.stack(rows) for rows in zip(*by, strict=True))
            for by in zip(*each, strict=True)
        ]

    # ---- the graphs

    def _grad(
        self,
        of: Sequence[Tensor],
        by: Sequence[Tensor],
        weights: Sequence[Tensor],
        keep: bool = False,
    ) -> list[Tensor]:
        """∂(Σ weights · of)/∂by, zero where nothing depends on it."""
        pairs = [(a, w) for a, w in zip(of, weights, strict=True) if a.requires_grad]
        if not pairs:
            return [torch.zeros_like(b) for b in by]
        found = torch.autograd.grad(
            [a for a, _ in pairs],
            by,
            [w for _, w in pairs],
            retain_graph=True,
            create_graph=keep,
            materialize_grads=True,
        )
        return (
            list(found) if keep else [g.detach() for g in found]
        )  # zeros that older versions make ask for a gradient

    def _units(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    def _batched(self, units: Tensor, chosen: slice) -> list[Tensor]:
        """Jᵀ of several unit vectors at once for some of the leaves, each (k, ...)."""
        leaves = self._leaves[chosen]
        try:
            found = torch.autograd.grad(
                self.rows,
                leaves,
                units,
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
        except RuntimeError:  # an operation without a batching rule
            each = [self._grad([self.rows], leaves, [unit]) for unit in units]
            return [torch.stack(column) for column in zip(*each, strict=True)]
        return [
            units.new_zeros(len(units), *leaf.shape) if g is None else g
            for g, leaf in zip(found, leaves, strict=True)
        ]

    def _blocked(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.cat([w.reshape(-1) for w in values[span]]) for span in self._spans)

    def _parts(self, v: Tensor, block: int) -> list[Tensor]:
        leaves = self._leaves[self._spans[block]]
        if v.shape != (self.sizes[block],):
            raise ValueError(
                f"block {self.names[block]!r} has {self.sizes[block]} parameters, got {tuple(v.shape)}"
            )
        pieces = torch.split(v, [leaf.numel() for leaf in leaves])
        return [piece.view_as(leaf) for piece, leaf in zip(pieces, leaves, strict=True)]


@dataclass(frozen=True)
class BlockKernel:
    """M^(l) = J^(l) J^(l)ᵀ/n of one block, or M of all of them, as a symmetric operator on (T,) vectors."""

    blocks: Blocks
    block: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.blocks.size, self.blocks.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M^(l) u. Cost: 8 forward passes."""
        pulled = self.blocks.vjp(u)
        if self.block is None:
            return self.blocks.jvp_all(pulled) / self.blocks.samples
        return self.blocks.jvp(pulled[self.block], self.block) / self.blocks.samples


def _by_name(state: State | None, shapes: Mapping[str, torch.Size], what: str) -> dict[str, Tensor]:
    """Return the values of a flat vector or a mapping by name; a mapping may hold more than the trainable ones."""
    if state is None:
        return {}
    if isinstance(state, Mapping):
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"{what}: the model's {name!r} has shape {tuple(shape)}, the snapshot has {found}"
                )
        found_all = dict(state)
    else:
        total = sum(shape.numel() for shape in shapes.values())
        if state.shape != (total,):
            raise ValueError(
                f"{what} has shape {tuple(state.shape)}; the model has {total} trainable parameters"
            )
        parts = torch.split(state, [shape.numel() for shape in shapes.values()])
        found_all = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
    for name, value in found_all.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what}: {name!r} holds values that are not finite")
    return found_all
