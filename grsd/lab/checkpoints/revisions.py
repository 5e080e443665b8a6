"""The order of checkpoints by their names: what trainers and published suites call them.

The names are those of Trainer (``checkpoint-500``), Accelerate (``epoch_3``, ``step_500``),
DeepSpeed (``global_step500``), Megatron (``iter_0000500``), Lightning (``epoch=1-step=500``),
Composer (``ep1-ba500``), Pythia (``step500``), OLMo (``stage1-step500-tokens2B``), or numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"([A-Za-z]*)[-_=.]*([0-9]+(?:\.[0-9]+)?)([kKmMbBtT](?![A-Za-z]))?")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
# what counts updates, best first; then epochs and tokens, where nothing else is counted
_COUNTERS = ("step", "checkpoint", "ckpt", "iteration", "iter", "batch", "ba", "update")
_OTHERS = ("epoch", "ep", "tokens", "token")
_PHASES = ("stage", "phase", "ingredient")  # of one training, each counting from its start
_END = ("final", "last", "latest", "main")  # where training ended, whatever its number


def _counts(name: str) -> tuple[tuple[float, ...], float | None]:
    """Phases of a training, and how far into the last of them; None for a name without a number."""
    numbers = [
        (word.lower(), float(digits) * _UNITS[unit.lower()])
        for word, digits, unit in _NUMBER.findall(name)
    ]
    phases = tuple(max((n for w, n in numbers if w == phase), default=0.0) for phase in _PHASES)
    for counter in (*_COUNTERS, *_OTHERS):
        for word, number in numbers:
            if word == counter or word.endswith(counter):
                return phases, number
    free = [number for word, number in numbers if word not in _PHASES]
    return phases, free[-1] if free else None


def step_of(name: str) -> int | None:
    """Number of the checkpoint's step (of epochs or tokens, where only these are counted), or None.

    512 for ``step512``, ``checkpoint-512``, ``epoch=1-step=512`` and ``stage1-step512-tokens2B``.
    """
    number = _counts(name)[1]
    return None if number is None else int(number)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as training made them: by phase, then by number, ties by name; the last is the default.

    Names without a number come first (``best`` says which one was chosen, not when), except
    ``final``, ``last``, ``latest`` and ``main``, which are where training ended and come last.
    """

    def key(name: str) -> tuple[int, tuple[float, ...], float, str]:
        phases, number = _counts(name)
        if number is None:
            return (2 if name.lower() in _END else 0, phases, 0.0, name)
        return (1, phases, number, name)

    return sorted(names, key=key)
