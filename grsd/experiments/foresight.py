"""The experiment ``foresight``: does what the conditions measure early predict how a net trains?

One piece is one residual MLP on digits: a recipe (depth, ε, gain, with or without norm) and a seed.
Early is where slow gradient descent has the loss at `EARLY` of its first value. There λ_max, the
variation of ṡ (D7), ‖J̇‖/‖J‖ (D3) and slope and excess of D4 are read. The outcomes come from other
runs, from the same start: full-batch gradient descent at every rate of `RATES`.

Chosen before the series was run, and after two nets had been timed. *Outcomes*, as logarithms: the
largest rate up to which training lowers the loss (``rate``), the least training loss over those
rates (``loss``), and the loss on other images there (``test``). *Statistic*: the gain, the share
of the outcome's variance that linear regression on `SHARPNESS` and `CONDITIONS` explains on
held-out nets beyond regression on `SHARPNESS` alone. *Questions*: held-out ``seeds`` of the same
recipes; held-out ``recipes``; and ``beyond``, held-out seeds where the regression knows the recipe
of every net, so that only what is the single net's own can help. *Null*: what the conditions have
beside sharpness (and recipe) is dealt out anew among the nets (among those of one recipe). *Answer*
per outcome and question: yes if the 95 % interval of the gain, over recipes drawn anew, lies above
0 and the null reaches the gain with probability below 0.05/3, one part for each outcome. The
question that decides is ``seeds``; no net is left out but those that cannot be read, which are
counted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, vmap

from grsd import checks, statistics
from grsd.dynamics.problem import Problem
from grsd.experiments import engine
from grsd.experiments.engine import Data, Experiment, Piece, Rows
from grsd.lab.data import images
from grsd.lab.nets import architectures, models, parts
from grsd.renorm.diagnostics import collapse, couplings
from grsd.renorm.diagnostics.block_matrices import block_matrices
from grsd.renorm.diagnostics.blocks import Blocks
from grsd.renorm.diagnostics.coherence import size

Array = NDArray[np.float64]
Sums = tuple[Array, Array, Array]  # per net: squared errors of the mean, the base, base and more

CLASSES = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))  # even or odd digits
EARLY, SLOW = 0.9, 2000  # share of the first loss, and steps after which it is given up
RATES = 2.0 ** (np.arange(-28, 13) / 2)  # 2⁻¹⁴ … 2⁶, half octaves
TESTS = 256  # images that the nets are not trained on
DEALS = 500  # of the null
LEVEL = 0.05 / 3  # one part for each outcome

SHARPNESS = ("sharpness", "sharpness at first")  # log λ_max of M, early and at the start
CONDITIONS = ("variation", "clock", "slope", "excess2")  # log D7, log D3, D4 and its rms² − floor²
OUTCOMES = ("rate", "loss", "test")  # logarithms
QUESTIONS = ("seeds", "recipes", "beyond")


@dataclass(frozen=True)
class Parameters:
    """Sizes and seeds; the method is that of the module."""

    depths: tuple[int, ...] = (2, 6, 16)
    epsilons: tuple[float, ...] = (0.3, 1.0)
    gains: tuple[float, ...] = (0.7, 1.5)  # weights have variance gain²/fan-in
    norms: tuple[int, ...] = (0, 1)  # 1: a branch reads a layer norm of the stream
    width: int = 12
    samples: int = 64
    steps: int = 200  # of gradient descent
    seeds: int = 5  # seeds 0, 1, …; each draws its own net and its own images

    def __post_init__(self) -> None:
        checks.at_least("depths", checks.ascending("depths", self.depths, 1), 1)
        checks.positive("epsilons", self.epsilons)
        checks.positive("gains", self.gains)
        for norm in self.norms:
            checks.one_of("norms", norm, (0, 1))
        checks.at_least("samples", self.samples, 32, "it is too small for the windows of D4")
        checks.at_least("steps", self.steps, 1)
        checks.at_least("seeds", self.seeds, 2, "one seed is held out at a time")


def pieces(p: Parameters) -> list[Piece]:
    """One piece per recipe and seed, all recipes of a seed together."""
    common = engine.shared(p, "depths", "epsilons", "gains", "norms", "seeds")
    recipes = itertools.product(range(p.seeds), p.depths, p.epsilons, p.gains, p.norms)
    keys = ("seed", "depth", "epsilon", "gain", "norm")
    return [{**common, **dict(zip(keys, recipe, strict=True))} for recipe in recipes]


def network(piece: Piece) -> nn.Module:
    """Return the residual MLP of a piece: two layers a branch, images (n, 1, 8, 8) → (n, 1)."""
    width, epsilon = piece["width"], piece["epsilon"]
    how = architectures.Common(
        width=width, depth=piece["depth"], epsilon=epsilon, seed=piece["seed"]
    )

    def branch() -> dict[str, nn.Module]:
        first, end = how.linear(width, width), how.linear(width, width)
        norm = parts.Norm(width) if piece["norm"] else None
        return {"branch": parts.Branch(first, how.activation, end, norm=norm)}

    net = how.net(lambda: parts.Flatten(64, width, bias=True), branch, nn.Identity())
    return models.drawn(net, piece["seed"], torch.float64, gain=piece["gain"])


def early(at: Problem, sharpness: float) -> Tensor | None:
    """Return θ where descent at a quarter of 1/λ_max first has `EARLY` of the loss, or None."""
    theta, goal = at.theta, EARLY * at.loss(at.theta)
    for _ in range(SLOW):
        theta = theta + at.velocity(theta) / (4 * sharpness)
        if at.loss(theta) <= goal:
            return theta
    return None


def reading(at: Problem, theta: Tensor) -> Data:
    """λ_max and D3, D4 and D7 at θ, as `renorm.conditions` reads them."""
    blocks = Blocks.of(at, theta)
    matrices = block_matrices(blocks)
    modes = matrices.modes()
    held = ~modes.in_kernel
    lam = modes.eigenvalues[held]
    shift = couplings.shift_invariance(modes.eigenvalues, modes.matrix, floor=modes.floor)
    return {
        "sharpness": math.log(modes.eigenvalues[-1]),
        "variation": math.log(collapse.separability(lam, modes.rates[held] / lam).variation),
        "clock": math.log(size(blocks, matrices=matrices).clock),
        "slope": shift.slope,
        "excess2": shift.rms**2 - shift.floor**2,
    }


def outcome(at: Problem, steps: int) -> tuple[float, float, Tensor] | None:
    """Return the largest stable rate, the least loss over the stable ones, and θ there.

    A rate is stable if `steps` of gradient descent lower the loss, there and at every smaller rate
    of `RATES`. All rates are trained side by side. None if the smallest does not.
    """

    def loss(theta: Tensor) -> Tensor:
        return 0.5 * (at.targets - at.output(theta)).square().mean()

    rates = torch.as_tensor(RATES)[:, None]
    theta, gradient = at.theta.repeat(len(RATES), 1), vmap(grad(loss))
    for _ in range(steps):
        theta = theta - rates * gradient(theta)
    last = vmap(loss)(theta).numpy()
    stable = int(np.argmin(np.append(last < at.loss(at.theta), False)))  # NaN is not below
    if stable == 0:
        return None
    best = int(np.argmin(last[:stable]))
    return float(RATES[stable - 1]), float(last[best]), theta[best]


def measure(piece: Piece) -> Data:
    """Early readings and outcomes of one net; ``failed`` says why it has none."""
    x, y = images.digits(CLASSES, piece["samples"] + TESTS, seed=1000 + piece["seed"])
    net, train = network(piece), piece["samples"]
    at = Problem(net, x[:train], y[:train])
    first = float(torch.linalg.eigvalsh(at.kernel(at.theta))[-1])
    theta, trained = early(at, first), outcome(at, piece["steps"])
    if theta is None or trained is None:
        return {"failed": "not early" if theta is None else "no stable rate"}
    rate, loss, end = trained
    ends = {"rate": rate, "loss": loss, "test": Problem(net, x[train:], y[train:]).loss(end)}
    return {
        **reading(at, theta),
        "sharpness at first": math.log(first),
        **{name: math.log(value) for name, value in ends.items()},
    }


def reduce(p: Parameters, listed: list[Piece], measured: list[Data]) -> Data:
    """Every net, and per outcome and question the shares explained, the gain and its null."""
    known = ("depth", "epsilon", "gain", "norm", "seed")
    kept = [(a, b) for a, b in zip(listed, measured, strict=True) if "failed" not in b]
    nets = [{**{k: a[k] for k in known}, **b} for a, b in kept]
    recipes = list(dict.fromkeys(tuple(net[k] for k in known[:-1]) for net in nets))
    recipe = np.array([recipes.index(tuple(net[k] for k in known[:-1])) for net in nets])
    seed = np.array([net["seed"] for net in nets])
    answers = [
        {"outcome": name, "question": question, **answer(nets, name, question, recipe, seed)}
        for name in OUTCOMES
        for question in QUESTIONS
    ]
    failed = [one["failed"] for one in measured if "failed" in one]
    return engine.rounded({"nets": nets, "answers": answers, "failed": failed}, 5)


def answer(nets: list[Data], name: str, question: str, recipe: Array, seed: Array) -> Data:
    """The gain of one outcome and question with its interval, its null and the answer."""
    y = np.array([net[name] for net in nets])
    base, more = (_columns(nets, names) for names in (SHARPNESS, CONDITIONS))
    one = recipe[:, None] == np.unique(recipe)  # columns of recipes take the place of the constant
    base = np.column_stack([one if question == "beyond" else np.ones(len(y)), base])
    folds = recipe if question == "recipes" else seed
    # what the conditions say beside the base: all that a regression on both can use of them
    more = more - base @ np.linalg.lstsq(base, more, rcond=None)[0]
    sums = held_out(y, base, more, folds)
    each = np.array([[s[recipe == k].sum() for s in sums] for k in np.unique(recipe)])
    interval, _ = statistics.bootstrap(lambda rows: _gain(rows.sum(axis=0)), each)

    # the null: the same conditions, of other nets
    rng, groups = np.random.default_rng(0), recipe if question == "beyond" else 0 * recipe
    null = np.array(
        [
            _gain([s.sum() for s in held_out(y, base, more[dealt(groups, rng)], folds)])
            for _ in range(DEALS)
        ]
    )
    chance = (1 + int((null >= interval.value).sum())) / (1 + DEALS)
    total, alone, both = (float(s.sum()) for s in sums)
    return {
        "sharpness": 1 - alone / total,
        "both": 1 - both / total,
        "gain": interval,
        "null": float(np.quantile(null, 0.95)),
        "chance": chance,
        "yes": int(interval.low > 0 and chance < LEVEL),
    }


def _columns(nets: list[Data], names: tuple[str, ...]) -> Array:
    """Readings (nets, names) of mean 0 and standard deviation 1."""
    x = np.array([[net[name] for name in names] for net in nets])
    return (x - x.mean(axis=0)) / x.std(axis=0)


def _gain(sums: Any) -> float:
    total, alone, both = sums
    return float((alone - both) / total)


def held_out(y: Array, base: Array, more: Array, folds: Array) -> Sums:
    """Squared errors (nets,) on each fold of what was fitted without it: mean, base, both."""
    found = np.empty((3, len(y)))
    designs = (np.ones((len(y), 1)), base, np.column_stack([base, more]))
    for fold in np.unique(folds):
        out = folds == fold
        for row, x in zip(found, designs, strict=True):
            weights = np.linalg.lstsq(x[~out], y[~out], rcond=None)[0]
            row[out] = (y[out] - x[out] @ weights) ** 2
    return found[0], found[1], found[2]


def dealt(groups: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """A random order of the nets that keeps every net in its group."""
    order = np.arange(len(groups))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order[members] = rng.permutation(members)
    return order


def table(result: Data) -> Rows:
    """Per outcome and question: shares of the variance explained on held-out nets, and answers."""
    columns = ["outcome", "held out", "sharpness", "with the conditions", "gain"]
    columns += ["null, 95 %", "chance", "they predict"]
    rows: list[list[object]] = []
    for a in result["answers"]:
        gain = str(statistics.Interval(*a["gain"]))
        told = "yes" if a["yes"] else "no"
        row = [a["outcome"], a["question"], a["sharpness"], a["both"], gain]
        rows.append([*row, a["null"], a["chance"], told])
    return columns, rows


EXPERIMENT = Experiment(Parameters, pieces, measure, reduce, table, gpu={"seeds": 20, "width": 32})
