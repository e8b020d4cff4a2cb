"""Fuzzing of file readers; from tests/: python -m fuzz.run [--readers=a,b] [--inputs=N] [--seconds=S] [--seed=N]

Prints for each reader how many inputs were tried, read, refused in one line, how many ended in a traceback, hung, or
took too much memory; and the first of each kind of those, with the seed that makes it again.
"""

import argparse
import collections
import contextlib
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings

from . import readers

HUNG_S = 20  # CPU seconds of one input
WAIT = 10  # times as many seconds of the clock, on a machine that others share
MEMORY = 3 * 2**30  # bytes of addresses beyond those of the process
GROWTH = 1 << 20  # KiB that one input may add to the most memory ever resident


class Hung(BaseException):
    """An input that computes for longer than HUNG_S, or waits for WAIT times as long."""


class Outcome(Exception):
    """What is no success and no line: `kind` says which, `text` all of it."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind, self.text = kind, text


def attempt(name, seed, index, folder, sample):
    """True where a spoiled file is read, False where it is refused in one line. Raises Outcome for all else."""
    reader, rng = readers.READERS[name], random.Random(f"{name} {seed} {index}")
    told = reader.spoil(rng, sample, folder)
    again = f"reader {name}, seed {seed}, input {index}: {told}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _watched(HUNG_S if index else 10 * HUNG_S):  # the first imports what the reader needs
            reader.read(folder)
        read = True
    except readers.EXPECTED as error:
        if "\n" in str(error) or not str(error):
            raise Outcome("lines", f"{again}\nis refused in several lines: {error}") from None
        read = False
    except Hung:
        raise Outcome("hang", f"{again}\ndoes not end\n{traceback.format_exc()[-3000:]}") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Outcome(type(error).__name__, f"{again}\n{traceback.format_exc()[-4000:]}") from None
    if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) > GROWTH:
        raise Outcome("memory", f"{again}\ntakes {grown / 2**20:.1f} GiB")
    return read


@contextlib.contextmanager
def _watched(seconds):
    def stop(*_):
        raise Hung

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, WAIT * seconds)}
    handlers = {number: signal.signal(number, stop) for number, _ in timers.values()}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit, 1)  # and again, where the first was lost in a callback
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def outcomes(name, seed, folder, inputs=None, seconds=None):
    """Yields True, False or an Outcome for one spoiled file after another, of so many or in so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    sample = readers.READERS[name].make(folder / "sample")
    end, index = float("inf"), 0
    while index < inputs if inputs else time.monotonic() < end or index < 5:
        try:
            yield attempt(name, seed, index, folder / "spoiled", sample)
        except Outcome as outcome:
            yield outcome
        index += 1
        end = min(end, time.monotonic() + (seconds or 0))


def main(argv=None):
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", default=",".join(readers.READERS))
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", default="0")
    options = parser.parse_args(argv)
    failed = False
    for name in options.readers.split(","):
        counts, first = collections.Counter(), {}
        with tempfile.TemporaryDirectory() as folder:
            for outcome in outcomes(name, options.seed, pathlib.Path(folder), options.inputs, options.seconds):
                kind = {True: "read", False: "one line"}.get(outcome) if isinstance(outcome, bool) else outcome.kind
                counts[kind] += 1
                if isinstance(outcome, Outcome):
                    first.setdefault((kind, outcome.text.strip().splitlines()[-1][:200]), outcome.text)
        print(f"{name}: {counts.total()} tried: {dict(counts.most_common())}", flush=True)
        for text in first.values():
            print(f"--- {text}\n", flush=True)
        failed |= bool(first)
    return failed


if __name__ == "__main__":
    sys.exit(main())
