"""The stored benchmarks of the product M u: what was asked for, and the tables of README and book.

The scripts in `benchmarks/` of a checkout measure (`make bench`); this module only reads what they
stored. A row that no run has filled reads "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grsd import results
from grsd.figures import Table

RESULT, RESULT_GPU = "benchmarks-cpu", "benchmarks-gpu"
NOT_MEASURED = "not measured"
SHAPES = {"h256": "h256 L4 V2048", "70m": "h512 L6 V50304 (70m)", "h1024": "h1024 L4 V50304"}
GPU_SHAPES = ("70m", "410m", "1.4b", "6.9b")
FASTER = "times as fast as"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the table: its number's place in a shape's record, and the goals."""

    title: str
    part: str
    key: str  # of a number or {"median", "low", "high"} in that part
    asked: tuple[float | None, ...] = ()  # one goal a shape
    at_most: bool = True  # whether goals are upper bounds

    @property
    def goals(self) -> dict[str, float]:
        """Shape → goal, where one was asked."""
        return {s: goal for s, goal in zip(SHAPES, self.asked, strict=False) if goal is not None}

    def read(self, record: Record) -> Any:
        """Return the stored value, or None."""
        return record.get(self.part, {}).get(self.key)

    def met(self, shape: str, record: Record) -> bool | None:
        """Say whether the median meets the goal; None without a goal or without a number."""
        value, goal = self.read(record), self.goals.get(shape)
        if value is None or goal is None:
            return None
        median = value["median"] if isinstance(value, Mapping) else value
        return bool(median <= goal if self.at_most else median >= goal)

    def cell(self, shape: str, record: Record) -> str:
        """The number with its spread, and the goal."""
        value, met = self.read(record), self.met(shape, record)
        if value is None or met is None:
            return _shown(value)
        goal = f"goal {'≤' if self.at_most else '≥'} {self.goals[shape]:g}"
        return f"{_shown(value)}; {goal}{'' if met else ', missed'}"


def _shown(value: Any) -> str:
    """A number, or median [lowest, highest] round; what no run measured is said."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, Mapping):
        return f"{_shown(value['median'])} [{_shown(value['low'])}, {_shown(value['high'])}]"
    return f"{value:.3g}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.1e}"


LINES = (
    Line("M u, factored (F+B)", "ratio", "factored", (0.80, 0.29, 0.27)),
    Line(f"{FASTER} retained double backward", "slower", "retained", (1.6, 4.3, 4.4), False),
    Line(f"{FASTER} `torch.func` VJP and JVP", "slower", "torch.func"),
    Line(f"{FASTER} curvlinops", "slower", "curvlinops", (3.0, 8.5, 9.0), False),
    Line(f"{FASTER} CoLA", "slower", "CoLA"),
    Line("set-up (F+B)", "ratio", "set-up", (0.8, 0.8, 0.8)),
    Line("peak memory of a product (weights)", "peak / weights", "factored", (None, 0.25, None)),
    Line("the same, retained double backward", "peak / weights", "retained"),
    Line("the same, curvlinops", "peak / weights", "curvlinops"),
    Line("100 Lanczos steps with set-up (F+B)", "profile", "ratio"),
    Line("share of their time beyond products", "profile", "beyond products", (0.03, 0.03, 0.03)),
    Line("difference to double backward, relative", "difference", "retained"),
    Line("FLOPs of M u / FLOPs of F+B", "flops", "product / (F+B)"),
    Line("M u if it ran at the rate of one large matrix product (F+B)", "ceiling", "product"),
    Line("set-up, likewise (F+B)", "ceiling", "set-up"),
    Line("F+B, likewise (F+B)", "ceiling", "F+B"),
)


def stored(name: str = RESULT) -> dict[str, Any]:
    """Return the data of a stored benchmark; empty when there is none."""
    return results.load(name).data if name in results.available() else {}


def products_table(data: Record | None = None) -> Table:
    """Return the product's table: a line a quantity, a column a shape."""
    records = (stored() if data is None else data).get("products", {})
    rows = [[line.title, *(line.cell(s, records.get(s, {})) for s in SHAPES)] for line in LINES]
    return Table(["T = 512, float32, two threads", *SHAPES.values()], rows)


def krylov_table(data: Record | None = None) -> Table:
    """Return the table of Lanczos routes on one dense matrix of known spectrum."""
    part = (stored() if data is None else data).get("krylov", {}).get("routes", {})
    columns = {  # heading → key
        "products": "steps",
        "time / products alone": "time / products",
        "error of a moment": "moment error",
        "error of the 20 largest": "error of the 20 largest",
        "copies of the largest": "copies of the largest",
    }
    rows = []
    for name in ("grsd", "linear_operator", "CoLA", "SciPy eigsh", "grsd, not reorthogonalised"):
        route = part.get("routes", {}).get(name)
        cells = [NOT_MEASURED if route is None else "–"] * len(columns)
        for k, key in enumerate(columns.values()):
            if route is not None and key in route:
                cells[k] = str(route[key]) if isinstance(route[key], int) else _shown(route[key])
        rows.append([name, *cells])
    return Table(["route", *columns], rows)


def gpu_table(data: Record | None = None) -> Table:
    """Return the table of the larger shapes on one GPU."""
    stored_rows = (stored(RESULT_GPU) if data is None else data).get("rows", [])
    columns = {  # heading → key
        "M u (F+B)": "M u / (F+B)",
        "TFLOP/s": "TFLOP/s",
        "peak beyond weights (MB)": "peak beyond weights (MB)",
        "50 batches of 100 steps (s)": "50 batches (s)",
    }
    rows = []
    for shape in GPU_SHAPES:
        for row in [row for row in stored_rows if row.get("shape") == shape] or [{}]:
            name = f"{shape}, TF32" if row.get("tf32") else shape
            rows.append([name, *(_shown(row.get(key)) for key in columns.values())])
    return Table(["shape", *columns], rows)


BLOCKS = {"products": products_table, "krylov": krylov_table, "gpu": gpu_table}


def filled(text: str) -> str:
    """Return `text` with the stored table between `<!-- benchmark: NAME -->` and `<!-- end -->`."""
    head, *parts = text.split("<!-- benchmark: ")
    for part in parts:
        name, opened, rest = part.partition(" -->")
        _, closed, tail = rest.partition("<!-- end -->")
        if not opened or not closed or name not in BLOCKS:
            wanted = f"it is not closed, or is none of {', '.join(BLOCKS)}"
            raise ValueError(f"the marker 'benchmark: {name[:40]}': {wanted}")
        table = BLOCKS[name]().markdown()
        head += f"<!-- benchmark: {name} -->\n\n{table}\n\n<!-- end -->{tail}"
    return head
