"""Search for rows in folders and rows files: each run once; everything that is left out has a reason."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from efficientllm.errors import UserError
from efficientllm.record import rows_file
from efficientllm.report import rows
from efficientllm.report.rows import Row
from efficientllm.untrusted import files as untrusted

GRID = "grid"  # folder of a sweep's grid search, and the key of its rows
_HINT = "give a record.json, a run's folder, a folder of runs or a file *.rows.jsonl"


@dataclasses.dataclass
class RowCollection:
    """Rows with variant names, run folders without a row, and a line for everything that was left out."""

    rows: list[Row]
    orphans: list[pathlib.Path]
    left_out: list[str]


def find_files(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """`(files, orphans)`: every `record.json` and rows file under the paths, and run folders without a row.

    Runs of a sweep's grid search are left out. Raises UserError for a path that is missing or holds no row.
    """
    files, orphans = [], []
    for path in map(pathlib.Path, paths):
        if not untrusted.is_there(path):
            raise UserError(f"{path}: no such file or folder; {_HINT}")
        records = [*files_below(path, "record.json"), *find_rows_files(path)] if path.is_dir() else [path]
        if not records:
            started = len(files_below(path, "config.json")) if path.is_dir() else 0
            problem = f"no record.json in it, {started} runs that have not ended" if started else "no record.json in it"
            raise UserError(f"{path}: {problem}; {_HINT}")
        files += [file for file in records if not _is_try(file, path)]
        if path.is_dir():
            runs = (file.parent for file in files_below(path, "config.json") if not _is_try(file, path))
            orphans += [run for run in runs if not untrusted.is_there(run / "record.json")]
    return list({os.path.realpath(file): file for file in files}.values()), orphans


def collect_rows(paths: Sequence[str | os.PathLike[str]]) -> RowCollection:
    """Reads the rows under these paths; invalid files, copies and grid searches are left out with a reason.

    Raises UserError if no row is left, and for a path that is itself an invalid file.
    """
    files, orphans = find_files(paths)
    named, valid, left_out = {os.path.realpath(path) for path in paths}, [], _tries(paths)
    for file in files:
        if not _is_text(file):
            left_out.append(f"left out: {file}: a path that is not UTF-8 or has control characters: rename it")
            continue
        try:
            is_one = not rows_file.is_rows_file(file)
            rows_of_file, wrong_lines = ([rows.read_row(file)], []) if is_one else read_rows_file(file)
        except UserError as error:
            if os.path.realpath(file) in named:
                raise
            left_out.append(f"left out: {error}")
        else:
            valid += rows_of_file
            left_out += wrong_lines
    tries = [row for row in valid if row.sweep.get(GRID)]
    if len(tries) < len(valid):  # a report on the grid search itself keeps them
        places = collections.Counter((row.path.parent.parent, row.sweep.get("name")) for row in tries)
        left_out += [f"left out: {place}: {n} tries of the grid of sweep {name}" for (place, name), n in places.items()]
        valid = [row for row in valid if not row.sweep.get(GRID)]
    valid, copies = _once(valid)
    left_out += copies
    if not valid:
        raise UserError(f"{', '.join(map(str, paths))}: no row is left; {'; '.join(left_out[:3]) or _HINT}")
    orphans = [run for run in orphans if _is_text(run)]
    return RowCollection(rows.name_variants(valid), orphans, [_line(line) for line in left_out])


def read_rows_file(file: pathlib.Path) -> tuple[list[Row], list[str]]:
    """Reads `(rows, lines)` of a rows file: a line for each row that is wrong and left out.

    A row has the path that its record.json would have if the file were a folder.
    """
    valid, left_out = [], []
    for where, line in rows_file.read_lines(file):
        try:
            folder, record = rows_file.parse_line(line, where)
            valid.append(rows.make_row(record, file / folder / "record.json", where))
        except UserError as error:
            left_out.append(f"left out: {error}")
    return valid, left_out


def _is_text(path):
    """True if a path is printable text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return str(path).isprintable()


def _line(text):
    """Escapes what a terminal or a UTF-8 file cannot print on one line."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def run_of(row: Row) -> str:
    """Identity of a run, independent of its path: its id, or a hash of the whole row if it has none."""
    if run_id := row.record["provenance"].get("run"):
        return run_id
    return hashlib.sha256(json.dumps(rows_file.trim_record(row.record), sort_keys=True).encode()).hexdigest()


def _once(rows):
    """`(rows, lines)`: each run once, and a line for each copy."""
    first_rows, lines = {}, []
    for row in rows:
        first = first_rows.setdefault(run_of(row), row)
        if first is not row:
            lines.append(f"left out: {row.path}: a copy of {first.path}, the same run")
    return list(first_rows.values()), lines


def files_below(path: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Files of this name below the folder, sorted; links to folders are not followed."""
    return [file for file in _walk(path) if file.name == name]


def _walk(path):
    """Files below the folder, sorted; links to folders are not followed."""
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (pathlib.Path(folder) / name for name in sorted(names))


def find_rows_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The rows files below a folder, sorted, or the path itself if it is one; see `record.rows_file`."""
    return [file for file in (_walk(path) if path.is_dir() else [path]) if rows_file.is_rows_file(file)]


def _is_try(file, root):
    """True if a file belongs to a grid search below `root`, which a sweep marks by its grid.json."""
    below = file.relative_to(root).parts if file != root else ()
    places = [i for i, name in enumerate(below) if name == GRID]
    return any(untrusted.is_file(root.joinpath(*below[:i]) / "grid.json") for i in places)


def _tries(paths):
    """A line for each sweep whose grid search is left out."""
    lines = []
    for path in map(pathlib.Path, paths):
        for file in files_below(path, "grid.json") if path.is_dir() else ():
            if count := len(files_below(file.parent / GRID, "record.json")):
                lines.append(
                    f"left out: {file.parent / GRID}: {count} tries by which a sweep chose a value, not rows of it"
                )
    return lines
