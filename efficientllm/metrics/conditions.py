"""Conditions of a measured window: CPU time lost to other programs, quotas, pauses, clocks, and a verdict.

The time of a `starved` window measures the load of the machine, not the technique. The verdict rests on
`lost_fraction`, the share by which other programs lengthened the window:

    lost CPU time / max(wall time, CPU time used + lost CPU time)

Lost CPU time is the time that threads of this process waited for a core, at most the CPU time that other programs or
the hypervisor had meanwhile. LOST = 5 % is above what the daemons of a quiet machine take (under 1 %) and above the
margin within which two results count as equal (2 %).
"""

import dataclasses
import typing
from collections.abc import Iterable, Sequence

from efficientllm.metrics import cpu_counters, host
from efficientllm.metrics.reading import Reading, missing, reading_or_missing
from efficientllm.metrics.sampler import Averages

Counters = dict[str, typing.Any]  # of `cpu_counters.read_counters`
LOST = 0.05
SHORTEST_S = 0.1  # the kernel counts CPU time in ticks of 10 ms: ten of them give one digit
UNITS = {
    "window_s": "s",
    "lost_fraction": "1",
    "others_fraction": "1",
    "stolen_fraction": "1",
    "throttled_fraction": "1",
    "pressure_fraction": "1",
    "cores_used": "1",
    "switches_involuntary_per_s": "1/s",
    "switches_voluntary_per_s": "1/s",
    "load_1m": "1",
    "stopped_s": "s",
    "cpu_clock_mhz": "MHz",
    "device_clock_mhz": "MHz",
    "power_capped_fraction": "1",
}
_SUMMED = ("cpu_s", "voluntary", "involuntary", "busy_s", "idle_s", "steal_s", "throttled_s", "pressure_s")


@dataclasses.dataclass(frozen=True)
class Span:
    """Differences of the CPU counters over one or more windows of `wall_s` seconds; None where unreadable.

    `wall_s` excludes stopped time. `faults` are an energy reader's descriptions of what disturbed the devices.
    """

    wall_s: float
    stopped_s: float
    cpu_s: float
    voluntary: int
    involuntary: int
    busy_s: float | None
    idle_s: float | None
    steal_s: float | None
    throttled_s: float | None
    pressure_s: float | None
    waited_s: float | None
    overheated: int | None
    load: float | None
    clock_mhz: float | None
    faults: tuple[str, ...] = ()

    @property
    def others_s(self) -> float | None:
        """CPU time that other programs used on the cores that this process may use."""
        return None if self.busy_s is None else max(0.0, self.busy_s - self.cpu_s)

    @property
    def lost_s(self) -> float | None:
        """CPU time that this process waited for while others used the cores, or None if unknown."""
        if self.others_s is None:
            return None
        taken = self.others_s + self.steal_s
        if (
            self.waited_s is None
        ):  # no run-queue delays on this kernel: assume that this process could have used idle cores
            return max(0.0, taken - self.idle_s)
        return min(taken, self.waited_s)


def span_between(begin: Counters, end: Counters, stopped_s: float = 0.0, faults: Iterable[str] = ()) -> Span:
    """The Span between two results of `cpu_counters.read_counters()`."""
    differences = {key: _less(end[key], begin[key]) for key in _SUMMED}
    before, after = begin["waited_s"] or {}, end["waited_s"]
    waited = None if after is None else sum(delay - before.get(thread, 0.0) for thread, delay in after.items())
    return Span(
        wall_s=max(0.0, end["at"] - begin["at"] - stopped_s),
        stopped_s=stopped_s,
        **differences,
        waited_s=waited,
        overheated=_less(end["overheated"], begin["overheated"]),
        load=cpu_counters.load_average(),
        clock_mhz=cpu_counters.clock_mhz(),
        faults=tuple(faults),
    )


def combine_spans(spans: Sequence[Span]) -> Span | None:
    """Merges the Spans of several windows of one run; None for an empty list."""
    if not spans:
        return None
    means = ("load", "clock_mhz")
    fields = [field.name for field in dataclasses.fields(Span) if field.name not in (*means, "faults")]
    totals = {key: _sum([getattr(span, key) for span in spans]) for key in fields}
    wall_s = totals["wall_s"]
    for key in means:
        weighted = _sum([_times(getattr(span, key), span.wall_s) for span in spans])
        totals[key] = weighted / wall_s if weighted is not None and wall_s else getattr(spans[-1], key)
    return Span(**totals, faults=tuple(dict.fromkeys(fault for span in spans for fault in span.faults)))


