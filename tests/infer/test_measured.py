"""Repeats within which the process was stopped or compiled count for nothing, and a baseline is scored on one text."""

import dataclasses

import jax
import numpy as np
import pytest

from efficientllm.config.presets import infer as preset
from efficientllm.errors import UserError
from efficientllm.infer import measure, row
from efficientllm.metrics import compiles
from efficientllm.metrics.energy import reader as energy
from efficientllm.objectives.next_token import NEXT_TOKEN
from report import made


@dataclasses.dataclass
class Carry:
    positions_B: object

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Engine:
    """Does nothing, and calls `event` at the call of that number."""

    def __init__(self, number, event):
        self.calls, self._number, self._event = 0, number, event

    def _call(self):
        self.calls += 1
        if self.calls == self._number:
            self._event()

    def prefill(self, prompts):
        self._call()
        return Carry(jax.numpy.full(len(prompts), len(prompts[0])))

    def decode(self, carry, prompts, steps):
        self._call()
        return carry, np.zeros((len(prompts), steps))


class Sampler:
    """Stopped for as long as a test says."""

    stopped = 0.0

    def mark(self):
        return self.stopped

    def since(self, mark):
        from efficientllm.metrics.sampler import Averages

        return Averages(1.0, 1.0, 0.1, "x", 0.5, "x", 1.0, None, stopped_s=self.stopped - mark)

    def stopped_s(self):
        return self.stopped


def measured(number, event, sampler):
    reader = energy.open_reader(jax.local_devices())
    return measure.measure(Engine(number, event), np.arange(1000), 1, 8, 2, 3, reader, sampler)


@pytest.mark.parametrize("number", [5, 6, 12, 15])
def test_a_repeat_that_was_stopped_is_made_again(number):
    """Calls 5 and 6 are the first measured prefill and decoding; 12 and 15 lie among single steps."""
    sampler = Sampler()

    def stop():
        sampler.stopped += 20.0

    repeats = measured(number, stop, sampler)
    assert repeats.interrupted == 1 and repeats.span.stopped_s == 20.0
    assert len(repeats.prefill_s) == len(repeats.decode_s) == 3 and max(repeats.requests_s) < 10
    again = row.warm_up_and_conditions(repeats)
    assert again["warm_up"]["interrupted_steps"] == 1 and again["conditions"]["stopped_s"].value == 20.0


def test_a_repeat_that_compiled_is_made_again():
    compiles.count_programs()
    repeats = measured(5, lambda: jax.jit(lambda x: x * 3.25 + 1.5)(np.ones(3)), Sampler())
    assert repeats.interrupted == 1 and len(repeats.prefill_s) == 3


def test_the_tower_is_measured_apart_and_its_energy_is_that_of_an_image():
    """Three rows of two images in ten encodings, 60 images at 12 J and at rest 4 J."""
    calls, (reader, sampler) = [], (energy.open_reader(jax.local_devices()), Sampler())
    images = measure.Images(lambda: calls.append(1), 2, 8e9)
    repeats = measure.measure(
        Engine(0, None), np.arange(99), 3, 8, 2, 4, reader, sampler, prompts=[[1] * 8], images=images
    )
    assert len(repeats.images.encode_s) == 4 and repeats.images.encodings == len(calls) - 1 >= 4
    window = energy.EnergyWindow(720.0, 36.0, 20.0, "meter", "node", "measured", 0.01, None)
    given = dataclasses.replace(repeats.images, encode_s=[0.3, 0.1, 0.2], encodings=10, energy=window)
    readings = row.of_images(dataclasses.replace(repeats, images=given), energy.IdlePower(12.0, None))
    values = {key: reading.value for key, reading in readings.items()}
    assert values == {"image_encode_s": 0.2, "flops_per_image": 4e9, "j_per_image": 12.0, "j_per_image_net": 8.0}
    assert row.of_images(dataclasses.replace(repeats, images=None), energy.IdlePower(12.0, None)) == {}


@pytest.mark.parametrize(
    ("told", "changes", "message"),
    [
        ({"data": {"fingerprint": "a"}}, {}, None),
        ({"data": {"fingerprint": "b"}}, {}, "its data is b, and here it is a"),
        ({}, {"data": "text(path='x')"}, "its data is text"),
        ({"data": {"fingerprint": "a"}}, {"eval.batches": 3}, "its eval.batches is 3"),
    ],
)
def test_a_baseline_that_was_scored_on_other_text_is_refused(tmp_path, told, changes, message):
    config = preset.get_config("int4")
    same = {"data": config.data, "eval.batches": config.eval.batches}
    values = {"resident_weight_bytes": 10.0, "bits_per_byte": 1.5}
    file = made.row(tmp_path, told=told, changes=same | changes, **values)
    config.infer.baseline = str(file)
    assert row.baseline_of(str(file), NEXT_TOKEN) == row.ScoredForm("the row attention-gqa", 10.0, 1.5)
    if message is None:
        row.check_baseline(config, {"data": {"fingerprint": "a"}})
    else:
        with pytest.raises(UserError, match=message):
            row.check_baseline(config, {"data": {"fingerprint": "a"}})
