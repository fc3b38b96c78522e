// Charts over the steps. Steps count from 1, as on the console.

const NARROW = 620;

// Writes names and last values next to the ends of the lines.
function endLabels(plot, labels) {
  const group = svg("g", { class: "ends" });
  for (const label of spread(labels, 15, plot.top + 4, plot.bottom - 2)) {
    const x = plot.right + 10;
    if (Math.abs(label.at - label.y) > 3) group.append(svg("path", { class: `leader ${label.className}`, d: `M${plot.right + 1} ${label.y}L${x - 2} ${label.at}` }));
    const text = svg("text", { x, y: label.at, dy: "0.35em", class: label.className }, shortened(label.text, (plot.width - x) / 7));
    text.append(svg("title", null, label.text));
    group.append(text);
  }
  plot.root.append(group);
}

// Shortens a label to about `room` letters. Keeps its last word, the value.
function shortened(text, room) {
  const most = Math.max(6, Math.floor(room));
  const end = text.slice(text.lastIndexOf(" "));
  return text.length <= most ? text : `${text.slice(0, Math.max(1, most - end.length - 1))}…${end}`;
}

function listLabels(labels) {
  return el("ul", { class: "key" }, labels.map((label) => el("li", null, el("i", { class: `swatch ${label.className}` }), label.text)));
}

// Best and mean scores with their intervals. `series` has {xs, lines: [{name, values, low, high, className}]} for each run. On a narrow
// screen the labels are listed below the chart. `disclosed` decides how many digits a score has.
function scoreChart(series, thresholds, xLabel, describe, disclosed) {
  const lines = series.flatMap((run) => run.lines.map((line) => ({ ...line, xs: run.xs, steps: run.steps })));
  return responsive("plot", (width) => {
    const narrow = width < NARROW;
    const plot = frame({
      width,
      height: narrow ? 280 : 380,
      xs: lines.flatMap((line) => line.xs),
      yRange: extent([...lines.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]), ...thresholds.map((t) => t[1])], 0.04),
      xLabel,
      margin: { right: narrow ? 12 : 232 },
      label: describe,
    });
    const labels = [];
    for (const [name, value] of thresholds) {
      plot.root.append(svg("line", { class: "threshold", x1: plot.left, x2: plot.right, y1: plot.y(value), y2: plot.y(value) }));
      labels.push({ y: plot.y(value), text: `${name} ${isExact(disclosed) ? score(value, disclosed) : number(value, 5)}`, className: "of-threshold" });
    }
    for (const line of lines) {
      if (line.low) plot.root.append(svg("path", { class: `band ${line.className}`, d: bandPath(line.xs, line.low, line.high, plot.x, plot.y) }));
    }
    for (const line of lines) {
      plot.root.append(svg("path", { class: `line ${line.className}`, d: linePath(line.xs, line.values, plot.x, plot.y) }));
      const last = line.values.findLastIndex(known);
      if (last < 0) continue;
      plot.root.append(svg("circle", { class: `dot ${line.className}`, r: 3.5, cx: plot.x(line.xs[last]), cy: plot.y(line.values[last]) }));
      labels.push({ y: plot.y(line.values[last]), text: `${line.name} ${score(line.values[last], disclosed)}`, className: line.className });
    }
    if (!narrow) endLabels(plot, labels);
    const cross = svg("line", { class: "cross", y1: plot.top, y2: plot.bottom, visibility: "hidden" });
    plot.root.append(cross);
    const xs = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
    onPointer(plot.root, (px) => {
      cross.setAttribute("visibility", px === null ? "hidden" : "visible");
      if (px === null) return null;
      const at = xs[nearest(xs.map(plot.x), px)];
      cross.setAttribute("x1", plot.x(at));
      cross.setAttribute("x2", plot.x(at));
      const shown = [];
      for (const line of lines) {
        const i = line.xs.indexOf(at);
        if (i < 0 || !known(line.values[i])) continue;
        const interval = line.low && known(line.low[i]) ? ` (95%: ${score(line.low[i])} to ${score(line.high[i])})` : "";
        shown.push([line.className, `${line.name} ${score(line.values[i], disclosed)}${interval}`]);
      }
      return [`${xLabel} ${at.toLocaleString("en")}`, ...shown];
    });
    return narrow ? [plot.root, listLabels(labels)] : [plot.root];
  });
}

