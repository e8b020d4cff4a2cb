"""Readings of a training run for its row: the study's metrics, physical metrics and conditions."""

import dataclasses
from collections.abc import Mapping

import jax

from efficientllm.cost import device_peaks, formulas, step_memory
from efficientllm.metrics import compiles, conditions, memory, sampler
from efficientllm.metrics.energy import reader
from efficientllm.metrics.reading import Reading, missing
from efficientllm.objectives.base import Objective
from efficientllm.record import row, study_metrics
from efficientllm.runtime import distributed
from efficientllm.train import setup as train_setup
from efficientllm.train.measure import Measurement
from efficientllm.train.setup import Setup
from efficientllm.typing import Record
from efficientllm.weights import activation_dtype

TIMED = (
    *(f"step_s_p{percent}" for percent in (50, 90, 95, 99)),
    "tokens_per_s",
    "energy_j",
    "j_per_token",
    "j_per_token_net",
    "mfu",
    "mfu_gemm",
    "hfu",
    "hfu_gemm",
    "mbu",
    "mbu_copy",
)


def all_energy(measurement: Measurement) -> reader.EnergyWindow:
    """Energy of the measured steps, summed over all processes. Collective: every process must call it."""
    local = dataclasses.asdict(reader.combine_windows(measurement.windows))
    return reader.sum_over_processes([reader.EnergyWindow(**window) for window in distributed.gather(local)])


def all_idle(idle: reader.IdlePower) -> reader.IdlePower:
    """Idle power, summed over all processes. Collective: every process must call it."""
    powers = [reader.IdlePower(**fields) for fields in distributed.gather(dataclasses.asdict(idle))]
    if reason := next((power.reason for power in powers if power.power_w is None), None):
        return reader.IdlePower(None, reason)
    drifts = [power.drift for power in powers if power.drift is not None]
    return reader.IdlePower(sum(power.power_w for power in powers), None, max(drifts, key=abs, default=None))


def conditions_of(measurement: Measurement, everywhere: bool) -> Record:
    """The row's `conditions`: the worst of all processes if `everywhere` (a collective call), else of this process."""
    span = conditions.combine_spans(measurement.spans)
    if everywhere:
        spans = distributed.gather(None if span is None else dataclasses.asdict(span))
        span = conditions.worst_span([None if fields is None else conditions.Span(**fields) for fields in spans])
    return conditions.row(span, sampler.combine_averages(measurement.averages))


def readings(
    setup: Setup, measurement: Measurement, window: reader.EnergyWindow, idle: reader.IdlePower
) -> tuple[dict[str, Reading], dict[str, Reading]]:
    """`(paper, physical)` readings of the measured steps of `run` (a `train.setup.Setup`).

    `window` is their energy, `idle` the idle power. Timed readings are null where no steps could be measured.
    """
    params = formulas.count_parameters(setup.lm, setup.boxed)
    if reason := _why_unmeasured(measurement):
        unmeasured = {key: missing(unit, reason) for key, unit in study_metrics.UNITS.items()}
        timed = {key: missing(row.PHYSICAL_UNITS[key], reason) for key in TIMED}
        return unmeasured, {**physical_of_model(setup, params), **timed}
    in_images = setup.objective.counted == "images"
    counts = {"tokens": measurement.samples if in_images else measurement.tokens}
    work = study_metrics.Work(
        task=setup.config.task,
        iterations_s=tuple(measurement.timer.samples),
        duration_s=measurement.seconds,
        params_active=params["active"],
        counted=setup.objective.counted,
        **({"samples": measurement.samples} if setup.config.task == "tune" else counts),
    )
    steps = measurement.timer.statistics()
    study = study_metrics.paper_metrics(work, sampler.combine_averages(measurement.averages), window)
    physical = {
        **physical_of_model(setup, params),
        **study_metrics.energy_metrics(window, measurement.tokens, idle),
        **_utilisation(setup, measurement.programs, measurement.seconds),
        **_hardware_utilisation(setup, measurement.programs, measurement.seconds),
        **_bandwidth_utilisation(setup, measurement.programs, measurement.seconds / measurement.steps),
        **{f"step_s_{key}": steps[key] for key in ("p50", "p90", "p95", "p99")},
        "tokens_per_s": Reading(
            measurement.tokens / measurement.seconds, "1/s", f"{measurement.steps} steady steps, padding not counted"
        ),
    }
    return study, physical | (_per_image(setup, measurement, physical) if in_images else {})


def _per_image(setup, measurement, physical):
    """The readings of a picture: its tokens' FLOPs and energy, and the rate."""
    flops, energy = physical["flops_per_token"], physical["j_per_token"]
    return {
        "images_per_s": Reading(measurement.samples / measurement.seconds, "1/s", f"{measurement.steps} steady steps"),
        "flops_per_image": dataclasses.replace(flops, value=flops.value * setup.length),
        "j_per_image": energy
        if energy.value is None
        else dataclasses.replace(energy, value=energy.value * measurement.tokens / measurement.samples),
    }


def quality(objective: Objective, evaluation: Mapping[str, float] | None, loss: float | None) -> dict[str, Reading]:
    """Readings of the last evaluation and the last training loss; null with the reason where a value is not finite."""
    readings = objective.readings(evaluation or {})
    return (
        readings if loss is None else {"loss": Reading(loss, objective.unit, "last logged training step"), **readings}
    )


def unknown(reason: str) -> tuple[dict[str, Reading], dict[str, Reading]]:
    """`(paper, physical)` readings that are all null for one reason."""
    study = {key: missing(unit, reason) for key, unit in study_metrics.UNITS.items()}
    return study, {key: missing(unit, reason) for key, unit in row.PHYSICAL_UNITS.items()}


