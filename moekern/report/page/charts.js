"use strict";
// Everything that is shown comes from the JSON in #data; text goes into the page as text only.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const COLOURS = ["#2f7ed8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#888888"];
const keys = D.layers.map(l => l.key);
const sizes = D.layers.map(l => l.experts);
const starts = sizes.reduce((s, n) => [...s, s[s.length - 1] + n], [0]);
const state = { plan: D.names[0] || "", layer: 0, value: "tokens", scale: "log", dim: D.names.length > 0 };

let printing = false; // on white paper, whatever the screen is

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const values = {};
const valuesOf = name => values[name] ||= D.values[name] && new Float32Array(bytes(D.values[name]).buffer);
const keptBits = {};
const isKept = (plan, layer, e) => {
  const i = starts[layer] + e, bits = keptBits[plan] ||= bytes(D.kept[plan]);
  return (bits[i >> 3] >> (i & 7) & 1) === 1;
};
const fmt = v => v === null || v === undefined || Number.isNaN(v) ? "not known"
  : Number.isInteger(v) ? v.toLocaleString("en") : Number(v.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
const percent = v => v === null || v === undefined ? "not known" : (100 * v).toFixed(1) + " %";

function make(parent, name, attributes = {}, text) {
  const html = parent instanceof HTMLElement && name !== "svg";
  const element = html ? document.createElement(name) : document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function svg(host, height, label) {
  const focused = host.contains(document.activeElement);
  host.replaceChildren();
  const width = Math.max(280, host.clientWidth);
  const chart = make(host, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "application", "aria-roledescription": "chart", "aria-label": label, tabindex: 0 });
  if (focused) chart.focus({ preventScroll: true });
  return { chart, width };
}

// The tooltip, which a screen reader hears as well.
const tip = $("tip");
function tell(text, x, y) {
  tip.textContent = text;
  tip.hidden = !text;
  if (!text) return;
  tip.style.left = Math.max(4, Math.min(x + 12, window.innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, y + 16 + tip.offsetHeight > window.innerHeight ? y - tip.offsetHeight - 10 : y + 16) + "px";
}
function explore(element, at, say, move, pick) {
  // at(x, y) -> a place or null; say(place) -> text; move(place, dx, dy) -> the next place by arrow keys
  let place = null;
  const where = event => { const box = element.getBoundingClientRect(); return at(event.clientX - box.left, event.clientY - box.top); };
  element.onpointermove = event => { place = where(event); tell(place === null ? "" : say(place), event.clientX, event.clientY); };
  element.onpointerleave = element.onblur = () => tell("");
  element.onclick = event => { const found = where(event); if (found !== null && pick) pick(found); };
  element.onkeydown = event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Enter" && place !== null && pick) return pick(place);
    if (event.key === "Escape") return tell("");
    if (!step) return;
    event.preventDefault();
    place = move(place, ...step);
    const box = element.getBoundingClientRect();
    tell(say(place), box.left + 40, Math.max(20, Math.min(box.top + 20, window.innerHeight - 80)));
  };
}
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
const along = n => (place, dx) => place === null ? 0 : clamp(place + dx, 0, n - 1);

function legend(host, rows) {
  host.replaceChildren();
  for (const [text, colour, dash] of rows) {
    const item = make(host, "li"), mark = make(item, "svg", { width: 26, height: 8, "aria-hidden": "true" });
    make(mark, "line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash });
    make(item, "span", {}, text);
  }
}

// Shares removed of saliency and of tokens against the share of experts removed.
function curves() {
  const host = $("curve"), height = 340, left = 46, bottom = 40, { chart, width } = svg(host, height, "cut curves; the table below holds the numbers");
  const X = v => left + v * (width - left - 26), Y = v => height - bottom - v * (height - bottom - 12);
  for (const v of [0, .25, .5, .75, 1]) {
    make(chart, "line", { class: "grid", x1: X(0), x2: X(1), y1: Y(v), y2: Y(v) });
    make(chart, "line", { class: "grid", x1: X(v), x2: X(v), y1: Y(0), y2: Y(1) });
    make(chart, "text", { class: "tick", x: X(0) - 6, y: Y(v) + 4, "text-anchor": "end" }, 100 * v + " %");
    make(chart, "text", { class: "tick", x: X(v), y: Y(0) + 16, "text-anchor": "middle" }, 100 * v + " %");
  }
  make(chart, "text", { class: "tick", x: X(.5), y: height - 4, "text-anchor": "middle" }, "experts removed");
  make(chart, "line", { class: "chance", x1: X(0), y1: Y(0), x2: X(1), y2: Y(1) });
  const rows = [["random", "#888888", "2 3"]];
  D.curves.forEach((curve, i) => {
    const colour = COLOURS[i % COLOURS.length], n = curve.saliency.length - 1;
    for (const [what, dash] of [["saliency", ""], ["tokens", "6 4"]]) {
      make(chart, "path", { d: curve[what].map((v, j) => (j ? "L" : "M") + X(j / n) + " " + Y(v)).join(""), fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash });
      if (curve.cut) make(chart, "circle", { cx: X(curve.cut.experts), cy: Y(curve.cut[what]), r: 4.5, fill: what === "tokens" ? "var(--page)" : colour, stroke: colour, "stroke-width": 2 });
      rows.push([`${curve.name}: ${what === "tokens" ? "traffic" : "saliency"}`, colour, dash]);
    }
    if (curve.knee) {
      const x = X(curve.knee.experts), y = Y(curve.knee.saliency);
      make(chart, "path", { d: `M${x} ${y - 7}L${x + 6} ${y}L${x} ${y + 7}L${x - 6} ${y}Z`, fill: "var(--page)", stroke: colour, "stroke-width": 2 });
    }
    if (curve.cut) make(chart, "line", { x1: X(curve.cut.experts), x2: X(curve.cut.experts), y1: Y(0), y2: Y(1), stroke: colour, "stroke-width": 1, "stroke-dasharray": "1 3" });
  });
  legend($("curve-legend"), rows);
  const n = D.curves[0].saliency.length;
  explore(chart, x => clamp(Math.round((x - left) / (width - left - 26) * (n - 1)), 0, n - 1),
    j => `${percent(j / (n - 1))} of the experts removed\n` + D.curves.map(c => `${c.name}: saliency ${percent(c.saliency[j])}, traffic ${percent(c.tokens[j])}${c.knee && Math.round(c.knee.experts * (n - 1)) === j ? " (knee)" : ""}`).join("\n"), along(n));
}

// A value with its error, or an interval, on one axis for each row.
function intervals(host, label, rows, form) {
  const known = rows.flatMap(r => [r.low, r.high, r.mean]).filter(v => v !== null);
  const low = Math.min(0, ...known), high = Math.max(1e-9, ...known), row = 36, { chart, width } = svg(host, rows.length * row + 22, label);
  const X = v => 8 + (v - low) / (high - low) * (width - 16);
  make(chart, "line", { class: "axis", x1: X(0), x2: X(0), y1: 0, y2: rows.length * row });
  rows.forEach((r, i) => {
    const y = i * row + 26;
    make(chart, "text", { class: "label", x: 13, y: y - 11 }, r.name);
    if (r.low !== null && r.high !== null) make(chart, "line", { class: "bar", x1: X(r.low), x2: X(r.high), y1: y, y2: y });
    make(chart, "circle", { class: r.open ? "dot open" : "dot", cx: X(r.mean), cy: y, r: 4 });
  });
  for (const v of [low, high]) make(chart, "text", { class: "tick", x: X(v), y: rows.length * row + 16, "text-anchor": v === low ? "start" : "end" }, form(v));
  explore(chart, (x, y) => clamp(Math.floor(y / row), 0, rows.length - 1), i => rows[i].told, (p, dx, dy) => p === null ? 0 : clamp(p + dx + dy, 0, rows.length - 1));
}
// A line a plan over buckets, with bars of errors.
function buckets(axis, rows) {
  const host = $("by-" + axis), names = D.evaluation.rows.map(r => r.name).filter(name => name !== D.evaluation.original && rows.some(r => name in r.plans));
  if (!host || !names.length) return;
  const height = 220, left = 46, { chart, width } = svg(host, height, `KL of plans by ${axis}; the table below holds the numbers`);
  const end = ({ value, error }) => value + (error || 0), known = rows.flatMap(r => Object.values(r.plans).map(p => end(p.kl))), high = Math.max(1e-9, ...known);
  const X = i => left + (i + .5) * (width - left - 8) / rows.length, Y = v => 10 + (1 - v / high) * (height - 60);
  for (const v of [0, high / 2, high]) {
    make(chart, "line", { class: "grid", x1: left, x2: width - 8, y1: Y(v), y2: Y(v) });
    make(chart, "text", { class: "tick", x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, Number(v.toPrecision(2)));
  }
  const every = Math.ceil(62 * rows.length / (width - left));
  rows.forEach((r, i) => i % every || make(chart, "text", { class: "tick", x: X(i), y: height - 34, "text-anchor": "middle" }, r.label));
  make(chart, "text", { class: "tick", x: left + (width - left) / 2, y: height - 14, "text-anchor": "middle" }, axis);
  names.forEach((name, n) => {
    const colour = COLOURS[n % COLOURS.length], shift = 3 * (n - (names.length - 1) / 2);
    const points = rows.map((r, i) => r.plans[name] && [X(i) + shift, r.plans[name].kl]).filter(Boolean);
    make(chart, "path", { d: points.map(([x, kl], i) => `${i ? "L" : "M"}${x} ${Y(kl.value)}`).join(""), fill: "none", stroke: colour, "stroke-width": 2 });
    for (const [x, kl] of points) if (kl.error !== null) make(chart, "line", { x1: x, x2: x, y1: Y(end(kl)), y2: Y(Math.max(0, kl.value - kl.error)), stroke: colour });
  });
  legend($(`by-${axis}-legend`), names.map((name, n) => [name, COLOURS[n % COLOURS.length], ""]));
  explore(chart, x => clamp(Math.floor((x - left) / (width - left - 8) * rows.length), 0, rows.length - 1),
    i => `${axis} ${rows[i].label}\n` + names.filter(name => name in rows[i].plans).map(name => { const { value, error } = rows[i].plans[name].kl; return `${name}: KL ${fmt(value)}` + (error === null ? "" : ` ± ${fmt(error)}`); }).join("\n"), along(rows.length));
}
function evaluation() {
  if (!D.evaluation) return;
  for (const [axis, rows] of Object.entries(D.evaluation.buckets)) buckets(axis, rows);
  const rows = D.evaluation.rows.filter(r => r.name !== D.evaluation.original).map(r => {
    const { value, error } = r.kl;
    return { name: r.name, mean: value, low: error === null ? null : value - error, high: error === null ? null : value + error, told: `${r.name}: KL ${fmt(value)}` + (error === null ? "" : ` ± ${fmt(error)} nats a token`) };
  });
  if (rows.length) intervals($("kl"), "KL of each plan with its standard error", rows, fmt);
  const pairs = D.evaluation.pairs.filter(p => p.metric === "kl").slice(0, 30).map(p => ({
    name: `${p.plan} - ${p.than}`, mean: p.mean, low: p.low, high: p.high, open: !p.clear,
    told: `${p.plan} has ${fmt(p.mean)} more KL than ${p.than}` + (p.low === null ? "" : ` (95 %: ${fmt(p.low)} to ${fmt(p.high)})`) + (p.clear ? "" : ": not told apart"),
  }));
  if (pairs.length) intervals($("pairs"), "paired differences of KL with intervals of 95 %", pairs, fmt);
}

// A row of bars for each number, a bar a layer; signed ones stand on a line in the middle.
function strips(host, label, rows) {
  const n = keys.length, row = 64, { chart, width } = svg(host, rows.length * row + 18, label), left = 4;
  const step = Math.min(48, (width - left - 4) / n), end = left + n * step;
  rows.forEach((r, i) => {
    const known = r.values.filter(v => v !== null), high = r.top ?? Math.max(1e-12, ...known), base = i * row + (r.signed ? 36 : 54);
    make(chart, "text", { class: "label", x: left, y: i * row + 13 }, `${r.label} (${r.signed ? `${r.form(-high)} ` : ""}to ${r.form(high)})`);
    make(chart, "line", { class: "axis", x1: left, x2: end, y1: base, y2: base });
    r.values.forEach((v, j) => {
      if (v === null) return;
      const h = (r.signed ? 18 : 34) * clamp(Math.abs(v) / high, 0, 1);
      make(chart, "rect", { class: j === state.layer ? "fill chosen" : "fill", x: left + j * step + step * .08, width: Math.max(1, step * .84), y: v < 0 ? base : base - h, height: Math.max(v === 0 ? 0 : 1, h) });
    });
  });
  for (const j of new Set([0, n - 1])) make(chart, "text", { class: "tick", x: left + (j + (j ? 1 : 0)) * step, y: rows.length * row + 12, "text-anchor": j ? "end" : "start" }, "layer " + keys[j]);
  explore(chart, x => clamp(Math.floor((x - left) / step), 0, n - 1), j => `layer ${keys[j]}\n` + rows.map(r => `${r.label}: ${r.form(r.values[j])}`).join("\n"), (place, dx) => place === null ? state.layer : clamp(place + dx, 0, n - 1), chooseLayer);
}
function evaluated() {
  const found = D.evaluation && D.evaluation.layers[state.plan];
  if (!found) return [];
  const row = (what, label, form, top) => ({ label: "evaluated: " + label, values: keys.map(key => found[key] ? found[key][what] : null), form, top });
  return [row("error", "relative error of the stream", percent), row("cosine", "cosine of the stream", fmt, 1), row("orphans", "orphans", percent),
    row("load", "load, busiest over mean", fmt), row("same_top1", "same first expert", percent, 1), row("overlap", "same choice", percent, 1)].filter(r => r.values.some(v => v !== null));
}
function layerStrips() {
  const rows = D.by_plan[state.plan];
  if (rows) {
    const of = name => rows.map(r => r[name]);
    strips($("strips"), "what the plan does in each layer", [
      { label: "saliency at the cut, over the layer's mean", values: of("at_cut"), form: fmt },
      { label: "saliency removed", values: of("saliency"), form: percent },
      { label: "traffic removed", values: of("tokens"), form: percent },
      { label: "tail risk: dropped experts that spike", values: of("spiking"), form: percent, top: 1 },
      { label: "absorbed: co-firing traffic that stays", values: of("absorbed"), form: percent, top: 1 },
      { label: "load of the kept, largest over mean", values: of("max_over_mean"), form: fmt },
      { label: "load of the kept, deviation over mean", values: of("variation"), form: fmt },
      { label: "Gini of the kept experts' load", values: of("gini"), form: fmt, top: 1 },
      ...evaluated(),
    ]);
  }
  const orders = state.plan ? [state.plan] : D.curves.map(c => c.name);
  strips($("follows-strips"), "what scores go with in each layer", orders.flatMap(name =>
    [["count", "tokens"], ["gate", "mean gate"], ["norm", "mean output norm"]].map(([what, label]) => ({ label: `${name} with ${label}`, values: D.follows[name].map(l => l[what]), form: fmt, top: 1, signed: true }))));
  strips($("coverage-strips"), "coverage of each layer", [
    { label: "experts with too few tokens", values: D.layers.map(l => l.thin / l.experts), form: percent },
    { label: "median tokens of an expert", values: D.layers.map(l => l.median), form: fmt },
    ...Object.entries(D.stability).filter(([, rows]) => rows && rows.some(r => r.kept !== null)).map(([name, rows]) => ({ label: `halves keep alike, ${name}`, values: rows.map(r => r.kept), form: fmt, top: 1 })),
  ]);
  strips($("router-strips"), "router of each layer", [
    { label: "router entropy, of ln E", values: D.layers.map(l => l.router.entropy), form: percent, top: 1 },
    { label: "dead experts", values: D.layers.map(l => l.router.dead / l.experts), form: percent },
    { label: "load, largest over mean", values: D.layers.map(l => l.router.max_over_mean), form: fmt },
    { label: "load, deviation over mean", values: D.layers.map(l => l.router.variation), form: fmt },
    { label: "load, Gini", values: D.layers.map(l => l.router.gini), form: fmt, top: 1 },
    { label: "largest |z| of load", values: D.layers.map(l => l.router.load_z && Math.abs(l.router.load_z.z)), form: fmt },
    { label: "largest |z| of output norm", values: D.layers.map(l => l.router.norm_z && Math.abs(l.router.norm_z.z)), form: fmt },
    ...(D.layers.some(l => l.router.variance) ? [{ label: "logits: variance within clusters, of all", values: D.layers.map(l => l.router.variance && l.router.variance.share), form: percent, top: 1 }] : []),
  ]);
  const told = D.layers.map(l => l.domains), found = told.find(d => d);
  if (found) strips($("domain-strips"), "domains and experts of each layer", [
    { label: "degradation: experts of one domain", values: told.map((d, i) => d && d.owned / sizes[i]), form: percent },
    ...Object.keys(found.served).slice(0, 8).map(name => ({ label: `on its own experts: mass of ${name}`, values: told.map(d => d && name in d.served ? d.served[name] : null), form: percent, top: 1 })),
  ]);
}

// Colours: a sequence from dark to light, and two sides of a middle.
const SEQUENCE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const SIDES = [[33, 102, 172], [146, 197, 222], [225, 225, 225], [253, 184, 99], [179, 88, 6]];
function colour(stops, t) {
  const at = clamp(t, 0, 1) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at)), f = at - i;
  return stops[i].map((v, c) => Math.round(v + f * (stops[i + 1][c] - v)));
}
const rgb = c => `rgb(${c[0]},${c[1]},${c[2]})`;

function grid(id, columns, rows, rowNames, cell, say, pick, label, names = null) {
  const canvas = $(id), host = canvas.parentElement, gutter = 54, margin = 10;
  // names of rows and of columns alike: a matrix, whose cells are square
  const w = clamp(Math.floor((host.clientWidth - gutter - margin) / columns), 3, names ? 22 : 30), h = names ? w : rows > 100 ? clamp(w, 3, 10) : rows > 24 ? 11 : 20;
  const ratio = window.devicePixelRatio || 1, draw = canvas.getContext("2d");
  canvas.width = (gutter + w * columns + margin) * ratio; canvas.height = (h * rows + 16) * ratio;
  canvas.style.width = gutter + w * columns + margin + "px"; canvas.style.height = h * rows + 16 + "px";
  canvas.setAttribute("aria-label", label);
  draw.scale(ratio, ratio);
  draw.font = "11px system-ui, sans-serif";
  const ink = printing ? "#1c1f24" : getComputedStyle(document.body).color, every = Math.ceil(14 / h);
  draw.textAlign = "right"; draw.textBaseline = "middle"; draw.fillStyle = ink;
  for (let r = 0; r < rows; r += every) draw.fillText(String(rowNames(r)).slice(0, 9), gutter - 5, Math.max(6, h * (r + .5)));
  draw.textAlign = "center";
  const ticks = Math.max(1, Math.ceil(28 / w));
  for (let c = 0; c < columns; c += ticks) draw.fillText(names ? names(c) : c, gutter + w * (c + .5), h * rows + 9);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    const found = cell(r, c);
    if (!found) continue;
    draw.fillStyle = rgb(found.colour);
    draw.fillRect(gutter + w * c, h * r, w > 5 ? w - 1 : w, h > 5 ? h - 1 : h);
    if (found.crossed && w > 6) {
      draw.strokeStyle = "#ffffff"; draw.beginPath(); draw.moveTo(gutter + w * c + 2, h * (r + 1) - 3); draw.lineTo(gutter + w * (c + 1) - 3, h * r + 2); draw.stroke();
    }
  }
  const at = (x, y) => { const c = Math.floor((x - gutter) / w), r = Math.floor(y / h); return c >= 0 && c < columns && r >= 0 && r < rows ? [r, c] : null; };
  explore(canvas, at, say, (p, dx, dy) => p === null ? [0, 0] : [clamp(p[0] + dy, 0, rows - 1), clamp(p[1] + dx, 0, columns - 1)], pick);
}

