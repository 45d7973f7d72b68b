"use strict";
(async () => {
const $ = (id) => document.getElementById(id);
const D = JSON.parse($("data").textContent);
const S = D.space, rows = S.rows, columns = S.columns, cells = rows * columns;
const canvas = $("map"), pen = canvas.getContext("2d");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

// ---- values ----------------------------------------------------------------------------------------------------------
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const codes = new Uint16Array(await new Response(stream).arrayBuffer());
  const values = new Float64Array(codes.length);
  for (let i = 0; i < codes.length; i++) values[i] = packed.low + codes[i] * packed.step;
  return values;
}
for (const v of D.variables) {
  v.label = v.label[0].toUpperCase() + v.label.slice(1);
  v.values = await unpack(v.grid);
  v.count = Math.max(1, v.levels.length);
  v.middle = v.levels.length ? v.levels.indexOf(0.5) : 0;
}
const distance = await unpack(D.distance);
const gridOf = (v, lead, level) => v.values.subarray((lead * v.count + level) * cells, (lead * v.count + level + 1) * cells);

const state = { variable: 0, layer: "median", lead: 0, picked: null, hover: null, zoom: 1, cx: (S.x[0] + S.x[1]) / 2, cy: (S.y[0] + S.y[1]) / 2 };
const variable = () => D.variables[state.variable];
const leads = D.valid.length;

function shown(lead) { // the grid the current layer shows
  const v = variable();
  if (state.layer === "width") {
    const low = gridOf(v, lead, 0), high = gridOf(v, lead, v.count - 1);
    return Float64Array.from(low, (value, i) => high[i] - value);
  }
  return gridOf(v, lead, { low: 0, median: v.middle, high: v.count - 1 }[state.layer]);
}
const scale = () => (state.layer === "width" ? { range: variable().width_range, hex: variable().width_colours } : { range: variable().range, hex: variable().colours });
const tables = new Map();
function table(hex) {
  if (!tables.has(hex)) tables.set(hex, Uint8Array.from({ length: 768 }, (_, i) => parseInt(hex.substr(2 * i, 2), 16)));
  return tables.get(hex);
}
function colour(value, s) {
  const t = table(s.hex), i = 3 * Math.round(255 * clamp((value - s.range[0]) / (s.range[1] - s.range[0]), 0, 1));
  return `rgb(${t[i]},${t[i + 1]},${t[i + 2]})`;
}

// ---- words -----------------------------------------------------------------------------------------------------------
function digits(v) { const span = v.range[1] - v.range[0]; return clamp(2 - Math.floor(Math.log10(span)), 0, 4); }
const number = (value, v = variable()) => value.toFixed(Math.min(digits(v), 3)).replace(/^-(0(\.0*)?)$/, "$1");
const zone = `UTC${D.utc_offset < 0 ? "−" : "+"}${Math.abs(D.utc_offset)}`.replace(/UTC\+0$/, "UTC");
const local = (seconds) => new Date((seconds + D.utc_offset * 3600) * 1000);
const part = (seconds, options) => local(seconds).toLocaleString("en-GB", { timeZone: "UTC", ...options });
const clock = (s) => part(s, { hour: "2-digit", minute: "2-digit" });
const dayTime = (s) => (D.calendar ? `${part(s, { weekday: "short", day: "numeric", month: "short" })} ${clock(s)}` : `t = ${+s.toFixed(3)}`);
const full = (s) => (D.calendar ? `${part(s, { day: "numeric", month: "short", year: "numeric" })}, ${clock(s)} ${zone}` : `t = ${+s.toFixed(3)}`);
function ahead(seconds) {
  if (!D.calendar) return `+${+seconds.toFixed(3)}`;
  const h = seconds / 3600;
  return seconds % 3600 ? `+${+(h).toFixed(1)} h` : `+${h} h`;
}
function age(seconds) {
  const h = seconds / 3600;
  return h < 1 ? `${Math.max(0, Math.round(h * 60))} min` : h < 48 ? `${h.toFixed(1)} h` : h < 24 * 730 ? `${Math.round(h / 24)} days` : `${(h / 8766).toFixed(1)} years`;
}
const degree = (v, plus, minus) => `${Math.abs(v).toFixed(3)}° ${v < 0 ? minus : plus}`;
const coordinates = (x, y) => (D.geographic ? `${degree(y, "N", "S")}, ${degree(x, "E", "W")}` : `x ${x.toFixed(3)}, y ${y.toFixed(3)}`);
const far = (v) => (D.geographic ? `${v.toFixed(1)} km` : v.toFixed(3));
const nice = (span) => { const p = 10 ** Math.floor(Math.log10(span)), m = span / p; return (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10) * p; };

// ---- view ------------------------------------------------------------------------------------------------------------
const view = {};
function measure() {
  const ratio = Math.min(2, devicePixelRatio || 1), w = innerWidth, h = innerHeight, small = w <= 760;
  canvas.width = w * ratio; canvas.height = h * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const box = small ? { l: 8, t: 108, r: 8, b: 272 } : { l: Math.min(350, w * 0.27), t: 16, r: Math.min(350, w * 0.27), b: 128 };
  const wide = (S.x[1] - S.x[0]) * S.length[0], tall = (S.y[1] - S.y[0]) * S.length[1];
  const inner = [w - box.l - box.r, h - box.t - box.b];
  const fit = Math.max(1e-9, Math.min(inner[0] / wide, inner[1] / tall));
  Object.assign(view, { w, h, mx: box.l + inner[0] / 2, my: box.t + inner[1] / 2, perUnit: fit * state.zoom });
}
const toX = (x) => view.mx + (x - state.cx) * S.length[0] * view.perUnit;
const toY = (y) => view.my - (y - state.cy) * S.length[1] * view.perUnit;
const fromX = (px) => state.cx + (px - view.mx) / (S.length[0] * view.perUnit);
const fromY = (py) => state.cy - (py - view.my) / (S.length[1] * view.perUnit);
const columnOf = (x) => Math.floor(((x - S.x[0]) / (S.x[1] - S.x[0])) * columns);
const rowOf = (y) => Math.floor(((y - S.y[0]) / (S.y[1] - S.y[0])) * rows);
const centreX = (c) => S.x[0] + ((c + 0.5) * (S.x[1] - S.x[0])) / columns;
const centreY = (r) => S.y[0] + ((r + 0.5) * (S.y[1] - S.y[0])) / rows;
function cellAt(x, y) { const c = columnOf(x), r = rowOf(y); return c >= 0 && c < columns && r >= 0 && r < rows ? { c, r, i: r * columns + c } : null; }

// ---- painting --------------------------------------------------------------------------------------------------------
const factor = clamp(Math.floor(560 / Math.max(rows, columns)), 1, 12);
function smooth(grid) { // Catmull-Rom in both directions, between cell centres
  const W = columns * factor, H = rows * factor;
  const index = (i, n) => (D.torus ? (i + n) % n : clamp(i, 0, n - 1));
  const taps = (n) => Array.from({ length: n * factor }, (_, k) => {
    const p = (k + 0.5) / factor - 0.5, i = Math.floor(p), t = p - i;
    const w = [((2 - t) * t - 1) * t / 2, (t * t * (3 * t - 5) + 2) / 2, ((4 - 3 * t) * t + 1) * t / 2, (t - 1) * t * t / 2];
    return { at: [-1, 0, 1, 2].map((d) => index(i + d, n)), w };
  });
  const across = taps(columns), down = taps(rows), half = new Float64Array(rows * W), out = new Float64Array(W * H);
  for (let r = 0; r < rows; r++) for (let k = 0; k < W; k++) { const { at, w } = across[k]; half[r * W + k] = w[0] * grid[r * columns + at[0]] + w[1] * grid[r * columns + at[1]] + w[2] * grid[r * columns + at[2]] + w[3] * grid[r * columns + at[3]]; }
  for (let k = 0; k < H; k++) { const { at, w } = down[k]; for (let c = 0; c < W; c++) out[k * W + c] = w[0] * half[at[0] * W + c] + w[1] * half[at[1] * W + c] + w[2] * half[at[2] * W + c] + w[3] * half[at[3] * W + c]; }
  return { values: out, W, H };
}
const picture = document.createElement("canvas"), veil = document.createElement("canvas"), stripes = document.createElement("canvas");
let lines = [], painted = "";
function paint() { // the field as an image, its isolines as segments in grid units; only when something changed
  const key = [state.variable, state.layer, state.lead].join();
  if (key === painted) return;
  painted = key;
  const s = scale(), t = table(s.hex), { values, W, H } = smooth(shown(state.lead));
  picture.width = W; picture.height = H;
  const context = picture.getContext("2d"), image = context.createImageData(W, H), span = s.range[1] - s.range[0];
  for (let k = 0; k < H; k++) for (let c = 0; c < W; c++) {
    const i = 3 * Math.round(255 * clamp((values[k * W + c] - s.range[0]) / span, 0, 1)), o = 4 * ((H - 1 - k) * W + c);
    image.data[o] = t[i]; image.data[o + 1] = t[i + 1]; image.data[o + 2] = t[i + 2]; image.data[o + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  lines = isolines(values, W, H, nice(span / 8), s.range);
}
function isolines(values, W, H, step, range) {
  const stride = Math.max(1, Math.round(factor / 3)), segments = [];
  for (let level = Math.ceil(range[0] / step) * step; level <= range[1]; level += step) {
    for (let k = 0; k + stride < H; k += stride) for (let c = 0; c + stride < W; c += stride) {
      const a = values[k * W + c] - level, b = values[k * W + c + stride] - level, d = values[(k + stride) * W + c] - level, e = values[(k + stride) * W + c + stride] - level;
      if (a > 0 === b > 0 && a > 0 === d > 0 && a > 0 === e > 0) continue;
      const cut = [];
      if (a > 0 !== b > 0) cut.push([c + stride * a / (a - b), k]);
      if (b > 0 !== e > 0) cut.push([c + stride, k + stride * b / (b - e)]);
      if (d > 0 !== e > 0) cut.push([c + stride * d / (d - e), k + stride]);
      if (a > 0 !== d > 0) cut.push([c, k + stride * a / (a - d)]);
      for (let n = 0; n + 1 < cut.length; n += 2) segments.push([...cut[n], ...cut[n + 1]].map((v) => (v + 0.5) / factor));
    }
  }
  return segments;
}
{ // data support does not change: 1 near sensors, 0 where nothing was measured for far
  const { values, W, H } = smooth(distance);
  veil.width = W; veil.height = H;
  const context = veil.getContext("2d"), image = context.createImageData(W, H);
  for (let k = 0; k < H; k++) for (let c = 0; c < W; c++) image.data[4 * ((H - 1 - k) * W + c) + 3] = 255 * clamp((values[k * W + c] / D.support - 1) / 0.35, 0, 1);
  context.putImageData(image, 0, 0);
}
const unsupported = distance.some((v) => v > D.support);

function draw() {
  measure(); paint();
  const left = toX(S.x[0]), right = toX(S.x[1]), top = toY(S.y[1]), bottom = toY(S.y[0]), wide = right - left, tall = bottom - top;
  canvas.dataset.box = [left, top, right, bottom].join(); // where the grid lies, for whoever drives the page from outside
  pen.clearRect(0, 0, view.w, view.h);
  graticule();
  pen.save();
  pen.beginPath(); pen.roundRect(left, top, wide, tall, 6); pen.clip();
  pen.imageSmoothingEnabled = true; pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, left, top, wide, tall);
  if ($("show-lines").checked) {
    pen.beginPath();
    for (const [x0, y0, x1, y1] of lines) { pen.moveTo(left + (x0 / columns) * wide, bottom - (y0 / rows) * tall); pen.lineTo(left + (x1 / columns) * wide, bottom - (y1 / rows) * tall); }
    pen.strokeStyle = css("--iso"); pen.lineWidth = 0.9; pen.stroke();
  }
  if ($("show-support").checked && unsupported) hatch(left, top, wide, tall);
  graticule(true);
  pen.restore();
  pen.beginPath(); pen.roundRect(left, top, wide, tall, 6); pen.strokeStyle = css("--line"); pen.lineWidth = 1.5; pen.stroke();
  if ($("show-sensors").checked) drawSensors();
  furniture(left, bottom);
  for (const [place, strong] of [[state.picked, true], [state.hover, false]]) if (place) crosshair(place, strong);
}
function hatch(left, top, wide, tall) { // fade and stripe what lies far from any sensor
  const ratio = canvas.width / view.w;
  stripes.width = canvas.width; stripes.height = canvas.height;
  const c = stripes.getContext("2d");
  c.scale(ratio, ratio);
  c.globalAlpha = 0.5; c.fillStyle = css("--paper"); c.fillRect(0, 0, view.w, view.h); c.globalAlpha = 1;
  c.beginPath();
  for (let x = -view.h; x < view.w; x += 9) { c.moveTo(x, view.h); c.lineTo(x + view.h, 0); }
  c.strokeStyle = css("--hatch"); c.lineWidth = 1; c.stroke();
  c.globalCompositeOperation = "destination-in"; c.drawImage(veil, left, top, wide, tall);
  pen.drawImage(stripes, 0, 0, view.w, view.h);
}
function graticule(over = false) {
  const step = [0, 1].map((axis) => nice(120 / (S.length[axis] * view.perUnit)));
  pen.strokeStyle = css("--grid"); pen.lineWidth = 1; pen.fillStyle = css("--soft"); pen.font = "11px system-ui, DejaVu Sans, sans-serif";
  const text = (v, n, plus, minus) => (D.geographic ? `${Math.abs(v).toFixed(n)}°${v < 0 ? minus : plus}` : v.toFixed(n));
  const label = (words, x, y) => { pen.textAlign = "left"; pen.lineWidth = 3; pen.strokeStyle = "rgba(0,0,0,.45)"; pen.strokeText(words, x, y); pen.fillStyle = "#fff"; pen.fillText(words, x, y); };
  const decimals = step.map((s) => Math.max(0, -Math.floor(Math.log10(s) + 1e-9)));
  const words = [];
  pen.beginPath();
  for (let x = Math.ceil(fromX(0) / step[0]) * step[0]; toX(x) < view.w; x += step[0]) {
    pen.moveTo(toX(x), 0); pen.lineTo(toX(x), view.h);
    if (over) words.push([text(x, decimals[0], "E", "W"), toX(x) + 4, Math.min(view.h - 124, toY(S.y[0])) - 6]);
  }
  for (let y = Math.ceil(fromY(view.h) / step[1]) * step[1]; toY(y) > 0; y += step[1]) {
    pen.moveTo(0, toY(y)); pen.lineTo(view.w, toY(y));
    if (over) words.push([text(y, decimals[1], "N", "S"), Math.max(0, toX(S.x[0])) + 6, toY(y) - 4]);
  }
  pen.stroke();
  const corner = Math.min(view.h - 124, toY(S.y[0])) - 26;
  for (const [text, x, y] of words) if (x > toX(S.x[0]) + 44 || y < corner) label(text, x, y);
}
const many = D.sensors.length > 120;
function drawSensors() {
  const s = scale(), radius = (many ? 3 : 6.5) * clamp(Math.sqrt(state.zoom), 1, 2);
  for (const sensor of D.sensors) {
    const x = toX(sensor.at[0]), y = toY(sensor.at[1]), last = seen(sensor).at(-1);
    pen.beginPath();
    if (sensor.role) { pen.moveTo(x, y - radius * 1.25); pen.lineTo(x + radius * 1.25, y); pen.lineTo(x, y + radius * 1.25); pen.lineTo(x - radius * 1.25, y); pen.closePath(); } else pen.arc(x, y, radius, 0, 7);
    if (last && state.layer !== "width") { pen.fillStyle = colour(last[1], s); pen.fill(); } else if (!last) { pen.fillStyle = "rgba(128,128,128,.55)"; pen.fill(); }
    pen.lineWidth = many ? 2 : 4; pen.strokeStyle = css("--ring-edge"); pen.stroke();
    pen.lineWidth = many ? 1 : 2.2; pen.strokeStyle = css("--ring"); pen.stroke();
  }
}
function furniture(left, bottom) { // scale bar and north
  const target = 110 / view.perUnit, length = nice(target), pixels = length * view.perUnit, small = view.w <= 760;
  const x = small ? 14 : 28, y = small ? 126 : view.h - 130;
  pen.strokeStyle = css("--ink"); pen.fillStyle = css("--ink"); pen.lineWidth = 1.6; pen.font = "11.5px system-ui, DejaVu Sans, sans-serif"; pen.textAlign = "left";
  pen.beginPath(); pen.moveTo(x, y - 6); pen.lineTo(x, y); pen.lineTo(x + pixels, y); pen.lineTo(x + pixels, y - 6); pen.stroke();
  pen.fillText(D.geographic ? `${+length.toPrecision(2)} km` : `${+length.toPrecision(2)}`, x + 6, y - 6);
  if (D.geographic) {
    const nx = x + 8, ny = y - 58;
    pen.beginPath(); pen.moveTo(nx, ny); pen.lineTo(nx + 6.5, ny + 19); pen.lineTo(nx, ny + 14.5); pen.lineTo(nx - 6.5, ny + 19); pen.closePath(); pen.fill();
    pen.textAlign = "center"; pen.fillText("N", nx, ny - 4);
  }
}
function crosshair(place, strong) {
  const x = toX(place.x), y = toY(place.y);
  for (const [width, shade] of [[strong ? 4 : 3, css("--ring-edge")], [strong ? 2 : 1.2, css("--ring")]]) { pen.lineWidth = width; pen.strokeStyle = shade; pen.beginPath(); pen.arc(x, y, strong ? 12 : 9, 0, 7); pen.stroke(); }
}

// ---- sensors ---------------------------------------------------------------------------------------------------------
const series = (sensor) => sensor.series[variable().name] || [];
const seen = (sensor) => series(sensor).filter(([t]) => t <= D.init);
function sensorNear(px, py, reach) {
  if (!$("show-sensors").checked) return null;
  let best = null, least = reach;
  for (const sensor of D.sensors) { const d = Math.hypot(toX(sensor.at[0]) - px, toY(sensor.at[1]) - py); if (d < least) { least = d; best = sensor; } }
  return best;
}
const roles = ["used by the model", "held out for validation", "held out for testing"];
const nameOf = (sensor) => (sensor.id < 0 ? (D.calendar ? "Moving sensor" : "Sensor") : `Station ${sensor.name}`);
const escaped = (text) => text.replace(/[&<>]/g, (sign) => `&#${sign.charCodeAt(0)};`);

// ---- tip -------------------------------------------------------------------------------------------------------------
function tip(place) {
  const box = $("tip"), cell = place && cellAt(place.x, place.y);
  state.hover = cell || (place && place.sensor) ? place : null;
  $("mark").hidden = !cell;
  if (!state.hover) { box.hidden = true; return; }
  const v = variable(), unit = v.unit ? ` <span class="unit">${v.unit}</span>` : "", value = cell ? shown(state.lead)[cell.i] : null;
  let html = "";
  if (cell) {
    const label = { median: "", low: `${percent(v.levels[0] ?? 0)} level`, high: `${percent(v.levels.at(-1) ?? 0)} level`, width: "interval width" }[state.layer];
    html += `<b>${number(value)}</b>${unit}${label ? ` <span class="unit">· ${label}</span>` : ""}`;
    if (v.levels.length) html += `<div>${interval(v)} interval ${number(gridOf(v, state.lead, 0)[cell.i])} to ${number(gridOf(v, state.lead, v.count - 1)[cell.i])}</div>`;
    html += `<div>${dayTime(D.valid[state.lead])} (${ahead(D.valid[state.lead] - D.init)})</div><div>${coordinates(place.x, place.y)} · ${far(distance[cell.i])} from a sensor</div>`;
    if (distance[cell.i] > D.support) html += "<div>far from any sensor: take with care</div>";
    const s = scale();
    $("mark").style.left = `${100 * clamp((value - s.range[0]) / (s.range[1] - s.range[0]), 0, 1)}%`;
    Object.assign(box.dataset, { row: cell.r, column: cell.c, value });
  }
  if (place.sensor) {
    const last = seen(place.sensor).at(-1);
    html += `<div class="sensor"><strong>${escaped(nameOf(place.sensor))}</strong>, ${roles[place.sensor.role]}<br>${last ? `observed ${number(last[1])}${unit}, ${dayTime(last[0])}` : "nothing observed in the last frames"}</div>`;
  }
  box.innerHTML = html; box.hidden = false;
  const px = toX(place.x), py = toY(place.y), w = box.offsetWidth, h = box.offsetHeight;
  box.style.transform = `translate(${px + 18 + w > view.w ? px - w - 18 : px + 18}px, ${clamp(py + 18 + h > view.h ? py - h - 18 : py + 18, 4, view.h - h)}px)`;
}
const percent = (level) => `${+(100 * level).toFixed(1)} %`;
const interval = (v) => percent(v.levels.at(-1) - v.levels[0]);

// ---- series ----------------------------------------------------------------------------------------------------------
function pick(place) { state.picked = place; chart(); draw(); }
function chart() {
  const place = state.picked, panel = $("series");
  panel.hidden = !place;
  if (!place) return;
  const v = variable(), cell = cellAt(place.x, place.y), own = place.sensor && place.sensor.forecast && place.sensor.forecast[v.name];
  const bands = own || (cell && D.valid.map((_, lead) => Array.from({ length: v.count }, (_, level) => gridOf(v, lead, level)[cell.i])));
  const points = place.sensor ? series(place.sensor) : [];
  if (!bands) { panel.hidden = true; return; }
  $("place").textContent = place.sensor ? `${nameOf(place.sensor)} · ${v.label}` : `${v.label} at ${coordinates(place.x, place.y)}`;
  $("place-detail").textContent = place.sensor ? `${coordinates(...place.sensor.at)} · ${roles[place.sensor.role]}` : `${far(distance[cell.i])} from the nearest sensor`;
  const W = 300, H = 180, l = 32, r = 6, t = 10, b = 20, times = [...points.map((p) => p[0]), ...D.valid], all = [...points.map((p) => p[1]), ...bands.flat()];
  const t0 = Math.min(...times), t1 = Math.max(...times), low = Math.min(...all), high = Math.max(...all), step = nice((high - low || 1) / 4), y0 = Math.floor(low / step) * step, y1 = Math.ceil(high / step) * step || 1;
  const X = (time) => l + ((time - t0) / (t1 - t0 || 1)) * (W - l - r), Y = (value) => H - b - ((value - y0) / (y1 - y0 || 1)) * (H - t - b);
  const path = (level) => D.valid.map((time, i) => `${X(time).toFixed(1)},${Y(bands[i][level]).toFixed(1)}`);
  const band = (from, to, name) => `<path class="${name}" d="M${path(from).join("L")}L${path(to).reverse().join("L")}Z"/>`;
  let out = "";
  for (let y = y0; y <= y1 + step / 2; y += step) out += `<line class="axis" x1="${l}" x2="${W - r}" y1="${Y(y)}" y2="${Y(y)}"/><text x="${l - 5}" y="${Y(y) + 3.5}" text-anchor="end">${+y.toPrecision(4)}</text>`;
  const every = D.calendar ? [1, 3, 6, 12, 24, 48, 96, 168].map((h) => h * 3600).find((s) => (t1 - t0) / s <= 6) || 604800 : nice((t1 - t0 || 1) / 5), shift = D.calendar ? D.utc_offset * 3600 : 0;
  for (let time = Math.ceil((t0 + shift) / every) * every - shift; time <= t1; time += every) {
    const label = D.calendar ? ((time + shift) % 86400 ? clock(time) : part(time, { day: "numeric", month: "short" })) : +time.toFixed(3);
    out += `<text x="${clamp(X(time), l + 12, W - 14)}" y="${H - 4}" text-anchor="middle">${label}</text>`;
  }
  if (v.levels.length) out += band(0, v.count - 1, "wide");
  if (v.levels.length >= 5) out += band(v.levels.indexOf(0.25) < 0 ? 1 : v.levels.indexOf(0.25), v.levels.indexOf(0.75) < 0 ? v.count - 2 : v.levels.indexOf(0.75), "middle");
  out += `<line class="start" x1="${X(D.init)}" x2="${X(D.init)}" y1="${t}" y2="${H - b}"/><path class="median" d="M${path(v.middle).join("L")}"/>`;
  for (const [time, value] of points) out += `<circle class="${time <= D.init ? "seen" : "later"}" cx="${X(time).toFixed(1)}" cy="${Y(value).toFixed(1)}" r="2.4"/>`;
  const now = D.valid[state.lead];
  out += `<line class="now" x1="${X(now)}" x2="${X(now)}" y1="${t}" y2="${H - b}"/><circle class="dot" cx="${X(now)}" cy="${Y(bands[state.lead][v.middle])}" r="5"/>`;
  $("chart").innerHTML = out;
  const keys = [`<span><i class="k-median"></i>${v.levels.length ? "median" : "forecast"}</span>`];
  if (v.levels.length) keys.push(`<span><i class="k-band"></i>${interval(v)} interval</span>`);
  if (points.some((p) => p[0] <= D.init)) keys.push('<span><i class="k-seen"></i>observed</span>');
  if (points.some((p) => p[0] > D.init)) keys.push('<span><i class="k-later"></i>observed later, not used</span>');
  $("keys").innerHTML = keys.join("");
}

// ---- controls --------------------------------------------------------------------------------------------------------
function choices(host, options, current, choose) {
  host.innerHTML = "";
  if (options.length < 2) return;
  options.forEach(([value, label, title], i) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = label; button.title = title || label; button.dataset.value = value;
    button.setAttribute("role", "radio"); button.setAttribute("aria-checked", value === current); button.tabIndex = value === current ? 0 : -1;
    button.onclick = () => choose(value);
    button.onkeydown = (e) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
      if (step) { e.preventDefault(); choose(options[(i + step + options.length) % options.length][0]); host.querySelector("[aria-checked=true]").focus(); }
    };
    host.append(button);
  });
}
function refresh() {
  const v = variable(), s = scale(), at = D.valid[state.lead];
  choices($("variables"), D.variables.map((one, i) => [i, one.label]), state.variable, (i) => { state.variable = i; if (!variable().levels.length) state.layer = "median"; refresh(); });
  const layers = v.levels.length ? [["median", "Median"], ["low", percent(v.levels[0]), "Lower end of the interval"], ["high", percent(v.levels.at(-1)), "Upper end of the interval"], ["width", "Uncertainty", `Width of the ${interval(v)} interval`]] : [];
  choices($("layers"), layers, state.layer, (layer) => { state.layer = layer; refresh(); });
  const t = table(s.hex), context = $("colours").getContext("2d"), image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([t[3 * i], t[3 * i + 1], t[3 * i + 2], 255], 4 * i);
  context.putImageData(image, 0, 0);
  const step = nice((s.range[1] - s.range[0]) / 4), ticks = [];
  for (let value = Math.ceil(s.range[0] / step - 1e-9) * step; value <= s.range[1] + step * 1e-6; value += step) ticks.push(value);
  $("ticks").innerHTML = ticks.map((value, i) => { const share = (100 * (value - s.range[0])) / (s.range[1] - s.range[0]), last = i === ticks.length - 1; return `<span class="${last && share > 92 ? "last" : ""}" style="left:${share}%">${+value.toPrecision(6)}</span>`; }).join("");
  const what = { median: v.levels.length ? "median" : "forecast", low: `${percent(v.levels[0] ?? 0)} level`, high: `${percent(v.levels.at(-1) ?? 0)} level`, width: `width of the ${v.levels.length ? interval(v) : ""} interval` }[state.layer];
  $("caption").innerHTML = `<span>${v.label}, ${what}</span><span>${v.unit}</span>`;
  $("subject").textContent = `${v.label}${v.unit ? ` in ${v.unit}` : ""}, ${D.calendar ? `next ${Math.round((D.valid.at(-1) - D.init) / 3600)} hours` : `${+(D.valid.at(-1) - D.init).toFixed(2)} time units ahead`}`;
  $("lead").setAttribute("aria-valuetext", `${dayTime(at)}, ${ahead(at - D.init)}`);
  $("lead").value = state.lead;
  $("valid").textContent = dayTime(at);
  $("ahead").textContent = `${ahead(at - D.init)}${D.calendar ? ` · ${part(at, { year: "numeric" })} · ${zone}` : " in model time"}`;
  tip(state.hover); chart(); draw();
}
function facts() {
  const list = [["Data until", full(D.init)], ["Issued", D.calendar ? full(Date.parse(D.published_at) / 1000) : D.published_at.replace("T", " ").replace("Z", " UTC")]];
  if (D.calendar) { const old = Date.now() / 1000 - D.init; list.push(["Data age", `${age(old)}${D.archive ? ", archive" : ""}`, !D.archive && old > 6 * 3600]); }
  list.push(["Sensors", `${D.sensors_used} of ${D.sensors_expected}`, D.sensors_used < D.sensors_expected / 2]);
  if (unsupported) list.push(["Hatched", `over ${far(D.support)} from a sensor`]);
  $("facts").innerHTML = list.map(([name, value, warn]) => `<dt>${name}</dt><dd${warn ? ' class="warn"' : ""}>${value}</dd>`).join("");
}
function setLead(lead) { state.lead = clamp(lead, 0, leads - 1); refresh(); }
let timer = null;
function play(on = !timer) {
  clearInterval(timer);
  timer = on ? setInterval(() => setLead((state.lead + 1) % leads), 450) : null;
  $("play").setAttribute("aria-pressed", !!timer); $("play").setAttribute("aria-label", timer ? "Pause" : "Play");
  $("play-icon").setAttribute("d", timer ? "M7 5h4v14H7zM13 5h4v14h-4z" : "M8 5v14l11-7z");
}
function zoomTo(change, px = view.mx, py = view.my) {
  const x = fromX(px), y = fromY(py), before = state.zoom;
  state.zoom = change ? clamp(state.zoom * change, 1, 24) : 1;
  if (state.zoom === 1) { state.cx = (S.x[0] + S.x[1]) / 2; state.cy = (S.y[0] + S.y[1]) / 2; } else {
    const keep = before / state.zoom;
    state.cx = clamp(x + (state.cx - x) * keep, S.x[0], S.x[1]); state.cy = clamp(y + (state.cy - y) * keep, S.y[0], S.y[1]);
  }
  draw();
}
$("lead").max = leads - 1;
$("lead").oninput = (e) => setLead(+e.target.value);
$("play").onclick = () => play();
$("close").onclick = () => { pick(null); canvas.focus(); };
$("theme").onclick = () => { document.documentElement.dataset.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; draw(); };
for (const id of ["show-sensors", "show-lines", "show-support"]) $(id).onchange = draw;
for (const button of document.querySelectorAll("[data-zoom]")) button.onclick = () => zoomTo(+button.dataset.zoom);
const shownMarks = Math.max(1, Math.ceil((leads - 1) / 6));
$("marks").innerHTML = D.valid.map((time, i) => (i % shownMarks && i !== leads - 1) || (i !== leads - 1 && leads - 1 - i < shownMarks * 0.6) ? "" : `<span style="left:${(100 * i) / Math.max(1, leads - 1)}%">${D.calendar ? ahead(time - D.init) : `+${+(time - D.init).toFixed(2)}`}</span>`).join("");

