"""A sweep as a job array of Slurm: one run an allocation, alone on its nodes; through `submitit`."""

import subprocess
import time

from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages
from efficientllm.sweep import execute

POLL_S = 5.0  # between two questions to the controller
start = execute.execute  # what a job calls
# What Slurm's accounting calls the end of a job that left no row; everything else is a crash.
STATES = {"OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout", "DEADLINE": "timeout"}


def open_executor(out, partition=None):
    """submitit's executor, whose scripts and logs are in `out`. Raises UserError without submitit or Slurm."""
    try:
        import submitit
    except ImportError:
        raise UserError(f"--launcher=slurm needs submitit: {optional_packages.remedy('sweep')}") from None
    try:
        executor = submitit.AutoExecutor(folder=(out / "slurm").absolute(), cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"--launcher=slurm: {error}") from None
    # Two runs that are measured must not share a node.
    executor.update_parameters(name=out.name, slurm_exclusive=True)
    if partition:
        executor.update_parameters(slurm_partition=partition)
    return executor


def submit(executor, runs, out, sweep, poll_s=POLL_S):
    """Submits those of `runs` that have no row, waits -> the outcomes of all, or None if it was told to stop.

    A job that Slurm starts again finds its row, or its checkpoints. A job that Slurm kills leaves a row made here.
    Raises UserError where Slurm refuses the array.
    """
    todo = [run for run in runs if execute.outcome(out / run.folder) is None]
    if todo:
        jobs = _submit(executor, todo, out, sweep)
        try:
            _wait(jobs, todo, out, poll_s)
        except KeyboardInterrupt:
            print(f"the jobs go on (scancel {_array(jobs)} ends them); the same command finds what they leave")
            return None
    return [execute.outcome(out / run.folder) for run in runs]


def _submit(executor, runs, out, sweep):
    from submitit.core.utils import FailedJobError

    executor.update_parameters(timeout_min=int(sweep.timeout_s // 60) + 5)
    folders = [str((out / run.folder).absolute()) for run in runs]
    try:
        limits = [[sweep.timeout_s] * len(runs), [sweep.memory_gb * 1e9] * len(runs)]
        jobs = executor.map_array(start, runs, folders, *limits)
    except FailedJobError as error:
        raise UserError(f"--launcher=slurm: {str(error).strip().splitlines()[-1]}") from None
    print(f"submitted {len(jobs)} jobs as array {_array(jobs)}", flush=True)
    return jobs


def _array(jobs):
    return jobs[0].job_id.partition("_")[0]


def _wait(jobs, runs, out, poll_s):
    """Returns when every run has a row. Rows rather than accounting say what is done: not every cluster accounts."""
    waiting = dict(zip([job.job_id for job in jobs], zip(jobs, runs, strict=True), strict=True))
    while waiting:
        queued = _queued(_array(jobs))  # asked first: a job that leaves the queue has written its row before
        for job_id, (job, run) in list(waiting.items()):
            found = execute.outcome(out / run.folder)
            if found is None and queued is not None and job_id not in queued:
                execute.write_row(run, out / run.folder, STATES.get(_state(job), "crash"))
                found = execute.outcome(out / run.folder)
            if found is not None:
                del waiting[job_id]
                print(f"{len(jobs) - len(waiting)}/{len(jobs)} {found:8} {run.folder}", flush=True)
        if waiting:
            time.sleep(poll_s)


def _queued(array):
    """Ids of the array's jobs that wait or run, or None if the controller does not answer."""
    command = ["squeue", "--noheader", "--array", f"--jobs={array}", "--format=%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return set(done.stdout.split())
    return set() if "Invalid job id" in done.stderr else None


def _state(job):
    """What accounting says of a job, in one word: `CANCELLED by 0` is CANCELLED; empty where nobody accounts."""
    done = subprocess.run(
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job.job_id}", "--format=State"],
        capture_output=True,
        text=True,
    )
    return next(iter(done.stdout.split()), "") if done.returncode == 0 else ""