function keptText(layer, e) {
  return state.plan && D.kept[state.plan] ? (isKept(state.plan, layer, e) ? `kept by ${state.plan}` : `dropped by ${state.plan}`) : "";
}
function heat() {
  const all = valuesOf(state.value), scaled = new Float32Array(all.length);
  const positive = all.every(v => v >= 0), log = state.scale === "log" && positive;
  let low = Infinity, high = -Infinity;
  if (log) for (const v of all) if (v > 0) { low = Math.min(low, Math.log(v)); high = Math.max(high, Math.log(v)); }
  for (let r = 0; r < keys.length; r++) {
    const row = all.subarray(starts[r], starts[r + 1]);
    if (log) row.forEach((v, e) => { scaled[starts[r] + e] = v > 0 ? (Math.log(v) - low) / Math.max(1e-9, high - low) : 0; });
    else if (state.scale === "layer") {
      const a = Math.min(...row), b = Math.max(...row);
      row.forEach((v, e) => { scaled[starts[r] + e] = b > a ? (v - a) / (b - a) : .5; });
    } else Array.from(row.keys()).sort((a, b) => row[a] - row[b]).forEach((e, place) => { scaled[starts[r] + e] = place / Math.max(1, row.length - 1); });
  }
  $("scale-note").textContent = state.scale === "log" && !positive ? "Values are not all positive: shown by their rank in the layer." : "";
  const dim = state.dim && D.kept[state.plan];
  grid("heat", Math.max(...sizes), keys.length, r => keys[r], (r, e) => {
    if (e >= sizes[r]) return null;
    const c = colour(SEQUENCE, scaled[starts[r] + e]), gone = dim && !isKept(state.plan, r, e);
    const grey = Math.round(110 + .35 * (.3 * c[0] + .59 * c[1] + .11 * c[2]));
    return { colour: gone ? [grey, grey, grey] : c, crossed: gone };
  }, ([r, e]) => e >= sizes[r] ? `layer ${keys[r]} has ${sizes[r]} experts` : [`layer ${keys[r]}, expert ${e}`, `${state.value}: ${fmt(all[starts[r] + e])}`, keptText(r, e)].filter(Boolean).join("\n"),
  ([r]) => chooseLayer(r), `${state.value}, a row a layer, a column an expert; arrow keys read it, Enter chooses the layer`);
}

