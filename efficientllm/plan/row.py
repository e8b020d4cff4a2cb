"""The row and the printed text of a plan. Predictions have their own keys: they are never ranked with measurements."""

import dataclasses
from collections.abc import Sequence

from efficientllm.cost import formulas
from efficientllm.metrics import compiles
from efficientllm.metrics.reading import Reading, missing, reading_or_missing
from efficientllm.plan import hardware as hardwares
from efficientllm.plan import hlo_cost, operation_table
from efficientllm.plan.calibration import Calibration
from efficientllm.plan.estimate import Estimate
from efficientllm.plan.hardware import Hardware
from efficientllm.plan.remedies import Try
from efficientllm.plan.workloads import Workload
from efficientllm.record import price_and_carbon
from efficientllm.typing import Record

LEAST = "least time by roofline"
_LATENCIES = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("a picture", "image_latency_s"))
_SIX = (
    ("AMU", "amu_gb", "GB"),
    ("PCU", "pcu", ""),
    ("AL", "al_s", "s"),
    ("TT", "tt_tokens_per_param_s", "1/s"),
    ("ST", "st_samples_per_param_s", "1/s"),
    ("IT", "it_tokens_per_s", "1/s"),
    ("AEC", "aec_w", "W"),
    ("MCR", "mcr", ""),
)


def predicted(
    workload: Workload,
    hardware: Hardware,
    count: int,
    estimate: Estimate,
    tries: Sequence[Try],
    calibration: Calibration | None,
) -> Record:
    """The `predicted` entry of the row as plain data: the study's metrics, memory, cost, and changes that fit."""
    total, room = estimate.total_bytes, hardware.memory_bytes
    return {
        **_six(workload, hardware, count, estimate, calibration),
        "source": estimate.source,
        "hardware": hardware.name,
        "device_kind": hardware.device_kind,
        "devices": count,
        "hosts": hardwares.hosts(hardware, count),
        "mesh": dict(workload.mesh.shape),
        "fits": None if total is None and estimate.refused is None else estimate.refused is None and total <= room,
        "refused": estimate.refused,
        "device_memory_bytes": room,
        "peak_bytes": total,
        "memory_bytes": estimate.memory,
        "by_shapes_bytes": estimate.by_shapes,
        "memory_parts": workload.memory_parts,
        **_cost(estimate),
        **workload.latencies(estimate.parts),
        "parts": {name: {"times": times} | _part(program) for name, (times, program) in estimate.parts.items()},
        "changes": [dataclasses.asdict(attempt) for attempt in tries],
        "calibration": None if calibration is None else calibration.summary(),
        "sources": {**hardware.sources, **estimate.roofline.sources},
    }


def _cost(estimate):
    return {
        "model_flops": estimate.model_flops,
        "program_flops": estimate.program_flops,
        "moved_bytes": estimate.moved_bytes,
        "launches": estimate.launches,
        "collectives": None if estimate.collectives is None else hlo_cost.by_kind(estimate.collectives),
        "roofline_s": estimate.roofline.sides,
        "step_s": estimate.roofline.seconds,
        "bound": estimate.roofline.bound,
        "kernels": estimate.kernels,
        "custom_calls": estimate.custom_calls,
    }


def _part(estimate):
    """Cost of one run of a program."""
    return {"peak_bytes": estimate.total_bytes, "memory_bytes": estimate.memory, **_cost(estimate)}


def _six(workload, hardware, count, estimate, calibration):
    """The study's metrics: AMU, AL, throughputs predicted; PCU and power of calibration rows; null with a reason."""
    seconds = estimate.roofline.seconds
    if seconds is not None and calibration is not None:
        seconds *= calibration.factor
    rates = dict.fromkeys(workload.no_rates) if seconds is None else workload.rates(seconds)
    watts, pcu = (calibration.mean("watts"), calibration.mean("pcu")) if calibration else (None, None)
    amounts = _amounts(workload, hardware, count, seconds, watts)
    total = estimate.total_bytes
    values = {
        "amu_gb": None if total is None else total / 1e9,
        "amu_fraction": None if total is None else total / hardware.memory_bytes,
        "pcu": pcu,
        "al_s": seconds,
        **rates,
        "aec_w": None if watts is None else watts * count,
        "aec_at_most_w": None if hardware.tdp_w is None else hardware.tdp_w * count,
        "mcr": None,
        **{key: amount.value for key, amount in amounts.items()},
    }
    reasons = dict.fromkeys(rates, _UNKNOWN) | _REASONS | {"mcr": workload.no_mcr}
    reasons |= {key: amount.reason for key, amount in amounts.items()}
    nulls = [key for key, value in (values | {"collectives": estimate.collectives}).items() if value is None]
    return values | {"reasons": {key: reasons[key] for key in nulls}}


