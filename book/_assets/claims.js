// The claims page: filters over the list of claims, made here because without scripts they would do nothing.
// `matches` is pure and tested with node.

function matches(claim, wanted) {
  const words = wanted.words.toLowerCase().split(/\s+/).filter(Boolean);
  return ["paper", "verdict", "chapter"].every((key) => !wanted[key] || claim[key] === wanted[key])
    && words.every((word) => claim.text.includes(word));
}

function filters(cards) {
  const bar = document.createElement("form");
  bar.className = "claim-filters";
  const wanted = { paper: "", verdict: "", chapter: "", words: "" };
  const said = document.createElement("output");
  const claims = cards.map((card) => ({ ...card.dataset, text: card.textContent.toLowerCase() }));
  const show = () => {
    let shown = 0;
    cards.forEach((card, k) => { card.hidden = !matches(claims[k], wanted); shown += !card.hidden; });
    // a paper none of whose claims is shown loses its heading too
    document.querySelectorAll("section section").forEach((section) => {
      const mine = section.querySelectorAll(".claim-card");
      section.hidden = mine.length > 0 && [...mine].every((card) => card.hidden);
    });
    said.textContent = `${shown} of ${cards.length} claims`;
  };
  for (const key of ["paper", "verdict", "chapter"]) {
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", key);
    choice.add(new Option(`any ${key}`, ""));
    [...new Set(claims.map((claim) => claim[key]))].filter(Boolean)
      .forEach((value) => choice.add(new Option(value.replace(/-/g, " "), value)));
    choice.addEventListener("change", () => { wanted[key] = choice.value; show(); });
    bar.append(choice);
  }
  const words = document.createElement("input");
  Object.assign(words, { type: "search", placeholder: "words, e.g. Lanczos" });
  words.setAttribute("aria-label", "words");
  words.addEventListener("input", () => { wanted.words = words.value; show(); });
  bar.append(words, said);
  bar.addEventListener("submit", (event) => event.preventDefault());
  show();
  return bar;
}

// A link to a claim opens its card.
function openTarget() {
  const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (card && card.matches("details")) { card.open = true; card.scrollIntoView(); }
}

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", () => {
    const cards = [...document.querySelectorAll(".claim-card")];
    const first = document.querySelector(".claim-counts");
    if (cards.length && first) first.closest("section").before(filters(cards));
    openTarget();
  });
  window.addEventListener("hashchange", openTarget);
}
if (typeof module !== "undefined") module.exports = { matches };
