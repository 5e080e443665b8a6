"""The experiment figures-3-6: one piece against a training written out by hand, and an archive against the arrays in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grsd.experiments import figures_3_6
from grsd.experiments.engine import find, run
from grsd.lab.data import archive

SMALL: dict[str, Any] = {"depths": (2, 3), "width": 32, "samples": 6, "steps": 2, "seeds": 1}


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Ten random images of each of three classes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", train_images=pixels, train_labels=np.repeat([0, 1, 5], 10))
    return str(tmp_path / "few.npz")


def test_a_sample_of_the_archive_is_its_pixels(images: str) -> None:
    """Every drawn image is one of the archive, of the class that its target says, standardized."""
    with np.load(images) as given:
        pixels, labels = (
            given["train_images"].transpose(0, 3, 1, 2).astype(float),
            given["train_labels"],
        )
    drawn = archive.two_classes(Path(images), (0, 5), 8, seed=3)
    assert sorted(drawn.targets.tolist()) == [-1.0] * 4 + [1.0] * 4
    # standardizing is affine by channel: undo it on two pixels, and look the rest up
    for x, y in zip(drawn.inputs.numpy(), drawn.targets, strict=True):
        fits = [
            k
            for k in range(30)
            if np.corrcoef(np.ravel(pixels[k][0]), np.ravel(x[0]))[0, 1] > 1 - 1e-9
        ]
        assert len(fits) == 1 and labels[fits[0]] == (0 if y < 0 else 5)
    assert drawn.inputs.square().mean((0, 2, 3)).numpy() == pytest.approx(np.ones(3))


def test_an_archive_that_is_none_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"other.npz has \['images'\]"):
        archive.two_classes(tmp_path / "other.npz", (0, 1), 2, seed=0)
    with pytest.raises(FileNotFoundError, match=r"no .nowhere\.npz. here"):
        archive.find("nowhere.npz")


def test_a_piece_is_gradient_descent_written_out(images: str, tmp_path: Path) -> None:
    """Equation 38 with its multipliers inside, rates of Table 4 by hand, and the ratios from the
    matrices; in float32 the two differ by rounding, 1e-7 a step, amplified by at most 1e3 here."""
    p = figures_3_6.Parameters(**SMALL, images=images, rates=(0.002,))
    outcome = run(find("figures-3-6"), p, cache=tmp_path)
    got = outcome.data["runs"][1]
    L, n = 3, 32
    x, y = figures_3_6.data(images, 6)
    model, _ = figures_3_6.build(x.shape[1], n, L, 0)
    read, *hidden, head = [w.detach().clone().requires_grad_() for w in model.parameters()]
    started, moved = hidden[-1].detach().clone(), []
    for _ in range(3):
        h = torch.relu(x @ read.T)
        for k in range(L):
            h = h + torch.relu(torch.relu(h @ hidden[2 * k].T) @ hidden[2 * k + 1].T) / L
        out = (h @ head.T)[:, 0] / n
        loss = torch.nn.functional.softplus(-(2 * y - 1) * out).mean()
        grads = torch.autograd.grad(loss, [read, *hidden, head])
        with torch.no_grad():
            before = hidden[-1].clone()
            rates = [0.002 * n] + [0.002 * L] * (2 * L) + [0.002 * n]
            for w, g, rate in zip([read, *hidden, head], grads, rates, strict=True):
                w -= rate * g
            moved.append((float(loss), before, hidden[-1].clone()))
    assert [r["loss"] for r in got["reads"]] == pytest.approx([m[0] for m in moved], rel=1e-4)

    def ratio(a: torch.Tensor, b: torch.Tensor) -> float:
        norms = [float(torch.linalg.matrix_norm(w, ord=2)) for w in (b, a, b - a)]
        return norms[0] / (norms[1] + norms[2])

    assert [r["weights"]["last, W2"][0] for r in got["reads"]] == pytest.approx(
        [ratio(*m[1:]) for m in moved], rel=1e-4
    )
    whole = got["whole"]["weights"]["last, W2"][0]
    assert whole == pytest.approx(ratio(started, moved[-1][2]), rel=1e-4)
    # what the chapter draws: the smallest over layers and times
    least = figures_3_6.series(outcome.data, 0.002)
    every = [v[0] for r in got["reads"] for v in r["weights"].values()]
    assert least["depths"] == [2, 3] and least["F.1, weights"][1] == [min(every)]
    assert outcome.data["images"]["sha256"] == archive.fingerprint(images)


def test_a_small_step_hides_a_cancellation_and_a_large_one_shows_it(
    images: str, tmp_path: Path
) -> None:
    """The floor of F.1: near one at a small rate whatever happens; with room at a large one."""
    p = figures_3_6.Parameters(**SMALL, images=images, rates=(1e-5, 0.01))
    data = run(find("figures-3-6"), p, cache=tmp_path).data
    small, large = (np.min(figures_3_6.series(data, r)["F.1, weights, floor"]) for r in p.rates)
    assert small > 0.99 and large < 0.95
