"""Whether the machine was this run's: the verdict by hand, against a real competitor, and stopped time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from efficientllm.metrics import conditions, cpu_counters
from efficientllm.metrics.conditions import Span
from efficientllm.metrics.pauses import PauseDetector
from efficientllm.record import timing_notes
from efficientllm.record.row import build_record, format_table

pytestmark = pytest.mark.quick

QUIET = {
    "wall_s": 10.0,
    "stopped_s": 0.0,
    "cpu_s": 18.0,
    "voluntary": 100,
    "involuntary": 10,
    "busy_s": 18.1,
    "idle_s": 1.9,
    "steal_s": 0.0,
    "throttled_s": 0.0,
    "pressure_s": 0.1,
    "waited_s": 3.0,
    "overheated": 0,
    "load": 1.0,
    "clock_mhz": None,
}


def span(**changes):
    return Span(**QUIET | changes)


@pytest.mark.parametrize(
    ("changes", "starved", "expected"),
    [
        ({}, False, ""),  # its own threads waited for each other, and nobody else had the cores
        ({"busy_s": 22.0}, True, "other programs"),
        ({"busy_s": 22.0, "waited_s": 0.2}, False, ""),  # others had cores that nobody here waited for
        ({"steal_s": 2.0}, True, "hypervisor"),
        ({"waited_s": None, "idle_s": 0.0, "busy_s": 20.0}, True, "other programs"),
        ({"waited_s": None, "busy_s": 19.5}, False, ""),
        ({"cpu_s": 0.5, "busy_s": 3.0, "waited_s": 0.1}, False, ""),  # waits for a device, hardly for a core
        ({"cpu_s": 0.5, "busy_s": 3.0, "waited_s": 1.0}, True, "10%"),
        ({"throttled_s": 1000.0}, True, "quota"),
        ({"overheated": 3}, True, "heat 3 times"),
        ({"faults": ("2 other process(es) on the GPU",)}, True, "on the GPU"),
        ({"stopped_s": 20.0}, False, ""),  # left out of the times, and said
        ({"busy_s": None, "steal_s": None}, None, "does not say"),
        ({"wall_s": 0.05}, None, "too coarse"),
    ],
)
def test_verdict(changes, starved, expected):
    verdict, reasons = conditions.verdict(span(**changes))
    assert verdict is starved and expected in "; ".join(reasons)


def test_what_cannot_be_read_is_null_with_a_reason_and_nothing_is_a_guess():
    readings = conditions.readings(span(busy_s=None, throttled_s=None, clock_mhz=None))
    assert readings.keys() == conditions.UNITS.keys()
    for key in ("others_fraction", "throttled_fraction", "cpu_clock_mhz", "lost_fraction", "device_clock_mhz"):
        assert readings[key].value is None and readings[key].reason
    assert readings["cores_used"].value == pytest.approx(1.8) and readings["switches_involuntary_per_s"].value == 1.0
    assert conditions.row(None)["starved"] is None


def test_windows_add_up_and_of_processes_the_worst_counts():
    whole = conditions.combine_spans([span(), span(wall_s=30.0, load=5.0, busy_s=40.0, faults=("hot",))])
    assert (whole.wall_s, whole.cpu_s, whole.busy_s, whole.load) == (40.0, 36.0, 58.1, 4.0)
    assert whole.faults == ("hot",) and conditions.combine_spans([]) is None
    worst = conditions.worst_span([span(), None, span(busy_s=22.0), span(stopped_s=3.0)])
    assert conditions.verdict(worst)[0] and worst.stopped_s == 3.0


def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_competitor_on_our_core_is_seen():
    """Half of the core goes to another process: about half of the time wanted is lost."""
    before, core = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        begin = cpu_counters.read_counters()
        work(1.5)
        span_of_test = conditions.span_between(begin, cpu_counters.read_counters())
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, before)
    assert conditions.lost_fraction(span_of_test) > 0.3 and conditions.verdict(span_of_test)[0] is True
    assert span_of_test.involuntary > 5


class Times:
    """Clocks that a test sets."""

    def __init__(self):
        self.now = self.cpu = self.away = 0.0
        self.waited = 0.0
        self.pulse = PauseDetector(
            lambda: self.now, lambda: self.cpu, lambda: self.away, lambda: {"thread": self.waited}
        )

    def beat(self, now=0.0, cpu=0.0, away=0.0, waited=0.0):
        self.now, self.cpu, self.away = self.now + now, self.cpu + cpu, self.away + away
        self.waited += waited
        return self.pulse.beat()


def test_stopped_time_is_a_late_beat_without_cpu_time():
    times = Times()
    assert times.beat(0.1, 0.2) == 0
    assert times.beat(5.0, 4.9) == 0, "busy, and its threads came late"
    assert times.beat(20.1, 0.05) == pytest.approx(20.0)
    assert times.beat(0.1, 0.1) == pytest.approx(20.0)
    assert times.beat(3.0, 0.1, waited=2.8) == pytest.approx(20.0), "others had the cores"
    assert times.beat(0.1, 0.1, away=3600.0) == pytest.approx(3620.0), "the machine slept"


STOPPED = """
import sys, threading, time
from efficientllm.metrics.pauses import PauseDetector
detector = PauseDetector()
print("ready", flush=True)
end = time.monotonic() + 3.0
while time.monotonic() < end:
    time.sleep(0.05)
    detector.beat()
print(detector.stopped_s)
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_knows_it():
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert float(process.communicate(timeout=30)[0]) == pytest.approx(1.4, abs=0.4)


def test_a_row_says_all_of_it():
    row = build_record(
        outcome="ok",
        name="x",
        task="pretrain",
        config={},
        provenance={},
        warm_up={"discarded_s": [1.0, 2.0], "settled": False, "interrupted_steps": 1},
        conditions=conditions.row(span(busy_s=22.0, stopped_s=20.0)),
    )
    assert row["conditions"]["starved"] is True and row["sources"]["stopped_s"]["unit"] == "s"
    text = " ".join(timing_notes.notes(row))
    for words in ("starved", "other programs", "stopped for 20.0 s", "not settled", "2 were discarded", "1 step(s)"):
        assert words in text
    table = format_table(row)
    assert table.count("note:") == 4 and max(map(len, table.splitlines())) <= 100
    assert timing_notes.notes({"outcome": "ok"}) == []
