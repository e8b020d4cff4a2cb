"""Readings of sampled pictures for the row: latencies, rates, FLOPs, bytes and energy of a picture and of a step."""

import dataclasses
import statistics
import typing

from efficientllm import sharding
from efficientllm.cost import device_peaks, formulas
from efficientllm.infer.measure_pictures import MeasuredPictures
from efficientllm.infer.picture_costs import PictureCosts
from efficientllm.metrics import compiles
from efficientllm.metrics.energy import reader
from efficientllm.metrics.reading import Reading, missing
from efficientllm.record import study_metrics
from efficientllm.typing import Mesh, Params
from efficientllm.weights import activation_dtype, resident_bytes

NO_TOKENS = "a picture is sampled whole: none of its tokens comes first, and none is cached"


def study(
    costs: PictureCosts, measured: MeasuredPictures, compared: study_metrics.Compression | None
) -> dict[str, Reading]:
    """The study's metrics; Eq. 6 counts pictures where it counts tokens of text."""
    work = study_metrics.Work(
        "infer",
        tuple(measured.batch_s),
        sum(measured.batch_s),
        formulas.count_parameters(costs.model, costs.boxed)["active"],
        generated=measured.rows * len(measured.batch_s),
        counted="images",
    )
    return study_metrics.paper_metrics(work, measured.averages, measured.energy, compared)


def times(measured: MeasuredPictures) -> dict[str, Reading]:
    """Latencies and rates; every picture of a batch has the latency of the batch."""
    batch_s, steps = statistics.median(measured.batch_s), measured.steps.statistics()
    pictures = f"{measured.rows} picture{'s' * (measured.rows > 1)}"
    source = f"median of {len(measured.batch_s)} batches of {pictures}"
    return {
        "image_latency_s": Reading(batch_s, "s", f"{source}: {measured.solver_steps} steps, from noise to pixels"),
        "step_s": Reading(measured.step_s, "s", f"{source}, {measured.solver_steps} steps in one call"),
        "denoise_s": Reading(
            measured.step_s * measured.solver_steps, "s", f"{source}: all {measured.solver_steps} steps"
        ),
        **{f"step_s_{key}": steps[key] for key in ("p50", "p90", "p95", "p99")},
        "decode_s": Reading(statistics.median(measured.decode_s), "s", f"{source}: latents to pixels")
        if measured.decode_s
        else missing("s", "the model samples pixels"),
        "images_per_s": Reading(measured.rows / batch_s, "1/s", source),
        "compile_s": compiles.time_reading(measured.compile_s, "first batch less the second"),
    }


def autoencoder(encoder: typing.Any, size: int) -> dict[str, Reading]:
    """The bytes of the autoencoder's weights, if there is one."""
    if encoder is None:
        return {"autoencoder_bytes": missing("bytes", "the model samples pixels")}
    return {"autoencoder_bytes": Reading(size, "bytes", "by shapes: its encoder and its decoder")}


def physical(
    costs: PictureCosts, params: Params, measured: MeasuredPictures, idle: reader.IdlePower, mesh: Mesh
) -> dict[str, Reading]:
    """The physical readings, without the peak of memory; `mesh` is the one that serves."""
    images, counts = measured.rows * measured.batches, formulas.count_parameters(costs.model, costs.boxed)
    tree = {key: Reading(value, "1", "parameter tree") for key, value in counts.items()}
    energy = study_metrics.energy_metrics(measured.energy, images * costs.tokens, idle)
    per_image = study_metrics.energy_metrics(measured.energy, images, idle)
    predicted = resident_bytes(params) + costs.live_bytes(measured.rows)
    return {
        **times(measured),
        "params_total": tree["total"],
        "params_active": tree["active"],
        "params_trainable": missing("1", "nothing learns"),
        "resident_weight_bytes": Reading(resident_bytes(params), "bytes", "arrays of the parameter tree"),
        "predicted_memory_bytes": Reading(predicted, "bytes", f"weights, and arrays of a step of {measured.rows}"),
        **{key: missing("s", NO_TOKENS) for key in ("ttft_s", "tpot_s")},
        "kv_bytes_per_token": missing("bytes", NO_TOKENS),
        **energy,
        "j_per_image": per_image["j_per_token"],
        "j_per_image_net": per_image["j_per_token_net"],
        **_bounds(costs, params, measured, mesh),
    }


def flops(costs: PictureCosts) -> dict[str, Reading]:
    """FLOPs of a picture, and of each of its tokens."""
    decoded = " and the decoder's jaxpr" if costs.encoder is not None else ""
    source = f"closed formula ({formulas.FLOP_CONVENTION}){decoded}, {costs.sampler.steps} steps"
    of_image = Reading(costs.image_flops, "FLOP", source)
    of_token = dataclasses.replace(of_image, value=costs.image_flops / costs.tokens)
    return {"flops_per_image": of_image, "flops_per_token": of_token}


def _bounds(costs, params, measured, mesh):
    """FLOPs and bytes, MFU and MBU of the steps, and the least time of a step by roofline."""
    devices, dtype = list(mesh.devices.flat), activation_dtype(costs.model.precision)
    shards = sharding.count_row_shards(mesh)
    moved = shards * costs.step_bytes(params, measured.rows // shards)  # each row shard reads the weights
    of_step = measured.rows * costs.step_flops
    return {
        **flops(costs),
        **device_peaks.model_flops_utilisation(of_step, measured.step_s, devices, dtype),
        **device_peaks.bandwidth_utilisation(moved, measured.step_s, devices),
        "bytes_per_step": Reading(moved, "bytes", f"weights touched and {measured.rows} pictures, at least"),
        "step_s_roofline": device_peaks.measured_roofline(of_step, moved, devices, dtype),
    }