function sorted() {
  const layer = state.layer, name = D.shown[state.plan] || D.shown[D.curves[0].name], all = valuesOf(name);
  const host = $("sorted"), said = `of layer ${keys[layer]}, by ${name}`;
  if (!all) { host.replaceChildren(); make(host, "p", {}, `${name} is not in this file, which would grow too large; --json has it.`); expertTable(null, ""); return; }
  const row = Array.from(all.subarray(starts[layer], starts[layer + 1]));
  const order = row.map((v, e) => e).sort((a, b) => row[b] - row[a] || a - b), kept = e => D.kept[state.plan] ? isKept(state.plan, layer, e) : true;
  const height = 220, { chart, width } = svg(host, height, `experts ${said}, from the highest to the lowest`);
  const low = Math.min(0, ...row), high = Math.max(1e-30, ...row), step = (width - 8) / row.length, Y = v => 14 + (high - v) / (high - low) * (height - 34);
  order.forEach((e, i) => make(chart, "rect", { class: kept(e) ? "fill" : "gone", x: 4 + i * step, width: Math.max(.8, step * .85), y: Math.min(Y(row[e]), Y(0)), height: Math.max(1, Math.abs(Y(row[e]) - Y(0))) }));
  const count = order.filter(kept).length;
  if (count < row.length) {
    make(chart, "line", { class: "cut", x1: 4 + count * step, x2: 4 + count * step, y1: 4, y2: height - 18 });
    make(chart, "text", { class: "label", x: clamp(4 + count * step + 5, 0, width - 90), y: 12 }, `${count} stay`);
  }
  make(chart, "text", { class: "tick", x: 4, y: height - 4 }, `layer ${keys[layer]}: ${fmt(row[order[0]])} down to ${fmt(row[order[row.length - 1]])}`);
  explore(chart, x => clamp(Math.floor((x - 4) / step), 0, row.length - 1), i => [`place ${i + 1}: expert ${order[i]}`, `${name}: ${fmt(row[order[i]])}`, keptText(layer, order[i])].filter(Boolean).join("\n"), along(row.length));
  expertTable(order.map(e => [e, fmt(valuesOf("tokens")[starts[layer] + e]), fmt(row[e]), D.kept[state.plan] ? (kept(e) ? "kept" : "dropped") : ""]), name);
}
function table(host, head, rows) {
  host.replaceChildren();
  if (!rows) return;
  const top = make(make(host, "thead"), "tr"), body = make(host, "tbody");
  for (const text of head) make(top, "th", { scope: "col" }, text);
  for (const row of rows) { const line = make(body, "tr"); row.forEach((text, i) => make(line, i ? "td" : "th", i ? {} : { scope: "row" }, text)); }
}
const expertTable = (rows, name) => table($("experts"), ["expert", "tokens", name, "plan"], rows);

