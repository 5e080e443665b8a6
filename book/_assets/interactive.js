// Two figures with sliders: the solution of the transport equation, and Lanczos steps against the exact measure.
// What they compute is pure and tested with node against the package; without scripts the static figures stand alone.

// --- The transport equation: loss at time s = t/t0 for eps0 = u^p on [lo, hi], by the midpoint rule in log u.

const LO = 1e-12, HI = 10, CELLS = 800, T0 = 1;

function clock(s, c0) {
  const a = 1 + c0;
  return 2 * T0 * (Math.abs(a) < 1e-9 ? Math.log(s) : (s ** a - 1) / a);
}

function loss(s, c0, p) {
  const K = clock(s, c0), h = Math.log(HI / LO) / CELLS;
  let sum = 0;
  for (let k = 0; k < CELLS; k++) {
    const u = LO * Math.exp((k + 0.5) * h);
    sum += u ** (p + 1) * Math.exp(-u * K) * h;
  }
  return sum;
}

// The printed (11), read as a density in lambda, leaves out the Jacobian of the flow: its integral is s^c0 times the loss.
const printed = (s, c0, p) => s ** c0 * loss(s, c0, p);

function slope(f, c0, p, from = 1e2, to = 1e3) {
  return Math.log(f(to, c0, p) / f(from, c0, p)) / Math.log(to / from);
}

// --- Drawing: axes with powers of ten, lines, bands.

const NS = "http://www.w3.org/2000/svg";
const W = 560, H = 300, LEFT = 58, BOTTOM = 40, TOP = 12, RIGHT = 12;

function node(name, attributes, parent, text) {
  const made = document.createElementNS(NS, name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function axes(box, x, y, labels) {
  box.replaceChildren();
  const px = (v) => LEFT + (W - LEFT - RIGHT) * (v - x[0]) / (x[1] - x[0]);
  const py = (v) => H - BOTTOM - (H - BOTTOM - TOP) * (v - y[0]) / (y[1] - y[0]);
  for (const [range, at] of [[x, "x"], [y, "y"]]) {
    const step = Math.max(1, Math.ceil((range[1] - range[0]) / 6));
    for (let v = Math.ceil(range[0]); v <= range[1] + 1e-9 && labels[at].log; v += step) {
      const [cx, cy] = at === "x" ? [px(v), H - BOTTOM + 16] : [LEFT - 8, py(v) + 4];
      const tick = node("text", { x: cx, y: cy, "text-anchor": at === "x" ? "middle" : "end" }, box, "10");
      node("tspan", { dy: -5, "font-size": "9" }, tick, String(v).replace("-", "−"));
    }
    if (!labels[at].log) [0, 0.5, 1].forEach((v) =>
      node("text", { x: LEFT - 8, y: py(v) + 4, "text-anchor": "end" }, box, String(v)));
  }
  node("path", { d: `M${LEFT},${TOP}V${H - BOTTOM}H${W - RIGHT}`, class: "axis" }, box);
  node("text", { x: (LEFT + W) / 2, y: H - 6, "text-anchor": "middle" }, box, labels.x.name);
  node("text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` }, box, labels.y.name);
  return { px, py };
}

function line(box, points, at, kind) {
  const d = points.map(([x, y], k) => `${k ? "L" : "M"}${at.px(x).toFixed(1)},${at.py(y).toFixed(1)}`);
  node("path", { d: d.join(""), class: kind }, box);
}

function slider(form, name, [low, high, step, start], change) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"),
    { type: "range", min: low, max: high, step, value: start });
  const shown = document.createElement("output");
  const tell = () => { shown.textContent = String(input.value).replace("-", "−"); change(Number(input.value)); };
  input.addEventListener("input", tell);
  label.append(`${name} `, input, " ", shown);
  form.append(label);
  return tell;
}

function frame(place, alt) {
  const box = document.createElementNS(NS, "svg");
  Object.entries({ viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": alt })
    .forEach(([key, value]) => box.setAttribute(key, value));
  const form = document.createElement("form"), said = document.createElement("p");
  said.className = "interactive-said";
  place.append(form, box, said);
  return { box, form, said };
}

function transport(place) {
  const { box, form, said } = frame(place, "Loss against time, printed and corrected");
  const state = { c0: 0.5, p: 0.5 };
  const times = Array.from({ length: 61 }, (_, k) => 3 * k / 60);  // log10 s
  const digits = (v) => v.toFixed(2).replace("-", "−");
  const draw = () => {
    const { c0, p } = state;
    const curves = [loss, printed].map((f) =>
      times.map((x) => [x, Math.log10(f(10 ** x, c0, p) / f(1, c0, p))]));
    const all = curves.flat().map(([, y]) => y);
    const range = [Math.min(-1, Math.floor(Math.min(...all))), Math.max(0, Math.ceil(Math.max(...all) - 1e-9))];
    const at = axes(box, [0, 3], range,
      { x: { name: "t / t₀", log: true }, y: { name: "loss, 1 at t₀", log: true } });
    line(box, curves[0], at, "corrected");
    line(box, curves[1], at, "printed");
    said.textContent = `Solid: the equation's own loss, slope ${digits(slope(loss, c0, p))} over the last decade; `
      + `−(1+c₀)(p+1) is ${digits(-(1 + c0) * (p + 1))}. Dashed: as printed, slope ${digits(slope(printed, c0, p))}; `
      + `−[(1+c₀)p+1] is ${digits(-((1 + c0) * p + 1))}.`;
  };
  slider(form, "c₀", [-0.5, 1.5, 0.1, 0.5], (v) => { state.c0 = v; draw(); });
  slider(form, "p", [-0.5, 1.5, 0.1, 0.5], (v) => { state.p = v; draw(); })();
}

// --- Lanczos: numbers that a cell of the chapter wrote into the page as JSON.

function lanczos(place) {
  const source = document.getElementById("lanczos-steps");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const { box, form, said } = frame(place, "Mass below an edge: truth, and the interval of m Lanczos steps");
  const x = data.edges.map((v) => Math.log10(v));
  slider(form, "steps m", [1, data.steps.length, 1, 8], (m) => {
    const { lower, upper } = data.steps[m - 1];
    const at = axes(box, [x[0], x[x.length - 1]], [0, 1],
      { x: { name: "edge on the λ axis", log: true }, y: { name: "share of the mass below", log: false } });
    const band = [...x.map((v, k) => [v, upper[k]]), ...x.map((v, k) => [v, lower[k]]).reverse()];
    line(box, band, at, "band");
    line(box, x.map((v, k) => [v, data.exact[k]]), at, "corrected");
    const widest = Math.max(...x.map((_, k) => upper[k] - lower[k]));
    said.textContent = `${m} steps: the widest interval is ${widest.toFixed(3)}; the truth (line) lies inside at every edge.`;
  })();
}

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".interactive-transport").forEach(transport);
    document.querySelectorAll(".interactive-lanczos").forEach(lanczos);
  });
}
if (typeof module !== "undefined") module.exports = { clock, loss, printed, slope };
