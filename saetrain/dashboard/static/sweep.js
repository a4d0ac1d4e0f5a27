"use strict";
const root = document.documentElement;
window.addEventListener("error", (e) => {
  root.dataset.error = e.message;
  const box = document.getElementById("error");
  box.hidden = false;
  box.textContent = "Part of this page could not be drawn: " + e.message;
});
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent), runs = data.runs;
const SVG = "http://www.w3.org/2000/svg";

function el(name, props = {}, ...children) {
  const svg = /^(svg|g|path|line|circle|text|title)$/.test(name) || props.svg;
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [k, v] of Object.entries(props)) if (v !== undefined && k !== "svg") node.setAttribute(k, v);
  node.append(...children);
  return node;
}
const num = (v) => typeof v !== "number" ? String(v) : v === 0 ? "0"
  : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6 ? v.toExponential(2) : String(+v.toPrecision(4));
const none = (v) => v === undefined || v === null;
const exact = (v) => none(v) ? "–" : typeof v === "string" ? v : JSON.stringify(v);  // a setting
const shown = (v) => typeof v === "number" ? num(v) : exact(v);
const nice = (n) => ({ fve: "FVE", l0: "L0", mse: "MSE", dead: "dead" }[n] || n);
const finite = (v) => typeof v === "number" && Number.isFinite(v);
const value = (run, n) => run.numbers[n] ?? run.logged[n];

function ticks(lo, hi, n) {
  const raw = (hi - lo) / n, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * ([1, 2, 5].find((m) => m * base >= raw) || 10), out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) out.push(+(i * step).toPrecision(10));
  return out;
}
// Axes of a plot: returns the two scales. Logarithmic where all is above 0 and spans a factor of 20,
// but never for shares such as FVE.
function axes(svg, xs, ys, xn, yn, height) {
  const w = Math.max(svg.clientWidth, 260), box = { l: 66, r: w - 14, t: 12, b: height - 44 };
  svg.setAttribute("viewBox", `0 0 ${w} ${height}`);
  svg.replaceChildren();
  const scale = (vs, name, a, b) => {
    let lo = Math.min(...vs), hi = Math.max(...vs);
    const log = lo > 0 && hi / lo > 20 && !["fve", "dead", "step"].includes(name) && !data.more.includes(name), f = log ? Math.log10 : (v) => v;
    if (hi <= lo) { const d = Math.abs(lo) || 1; lo -= d / 10; hi += d / 10; }
    const pad = 0.05 * (f(hi) - f(lo)), f0 = f(lo) - pad, f1 = f(hi) + pad;
    const at = (v) => a + (b - a) * (f(v) - f0) / (f1 - f0);
    const marks = log ? [] : ticks(f0, f1, Math.abs(b - a) / (a > b ? 45 : 90));
    if (log) for (let e = Math.floor(f0); e <= f1; e++) for (const m of [1, 2, 5]) {
      const v = m * 10 ** e;
      if (f(v) >= f0 && f(v) <= f1) marks.push(+v.toPrecision(3));
    }
    return [at, marks];
  };
  const [x, xt] = scale(xs, xn, box.l, box.r), [y, yt] = scale(ys, yn, box.b, box.t);
  for (const t of yt) svg.append(el("line", { class: "grid", x1: box.l, x2: box.r, y1: y(t), y2: y(t) }),
    el("text", { x: box.l - 7, y: y(t) + 4, "text-anchor": "end" }, num(t)));
  for (const t of xt) svg.append(el("line", { class: "axis", x1: x(t), x2: x(t), y1: box.b, y2: box.b + 4 }),
    el("text", { x: x(t), y: box.b + 18, "text-anchor": "middle" }, num(t)));
  svg.append(el("line", { class: "axis", x1: box.l, x2: box.r, y1: box.b, y2: box.b }),
    el("text", { x: (box.l + box.r) / 2, y: box.b + 36, "text-anchor": "middle" }, nice(xn)),
    el("text", { x: -(box.t + box.b) / 2, y: 13, transform: "rotate(-90)", "text-anchor": "middle" }, nice(yn)));
  return [x, y];
}

// ---- the trade-off -------------------------------------------------------------------------------

const sign = (n) => data.more.includes(n) ? 1 : -1;  // of "better"
// Runs that no other run beats: at least as good in both numbers and better in one.
function front(xn, yn) {
  const at = runs.map((r, i) => [i, sign(xn) * r.numbers[xn], sign(yn) * r.numbers[yn]])
    .filter((p) => finite(p[1]) && finite(p[2]));
  return at.filter(([, a, b]) => !at.some(([, c, d]) => c >= a && d >= b && (c > a || d > b))).map((p) => p[0]);
}
const label = (run) => data.settings.filter((k) => !none(run.config[k]))
  .map((k) => `${k}=${exact(run.config[k])}`).join(" ") || run.name;
