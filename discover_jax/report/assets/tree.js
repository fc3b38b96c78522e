// The tree of attempts: a dot per attempt at its step and score, with an edge to its parent.

const STRIP = 30;
const REACH = 28;
const WORST_SHARE = 0.08;
const shownStep = (step) => step + 1;

// Ancestors of a row, oldest first, and the row itself.
function ancestors(tree, row) {
  const chain = [];
  for (let at = row; at >= 0 && chain.length <= tree.id.length; at = tree.parent[at]) chain.push(at);
  return chain.reverse();
}

// Children of a row, best first.
function childrenOf(tree, row) {
  const found = [];
  for (let i = 0; i < tree.id.length; i += 1) if (tree.parent[i] === row) found.push(i);
  return found.sort((a, b) => tree.reward[b] - tree.reward[a]);
}

// The range of the y axis. It excludes the worst scores, which are drawn at the chart's edge.
function scoreRange(values, higher) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const skipped = Math.floor(sorted.length * WORST_SHARE);
  return extent(higher ? [sorted[skipped], sorted[sorted.length - 1]] : [sorted[0], sorted[sorted.length - 1 - skipped]], 0.05);
}

// `outcomes`: label and class of each outcome. `choose(row)` is called for the selected row.
function treeChart({ tree, lineage, disclosed, outcomes, describe, choose }) {
  const higher = disclosed ? disclosed.higher_is_better : null;
  const rows = tree.id.map((_, row) => row);
  const values = higher === null ? tree.reward.map((reward, row) => (known(tree.score[row]) ? reward : null)) : tree.score;
  const range = scoreRange(values, higher !== false);
  const beyond = values.filter((value) => known(value) && (value < range[0] || value > range[1])).length;
  const groups = Math.max(...tree.group) + 1;
  const size = Math.max(...tree.index) + 1;
  const steps = [...new Set(tree.step)].sort((a, b) => a - b).map(shownStep);
  let chosen = -1;
  let redraw = () => {};

  const host = responsive("plot scroll", (available) => {
    const width = Math.max(available, steps.length * 14 + 80);
    const narrow = available < NARROW;
    const plot = frame({
      width,
      height: narrow ? 360 : 460,
      xs: steps,
      xPad: 0.5,
      yRange: range,
      xLabel: "step",
      label: describe,
      margin: { bottom: 28 + STRIP, right: 16 },
    });
    const failedTop = plot.bottom + 24;
    const px = rows.map((row) => plot.x(shownStep(tree.step[row]) - 0.43 + (0.86 * (tree.group[row] * size + tree.index[row] + 0.5)) / (groups * size)));
    const py = rows.map((row) =>
      known(values[row]) ? plot.y(Math.min(Math.max(values[row], range[0]), range[1])) : failedTop + 4 + ((STRIP - 10) * (tree.index[row] + 0.5)) / size,
    );
    const dots = (some) => some.map((row) => `M${px[row].toFixed(1)} ${py[row].toFixed(1)}h0`).join("");
    const edge = (row) => {
      const from = tree.parent[row];
      const middle = (px[from] + px[row]) / 2;
      return `M${px[from].toFixed(1)} ${py[from].toFixed(1)}C${middle.toFixed(1)} ${py[from].toFixed(1)} ${middle.toFixed(1)} ${py[row].toFixed(1)} ${px[row].toFixed(1)} ${py[row].toFixed(1)}`;
    };
    const edges = (some) => some.filter((row) => tree.parent[row] >= 0).map(edge).join("");
    const crowd = rows.length > 1500 ? " crowd" : "";
    plot.root.append(
      svg("line", { class: "rule", x1: plot.left, x2: plot.right, y1: failedTop - 2, y2: failedTop - 2 }),
      svg("text", { class: "axis", x: plot.left - 8, y: failedTop + STRIP / 2 - 2, dy: "0.35em", "text-anchor": "end" }, "failed"),
      svg("path", { class: `edge${crowd}`, d: edges(rows.filter((row) => known(tree.score[row]))) }),
    );
    outcomes.forEach((outcome, kind) => {
      const some = rows.filter((row) => tree.outcome[row] === kind);
      if (some.length) plot.root.append(svg("path", { class: `dots ${outcome.className}${crowd}`, d: dots(some) }));
    });
    if (lineage.length) {
      const best = lineage[lineage.length - 1];
      plot.root.append(svg("path", { class: "edge best", d: edges(lineage) }), svg("path", { class: "dots best", d: dots(lineage) }));
      const atRight = px[best] > plot.right - 120;
      plot.root.append(
        svg("text", { class: "best-label", x: px[best] + (atRight ? -9 : 9), y: higher === false ? py[best] + 20 : Math.max(plot.top + 4, py[best] - 8), "text-anchor": atRight ? "end" : "start" }, `best ${score(tree.score[best], disclosed)}`),
      );
    }
    const marks = svg("g", { class: "marks" });
    const hover = svg("circle", { class: "hover", r: 6, visibility: "hidden" });
    plot.root.append(marks, hover);
    redraw = () => {
      marks.replaceChildren();
      if (chosen < 0) return;
      const family = ancestors(tree, chosen);
      const children = childrenOf(tree, chosen);
      marks.append(
        svg("path", { class: children.length > 20 ? "edge child many" : "edge child", d: edges(children) }),
        svg("path", { class: "edge chosen", d: edges(family) }),
        svg("path", { class: "dots chosen", d: dots(family) }),
        svg("circle", { class: "ring", r: 7, cx: px[chosen], cy: py[chosen] }),
      );
    };
    redraw();
    const under = (x, y) => {
      let found = -1;
      let least = REACH ** 2;
      for (const row of rows) {
        const distance = (px[row] - x) ** 2 + (py[row] - y) ** 2;
        if (distance < least) {
          least = distance;
          found = row;
        }
      }
      return found;
    };
    onPointer(
      plot.root,
      (x, y) => {
        const row = x === null ? -1 : under(x, y);
        hover.setAttribute("visibility", row < 0 ? "hidden" : "visible");
        if (row < 0) return null;
        hover.setAttribute("cx", px[row]);
        hover.setAttribute("cy", py[row]);
        return hoverLines(tree, row, disclosed, outcomes);
      },
      (x, y) => {
        const row = under(x, y);
        if (row >= 0) choose(row);
      },
    );
    plot.root.setAttribute("tabindex", "0");
    plot.root.addEventListener("keydown", (event) => {
      const next = neighbour(tree, chosen, event.key);
      if (next < 0) return;
      event.preventDefault();
      choose(next);
    });
    return [plot.root];
  });
  return {
    host,
    beyond,
    edge: higher === false ? range[1] : range[0],
    mark(row) {
      chosen = row;
      redraw();
    },
  };
}

