"""Where runs are run: here one after another, or as a job array of Slurm."""

import time

from efficientllm.errors import UserError, did_you_mean
from efficientllm.runtime.log import clock_time
from efficientllm.sweep.execute import execute, outcome, why

LAUNCHERS = ("local", "slurm")


def launcher(name, out, partition=None):
    """A function `(runs, out, sweep, costs)` to their outcomes, or None if it was stopped. Raises UserError."""
    check(name)
    if name == "local":
        return local
    from efficientllm.sweep import slurm

    executor = slurm.open_executor(out, partition)
    return lambda runs, out, sweep, costs: slurm.submit(executor, runs, out, sweep)


def check(name):
    """Raises UserError unless `name` is a launcher's."""
    if name not in LAUNCHERS:
        raise UserError(f"--launcher={name}: known are {', '.join(LAUNCHERS)}{did_you_mean(name, LAUNCHERS)}")


def local(runs, out, sweep, costs):
    """One run after another: two that are measured must not share the machine."""
    found, spent, done = [], 0.0, 0.0
    total = sum(costs[run.variant].flops for run in runs)
    for index, run in enumerate(runs):
        known, begin = outcome(out / run.folder), time.monotonic()
        left = "" if not done else f", {clock_time(spent * (total - done) / done)} left"
        if known is None:
            print(f"run {index + 1}/{len(runs)}: {run.variant}, block {run.block}, seed {run.seed}{left}", flush=True)
        found.append(known or execute(run, out / run.folder, sweep.timeout_s, sweep.memory_gb * 1e9))
        if known is None:
            print(f"  {found[-1]} in {time.monotonic() - begin:.0f} s", flush=True)
            if found[-1] not in ("ok", "interrupted"):
                print(f"  {why(out / run.folder)}\n  {out / run.folder}", flush=True)
            spent += time.monotonic() - begin
            done += costs[run.variant].flops
        else:
            total -= costs[run.variant].flops
        if found[-1] == "interrupted":
            return None
    return found
