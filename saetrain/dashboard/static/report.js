"use strict";
const root = document.documentElement;
window.addEventListener("error", (e) => {
  root.dataset.error = e.message;
  const box = document.getElementById("error");
  box.hidden = false;
  box.textContent = "Part of this page could not be drawn: " + e.message;
});
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

function el(name, props = {}, ...children) {
  const svg = /^(svg|g|path|line|rect|circle|text|title|clipPath|defs)$/.test(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [k, v] of Object.entries(props)) if (v !== undefined) node.setAttribute(k, v);
  node.append(...children);
  return node;
}
const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const num = (v) => typeof v !== "number" ? String(v) : v === 0 ? "0"
  : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6 ? v.toExponential(2) : String(+v.toPrecision(4));
const si = (v) => v >= 1e9 ? +(v / 1e9).toPrecision(3) + "B" : v >= 1e6 ? +(v / 1e6).toPrecision(3) + "M"
  : v >= 1e3 ? +(v / 1e3).toPrecision(3) + "k" : num(v);
const power = (e) => "10" + String(e).replace(/[-0-9]/g, (c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c]);

// ---- plots ---------------------------------------------------------------------------------------

function ticks(lo, hi, n) {
  const raw = (hi - lo) / n, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * ([1, 2, 5].find((m) => m * base >= raw) || 10), out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) out.push(+(i * step).toPrecision(10));
  return out;
}
function logTicks(lo, hi) {
  const out = [];
  for (let e = Math.floor(Math.log10(lo)); 10 ** e <= hi; e++)
    for (const m of [1, 2, 5]) if (m * 10 ** e >= lo && m * 10 ** e <= hi) out.push(+(m * 10 ** e).toPrecision(3));
  return out;
}
function frame(svg, box, x, y, xTicks, yTicks, xText, yText, xLabel, yLabel) {
  for (const t of yTicks) svg.append(el("line", { class: "grid", x1: box.l, x2: box.r, y1: y(t), y2: y(t) }),
    el("text", { x: box.l - 7, y: y(t) + 4, "text-anchor": "end" }, yText(t)));
  for (const t of xTicks) svg.append(el("line", { class: "axis", x1: x(t), x2: x(t), y1: box.b, y2: box.b + 4 }),
    el("text", { x: x(t), y: box.b + 18 + (box.drop || 0), "text-anchor": "middle" }, xText(t)));
  svg.append(el("line", { class: "axis", x1: box.l, x2: box.r, y1: box.b, y2: box.b }),
    el("text", { x: (box.l + box.r) / 2, y: box.b + 36 + (box.drop || 0), "text-anchor": "middle" }, xLabel),
    el("text", { x: -(box.t + box.b) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, yLabel));
}
const DASH = ["", "6 4", "2 3", "9 3 2 3"];
const UNITS = { "Dead latents": "share of latents", L0: "latents per token", FVE: "FVE", Loss: "loss" };

function curve(chart) {
  const pts = chart.series.flatMap((s) => s.points).filter((p) => Number.isFinite(p[2]));
  const byTokens = pts.every((p) => Number.isFinite(p[1])), X = (p) => p[byTokens ? 1 : 0];
  const values = pts.map((p) => p[2]), xs = [...new Set(pts.map(X))].sort((a, b) => a - b);
  const share = chart.title === "Dead latents", all = chart.title === "FVE";
  let lo = Math.min(...values), hi = Math.max(...values);
  const log = chart.title === "Loss" && lo > 0 && hi / lo > 20, lowest = lo;
  if (share || chart.title === "L0") lo = 0;
  if (all) { lo = Math.max(Math.min(lo, 0), -0.1); hi = Math.max(hi, 1); }
  if (chart.title === "Loss" && !log) lo = Math.min(lo, 0);
  if (hi <= lo) hi = lo + (share ? 0.01 : Math.abs(lo) || 1);
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const legend = el("div", { class: "legend" }, ...chart.series.map((s, i) => el("span", {},
    el("svg", { width: 26, height: 8, "aria-hidden": "true" }, s.points.length > 1
      ? el("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: `var(--s${i % 4})`, "stroke-width": 2, "stroke-dasharray": DASH[i % 4] })
      : el("circle", { cx: 13, cy: 4, r: 4, fill: `var(--s${i % 4})` })), s.name)));
  const notes = [log && "Logarithmic scale.", all && lowest < lo && `Values below ${lo} are cut; the lowest is ${num(lowest)}.`,
    chart.stride > 1 && `Every ${chart.stride}th logged row is drawn.`].filter(Boolean).join(" ");
  const svg = el("svg", { class: "plot", tabindex: 0, role: "img",
    "aria-label": `${chart.title} over training. Arrow keys read values.` });
  const panel = el("div", { class: "chart" }, el("h3", {}, chart.title), legend, svg, readout);
  if (notes) panel.append(el("p", { class: "note" }, notes));
  let at = null, box, x, y;
  const f = log ? Math.log10 : (v) => v, fmt = share ? (v) => +(100 * v).toPrecision(3) + "%" : num;
  function draw() {
    const w = Math.max(svg.clientWidth, 260), h = 230;
    box = { l: 70, r: w - 10, t: 8, b: h - 44 };
    const x1 = Math.max(...xs), pad = hi === 1 && all ? 0 : 0.04 * (f(hi) - f(lo)), fl = f(lo), fh = f(hi) + pad;
    x = (v) => box.l + (box.r - box.l) * v / (x1 || 1);
    y = (v) => box.b - (box.b - box.t) * (f(v) - fl) / (fh - fl);
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.replaceChildren();
    frame(svg, box, x, y, ticks(0, x1 || 1, Math.max(3, w / 110)), log ? logTicks(lo, hi) : ticks(lo, hi, 5), si, fmt,
      byTokens ? "training tokens" : "step", UNITS[chart.title] || "");
    chart.series.forEach((s, i) => {
      let d = "", pen = "M";
      for (const p of s.points) {
        if (!Number.isFinite(p[2]) || (log && p[2] <= 0)) { pen = "M"; continue; }
        d += `${pen}${x(X(p)).toFixed(1)},${Math.min(y(p[2]), box.b).toFixed(1)}`; pen = "L";
      }
      svg.append(s.points.length > 1
        ? el("path", { class: "line", d, stroke: `var(--s${i % 4})`, "stroke-dasharray": DASH[i % 4] })
        : el("circle", { cx: x(X(s.points[0])), cy: Math.min(y(s.points[0][2]), box.b), r: 4.5, fill: `var(--s${i % 4})` }));
    });
    if (at !== null) svg.append(el("line", { class: "cursor", x1: x(xs[at]), x2: x(xs[at]), y1: box.t, y2: box.b }));
  }
  function read(i) {
    at = i;
    const here = chart.series.map((s) => [s.name, s.points.find((p) => X(p) === xs[i])]).filter((e) => e[1]);
    const p = here.length ? here[0][1] : null;
    readout.textContent = p ? `step ${p[0].toLocaleString("en")}${byTokens ? `, ${p[1].toLocaleString("en")} tokens` : ""} — `
      + here.map(([n, q]) => `${n} ${fmt(q[2])}`).join(", ") : "";
    draw();
  }
  svg.addEventListener("pointermove", (e) => {
    const r = svg.getBoundingClientRect(), px = (e.clientX - r.left) * svg.viewBox.baseVal.width / r.width;
    read(xs.reduce((b, v, i) => Math.abs(x(v) - px) < Math.abs(x(xs[b]) - px) ? i : b, 0));
  });
  svg.addEventListener("keydown", (e) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (move) { e.preventDefault(); read(Math.min(xs.length - 1, Math.max(0, (at === null ? xs.length : at) + move))); }
  });
  return [panel, draw];
}

function histogram(d) {
  const svg = el("svg", { class: "plot", role: "img", "aria-label": "Number of latents by log10 of their density" });
  const shown = data.features ? data.features.cards.map((c) => c.log10_density).filter(Number.isFinite) : [];
  const first = Math.min(d.counts.findIndex((c) => c > 0), Math.max(0, d.counts.length - 4));
  const lo = Math.floor(d.edges[Math.max(first, 0)]), top = Math.max(d.zero, ...d.counts, 1);
  const n = d.n ? `${d.n.toLocaleString("en")} held-out tokens` : "held-out tokens";
  function draw() {
    const w = Math.max(svg.clientWidth, 260), h = 270, box = { l: 62, r: w - 12, t: 20, b: h - 54, drop: 9 };
    const gap = Math.min(70, w / 7), x = (v) => box.l + gap + (box.r - box.l - gap) * (v - lo) / -lo;
    const y = (v) => box.b - (box.b - box.t) * v / top;
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.replaceChildren();
    const decades = Array.from({ length: 1 - lo }, (_, i) => lo + i);
    frame(svg, box, x, y, decades, ticks(0, top, 4), (e) => e ? power(e) : "1", si,
      "density: share of tokens a latent fires on", "latents");
    d.counts.forEach((c, i) => c && svg.append(el("rect", { class: "bar", x: x(d.edges[i]) + 0.75, y: y(c),
      width: Math.max(1, x(d.edges[i + 1]) - x(d.edges[i]) - 1.5), height: Math.max(1, box.b - y(c)),
      "data-tip": `${count(c, "latent")} with density ${(10 ** d.edges[i]).toPrecision(2)} to ${(10 ** d.edges[i + 1]).toPrecision(2)}` })));
    const zw = gap * 0.45, zx = box.l + gap * 0.18;
    svg.append(el("rect", { class: "bar zero", x: zx, y: y(d.zero), width: zw, height: box.b - y(d.zero),
      "data-tip": `${count(d.zero, "latent")} fired on none of ${n}` }),
      el("text", { x: zx + zw / 2, y: box.b + 18 + box.drop, "text-anchor": "middle" }, "0"),
      el("text", { x: zx + zw / 2, y: y(d.zero) - 5, "text-anchor": "middle" }, si(d.zero)));
    for (const v of shown) svg.append(el("path", { class: "shown", d: `M${x(v)},${box.b + 5}l3.5,8h-7z` }));
  }
  const text = `Counted on ${n}. ` + (d.zero === 0 ? "Every latent fired at least once. "
    : `The bar at 0 stands apart: ${count(d.zero, "latent")} never fired there`
      + (d.n ? `, so each has a density below ${num(3 / d.n)} (3/n, 95 % confidence). ` : ". "))
    + (shown.length ? "Triangles: the features shown below." : "");
  return [el("div", { class: "chart" }, svg, el("p", { class: "note" }, text)), draw];
}

// ---- features ------------------------------------------------------------------------------------

const CONTROL = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
function visible(text, lines) {
  return text.replace(CONTROL, (c) => {
    const code = c.codePointAt(0);
    if (c === "\n" || code === 0x2028 || code === 0x2029) return lines ? "↵\n" : "↵";
    if (c === "\t") return "⇥ ";
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}
function token(card, example, i, lines) {
  const act = example.act[i], a = act ? Math.min(1, act / card.max) : 0, text = example.text[i];
  const kinds = ["t", a > 0 && "on", a > 0.45 && "high", i === example.peak && "peak", act === null && "out"];
  const quoted = example.hex[i] ? `bytes ${example.hex[i]}` : `“${visible(text)}”`;
  const node = el("span", { class: kinds.filter(Boolean).join(" "), "data-tip": act === null
    ? `${quoted}\nnot counted: a special token, or a document outside the split`
    : `${quoted}\nactivation ${num(act)}${a ? `, ${Math.round(100 * a)} % of max` : ""}, position ${example.first + i}` });
  if (a > 0) node.style.setProperty("--a", (0.12 + 0.88 * a).toFixed(3));
  node.textContent = visible(text, lines) || "‥"; // a token that only continues a character
  return node;
}
function context(card, example) {
  const part = (from, to) => Array.from({ length: Math.max(0, to - from) }, (_, k) => token(card, example, from + k, false));
  const button = el("button", { type: "button", "aria-expanded": "false",
    "aria-label": `Activation ${num(example.value)}: show the whole context` }, num(example.value));
  const kwic = el("div", { class: "kwic" }, button,
    el("div", { class: "side left" }, el("bdi", {}, ...part(Math.max(0, example.peak - 48), example.peak))),
    el("div", { class: "mid" }, ...part(example.peak, example.peak + 1)),
    el("div", { class: "side" }, el("bdi", {}, ...part(example.peak + 1, Math.min(example.text.length, example.peak + 49)))));
  const row = el("div", { class: "row" }, kwic);
  let full = null;
  kwic.addEventListener("click", (e) => {
    if (e.target !== button && String(getSelection())) return; // text is being selected
    if (!full) {
      const last = example.first + example.text.length - 1;
      full = el("div", { class: "full" }, el("span", { class: "where" },
        `segment ${example.segment}, context ${example.ctx}, positions ${example.first} to ${last}; the context has ${count(example.length, "token")}`),
        ...example.text.map((_, i) => token(card, example, i, true)));
      full.hidden = true;
      row.append(full);
    }
    full.hidden = !full.hidden;
    button.setAttribute("aria-expanded", String(!full.hidden));
  });
  return row;
}
function cardOf(card, all) {
  const stat = (...parts) => el("li", {}, ...parts), b = (v) => el("b", {}, v);
  const head = [stat("density ", b((100 * card.density).toPrecision(3) + " %")), stat("log₁₀ ", b(card.log10_density === null ? "−∞" : card.log10_density.toFixed(2).replace("-", "−"))),
    stat("fires on ", b(card.fires.toLocaleString("en")), ` of ${count(all.n_tokens, "token")}`),
    stat("in ", b(card.contexts.toLocaleString("en")), ` of ${count(all.n_contexts, "context")}`), stat("max ", b(num(card.max)))];
  if (card.mean !== null) head.push(stat("mean when on ", b(num(card.mean))));
  const node = el("article", { class: "card", id: `feature-${card.id}` }, el("h3", {}, `Latent ${card.id}`), el("ul", { class: "stats" }, ...head),
    ...card.examples.map((e) => context(card, e)));
  if (!card.examples.length) node.append(el("p", { class: "empty" }, "It fired on no counted token."));
  node.needle = (`${card.id}\n` + card.examples.map((e) => e.text.join("")).join("\n")).toLowerCase();
  return node;
}
function features(all) {
  if (!all) { $("about").append(el("p", { class: "empty" }, "This run's batches came from no store, so there is no text to show.")); return; }
  const cards = all.cards.map((c) => cardOf(c, all));
  const box = el("input", { type: "search", placeholder: "Filter by text or latent number", "aria-label": "Filter features", autocomplete: "off" });
  const found = el("span", { class: "note", "aria-live": "polite" });
  const filter = () => {
    const q = box.value.toLowerCase();
    for (const c of cards) c.hidden = !c.needle.includes(q);
    found.textContent = `${cards.filter((c) => !c.hidden).length} of ${cards.length} shown`;
  };
  box.addEventListener("input", filter);
  filter();
  const k = Math.max(0, ...all.cards.map((c) => c.examples.length));
  $("about").append(el("p", {}, all.rule), el("p", { class: "note" },
    `Counted on ${count(all.n_tokens, "held-out token").replace("held-out", all.split.replace("_", "-"))} in ${count(all.n_contexts, "context")}; special tokens are not counted. `
    + `${count(all.n_dead, "latent")} of ${all.n_latents.toLocaleString("en")} fired on none of them. Each feature lists at most ${k} contexts, the ones with its largest activations, `
    + "one line each, with the strongest token in the middle. Select a line to read the context."),
    el("div", { class: "bar-top" }, box, found, el("span", { class: "ramp" }, "0", el("i"), "max of the feature")));
  $("cards").append(...cards);
}

// ---- the page ------------------------------------------------------------------------------------

function table(node, heads, rows) {
  node.append(el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, ...rows.map((r) => el("tr", {}, ...r.map((c, i) => el("td", i === 1 ? { class: "num" } : {}, c))))));
}
const tip = $("tip");
document.addEventListener("pointerover", (e) => {
  const on = e.target.closest ? e.target.closest("[data-tip]") : null;
  tip.hidden = !on;
  if (!on) return;
  tip.textContent = on.dataset.tip;
  const r = on.getClientRects()[0] || on.getBoundingClientRect(), w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = Math.max(6, Math.min(innerWidth - w - 6, r.left)) + "px";
  tip.style.top = (r.top > h + 12 ? r.top - h - 6 : r.bottom + 6) + "px";
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

for (const [k, v] of data.facts) $("facts").append(el("div", v.length > 24 ? { class: "wide" } : {}, el("dt", {}, k), el("dd", {}, v)));
for (const t of data.tiles) $("tiles").append(el("div", { class: "tile" }, el("div", { class: "label" }, t.label),
  el("div", { class: "value" }, t.value, " ", el("span", { class: "extra" }, t.extra)),
  ...(t.formula ? [el("p", { class: "formula" }, t.formula)] : []), el("p", {}, t.note)));
table($("metrics"), ["Number", "Value", "Formula"], data.metrics);
table($("config"), ["Setting", "Value"], data.settings);
const plots = data.charts.map((c) => { const [node, draw] = curve(c); $("charts").append(node); return draw; });
if (!data.charts.length) $("charts").append(el("p", { class: "empty" }, "metrics.jsonl has no curve."));
if (data.density) { const [node, draw] = histogram(data.density); $("histogram").append(node); plots.push(draw); }
else $("histogram").append(el("p", { class: "empty" }, "eval.json has no density histogram."));
const drawAll = () => plots.forEach((draw) => draw());
drawAll();
window.addEventListener("resize", drawAll);
features(data.features);
root.dataset.ready = "true";
