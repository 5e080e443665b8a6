"""What a product does, line by line: the plan that `NTK.plan()` returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanRow:
    """One line of `NTK.plan()`: what a product does for one parameter or pass.

    Attributes
    ----------
    layer : str, names of the parameters, or the pass.
    rule : str, how the parameter enters ("rows", "gather", "scale", "shift", "conv", "plain", joined by "+").
    association : str, the form of K that is used.
    flops : int, multiplications and additions of one product.
    bytes : int, memory held for it beyond the weights.
    """

    layer: str
    rule: str
    association: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The rows of a plan; prints as a table."""

    method: str
    rows: tuple[PlanRow, ...]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = ("layer", "rule", "association", "MFLOP", "MB")
        body = [
            (r.layer, r.rule, r.association, f"{r.flops / 1e6:.3f}", f"{r.bytes / 1e6:.3f}")
            for r in self.rows
        ]
        total = (
            "total",
            self.method,
            "",
            f"{self.flops / 1e6:.3f}",
            f"{sum(r.bytes for r in self.rows) / 1e6:.3f}",
        )
        lines = [head, *body, total]
        widths = [max(len(line[k]) for line in lines) for k in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if k < 3 else cell.rjust(w)
                for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
