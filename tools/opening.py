"""Draw the front page's opening from the stored result `protocol-mini`: book/_assets/opening.svg.

    python tools/opening.py

One bar an octave of the eigenvalue axis, as high as the error energy that Lanczos found there, at
six checkpoints of a language model. The bars move by style sheet, without a script; a reader who
asks for less motion, and a printer, see the last checkpoint and the outline of the first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from grsd import results
from grsd.experiments.protocol import MINI

TARGET = Path(__file__).parents[1] / "book" / "_assets" / "opening.svg"
WIDE, HIGH, LEFT, FLOOR, TOP = 640, 300, 64, 240, 46
SECONDS = 15  # one round; a checkpoint stands for two thirds of its share
FIRST, LAST = -5, 6  # octaves shown; the others hold less than a thousandth of the energy
HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-size="13" '
    f'font-family="DejaVu Sans, sans-serif"><rect width="{WIDE}" height="{HIGH}" fill="#fff"/>'
)
BASE = (
    ".bar{fill:#0072b2;transform-box:fill-box;transform-origin:bottom}"
    ".first{fill:none;stroke:#8a939c;stroke-dasharray:4 3}.word{font-weight:600}"
)
RULES = f".bar,.word{{animation:{SECONDS}s infinite}}"


def profiles() -> list[tuple[str, float, dict[int, float]]]:
    """(step, loss in nats, {octave: energy}) of the followed model, in the order of training."""
    rows = MINI.batch_size * MINI.length
    wanted = {"model": MINI.followed[0], "targets": "text", "rows": rows, "start": "error"}
    found = []
    for revision in MINI.revisions:
        cell = next(
            c
            for c in results.load("protocol-mini").data["cells"]
            if c["revision"] == revision and all(c[key] == wanted[key] for key in wanted)
        )
        found.append((revision.removeprefix("step"), cell["loss"], octaves(cell["profile"])))
    return found


def octaves(profile: dict[str, Any]) -> dict[int, float]:
    """Energy from 2^k to 2^(k+1), by k."""
    start = round(math.log2(profile["edges"][0]))
    return {start + k: energy for k, energy in enumerate(profile["energies"])}


def draw(found: list[tuple[str, float, dict[int, float]]]) -> str:
    """The picture as SVG: outline of the first profile, moving bars, a line of words each."""
    highest = max(max(energies.values()) for _, _, energies in found)
    step = (WIDE - LEFT - 16) / (LAST - FIRST)
    marks, rules = [], [RULES]
    for k in range(FIRST, LAST):
        heights = [(FLOOR - TOP) * energies.get(k, 0.0) / highest for _, _, energies in found]
        x, most = LEFT + step * (k - FIRST), max(*heights, 1e-3)
        box = f'x="{x + 2:.1f}" width="{step - 4:.1f}"'
        marks.append(f'<rect class="first" {box} {_tall(heights[0])}/>')
        # a bar of the greatest height, scaled to the last checkpoint's unless it moves
        last = f'style="transform:scaleY({heights[-1] / most:.4f})"'
        marks.append(f'<rect id="b{k - FIRST}" class="bar" {box} {_tall(most)} {last}/>')
        rules.append(
            _moves(f"b{k - FIRST}", [f"transform:scaleY({h / most:.4f})" for h in heights])
        )
        power = f'2<tspan dy="-5" font-size="9">{str(k).replace("-", "−")}</tspan>'
        marks.append(f'<text x="{x:.1f}" y="{FLOOR + 18}" text-anchor="middle">{power}</text>')
    for n, (name, loss, energies) in enumerate(found):
        said = f"step {name}: loss {loss:.2f} nats, error energy {sum(energies.values()):.1f}"
        seen = f'style="opacity:{int(n == len(found) - 1)}"'
        marks.append(f'<text id="w{n}" class="word" x="{LEFT}" y="24" {seen}>{said}</text>')
        rules.append(_moves(f"w{n}", [f"opacity:{int(m == n)}" for m in range(len(found))], 0.99))
    style = f"{BASE}@media (prefers-reduced-motion:no-preference){{{''.join(rules)}}}"
    return f"{HEAD}<style>{style}</style>{''.join(marks)}{_axes(found[0][0])}</svg>\n"


def _tall(height: float) -> str:
    return f'y="{FLOOR - height:.2f}" height="{height:.2f}"'


def _moves(name: str, states: list[str], stands: float = 0.67) -> str:
    """A rule that takes an element through its states and back to the first."""
    share = 100 / len(states)
    frames = [f"{share * n:.1f}%,{share * (n + stands):.1f}%{{{s}}}" for n, s in enumerate(states)]
    return (
        f"@keyframes {name}{{{''.join(frames)}100%{{{states[0]}}}}}#{name}{{animation-name:{name}}}"
    )


def _axes(first: str) -> str:
    middle = (FLOOR + TOP) // 2
    return (
        f'<path d="M{LEFT},{TOP}V{FLOOR}H{WIDE - 16}" fill="none" stroke="#333"/>'
        f'<text x="{(LEFT + WIDE) // 2}" y="{HIGH - 14}" text-anchor="middle">'
        "eigenvalue λ of the training operator</text>"
        f'<text transform="rotate(-90 24 {middle})" x="24" y="{middle}" text-anchor="middle">'
        "error energy per octave</text>"
        f'<text x="{WIDE - 16}" y="24" text-anchor="end" fill="#555">dashed: step {first}</text>'
    )


if __name__ == "__main__":
    TARGET.write_text(draw(profiles()), encoding="utf-8")
