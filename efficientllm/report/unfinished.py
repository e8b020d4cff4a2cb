"""Runs without a row: which of them go on, and which were stopped or killed."""

import time

from efficientllm.report import texts

RECENT_S = 600.0  # a run that wrote within these seconds may still go on
_LINES = 12
_LOGS = ("log.txt", "output.txt")


def unfinished(folders, now=None):
    """An entry a folder of a run: `path`, `state` (`running`, `stopped`), `said`, and the log's `tail`."""
    return [_entry(folder, time.time() if now is None else now) for folder in folders]


def _entry(folder, now):
    lines = _log(folder)
    written = max((file.stat().st_mtime for file in folder.iterdir() if file.is_file()), default=0.0)
    running = now - written < RECENT_S and not (lines and "the same command resumes" in lines[-1])
    return {
        "path": str(folder),
        "state": "running" if running else "stopped",
        "said": f"{_last(lines)} ({_age(now - written)} ago)",
        "tail": "\n".join(lines[-_LINES:]),
    }


def _last(lines):
    return next((line for line in reversed(lines) if line.strip()), "nothing is logged yet")[:300]


def _log(folder):
    for name in _LOGS:
        if lines := texts.end(folder / name).splitlines():
            return lines
    return []


def _age(seconds):
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
