"""Cost and CO2: `config.metrics.price` and `config.metrics.carbon` applied to the time and mean power of a run.

The study has neither. Every amount is of a unit of work: a million tokens, a picture of a diffusion model, or all
steps of a training run. Time is that of the measured steps or requests: start, compilation, evaluations and
checkpoints are not in it. CO2 is that of the energy which was metered, without the overhead of a data centre (PUE).
"""

import dataclasses
import typing

from efficientllm.config.carbon_intensity import CarbonIntensity, read_carbon
from efficientllm.metrics.reading import Reading, missing
from efficientllm.typing import Config

_WHAT = {"mtoken": "a million tokens", "image": "a picture", "run": "all steps"}
UNITS = {"usd_per_mtoken": "USD", "co2_g_per_mtoken": "g", "usd_per_run": "USD", "co2_g_per_run": "g"}
IMAGE_UNITS = {"usd_per_image": "USD", "co2_g_per_image": "g"}
LABELS = {
    **{f"usd_per_{unit}": f"cost {what}" for unit, what in _WHAT.items()},
    **{f"co2_g_per_{unit}": f"CO2  {what}" for unit, what in _WHAT.items()},
}
MILLION = 1e6
_J_PER_KWH, _S_PER_HOUR = 3.6e6, 3600
_NO_PRICE = "config.metrics.price is 0: set it to $ per device hour"
_NO_CARBON = "config.metrics.carbon is empty: set it to g/kWh, and where the figure is from"
_NO_RUN = "of a training run; this is one of inference"
_NO_TOKENS = "pictures are sampled, no tokens: see the amounts of an image"


@dataclasses.dataclass(frozen=True)
class Currency:
    """What an hour of a device costs in USD, 0 is unknown, and what a kWh emits, None is unknown."""

    price: float
    carbon: CarbonIntensity | None

    @classmethod
    def of(cls, config: Config) -> typing.Self:
        return cls(config.metrics.price, read_carbon(config.metrics.carbon))

    @property
    def is_set(self) -> bool:
        return bool(self.price) or self.carbon is not None

    def cost(self, seconds: Reading, devices: int, what: str) -> Reading:
        """USD of `seconds` on that many devices."""
        if not self.price:
            return missing("USD", _NO_PRICE)
        if seconds.value is None:
            return missing("USD", seconds.reason)
        usd = seconds.value * devices * self.price / _S_PER_HOUR
        paid = "1 device" if devices == 1 else f"{devices} devices, each"
        return Reading(usd, "USD", f"{what}, {paid} at {self.price:g} $ an hour")

    def co2(self, seconds: Reading, power_w: Reading, what: str) -> Reading:
        """Grams of CO2 of `seconds` at a mean power of all devices."""
        if self.carbon is None:
            return missing("g", _NO_CARBON)
        if reason := power_w.reason or seconds.reason:
            return missing("g", reason)
        grams = power_w.value * seconds.value * self.carbon.g_per_kwh / _J_PER_KWH
        return Reading(grams, "g", f"{what}, {power_w.source} x {self.carbon.g_per_kwh:g} g/kWh: {self.carbon.source}")

    def readings(self, work: dict[str, tuple[Reading, str]], power_w: Reading, devices: int) -> dict[str, Reading]:
        """`usd_per_UNIT` and `co2_g_per_UNIT` for each unit of `work`, `{unit: (its seconds, what they are of)}`."""
        amounts = {}
        for unit, (seconds, what) in work.items():
            amounts[f"usd_per_{unit}"] = self.cost(seconds, devices, what)
            amounts[f"co2_g_per_{unit}"] = self.co2(seconds, power_w, what)
        return amounts


def of_row(config: Config, paper: dict[str, Reading], physical: dict[str, Reading], devices: int) -> dict[str, Reading]:
    """The amounts of a measured run, from its readings; `devices` are those that are paid for.

    Generated tokens pay for their prefill too.
    """
    serves = config.task == "infer"
    rate = paper["it_tokens_per_s"] if serves else physical["tokens_per_s"]
    work = {"mtoken": (_inverse(rate, MILLION), "generated tokens and their prefill" if serves else "tokens")}
    if "images_per_s" in physical:
        work["image"] = _inverse(physical["images_per_s"]), "pictures"
        if serves:
            work["mtoken"] = missing("s", _NO_TOKENS), ""
    work["run"] = missing("s", _NO_RUN), ""
    if not serves:
        work["run"] = _times(paper["al_s"], config.train.steps), f"{config.train.steps} steps at their mean time"
    return Currency.of(config).readings(work, paper["aec_w"], devices)


def of_plan(
    config: Config, seconds: Reading, power_w: Reading, units: dict[str, float], devices: int
) -> dict[str, Reading]:
    """The amounts of a plan whose step or request takes `seconds` and does so many `units` of work."""
    work = {unit: (_times(seconds, 1 / count), f"{seconds.source} time") for unit, count in units.items()}
    return Currency.of(config).readings(work, power_w, devices)


def _inverse(rate, count=1.0):
    """Seconds of `count` units of work."""
    return missing("s", rate.reason) if rate.value is None else Reading(count / rate.value, "s", rate.source)


def _times(seconds, count):
    return seconds if seconds.value is None else dataclasses.replace(seconds, value=seconds.value * count)
