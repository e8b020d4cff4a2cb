/* Puts the page together. */
function setTheme(name) {
  document.documentElement.dataset.theme = name;
}

/* Draws again what has colours of the theme in it. */
function repaint() {
  renderCharts();
  if (tableState.opened.size) renderTable();
}

/* The theme of the reader's own choice, or else of the system. */
const systemTheme = matchMedia("(prefers-color-scheme: dark)");
let ownTheme = null;
const chosenTheme = () => ownTheme ?? (systemTheme.matches ? "dark" : "light");

function setUpTheme() {
  try { ownTheme = localStorage.getItem("efficientllm-theme"); } catch { ownTheme = null; } // a browser may keep no storage for files
  setTheme(chosenTheme());
  systemTheme.addEventListener("change", () => {
    if (ownTheme !== null || printing) return; // paper stays light: the end of printing asks again
    setTheme(chosenTheme());
    repaint();
  });
  byId("theme").addEventListener("click", () => {
    ownTheme = theme() === "dark" ? "light" : "dark";
    setTheme(ownTheme);
    try { localStorage.setItem("efficientllm-theme", ownTheme); } catch { /* the switch still works for this visit */ }
    repaint();
  });
}

function renderSummary() {
  const devices = [...new Set(BOARD.groups.map((group) => group.device))].join("; ");
  const count = BOARD.groups.reduce((sum, group) => sum + group.variants.length, 0);
  const running = BOARD.without_row.filter((run) => run.state === "running").length;
  const failed = (BOARD.failures.length ? `, ${BOARD.failures.length} failed` : "") + (running ? `, ${running} running` : "");
  const groups = BOARD.groups.length === 1 ? "one ranking" : `${BOARD.groups.length} rankings that are never mixed`;
  byId("summary").textContent = `${BOARD.rows} rows${failed}, ${count} variants in ${groups}. ${devices}`;
}

function answerNode(query, group) {
  const { fit, out } = answer(query, group), unit = COLUMNS[query.key].unit;
  const best = fit[0], second = fit[1];
  const lines = [make("h3", {}, group.name)];
  if (!best) lines.push(make("p", { class: "answer" }, "No variant fits."));
  else {
    const ratio = best.cell.ratio === undefined ? "the baseline" : showRatio(best.cell);
    lines.push(make("p", { class: "answer" }, make("b", {}, best.variant.variant), ` ${show(best.cell.mean, unit)} · ${ratio}`,
      best.sure ? "" : make("span", { class: "open" }, " · not certain: a limit lies within an interval, or there is none")));
  }
  if (second) {
    const share = group.wins[query.key]?.[best.variant.variant]?.[second.variant.variant];
    const better = COLUMNS[query.key].better === (query.most ? "higher" : "lower");
    const sure = share === undefined ? "" : `; it is ahead with a probability of ${percent(better ? share : 1 - share)}`;
    lines.push(make("p", { class: "hint" }, `Next: ${second.variant.variant} ${show(second.cell.mean, unit)}${sure}. ${fit.length} fit.`));
  }
  if (out.length) {
    lines.push(make("details", {}, make("summary", {}, `${out.length} ${out.length === 1 ? "does" : "do"} not fit`),
      ...out.map((one) => make("p", { class: "hint" }, `${one.variant.variant}: ${one.why}`))));
  }
  return make("div", { class: "answer-group" }, ...lines);
}

function ask() {
  const error = byId("query-error"), result = byId("query-result");
  error.hidden = true;
  byId("query").removeAttribute("aria-invalid");
  try {
    const query = parseQuery(byId("query").value);
    result.replaceChildren(...BOARD.groups.map((group) => answerNode(query, group)));
  } catch (problem) {
    if (!(problem instanceof QueryError)) throw problem;
    result.replaceChildren();
    error.textContent = problem.message;
    error.hidden = false;
    byId("query").setAttribute("aria-invalid", "true");
  }
}

function setUpQuery() {
  const held = new Set(BOARD.groups.flatMap((group) => heldMetrics(group).map((column) => column.key)));
  const everywhere = (key) => BOARD.groups.every((group) => heldMetrics(group).some((column) => column.key === key));
  const costs = ["j_per_token", "tpot_s", "al_s", "amu_gb"].filter((key) => held.has(key));
  const compared = (key) => BOARD.groups.some((group) => group.variants.some((variant) => variant.cells[key].ratio !== undefined));
  const cost = costs.find((key) => everywhere(key) && compared(key)) ?? costs.find(compared) ?? costs.find(everywhere) ?? costs[0] ?? [...held][0] ?? "al_s";
  const quality = ["eval_loss", "loss", "mcr"].find((key) => held.has(key));
  byId("query").value = quality && quality !== "mcr" ? `least ${cost} with ${quality} <= +1 %` : `least ${cost}`;
  byId("query-help").textContent = "least|most METRIC with METRIC <= VALUE and … · values: 20 ms, 3.5 GB, 0.2, or +1 % of the baseline's";
  byId("query-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  ask();
}

async function start() {
  setUpTheme();
  DATA.details = { runs: {}, texts: [] };
  try { DATA.details = JSON.parse(await unpack("details")); } catch (problem) { console.warn(`details of runs need a browser with DecompressionStream: ${problem}`); }
  setUpRuns();
  renderSummary();
  setUpQuery();
  renderBoard();
  setUpTable();
  renderStudy();
  renderClaims();
  renderNoise();
  renderFailures();
  fillSelect(byId("ranks-group"), groupOptions(), BOARD.groups[0]?.name);
  byId("ranks-group").addEventListener("change", setUpRanks);
  byId("ranks-metric").addEventListener("change", renderRanks);
  setUpRanks();
  try { await loadPlotly(); } catch (problem) { console.warn(`charts need a browser with DecompressionStream: ${problem}`); }
  setUpCharts();
  setUpPictures();
  setUpAddress();
  setUpPrint();
  document.documentElement.dataset.ready = "yes";
}

start();
