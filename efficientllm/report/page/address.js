/* What is asked and chosen, in the address behind "#": a link shows the same again. Only what differs from the page as
   it opens is written, and whatever an address holds is taken only where a control offers it. */
const CONTROLS = { // in the order of setting them: what a choice offers depends on those before it
  query: "query", filter: "filter", by: "group-by", study: "show-study",
  "tradeoff-rows": "pareto-group", x: "pareto-x", y: "pareto-y", "six-rows": "six-group",
  "rank-rows": "ranks-group", rank: "ranks-metric", "curve-rows": "curves-group", curve: "curves-tag",
  "level-rows": "levels-group", levels: "levels-show",
  "sample-rows": "samples-group", block: "samples-block", sample: "samples-place", nearest: "samples-nearest",
};
const address = { defaults: {}, writing: false, last: null };

const controlValue = (control) => (control.type === "checkbox" ? (control.checked ? "yes" : "") : control.value);

function setControl(control, value) {
  if (control.tagName === "SELECT" && ![...control.options].some((option) => option.value === value)) return;
  if (controlValue(control) === value) return;
  if (control.type === "checkbox") control.checked = value === "yes";
  else control.value = value;
  control.dispatchEvent(new Event(control.tagName === "INPUT" && control.type !== "checkbox" ? "input" : "change"));
}

/* [section or "", URLSearchParams] of the address. */
function readAddress() {
  const [section, ...rest] = location.hash.slice(1).split("?");
  return [/^[a-z-]*$/.test(section) ? section : "", new URLSearchParams(rest.join("?"))];
}

function writeAddress(section = readAddress()[0]) {
  if (!address.writing) return;
  const asked = new URLSearchParams();
  for (const [name, id] of Object.entries(CONTROLS)) {
    const value = controlValue(byId(id));
    if (value !== address.defaults[name]) asked.set(name, value);
  }
  if (tableState.sort) asked.set("sort", `${tableState.descending ? "-" : ""}${tableState.sort}`);
  const columns = tableState.columns.join(",");
  if (columns !== address.defaults.columns) asked.set("columns", columns);
  for (const path of tableState.opened.values()) asked.append("open", path);
  const text = asked.toString();
  const hash = section || text ? `#${section}${text ? `?${text}` : ""}` : "";
  if (hash === location.hash) return;
  history.replaceState(null, "", hash || location.href.split("#")[0]);
}

/* Puts the page into the state of its address. */
function followAddress() {
  const [section, asked] = readAddress();
  address.writing = false;
  for (const [name, id] of Object.entries(CONTROLS)) setControl(byId(id), asked.get(name) ?? address.defaults[name] ?? "");
  const sort = asked.get("sort") ?? "", key = sort.replace(/^-/, "");
  tableState.sort = isSortable(key) ? key : null;
  tableState.descending = tableState.sort !== null && sort.startsWith("-");
  chooseColumns((asked.get("columns") ?? address.defaults.columns).split(","));
  tableState.opened = new Map(asked.getAll("open").filter((path) => RUNS.get(path)?.entry).map((path) => [RUNS.get(path).entry, path]));
  renderTable();
  ask();
  address.writing = true;
  if (section) showSection(section);
}

function showSection(section) {
  const target = byId(section);
  if (!target?.matches("section")) return;
  target.scrollIntoView();
  target.querySelector("h2").setAttribute("tabindex", "-1");
}

function setUpAddress() {
  for (const [name, id] of Object.entries(CONTROLS)) {
    address.defaults[name] = controlValue(byId(id));
    byId(id).addEventListener(byId(id).tagName === "SELECT" ? "change" : "input", () => writeAddress());
  }
  address.defaults.columns = tableState.columns.join(",");
  byId("query-form").addEventListener("submit", () => writeAddress());
  for (const link of document.querySelectorAll("nav a, .skip")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const section = link.getAttribute("href").slice(1);
      showSection(section);
      byId(section).querySelector("h2").focus({ preventScroll: true });
      writeAddress(section);
    });
  }
  addEventListener("hashchange", followAddress);
  followAddress();
}
