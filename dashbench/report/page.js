"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";

function make(tag, attributes, parent, text) {
  const e = document.createElementNS(NS, tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.appendChild(e);
  return e;
}
function html(tag, attributes, parent, text) {
  const e = document.createElement(tag);
  for (const k in attributes) e.setAttribute(k, attributes[k]);
  if (text !== undefined) e.textContent = text;
  if (parent) parent.appendChild(e);
  return e;
}
const tokens = (n) => (n % 1024 === 0 ? n / 1024 + "k" : String(n));
const plain = (v) => String(Number(v.toPrecision(3)));

// Ticks of a log axis: 1, 2 and 5 a decade where there is room, powers of ten otherwise.
function logTicks(low, high) {
  const out = [];
  const steps = high / low > 300 ? [1] : [1, 2, 5];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
    for (const s of steps) {
      const v = s * 10 ** e;
      if (v >= low * 0.999 && v <= high * 1.001) out.push(v);
    }
  return out;
}
function linearTicks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2));
  const by = (high - low) / step > 12 ? 5 * step : (high - low) / step > 5 ? 2 * step : step;
  const out = [];
  for (let v = Math.ceil(low / by) * by; v <= high + 1e-9; v += by) out.push(Number(v.toPrecision(8)));
  return out;
}
// Moves labels apart, keeping their order.
function spread(places, gap) {
  const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const y = order.map((i) => places[i]);
  for (let round = 0; round < 200; round++) {
    let moved = false;
    for (let i = 0; i + 1 < y.length; i++) {
      const lack = gap - (y[i + 1] - y[i]);
      if (lack > 1e-6) { y[i] -= lack / 2; y[i + 1] += lack / 2; moved = true; }
    }
    if (!moved) break;
  }
  const out = [];
  order.forEach((i, k) => { out[i] = y[k]; });
  return out;
}

const DASHES = ["", "6 4", "2 3", "8 3 2 3"];

