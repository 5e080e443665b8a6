"""The experiment gpt2-coords: standard parametrization is the untouched model, and what is read is what enters the last norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grsd.experiments import gpt2_coords
from grsd.experiments.engine import find, run
from grsd.lab.data import help_text

SMALL: dict[str, Any] = {
    "widths": (64, 128, 256),
    "depths": (2, 4, 8),
    "base_width": 64,
    "base_depth": 2,
    "seeds": 1,
    "steps": 2,
    "batch": 2,
    "length": 8,
}


def test_sp_is_the_model_as_it_comes() -> None:
    """A model with σ = 0.02 everywhere and no multiplier, written out, has the same losses and
    norms at the start; μP at another size has not."""
    piece = next(
        q
        for q in gpt2_coords.pieces(gpt2_coords.Parameters(**SMALL))
        if (q["n"], q["L"], q["scheme"]) == (64, 8, "sp")
    )
    torch.manual_seed(0)
    model = gpt2_coords.factory(8)(64, 8)
    # the same draws as a plan's: parameter by parameter from one generator
    again = gpt2_coords.measure(piece)
    assert model.lm_head.weight is not model.transformer.wte.weight
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2]
    sizes = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in matrices:
                p.normal_(0.0, 0.02, generator=generator)
        seen: list[torch.Tensor] = []
        handle = model.transformer.ln_f.register_forward_pre_hook(
            lambda m, a, seen=seen: seen.append(a[0].detach())
        )
        loss = help_text.next_byte(2, 8)(model)
        handle.remove()
        sizes.append((float(seen[0].square().mean().sqrt()), float(loss.detach())))
    norms, losses = torch.tensor(sizes).T
    # one more draw of the same law: within four standard deviations of forty
    for value, law in ((again["norm"][0], norms), (again["losses"][0], losses)):
        assert abs(value - float(law.mean())) < 4 * float(law.std())
    mup = gpt2_coords.measure({**piece, "scheme": "mup"})["norm"][0]
    assert abs(mup - float(norms.mean())) > 4 * float(norms.std())


def test_both_schemes_are_one_at_the_base_and_sp_is_seen_to_grow(tmp_path: Path) -> None:
    data = run(find("gpt2-coords"), gpt2_coords.Parameters(**SMALL), cache=tmp_path).data
    at_base = [r for r in data["runs"] if (r["n"], r["L"]) == (64, 2)]
    assert at_base[0]["change"] == at_base[1]["change"] and len(at_base) == 2
    slopes = {s: {a: data["slopes"][s][a][-1] for a in ("n", "L")} for s in ("sp", "mup")}
    for axis in ("n", "L"):
        assert slopes["sp"][axis][0] > 0.4 and abs(slopes["mup"][axis][0]) < 0.3
    # the series that is drawn holds every size once a seed
    assert [n for n, _, _ in gpt2_coords.along(data, "mup", "n")] == [64, 128, 256]


def test_sizes_that_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="width is 96"):
        gpt2_coords.Parameters(widths=(64, 96))
    assert isinstance(gpt2_coords.factory(8)(64, 1), nn.Module)
