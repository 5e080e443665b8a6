"""Several optimizers as one, in one process or in many; and a backward pass that Sophia can use."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Combined(torch.optim.Optimizer):
    """Several optimizers as one: one `step`, one state, one list of groups for schedulers.

    The state is that of torch, entries numbered through all groups, so that
    `torch.distributed.checkpoint.state_dict` saves and loads it by parameter name. A new group
    names its optimizer by the key "optimizer", the place in `optimizers`, or goes to the only one
    that takes its parameters (vectors no matrix optimizer takes).
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise ValueError("no optimizer to combine")
        self.optimizers: list[torch.optim.Optimizer] = []
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[Group]:
        """The very groups of the parts: what a scheduler writes reaches them."""
        return [g for o in self.optimizers for g in o.param_groups] or self._checked

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._checked = groups  # while torch looks for parameters in two groups

    @property
    def state(self) -> Any:
        """The states of all parts, by parameter."""
        return {p: s for o in self.optimizers for p, s in o.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        """Take torch's empty state; what is kept is that of the parts."""

    def add_param_group(self, param_group: Group) -> None:
        if not self.optimizers:
            super().add_param_group(param_group)
            return
        group = dict(param_group)
        names = [type(o).__name__ for o in self.optimizers]
        place = group.pop("optimizer", None)
        params = group.get("params", [])
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if place is None:
            # vectors go to the one optimizer that takes them
            able = [
                k
                for k, o in enumerate(self.optimizers)
                if not hasattr(o, "matrices_only") or all(p.ndim > 1 for p in group["params"])
            ]
            place = able[0] if len(able) == 1 else None
        if not (isinstance(place, int) and 0 <= place < len(names)):
            raise ValueError(
                f"which of {names} is to step this group? Say optimizer=0 … {len(names) - 1} in "
                f"it, got {place!r}"
            )
        # a parameter that another part already steps would be stepped twice
        known = {id(p) for g in self.param_groups for p in g["params"]}
        if any(id(p) in known for p in group["params"]):
            raise ValueError("some parameters appear in more than one parameter group")
        self.optimizers[place].add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Combined.__init__(self, state["optimizers"])

    def step(self, closure: Any = None) -> Any:
        loss = evaluate(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups: list[Group] = []
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            first = sum(len(g["params"]) for g in groups)
            state |= {first + k: value for k, value in own["state"].items()}
            groups += [
                {**g, "params": [first + k for k in g["params"]]} for g in own["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups, count = state_dict.get("param_groups", []), len(self.param_groups)
        if len(groups) != count:
            raise ValueError(f"the state holds {len(groups)} groups, here are {count}")
        done = 0
        for optimizer in self.optimizers:
            # the groups of this part, its parameters numbered from 0 again
            own = groups[done : done + len(optimizer.param_groups)]
            ids = {key: k for k, key in enumerate(itertools.chain(*(g["params"] for g in own)))}
            state = {
                k: state_dict["state"][key] for key, k in ids.items() if key in state_dict["state"]
            }
            renamed = [{**g, "params": [ids[key] for key in g["params"]]} for g in own]
            optimizer.load_state_dict({"state": state, "param_groups": renamed})
            done += len(own)


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """Return what the closure of a step gives, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Run `loss.backward()`, and keep the gradients' graph where Sophia needs it for curvature."""
    curved = any(group.get("create_graph", False) for group in optimizer.param_groups)
    with warnings.catch_warnings():
        # zero_grad() breaks the cycle that torch warns of
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
        loss.backward(create_graph=curved)  # type: ignore[no-untyped-call]
