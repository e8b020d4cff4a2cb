"""Measurement of prefill and decoding in separate windows, on new prompts in each repeat."""

import dataclasses
import logging
import math
import time

import jax
import numpy as np

from efficientllm.infer.engine import Engine
from efficientllm.metrics import compiles, conditions, cpu_counters, sampler, timer
from efficientllm.metrics.energy import reader as energy
from efficientllm.metrics.energy.window import EnergyReader
from efficientllm.runtime.log import Countdown

log = logging.getLogger("efficientllm")
WARM_UPS = 2  # discarded repeats: the first compiles
WINDOW_S = 2.0  # least length of an energy window
AGAIN = 5  # retries of a window in which the process was paused or compiled a program


@dataclasses.dataclass
class Measured:
    """Result of `measure`.

    rows, prompt, new_tokens:  shape of a batch: prompts, tokens of a prompt, tokens of a completion.
    prefill_s, decode_s:       seconds of a batch in each repeat.
    discarded_s:               seconds of prefill and decoding together in each warm-up repeat.
    steps:                     times of single decode steps, each waited for.
    prefills, decodes:         number of batches in the energy windows.
    span:                      conditions of the machine during the repeats.
    interrupted:               windows and steps that were discarded because the process was paused.
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

    @property
    def requests_s(self) -> list[float]:
        """Wall time of prefill and decoding of the batch in each repeat."""
        return [prefill + decode for prefill, decode in zip(self.prefill_s, self.decode_s, strict=True)]

    @property
    def compile_s(self) -> float:
        """First warm-up repeat less the second."""
        return max(0.0, self.discarded_s[0] - self.discarded_s[1])


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
) -> Measured:
    """Measures batches of `rows` prompts of `prompt` tokens, taken from the text `ids`, and `new_tokens` after each.

    Throughput comes from decoding a batch in one call, latencies from further batches decoded step by step. Windows too
    short for the energy `reader` repeat their work: prefill on new prompts, decoding from the same positions.
    `averages` is the run's `Sampler`.
    """
    return _Measurement(engine, ids, rows, prompt, new_tokens, reader, averages, seed).run(repeats)


def fresh(ids: np.ndarray, rows: int, length: int, random: np.random.Generator) -> list[list[int]]:
    """Draws `rows` random spans of `length` tokens of a text; a shorter text is repeated."""
    if len(ids) < length:
        ids = np.tile(ids, -(-length // len(ids)))
    starts = random.integers(0, len(ids) - length + 1, rows)
    return [ids[start : start + length].tolist() for start in starts]


class _Measurement:
    def __init__(self, engine, ids, rows, prompt, new_tokens, reader, averages, seed):
        self._engine, self._reader, self._sampler = engine, reader, averages
        self._new_tokens, self._shape = new_tokens, (rows, prompt)
        self._ids, self._random = np.asarray(ids), np.random.default_rng(seed)
        self._parts, self._windows = [], {"prefill": [], "decode": []}
        self._times, self._counts = {"prefill": [], "decode": []}, {"prefill": 0, "decode": 0}
        self._interrupted, self._faults = 0, []

    def run(self, repeats):
        rows, prompt = self._shape
        log.info(f"compiling and measuring {rows} x {prompt} + {self._new_tokens} tokens, {repeats} times")
        warm = [(self._seconds(self._prefill), self._seconds(self._decode)) for _ in range(WARM_UPS)]
        countdown = Countdown("measuring", 2 * repeats)
        begin, stopped = cpu_counters.read_counters(), self._sampler.stopped_s()
        for _ in range(repeats):
            self._window("prefill", self._prefill, warm[-1][0])
            self._window("decode", self._decode, warm[-1][1])
            countdown.add()
        steps = timer.StepTimer(cap=5)
        for _ in range(repeats):
            self._prefill()
            for _ in range(self._new_tokens):
                self._step(steps)
            countdown.add()
        stopped = self._sampler.stopped_s() - stopped
        span = conditions.span_between(begin, cpu_counters.read_counters(), stopped, self._faults)
        return Measured(
            *self._shape,
            self._new_tokens,
            self._times["prefill"],
            self._times["decode"],
            [sum(pair) for pair in warm],
            steps,
            self._counts["prefill"],
            self._counts["decode"],
            energy.combine_windows(self._windows["prefill"]),
            energy.combine_windows(self._windows["decode"]),
            sampler.combine_averages(self._parts),
            span,
            self._interrupted,
        )

    def _step(self, steps):
        """Times one decode step; not counted if the process was paused during it."""
        stopped, compiled = self._sampler.stopped_s(), compiles.count_programs()
        seconds = self._seconds(lambda: self._decode(1, rewind=False))
        if self._sampler.stopped_s() > stopped:
            self._interrupted += 1
        elif steps.warming or compiles.count_programs() == compiled:
            steps.add(seconds)

    def _window(self, name, call, expected_s):
        times = 1 if self._reader.reason else max(1, math.ceil(WINDOW_S / expected_s))
        for last in [False] * AGAIN + [True]:
            compiled = compiles.count_programs()
            with self._reader.window() as window:
                mark = self._sampler.mark()
                seconds = self._seconds(lambda: [call() for _ in range(times)])
                averages = self._sampler.since(mark)
            self._faults.extend(self._reader.faults())
            compiled = compiles.count_programs() - compiled
            if not averages.stopped_s and not compiled:
                break
            self._interrupted += not last
        self._parts.append(averages)
        self._times[name].append((seconds - averages.stopped_s) / times)
        self._counts[name] += times
        invalid = compiled and energy.COMPILED or averages.stopped_s and energy.STOPPED.format(averages.stopped_s)
        self._windows[name].append(energy.void_window(window.result, invalid) if invalid else window.result)

    def _seconds(self, call):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def _prefill(self):
        """Prefills new prompts into `_carry`."""
        self._carry = None  # free the old states first: serving never holds two
        self._prompts = fresh(self._ids, *self._shape, self._random)
        self._carry = jax.block_until_ready(self._engine.prefill(self._prompts))
        self._start = np.asarray(self._carry.positions_B)

    def _decode(self, steps=None, rewind=True):
        carry = self._carry
        if rewind:  # later cache slots are overwritten; a recurrent state costs the same whatever it holds
            carry = carry.replace(positions_B=jax.device_put(self._start, carry.positions_B.sharding))
        self._carry, _ = jax.block_until_ready(self._engine.decode(carry, self._prompts, steps or self._new_tokens))
