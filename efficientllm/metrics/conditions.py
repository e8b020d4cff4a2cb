"""How much of the machine a measured window got: CPU time lost to others, limits, stops, clocks, and a verdict.

A row whose window was `starved` says how long its work takes beside other work, and nothing of its technique. The
verdict's one number is `lost_fraction`, the share by which the window is longer for other programs' sake: the CPU time
that this process's threads waited for a core, as far as others (or the hypervisor) had the cores meanwhile, over the
CPU time that it wanted, or over the wall time where it wanted less than one core. LOST = 5 % is above the daemons of a
quiet machine (under 1 %) and the margin that counts as equal (2 %), so that a verdict of either size is not theirs.
"""

import dataclasses

from efficientllm.metrics import counters, host
from efficientllm.metrics.reading import missing, reading_or_missing

LOST = 0.05
SHORTEST_S = 0.1  # the kernel counts cores in ticks of 10 ms: less than ten of them say nothing
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
    """What the counters moved over one or more windows of `wall_s` seconds, None where unreadable.

    Stopped time is no part of `wall_s`. `faults` are a reader's words for what disturbed the devices.
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
    faults: tuple = ()

    @property
    def others_s(self):
        """CPU time that other programs had of this process's cores."""
        return None if self.busy_s is None else max(0.0, self.busy_s - self.cpu_s)

    @property
    def lost_s(self):
        """CPU time that this process wanted and others had, or None.

        Without the kernel's word for how long threads waited: what others had beyond what was idle.
        """
        if self.others_s is None:
            return None
        taken = self.others_s + self.steal_s
        return max(0.0, taken - self.idle_s) if self.waited_s is None else min(taken, self.waited_s)


def read():
    """The counters at this moment, to hand to `between`."""
    return counters.read()


def between(begin, end, stopped_s=0.0, faults=()):
    """The Span from one `read()` to another."""
    summed = {key: _less(end[key], begin[key]) for key in _SUMMED}
    before, after = begin["waited_s"] or {}, end["waited_s"]
    waited = None if after is None else sum(delay - before.get(thread, 0.0) for thread, delay in after.items())
    return Span(
        wall_s=max(0.0, end["at"] - begin["at"] - stopped_s),
        stopped_s=stopped_s,
        **summed,
        waited_s=waited,
        overheated=_less(end["overheated"], begin["overheated"]),
        load=counters.load(),
        clock_mhz=counters.clock_mhz(),
        faults=tuple(faults),
    )


def combine(spans):
    """Several windows of one run as one, or None for none."""
    if not spans:
        return None
    means = ("load", "clock_mhz")
    fields = [field.name for field in dataclasses.fields(Span) if field.name not in (*means, "faults")]
    whole = {key: _sum([getattr(span, key) for span in spans]) for key in fields}
    wall = whole["wall_s"]
    for key in means:
        weighted = _sum([_times(getattr(span, key), span.wall_s) for span in spans])
        whole[key] = weighted / wall if weighted is not None and wall else getattr(spans[-1], key)
    return Span(**whole, faults=tuple(dict.fromkeys(fault for span in spans for fault in span.faults)))


def over_processes(spans):
    """The Spans of all processes of a run as one: the worst of them decides, as a step waits for the slowest."""
    known = [span for span in spans if span is not None]
    if not known:
        return None
    worst = max(known, key=lambda span: lost_fraction(span) or 0.0)
    stopped = max(span.stopped_s for span in known)
    faults = tuple(dict.fromkeys(fault for span in known for fault in span.faults))
    return dataclasses.replace(worst, stopped_s=stopped, faults=faults)


def lost_fraction(span):
    """The share by which the window is longer for other programs' sake; None where the counters do not say."""
    if span.lost_s is None or span.wall_s < SHORTEST_S:
        return None
    return span.lost_s / max(span.wall_s, span.cpu_s + span.lost_s)


def verdict(span):
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


def readings(span, averages=None):
    """Every key of UNITS as a Reading; `averages` (`sampler.Averages`) knows the devices' clocks."""
    if span is None:
        return {key: missing(unit, "no finished work was measured") for key, unit in UNITS.items()}
    wall, cores = span.wall_s, host.usable_cores()
    elapsed = wall + span.stopped_s  # in which the others went on
    lost_of = "CPU time waited for while others had the cores, over the time wanted"
    kernel, unread = f"/proc/stat, {cores} cores", "not readable here"
    values = {
        "window_s": (wall, "measured windows, wall clock"),
        "lost_fraction": (lost_fraction(span), lost_of),
        "others_fraction": (_per(span.others_s, elapsed * cores), kernel),
        "stolen_fraction": (_per(span.steal_s, elapsed * cores), kernel),
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
    found = {key: reading_or_missing(value, UNITS[key], source, unread) for key, (value, source) in values.items()}
    if found["lost_fraction"].value is None:
        found["lost_fraction"] = missing("1", _unknown(span))
    return found


def row(span, averages=None):
    """The row's group: `{"starved": bool or None, "reasons": [...], key: Reading, ...}`."""
    starved, reasons = verdict(span)
    return {"starved": starved, "reasons": reasons, **readings(span, averages)}


def unmeasured(reason):
    """The row's group of a run that measured nothing."""
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
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _per(value, whole):
    return value / whole if value is not None and whole else None