def worst_span(spans: Sequence[Span | None]) -> Span | None:
    """The Span of the process that lost most, with the faults of all processes: a step waits for the slowest."""
    spans_read = [span for span in spans if span is not None]
    if not spans_read:
        return None
    worst = max(spans_read, key=lambda span: lost_fraction(span) or 0.0)
    stopped = max(span.stopped_s for span in spans_read)
    faults = tuple(dict.fromkeys(fault for span in spans_read for fault in span.faults))
    return dataclasses.replace(worst, stopped_s=stopped, faults=faults)


def lost_fraction(span: Span) -> float | None:
    """Share by which other programs lengthened the window; None where the counters do not say."""
    if span.lost_s is None or span.wall_s < SHORTEST_S:
        return None
    return span.lost_s / max(span.wall_s, span.cpu_s + span.lost_s)


def verdict(span: Span | None) -> tuple[bool | None, list[str]]:
    """`(starved, reasons)`: True, False, or None where nothing could be read."""
    if span is None:
        return None, ["no finished work was measured"]
    reasons = list(span.faults)
    lost, throttled = lost_fraction(span), _per(span.throttled_s, span.wall_s * host.usable_cores())
    if lost is not None and lost > LOST:
        reasons.append(f"{lost:.0%} of the CPU time that it wanted went to other programs or the hypervisor")
    if throttled is not None and throttled > LOST:
        reasons.append(f"the quota of its cgroup held its threads back for {throttled:.0%} of the cores' time")
    if span.overheated:
        reasons.append(f"the cores slowed down for heat {span.overheated} times")
    if reasons:
        return True, reasons
    return (None, [_unknown(span)]) if lost is None else (False, [])


def readings(span: Span | None, averages: Averages | None = None) -> dict[str, Reading]:
    """A Reading for every key of UNITS; `averages` (`sampler.Averages`) holds the devices' clocks."""
    if span is None:
        return {key: missing(unit, "no finished work was measured") for key, unit in UNITS.items()}
    wall, cores = span.wall_s, host.usable_cores()
    elapsed = wall + span.stopped_s  # other programs ran on while this process was stopped
    lost_source = "CPU time waited for while others had the cores, over the time wanted"
    kernel_source, reason = f"/proc/stat, {cores} cores", "not readable here"
    values = {
        "window_s": (wall, "measured windows, wall clock"),
        "lost_fraction": (lost_fraction(span), lost_source),
        "others_fraction": (_per(span.others_s, elapsed * cores), kernel_source),
        "stolen_fraction": (_per(span.steal_s, elapsed * cores), kernel_source),
        "throttled_fraction": (_per(span.throttled_s, elapsed * cores), "cpu.stat of the cgroup"),
        "pressure_fraction": (_per(span.pressure_s, elapsed), "/proc/pressure/cpu, some"),
        "cores_used": (_per(span.cpu_s, wall), "CPU time of the process over wall time"),
        "switches_involuntary_per_s": (_per(span.involuntary, wall), "getrusage"),
        "switches_voluntary_per_s": (_per(span.voluntary, wall), "getrusage"),
        "load_1m": (span.load, "load average of a minute"),
        "stopped_s": (span.stopped_s, "clocks that nobody could read meanwhile; left out of times"),
        "cpu_clock_mhz": (span.clock_mhz, "cpufreq, at the edges of windows"),
        "device_clock_mhz": (averages and averages.device_clock_mhz, "nvml, mean over devices and time"),
        "power_capped_fraction": (averages and averages.power_capped, "nvml, share of the samples"),
    }
    readings_by_key = {
        key: reading_or_missing(value, UNITS[key], source, reason) for key, (value, source) in values.items()
    }
    if readings_by_key["lost_fraction"].value is None:
        readings_by_key["lost_fraction"] = missing("1", _unknown(span))
    return readings_by_key


def row(span: Span | None, averages: Averages | None = None) -> dict[str, typing.Any]:
    """The row's group `conditions`: `{"starved": bool or None, "reasons": [...], key: Reading, ...}`."""
    starved, reasons = verdict(span)
    return {"starved": starved, "reasons": reasons, **readings(span, averages)}


def unmeasured(reason: str) -> dict[str, typing.Any]:
    """The row's group `conditions` of a run without a measured window."""
    return {"starved": None, "reasons": [reason], **{key: missing(unit, reason) for key, unit in UNITS.items()}}


def _unknown(span):
    if span.wall_s < SHORTEST_S:
        return f"windows of {span.wall_s:.2g} s are shorter than {SHORTEST_S:g} s, and the kernel's ticks too coarse"
    return "this system does not say who had the cores"


def _less(after, before):
    return None if after is None or before is None else after - before


def _times(value, seconds):
    return None if value is None else value * seconds


def _sum(values):
    numbers = [value for value in values if value is not None]
    return sum(numbers) if numbers else None


def _per(value, whole):
    return value / whole if value is not None and whole else None
