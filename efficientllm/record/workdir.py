"""Workdir, the folder of a run: its lock, config and row, and whether a later run may resume or replace it."""

import contextlib
import datetime
import json
import logging
import os
import pathlib

from efficientllm.config.plain import config_hash, plain
from efficientllm.errors import UserError
from efficientllm.record import resume_check, run_files
from efficientllm.record.lock import Lock
from efficientllm.record.row import write_record
from efficientllm.runtime.atomic_write import write_atomically
from efficientllm.typing import Config, PathLike, Record

log = logging.getLogger("efficientllm")


class Workdir:
    """The folder of one run, created when opened. Raises UserError if it cannot be written or holds other files.

    With `overwrite`, `claim` removes the files of the run in it: after the new config has been checked.
    """

    def __init__(self, config: Config, path: PathLike | None = None, overwrite: bool = False):
        self._is_default = not path
        self.path = pathlib.Path(path or _default(config)).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.code: dict[str, str] = {}  # hashes of the files of config.imports
        self.code_versions: list[dict[str, str]] = []  # those of all parts of the run
        self._overwrite, self._log_start, self._lock = overwrite, 0, Lock(self.path)
        try:
            run_files.check_free(self.path)
            if overwrite and run_files.is_run(self.path):
                run_files.check_removable(self.path)
            self._is_new = not self.path.exists() or not any(self.path.iterdir())
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--workdir={self.path}: cannot be written: {reason}") from None

    def acquire(self) -> "Workdir":
        """Locks the folder until `release`; returns self. Raises UserError if another process holds it."""
        try:
            self._lock.acquire()
            run_files.remove_partial(self.path)
            log_file = self.path / "log.txt"
            self._log_start = log_file.stat().st_size if log_file.is_file() else 0
        except OSError as error:
            raise UserError(f"--workdir={self.path}: cannot be written: {error.strerror}") from None
        return self

    def release(self, refused: bool = False) -> None:
        """Unlocks the folder. A new run that was `refused` before its first checkpoint or row leaves nothing behind."""
        if refused and self._is_new and self.steps_saved() is None and not (self.path / run_files.ROW).exists():
            run_files.remove(self.path)
            for name in ("log.txt", run_files.MARKER):
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty, as expected
                self.path.rmdir()

    @property
    def shown(self) -> pathlib.Path:
        """The path as a user would write it: relative where that is shorter."""
        here = pathlib.Path.cwd()
        return self.path.relative_to(here) if self.path.is_relative_to(here) else self.path

    @property
    def siblings(self) -> pathlib.Path:
        """The folder that holds the runs to compare with: `runs` for a default workdir."""
        return self.shown.parents[1] if self._is_default else self.shown.parent

    def finished(self) -> Record | None:
        """The row of a run that ended well, or None."""
        row = self._row()
        return row if row and row.get("outcome") == "ok" else None

    def answer(self, config: Config) -> str | None:
        """Why nothing is left to do for `config`, or None. Raises UserError if the folder holds another run."""
        if self._overwrite:
            return None
        requested, row, steps = plain(config), self.finished(), self.steps_saved()
        marked = self._marker().get("asked")
        if row:
            old = marked if row.get("task") == "plan" else row.get("config")
            return resume_check.check_finished(self, old, requested, self._changed_code(row), steps)
        old = marked or self._read("config.json")
        if old is not None:
            resume_check.check_unfinished(self, old, requested, steps)
        return None

    def steps_saved(self) -> int | None:
        """The newest step with a checkpoint, or None."""
        if not self.checkpoints.is_dir():
            return None
        return max((int(entry.name) for entry in self.checkpoints.iterdir() if entry.name.isdecimal()), default=None)

    def claim(self, config: Config, asked: Config | None = None) -> None:
        """Writes the marker and `config.json`, after removing the run that is to be overwritten.

        `asked` is the config of the command line, if the run uses a changed one. Raises UserError as `answer` does.
        """
        self.answer(asked or config)
        if self._overwrite and run_files.is_run(self.path):
            self._mark({"program": "efficientllm"})  # an interrupted removal can then be repeated
            self._clear()
        old = {} if self._overwrite else self._marker()
        self.code_versions = [
            *old.get("code", []),
            *([self.code] if self.code not in (old.get("code") or [{}]) else []),
        ]
        if len(self.code_versions) > 1:
            log.warning("the code of config.imports has changed since this run began; its row names each version")
        self._mark(
            {
                "program": "efficientllm",
                "created": old.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "config_hash": config_hash(asked or config),
                "asked": plain(asked or config),
                "code": self.code_versions,
            }
        )
        write_atomically(self.path / "config.json", json.dumps(plain(config), indent=2))

    def _mark(self, content):
        write_atomically(self.path / run_files.MARKER, json.dumps(content, indent=2))

    def _clear(self):
        remaining = run_files.remove(self.path)
        log = self.path / "log.txt"
        if log.is_file():
            lines = log.read_bytes()[self._log_start :]
            log.write_bytes(lines)
        if remaining:
            print(f"{self.shown}: left in place, as no run writes them: {', '.join(remaining)}")

    def code_provenance(self) -> dict[str, list]:
        """Hashes of `config.imports` for the row: `{"code": [{name: hash}, ...]}`, one entry per change."""
        versions = self.code_versions or [self.code]
        return {"code": versions} if any(versions) else {}

    def write_row(self, row: Record) -> pathlib.Path:
        """Writes `record.json` and returns its path. A failed row beside a good one goes to `record.failed.json`."""
        keeps_row = row["outcome"] != "ok" and self.finished() is not None
        file = self.path / (run_files.FAILED_ROW if keeps_row else run_files.ROW)
        write_record(row, file)
        if row["outcome"] == "ok":
            (self.path / run_files.FAILED_ROW).unlink(missing_ok=True)
        return file

    def _row(self):
        with contextlib.suppress(UserError):
            return run_files.read_object(self.path / run_files.ROW)
        return None

    def _marker(self):
        return self._read(run_files.MARKER) or {}

    def _read(self, name):
        try:
            return run_files.read_object(self.path / name, f"--workdir={self.path}: its {name}")
        except UserError as error:
            raise UserError(f"{error}; take another workdir, or --overwrite it") from None

    def _changed_code(self, row):
        provenance = row.get("provenance")
        versions = provenance.get("code") if isinstance(provenance, dict) else None
        old = versions[-1] if versions else self.code  # rows of older versions have none
        names = sorted(name for name in old.keys() | self.code.keys() if old.get(name) != self.code.get(name))
        return [f"imports (the content of {name})" for name in names]


def _default(config):
    """The default workdir, `runs/NAME/HASH`. Raises UserError for a name that leads elsewhere."""
    folder = os.path.normpath(pathlib.Path("runs") / config.name)
    if not folder.startswith(f"runs{os.sep}"):
        raise UserError(f"config.name = {config.name!r}: leads out of the folder runs/; take a plain name")
    return pathlib.Path(folder) / config_hash(config)
