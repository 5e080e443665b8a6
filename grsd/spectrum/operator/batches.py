"""Many independent batches at once: one forward pass, and one operator a batch.

A batch of a few hundred tokens does not fill a GPU. Here the sequences of all batches run through
the network together, and the blocks of K are kept apart. `grsd.spectrum.lanczos_batches` runs the
Lanczos recurrence of all of them.
"""

from __future__ import annotations

from torch import Tensor, nn

from grsd.spectrum.observables import Observable
from grsd.spectrum.operator.base import Inputs, Normalize, NTKBase, Plan, copied
from grsd.spectrum.operator.cuda_graph import replayed
from grsd.spectrum.operator.factored import Factored
from grsd.spectrum.operator.trace import Trace
from grsd.spectrum.programs.record import Unrecordable


class NTKBatches(NTKBase):
    """The operators M_1 … M_G of G independent batches of T rows each, multiplied in lock-step.

    Parameters
    ----------
    model, inputs, observable, normalize, products
        As for `NTK`; the first axis of the inputs (and targets) holds one batch after another.
    batches
        G, all of one size.

    Attributes
    ----------
    outputs : (G, T), f at the rows, detached.
    inner_weight : 1 / (samples of one batch) for "mean" and 1 for "sum".

    Raises
    ------
    ValueError
        What `NTK` raises; unequal numbers of rows; a parameter that does not see the batches apart
        (a learned table of positions, batch statistics, one that no rule knows).

    Notes
    -----
    Cost of a product: that of all sequences in one `NTK`, with (T × T) Gram matrices a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        observable: Observable,
        *,
        batches: int,
        normalize: Normalize = "mean",
        products: int = 100,
    ) -> None:
        super().__init__(model, normalize)
        inputs, self._observable = copied(inputs, observable)

        def make(rows: Tensor, trace: Trace) -> Factored:
            if batches < 1 or rows.numel() % batches:
                raise ValueError(
                    f"{rows.numel()} rows cannot be split into {batches} equal batches"
                )
            return Factored(rows, trace, self._names, batches, products)

        try:
            flat, self._factored = self._recorded(inputs, self._observable, make)
        except Unrecordable as failure:
            raise ValueError(
                f"the backward pass of this model cannot be recorded ({failure}); make one NTK for "
                "each batch"
            ) from failure
        self._count(self._factored)
        self.outputs: Tensor = flat.view(batches, -1)
        self.inner_weight: float = batches / self._samples if normalize == "mean" else 1.0
        self._product = replayed(self._factored, flat)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.outputs.shape[0], self.outputs.shape[1], self.outputs.shape[1])

    @property
    def error(self) -> Tensor:
        """The observable's error vectors, (G, T)."""
        return self._observable.error(self.outputs.view(-1)).view(self.outputs.shape)

    def plan(self) -> Plan:
        """Return what a product does, as `NTK.plan`."""
        return Plan("factored", tuple(self._factored.plan_rows))

    def __matmul__(self, u: Tensor) -> Tensor:
        """Return M_g u_g for all g, (G, T), from u of shape (G, T)."""
        self._check(u, tuple(self.outputs.shape))
        self._watch.check()
        product = self._product(u.reshape(-1)).view(self.outputs.shape)
        return self._finite(product * self.inner_weight, u)
