"""From what an inference run measured to its row."""

import dataclasses
import math
import statistics

from efficientllm import sharding
from efficientllm.config.plain import flatten
from efficientllm.cost import device_peaks, formulas
from efficientllm.errors import UserError
from efficientllm.metrics import conditions
from efficientllm.metrics.energy import reader
from efficientllm.metrics.reading import Reading, missing
from efficientllm.record import study_metrics
from efficientllm.record.row import read_record
from efficientllm.weights import activation_dtype, resident_bytes

LIKELIHOOD = "likelihood a byte of held-out text"  # 2^-bits_per_byte: 1 is certainty, and more is better


@dataclasses.dataclass(frozen=True)
class Scored:
    """Bytes of a form of the weights and bits per byte of held-out text under it: what MCR compares."""

    name: str
    bytes: int
    bits_per_byte: float


def baseline_of(file):
    """The Scored of another run's row. Raises UserError for what holds no such numbers."""
    where, row = f"config.infer.baseline = {file!r}", _row_of(file)
    try:
        size, bits = row["physical"]["resident_weight_bytes"], row["quality"]["bits_per_byte"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: no row with resident_weight_bytes and bits_per_byte ({error!r})") from None
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in (size, bits)):
        raise UserError(f"{where}: its resident_weight_bytes or bits_per_byte is no number")
    if size is None or bits is None or size <= 0:
        raise UserError(f"{where}: its resident_weight_bytes or bits_per_byte is null or 0")
    return Scored(f"the row {row.get('name')}", size, bits)


def check_baseline(config, described):
    """Raises UserError for a baseline that is the row of a run which was scored on other text than this one, whose data
    `described` (`data.describe`) tells."""
    file = config.infer.baseline
    if not file.endswith(".json"):
        return
    row = _row_of(file)
    before = flatten(row.get("config") or {})
    then = (row.get("provenance") or {}).get("data") or {}
    pairs = {"data": (then.get("fingerprint"), described["fingerprint"])}
    if pairs["data"][0] is None:
        pairs["data"] = (before.get("data"), config.data)
    pairs["eval.batches"] = (before.get("eval.batches"), config.eval.batches)
    for what, (old, new) in pairs.items():
        if old is not None and old != new:
            raise UserError(
                f"config.infer.baseline = {file!r}: its {what} is {old}, and here it is {new}: its quality is that of "
                "other text; score the baseline on the same"
            )


def _row_of(file):
    try:
        return read_record(file)
    except UserError as error:
        raise UserError(f"config.infer.baseline = {error}") from None


def compression(baseline, ours):
    """What Eq. 9 compares, for two Scored; None where one of them has no finite score."""
    if not all(math.isfinite(each.bits_per_byte) for each in (baseline, ours)):
        return None
    qualities = (2**-baseline.bits_per_byte, 2**-ours.bits_per_byte)
    name = f"{LIKELIHOOD}, against {baseline.name}"
    return study_metrics.Compression(baseline.bytes, ours.bytes, *qualities, name)


def noted(reading, history):
    """The Reading with `history` behind its source."""
    return (
        dataclasses.replace(reading, source=f"{reading.source}; {history}") if history and reading.source else reading
    )


def study(lm, boxed, found, compared):
    """The study's metrics of `found` (a `measure.Measured`); `compared` is a Compression or None."""
    work = study_metrics.Work(
        "infer",
        tuple(found.requests_s),
        sum(found.requests_s),
        formulas.count_parameters(lm, boxed)["active"],
        generated=found.rows * found.new_tokens * len(found.requests_s),
    )
    return study_metrics.paper_metrics(work, found.averages, _window(found), compared)


def warm_up_and_conditions(found):
    """`{"warm_up": ..., "conditions": ...}` of the row of a `measure.Measured`."""
    steps = found.steps.statistics()
    aside = {"discarded_s": steps["discarded_s"], "settled": steps["settled"], "interrupted_steps": found.interrupted}
    return {
        "warm_up": aside | {"first_batches_s": found.discarded_s},
        "conditions": conditions.row(found.span, found.averages),
    }


