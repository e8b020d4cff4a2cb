"""Readings of an inference run for its row: latencies, rates, bytes, energy, compression, conditions."""

import dataclasses
import math
import statistics

from efficientllm import sharding
from efficientllm.config.plain import flatten
from efficientllm.cost import device_peaks, formulas
from efficientllm.embeds.tokens import LM
from efficientllm.errors import UserError
from efficientllm.infer.measure import ServingMeasurement
from efficientllm.metrics import compiles, conditions
from efficientllm.metrics.energy import reader
from efficientllm.metrics.reading import Reading, missing
from efficientllm.objectives.base import Objective
from efficientllm.record import study_metrics
from efficientllm.record.row import read_record
from efficientllm.typing import Config, Mesh, Params, PyTree, Record
from efficientllm.weights import activation_dtype, resident_bytes


@dataclasses.dataclass(frozen=True)
class ScoredForm:
    """Size of a form of the weights, and its held-out loss that the objective is `judged_by`: the inputs of MCR."""

    name: str
    bytes: int
    loss: float


def baseline_of(file: str, objective: Objective) -> ScoredForm:
    """Reads the form of another run's `record.json`. Raises UserError where the numbers are missing."""
    where, row, key = f"config.infer.baseline = {file!r}", _row_of(file), objective.judged_by
    try:
        size, loss = row["physical"]["resident_weight_bytes"], row["quality"][key]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: no row with resident_weight_bytes and {key} ({error!r})") from None
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in (size, loss)):
        raise UserError(f"{where}: its resident_weight_bytes or {key} is no number")
    if size is None or loss is None or size <= 0:
        raise UserError(f"{where}: its resident_weight_bytes or {key} is null or 0")
    return ScoredForm(f"the row {row.get('name')}", size, loss)


def check_baseline(config: Config, facts: Record) -> None:
    """Raises UserError for a baseline row that was scored otherwise than this run.

    `facts` are this run's provenance: `data`, and for pictures `objective`.
    """
    file = config.infer.baseline
    if not file.endswith(".json"):
        return
    row = _row_of(file)
    before, then = flatten(row.get("config") or {}), row.get("provenance") or {}
    pairs = {"data": ((then.get("data") or {}).get("fingerprint"), facts["data"].get("fingerprint"))}
    if pairs["data"][0] is None:
        pairs["data"] = (before.get("data"), config.data)
    pairs["eval.batches"] = (before.get("eval.batches"), config.eval.batches)
    pairs["objective"] = (then.get("objective"), facts.get("objective"))
    for what, (old, new) in pairs.items():
        if old is not None and old != new:
            raise UserError(
                f"config.infer.baseline = {file!r}: its {what} is {old}, and here it is {new}: its quality is "
                "another; score the baseline on the same"
            )


def _row_of(file):
    try:
        return read_record(file)
    except UserError as error:
        raise UserError(f"config.infer.baseline = {error}") from None


def compression(objective: Objective, baseline: ScoredForm, compressed: ScoredForm) -> study_metrics.Compression | None:
    """The inputs of MCR (Eq. 9) from two forms; None where a score is not finite."""
    if not all(math.isfinite(scored.loss) for scored in (baseline, compressed)):
        return None
    qualities = objective.likelihood(baseline.loss), objective.likelihood(compressed.loss)
    name = f"{objective.likelihood_name}, against {baseline.name}"
    return study_metrics.Compression(baseline.bytes, compressed.bytes, *qualities, name)


def noted(reading: Reading, history: str) -> Reading:
    """Appends `history` to the source of a Reading."""
    return (
        dataclasses.replace(reading, source=f"{reading.source}; {history}") if history and reading.source else reading
    )


def study(
    lm: LM, boxed: PyTree, measured: ServingMeasurement, compared: study_metrics.Compression | None
) -> dict[str, Reading]:
    """The study's metrics of a `measure.ServingMeasurement`; `compared` is a Compression or None."""
    work = study_metrics.Work(
        "infer",
        tuple(measured.requests_s),
        sum(measured.requests_s),
        formulas.count_parameters(lm, boxed)["active"],
        generated=measured.rows * measured.new_tokens * len(measured.requests_s),
    )
    return study_metrics.paper_metrics(work, measured.averages, _window(measured), compared)


def warm_up_and_conditions(measured: ServingMeasurement) -> Record:
    """`{"warm_up": ..., "conditions": ...}` of the row of a `measure.ServingMeasurement`."""
    steps = measured.steps.statistics()
    aside = {
        "discarded_s": steps["discarded_s"],
        "settled": steps["settled"],
        "interrupted_steps": measured.interrupted,
    }
    return {
        "warm_up": aside | {"first_batches_s": measured.discarded_s},
        "conditions": conditions.row(measured.span, measured.averages),
    }


def _window(measured):
    """Energy and time of one prefill and one decode a repeat: the windows may contain either more often."""
    phases = ((measured.prefill_energy, measured.prefills), (measured.decode_energy, measured.decodes))
    whole = reader.combine_windows([window for window, _ in phases])
    if whole.energy_j is None:
        return whole
    repeats = len(measured.requests_s)
    joules = sum(window.energy_j * repeats / count for window, count in phases)
    seconds = sum(window.duration_s * repeats / count for window, count in phases)
    return dataclasses.replace(whole, energy_j=joules, duration_s=seconds, mean_power_w=joules / seconds)


