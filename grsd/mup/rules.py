"""How multipliers, initial variances, learning rates, weight decay and ε scale with width and depth, for each optimizer.

`RULES` is the table, as data. `derive` makes the same table from the spectral condition and the size of the optimizer's update,
so that neither is believed on the other's word. With r_n = n/n_base and r_L = L/L_base, a hyperparameter is its base value
times `Scale.at(r_n, r_L)`. Source: 2603.00541, condition 3.1, B.1–B.3, tables 1–6.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

__all__ = ["OPTIMIZERS", "ROLES", "RULES", "Rule", "Scale", "derive", "rule", "update_norm"]

Role = Literal["input", "hidden", "output", "input_bias", "hidden_bias", "output_bias"]
ROLES: tuple[Role, ...] = ("input", "hidden", "output", "input_bias", "hidden_bias", "output_bias")
MATRICES: tuple[Role, ...] = ("input", "hidden", "output")


class Scale(NamedTuple):
    """r_n^n · r_L^L, with rational exponents."""

    n: Fraction = Fraction(0)
    L: Fraction = Fraction(0)

    def __mul__(self, other: object) -> Scale:
        if not isinstance(other, Scale):
            return NotImplemented
        return Scale(self.n + other.n, self.L + other.L)

    def __truediv__(self, other: object) -> Scale:
        if not isinstance(other, Scale):
            return NotImplemented
        return Scale(self.n - other.n, self.L - other.L)

    def __pow__(self, power: object) -> Scale:
        if not isinstance(power, (int, Fraction)):
            return NotImplemented
        return Scale(self.n * power, self.L * power)

    def at(self, r_n: float, r_L: float) -> float:
        """Return the factor for width ratio r_n and depth ratio r_L, both positive."""
        if not (r_n > 0 and r_L > 0 and math.isfinite(r_n) and math.isfinite(r_L)):
            raise ValueError(
                f"width and depth ratios must be positive and finite, got r_n = {r_n}, r_L = {r_L}"
            )
        return math.pow(r_n, self.n) * math.pow(r_L, self.L)

    def __str__(self) -> str:
        powers = tuple(zip(("r_n", "r_L"), self, strict=True))
        above, below = (
            [_power(x, sign * p) for x, p in powers if sign * p > 0] for sign in (1, -1)
        )
        if not below:
            return " ".join(above) or "1"
        return f"{' '.join(above) or '1'}/{below[0] if len(below) == 1 else '(' + ' '.join(below) + ')'}"


def _power(symbol: str, power: Fraction) -> str:
    return {1: symbol, 2: f"{symbol}²", Fraction(1, 2): f"√{symbol}"}.get(
        power, f"{symbol}^{power}"
    )


def scale(n: int | str = 0, L: int | str = 0) -> Scale:
    """Return r_n^n r_L^L from whole numbers or fractions written as strings."""
    return Scale(Fraction(n), Fraction(L))


ONE = scale()


@dataclass(frozen=True)
class Rule:
    """What one role needs under one optimizer; every field is the factor on the base value.

    Attributes
    ----------
    multiplier : α, on the output of the layer (for a hidden layer: of its residual block, once for the block).
    variance : σ², of the initial weights.
    lr : η.
    weight_decay : λ in ΔW = −η (A + λ W): the decay grows with what the update does.
    eps : ε of the optimizer, or None when it has none that matters.
    clip : ρ of Sophia, which multiplies the curvature before it divides, or None.
    """

    multiplier: Scale
    variance: Scale
    lr: Scale
    weight_decay: Scale
    eps: Scale | None = None
    clip: Scale | None = None


@dataclass(frozen=True)
class Optimizer:
    """What `derive` knows about an optimizer: the size of its first update.

    Attributes
    ----------
    kind : "gradient", "sign" or "orthogonal": A is ∇, an entrywise sign, or U Vᵀ with all singular values 1.
    factor : multiplies U Vᵀ: None for 1, "kimi" for 0.2 √max(n_in, n_out), "keller" for √max(1, n_out/n_in), "radius" for √(n_out/n_in).
    eps : what ε is compared with: "entry" (a typical entry of ∇), "square" (the square of ∇'s largest singular value), or None.
    matrices_only : it cannot take vectors; biases then go to another optimizer.
    clip : the ratio of momentum to curvature is kept in proportion to a bound ρ that scales.
    caution : what a plan with it should say.
    """

    kind: Literal["gradient", "sign", "orthogonal"]
    factor: Literal["kimi", "keller", "radius"] | None = None
    eps: Literal["entry", "square"] | None = None
    matrices_only: bool = False
    clip: bool = False
    caution: str = ""


SOAP_CAUTION = (
    "soap: the paper's rule (η of hidden matrices not scaled) holds for the first step. Once the averaged statistics have full rank, "
    "updates grow like √r_n beside it; 'soap_sqrt' scales η for that."
)

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer("gradient"),
    "adamw": Optimizer("sign", eps="entry"),
    "lion": Optimizer("sign"),
    "sophia": Optimizer("sign"),
    "sophia_rho": Optimizer("sign", clip=True),
    "muon": Optimizer("orthogonal", matrices_only=True),
    "muon_keller": Optimizer("orthogonal", "keller", matrices_only=True),
    "muon_kimi": Optimizer("orthogonal", "kimi", matrices_only=True),
    "shampoo": Optimizer("orthogonal", eps="square", matrices_only=True),
    "soap": Optimizer("orthogonal", matrices_only=True, caution=SOAP_CAUTION),
    "soap_sqrt": Optimizer("orthogonal", "kimi", matrices_only=True),
    "sso": Optimizer("orthogonal", "radius", matrices_only=True),
}
"""Nine optimizers, some in variants: Muon with bare U Vᵀ (the paper's), Jordan's factor (torch's default) and Kimi's ("match_rms_adamw");
SOAP at its first step and, as `soap_sqrt`, with statistics of full rank, where a rotated matrix of ±1 has the spectral norm of Kimi's
factor, about √max(n_in, n_out); Sophia with a fixed ρ, where it drifts to a sign, and, as `sophia_rho`, with ρ in proportion to r_n r_L."""


# α, σ² of the roles do not depend on the optimizer. "nL^-2" is r_n r_L^-2; "-" says that there is none.
_INIT = {
    # role          α, k ≥ 2   α, k = 1   σ²
    "input": ("1", "1", "1"),
    "hidden": ("L^-1", "L^-1/2", "n^-1"),
    "output": ("n^-1", "n^-1", "1"),
    "input_bias": ("1", "1", "1"),
    "hidden_bias": ("L^-1", "L^-1/2", "1"),
    "output_bias": ("1", "1", "1"),  # not in the paper: a number of fixed size, added after α
}
_UPDATES = """
optimizer    k  of  input   hidden        output  input_bias  hidden_bias  output_bias
sgd          2  η   n       L             n       n           nL           1
sgd          2  λ   n^-1    L^-1          n^-1    n^-1        n^-1L^-1     1
sgd          1  η   n       1             n       n           n            1
sgd          1  λ   n^-1    L^-1/2        n^-1    n^-1        n^-1L^-1/2   1
adamw        2  η   1       n^-1          1       1           1            1
adamw        2  λ   1       n             1       1           1            1
adamw        2  ε   n^-1    n^-1L^-1      n^-1    n^-1        n^-1L^-1     1
adamw        1  η   1       n^-1L^-1/2    1       1           L^-1/2       1
adamw        1  λ   1       n             1       1           1            1
adamw        1  ε   n^-1    n^-1L^-1/2    n^-1    n^-1        n^-1L^-1/2   1
lion         2  η   1       n^-1          1       1           1            1
lion         2  λ   1       n             1       1           1            1
lion         1  η   1       n^-1L^-1/2    1       1           L^-1/2       1
lion         1  λ   1       n             1       1           1            1
sophia       2  η   1       n^-1          1       1           1            1
sophia       2  λ   1       n             1       1           1            1
sophia       1  η   1       n^-1L^-1/2    1       1           L^-1/2       1
sophia       1  λ   1       n             1       1           1            1
sophia_rho   2  η   1       n^-1          1       1           1            1
sophia_rho   2  λ   1       n             1       1           1            1
sophia_rho   2  ρ   n       nL            n       n           nL           1
sophia_rho   1  η   1       n^-1L^-1/2    1       1           L^-1/2       1
sophia_rho   1  λ   1       n             1       1           1            1
sophia_rho   1  ρ   n       nL^1/2        n       n           nL^1/2       1
muon         2  η   n^1/2   1             n^1/2   -           -            -
muon         2  λ   n^-1/2  1             n^-1/2  -           -            -
muon         1  η   n^1/2   L^-1/2        n^1/2   -           -            -
muon         1  λ   n^-1/2  1             n^-1/2  -           -            -
muon_keller  2  η   1       1             n^1/2   -           -            -
muon_keller  2  λ   1       1             n^-1/2  -           -            -
muon_keller  1  η   1       L^-1/2        n^1/2   -           -            -
muon_keller  1  λ   1       1             n^-1/2  -           -            -
muon_kimi    2  η   1       n^-1/2        1       -           -            -
muon_kimi    2  λ   1       n^1/2         1       -           -            -
muon_kimi    1  η   1       n^-1/2L^-1/2  1       -           -            -
muon_kimi    1  λ   1       n^1/2         1       -           -            -
shampoo      2  η   n^1/2   1             n^1/2   -           -            -
shampoo      2  λ   n^-1/2  1             n^-1/2  -           -            -
shampoo      2  ε   n^-1    L^-2          n^-1    -           -            -
shampoo      1  η   n^1/2   L^-1/2        n^1/2   -           -            -
shampoo      1  λ   n^-1/2  1             n^-1/2  -           -            -
shampoo      1  ε   n^-1    L^-1          n^-1    -           -            -
soap         2  η   n^1/2   1             n^1/2   -           -            -
soap         2  λ   n^-1/2  1             n^-1/2  -           -            -
soap         1  η   n^1/2   L^-1/2        n^1/2   -           -            -
soap         1  λ   n^-1/2  1             n^-1/2  -           -            -
soap_sqrt    2  η   1       n^-1/2        1       -           -            -
soap_sqrt    2  λ   1       n^1/2         1       -           -            -
soap_sqrt    1  η   1       n^-1/2L^-1/2  1       -           -            -
soap_sqrt    1  λ   1       n^1/2         1       -           -            -
sso          2  η   1       1             n       -           -            -
sso          2  λ   1       1             n^-1    -           -            -
sso          1  η   1       L^-1/2        n       -           -            -
sso          1  λ   1       1             n^-1    -           -            -
"""


def _parse(cell: str) -> Scale | None:
    if cell == "-":
        return None
    powers = dict(re.findall(r"([nL])(?:\^(-?\d+(?:/\d+)?))?", cell))
    return Scale(*(Fraction(powers[s] or 1) if s in powers else Fraction(0) for s in "nL"))


def _table() -> dict[tuple[str, int], dict[Role, Rule]]:
    lines = [line.split() for line in _UPDATES.strip().splitlines()[1:]]
    cells = {
        (name, int(k), of): dict(zip(ROLES, map(_parse, row), strict=True))
        for name, k, of, *row in lines
    }
    found: dict[tuple[str, int], dict[Role, Rule]] = {}
    for name in OPTIMIZERS:
        for k in (1, 2):
            found[name, k] = {}
            for role in ROLES:
                lr, decay = cells[name, k, "η"][role], cells[name, k, "λ"][role]
                if lr is None or decay is None:
                    continue
                wide, narrow, variance = (_parse(cell) for cell in _INIT[role])
                multiplier = wide if k == 2 else narrow
                assert multiplier is not None and variance is not None
                eps, clip = (cells.get((name, k, of), {}).get(role) for of in "ερ")
                found[name, k][role] = Rule(multiplier, variance, lr, decay, eps, clip)
    return found


RULES: dict[tuple[str, int], dict[Role, Rule]] = _table()
"""(optimizer, k) → role → rule; k = 2 for residual blocks of two or more layers (tables 1–6), k = 1 for one (condition B.1)."""


def rule(optimizer: str, role: str, k: int = 2) -> Rule:
    """Return the rule of one role; k is the number of layers in a residual block.

    Raises
    ------
    ValueError
        An optimizer or role that the table does not have, k < 1, or an optimizer that takes matrices only for a bias.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"no rule for the optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}"
        )
    if role not in ROLES:
        raise ValueError(f"no role {role!r}; there are {', '.join(ROLES)}")
    if k < 1:
        raise ValueError(f"a residual block has at least one layer, got k = {k}")
    table = RULES[optimizer, min(k, 2)]
    if role not in table:
        raise ValueError(
            f"{optimizer} takes matrices only: give the {role} parameters to a vector optimizer, e.g. other='adamw'"
        )
    return table[role]


# --- The same table again, from the condition ----------------------------------------------------------------------

_SIZES: dict[str, tuple[Scale, Scale]] = {  # (n_out, n_in); a bias is a vector of n_out
    "input": (scale(1), ONE),
    "hidden": (scale(1), scale(1)),
    "output": (ONE, scale(1)),
    "input_bias": (scale(1), ONE),
    "hidden_bias": (scale(1), ONE),
    "output_bias": (ONE, ONE),
}
HALF = Fraction(1, 2)


def sizes(role: str) -> tuple[Scale, Scale]:
    """Return how (n_out, n_in) of a role grow; a bias is a vector of n_out."""
    return _SIZES[role]


def _largest(a: Scale, b: Scale) -> Scale:
    """Return the larger of two scales as n grows (neither has an L here)."""
    return a if a.n >= b.n else b


def _rms(role: str, spectral: Scale) -> Scale:
    """Return ‖·‖_R from ‖·‖₂: times √(n_in/n_out) for a matrix, over √n_out for a vector."""
    out, into = _SIZES[role]
    return spectral * (into / out) ** HALF if role in MATRICES else spectral / out**HALF


def weight_norm(role: str, variance: Scale) -> Scale:
    """Return how ‖W‖_R of independent entries scales: σ (√n_in + √n_out) √(n_in/n_out), and σ for a bias."""
    out, into = _SIZES[role]
    if role not in MATRICES:
        return variance**HALF
    return _rms(role, variance**HALF * _largest(out, into) ** HALF)


def gradient_norm(role: str, k: int) -> Scale:
    """Return how ‖∇W‖₂ (Frobenius and spectral norm alike: one sample, rank one) scales when ∂ℓ/∂f and features are Θ(1).

    h has norm √n; what comes back to the residual stream is α_out W_outᵀ ∂ℓ/∂f, of norm n^-1 · √n; a block adds its α.
    """
    alpha = _parse(_INIT["hidden"][0 if k >= 2 else 1]) or ONE
    features, back = scale("1/2"), scale(-1) * scale("1/2")
    return {
        "input": back,  # g xᵀ, with x of fixed size
        "hidden": alpha
        * back
        * features,  # α (W⁽²⁾ᵀ g) hᵀ and α g (W⁽¹⁾h)ᵀ alike, since ‖W‖₂ = Θ(1)
        "output": scale(-1) * features,  # α_out ∂ℓ/∂f hᵀ
        "input_bias": back,
        "hidden_bias": alpha * back,
        "output_bias": ONE,
    }[role]


def update_norm(optimizer: str, role: str, k: int = 2) -> Scale:
    """Return how ‖A‖_R of the first update ΔW = −η A scales, at η = 1. Source: 2603.00541, equations (11)–(14), (25), (31), (35)."""
    kind, factor = OPTIMIZERS[optimizer].kind, OPTIMIZERS[optimizer].factor
    out, into = _SIZES[role]
    if kind == "gradient":
        return _rms(role, gradient_norm(role, k))
    if kind == "sign":  # entries ±1: norm √(n_in n_out)
        return _rms(role, (out * into) ** HALF)
    if role not in MATRICES:
        raise ValueError(f"{optimizer} takes matrices only, got the role {role!r}")
    scaling = {
        None: ONE,
        "kimi": _largest(out, into) ** HALF,
        "keller": _largest(ONE, out / into) ** HALF,
        "radius": (out / into) ** HALF,
    }[factor]
    return _rms(role, scaling)


def derive(optimizer: str, k: int = 2) -> dict[Role, Rule]:
    """Return the rules of one optimizer from the spectral condition: what `RULES` must agree with.

    Input and output: α ‖W‖_R = α ‖ΔW‖_R = Θ(1) (C1.1, C2.1). A block of k ≥ 2 layers: α ∏ ‖W‖_R = Θ(1/L) with every subset of the factors
    replaced by its update (C1.2, C2.2, C2.3, B.2), so ‖ΔW‖_R = ‖W‖_R = Θ(1) and α = 1/L. One layer: α ‖W‖_R = Θ(1/√L), the largest
    that B.1 allows, and α ‖ΔW‖_R = Θ(1/L). Biases: ‖b‖_R = Θ(1), and updates like those of the block (B.3). Decay: λ ‖W‖_R = ‖A‖_R
    (Δ2). ε: the size of what it is added to. ρ: what keeps m/(ρh) fixed, when the curvature h is of the size of a squared gradient.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"no rule for the optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}"
        )
    known = OPTIMIZERS[optimizer]
    found: dict[Role, Rule] = {}
    for role in MATRICES if known.matrices_only else ROLES:
        variance = (
            scale(-1) if role == "hidden" else ONE
        )  # ‖W‖_R = Θ(1), but for the output: Θ(n), its α takes it back
        inside = role in ("hidden", "hidden_bias")
        norm = weight_norm(role, variance)
        target = ONE if not inside else scale(0, -1) if k >= 2 else scale(0, "-1/2")
        multiplier = target / weight_norm("hidden", scale(-1)) if inside else ONE / norm
        change = scale(0, -1) / multiplier if inside else ONE / multiplier  # what ‖ΔW‖_R must be
        size = update_norm(optimizer, role, k)
        entry = (
            gradient_norm(role, k) / (_SIZES[role][0] * _SIZES[role][1]) ** HALF
        )  # of the gradient, root mean square
        eps = {None: None, "entry": entry, "square": gradient_norm(role, k) ** 2}[known.eps]
        clip = ONE / entry if known.clip else None  # m/(ρh) with h like m²
        found[role] = Rule(multiplier, variance, change / size, size / norm, eps, clip)
    return found
