"""The table of hardware, and what is refused of it."""

import json

import pytest

from efficientllm.cost import device_peaks, hardware_table
from efficientllm.errors import UserError
from efficientllm.plan import hardware, roofline
from efficientllm.plan.hlo_cost import Collective

pytestmark = pytest.mark.quick

NAMES = sorted(hardware_table.plannable_hardware())


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name):
    device = hardware.find(name, 1)
    assert set(device.sources) >= {"memory"} | ({"link", "power"} if device.plugin else set())
    assert device.network is None or "network" in device.sources
    if device.plugin:
        assert device.device_kind in device_peaks.PEAKS and device.memory_bytes > 1e10
        half = "float16" if device.capability == (7, 5) else "bfloat16"  # Turing has none of the latter
        assert device.peak_flops(half).value and device.bandwidth().value


@pytest.mark.parametrize(
    "spelling, name",
    [
        *(("gh200", "gh200_96"), ("h100_sxm", "h100"), ("tpu_v5e", "v5e"), ("a100_sxm_80", "a100"), ("b2", "b200")),
        *(
            ("H100", "h100"),
            ("RTX 4090", "rtx4090"),
            ("4090", "rtx4090"),
            ("rtx-3090", "rtx3090"),
            ("A6000", "rtx_a6000"),
        ),
        *(("NVIDIA GeForce RTX 5090", "rtx5090"), ("L40S", "l40s"), ("l4", "l4"), ("nvidia a10", "a10")),
    ],
)
def test_a_name_has_one_spelling_and_takes_others(spelling, name):
    assert hardware.find(spelling, 1).name == name


def test_names_that_are_none_or_many():
    assert "TPU v4" in device_peaks.PEAKS  # whose memory and links the table has not
    for name in ("h", "v4", "v5", "h300", "", "rtx", "nvidia"):
        with pytest.raises(UserError, match="no such hardware; known: .*gh200_96"):
            hardware.find(name, 1)


OWN = {"device_kind": "My Card", "memory_bytes": 2e10, "bandwidth": 1e12, "flops": {"bfloat16": 1e14}}


def test_hardware_of_one_s_own_is_a_file(tmp_path):
    file = tmp_path / "card.json"
    file.write_text(json.dumps(OWN))
    device = hardware.find(str(file), 1)
    assert (device.peak_flops("bfloat16").value, device.bandwidth().value, device.memory_bytes) == (1e14, 1e12, 2e10)
    assert device.peak_flops("float16").value is None and not device.has_compiler and device.capability == (0, 0)
    assert roofline.roofline(device, 1, "bfloat16", 1e14, 1e12, []).seconds == pytest.approx(1.0)
    for change, message in (
        ({"bandwidth": -1}, "bandwidth = -1: must be above 0 and finite"),
        ({"flops": {"bfloat16": "fast"}}, "flops of bfloat16 = 'fast'"),
        ({"flops": 3}, "flops = 3: must be a dict"),
        ({"tdp": 3}, "no fact 'tdp'"),
        ({"platform": "npu"}, "none of gpu, tpu"),
        ({"per_host": 0}, "per_host = 0"),
    ):
        file.write_text(json.dumps(OWN | change))
        with pytest.raises(UserError) as error:
            hardware.find(str(file), 1)
        assert message in str(error.value) and "config.plan.hardware = " in str(error.value)
    file.write_text("[]")
    with pytest.raises(UserError):
        hardware.find(str(file), 1)


@pytest.mark.parametrize(
    "name, count, message",
    [
        ("v5e", 6, "4, 8, 16"),
        ("h200", 12, "16 would do"),
        ("h200", 0, "least 1"),
        ("rtx4090", 9, "no network"),
        ("cpu", 2000, "at most 1,024"),
    ],
)
def test_numbers_that_hardware_does_not_come_in(name, count, message):
    with pytest.raises(UserError, match=message):
        hardware.check_count(hardware.find(name, 1), count)


def test_a_group_over_hosts_is_held_up_by_the_network():
    gh200 = hardware.find("gh200_96", 1)  # four a host, 450 GB/s inside, 25 GB/s an adapter

    def speed(*group):
        return hardware.link_bandwidth(gh200, group).value

    assert speed(0, 1, 2, 3) == 450e9
    assert speed(0, 4) == 25e9
    assert speed(*range(8)) == 4 * 25e9
    assert speed(3, 4) == 25e9
    assert hardware.link_bandwidth(hardware.find("v5e", 1), range(256)).value == 200e9


def test_the_sides_of_a_roofline():
    h200 = hardware.find("h200", 8)
    sum_of_gradients = Collective("all-reduce", 2, 8e9, (tuple(range(8)),))
    seconds = roofline.roofline(h200, 8, "bfloat16", 8 * 989e12, 9.6e9, [sum_of_gradients])
    assert seconds.compute == pytest.approx(1.0)
    assert seconds.memory == pytest.approx(0.002)
    assert seconds.network == pytest.approx(2 * 8e9 * 2 * 7 / 8 / 450e9)
    assert (seconds.bound, seconds.seconds) == ("compute", seconds.compute)
    many = roofline.roofline(h200, 8, "bfloat16", 8 * 989e9, 9.6e9, [], launches=5000)
    assert many.launches == pytest.approx(0.005) and many.bound == "launches" and "H100" in many.sources["kernel"]
    unknown = roofline.roofline(hardware.find("b200", 1), 1, "float32", 1e12, None, None, launches=5000)
    assert unknown.sides == {} and unknown.seconds is None and unknown.bound is None


def test_a_gpu_is_described_to_its_compiler():
    text = hardware.target_config(hardware.find("b200", 1))
    assert "core_count: 148" in text and "major: 10 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "feature_extension" not in hardware.target_config(hardware.find("a100", 1))
