"""How multipliers, initial variances, learning rates, weight decay and ε scale with width and
depth, for each optimizer.

`RULES` is the table, as data. `derive` makes the same table from the spectral condition and the
size of the optimizer's update, so that neither is believed on the other's word. With r_n = n/n_base
and r_L = L/L_base, a hyperparameter is its base value times `Scale.at(r_n, r_L)`. Source:
2603.00541, condition 3.1, B.1–B.3, tables 1–6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

from grsd.mup.registry import INITIAL, OPTIMIZERS, Optimizer, Rule, row
from grsd.mup.scales import HALF, MATRICES, ONE, ROLES, Role, Scale, larger, scale

__all__ = [
    "MATRICES",
    "OPTIMIZERS",
    "ROLES",
    "RULES",
    "SIZES",
    "Optimizer",
    "Role",
    "Rule",
    "Scale",
    "derive",
    "gradient_norm",
    "rule",
    "scale",
    "shaped",
    "update_norm",
    "weight_norm",
]


class _Rules(Mapping[tuple[str, int], dict[Role, Rule]]):
    """The tables of all rows, read when asked for: a row that is added later is there too."""

    def __getitem__(self, key: tuple[str, int]) -> dict[Role, Rule]:
        return OPTIMIZERS[key[0]].rules[key[1]]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, k) for name in OPTIMIZERS for k in (1, 2))

    def __len__(self) -> int:
        return 2 * len(OPTIMIZERS)


RULES = _Rules()
"""(optimizer, k) → role → rule; k = 2 for residual blocks of two or more layers (tables 1–6), k = 1
for one (condition B.1)."""


def rule(optimizer: str, role: str, k: int = 2) -> Rule:
    """Return the rule of one role, for k layers in a residual block."""
    table = row(optimizer).rules
    if role not in ROLES:
        raise ValueError(f"no role {role!r}; there are {', '.join(ROLES)}")
    if k < 1:
        raise ValueError(f"a residual block has at least one layer, got k = {k}")
    if role not in table[min(k, 2)]:
        raise ValueError(
            f"{optimizer} takes matrices only: give the {role} parameters to a vector optimizer, "
            "e.g. other='adamw'"
        )
    return table[min(k, 2)][role]


def shaped(optimizer: str, known: Rule, out: Fraction, into: Fraction) -> Rule:
    """Return the rule of a hidden matrix whose n_out and n_in grow like powers of r_n.

    Entries start with variance 1/n_in, and the update keeps its ‖ΔW‖_R; for 1 and 1 this is the
    known rule. Key heads of a fixed number have (0, 1), a rounded feed-forward width almost 1.
    """
    own = (Scale(out), Scale(into))
    change = update_norm(optimizer, "hidden") / update_norm(optimizer, "hidden", sizes=own)
    # η A and λ A stay what they are, and so does the decay η λ
    return replace(
        known,
        variance=Scale(-into, known.variance.L),
        lr=known.lr * change,
        weight_decay=known.weight_decay / change,
    )


# --- The same table again, from the condition -----------------------------------------------------

SIZES: dict[str, tuple[Scale, Scale]] = {
    "input": (scale(1), ONE),
    "hidden": (scale(1), scale(1)),
    "output": (ONE, scale(1)),
    "input_bias": (scale(1), ONE),
    "hidden_bias": (scale(1), ONE),
    "output_bias": (ONE, ONE),
}
"""How (n_out, n_in) of a role grow; a bias is a vector of n_out."""


def _rms(role: str, spectral: Scale, sizes: tuple[Scale, Scale] | None = None) -> Scale:
    """Return ‖·‖_R from ‖·‖₂: times √(n_in/n_out) for a matrix, over √n_out for a vector."""
    out, into = sizes or SIZES[role]
    return spectral * (into / out) ** HALF if role in MATRICES else spectral / out**HALF


def weight_norm(role: str, variance: Scale) -> Scale:
    """Return how ‖W‖_R of independent entries of a variance scales; σ itself for a bias."""
    if role not in MATRICES:
        return variance**HALF
    return _rms(role, variance**HALF * larger(*SIZES[role]) ** HALF)


def gradient_norm(role: str, k: int) -> Scale:
    """Return how ‖∇W‖₂ (Frobenius and spectral norm alike: one sample, rank one) scales when ∂ℓ/∂f
    and features are Θ(1).

    h has norm √n; what comes back to the residual stream is α_out W_outᵀ ∂ℓ/∂f, of norm n^-1 · √n;
    a block adds its α.
    """
    alpha = INITIAL["hidden"][0 if k >= 2 else 1]
    features, back = scale("1/2"), scale(-1) * scale("1/2")
    return {
        "input": back,  # g xᵀ, with x of fixed size
        "hidden": alpha * back * features,  # α (W⁽²⁾ᵀ g) hᵀ and α g (W⁽¹⁾h)ᵀ alike: ‖W‖₂ = Θ(1)
        "output": scale(-1) * features,  # α_out ∂ℓ/∂f hᵀ
        "input_bias": back,
        "hidden_bias": alpha * back,
        "output_bias": ONE,
    }[role]


def update_norm(
    optimizer: str, role: str, k: int = 2, *, sizes: tuple[Scale, Scale] | None = None
) -> Scale:
    """Return how ‖A‖_R of the first update ΔW = −η A scales, at η = 1 (2603.00541, (11)–(35)).

    `sizes`, of (n_out, n_in), take the place of those of the role.
    """
    known, (out, into) = row(optimizer), sizes or SIZES[role]
    if known.kind == "gradient":
        return _rms(role, gradient_norm(role, k), sizes)
    if known.kind == "sign":  # entries ±1: norm √(n_in n_out)
        return _rms(role, (out * into) ** HALF, sizes)
    if role not in MATRICES:
        raise ValueError(f"{optimizer} takes matrices only, got the role {role!r}")
    return _rms(role, known.factor(out, into), sizes)


def derive(optimizer: str, k: int = 2) -> dict[Role, Rule]:
    """Return the rules of one optimizer from the spectral condition: what `RULES` must agree with.

    Input and output: α ‖W‖_R = α ‖ΔW‖_R = Θ(1) (C1.1, C2.1). A block of k ≥ 2 layers: α ∏ ‖W‖_R =
    Θ(1/L) with every subset of the factors replaced by its update (C1.2, C2.2, C2.3, B.2), so
    ‖ΔW‖_R = ‖W‖_R = Θ(1) and α = 1/L. One layer: α ‖W‖_R = Θ(1/√L), the largest that B.1 allows,
    and α ‖ΔW‖_R = Θ(1/L). Biases: ‖b‖_R = Θ(1), and updates like those of the block (B.3). Decay: λ
    ‖W‖_R = ‖A‖_R (Δ2). ε: the size of what it is added to. ρ: what keeps m/(ρh) fixed, when the
    curvature h is of the size of a squared gradient.
    """
    known = row(optimizer)
    clips = known.rules[2]["hidden"].clip is not None  # its bound ρ scales
    derived: dict[Role, Rule] = {}
    for role in known.takes:
        inside = role in ("hidden", "hidden_bias")
        # σ² for which ‖W‖_R = Θ(1); for the output ‖W‖_R = Θ(n), which its α takes back
        variance = scale(-1) if role == "hidden" else ONE
        norm = weight_norm(role, variance)
        # α: what the block, or the layer, may do to features at the start
        start = ONE if not inside else scale(0, -1) if k >= 2 else scale(0, "-1/2")
        multiplier = start if inside else start / norm
        # η: ‖ΔW‖_R = η ‖A‖_R must be this change; λ: the decay is as large as A
        change = (scale(0, -1) if inside else ONE) / multiplier
        size = update_norm(optimizer, role, k)
        # ε and ρ: compared with the gradient's entries (mean square), its norm, or that squared
        out, into = SIZES[role]
        entry = gradient_norm(role, k) / (out * into) ** HALF
        whole = gradient_norm(role, k)
        eps = {None: None, "entry": entry, "norm": whole, "square": whole**2}[known.eps]
        clip = ONE / entry if clips else None  # m/(ρh) with h like m²
        derived[role] = Rule(multiplier, variance, change / size, size / norm, eps, clip)
    return derived
