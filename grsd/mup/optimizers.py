"""The matrix optimizers of the paper's tables that no library has in this form, on one batched Newton–Schulz.

`Muon` in three scalings, `Shampoo` with exponential averages, `SSO` on the spectral sphere. SGD and AdamW are torch's; Lion, SOAP and
Sophia come from `pytorch_optimizer`. `assemble` builds what a plan asks for, and `Combined` makes one optimizer of several.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "SSO",
    "Combined",
    "Muon",
    "Shampoo",
    "assemble",
    "backward",
    "newton_schulz",
    "pieces",
    "polar",
]

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of Jordan's iteration: singular values end between about 0.7 and 1.2."""
Scaling = Literal["bare", "keller", "kimi"]


def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return about U Vᵀ of every matrix in a batch, (..., m, n), by X ← aX + (b XXᵀ + c (XXᵀ)²) X.

    Parameters
    ----------
    G : Tensor, (..., m, n)
        Matrices of one shape are worked on together: three batched products a step, however many there are.
    steps : int
    coefficients : (a, b, c)
    dtype : of the iteration; by default bfloat16 on a GPU, float32 (or G's float64) on a CPU.

    Returns
    -------
    Tensor
        In the dtype of G. With the default coefficients the singular values that are above 10⁻³ of the norm lie in [0.68, 1.13] after
        five steps; `polar` is exact.

    Notes
    -----
    Cost: 4 m² n + 2 m³ multiply-adds a step, m ≤ n. In bfloat16 the result is off by about 0.03 in the spectral norm.
    """
    if G.ndim < 2:
        raise ValueError(f"orthogonalisation needs matrices, got shape {tuple(G.shape)}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"the iteration needs a floating-point dtype, got {dtype}")
    plain = (
        torch.bfloat16
        if G.is_cuda
        else torch.float64
        if G.dtype == torch.float64
        else torch.float32
    )
    work = plain if dtype is None else dtype
    X = G.to(work)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(torch.finfo(work).tiny)
    a, b, c = coefficients
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.reshape(shape)
    return (X.mT if tall else X).to(G.dtype)


def polar(G: Tensor) -> Tensor:
    """Return U Vᵀ from the singular value decomposition, (..., m, n); directions of singular value 0 (to rounding) are left out."""
    u, s, vt = torch.linalg.svd(G, full_matrices=False)
    kept = (s > s[..., :1] * max(G.shape[-2:]) * torch.finfo(G.dtype).eps).to(G.dtype)
    found: Tensor = (u * kept[..., None, :]) @ vt
    return found


def _by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, x in enumerate(tensors):
        groups.setdefault((*x.shape, x.dtype, x.device), []).append(k)
    return list(groups.values())


def _factor(shape: torch.Size, scaling: Scaling) -> float:
    out, into = shape[-2:]
    return {
        "bare": 1.0,
        "keller": math.sqrt(max(1.0, out / into)),
        "kimi": 0.2 * math.sqrt(max(out, into)),
    }[scaling]


def pieces(p: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Return views of a (fused) weight, each (..., n_out, n_in), leading axes to be joined with n_out."""
    split, W = group.get("split", 1), p.mT if group.get("transposed") else p
    heads, parts = split if isinstance(split, (tuple, list)) else (1, split)
    if heads < 1 or parts < 1 or W.shape[0] % (heads * parts):
        raise ValueError(
            f"split = {split} does not divide the {W.shape[0]} outputs of a matrix of shape {tuple(p.shape)}"
        )
    if parts == 1:
        return [W]
    return list(W.view(heads, parts, -1, W.shape[1]).unbind(1))


class _Matrix(torch.optim.Optimizer):
    """What the matrix optimizers share: checks, momentum, splitting of fused weights, decay, and work in batches of one shape."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if not (defaults["lr"] >= 0 and math.isfinite(defaults["lr"])):
            raise ValueError(f"lr must be finite and not negative, got {defaults['lr']}")
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"{type(self).__name__} takes matrices; a parameter has shape {tuple(p.shape)}. Give it to another optimizer"
                    )
                pieces(p, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            if not used:
                continue
            entering, home = [], []
            for p in used:
                parts = pieces(self._momentum(p, group), group)
                entering += [part.reshape(-1, part.shape[-1]) for part in parts]
                home += [(p, k) for k in range(len(parts))]
            fades = 1 - group["lr"] * group["weight_decay"]
            for chosen in _by_shape(entering):
                stacked = torch.stack([entering[k] for k in chosen])
                update = self._update(stacked, [home[k] for k in chosen], group)
                for k, u in zip(chosen, update.unbind(0), strict=True):
                    p, part = home[k]
                    piece = pieces(p, group)[part]
                    piece.mul_(fades).sub_(u.view(piece.shape), alpha=group["lr"])
            self._after(used, group)
        return loss

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        beta = group["momentum"]
        if beta == 0:
            return p.grad
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        mean: Tensor = state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(mean, beta) if group.get("nesterov", False) else mean.clone()

    def _update(self, G: Tensor, home: list[tuple[Tensor, int]], group: dict[str, Any]) -> Tensor:
        """Return the direction of a batch of matrices, (b, n_out, n_in): the gradient itself, unless a subclass says otherwise."""
        return G

    def _after(self, used: list[Tensor], group: dict[str, Any]) -> None:
        return None


class Muon(_Matrix):
    """ΔW = −η (s U Vᵀ + λ W) with U Vᵀ of the momentum, by batched Newton–Schulz.

    Parameters
    ----------
    params : matrices (n_out, n_in), or groups of them. A group may set ``split`` = k for k matrices fused along the outputs
        (GPT-2's QKV), or (h, k) when the k alternate in h blocks (GPT-NeoX's, by head), and ``transposed`` = True for weights
        stored (n_in, n_out).
    lr : float, η.
    scaling : "bare": s = 1, equation (21) of 2603.00541; "keller": √max(1, n_out/n_in), torch's default; "kimi": 0.2 √max(n_out, n_in),
        torch's "match_rms_adamw".
    momentum, nesterov, steps, weight_decay : as `torch.optim.Muon`.
    exact : bool, use the singular value decomposition in place of Newton–Schulz.
    dtype : of the iteration, as in `newton_schulz`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        scaling: Scaling = "bare",
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        weight_decay: float = 0.0,
        exact: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if scaling not in ("bare", "keller", "kimi"):
            raise ValueError(f'scaling must be "bare", "keller" or "kimi", got {scaling!r}')
        defaults = {
            "lr": lr,
            "scaling": scaling,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "weight_decay": weight_decay,
            "exact": exact,
            "dtype": dtype,
        }
        super().__init__(params, defaults)

    def _update(self, G: Tensor, home: list[tuple[Tensor, int]], group: dict[str, Any]) -> Tensor:
        direction = (
            polar(G)
            if group["exact"]
            else newton_schulz(G, steps=group["steps"], dtype=group["dtype"])
        )
        return direction * _factor(G.shape, group["scaling"])


class Shampoo(_Matrix):
    """ΔW = −η ((Λ + εI)^{-1/4} G (Ρ + εI)^{-1/4} + λ W) with exponential averages Λ of G Gᵀ and Ρ of GᵀG (bias-corrected).

    The first step is U Vᵀ for ε → 0. ε stands inside the root, where it is compared with squares of singular values. Source: 2603.00541,
    equations (32)–(33).

    Parameters
    ----------
    params, lr, weight_decay, momentum : as `Muon`.
    beta : float, of the averages; 0 keeps the last gradient alone.
    eps : float, ε.
    every : int, steps between two eigendecompositions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        beta: float = 0.95,
        momentum: float = 0.0,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        every: int = 1,
    ) -> None:
        if not 0 <= beta < 1 or not eps >= 0 or every < 1:
            raise ValueError(
                f"need 0 ≤ beta < 1, eps ≥ 0 and every ≥ 1; got {beta}, {eps}, {every}"
            )
        defaults = {
            "lr": lr,
            "beta": beta,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "every": every,
        }
        super().__init__(params, defaults)

    def _update(self, G: Tensor, home: list[tuple[Tensor, int]], group: dict[str, Any]) -> Tensor:
        sides: list[Tensor] = []
        for name, statistic in (("rows", G @ G.mT), ("columns", G.mT @ G)):
            for (p, part), now in zip(home, statistic.unbind(0), strict=True):
                state = self.state[p].setdefault(
                    f"{name}.{part}", {"mean": torch.zeros_like(now), "count": 0}
                )
                state["mean"].lerp_(now, 1 - group["beta"])
                state["count"] += 1
            states = [self.state[p][f"{name}.{part}"] for p, part in home]
            if (states[0]["count"] - 1) % group["every"] == 0:
                means = torch.stack([s["mean"] / (1 - group["beta"] ** s["count"]) for s in states])
                for s, root in zip(
                    states, _inverse_fourth_root(means, group["eps"]).unbind(0), strict=True
                ):
                    s["root"] = root
            sides.append(torch.stack([s["root"] for s in states]))
        preconditioned: Tensor = sides[0] @ G @ sides[1]
        return preconditioned


def _inverse_fourth_root(S: Tensor, eps: float) -> Tensor:
    """Return (S + εI)^{-1/4}; eigenvalues at rounding count as absent when ε is smaller."""
    values, vectors = torch.linalg.eigh(S)
    floor = values[..., -1:] * S.shape[-1] * torch.finfo(S.dtype).eps
    power = (values.clamp_min(0) + eps).clamp_min(torch.finfo(S.dtype).tiny) ** -0.25
    power = torch.where((values > floor) | (eps > floor), power, torch.zeros_like(power))
    root: Tensor = (vectors * power[..., None, :]) @ vectors.mT
    return root


class SSO(_Matrix):
    """Steepest descent on the spectral sphere ‖W‖₂ = R, R = c √(n_out/n_in): tangent step −η R Φ, then back to the sphere.

    Φ = msign(G + μ u₁v₁ᵀ) with u₁, v₁ the leading singular vectors of W and μ such that ⟨u₁v₁ᵀ, Φ⟩ = 0, by bisection. Source: 2603.00541,
    C.7, after arXiv:2601.08393. Weight decay acts before the retraction, which undoes its scaling part.

    Parameters
    ----------
    params, lr, momentum, weight_decay, steps, exact : as `Muon`.
    radius : float, c.
    bisections : int, for μ; 0 leaves the constraint out (μ = 0).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        radius: float = 1.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 5,
        bisections: int = 20,
        exact: bool = False,
    ) -> None:
        if not radius > 0 or bisections < 0:
            raise ValueError(f"need radius > 0 and bisections ≥ 0, got {radius} and {bisections}")
        defaults = {
            "lr": lr,
            "radius": radius,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "steps": steps,
            "bisections": bisections,
            "exact": exact,
        }
        super().__init__(params, defaults)

    def _update(self, G: Tensor, home: list[tuple[Tensor, int]], group: dict[str, Any]) -> Tensor:
        weights = torch.stack([_flat(pieces(p, group)[part]) for p, part in home])
        u, v = _leading(weights)
        theta = u[..., :, None] * v[..., None, :]
        G = G / torch.linalg.matrix_norm(G, keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)

        def direction(mu: Tensor) -> Tensor:
            A = G + mu[:, None, None] * theta
            return polar(A) if group["exact"] else newton_schulz(A, steps=group["steps"])

        low, high = (
            G.new_full((len(G),), -2.0),
            G.new_full((len(G),), 2.0),
        )  # ‖G‖ = 1: beyond, θ decides the sign
        mu = G.new_zeros(len(G))
        for _ in range(group["bisections"]):
            slope = (theta * direction(mu)).sum((-2, -1))  # grows with μ
            low, high = torch.where(slope < 0, mu, low), torch.where(slope < 0, high, mu)
            mu = (low + high) / 2
        radius: float = group["radius"] * math.sqrt(G.shape[-2] / G.shape[-1])
        return direction(mu) * radius

    def _after(self, used: list[Tensor], group: dict[str, Any]) -> None:
        self.retract(used, group)

    @torch.no_grad()
    def retract(
        self, used: Sequence[Tensor] | None = None, group: dict[str, Any] | None = None
    ) -> None:
        """Put every matrix on its sphere; call it once before training when the weights are not on it."""
        if group is None:
            for each in self.param_groups:
                self.retract(each["params"], each)
            return
        for p in used or ():
            for piece in pieces(p, group):
                W = _flat(piece)
                R = group["radius"] * math.sqrt(W.shape[0] / W.shape[1])
                piece.mul_(R / torch.linalg.matrix_norm(W, ord=2))


