"""Execution of one run in its own process; every outcome, crashes included, leaves a row."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from efficientllm.config.plain import plain
from efficientllm.errors import UserError
from efficientllm.metrics import host
from efficientllm.record.row import OUTCOMES, build_record, read_record, wall_seconds, write_record
from efficientllm.report import file_excerpts
from efficientllm.runtime import user_cache
from efficientllm.sweep.spec import Run
from efficientllm.untrusted import json_text

MESSAGE_CHARS = 300  # of a failed run's last message
TAIL = 20  # lines of output in the row of a failed run
GRACE_S = 60  # seconds for a run to save after SIGTERM
POLL_S = 0.2  # between two readings of a run's memory
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses of a run that was stopped and has saved
MEMORY_SHARE = 0.9  # of the machine's memory; a run above it is killed before the kernel kills any process


def execute_run(
    run: Run,
    folder: str | os.PathLike[str],
    timeout_s: float,
    memory_bytes: float = 0,
    command: Sequence[str] = (sys.executable, "-m", "efficientllm.main"),
) -> str:
    """Executes `run` in `folder` unless it has a row -> its outcome.

    A run with more resident bytes than `memory_bytes` (0: MEMORY_SHARE of the machine's) is killed as `oom`. A run
    without a row gets one made from its exit status. An interrupted run has no row: the same call resumes it.
    """
    folder = pathlib.Path(folder)
    if (outcome := read_outcome(folder)) is not None:
        return outcome
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        limit = memory_bytes or MEMORY_SHARE * host.memory_total_bytes()
        status = _process((*command, *run.argv, f"--workdir={folder}"), output, timeout_s, limit)
    if status != "interrupted":
        write_row(run, folder, status)
    return read_outcome(folder) or status


def read_outcome(folder: str | os.PathLike[str]) -> str | None:
    """Reads the outcome in a folder's row; None without a row, or if its `sweep` entry is missing."""
    try:
        row = read_record(pathlib.Path(folder) / "record.json")
    except UserError:
        return None
    return row["outcome"] if "sweep" in row else None


def run_seconds(folder: str | os.PathLike[str]) -> float | None:
    """Wall time of the run whose row is in a folder; None if it did not end by itself."""
    try:
        return wall_seconds(read_record(pathlib.Path(folder) / "record.json"))
    except UserError:
        return None


def last_message(folder: str | os.PathLike[str]) -> str:
    """The last message of a failed run: its row's error, or the last line of its log or output."""
    folder = pathlib.Path(folder)
    try:
        row = read_record(folder / "record.json")
    except UserError:
        row = {}
    for output in (row.get("error"), row.get("log_tail"), _lines(folder / "log.txt"), _lines(folder / "output.txt")):
        lines = output.splitlines() if isinstance(output, str) else output or []
        if message := next((str(line).strip() for line in reversed(lines) if str(line).strip()), None):
            return message if len(message) <= MESSAGE_CHARS else f"{message[: MESSAGE_CHARS - 3]}..."
    return "it left no message"


def _lines(file):
    """Reads the last lines of a text file."""
    return file_excerpts.read_end(file).splitlines()[-TAIL:]


def set_row_aside(folder: str | os.PathLike[str]) -> None:
    """Renames the row of a failed run, so that the run is repeated."""
    file = pathlib.Path(folder) / "record.json"
    file.replace(file.with_name(f"record-{int(time.time())}.failed"))


def _process(argv, output, timeout_s, memory_bytes):
    """Runs a process -> its exit status, `timeout`, `oom`, or `interrupted` if this process was told to stop."""
    # Every run of a sweep compiles: what a program costs the first time is among the numbers compared.
    variables = os.environ | {user_cache.PROGRAMS: "off"}
    process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=variables)
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            try:
                status = process.wait(POLL_S)
                return "interrupted" if status in STOPPED else status
            except subprocess.TimeoutExpired:
                used = host.rss_bytes(process.pid)
            if used > memory_bytes:
                process.kill()
                process.wait()
                output.write(f"stopped at {used / 1e9:.2f} GB resident, over {memory_bytes / 1e9:.2f} GB\n".encode())
                return "oom"
        _stop(process, signal.SIGTERM)
        return "timeout"
    except KeyboardInterrupt:  # at a terminal the run got SIGINT too
        _stop(process, signal.SIGTERM)
        return "interrupted"


def _stop(process, signum):
    process.send_signal(signum)
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def outcome_of_exit(ended: str | int) -> str:
    """The outcome of a process without a row. Signals are negative, or 128 + signal from a shell."""
    if ended in OUTCOMES:
        return ended
    if ended in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "oom"  # an unexplained SIGKILL is almost always the kernel's out-of-memory killer
    return "invalid" if ended == 2 else "crash"


def write_row(run: Run, folder: pathlib.Path, ended: str | int) -> None:
    """Adds the run's place in the sweep to its row; makes a row if the run left none."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "record.json"
    try:
        row = read_record(file)
    except UserError:
        row = _row_of_failed(run, folder, ended)
    if ended == "timeout":
        row["outcome"] = "timeout"
    write_record(row | {"sweep": run.place}, file)


def _config(run, folder):
    """The config that the run wrote; else the one its command line describes; else the command line."""
    from efficientllm import main

    try:
        return json_text.read(folder / "config.json")
    except UserError:
        pass
    try:
        return plain(main.parse(list(run.argv))[0])
    except UserError:
        return {"seed": run.seed, "command": list(run.argv)}


def _row_of_failed(run, folder, ended):
    config = _config(run, folder)
    row = build_record(
        outcome=outcome_of_exit(ended),
        name=run.variant,
        task=config.get("task", "unknown"),
        config=config,
        provenance={"exit_status": ended, "host": {"name_hash": host.name_hash()}, "ended": time.time()},
    )
    return row | {"log_tail": _lines(folder / "output.txt")}
