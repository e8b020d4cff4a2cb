"""Rows file: the rows of many runs in one file that is committed, a JSON line each, plain or gzipped by its ending.

A line is a trimmed record.json, and `folder`, the run's folder below that of its sweep. `pack_rows` writes the file
from folders, `restore_rows` the folders from the file: on a fresh machine the runs of the file count as finished.
"""

import gzip
import io
import json
import os
import pathlib
import re
import zlib

from efficientllm.errors import UserError, short_repr
from efficientllm.record.row import check_version, finite, read_record, write_record
from efficientllm.runtime.atomic_write import replacing
from efficientllm.typing import PathLike, Record
from efficientllm.untrusted import files, json_text

ENDINGS = (".rows.jsonl", ".rows.jsonl.gz")
MOST = 256 * 2**20  # bytes of the unpacked text: some 30,000 rows
_FOLDER = re.compile(r"(?!\.{1,2}(/|$))[^/\\\x00-\x1f\x7f]+(/(?!\.{1,2}(/|$))[^/\\\x00-\x1f\x7f]+)*")


def is_rows_file(path: PathLike) -> bool:
    """Whether a path is named like a rows file."""
    return str(path).endswith(ENDINGS)


def check_name(flag: str, path: str) -> None:
    """Raises UserError unless `path`, the value of `flag`, is named like a rows file."""
    if not is_rows_file(path):
        raise UserError(f"{flag}={path}: must end in {' or '.join(ENDINGS)}, such as rows/attention{ENDINGS[0]}")


def read_lines(file: PathLike) -> list[tuple[str, str]]:
    """Reads `(where, line)` of the lines that are not empty. Raises UserError for a file that cannot be read."""
    data = files.read_bytes(file, MOST)
    if str(file).endswith(".gz"):
        data = _unpack(data, file)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start})") from None
    return [(f"{file}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _unpack(data, file):
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            text = stream.read(MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: is not a whole gzip file ({error})") from None
    if len(text) > MOST:
        raise UserError(f"{file}: has more than {MOST:,} bytes unpacked, the most that are read")
    return text


def parse_line(line: str, where: str) -> tuple[str, Record]:
    """Parses a line -> `(folder, record)`. Raises UserError that begins with `where`."""
    try:
        record = json_text.parse(line, where, nan=True)
    except UserError as error:
        raise UserError(f"{where}: no readable row: {str(error).removeprefix(f'{where}: ')}") from None
    check_version(record, where)
    folder = record.pop("folder", None)
    if not isinstance(folder, str) or not _FOLDER.fullmatch(folder):
        raise UserError(f"{where}: no row: its 'folder' is {short_repr(folder)}, not a relative path without ..")
    json_text.field(record, "outcome", str, f"{where}: no row")
    for key in ("provenance", "sources", "config", "paper", "physical", "quality"):
        json_text.field(record, key, dict, f"{where}: no row")
    return folder, record


def read_rows_file(file: PathLike) -> dict[str, Record]:
    """Reads `{folder: record}`; of two lines of one folder the last counts. Raises UserError for a wrong line."""
    return dict(parse_line(line, where) for where, line in read_lines(file))


def restore_rows(file: PathLike, out: PathLike) -> int:
    """Writes record.json into each run's folder below `out` that has none -> how many. A missing file has no rows."""
    if not files.is_there(file):
        return 0
    restored = 0
    for folder, record in read_rows_file(file).items():
        path = pathlib.Path(out) / folder / "record.json"
        if not files.is_there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_record(record, path)
            restored += 1
    return restored


def pack_rows(out: PathLike, file: PathLike) -> int:
    """Merges the rows below `out` into a rows file, atomically -> how many it then holds; sorted by folder, each once.

    Of two rows of one folder, that of `out` counts, unless it failed and the file's did not. Of copies of one run in
    two folders the first counts, but for a trial of a grid and the block that took it over. Raises UserError for a
    file, or a record.json, that is no row.
    """
    rows = read_rows_file(file) if files.is_there(file) else {}
    for folder, record in _records_below(pathlib.Path(out)):
        if not (folder in rows and rows[folder]["outcome"] == "ok" != record["outcome"]):
            rows[folder] = record
    lines, runs = [], set()
    for folder, record in sorted(rows.items()):
        run, is_trial = record["provenance"].get("run"), "grid" in record.get("sweep", {})
        if run is None or (run, is_trial) not in runs:
            runs.add((run, is_trial))
            row = {"folder": folder, **trim_record(finite(record))}
            lines.append(json.dumps(row, separators=(",", ":"), allow_nan=False))
    text = "".join(f"{line}\n" for line in lines).encode()
    pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_bytes(gzip.compress(text, mtime=0) if str(file).endswith(".gz") else text)
    return len(lines)


def _records_below(out):
    """Yields `(folder, record)` of each record.json below a folder, sorted; links to folders are not followed."""
    for path, folders, names in os.walk(out):
        folders.sort()
        if "record.json" in names:
            folder = pathlib.Path(path).relative_to(out).as_posix()
            if not _FOLDER.fullmatch(folder) or folder == ".":
                raise UserError(f"{path}: is a run's folder; give the folder that holds it")
            yield folder, read_record(pathlib.Path(path) / "record.json")


def trim_record(record: Record) -> Record:
    """Removes nulls of `sources`, where a missing key means the same, and digits of warm-up times. Idempotent."""
    sources, warm_up = record["sources"], record.get("warm_up")
    trimmed = dict(record)
    if isinstance(sources, dict):
        trimmed["sources"] = {key: _without_nulls(source) for key, source in sources.items()}
    if isinstance(warm_up, dict) and isinstance(warm_up.get("discarded_s"), list):
        discarded = [float(f"{time:.3g}") if json_text.is_number(time) else time for time in warm_up["discarded_s"]]
        trimmed["warm_up"] = warm_up | {"discarded_s": discarded}
    return trimmed


def _without_nulls(source):
    return {key: item for key, item in source.items() if item is not None} if isinstance(source, dict) else source
