"""Readers of JSON, CSV and Parquet files, row by row, each with its place in the file for error messages."""

import csv
import io
import itertools
import json
import re
import typing

from efficientllm.data import streams
from efficientllm.errors import UserError, did_you_mean

FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
DELIMITERS = {"csv": ",;\t|", "tsv": "\t"}
ENDINGS = tuple(FORMATS) + tuple(ending + packed for ending in FORMATS for packed in streams.COMPRESSED)
_SPACE = re.compile(r"[ \t\r\n]*")
_RETURN = re.compile(r"(?<=\r)(?!\n)(?=.)", re.DOTALL)
_HUGE = 1 << 30


def read_rows(path: str, fallback: str, choose: typing.Any) -> typing.Iterator[tuple[str, typing.Any]]:
    """Yields `(where, row)` of each row of a file, whose format is that of its ending, else `fallback`.

    `choose(names, where)` gives the columns of a CSV or Parquet file to read. Rows are dicts; in JSON they are what the
    file holds. Raises UserError that names the file and the line.
    """
    name = path.lower()
    for packed in streams.COMPRESSED:
        name = name.removesuffix(packed)
    kind = next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), fallback)
    with streams.opened(path) as stream:
        if stream.peek(4)[:4] == b"PAR1":
            kind = "parquet"
    if kind == "parquet":
        return _parquet(path, choose)
    return _json(path) if kind == "json" else _csv(path, kind, choose)


def field_value(row: typing.Any, name: str, where: str) -> typing.Any:
    """Returns the value of a row's field. Raises UserError that lists the fields there are."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(row).__name__}")
    if name not in row:
        raise UserError(missing_field(name, row, where))
    return row[name]


def missing_field(name: str, names: typing.Collection[str], where: str) -> str:
    """Words the error message for a field that is none of `names`."""
    return f"{where}: no field {name!r}; there are: {', '.join(names) or 'none'}{did_you_mean(name, names)}"


def check_text(value: typing.Any, name: str, where: str) -> str | None:
    """Returns the text of a field, None for null. Raises UserError for another type and for invalid Unicode."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} holds {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half of a surrogate pair, which is no character, in field {name!r}; take it out"
            ) from None
    return value


def _json(path):
    """JSON lines; or one array, or one object, over the whole file."""
    for where, value in _values(path):
        if not isinstance(value, dict | list):
            raise UserError(f"{where}: a JSON object is needed, not {type(value).__name__}")
        yield where, value


def _values(path):
    """Yields `(where, value)` of what each line holds, or each element of the file's array or object."""
    blank = True
    for number, line in streams.lines(path):
        if not line.strip():
            continue
        if blank and (rows_of_value := _whole(path, line)) is not None:
            yield from rows_of_value
            return
        blank = False
        yield f"{path}, line {number}", _parsed(lambda line=line: json.loads(line), path, number)


def _whole(path, first):
    """The rows of a file that is one value, judged by its first line; None where lines are records."""
    begin = first.lstrip()
    if begin[0] == "[" and (not _is_json(begin) or _single(path)):
        return _array(path, streams.whole(path))
    if begin[0] == "{" and not _is_json(begin) and _unfinished(begin):
        content = streams.whole(path)
        return _object(path, content)
    return None


