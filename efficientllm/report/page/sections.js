/* Ranks and wins, the study beside ours, its claims, the noise floor, failures. */
const EQUATION = "probability that the row's variant beats the column's";

function renderRanks() {
  const group = chosenGroup("ranks-group"), key = byId("ranks-metric").value, box = byId("ranks-text");
  if (!key) return box.replaceChildren(make("p", { class: "hint" }, "Nothing here can be ranked."));
  const ranked = group.variants.filter((variant) => variant.cells[key].rank !== undefined);
  ranked.sort((a, b) => a.cells[key].rank - b.cells[key].rank);
  const names = ranked.map((variant) => variant.variant), wins = group.wins[key];
  const rows = ranked.map((variant) => {
    const cell = variant.cells[key];
    const range = cell.rank_low === null ? "one block: no interval" : `${cell.rank_low}–${cell.rank_high}`;
    return [variant.variant, String(cell.rank), range, ...(wins ? names.map((other) => winNode(wins, variant.variant, other)) : [])];
  });
  const refused = group.variants.filter((variant) => variant.cells[key].rank === undefined);
  box.replaceChildren(
    plainTable(`${COLUMNS[key].label}, ${COLUMNS[key].better} is better${wins ? `; cells: ${EQUATION}` : ""}`,
      ["variant", "rank", "95 %", ...(wins ? names : [])], rows, ["", "", "", ...names.map(() => "heat")]),
    ...refused.map((variant) => make("p", { class: "hint" }, `${variant.variant} is not ranked: ${variant.cells[key].reason}`)));
}

function winNode(wins, variant, other) {
  if (variant === other) return "";
  const share = wins[variant][other];
  return make("span", { class: share >= 0.975 ? "better" : share <= 0.025 ? "worse" : "" }, percent(share));
}

function setUpRanks() {
  const group = chosenGroup("ranks-group");
  const columns = heldMetrics(group).filter((column) => group.variants.some((variant) => variant.cells[column.key].rank !== undefined));
  const first = ["al_s", "tpot_s", "tokens_per_s", "eval_loss"].find((key) => columns.some((column) => column.key === key));
  fillSelect(byId("ranks-metric"), metricOptions(columns), first ?? columns[0]?.key);
  renderRanks();
}

function renderStudy() {
  const tables = BOARD.groups.flatMap((group) => group.study.map((entry) => {
    const rows = entry.rows.map((row) => [row.variant, row.metric, `×${row.study_ratio.toFixed(3)}`,
      row.ratio === undefined ? make("span", { class: "null", title: row.reason, tabindex: "0" }, "–") : showRatio(row), row.agrees]);
    return make("div", {}, make("h3", {}, `${entry.table} · ratios to ${entry.baseline}`),
      plainTable(`${group.name}`, ["variant", "metric", "study", "here", ""], rows, ["", "text", "", "", "text"]),
      make("p", { class: "hint" }, `${entry.trust}. ${entry.note}`));
  }));
  const none = make("p", { class: "hint" }, "No table of the study holds the baseline and a variant of these rows.");
  byId("study-text").replaceChildren(...(tables.length ? tables : [none]));
}

function claimRow(claim) {
  const kinds = { holds: "better", "does not hold": "worse" };
  const pairs = claim.pairs.filter((pair) => pair.ratio !== undefined)
    .map((pair) => make("small", {}, `${pair.variant} / ${pair.against} ${showRatio(pair)}`));
  const says = make("span", {}, claim.says, make("small", {}, `${claim.where}${claim.note ? `. ${claim.note}` : ""}`));
  const drawn = DATA.claims[claim.name];
  const figure = drawn ? new DOMParser().parseFromString(drawn, "text/html").body.firstElementChild : null;
  const takes = claim.takes ? make("small", {}, `to decide it, if ratios are as seen: ${claim.takes}`) : null;
  const found = make("span", {}, figure, ...(drawn ? [] : pairs), claim.reason ? make("small", {}, claim.reason) : null, takes);
  const status = make("span", { class: kinds[claim.status.replace(", predicted", "")] ?? "open" }, claim.status);
  return [claim.name, says, `${claim.metric} ratio ${claim.ratio}`, status, found];
}

