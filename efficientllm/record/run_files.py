"""Files of a run's folder: which ones a run writes, whether a folder holds a run, and how its files are removed."""

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
}  # config.json files of other programs lack some of these
# A new run must not find these in a folder that is not a run: it would read or replace them.
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
    "picture.json",
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
    r"samples/((grid|nearest|\d+)\.png|samples\.json)",
    r"picture\.json",
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
_NOT_REMOVED = (
    MARKER,
    "owner.json",
    "log.txt",
    "output.txt",
)  # the first three are the running process's, the last a sweep's
_FOLDERS = ("checkpoints", "samples", "adapter", "tokenizer", "plugins")


def read_object(file: pathlib.Path, where: str | None = None) -> dict | None:
    """Reads the JSON object in a file; None if there is no file. Raises UserError for anything else."""
    return json_text.read(file, where=where) if files.is_there(file) else None


def is_run(folder: pathlib.Path) -> bool:
    """Whether the files prove that the folder is a run of this program: its marker, config or row."""

    def holds(name, is_proof):
        try:
            content = read_object(folder / name)
        except UserError:
            return False
        return content is not None and is_proof(content)

    return (
        holds(MARKER, lambda marker: marker.get("program") == "efficientllm")
        or holds("config.json", lambda config: config.keys() >= _CONFIG_KEYS and isinstance(config["train"], dict))
        or holds(ROW, lambda row: row.keys() >= {"schema_version", "outcome", "task", "sources", "provenance"})
    )


def check_free(folder: pathlib.Path) -> None:
    """Raises UserError for a folder in which a new run would replace files of something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder}: cannot be written, it is a file; take another workdir")
    occupied = [name for name in _CLAIMED if (folder / name).exists() or (folder / name).is_symlink()]
    if occupied and not is_run(folder):
        raise UserError(
            f"--workdir={folder} holds {occupied[0]} and is not a run of this program; nothing was changed, take "
            "another workdir"
        )


def check_removable(folder: pathlib.Path) -> None:
    """Raises UserError for --overwrite of a link, a home folder or a root folder."""
    if folder.is_symlink():
        raise UserError(f"--workdir={folder} --overwrite: it is a link to {folder.resolve()}; name that folder itself")
    if folder.resolve() in (pathlib.Path(folder.anchor), pathlib.Path.home().resolve()):
        raise UserError(f"--workdir={folder} --overwrite: the run's files lie in a home or root folder; take another")


def remove(folder: pathlib.Path) -> list[str]:
    """Removes the files of a run from its folder. Returns the names that stay, because no run writes them.

    Links are removed, never their targets. The marker stays, so that an interrupted removal can be repeated.
    """
    for file in _matching(folder, (*_FILES, *_PARTIAL)):
        _remove(file)
    for name in _FOLDERS:
        inner = folder / name
        if inner.is_symlink():
            inner.unlink()
        elif inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in _NOT_REMOVED)


def remove_partial(folder: pathlib.Path) -> None:
    """Removes temporary files of writes that were interrupted, by a kill for example."""
    for file in _matching(folder, _PARTIAL):
        _remove(file)


def _remove(path):
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _matching(folder, patterns):
    """Entries of the folder, and of its subfolders that a run makes, whose relative path matches a pattern."""
    pattern = re.compile("|".join(f"(?:{name})" for name in patterns))
    inner = [folder / name for name in _FOLDERS if (folder / name).is_dir() and not (folder / name).is_symlink()]
    entries = [entry for base in (folder, *inner) for entry in base.iterdir()]
    return [entry for entry in entries if pattern.fullmatch(entry.relative_to(folder).as_posix())]
