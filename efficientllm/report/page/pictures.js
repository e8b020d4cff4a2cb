/* Runs on pictures: their held-out loss by noise level, and what they sampled, side by side. */
const LEVELS = [1, 2, 3, 4, 5, 6, 7], levelKey = (level) => `eval_loss_level_${level}`;
const PICTURES = DATA.pictures.runs;

const hasLevels = (group) => LEVELS.every((level) => COLUMNS[levelKey(level)]) &&
  group.variants.some((variant) => LEVELS.every((level) => variant.cells[levelKey(level)].mean !== null));
const hasPictures = (group) => group.variants.some((variant) => variant.paths.some((path) => PICTURES[path]));

/* Shows a section and its link, or neither. */
function showOnly(id, shown) {
  byId(id).hidden = !shown;
  document.querySelector(`nav a[href="#${id}"]`).hidden = !shown;
}

function renderLevels() {
  const group = chosenGroup("levels-group"), relative = byId("levels-show").value === "ratio";
  if (!group) return;
  const whole = group.variants.filter((variant) => LEVELS.every((level) => variant.cells[levelKey(level)].mean !== null));
  const refused = (variant) => LEVELS.map((level) => refusal(variant, group, levelKey(level))).find(Boolean);
  const compared = whole.filter((variant) => !relative || variant.variant === group.baseline || !refused(variant));
  const value = (variant, level) => {
    const cell = variant.cells[levelKey(level)];
    return !relative ? cell.mean : variant.variant === group.baseline ? 1 : cell.ratio ?? null;
  };
  const traces = compared.slice(0, MOST).map((variant) => {
    const i = group.variants.indexOf(variant);
    return {
      x: LEVELS.map((level) => level / 8), y: LEVELS.map((level) => value(variant, level)), mode: "lines+markers", name: variant.variant,
      line: { color: colour(i), width: 1.5, dash: DASHES[i % DASHES.length] }, marker: { size: 6 }, meta: plotText(variant.variant),
      hovertemplate: "%{meta}<br>%{y:.5g} at %{x}<extra></extra>",
    };
  });
  const name = relative ? "held-out loss / the baseline's" : "held-out loss";
  plot("levels-chart", traces, { xaxis: { title: { text: "noise level, as a share of the range", standoff: 10 }, tickvals: LEVELS.map((level) => level / 8),
    ticktext: LEVELS.map((level) => `${level}/8`) }, yaxis: { title: { text: name } } },
    traces.length ? `${name} by noise level` : "No variant has a loss at every noise level.");
  const rows = whole.map((variant) => [variant.variant, ...["eval_loss", ...LEVELS.map(levelKey)].map((key) => levelNode(variant, key))]);
  const notes = whole.filter(refused).map((variant) => `${variant.variant} is not compared: ${refused(variant)}.`);
  byId("levels-text").replaceChildren(
    plainTable(`${group.name} · ${COLUMNS.eval_loss.better} is better`, ["variant", "all levels", ...LEVELS.map((level) => `${level}/8`)], rows),
    make("p", { class: "hint" }, `A level is a share of the range: 1/8 is little noise, 7/8 almost all. ${notes.join(" ")}${tooMany(compared)}`));
}

function levelNode(variant, key) {
  const cell = variant.cells[key];
  return make("span", {}, valueNode(cell, COLUMNS[key].unit), ratioNode(cell));
}

/* The runs of a group that have a picture in this block, one a variant. */
function shownRuns(group, block) {
  const runs = group.variants.map((variant) => {
    const path = variant.paths.find((each) => PICTURES[each] && RUNS.get(each).block === block);
    return path ? { variant, path, picture: PICTURES[path] } : null;
  });
  return runs.filter(Boolean);
}

/* What a place was drawn for: its prompt, or its class. */
const wantedAt = (picture, place) => picture.prompts?.[place] || picture.classes[place];
const wantedWord = (picture) => (picture?.prompts?.length ? "prompt" : "class");

/* Names each place by its prompt or its class: "3: b". */
const placeName = (picture, place) => `${place + 1}${wantedAt(picture, place) ? `: ${short(wantedAt(picture, place), 80)}` : ""}`;

function wantedList(picture) {
  const isPrompt = wantedWord(picture) === "prompt", listed = isPrompt ? picture.prompts : picture.classes ?? [];
  const names = [...new Set(listed.filter(Boolean))];
  return names.length ? `, ${isPrompt ? "prompts" : "classes"} ${short(names.join(", "), 160)}` : "";
}

/* A grid of samples, or one place of it, which is cut out by the box around it. */
function pictureNode(picture, kind, place, alt) {
  const image = make("img", { src: picture[kind], alt, width: picture.width, height: picture.height, class: picture.width < 480 ? "pixels" : null });
  const box = make("div", { class: place === null ? "picture" : "picture place" }, image);
  if (place === null) return box;
  const [width, height] = picture.cell, { columns, border } = picture;
  const left = (place % columns) * (width + border), top = Math.floor(place / columns) * (height + border);
  image.style.cssText = `width:${(100 * picture.width) / width}%;left:${(-100 * left) / width}%;top:${(-100 * top) / height}%`;
  box.style.aspectRatio = `${width} / ${height}`;
  return box;
}