const claimTable = (caption, claims) => plainTable(caption, ["claim", "it says", "checked as", "here", "ratios, or why not"],
  claims.map(claimRow), ["", "wrap", "text", "text", "wrap"]);

/* Those that these rows say something of; the others below, folded. */
function renderClaims() {
  const tested = BOARD.claims.filter((claim) => claim.pairs.some((pair) => pair.ratio !== undefined));
  const others = BOARD.claims.filter((claim) => !tested.includes(claim));
  const parts = [tested.length ? claimTable("EfficientLLM, arXiv:2505.13840, replayed on these rows", tested)
    : make("p", { class: "hint" }, "These rows hold no pair of variants that a claim compares.")];
  if (BOARD.forecasts.length) parts.push(claimTable("Predicted, not measured: what plans say of the claims", BOARD.forecasts));
  if (others.length) {
    parts.push(make("details", {}, make("summary", {}, `${others.length} that cannot be tested here, and what they would need`),
      claimTable("", others)));
  }
  byId("claims-text").replaceChildren(...parts);
}

function renderNoise() {
  const tables = BOARD.groups.filter((group) => Object.keys(group.noise).length).map((group) => plainTable(
    `${group.name}: ${group.baseline} against itself`,
    ["metric", "ratio to itself", "pairs", `smallest effect that ${group.blocks} blocks see`, "blocks to see 3 %"],
    Object.entries(group.noise).map(([key, found]) => [key, showRatio(found), String(found.pairs),
      found.smallest_effect === null ? "–" : `${(found.smallest_effect * 100).toPrecision(2)} %`, String(found.blocks_for_3_percent)])));
  const none = make("p", { class: "hint" }, "Unknown: no block holds the baseline twice.");
  byId("noise-text").replaceChildren(...(tables.length ? tables : [none]),
    make("p", { class: "hint" }, "Seen: a 95 % interval that excludes 1, in four sweeps of five."));
}

/* Made when it is opened: a report may hold hundreds. */
function folded(summary, content) {
  const details = make("details", {}, make("summary", {}, ...summary));
  details.addEventListener("toggle", () => { if (details.open && details.children.length < 2) details.append(content()); });
  return details;
}

function failureNode(row) {
  const lines = row.tail.split("\n").filter((line) => line.trim());
  const said = lines.length ? lines[lines.length - 1].trim() : "no log is kept beside this row";
  return folded([make("b", { class: "worse" }, row.outcome), ` ${row.variant} · ${row.block} `, make("small", { class: "error" }, said)],
    () => runNode(row.path));
}

function unfinishedNode(run) {
  return folded([make("b", { class: "open" }, run.state), ` ${run.path} `, make("small", {}, run.said)],
    () => make("pre", { tabindex: "0" }, run.tail || "nothing is logged yet"));
}

function renderFailures() {
  const running = BOARD.without_row.filter((run) => run.state === "running");
  const stopped = BOARD.without_row.filter((run) => run.state !== "running");
  const groups = [
    ["Failed", BOARD.failures.filter((row) => row.outcome !== "interrupted").map(failureNode)],
    ["Running", running.map(unfinishedNode)],
    ["Stopped: the same command resumes", [...BOARD.failures.filter((row) => row.outcome === "interrupted").map(failureNode), ...stopped.map(unfinishedNode)]],
  ];
  const parts = groups.filter(([, nodes]) => nodes.length).flatMap(([title, nodes]) => [make("h3", {}, `${title} (${nodes.length})`), ...nodes]);
  byId("failures-text").replaceChildren(...(parts.length ? parts : [make("p", { class: "hint" }, "None.")]));
}
