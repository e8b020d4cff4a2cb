/* Constraint queries: least|most METRIC [with METRIC <= VALUE [and ...]], or the conditions first:
   METRIC <= VALUE and ... and least|most METRIC. query.py reads the same language.
   VALUE is a number with a unit (20 ms, 3.5 GB, 0.2) or a change against the baseline (+1 %, -5%). */
const UNITS = {
  s: ["s", 1], ms: ["s", 1e-3], us: ["s", 1e-6], "µs": ["s", 1e-6], min: ["s", 60], j: ["J", 1], mj: ["J", 1e-3], kj: ["J", 1e3],
  w: ["W", 1], mw: ["W", 1e-3], kw: ["W", 1e3], b: ["bytes", 1], kb: ["bytes", 1e3], mb: ["bytes", 1e6], gb: ["bytes", 1e9],
  kib: ["bytes", 1024], mib: ["bytes", 1048576], gib: ["bytes", 1073741824], "/s": ["1/s", 1], "1/s": ["1/s", 1],
  nat: ["nat", 1], bit: ["bit", 1], flop: ["FLOP", 1], gflop: ["FLOP", 1e9], mflop: ["FLOP", 1e6], $: ["USD", 1],
  usd: ["USD", 1], g: ["g", 1], kg: ["g", 1e3], "": [null, 1],
};

class QueryError extends Error {}

const normal = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");

function metricNames() {
  const names = new Map();
  for (const { key, label } of BOARD.columns) {
    for (const name of [key, label, key.replace(/_(s|w|gb|bytes)$/, "")]) {
      if (!names.has(normal(name))) names.set(normal(name), key);
    }
  }
  names.set("memory", "peak_memory_bytes");
  return names;
}

/* The edit distance of two words, for "did you mean". */
function distance(a, b) {
  let row = [...Array(b.length + 1).keys()];
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length];
}

function findMetric(text) {
  const names = metricNames(), word = normal(text);
  if (!word) throw new QueryError("a metric is missing; for example: least eval_loss with al_s <= 500 ms");
  if (names.has(word)) return names.get(word);
  const close = [...names.keys()].sort((a, b) => distance(word, a) - distance(word, b))[0];
  const hint = distance(word, close) <= Math.max(2, word.length / 3) ? `; did you mean “${names.get(close)}”?` : "";
  const known = BOARD.columns.map((column) => column.key).join(", ");
  throw new QueryError(`no metric “${text.trim()}”${hint}\nknown: ${known}`);
}

function parseValue(text, key) {
  const found = text.trim().match(/^([+-]?)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(.*)$/i);
  if (!found) throw new QueryError(`“${text.trim()}” is no value for ${key}; write 20 ms, 0.5, or +1 % of the baseline`);
  const [, sign, number, unit] = found;
  if (unit.trim() === "%" && sign) return { relative: 1 + (Number(number) / 100) * (sign === "-" ? -1 : 1) };
  if (unit.trim() === "%") return { absolute: Number(number) / 100 };
  const wanted = COLUMNS[key].unit, known = UNITS[unit.trim().toLowerCase()];
  const factor = known && wanted === "GB" && known[0] === "bytes" ? known[1] / 1e9
    : known && (known[0] === null || known[0] === wanted) ? known[1] : null;
  if (factor === null) throw new QueryError(`“${unit.trim()}” is no unit for ${key}, which is in ${wanted}`);
  return { absolute: Number(`${sign}${number}`) * factor };
}

function parseCondition(text) {
  const found = text.match(/^(.*?)(<=|>=|≤|≥|<|>|==?)(.*)$/);
  if (!found) throw new QueryError(`“${text.trim()}” is no condition; write METRIC <= VALUE, for example tpot_s <= 20 ms`);
  const sign = { "≤": "<=", "≥": ">=", "==": "=" }[found[2]] ?? found[2];
  const key = findMetric(found[1]);
  return { key, sign, text: text.trim(), ...parseValue(found[3], key) };
}

/* {most, key, conditions}. Throws a QueryError that says what would be right. */
function parseQuery(text) {
  const last = text.trim().match(/^(.*[<>=≤≥].*?)(?:\s+and\s+|\s*[,;]\s*)((?:least|lowest|min|most|highest|max)\s[^<>=≤≥]+)$/i);
  if (last) text = `${last[2]} with ${last[1]}`;
  const found = text.trim().match(/^(least|lowest|min|most|highest|max)\s+(.+?)(?:\s+(?:with|where|if)\s+(.*))?$/i);
  if (!found) throw new QueryError("begin with least or most: least j_per_token with tpot_s <= 20 ms and eval_loss <= +1 %");
  const most = /^(most|highest|max)$/i.test(found[1]);
  if (/[<>=≤≥]/.test(found[2])) throw new QueryError("conditions follow “with”: least al_s with eval_loss <= +1 %");
  const parts = found[3] === undefined ? [] : found[3].split(/\s+and\s+|\s*[,;]\s*/i);
  return { most, key: findMetric(found[2]), conditions: parts.map(parseCondition) };
}

const HOLDS = {
  "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, ">": (a, b) => a > b,
  "=": (a, b) => Math.abs(a - b) <= 1e-9 * Math.abs(b),
};

/* Why a value may not stand beside the baseline's (other training, data, device limits, a starved machine), or null. */
const refusal = (variant, group, key) => (variant.variant === group.baseline ? null : variant.cells[key].reason);

/* {ok, why, sure}: `sure` is false where the ratio's interval holds the bound. */
function check(condition, variant, group) {
  const cell = variant.cells[condition.key];
  if (cell.mean === null) return { ok: false, why: `${condition.key} is null: ${cell.reason}` };
  if (refusal(variant, group, condition.key)) return { ok: false, why: `${condition.key} is not compared: ${cell.reason}` };
  if (condition.absolute !== undefined) {
    const ok = HOLDS[condition.sign](cell.mean, condition.absolute);
    return { ok, sure: true, why: ok ? "" : `${condition.key} is ${show(cell.mean, COLUMNS[condition.key].unit)}` };
  }
  if (variant.variant === group.baseline) return { ok: HOLDS[condition.sign](1, condition.relative), sure: true, why: "is the baseline" };
  if (cell.ratio === undefined) return { ok: false, why: `${condition.key} has no ratio: ${cell.reason}` };
  const ok = HOLDS[condition.sign](cell.ratio, condition.relative);
  const sure = cell.low !== null && !(cell.low <= condition.relative && condition.relative <= cell.high);
  return { ok, sure, why: ok ? "" : `${condition.key} is ${showRatio(cell)}` };
}

/* Answers a query in one group: fitting variants, best first, and why the others are out. */
function answer(query, group) {
  const fit = [], out = [];
  for (const variant of group.variants) {
    const checks = query.conditions.map((condition) => check(condition, variant, group));
    const cell = variant.cells[query.key];
    const failed = checks.filter((one) => !one.ok).map((one) => one.why);
    if (cell.mean === null) failed.unshift(`${query.key} is null: ${cell.reason}`);
    else if (refusal(variant, group, query.key)) failed.unshift(`${query.key} is not ranked: ${cell.reason}`);
    if (failed.length) out.push({ variant, why: [...new Set(failed)].join("; ") });
    else fit.push({ variant, cell, sure: checks.every((one) => one.sure) });
  }
  fit.sort((a, b) => (a.cell.mean - b.cell.mean) * (query.most ? -1 : 1));
  return { fit, out };
}