function domains() {
  const layer = state.layer, found = D.preferences[layer], names = found ? Object.keys(found) : [];
  $("domain-heat").hidden = !names.length;
  $("domain-none").hidden = names.length > 0;
  if (!names.length) return;
  const rows = names.map(name => new Int8Array(bytes(found[name]).buffer));
  const text = v => v === -128 ? "no tokens" : v === -127 ? "never" : `${fmt(2 ** (v / 16))} times the mean of domains`;
  grid("domain-heat", sizes[layer], names.length, r => names[r], (r, e) => rows[r][e] === -128 ? null : { colour: colour(SIDES, .5 + rows[r][e] / 96), crossed: false },
    ([r, e]) => [`layer ${keys[layer]}, expert ${e}, ${names[r]}`, `share of slots: ${text(rows[r][e])}`, keptText(layer, e)].filter(Boolean).join("\n"), null, `layer ${keys[layer]}: domains by experts`);
  table($("domain-table"), ["expert", ...names], Array.from({ length: sizes[layer] }, (_, e) => [e, ...rows.map(row => text(row[e]))]));
}

// A matrix of pairs of the layer's most used experts, held as a byte for each pair above the diagonal; 0 is not known.
function pairs(id, cells, place, text, label) {
  const layer = state.layer, shown = D.pairs[layer].experts, n = shown.length;
  const at = (i, j) => { const [a, b] = i < j ? [i, j] : [j, i]; return a * n - a * (a + 1) / 2 + (b - a - 1); };
  const value = (i, j) => i === j ? 0 : cells[at(i, j)];
  grid(id, n, n, r => shown[r], (i, j) => value(i, j) === 0 ? null : { colour: colour(SIDES, place(value(i, j))), crossed: false },
    ([i, j]) => i === j ? `expert ${shown[i]}` : `layer ${keys[layer]}, experts ${shown[i]} and ${shown[j]}\n${value(i, j) ? text(value(i, j)) : "not known"}`, null, `layer ${keys[layer]}: ${label}`, c => shown[c]);
}
function together() {
  const layer = state.layer, found = D.pairs[layer], alike = found.alike !== null;
  for (const span of document.querySelectorAll("[data-busy]")) span.textContent = found.experts.length < sizes[layer] ? `The ${found.experts.length} most used experts of ${sizes[layer]}.` : "";
  pairs("lift", bytes(found.lift), v => .5 + (v - 128) / 96, v => v === 1 ? "never together" : `lift ${fmt(2 ** ((v - 128) / 16))}`, "lift of pairs of experts");
  $("alike").hidden = $("alike-ramp").hidden = !alike;
  $("alike-what").textContent = alike ? found.like : "Outputs were not measured: --tier dimensions, or replay.";
  const cells = alike ? bytes(found.alike) : [], high = cells.reduce((most, v) => v ? Math.max(most, Math.abs(v - 128)) : most, 1);
  for (const [id, sign] of [["alike-low", -1], ["alike-high", 1]]) $(id).textContent = fmt(sign * high / 127);
  if (alike) pairs("alike", cells, v => .5 + (v - 128) / (2 * high), v => `cosine ${fmt((v - 128) / 127)}`, found.like);
  const both = p => p.experts.join(" and "), stay = p => D.kept[state.plan] ? ["both dropped", "one kept", "both kept"][p.experts.filter(e => isKept(state.plan, layer, e)).length] : "";
  table($("strongest"), ["experts", "tokens together", "lift", "plan"], found.strongest.map(p => [both(p), fmt(p.tokens), fmt(p.lift), stay(p)]));
  table($("nearest"), ["experts", "cosine", "plan"], alike && found.nearest.map(p => [both(p), fmt(p.cosine), stay(p)]));
}

