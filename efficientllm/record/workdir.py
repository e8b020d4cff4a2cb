"""A run's folder: its owner, its config, its row, and what a later run of the same command may do with it."""

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

log = logging.getLogger("efficientllm")


class Workdir:
    """The folder of one run. Opening one makes it; raises UserError where it cannot be written or is none of ours.

    With `overwrite` the files of the run in it are removed when this one claims it: after its config has been checked.
    """

    def __init__(self, config, path=None, overwrite=False):
        self._is_default = not path
        self.path = pathlib.Path(path or _default(config)).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.code, self.code_versions = {}, []  # of config.imports: what is here now, and of all parts of the run
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
            raise UserError(f"--workdir={self.path} cannot be written: {reason}") from None

    def acquire(self):
        """Keeps other processes out until `release`; returns self. Raises UserError if one is in."""
        try:
            self._lock.acquire()
            run_files.remove_partial(self.path)
            log_file = self.path / "log.txt"
            self._log_start = log_file.stat().st_size if log_file.is_file() else 0
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}") from None
        return self

    def release(self, refused=False):
        """Lets others in. Of a run in a new folder that was `refused` before a checkpoint or a row, nothing stays."""
        if refused and self._is_new and self.steps_saved() is None and not (self.path / run_files.ROW).exists():
            run_files.remove(self.path)
            for name in ("log.txt", run_files.MARKER):
                (self.path / name).unlink(missing_ok=True)
        self._lock.release()
        if self._is_new:
            with contextlib.suppress(OSError):  # it holds something, as it should
                self.path.rmdir()

    @property
    def shown(self):
        """The path as a user would write it: relative where that is shorter."""
        here = pathlib.Path.cwd()
        return self.path.relative_to(here) if self.path.is_relative_to(here) else self.path

    @property
    def siblings(self):
        """The folder that holds the runs to compare with: `runs` for a default workdir."""
        return self.shown.parents[1] if self._is_default else self.shown.parent

    def finished(self):
        """The row of a run that ended well, or None."""
        row = self._row()
        return row if row and row.get("outcome") == "ok" else None

    def answer(self, config):
        """Why nothing is left to do for `config` here, or None. Raises UserError where another run is in the way."""
        if self._overwrite:
            return None
        asked, row, steps = plain(config), self.finished(), self.steps_saved()
        marked = self._marker().get("asked")
        if row:
            old = marked if row.get("task") == "plan" else row.get("config")
            return resume_check.of_finished(self, old, asked, self._changed_code(row), steps)
        old = marked or self._read("config.json")
        if old is not None:
            resume_check.of_unfinished(self, old, asked, steps)
        return None

    def steps_saved(self):
        """The newest step that a folder of checkpoints names, or None."""
        if not self.checkpoints.is_dir():
            return None
        return max((int(entry.name) for entry in self.checkpoints.iterdir() if entry.name.isdecimal()), default=None)

    def claim(self, config, asked=None):
        """Writes the marker and `config.json`, after removing the run that is to be overwritten.

        `asked` is the config of the command line, if the run goes by another one. Raises UserError as `answer` does.
        """
        self.answer(asked or config)
        if self._overwrite and run_files.is_run(self.path):
            self._mark({"program": "efficientllm"})  # a removal that is cut off can then be repeated
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
        stays = run_files.remove(self.path)
        log = self.path / "log.txt"
        if log.is_file():
            lines = log.read_bytes()[self._log_start :]
            log.write_bytes(lines)
        if stays:
            print(f"{self.shown}: left in place, as no run writes them: {', '.join(stays)}")

    def code_provenance(self):
        """What a row says of the content of `config.imports`: `{"code": [{name: hash}, ...]}`, one for each change."""
        versions = self.code_versions or [self.code]
        return {"code": versions} if any(versions) else {}

    def write_row(self, row):
        """Writes `record.json` -> its path; beside a row that is ok, one that is not goes into `record.failed.json`."""
        keeps = row["outcome"] != "ok" and self.finished() is not None
        file = self.path / (run_files.FAILED_ROW if keeps else run_files.ROW)
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
        old = versions[-1] if versions else self.code  # a row without them is older than they are
        names = sorted(name for name in old.keys() | self.code.keys() if old.get(name) != self.code.get(name))
        return [f"imports (the content of {name})" for name in names]


def _default(config):
    """`runs/NAME/HASH`. Raises UserError for a name that leads elsewhere."""
    folder = os.path.normpath(pathlib.Path("runs") / config.name)
    if not folder.startswith(f"runs{os.sep}"):
        raise UserError(
            f"config.name = {config.name!r}: names a folder of runs/, and leads out of it; take a plain name"
        )
    return pathlib.Path(folder) / config_hash(config)
