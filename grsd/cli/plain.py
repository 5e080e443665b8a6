"""The ledger's TeX as text for a terminal: ``$\\lambda_{\\max} \\ge 0$`` becomes λ_max ≥ 0.

Only the commands that the ledger uses are known, and a test sees that each is in the table.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_SYMBOLS = dict(
    pair.split(":")
    for pair in """alpha:α beta:β gamma:γ delta:δ varepsilon:ε eta:η theta:θ kappa:κ lambda:λ mu:μ
    nu:ν pi:π rho:ρ sigma:σ tau:τ varphi:φ chi:χ psi:ψ omega:ω Gamma:Γ Delta:Δ Theta:Θ Omega:Ω
    sum:Σ prod:∏ int:∫ partial:∂ nabla:∇ infty:∞ emptyset:∅ ell:ℓ langle:⟨ rangle:⟩ |:‖ le:≤ ge:≥
    ll:≪ gg:≫ approx:≈ simeq:≃ sim:~ equiv:≡ ne:≠ propto:∝ to:→ leftarrow:← mapsto:↦ pm:± times:×
    cdot:· cdots:⋯ dots:… otimes:⊗ odot:⊙ vee:∨ top:ᵀ tfrac12:½ %:% ,:""".split()
)
_SYMBOLS |= {"dot": "\u0307", "tilde": "\u0303", "hat": "\u0302", "bar": "\u0304", "sqrt": "√"}
_NAMES = ("exp", "log", "cos", "cosh", "sinh", "min", "max", "sup", "ker")
_RAISED = dict(zip("0123456789+−()kᵀ", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ᵏᵀ", strict=True))
_LOWERED = dict(zip("0123456789", "₀₁₂₃₄₅₆₇₈₉", strict=True))
_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # braces in braces in braces


def plain(text: str) -> str:
    """Text of the ledger without dollars: what stands between them as Unicode.

    Raises a KeyError, which names the command, for TeX that the table does not know.
    """
    return re.sub(r"\$([^$]*)\$", lambda found: _formula(found[1]), text)


def _formula(tex: str) -> str:
    tex = tex.replace("-", "−").replace("'", "′").replace("{,}", ",")
    tex = tex.replace(r"\tfrac12 ", r"\tfrac12").replace(r"\tfrac12", "½")
    # names of functions and words keep their letters; what they are applied to keeps its distance
    tex = re.sub(r"\\(?:operatorname|mathrm|mathbb|text)\{([^{}]*)\} ?", r"\1 ", tex)
    tex = re.sub(r"\\([A-Za-z]+|[|%,]) ?", _command, tex)
    tex = re.sub("([\u0302-\u0307])(?:{(.)}|(.))", lambda m: (m[2] or m[3]) + m[1], tex)
    # scripts from the inside out, then roots
    for mark, table in (("_", _LOWERED), ("^", _RAISED)):
        tex = re.sub(rf"{re.escape(mark)}(?:{_GROUP}|(\S\u0307?))", _script(mark, table), tex)
    tex = re.sub(rf"√{_GROUP}", lambda m: f"√{m[1]}" if len(m[1]) < 2 else f"√({m[1]})", tex)
    tex = re.sub(r"(?<=[^({_]) ?([=<>≤≥≪≫≈≃≡≠∝↦←~]|(?<![a-z])→(?![a-z])) ?", r" \1 ", tex)
    tex = re.sub(r"(?<=[\w)]) ?± ?", " ± ", tex).replace(" ∗", "∗").replace(",,", ",")
    return unicodedata.normalize("NFC", " ".join(tex.split()))


def _command(found: re.Match[str]) -> str:
    """The symbol of a command; the name of a function is followed by what it is applied to."""
    name, after = found[1], found.string[found.end() : found.end() + 1]
    if name in _NAMES:
        return name + ("" if after in "(^_}" else " ")
    return _SYMBOLS[name]


def _script(mark: str, table: dict[str, str]) -> Callable[[re.Match[str]], str]:
    """A replacement for scripts: raised or lowered letters where they exist, else ``^(…)``."""

    def set_in(found: re.Match[str]) -> str:
        inner = found[1] if found[1] is not None else found[2]
        if all(letter in table for letter in inner):
            return "".join(table[letter] for letter in inner)
        # one star, and a word as an index, need no brackets
        if inner == "*":
            return "∗"
        if inner.endswith(")*"):  # of an operator that has a layer
            return f"^{inner[:-1]}∗"
        word = len(inner) < 2 or (mark == "_" and inner.strip().isalnum())
        bracketed = inner.startswith("(") and inner.endswith(")") and inner.count("(") == 1
        return mark + (inner.strip() if word or bracketed else f"({inner.strip()})")

    return set_in
