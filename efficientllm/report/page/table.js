/* The table of variants: sorted, filtered, grouped, with the study's rows on demand. */
const FIRST = ["eval_loss", "loss", "j_per_token", "tokens_per_s", "peak_memory_bytes", "flops_per_token", "params_active",
  "fid", "fd_own", "nearest_ratio", "images_per_s", "flops_per_image", "j_per_image"];
const GROUPINGS = {
  ranking: ["ranking group", (entry) => entry.group.name],
  device: ["device", (entry) => entry.group.device],
  scale: ["scale", (entry) => entry.variant.scale ?? "–"],
  axis: ["study axis", (entry) => entry.variant.axis],
  task: ["task", (entry) => entry.group.task],
};
const tableState = { sort: null, descending: false, columns: [], opened: new Map() }; // opened: entry's key -> path of the run

function allEntries() {
  return BOARD.groups.flatMap((group) => group.variants.map((variant) => ({ group, variant })));
}

function initialColumns() {
  const six = new Set(BOARD.groups.flatMap((group) => group.six));
  const held = new Set(BOARD.groups.flatMap((group) => heldMetrics(group, false).map((column) => column.key)));
  const keys = BOARD.columns.map((column) => column.key);
  return keys.filter((key) => six.has(key) || (FIRST.includes(key) && held.has(key)));
}

/* What the filter searches: names, techniques, outcomes and setting; every word must occur. */
function matches(entry, words) {
  const { group, variant } = entry;
  const text = [variant.variant, variant.axis, group.name, ...Object.values(variant.techniques), ...Object.keys(variant.outcomes)];
  const all = text.join(" ").toLowerCase();
  return words.every((word) => all.includes(word));
}

function sortValue(entry, key) {
  if (key === "variant") return entry.variant.variant;
  if (key === "rows") return Object.values(entry.variant.outcomes).reduce((a, b) => a + b, 0);
  if (key === "score") return entry.variant.efficiency_score;
  return entry.variant.cells[key].mean;
}

const isSortable = (key) => ["variant", "rows", "score"].includes(key) || Boolean(COLUMNS[key]);

/* Nulls stay at the end, whichever way. */
function sorted(entries) {
  const { sort, descending } = tableState;
  if (!sort) return entries;
  return [...entries].sort((a, b) => {
    const x = sortValue(a, sort), y = sortValue(b, sort);
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return descending ? -order : order;
  });
}

function headCell(key, label, hint) {
  const direction = tableState.sort === key ? (tableState.descending ? "descending" : "ascending") : "none";
  const button = make("button", { type: "button", "data-sort": key }, label);
  button.addEventListener("click", () => {
    tableState.descending = tableState.sort === key && !tableState.descending;
    tableState.sort = key;
    renderTable();
    writeAddress();
    document.querySelector(`[data-sort="${CSS.escape(key)}"]`)?.focus();
  });
  return make("th", { scope: "col", "aria-sort": direction }, button, make("small", {}, hint));
}

function ratioNode(cell) {
  if (cell.ratio === undefined) return null;
  const verdict = cell.verdict;
  const mark = verdict.startsWith("better") ? "▲ " : verdict.startsWith("worse") ? "▼ " : verdict.startsWith("equal") ? "≈ " : "";
  const kind = mark === "▲ " ? "better" : mark === "▼ " ? "worse" : "";
  const within = verdict.startsWith("withheld") ? ", within noise" : "";
  return make("small", { class: kind, title: `${verdict}; ${cell.method}` }, `${mark}${showRatio(cell)}${within}`);
}

function metricCell(cell, key) {
  const td = make("td", { "data-key": key }, valueNode(cell, COLUMNS[key].unit), ratioNode(cell));
  if (cell.mean !== null && cell.reason) td.append(make("small", { class: "open", title: cell.reason }, "not compared"));
  if (cell.starved) td.append(make("small", { class: "open", title: "the machine was not this run's alone" }, `${cell.starved} of ${cell.n} starved`));
  return td;
}

/* What must be known of a variant's times, as a mark with all of it as its title. */
function notesNode(variant) {
  if (!variant.notes.length) return null;
  return make("small", { class: "open", title: variant.notes.join("\n"), tabindex: "0" }, variant.notes.length === 1 ? "1 note" : `${variant.notes.length} notes`);
}

function outcomesText(variant) {
  return Object.entries(variant.outcomes).map(([outcome, count]) => `${count} ${outcome}`).join(", ");
}

