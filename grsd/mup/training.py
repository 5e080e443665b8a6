"""Training under a plan: one run, or several of one size as one program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from grsd.mup.combined import backward
from grsd.mup.plans import Plan
from grsd.mup.registry import assemble, row

Loss = Callable[..., Tensor]
Batch = Callable[[int, int], Sequence[Tensor]]
Run = tuple[int, float]


class _Program(nn.Module):
    """The loss of one model as a module, so that its tensors can be put in place."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.model, *batch)


class Stack:
    """Models of one architecture whose passes are one program (`torch.func.vmap`).

    Parameters and buffers of all K models are moved into one tensor (K, …) per name, and every
    model keeps views: what steps or reads a single model goes on to work.
    """

    def __init__(self, models: Sequence[nn.Module], loss: Loss) -> None:
        self.models, self.program = models, _Program(models[0], loss)
        self.parameters = _joined([dict(model.named_parameters()) for model in models])
        self.buffers = _joined([dict(model.named_buffers()) for model in models])
        self.leaves = {
            f"model.{name}": t for name, t in {**self.parameters, **self.buffers}.items()
        }

    def backward(self, batches: Sequence[Sequence[Tensor]], clip: float | None) -> list[float]:
        """Return every model's loss on its own batch, with its gradients in place, clipped."""
        for tensor in self.parameters.values():
            tensor.grad = None
        stacked = tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
        one = vmap(self._loss, in_dims=(0,) * (1 + len(stacked)), randomness="different")
        # on a CPU, vmap would take torch's fused attention model by model
        on_cpu = all(tensor.device.type == "cpu" for tensor in self.parameters.values())
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            losses: Tensor = one(self.leaves, *stacked)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        grads = {n: t.grad for n, t in self.parameters.items() if t.grad is not None}
        if clip is not None:
            # one norm for each model, as `torch.nn.utils.clip_grad_norm_` has it
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
            factors = (clip / (norms + 1e-6)).clamp(max=1.0)
            for g in grads.values():
                g.mul_(factors.view(-1, *[1] * (g.ndim - 1)))
        # a loss depends on its own model alone, so a slice is that model's gradient
        for name, g in grads.items():
            for model, own in zip(self.models, g.unbind(), strict=True):
                model.get_parameter(name).grad = own
        values: list[float] = losses.tolist()
        return values

    def _loss(self, leaves: dict[str, Tensor], *batch: Tensor) -> Tensor:
        value: Tensor = functional_call(self.program, leaves, batch)
        return value


def _joined(tensors: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the tensors of one name in one, and leave views of it where they were."""
    joined: dict[str, Tensor] = {}
    for name, first in tensors[0].items():
        whole = torch.stack([one[name].detach() for one in tensors])
        for one, part in zip(tensors, whole.unbind(), strict=True):
            one[name].data = part
        joined[name] = whole.requires_grad_(first.requires_grad)
    return joined


def train(
    models: Sequence[nn.Module],
    made: Plan,
    loss: Loss,
    batch: Batch,
    runs: Sequence[Run],
    *,
    steps: int,
    weight_decay: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    clip: float | None = None,
    **options: Any,
) -> list[tuple[float, int]]:
    """Draw the weights, train under a plan, return (loss, steps made) of every run.

    NaN is the loss of a run that diverged; it ends there, and the others go on. Several runs have
    their passes as one program, and agree with runs one by one up to rounding; then the forward
    pass may not branch on values, and what is random in it (dropout) is drawn for all at once.
    torch's generators are seeded with the first seed for the runs and put back after them.

    Parameters
    ----------
    models : one for each run, all of the architecture that `made` was made for
    loss : (model, the tensors of a batch) → scalar
    batch : (seed, step) → the tensors that `loss` takes, the same for the same seed and step
    runs : (seed, base learning rate) of each
    schedule : step → factor on all rates, such as `grsd.mup.schedules.cosine`
    score : model → number to be compared, called once at the end without gradients; by default the
        mean training loss of the last quarter of the steps
    clip : largest norm of the gradient of a run
    options : as `Plan.make_optimizer`

    Raises ValueError where numbers of models and runs differ, and for several runs of an optimizer
    with decompositions or curvature. Memory of several runs is that of one, times their number.
    """
    if not runs or len(models) != len(runs):
        raise ValueError(f"need a model for each run; got {len(models)} for {len(runs)} runs")
    seen: list[list[float]] = [[] for _ in runs]
    with torch.random.fork_rng(), ExitStack() as hooks:
        torch.manual_seed(runs[0][0])
        for model, (seed, _) in zip(models, runs, strict=True):
            made.initialize_(model, seed=seed)
            for handle in made.attach(model):
                hooks.callback(handle.remove)
        optimizer = _optimizer(made, models, runs, weight_decay=weight_decay, **options)
        rates = [group["lr"] for group in optimizer.param_groups]
        live, stack = list(range(len(runs))), None
        for step in range(steps):
            # the passes of all runs that live
            batches = {seed: batch(seed, step) for seed in {runs[k][0] for k in live}}
            if len(live) == 1:
                optimizer.zero_grad()
                model = models[live[0]]
                now = loss(model, *batches[runs[live[0]][0]])
                losses = [float(now.detach())]
                if math.isfinite(losses[0]):
                    backward(now, optimizer)
                    if clip is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), clip)
            else:
                if stack is None or len(stack.models) > len(live):
                    stack = Stack([models[k] for k in live], loss)
                losses = stack.backward([batches[runs[k][0]] for k in live], clip)
            # a run that left the numbers ends, and is stepped no more
            for k, value in zip(list(live), losses, strict=True):
                seen[k].append(value)
                if not math.isfinite(value):
                    live.remove(k)
                    models[k].zero_grad()
            # every group by one factor: a schedule keeps the plan's ratios
            factor = 1.0 if schedule is None else schedule(step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            try:
                if live:
                    optimizer.step()
            # a decomposition met infinite entries; of several runs it does not say whose
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                if len(live) > 1:
                    raise
                live = []
            if not live:
                break
        # the number that is compared
        last, ended = max(1, steps // 4), []
        for k, values in enumerate(seen):
            if k not in live:
                # what diverged made one step less than it saw losses
                ended.append((math.nan, len(values) - 1))
                continue
            with torch.no_grad():
                final = float(score(models[k])) if score else math.fsum(values[-last:]) / last
            ended.append((final if math.isfinite(final) else math.nan, steps))
        return ended


def _optimizer(
    made: Plan,
    models: Sequence[nn.Module],
    runs: Sequence[Run],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **base: Any,
) -> torch.optim.Optimizer:
    """Return one optimizer for all runs, each with groups of its own at its own rate."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for model, (_, lr) in zip(models, runs, strict=True):
        for name, own in made.param_groups(model, lr=lr, **base).items():
            groups.setdefault(name, []).extend(own)
    if len(runs) > 1:
        if apart := [name for name in groups if row(name).alone]:
            raise ValueError(
                f"{len(runs)} runs at once of {apart[0]}, whose steps differentiate gradients or "
                "decompose matrices; make them one by one"
            )
        if "adamw" in groups:
            options = {
                **(options or {}),
                "adamw": {"fused": True, **(options or {}).get("adamw", {})},
            }
    return assemble(groups, runs[0][1], options)
