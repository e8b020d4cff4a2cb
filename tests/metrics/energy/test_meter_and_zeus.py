"""Meters, other libraries' counters and idle power, on clocks and counters of our own."""

import types

import pytest

from efficientllm.errors import UserError
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.energy.meter_and_zeus import MeterReader, ZeusReader
from efficientllm.metrics.energy.window import EnergyReader

pytestmark = pytest.mark.quick


class Clock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def meter(tmp_path, rows, header="time,watts\n"):
    file = tmp_path / "watts.csv"
    file.write_text(header + "".join(f"{at},{watts}\n" for at, watts in rows))
    return file


def test_a_meters_samples_are_integrated_between_the_edges(tmp_path):
    clock = Clock(1000.5)
    # 100 W, then a ramp to 200 W between 1002 and 1003, then 200 W.
    rows = [(1000 + i, 100 if i < 3 else 200) for i in range(10)]
    reader = MeterReader(meter(tmp_path, rows), clock, clock.sleep)
    reader.start()
    clock.now = 1005.5
    window = reader.stop()
    assert window.energy_j == pytest.approx(1.5 * 100 + 150 + 2.5 * 200)
    assert window.mean_power_w == pytest.approx(800 / 5)
    assert (window.source, window.scope, window.kind) == ("meter", "node", "sampled")
    assert window.error_bound == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([(1003, 1), (1020, 1)], "no samples on both sides"),
        ([(999, 1), (1003, 1)], "no samples on both sides"),
        ([(999, 1), (1001, 1), (1009, 1), (1011, 1)], "a gap of 8.0 s"),
    ],
)
def test_a_window_that_the_meter_missed_is_void(rows, reason, tmp_path):
    clock = Clock()
    reader = MeterReader(meter(tmp_path, rows), clock, lambda seconds: None)
    reader.start()
    clock.now = 1010.0
    window = reader.stop()
    assert window.energy_j is None and reason in window.reason


def test_a_bad_meter_file_is_named_by_line(tmp_path):
    with pytest.raises(UserError, match="line 3: rows of unix time in s and W are needed, not 'x,y'"):
        MeterReader(meter(tmp_path, [(1, 2), ("x", "y"), (3, 4)]))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        MeterReader(tmp_path / "nothing.csv")


def test_counters_are_subtracted_and_a_reset_voids_the_window():
    counts, clock = {"package": 10.0, "dram": 1.0}, Clock()
    reader = ZeusReader({name: lambda name=name: counts[name] for name in counts}, "cpu", "zeus (RAPL)", clock=clock)
    with reader.window() as window:
        counts.update(package=30.0, dram=3.0)
        clock.now += 2
    assert window.result.energy_j == pytest.approx(22.0) and window.result.mean_power_w == pytest.approx(11.0)
    with reader.window() as window:
        counts.update(package=5.0)
        clock.now += 2
    assert window.result.energy_j is None and "package was reset" in window.result.reason
    with reader.window() as window:
        clock.now += 2
    assert window.result.energy_j is None and "no counter moved" in window.result.reason


def test_idle_power_is_measured_only_where_there_is_energy_to_read():
    clock, counts = Clock(), [0.0]

    def rest(seconds):
        clock.now += seconds
        counts[0] += 50 * seconds

    reader = ZeusReader({"x": lambda: counts[0]}, "cpu", "test", clock=clock)
    idle = energy.idle_power(reader, sleep=rest)
    assert idle.power_w == pytest.approx(50.0) and not idle.drifted
    assert (
        idle.compared(energy.IdlePower(53.0, None)).drifted and not idle.compared(energy.IdlePower(52.0, None)).drifted
    )

    def never(seconds):
        raise AssertionError("it waited")

    assert energy.idle_power(EnergyReader("no counter"), sleep=never) == energy.IdlePower(None, "no counter")


def test_a_meter_goes_before_every_counter(tmp_path):
    device = types.SimpleNamespace(platform="cpu")
    reader = energy.open_reader([device], meter=str(meter(tmp_path, [(1, 2)])))
    assert isinstance(reader, MeterReader)
