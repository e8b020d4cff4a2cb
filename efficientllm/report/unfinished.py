"""Runs without a row: still running, or stopped."""

import contextlib
import pathlib
import time
from collections.abc import Iterable

from efficientllm.errors import UserError
from efficientllm.record import lock
from efficientllm.report import file_excerpts
from efficientllm.untrusted import json_text

RECENT_S = 600.0  # a run that wrote within these seconds may still go on
_LINES = 12
_LOGS = ("log.txt", "output.txt")


def list_unfinished(folders: Iterable[pathlib.Path], now: float | None = None) -> list[dict[str, str]]:
    """An entry per run folder: `path`, `state` (`running`, `stopped`), `said` (last line), and the log's `tail`."""
    return [_entry(folder, time.time() if now is None else now) for folder in folders]


def _entry(folder, now):
    lines = _log(folder)
    written = max(_times(folder), default=0.0)
    alive = _alive(folder)
    recent = now - written < RECENT_S and not (lines and "the same command resumes" in lines[-1])
    running = recent if alive is None else alive
    return {
        "path": str(folder),
        "state": "running" if running else "stopped",
        "said": f"{_last(lines)} ({_age(now - written)} ago)",
        "tail": "\n".join(lines[-_LINES:]),
    }


def _alive(folder):
    """Whether the process that owns the folder is alive; None without an owner, or if it is on another machine."""
    try:
        owner = json_text.parse(file_excerpts.read_beginning(folder / lock.FILE), folder / lock.FILE)
    except UserError:
        return None
    return lock.is_alive(owner) if isinstance(owner, dict) and owner else None


def _times(folder):
    """Modification times of the folder's files; a running process may remove files meanwhile."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if file.is_file():
                yield file.stat().st_mtime


def _last(lines):
    return next((line for line in reversed(lines) if line.strip()), "nothing is logged yet")[:300]


def _log(folder):
    for name in _LOGS:
        if lines := file_excerpts.read_end(folder / name).splitlines():
            return lines
    return []


def _age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
