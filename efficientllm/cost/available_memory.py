"""Memory that there is for a run, and how far beyond it a prediction must be to be believed."""

import dataclasses

from efficientllm.errors import UserError
from efficientllm.metrics import host

# Plans of memory are so much beyond what was seen, at most, in runs that fitted.
SLACK = 1.2


@dataclasses.dataclass(frozen=True)
class Room:
    """`bytes` that a run may take; `shared` if all devices of this process take them from one memory, as on CPUs."""

    bytes: int
    shared: bool
    name: str

    def refuses(self, least, predicted):
        """Whether `predicted` bytes, of which `least` are certain, cannot be had."""
        return least > self.bytes or predicted > SLACK * self.bytes


def of(config, devices):
    """The Room of a run on `devices` (of this process), None where the backend does not say."""
    shared = devices[0].platform == "cpu"
    if config.memory_gb:
        return Room(round(config.memory_gb * 1e9), shared, "config.memory_gb")
    if shared:
        return Room(host.memory_free_bytes(), shared, "free memory here")
    stats = [device.memory_stats() or {} for device in devices]
    if any("bytes_limit" not in each for each in stats):
        return None
    return Room(min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats), shared, "free of each device")


def check_conversion(needed, what):
    """Refuses to hold `needed` bytes where the machine, or its container, has not as many at all. Raises UserError."""
    there = host.memory_total_bytes()
    if needed > SLACK * there:
        raise UserError(f"{what} holds {needed / 1e9:,.1f} GB at once; there is memory of {there / 1e9:,.1f} GB")
