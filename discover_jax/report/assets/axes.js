// Scales and axes. A frame is the area of a chart, with its two scales.

function ticks(low, high, target) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(1, target);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// The range of the known values, widened by a fraction of its size at each end.
function extent(values, margin = 0.06) {
  const real = values.filter(known);
  if (!real.length) return [0, 1];
  let low = Infinity;
  let high = -Infinity;
  for (const value of real) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) {
    const half = Math.abs(low) / 10 || 0.5;
    return [low - half, high + half];
  }
  return [low - margin * (high - low), high + margin * (high - low)];
}

function linear([low, high], [from, to]) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function tickText(tick, all) {
  const step = all.length > 1 ? Math.abs(all[1] - all[0]) : Math.abs(tick) || 1;
  const size = Math.max(...all.map(Math.abs));
  if (size && (size < 1e-3 || size >= 1e6)) return number(tick, 2);
  return tick.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)) });
}

// `xs`: the x values of all series. `yRange`: the range of the y axis. Ticks of the x axis are whole numbers.
function frame({ width, height, xs, yRange, xLabel, margin, label, yTicks = 5, xPad = 0 }) {
  const room = { top: 14, right: 14, bottom: 24, left: 52, ...margin };
  const xLow = Math.min(...xs) - xPad;
  const xHigh = Math.max(...xs) + xPad;
  const right = width - room.right;
  const bottom = height - room.bottom;
  const x = xHigh > xLow ? linear([xLow, xHigh], [room.left, right]) : () => (room.left + right) / 2;
  const y = linear(yRange, [bottom, room.top]);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "chart" });
  const grid = svg("g", { class: "grid" });
  const yFound = ticks(yRange[0], yRange[1], yTicks);
  for (const tick of yFound) {
    grid.append(
      svg("line", { x1: room.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: room.left - 8, y: y(tick), dy: "0.35em", "text-anchor": "end" }, tickText(tick, yFound)),
    );
  }
  for (const tick of ticks(Math.min(...xs), Math.max(...xs), Math.max(1, Math.floor((right - room.left) / 56)))) {
    if (!Number.isInteger(tick)) continue;
    grid.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, tick.toLocaleString("en")));
  }
  if (xLabel) grid.append(svg("text", { x: room.left - 8, y: bottom + 16, "text-anchor": "end", class: "axis" }, xLabel));
  root.append(grid);
  return { root, x, y, left: room.left, right, top: room.top, bottom, width, height };
}

// Index of the value that is nearest to `target`.
function nearest(values, target) {
  let best = 0;
  for (let i = 1; i < values.length; i += 1) if (Math.abs(values[i] - target) < Math.abs(values[best] - target)) best = i;
  return best;
}

// Sets `at` of each label {y, ...} so that labels do not overlap and stay between two bounds.
function spread(labels, gap, top, bottom) {
  const sorted = [...labels].sort((a, b) => a.y - b.y);
  for (const label of sorted) label.at = Math.min(Math.max(label.y, top), bottom);
  for (let pass = 0; pass < 60; pass += 1) {
    for (let i = 1; i < sorted.length; i += 1) {
      const lack = gap - (sorted[i].at - sorted[i - 1].at);
      if (lack > 0) {
        sorted[i - 1].at = Math.max(top, sorted[i - 1].at - lack / 2);
        sorted[i].at = Math.min(bottom, sorted[i].at + lack / 2);
      }
    }
  }
  return sorted;
}

// The path through the known points, with gaps at unknown ones.
function linePath(xs, ys, x, y) {
  let path = "";
  let drawing = false;
  xs.forEach((each, i) => {
    if (known(ys[i])) path += `${drawing ? "L" : "M"}${x(each).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    drawing = known(ys[i]);
  });
  return path;
}

// The area between lower and upper values, with gaps where either is unknown.
function bandPath(xs, lows, highs, x, y) {
  let path = "";
  let run = [];
  const close = () => {
    if (run.length === 1) run = [run[0]];
    if (run.length) {
      const there = run.map((i) => `${x(xs[i]).toFixed(1)} ${y(highs[i]).toFixed(1)}`);
      const back = run.map((i) => `${x(xs[i]).toFixed(1)} ${y(lows[i]).toFixed(1)}`).reverse();
      path += `M${there.join("L")}L${back.join("L")}Z`;
    }
    run = [];
  };
  xs.forEach((_, i) => {
    if (known(lows[i]) && known(highs[i])) run.push(i);
    else close();
  });
  close();
  return path;
}