def _flat(piece: Tensor) -> Tensor:
    return piece.reshape(-1, piece.shape[-1])


def _leading(W: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(W, full_matrices=False)
    return u[..., :, 0], vt[..., 0, :]


class Combined(torch.optim.Optimizer):
    """Several optimizers as one: one `step`, one state, and one list of groups, so that any scheduler drives all of them."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise ValueError("no optimizer to combine")
        self.optimizers = list(optimizers)
        super().__init__([g for o in self.optimizers for g in o.param_groups], {})
        # the very groups of the parts, not copies: what a scheduler writes must reach them
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict.get("optimizers", ())) != len(self.optimizers):
            raise ValueError(
                f"the state holds {len(state_dict.get('optimizers', ()))} optimizers, here are {len(self.optimizers)}"
            )
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]


def backward(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Run `loss.backward()`, and keep the gradients' own graph where a part of the optimizer estimates curvature from it (Sophia)."""
    parts = optimizer.optimizers if isinstance(optimizer, Combined) else [optimizer]
    curved = any(type(part).__name__ == "SophiaH" for part in parts)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Using backward\\(\\) with create_graph=True"
        )  # zero_grad() breaks that cycle
        loss.backward(create_graph=curved)  # type: ignore[no-untyped-call]


_KEPT = {
    "lion": "Lion",
    "soap": "SOAP",
    "soap_sqrt": "SOAP",
    "sophia": "SophiaH",
    "sophia_rho": "SophiaH",
}
RHO = 1e-2  # SophiaH's own default


