"""Measurement of sampling pictures: whole batches in one call and single steps of the solver, or as they are drawn."""

import dataclasses
import functools
import logging
import statistics
import time
import typing
from collections.abc import Callable, Iterator

import jax
import numpy as np

from efficientllm.infer.denoise import DiffusionSampler
from efficientllm.infer.image_samples import PictureRequests, SampleConditions, describe_batch, image_shape, labelled
from efficientllm.infer.measure import warm_ups
from efficientllm.infer.measurement_windows import Windows, seconds_of
from efficientllm.infer.offload import OffloadedParams
from efficientllm.infer.pictures import images_to_uint8
from efficientllm.metrics import conditions, sampler, timer
from efficientllm.metrics.energy.window import EnergyWindow
from efficientllm.runtime.log import Countdown
from efficientllm.typing import Params

log = logging.getLogger("efficientllm")


@dataclasses.dataclass
class MeasuredPictures:
    """Result of `measure_pictures`.

    rows, solver_steps:  pictures of a batch, and steps from noise to a picture.
    batch_s:             seconds of a batch in each repeat, from noise to pixels.
    decode_s:            seconds of decoding its latents, measured apart; none where the model samples pixels.
    discarded_s:         those of the warm-up repeats.
    steps:               times of single steps of the solver, each waited for.
    batches:             batches in the energy windows.
    span, interrupted:   as in `measure.ServingMeasurement`.
    """

    rows: int
    solver_steps: int
    batch_s: list[float]
    decode_s: list[float]
    discarded_s: list[float]
    steps: timer.StepTimer
    batches: int
    energy: EnergyWindow
    averages: sampler.Averages
    span: conditions.Span | None = None
    interrupted: int = 0

    @property
    def step_s(self) -> float:
        """Seconds of a step, with a share of what is computed once: where all are taken in one call, or of each."""
        decode_s = statistics.median(self.decode_s) if self.decode_s else 0.0
        return (statistics.median(self.batch_s) - decode_s) / self.solver_steps

    @property
    def compile_s(self) -> float:
        """First warm-up repeat less the second."""
        return max(0.0, self.discarded_s[0] - self.discarded_s[1])


def measure_pictures(
    pictures: DiffusionSampler,
    params: Params | OffloadedParams,
    decode: Callable[[jax.Array], jax.Array] | None,
    rows: int,
    repeats: int,
    windows: Windows,
    seed: int = 0,
) -> MeasuredPictures:
    """Measures batches of `rows` pictures of random classes, with new noise in each.

    `decode` maps latents to pixels; None where the model samples pixels.
    """
    random, model = np.random.default_rng(seed), pictures.model

    def request():
        wanted = SampleConditions(labelled(model, random.integers(0, max(1, model.classes), rows)))
        return wanted, jax.random.key(int(random.integers(2**31)))

    def sample():
        nonlocal x_BhwC
        wanted, key = request()
        x_BhwC = pictures.sample(params, wanted.condition, key, image_shape(model))
        jax.block_until_ready(x_BhwC if decode is None else decode(x_BhwC))

    x_BhwC = None
    log.info(f"compiling and measuring {describe_batch(model, rows)} in {pictures.steps} steps, {repeats} times")
    discarded_s = warm_ups(lambda: seconds_of(sample))
    countdown, decode_s = Countdown("measuring", 2 * repeats), []
    windows.begin()
    for _ in range(repeats):
        windows.measure("batch", sample, discarded_s[-1])
        countdown.add()
    for _ in range(repeats):
        wanted, key = request()
        _measure_steps(pictures, params, wanted, key, windows)
        if decode is not None:
            decode_s.append(seconds_of(lambda: jax.block_until_ready(decode(x_BhwC))))
        countdown.add()
    return _result(pictures, rows, windows, discarded_s, decode_s)


class MeasuredBatches:
    """All pictures of `requests`, drawn once, `rows` at a time, and measured as they are drawn.

    First a step from noise, and a decoding, are computed twice and discarded: they compile the programs.

    Args:
      params, decode: as in `measure_pictures`.
      after_step: called after every step; what it raises ends the sampling.
    """

    def __init__(
        self,
        pictures: DiffusionSampler,
        params: Params | OffloadedParams,
        decode: Callable[[jax.Array], jax.Array] | None,
        requests: PictureRequests,
        rows: int,
        windows: Windows,
        after_step: Callable[[], typing.Any],
    ) -> None:
        self._pictures, self._params, self._decode, self._windows = pictures, params, decode, windows
        self._requests, self._rows, self._after_step = requests, rows, after_step
        self._discarded_s: list[float] = []
        self._decode_s: list[float] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the pictures of each batch, uint8."""
        log.info(f"compiling {describe_batch(self._pictures.model, self._rows)} in {self._pictures.steps} steps")
        self._discarded_s = warm_ups(lambda: seconds_of(self._warm_up))
        self._windows.begin()
        for first in range(0, self._requests.count, self._rows):
            images_BhwC = self._windows.measure_once("batch", functools.partial(self._draw, first))
            yield images_to_uint8(images_BhwC)[: self._requests.count - first]

    def measured(self) -> MeasuredPictures:
        """The measurement, once all batches are drawn."""
        return _result(self._pictures, self._rows, self._windows, self._discarded_s, self._decode_s)

    def _warm_up(self):
        wanted, key = self._requests.wanted(np.arange(self._rows)), jax.random.key(self._requests.seed)
        request = self._pictures.request(self._params, *wanted)
        carry = self._pictures.begin(self._rows, key, image_shape(self._pictures.model))
        x_BhwC = self._pictures.advance(self._params, request, carry, 0, 1).x_BhwC
        jax.block_until_ready(x_BhwC if self._decode is None else self._decode(x_BhwC))

    def _draw(self, first):
        wanted, key = self._requests.wanted(first + np.arange(self._rows)), jax.random.key(self._requests.seed)
        x_BhwC = _measure_steps(self._pictures, self._params, wanted, key, self._windows, first, self._after_step)
        if self._decode is None:
            return x_BhwC
        begin = time.perf_counter()
        images_BhwC = jax.block_until_ready(self._decode(x_BhwC))
        self._decode_s.append(time.perf_counter() - begin)
        return images_BhwC


def _result(pictures, rows, windows, discarded_s, decode_s):
    return MeasuredPictures(
        rows=rows,
        solver_steps=pictures.steps,
        decode_s=decode_s,
        batch_s=windows.times["batch"],
        discarded_s=discarded_s,
        steps=windows.steps,
        batches=windows.counts["batch"],
        energy=windows.energy_of("batch"),
        averages=windows.averages(),
        span=windows.span(),
        interrupted=windows.interrupted,
    )


def _measure_steps(pictures, params, wanted, key, windows, first=0, after_step=lambda: None):
    """Takes the steps of a batch one by one; returns what is sampled."""
    request = pictures.request(params, *wanted)
    carry = jax.block_until_ready(pictures.begin(wanted.condition.rows, key, image_shape(pictures.model), first))

    def step():
        nonlocal carry
        carry = jax.block_until_ready(pictures.advance(params, request, carry, start, 1))

    for start in range(pictures.steps):  # noqa: B007  `step` reads it
        windows.measure_step(step)
        after_step()
    return carry.x_BhwC
