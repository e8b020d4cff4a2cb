"""Columns of a report: a metric's unit, its label, which direction is better, and number formatting."""

import dataclasses
import math
import typing
from collections.abc import Iterable

from efficientllm.metrics.conditions import UNITS as CONDITIONS
from efficientllm.record.row import PHYSICAL_UNITS, QUALITY_UNITS
from efficientllm.record.study_metrics import UNITS

# The longest key that is a prefix of the metric's name counts: `tpot_s_p95` is judged as `tpot_s`.
BETTER = {
    **dict.fromkeys(("amu", "al_s", "aec_w", "energy_j", "j_per_token", "peak_memory", "resident_weight"), "lower"),
    **dict.fromkeys(
        ("checkpoint_bytes", "ttft", "tpot", "step_s", "flops_per_token", "kv_bytes", "compile_s"), "lower"
    ),
    **dict.fromkeys(("program_flops", "compiled_memory", "predicted_memory"), "lower"),
    **dict.fromkeys(("loss", "eval_loss", "perplexity", "bits_per_byte"), "lower"),
    **dict.fromkeys(("j_per_image", "flops_per_image", "image_latency", "eval_vlb"), "lower"),
    **dict.fromkeys(("text_encode", "image_encode", "denoise_s", "decode_s", "autoencoder_bytes", "offload_"), "lower"),
    **dict.fromkeys(("fd_", "fid", "kd_", "kid"), "lower"),
    **dict.fromkeys(("usd_", "co2_"), "lower"),
    **dict.fromkeys(("pcu", "tt_", "st_", "it_", "mcr", "tokens_per_s", "mfu", "hfu", "mbu"), "higher"),
    **dict.fromkeys(("images_per_s", "sample_precision", "sample_recall", "exact_match"), "higher"),
}
_UNJUDGED = "_floor"  # the end of the name of a number that says how well a metric can be measured
LABELS = {
    "amu_gb": "AMU",
    "amu_fraction": "AMU share",
    "pcu": "PCU",
    "al_s": "AL",
    "tt_tokens_per_param_s": "TT",
    "st_samples_per_param_s": "ST",
    "it_tokens_per_s": "IT",
    "aec_w": "AEC",
    "mcr": "MCR",
    "j_per_token": "J/token",
    "j_per_token_net": "J/token net",
    "tokens_per_s": "tokens/s",
    "eval_loss": "eval loss",
    "eval_loss_also": "eval loss elsewhere",
    "exact_match": "exact match",
    "peak_memory_bytes": "peak memory",
    "flops_per_token": "FLOPs/token",
    "tpot_s": "TPOT",
    "ttft_s": "TTFT",
    "images_per_s": "images/s",
    "image_latency_s": "image latency",
    "flops_per_image": "FLOPs/image",
    "j_per_image": "J/image",
    "eval_vlb": "eval VLB",
    "usd_per_mtoken": "$/M tokens",
    "usd_per_image": "$/image",
    "usd_per_run": "$/run",
    "co2_g_per_mtoken": "CO2/M tokens",
    "co2_g_per_image": "CO2/image",
    "co2_g_per_run": "CO2/run",
    "fid": "FID",
    "fd_own": "FD (own)",
    "fd_own_floor": "FD (own), floor",
    "kd_own": "KD (own)",
}
LEVEL_LOSS = "eval_loss_level_"  # and k: held-out loss at the noise level k / 8
THROUGHPUT = {"pretrain": "tt_tokens_per_param_s", "tune": "st_samples_per_param_s", "infer": "it_tokens_per_s"}
QUALITY = tuple(QUALITY_UNITS)
SAMPLES = (
    "fd_",
    "fid",
    "kd_",
    "kid",
    "sample_",
    "nearest_ratio",
)  # distances of sampled pictures from the training set, by the extractor's name
ENERGY = ("aec_w", "energy_j", "j_per_token", "j_per_image", "co2_")
COST = "usd_"
# Determined by the config, equal in every process: one pair of rows suffices for a verdict.
EXACT = (
    "flops_per_token",
    "flops_per_image",
    "program_flops",
    "params_",
    "kv_bytes_per_token",
    "resident_weight_bytes",
    "text_encoder_bytes",
    "autoencoder_bytes",
    "compiled_memory",
    "predicted_memory",
)
# Affected by other programs on the machine: times, rates and power.
TIMED: tuple[str, ...] = (
    "al_s",
    "tt_",
    "st_",
    "it_",
    "tokens_per_s",
    "images_per_s",
    "image_latency",
    "prefill_tokens_per_s",
    "requests_per_s",
    "step_s",
    "ttft",
    "tpot",
)
TIMED += ("text_encode_s", "image_encode_s", "denoise_s", "decode_s", "offload_s")
TIMED += ("compile_s", "mfu", "hfu", "mbu", "pcu", *ENERGY, COST, "prefill_energy", "prefill_j")
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric in a report. `better` is `lower`, `higher`, or None where neither is better."""

    key: str
    unit: str
    better: str | None
    group: str | None

    @property
    def label(self) -> str:
        return LABELS.get(self.key, self.key.replace("_", " "))


def column(key: str, unit: str, group: str | None) -> Column:
    """Makes the column of a metric; estimates (`est_*`) and floors have no better direction and are never ranked."""
    prefix = max((candidate for candidate in BETTER if key.startswith(candidate)), key=len, default=None)
    return Column(key, unit, None if key.endswith(_UNJUDGED) else BETTER.get(prefix), group)


def list_columns(rows: Iterable[typing.Any]) -> list[Column]:
    """Lists the columns of these rows: known metrics in the order of the record, then others by name."""
    groups = {**dict.fromkeys(UNITS, "paper"), **dict.fromkeys(QUALITY_UNITS, "quality")}
    groups |= dict.fromkeys(PHYSICAL_UNITS, "physical")
    units = {**UNITS, **QUALITY_UNITS, **PHYSICAL_UNITS}
    rows = list(rows)
    extra = {key: row for row in rows for key in row.values if key not in groups}
    listed = [column(key, _unit(key, units[key], rows), group) for key, group in groups.items()]
    return listed + [column(key, row.unit(key), row.group(key)) for key, row in sorted(extra.items())]


def _unit(key, unit, rows):
    """The unit in which the rows have a metric; none where they differ, as losses of text and of pictures do."""
    recorded = {row.unit(key) for row in rows if row.values.get(key) is not None} or {unit}
    return recorded.pop() if len(recorded) == 1 else "1"


def study_metrics(task: str) -> tuple[str, ...]:
    """The study's six metrics for a task, with the task's throughput."""
    return ("amu_gb", "pcu", "al_s", THROUGHPUT.get(task, THROUGHPUT["pretrain"]), "aec_w", "mcr")


def is_energy(key: str) -> bool:
    return key.startswith(ENERGY)


def is_cost(key: str) -> bool:
    return key.startswith(COST)


def is_emission(key: str) -> bool:
    return key.startswith("co2_")


def is_quality(key: str) -> bool:
    return key in QUALITY or key.startswith((LEVEL_LOSS, "eval_", "exact_match", *SAMPLES))


def is_level(key: str) -> bool:
    return key.startswith(LEVEL_LOSS)


def is_of_samples(key: str) -> bool:
    return key.startswith(SAMPLES)


def is_exact(key: str) -> bool:
    return key.startswith(EXACT)


def is_condition(key: str) -> bool:
    return key in CONDITIONS


def is_timed(key: str) -> bool:
    return key.startswith(TIMED) and not key.endswith("_roofline")


def format_value(value: float | None, unit: str) -> str:
    """Formats a value with four digits and an SI prefix: `494 ms`, `1.31 M`; `–` for None."""
    if value is None:
        return "–"
    unit = {"1": "", "bytes": "B", "1/s": "/s"}.get(unit, unit)
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    factor, prefix = next(((f, p) for f, p in _SI if abs(value) >= f * 0.99995), _SI[-1])
    if unit in ("", "nat", "bit", "GB", "USD") and 1e-3 <= abs(value) < 1e4:
        factor, prefix = 1, ""
    if unit == "/s" and abs(value) < 1:  # `2 m/s` would read as a speed
        return f"{value:.3e} /s"
    return f"{value / factor:.4g} {prefix}{unit}".strip()
