"""The study's metrics (EfficientLLM, arXiv:2505.13840, Eq. 1-9) from measured inputs, as the study defines them."""

import dataclasses
import typing

from efficientllm.metrics.energy.window import EnergyWindow
from efficientllm.metrics.reading import Reading, missing, reading_or_missing
from efficientllm.metrics.sampler import Averages

UNITS = {
    "amu_gb": "GB",
    "amu_fraction": "1",
    "pcu": "1",
    "al_s": "s",
    "tt_tokens_per_param_s": "1/s",
    "st_samples_per_param_s": "1/s",
    "it_tokens_per_s": "1/s",
    "aec_w": "W",
    "mcr": "1",
}
TASKS = ("pretrain", "tune", "infer")


@dataclasses.dataclass(frozen=True)
class Compression:
    """Inputs of the compression rate, Eq. 9: measured bytes, and a quality score of which higher is better.

    A baseline is compared with itself.
    """

    original_bytes: int
    compressed_bytes: int
    original_quality: float
    compressed_quality: float
    quality_name: str


@dataclasses.dataclass(frozen=True)
class Work:
    """Work finished in one measured window.

    task:           `pretrain`, `tune` or `infer`.
    iterations_s:   wall time of each iteration or request in s, with compute and communication, after blocking on it.
    duration_s:     wall time of the window in s; throughput divides by it, not by the sum of `iterations_s`.
    params_active:  parameters used per token: fewer than all in a mixture of experts.
    tokens:         tokens trained on (pretrain), None elsewhere.
    samples:        samples trained on (tune), None elsewhere.
    generated:      tokens generated (infer), prompts not included, None elsewhere.
    counted:        what `tokens` and `generated` count: the study counts images where a model learns from images.
    Raises ValueError if a count belongs to another task, so that it is never reported under the wrong name.
    """

    task: str
    iterations_s: tuple[float, ...]
    duration_s: float
    params_active: int
    tokens: float | None = None
    samples: float | None = None
    generated: float | None = None
    counted: str = "tokens"

    def __post_init__(self):
        counts = {"pretrain": self.tokens, "tune": self.samples, "infer": self.generated}
        if self.task not in counts:
            raise ValueError(f"task {self.task!r} is none of {', '.join(TASKS)}")
        counted = [task for task, count in counts.items() if count is not None]
        if counted != [self.task]:
            raise ValueError(f"{self.task} counts its own work only, not that of {', '.join(counted) or 'nothing'}")


def paper_metrics(
    work: Work, averages: Averages, energy: EnergyWindow, compression: Compression | None = None
) -> dict[str, Reading]:
    """The study's metrics as `{key: Reading}`, every key of UNITS, null with a reason where nothing was measured.

    Memory is per device and power is of all devices. Per-parameter throughputs divide by active parameters.
    """
    memory = averages.memory_bytes
    readings = {
        "amu_gb": _or_null("amu_gb", None if memory is None else memory / 1e9, averages.memory_source),
        "amu_fraction": _or_null("amu_fraction", averages.memory_fraction, averages.memory_source),
        "pcu": _or_null("pcu", averages.utilisation, averages.utilisation_source),
        "al_s": _latency(work),
        "tt_tokens_per_param_s": _throughput("tt_tokens_per_param_s", "pretrain", work, work.tokens),
        "st_samples_per_param_s": _throughput("st_samples_per_param_s", "tune", work, work.samples),
        "it_tokens_per_s": _throughput("it_tokens_per_s", "infer", work, work.generated),
        "aec_w": reading_or_missing(energy.mean_power_w, "W", _energy_source(energy), energy.reason),
        "mcr": _compression_rate(compression),
    }
    return readings


def _or_null(key, value, source):
    return reading_or_missing(value, UNITS[key], source, f"not readable here ({source})")


def _latency(work):
    if not work.iterations_s:
        return missing("s", "no iteration was timed")
    count = len(work.iterations_s)
    return Reading(sum(work.iterations_s) / count, "s", f"mean wall time of {count} iterations (Eq. 3)")


def _throughput(key, task, work, count):
    """Eq. 4-6: work over time, and in training over parameters."""
    if work.task != task:
        return missing(UNITS[key], f"a metric of {task}, and this run is {work.task}")
    rate = count / work.duration_s
    if task == "infer":
        return Reading(rate, UNITS[key], f"generated {work.counted} over wall time (Eq. 6)")
    unit = f"{work.counted} (Eq. 4)" if task == "pretrain" else "samples (Eq. 5)"
    return Reading(rate / work.params_active, UNITS[key], f"{unit} over wall time and active parameters")


def _energy_source(energy):
    bound = "" if energy.error_bound is None else f", edges +-{energy.error_bound:.1%}"
    return f"{energy.source} ({energy.kind}, {energy.scope}{bound})"


def _compression_rate(compression):
    """Eq. 9: (original size / compressed size) x (compressed quality / original quality)."""
    if compression is None:
        return missing("1", "nothing is compressed in this run")
    size_ratio = compression.original_bytes / compression.compressed_bytes
    quality_ratio = compression.compressed_quality / compression.original_quality
    return Reading(size_ratio * quality_ratio, "1", f"measured bytes and {compression.quality_name} (Eq. 9)")


def energy_metrics(energy: EnergyWindow, tokens: float, idle: typing.Any = None) -> dict[str, Reading]:
    """`energy_j`, `j_per_token` (gross) and `j_per_token_net` (less idle power) as `{key: Reading}`.

    `tokens` were processed in the window; `idle` (`energy.Idle`) was measured in the same process, devices at rest.
    """
    source, reason = _energy_source(energy), energy.reason
    gross, idle_power_w = energy.energy_j, idle and idle.power_w
    no_idle = reason or (idle and idle.reason) or "idle power was not measured"
    if idle is not None and idle.drifted:
        idle_power_w, no_idle = None, f"idle power drifted by {idle.drift:+.1%} over the run"
    net = None if gross is None or idle_power_w is None else gross - idle_power_w * energy.duration_s
    return {
        "energy_j": reading_or_missing(gross, "J", source, reason),
        "j_per_token": reading_or_missing(None if gross is None else gross / tokens, "J", source, reason),
        "j_per_token_net": reading_or_missing(None if net is None else net / tokens, "J", source, no_idle),
    }
