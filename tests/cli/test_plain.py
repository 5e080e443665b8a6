"""The ledger in a terminal: every command is known, and Unicode says what the TeX says."""

from __future__ import annotations

import re

import pytest

from grsd import claims
from grsd.cli.plain import plain
from tests.test_claims import texts

TEXTS = [text for claim in claims.load() for text in texts(claim)]


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"$L \propto t^{-(1+c_0)(p+1)}$, for $c_0 > -1$", "L ∝ t^(−(1+c₀)(p+1)), for c₀ > −1"),
        (r"$\|M - \sum M^{(l)}\|/\|M\|$", "‖M − ΣM^(l)‖/‖M‖"),
        (r"$\tilde X = X/\sqrt{\lambda_u \lambda_v}$", "X̃ = X/√(λ_u λ_v)"),
        (r"$\eta\lambda_{\max} = 2$ to $10^{-12}$", "ηλ_max = 2 to 10⁻¹²"),
        (r"$\log\hat K$ and $\langle\dot s\rangle$", "log K̂ and ⟨ṡ⟩"),
        (r"$J^{(l)*}J^{(m)}$, $J^*$ and $W^{(2)\top}g$", "J^(l)∗J^(m), J∗ and W⁽²⁾ᵀg"),
        (r"$h = 64 \dots512$, $0 \pm0.1$", "h = 64 … 512, 0 ± 0.1"),
        (r"$\tfrac12 \|e\|^2 = \tfrac12 \sum g_u^2$", "½‖e‖² = ½Σg_u²"),
        ("`match_rms` and 3 % stay", "`match_rms` and 3 % stay"),
    ],
)
def test_formulas_read_as_they_are_written_by_hand(tex: str, text: str) -> None:
    squeezed = str.maketrans("", "", " ")
    assert plain(tex).translate(squeezed) == text.translate(squeezed)
    assert "  " not in plain(tex) and "\\" not in plain(tex)


def test_no_command_of_the_ledger_is_left_over() -> None:
    for text in TEXTS:
        shown = plain(text)
        assert not re.search(r"[\\$]|[{}]", shown), shown
        assert shown.count("(") == shown.count(")"), shown


def test_an_unknown_command_is_named() -> None:
    with pytest.raises(KeyError, match="aleph"):
        plain(r"$\aleph_0$")
