"""Energy on the λ axis at one instant: shells with sharp edges, and fluxes through soft ones.

Sharp shells follow 2512.10427, section 3, with the kernel of M as a shell of its own. Their
energies jump when an eigenvalue crosses an edge; :mod:`grsd.dynamics.crossings` integrates over
that. Soft edges are resolvents of M: their energies are smooth in time and need no eigenvectors.

Cells are numbered along the λ axis: 0 is ker M, 1 what lies below the first edge, 2 … N+1 the N
shells, N+2 the rest above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from grsd import checks
from grsd.dynamics.modes import Modes, in_float64
from grsd.spectrum.shells import LogShells

__all__ = [
    "Flux",
    "ShellBalance",
    "cumulative_flux",
    "resolvent_energy",
    "resolvent_flux",
    "shell_balance",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ShellBalance:
    """What changes the energy of every cell at one instant, as in equations (1)–(3).

    Attributes
    ----------
    shells : LogShells
    counts : (N+3,) int, modes in each cell.
    energies : (N+3,), E_α = ½ Σ g_u²; they add up to ½⟨e, e⟩.
    dissipation : (N+3,), D_α = Σ λ_u g_u², energy per time.
    exchange : (N+3, N+3), `exchange[α, β]` = F_{β→α} = −Σ_{u∈α, v∈β} g_v g_u Ω_{v→u}: what α
        receives from β per time. Antisymmetric; its diagonal, kept, is the sum of Proposition 1.
    """

    shells: LogShells
    counts: NDArray[np.int64]
    energies: Array
    dissipation: Array
    exchange: Array

    @property
    def rate(self) -> Array:
        """−D_α + Σ_β F_{β→α}, (N+3,): dE_α/dt between two crossings, which is equation (3)."""
        return self.exchange.sum(axis=1) - self.dissipation

    @property
    def leak(self) -> float:
        """Energy that flows into ker M per time, and is dissipated no more while it is there."""
        return float(self.exchange[0].sum())


def shell_balance(at: Modes, shells: LogShells) -> ShellBalance:
    """Sort the modes of one instant into shells: what the shells lose and exchange.

    Eigenvalues that repeat inside a cell are harmless: their coupling cancels, whatever the basis;
    an edge between two that agree to rounding is refused. Source: 2512.10427, sections 3.2–3.5,
    with a shell for the kernel. Cost: O(n²).
    """
    place = np.searchsorted(shells.edges, at.eigenvalues, side="right") + 1
    cell, count = np.where(at.in_kernel, 0, place), len(shells) + 3
    # modes of the kernel have λ = 0: what rounding left there must not dissipate
    x, g = np.where(at.in_kernel, 0.0, at.eigenvalues), at.coefficients
    if not ((cell >= 2) & (cell < count - 1)).any():
        raise ValueError(
            f"no eigenvalue lies between the edges {shells.edges[0]:.4g} and "
            f"{shells.edges[-1]:.4g}; outside the kernel lie {x[x > 0][:1]} … {x[x > 0][-1:]}"
        )
    gaps = x[None, :] - x[:, None]  # λ_v − λ_u
    # pairs that agree to rounding have no Ω: harmless in one cell, refused across an edge
    close, alike = np.abs(gaps) <= at.floor, cell[:, None] == cell[None, :]
    torn = close & ~alike & ~at.in_kernel[:, None] & ~at.in_kernel[None, :]
    if torn.any():
        u, v = np.argwhere(torn)[0]
        raise ValueError(
            f"an edge separates the eigenvalues {x[u]:.17g} and {x[v]:.17g}, which agree to "
            "rounding: their exchange has no value. Move the edge, or use resolvent_flux"
        )
    # −g_v g_u Ω_{v→u} of every pair, then summed over cells by their indicator vectors
    free = close & alike
    pairs = -np.where(free, 0.0, np.outer(g, g) * at.matrix / np.where(free, 1.0, gaps))
    member = np.zeros((count, len(x)))
    member[cell, np.arange(len(x))] = 1.0
    return ShellBalance(
        shells=shells,
        counts=np.bincount(cell, minlength=count).astype(np.int64),
        energies=member @ (0.5 * g**2),
        dissipation=member @ (x * g**2),
        exchange=member @ pairs @ member.T,
    )


def cumulative_flux(exchange: ArrayLike) -> Array:
    """Return J_{≤α} = Σ_{β>α} Σ_{γ≤α} F_{β→γ}, (..., c): energy that moves *down* past each cell.

    `exchange[..., γ, β]` = F_{β→γ}, (..., c, c) with cells in ascending order, as Definition 4.1
    has it; the last entry is 0, since nothing lies above.
    """
    f = np.asarray(exchange, dtype=np.float64)
    if f.ndim < 2 or f.shape[-1] != f.shape[-2]:
        raise ValueError(f"exchange has shape {f.shape}; expected one row and one column per cell")
    downward = [f[..., : a + 1, a + 1 :].sum(axis=(-2, -1)) for a in range(f.shape[-1])]
    return np.stack(downward, axis=-1)


def _resolvents(
    M: Tensor, error: Tensor, a: float, power: int
) -> Iterator[tuple[float, complex, Tensor]]:
    """Yield (weight, ω, (M − aωI)⁻¹e), a root of ωᵖ = −1 per conjugate pair; weights sum to 1."""
    identity = torch.eye(len(error), dtype=M.dtype, device=M.device)
    for j in range((power + 1) // 2):
        if 2 * j + 1 == power:  # ω = −1
            yield 1 / power, -1.0, torch.linalg.solve(M + a * identity, error)
        else:
            root = complex(np.exp(1j * np.pi * (2 * j + 1) / power))
            shifted = M - a * root * identity
            yield 2 / power, root, torch.linalg.solve(shifted, error.to(shifted.dtype))


def resolvent_energy(M: Tensor, error: Tensor, edges: ArrayLike, *, power: int = 1) -> Tensor:
    """Return ½⟨e, σ_a(M)e⟩ at edges a > 0, σ_a(λ) = λᵖ/(λᵖ + aᵖ): (k,) energies above soft edges.

    M (n, n) and error (n,) are float64, M symmetric, the edges (k,) ascending; a larger `power` p
    is sharper. The result is differentiable in both modes. The energy below a is ½⟨e, e⟩ less it;
    differences of neighbours are the energies of soft shells.

    Notes
    -----
    With the p roots ω of −1, σ_a(M) = (1/p) Σ_ω M(M − aωI)⁻¹: rotated resolvents, each as well
    conditioned as that of p = 1 up to a factor 1/sin(π/p); the matrix power (M/a)ᵖ would not be.
    Cost: one dense factorisation per edge and conjugate pair.
    """
    places, n = _checked(M, error, edges, power), len(error)
    energies = []
    for a in places:
        above = M.new_zeros(())
        for weight, _, x in _resolvents(M, error, a, power):
            above = above + (0.5 * weight / n) * (M @ error @ x.real)
        energies.append(above)
    return torch.stack(energies)


@dataclass(frozen=True)
class Flux:
    """Energy around soft edges at one instant, and what changes it. No eigenvector was computed.

    d(above)/dt = total − dissipation_above and d(below)/dt = −total − dissipation_below. The two
    parts of `total`, which need eigenvectors, are in :func:`grsd.dynamics.drift.edge_flux`.

    Attributes
    ----------
    edges : (k,), positions a.
    above, below : (k,), ½⟨e, σ_a(M)e⟩ and ½⟨e, (1 − σ_a(M))e⟩; the latter holds ker M.
    total : (k,), J(a) = ½⟨e, Dσ_a(M)[Ṁ] e⟩: energy per time through the edge, upwards positive.
    dissipation_above, dissipation_below : (k,), ⟨e, σ_a(M)M e⟩ and ⟨e, (1 − σ_a(M))M e⟩.
    """

    edges: Array
    above: Array
    below: Array
    total: Array
    dissipation_above: Array
    dissipation_below: Array


def resolvent_flux(
    M: Tensor | Array,
    rate: Tensor | Array,
    error: Tensor | Array,
    edges: ArrayLike,
    *,
    power: int = 1,
) -> Flux:
    """Return the flux of energy through soft edges σ_a, and the dissipation on either side.

    Arguments and cost are those of :func:`resolvent_energy`; `rate` = Ṁ, (n, n) float64, symmetric.
    Dσ_a(M)[Ṁ] = −(a/p) Σ_ω ω (M − aω)⁻¹ Ṁ (M − aω)⁻¹; for p = 1 the flux is (a/2)⟨x, Ṁx⟩ with
    (M + a)x = e. Source: the smooth form of 2512.10427, equation (2), with the term that it lacks.
    """
    m, r, e = (torch.as_tensor(a) for a in (M, rate, error))
    places, n = _checked(m, e, edges, power), len(e)
    in_float64("rate", r, (n, n))
    pushed = m @ e
    dissipation = float(e @ pushed) / n
    rows = []
    for a in places:
        # energy above and below the edge, the flux through it, and the dissipation above
        above, below, total, upper = (m.new_zeros(()) for _ in range(4))
        for weight, root, x in _resolvents(m, e, a, power):
            above = above + weight * (pushed @ x.real)
            below = below - weight * (a * root * (e.to(x.dtype) @ x)).real
            upper = upper + weight * (pushed @ (m @ x.real))
            total = total - weight * (a * root * (x @ (r.to(x.dtype) @ x))).real
        rows.append(torch.stack([above / 2, below / 2, total / 2, upper]) / n)
    above, below, total, upper = torch.stack(rows).detach().cpu().numpy().T
    return Flux(places, above, below, total, upper, dissipation - upper)


def _checked(M: Tensor, error: Tensor, edges: ArrayLike, power: int) -> Array:
    """Return the edges once everything is what `resolvent_energy` says."""
    in_float64("M", M, (len(error), len(error)))
    in_float64("error", error, ("n",))
    checks.whole("power", power, 1)
    places = checks.ascending("edges", np.atleast_1d(np.asarray(edges, np.float64)), 1)
    return checks.positive("edges", places)