def assemble(
    groups: dict[str, list[dict[str, Any]]],
    lr: float,
    options: dict[str, dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """Return one optimizer from the groups of `Plan.param_groups`; several are put into a `Combined`."""
    options = {name: dict(more) for name, more in (options or {}).items()}
    unknown = set(options) - set(groups)
    if unknown:
        raise ValueError(f"options name {sorted(unknown)[0]!r}; this plan uses {', '.join(groups)}")
    built = [
        _build(name, [dict(g) for g in chosen], lr, options.get(name, {}))
        for name, chosen in groups.items()
    ]
    return built[0] if len(built) == 1 else Combined(built)


def _build(
    name: str, groups: list[dict[str, Any]], lr: float, more: dict[str, Any]
) -> torch.optim.Optimizer:
    if name == "sgd":
        groups = [{k: v for k, v in g.items() if k != "eps"} for g in groups]
        return torch.optim.SGD(groups, lr=lr, **more)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **more)
    if name.startswith("muon"):
        return Muon(
            groups,
            lr=lr,
            **{"scaling": {"muon": "bare"}.get(name, name.removeprefix("muon_")), **more},
        )
    if name == "shampoo":
        return Shampoo(groups, lr=lr, **more)
    if name == "sso":
        return SSO(groups, lr=lr, **more)
    try:
        library = importlib.import_module("pytorch_optimizer")
    except ImportError as missing:
        raise ImportError(
            f"{name} comes from the package pytorch_optimizer, which is not installed: pip install pytorch_optimizer"
        ) from missing
    if name.startswith("sophia"):
        # SophiaH moves by η clip(m/h, ±ρ), the paper's Sophia by η clip(m/(ρh), ±1): with the η of the table, η/ρ for it
        rho = more.pop("p", RHO)
        for g in groups:
            bound = rho * g.get("mup_clip", 1.0)
            g |= {"p": bound, "lr": g["lr"] / bound, "mup_lr": g["mup_lr"] / bound}
    kept: torch.optim.Optimizer = getattr(library, _KEPT[name])(groups, lr=lr, **more)
    return kept
