"""The Jacobian of a model in blocks J = (J^(1), …, J^(L)), and how each of them moves.

Along θ̇ = J∗e every block has J̇^(l) = Σ_m G_lm, where G_lm = d/ds J^(l) along the m-th block of
θ̇. The sum is exact. (J̇^(l))ᵀu is a Hessian product: Jᵀu with its graph, then the gradient of
⟨Jᵀu, θ̇⟩. The order matters in PyTorch 2: the gradient of Jθ̇ instead, with Jθ̇ taken as the
derivative of Jᵀu by u, is wrong for layer normalisation, whose third derivative by its input is not
kept.

Conventions of :mod:`grsd.dynamics`: ⟨u, v⟩ = (1/n) Σ uv and J∗ = Jᵀ/n, so ‖J‖² is the largest
eigenvalue of M = J Jᵀ/n. The products below are with J and Jᵀ themselves,
and passes are forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from grsd.dynamics.problem import Problem, kinks_of
from grsd.renorm.diagnostics.splitting import Split, entrances, split_parameters
from grsd.spectrum.observables import Observable, Outputs, TokenLogProb
from grsd.spectrum.operator.base import Inputs, forward_rows, refuse_dropout
from grsd.spectrum.operator.gradients import refuse_hooks

__all__ = ["BlockKernel", "Blocks", "State"]

State = Tensor | Mapping[str, Tensor]  # one flat vector (P,), or by name (buffers may be there)
Parts = tuple[Tensor, ...]  # one tensor a block

# A forward pass costs 1 and its backward pass 2; a backward pass through a graph of 3, 6, … costs
# twice that.
FORWARD, VJP, JVP, RATE_VJP, RATE_JVP = 1, 2, 6, 8, 18


class Blocks:
    """A model on fixed data at one instant, its parameters in L ordered blocks. It is not changed.

    Parameters
    ----------
    model, inputs, observable : as for `grsd.spectrum.NTK`; the observable says what the T rows are
    split : as in :func:`grsd.renorm.diagnostics.splitting.split_parameters`
    state : Tensor (P,) or mapping, optional
        Parameters to use instead of the model's own: the trainable ones as one vector in their
        order, or by name (a `state_dict`, with its buffers).
    along : Tensor (P,) or mapping, optional
        θ̇, where it is not that of the gradient flow, e.g. a step of an optimizer divided by its
        time.
    drive : callable, optional
        From rows to −n ∂L/∂f, (T,), so that θ̇ = Jᵀ drive/n. By default 1 for `TokenLogProb`, whose
        loss is its mean, and the observable's error otherwise.
    trainable : sequence of str, optional
        Names of the parameters that J is taken over; by default those that require a gradient.

    Attributes
    ----------
    names : tuple of str, the L blocks in the order of depth.
    members, shapes : tuples of tuples, the names and the shapes of each block's parameters.
    sizes : tuple of int, p_l.
    outputs : Tensor (T,), f.
    samples : int, n.
    reused : dict, parameter → how often it enters the computation, where that is more than once.
    kinks : tuple of str
        Operations without a second derivative (ReLU, max, …): J̇ is that between kinks.
    passes : int, work so far in units of one forward pass.
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
        if trainable is None:
            trainable = [name for name, p in own.items() if p.requires_grad]
        refuse_hooks(model, {name: own[name] for name in trainable if name in own})
        self._trainable = list(trainable)
        if not self._trainable:
            raise ValueError("no parameter of the model requires a gradient, so J is empty")
        blocks = split_parameters(model, self._trainable, split)
        self.names, self.members = tuple(blocks), tuple(blocks.values())
        self._model, self._inputs, self._observable, self._drive = model, inputs, observable, drive

        # the values at which the model runs: its own, replaced by those of the state
        self._flat_shapes = {name: own[name].shape for name in self._trainable}
        given = self._named(state, "state")
        if unknown := sorted(given.keys() - model.state_dict().keys() - own.keys()):
            raise ValueError(f"state holds {unknown[0]!r}, which the model does not have")
        known = own.keys() | dict(model.named_buffers()).keys()  # a shared one under its first name
        self._values = {name: p.detach() for name, p in own.items()}
        self._values |= {name: value for name, value in given.items() if name in known}
        ordered = [name for members in self.members for name in members]
        leaves = {name: self._values[name].detach().clone().requires_grad_() for name in ordered}

        # one forward pass, whose graph serves all products
        constant = self._values | leaves
        self.rows, self.samples = forward_rows(model, inputs, observable, constant=constant)
        self.outputs, self.kinks = self.rows.detach(), kinks_of(self.rows)
        self.reused = {k: count for k, count in entrances(self.rows, leaves).items() if count > 1}
        self._leaves = list(leaves.values())
        ends = accumulate((len(members) for members in self.members), initial=0)
        self._spans = [slice(a, b) for a, b in pairwise(ends)]
        self.shapes = tuple(tuple(tuple(leaves[k].shape) for k in ks) for ks in self.members)
        self.sizes = tuple(sum(leaf.numel() for leaf in self._leaves[span]) for span in self._spans)

        # Jᵀ probe with its graph: its derivative by the probe is J
        self._probe = torch.zeros_like(self.outputs, requires_grad=True)
        self._pulled = self._grad([self.rows], self._leaves, [self._probe], keep=True)
        if not any(w.requires_grad for w in self._pulled):
            raise ValueError(
                "no trainable parameter reaches the outputs (constant outputs), so J is zero"
            )
        self._bent: list[Tensor] | None = None  # J̇ᵀ probe with its graph, when it is asked for
        self.passes = FORWARD + VJP
        if along is None:
            pulled = self._grad([self.rows], self._leaves, [self.drive])
            self._velocity = [w / self.samples for w in pulled]
            self.passes += VJP
        else:
            moved = self._named(along, "along")
            self._velocity = [moved[name].to(leaf) for name, leaf in leaves.items()]

    @classmethod
    def of(cls, problem: Problem, theta: State | None = None, *, split: Split = "auto") -> Blocks:
        """Return the blocks of a `Problem` at θ (by default its own), driven by e = target − f."""
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
        """Return the same blocks of the same model at other parameters. Cost: 5 passes."""
        return Blocks(
            self._model,
            self._inputs,
            self._observable,
            split=dict(zip(self.names, self.members, strict=True)),
            state=state,
            along=along,
            drive=self._drive,
            trainable=self._trainable,
        )

    def by_name(self, state: State) -> dict[str, Tensor]:
        """Return the trainable parameters of a state, by name."""
        named = self._named(state, "state")
        return {name: named[name] for name in self._trainable}

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
    def velocity(self) -> Parts:
        """θ̇ by block, each (p_l,)."""
        return self._blocked(self._velocity)

    # ---- products with J and with its rate

    def vjp(self, u: Tensor) -> Parts:
        """Return J^(l)ᵀ u for every l, each (p_l,). Cost: 2 passes."""
        self.passes += VJP
        return self._blocked(self._grad([self.rows], self._leaves, [u]))

    def jvp(self, v: Tensor, block: int) -> Tensor:
        """Return J^(l) v for v of shape (p_l,), (T,). Cost: at most 6 passes."""
        self.passes += JVP
        span = self._spans[block]
        return self._grad(self._pulled[span], [self._probe], self._split(v, block))[0]

    def jvp_all(self, v: Sequence[Tensor]) -> Tensor:
        """Return J v = Σ_l J^(l) v_l for one vector a block, (T,). Cost: 6 passes."""
        self.passes += JVP
        return self._grad(self._pulled, [self._probe], self._split_all(v))[0]

    def rate_vjp(self, u: Tensor) -> Parts:
        """Return (J̇^(l))ᵀ u for every l. Cost: 8 passes (a Hessian product)."""
        self.passes += RATE_VJP
        pulled = self._grad([self.rows], self._leaves, [u], keep=True)
        return self._blocked(self._grad(pulled, self._leaves, self._velocity))

    def pieces(self, u: Tensor) -> list[Parts]:
        """Return G_lmᵀ u at [m][l], each (p_l,), for all m. Cost: 2 + 6 L passes; L·P numbers."""
        self.passes += VJP + (RATE_VJP - VJP) * len(self)
        pulled = self._grad([self.rows], self._leaves, [u], keep=True)
        return [
            self._blocked(self._grad(pulled[span], self._leaves, self._velocity[span]))
            for span in self._spans
        ]

    def rate_jvp(self, v: Sequence[Tensor]) -> Tensor:
        """Return J̇ v = Σ_l J̇^(l) v_l, (T,), for one vector a block. Cost: about 18 passes."""
        if self._bent is None:
            self._bent = self._grad(self._pulled, self._leaves, self._velocity, keep=True)
            self.passes += RATE_VJP - VJP
        self.passes += RATE_JVP
        return self._grad(self._bent, [self._probe], self._split_all(v))[0]

    def kernel(self, block: int | None = None) -> BlockKernel:
        """Return M^(l) = J^(l) J^(l)ᵀ/n, or M for None, as an operator."""
        return BlockKernel(self, block)

    def rate_gap(self, seed: int = 0) -> float:
        """Return how far J̇ᵀu by autodiff is from a difference quotient of Jᵀu, for one random u.

        Relative, the best of three steps. It should be below 1e-5 in float64 and about 1e-2 in
        float32. More means that an operation has no second derivative, or a wrong one. Cost: 50
        forward passes a step.
        """
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(self.size, generator=generator, dtype=torch.float64).to(self.outputs)
        ordered = [name for members in self.members for name in members]
        along = dict(zip(ordered, self._velocity, strict=True))
        still = {name: torch.zeros_like(v) for name, v in along.items()}
        rate = torch.cat(self.rate_vjp(u)).double()

        def pulled(step: float) -> Tensor:
            moved = {name: self._values[name] + step * v for name, v in along.items()}
            there = self.at(self._values | moved, still)
            gradient = torch.cat(there.vjp(u)).double()
            self.passes += there.passes
            return gradient

        # steps as large as the parameters allow: rounding weighs least, if the network does not
        # bend within them
        fastest = max(float(v.abs().max()) for v in self._velocity)
        largest = max(float(leaf.detach().abs().max()) for leaf in self._leaves)
        gap = float("inf")
        for share in (1e-3, 1e-4, 1e-5) if self.dtype == torch.float64 else (1e-2, 1e-3, 1e-4):
            h = share * (1 + largest) / max(fastest, 1e-300)
            near, far = (pulled(k * h) - pulled(-k * h) for k in (1, 2))
            quotient = (8 * near - far) / (12 * h)
            scale = torch.maximum(quotient.norm(), rate.norm()).clamp(min=1e-300)
            gap = min(gap, float((quotient - rate).norm() / scale))
            if gap < 1e-5:
                break
        return gap

    # ---- dense, for small models

    def jacobian(self, only: slice = slice(None)) -> Parts:
        """Return J^(l), (T, p_l), of every block or of a slice. Cost: T gradients, T·P numbers."""
        self.passes += VJP * self.size
        spans = self._spans[only]
        first = spans[0].start
        leaves = self._leaves[first : spans[-1].stop]
        batches = [self._pull_batch(units, leaves) for units in torch.split(self._units(), 64)]
        rows = [torch.cat(column).flatten(1) for column in zip(*batches, strict=True)]
        return tuple(torch.cat(rows[s.start - first : s.stop - first], dim=1) for s in spans)

    def rate(self, only: slice = slice(None)) -> Parts:
        """Return J̇^(l), (T, p_l), of every block or of a slice. Cost: T Hessian products."""
        rows = [self.rate_vjp(unit)[only] for unit in self._units()]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def rate_pieces(self) -> list[Parts]:
        """Return every G_lm at [m][l], (T, p_l). Cost: T·L Hessian products, T·L·P numbers."""
        rows = [self.pieces(unit) for unit in self._units()]
        return [
            tuple(torch.stack(column) for column in zip(*of_block, strict=True))
            for of_block in zip(*rows, strict=True)
        ]

    # ---- the graph, flat vectors and blocks

    def _grad(
        self,
        of: Sequence[Tensor],
        by: Sequence[Tensor],
        weights: Sequence[Tensor],
        keep: bool = False,
    ) -> list[Tensor]:
        """∂(Σ weights · of)/∂by, zero where nothing depends on it; with its own graph if `keep`."""
        pairs = [(a, w) for a, w in zip(of, weights, strict=True) if a.requires_grad]
        if not pairs:
            return [torch.zeros_like(b) for b in by]
        tops, cotangents = zip(*pairs, strict=True)
        options = {"retain_graph": True, "create_graph": keep, "materialize_grads": True}
        gradients = torch.autograd.grad(tops, by, cotangents, **options)
        # zeros that older versions make ask for a gradient
        return list(gradients) if keep else [g.detach() for g in gradients]

    def _units(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype, device=self.device)

    def _pull_batch(self, units: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Jᵀ of several unit vectors at once for some of the leaves, each (k, ...)."""
        options = {"retain_graph": True, "is_grads_batched": True, "allow_unused": True}
        try:
            gradients = torch.autograd.grad(self.rows, leaves, units, **options)
        except RuntimeError:  # an operation without a batching rule
            rows = [self._grad([self.rows], leaves, [unit]) for unit in units]
            return [torch.stack(column) for column in zip(*rows, strict=True)]
        return [
            units.new_zeros(len(units), *leaf.shape) if g is None else g
            for g, leaf in zip(gradients, leaves, strict=True)
        ]

    def _blocked(self, values: Sequence[Tensor]) -> Parts:
        return tuple(torch.cat([w.reshape(-1) for w in values[span]]) for span in self._spans)

    def _split(self, v: Tensor, block: int) -> list[Tensor]:
        size = self.sizes[block]
        if v.shape != (size,):
            raise ValueError(
                f"block {self.names[block]!r} has {size} parameters, got {tuple(v.shape)}"
            )
        return _shaped(v, [leaf.shape for leaf in self._leaves[self._spans[block]]])

    def _split_all(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [part for block, one in enumerate(v) for part in self._split(one, block)]

    def _named(self, state: State | None, what: str) -> dict[str, Tensor]:
        """A state by name; a mapping may hold more than the trainable parameters."""
        if state is None:
            return {}
        if isinstance(state, Mapping):
            named = dict(state)
            for name, shape in self._flat_shapes.items():
                if name not in named or named[name].shape != shape:
                    seen = tuple(named[name].shape) if name in named else "nothing"
                    raise ValueError(
                        f"{what}: the model's {name!r} has shape {tuple(shape)}, the snapshot has "
                        f"{seen}"
                    )
        else:
            total = sum(shape.numel() for shape in self._flat_shapes.values())
            if state.shape != (total,):
                raise ValueError(
                    f"{what} has shape {tuple(state.shape)}; the model has {total} trainable "
                    "parameters"
                )
            parts = _shaped(state, list(self._flat_shapes.values()))
            named = dict(zip(self._flat_shapes, parts, strict=True))
        for name, value in named.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{what}: {name!r} holds values that are not finite")
        return named


def _shaped(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class BlockKernel:
    """M^(l) = J^(l) J^(l)ᵀ/n of one block, or M of all, as a symmetric operator on (T,)."""

    def __init__(self, blocks: Blocks, block: int | None) -> None:
        self.blocks, self.block = blocks, block
        self.shape, self.dtype, self.device = (
            (blocks.size, blocks.size),
            blocks.dtype,
            blocks.device,
        )

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M^(l) u. Cost: 8 passes."""
        pulled = self.blocks.vjp(u)
        if self.block is None:
            return self.blocks.jvp_all(pulled) / self.blocks.samples
        return self.blocks.jvp(pulled[self.block], self.block) / self.blocks.samples
