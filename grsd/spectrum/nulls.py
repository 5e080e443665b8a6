"""What a profile must be compared with before it is read as evidence.

Each null model destroys one thing that a claim rests on and keeps the rest. Untrained weights are
the fourth null: they need no code here, only the checkpoint at step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from grsd import checks
from grsd.spectrum.lanczos import lanczos
from grsd.spectrum.measure import SpectralMeasure
from grsd.spectrum.observables import IGNORE
from grsd.spectrum.operator.base import Operator
from grsd.spectrum.shells import LogShells, ShellProfile


def random_start(like: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return a Gaussian vector of the same norm: M is kept, the error's direction is not."""
    draw = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    return draw * (torch.linalg.vector_norm(like) / torch.linalg.vector_norm(draw))


def random_signs(like: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return `like` with a fair random sign on every row: sizes are kept, coordination is not.

    What remains of a profile is, in the mean, Σ e_i² times the spectral measure of row i.
    """
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int64).mul_(2).sub_(1)
    return like * signs.to(like)


def shuffled(targets: Tensor, *, generator: torch.Generator, ignore_index: int = IGNORE) -> Tensor:
    """Return the counted targets in random order: kept is how often each occurs, lost is where."""
    flat = targets.reshape(-1).clone()
    counted = torch.nonzero(flat != ignore_index).squeeze(1)
    order = torch.randperm(counted.numel(), generator=generator).to(counted.device)
    flat[counted] = flat[counted[order]]
    return flat.reshape(targets.shape)


def density_of_states(
    M: Operator, *, probes: int, steps: int, generator: torch.Generator
) -> list[SpectralMeasure]:
    """Return `probes` measures of Gaussian start vectors, of mass T: weights count eigenvalues.

    The mean of their shell masses estimates the number n_α of eigenvalues per shell (stochastic
    Lanczos quadrature; Lin, Saad and Yang 2016). Cost: probes · steps products.
    """
    checks.at_least("probes", probes, 1)
    size = int(M.shape[0])
    unit = torch.ones(size, dtype=M.dtype, device=M.device)
    measures = []
    for _ in range(probes):
        mu = lanczos(M, random_start(unit, generator=generator), steps).measure()
        weights = mu.weights * (size / mu.mass)
        measures.append(replace(mu, weights=weights, tridiagonal=None))
    return measures


def counts(measures: Sequence[SpectralMeasure], shells: LogShells) -> np.ndarray:
    """Return the estimated number of eigenvalues per shell, (probes, n), of `density_of_states`."""
    return np.stack([2.0 * mu.shells(shells).energies for mu in measures])


def frozen_kernel(measure: SpectralMeasure, time: float, shells: LogShells) -> ShellProfile:
    """Return the profile of a kernel frozen at `measure` after `time`: every weight × exp(−2λt).

    The null of no transport (c0 = 0 in 2512.10427): each mode decays where it stands. The interval
    of a shell is that of the measure, damped by the factors at its two edges.
    """
    checks.at_least("time", time, 0)
    decayed = measure.weights * np.exp(-2.0 * measure.nodes * time)
    before = measure.shells(shells)
    after = replace(measure, weights=decayed, tridiagonal=None).shells(shells)
    slow, fast = np.exp(-2.0 * shells.edges[:-1] * time), np.exp(-2.0 * shells.edges[1:] * time)
    return replace(after, lower=before.lower * fast, upper=before.upper * slow)


def fit_frozen_kernel(measure: SpectralMeasure, energy: float) -> float:
    """Return the time at which a frozen kernel's energy ½ Σ w exp(−2λt) has fallen to `energy`.

    An energy above the initial one, or at most what the kernel of M can never lose, is refused.
    """
    start, stays = 0.5 * measure.mass, 0.5 * float(measure.weights[measure.in_kernel].sum())
    if not stays < energy <= start:
        raise ValueError(
            f"a frozen kernel can only fall from {start:.6g} to above {stays:.6g}; asked for "
            f"{energy:.6g}"
        )

    def excess(log_time: float) -> float:
        decay = np.exp(-2.0 * measure.nodes * np.exp(log_time))
        return 0.5 * float(np.sum(measure.weights * decay)) - energy

    # from before the fastest mode has moved until after the slowest is gone
    moving = measure.nodes[~measure.in_kernel]
    low, high = np.log(1e-12 / moving.max()), np.log(1e3 / moving.min())
    if excess(low) <= 0:
        return 0.0
    return float(np.exp(brentq(excess, low, high, xtol=1e-12)))
