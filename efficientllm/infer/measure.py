"""Prefill and decoding measured apart, each in windows of its own, on prompts that are fresh each time."""

import dataclasses
import logging
import math
import time

import jax
import numpy as np

from efficientllm.metrics import compiles, conditions, cpu_counters, sampler, timer
from efficientllm.metrics.energy import reader as energy
from efficientllm.runtime.log import Countdown

log = logging.getLogger("efficientllm")
WARM_UPS = 2  # repeats that are set aside: the first compiles
WINDOW_S = 2.0  # what an energy window should last at least, where energy can be read
AGAIN = 5  # repeats at most that are made again because the process was stopped, or compiled, within them


@dataclasses.dataclass
class Measured:
    """What `measure` found, times in s.

    prefill_s, decode_s: of each repeat, of a whole batch; `discarded_s` those of the warm-up, both together.
    steps: single steps of decoding, each waited for.
    prefills, decodes: how many batches lie in the energy windows.
    span: what the machine's counters say of the repeats; `interrupted` of them, within which the process was stopped,
    were made again and count for nothing.
    """

    rows: int
    prompt: int
    new_tokens: int
    prefill_s: list
    decode_s: list
    discarded_s: list
    steps: timer.StepTimer
    prefills: int
    decodes: int
    prefill_energy: energy.EnergyWindow
    decode_energy: energy.EnergyWindow
    averages: sampler.Averages
    span: conditions.Span | None = None
    interrupted: int = 0

    @property
    def requests_s(self):
        """Wall time of each repeat: prefill and decoding of all its rows, which are served together."""
        return [a + b for a, b in zip(self.prefill_s, self.decode_s, strict=True)]

    @property
    def compile_s(self):
        """What the first repeat took longer than the second."""
        return max(0.0, self.discarded_s[0] - self.discarded_s[1])


def measure(engine, ids, rows, prompt, new_tokens, repeats, reader, averages, seed=0):
    """A Measured of batches of `rows` prompts of `prompt` tokens, cut from the text `ids`, and `new_tokens` after them.

    Throughput comes from decoding in one call, latencies from as many batches decoded a step at a time. A window that
    is too short for the energy `reader` holds its work several times: prefill on further prompts, decoding from the
    same places again. `averages` is the run's `Sampler`.
    """
    return _Measurement(engine, ids, rows, prompt, new_tokens, reader, averages, seed).run(repeats)


def fresh(ids, rows, length, random):
    """`rows` stretches of `length` tokens from random places of a text, which is repeated where it is shorter."""
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
        """Times a step of decoding; one within which the process was stopped is left out."""
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
        why = compiled and energy.COMPILED or averages.stopped_s and energy.STOPPED.format(averages.stopped_s)
        self._windows[name].append(energy.void_window(window.result, why) if why else window.result)

    def _seconds(self, call):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def _prefill(self):
        """Leaves the state of fresh prompts in `_carry`."""
        self._carry = None  # two states at once would be a peak that serving has not
        self._prompts = fresh(self._ids, *self._shape, self._random)
        self._carry = jax.block_until_ready(self._engine.prefill(self._prompts))
        self._start = np.asarray(self._carry.positions_B)

    def _decode(self, steps=None, rewind=True):
        carry = self._carry
        if rewind:  # what the state holds beyond is overwritten, or costs the same whatever it is
            carry = carry.replace(positions_B=jax.device_put(self._start, carry.positions_B.sharding))
        self._carry, _ = jax.block_until_ready(self._engine.decode(carry, self._prompts, steps or self._new_tokens))
