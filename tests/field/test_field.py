"""Every cell of the field table is exact or refused with a remedy; what judges the cells is shown faults and a null."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grsd.experiments import engine, field
from grsd.experiments.field_settings import SETTINGS, prepare
from grsd.lab.nets.tiny import ARCHITECTURES
from grsd.spectrum import NTK
from tests.cases import dense

from .conftest import KINDS, sample


def test_a_cell_is_exact_or_refused(architecture: str, setting: str) -> None:
    asked = field.Parameters((architecture,), (setting,))
    outcome = engine.run(field.EXPERIMENT, asked)
    cell = outcome.data["rows"][architecture]["cells"][setting]
    why = [outcome.data["reasons"][k] for k in cell.get("reasons", {}).values()]
    assert cell["status"] in ("exact", "refused", "absent"), why


def test_the_sample_has_every_setting_and_every_kind() -> None:
    cells = sample()
    assert {setting for _, setting in cells} == {*SETTINGS}
    assert {ARCHITECTURES[name].kind for name, _ in cells} == {*KINDS}
    assert len(ARCHITECTURES) >= 45


class Dropped(NTK):
    """The share of one layer, a bias with few entries, is missing."""

    def __init__(self, model: nn.Module, *args: Any, **how: Any) -> None:
        names = [name for name, _ in model.named_parameters()]
        missing = next(name for name in names if name.endswith("mlp.c_proj.bias"))
        super().__init__(model, *args, parameters=[n for n in names if n != missing], **how)


class Scaled(NTK):
    """Every product is one per cent too large."""

    def __matmul__(self, u: Tensor) -> Tensor:
        return 1.01 * super().__matmul__(u)


class Crossless(NTK):
    """Only products with single vectors are right."""

    def to_dense(self) -> Tensor:
        return super().to_dense().diagonal().diag()


class Careless(NTK):
    """The model has another buffer or weight afterwards."""

    def __init__(self, model: nn.Module, *args: Any, **how: Any) -> None:
        super().__init__(model, *args, **how)
        next(model.parameters()).data.add_(1e-3)


class Raw(NTK):
    """A library's error."""

    def __init__(self, *args: Any, **how: Any) -> None:
        torch.zeros(2) @ torch.zeros(3)


def hint(words: str) -> type[NTK]:
    """A refusal of this package with these words."""

    class Refused(NTK):
        def __init__(self, *args: Any, **how: Any) -> None:
            source = compile(f"raise ValueError({words!r})", field.__file__, "exec")
            exec(source)

    return Refused


PLANTED: dict[str, tuple[Callable[..., Any], str]] = {
    "null": (NTK, "exact"),
    "a layer is missing": (Dropped, "wrong"),
    "scaled": (Scaled, "wrong"),
    "blocks": (Crossless, "wrong"),
    "the model is changed": (Careless, "wrong"),
    "a library's error": (Raw, "raw"),
    "no remedy": (hint("layer 'a' has dropout"), "raw"),
    "a remedy": (hint("layer 'a' has dropout (p = 0.1). Call model.eval() first"), "refused"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_faults_are_seen_and_the_null_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted, status = PLANTED[name]
    case = prepare("gpt2", "sdpa")
    J, eps = field.truth(case)
    monkeypatch.setattr(field, "NTK", planted)
    found = field.judge(case, J, field.tolerance(eps, J.shape[1]), "auto", 1)
    assert found["status"] == status, found


@pytest.mark.parametrize("setting", ["bfloat16", "autocast"])
def test_a_missing_layer_is_seen_in_sixteen_bits(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = prepare("gpt2", setting)
    J, eps = field.truth(case)
    monkeypatch.setattr(field, "NTK", Dropped)
    assert field.judge(case, J, field.tolerance(eps, J.shape[1]), "auto", 1)["status"] == "wrong"


def test_the_coarsest_arithmetic_is_that_of_what_carries_a_gradient() -> None:
    """A norm in float32 counts, whatever the weights are; a table of angles in float32 does not."""

    def eps(name: str, setting: str) -> float:
        return field.truth(prepare(name, setting))[1]

    kinds = {torch.float64: ("gpt_neox", "sdpa"), torch.float32: ("llama", "sdpa")}
    kinds |= {torch.bfloat16: ("gpt2", "autocast")}
    for dtype, cell in kinds.items():
        assert eps(*cell) == torch.finfo(dtype).eps


def test_the_truth_is_that_of_the_other_oracle() -> None:
    case = prepare("gpt2", "ignored")
    J, _ = field.truth(case)
    other = dense(case.plain, case.inputs, case.observable)
    assert float((J @ J.T - other).norm() / other.norm()) < 1e-13
