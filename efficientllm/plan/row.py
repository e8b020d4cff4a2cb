"""A plan as a row and as text. All that is predicted stands in keys of its own: no measured row is ranked with it."""

import dataclasses

from efficientllm.cost import formulas
from efficientllm.metrics.reading import Reading, missing
from efficientllm.plan import hardware as hardwares
from efficientllm.plan import hlo_cost

LEAST = "least time by roofline"
_LATENCIES = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
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


def predicted(one, hardware, count, found, tries, calibration):
    """The row's `predicted`: the study's six metrics, memory, cost and what it takes to fit, as plain data."""
    total, room = found.total_bytes, hardware.memory_bytes
    return {
        **_six(one, hardware, count, found, calibration),
        "source": found.source,
        "hardware": hardware.name,
        "device_kind": hardware.device_kind,
        "devices": count,
        "hosts": hardwares.hosts(hardware, count),
        "mesh": dict(one.mesh.shape),
        "fits": None if total is None and found.refused is None else found.refused is None and total <= room,
        "refused": found.refused,
        "device_memory_bytes": room,
        "peak_bytes": total,
        "memory_bytes": found.memory,
        "by_shapes_bytes": found.by_shapes,
        **_cost(found),
        **one.latencies(found.parts),
        "parts": {name: {"times": times} | _part(each) for name, (times, each) in found.parts.items()},
        "changes": [dataclasses.asdict(each) for each in tries],
        "calibration": None if calibration is None else calibration.summary(),
        "sources": {**hardware.sources, **found.roofline.sources},
    }


def _cost(found):
    return {
        "model_flops": found.model_flops,
        "program_flops": found.program_flops,
        "moved_bytes": found.moved_bytes,
        "launches": found.launches,
        "collectives": None if found.collectives is None else hlo_cost.by_kind(found.collectives),
        "roofline_s": found.roofline.sides,
        "step_s": found.roofline.seconds,
        "bound": found.roofline.bound,
        "kernels": found.kernels,
        "custom_calls": found.custom_calls,
    }


def _part(found):
    """One program of several: a run of it."""
    return {"peak_bytes": found.total_bytes, "memory_bytes": found.memory, **_cost(found)}


def _six(one, hardware, count, found, calibration):
    """AMU, AL and throughputs from the plan; PCU and power only as measured rows had them; null with the reason."""
    seconds = found.roofline.seconds
    if seconds is not None and calibration is not None:
        seconds *= calibration.factor
    rates = dict.fromkeys(one.no_rates) if seconds is None else one.rates(seconds)
    watts, busy = (calibration.mean("watts"), calibration.mean("pcu")) if calibration else (None, None)
    total = found.total_bytes
    values = {
        "amu_gb": None if total is None else total / 1e9,
        "amu_fraction": None if total is None else total / hardware.memory_bytes,
        "pcu": busy,
        "al_s": seconds,
        **rates,
        "aec_w": None if watts is None else watts * count,
        "aec_at_most_w": None if hardware.tdp_w is None else hardware.tdp_w * count,
        "mcr": None,
    }
    reasons = dict.fromkeys(rates, _UNKNOWN) | _REASONS | {"mcr": one.no_mcr}
    return values | {"reasons": {key: reasons[key] for key, value in values.items() if value is None}}


_UNKNOWN = "a peak or the compiler's figure is not known"
_REASONS = {
    "amu_gb": "the compiler gives no figure",
    "amu_fraction": "the compiler gives no figure",
    "pcu": "how busy a device is said to be is measured: give rows of it as config.plan.calibration",
    "al_s": _UNKNOWN,
    "aec_w": "power is measured: give rows of this hardware as config.plan.calibration",
    "aec_at_most_w": "no design power of the device alone is published",
}


def physical(one, found):
    """What is known of the model without a clock, as readings."""
    params = formulas.count_parameters(one.lm, one.boxed)
    executed = found.program_flops
    return {
        "params_total": Reading(params["total"], "1", "parameter tree"),
        "params_active": Reading(params["active"], "1", "parameter tree, experts as far as a token is sent to them"),
        **one.readings(),
        "program_flops_per_token": missing("FLOP", "kernels hide their products")
        if executed is None
        else Reading(executed / one.tokens, "FLOP", "products of the programs, counted in their jaxprs"),
        "compile_s": missing("s", "no compiler")
        if found.compile_s is None
        else Reading(found.compile_s, "s", "XLA compilation of the programs"),
    }


