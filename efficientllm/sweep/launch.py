"""Launchers: runs one after another on this machine, or as a Slurm job array."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime.log import clock_time
from efficientllm.sweep.cost_estimates import Cost
from efficientllm.sweep.execute import execute_run, last_message, read_outcome
from efficientllm.sweep.spec import Run, Sweep

LAUNCHERS = ("local", "slurm")


def open_launcher(
    name: str, out: pathlib.Path, partition: str | None = None, save_rows: Callable[[], object] | None = None
) -> Callable[..., list[str] | None]:
    """A function `(runs, out, sweep, costs) -> outcomes`, or None if it was stopped. Raises UserError.

    `save_rows` is called after each local run.
    """
    check_launcher(name)
    if name == "local":
        return functools.partial(run_locally, save_rows=save_rows)
    from efficientllm.sweep import slurm

    executor = slurm.open_executor(out, partition)
    return lambda runs, out, sweep, costs: slurm.submit_runs(executor, runs, out, sweep)


def check_launcher(name: str) -> None:
    """Raises UserError unless `name` is a launcher."""
    if name not in LAUNCHERS:
        raise UserError(f"--launcher={name}: known are {', '.join(LAUNCHERS)}{did_you_mean(name, LAUNCHERS)}")


def run_locally(
    runs: Sequence[Run],
    out: pathlib.Path,
    sweep: Sweep,
    costs: dict[str, Cost],
    save_rows: Callable[[], object] | None = None,
) -> list[str] | None:
    """Executes one run after another: measured runs must not share the machine."""
    outcomes, spent, done = [], 0.0, 0.0
    total = sum(costs[run.variant].flops for run in runs)
    for index, run in enumerate(runs):
        earlier, begin = read_outcome(out / run.folder), time.monotonic()
        left = "" if not done else f", {clock_time(spent * (total - done) / done)} left"
        if earlier is None:
            print(f"run {index + 1}/{len(runs)}: {run.variant}, block {run.block}, seed {run.seed}{left}", flush=True)
        outcomes.append(earlier or execute_run(run, out / run.folder, sweep.timeout_s, sweep.memory_gb * 1e9))
        if earlier is None:
            print(f"  {outcomes[-1]} in {time.monotonic() - begin:.0f} s", flush=True)
            if outcomes[-1] not in ("ok", "interrupted"):
                print(f"  {last_message(out / run.folder)}\n  {out / run.folder}", flush=True)
            if save_rows:
                save_rows()
            spent += time.monotonic() - begin
            done += costs[run.variant].flops
        else:
            total -= costs[run.variant].flops
        if outcomes[-1] == "interrupted":
            return None
    return outcomes