function drawLines(box, chart, panel, hidden) {
  const narrow = box.clientWidth < 520;
  const W = Math.max(300, box.clientWidth), H = narrow ? 280 : 380;
  const M = { l: 50, r: narrow ? 96 : 150, t: 10, b: 42 };
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${chart.title}: ${panel.name}` }, box);
  const shown = panel.series.filter((s) => !hidden.has(s.method));
  const points = shown.flatMap((s) => s.points);
  if (!points.length) { make("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, svg, "nothing selected"); return; }
  const pareto = chart.kind === "pareto";
  const xs = points.flatMap((p) => (pareto ? [p[4], p[5]] : [p[0]])).filter((v) => v > 0);
  let x0 = Math.min(...xs), x1 = Math.max(...xs);
  if (x0 === x1) { x0 /= 2; x1 *= 2; }
  x0 /= 1.08; x1 *= 1.08;
  let y0 = Math.min(...points.map((p) => p[2])), y1 = Math.max(...points.map((p) => p[3]));
  if (chart.line) { y0 = Math.min(y0, chart.line); y1 = Math.max(y1, chart.line); }
  if (pareto) { const pad = 0.05 * (y1 - y0 || 1); y0 -= pad; y1 = Math.min(1.02, y1 + pad); }
  else { y0 /= 1.15; y1 *= 1.15; }
  const turned = pareto && panel.sparsity;
  const X = (v) => {
    const share = Math.log(v / x0) / Math.log(x1 / x0);
    return M.l + (turned ? 1 - share : share) * (W - M.l - M.r);
  };
  const Y = (v) => H - M.b - (pareto ? (v - y0) / (y1 - y0) : Math.log(v / y0) / Math.log(y1 / y0)) * (H - M.t - M.b);
  const grid = make("g", { stroke: "#e4e4e4" }, svg), words = make("g", { fill: "#444" }, svg);
  for (const v of pareto ? linearTicks(y0, y1) : logTicks(y0, y1)) {
    make("line", { x1: M.l, x2: W - M.r, y1: Y(v), y2: Y(v) }, grid);
    make("text", { x: M.l - 6, y: Y(v) + 4, "text-anchor": "end" }, words, plain(v));
  }
  let ticks;
  if (turned) ticks = Array.from({ length: 10 }, (_, i) => 2 ** -i).filter((v) => v >= x0 && v <= x1).map((v) => [v, plain(100 * (1 - v)) + " %"]);
  else if (pareto) ticks = (x1 / x0 > 4 ? logTicks(x0, x1) : linearTicks(x0, x1)).map((v) => [v, plain(v)]);
  else ticks = [...new Set(xs)].sort((a, b) => a - b).map((v) => [v, tokens(v)]);
  let last = -1e9;
  const power = (v) => pareto || (v & (v - 1)) === 0;
  const placed = [];
  for (const [v, name] of [...ticks].sort((a, b) => power(b[0]) - power(a[0]) || a[0] - b[0])) {
    if (placed.some((p) => Math.abs(p - X(v)) < 34)) continue;
    placed.push(X(v));
    make("line", { x1: X(v), x2: X(v), y1: M.t, y2: H - M.b }, grid);
    make("text", { x: X(v), y: H - M.b + 16, "text-anchor": "middle" }, words, name);
  }
  make("text", { x: (M.l + W - M.r) / 2, y: H - 6, "text-anchor": "middle" }, words, panel.x || chart.x);
  make("text", { x: 12, y: (M.t + H - M.b) / 2, transform: `rotate(-90 12 ${(M.t + H - M.b) / 2})`, "text-anchor": "middle" }, words, chart.y);
  if (chart.line) make("line", { x1: M.l, x2: W - M.r, y1: Y(chart.line), y2: Y(chart.line), stroke: "#888", "stroke-width": 1.5 }, svg);
  const members = {};
  const ends = [];
  for (const s of shown) {
    const nth = (members[s.method] = (members[s.method] ?? -1) + 1);
    const g = make("g", { stroke: s.colour, fill: s.colour }, svg);
    const path = s.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    make("path", { d: path, fill: "none", "stroke-width": 2, "stroke-dasharray": DASHES[nth % 4] }, g);
    s.points.forEach((p, i) => {
      make("line", { x1: X(p[0]), x2: X(p[0]), y1: Y(p[2]), y2: Y(p[3]), "stroke-width": 1.2 }, g);
      if (pareto) make("line", { x1: X(p[4]), x2: X(p[5]), y1: Y(p[1]), y2: Y(p[1]), "stroke-width": 1.2 }, g);
      const open = pareto && s.marks[i] !== "on";
      const dot = make("circle", { cx: X(p[0]), cy: Y(p[1]), r: 3.6, fill: open ? "#fff" : s.colour, "stroke-width": 1.6 }, g);
      const name = pareto ? s.names[i] : `${s.label} at ${tokens(p[0])}`;
      make("title", {}, dot, `${name}: ${plain(p[1])} [${plain(p[2])}, ${plain(p[3])}]`);
    });
    const end = turned ? s.points[0] : s.points[s.points.length - 1];
    ends.push([Y(end[1]), s.label, s.colour]);
  }
  const heights = spread(ends.map((e) => e[0]), 14);
  ends.forEach((e, i) => make("text", { x: W - M.r + 7, y: heights[i] + 4, fill: e[2] }, svg, e[1]));
}

function drawStack(box, chart, panel) {
  const W = Math.max(300, box.clientWidth), H = 330;
  const M = { l: 50, r: 70, t: 22, b: 42 };
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${chart.title}: ${panel.name}` }, box);
  const top = 1.1 * Math.max(1, ...panel.bars.map((b) => b.parts.reduce((s, p) => s + p[2], 0)));
  const Y = (v) => H - M.b - (v / top) * (H - M.t - M.b);
  const step = (W - M.l - M.r) / panel.bars.length;
  const words = make("g", { fill: "#444" }, svg);
  for (const v of linearTicks(0, top)) {
    make("line", { x1: M.l, x2: W - M.r, y1: Y(v), y2: Y(v), stroke: "#e4e4e4" }, svg);
    make("text", { x: M.l - 6, y: Y(v) + 4, "text-anchor": "end" }, words, plain(v));
  }
  const colours = new Map();
  panel.bars.forEach((bar, i) => {
    let at = 0;
    const wide = Math.min(90, 0.6 * step), x = M.l + step * (i + 0.5);
    for (const [name, shade, share] of bar.parts) {
      colours.set(name, shade);
      const r = make("rect", { x: x - wide / 2, width: wide, y: Y(at + share), height: Math.max(0, Y(at) - Y(at + share)), fill: shade }, svg);
      make("title", {}, r, `${name}: ${plain(share * bar.dense)} ms of ${plain(bar.ms)} ms`);
      at += share;
    }
    make("text", { x, y: Y(at) - 5, "text-anchor": "middle" }, words, `${plain(bar.ms)} ms`);
    make("text", { x, y: H - M.b + 16, "text-anchor": "middle" }, words, bar.x);
  });
  make("line", { x1: M.l, x2: W - M.r, y1: Y(1), y2: Y(1), stroke: "#000", "stroke-dasharray": "5 4" }, svg);
  make("text", { x: W - M.r + 6, y: Y(1) + 4 }, words, "best dense");
  make("text", { x: (M.l + W - M.r) / 2, y: H - 6, "text-anchor": "middle" }, words, chart.x);
  make("text", { x: 12, y: H / 2, transform: `rotate(-90 12 ${H / 2})`, "text-anchor": "middle" }, words, chart.y);
  const legend = html("div", { class: "legend" }, box);
  for (const [name, shade] of colours) {
    const item = html("span", {}, legend);
    html("i", { style: `background:${shade}` }, item);
    item.append(name);
  }
}