function figureNode({ variant, path, picture }, group, place) {
  const name = `${variant.variant}, ${RUNS.get(path).block}`, distance = nearestText(picture, place);
  const what = place === null ? `${picture.count ?? "The"} samples of ${name}${wantedList(picture)}` : `Sample ${placeName(picture, place)} of ${name}`;
  const parts = [pictureNode(picture, "grid", place, what)], beside = [];
  if (picture.base) {
    parts.unshift(pictureNode(picture, "base", place, `${place === null ? "Samples" : "Sample"} of the model before tuning, of the same ${wantedWord(picture)} and noise: ${name}`));
    beside.push("left: the model before tuning");
  }
  if (byId("samples-nearest").checked && picture.nearest) {
    parts.push(pictureNode(picture, "nearest", place, `Training pictures nearest to the ${place === null ? "samples" : "sample"} of ${name}${distance ? `: ${distance}` : ""}`));
    beside.push(`right: the nearest training pictures${distance ? `, ${distance}` : ""}`);
  }
  const button = make("button", { type: "button", class: "enlarge", "aria-pressed": "false", "aria-label": `Enlarge: ${what}` }, ...parts);
  const numbers = ["eval_loss", "fd_own", "fid"].filter((key) => COLUMNS[key] && variant.cells[key].mean !== null)
    .map((key) => `${COLUMNS[key].label} ${show(variant.cells[key].mean, COLUMNS[key].unit)}`);
  const figure = make("figure", { "data-variant": variant.variant }, make("figcaption", {}, make("b", {}, variant.variant),
    variant.variant === group.baseline ? make("small", { class: "mark" }, "baseline") : null, make("small", {}, numbers.join(" · "))),
    button, beside.length ? make("small", {}, beside.join("; ")) : null);
  button.addEventListener("click", () => button.setAttribute("aria-pressed", String(figure.classList.toggle("large"))));
  return figure;
}

/* How near the training pictures are, and how near they are to pictures that were held out. */
function nearestText(picture, place) {
  if (!picture.distances) return "";
  const sortedDistances = [...picture.distances].sort((a, b) => a - b), middle = sortedDistances.length >> 1;
  const median = sortedDistances.length % 2 ? sortedDistances[middle] : (sortedDistances[middle - 1] + sortedDistances[middle]) / 2;
  const own = place === null ? `median distance ${digits(median)}` : `distance ${digits(picture.distances[place])}`;
  return `${own}${picture.unseen === null ? "" : ` (held-out pictures: ${digits(picture.unseen)})`}`;
}

/* What of the drawing differs between runs, in words; "" where nothing does. */
function drawnDifferently(runs) {
  const facts = { "how they were drawn": (picture) => picture.how, "the classes": (picture) => JSON.stringify(picture.classes),
    "the prompts": (picture) => JSON.stringify(picture.prompts),
    "their size": (picture) => JSON.stringify(picture.cell) };
  return Object.entries(facts).filter(([, of]) => new Set(runs.map(({ picture }) => of(picture))).size > 1).map(([name]) => name).join(", ");
}

function renderSamples() {
  const group = chosenGroup("samples-group");
  if (!group) return;
  const runs = shownRuns(group, byId("samples-block").value), differ = drawnDifferently(runs), value = byId("samples-place").value;
  const known = runs.every(({ picture }) => picture.cell);
  const place = value === "" || !known || differ ? null : Number(value);
  byId("samples-pictures").replaceChildren(...runs.slice(0, MOST).map((run) => figureNode(run, group, place)));
  const alike = !known ? "What was drawn where is not recorded of all of these." : differ ? `Not drawn alike, these differ in ${differ}.`
    : `Same noise and same ${wantedWord(runs[0]?.picture)} at the same place of every grid (${runs[0]?.picture.how}): they differ by their models alone.`;
  const of = runs.find(({ picture }) => picture.of)?.picture.of;
  const near = !byId("samples-nearest").checked || !of ? ""
    : ` Distances are root mean squares of pixels, 0 to 255, from the nearest of ${of} training pictures: samples much nearer than held-out pictures are copies.`;
  byId("samples-hint").textContent = `${alike}${tooMany(runs)}${near} ${DATA.pictures.how} A click, or Enter, enlarges one.`;
}

function setUpSampleChoices() {
  const group = chosenGroup("samples-group");
  if (!group) return;
  const blocks = [...new Set(group.variants.flatMap((variant) => variant.paths.filter((path) => PICTURES[path]).map((path) => RUNS.get(path).block)))].sort();
  const before = byId("samples-block").value;
  fillSelect(byId("samples-block"), blocks.map((block) => [block, block || "–"]), blocks.includes(before) ? before : blocks[0]);
  setUpPlaces();
}

function setUpPlaces() {
  const runs = shownRuns(chosenGroup("samples-group"), byId("samples-block").value);
  const first = runs.find(({ picture }) => picture.cell)?.picture, before = byId("samples-place").value;
  const places = first && !drawnDifferently(runs) ? [...first.classes.keys()].map((place) => [String(place), placeName(first, place)]) : [];
  fillSelect(byId("samples-place"), [["", "all"], ...places], before);
  renderSamples();
}

function setUpPictures() {
  const leveled = BOARD.groups.filter(hasLevels), pictured = BOARD.groups.filter(hasPictures);
  showOnly("levels", leveled.length > 0);
  showOnly("samples", pictured.length > 0);
  fillSelect(byId("levels-group"), leveled.map((group) => [group.name, group.name]));
  fillSelect(byId("levels-show"), [["loss", "loss"], ["ratio", "ratio to the baseline"]]);
  fillSelect(byId("samples-group"), pictured.map((group) => [group.name, group.name]));
  for (const id of ["levels-group", "levels-show"]) byId(id).addEventListener("change", renderLevels);
  byId("samples-group").addEventListener("change", setUpSampleChoices);
  byId("samples-block").addEventListener("change", setUpPlaces);
  for (const id of ["samples-place", "samples-nearest"]) byId(id).addEventListener("change", renderSamples);
  renderLevels();
  setUpSampleChoices();
}