def _is_json(line):
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _unfinished(line):
    """Whether a line is the beginning of an object that goes on below, rather than wrong."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip()) or line.strip() == "{"
    except (ValueError, RecursionError):
        pass
    return False


def _single(path):
    """Whether a file has one line that is not blank."""
    filled = (line for _, line in streams.lines(path) if line.strip())
    next(filled)
    return next(filled, None) is None


def _array(path, content):
    """The elements of the array that the file is, one at a time, with the lines they begin in."""
    decoder, at, line = json.JSONDecoder(), content.index("[") + 1, 1
    counted, first = 0, True
    while True:
        at = _SPACE.match(content, at).end()
        if first and content[at : at + 1] == "]":
            break
        line, counted = line + content.count("\n", counted, at), at
        value, at = _parsed(lambda at=at: decoder.raw_decode(content, at), path, line)
        yield f"{path}, line {line}", value
        at, first = _SPACE.match(content, at).end(), False
        if content[at : at + 1] != ",":
            break
        at += 1
    line += content.count("\n", counted, at)
    if content[at : at + 1] != "]":
        raise UserError(f"{path}, line {line}: not JSON (a comma or the array's ']' is missing)")
    if content[at + 1 :].strip():
        raise UserError(f"{path}, line {line}: not JSON (there is more after the array's ']')")


def _object(path, content):
    """The object that the file is: its only list of objects if it has one, else a record by itself."""
    value = _parsed(lambda: json.loads(content), path)
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    is_conversation = "role" in lists[0][0] or "from" in lists[0][0] if len(lists) == 1 else False
    if len(lists) == 1 and not is_conversation:
        yield from ((f"{path}, record {index}", record) for index, record in enumerate(lists[0], 1))
    else:
        yield f"{path}, line 1", value


def _parsed(parse, path, line=None):
    try:
        return parse()
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}, line {line or 1}: JSON that is nested too deep to be a record") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(
            f"{path}, line {line or 1}: not JSON that can be read ({str(error).partition(';')[0]})"
        ) from None


def _csv(path, kind, choose):
    """Rows of the chosen columns, by the names of the first; a file's delimiter is the one its header has most of."""
    csv.field_size_limit(_HUGE)
    source = _csv_lines(path)
    above, header = next(((number, line) for number, line in source if line.strip()), (1, ""))
    outside = "".join(header.split('"')[::2])
    delimiter = max(DELIMITERS[kind], key=outside.count)
    if delimiter not in outside:  # of one column every line is a field
        delimiter = "\x1f"
    lines = itertools.chain([header], (line for _, line in source))
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=_quoting(path, kind))
    names, line = None, above
    while True:
        begin = line
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}, line {begin}: not CSV ({error}); a quote within a field is doubled") from None
        line = above + reader.line_num
        if values is None:
            return
        if names is None:
            names, chosen = _header(values, f"{path}, line {begin}", choose)
        elif len(values) == len(names):
            yield f"{path}, line {begin}", {name: values[column] for name, column in chosen.items()}
        elif values:
            raise UserError(
                f"{path}, line {begin}: {len(values)} fields under a header of {len(names)}; a field that holds "
                f"{delimiter!r} or a line end is put into double quotes"
            )


def _csv_lines(path):
    """The lines of a file whose lines may end in a carriage return alone, as spreadsheets on a Macintosh write them."""
    for number, line in streams.lines(path):
        yield from ((number, piece) for piece in (_RETURN.split(line) if "\r" in line[:-2] else [line]))


def _quoting(path, kind):
    """Whether quotes are those of CSV, or characters, as in many TSV files: what makes no sense as the first is the
    second."""
    if kind == "tsv":
        try:
            for _ in csv.reader((line for _, line in _csv_lines(path)), delimiter="\t", strict=True):
                pass
        except csv.Error:
            return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def _header(values, where, choose):
    """`(names, {name of a chosen column: its place})`."""
    names = [name.strip() for name in values]
    chosen = choose(names, where)
    if twice := next((name for name in chosen if names.count(name) > 1), None):
        raise UserError(f"{where}: the header has the field {twice!r} twice; rename one")
    return names, {name: names.index(name) for name in chosen}


def _parquet(path, choose):
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with streams.reading(path), open(path, "rb") as file:
            packed = file.read(4) != b"PAR1"
        source = path
        if packed:
            with streams.opened(path) as stream:
                source = io.BytesIO(stream.read())
        with pyarrow.parquet.ParquetFile(source) as file:
            columns = choose(file.schema_arrow.names, path)
            for batch in file.iter_batches(256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number + 1} or after: not UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: is no Parquet file ({reason})") from None
