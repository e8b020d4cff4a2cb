"""The largest batch, or the longest context, that each variant of a sweep still runs with on this machine.

Doubling until a run fails, then bisection between. Every try is a run of its own with a row of its own: what is out of
memory, or refused, is data like what is not.
"""

import dataclasses
import json

from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.sweep import execute, spec

RUNS = ("ok", "nan")  # a loss that is not a number has had its memory
SHARPNESS = 16  # the search ends when what fails is within a sixteenth of what runs, or one least value above it


@dataclasses.dataclass(frozen=True)
class Found:
    """`largest` value that runs (None: not even the least), the outcome that `bounded` it (None: nothing did), and all
    `tries` as `(value, outcome)` in their order."""

    largest: int | None
    bounded: str | None
    tries: tuple


def search(sweep, out, extra=(), retry=(), run=execute.execute):
    """`{variant: Found}`, also written to `search.json` in `out`; None if it was told to stop.

    The same call goes on with an interrupted search: tries that have rows are not repeated, unless they ended as one
    of `retry`.
    """
    found = {}
    for variant in sweep.variants:
        tries = []

        def outcome(value, variant=variant, tries=tries):
            probe = _probe(sweep, variant, value, len(tries), extra)
            folder = out / probe.folder
            if execute.outcome(folder) in retry:
                execute.forget(folder)
            known = execute.outcome(folder)
            tries.append((value, known or run(probe, folder, sweep.timeout_s, sweep.memory_gb * 1e9)))
            print(f"{variant}: {sweep.search[0]} = {value:,}: {tries[-1][1]}", flush=True)
            return tries[-1][1]

        _, least, most = sweep.search
        largest, bounded = find(outcome, least, most)
        if bounded == "interrupted":
            return None
        found[variant] = Found(largest, bounded, tuple(tries))
    out.mkdir(parents=True, exist_ok=True)
    text = {variant: dataclasses.asdict(each) for variant, each in found.items()}
    write_atomically(out / "search.json", json.dumps({"key": sweep.search[0], "variants": text}, indent=2))
    return found


def _probe(sweep, variant, value, order, extra):
    seed, flag = sweep.seeds[0], f"--config.{sweep.search[0]}={value}"
    argv = (*spec.argv_of(sweep, variant, extra), flag, f"--config.seed={seed}")
    return spec.Run(sweep.name, variant, sweep.baseline, 0, order, seed, argv, search=flag)


def find(outcome, least, most):
    """`(largest, bounded)`: the largest multiple of `least` up to `most` whose `outcome(value)` is one of RUNS, to
    within SHARPNESS, and the outcome above it; `(None, outcome)` where not even `least` runs."""
    good, bad, bounded = 0, None, None
    value = least
    while value is not None:
        ended = outcome(value)
        if ended == "interrupted":
            return None, ended
        if ended in RUNS:
            good = value
        else:
            bad, bounded = value, ended
        value = _next(good, bad, least, most // least * least)
    return good or None, bounded


def _next(good, bad, least, most):
    if bad is None:
        return min(2 * good, most) if good < most else None
    if bad - good <= max(least, good / SHARPNESS):
        return None
    return (good + bad) // 2 // least * least


def table(sweep, found):
    """The searches' results as text."""
    lines = [f"{'variant':24}{sweep.search[0]:>18}  ended by"]
    for variant, each in found.items():
        largest = "none" if each.largest is None else f"{each.largest:,}"
        lines.append(f"{variant:24}{largest:>18}  {each.bounded or f'the largest asked for, {sweep.search[2]:,}'}")
    return "\n".join(lines)
