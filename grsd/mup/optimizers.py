"""The matrix optimizers of the tables that no library has in this form, on batched Newton–Schulz.

`Muon` in three scalings, `NorMuon` with rows of one size, `Shampoo` with exponential averages,
`SSO` on the spectral sphere. SGD and AdamW are torch's; Lion, SOAP and Sophia come from
`pytorch_optimizer`. `grsd.mup.registry` builds what a plan asks for, and `grsd.mup.combined` makes
one optimizer of several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grsd import checks
from grsd.mup.combined import Group, evaluate
from grsd.mup.norms import scaled
from grsd.mup.sharding import put, whole

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of Jordan's iteration: singular values end between about 0.7 and 1.2."""
_MINIMAX = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
POLAR_EXPRESS = (
    *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _MINIMAX),
    (1.875, -1.25, 0.375),
)
"""Those of each step in arXiv:2505.16932: the composition of best odd quintics for singular values
in [10⁻³, 1], with its safety factor 1.01 in all steps but the last."""
Triple = tuple[float, float, float]
Part = tuple[Tensor, Tensor, int]  # a parameter, its whole weight, and which of its fused matrices


def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: Triple | Sequence[Triple] = QUINTIC,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return about U Vᵀ of every matrix in a batch, (..., m, n), by X ← aX + (b XXᵀ + c (XXᵀ)²) X.

    It has the dtype of G; the iteration runs in `dtype`, by default bfloat16 on a GPU (off by about
    0.03 in the spectral norm), float32, or G's float64, on a CPU. Singular values that are above
    10⁻³ of the norm end in [0.68, 1.13] after five steps of the default coefficients; `polar` is
    exact. `coefficients` are a, b, c of all steps, or a list of those of each (the last is used
    again), such as `POLAR_EXPRESS`. Cost: 4 m² n + 2 m³ multiply-adds a step and matrix, m ≤ n, in
    three batched products.
    """
    if G.ndim < 2:
        raise ValueError(f"orthogonalisation needs matrices, got shape {tuple(G.shape)}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"the iteration needs a floating-point dtype, got {dtype}")
    G, given = scaled(G, 2)[0], G.dtype
    if dtype is None:
        exact = torch.float64 if G.dtype == torch.float64 else torch.float32
        dtype = torch.bfloat16 if G.is_cuda else exact
    # wide matrices of Frobenius norm 1, hence of singular values at most 1, in one batch
    X = G.to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    # the iteration, on three axes
    listed: Any = [coefficients] if isinstance(coefficients[0], int | float) else coefficients
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    for k in range(steps):
        a, b, c = listed[min(k, len(listed) - 1)]
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.reshape(shape)
    return (X.mT if tall else X).to(given)


def polar(G: Tensor) -> Tensor:
    """Return U Vᵀ from the singular value decomposition, (..., m, n); 0 where these are 0."""
    u, s, vt = torch.linalg.svd(scaled(G, 2)[0], full_matrices=False)
    kept = (s > s[..., :1] * max(G.shape[-2:]) * torch.finfo(G.dtype).eps).to(G.dtype)
    return (u * kept[..., None, :]) @ vt


def pieces(p: Tensor, group: Group) -> list[Tensor]:
    """Return views (..., n_out, n_in) of a (fused) weight; leading axes are part of n_out.

    Three axes and more are a convolution's, whose inputs are flattened, or with ``batched`` those
    of several matrices, such as experts. ``split`` = k are k equal parts along the outputs, a tuple
    the sizes of parts that come again and again.
    """
    if group.get("batched"):
        return [x for one in p.unbind(0) for x in pieces(one, {**group, "batched": False})]
    split, W = group.get("split", 1), p if p.ndim == 2 else p.view(len(p), -1)
    W = W.mT if group.get("transposed") else W
    k = split if isinstance(split, int) else len(split)
    sizes = [len(W) // max(k, 1)] * k if isinstance(split, int) else list(split)
    if min(sizes, default=0) < 1 or len(W) % sum(sizes):
        raise ValueError(
            f"split = {split} does not divide the {len(W)} outputs of a matrix of shape "
            f"{tuple(p.shape)}"
        )
    if len(sizes) == 1:
        return [W]
    ends = list(itertools.accumulate(sizes))[:-1]
    return list(W.view(-1, sum(sizes), W.shape[1]).tensor_split(ends, 1))


class _Matrix(torch.optim.Optimizer):
    """What the matrix optimizers share: momentum, decay, fused weights, batches of one shape.

    A sharded matrix is gathered, and every process computes its update: all-gathers of momentum and
    weight a step.
    """

    matrices_only = True  #: for `Combined.add_param_group`

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        checks.at_least("lr", defaults["lr"], 0, "it must be finite and not negative")
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(
                        f"{type(self).__name__} takes matrices; a parameter has shape "
                        f"{tuple(p.shape)}. Give it to another optimizer"
                    )
                pieces(torch.empty(p.shape, device="meta"), group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss, weights = evaluate(closure), dict[Tensor, Tensor]()
        # the gradients of all parts of fused weights, by shape, with where they came from
        batches: dict[Any, list[tuple[Tensor, Part, Group]]] = {}
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                weights[p] = whole(p)
                for k, part in enumerate(pieces(whole(self._momentum(p, group)), group)):
                    G = _flat(part)
                    key = (*G.shape, G.dtype, G.device, self._alike(group))
                    batches.setdefault(key, []).append((G, (p, weights[p], k), group))
        # one update for each shape, written back part by part
        for batch in batches.values():
            home = [part for _, part, _ in batch]
            updates = self._update(torch.stack([G for G, _, _ in batch]), home, batch[0][2])
            for (_, (_, W, k), group), u in zip(batch, updates.unbind(0), strict=True):
                piece, rates = pieces(W, group)[k], group.get("rates")
                rate = rates[k % len(rates)] if rates else 1.0
                piece.mul_(1 - group["lr"] * group["weight_decay"])
                piece.sub_(u.view(piece.shape), alpha=rate * group["lr"])
        for group in self.param_groups:
            self._after([weights[p] for p in group["params"] if p in weights], group)
        for p, W in weights.items():
            put(p, W)
        return loss

    def _alike(self, group: Group) -> object:
        """Return what groups share whose updates are made in one batch; by default, nothing."""
        return id(group)

    def _momentum(self, p: Tensor, group: Group) -> Tensor:
        assert p.grad is not None
        beta = group["momentum"]
        if beta == 0:
            return p.grad
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        mean: Tensor = state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(mean, beta) if group.get("nesterov", False) else mean.clone()

    def _update(self, G: Tensor, home: list[Part], group: Group) -> Tensor:
        """Return the direction of a batch of matrices, (b, n_out, n_in)."""
        return G

    def _after(self, weights: Iterable[Tensor], group: Group) -> None:
        """Do to the whole weights what follows the step."""


class _Orthogonal(_Matrix):
    """What Muon and SSO share: U Vᵀ of a batch, by Newton–Schulz or exact."""

    def __init__(
        self,
        params: Iterable[Any],
        own: Group,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 5,
        exact: bool = False,
        dtype: torch.dtype | None = None,
        coefficients: Triple | Sequence[Triple] = QUINTIC,
    ) -> None:
        own |= {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        own |= {"steps": steps, "exact": exact, "dtype": dtype, "coefficients": coefficients}
        super().__init__(params, own)

    def _direction(self, G: Tensor, group: Group) -> Tensor:
        if group["exact"]:
            return polar(G)
        how = {name: group[name] for name in ("steps", "dtype", "coefficients")}
        return newton_schulz(G, **how)


class Muon(_Orthogonal):
    """ΔW = −η (s U Vᵀ + λ W) with U Vᵀ of the momentum, by batched Newton–Schulz.

    Parameters
    ----------
    params : matrices (n_out, n_in), convolutions (n_out, n_in, …), or groups of them. A group may
        set ``split`` = k for k matrices fused along the outputs (GPT-2's QKV), or sizes that come
        again and again (GPT-NeoX's, by head), ``transposed`` = True for weights stored (n_in,
        n_out), ``batched`` = True for several matrices on the first axis (experts), and ``rates``,
        factors on the rate of fused parts.
    scaling : "bare": s = 1, equation (21) of 2603.00541; "keller": √max(1, n_out/n_in), torch's
        default; "kimi": 0.2 √max(n_out, n_in), torch's "match_rms_adamw".
    lr, and `shared` : momentum, nesterov, weight_decay as `torch.optim.Muon`; steps, dtype and
        coefficients as `newton_schulz`; exact=True takes the singular value decomposition in its
        place.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        scaling: Literal["bare", "keller", "kimi"] = "bare",
        **shared: Any,
    ) -> None:
        checks.one_of("scaling", scaling, ("bare", "keller", "kimi"))
        super().__init__(params, {"lr": lr, "scaling": scaling}, **shared)

    def _alike(self, group: Group) -> object:
        names = ("steps", "exact", "dtype", "coefficients", "scaling", "beta2")
        return repr([group.get(name) for name in names])

    def _update(self, G: Tensor, home: list[Part], group: Group) -> Tensor:
        out, into = G.shape[-2:]
        squares = {"bare": 1.0, "keller": max(1.0, out / into), "kimi": 0.04 * max(out, into)}
        return self._direction(G, group) * math.sqrt(squares[group["scaling"]])


