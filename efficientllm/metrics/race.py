"""Speed comparisons: contestants timed in randomised blocks, and ratios of medians with bootstrap intervals.

A block calls every contestant once, in random order, so that drift of the machine meets all of them alike. The first
blocks are discarded: they compile, fill caches and grow allocators. A ratio pairs the two contestants block by block.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import numpy as np

from efficientllm.errors import UserError

DISCARDED = 2  # blocks
AfterBlock = Callable[[int, dict[str, typing.Any]], None]


class Ratio(typing.NamedTuple):
    """A ratio of medians with the ends of its 95 % interval."""

    ratio: float
    low: float
    high: float

    def __str__(self):
        return f"{self.ratio:.2f} ({self.low:.2f}-{self.high:.2f})"


def race(
    contestants: Mapping[str, Callable[[int], typing.Any]],
    blocks: int,
    discarded: int = DISCARDED,
    seed: int = 0,
    after_block: AfterBlock | None = None,
) -> dict[str, list]:
    """`{name: results of the counted blocks}` of `contestants`, functions of the block's number by name.

    Runs `discarded` blocks whose results are dropped, then `blocks` that count; numbers go on through both. The order
    within each is drawn from `seed`. `after_block(number, {name: result})` sees the discarded blocks too. An exception
    of a contestant ends the race, with a note of its name and the block; a process that died is a UserError.
    """
    if blocks < 1:
        raise UserError(f"blocks = {blocks}: a race needs at least one that counts")
    results: dict[str, list] = {name: [] for name in contestants}
    order, names = random.Random(seed), list(contestants)
    for block in range(discarded + blocks):
        latest = {name: _result(contestants[name], name, block) for name in order.sample(names, len(names))}
        for name, result in latest.items() if block >= discarded else ():
            results[name].append(result)
        if after_block:
            after_block(block, latest)
    return results


def _result(contestant, name, block):
    try:
        return contestant(block)
    except ProcessDied as died:
        raise UserError(f"{name}: {died}") from None
    except Exception as error:
        error.add_note(f"{name} in block {block} of the race")
        raise


def race_calls(calls: Mapping[str, Callable[[], typing.Any]], blocks: int, **options) -> list[dict[str, list]]:
    """`({name: wall seconds}, {name: CPU seconds of all threads})` of `calls`, functions without arguments by name."""
    return columns(race({name: _timed(call) for name, call in calls.items()}, blocks, **options))


def _timed(call):
    def contestant(block):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu

    return contestant


def columns(results: Mapping[str, list]) -> list[dict[str, list]]:
    """Results that are tuples as one `{name: values}` for each position: `wall, cpu = columns(race(...))`."""
    width = len(next(iter(results.values()))[0])
    return [{name: [row[i] for row in rows] for name, rows in results.items()} for i in range(width)]


def print_progress(blocks: int, discarded: int = DISCARDED, label: str = "") -> AfterBlock:
    """An `after_block` that prints to stderr how many of all blocks are done."""
    return lambda block, _: print(f"{label}block {block + 1} of {discarded + blocks}", file=sys.stderr, flush=True)


def ratio_of_medians(
    numerators: Sequence[float], denominators: Sequence[float], draws: int = 10_000, seed: int = 0
) -> Ratio:
    """The Ratio of the medians of two equally long lists, paired by block.

    The interval is the percentile bootstrap over blocks, Efron & Tibshirani (1993), chapter 13: `draws` times as many
    blocks as there are, drawn with replacement. It says nothing of what differs between one process and the next.
    """
    pairs_2B = np.array([numerators, denominators], float)
    blocks = pairs_2B.shape[1]
    drawn_RB = np.random.default_rng(seed).integers(0, blocks, (draws, blocks))
    above_R, below_R = np.median(pairs_2B[:, drawn_RB], axis=-1)
    above, below = np.median(pairs_2B, axis=-1)
    return Ratio(float(above / below), *np.quantile(above_R / below_R, [0.025, 0.975]).tolist())


def pin(cores: int) -> None:
    """Keeps this process on the last `cores` that it may use; libraries size their thread pools by those."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


class ProcessDied(RuntimeError):
    """The process of a contestant ended before it answered."""


def _reason(status):
    if status >= 0:
        return f"its process ended with status {status}; the error stands above"
    number = signal.Signals(-status)
    causes = {
        signal.SIGILL: "it was built with instructions that this machine does not have",
        signal.SIGKILL: "as the system does where memory is short",
    }
    return f"its process was ended by {number.name} ({causes.get(number, signal.strsignal(number))})"


class Process:
    """A contestant in a process of its own, whose thread pools and allocator are inside no other.

    `make(*arguments)` runs there, once, and returns the function that `ask` calls from here. `environment` is set
    before the process starts. `close` ends it.
    """

    def __init__(self, make: Callable[..., Callable], *arguments, environment: Mapping[str, str] | None = None):
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_answer, args=(make, arguments, far_end), daemon=True)
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        far_end.close()  # so that a process that dies ends our wait

    def ask(self, *question) -> typing.Any:
        """The answer to `question`. ProcessDied where the process ended instead."""
        try:
            self._pipe.send(question)
            return self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise ProcessDied(_reason(self._process.exitcode)) from None

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _answer(make, arguments, pipe):
    answer = make(*arguments)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        pipe.send(answer(*question))
