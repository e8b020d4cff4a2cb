"""The files of a run's folder: which a run writes, whether a folder is a run at all, and how its files are removed."""

import pathlib
import re
import shutil

from efficientllm.errors import UserError
from efficientllm.untrusted import files, json_text

MARKER = "run.json"
ROW, FAILED_ROW = "record.json", "record.failed.json"
_CONFIG_KEYS = {
    "task",
    "seed",
    "mesh",
    "model",
    "train",
    "eval",
    "checkpoint",
}  # other programs' config.json has not all
# What a run must not find in a folder that is none: it would read or replace them.
_CLAIMED = (
    "config.json",
    ROW,
    FAILED_ROW,
    "checkpoints",
    "samples",
    "adapter",
    "tokenizer",
    "results.json",
    "calibration.json",
)
_FILES = (
    r"config\.json",
    r"record(\.failed)?\.json",
    r"record-\d+\.failed",
    r"results\.json",
    r"calibration\.json",
    r"events\.out\.tfevents\..*",
    r"checkpoints/\d+",
    r"checkpoints/(unreadable|diverged)-\d+(\.\d+)?",
    r"checkpoints/\d+\.orbax-checkpoint-tmp.*",
    r"samples/generated\.jsonl",
    r"adapter/adapter_(config\.json|model\.safetensors)",
    r"tokenizer/((tokenizer|tokenizer_config|generation_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt)",
    r"tokenizer/(tokenizer\.model|chat_template\.jinja|additional_chat_templates)",
    r"\.tokenizer-\d+",
    r"tokenizer/[\w-]+\.(json|txt|model|jinja)",
    r"plugins/profile",
)
_PARTIAL = (  # of writes that were cut off
    r"\.(record|record\.failed|config|run)\.json-\d+",
    r"record(\.failed)?\.json\.\d+\.partial",  # of rows, until 2026-11
    r"\.probe-\d+",
    r"\.tokenizer-\d+",
    r"adapter/\.adapter_(model\.safetensors|config\.json)-\d+",
)
_KEPT = (MARKER, "owner.json", "log.txt", "output.txt")  # the first three are the running process's, the last a sweep's
_FOLDERS = ("checkpoints", "samples", "adapter", "tokenizer", "plugins")


def read_object(file, where=None):
    """The JSON object in a file, None where there is no file. Raises UserError for anything else."""
    return json_text.read(file, where=where) if files.is_there(file) else None


def is_run(folder):
    """Whether the files prove that the folder is a run of this program: its marker, config or row."""

    def holds(name, proves):
        try:
            found = read_object(folder / name)
        except UserError:
            return False
        return found is not None and proves(found)

    return (
        holds(MARKER, lambda found: found.get("program") == "efficientllm")
        or holds("config.json", lambda found: found.keys() >= _CONFIG_KEYS and isinstance(found["train"], dict))
        or holds(ROW, lambda found: found.keys() >= {"schema_version", "outcome", "task", "sources", "provenance"})
    )


def check_free(folder):
    """Refuses a folder in which a new run would replace files that are not its own. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} cannot be written: it is a file; take another workdir")
    found = [name for name in _CLAIMED if (folder / name).exists() or (folder / name).is_symlink()]
    if found and not is_run(folder):
        raise UserError(
            f"--workdir={folder} holds {found[0]} and is no run of this program; nothing is touched, take another "
            "workdir"
        )


def check_removable(folder):
    """Refuses to empty what can hardly be meant. Raises UserError."""
    if folder.is_symlink():
        raise UserError(f"--workdir={folder} --overwrite: it is a link to {folder.resolve()}; name that folder itself")
    if folder.resolve() in (pathlib.Path(folder.anchor), pathlib.Path.home().resolve()):
        raise UserError(f"--workdir={folder} --overwrite: the run's files lie in a home or root folder; take another")


def remove(folder):
    """Removes what a run writes, from a folder that is one -> names that stay, because no run writes them.

    Links are removed, never what they lead to. The marker stays, so that a removal that is cut off can be repeated.
    """
    for file in _matching(folder, (*_FILES, *_PARTIAL)):
        _remove(file)
    for name in _FOLDERS:
        inner = folder / name
        if inner.is_symlink():
            inner.unlink()
        elif inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in _KEPT)


def remove_partial(folder):
    """Removes what writes left behind that were cut off, by a kill for example."""
    for file in _matching(folder, _PARTIAL):
        _remove(file)


def _remove(path):
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _matching(folder, patterns):
    """Entries of the folder, and of the folders in it that a run makes, whose relative path is in `patterns`."""
    known = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    inner = [folder / name for name in _FOLDERS if (folder / name).is_dir() and not (folder / name).is_symlink()]
    entries = [entry for base in (folder, *inner) for entry in base.iterdir()]
    return [entry for entry in entries if known.fullmatch(entry.relative_to(folder).as_posix())]