function hoverLines(tree, row, disclosed, outcomes) {
  const scoreName = disclosed ? disclosed.metric : "score";
  const parent = tree.parent[row];
  const change = parent >= 0 && known(tree.score[row]) && known(tree.score[parent]) ? ` (${signed(tree.score[row] - tree.score[parent], disclosed)} vs. parent)` : "";
  return [
    `${tree.id[row]}, step ${shownStep(tree.step[row])}`,
    known(tree.score[row]) ? [outcomes[tree.outcome[row]].className, `${scoreName} ${score(tree.score[row], disclosed)}${change}`] : [outcomes[tree.outcome[row]].className, outcomes[tree.outcome[row]].label],
    count(tree.tokens[row], "token"),
  ];
}

// The row that an arrow key selects: parent, best child or sibling; -1 if there is none.
function neighbour(tree, row, key) {
  if (row < 0) return -1;
  if (key === "ArrowLeft") return tree.parent[row];
  if (key === "ArrowRight") return childrenOf(tree, row)[0] ?? -1;
  if (key !== "ArrowUp" && key !== "ArrowDown") return -1;
  const same = tree.id.map((_, i) => i).filter((i) => tree.step[i] === tree.step[row] && tree.group[i] === tree.group[row]);
  return same[same.indexOf(row) + (key === "ArrowUp" ? -1 : 1)] ?? -1;
}
