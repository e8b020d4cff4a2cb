/* Charts with plotly.js, which the page carries compressed. */
const PALETTES = {
  light: ["#1d4ed8", "#c2620a", "#0b7a4b", "#b42318", "#6d28d9", "#0e7490", "#a8155e", "#4d7c0f", "#64748b", "#78350f"],
  dark: ["#8ab4ff", "#f5a952", "#4cc38a", "#ff8b7e", "#b79bff", "#5fd0e6", "#f08bbd", "#a9d05e", "#9aa5b1", "#d8a373"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const PRINTED = { width: 640, height: 380, autosize: false }; // fits A4 and letter upright
let printing = false;

async function loadPlotly() {
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);
}

const theme = () => document.documentElement.dataset.theme;
const colour = (i) => PALETTES[theme()][i % PALETTES.light.length];

function layout(extra) {
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 }, hovermode: "closest",
    margin: { l: 60, r: 20, t: 16, b: 56 }, showlegend: false, ...(printing ? PRINTED : {}), ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

function plot(id, traces, extra, label) {
  const box = byId(id);
  box.setAttribute("aria-label", label);
  if (box.nextElementSibling?.matches(".legend")) box.nextElementSibling.remove();
  if (!traces.length || !window.Plotly) {
    window.Plotly?.purge(box);
    box.className = "chart empty";
    box.textContent = label;
    return;
  }
  if (box.className !== "chart") box.replaceChildren();
  box.className = "chart";
  Plotly.react(box, traces, layout(extra), { displayModeBar: false, responsive: !printing });
  const named = traces.filter((trace) => trace.line).map((trace) => [trace.name, trace.line.color, trace.line.dash]);
  if (named.length) box.after(legendNode(named, box));
}

/* Names and colours of lines as buttons below their chart, which hide and show them: plotly.js's own legend covers axes. */
function legendNode(entries, box = null) {
  const first = new Map(entries.map(([name, ...look]) => [name, look]).reverse());
  return make("div", { class: "legend" }, ...[...first].reverse().map(([name, [color, dash]]) => {
    const line = make("i", { "data-dash": dash });
    line.style.borderTopColor = color;
    const button = make(box ? "button" : "span", box ? { type: "button", "aria-pressed": "true", title: name } : { title: name }, line, short(name, 40));
    if (box) {
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shown));
        Plotly.restyle(box, { visible: shown }, box.data.flatMap((trace, i) => (trace.name === name ? [i] : [])));
      });
    }
    return button;
  }));
}

const chosenGroup = (id) => BOARD.groups.find((group) => group.name === byId(id).value);

function axisTitle(key) {
  const { label, unit, better } = COLUMNS[key];
  return { text: `${label} (${unit}${better ? `, ${better} is better` : ""})` };
}

function paretoShares(group, x, y) {
  return group.pareto[`${x}|${y}`] ?? group.pareto[`${y}|${x}`] ?? {};
}

/* A range with room around the values for points and their names. */
function around(values) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low) * 0.12 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/* Where each point's name goes, so that names neither meet nor leave the chart; "" where there is no room for one. */
function labelPlaces(box, xs, ys, names, [xRange, yRange]) {
  const width = (printing ? PRINTED.width : box.clientWidth) - 80, height = (printing ? PRINTED.height : box.clientHeight) - 72;
  const at = xs.map((x, i) => [((x - xRange[0]) / (xRange[1] - xRange[0])) * width, (1 - (ys[i] - yRange[0]) / (yRange[1] - yRange[0])) * height]);
  const taken = at.map(([px, py]) => [px - 7, py - 7, px + 7, py + 7]);
  const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  return names.map((name, i) => {
    const [px, py] = at[i], wide = name.length * 7 + 4;
    const boxes = {
      "top center": [px - wide / 2, py - 24, px + wide / 2, py - 7], "bottom center": [px - wide / 2, py + 7, px + wide / 2, py + 24],
      "middle right": [px + 7, py - 9, px + 7 + wide, py + 9], "middle left": [px - 7 - wide, py - 9, px - 7, py + 9],
    };
    const free = Object.entries(boxes).find(([, rect]) => rect[0] >= 0 && rect[2] <= width && rect[1] >= 0 && rect[3] <= height &&
      !taken.some((other) => meets(rect, other)));
    if (free) taken.push(free[1]);
    return free ? free[0] : "";
  });
}