def _window(found):
    """Energy of a typical share of prefill and decoding: the windows may hold one of them more often."""
    parts = ((found.prefill_energy, found.prefills), (found.decode_energy, found.decodes))
    whole = reader.combine_windows([window for window, _ in parts])
    if whole.energy_j is None:
        return whole
    repeats = len(found.requests_s)
    joules = sum(window.energy_j * repeats / count for window, count in parts)
    seconds = sum(window.duration_s * repeats / count for window, count in parts)
    return dataclasses.replace(whole, energy_j=joules, duration_s=seconds, mean_power_w=joules / seconds)


def times(found):
    """Latencies and rates as Readings. One token is one step of all rows, so that TPOT is what each of them waits."""
    of = f"median of {len(found.prefill_s)} batches of {found.rows} x {found.prompt} tokens"
    prefill, decode = statistics.median(found.prefill_s), statistics.median(found.decode_s)
    steps = found.steps.statistics()
    tails = {f"tpot_s_{key}": steps[key] for key in ("p50", "p90", "p95", "p99")}
    rate = lambda tokens, seconds: Reading(found.rows * tokens / seconds, "1/s", of)  # noqa: E731
    return {
        "ttft_s": Reading(prefill, "s", f"{of}: prefill and the first token's logits"),
        "tpot_s": Reading(decode / found.new_tokens, "s", f"{of}: {found.new_tokens} tokens in one call"),
        **tails,
        "prefill_tokens_per_s": rate(found.prompt, prefill),
        "tokens_per_s": rate(found.new_tokens, decode),
        "requests_per_s": Reading(found.rows * len(found.requests_s) / sum(found.requests_s), "1/s", "requests in all"),
        "compile_s": Reading(found.compile_s, "s", "first batch less the second"),
    }


def physical(lm, boxed, params, found, idle, mesh):
    """Everything physical but the peak of memory; `mesh` is that of the devices that serve."""
    counts, of_weights = formulas.count_parameters(lm, boxed), "arrays of the parameter tree"
    length = found.prompt + found.new_tokens
    tree = {key: Reading(value, "1", "parameter tree") for key, value in counts.items()}
    decoded = found.rows * found.new_tokens * found.decodes
    prefilled = study_metrics.energy_metrics(found.prefill_energy, found.rows * found.prompt * found.prefills, idle)
    return {
        **times(found),
        "params_total": tree["total"],
        "params_active": tree["active"],
        "params_trainable": missing("1", "nothing learns"),
        "resident_weight_bytes": Reading(resident_bytes(params), "bytes", of_weights),
        "predicted_memory_bytes": Reading(
            resident_bytes(params) + found.rows * formulas.state_bytes(lm, length),
            "bytes",
            f"weights, and closed formula of the state of {found.rows} x {length} tokens",
        ),
        "kv_bytes_per_token": Reading(
            formulas.state_bytes(lm, length) / length, "bytes", f"closed formula, row of {length}"
        ),
        **study_metrics.energy_metrics(found.decode_energy, decoded, idle),
        **{f"prefill_{key}": reading for key, reading in prefilled.items()},
        **_bounds(lm, boxed, params, found, mesh),
    }


def _bounds(lm, boxed, params, found, mesh):
    """Utilisation of prefill and of decoding, and the time that a step of decoding cannot fall below."""
    devices, dtype, ways = list(mesh.devices.flat), activation_dtype(lm.precision), sharding.row_ways(mesh)
    middle = found.prompt + found.new_tokens // 2  # the state grows by a token a step
    moved = ways * formulas.decode_bytes(lm, boxed, params, found.rows // ways, middle)  # weights, by each part
    flops = formulas.decode_flops(lm, boxed, middle)
    step_s = statistics.median(found.decode_s) / found.new_tokens
    prefill = found.rows * formulas.forward_flops(lm, boxed, found.prompt)
    used = device_peaks.model_flops_utilisation(prefill, statistics.median(found.prefill_s), devices, dtype)
    return {
        **{key: dataclasses.replace(each, source=f"prefill: {each.source}") for key, each in used.items()},
        **device_peaks.bandwidth_utilisation(moved, step_s, devices),
        "flops_per_token": Reading(flops, "FLOP", f"closed formula ({formulas.FLOP_CONVENTION}), token {middle}"),
        "decode_bytes_per_step": Reading(
            moved, "bytes", f"weights touched and state of {found.rows} x {middle} tokens"
        ),
        "tpot_s_roofline": device_peaks.measured_roofline(found.rows * flops, moved, devices, dtype),
    }