def _amounts(workload, hardware, count, seconds, watts):
    """Cost and CO2 of the planned time, at the power of the calibration rows' devices, as Readings."""
    planned_s = reading_or_missing(seconds, "s", "planned", _UNKNOWN)
    power_w = reading_or_missing(None if watts is None else watts * count, "W", "calibration", _REASONS["aec_w"])
    paid = 1 if hardware.platform == "cpu" else count
    return price_and_carbon.of_plan(workload.config, planned_s, power_w, workload.units, paid)


_UNKNOWN = "a peak or the compiler's figure is not known"
_REASONS = {
    "amu_gb": "the compiler gives no figure",
    "amu_fraction": "the compiler gives no figure",
    "pcu": "how busy a device is said to be is measured: give rows of it as config.plan.calibration",
    "al_s": _UNKNOWN,
    "aec_w": "power is measured: give rows of this hardware as config.plan.calibration",
    "collectives": "neither a compiler nor a closed formula gives them: the least time is without the network",
    "aec_at_most_w": "no design power of the device alone is published",
}


def physical(workload: Workload, estimate: Estimate) -> dict[str, Reading]:
    """The row's physical readings, which need no measured time."""
    params = formulas.count_parameters(workload.lm, workload.boxed)
    executed = estimate.program_flops
    return {
        "params_total": Reading(params["total"], "1", "parameter tree"),
        "params_active": Reading(params["active"], "1", "parameter tree, experts as far as a token is sent to them"),
        **workload.readings(),
        "program_flops_per_token": missing("FLOP", "kernels hide their products")
        if executed is None
        else Reading(executed / workload.tokens, "FLOP", "products of the programs, counted in their jaxprs"),
        "compile_s": missing("s", "no compiler")
        if estimate.compile_s is None
        else compiles.time_reading(estimate.compile_s, "XLA compilation of the programs"),
    }


def text(name: str, workload: Workload, hardware: Hardware, estimate: Estimate, prediction: Record) -> str:
    """Formats a plan for the log."""
    count = prediction["devices"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in prediction["mesh"].items() if size > 1) or "one device"
    by = f"compiled for it in {estimate.compile_s:.1f} s" if estimate.source == "compiler" else "from shapes alone"
    lines = [
        f"plan of {name}: {workload.heading} on {count} x {hardware.name} "
        f"({prediction['hosts']} host{'s' * (prediction['hosts'] > 1)}), mesh {mesh}; {by}",
        *_memory_lines(hardware, estimate, prediction),
        *_cost_lines(estimate, prediction),
        *_six_lines(prediction),
    ]
    return "\n".join(lines)


def _memory_lines(hardware, estimate, prediction):
    room, total = prediction["device_memory_bytes"], prediction["peak_bytes"]
    kinds = (("argument_bytes", "arguments"), ("output_bytes", "outputs"), ("alias_bytes", "of them in place"))
    entries = [
        f"{label} {estimate.memory[key] / 1e9:.2f}"
        for key, label in (*kinds, ("temp_bytes", "temporaries"))
        if key in estimate.memory
    ]
    verdict = "fits" if prediction["fits"] else "does not fit"
    peak = "of unknown size" if total is None else f"{total / 1e9:.2f}"
    lines = [
        f"  memory, GB a device  peak {peak} of {room / 1e9:.1f}: {verdict}"
        + (f"  ({', '.join(entries)})" if entries else "")
        + (f"; by shapes {estimate.by_shapes / 1e9:.2f}" if estimate.source == "compiler" else "")
    ]
    shapes = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in prediction["memory_parts"].items())
    lines.append(f"    by part, of shapes  {shapes}")
    if estimate.refused:
        lines.append(f"    the compiler refuses: {estimate.refused[:160]}")
    if prediction["fits"] and hardware.platform == "gpu" and total > 0.75 * room:
        lines.append(
            f"    JAX takes 75 % of a GPU by itself: XLA_PYTHON_CLIENT_MEM_FRACTION={total / room + 0.005:.2f}"
        )
    for change in prediction["changes"]:
        size = "no figure" if change["total_bytes"] is None else f"{change['total_bytes'] / 1e9:.2f} GB"
        outcome = "would fit" if change["fits"] else change["reason"] or "does not fit either"
        lines.append(f"    with {change['flags']}: {size}, {outcome}")
    if not prediction["fits"] and not prediction["changes"]:
        lines.append("    no single change of remat, mesh or micro-batch is left to try")
    return lines