for (const chart of DATA.charts) {
  const host = document.querySelector(`[data-chart="${chart.id}"]`);
  const controls = html("div", { class: "controls" }, host);
  const select = html("select", { "aria-label": `${chart.title}: what to show` }, controls);
  chart.panels.forEach((p, i) => html("option", { value: i }, select, p.name));
  const chips = html("span", { class: "controls chips" }, controls);
  const box = html("div", { class: "canvas" }, host);
  const hidden = new Set();
  const draw = () => {
    const panel = chart.panels[select.value];
    box.replaceChildren();
    if (chart.kind === "stack") drawStack(box, chart, panel);
    else drawLines(box, chart, panel, hidden);
  };
  const refill = () => {
    chips.replaceChildren();
    const panel = chart.panels[select.value];
    const methods = new Map((panel.series || []).map((s) => [s.method, s.colour]));
    for (const [method, shade] of methods) {
      const chip = html("button", { class: "chip", type: "button", "aria-pressed": !hidden.has(method), style: `color:${shade}` }, chips, method);
      chip.onclick = () => {
        if (!hidden.delete(method)) hidden.add(method);
        chip.setAttribute("aria-pressed", !hidden.has(method));
        draw();
      };
    }
    draw();
  };
  select.onchange = refill;
  refill();
  let width = box.clientWidth;
  addEventListener("resize", () => { if (box.clientWidth !== width) { width = box.clientWidth; draw(); } });
}

// "93.75 %" and "1.2 [1.1, 1.3]" sort by their number, sizes such as 16k by what they mean, the rest as text.
function worth(text) {
  const m = /^[+<≤]?\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)(k?)/.exec(text.trim());
  return m ? Number(m[1]) * (m[2] ? 1024 : 1) : null;
}
function order(a, b) {
  if (a === b) return 0;
  if (a === null || a === "") return 1;
  if (b === null || b === "") return -1;
  return a < b ? -1 : 1;
}
function sortMark(head, chosen, direction) {
  head.querySelectorAll("th").forEach((th, i) => {
    if (i === chosen) th.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else th.removeAttribute("aria-sort");
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  if (body.rows.length > 5) {
    const find = html("input", { class: "find", type: "search", placeholder: "filter", "aria-label": "filter this table" });
    table.closest("figure").insertBefore(find, table.parentNode);
    find.oninput = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of body.rows) row.hidden = !words.every((w) => row.textContent.toLowerCase().includes(w));
    };
  }
  let chosen = -1, direction = 1;
  table.tHead.querySelectorAll("th").forEach((th, column) => {
    th.onclick = () => {
      direction = chosen === column ? -direction : 1;
      chosen = column;
      const rows = [...body.rows].map((row) => {
        const text = row.cells[column].textContent;
        return [th.classList.contains("n") ? worth(text) : text, row];
      });
      rows.sort((a, b) => (a[0] === null || b[0] === null ? order(a[0], b[0]) : direction * order(a[0], b[0])));
      body.append(...rows.map((r) => r[1]));
      sortMark(table.tHead, column, direction);
    };
  });
}