/* As many of the variants as a chart shows apart, and a word on the rest. */
const MOST = 60;
const tooMany = (variants) => (variants.length > MOST ? ` The first ${MOST} of ${variants.length} variants are drawn.` : "");

function renderPareto() {
  const group = chosenGroup("pareto-group"), x = byId("pareto-x").value, y = byId("pareto-y").value;
  const shares = paretoShares(group, x, y);
  const held = group.variants.filter((variant) => x && y && variant.cells[x].mean !== null && variant.cells[y].mean !== null);
  const refused = (variant) => refusal(variant, group, x) ?? refusal(variant, group, y);
  const text = (variant) => (refused(variant) ? " (not compared)" : shares[variant.variant] == null ? "" : ` ${percent(shares[variant.variant])}`);
  const drawn = held.slice(0, MOST), [xs, ys] = [x, y].map((key) => drawn.map((variant) => variant.cells[key].mean));
  const names = drawn.map((variant) => `${short(variant.variant)}${text(variant)}`);
  const ranges = [around(xs), around(ys)], places = labelPlaces(byId("pareto"), xs, ys, names, ranges);
  const traces = drawn.map((variant, i) => ({
    x: [xs[i]], y: [ys[i]], mode: "markers+text", text: [places[i] ? plotText(names[i]) : ""], textposition: places[i] || "top center",
    name: variant.variant, meta: plotText(variant.variant + text(variant)),
    marker: { color: colour(i), size: 12, opacity: 0.25 + 0.75 * (shares[variant.variant] ?? 1), symbol: refused(variant) ? "x-thin-open" : "circle" },
    hovertemplate: `%{meta}<br>${x}: ${show(xs[i], COLUMNS[x].unit)}<br>${y}: ${show(ys[i], COLUMNS[y].unit)}<extra></extra>`,
  }));
  const axis = (key, range) => ({ title: { ...axisTitle(key), standoff: 10 }, range });
  plot("pareto", traces, { xaxis: axis(x, ranges[0]), yaxis: axis(y, ranges[1]) },
    traces.length ? `Scatter of ${x} and ${y}` : "No variant has both metrics.");
  const rows = held.map((variant) => [variant.variant, show(variant.cells[x].mean, COLUMNS[x].unit),
    show(variant.cells[y].mean, COLUMNS[y].unit), refused(variant) ? `not compared: ${refused(variant)}` : percent(shares[variant.variant])]);
  const unsure = held.length && held.every((variant) => shares[variant.variant] == null);
  byId("pareto-text").replaceChildren(...(rows.length ? [plainTable("", ["variant", x, y, "probability of being non-dominated"], rows)] : []),
    make("p", { class: "hint" }, (unsure ? "No probability: it takes two blocks, and rows that may be ranked together." : "") + tooMany(held)));
}

function renderRadar() {
  const group = chosenGroup("six-group");
  const known = group.six.filter((key) => group.variants.some((variant) => variant.normalised[key] !== null));
  const whole = group.variants.filter((variant) => known.every((key) => variant.normalised[key] !== null));
  const closed = [...known, known[0]];
  const traces = known.length < 3 ? [] : whole.slice(0, MOST).map((variant, i) => ({
    type: "scatterpolar", name: variant.variant, mode: "lines+markers", marker: { size: 5 }, meta: plotText(variant.variant),
    r: closed.map((key) => variant.normalised[key]), theta: closed.map((key) => COLUMNS[key].label),
    hovertemplate: "%{meta}<br>%{theta}: %{r:.2f}<extra></extra>",
    line: { color: colour(i), width: 2, dash: DASHES[i % DASHES.length] },
  }));
  const line = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
  plot("radar", traces, { margin: { l: 40, r: 40, t: 30, b: 30 }, polar: { bgcolor: "rgba(0,0,0,0)",
    radialaxis: { range: [0, 1], gridcolor: line, tickvals: [0.1, 0.5, 1] }, angularaxis: { gridcolor: line, linecolor: line } } },
    traces.length ? "Radar of the normalised metrics; 1 is best in the group" : "Fewer than three of the six metrics are known here.");
  const missing = group.six.filter((key) => !known.includes(key));
  const why = missing.map((key) => `${COLUMNS[key].label}: ${group.variants[0].cells[key].reason}`);
  byId("six-text").replaceChildren(
    plainTable("", ["variant", ...group.six.map((key) => COLUMNS[key].label)], group.variants.map((variant) => [variant.variant,
      ...group.six.map((key) => variant.normalised[key]?.toFixed(2) ?? valueNode({ mean: null, reason: variant.cells[key].reason }))])),
    make("p", { class: "hint" }, "Min-max over this group to 0.1..1 with 1 best (Eq. 10–11). " + (why.length ? `Not measured – ${why.join("; ")}.` : "") + tooMany(whole)));
}

