"""The experiment mup-norms: what is stored gives back the sizes that were measured, and its exponents hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grsd import results
from grsd.experiments import mup_norms
from grsd.experiments.engine import find, parameters, run
from grsd.mup import audit_update_norms

SMALL: dict[str, Any] = {
    "widths": (16, 32),
    "depths": (2, 4),
    "base_width": 16,
    "base_depth": 2,
    "seeds": 2,
    "slow_width": 16,
}


def test_the_stored_sizes_are_the_measured_ones(tmp_path: Path) -> None:
    asked = mup_norms.Parameters(**SMALL, optimizers=("sgd", "muon", "sso"), layers=(2,))
    outcome = run(find("mup-norms"), asked, cache=tmp_path)
    found = mup_norms.audit(outcome.data, 2)
    direct = audit_update_norms(
        mup_norms.network(2, base_depth=2),
        mup_norms.one_sample,
        widths=(16, 32),
        depths=(2, 4),
        base=(16, 2),
        optimizers=["sgd", "muon"],
        seeds=(0, 1),
    )
    for e in direct.exponents:
        if e.role != "output_bias":  # not stored; the rest rounded to four digits
            again = found[e.optimizer, e.role, e.quantity, e.axis]
            assert (
                again.measured.value == pytest.approx(e.measured.value, abs=2e-3)
                and again.wanted == e.wanted
            )
    assert [s.updates["sso"] != {} for s in mup_norms.sizes(outcome.data, 2) if s.width == 32] == [
        False,
        False,
    ]
    columns, rows = mup_norms.table(outcome.data)
    assert (
        len(columns) == 7 and len(rows) == 5 + 3 + 3 - 3
    )  # SSO at one width alone has no exponent in n
    with pytest.raises(ValueError, match="the result has no k = 1; it has 2"):
        mup_norms.sizes(outcome.data, 1)
    with pytest.raises(ValueError, match="optimizer is 'adam'; expected one of"):
        mup_norms.Parameters(optimizers=("adam",))


@pytest.mark.parametrize("k", [2, 1])
def test_every_exponent_of_the_stored_result_is_the_predicted_one(k: int) -> None:
    stored = results.load("mup-norms")
    assert {n for n, *_ in stored.data["k"][str(k)]["pieces"]} == {64, 128, 256, 512, 1024}
    assert {depth for _, depth, _ in stored.data["k"][str(k)]["pieces"]} == {4, 8, 16, 32, 64}
    found = mup_norms.audit(stored.data, k)
    assert found.failures == () and len(found.exponents) > 150
    other = mup_norms.audit({**stored.data, "k": {str(3 - k): stored.data["k"][str(k)]}}, 3 - k)
    assert {e.axis for e in other.failures} == {
        "depth"
    }  # the rules of the other kind of block are told apart


def test_the_net_goes_to_the_device_of_the_piece_and_the_sample_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (piece, *_) = mup_norms.pieces(mup_norms.Parameters(**SMALL, device="quantum"))
    with pytest.raises(RuntimeError, match="quantum"):
        mup_norms.measure(piece)
    assert mup_norms.one_sample(mup_norms.network(2)(16, 2).to("meta")).device.type == "meta"
    monkeypatch.setenv("GRSD_SCALE", "gpu")
    large = parameters(find("mup-norms"))
    assert large.device == "cuda" and max(large.widths) == 4096 and max(large.depths) == 256
