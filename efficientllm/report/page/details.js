/* What a row opens to: the command that runs it again, its config, numbers with sources, curves, log, sample, files. */
const RUNS = new Map(); // path -> {entry, ...what DATA.details holds of it}

const entryKey = (group, variant) => `${BOARD.groups.indexOf(group)} ${variant.variant}`;

function setUpRuns() {
  for (const [path, run] of Object.entries(DATA.details.runs)) RUNS.set(path, run); // also of those that rank nowhere
  for (const group of BOARD.groups) {
    for (const variant of group.variants) {
      for (const path of variant.paths) {
        RUNS.set(path, { ...(DATA.details.runs[path] ?? {}), entry: entryKey(group, variant), variant: variant.variant });
      }
    }
  }
}

const runName = (path) => `${RUNS.get(path).block || "run"} · ${RUNS.get(path).outcome ?? ""} · ${path}`;

/* The panel below a variant's row; `chosen(path)` is called when another of its runs is asked for. */
function panel(variant, path, chosen) {
  const paths = variant.paths.filter((each) => RUNS.has(each));
  const select = make("select", {});
  fillSelect(select, paths.map((each) => [each, runName(each)]), path);
  select.addEventListener("change", () => chosen(select.value));
  const many = paths.length > 1;
  const head = make("label", { class: "runs" }, many ? `Run (${paths.length}) ` : "Run ", many ? select : make("span", {}, runName(path)));
  return make("div", { class: "panel" }, head, runNode(path));
}

function runNode(path) {
  const run = RUNS.get(path);
  if (!run?.command) return make("p", { class: "hint" }, "Nothing more is known of this run.");
  const parts = [
    errorNode(run), ...run.notes.map((note) => make("p", { class: "open whole" }, `Note: ${note}`)), commandNode(run), configNode(run), curveNode(path), numbersNode(run), textNode("Sample", run.sample), samplesNode(path),
    textNode("End of the log", run.log), factsNode(run),
  ];
  return make("div", { class: "run" }, ...parts.filter(Boolean));
}

const part = (title, ...children) => make("div", { class: "part" }, make("h4", {}, title), ...children);

const textNode = (title, text) => (text ? part(title, make("pre", { tabindex: "0" }, text)) : null);

function samplesNode(path) {
  const picture = PICTURES[path];
  return picture ? part("Samples", pictureNode(picture, "grid", null, `Samples of ${runName(path)}${wantedList(picture)}`)) : null;
}

function errorNode(run) {
  const lines = (run.log ?? "").split("\n").filter((line) => line.trim());
  return run.outcome !== "ok" && lines.length ? make("p", { class: "error" }, `${run.outcome}: ${lines[lines.length - 1].trim()}`) : null;
}

function commandNode(run) {
  const words = run.command.split(/ (?='?--)/); // a line breaks between flags, not behind their hyphens
  const text = make("pre", { class: "command", tabindex: "0" }, ...words.flatMap((word, i) => [i ? " " : "", make("span", {}, word)]));
  const button = make("button", { type: "button", class: "small" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(run.command);
      button.textContent = "Copied";
    } catch { // no clipboard here: mark the text, which the keyboard copies
      getSelection().selectAllChildren(text);
      button.textContent = "Marked: copy it";
    }
  });
  const made = part("The command that runs it again", text, button);
  made.classList.add("whole");
  return made;
}

function configNode(run) {
  const rows = run.config.map(([key, value, base]) => [key, value, base ?? "no such key"]);
  const rest = make("p", { class: "hint" }, `${run.keys - rows.length} further keys are as in the base config.`);
  return part("Config", rows.length ? plainTable("", ["key", "value", "base config"], rows, ["", "wrap", "wrap"]) : null, rest);
}

function numbersNode(run) {
  const rows = BOARD.columns.filter(({ key }) => run.numbers[key]).map(({ key, unit }) => {
    const [value, source] = run.numbers[key];
    return [key, value === null ? make("span", { class: "open" }, "null") : show(value, unit), DATA.details.texts[source]];
  });
  const known = rows.filter((row) => typeof row[1] === "string").length;
  const table = plainTable("", ["number", "value", "source, or why there is none"], rows, ["", "", "wrap"]);
  table.querySelector(".scroll").classList.add("tall");
  const made = part(`Numbers: ${known} known, ${rows.length - known} null`, table);
  made.classList.add("whole");
  return made;
}

function curveNode(path) {
  const curves = DATA.curves[path] ?? {}, tags = ["loss", "eval_loss"].filter((tag) => curves[tag]);
  if (!tags.length || !window.Plotly) return tags.length ? null : part("Curves", make("p", { class: "hint" }, "No TensorBoard event file lies beside this row."));
  const box = make("div", { class: "chart small", role: "img", "aria-label": `${tags.join(" and ")} over steps` });
  const traces = tags.map((tag, i) => ({ x: curves[tag].steps, y: curves[tag].values, name: tag, mode: tag === "loss" ? "lines" : "lines+markers",
    line: { color: colour(i), width: 1.5, dash: DASHES[i] } }));
  // It is drawn once it is in the page, where it has a width.
  requestAnimationFrame(() => box.isConnected && Plotly.react(box, traces, layout({ margin: { l: 48, r: 12, t: 8, b: 40 },
    xaxis: { title: { text: "step", standoff: 8 } } }), { displayModeBar: false, responsive: true }));
  return part("Curves", box, legendNode(traces.map((trace) => [trace.name, trace.line.color])));
}

function factsNode(run) {
  const facts = Object.entries(run.facts).map(([name, value]) => make("div", {}, make("b", {}, `${name} `), value));
  const links = Object.entries(run.files).map(([name, href]) => make("a", { href }, name));
  return part("Where it comes from", ...facts, make("p", { class: "files" }, ...links));
}