def _cost_lines(estimate, prediction):
    if not prediction["parts"]:
        return [*_lines_of("a step", estimate.source, prediction), *_operation_lines(estimate)]
    lines = []
    for name, program in prediction["parts"].items():
        lines += _lines_of(f"{program['times']} x {name}", estimate.source, program)
        lines += _operation_lines(estimate.parts[name][1])
    planned = [(label, prediction[key]) for label, key in _LATENCIES if prediction.get(key) is not None]
    latencies = [f"{label} {seconds * 1e3:,.4g} ms" for label, seconds in planned]
    return [*lines, f"  {'least latencies':<20} {', '.join(latencies)}"] if latencies else lines


def _operation_lines(estimate):
    """The table of operations by kind of a compiled program; bytes and FLOPs are of one device."""
    return [f"      {line}" for line in operation_table.lines(estimate.operations)] if estimate.operations else []


def _lines_of(label, source, prediction):
    sides = ", ".join(f"{side} {seconds * 1e3:,.4g} ms" for side, seconds in prediction["roofline_s"].items())
    executed = prediction["program_flops"]
    flops = f"{prediction['model_flops'] / 1e12:,.4g} TFLOP of the model" + (
        f", {executed / 1e12:,.4g} of the program" if executed else ""
    )
    moved = (
        "" if prediction["moved_bytes"] is None else f"; {prediction['moved_bytes'] / 1e9:,.4g} GB moved on a device"
    )
    launched = "" if prediction["launches"] is None else f", {prediction['launches']:,} kernels"
    lines = [f"  {label:<20} {flops}{moved}{launched}"]
    for kind, total in (prediction["collectives"] or {}).items():
        size, sent = total["bytes"] / 1e9, total["wire_bytes"] / 1e9
        how = f"{total['count']:>6} x" if source == "compiler" else "by formula"
        lines.append(f"    {kind:<18} {how}, {size:,.4g} GB a device, {sent:,.4g} sent")
    names = {
        **prediction["kernels"],
        **({"calls": list(prediction["custom_calls"])} if prediction["custom_calls"] else {}),
    }
    if names:
        lines.append(
            "    kernels            " + "; ".join(f"{key}: {', '.join(kinds)}" for key, kinds in names.items())
        )
    if sides:
        unknown = ", network not known" if prediction["collectives"] is None else ""
        lines.append(f"    least time         {sides}{unknown}: bound by {prediction['bound']}")
    return lines


def _six_lines(prediction):
    calibration = prediction["calibration"]
    basis = (
        LEAST
        if calibration is None
        else f"roofline x {calibration['factor']:.2f}, from {calibration['rows']} measured rows"
    )
    if calibration and calibration["median_error"] is not None:
        basis += (
            f"; each from the others off by {calibration['median_error']:.0%}, at most {calibration['worst_error']:.0%}"
        )
    lines = [f"  predicted ({basis})"]
    for label, key, unit in _SIX:
        if key not in prediction:
            continue
        value = prediction[key]
        lines.append(
            f"    {label:<5}" + (f"null  {prediction['reasons'][key]}" if value is None else f"{value:.4g} {unit}")
        )
    for key, label in price_and_carbon.LABELS.items():
        if prediction.get(key) is not None:
            lines.append(f"    {label} {prediction[key]:.4g} {'USD' if key.startswith('usd') else 'g'}")
    return lines
