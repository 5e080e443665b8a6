from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grsd.lab.checkpoints import opened
from grsd.lab.checkpoints.revisions import in_order, step_of

FAMILIES = (
    "step{}",
    "step_{}",
    "step-{}",
    "steps_{}",
    "checkpoint-{}",
    "checkpoint_{}",
    "checkpoint{}",
    "ckpt_{}",
    "ckpt-{}",
    "global_step{}",
    "iter_{:07d}",
    "iteration-{}",
    "model_step_{}",
    "ba{}",
    "ep1-ba{}",
    "epoch_{}",
    "epoch={}",
    "epoch=1-step={}",
    "step{}-tokens4B",
    "stage1-step{}-tokens5B",
    "stage2-ingredient1-step{}-tokens9B",
    "tokens{}B",
    "{}",
    "pythia-70m-step{}",
    "llama-7b-{}",
)
PLAIN = [f for f in FAMILIES if not f.startswith(("stage", "tokens"))]


@given(
    family=st.sampled_from(FAMILIES),
    numbers=st.lists(st.integers(0, 10**9), min_size=2, max_size=8, unique=True),
)
def test_a_family_sorts_by_its_number(family: str, numbers: list[int]) -> None:
    assert in_order(map(family.format, numbers)) == [family.format(n) for n in sorted(numbers)]


@given(pairs=st.lists(st.tuples(st.sampled_from(PLAIN), st.integers(0, 10**9)), max_size=8))
def test_mixed_families_sort_by_number_and_ties_by_name(pairs: list[tuple[str, int]]) -> None:
    numbers = {family.format(number): number for family, number in pairs}
    assert in_order(numbers) == sorted(numbers, key=lambda name: (numbers[name], name))
    assert all(step_of(name) == number for name, number in numbers.items())


@given(names=st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6))
def test_any_names_have_one_order(names: list[str]) -> None:
    ordered = in_order(names)
    assert sorted(ordered) == sorted(names) and in_order(reversed(names)) == ordered


def test_stages_epochs_and_units_go_first() -> None:
    for ordered in (
        [
            "stage1-step9-tokens1B",
            "stage1-step10-tokens1B",
            "stage2-ingredient1-step5-tokens1B",
            "stage2-ingredient2-step1-tokens1B",
            "main",
        ],
        ["epoch=0-step=900", "epoch=1-step=1000", "epoch=2-step=1100"],
        ["tokens900M", "tokens2B", "tokens1.5T"],
        ["best", "0", "checkpoint-500", "checkpoint-1500", "final"],
        ["step999", "step1000", "last", "main"],
    ):
        assert in_order(sorted(ordered)) == ordered
    assert [step_of(name) for name in ("best", "main", "epoch_3", "stage1-step7-tokens5B")] == [
        None,
        None,
        3,
        7,
    ]


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (("checkpoint-500", "checkpoint-1000", "checkpoint-1500"), "checkpoint-1500"),
        (("checkpoint-500", "checkpoint-1500", "best"), "checkpoint-1500"),
        (("step5", "step10", "final"), "final"),
        (("9", "10"), "10"),
    ],
)
def test_the_default_is_the_last(names: tuple[str, ...], last: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    model = opened.open_model(tmp_path)
    assert model.checkpoint().revision == model.revisions[-1] == last


def test_a_trainers_folder_ends_with_its_own_model(tmp_path: Path) -> None:
    """After training the folder itself holds a model: the last one, beside the checkpoints in it."""
    for name in ("checkpoint-500", "checkpoint-1000", "."):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    model = opened.open_model(tmp_path)
    assert model.revisions == ["checkpoint-500", "checkpoint-1000"]  # a configuration alone
    assert model.checkpoint().path == tmp_path / "checkpoint-1000"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert model.revisions == ["checkpoint-500", "checkpoint-1000", "main"]
    assert model.checkpoint().path == tmp_path
