"""Rows found in folders: each once, whatever it is called, and what is left out with the reason."""

import dataclasses
import hashlib
import json
import os
import pathlib

from efficientllm.errors import UserError
from efficientllm.report import rows
from efficientllm.untrusted import files as untrusted
from efficientllm.untrusted import json_text

GRID = "grid"  # the folder of a sweep's tries, and their sweep's key
_HINT = "give a record.json, a run's folder or a folder of runs"


@dataclasses.dataclass
class Found:
    """Rows told apart, run folders without a row, and a line for everything that was left out."""

    rows: list
    orphans: list
    left_out: list


def find(paths):
    """`(files, orphans)`: every `record.json` under the paths, and run folders that hold none (killed, or running).

    The tries of a sweep's grid, which only chose a value for others, are left out. Raises UserError for a path that is
    not there or holds no row.
    """
    files, orphans = [], []
    for path in map(pathlib.Path, paths):
        if not untrusted.is_there(path):
            raise UserError(f"{path}: no such file or folder; {_HINT}")
        found = _below(path, "record.json") if path.is_dir() else [path]
        if not found:
            going = len(_below(path, "config.json")) if path.is_dir() else 0
            said = f"no record.json in it, {going} runs of which none has ended" if going else "no record.json in it"
            raise UserError(f"{path}: {said}; {_HINT}")
        files += [file for file in found if not _is_try(file, path)]
        if path.is_dir():
            runs = (file.parent for file in _below(path, "config.json") if not _is_try(file, path))
            orphans += [run for run in runs if not untrusted.is_there(run / "record.json")]
    return list({os.path.realpath(file): file for file in files}.values()), orphans


def collect(paths):
    """The Found of these paths: what is no row is left out with the reason, as are copies and a grid's tries.

    Raises UserError where nothing is left, and for a file that was named itself and is no row.
    """
    files, orphans = find(paths)
    named, good, left_out = {os.path.realpath(path) for path in paths}, [], _tries(paths)
    for file in files:
        if not _is_text(file):
            left_out.append(f"left out: {file}: a path that is not UTF-8 or has control characters: rename it")
            continue
        try:
            good.append(rows.read_row(file))
        except UserError as error:
            if os.path.realpath(file) in named:
                raise
            left_out.append(f"left out: {error}")
    tries = [row for row in good if row.sweep.get(GRID)]
    if len(tries) < len(good):  # else they are what was asked for
        left_out += [f"left out: {row.path}: a try of the grid of sweep {row.sweep.get('name')}" for row in tries]
        good = [row for row in good if not row.sweep.get(GRID)]
    good, copies = _once(good)
    left_out += copies
    if not good:
        raise UserError(f"{', '.join(map(str, paths))}: no row is left; {'; '.join(left_out[:3]) or _HINT}")
    orphans = [run for run in orphans if _is_text(run)]
    return Found(rows.told_apart(good), orphans, [_line(said) for said in left_out])


def _is_text(path):
    """Whether a path can stand in a report."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return str(path).isprintable()


def _line(text):
    """A text as one line that any terminal and file can hold."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def run_of(row):
    """What tells runs apart, wherever their rows lie: the id that a run gives itself, else all that its row says."""
    if own := row.record["provenance"].get("run"):
        return own
    return hashlib.sha256(json.dumps(row.record, sort_keys=True).encode()).hexdigest()


def _once(found):
    """`(rows, lines)`: each run once, and a line for each copy of one."""
    kept, lines = {}, []
    for row in found:
        first = kept.setdefault(run_of(row), row)
        if first is not row:
            lines.append(f"left out: {row.path}: a copy of {first.path}, the same run")
    return list(kept.values()), lines


def _below(path, name):
    """Files of this name in the folder, in order; links to folders are not followed."""
    found = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        if name in names:
            found.append(pathlib.Path(folder) / name)
    return found


def _is_try(file, root):
    """Whether a file lies among the tries of a sweep's grid below `root`: by the grid.json that a sweep writes."""
    below = file.relative_to(root).parts if file != root else ()
    places = [i for i, part in enumerate(below) if part == GRID]
    return any(untrusted.is_file(root.joinpath(*below[:i]) / "grid.json") for i in places)


def _tries(paths):
    """A line for each sweep whose tries are left out."""
    lines = []
    for path in map(pathlib.Path, paths):
        for file in _below(path, "grid.json") if path.is_dir() else ():
            if count := len(_below(file.parent / GRID, "record.json")):
                lines.append(
                    f"left out: {file.parent / GRID}: {count} tries by which a sweep chose a value, not rows of it"
                )
    return lines


def grids(paths):
    """What sweeps below the paths chose before they compared, as `sweep.grid` writes it; what is none is left out."""
    found = []
    for path in map(pathlib.Path, paths):
        for file in _below(path, "grid.json") if path.is_dir() else ():
            try:
                grid = json_text.read(file)
            except UserError:
                continue
            if _is_grid(grid):
                found.append(grid)
    return found


def _is_grid(grid):
    """Whether this is what `sweep.grid.choose` writes."""
    variants = grid.get("variants")
    if not isinstance(variants, dict) or not {"sweep", "key"} <= grid.keys():
        return False
    entries = [entry for entry in variants.values() if isinstance(entry, dict) and isinstance(entry.get("tries"), list)]
    needed = {"value", "outcome", "eval_loss", "seconds"}
    number = (int, float, type(None))
    return len(entries) == len(variants) and all(
        isinstance(each, dict)
        and needed <= each.keys()
        and all(isinstance(each[key], number) for key in ("eval_loss", "seconds"))
        for entry in entries
        for each in entry["tries"]
        if "chosen" in entry
    )
