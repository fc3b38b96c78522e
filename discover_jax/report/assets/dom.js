// Elements. Text only ever enters as text nodes: nothing here parses markup, so whatever a program printed stays what it is.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// A chart that is drawn again at each width it gets: `draw(width)` gives its elements.
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

// Shows lines of text beside a pointer; each is a string, or [series' class, text].
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

// Lets a chart answer the pointer: `at(x, y)`, in the chart's own pixels, gives the lines to show, or null for none.
function answers(root, at, click) {
  const place = (event) => {
    const box = root.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const move = (event) => {
    const lines = at(...place(event));
    if (lines) showTip(event, lines);
    else hideTip();
  };
  root.addEventListener("pointermove", move);
  root.addEventListener("pointerdown", move);
  root.addEventListener("pointerleave", () => {
    at(null, null);
    hideTip();
  });
  if (click) root.addEventListener("click", (event) => click(...place(event)));
}
