/* Charts with plotly.js, which the page carries compressed. */
const PALETTES = {
  light: ["#1d4ed8", "#c2620a", "#0b7a4b", "#b42318", "#6d28d9", "#0e7490", "#a8155e", "#4d7c0f", "#64748b", "#78350f"],
  dark: ["#8ab4ff", "#f5a952", "#4cc38a", "#ff8b7e", "#b79bff", "#5fd0e6", "#f08bbd", "#a9d05e", "#9aa5b1", "#d8a373"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];

async function loadPlotly() {
  const packed = atob(byId("plotly").textContent.trim());
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
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
    margin: { l: 60, r: 20, t: 16, b: 50 }, legend: { orientation: "h", y: -0.2 }, ...extra,
    xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
  };
}

function plot(id, traces, extra, label) {
  const box = byId(id);
  box.setAttribute("aria-label", label);
  if (!traces.length || !window.Plotly) {
    window.Plotly?.purge(box);
    box.className = "chart empty";
    box.textContent = label;
    return;
  }
  if (box.className !== "chart") box.replaceChildren();
  box.className = "chart";
  Plotly.react(box, traces, layout(extra), { displayModeBar: false, responsive: true });
}

const chosenGroup = (id) => BOARD.groups[Number(byId(id).value)];

function axisTitle(key) {
  const { label, unit, better } = COLUMNS[key];
  return { text: `${label} (${unit}${better ? `, ${better} is better` : ""})` };
}

function paretoShares(group, x, y) {
  return group.pareto[`${x}|${y}`] ?? group.pareto[`${y}|${x}`] ?? {};
}

function renderPareto() {
  const group = chosenGroup("pareto-group"), x = byId("pareto-x").value, y = byId("pareto-y").value;
  const shares = paretoShares(group, x, y);
  const held = group.variants.filter((variant) => x && y && variant.cells[x].mean !== null && variant.cells[y].mean !== null);
  const text = (variant) => shares[variant.variant] == null ? variant.variant : `${variant.variant} ${percent(shares[variant.variant])}`;
  const traces = held.map((variant, i) => ({
    x: [variant.cells[x].mean], y: [variant.cells[y].mean], mode: "markers+text", text: [text(variant)], textposition: "top center",
    name: variant.variant, showlegend: false, cliponaxis: false,
    marker: { color: colour(i), size: 12, opacity: 0.25 + 0.75 * (shares[variant.variant] ?? 1) },
    hovertemplate: `${variant.variant}<br>${x}: ${show(variant.cells[x].mean, COLUMNS[x].unit)}<br>${y}: ${show(variant.cells[y].mean, COLUMNS[y].unit)}<extra></extra>`,
  }));
  plot("pareto", traces, { xaxis: { title: axisTitle(x) }, yaxis: { title: axisTitle(y) } },
    traces.length ? `Scatter of ${x} and ${y}` : "No variant has both metrics.");
  const rows = held.map((variant) => [variant.variant, show(variant.cells[x].mean, COLUMNS[x].unit),
    show(variant.cells[y].mean, COLUMNS[y].unit), percent(shares[variant.variant])]);
  const unsure = held.length && held.every((variant) => shares[variant.variant] == null);
  byId("pareto-text").replaceChildren(...(rows.length ? [plainTable("", ["variant", x, y, "probability of being non-dominated"], rows)] : []),
    make("p", { class: "hint" }, unsure ? "No probability: it takes two blocks, and rows that may be ranked together." : ""));
}

function renderRadar() {
  const group = chosenGroup("six-group");
  const known = group.six.filter((key) => group.variants.some((variant) => variant.normalised[key] !== null));
  const whole = group.variants.filter((variant) => known.every((key) => variant.normalised[key] !== null));
  const around = [...known, known[0]];
  const traces = known.length < 3 ? [] : whole.map((variant, i) => ({
    type: "scatterpolar", name: variant.variant, mode: "lines+markers", marker: { size: 5 },
    r: around.map((key) => variant.normalised[key]), theta: around.map((key) => COLUMNS[key].label),
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
    make("p", { class: "hint" }, "Min-max over this group to 0.1..1 with 1 best (Eq. 10–11). " + (why.length ? `Not measured – ${why.join("; ")}.` : "")));
}

function renderCurves() {
  const group = chosenGroup("curves-group"), tag = byId("curves-tag").value;
  const traces = group.variants.flatMap((variant, i) => variant.paths.filter((path) => DATA.curves[path]?.[tag]).map((path, run) => ({
    x: DATA.curves[path][tag].steps, y: DATA.curves[path][tag].values, mode: "lines", name: variant.variant,
    legendgroup: variant.variant, showlegend: run === 0, line: { color: colour(i), width: 1.5, dash: DASHES[i % DASHES.length] },
    hovertemplate: `%{y:.5g} at step %{x}<extra>${path}</extra>`,
  })));
  plot("curves-chart", traces, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: tag } } },
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
  for (const id of ["pareto-group", "six-group", "curves-group"]) fillSelect(byId(id), groupOptions(), "0");
  const drawn = BOARD.groups.findIndex((group) => group.variants.some((variant) => variant.paths.some((path) => DATA.curves[path]?.loss)));
  byId("curves-group").value = String(Math.max(0, drawn));
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
}
