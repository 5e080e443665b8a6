"""Heads on frozen features: closed forms against the operators and the flow of a whole net."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grsd.experiments import engine, frozen_features
from grsd.experiments.frozen_features import EXPERIMENT, Parameters, measure_of
from grsd.lab.checkpoints import suites
from grsd.lab.checkpoints.training import Preset
from grsd.spectrum import NTK, ClassLogits, TokenLogProb

T, WIDTH, CLASSES = 10, 6, 5


@pytest.fixture
def problem() -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(T, WIDTH, generator=generator, dtype=torch.float64)
    head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.float64)
    nn.init.normal_(head.weight, generator=generator)
    return h, head, torch.randint(0, CLASSES, (T,), generator=generator)


def test_both_operators_are_those_of_the_head(
    problem: tuple[torch.Tensor, nn.Linear, torch.Tensor],
) -> None:
    h, head, y = problem
    generator = torch.Generator().manual_seed(1)
    found = frozen_features.spectra(h, head.weight.detach(), y, generator)
    M = NTK(head, h[None], TokenLogProb(y[None]))
    K = NTK(head, h, ClassLogits(y))
    starts = {"error": M.error, "ones": torch.ones(T, dtype=torch.float64), "delta": K.error}
    for start, v in starts.items():
        operator = K if start == "delta" else M
        values, vectors = torch.linalg.eigh(operator.to_dense())
        weights = (vectors.T @ v) ** 2 * operator.inner_weight
        measure = measure_of(found, start)
        moments = [float((weights * values**k).sum()) for k in range(4)]
        np.testing.assert_allclose(measure.moments(4), moments, rtol=1e-10)
    np.testing.assert_allclose(
        found["eigenvalues"], torch.linalg.eigvalsh(M.to_dense()), atol=1e-12
    )
    assert found["loss"] == pytest.approx(float(M.error.mean()))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Parameters:
    monkeypatch.setenv("GRSD_CACHE", str(tmp_path))
    name = "mini-0.4m"
    shape = Preset(name, hidden=16, layers=1, heads=2, vocab_size=2048, lr=4e-3, batch_size=2)
    monkeypatch.setitem(suites.MINI, name, shape)
    suites.train(name, suites.of_suite(name), steps=2, batch_size=2)
    return Parameters(
        name, "step2", times=(0.0, 1e-3, 400.0, 1600.0), steps=(0, 2), size=1, length=8, batches=2
    )


def test_the_flow_obeys_its_operator_and_ends_as_it_must(small: Parameters) -> None:
    piece = EXPERIMENT.pieces(small)[0]
    start, soon, late, later = (one[0] for one in frozen_features.measure(piece)["moments"])
    # dL/dt = −⟨1, M 1⟩: one forward difference, off by half a step of the second derivative
    rate = (start["loss"] - soon["loss"]) / 1e-3
    assert rate == pytest.approx(measure_of(start, "ones").moments(2)[1], rel=1e-2)
    # e ~ 1/ct and λ ~ 1/ct² once all tokens are learned (8 of them, 16 features); to their logs
    assert late["loss"] < 0.2 < start["loss"]
    fall = np.log(late["eigenvalues"][-1] / later["eigenvalues"][-1]) / np.log(4)
    assert fall == pytest.approx(2, abs=0.2)
    # the kernel of the logits stands still
    np.testing.assert_allclose(late["delta"]["eigenvalues"], start["delta"]["eigenvalues"])


def test_the_trained_head_is_all_that_moves(small: Parameters) -> None:
    piece = EXPERIMENT.pieces(small)[-1]
    assert piece["kind"] == "head"
    first, last = frozen_features.measure(piece)["moments"]
    assert len(first) == len(last) == 2
    for a, b in zip(first, last, strict=True):
        assert a["delta"]["eigenvalues"] == b["delta"]["eigenvalues"]  # the features
        assert a["loss"] != b["loss"]
    # before any step it is the suite's own net: the same loss on the same tokens
    net = suites.build(suites.MINI[small.model], 0, torch.device("cpu"))
    x, y = frozen_features._batches(piece, 2)[1]
    with torch.no_grad():
        logits = net(input_ids=x, use_cache=False).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, y.flatten())
    assert first[1]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_run_has_a_row_per_null_and_time(small: Parameters) -> None:
    outcome = engine.run(EXPERIMENT, small)
    columns, rows = frozen_features.table(outcome.data)
    assert [row[:3] for row in rows] == [
        *(["flow", time, 2] for time in small.times),
        *(["head", step, 2] for step in small.steps),
    ]
    assert all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "big"}, "big"),
        ({"times": (1.0, 0.5)}, r"0\.5"),
        ({"steps": (0,)}, "steps"),
        ({"times": (-1.0, 1.0)}, "-1"),
        ({"batches": 0}, "0"),
    ],
)
def test_bad_parameters_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(**changed)