def text(name, one, hardware, found, made):
    """What a plan prints."""
    count = made["devices"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in made["mesh"].items() if size > 1) or "one device"
    by = f"compiled for it in {found.compile_s:.1f} s" if found.source == "compiler" else "from shapes alone"
    lines = [
        f"plan of {name}: {one.heading} on {count} x {hardware.name} "
        f"({made['hosts']} host{'s' * (made['hosts'] > 1)}), mesh {mesh}; {by}",
        *_memory_lines(hardware, found, made),
        *_cost_lines(found, made),
        *_six_lines(made),
    ]
    return "\n".join(lines)


def _memory_lines(hardware, found, made):
    room, total = made["device_memory_bytes"], made["peak_bytes"]
    kinds = (("argument_bytes", "arguments"), ("output_bytes", "outputs"), ("alias_bytes", "of them in place"))
    parts = [
        f"{said} {found.memory[key] / 1e9:.2f}"
        for key, said in (*kinds, ("temp_bytes", "temporaries"))
        if key in found.memory
    ]
    verdict = "fits" if made["fits"] else "does not fit"
    peak = "of unknown size" if total is None else f"{total / 1e9:.2f}"
    lines = [
        f"  memory, GB a device  peak {peak} of {room / 1e9:.1f}: {verdict}"
        + (f"  ({', '.join(parts)})" if parts else "")
        + (f"; by shapes {found.by_shapes / 1e9:.2f}" if found.source == "compiler" else "")
    ]
    if found.refused:
        lines.append(f"    the compiler refuses: {found.refused[:160]}")
    if made["fits"] and hardware.platform == "gpu" and total > 0.75 * room:
        lines.append(
            f"    JAX takes 75 % of a GPU by itself: XLA_PYTHON_CLIENT_MEM_FRACTION={total / room + 0.005:.2f}"
        )
    for each in made["changes"]:
        said = "no figure" if each["total_bytes"] is None else f"{each['total_bytes'] / 1e9:.2f} GB"
        ends = "would fit" if each["fits"] else each["reason"] or "does not fit either"
        lines.append(f"    with {each['flags']}: {said}, {ends}")
    if not made["fits"] and not made["changes"]:
        lines.append("    no single change of remat, mesh or micro-batch is left to try")
    return lines


def _cost_lines(found, made):
    if not made["parts"]:
        return _lines_of("a step", found.source, made)
    lines = []
    for name, part in made["parts"].items():
        lines += _lines_of(f"{part['times']} x {name}", found.source, part)
    known = [f"{label} {made[key] * 1e3:,.4g} ms" for label, key in _LATENCIES if made[key] is not None]
    return [*lines, f"  {'least latencies':<20} {', '.join(known)}"] if known else lines


def _lines_of(label, source, made):
    sides = ", ".join(f"{side} {seconds * 1e3:,.4g} ms" for side, seconds in made["roofline_s"].items())
    executed = made["program_flops"]
    flops = f"{made['model_flops'] / 1e12:,.4g} TFLOP of the model" + (
        f", {executed / 1e12:,.4g} of the program" if executed else ""
    )
    moved = "" if made["moved_bytes"] is None else f"; {made['moved_bytes'] / 1e9:,.4g} GB moved on a device"
    launched = "" if made["launches"] is None else f", {made['launches']:,} kernels"
    lines = [f"  {label:<20} {flops}{moved}{launched}"]
    for kind, each in (made["collectives"] or {}).items():
        size, sent = each["bytes"] / 1e9, each["wire_bytes"] / 1e9
        how = f"{each['count']:>6} x" if source == "compiler" else "by formula"
        lines.append(f"    {kind:<18} {how}, {size:,.4g} GB a device, {sent:,.4g} sent")
    names = {**made["kernels"], **({"calls": list(made["custom_calls"])} if made["custom_calls"] else {})}
    if names:
        lines.append(
            "    kernels            " + "; ".join(f"{key}: {', '.join(kinds)}" for key, kinds in names.items())
        )
    if sides:
        lines.append(f"    least time         {sides}: bound by {made['bound']}")
    return lines


def _six_lines(made):
    known = made["calibration"]
    said = LEAST if known is None else f"roofline x {known['factor']:.2f}, from {known['rows']} measured rows"
    if known and known["median_error"] is not None:
        said += f"; each from the others off by {known['median_error']:.0%}, at most {known['worst_error']:.0%}"
    lines = [f"  predicted ({said})"]
    for label, key, unit in _SIX:
        if key not in made:
            continue
        value = made[key]
        lines.append(f"    {label:<5}" + (f"null  {made['reasons'][key]}" if value is None else f"{value:.4g} {unit}"))
    return lines
