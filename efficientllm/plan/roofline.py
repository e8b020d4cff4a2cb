"""The least time a step can take: what it computes, moves and sends over what the hardware does at best.

A roofline (Williams et al. 2009, doi:10.1145/1498765.1498785) with two sides more: the network, and on GPUs the least
time of as many kernels, one after another. Each side alone is a lower bound of a step; the greatest is the time of one
that overlaps them wholly, their sum of one that does not at all.
"""

import dataclasses

from efficientllm.plan import hardware as hardwares


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of each side, None where it is not known, and where the figures come from."""

    compute: float | None
    memory: float | None
    network: float | None
    launches: float | None
    sources: dict

    @property
    def sides(self):
        """The known sides, `{name: seconds}`."""
        found = {side: getattr(self, side) for side in ("compute", "memory", "network", "launches")}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    @property
    def seconds(self):
        return max(self.sides.values(), default=None)

    @property
    def bound(self):
        """The name of the greatest side."""
        return max(self.sides, key=self.sides.get, default=None)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Programs one after another: pairs of (how often it runs, its Roofline)."""

    links: tuple

    @property
    def sides(self):
        """Seconds of each side that every link knows."""
        shared = [side for side in self.links[0][1].sides if all(side in line.sides for _, line in self.links)]
        return {side: sum(times * line.sides[side] for times, line in self.links) for side in shared}

    @property
    def seconds(self):
        """Each link by its own greatest side: more than the greatest of the sums."""
        values = [(times, line.seconds) for times, line in self.links]
        return None if any(value is None for _, value in values) else sum(times * value for times, value in values)

    @property
    def bound(self):
        """That of the link which takes longest."""
        if self.seconds is None:
            return None
        return max(self.links, key=lambda link: link[0] * link[1].seconds)[1].bound

    @property
    def sources(self):
        return self.links[0][1].sources


def roofline(hardware, count, dtype, flops, moved, collectives, launches=None):
    """The Roofline of a step.

    `flops` are of all devices, `moved` bytes, the `collectives` and the kernels that are launched of one; None for
    what is not known.
    """
    peak, bandwidth = hardware.peak_flops(dtype), hardware.bandwidth()
    known = peak.value is not None and flops is not None
    shared = 1 if hardware.platform == "cpu" else count  # the CPU devices of a process share its cores
    at_once = count if hardware.platform == "cpu" else 1
    return Roofline(
        compute=flops / (shared * peak.value) if known else None,
        memory=None if moved is None or bandwidth.value is None else moved * at_once / bandwidth.value,
        network=None if collectives is None else network_seconds(hardware, collectives),
        launches=None if launches is None or hardware.kernel_s is None else launches * hardware.kernel_s,
        sources={
            "peak_flops": f"{dtype}: {peak.source if peak.value is not None else peak.reason}",
            "bandwidth": bandwidth.source if bandwidth.value is not None else bandwidth.reason,
            **{key: hardware.sources[key] for key in ("link", "network", "kernel") if key in hardware.sources},
        },
    )


def network_seconds(hardware, collectives):
    """Seconds that the collectives of a step take one after another; 0 on devices of one memory."""
    if not hardware.link:
        return 0.0
    return sum(
        one.times * one.wire_bytes / min(hardwares.link_bandwidth(hardware, group).value for group in set(one.groups))
        for one in collectives
    )
