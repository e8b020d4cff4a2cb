"""Measurement of prefill and decoding in separate windows, on new prompts in each repeat."""

import dataclasses
import logging
import typing
from collections.abc import Callable

import jax
import numpy as np

from efficientllm.infer.engine import Engine
from efficientllm.infer.measurement_windows import Windows, seconds_of
from efficientllm.metrics import conditions, sampler, timer
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.runtime import malloc
from efficientllm.runtime.log import Countdown

log = logging.getLogger("efficientllm")
WARM_UPS = 2  # discarded repeats: the first compiles
Result = typing.TypeVar("Result")


@dataclasses.dataclass
class ServingMeasurement:
    """Result of `measure`.

    rows, prompt, new_tokens:  shape of a batch: prompts, tokens of a prompt, tokens of a completion.
    prefill_s, decode_s:       seconds of a batch in each repeat.
    discarded_s:               seconds of prefill and decoding together in each warm-up repeat.
    steps:                     times of single decode steps, each waited for.
    prefills, decodes:         number of batches in the energy windows.
    span:                      conditions of the machine during the repeats.
    interrupted:               windows and steps that were discarded because the process was paused.
    images:                    what was measured of the prompts' images; None where they have none.
    """

    rows: int
    prompt: int
    new_tokens: int
    prefill_s: list[float]
    decode_s: list[float]
    discarded_s: list[float]
    steps: timer.StepTimer
    prefills: int
    decodes: int
    prefill_energy: energy.EnergyWindow
    decode_energy: energy.EnergyWindow
    averages: sampler.Averages
    span: conditions.Span | None = None
    interrupted: int = 0
    images: "MeasuredImages | None" = None

    @property
    def requests_s(self) -> list[float]:
        """Wall time of prefill and decoding of the batch in each repeat."""
        return [prefill + decode for prefill, decode in zip(self.prefill_s, self.decode_s, strict=True)]

    @property
    def compile_s(self) -> float:
        """First warm-up repeat less the second."""
        return max(0.0, self.discarded_s[0] - self.discarded_s[1])


@dataclasses.dataclass
class MeasuredImages:
    """What `measure` measured of a tower alone, which prefill calls first.

    count:      images of a row.
    flops:      of the tower for the images of a row.
    encode_s:   seconds of all images of a batch in each repeat.
    encodings:  batches in the energy windows.
    """

    count: int
    flops: float
    encode_s: list[float]
    encodings: int
    energy: energy.EnergyWindow


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of the rows of a batch: `encode` computes the features of all; `count` and `flops` are of a row."""

    encode: Callable[[], typing.Any]
    count: int
    flops: float


def warm_ups(repeat: Callable[[], Result]) -> list[Result]:
    """Calls `repeat` WARM_UPS times -> its results. What compilation leaves is returned after the first.

    Not after the last: scratch memory would go too, and the first measured repeat would take it anew.
    """
    first = repeat()
    malloc.trim()
    return [first, *(repeat() for _ in range(WARM_UPS - 1))]


def measure(
    engine: Engine,
    ids: np.ndarray,
    rows: int,
    prompt: int,
    new_tokens: int,
    repeats: int,
    reader: EnergyReader,
    averages: sampler.Sampler,
    seed: int = 0,
    prompts: list[list[int]] | None = None,
    images: Images | None = None,
) -> ServingMeasurement:
    """Measures batches of `rows` prompts of `prompt` tokens, taken from the text `ids`, and `new_tokens` after each.

    Throughput comes from decoding a batch in one call, latencies from further batches decoded step by step. Windows too
    short for the energy `reader` repeat their work: prefill on new prompts, decoding from the same positions.
    `averages` is the run's `Sampler`. `prompts` are measured in place of spans of the text; prefill computes the
    features of their `images`, which are measured apart too.
    """
    windows = Windows(reader, averages)
    return _Measurement(engine, ids, rows, prompt, new_tokens, windows, seed, prompts, images).run(repeats)


def fresh(ids: np.ndarray, rows: int, length: int, random: np.random.Generator) -> list[list[int]]:
    """Draws `rows` random spans of `length` tokens of a text; a shorter text is repeated."""
    if len(ids) < length:
        ids = np.tile(ids, -(-length // len(ids)))
    starts = random.integers(0, len(ids) - length + 1, rows)
    return [ids[start : start + length].tolist() for start in starts]


class _Measurement:
    def __init__(self, engine, ids, rows, prompt, new_tokens, windows, seed, prompts, images):
        self._engine, self._windows, self._images = engine, windows, images
        self._new_tokens, self._shape, self._given = new_tokens, (rows, prompt), prompts
        self._ids, self._random = np.asarray(ids), np.random.default_rng(seed)

    def run(self, repeats):
        rows, prompt = self._shape
        log.info(f"compiling and measuring {rows} x {prompt} + {self._new_tokens} tokens, {repeats} times")
        warm = warm_ups(lambda: (seconds_of(self._prefill), seconds_of(self._decode)))
        countdown, windows = Countdown("measuring", 2 * repeats), self._windows
        encode_s = seconds_of(self._images.encode) if self._images else 0.0  # compiled with prefill
        windows.begin()
        for _ in range(repeats):
            windows.measure("prefill", self._prefill, warm[-1][0])
            windows.measure("decode", self._decode, warm[-1][1])
            if self._images:
                windows.measure("images", self._images.encode, encode_s)
            countdown.add()
        for _ in range(repeats):
            self._prefill()
            for _ in range(self._new_tokens):
                windows.measure_step(lambda: self._decode(1, rewind=False))
            countdown.add()
        return ServingMeasurement(
            *self._shape,
            self._new_tokens,
            windows.times["prefill"],
            windows.times["decode"],
            [sum(pair) for pair in warm],
            windows.steps,
            windows.counts["prefill"],
            windows.counts["decode"],
            windows.energy_of("prefill"),
            windows.energy_of("decode"),
            windows.averages(),
            windows.span(),
            windows.interrupted,
            self._measured_images(),
        )

    def _measured_images(self):
        if self._images is None:
            return None
        count, flops = self._images.count, self._images.flops
        windows = self._windows
        return MeasuredImages(
            count, flops, windows.times["images"], windows.counts["images"], windows.energy_of("images")
        )

    def _prefill(self):
        """Prefills new prompts into `_carry`."""
        self._carry = None  # free the old states first: serving never holds two
        self._prompts = self._given or fresh(self._ids, *self._shape, self._random)
        self._carry = jax.block_until_ready(self._engine.prefill(self._prompts))
        self._start = np.asarray(self._carry.positions_B)

    def _decode(self, steps=None, rewind=True):
        carry = self._carry
        if rewind:  # later cache slots are overwritten; a recurrent state costs the same whatever it holds
            carry = carry.replace(positions_B=jax.device_put(self._start, carry.positions_B.sharding))
        self._carry, _ = jax.block_until_ready(self._engine.decode(carry, self._prompts, steps or self._new_tokens))
