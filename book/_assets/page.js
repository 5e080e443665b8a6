// On every page: a formula that is a little too wide is set smaller, what hides something is shaded, and search
// shows formulas as text.

// The smallest size at which a formula is still read; what is wider scrolls.
const SMALLEST = 0.72;

function fitFormulas() {
  document.querySelectorAll('mjx-container[display="true"]').forEach((formula) => {
    const full = (formula.dataset.size ??= String(parseFloat(formula.style.fontSize) || 100));
    formula.style.fontSize = `${full}%`;
    const share = formula.clientWidth / formula.scrollWidth;
    if (share < 1) formula.style.fontSize = `${Math.max(SMALLEST, 0.985 * share) * full}%`;
  });
}

// Panels side by side are too small on a phone; there such a picture scrolls in a box of its own.
const WIDE = 1.8;  // width over height

function boxWideFigures() {
  document.querySelectorAll(".bd-content :is(figure, .answer, .cell_output) img").forEach((image) => {
    if (image.naturalWidth < WIDE * image.naturalHeight || image.closest(".wide-figure")) return;
    const box = document.createElement("div");
    box.className = "wide-figure";
    image.replaceWith(box);
    box.append(image);
  });
}

// A shade at the right edge of what can still be scrolled, until it has been.
const SCROLLERS = '.pst-scrollable-table-container, mjx-container[display="true"], pre, .sig, .wide-figure';

function shade(box) {
  box.classList.toggle("hides-more", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
}

function markScrollers() {
  document.querySelectorAll(".pst-scrollable-table-container").forEach((box) => {
    box.classList.remove("tight");
    box.classList.toggle("tight", box.scrollWidth > box.clientWidth + 1);
  });
  document.querySelectorAll(SCROLLERS).forEach((box) => {
    shade(box);
    box.onscroll = () => shade(box);
  });
}

// TeX in an excerpt of the search: letters for their commands, no delimiters and no other commands.
const LETTERS = Object.fromEntries("alpha:α beta:β gamma:γ delta:δ varepsilon:ε epsilon:ε eta:η theta:θ kappa:κ lambda:λ mu:μ rho:ρ sigma:σ tau:τ varphi:φ phi:φ chi:χ psi:ψ omega:ω Gamma:Γ Delta:Δ Theta:Θ Omega:Ω sum:Σ prod:∏ int:∫ partial:∂ nabla:∇ infty:∞ langle:⟨ rangle:⟩ le:≤ ge:≥ ll:≪ gg:≫ approx:≈ simeq:≃ ne:≠ propto:∝ to:→ pm:± times:× cdot:· dots:… top:ᵀ ast:* star:*"
  .split(" ").map((pair) => pair.split(":")));

function untex(text) {
  return text.replace(/\\\(([\s\S]*?)\\\)|\\\[([\s\S]*?)\\\]|\$([^$\n]+)\$/g, (_, a, b, c) => (a ?? b ?? c)
    .replace(/\\tfrac12|\\frac12/g, "½").replace(/\\[|]/g, "‖")
    .replace(/\\([A-Za-z]+) ?/g, (_all, name) => LETTERS[name] ?? (/^(log|exp|max|min|sup|cos|sinh)$/.test(name) ? `${name} ` : ""))
    .replace(/\\[,;!: ]/g, " ").replace(/[{}]/g, ""));
}

if (typeof document !== "undefined") {
  window.addEventListener("load", () => window.MathJax?.startup?.promise.then(() => {
    const fit = () => { boxWideFigures(); fitFormulas(); markScrollers(); };
    fit();
    window.addEventListener("resize", fit);
    document.addEventListener("toggle", markScrollers, true);
  }));
  document.addEventListener("DOMContentLoaded", () => {
    if (typeof Search === "undefined") return;
    const plain = Search.htmlToText;
    Search.htmlToText = (...page) => untex(plain(...page));
  });
}
if (typeof module !== "undefined") module.exports = { untex };
