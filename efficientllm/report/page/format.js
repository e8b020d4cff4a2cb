/* The page's data, and how its parts are made and printed. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const BOARD = DATA.board;
const COLUMNS = Object.assign(Object.create(null), Object.fromEntries(BOARD.columns.map((column) => [column.key, column])));
const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];

const byId = (id) => document.getElementById(id);

/* The text that an element holds, gzipped and in base64. */
async function unpack(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

/* An element: make("td", {class: "null", title: "why"}, "text", child, ...). */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function digits(value) {
  return Number(value.toPrecision(4)).toString();
}

/* "494 ms", "1.31 M", "–": four digits, with the SI prefix that keeps them before the point. */
function show(value, unit) {
  if (value === null || value === undefined) return "–";
  const named = { 1: "", bytes: "B", "1/s": "/s" }[unit] ?? unit;
  let [factor, prefix] = PREFIXES.find(([size]) => Math.abs(value) >= size * 0.99995) ?? PREFIXES[PREFIXES.length - 1];
  const plain = ["", "nat", "bit", "GB", "USD"].includes(named) && Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4;
  if (value === 0 || plain) [factor, prefix] = [1, ""];
  if (named === "/s" && Math.abs(value) < 1) return `${value.toExponential(3)} /s`; // 2 m/s would be a speed
  return `${digits(value / factor)} ${prefix}${named}`.trim();
}

function showRatio(entry) {
  if (entry.low === null || entry.low === undefined) return `×${entry.ratio.toFixed(3)}, no interval`;
  if (entry.low <= 1 && entry.high >= 1 && (entry.low < 0.5 || entry.high > 2)) return "cannot be told apart";
  return `×${entry.ratio.toFixed(3)} (${entry.low.toFixed(3)}–${entry.high.toFixed(3)})`;
}

function percent(share) {
  return share === null || share === undefined ? "–" : `${Math.round(share * 100)} %`;
}

/* A value, or a dash with the reason as its title. */
function valueNode(cell, unit) {
  if (cell.mean !== null) return document.createTextNode(show(cell.mean, unit));
  return make("span", { class: "null", title: cell.reason, tabindex: "0", "aria-label": `null: ${cell.reason}` }, "–");
}

/* A box for what may be wide: it scrolls sideways, and its edges show that there is more. */
function scrollBox(content, label) {
  const box = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, content);
  const frame = make("div", { class: "frame" }, box);
  frame.style.setProperty("--columns", content.rows[0]?.cells.length ?? 1); // what print shares the page's width by
  const look = () => {
    frame.classList.toggle("more-left", box.scrollLeft > 1);
    frame.classList.toggle("more-right", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  };
  box.addEventListener("scroll", look, { passive: true });
  const sizes = new ResizeObserver(look);
  sizes.observe(box);
  sizes.observe(content);
  return frame;
}

/* A table in a box that scrolls sideways: heads are strings, rows are lists of strings or nodes. */
function plainTable(caption, heads, rows, classes = []) {
  const head = make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: classes[i] }, text)));
  const body = rows.map((row) =>
    make("tr", {}, ...row.map((cell, i) =>
      i === 0 ? make("th", { scope: "row" }, cell) : make("td", { class: classes[i] }, cell))));
  const table = make("table", {}, caption ? make("caption", {}, caption) : null,
    make("thead", {}, head), make("tbody", {}, ...body));
  return scrollBox(table, caption || heads[0]);
}

function fillSelect(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value, selected: value === chosen }, text)));
}

function groupOptions() {
  return BOARD.groups.map((group) => [group.name, group.name]);
}

/* Text as plotly.js takes it, which reads tags and entities of HTML. */
const plotText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const short = (text, most = 28) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

/* Metrics of a group that hold a value, optionally only those that have a better way. */
function heldMetrics(group, judged = true) {
  return BOARD.columns.filter((column) => (!judged || column.better) &&
    group.variants.some((variant) => variant.cells[column.key].mean !== null));
}

function metricOptions(columns) {
  return columns.map((column) => [column.key, `${column.label} (${column.key})`]);
}