// A histogram of the rewards of valid programs per step, as a column of cells. Failures have a separate row.
function rewardChart(steps, rewards, validMeans, means, tallest) {
  const bins = rewards.edges.length - 1;
  return responsive("plot", (width) => {
    const strip = 22;
    const plot = frame({
      width,
      height: 300,
      xs: steps,
      xPad: 0.5,
      yRange: bins > 0 ? [rewards.edges[0], rewards.edges[bins]] : [0, 1],
      xLabel: "step",
      margin: { bottom: 24 + strip, left: 56 },
      label: `Histograms of the rewards of valid programs in ${steps.length} steps`,
    });
    const wide = Math.max(1, plot.x(steps[0] + 1) - plot.x(steps[0]) || plot.right - plot.left);
    const cell = Math.max(1, wide > 6 ? Math.min(0.9 * wide, 90) : wide);
    const top = Math.max(1, tallest);
    const cells = svg("g", { class: "cells" });
    steps.forEach((step, s) => {
      rewards.counts[s].forEach((each, b) => {
        if (!each) return;
        const y = plot.y(rewards.edges[b + 1]);
        const height = Math.max(1, plot.y(rewards.edges[b]) - y - 0.5);
        cells.append(svg("rect", { x: plot.x(step) - cell / 2, y, width: cell, height, "fill-opacity": (0.12 + 0.88 * Math.sqrt(each / top)).toFixed(3) }));
      });
    });
    const failed = svg("g", { class: "cells failed" });
    const base = plot.bottom + 22;
    const most = Math.max(1, ...steps.map((_, s) => rewards.failed[s] + total(rewards.counts[s])));
    steps.forEach((step, s) => {
      if (!rewards.failed[s]) return;
      failed.append(svg("rect", { x: plot.x(step) - cell / 2, y: base, width: cell, height: strip - 4, "fill-opacity": (0.15 + 0.85 * Math.sqrt(rewards.failed[s] / most)).toFixed(3) }));
      if (cell > 15) failed.append(svg("text", { x: plot.x(step), y: base + (strip - 4) / 2, dy: "0.35em", "text-anchor": "middle" }, String(rewards.failed[s])));
    });
    failed.append(svg("text", { x: plot.left - 8, y: base + (strip - 4) / 2, dy: "0.35em", "text-anchor": "end", class: "axis" }, "failed"));
    plot.root.append(cells, failed);
    const inside = validMeans.map((mean) => (known(mean) && bins > 0 && mean >= rewards.edges[0] ? mean : null));
    steps.forEach((step, s) => {
      if (known(inside[s])) plot.root.append(svg("line", { class: "mean-mark", x1: plot.x(step) - cell / 2, x2: plot.x(step) + cell / 2, y1: plot.y(inside[s]), y2: plot.y(inside[s]) }));
    });
    onPointer(plot.root, (px, py) => {
      if (px === null || px < plot.left || px > plot.right) return null;
      const s = nearest(steps.map(plot.x), px);
      const shown = [`step ${steps[s]}`, `mean reward ${score(validMeans[s])}, with failures ${score(means[s])}`];
      if (bins > 0 && py <= plot.bottom) {
        const b = rewards.edges.slice(0, -1).findIndex((_, i) => py <= plot.y(rewards.edges[i]) && py >= plot.y(rewards.edges[i + 1]));
        if (b >= 0) shown.push(`${count(rewards.counts[s][b], "program")} from ${b ? score(rewards.edges[b]) : "the lowest"} to ${score(rewards.edges[b + 1])}`);
      }
      shown.push(`${count(rewards.failed[s], "failure")}`);
      return shown;
    });
    return [plot.root];
  });
}

// Stacked bars, one per step. `parts` has {label, className, values} for each part.
function stackChart(steps, parts, { height = 240, unit = "", xLabel = "step", text = number, label, margin = {} }) {
  const sums = steps.map((_, i) => total(parts.map((part) => part.values[i] || 0)));
  return responsive("plot", (width) => {
    const plot = frame({ width, height, xs: steps, xPad: 0.5, yRange: [0, Math.max(1e-9, ...sums)], xLabel, label, yTicks: 4, margin });
    const wide = plot.x(steps[0] + 1) - plot.x(steps[0]) || plot.right - plot.left;
    const bar = Math.max(1, wide > 6 ? Math.min(0.9 * wide, 64) : wide);
    steps.forEach((step, i) => {
      let below = 0;
      for (const part of parts) {
        const value = part.values[i] || 0;
        if (!value) continue;
        const top = plot.y(below + value);
        plot.root.append(svg("rect", { class: `part ${part.className}`, x: plot.x(step) - bar / 2, width: bar, y: top, height: Math.max(0, plot.y(below) - top) }));
        below += value;
      }
    });
    onPointer(plot.root, (px) => {
      if (px === null || px < plot.left || px > plot.right) return null;
      const i = nearest(steps.map(plot.x), px);
      const shown = parts.filter((part) => part.values[i]).map((part) => [part.className, `${part.label} ${text(part.values[i])}${unit}`]);
      return [`step ${steps[i]}`, ...shown.reverse()];
    });
    return [plot.root];
  });
}

// A small chart of lines, or of one line with a range around it.
function lineChart(lines, { height = 150, xLabel = "step", label, range = null }) {
  return responsive("plot", (width) => {
    const all = [...lines.flatMap((line) => line.values), ...(range ? [...range.low, ...range.high] : [])];
    const several = lines.length > 1;
    const plot = frame({
      width,
      height,
      xs: lines.flatMap((line) => line.xs),
      yRange: extent(all, 0.1),
      xLabel,
      label,
      yTicks: 4,
      margin: { left: 50, right: several ? 122 : 58, top: 10 },
    });
    if (range) plot.root.append(svg("path", { class: "band s0", d: bandPath(lines[0].xs, range.low, range.high, plot.x, plot.y) }));
    const labels = [];
    for (const line of lines) {
      plot.root.append(svg("path", { class: `line ${line.className}`, d: linePath(line.xs, line.values, plot.x, plot.y) }));
      const last = line.values.findLastIndex(known);
      if (last < 0) continue;
      plot.root.append(svg("circle", { class: `dot ${line.className}`, r: 3, cx: plot.x(line.xs[last]), cy: plot.y(line.values[last]) }));
      labels.push({ y: plot.y(line.values[last]), className: line.className, text: `${several ? `${line.label} ` : ""}${number(line.values[last], 3)}` });
    }
    endLabels(plot, labels);
    const xs = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
    onPointer(plot.root, (px) => {
      if (px === null) return null;
      const at = xs[nearest(xs.map(plot.x), px)];
      const shown = lines.map((line) => [line.className, `${line.label} ${number(line.values[line.xs.indexOf(at)], 3)}`]);
      if (range) {
        const i = lines[0].xs.indexOf(at);
        shown.push(`from ${number(range.low[i], 3)} to ${number(range.high[i], 3)}`);
      }
      return [`${xLabel} ${at.toLocaleString("en")}`, ...shown];
    });
    return [plot.root];
  });
}