function ofLayer() {
  for (const span of document.querySelectorAll("[data-layer]")) span.textContent = "layer " + keys[state.layer];
  sorted(); domains(); together(); reachable();
}
function chooseLayer(layer) { state.layer = layer; $("layer").value = layer; ofLayer(); layerStrips(); }
function options(select, names) { for (const [value, text] of names) make(select, "option", { value }, text); }

options($("layer"), keys.map((key, i) => [i, key]));
options($("plan"), D.names.map(name => [name, name]));
options($("value"), Object.keys(D.values).map(name => [name, name]));
$("dim").checked = state.dim;
$("layer").onchange = event => chooseLayer(+event.target.value);
$("plan").onchange = event => { state.plan = event.target.value; heat(); layerStrips(); ofLayer(); };
$("value").onchange = event => { state.value = event.target.value; heat(); };
$("scale").onchange = event => { state.scale = event.target.value; heat(); };
$("dim").onchange = event => { state.dim = event.target.checked; heat(); };
// What scrolls can be reached by the keyboard.
function reachable() {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth && !box.querySelector("canvas")) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
function all() { evaluation(); curves(); heat(); layerStrips(); ofLayer(); }
document.addEventListener("toggle", reachable, true);
let width = window.innerWidth;
window.onresize = () => { if (window.innerWidth !== width) { width = window.innerWidth; all(); } };
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
for (const [event, value] of [["beforeprint", true], ["afterprint", false]]) window.addEventListener(event, () => { printing = value; heat(); ofLayer(); });
document.documentElement.classList.add("live");
all();
