"""Search for the largest batch or longest context with which each variant runs on this machine.

The value doubles until a run fails; then the search bisects. Every trial is a run with a row: a trial that is out of
memory or refused is a result like any other.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.sweep import execute, spec

RUNS = ("ok", "nan")  # a run that ended with a NaN loss did fit into memory
RESOLUTION = 16  # the search ends when the failing value is within 1/16 of the running one, or one step above it


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    largest: the largest value that runs; None if not even the least does.
    bounded: the outcome of the trial above it; None if the search reached its end.
    tries:   `(value, outcome)` of all trials in order.
    """

    largest: int | None
    bounded: str | None
    tries: tuple[tuple[int, str], ...]


def search_all(
    sweep: spec.Sweep,
    out: pathlib.Path,
    extra: Sequence[str] = (),
    retry: Sequence[str] = (),
    run: Callable[..., str] = execute.execute_run,
) -> dict[str, SearchResult] | None:
    """Searches for every variant -> `{variant: SearchResult}`, also written to `search.json`; None if stopped.

    The same call resumes an interrupted search: trials with rows are not repeated, unless their outcome is in `retry`.
    """
    results = {}
    for variant in sweep.variants:
        tries: list[tuple[int, str]] = []

        def outcome(value, variant=variant, tries=tries):
            probe = _probe(sweep, variant, value, len(tries), extra)
            folder = out / probe.folder
            if execute.read_outcome(folder) in retry:
                execute.set_row_aside(folder)
            finished = execute.read_outcome(folder)
            tries.append((value, finished or run(probe, folder, sweep.timeout_s, sweep.memory_gb * 1e9)))
            print(f"{variant}: {sweep.search[0]} = {value:,}: {tries[-1][1]}", flush=True)
            return tries[-1][1]

        _, least, most = sweep.search
        largest, bounded = find_largest(outcome, least, most)
        if bounded == "interrupted":
            return None
        results[variant] = SearchResult(largest, bounded, tuple(tries))
    out.mkdir(parents=True, exist_ok=True)
    text = {variant: dataclasses.asdict(result) for variant, result in results.items()}
    write_atomically(out / "search.json", json.dumps({"key": sweep.search[0], "variants": text}, indent=2))
    return results


def _probe(sweep, variant, value, order, extra):
    seed, flag = sweep.seeds[0], f"--config.{sweep.search[0]}={value}"
    argv = (*spec.argv_of(sweep, variant, extra), flag, f"--config.seed={seed}")
    return spec.Run(sweep.name, variant, sweep.baseline, 0, order, seed, argv, search=flag, measures=sweep.measures)


def find_largest(outcome: Callable[[int], str], least: int, most: int) -> tuple[int | None, str | None]:
    """Searches multiples of `least` up to `most` for the largest whose `outcome(value)` is in RUNS.

    Returns `(largest, bounded)`: the value within RESOLUTION, and the outcome above it. `(None, outcome)` if not even
    `least` runs.
    """
    running, failing, bounded = 0, None, None
    value = least
    while value is not None:
        result = outcome(value)
        if result == "interrupted":
            return None, result
        if result in RUNS:
            running = value
        else:
            failing, bounded = value, result
        value = _next(running, failing, least, most // least * least)
    return running or None, bounded


def _next(running, failing, least, most):
    if failing is None:
        return min(2 * running, most) if running < most else None
    if failing - running <= max(least, running / RESOLUTION):
        return None
    return (running + failing) // 2 // least * least


def format_results(sweep: spec.Sweep, results: dict[str, SearchResult]) -> str:
    """Formats the results of the searches."""
    lines = [f"{'variant':24}{sweep.search[0]:>18}  ended by"]
    for variant, result in results.items():
        largest = "none" if result.largest is None else f"{result.largest:,}"
        lines.append(f"{variant:24}{largest:>18}  {result.bounded or f'the largest asked for, {sweep.search[2]:,}'}")
    return "\n".join(lines)