// ---- pointer, touch, keys --------------------------------------------------------------------------------------------
const pointers = new Map();
let dragged = 0, pinch = 0;
function placeAt(px, py, touch) {
  const sensor = sensorNear(px, py, touch ? 18 : many ? 6 : 11);
  return sensor ? { x: sensor.at[0], y: sensor.at[1], sensor } : { x: fromX(px), y: fromY(py), sensor: null };
}
canvas.onpointerdown = (e) => { canvas.setPointerCapture(e.pointerId); pointers.set(e.pointerId, [e.clientX, e.clientY]); dragged = 0; pinch = 0; };
canvas.onpointermove = (e) => {
  const before = pointers.get(e.pointerId);
  if (!before) { tip(placeAt(e.clientX, e.clientY)); draw(); return; }
  const dx = e.clientX - before[0], dy = e.clientY - before[1];
  pointers.set(e.pointerId, [e.clientX, e.clientY]);
  dragged += Math.hypot(dx, dy);
  if (pointers.size === 2) {
    const [a, b] = [...pointers.values()], span = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch) zoomTo(span / pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    pinch = span;
  } else if (state.zoom > 1 && dragged > 4) {
    state.cx = clamp(state.cx - dx / (S.length[0] * view.perUnit), S.x[0], S.x[1]); state.cy = clamp(state.cy + dy / (S.length[1] * view.perUnit), S.y[0], S.y[1]);
    tip(null); draw();
  } else if (e.pointerType === "touch") { tip(placeAt(e.clientX, e.clientY, true)); draw(); }
};
canvas.onpointerup = (e) => {
  if (pointers.delete(e.pointerId) && dragged < 6 && !pinch) {
    const place = placeAt(e.clientX, e.clientY, e.pointerType === "touch");
    if (cellAt(place.x, place.y) || place.sensor) { tip(e.pointerType === "touch" ? place : state.hover); pick(place); }
  }
};
canvas.onpointercancel = (e) => pointers.delete(e.pointerId);
canvas.onpointerleave = (e) => { if (!pointers.size && e.pointerType !== "touch") { tip(null); draw(); } };
canvas.onwheel = (e) => { e.preventDefault(); zoomTo(Math.exp(-e.deltaY * 0.0015), e.clientX, e.clientY); };
canvas.ondblclick = (e) => zoomTo(2, e.clientX, e.clientY);
canvas.onkeydown = (e) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[e.key];
  if (move) {
    const from = state.hover ? cellAt(state.hover.x, state.hover.y) : null, c = clamp((from ? from.c : columns >> 1) + move[0], 0, columns - 1), r = clamp((from ? from.r : rows >> 1) + move[1], 0, rows - 1);
    tip({ x: centreX(c), y: centreY(r), sensor: null }); draw();
  } else if (e.key === "Enter" && state.hover) pick(state.hover);
  else if (e.key === "+" || e.key === "=") zoomTo(1.5); else if (e.key === "-") zoomTo(1 / 1.5); else if (e.key === "0") zoomTo(0); else return;
  e.preventDefault();
};
addEventListener("keydown", (e) => {
  if (e.key === "Escape" && state.picked) pick(null);
  else if (e.target === $("lead") || /BUTTON|INPUT/.test(e.target.tagName)) return;
  else if (e.key === " ") { e.preventDefault(); play(); } else if (e.key === ",") setLead(state.lead - 1); else if (e.key === ".") setLead(state.lead + 1);
});
addEventListener("resize", draw);
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => { document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; draw(); };
dark.onchange = follow;

facts(); refresh(); follow();
if (innerWidth > 1000) { // begin with a series, so that it is seen that there are some
  const first = D.sensors.find((s) => s.id >= 0 && seen(s).length) || null;
  pick(first ? { x: first.at[0], y: first.at[1], sensor: first } : { x: centreX(columns >> 1), y: centreY(rows >> 1), sensor: null });
}
document.documentElement.dataset.ready = "true";
})();
