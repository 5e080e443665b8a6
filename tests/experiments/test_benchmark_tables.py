"""The stored benchmark: the pages show it and nothing else, absent rows stay visible, and the scripts run at tiny size."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from grsd import results
from grsd.experiments import benchmark_tables

ROOT = Path(__file__).resolve().parents[2]
SPREAD = {"median": 0.3, "low": 0.2, "high": 0.4}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("common", "products", "krylov", "shapes"):
        sys.modules.pop(name, None)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


# --- The pages -------------------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_stored_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- benchmark: {name} -->" in text for name in benchmark_tables.BLOCKS)
    assert benchmark_tables.filled(text) == text, "run: python benchmarks/readme.py"
    assert (
        benchmark_tables.filled(text.replace("times as fast as", "faster than")) == text
    )  # a number typed by hand is put right


def test_the_chapter_shows_the_stored_result() -> None:
    text = (ROOT / "book/spectrum/product.md").read_text(encoding="utf-8")
    for name in ("products_table", "krylov_table", "gpu_table"):
        assert f"\nbenchmark_tables.{name}()\n```" in text
    assert "| M u, factored" not in text


@pytest.mark.parametrize(
    "text", ["<!-- benchmark: other -->\n<!-- end -->", "<!-- benchmark: libraries -->\nno end"]
)
def test_a_damaged_marker_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="marker"):
        benchmark_tables.filled(text)


def test_what_no_run_measured_is_said_not_left_out() -> None:
    empty = benchmark_tables.products_table({})
    assert len(empty.rows) == len(benchmark_tables.LINES)
    assert all(cell == benchmark_tables.NOT_MEASURED for row in empty.rows for cell in row[1:])
    assert [row[0] for row in benchmark_tables.gpu_table({}).rows] == list(
        benchmark_tables.GPU_SHAPES
    )
    assert all(
        cell == benchmark_tables.NOT_MEASURED
        for row in benchmark_tables.gpu_table({}).rows
        for cell in row[1:]
    )
    assert all(
        cell == benchmark_tables.NOT_MEASURED
        for row in benchmark_tables.krylov_table({}).rows
        for cell in row[1:]
    )
    failed = benchmark_tables.gpu_table(
        {"rows": [{"shape": "6.9b", "not measured": "out of memory"}]}
    )
    assert failed.rows[-1] == ["6.9b", *[benchmark_tables.NOT_MEASURED] * 4]


def test_the_short_table_has_the_lines_that_compare_and_no_other() -> None:
    record = {"slower": {"curvlinops": SPREAD}, "ratio": {"factored": SPREAD}}
    rows = benchmark_tables.libraries_table({"products": {"70m": record}}).rows
    assert [row[2] for row in rows if "curvlinops" in str(row[0])] == ["0.3 [0.2, 0.4]"]
    assert len(rows) == 4 and all("times as fast as" in str(row[0]) for row in rows)


def test_the_environment_of_the_benchmarks_is_pinned_without_torch() -> None:
    lines = [
        x
        for x in (ROOT / "benchmarks/requirements.txt").read_text().splitlines()
        if not x.startswith("#")
    ]
    assert lines and all(
        line.count("==") == 1 and not line.startswith(("-", "torch")) for line in lines
    )
    recipe = (ROOT / "Makefile").read_text()
    assert "--no-deps --target $(OTHERS) -r benchmarks/requirements.txt" in recipe


# --- The scripts -----------------------------------------------------------------------------------------------------------


def test_the_scripts_run_at_tiny_size_and_merge_what_they_measure(
    script: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = (
        "--shape",
        "tiny",
        "--batch",
        "2",
        "--length",
        "8",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
    )
    products = script("products")  # type: ignore[operator]
    run(products, monkeypatch, *tiny, "--parts", "time", "--against", "retained", "torch.func")
    run(
        products,
        monkeypatch,
        *tiny,
        "--parts",
        "memory",
        "profile",
        "--steps",
        "8",
        "--profiles",
        "1",
        "--against",
        "retained",
    )
    krylov = script("krylov")  # type: ignore[operator]
    run(
        krylov,
        monkeypatch,
        "--size",
        "200",
        "--steps",
        "40",
        "--repeats",
        "1",
        "--out",
        str(tmp_path),
    )
    run(krylov, monkeypatch, "--parts", "share", *tiny, "--steps", "8")
    data = results.load(benchmark_tables.RESULT, tmp_path).data
    record = data["products"]["tiny"]
    assert max(record["difference"].values()) < 1e-5  # float32, 32 entries a sum
    assert record["flops"]["planned / (F+B)"] == pytest.approx(
        record["flops"]["product / (F+B)"], rel=0.1
    )
    assert set(record["peak / weights"]) == {"factored", "retained"}
    assert set(record["made"]) == {*record} - {"made"}
    routes = data["krylov"]["routes"]["routes"]
    assert (
        routes["grsd"]["moment error"]
        < 1e-4
        < routes["grsd, not reorthogonalised"]["error of the 20 largest"]
    )
    assert 0 <= data["krylov"]["share"]["profile"]["beyond products"]["median"] <= 1
    text = (tmp_path / f"{benchmark_tables.RESULT}.json").read_text()
    assert str(tmp_path) not in text and "seconds" not in text


def test_the_script_for_a_gpu_runs_and_stores(
    script: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = script("shapes")  # type: ignore[operator]
    run(shapes, monkeypatch, "--shapes", "tiny", "--steps", "5", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / f"{benchmark_tables.RESULT_GPU}.json").read_text())["data"][
        "rows"
    ]
    assert row["relative difference"] < 1e-5 and not any(
        "(ms)" in key for key in row
    )  # no absolute time of a CPU


def test_peak_counts_storages_once_and_forgets_what_is_freed(script: object) -> None:
    Peak = script("common").Peak  # type: ignore[operator]
    held = torch.ones(50)
    with Peak() as peak:
        a = torch.ones(1000)  # 4000 bytes
        view = a.view(10, 100).T
        b = a * 2  # 8000 at once
        del b
        c = view[0] + 1  # 10 numbers: 4040 now
        held.add_(1)  # not made here
    assert (peak.most, peak.now) == (8000, 4040)
    del a, view, c
    assert peak.now == 0


def test_the_matrix_of_known_spectrum_is_what_it_says(script: object) -> None:
    krylov = script("krylov")  # type: ignore[operator]
    M, start, (nodes, weights) = krylov.known(60, 3)
    values, vectors = np.linalg.eigh(M.numpy())
    assert np.abs(values - nodes).max() < 1e-13  # 60 roundings
    assert np.abs((vectors.T @ start.numpy()) ** 2 - weights).max() < 1e-12
    exact = (nodes, weights)
    few = krylov.by_grsd(M, start, 5)
    assert krylov.moment_error(few, exact, 10) < 1e-12
    assert (
        krylov.moment_error(few, exact, 20) > 1e-4
    )  # beyond degree 2m − 1 a quadrature is not exact
    assert krylov.moment_error((few[0] * 1.001, few[1]), exact, 10) > 1e-5  # a wrong node is seen
