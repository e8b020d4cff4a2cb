"""Table of the operations of profiled training steps: their times from the trace, their costs from the program."""

import dataclasses
import logging
import pathlib

import jax

from efficientllm.cost import device_peaks
from efficientllm.metrics import trace
from efficientllm.plan import hlo_text, operation_table, operations
from efficientllm.train.measure import Measurement
from efficientllm.train.setup import Setup
from efficientllm.typing import Record
from efficientllm.weights import Precision

log = logging.getLogger("efficientllm")


def summarize(setup: Setup, measurement: Measurement, folder: pathlib.Path) -> Record:
    """Logs the table of the steps that were profiled -> the row's entry `profile`; none without a trace in `folder`.

    Times, FLOPs and bytes are of one step on one device. The devices of a CPU share its cores, so their times are
    those of all.
    """
    file, count = trace.newest_file(folder), len(measurement.profiled)
    if file is None or not count:
        return {}
    parts = {index: _program(setup, index) for index in measurement.profiled_programs}
    times = trace.seconds_by_operation(file, [module for module, _ in parts.values()])
    seconds = {f"{module}/{name}": value / count for module in times for name, value in times[module].items()}
    costs = [
        operation._replace(
            name=f"{module}/{operation.name}", times=operation.times * measurement.profiled_programs[index] / count
        )
        for index, (module, program_operations) in parts.items()
        for operation in program_operations
    ]
    if not seconds:
        log.warning(f"{file} names no operation of the step: the table has no times")
    rows = operations.by_kind(costs, _peaks(setup), seconds or None)
    step_s = sum(measurement.profiled) / count
    shown = file.parent.relative_to(folder)
    log.info(f"profile of {count} steps, {step_s * 1e3:,.4g} ms each on a device; trace: {shown}")
    log.info("\n".join(operation_table.lines(rows, step_s if seconds else None)))
    summary = {
        "steps": count,
        "step_s": step_s,
        "trace": str(shown),
        "operations": [dataclasses.asdict(row) for row in rows],
    }
    return {"profile": summary}


def _program(setup, index):
    """`(its name in a trace, its operations)` of the step's program for a size of batch."""
    program = hlo_text.Program(setup.step_programs[index].as_text())
    return program.name, operations.of_program(program)


def _peaks(setup):
    """Rates that were measured on this machine before training."""
    flops = device_peaks.measure_gemm_peak(Precision.of(setup.lm.precision).product.name)
    devices = jax.devices()
    shared_by = len(devices) // device_peaks.count_parallel(devices)
    return operations.Peaks(flops.value, device_peaks.measure_copy_bandwidth().value, shared_by)
