"""`EnergyReader`, the interface of energy readers, and `EnergyWindow`, the energy of a measured window."""

import contextlib
import dataclasses
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class EnergyWindow:
    """Energy of a window, summed over all devices of its reader.

    energy_j, mean_power_w: None where the window is void.
    duration_s:  wall time from start to stop.
    source:      such as `nvml energy counter`, `nvml averaged power`, `meter`, or `unavailable`.
    scope:       what was metered: `gpu`, `module` (GPU, CPU and memory of a superchip), `node`, or None. Energies of
                 different scopes are never compared.
    kind:        `measured` (a counter), `sampled` (integrated power) or `unavailable`.
    error_bound: relative, from the edges of the window only; None where the window is void.
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


def unavailable_window(reason: str, duration_s: float = 0.0) -> EnergyWindow:
    """A window without energy, with the reason."""
    return EnergyWindow(None, None, duration_s, "unavailable", None, "unavailable", None, reason)


COMPILED = "a program was compiled inside the window"
STOPPED = "the process was stopped for {:.1f} s inside the window"


def void_window(window: EnergyWindow, reason: str) -> EnergyWindow:
    """The window with its energy removed, for `reason`; a window that is void already keeps its reason."""
    if window.energy_j is None:
        return window
    return dataclasses.replace(window, energy_j=None, mean_power_w=None, error_bound=None, reason=reason)


def combine_windows(windows: Sequence[EnergyWindow]) -> EnergyWindow:
    """Merges windows of one reader: durations and energies are summed; void if any window is.

    Raises ValueError for windows of different sources or scopes, which must not be added up.
    """
    if not windows:
        return unavailable_window("no finished work was measured")
    first = windows[0]
    if any((window.source, window.scope) != (first.source, first.scope) for window in windows):
        raise ValueError("windows of different sources or scopes are not added up")
    duration_s = sum(window.duration_s for window in windows)
    reason = next((window.reason for window in windows if window.reason), None)
    if reason:
        return dataclasses.replace(
            first, energy_j=None, mean_power_w=None, duration_s=duration_s, error_bound=None, reason=reason
        )
    energy_j = sum(window.energy_j for window in windows)
    return dataclasses.replace(
        first,
        energy_j=energy_j,
        mean_power_w=energy_j / duration_s,
        duration_s=duration_s,
        error_bound=sum(window.error_bound * window.energy_j for window in windows) / energy_j,
    )


def sum_over_processes(windows: Sequence[EnergyWindow]) -> EnergyWindow:
    """Merges the windows of all processes over the same work: energies are summed, the longest duration counts.

    Each process reads its local devices. Void if any window is, or if their sources or scopes differ.
    """
    first, duration_s = windows[0], max(window.duration_s for window in windows)
    if any((window.source, window.scope) != (first.source, first.scope) for window in windows):
        return unavailable_window("the processes read energy from different sources or scopes", duration_s)
    whole = combine_windows(windows)
    power_w = None if whole.energy_j is None else whole.energy_j / duration_s
    return dataclasses.replace(whole, duration_s=duration_s, mean_power_w=power_w)


class EnergyReader:
    """Interface of energy readers. The base class itself serves devices without a counter; `reason` says why."""

    source, kind = "unavailable", "unavailable"
    scope: str | None = None
    telemetry: str | None = None  # the source of `sample`; None if it reads nothing
    passed_over: tuple[str, ...] = ()  # better sources that were tried first, with the reasons for which they failed

    def __init__(self, reason: str | None, clock: Callable[[], float] = time.monotonic):
        self.reason = reason
        self._clock = clock
        self._started: float | None = None

    def sample(self) -> dict[str, float | None]:
        """Reads the devices now: `power_w` and `memory_bytes` summed, mean `utilisation` 0..1.

        Where readable also the mean `clock_mhz`, and `power_capped`: the share of devices at their power limit.
        """
        return {"power_w": None, "memory_bytes": None, "utilisation": None}

    def memory_total_bytes(self) -> float | None:
        """Memory of all devices, summed, or None."""
        return None

    def describe(self) -> dict[str, typing.Any]:
        """Device facts for the provenance: UUIDs, driver, power limits, clocks."""
        return {}

    def faults(self) -> tuple[str, ...]:
        """Descriptions of what disturbed the devices since the last window was opened."""
        return ()

    def start(self) -> None:
        """Opens a window. The work before it must be finished. Raises RuntimeError if one is open."""
        self._forbid_open()
        self._started = self._clock()

    def stop(self) -> EnergyWindow:
        """Closes the window and returns it. Its work must be finished. Raises RuntimeError if no window is open."""
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
    def window(self) -> Iterator[types.SimpleNamespace]:
        """Opens a window for a `with` block; the yielded object holds the EnergyWindow in `.result` afterwards."""
        holder = types.SimpleNamespace(result=None)
        self.start()
        try:
            yield holder
        finally:
            holder.result = self.stop()
