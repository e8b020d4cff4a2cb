/* What a board has above a report: answers to standing questions, counts, planned rows beside the measured ones. */
function answerCard(entry) {
  const found = entry.answers.filter((answer) => answer.text);
  const parts = found.flatMap((answer) => [
    make("p", { class: "answer" }, answer.text),
    make("p", { class: "hint" }, answer.next, make("br"), answer.group),
    answer.out.length ? make("details", {}, make("summary", {}, `${answer.out.length} ${answer.out.length === 1 ? "does" : "do"} not fit`),
      ...answer.out.map((text) => make("p", { class: "hint" }, text))) : null,
  ]);
  const link = make("a", { href: "#ask" }, entry.query);
  link.addEventListener("click", () => { byId("query").value = entry.query; ask(); });
  return make("div", { class: "answer-group" }, make("h3", {}, entry.asked), ...parts,
    entry.missing ? make("p", { class: "answer open" }, entry.missing) : null, make("p", { class: "hint" }, "asked as: ", link));
}

function renderBoard() {
  const answers = BOARD.answers ?? [], facts = BOARD.facts ?? [], planned = BOARD.planned ?? [];
  showOnly("answers", answers.length || facts.length);
  byId("answers-text").replaceChildren(...answers.map(answerCard), ...facts.map((fact) => make("p", { class: "hint" }, fact)));
  const joined = BOARD.groups.filter((group) => group.setting);
  byId("table-settings").replaceChildren(...joined.map((group) => make("p", { class: "hint" }, `${group.name}: ${group.setting}`)));
  showOnly("planned", planned.length);
  byId("planned-text").replaceChildren(...planned.map((table) => make("details", {},
    make("summary", {}, `${table.rows.length} plans of ${table.source}`), plainTable("", table.heads, table.rows))));
}
