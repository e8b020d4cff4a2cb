"""Weights that live in the host's memory, and are on the devices only while a part of a pipeline is used."""

import dataclasses
import time
from collections.abc import Sequence

import jax

from efficientllm.metrics.reading import Reading, missing
from efficientllm.typing import Params
from efficientllm.weights import resident_bytes

HOST = "pinned_host"  # the kind of memory that devices copy from
ONE_MEMORY = "the device is a CPU, whose memory is the host's: nothing is moved, and all parts stay where they are"


def has_host_memory(devices: Sequence[jax.Device]) -> bool:
    """Whether the host's memory is another than the devices'."""
    return all(device.platform != "cpu" for device in devices)


def to_host(params: Params) -> Params:
    """Copies parameters to the host's memory, sharded as they are."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST)), params)


@dataclasses.dataclass
class Moves:
    """What moving weights to the devices has cost: bytes, seconds, and how often a part was moved."""

    bytes: int = 0
    seconds: float = 0.0
    count: int = 0


@dataclasses.dataclass
class OffloadedParams:
    """Parameters in the host's memory (`to_host`). Of the parts of one `group`, one at a time is on the devices.

    group:  the parts of a pipeline, this one among them.
    """

    host: Params
    moves: Moves
    group: list["OffloadedParams"]
    _placed: Params | None = None

    def __post_init__(self):
        self.group.append(self)

    def on_devices(self) -> Params:
        """Returns the parameters on the devices. Those of the other parts leave them."""
        if self._placed is None:
            for part in self.group:
                part._placed = None  # nothing is copied back: the host has them
            begin = time.perf_counter()
            kind = _device_kind(self.host)
            move = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(kind)), self.host)
            self._placed = jax.block_until_ready(move)
            self.moves.seconds += time.perf_counter() - begin
            self.moves.bytes += resident_bytes(self.host)
            self.moves.count += 1
        return self._placed


def on_devices(params: Params | OffloadedParams) -> Params:
    """Returns parameters, on the devices if they are `OffloadedParams`."""
    return params.on_devices() if isinstance(params, OffloadedParams) else params


def readings(moves: Moves | None, parts: int) -> dict[str, Reading]:
    """The cost of a batch of pictures in bytes and seconds; `parts` come in turn. No `moves` is a CPU."""
    if moves is None:
        return {"offload_bytes": missing("bytes", ONE_MEMORY), "offload_s": missing("s", ONE_MEMORY)}
    batches = moves.count / parts
    source = f"weights from the host to the devices for a batch, mean of {batches:g}; they are not copied back"
    return {
        "offload_bytes": Reading(moves.bytes / batches, "bytes", source),
        "offload_s": Reading(moves.seconds / batches, "s", source),
    }


def _device_kind(params):
    device = next(iter(jax.tree.leaves(params)[0].sharding.device_set))
    return device.default_memory().kind
