"""Many independent batches at once: one forward pass, one operator a batch, one Lanczos recurrence for all of them.

A batch of a few hundred tokens does not fill a GPU. Here the sequences of all batches run through the network together, the
blocks of K are kept apart, and the coefficients of every batch come out of the same sequence of products. A single batch is
the business of :mod:`grsd.spectrum.operator.ntk` and :mod:`grsd.spectrum.lanczos`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from grsd.spectrum.lanczos import recurrence, tridiagonal
from grsd.spectrum.measure import Tridiagonal
from grsd.spectrum.observables import Observable
from grsd.spectrum.operator.base import Inputs, Kernel, Normalize
from grsd.spectrum.operator.cuda_graph import replayed
from grsd.spectrum.operator.factored import Factored
from grsd.spectrum.operator.plan import Plan
from grsd.spectrum.operator.trace import Trace
from grsd.spectrum.programs.record import Unrecordable


class NTKBatches(Kernel):
    """The kernels M_1 … M_G of G independent batches of T rows each, multiplied in lock-step.

    Parameters
    ----------
    model, inputs, observable, normalize
        As for `NTK`. The first axis of the inputs (and targets) holds the batches one after another, all of one size.
    batches
        G. The number of rows must be a multiple of it.

    Attributes
    ----------
    shape : (G, T, T)
    outputs : Tensor, (G, T), f at the rows, detached.
    inner_weight : float, 1 / (samples of one batch) for "mean" and 1 for "sum".

    Raises
    ------
    ValueError
        What `NTK` raises; a parameter that does not see the batches apart (a learned table of positions that is shared by
        all sequences, batch statistics, a parameter that no rule knows); unequal numbers of rows.

    Notes
    -----
    Cost of a product: that of the factored product of all sequences, with (T × T) Gram matrices for every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        batches: int,
        normalize: Normalize = "mean",
    ) -> None:
        super().__init__(model, normalize)
        self._observable = observable
        trace = Trace(self._parameters)
        try:
            rows = self._rows(inputs, observable, trace)
        except Unrecordable as failure:
            raise ValueError(
                f"the backward pass of this model cannot be recorded ({failure})"
            ) from failure
        trace.check_inputs()
        if batches < 1 or rows.numel() % batches:
            raise ValueError(
                f"{rows.numel()} rows cannot be split into {batches} batches of equal size"
            )
        flat = rows.detach()
        self.outputs: Tensor = flat.view(batches, -1)
        samples = observable.samples(flat)
        self.inner_weight: float = batches / samples if normalize == "mean" else 1.0
        try:
            self._factored = Factored(rows, trace, self._names, groups=batches)
        except RuntimeError as failure:
            reason = str(failure).splitlines()[0]
            raise ValueError(
                f"the backward pass of this model cannot be recorded ({reason})"
            ) from failure
        self._product = replayed(self._factored, flat)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.outputs.shape[0], self.outputs.shape[1], self.outputs.shape[1])

    @property
    def error(self) -> Tensor:
        """The observable's error vectors, (G, T)."""
        return self._observable.error(self.outputs.view(-1)).view(self.outputs.shape)

    def _dtypes(self) -> set[torch.dtype]:
        return super()._dtypes() | self._factored.dtypes

    def plan(self) -> Plan:
        """Return what a product does, as `NTK.plan`."""
        return Plan("factored", tuple(self._factored.plan_rows))

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M_g u_g for all g, (G, T), from u of shape (G, T)."""
        self._check(u, tuple(self.outputs.shape))
        self._same_parameters()
        return self._product(u.reshape(-1)).view(self.outputs.shape) * self.inner_weight


def lanczos_batches(M: NTKBatches, starts: Tensor, steps: int) -> list[Tridiagonal]:
    """Run Lanczos with full reorthogonalisation on every batch at once; return one `Tridiagonal` a batch.

    Parameters
    ----------
    M
        The operators.
    starts
        (G, T), one start vector a batch, none of them zero.
    steps
        m, between 1 and T.

    Raises
    ------
    ValueError
        A start vector that is zero, not finite or does not fit; steps outside [1, T]; a product that is not finite.

    Notes
    -----
    Cost: m products, 8 m² T operations a batch and G m T numbers. No step waits for the device: a batch whose Krylov space is
    exhausted goes on with rounding noise, which is cut off afterwards, as in `lanczos`.
    """
    groups, size, _ = M.shape
    if starts.shape != (groups, size) or starts.dtype != M.dtype or starts.device != M.device:
        raise ValueError(
            f"the start vectors must be {(groups, size)}, {M.dtype} on {M.device}; got {tuple(starts.shape)}, "
            f"{starts.dtype} on {starts.device}"
        )
    if not 1 <= steps <= size:
        raise ValueError(f"steps must be between 1 and T = {size}, got {steps}")
    norms = torch.linalg.vector_norm(starts, dim=1)
    bad = [k for k, norm in enumerate(norms.tolist()) if not (np.isfinite(norm) and norm > 0)]
    if bad:
        raise ValueError(f"the start vectors of batches {bad} are zero or not finite")

    alphas, betas = recurrence(M, starts / norms[:, None], steps)
    masses = norms.to("cpu", torch.float64).numpy() ** 2 * M.inner_weight
    return [
        tridiagonal(a, b, float(mass), M.eps, size)
        for a, b, mass in zip(alphas, betas, masses, strict=True)
    ]