// All rows: only those in view are in the document.
(function grid() {
  const { columns, numbers, words, layouts } = DATA.rows;
  const rows = DATA.rows.rows.map(([layout, ...cells]) => {
    const row = Array(columns.length).fill(null);
    layouts[layout].forEach((column, i) => (row[column] = cells[i]));
    return row;
  });
  const host = document.getElementById("grid"), table = host.firstElementChild, body = table.tBodies[0];
  const used = columns.map((_, c) => rows.some((r) => r[c] !== null));
  const visible = columns.map((_, c) => c).filter((c) => used[c]);
  const HIGH = 25;
  const cell = (r, c) => (r[c] === null ? "" : numbers[c] ? (columns[c] === "context" ? tokens(r[c]) : plain5(r[c])) : words[r[c]]);
  function plain5(v) { return String(v); }
  const small = words.map((w) => w.toLowerCase());
  const filters = new Map();
  let everywhere = [], view = rows, chosen = -1, direction = 1;
  const head = table.tHead.insertRow();
  for (const c of visible) {
    const th = html("th", { scope: "col", class: numbers[c] ? "n" : "" }, head);
    const button = html("button", { type: "button" }, th, columns[c]);
    const input = html("input", { type: "search", "aria-label": `filter ${columns[c]}` }, th);
    button.onclick = () => { direction = chosen === c ? -direction : 1; chosen = c; update(); sortMark(table.tHead, visible.indexOf(c), direction); };
    input.oninput = () => { input.value.trim() ? filters.set(c, matcher(c, input.value.trim())) : filters.delete(c); update(); };
  }
  function matcher(c, text) {
    if (!numbers[c]) {
      const want = text.toLowerCase();
      const hit = small.map((w) => w.includes(want));
      return (r) => r[c] !== null && hit[r[c]];
    }
    const number = (t) => (/k$/i.test(t) ? 1024 * parseFloat(t) : parseFloat(t));
    const range = /^(.+)\.\.(.+)$/.exec(text), side = /^([<>]=?)(.+)$/.exec(text);
    if (range) { const a = number(range[1]), b = number(range[2]); return (r) => r[c] !== null && r[c] >= a && r[c] <= b; }
    if (side) {
      const v = number(side[2]);
      const test = { "<": (x) => x < v, ">": (x) => x > v, "<=": (x) => x <= v, ">=": (x) => x >= v }[side[1]];
      return (r) => r[c] !== null && test(r[c]);
    }
    const v = number(text);
    return (r) => r[c] === v;
  }
  const search = document.getElementById("everywhere");
  search.oninput = () => { everywhere = search.value.toLowerCase().split(/\s+/).filter(Boolean); update(); };
  function update() {
    const tests = [...filters.values()];
    view = rows.filter((r) => tests.every((t) => t(r)));
    for (const w of everywhere) {
      const hit = small.map((x) => x.includes(w));
      view = view.filter((r) => visible.some((c) => r[c] !== null && (numbers[c] ? cell(r, c).includes(w) : hit[r[c]])));
    }
    if (chosen >= 0) {
      const value = (r) => (r[chosen] === null ? null : numbers[chosen] ? r[chosen] : words[r[chosen]]);
      view = view.map((r) => [value(r), r]).sort((a, b) => (a[0] === null || b[0] === null ? order(a[0], b[0]) : direction * order(a[0], b[0]))).map((p) => p[1]);
    }
    document.getElementById("shown").textContent = `${view.length} of ${rows.length} rows`;
    host.scrollTop = 0;
    paint();
  }
  function paint() {
    const first = Math.max(0, Math.floor(host.scrollTop / HIGH) - 10), last = Math.min(view.length, first + Math.ceil(host.clientHeight / HIGH) + 20);
    const filler = (n) => { const tr = document.createElement("tr"); const td = html("td", { colspan: visible.length, style: `height:${n * HIGH}px;padding:0;border:0` }, tr); return tr; };
    const parts = [];
    if (first > 0) parts.push(filler(first));
    for (let i = first; i < last; i++) {
      const tr = document.createElement("tr");
      for (const c of visible) html("td", numbers[c] ? { class: "n" } : {}, tr, cell(view[i], c));
      parts.push(tr);
    }
    if (last < view.length) parts.push(filler(view.length - last));
    body.replaceChildren(...parts);
  }
  let waiting = false;
  host.onscroll = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; paint(); }); } };
  update();
})();