class NorMuon(Muon):
    """Muon with rows of one size: ΔW = −η (s D^{-1/2} U Vᵀ c + λ W), D averages of rows' squares.

    D holds the exponential average (`beta2`, from 0) of the mean square of each row of U Vᵀ, the
    outputs of one neuron, and c keeps the Frobenius norm of U Vᵀ. The rest is as in `Muon`; with
    scaling "kimi" it is the paper's algorithm, with "keller" that of its code. Source:
    arXiv:2510.05491, algorithm 1.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, *, beta2: float = 0.95, **more: Any
    ) -> None:
        super().__init__(params, lr, **more)
        self.defaults["beta2"] = checks.between("beta2", beta2, 0, 1, "[)")
        for group in self.param_groups:
            group.setdefault("beta2", beta2)

    def _update(self, G: Tensor, home: list[Part], group: Group) -> Tensor:
        update, means = super()._update(G, home, group), []
        squares = update.square().mean(-1, keepdim=True)
        for (p, _, k), now in zip(home, squares.unbind(0), strict=True):
            mean = self.state[p].setdefault(f"rows.{k}", torch.zeros_like(now))
            means.append(mean.lerp_(now, 1 - group["beta2"]))
        # a row without an update has none, whatever its average
        apart, tiny = torch.stack(means).sqrt(), torch.finfo(update.dtype).tiny
        even = torch.where(squares > 0, update / apart.clamp_min(tiny), torch.zeros_like(update))
        size, new = (torch.linalg.matrix_norm(x, keepdim=True) for x in (update, even))
        return even * (size / new.clamp_min(tiny))


class Shampoo(_Matrix):
    """ΔW = −η ((Λ + εI)^{-1/4} G (Ρ + εI)^{-1/4} + λ W), Λ and Ρ averages of G Gᵀ and GᵀG.

    The averages are exponential (`beta`; 0 keeps the last gradient) and bias-corrected; roots are
    taken `every` so many steps. The first step is U Vᵀ for ε → 0, which stands inside the root,
    beside squares of singular values. The rest is as in `Muon`. Source: 2603.00541, (32)–(33).
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
        checks.between("beta", beta, 0, 1, "[)")
        checks.at_least("eps", eps, 0)
        checks.whole("every", every, 1)
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, own | {"beta": beta, "eps": eps, "every": every})

    def _update(self, G: Tensor, home: list[Part], group: Group) -> Tensor:
        sides: list[Tensor] = []
        for name, statistic in (("rows", G @ G.mT), ("columns", G.mT @ G)):
            # the averages of every matrix of the batch live with its parameter
            states = []
            for (p, _, part), now in zip(home, statistic.unbind(0), strict=True):
                fresh = {"mean": torch.zeros_like(now), "count": 0}
                states.append(self.state[p].setdefault(f"{name}.{part}", fresh))
                states[-1]["mean"].lerp_(now, 1 - group["beta"])
                states[-1]["count"] += 1
            # their roots are made anew every so many steps
            if (states[0]["count"] - 1) % group["every"] == 0:
                means = torch.stack([s["mean"] / (1 - group["beta"] ** s["count"]) for s in states])
                roots = _inverse_fourth_root(means, group["eps"]).unbind(0)
                for state, root in zip(states, roots, strict=True):
                    state["root"] = root
            sides.append(torch.stack([s["root"] for s in states]))
        return sides[0] @ G @ sides[1]


