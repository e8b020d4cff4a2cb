"""Where runs are run: here one after another, or as a job array of Slurm."""

import time

from efficientllm.errors import UserError, did_you_mean
from efficientllm.sweep.execute import execute, outcome
from efficientllm.train.progress import clock_time

LAUNCHERS = ("local", "slurm")


def launcher(name, out, partition=None):
    """A function `(runs, out, timeout_s, costs)` to their outcomes, or None if it was stopped. Raises UserError."""
    if name not in LAUNCHERS:
        raise UserError(f"--launcher={name}: known are {', '.join(LAUNCHERS)}{did_you_mean(name, LAUNCHERS)}")
    if name == "local":
        return local
    executor = _slurm(out, partition)
    return lambda runs, out, timeout_s, costs: slurm(executor, runs, out, timeout_s)


def local(runs, out, timeout_s, costs):
    """One run after another: two that are measured must not share the machine."""
    found, spent, done = [], 0.0, 0.0
    total = sum(costs[run.variant].flops for run in runs)
    for index, run in enumerate(runs):
        known, begin = outcome(out / run.folder), time.monotonic()
        left = "" if not done else f", {clock_time(spent * (total - done) / done)} left"
        if known is None:
            print(f"run {index + 1}/{len(runs)}: {run.variant}, block {run.block}, seed {run.seed}{left}", flush=True)
        found.append(known or execute(run, out / run.folder, timeout_s))
        if known is None:
            print(f"  {found[-1]} in {time.monotonic() - begin:.0f} s", flush=True)
            spent += time.monotonic() - begin
            done += costs[run.variant].flops
        else:
            total -= costs[run.variant].flops
        if found[-1] == "interrupted":
            return None
    return found


def _slurm(out, partition):
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher=slurm needs submitit: pip install -e '.[sweep]'") from None
    try:
        executor = submitit.AutoExecutor(folder=out / "slurm", cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"--launcher=slurm: {error}") from None
    executor.update_parameters(name=out.name, **({"slurm_partition": partition} if partition else {}))
    return executor


def slurm(executor, runs, out, timeout_s):
    """One array, one run an allocation. A job that is run again finds its row, or its checkpoints."""
    executor.update_parameters(timeout_min=int(timeout_s // 60) + 5)
    paths = [str((out / run.folder).absolute()) for run in runs]
    jobs = executor.map_array(execute, runs, paths, [timeout_s] * len(runs))
    print(f"submitted {len(jobs)} jobs as array {jobs[0].job_id.partition('_')[0]}", flush=True)
    try:
        return [_result(job) for job in jobs]
    except KeyboardInterrupt:
        print("the jobs go on; the same command finds what they leave")
        return None


def _result(job):
    try:
        return job.result()
    except Exception as error:  # submitit raises whatever the job's process did
        return f"crash ({str(error).splitlines()[0]:.80})"
