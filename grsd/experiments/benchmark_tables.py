"""The stored benchmarks of the product M u: what was asked for, and the tables that README and book show.

The scripts in `benchmarks/` of a checkout measure (`make bench`); this module only reads what they stored. A row that no run
has filled reads "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grsd import results
from grsd.figures import Table

RESULT, RESULT_GPU = "benchmarks-cpu", "benchmarks-gpu"
NOT_MEASURED = "not measured"
SHAPES = {"h256": "h256 L4 V2048", "70m": "h512 L6 V50304 (70m)", "h1024": "h1024 L4 V50304"}
GPU_SHAPES = ("70m", "410m", "1.4b", "6.9b")


@dataclass(frozen=True)
class Line:
    """One line of the table: where its number lies in a shape's record, and the goal for each shape.

    Attributes
    ----------
    title : str
    path : keys into the record, joined by "/"; its end is a number or {"median", "low", "high"}.
    goals : shape → number; empty when nothing was asked.
    at_most : whether the goal is an upper bound.
    """

    title: str
    path: tuple[str, ...]
    goals: Mapping[str, float]
    at_most: bool = True

    def read(self, record: Mapping[str, Any]) -> Any:
        """Return the stored value, or None."""
        value: Any = record
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def met(self, shape: str, record: Mapping[str, Any]) -> bool | None:
        """Say whether the median meets the goal; None without a goal or without a number."""
        value, goal = self.read(record), self.goals.get(shape)
        if value is None or goal is None:
            return None
        found = value["median"] if isinstance(value, Mapping) else value
        return bool(found <= goal if self.at_most else found >= goal)


def _every(value: float) -> dict[str, float]:
    return dict.fromkeys(SHAPES, value)


LINES = (
    Line("M u, factored (F+B)", ("ratio", "factored"), {"h256": 0.80, "70m": 0.29, "h1024": 0.27}),
    Line(
        "times as fast as retained double backward",
        ("slower", "retained"),
        {"h256": 1.6, "70m": 4.3, "h1024": 4.4},
        False,
    ),
    Line("times as fast as `torch.func` VJP and JVP", ("slower", "torch.func"), {}),
    Line(
        "times as fast as curvlinops",
        ("slower", "curvlinops"),
        {"h256": 3.0, "70m": 8.5, "h1024": 9.0},
        False,
    ),
    Line("times as fast as CoLA", ("slower", "CoLA"), {}),
    Line("set-up (F+B)", ("ratio", "set-up"), _every(0.8)),
    Line("peak memory of a product (weights)", ("peak / weights", "factored"), {"70m": 0.25}),
    Line("the same, retained double backward", ("peak / weights", "retained"), {}),
    Line("the same, curvlinops", ("peak / weights", "curvlinops"), {}),
    Line("100 Lanczos steps with set-up (F+B)", ("profile", "ratio"), {}),
    Line("share of their time beyond products", ("profile", "beyond products"), _every(0.03)),
    Line("difference to double backward, relative", ("difference", "retained"), {}),
    Line("FLOPs of M u / FLOPs of F+B", ("flops", "product / (F+B)"), {}),
    Line("M u if it ran at the rate of one large matrix product (F+B)", ("ceiling", "product"), {}),
    Line("set-up, likewise (F+B)", ("ceiling", "set-up"), {}),
    Line("F+B, likewise (F+B)", ("ceiling", "F+B"), {}),
)


def stored(name: str = RESULT) -> dict[str, Any]:
    """Return the data of a stored benchmark; empty when there is none."""
    return results.load(name).data if name in results.available() else {}


def _number(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.1e}"


def _cell(line: Line, shape: str, record: Mapping[str, Any]) -> str:
    value = line.read(record)
    if value is None:
        return NOT_MEASURED
    if isinstance(value, Mapping):
        text = f"{_number(value['median'])} [{_number(value['low'])}, {_number(value['high'])}]"
    else:
        text = _number(value)
    met = line.met(shape, record)
    if met is None:
        return text
    return f"{text}; goal {'≤' if line.at_most else '≥'} {line.goals[shape]:g}{'' if met else ', missed'}"


def products_table(data: Mapping[str, Any] | None = None) -> Table:
    """Return the product's table: a line a quantity, a column a shape; median [lowest, highest] round, and the goal."""
    records = (stored() if data is None else data).get("products", {})
    body = [
        [line.title, *(_cell(line, shape, records.get(shape, {})) for shape in SHAPES)]
        for line in LINES
    ]
    return Table(["T = 512, float32, two threads", *SHAPES.values()], body)


def krylov_table(data: Mapping[str, Any] | None = None) -> Table:
    """Return the table of Lanczos routes on one dense matrix of known spectrum."""
    routes = (
        (stored() if data is None else data).get("krylov", {}).get("routes", {}).get("routes", {})
    )
    columns = [
        "route",
        "products",
        "time / products alone",
        "error of a moment",
        "error of the 20 largest",
        "copies of the largest",
    ]
    body = []
    for name in ("grsd", "linear_operator", "CoLA", "SciPy eigsh", "grsd, not reorthogonalised"):
        row = routes.get(name)
        if row is None:
            body.append([name, *[NOT_MEASURED] * 5])
            continue
        spread = row["time / products"]
        body.append(
            [
                name,
                str(row["steps"]),
                f"{_number(spread['median'])} [{_number(spread['low'])}, {_number(spread['high'])}]",
                *(
                    _number(row[key]) if key in row else "–"
                    for key in ("moment error", "error of the 20 largest")
                ),
                str(row.get("copies of the largest", "–")),
            ]
        )
    return Table(columns, body)


def gpu_table(data: Mapping[str, Any] | None = None) -> Table:
    """Return the table of the larger shapes on one GPU."""
    rows = (stored(RESULT_GPU) if data is None else data).get("rows", [])
    columns = [
        "shape",
        "M u (F+B)",
        "TFLOP/s",
        "peak beyond weights (MB)",
        "50 batches of 100 steps (s)",
    ]
    keys = ("M u / (F+B)", "TFLOP/s", "peak beyond weights (MB)", "50 batches (s)")
    body = []
    for shape in GPU_SHAPES:
        found = [row for row in rows if row.get("shape") == shape] or [{}]
        for row in found:
            name = f"{shape}, TF32" if row.get("tf32") else shape
            body.append(
                [name, *(_number(row[key]) if key in row else NOT_MEASURED for key in keys)]
            )
    return Table(columns, body)


BLOCKS: dict[str, Callable[[], Table]] = {
    "products": products_table,
    "krylov": krylov_table,
    "gpu": gpu_table,
}


def filled(text: str) -> str:
    """Return `text` with each table between its markers `<!-- benchmark: NAME -->` and `<!-- end -->` replaced by the stored one.

    Raises
    ------
    ValueError
        When a marker is not closed or names no table.
    """
    head, *parts = text.split("<!-- benchmark: ")
    out = [head]
    for part in parts:
        name, found, rest = part.partition(" -->")
        _, closed, tail = rest.partition("<!-- end -->")
        if not found or not closed or name not in BLOCKS:
            raise ValueError(
                f"the marker 'benchmark: {name[:40]}' is not closed, or is none of {', '.join(BLOCKS)}"
            )
        out.append(
            f"<!-- benchmark: {name} -->\n\n{BLOCKS[name]().markdown()}\n\n<!-- end -->{tail}"
        )
    return "".join(out)
