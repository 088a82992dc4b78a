"use strict";
// Charts of our own: three kinds, a few kilobytes, each with a text for those who do not see it.

const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((value, i) => Math.round(value + (VIRIDIS[low + 1][i] - value) * (place - low)));
}

// Bars from left to right; labels: what stands below the first, the middle and the last.
function barChart({ counts, labels, title, describe, log = false, mark = null, line = null, height = 110 }) {
  const width = 360, left = 8, bottom = 18, top = 6;
  const most = Math.max(1, ...counts);
  const scale = (count) => (log ? Math.log1p(count) / Math.log1p(most) : count / most);
  const step = (width - 2 * left) / Math.max(counts.length, 1);
  const bars = counts.map((count, i) => {
    const size = scale(count) * (height - bottom - top);
    const bar = svg("rect", {
      x: left + i * step, y: height - bottom - size, width: Math.max(step - 1, 0.5), height: size,
      class: i === mark ? "bar marked" : "bar",
    });
    bar.append(svg("title", { text: describe(i, count) }));
    return bar;
  });
  const anchors = ["start", "middle", "end"];
  const places = [left, width / 2, width - left];
  const texts = labels.map((label, i) => svg("text", { x: places[i], y: height - 4, "text-anchor": anchors[i], text: label }));
  const base = svg("line", { x1: left, x2: width - left, y1: height - bottom + 0.5, y2: height - bottom + 0.5, class: "axis" });
  // A line at a place in bars.
  const at = line === null ? null : left + Math.min(line, counts.length) * step;
  const cut = at === null ? [] : [svg("line", { x1: at, x2: at, y1: 0, y2: height - bottom, class: "cut" })];
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "chart" }, bars, base, cut, texts);
}

// A number's place among all: bars of equal width over the range, on the log where that is how they lie.
function histogram(values, { log = false, bins = 40, range = null } = {}) {
  const good = Array.from(values).filter((v) => Number.isFinite(v) && (!log || v > 0)).map((v) => (log ? Math.log10(v) : v));
  if (!good.length) return { counts: [], low: 0, high: 1, n: 0, log };
  let low = Infinity, high = -Infinity;
  for (const v of good) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  if (range) [low, high] = range;
  if (high === low) high = low + 1e-9 + Math.abs(low) * 1e-6;
  const counts = new Array(bins).fill(0);
  for (const v of good) counts[Math.min(bins - 1, Math.max(0, Math.floor(((v - low) / (high - low)) * bins)))]++;
  return { counts, low, high, n: good.length, log };
}

const plain = (value, log) => (log ? (value > 0 ? Math.log10(value) : NaN) : value);

// The ends of several columns together; on the log, the logarithms.
function bounds(columns, log) {
  let low = Infinity, high = -Infinity;
  for (const values of columns) {
    for (const v of values) {
      const p = plain(v, log);
      if (!Number.isFinite(p)) continue;
      if (p < low) low = p;
      if (p > high) high = p;
    }
  }
  return low > high ? [0, 1] : low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// Every latent a point. xs, ys, colours: the ends of the axes and of the colours, which are all SAEs'. Clicking one takes the nearest; the table of latents has the same numbers for the keyboard.
function scatter(canvas, { x, y, colour, xs, ys, colours, logX, logY, onPick, ink, grid, chosen, dark }) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 420, height = canvas.clientHeight || 300;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [x0, x1] = xs, [y0, y1] = ys, [c0, c1] = colours;
  const left = 58, right = 10, top = 8, bottom = 26;
  const px = (v) => left + ((plain(v, logX) - x0) / (x1 - x0)) * (width - left - right);
  const py = (v) => height - bottom - ((plain(v, logY) - y0) / (y1 - y0)) * (height - top - bottom);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = ink;
  pen.strokeStyle = grid;
  for (let i = 0; i <= 4; i++) {
    const vx = x0 + ((x1 - x0) * i) / 4, vy = y0 + ((y1 - y0) * i) / 4;
    const gx = left + ((width - left - right) * i) / 4, gy = height - bottom - ((height - top - bottom) * i) / 4;
    pen.beginPath();
    pen.moveTo(gx, top);
    pen.lineTo(gx, height - bottom);
    pen.moveTo(left, gy);
    pen.lineTo(width - right, gy);
    pen.stroke();
    pen.textAlign = i === 0 ? "left" : i === 4 ? "right" : "center";
    pen.fillText(tick(logX ? 10 ** vx : vx), gx, height - 8);
    pen.textAlign = "right";
    pen.fillText(tick(logY ? 10 ** vy : vy), left - 6, gy + 4);
  }
  const shade = (share) => viridis(dark ? 0.25 + 0.75 * share : 0.92 * share); // ends that the ground would swallow are left out
  const size = x.length > 20000 ? 2 : x.length > 2000 ? 3 : 4;
  pen.globalAlpha = x.length > 4000 ? 0.55 : 0.75;
  for (let i = 0; i < x.length; i++) {
    const gx = px(x[i]), gy = py(y[i]);
    if (!Number.isFinite(gx) || !Number.isFinite(gy)) continue;
    pen.fillStyle = colour && Number.isFinite(colour[i]) ? `rgb(${shade((colour[i] - c0) / (c1 - c0)).join(",")})` : "#7d8792";
    pen.fillRect(gx - size / 2, gy - size / 2, size, size);
  }
  pen.globalAlpha = 1;
  if (chosen !== null && chosen !== undefined && Number.isFinite(px(x[chosen])) && Number.isFinite(py(y[chosen]))) {
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(px(x[chosen]), py(y[chosen]), 7, 0, 2 * Math.PI);
    pen.stroke();
  }
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    let best = -1, nearest = 400;
    for (let i = 0; i < x.length; i++) {
      const d = (px(x[i]) - event.clientX + box.left) ** 2 + (py(y[i]) - event.clientY + box.top) ** 2;
      if (d < nearest) [best, nearest] = [i, d];
    }
    if (best >= 0) onPick(best);
  };
}
