// Formats numbers for people.

const MISSING = "–";

function known(value) {
  return value !== null && value !== undefined;
}

function number(value, digits = 4) {
  if (!known(value)) return MISSING;
  const size = Math.abs(value);
  if (size < 1e-12) return "0"; // the rounding error of a sum that is 0
  if (size < 1e-3 || size >= 1e7) return value.toExponential(1).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.ceil(Math.log10(size))) });
}

const isExact = (disclosed) => Boolean(disclosed) && disclosed.reward === "evaluate";

// Scores have four decimals, as on the console. Those of a problem have nine digits, because small gains count.
function score(value, disclosed) {
  if (!known(value)) return MISSING;
  if (isExact(disclosed)) return String(Number(value.toPrecision(9)));
  return Math.abs(value) < 1e4 ? value.toFixed(4) : number(value, 6);
}

// All digits of a problem's score, where the last ones count.
function exactScore(value, disclosed) {
  return known(value) && isExact(disclosed) ? String(value) : score(value);
}

function signed(value, disclosed) {
  if (!known(value)) return MISSING;
  return (value < 0 ? "−" : "+") + (isExact(disclosed) && value !== 0 ? Number(Math.abs(value).toPrecision(3)) : score(Math.abs(value)));
}

function count(value, one, many) {
  return `${value.toLocaleString("en")} ${value === 1 ? one : many || `${one}s`}`;
}

function percent(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)}%` : MISSING;
}

function span(interval) {
  return known(interval) ? `${score(interval[0])} to ${score(interval[1])}` : MISSING;
}

const total = (values) => values.reduce((sum, value) => sum + value, 0);