def _inverse_fourth_root(S: Tensor, eps: float) -> Tensor:
    """Return (S + εI)^{-1/4}; eigenvalues at rounding count as absent when ε is smaller."""
    if not bool(torch.isfinite(S).all()):
        raise ValueError(f"squares of gradients are not finite in {S.dtype}: clip or scale them")
    values, vectors = torch.linalg.eigh(S)
    floor = values[..., -1:] * S.shape[-1] * torch.finfo(S.dtype).eps
    power = (values.clamp_min(0) + eps).clamp_min(torch.finfo(S.dtype).tiny) ** -0.25
    power = torch.where((values > floor) | (eps > floor), power, torch.zeros_like(power))
    return (vectors * power[..., None, :]) @ vectors.mT


class SSO(_Orthogonal):
    """Steepest descent on the spectral sphere ‖W‖₂ = R = c √(n_out/n_in): −η R Φ, then back to it.

    Φ = msign(G + μ u₁v₁ᵀ) with u₁, v₁ the leading singular vectors of W and μ such that ⟨u₁v₁ᵀ, Φ⟩
    = 0, by `bisections` (0: μ = 0). `radius` is c; the rest is as in `Muon`. Weight decay acts
    before the retraction, which undoes its scaling part. Source: 2603.00541, C.7, after
    arXiv:2601.08393.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        radius: float = 1.0,
        bisections: int = 20,
        **shared: Any,
    ) -> None:
        checks.positive("radius", radius)
        checks.whole("bisections", bisections)
        super().__init__(params, {"lr": lr, "radius": radius, "bisections": bisections}, **shared)

    def _update(self, G: Tensor, home: list[Part], group: Group) -> Tensor:
        # θ = u₁v₁ᵀ of the weights, which the step must not move along
        u, _, vt = torch.linalg.svd(
            torch.stack([_flat(pieces(W, group)[k]) for _, W, k in home]), full_matrices=False
        )
        theta = u[..., :, :1] * vt[..., :1, :]
        # bisection for μ; with ‖G‖ = 1 the sign beyond ±2 is that of θ
        G = scaled(G, 2)[0]
        G = G / torch.linalg.matrix_norm(G, keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
        mu = G.new_zeros(len(G))
        low, high = mu - 2, mu + 2
        for _ in range(group["bisections"]):
            slope = (theta * self._direction(G + mu[:, None, None] * theta, group)).sum((-2, -1))
            low, high = torch.where(slope < 0, mu, low), torch.where(slope < 0, high, mu)
            mu = (low + high) / 2
        return self._direction(G + mu[:, None, None] * theta, group) * _radius(G, group)

    def _after(self, weights: Iterable[Tensor], group: Group) -> None:
        for weight in weights:
            for piece in pieces(weight, group):
                W = _flat(piece)
                piece.mul_(_radius(W, group) / torch.linalg.matrix_norm(W, ord=2))

    @torch.no_grad()
    def retract(self) -> None:
        """Put every matrix on its sphere; call it once before training if the weights are not."""
        for group in self.param_groups:
            weights = {p: whole(p) for p in group["params"]}
            self._after(weights.values(), group)
            for p, W in weights.items():
                put(p, W)


def _radius(W: Tensor, group: Group) -> float:
    """Return R of SSO's sphere."""
    return float(group["radius"]) * math.sqrt(W.shape[-2] / W.shape[-1])


def _flat(piece: Tensor) -> Tensor:
    return piece.reshape(-1, piece.shape[-1])
