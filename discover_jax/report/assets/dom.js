// Creates elements. Text is inserted only as text nodes and never parsed as markup, so no text of a run can become an element.

const SVG = "http://www.w3.org/2000/svg";

// Text without characters that are hidden or change the order of others, which could show another program than the one that ran. A
// replacement character shows where they were; variants of emoji leave no mark.
function visible(text) {
  const mark = (found) => (found === "\n" || found === "\t" ? found : /[\ufe00-\ufe0f]/.test(found) ? "" : "\ufffd");
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu, mark);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : visible(String(value)));
  }
  const shown = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  node.append(...shown.map((child) => (child instanceof Node ? child : visible(String(child)))));
  return node;
}

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// An element that is redrawn when its width changes. `draw(width)` returns its children.
function responsive(className, draw) {
  const host = el("div", { class: className });
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(host.clientWidth);
    if (width && width !== drawn) {
      drawn = width;
      host.replaceChildren(...[draw(width)].flat());
    }
  }).observe(host);
  return host;
}

const tip = el("div", { class: "tip", role: "status", hidden: true });

// Shows lines of text next to the pointer. Each line is a string or [class of the series, text].
function showTip(event, lines) {
  tip.replaceChildren(
    ...lines.map((line) => (typeof line === "string" ? el("div", null, line) : el("div", null, el("i", { class: `swatch ${line[0]}` }), line[1]))),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
  const top = event.clientY + 14 + height > innerHeight ? event.clientY - 14 - height : event.clientY + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Adds a tooltip and a click handler to a chart. `at(x, y)`, in pixels of the chart, returns the tooltip's lines, or null for no tooltip.
// It is called with nulls when the pointer leaves.
function onPointer(root, at, click) {
  const position = (event) => {
    const box = root.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const move = (event) => {
    const lines = at(...position(event));
    if (lines) showTip(event, lines);
    else hideTip();
  };
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", () => {
    at(null, null);
    hideTip();
  });
  if (click) root.addEventListener("click", (event) => click(...position(event)));
}
