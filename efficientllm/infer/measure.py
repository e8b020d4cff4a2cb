"""Prefill and decoding measured apart, each in windows of its own, on prompts that are fresh each time."""

import dataclasses
import time

import jax
import numpy as np

from efficientllm.metrics import energy, timer


@dataclasses.dataclass
class Measured:
    """Times in s: `prefill_s` and `decode_s` of each repeat, `steps_s` of single steps; energy windows of both."""

    prefill_s: list
    decode_s: list
    steps_s: timer.StepTimer
    prefill_energy: energy.EnergyWindow
    decode_energy: energy.EnergyWindow
    averages: object
    rows: int
    new_tokens: int

    @property
    def requests_s(self):
        """Of whole requests: prefill and decoding."""
        return [a + b for a, b in zip(self.prefill_s, self.decode_s, strict=True)]


def measure(engine, vocab_size, rows, prompt, new_tokens, repeats, reader, sampler, seed=0):
    """A Measured of `rows` prompts of `prompt` random tokens each and `new_tokens` after them.

    The first repeat compiles and is dropped. Decoding is timed whole, in one call, and step by step for percentiles.
    """
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    times, windows = {"prefill": [], "decode": []}, {"prefill": [], "decode": []}
    mark = None
    for repeat in range(repeats + 1):
        prompts = random.integers(0, vocab_size, (rows, prompt)).tolist()
        measured = repeat > 0
        if repeat == 1:
            mark = sampler.mark()
        carry = _timed("prefill", lambda p=prompts: engine.prefill(p), reader, times, windows, measured)
        _timed(
            "decode",
            lambda c=carry, p=prompts: engine.decode(c, p, new_tokens, key),
            reader,
            times,
            windows,
            measured,
        )
    averages = sampler.since(mark)
    steps = timer.StepTimer(cap=5)
    carry = engine.prefill(prompts)
    for _ in range(new_tokens):
        with steps.step():
            carry, _ = jax.block_until_ready(engine.decode(carry, prompts, 1, key))
    return Measured(
        times["prefill"],
        times["decode"],
        steps,
        energy.combine(windows["prefill"]),
        energy.combine(windows["decode"]),
        averages,
        rows,
        new_tokens,
    )


def _timed(name, call, reader, times, windows, measured):
    with reader.window() as window:
        begin = time.perf_counter()
        found = jax.block_until_ready(call())
        seconds = time.perf_counter() - begin
    if measured:
        times[name].append(seconds)
        windows[name].append(window.result)
    return found
