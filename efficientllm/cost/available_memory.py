"""Memory available to a run, and the slack that predictions of memory need."""

import dataclasses
import typing
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.metrics import host

# The largest ratio of predicted to measured memory among runs that fitted: a smaller excess is not refused.
SLACK = 1.2


@dataclasses.dataclass(frozen=True)
class AvailableMemory:
    """Bytes that a run may take; `shared` if all local devices share one memory, as CPU devices do."""

    bytes: int
    shared: bool
    name: str

    def refuses(self, least: float, predicted: float) -> bool:
        """True if `predicted` bytes, of which `least` are certain, are not available."""
        return least > self.bytes or predicted > SLACK * self.bytes


def measure_available(config: typing.Any, devices: Sequence[typing.Any]) -> AvailableMemory | None:
    """Memory available to a run on these local `devices`; None where the backend does not say."""
    shared = devices[0].platform == "cpu"
    if config.memory_gb:
        return AvailableMemory(round(config.memory_gb * 1e9), shared, "config.memory_gb")
    if shared:
        return AvailableMemory(host.memory_free_bytes(), shared, "free memory here")
    stats = [device.memory_stats() or {} for device in devices]
    if any("bytes_limit" not in counts for counts in stats):
        return None
    free = min(counts["bytes_limit"] - counts.get("bytes_in_use", 0) for counts in stats)
    return AvailableMemory(free, shared, "free of each device")


def check_conversion(needed: int, what: str) -> None:
    """Raises UserError if the machine or its container has less memory than `needed` bytes in all."""
    total = host.memory_total_bytes()
    if needed > SLACK * total:
        raise UserError(f"{what} holds {needed / 1e9:,.1f} GB at once; there is memory of {total / 1e9:,.1f} GB")
