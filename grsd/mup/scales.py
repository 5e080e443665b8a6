"""Powers of the width and depth ratio, r_n^a r_L^b, and the roles that parameters have."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Role = Literal["input", "hidden", "output", "input_bias", "hidden_bias", "output_bias"]
ROLES: tuple[Role, ...] = ("input", "hidden", "output", "input_bias", "hidden_bias", "output_bias")
MATRICES: tuple[Role, ...] = ROLES[:3]
HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Scale:
    """r_n^n · r_L^L, with rational exponents."""

    n: Fraction = Fraction(0)
    L: Fraction = Fraction(0)

    def __mul__(self, other: Scale) -> Scale:
        return Scale(self.n + other.n, self.L + other.L)

    def __truediv__(self, other: Scale) -> Scale:
        return self * other**-1

    def __pow__(self, power: int | Fraction) -> Scale:
        return Scale(self.n * power, self.L * power)

    def at(self, r_n: float, r_L: float) -> float:
        """Return the factor for width ratio r_n and depth ratio r_L, both positive."""
        if not (r_n > 0 and r_L > 0 and math.isfinite(r_n) and math.isfinite(r_L)):
            raise ValueError(
                f"width and depth ratios must be positive and finite, got r_n = {r_n}, r_L = {r_L}"
            )
        return math.pow(r_n, self.n) * math.pow(r_L, self.L)

    def __str__(self) -> str:
        powers = (("r_n", self.n), ("r_L", self.L))
        above, below = (
            [_power(x, sign * p) for x, p in powers if sign * p > 0] for sign in (1, -1)
        )
        numerator, denominator = " ".join(above) or "1", " ".join(below)
        if not below:
            return numerator
        return f"{numerator}/{denominator if len(below) == 1 else f'({denominator})'}"


def _power(symbol: str, power: Fraction) -> str:
    known = {1: symbol, 2: f"{symbol}²", HALF: f"√{symbol}"}
    exact = power.denominator < 10
    return known.get(power, f"{symbol}^{power if exact else format(float(power), '.3g')}")


def scale(n: int | str = 0, L: int | str = 0) -> Scale:
    """Return r_n^n r_L^L from whole numbers or fractions written as strings."""
    return Scale(Fraction(n), Fraction(L))


ONE = scale()


def parse(cell: str) -> Scale:
    """Return the scale of a table's cell: "nL^-1/2" is r_n r_L^-1/2, "1" is 1."""
    powers = dict(re.findall(r"([nL])(?:\^(-?\d+(?:/\d+)?))?", cell))
    return Scale(*(Fraction(powers[s] or 1) if s in powers else Fraction(0) for s in "nL"))


def larger(a: Scale, b: Scale) -> Scale:
    """Return the larger of two scales as n grows (neither has an L)."""
    return a if a.n >= b.n else b
