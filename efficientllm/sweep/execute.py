"""Execution of one run in its own process; every outcome, crashes included, leaves a row."""

import datetime
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
from efficientllm.record.row import OUTCOMES, build_record, read_record, write_record
from efficientllm.report import file_excerpts
from efficientllm.sweep.spec import Run
from efficientllm.untrusted import json_text

LONGEST = 300  # characters of a failed run's last message
TAIL = 20  # lines of the log in the row of a run that failed
GRACE_S = 60  # for a run to save after it is told to stop
LOOK_S = 0.2  # between two readings of a run's memory
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses of a run that was stopped and has saved
ROOM = 0.9  # share of the machine's memory; above it a run is stopped before the kernel kills some process


def execute_run(
    run: Run,
    folder: str | os.PathLike[str],
    timeout_s: float,
    memory_bytes: float = 0,
    command: Sequence[str] = (sys.executable, "-m", "efficientllm.main"),
) -> str:
    """Executes `run` in `folder` unless it has a row -> its outcome.

    A run with more than `memory_bytes` resident (0: ROOM of the machine's) is stopped as `oom`. If the run wrote no
    row, one is made here from its exit status. An interrupted run has no row: the same call resumes it.
    """
    folder = pathlib.Path(folder)
    if (earlier := read_outcome(folder)) is not None:
        return earlier
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        limit = memory_bytes or ROOM * host.memory_total_bytes()
        ended = _process((*command, *run.argv, f"--workdir={folder}"), output, timeout_s, limit)
    if ended != "interrupted":
        write_row(run, folder, ended)
    return read_outcome(folder) or ended


def read_outcome(folder: str | os.PathLike[str]) -> str | None:
    """Reads the outcome in a folder's row; None without a row that a sweep has marked."""
    try:
        row = read_record(pathlib.Path(folder) / "record.json")
    except UserError:
        return None
    return row["outcome"] if "sweep" in row else None


def run_seconds(folder: str | os.PathLike[str]) -> float | None:
    """Wall time of the run whose row is in a folder; None if it did not end by itself."""
    try:
        provenance = read_record(pathlib.Path(folder) / "record.json")["provenance"]
        begin, end = (datetime.datetime.fromisoformat(provenance[key]) for key in ("started", "ended"))
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return (end - begin).total_seconds()


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
            return message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
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
    process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    end = time.monotonic() + timeout_s
    try:
        while time.monotonic() < end:
            try:
                ended = process.wait(LOOK_S)
                return "interrupted" if ended in STOPPED else ended
            except subprocess.TimeoutExpired:
                used = host.rss_bytes(process.pid)
            if used > memory_bytes:
                process.kill()
                process.wait()
                output.write(f"stopped at {used / 1e9:.2f} GB resident, over {memory_bytes / 1e9:.2f} GB\n".encode())
                return "oom"
        _stop(process, signal.SIGTERM)
        return "timeout"
    except KeyboardInterrupt:  # the process has had the same signal from the terminal
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
        row = _failed(run, folder, ended)
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


def _failed(run, folder, ended):
    config = _config(run, folder)
    row = build_record(
        outcome=outcome_of_exit(ended),
        name=run.variant,
        task=config.get("task", "unknown"),
        config=config,
        provenance={"exit_status": ended, "host": {"name_hash": host.name_hash()}, "ended": time.time()},
    )
    return row | {"log_tail": _lines(folder / "output.txt")}