def times(measured: ServingMeasurement) -> dict[str, Reading]:
    """Latencies and rates as Readings. TPOT is the time of a step, which yields a token in every row."""
    source = f"median of {len(measured.prefill_s)} batches of {measured.rows} x {measured.prompt} tokens"
    prefill, decode = statistics.median(measured.prefill_s), statistics.median(measured.decode_s)
    steps = measured.steps.statistics()
    tails = {f"tpot_s_{key}": steps[key] for key in ("p50", "p90", "p95", "p99")}

    def rate(tokens, seconds):
        return Reading(measured.rows * tokens / seconds, "1/s", source)

    return {
        "ttft_s": Reading(prefill, "s", f"{source}: prefill and the first token's logits"),
        "tpot_s": Reading(decode / measured.new_tokens, "s", f"{source}: {measured.new_tokens} tokens in one call"),
        **tails,
        "prefill_tokens_per_s": rate(measured.prompt, prefill),
        "tokens_per_s": rate(measured.new_tokens, decode),
        "requests_per_s": Reading(
            measured.rows * len(measured.requests_s) / sum(measured.requests_s), "1/s", "requests in all"
        ),
        "compile_s": compiles.time_reading(measured.compile_s, "first batch less the second"),
    }


def physical(
    lm: LM, boxed: PyTree, params: Params, measured: ServingMeasurement, idle: reader.IdlePower, mesh: Mesh
) -> dict[str, Reading]:
    """The physical readings, without peak memory; `mesh` is the one that serves."""
    counts, weights_source = formulas.count_parameters(lm, boxed), "arrays of the parameter tree"
    length = measured.prompt + measured.new_tokens
    tree = {key: Reading(value, "1", "parameter tree") for key, value in counts.items()}
    decoded = measured.rows * measured.new_tokens * measured.decodes
    prefilled = study_metrics.energy_metrics(
        measured.prefill_energy, measured.rows * measured.prompt * measured.prefills, idle
    )
    return {
        **times(measured),
        "params_total": tree["total"],
        "params_active": tree["active"],
        "params_trainable": missing("1", "nothing learns"),
        "resident_weight_bytes": Reading(resident_bytes(params), "bytes", weights_source),
        "predicted_memory_bytes": Reading(
            resident_bytes(params) + measured.rows * formulas.state_bytes(lm, length),
            "bytes",
            f"weights, and closed formula of the state of {measured.rows} x {length} tokens",
        ),
        "kv_bytes_per_token": Reading(
            formulas.state_bytes(lm, length) / length, "bytes", f"closed formula, row of {length}"
        ),
        **study_metrics.energy_metrics(measured.decode_energy, decoded, idle),
        **{f"prefill_{key}": reading for key, reading in prefilled.items()},
        **of_images(measured, idle),
        **_bounds(lm, boxed, params, measured, mesh),
    }


def of_images(measured: ServingMeasurement, idle: reader.IdlePower) -> dict[str, Reading]:
    """Time, FLOPs and energy of a tower alone for the images of the prompts; its time is a part of TTFT."""
    images = measured.images
    if images is None:
        return {}
    source = f"median of {len(images.encode_s)} batches of {measured.rows} x {images.count} images, the tower alone"
    joules = study_metrics.energy_metrics(images.energy, measured.rows * images.count * images.encodings, idle)
    return {
        "image_encode_s": Reading(statistics.median(images.encode_s), "s", f"{source}: a part of ttft_s"),
        "flops_per_image": Reading(images.flops / images.count, "FLOP", "closed formula of the tower"),
        "j_per_image": joules["j_per_token"],
        "j_per_image_net": joules["j_per_token_net"],
    }


def _bounds(lm, boxed, params, measured, mesh):
    """MFU of prefill, MBU of decoding, and the least time of a decode step by roofline."""
    devices, dtype, shards = list(mesh.devices.flat), activation_dtype(lm.precision), sharding.count_row_shards(mesh)
    middle = measured.prompt + measured.new_tokens // 2  # the state grows by a token a step
    moved = shards * formulas.decode_bytes(
        lm, boxed, params, measured.rows // shards, middle
    )  # each row shard reads the weights
    flops = formulas.decode_flops(lm, boxed, middle)
    step_s = statistics.median(measured.decode_s) / measured.new_tokens
    image_flops = 0.0 if measured.images is None else measured.images.flops
    prefill = measured.rows * (formulas.forward_flops(lm, boxed, measured.prompt) + image_flops)
    utilisation = device_peaks.model_flops_utilisation(prefill, statistics.median(measured.prefill_s), devices, dtype)
    return {
        **{
            key: dataclasses.replace(reading, source=f"prefill: {reading.source}")
            for key, reading in utilisation.items()
        },
        **device_peaks.bandwidth_utilisation(moved, step_s, devices),
        "flops_per_token": Reading(flops, "FLOP", f"closed formula ({formulas.FLOP_CONVENTION}), token {middle}"),
        "decode_bytes_per_step": Reading(
            moved, "bytes", f"weights touched and state of {measured.rows} x {middle} tokens"
        ),
        "tpot_s_roofline": device_peaks.measured_roofline(measured.rows * flops, moved, devices, dtype),
    }
