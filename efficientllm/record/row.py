"""Row of a run: builds it, writes and reads `record.json`, and formats the table printed at the end."""

import datetime
import json
import math
import shutil
import textwrap
import typing

from efficientllm.errors import UserError
from efficientllm.metrics.conditions import unmeasured
from efficientllm.metrics.reading import Reading, missing
from efficientllm.record import price_and_carbon, study_metrics, timing_notes
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.typing import PathLike, Record
from efficientllm.untrusted import json_text

Readings = dict[str, Reading]
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
    **price_and_carbon.UNITS,
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
# Latencies and bytes of text and of pictures: label, key, shown unit, and its size in the unit of the row.
_SERVING = (
    ("TTFT first token", "ttft_s", "ms", 1e-3),
    ("     of it the tower", "image_encode_s", "ms", 1e-3),
    ("TPOT each token after it", "tpot_s", "ms", 1e-3),
    ("     weights", "resident_weight_bytes", "MB", 1e6),
    ("     state of a token", "kv_bytes_per_token", "kB", 1e3),
)
_SERVING_PICTURES = (
    ("     a picture", "image_latency_s", "ms", 1e-3),
    ("     a solver step", "step_s", "ms", 1e-3),
    ("     weights", "resident_weight_bytes", "MB", 1e6),
)
# The other parts of a pipeline, where it has any.
_PIPELINE = (
    ("     text encoders", "text_encoder_bytes", "MB", 1e6),
    ("     encoding texts", "text_encode_s", "s", 1),
    ("     autoencoder", "autoencoder_bytes", "MB", 1e6),
    ("     decoding latents", "decode_s", "ms", 1e-3),
    ("     weights moved", "offload_bytes", "MB", 1e6),
    ("     moving them", "offload_s", "ms", 1e-3),
)
_SHOWN_BY_TASK = {"pretrain": "tt_tokens_per_param_s", "tune": "st_samples_per_param_s", "infer": "it_tokens_per_s"}


def build_record(
    *,
    outcome: str,
    name: str,
    task: str,
    config: dict[str, typing.Any],
    provenance: dict[str, typing.Any],
    paper_readings: Readings | None = None,
    physical: Readings | None = None,
    quality: Readings | None = None,
    predicted: dict[str, typing.Any] | None = None,
    warm_up: dict[str, typing.Any] | None = None,
    conditions: Readings | None = None,
) -> Record:
    """Builds the row as plain data, ready for JSON.

    `paper_readings`, `physical` and `quality` are `{key: Reading}`. Keys of the schema that are absent become null, so
    that every row has the same columns. `predicted` holds numbers of a plan, `warm_up` the discarded times, and
    `conditions` the state of the machine in the measured windows. Raises ValueError for an unknown outcome or a key
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
    machine_readings = dict(conditions or unmeasured(absent))
    starved = {key: machine_readings.pop(key) for key in ("starved", "reasons")}
    groups["conditions"] = machine_readings
    keys = [key for group in groups.values() for key in group]
    if len(set(keys)) < len(keys):
        raise ValueError(f"given in two groups: {sorted({key for key in keys if keys.count(key) > 1})}")
    values = {group: {key: reading.value for key, reading in readings.items()} for group, readings in groups.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "outcome": outcome,
        "name": name,
        "task": task,
        **values,
        "conditions": starved | values["conditions"],
        "predicted": predicted or {},
        "warm_up": warm_up or {},
        "sources": {key: _source(reading) for readings in groups.values() for key, reading in readings.items()},
        "provenance": provenance,
        "config": config,
    }


def _complete(readings, units, absent):
    nulls = {key: missing(unit, absent) for key, unit in units.items()}
    return {**nulls, **(readings or {})}


def _source(reading):
    """The entry of `sources`; of a mean also its standard error and `[sum, weight]` of its parts."""
    entry = {"source": reading.source, "reason": reading.reason, "unit": reading.unit}
    if reading.standard_error is None:
        return entry
    return entry | {"standard_error": reading.standard_error, "parts": [list(part) for part in reading.parts]}


def finite(record: Record) -> Record:
    """Replaces each number that is not finite by null. `not_finite` tells what it was, by its place in the row."""
    lost = {}

    def plain(value, place):
        if isinstance(value, dict):
            return {key: plain(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        if getattr(value, "shape", None) == ():  # a scalar of numpy or JAX
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            lost[place] = str(float(value))
            return None
        return value

    cleared = plain(record, "")
    return cleared | {"not_finite": lost | record.get("not_finite", {})} if lost else cleared


def write_record(record: Record, path: PathLike) -> None:
    """Writes the row atomically, with null for numbers that are not finite (see `finite`)."""
    write_atomically(path, json.dumps(finite(record), indent=2, allow_nan=False) + "\n")


def read_record(path: PathLike) -> Record:
    """Reads the row at `path`, NaN included. Raises UserError if it is not a row of this schema."""
    try:
        record = json_text.read(path, kind=None, nan=True)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: no readable row: {reason}") from None
    check_version(record, path)
    return record


def check_version(record: typing.Any, where: PathLike) -> None:
    """Raises UserError that begins with `where` unless a JSON value is a row of this schema."""
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema_version is {version!r}; this program reads {SCHEMA_VERSION}")


def wall_seconds(record: Record) -> float | None:
    """Wall time of a row's run; None if it did not end by itself."""
    try:
        begin, end = (datetime.datetime.fromisoformat(record["provenance"][key]) for key in ("started", "ended"))
        return (end - begin).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def format_table(record: Record, width: int | None = None) -> str:
    """Formats the study's metrics of a row: value, unit, and the source or why there is no value.

    Rows of inference also show latencies and bytes. By default as wide as the terminal, from 80 to 100 columns.
    """
    width = width or min(100, max(80, shutil.get_terminal_size((100, 24)).columns))
    shown = _SHOWN_BY_TASK.get(record["task"])
    hidden = set(_SHOWN_BY_TASK.values()) - {shown} if shown else set()
    lines = [f"{'metric':<26}{'value':>11}  {'unit':<5}{'better':<8}source, or why there is none"]
    lines.append("-" * width)
    for label, key, better in _TABLE:
        if key not in hidden:
            lines += _table_row(label, record["paper"][key], record["sources"][key], better, width)
    physical = record["physical"]
    serving: tuple[tuple[str, str, str, float], ...]
    serving = _SERVING_PICTURES if "image_latency_s" in physical else _SERVING
    serving += _PIPELINE if "text_encoder_bytes" in physical else ()
    serving = tuple(line for line in serving if line[1] in physical)
    for label, key, unit, size in serving if record["task"] == "infer" else ():
        value, source = physical[key], record["sources"][key] | {"unit": unit}
        lines += _table_row(label, None if value is None else value / size, source, "lower", width)
    for key, label in price_and_carbon.LABELS.items():  # shown where they are known: price and carbon are the user's
        if record["physical"].get(key) is not None:
            lines += _table_row(label, record["physical"][key], record["sources"][key], "lower", width)
    for note in timing_notes.notes(record):
        lines += textwrap.wrap(f"note: {note}", width, subsequent_indent="      ")
    return "\n".join(lines)


def _table_row(label, value, source, better, width):
    start = f"{label:<26}{'null' if value is None else f'{value:.4g}':>11}  {source['unit']:<5}{better:<8}"
    words = textwrap.wrap(source["reason"] or source["source"], width - len(start)) or [""]
    return [start + words[0], *(" " * len(start) + line for line in words[1:])]
