"""One run as a process of its own, and its outcome as a row, whatever becomes of it."""

import datetime
import pathlib
import signal
import subprocess
import sys
import time

from efficientllm.config.plain import plain
from efficientllm.errors import UserError
from efficientllm.metrics import host
from efficientllm.record import row as record
from efficientllm.report import file_excerpts
from efficientllm.untrusted import json_text

LONGEST = 300  # characters of what is said of a failed run
TAIL = 20  # lines of the log in the row of a run that failed
GRACE_S = 60  # for a run that is told to stop: it saves
LOOK_S = 0.2  # between two looks at a run's memory
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # a run that somebody stopped, and that has saved
ROOM = 0.9  # of the machine's memory: a run that takes more is stopped before the kernel picks something to kill


def execute(run, folder, timeout_s, memory_bytes=0, command=(sys.executable, "-m", "efficientllm.main")):
    """Runs `run` in `folder` unless it has a row -> its outcome.

    A run that is resident with more than `memory_bytes` (0: ROOM of the machine's) is stopped and is `oom`. The row is
    the run's own where it wrote one, else made here from how the process ended. An interrupted run has no row: the same
    call resumes it.
    """
    folder = pathlib.Path(folder)
    if (known := outcome(folder)) is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab") as output:
        limit = memory_bytes or ROOM * host.memory_total_bytes()
        ended = _process((*command, *run.argv, f"--workdir={folder}"), output, timeout_s, limit)
    if ended != "interrupted":
        write_row(run, folder, ended)
    return outcome(folder) or ended


def outcome(folder):
    """The outcome in a folder's row, or None where there is no row that a sweep has marked."""
    try:
        found = record.read_record(pathlib.Path(folder) / "record.json")
    except UserError:
        return None
    return found["outcome"] if "sweep" in found else None


def seconds(folder):
    """Wall time of the run whose row is in a folder, if it ended by itself, or None."""
    try:
        told = record.read_record(pathlib.Path(folder) / "record.json")["provenance"]
        begin, end = (datetime.datetime.fromisoformat(told[key]) for key in ("started", "ended"))
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return (end - begin).total_seconds()


def why(folder):
    """The last thing that a failed run said: its row's error, or the last line of its log or output."""
    folder = pathlib.Path(folder)
    try:
        row = record.read_record(folder / "record.json")
    except UserError:
        row = {}
    for said in (row.get("error"), row.get("log_tail"), _lines(folder / "log.txt"), _lines(folder / "output.txt")):
        lines = said.splitlines() if isinstance(said, str) else said or []
        if found := next((str(line).strip() for line in reversed(lines) if str(line).strip()), None):
            return found if len(found) <= LONGEST else f"{found[: LONGEST - 3]}..."
    return "it said nothing"


def _lines(file):
    """The last lines of a text that may be long."""
    return file_excerpts.read_end(file).splitlines()[-TAIL:]


def forget(folder):
    """Sets the row of a failed run aside, so that it runs again."""
    file = pathlib.Path(folder) / "record.json"
    file.replace(file.with_name(f"record-{int(time.time())}.failed"))


def _process(argv, output, timeout_s, memory_bytes):
    """How the process ended: an exit status, `timeout`, `oom`, or `interrupted` if we were told to stop."""
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


def typed(ended):
    """The outcome of a process that left no row: a signal's number is negative, or above 128 from a shell."""
    if ended in record.OUTCOMES:
        return ended
    if ended in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "oom"  # nobody else kills without a word: the kernel did, for memory
    return "invalid" if ended == 2 else "crash"


def write_row(run, folder, ended):
    """Adds the run's place to the row in its folder, or makes the row of how it `ended`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "record.json"
    try:
        found = record.read_record(file)
    except UserError:
        found = _failed(run, folder, ended)
    if ended == "timeout":
        found["outcome"] = "timeout"
    record.write_record(found | {"sweep": run.place}, file)


def _config(run, folder):
    """The config that the run wrote, or that its command line means, or its command line."""
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
    found = record.build_record(
        outcome=typed(ended),
        name=run.variant,
        task=config.get("task", "unknown"),
        config=config,
        provenance={"exit_status": ended, "host": {"name_hash": host.name_hash()}, "ended": time.time()},
    )
    return found | {"log_tail": _lines(folder / "output.txt")}