const COLOURS = ["var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)"];
const FLOOR = -0.1;  // one diverged run must not squeeze all others into a line
const drawn = (v, n) => n === "fve" ? Math.max(v, FLOOR) : v;
let current = null, colour = () => COLOURS[0];

function colours() {
  const key = $("by").value, found = [...new Set(runs.map((r) => exact(r.config[key])))];
  $("key").replaceChildren();
  if (!key) return () => COLOURS[0];
  found.sort((a, b) => (+a - +b) || (a < b ? -1 : 1));
  const nth = (i) => found.length <= 4 ? COLOURS[i] : `hsl(${250 - 220 * i / (found.length - 1)} 65% 50%)`;
  found.forEach((v, i) => {
    const dot = el("i", {});
    dot.style.background = nth(i);
    $("key").append(el("span", {}, dot, v));
  });
  return (run) => nth(found.indexOf(exact(run.config[key])));
}
function drawPareto() {
  const svg = $("pareto"), xn = $("x").value, yn = $("y").value;
  colour = colours();
  const here = runs.map((r, i) => i).filter((i) => finite(runs[i].numbers[xn]) && finite(runs[i].numbers[yn]));
  const at = (i, n) => drawn(runs[i].numbers[n], n), cut = [xn, yn].includes("fve") && here.some((i) => runs[i].numbers.fve < FLOOR);
  const best = front(xn, yn), way = (n) => sign(n) > 0 ? "high" : "low";
  $("rule").textContent = here.length ? `◆ and dashed: no other run is at least as good in both (${way(xn)} ${nice(xn)}, `
    + `${way(yn)} ${nice(yn)}) and better in one. Held-out documents.${cut ? ` FVE below ${FLOOR} is drawn at the edge.` : ""}` : "No run has been evaluated yet.";
  for (const row of $("table").tBodies[0].rows) row.classList.toggle("best", best.includes(+row.dataset.i));
  svg.replaceChildren();
  if (!here.length) return;
  const [x, y] = axes(svg, here.map((i) => at(i, xn)), here.map((i) => at(i, yn)), xn, yn, 340);
  const pt = (i) => `${x(at(i, xn)).toFixed(1)},${y(at(i, yn)).toFixed(1)}`;
  const line = [...best].sort((a, b) => at(a, xn) - at(b, xn));
  if (line.length > 1) svg.append(el("path", { class: "front", d: "M" + line.map(pt).join("L") }));
  for (const i of here) {
    const run = runs[i], [cx, cy] = pt(i).split(",");
    const text = `${label(run)}: ${nice(xn)} ${num(run.numbers[xn])}, ${nice(yn)} ${num(run.numbers[yn])}`;
    const dot = el("circle", { class: `point${best.includes(i) ? "" : " off"}`, cx, cy, r: best.includes(i) ? 7 : 5.5, "data-i": i });
    dot.style.fill = colour(run);
    const link = el("a", { svg: 1, "aria-label": text, "data-i": i, tabindex: 0, ...(run.link && { href: run.link }) }, dot);
    link.addEventListener("pointerenter", () => mark(i));
    link.addEventListener("focus", () => mark(i));
    svg.append(link);
  }
  mark(current);
}

// ---- curves --------------------------------------------------------------------------------------

function drawCurves() {
  const svg = $("lines"), name = $("curve").value;
  const sets = runs.map((r) => (r.curves[name] || []).filter((p) => finite(p[1])));
  const all = sets.flat();
  svg.replaceChildren();
  if (!all.length) return;
  const [x, y] = axes(svg, all.map((p) => p[0]), all.map((p) => drawn(p[1], name)), "step", name, 340);
  sets.forEach((pts, i) => {
    if (!pts.length) return;
    const d = "M" + pts.map((p) => `${x(p[0]).toFixed(1)},${y(drawn(p[1], name)).toFixed(1)}`).join("L");
    const path = el("path", { class: "run-line", d, "data-i": i });
    path.style.stroke = colour(runs[i]);
    path.addEventListener("pointerenter", () => mark(i));
    svg.append(path);
  });
  mark(current);
}
function mark(i) {
  current = i;
  for (const node of document.querySelectorAll(".at")) node.classList.remove("at");
  if (i === null) return;
  const run = runs[i], xn = $("x").value, yn = $("y").value, c = $("curve").value;
  for (const node of document.querySelectorAll(`.point[data-i="${i}"], .run-line[data-i="${i}"], tr[data-i="${i}"]`)) {
    node.classList.add("at");
    if (node.matches(".run-line")) node.parentNode.append(node);
  }
  const last = (run.curves[c] || []).at(-1);
  $("point").textContent = `${label(run)} — ${nice(xn)} ${shown(value(run, xn))}, ${nice(yn)} ${shown(value(run, yn))}`;
  $("line").textContent = `${label(run)}${last ? ` — ${nice(c)} ${num(last[1])} at step ${last[0].toLocaleString("en")}` : ""}`;
}