def warm_up(measurement: Measurement) -> Record:
    """The row's `warm_up`: seconds of the discarded steps, whether times had settled, interrupted and traced steps."""
    statistics = measurement.timer.statistics()
    profiled = {"profiled_steps": len(measurement.profiled)} if measurement.profiled else {}
    steps = {key: statistics[key] for key in ("discarded_s", "settled")}
    return steps | {"interrupted_steps": measurement.interrupted} | profiled


def _why_unmeasured(measurement):
    """Why no time could be measured; None where times are valid."""
    if not measurement.steps and measurement.interrupted:
        return f"the process was stopped within all {measurement.interrupted} of the steps that were to be measured"
    if not measurement.steps and measurement.unwatched:
        return f"too short: a checkpoint was being written in all of the {measurement.unwatched} steps after warm-up"
    if not measurement.steps:
        return f"too short to measure: all of its {len(measurement.timer.discarded)} steps went into warming up"
    if measurement.compiled:
        return f"{measurement.compiled} program(s) were compiled inside the measured steps"
    return None


def utilisation(setup: Setup, step_seconds: float, program: int = 0) -> dict[str, float]:
    """MFU of one step of a program as numbers: `mfu` if the device's peak is known, and `mfu_gemm`."""
    readings = _utilisation(setup, {program: 1}, step_seconds)
    return {key: reading.value for key, reading in readings.items() if reading.value is not None}


def _step_flops(setup, lm):
    """FLOPs of a step of a model, by closed formula."""
    return formulas.step_flops(lm, setup.boxed, _length(setup, lm), setup.batch_size, setup.method)


def _length(setup, lm):
    """Tokens of a row of a model of `setup.models`."""
    return lm.row_length(setup.config.train.length)


def _utilisation(setup, programs, seconds):
    """`programs` are the numbers of steps by program."""
    flops = sum(steps * _step_flops(setup, setup.models[program]) for program, steps in programs.items())
    return device_peaks.model_flops_utilisation(flops, seconds, jax.devices(), activation_dtype(setup.lm.precision))


def _hardware_utilisation(setup, programs, seconds):
    readings = [(setup.program_flops[program], steps) for program, steps in programs.items()]
    flops = next((flops for flops, _ in readings if flops.value is None), None)
    if flops is None:
        total = sum(flops.value * steps for flops, steps in readings)
        flops = dataclasses.replace(setup.program_flops[0], value=total)
    return device_peaks.hardware_flops_utilisation(flops, seconds, jax.devices(), activation_dtype(setup.lm.precision))


def _bandwidth_utilisation(setup, programs, step_seconds):
    """MBU of a step, and its least time by roofline, of the mean over the steps of all programs."""
    moved, flops = _mean_work(setup, programs)
    devices = jax.devices()
    description = "parameters, moments, gradients and activations, each passing once for each use,"
    return {
        **device_peaks.bandwidth_utilisation(moved, step_seconds, devices, description),
        "step_s_roofline": device_peaks.measured_roofline(flops, moved, devices, activation_dtype(setup.lm.precision)),
    }


def _mean_work(setup, programs):
    """`(bytes moved, FLOPs)` of a step, the means over the steps by program."""
    train, work = setup.config.train, []
    for program, steps in programs.items():
        moved = step_memory.moved_bytes(setup.shaped, setup.activation_bytes(program), train.accumulate)
        work.append((steps, moved, _step_flops(setup, setup.models[program])))
    total = sum(steps for steps, _, _ in work)
    moved, flops = (sum(values[0] * values[i] for values in work) / total for i in (1, 2))
    return moved, flops


def memory_of(setup: Setup) -> dict[str, Reading]:
    """Memory of a step: measured peak, the compiler's plan, and the estimate from shapes."""
    return {
        "peak_memory_bytes": memory.peak_bytes(jax.local_devices(), setup.rss_before),
        "compiled_memory_bytes": setup.program_memory,
        "predicted_memory_bytes": train_setup.predicted_memory(setup),
    }


def physical_of_model(setup: Setup, params: dict[str, int]) -> dict[str, Reading]:
    """Readings that need no time: parameters, FLOPs, bytes."""
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.shaped.all_params))
    flops = _step_flops(setup, setup.lm) / (setup.length * setup.batch_size)
    trainable = sum(leaf.size for leaf in jax.tree.leaves(setup.shaped.params))
    formula = f"closed formula ({formulas.FLOP_CONVENTION})"
    return {
        "params_total": Reading(params["total"], "1", "parameter tree"),
        "params_active": Reading(params["active"], "1", "parameter tree, experts as far as a token is sent to them"),
        "params_trainable": Reading(trainable, "1", "parameter tree"),
        "flops_per_token": Reading(flops, "FLOP", f"{formula}, forward and backward, row of {setup.length}"),
        "resident_weight_bytes": Reading(weights, "bytes", "parameter tree, over all devices"),
        **memory_of(setup),
        "program_flops_per_token": _per_token(setup, setup.program_flops[0]),
        "kv_bytes_per_token": Reading(
            formulas.state_bytes(setup.lm, setup.length) / setup.length,
            "bytes",
            f"closed formula, row of {setup.length}",
        ),
        "compile_s": compiles.time_reading(
            setup.compile_s["compile"], "XLA compilation of the training step", setup.program_loads
        )
        if setup.compile_s
        else missing("s", "the run ended before compilation"),
    }


def _per_token(setup, flops):
    if flops.value is None:
        return flops
    return dataclasses.replace(flops, value=flops.value / (setup.length * setup.batch_size))
