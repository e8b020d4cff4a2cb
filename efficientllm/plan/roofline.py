"""Rooflines: the least time of a step by FLOPs, memory traffic, network traffic and kernel launches.

The roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785) with two more sides: the network, and on GPUs the
least time of the kernel launches. Each side is a lower bound. A step that overlaps them perfectly takes the maximum of
the sides, one without overlap takes their sum.
"""

import dataclasses
from collections.abc import Sequence

from efficientllm.plan import hardware as hardwares
from efficientllm.plan.hardware import Hardware
from efficientllm.plan.hlo_cost import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of each side, None where unknown, and the sources of the hardware's figures."""

    compute: float | None
    memory: float | None
    network: float | None
    launches: float | None
    sources: dict

    @property
    def sides(self) -> dict[str, float]:
        """The known sides, `{name: seconds}`."""
        sides = {side: getattr(self, side) for side in ("compute", "memory", "network", "launches")}
        return {name: seconds for name, seconds in sides.items() if seconds is not None}

    @property
    def seconds(self) -> float | None:
        return max(self.sides.values(), default=None)

    @property
    def bound(self) -> str | None:
        """Name of the largest side."""
        return max(self.sides, key=self.sides.get, default=None)


@dataclasses.dataclass(frozen=True)
class Chain:
    """The roofline of programs in sequence; `links` are pairs (how often it runs, its Roofline)."""

    links: tuple

    @property
    def sides(self) -> dict[str, float]:
        """Seconds of each side that is known for every program."""
        shared = [side for side in self.links[0][1].sides if all(side in line.sides for _, line in self.links)]
        return {side: sum(times * line.sides[side] for times, line in self.links) for side in shared}

    @property
    def seconds(self) -> float | None:
        """Sum of the programs' least times; at least the largest of `sides`."""
        values = [(times, line.seconds) for times, line in self.links]
        return None if any(value is None for _, value in values) else sum(times * value for times, value in values)

    @property
    def bound(self) -> str | None:
        """The largest side of the program that takes longest."""
        if self.seconds is None:
            return None
        return max(self.links, key=lambda link: link[0] * link[1].seconds)[1].bound

    @property
    def sources(self) -> dict[str, str]:
        return self.links[0][1].sources


def roofline(
    hardware: Hardware,
    count: int,
    dtype: str,
    flops: float | None,
    moved: float | None,
    collectives: Sequence[Collective] | None,
    launches: int | None = None,
) -> Roofline:
    """The Roofline of a step.

    `flops` is the total of all devices. `moved` (bytes), `collectives` and `launches` (a number of kernels) are of one
    device, None where unknown.
    """
    peak, bandwidth = hardware.peak_flops(dtype), hardware.bandwidth()
    can_compute = peak.value is not None and flops is not None
    shared = 1 if hardware.platform == "cpu" else count  # the CPU devices of a process share its cores
    at_once = count if hardware.platform == "cpu" else 1
    return Roofline(
        compute=flops / (shared * peak.value) if can_compute else None,
        memory=None if moved is None or bandwidth.value is None else moved * at_once / bandwidth.value,
        network=None if collectives is None else network_seconds(hardware, collectives),
        launches=None if launches is None or hardware.kernel_s is None else launches * hardware.kernel_s,
        sources={
            "peak_flops": f"{dtype}: {peak.source if peak.value is not None else peak.reason}",
            "bandwidth": bandwidth.source if bandwidth.value is not None else bandwidth.reason,
            **{key: hardware.sources[key] for key in ("link", "network", "kernel") if key in hardware.sources},
        },
    )


def network_seconds(hardware: Hardware, collectives: Sequence[Collective]) -> float:
    """Seconds of the collectives of a step in sequence; 0 where the devices share a memory."""
    if not hardware.link:
        return 0.0
    return sum(
        collective.times
        * collective.wire_bytes
        / min(hardwares.link_bandwidth(hardware, group).value for group in set(collective.groups))
        for collective in collectives
    )
