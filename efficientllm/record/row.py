"""The row of one run: `record.json`, and the table that is printed at its end."""

import json
import math
import shutil
import textwrap

from efficientllm.errors import UserError
from efficientllm.metrics.conditions import unmeasured
from efficientllm.metrics.reading import missing
from efficientllm.record import notes, study_metrics
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.untrusted import json_text

SCHEMA_VERSION = 1
OUTCOMES = ("ok", "nan", "oom", "timeout", "crash", "error", "invalid", "interrupted")
PHYSICAL_UNITS = {
    "energy_j": "J",
    "j_per_token": "J",
    "j_per_token_net": "J",
    "peak_memory_bytes": "bytes",
    "compiled_memory_bytes": "bytes",
    "predicted_memory_bytes": "bytes",
    "resident_weight_bytes": "bytes",
    "checkpoint_bytes": "bytes",
    "tokens_per_s": "1/s",
    "step_s_p50": "s",
    "step_s_p90": "s",
    "step_s_p95": "s",
    "step_s_p99": "s",
    "step_s_roofline": "s",
    "ttft_s": "s",
    "tpot_s": "s",
    "mfu": "1",
    "mfu_gemm": "1",
    "hfu": "1",
    "hfu_gemm": "1",
    "mbu": "1",
    "mbu_copy": "1",
    "flops_per_token": "FLOP",
    "program_flops_per_token": "FLOP",
    "params_total": "1",
    "params_active": "1",
    "params_trainable": "1",
    "kv_bytes_per_token": "bytes",
    "compile_s": "s",
}
QUALITY_UNITS = {"loss": "nat", "eval_loss": "nat", "perplexity": "1", "bits_per_byte": "bit"}
_TABLE = (
    ("AMU  average memory", "amu_gb", "lower"),
    ("     of the device", "amu_fraction", "lower"),
    ("PCU  utilisation", "pcu", "higher"),
    ("AL   average latency", "al_s", "lower"),
    ("TT   training throughput", "tt_tokens_per_param_s", "higher"),
    ("ST   tuning throughput", "st_samples_per_param_s", "higher"),
    ("IT   inference throughput", "it_tokens_per_s", "higher"),
    ("AEC  mean power", "aec_w", "lower"),
    ("MCR  compression rate", "mcr", "higher"),
)
# What serving is judged by besides: label, key, unit and how many of the row's units it is.
_SERVING = (
    ("TTFT first token", "ttft_s", "ms", 1e-3),
    ("TPOT each token after it", "tpot_s", "ms", 1e-3),
    ("     weights", "resident_weight_bytes", "MB", 1e6),
    ("     state of a token", "kv_bytes_per_token", "kB", 1e3),
)
_SHOWN_BY_TASK = {"pretrain": "tt_tokens_per_param_s", "tune": "st_samples_per_param_s", "infer": "it_tokens_per_s"}


def build_record(
    *,
    outcome,
    name,
    task,
    config,
    provenance,
    paper_readings=None,
    physical=None,
    quality=None,
    predicted=None,
    warm_up=None,
    conditions=None,
):
    """The row as plain data, ready for JSON.

    `paper_readings`, `physical` and `quality` are `{key: Reading}`; known keys that are absent become null, so that
    every row has the same columns. `predicted` holds plain numbers of a plan, `warm_up` the times that were set aside,
    `conditions` what `conditions.row` says of the measured windows. Raises ValueError for an unknown outcome or a key
    given in two groups.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome {outcome!r} is none of {', '.join(OUTCOMES)}")
    absent = "not measured in this run" if outcome == "ok" else f"the run ended as {outcome}"
    groups = {
        "paper": _complete(paper_readings, study_metrics.UNITS, absent),
        "physical": _complete(physical, PHYSICAL_UNITS, absent),
        "quality": _complete(quality, QUALITY_UNITS, absent),
    }
    met = dict(conditions or unmeasured(absent))
    starved = {key: met.pop(key) for key in ("starved", "reasons")}
    groups["conditions"] = met
    keys = [key for group in groups.values() for key in group]
    if len(set(keys)) < len(keys):
        raise ValueError(f"given in two groups: {sorted({key for key in keys if keys.count(key) > 1})}")
    values = {group: {key: each.value for key, each in readings.items()} for group, readings in groups.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "outcome": outcome,
        "name": name,
        "task": task,
        **values,
        "conditions": starved | values["conditions"],
        "predicted": predicted or {},
        "warm_up": warm_up or {},
        "sources": {key: _source(each) for readings in groups.values() for key, each in readings.items()},
        "provenance": provenance,
        "config": config,
    }


def _complete(readings, units, absent):
    known = {key: missing(unit, absent) for key, unit in units.items()}
    return {**known, **(readings or {})}


def _source(reading):
    return {"source": reading.source, "reason": reading.reason, "unit": reading.unit}


def finite(record):
    """The row with null for each number that is not finite, and in `not_finite` what stood there, by place."""
    lost = {}

    def plain(value, place):
        if isinstance(value, dict):
            return {key: plain(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        if getattr(value, "shape", None) == ():  # of numpy or jax
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            lost[place] = str(float(value))
            return None
        return value

    cleared = plain(record, "")
    return cleared | {"not_finite": lost | record.get("not_finite", {})} if lost else cleared


def write_record(record, path):
    """Writes the row so that a reader sees the old file or the new one, never a part of one.

    Numbers that are not finite are null in it (see `finite`).
    """
    write_atomically(path, json.dumps(finite(record), indent=2, allow_nan=False) + "\n")


def read_record(path):
    """The row at `path`. Raises UserError if it is no row of this schema. A NaN is taken: readers make it null."""
    try:
        record = json_text.read(path, kind=None, nan=True)
    except UserError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: no readable row: {said}") from None
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version!r}; this program reads {SCHEMA_VERSION}")
    return record


def format_table(record, width=None):
    """The study's metrics of a row as text: value, unit, and the source or why there is no value; of serving also
    latencies and bytes. As wide as the terminal, from 80 to 100 columns."""
    width = width or min(100, max(80, shutil.get_terminal_size((100, 24)).columns))
    shown = _SHOWN_BY_TASK.get(record["task"])
    hidden = set(_SHOWN_BY_TASK.values()) - {shown} if shown else set()
    lines = [f"{'metric':<26}{'value':>11}  {'unit':<5}{'better':<8}source, or why there is none"]
    lines.append("-" * width)
    for label, key, better in _TABLE:
        if key not in hidden:
            lines += _table_row(label, record["paper"][key], record["sources"][key], better, width)
    for label, key, unit, size in _SERVING if record["task"] == "infer" else ():
        value, source = record["physical"][key], record["sources"][key] | {"unit": unit}
        lines += _table_row(label, None if value is None else value / size, source, "lower", width)
    for note in notes.notes(record):
        lines += textwrap.wrap(f"note: {note}", width, subsequent_indent="      ")
    return "\n".join(lines)


def _table_row(label, value, source, better, width):
    start = f"{label:<26}{'null' if value is None else f'{value:.4g}':>11}  {source['unit']:<5}{better:<8}"
    words = textwrap.wrap(source["reason"] or source["source"], width - len(start)) or [""]
    return [start + words[0], *(" " * len(start) + line for line in words[1:])]
