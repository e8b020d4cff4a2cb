"""Slurm launcher, through `submitit`: a job array with one run per allocation, alone on its nodes."""

import pathlib
import subprocess
import time
import typing
from collections.abc import Sequence

from efficientllm.errors import UserError
from efficientllm.runtime import optional_packages
from efficientllm.sweep import execute
from efficientllm.sweep.spec import Run, Sweep

POLL_S = 5.0  # between two queries of the controller
start = execute.execute_run  # what a job calls
# Outcome of a job without a row, by its state in Slurm's accounting; any other state is a crash.
STATES = {"OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout", "DEADLINE": "timeout"}


def open_executor(out: pathlib.Path, partition: str | None = None) -> typing.Any:
    """Opens submitit's executor, with scripts and logs in `out`. Raises UserError without submitit or Slurm."""
    try:
        import submitit
    except ImportError:
        raise UserError(f"--launcher=slurm needs submitit: {optional_packages.remedy('sweep')}") from None
    try:
        executor = submitit.AutoExecutor(folder=(out / "slurm").absolute(), cluster="slurm")
    except RuntimeError as error:
        raise UserError(f"--launcher=slurm: {error}") from None
    # Measured runs must not share a node.
    executor.update_parameters(name=out.name, slurm_exclusive=True)
    if partition:
        executor.update_parameters(slurm_partition=partition)
    return executor


def submit_runs(
    executor: typing.Any, runs: Sequence[Run], out: pathlib.Path, sweep: Sweep, poll_s: float = POLL_S
) -> list[str] | None:
    """Submits the runs without a row and waits -> the outcomes of all, or None if stopped.

    A job that Slurm restarts finds its row or its checkpoints. For a job that Slurm kills the row is made here.
    Raises UserError if Slurm refuses the array.
    """
    todo = [run for run in runs if execute.read_outcome(out / run.folder) is None]
    if todo:
        jobs = _submit(executor, todo, out, sweep)
        try:
            _wait(jobs, todo, out, poll_s)
        except KeyboardInterrupt:
            print(f"the jobs go on (scancel {_array(jobs)} ends them); the same command finds what they leave")
            return None
    return [execute.read_outcome(out / run.folder) for run in runs]


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
    """Waits until every run has a row. Rows decide, not Slurm's accounting: not every cluster has it."""
    waiting = dict(zip([job.job_id for job in jobs], zip(jobs, runs, strict=True), strict=True))
    while waiting:
        queued = _queued(_array(jobs))  # queried before the rows: a job writes its row before it leaves the queue
        for job_id, (job, run) in list(waiting.items()):
            outcome = execute.read_outcome(out / run.folder)
            if outcome is None and queued is not None and job_id not in queued:
                execute.write_row(run, out / run.folder, STATES.get(_state(job), "crash"))
                outcome = execute.read_outcome(out / run.folder)
            if outcome is not None:
                del waiting[job_id]
                print(f"{len(jobs) - len(waiting)}/{len(jobs)} {outcome:8} {run.folder}", flush=True)
        if waiting:
            time.sleep(poll_s)


def _queued(array):
    """Ids of the array's jobs that are pending or running; None if the controller does not answer."""
    command = ["squeue", "--noheader", "--array", f"--jobs={array}", "--format=%i"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return set(done.stdout.split())
    return set() if "Invalid job id" in done.stderr else None


def _state(job):
    """State of a job in Slurm's accounting, its first word (`CANCELLED by 0`); empty without accounting."""
    done = subprocess.run(
        ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job.job_id}", "--format=State"],
        capture_output=True,
        text=True,
    )
    return next(iter(done.stdout.split()), "") if done.returncode == 0 else ""