function renderCurves() {
  const group = chosenGroup("curves-group"), tag = byId("curves-tag").value;
  const traces = group.variants.slice(0, MOST).flatMap((variant, i) => variant.paths.filter((path) => DATA.curves[path]?.[tag]).map((path) => ({
    x: DATA.curves[path][tag].steps, y: DATA.curves[path][tag].values, mode: "lines", name: variant.variant,
    line: { color: colour(i), width: 1.5, dash: DASHES[i % DASHES.length] }, meta: plotText(`${variant.variant}, ${RUNS.get(path).block}`),
    hovertemplate: "%{meta}<br>%{y:.5g} at step %{x}<extra></extra>",
  })));
  plot("curves-chart", traces, { xaxis: { title: { text: "step", standoff: 10 } }, yaxis: { title: { text: tag } } },
    traces.length ? `${tag} over steps` : "No TensorBoard event files lie beside these rows.");
}

function setUpPareto() {
  const columns = heldMetrics(chosenGroup("pareto-group"));
  const pick = (keys, fallback) => keys.find((key) => columns.some((column) => column.key === key)) ?? columns[fallback]?.key;
  fillSelect(byId("pareto-x"), metricOptions(columns), pick(["j_per_token", "tpot_s", "al_s"], 0));
  fillSelect(byId("pareto-y"), metricOptions(columns), pick(["eval_loss", "loss", "mcr"], 1));
  renderPareto();
}

function setUpCharts() {
  for (const id of ["pareto-group", "six-group", "curves-group"]) fillSelect(byId(id), groupOptions(), BOARD.groups[0]?.name);
  const drawn = BOARD.groups.find((group) => group.variants.some((variant) => variant.paths.some((path) => DATA.curves[path]?.loss)));
  if (drawn) byId("curves-group").value = drawn.name;
  const tags = [...new Set(Object.values(DATA.curves).flatMap((run) => Object.keys(run)))];
  fillSelect(byId("curves-tag"), tags.map((tag) => [tag, tag]), tags[0]);
  byId("pareto-group").addEventListener("change", setUpPareto);
  for (const id of ["pareto-x", "pareto-y"]) byId(id).addEventListener("change", renderPareto);
  byId("six-group").addEventListener("change", renderRadar);
  for (const id of ["curves-group", "curves-tag"]) byId(id).addEventListener("change", renderCurves);
  setUpPareto();
  renderRadar();
  renderCurves();
}

function renderCharts() {
  renderPareto();
  renderRadar();
  renderCurves();
  renderLevels();
}

/* On paper: light, charts of a width that every page has, and back. */
function setUpPrint() {
  const opened = () => document.querySelectorAll(".opened .chart");
  addEventListener("beforeprint", () => {
    if (printing) return;
    printing = true;
    setTheme("light");
    renderCharts();
    for (const box of opened()) if (box.data) Plotly.relayout(box, { ...PRINTED, height: 240 });
  });
  addEventListener("afterprint", () => {
    printing = false;
    setTheme(chosenTheme());
    renderCharts();
    for (const box of opened()) if (box.data) Plotly.relayout(box, { width: null, height: null, autosize: true });
  });
}
