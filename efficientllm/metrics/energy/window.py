"""What an energy reader is and what its windows give; the readers themselves are in energy.py and nvml_energy.py."""

import contextlib
import dataclasses
import time
import types


@dataclasses.dataclass(frozen=True)
class EnergyWindow:
    """Energy of one window over all devices of the reader.

    energy_j, mean_power_w: None where the window is void.
    duration_s:  wall time from start to stop.
    source:      `nvml energy counter`, `nvml instantaneous power`, `nvml averaged power` or `unavailable`.
    scope:       what was metered: `gpu`, `module` (GPU, CPU and memory of a superchip), or None. Never compared mixed.
    kind:        `measured` (a counter), `sampled` (integrated power) or `unavailable`.
    error_bound: relative, from the edges of the window alone; None where the window is void.
    reason:      why the window is void, else None.
    """

    energy_j: float | None
    mean_power_w: float | None
    duration_s: float
    source: str
    scope: str | None
    kind: str
    error_bound: float | None
    reason: str | None


def unavailable(reason, duration_s=0.0):
    """A window without energy, and why."""
    return EnergyWindow(None, None, duration_s, "unavailable", None, "unavailable", None, reason)


COMPILED = "a program was compiled inside the window"
STOPPED = "the process was stopped for {:.1f} s inside the window"


def void(window, reason):
    """The window without its energy, if it had any, and why."""
    if window.energy_j is None:
        return window
    return dataclasses.replace(window, energy_j=None, mean_power_w=None, error_bound=None, reason=reason)


def combine(windows):
    """Several windows of one reader as one, their durations and energies summed; void if any of them is.

    Raises ValueError for windows of different sources or scopes, which must not be added up.
    """
    if not windows:
        return unavailable("no finished work was measured")
    first = windows[0]
    if any((each.source, each.scope) != (first.source, first.scope) for each in windows):
        raise ValueError("windows of different sources or scopes are not added up")
    duration_s = sum(each.duration_s for each in windows)
    reason = next((each.reason for each in windows if each.reason), None)
    if reason:
        return dataclasses.replace(
            first, energy_j=None, mean_power_w=None, duration_s=duration_s, error_bound=None, reason=reason
        )
    energy_j = sum(each.energy_j for each in windows)
    return dataclasses.replace(
        first,
        energy_j=energy_j,
        mean_power_w=energy_j / duration_s,
        duration_s=duration_s,
        error_bound=sum(each.error_bound * each.energy_j for each in windows) / energy_j,
    )


def over_processes(windows):
    """The windows of all processes over the same work as one: energy summed, over the longest of their durations.

    Each process has read its own devices. Void if any window is, or if their sources or scopes differ.
    """
    first, duration_s = windows[0], max(each.duration_s for each in windows)
    if any((each.source, each.scope) != (first.source, first.scope) for each in windows):
        return unavailable("the processes read energy from different sources or scopes", duration_s)
    whole = combine(windows)
    power_w = None if whole.energy_j is None else whole.energy_j / duration_s
    return dataclasses.replace(whole, duration_s=duration_s, mean_power_w=power_w)


class Reader:
    """What every reader does; by itself the reader of devices whose energy cannot be read, and `reason` says why."""

    source, kind = "unavailable", "unavailable"
    scope: str | None = None
    telemetry: str | None = None  # what `sample` reads from, None where it reads nothing
    passed_over = ()  # better sources that were tried first, and why each was not used

    def __init__(self, reason, clock=time.monotonic):
        self.reason = reason
        self._clock = clock
        self._started = None

    def sample(self):
        """Readings of this moment: `power_w` and `memory_bytes` summed over devices, mean `utilisation` 0..1.

        Where they can be read also the mean `clock_mhz` and the share of devices that a limit holds down,
        `power_capped`.
        """
        return {"power_w": None, "memory_bytes": None, "utilisation": None}

    def memory_total_bytes(self):
        """Memory of all devices together, or None."""
        return None

    def describe(self):
        """What provenance records of the devices: UUIDs, driver, power limits, clocks."""
        return {}

    def faults(self):
        """What disturbed the devices since the last window was opened, in words."""
        return ()

    def start(self):
        """Opens a window. The work before it must be finished. Raises RuntimeError if one is open."""
        self._forbid_open()
        self._started = self._clock()

    def stop(self):
        """Closes the window, whose work must be finished, as an EnergyWindow. Raises RuntimeError if none is open."""
        return self._close(self._duration(), reason=self.reason)

    def _forbid_open(self):
        if self._started is not None:
            raise RuntimeError("an energy window is open: stop() it first")

    def _duration(self):
        if self._started is None:
            raise RuntimeError("no energy window is open: start() one first")
        return self._clock() - self._started

    def _close(self, duration_s, power_w=None, error_bound=None, reason=None):
        self._started = None
        energy_j = None if power_w is None else power_w * duration_s
        return EnergyWindow(energy_j, power_w, duration_s, self.source, self.scope, self.kind, error_bound, reason)

    @contextlib.contextmanager
    def window(self):
        """A `with` block as a window; the object it gives holds the EnergyWindow in `.result` afterwards."""
        holder = types.SimpleNamespace(result=None)
        self.start()
        try:
            yield holder
        finally:
            holder.result = self.stop()