// ---- the table -----------------------------------------------------------------------------------

const reasons = runs.some((r) => r.reason), unfinished = runs.some((r) => r.state !== "finished");
const columns = [["run", (r) => r.name],
  ...(unfinished ? [["state", (r) => r.state === "finished" ? r.state : `${r.state}, ${r.progress}`]] : []),
  ...data.settings.map((k) => [k, (r) => r.config[k]]),
  ...data.numbers.slice(0, 8).map((n) => [nice(n), (r) => value(r, n), n]),
  ...(reasons ? [["reason", (r) => r.reason]] : [])];
const numeric = columns.map(([, get]) => runs.some((r) => finite(get(r))));  // to the right
let order = { column: null, down: false };

function compare(a, b) {
  if (finite(a) && finite(b)) return a - b;
  return exact(a).localeCompare(exact(b), "en", { numeric: true });
}
function fillTable() {
  const body = $("table").tBodies[0], ids = runs.map((_, i) => i);
  if (order.column !== null) {
    const [, get, number] = columns[order.column], last = (i) => none(get(runs[i])) || number && !finite(get(runs[i]));
    ids.sort((a, b) => last(a) - last(b) || !last(a) * (order.down ? -1 : 1) * compare(get(runs[a]), get(runs[b])));
  }
  body.replaceChildren(...ids.map((i) => {
    const run = runs[i];
    const row = el("tr", { "data-i": i }, ...columns.map(([name, get, number], c) => {
      const v = get(run), text = (number ? shown : exact)(v);
      const logged = number && run.numbers[number] === undefined && finite(v);
      const kind = name === "reason" ? "why" : logged ? "value logged" : numeric[c] ? "value" : text.length > 56 ? "long" : undefined;
      const cell = el("td", { class: kind });
      cell.append(c === 0 && run.link ? el("a", { href: run.link }, text) : text);
      return cell;
    }));
    row.addEventListener("pointerenter", () => mark(i));
    row.addEventListener("focusin", () => mark(i));
    return row;
  }));
  [...$("table").tHead.rows[0].cells].forEach((th, c) => th.setAttribute("aria-sort",
    c !== order.column ? "none" : order.down ? "descending" : "ascending"));
}
$("table").tHead.append(el("tr", {}, ...columns.map(([name], c) => {
  const button = el("button", { type: "button" }, name);
  button.addEventListener("click", () => {
    order = { column: c, down: order.column === c ? !order.down : data.more.includes(columns[c][2]) };
    fillTable();
    drawPareto();
  });
  return el("th", { scope: "col", class: numeric[c] ? "value" : undefined }, button);
})));

// ---- start ---------------------------------------------------------------------------------------

const fill = (id, names, start) => {
  $(id).append(...names.map((n) => el("option", { value: n, ...(n === start && { selected: "" }) }, n ? nice(n) : "none")));
};
const both = data.numbers.length > 1 ? data.numbers : [...data.numbers, ...data.numbers];
fill("x", data.numbers, data.numbers.includes("l0") ? "l0" : both[1]);
fill("y", data.numbers, data.numbers.includes("fve") ? "fve" : both[0]);
const few = data.settings.filter((k) => new Set(runs.map((r) => exact(r.config[k]))).size <= 12);
fill("by", ["", ...data.settings], few[0] || "");
fill("curve", data.curves, data.curves[0]);
const states = {};
for (const r of runs) states[r.state] = (states[r.state] || 0) + 1;
$("states").textContent = `${runs.length} run${runs.length > 1 ? "s" : ""}: ` + Object.entries(states).map(([s, n]) => `${n} ${s}`).join(", ");
const draw = () => { drawPareto(); drawCurves(); };
for (const node of document.querySelectorAll("#tradeoff .bar-top, #tradeoff .chart"))
  node.hidden = !runs.some((r) => Object.keys(r.numbers).length);
$("curves").hidden = !data.curves.length;
for (const id of ["x", "y"]) $(id).addEventListener("change", drawPareto);
$("by").addEventListener("change", draw);
$("curve").addEventListener("change", drawCurves);
fillTable();
draw();
window.addEventListener("resize", draw);
root.dataset.ready = "true";
