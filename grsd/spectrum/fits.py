"""Two shapes for a profile: the one that 2512.10427 draws through it (Figure 1b), and the null that has half as many parameters.

Both are fitted to log E by least squares over the shells that hold energy, so that their residuals can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import gammaincc, gammaln

from grsd.spectrum.shells import AveragedProfile, LogShells, ShellProfile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A fitted shape.

    Attributes
    ----------
    name : str
    parameters : dict of str to float
    energies : (n,), the fitted shell energies on all shells (0 where they underflow).
    rms : float, root mean square of the residuals of log E over the shells that were fitted.
    aic : float, n log(rms²) + 2k + 2k(k+1)/(n−k−1), small-sample Akaike criterion; inf when n ≤ k + 1.
    points : int, number of shells fitted.
    """

    name: str
    parameters: dict[str, float]
    energies: Array
    rms: float
    aic: float
    points: int


def piecewise(profile: ShellProfile | AveragedProfile, *, share: float = 1e-4) -> Fit:
    """Fit a power law below a frontier and exp(−κλ) above it, blended over log λ by a logistic step: six parameters.

    log E = (1 − σ)(a + b s) + σ (c − κ eˢ) with s = log λ_α and σ = 1/(1 + exp(−(s − s₀)/w)); parameters a, b, c, κ, s₀, w.
    Shells with less than `share` of the largest energy are left out. Source: 2512.10427, Figure 1b, where the blending is
    named but not given.
    """
    centers, _ = _seen(profile, share)

    def model(x: Array, s: Array) -> Array:
        a, b, c, log_kappa, place, log_width = x
        step = 1.0 / (1.0 + np.exp(-np.clip((s - place) / np.exp(log_width), -60, 60)))
        found: Array = (1 - step) * (a + b * s) + step * (
            c - np.exp(np.clip(log_kappa + s, -60, 60))
        )
        return found

    top = float(np.log(centers[int(np.argmax(_seen(profile, share)[1]))]))
    height = float(_seen(profile, share)[1].max())
    starts = [
        np.array([height - slope * top, slope, height + 1.0, -top, top, np.log(width)])
        for slope in (0.5, 1.5, 3.0)
        for width in (0.3, 1.0)
    ]
    names = ("a", "b", "c", "log_kappa", "frontier", "log_width")
    return _fit(
        "piecewise",
        names,
        profile,
        share,
        lambda x: model(x, np.log(profile.shells.centers)),
        starts,
    )


def frozen(profile: ShellProfile | AveragedProfile, *, share: float = 1e-4) -> Fit:
    """Fit E_α = C ∫ λᵖ exp(−κλ) dλ over the shell: a power-law spectrum that decays in place (c0 = 0), three parameters."""
    centers, heights = _seen(profile, share)
    top = float(centers[int(np.argmax(heights))])

    def model(x: Array) -> Array:
        found: Array = x[0] + log_gamma_shells(
            profile.shells, float(np.exp(x[1])) - 1.0, float(np.exp(x[2]))
        )
        return found

    starts = []
    for exponent in (0.3, 1.0, 3.0):  # the peak of λ^(p+1) e^(−κλ) is at (p+1)/κ
        shape = log_gamma_shells(profile.shells, exponent - 1.0, exponent / top)
        starts.append(
            np.array([heights.max() - shape.max(), np.log(exponent), np.log(exponent / top)])
        )
    return _fit("frozen", ("log_c", "log_p_plus_1", "log_kappa"), profile, share, model, starts)


def log_gamma_shells(shells: LogShells, p: float, kappa: float) -> Array:
    """Return log ∫_shell λᵖ e^(−κλ) dλ = log{κ^−(p+1) [Γ(p+1, κλ_α) − Γ(p+1, κλ_{α+1})]} for p > −1, κ > 0, (n,)."""
    if not (p > -1 and kappa > 0):
        raise ValueError(f"the integral needs p > -1 and kappa > 0, got p = {p}, kappa = {kappa}")
    tails = gammaincc(p + 1, kappa * shells.edges)
    share = np.maximum(tails[:-1] - tails[1:], np.finfo(float).tiny)
    found: Array = np.log(share) + gammaln(p + 1) - (p + 1) * np.log(kappa)
    return found


def _seen(profile: ShellProfile | AveragedProfile, share: float) -> tuple[Array, Array]:
    used = profile.energies > share * profile.energies.max()
    return profile.shells.centers[used], np.log(profile.energies[used])


def _fit(
    name: str,
    names: tuple[str, ...],
    profile: ShellProfile | AveragedProfile,
    share: float,
    model: Callable[[Array], Array],
    starts: list[Array],
) -> Fit:
    used = profile.energies > share * profile.energies.max()
    heights = np.log(profile.energies[used])
    if heights.size < len(names):
        raise ValueError(
            f"{name}: {heights.size} shells hold energy, too few for {len(names)} parameters"
        )
    tries = [
        least_squares(lambda x: model(x)[used] - heights, start, max_nfev=4000) for start in starts
    ]
    best = min(tries, key=lambda t: float(t.cost))
    n, k = int(heights.size), len(names)
    square = max(2.0 * float(best.cost) / n, np.finfo(float).tiny)
    small = 2.0 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.inf
    with np.errstate(under="ignore"):
        energies = np.exp(model(best.x))
    parameters = {key: float(value) for key, value in zip(names, best.x, strict=True)}
    return Fit(
        name,
        parameters,
        energies,
        float(np.sqrt(square)),
        float(n * np.log(square) + 2 * k + small),
        n,
    )
