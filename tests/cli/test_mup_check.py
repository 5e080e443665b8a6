"""`grsd mup-check`: flat in μP, not flat in the control, and sentences for what it cannot do; `mup-plan`: the numbers of a plan, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from grsd.cli import main
from grsd.lab.data import help_text
from grsd.lab.nets import stock
from grsd.mup import coord_check

TINY = {
    "widths": "32,64,128",
    "depths": "2,4",
    "base": "32,2",
    "steps": 2,
    "seeds": 2,
    "batch-size": 2,
    "length": 16,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def check(model: str, *flags: str, **options: Any) -> Result:
    chosen = TINY | {key.replace("_", "-"): value for key, value in options.items()}
    words = [word for key, value in chosen.items() for word in (f"--{key}", str(value))]
    return CliRunner().invoke(main, ["mup-check", model, *words, *flags])


def refusal(result: Result) -> str:
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def test_mup_is_flat_and_prints_plan_sizes_and_slopes() -> None:
    # two depths that are far apart: an interval that is narrow enough to decide
    found = check("gpt_neox", depths="2,8", seeds=6)
    assert found.exit_code == 0, found.output
    for words in (
        "width ratio r_n = 4, depth ratio r_L = 4, k ≥ 2",
        "contributions, measured: adds 0.25 to 0.25 (wanted 0.25); gives 0.25 to 0.25",
        "block multiplier α",
        "change of features, step 1",
        "muon_kimi, mup: flat",
        "change of features against width",
    ):
        assert words in found.stdout
    rows = [line.split()[:2] for line in found.stdout.splitlines() if line[:1].isdigit()]
    assert rows == [["32", "2"], ["32", "8"], ["64", "2"], ["128", "2"]]  # the base once


def test_the_control_is_not_flat_and_names_conditions() -> None:
    found = check("gpt_neox", "--sp", seeds=2)
    assert found.exit_code == 1, found.output
    assert "muon_kimi, sp: not flat" in found.stdout and "block multiplier" not in found.stdout
    # two powers that hold at any size: Kimi's factor √n on the hidden matrices, and AdamW's n on the head
    assert "C2.2 is broken: the update norm of hidden goes like width^+0.5" in found.stdout
    assert "C2.1 is broken: the update norm of output goes like width^+1.0" in found.stdout


def test_json_holds_what_the_library_finds() -> None:
    found = check("llama", "--sp", "--json", optimizer="adamw", lr=0.002, seeds=2)
    assert found.exit_code == 1, found.output
    data = json.loads(found.stdout)
    direct = coord_check(
        stock.factory(stock.configuration("llama"), positions=16),
        help_text.next_byte(2, 16),
        widths=(32, 64, 128),
        depths=(2, 4),
        base=(32, 2),
        optimizer="adamw",
        lr=0.002,
        steps=2,
        seeds=(0, 1),
        parametrization="sp",
    )
    assert (data["verdict"], data["optimizer"], data["parametrization"]) == (
        "not flat",
        "adamw",
        "sp",
    )
    for key, fitted in (("slopes", direct.slopes), ("first", direct.first)):
        assert data[key] == {
            axis: pytest.approx([s.value, s.low, s.high]) for axis, s in fitted.items()
        }
    named = {
        (f["role"], f["quantity"], f["axis"], f["condition"], f["wanted"]) for f in data["findings"]
    }
    assert (
        named
        == {(f.role, f.quantity, f.axis, f.condition, f.wanted) for f in direct.findings}
        != set()
    )
    assert "hidden weights" in data["plan"]


def test_json_of_a_slope_without_an_interval_and_of_a_run_that_diverged() -> None:
    flat = json.loads(check("gpt2", "--json", seeds=1).stdout)
    value, low, high = flat["slopes"]["depth"]  # two depths, one seed: a line through two points
    assert flat["verdict"] == "undecided" and abs(value) < 0.25 and low is None and high is None
    assert all(row["right"] for row in flat["contributions"]) and flat["contributions"]
    assert flat["slopes"]["width"][1] is not None
    lost = check("gpt_neox", "--sp", "--json", optimizer="sgd", lr=1e30, depths=2)
    assert lost.exit_code == 1 and json.loads(lost.stdout)["verdict"] == "diverged"


def test_a_folder_with_a_configuration_is_a_model(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=24, n_head=3, n_layer=1, n_inner=48).save_pretrained(tmp_path)
    found = check(
        str(tmp_path), widths=" 16, 32,", depths=2, base="16,2", optimizer="adamw", lr=0.002
    )
    assert found.exit_code in (0, 1)
    assert found.stderr == "mup-check: 0 of 12 (forward passes of 4 runs)\n"
    assert [line.split()[:2] for line in found.stdout.splitlines() if line[:1].isdigit()] == [
        ["16", "2"],
        ["32", "2"],
    ]
    assert "the width is a multiple of 8 (num_attention_heads = 3 at 24" in refusal(
        check(str(tmp_path), widths="16,20")
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widths": "32,a"}, "'32,a' is not a list of whole numbers between commas"),
        ({"depths": "2;4"}, "'2;4' is not a list of whole numbers"),
        ({"base": "32"}, "--base 32: expected WIDTH,DEPTH"),
        ({"base": "32,2,1"}, "--base 32,2,1: expected WIDTH,DEPTH"),
        (
            {"widths": "32,40"},
            "width 40 and depth 4: sizes are positive, and the width is a multiple of 16",
        ),
        ({"depths": "0,2"}, "positive sizes"),
        ({"widths": "64", "depths": "4"}, "two widths or two depths are needed"),
        ({"widths": "", "depths": ""}, "two widths or two depths are needed"),
        ({"steps": 0}, "Invalid value for '--steps': 0 is not in the range"),
        ({"seeds": 0}, "--seeds 0 must be positive"),
        ({"length": 0}, "--length 0"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"lr": 0}, "lr is 0.0; it must be positive and finite"),
        ({"optimizer": "adam"}, "no rule for the optimizer 'adam'"),
        ({"layers": 0}, "at least one layer, got k = 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    assert words in refusal(check("gpt2", **options))


def test_a_model_that_is_not_there_is_refused() -> None:
    for name in ("nothing-here", "./nowhere"):
        assert f"no configuration '{name}': expected gpt2, gpt_neox, llama, mistral" in refusal(
            check(name)
        )


def test_what_is_said_of_a_model_reaches_the_plan() -> None:
    missed = check("gpt2", branch_ends="*.attn.c_proj", seeds=1, depths=2, widths="32,64")
    assert missed.exit_code == 1 and "gives 0.5" in missed.stdout
    assert "roles has the pattern 'nothing.*'" in refusal(check("gpt2", roles="nothing.*=input"))
    assert "'wte' is not of the form NAME=VALUE" in refusal(check("gpt2", roles="wte"))


def test_help_has_examples_and_exit_codes() -> None:
    shown = CliRunner().invoke(main, ["mup-check", "--help"])
    assert shown.exit_code == 0
    for words in (
        "--json",
        "Examples:",
        "Exit code 0 when the check is flat and the plan complete",
        "--sp",
    ):
        assert words in shown.stdout


# --- mup-plan -----------------------------------------------------------------------------------------------


def planned(*words: str) -> Result:
    return CliRunner().invoke(main, ["mup-plan", "llama", *words])


def test_the_plans_options_reach_the_groups() -> None:
    """Against rules written out: a Llama of 4 times the width and depth, and other budgets."""
    size = ["--width", "256", "--depth", "8", "--base", "64,2", "--lr", "0.01"]
    usual = ["--weight-decay", "0.1", "--no-decay", "gains,biases,embeddings", "--eps", "1e-8"]
    told = json.loads(planned(*size, *usual, "--other-ratio", "0.1", "--json").stdout)
    assert (told["r_n"], told["r_L"]) == (4.0, 4.0)
    groups = {g["role"]: g for g in told["groups"]}
    # Muon, Kimi's factor: η/√r_n, λ √r_n; AdamW at a tenth of η, ε/r_n, and in the stack ε/(r_n r_L)
    assert groups["hidden"]["lr"] == pytest.approx(0.005)
    assert groups["hidden"]["weight_decay"] == pytest.approx(0.2)
    assert groups["output"]["lr"] == pytest.approx(0.001)
    assert groups["output"]["eps"] == pytest.approx(0.25e-8)
    assert groups["hidden_bias"]["eps"] == pytest.approx(0.0625e-8)
    none = {role for role, g in groups.items() if g["weight_decay"] == 0}
    assert (
        none == {"input", "hidden_bias", "input_bias"} and groups["output"]["weight_decay"] == 0.1
    )
    # ε as CompleteP's code had it, decay independent of η, and factors of one's own
    more = ["--eps-rule", "completep", "--wd-rule", "independent", "--multipliers", "input=25"]
    told = json.loads(
        planned(*size, "--weight-decay", "1e-4", "--eps", "1e-8", *more, "--json").stdout
    )
    groups = {g["role"]: g for g in told["groups"]}
    assert {g["eps"] for g in told["groups"] if g["optimizer"] == "adamw"} == {0.0625e-8}
    for g in told["groups"]:
        assert g["lr"] * g["weight_decay"] == pytest.approx(1e-4)
    assert told["factors"]["model.embed_tokens"] == 25
    # four times the batch, twice the tokens: η √4, and ηλ 4/2
    told = json.loads(
        planned(*size, "--weight-decay", "0.1", "--batch", "4", "--horizon", "2", "--json").stdout
    )
    (hidden,) = (g for g in told["groups"] if g["role"] == "hidden")
    assert hidden["lr"] == pytest.approx(0.01) and hidden["weight_decay"] == pytest.approx(0.2)


def test_no_weights_are_made_and_the_table_is_printed() -> None:
    """Seven billion parameters in float32 are 27 GB, which no test machine has to spare."""
    shown = planned("--width", "4096", "--depth", "32", "--lr", "0.01")
    assert shown.exit_code == 0, shown.output
    for words in (
        "r_n = 64, depth ratio r_L = 16",
        "model.layers.*.mlp.down_proj",
        "1/r_n = 0.01562",
    ):
        assert words in shown.stdout
    for flags, words in (
        (("--no-decay", "heads"), "no_decay is 'heads'"),
        (("--multipliers", "input=big"), "is not of the form NAME=NUMBER"),
        (("--base", "64"), "expected WIDTH,DEPTH"),
        (("--eps-rule", "mine"), "eps_rule is 'mine'"),
    ):
        assert words in refusal(planned(*flags))
