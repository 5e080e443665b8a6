"""The page "Works on": what the directives make of a result, on one with every status and on the stored one."""

from __future__ import annotations

from typing import Any

import companion_field
from docutils import nodes

from grsd import results
from grsd.experiments.field_settings import SETTINGS
from grsd.lab.nets.tiny import ARCHITECTURES

CALL = "dropout 'h.{}.drop' is active (p = 0.{}). Call model.eval() first"


def data() -> dict[str, Any]:
    """Two decoders and an encoder in three settings: every status, and one reason said of two modules."""
    exact = {"status": "exact", "difference": 3e-7, "eps": 1e-7}
    refused = [{"status": "refused", "reasons": {"auto": k, "graph": k}} for k in (0, 1)]
    absent = [{"status": "absent", "reasons": {"": k}} for k in (2, 3)]
    wrong = {"status": "wrong", "difference": 0.5, "eps": 1e-7, "reasons": {"graph": 4}}
    rows = {
        "gpt2": ("decoder", [exact, refused[0], absent[0]]),
        "llama": ("decoder", [exact | {"difference": 1e-7}, refused[1], wrong]),
        "bert": ("encoder", [exact, exact, absent[1]]),
    }
    settings = ["sdpa", "dropout", "left"]
    return {
        "settings": [[name, f"what {name} is"] for name in settings],
        "rows": {
            name: {"kind": kind, "cells": dict(zip(settings, cells, strict=True))}
            for name, (kind, cells) in rows.items()
        },
        "reasons": [
            CALL.format(0, 1),
            CALL.format(11, 25),
            "no such setting",
            "the model itself fails: TypeError: float",
            "M u differs",
        ],
    }


def test_the_table_shows_every_status_with_the_number_of_its_reason() -> None:
    lines = [
        [cell.astext() for cell in row.findall(nodes.entry)]
        for row in companion_field.table(data()).findall(nodes.row)
    ]
    assert lines == [
        ["", "sdpa", "dropout", "left", "largest / ε"],
        ["Decoders"],
        ["gpt2", "✓", "R1", "–", "3.0"],
        ["llama", "✓", "R1", "✗2", "1.0"],
        ["Encoders"],
        ["bert", "✓", "✓", "–3", "3.0"],
    ]


def test_reasons_are_listed_once_with_their_cells_and_forms() -> None:
    items = [
        [p.astext() for p in item.findall(nodes.paragraph)]
        for item in companion_field.reasons(data()).findall(nodes.list_item)
    ]
    assert items == [
        [CALL.format(0, 1), "gpt2: dropout; llama: dropout"],
        ["M u differs (graph form only)", "llama: left"],
        ["the model itself fails: TypeError: float", "bert: left"],
    ]


def test_a_result_without_refusals_has_no_list() -> None:
    clean = data()
    for row in clean["rows"].values():
        row["cells"] = dict.fromkeys(row["cells"], row["cells"]["sdpa"])
    assert companion_field.reasons(clean).astext() == "Nothing is refused."


def test_the_stored_result_is_the_whole_matrix_without_a_fault() -> None:
    stored = results.load("field")
    assert [name for name, _ in stored.data["settings"]] == [*SETTINGS]
    assert {*stored.data["rows"]} == {*ARCHITECTURES}
    statuses = [c["status"] for row in stored.data["rows"].values() for c in row["cells"].values()]
    assert len(statuses) == len(SETTINGS) * len(ARCHITECTURES)
    assert {*statuses} <= {"exact", "refused", "absent"}
    said = companion_field.origin(stored).astext()
    assert not any("site-packages" in reason for reason in stored.data["reasons"])
    assert f"{statuses.count('exact')} exact" in said and "transformers " in said
