"""A run's folder: its config, its row, and what a later run of the same command may do with it."""

import hashlib
import json
import os
import pathlib
import shutil

from efficientllm.errors import UserError

# Keys that may change between the parts of a resumed run: they change how it is watched, saved or spread, not what it
# computes.
FREE = (
    "name",
    "task",
    "imports",
    "mesh",
    "train.steps",
    "train.log_every",
    "eval",
    "checkpoint",
    "sample",
    "metrics",
    "plan",
)


def plain(config):
    """The config as JSON holds it: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(config.to_dict()))


def config_hash(config):
    """Twelve hex digits that name the config's content."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


class Workdir:
    """The folder of one run. Opening one makes it; raises UserError where it cannot be written."""

    def __init__(self, config, path=None, overwrite=False):
        default = pathlib.Path("runs") / config.name / config_hash(config)
        self._is_default = not path
        self.path = pathlib.Path(path or default).absolute()
        self.checkpoints = self.path / "checkpoints"
        if overwrite and (self.path / "config.json").exists():
            shutil.rmtree(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}") from None

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
        try:
            record = json.loads((self.path / "record.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return record if record.get("outcome") == "ok" else None

    def claim(self, config):
        """Writes `config.json`, or checks that the run in here computes the same. Raises UserError naming the keys."""
        file = self.path / "config.json"
        new = plain(config)
        if file.exists():
            old = json.loads(file.read_text())
            if keys := changed(old, new):
                raise UserError(
                    f"--workdir={self.path} holds a run with another config: {', '.join(keys)}; "
                    "take another workdir, or --overwrite it"
                )
        write_atomically(file, json.dumps(new, indent=2))


def changed(old, new):
    """`key (old -> new)` for every key outside FREE whose values differ."""
    a, b = flatten(old), flatten(new)
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key} ({a.get(key)!r} -> {b.get(key)!r})" for key in keys if not _is_free(key)]


def _is_free(key):
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def flatten(tree, prefix=""):
    """`{"train.steps": 300, ...}` of a nested dict."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}


def write_atomically(file, text):
    """Replaces `file` by `text`, whole or not at all."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(file)
