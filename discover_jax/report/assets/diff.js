// Line diffs between a program and its parent.

const MOST_CELLS = 4e6;
const CONTEXT = 3;

// Rows [kind, left line's index or -1, right line's index or -1] of a diff by longest common subsequence. `kind` is " ", "-" or "+".
function diffLines(left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start += 1;
  let leftEnd = left.length;
  let rightEnd = right.length;
  while (leftEnd > start && rightEnd > start && left[leftEnd - 1] === right[rightEnd - 1]) {
    leftEnd -= 1;
    rightEnd -= 1;
  }
  const rows = [];
  for (let i = 0; i < start; i += 1) rows.push([" ", i, i]);
  const n = leftEnd - start;
  const m = rightEnd - start;
  if (n * m > MOST_CELLS) {
    // Too long for the comparison of all pairs of lines: show all lines as removed and added.
    for (let i = start; i < leftEnd; i += 1) rows.push(["-", i, -1]);
    for (let j = start; j < rightEnd; j += 1) rows.push(["+", -1, j]);
  } else {
    const longest = new Uint32Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i -= 1) {
      for (let j = m - 1; j >= 0; j -= 1) {
        longest[i * (m + 1) + j] =
          left[start + i] === right[start + j]
            ? longest[(i + 1) * (m + 1) + j + 1] + 1
            : Math.max(longest[(i + 1) * (m + 1) + j], longest[i * (m + 1) + j + 1]);
      }
    }
    let i = 0;
    let j = 0;
    while (i < n || j < m) {
      if (i < n && j < m && left[start + i] === right[start + j]) {
        rows.push([" ", start + i, start + j]);
        i += 1;
        j += 1;
      } else if (i < n && (j === m || longest[(i + 1) * (m + 1) + j] >= longest[i * (m + 1) + j + 1])) {
        rows.push(["-", start + i, -1]);
        i += 1;
      } else {
        rows.push(["+", -1, start + j]);
        j += 1;
      }
    }
  }
  for (let k = 0; k < left.length - leftEnd; k += 1) rows.push([" ", leftEnd + k, rightEnd + k]);
  return rows;
}

// Pairs removed lines with the added lines that replace them: [left index, right index, changed] of each row.
function sideBySide(rows) {
  const pairs = [];
  let removed = [];
  let added = [];
  const flush = () => {
    for (let k = 0; k < Math.max(removed.length, added.length); k += 1) pairs.push([k < removed.length ? removed[k] : -1, k < added.length ? added[k] : -1, true]);
    removed = [];
    added = [];
  };
  for (const [kind, i, j] of rows) {
    if (kind === "-") removed.push(i);
    else if (kind === "+") added.push(j);
    else {
      flush();
      pairs.push([i, j, false]);
    }
  }
  flush();
  return pairs;
}

// A line's text, with the part marked that differs from the other line.
function marked(text, other) {
  if (other === null) return [text];
  const words = text.match(/\w+|\W/g) || [];
  const others = other.match(/\w+|\W/g) || [];
  let start = 0;
  while (start < words.length && start < others.length && words[start] === others[start]) start += 1;
  let end = 0;
  while (end < words.length - start && end < others.length - start && words[words.length - 1 - end] === others[others.length - 1 - end]) end += 1;
  const [before, middle, after] = [words.slice(0, start), words.slice(start, words.length - end), words.slice(words.length - end)].map((part) => part.join(""));
  if (!middle || (before + after).trim().length < text.trim().length / 4) return [text];
  return [before, el("mark", null, middle), after];
}

function half(side, index, text, other, changed) {
  const kind = index < 0 ? "none" : changed ? (side === "left" ? "out" : "in") : "same";
  return [
    el("span", { class: `line-number ${side} ${kind}` }, index < 0 ? "" : String(index + 1)),
    el("code", { class: `${side} ${kind}` }, index < 0 ? "" : changed ? marked(text, other) : text),
  ];
}

// Two programs side by side; on a narrow screen, changed lines are below each other. Unchanged lines far from a change are folded.
function diffView(left, right) {
  const pairs = sideBySide(diffLines(left, right));
  const near = pairs.map(() => false);
  pairs.forEach(([, , changed], k) => {
    if (changed) for (let d = Math.max(0, k - CONTEXT); d <= Math.min(pairs.length - 1, k + CONTEXT); d += 1) near[d] = true;
  });
  const view = el("div", { class: "diff" });
  const line = ([i, j, changed]) => {
    const a = i < 0 ? null : left[i];
    const b = j < 0 ? null : right[j];
    return el("div", { class: changed ? "row changed" : "row" }, half("left", i, a, b, changed), half("right", j, b, a, changed));
  };
  for (let k = 0; k < pairs.length; ) {
    let end = k;
    while (end < pairs.length && near[end] === near[k]) end += 1;
    const part = pairs.slice(k, end);
    if (near[k] || part.length <= 2) view.append(...part.map(line));
    else {
      const unfold = el("button", { class: "fold", onclick: () => unfold.replaceWith(...part.map(line)) }, count(part.length, "unchanged line"));
      view.append(unfold);
    }
    k = end;
  }
  return view;
}

function codeView(lines) {
  return el("pre", { class: "program" }, lines.map((line, i) => el("div", null, el("span", { class: "line-number" }, String(i + 1)), el("code", null, line))));
}
