"""Families of plans as an experiment: one piece beside its parts, a planted fault, a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from grsd import mup
from grsd.experiments import mup_families
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup.families import FAMILIES

SMALL: dict[str, Any] = {"widths": (32, 64), "depths": (2, 4), "seeds": 1, "steps": 1}


def piece(family: str) -> Any:
    listed = mup_families.pieces(mup_families.Parameters(**SMALL))
    assert {one["family"] for one in listed} == set(FAMILIES)
    return next(one for one in listed if one["family"] == family)


def test_a_piece_is_what_the_plan_and_the_check_say() -> None:
    asked = piece("llama")
    found = mup_families.measure(asked)
    assert found["complete"] and found["departure"] < 1e-4 and found["refused"] == ""
    own = {"input": asked["embedding"]}
    direct = mup.coord_check(
        stock.factory(stock.configuration("llama"), positions=asked["length"]),
        help_text.next_byte(asked["batch_size"], asked["length"]),
        widths=(32, 64),
        depths=(2, 4),
        base=(32, 2),
        optimizer="adamw",
        lr=2.0**-7,
        steps=1,
        seeds=(0,),
        make_plan=lambda model, start: mup.plan(
            model, base=start, optimizer="adamw", multipliers=own
        ),
    )
    assert found["slopes"]["features, width"][0] == round(direct.slopes["width"].value, 3)
    assert found["slopes"]["output, depth"][0] == round(direct.output_slopes["depth"].value, 3)


def test_a_row_that_misses_a_branch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"]._replace(branch_ends=("*.o_proj",)))
    found = mup_families.measure(piece("llama"))
    assert not found["complete"]  # however little its feed-forward layers add at the start


def test_a_family_without_a_plan_says_why() -> None:
    found = mup_families.measure(piece("t5"))
    assert "plan T5EncoderModel" in found["refused"]
    listed = [piece("t5"), piece("llama")]
    columns, rows = mup_families.table(
        mup_families.reduce(mup_families.Parameters(), listed[:1], [found])
    )
    assert rows == [["t5", "adamw", "refused", "–", "–", "–"]] and len(columns) == 6
