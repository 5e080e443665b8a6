"""The stored benchmarks of the product M u, as the tables of README and book.

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
SHAPES = {
    "h256": "h256 L4 V2048",
    "70m": "h512 L6 V50304 (70m)",
    "h1024": "h1024 L4 V50304",
    "smollm2": "SmolLM2-135M",
}
GPU_SHAPES = ("70m", "410m", "1.4b", "6.9b")
FASTER = "times as fast as"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the table: its number's place in a shape's record."""

    title: str
    part: str
    key: str  # of a number or {"median", "low", "high"} in that part

    def cell(self, record: Record) -> str:
        """The number with its spread."""
        return _shown(record.get(self.part, {}).get(self.key))


def _shown(value: Any) -> str:
    """A number, or median [lowest, highest] round; what no run measured is said."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, Mapping):
        return f"{_shown(value['median'])} [{_shown(value['low'])}, {_shown(value['high'])}]"
    return f"{value:.3g}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.1e}"


LINES = (
    Line("M u, factored (F+B)", "ratio", "factored"),
    Line(f"{FASTER} retained double backward", "slower", "retained"),
    Line(f"{FASTER} `torch.func` VJP and JVP", "slower", "torch.func"),
    Line(f"{FASTER} curvlinops", "slower", "curvlinops"),
    Line(f"{FASTER} CoLA", "slower", "CoLA"),
    Line("set-up (F+B)", "ratio", "set-up"),
    Line("peak memory of a product (weights)", "peak / weights", "factored"),
    Line("the same, retained double backward", "peak / weights", "retained"),
    Line("the same, curvlinops", "peak / weights", "curvlinops"),
    Line("100 Lanczos steps with set-up (F+B)", "profile", "ratio"),
    Line("share of their time beyond products", "profile", "beyond products"),
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
    rows = [[line.title, *(line.cell(records.get(s, {})) for s in SHAPES)] for line in LINES]
    return Table(["T = 512, float32, two threads", *SHAPES.values()], rows)


def libraries_table(data: Record | None = None) -> Table:
    """Return the lines of the product's table that compare with other routes."""
    whole = products_table(data)
    return Table(whole.columns, [row for row in whole.rows if FASTER in str(row[0])])


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


BLOCKS = {"libraries": libraries_table}


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
