"""What a candidate costs, by metric: planned by shapes, in the units of a report's columns."""

from __future__ import annotations

import dataclasses

from efficientllm.metrics.reading import missing, reading_or_missing
from efficientllm.plan import roofline as rooflines
from efficientllm.plan.workloads import Workload
from efficientllm.recommend.request import Changes, Request
from efficientllm.recommend.techniques import Technique
from efficientllm.record import price_and_carbon
from efficientllm.weights import Precision

NO_POWER = missing("W", "the power of a device is measured, not planned")
PLANNED = "planned by shapes"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A technique with a setting, planned: metrics by key, and the workload that a compiler would be given."""

    technique: Technique
    changes: Changes
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def all_changes(self) -> Changes:
        return dict(self.technique.changes) | self.changes


def seconds_of(request: Request, workload: Workload, flops: float, moved: float | None) -> float | None:
    """Least seconds of so many FLOPs of all devices and bytes of one, with the network where a formula has it."""
    dtype = str(Precision.of(workload.lm.precision).product)
    sent = workload.sent_by_formula()
    return rooflines.roofline(request.hardware, request.devices, dtype, flops, moved, sent).seconds


def shared_metrics(request: Request, workload: Workload, seconds: float | None, memory: float) -> dict[str, float]:
    """The metrics of every workload, from its least time and its memory."""
    metrics = {"peak_memory_bytes": memory, "amu_gb": memory / 1e9}
    metrics |= {key: reading.value for key, reading in workload.readings().items() if reading.value is not None}
    if seconds is None:
        return metrics
    metrics |= {"al_s": seconds, "tokens_per_s": workload.tokens / seconds} | workload.rates(seconds)
    paid = 1 if request.hardware.platform == "cpu" else request.devices
    planned_s = reading_or_missing(seconds, "s", PLANNED, "")
    amounts = price_and_carbon.of_plan(workload.config, planned_s, NO_POWER, workload.units, paid)
    return metrics | {key: amount.value for key, amount in amounts.items() if amount.value is not None}


def planned_keys(task: str) -> tuple[str, ...]:
    """The metrics that a plan by shapes gives."""
    shared = (
        *("peak_memory_bytes", "amu_gb", "al_s", "tokens_per_s", "flops_per_token", "resident_weight_bytes"),
        "usd_per_mtoken",
    )
    if task == "infer":
        return (*shared, "ttft_s", "tpot_s", "it_tokens_per_s", "kv_bytes_per_token", "params_total")
    rate = "tt_tokens_per_param_s" if task == "pretrain" else "st_samples_per_param_s"
    return (*shared, rate, "params_trainable", "usd_per_run", "params_total")
