"""Published models, exactly: a tiny checkpoint against its dense float64 Jacobian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from grsd.experiments import engine, published
from grsd.experiments.published import EXPERIMENT, SHELLS, Parameters
from grsd.lab.checkpoints import opened
from grsd.lab.checkpoints.suites import Suite
from grsd.lab.data import corpora
from grsd.spectrum import SpectralMeasure, Tridiagonal
from grsd.spectrum.measure import FLOOR
from tests.lab.cases import write_texts

LENGTH = 12


@pytest.fixture
def piece(suite: Suite, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "words.txt"
    text.write_text("\n".join(p.read_text() for p in write_texts(tmp_path / "docs")))
    checkpoint = suite.path(opened.revisions_in(suite.root)[-1])
    asked = Parameters((str(checkpoint),), (str(text),), length=LENGTH, batches=(2, 1), steps=8)
    return EXPERIMENT.pieces(asked)[0]


def tokens(piece: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    corpus = corpora.open_corpus(piece["path"], opened.load(piece["model"]).tokenizer)
    return next(iter(corpus.batches(1, piece["size"], LENGTH, 0, "all")))


def dense(piece: dict[str, Any], net: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """M by one backward pass a row in float64, and e."""
    x, y = tokens(piece)
    logits = net(input_ids=x, use_cache=False).logits.flatten(0, 1)
    rows = -cross_entropy(logits, y.flatten(), reduction="none")
    weights = list(net.parameters())
    jacobian = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(row, weights, retain_graph=True)])
            for row in rows
        ]
    )
    return (jacobian @ jacobian.T).detach() / len(rows), -rows.detach()


def change_along_the_gradient(piece: dict[str, Any]) -> float:
    """‖P J g‖² per token by central differences in float64; P takes out the mean of a token."""
    net = opened.load(piece["model"], dtype=torch.float64).model
    x, y = tokens(piece)
    weights = list(net.parameters())

    def logits() -> torch.Tensor:
        return net(input_ids=x, use_cache=False).logits.flatten(0, 1)

    gradient = torch.autograd.grad(cross_entropy(logits(), y.flatten()), weights)
    step, ends = 1e-5, []  # errors h² of the third derivative and eps/h: both below 1e-8
    with torch.no_grad():
        for sign in (1, -2):  # to +h, then to −h
            for weight, g in zip(weights, gradient, strict=True):
                weight.add_(g, alpha=sign * step)
            ends.append(logits())
    change = (ends[0] - ends[1]) / (2 * step)
    change = change - change.mean(-1, keepdim=True)
    return float(change.square().sum() / y.numel())


def test_a_piece_is_the_measure_of_the_dense_jacobian(piece: dict[str, Any]) -> None:
    data = published.measure(piece)
    M, e = dense(piece, opened.load(piece["model"], dtype=torch.float64).model)
    values, vectors = torch.linalg.eigh(M)
    # Weyl: an eigenvalue moves by at most the rounding of M, which the floor of a measure bounds
    slack = FLOOR * data["eps"] * float(values[-1])
    assert np.abs(np.array(data["eigenvalues"]) - values.numpy()).max() < slack
    truth = SpectralMeasure.exact(values, (vectors.T @ e) ** 2 / len(e), semidefinite=True)
    found = published.measure_of(data)
    assert found.mass == pytest.approx(truth.mass, rel=1e-5)
    for k in range(1, 4):  # moments, which neighbours that mix do not change
        assert found.moments(4)[k] == pytest.approx(truth.moments(4)[k], rel=1e-4)

    # one number by three routes: ⟨1, M 1⟩, the gradient of the loss, and ⟨δ, K δ⟩
    delta = Tridiagonal.from_json(data["delta"])
    assert data["rate"] == pytest.approx(float(M.sum() / len(e)), rel=1e-4)
    assert data["gradient"] == pytest.approx(data["rate"], rel=1e-4)
    assert delta.mass * delta.alphas[0] == pytest.approx(data["gradient"], rel=1e-4)

    # δ on centred logits: the second moment is the length of their change along the gradient
    assert delta.mass * (delta.alphas[0] ** 2 + delta.betas[0] ** 2) == pytest.approx(
        change_along_the_gradient(piece), rel=1e-4
    )

    # the bounds of eight Lanczos steps hold what is exact
    rough = Tridiagonal.from_json(data["lanczos"]).measure().shells(SHELLS)
    exact, slack = found.shells(SHELLS), data["eps"] * found.mass
    assert (exact.energies >= rough.lower - slack).all()
    assert (exact.energies <= rough.upper + slack).all()


def test_gradients_of_tokens_bound_the_top_of_K(piece: dict[str, Any]) -> None:
    net = opened.load(piece["model"], dtype=torch.float64).model
    x, y = tokens(piece)
    logits = net(input_ids=x, use_cache=False).logits.flatten(0, 1)
    centred = logits - logits.mean(-1, keepdim=True)
    delta = (
        torch.nn.functional.one_hot(y.flatten(), logits.shape[1]) - logits.softmax(-1)
    ).detach()
    # the columns of Δ, each a token's own block, of length one; Q = Δᵀ J, row by row
    unit = delta / delta.norm(dim=1, keepdim=True)
    rows = (unit * centred).sum(1)
    J = [torch.autograd.grad(row, list(net.parameters()), retain_graph=True) for row in rows]
    Q = torch.stack([torch.cat([g.flatten() for g in one]) for one in J])
    data = published.measure(piece)
    bound = float(torch.linalg.matrix_norm(Q, 2) ** 2 / len(rows))
    assert data["samples_top"] == pytest.approx(bound, rel=1e-4)
    # below the largest eigenvalue, and above every quotient inside the span of Δ
    delta_line = Tridiagonal.from_json(data["delta"])
    assert data["samples_top"] <= delta_line.measure().nodes[-1] * (1 + 1e-4)
    assert data["samples_top"] >= delta_line.alphas[0] * (1 - 1e-4)


def test_a_killed_piece_goes_on_from_its_columns(
    piece: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "COLUMNS", 5)
    piece = {**piece, "lanczos": 0, "delta": 0}
    made: list[int] = []
    columns = published._columns

    def dies(M: Any, start: int) -> dict[str, Any]:
        if start == 10 and 10 not in made:
            made.append(start)
            raise KeyboardInterrupt
        made.append(start)
        return columns(M, start)

    monkeypatch.setattr(published, "_columns", dies)
    with pytest.raises(KeyboardInterrupt):
        published.measure(piece)
    resumed = published.measure(piece)
    assert made == [0, 5, 10, 10]  # what was whole was read
    M, _ = dense(piece, opened.load(piece["model"], dtype=torch.float64).model)
    slack = FLOOR * resumed["eps"] * float(torch.linalg.eigvalsh(M)[-1])
    assert np.abs(np.array(resumed["eigenvalues"]) - torch.linalg.eigvalsh(M).numpy()).max() < slack


def test_a_first_token_shifts_the_window(piece: dict[str, Any]) -> None:
    tokenizer = opened.load(piece["model"]).tokenizer
    piece = {**piece, "lanczos": 0, "delta": 0}
    net = opened.load(piece["model"], dtype=torch.float64).model
    x, _ = tokens(piece)
    whole = torch.cat([torch.full_like(x[:, :1], tokenizer.bos_token_id), x], dim=1)
    logits = net(input_ids=whole[:, :-1], use_cache=False).logits.flatten(0, 1)
    loss = float(cross_entropy(logits, x.flatten()).detach())
    assert published.measure({**piece, "bos": 1})["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_variants_change_what_they_say(piece: dict[str, Any]) -> None:
    text, *others = (
        published.measure({**piece, "variant": variant, "lanczos": 0, "delta": 0})
        for variant in ("published", "twin", "shuffled", "rounded")
    )
    vocabulary = opened.load(piece["model"]).vocab_size
    twin, shuffled, noisy = others
    assert abs(twin["loss"] - np.log(vocabulary)) < 0.2  # nothing is known before training
    assert twin["eigenvalues"] != text["eigenvalues"]
    assert shuffled["loss"] != text["loss"]
    assert 0 < abs(noisy["loss"] - text["loss"]) < 0.5


def test_the_noise_is_that_of_a_four_bit_rounding() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.LayerNorm(256))
    before = [p.detach().clone() for p in net.parameters()]
    published.rounding(net, torch.Generator().manual_seed(1))
    moved = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    assert all(not change.any() for change in moved[1:])  # vectors are stored in full
    blocks = before[0].reshape(-1, 32)
    step = (blocks.amax(1) - blocks.amin(1)) / 15
    error = moved[0].reshape(-1, 32) / step[:, None]
    # uniform on ± ½: standard deviation 1/√12, seen on 16,384 numbers to 1 %
    assert float(error.abs().max()) <= 0.5 + 1e-5
    assert float(error.std()) == pytest.approx(12**-0.5, rel=0.02)
    # rounding to the grid of the block itself gives no more
    grid = (blocks / step[:, None]).round() * step[:, None]
    assert float((grid - blocks).std()) == pytest.approx(float(moved[0].std()), rel=0.05)


def test_pieces_name_weights_and_text(piece: dict[str, Any], tmp_path: Path) -> None:
    assert len(piece["weights"]) == len(piece["text"]) == 64
    other = tmp_path / "other.txt"
    other.write_text("x" * 5000)
    asked = Parameters((piece["model"],), (str(other),), length=LENGTH, batches=(2, 1))
    listed = EXPERIMENT.pieces(asked)
    assert listed[0]["text"] != piece["text"] and listed[0]["weights"] == piece["weights"]
    assert [p["variant"] for p in listed[:4]] == list(published.VARIANTS)
    assert all(p["variant"] in published.VARIANTS[:2] for p in listed[4:])
    assert [bool(p["lanczos"]) for p in listed] == [True] + [False] * (len(listed) - 1)


def test_a_run_reduces_to_groups(piece: dict[str, Any]) -> None:
    asked = Parameters(
        (piece["model"],), (piece["path"],), ("published", "twin"), LENGTH, (1,), (2,), 4
    )
    outcome = engine.run(EXPERIMENT, asked)
    columns, rows = published.table(outcome.data)
    assert len(rows) == 2 * len(published.STARTS) and len(columns) == len(rows[0])
    group = outcome.data["groups"][0]
    members = [one for one in outcome.data["pieces"] if one["variant"] == "published"]
    assert group["batches"] == len(members) == 2
    assert group["loss"] == pytest.approx(np.mean([m["loss"] for m in members]), rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"variants": ("quiet",)}, "quiet"),
        ({"sizes": (2, 1)}, r"\(2, 1\)|2"),
        ({"batches": (3,)}, r"batches has 1 numbers"),
        ({"steps": 0}, "0"),
        ({"position": -1}, "-1"),
        ({"bos": 2}, "2"),
    ],
)
def test_bad_parameters_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(**changed)