function entryRow({ group, variant }) {
  const score = variant.efficiency_score, key = entryKey(group, variant);
  const whole = group.score.of.length === 5;
  const failed = Object.keys(variant.outcomes).some((outcome) => outcome !== "ok");
  const row = make("tr", { class: variant.variant === group.baseline ? "baseline" : null, "data-variant": variant.variant },
    make("th", { scope: "row" }, openButton(variant, key)),
    make("td", { class: failed ? "outcomes worse" : "outcomes" }, outcomesText(variant), notesNode(variant)),
    ...tableState.columns.map((key) => metricCell(variant.cells[key], key)),
    make("td", { title: score === null ? "no metric of Eq. 12 is known" : `Eq. 12 over ${group.score.over.join(", ")}: ${group.score.of.join(", ")}` },
      score === null ? "–" : score.toFixed(3), !whole && score !== null ? make("small", {}, `${group.score.of.length} of 5`) : null));
  return tableState.opened.has(key) ? [row, panelRow(variant, key)] : [row];
}

/* The variant's name, which opens and closes what is known of its runs. */
function openButton(variant, key) {
  const button = make("button", { type: "button", class: "open-row", "aria-expanded": String(tableState.opened.has(key)) }, variant.variant);
  button.addEventListener("click", () => {
    const row = button.closest("tr"), opened = tableState.opened.has(key);
    if (opened) {
      tableState.opened.delete(key);
      row.nextElementSibling.remove();
    } else {
      tableState.opened.set(key, variant.paths[0]);
      row.after(panelRow(variant, key));
    }
    button.setAttribute("aria-expanded", String(!opened));
    writeAddress();
  });
  return button;
}

function panelRow(variant, key) {
  const show = () => panel(variant, tableState.opened.get(key), (path) => {
    tableState.opened.set(key, path);
    cell.replaceChildren(show());
    cell.querySelector("select").focus();
    writeAddress();
  });
  const cell = make("td", { colspan: String(tableState.columns.length + 3) });
  cell.append(show());
  return make("tr", { class: "opened" }, cell);
}

/* The study's rows of an axis, in our columns where they have a figure. */
function studyRows(axes) {
  const ours = (row, key) => (key === "perplexity" ? row.ppl : row[key]) ?? null;
  return [...axes].flatMap((axis) => (DATA.study[axis] ?? []).flatMap((table) => table.rows.map((row) =>
    make("tr", { class: "theirs", title: `${table.trust}. ${table.note ?? ""}` },
      make("th", { scope: "row" }, row.name, make("small", {}, `study: ${table.table}`)), make("td", {}, ""),
      ...tableState.columns.map((key) => make("td", {}, valueNode({ mean: ours(row, key), reason: "not in the study's table" }, COLUMNS[key].unit))),
      make("td", {}, "–")))));
}

function renderTable() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const [, groupOf] = GROUPINGS[byId("group-by").value];
  const entries = allEntries(), kept = entries.filter((entry) => matches(entry, words));
  const parts = new Map();
  for (const entry of kept) parts.set(groupOf(entry), [...(parts.get(groupOf(entry)) ?? []), entry]);
  const heads = () => [headCell("variant", "variant", " "), headCell("rows", "rows", "outcome"),
    ...tableState.columns.map((key) => {
      const { label, unit, better } = COLUMNS[key];
      return headCell(key, label, `${unit}${better ? ` · ${better}` : ""}`);
    }), headCell("score", "score", "Eq. 12 · higher")];
  byId("table-tables").replaceChildren(...[...parts].map(([name, own]) => {
    const study = byId("show-study").checked ? studyRows(new Set(own.map((entry) => entry.variant.axis))) : [];
    const table = make("table", {}, make("caption", {}, name), make("thead", {}, make("tr", {}, ...heads())),
      make("tbody", {}, ...sorted(own).flatMap(entryRow), ...study));
    return scrollBox(table, name);
  }));
  byId("table-count").textContent = `${kept.length} of ${entries.length} variants`;
}

function setUpTable() {
  tableState.columns = initialColumns();
  fillSelect(byId("group-by"), Object.entries(GROUPINGS).map(([key, [label]]) => [key, label]), "ranking");
  const fieldset = byId("columns").querySelector("fieldset");
  for (const { key, label } of BOARD.columns) {
    const box = make("input", { type: "checkbox", value: key });
    box.addEventListener("change", () => {
      chooseColumns([...fieldset.querySelectorAll("input:checked")].map((input) => input.value));
      renderTable();
      writeAddress();
    });
    fieldset.append(make("label", { class: "check", title: key }, box, label));
  }
  chooseColumns(tableState.columns);
  byId("filter").addEventListener("input", renderTable);
  byId("group-by").addEventListener("change", renderTable);
  byId("show-study").addEventListener("change", renderTable);
  renderTable();
}

/* Shows these metrics, as many of them as there are, in the order of the board. */
function chooseColumns(keys) {
  const wanted = new Set(keys);
  tableState.columns = BOARD.columns.map((column) => column.key).filter((key) => wanted.has(key));
  for (const box of byId("columns").querySelectorAll("input")) box.checked = wanted.has(box.value);
}
