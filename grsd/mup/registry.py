"""The optimizers, one row each: what tables, plans, audits and checks know about them.

To add one, write a row of `OPTIMIZERS`, and its builder if no library has the optimizer.
`grsd.mup.rules.derive` derives the row's table a second time from its update.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch

from grsd.mup.combined import Combined
from grsd.mup.optimizers import SSO, Muon, NorMuon, Shampoo
from grsd.mup.scales import HALF, MATRICES, ONE, ROLES, Role, Scale, larger, parse

Groups = list[dict[str, Any]]
Builder = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """What one role needs under one optimizer; every field is the factor on the base value."""

    multiplier: Scale  #: α, on the output of the layer, or once on that of a residual block
    variance: Scale  #: σ², of the initial weights
    lr: Scale  #: η
    weight_decay: Scale  #: λ in ΔW = −η (A + λ W), so the decay grows with the update
    eps: Scale | None = None  #: ε, or None when the optimizer has none that matters
    clip: Scale | None = None  #: ρ of Sophia, which multiplies the curvature before it divides


# Of every role, whatever the optimizer: α in blocks of two or more layers, α in blocks of one, σ².
INITIAL: dict[Role, tuple[Scale, Scale, Scale]] = {
    "input": (ONE, ONE, ONE),
    "hidden": (parse("L^-1"), parse("L^-1/2"), parse("n^-1")),
    "output": (parse("n^-1"), parse("n^-1"), ONE),
    "input_bias": (ONE, ONE, ONE),
    "hidden_bias": (parse("L^-1"), parse("L^-1/2"), ONE),
    "output_bias": (ONE, ONE, ONE),  # not in the paper: a number of fixed size, added after α
}


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes
    ----------
    build : (parameter groups, lr=, options) → optimizer, as the classes of `torch.optim` are
        called.
    kind : the A of the first update ΔW = −η A is ∇, an entrywise sign, or U Vᵀ.
    table : a line for each of η, λ and, where there is one, ε and ρ (Sophia's bound). Cells are
        those of input, hidden (k ≥ 2 and k = 1, layers of a block) and output matrices, and then
        the same of biases; without these the optimizer takes matrices only.
    eps : what ε is compared with: "entry" (a typical entry of ∇), "norm" (∇'s largest singular
        value), "square" (the square of that), or None.
    variant_of : the optimizer whose measured norms of first steps are its own too.
    rate : base rate of coordinate checks, at which features of their base model change by about a
        tenth; None leaves it out of them.
    mistake : exponents of r_n and r_L by which a wrong hidden rate differs from the rule's, in
        width a rule of another row or role, in depth mostly the rule of blocks of one layer;
        coordinate checks must tell it apart.
    exact : options that make the first step the one of the derivation: singular value
        decompositions, no ε, no decay.
    slow : 1 when every step after the first needs decompositions, 2 when the first needs many, too.
    """

    words: str  #: one line for lists
    build: Builder
    kind: Literal["gradient", "sign", "orthogonal"]
    table: str
    #: (scale of n_out, of n_in) → that of the factor on U Vᵀ
    factor: Callable[[Scale, Scale], Scale] = lambda out, into: ONE
    eps: Literal["entry", "norm", "square"] | None = None
    caution: str = ""  #: what a plan with it should say
    variant_of: str | None = None
    rate: float | None = None
    mistake: tuple[float, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  #: of `build`, in coordinate checks
    exact: Mapping[str, Any] = field(default_factory=dict)
    first_lr: float = 1.0  #: η of the exact first step, where it must be small
    first: Callable[[Any], object] = lambda optimizer: optimizer.step()  #: how that step is made
    slow: Literal[0, 1, 2] = 0

    @cached_property
    def rules(self) -> dict[int, dict[Role, Rule]]:
        """The table, read: k (2 stands for more) → role → rule."""
        lines = [line.split() for line in self.table.strip().splitlines()]
        cells = {name: tuple(map(parse, row)) for name, *row in lines}
        if {len(row) for row in cells.values()} not in ({4}, {8}) or not cells.keys() >= {"η", "λ"}:
            raise ValueError(f"a table has lines of 4 or 8 cells for η and λ, got {self.table!r}")
        rules: dict[int, dict[Role, Rule]] = {1: {}, 2: {}}
        for k, by_role in rules.items():
            # of the eight columns, hidden roles have one for each k
            places = (0, 1, 3, 4, 5, 7) if k > 1 else (0, 2, 3, 4, 6, 7)
            for role, place in zip(ROLES, places, strict=True):
                if place < len(cells["η"]):
                    eta, decay = (cells[name][place] for name in "ηλ")
                    eps, clip = (cells[name][place] if name in cells else None for name in "ερ")
                    wide, narrow, variance = INITIAL[role]
                    multiplier = wide if k > 1 else narrow
                    by_role[role] = Rule(multiplier, variance, eta, decay, eps, clip)
        return rules

    @property
    def takes(self) -> tuple[Role, ...]:
        """The roles that it has rules for: `ROLES`, or matrices alone."""
        return tuple(self.rules[2])

    @property
    def alone(self) -> bool:
        """It steps one run at a time: with curvature, or with decompositions, which may fail."""
        return self.slow > 0 or self.build is _sophia

    @property
    def matrices_only(self) -> bool:
        """It cannot take vectors; biases then go to another optimizer."""
        return self.takes == MATRICES


# --- Builders of what is not built by its class ---------------------------------------------------

RHO = 1e-2  # SophiaH's own default
_EXACT = {"exact": True}


def _sgd(groups: Groups, lr: float, **options: Any) -> torch.optim.Optimizer:
    plain = [{key: value for key, value in g.items() if key != "eps"} for g in groups]
    return torch.optim.SGD(plain, lr=lr, **options)


def _sso(groups: Groups, lr: float, *, retract: bool = False, **options: Any) -> SSO:
    optimizer = SSO(groups, lr=lr, **options)
    if retract:
        optimizer.retract()
    return optimizer


def _library(name: str) -> Builder:
    """Return the builder of a class of pytorch_optimizer, which is imported when it is used."""

    def build(groups: Groups, lr: float, **options: Any) -> torch.optim.Optimizer:
        try:
            library = importlib.import_module("pytorch_optimizer")
        except ImportError as missing:
            raise ImportError(
                f"{name} comes from the package pytorch_optimizer, which is not installed: pip "
                "install pytorch_optimizer"
            ) from missing
        optimizer: torch.optim.Optimizer = getattr(library, name)(groups, lr=lr, **options)
        return optimizer

    return build


def _sophia(groups: Groups, lr: float, *, p: float = RHO, **options: Any) -> torch.optim.Optimizer:
    """Build SophiaH: its step is η clip(m/h, ±ρ), the paper's η clip(m/(ρh), ±1); η/ρ here."""
    for g in groups:
        bound = p * g.get("mup_clip", 1.0)
        g |= {"p": bound, "lr": g["lr"] / bound, "mup_lr": g["mup_lr"] / bound}
        g["weight_decay"] = g.get("weight_decay", 0.0) * bound  # the decay of a step stays η λ
        g["create_graph"] = True  # for `grsd.mup.combined.backward`: it estimates the curvature
    return _library("SophiaH")(groups, lr=lr, **options)


def _sophia_first(optimizer: Any) -> None:
    """Step with the curvature of a Gauss-Newton step with one output: the squared gradient."""
    entries = (p for group in optimizer.param_groups for p in group["params"])
    optimizer.step(hessian=[p.grad.square() for p in entries if p.grad is not None])


def _soap_first(optimizer: Any) -> None:
    """Step twice: the library's first step only sets up the eigenbases."""
    optimizer.step()
    optimizer.step()


# --- The rows -------------------------------------------------------------------------------------

#      input    hidden   hidden, k=1   output   | biases: input, hidden, hidden, k=1, output
_SIGN = """
    η  1        n^-1     n^-1L^-1/2    1          1       1           L^-1/2       1
    λ  1        n        n             1          1       1           1            1
"""
_BARE = """
    η  n^1/2    1        L^-1/2        n^1/2
    λ  n^-1/2   1        1             n^-1/2
"""
_KIMI = """
    η  1        n^-1/2   n^-1/2L^-1/2  1
    λ  1        n^1/2    n^1/2         1
"""
# updates of one kind have one table, and mistakes that are each other's rules
_sign = partial(Optimizer, kind="sign", table=_SIGN, rate=2.0**-11, mistake=(1.0, -0.5))
_orthogonal = partial(Optimizer, kind="orthogonal", rate=2.0**-9)
_bare = partial(_orthogonal, table=_BARE, mistake=(-0.5, -0.5))
_kimis = partial(
    _orthogonal,
    table=_KIMI,
    factor=lambda out, into: larger(out, into) ** HALF,  # 0.2 √max(n_in, n_out)
    mistake=(0.5, -0.5),
)
_SOAP = {"rate": 2.0**-10, "exact": {"weight_decay": 0.0}, "first": _soap_first, "slow": 2}

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(
        "SGD",
        _sgd,
        kind="gradient",
        table="""
    η  n        L        1             n          n       nL          n            1
    λ  n^-1     L^-1     L^-1/2        n^-1       n^-1    n^-1L^-1    n^-1L^-1/2   1
""",
        rate=2.0**-3,
        mistake=(1.0, -1.0),  # the rate of input weights; Table 4 without r_L
    ),
    "adamw": _sign(  # the mistake: no factor of width
        "AdamW",
        torch.optim.AdamW,
        table=_SIGN
        + "ε  n^-1     n^-1L^-1 n^-1L^-1/2    n^-1       n^-1    n^-1L^-1    n^-1L^-1/2   1",
        eps="entry",
        exact={"eps": 1e-30},  # not 0: dead units have gradients of exactly 0
    ),
    "lion": _sign("Lion", _library("Lion"), exact={"betas": (0.9, 0.99)}),
    "sophia": _sign("Sophia, ρ fixed, where it drifts to a sign", _sophia, first=_sophia_first),
    "sophia_rho": _sign(
        "Sophia, ρ in proportion to r_n r_L",
        _sophia,
        table=_SIGN
        + "ρ  n        nL       nL^1/2        n          n       nL          nL^1/2   1",
        rate=None,
        mistake=None,
        variant_of="sophia",
        first=_sophia_first,
    ),
    "muon": _bare("Muon, bare U Vᵀ: the paper's", partial(Muon, scaling="bare"), exact=_EXACT),
    "muon_keller": _orthogonal(
        "Muon, Jordan's factor: torch's default",
        partial(Muon, scaling="keller"),
        table="""
    η  1        1        L^-1/2        n^1/2
    λ  1        1        1             n^-1/2
""",
        factor=lambda out, into: larger(ONE, out / into) ** HALF,  # √max(1, n_out/n_in)
        rate=None,
        exact=_EXACT,
    ),
    "muon_kimi": _kimis(
        "Muon, Kimi's factor: torch's match_rms_adamw", partial(Muon, scaling="kimi"), exact=_EXACT
    ),
    # its first step has the norm of Muon's, since a gradient of rank one has rows of one direction
    "normuon": _kimis(
        "NorMuon, rows of one size, Kimi's factor",
        partial(NorMuon, scaling="kimi"),
        variant_of="muon_kimi",
        rate=None,
        mistake=None,
        exact=_EXACT,
    ),
    "shampoo": _bare(
        "Shampoo",
        Shampoo,
        table=_BARE + "ε  n^-1     L^-2     L^-1          n^-1",
        eps="square",
        exact={"eps": 0.0},
        slow=1,
    ),
    "soap": _bare(  # no mistake: in width its own rule is `soap_sqrt`'s
        "SOAP, ε a share of the gradient's norm",
        _library("SOAP"),
        # not in the paper: the ε with which its rule holds beyond the first step
        table=_BARE + "ε  n^-1/2   L^-1     L^-1/2        n^-1/2",
        eps="norm",
        mistake=None,
        caution="soap: the paper's rule (hidden η not scaled) holds after the first step where ε "
        "is a share of the gradient's largest singular value: give the base's as eps=, and the "
        "plan scales it. Under a constant small ε updates grow beside it, up to like r_n.",
        **_SOAP,
    ),
    # it turns a matrix of ±1, whose spectral norm is about √max(n_in, n_out): Kimi's factor
    "soap_sqrt": _kimis(
        "SOAP, independent gradients of full rank", _library("SOAP"), variant_of="soap", **_SOAP
    ),
    "sso": _orthogonal(
        "SSO, on the spectral sphere",
        _sso,
        table="""
    η  1        1        L^-1/2        n
    λ  1        1        1             n^-1
""",
        factor=lambda out, into: (out / into) ** HALF,  # the sphere's radius
        rate=2.0**-8,
        mistake=(-0.5, -0.5),
        # the sphere where Gaussian weights of infinite width start: at width n their norm is below
        # it by a share of order n^(−2/3), and the first step ends in a small jump onto the sphere
        options={"radius": 2.0},
        exact={"exact": True, "bisections": 8, "retract": True},  # the norm does not depend on μ
        first_lr=1e-3,  # the retraction is not linear in η
        slow=2,
    ),
}
"""Nine optimizers, some in variants."""


def row(optimizer: str) -> Optimizer:
    """Return the row of an optimizer, or refuse a name that has none."""
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"no rule for the optimizer {optimizer!r}; there are {known}")
    return OPTIMIZERS[optimizer]


def assemble(
    groups: Mapping[str, Groups], lr: float, options: Mapping[str, Mapping[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """Return one optimizer from the groups of `Plan.param_groups`, several as a `Combined`."""
    options = options or {}
    if unknown := sorted(set(options) - set(groups)):
        raise ValueError(f"options name {unknown[0]!r}; this plan uses {', '.join(groups)}")
    built = [
        row(name).build([dict(g) for g in chosen], lr=lr, **options.get(name, {}))
        for name, chosen in groups.items()
    ]
    return built[0] if len(built) == 1 else Combined(built)
