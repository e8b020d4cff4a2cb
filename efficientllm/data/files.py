"""The user's files, read through `datasets`: text, JSON lines, Parquet."""

import codecs
import dataclasses
import glob
import json
import os

from efficientllm.data import cache
from efficientllm.errors import UserError, did_you_mean
from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class _Files:
    """Files that match the glob `path` (`**` crosses folders), in the order of their names; one row, one document."""

    path: str

    streaming = False

    def key(self):
        """Changes when a file or a field does."""
        return f"{self} {cache.stat_key(self._paths())}"

    def _paths(self):
        """Raises UserError if no file matches or one is empty."""
        pattern = os.path.abspath(os.path.expanduser(self.path))
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not paths:
            hint = f"; it is a folder: write {os.path.join(self.path, '**')!r}" if os.path.isdir(pattern) else ""
            raise UserError(f"data path={self.path!r}: no file matches{hint}")
        for path in paths:
            if os.path.getsize(path) == 0:
                raise UserError(f"data path={self.path!r}: {path} is empty")
        return paths

    def _texts(self, builder, field, check, **options):
        # Streamed, because the tokens are cached: an Arrow copy of the text would only fill the disk.
        datasets, paths = library(), self._paths()
        try:
            patterns = [glob.escape(path) for path in paths]
            rows = datasets.load_dataset(builder, data_files=patterns, split="train", streaming=True, **options)
            yield from column(rows, field, f"data path={self.path!r}")
        except UserError:
            raise
        except (ValueError, datasets.exceptions.DatasetsError) as error:
            for path in paths:
                check(path)
            reason = " ".join(str(error).split())
            raise UserError(f"data path={self.path!r}: `datasets` cannot read it ({reason})") from error


@register("data", "text")
@dataclasses.dataclass(frozen=True)
class Text(_Files):
    """UTF-8 text files. One longer than `document_size` characters becomes several documents, cut at line ends,
    so that a single big file has a held-out part too."""

    held_out: float = 0.05
    document_size: int = 65_536

    def documents(self):
        """Yields (text, what decides its side of the split). Raises UserError for what is not UTF-8."""
        for text in self._texts("text", "text", check_utf8, sample_by="document"):
            yield from ((part, part) for part in _parts(text, self.document_size))


@register("data", "jsonl")
@dataclasses.dataclass(frozen=True)
class JsonLines(_Files):
    """JSON lines, of which `field` holds the text."""

    field: str = "text"
    held_out: float = 0.05

    def documents(self):
        """Yields (text, what decides its side of the split). Raises UserError for invalid lines or a missing field."""
        yield from (
            (text, text) for text in self._texts("json", self.field, check_json_lines, parse_agent_traces=False)
        )


@register("data", "parquet")
@dataclasses.dataclass(frozen=True)
class Parquet(_Files):
    """Parquet files, of which the column `field` holds the text."""

    field: str = "text"
    held_out: float = 0.05

    def documents(self):
        """Yields (text, what decides its side of the split). Raises UserError for a missing column."""
        yield from ((text, text) for text in self._texts("parquet", self.field, check_parquet))


def library():
    """`datasets`, which is not to look for torch: a stream would import it, a second and 200 MB that a run would be
    measured with, to share its epoch number with workers that there are none of."""
    import datasets

    datasets.config.TORCH_AVAILABLE = False
    return datasets


def column(rows, field, where, batch_size=64):
    """Yields the strings in column `field` of a `datasets` data set; null and blank ones are no documents.

    Raises UserError that names the columns there are if `field` is none of them, or if it does not hold text.
    """
    for batch in rows.iter(batch_size):
        if field not in batch:
            raise UserError(f"{where}: no field {field!r}; there are: {', '.join(batch)}{did_you_mean(field, batch)}")
        for text in batch[field]:
            if not isinstance(text, str | None):
                raise UserError(f"{where}: field {field!r} holds {type(text).__name__}, not text")
            if text and not text.isspace():
                yield text


def check_utf8(path):
    """Raises UserError with the first byte of the file that is not UTF-8, if there is one."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: byte {offset - held + error.start}") from None
            if not chunk:
                return
            offset += len(chunk)


def check_json_lines(path):
    """Raises UserError with the first line of the file that is no JSON object, if there is one."""
    check_utf8(path)
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line) if line.strip() else {}
                json.dumps(value, ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
            except UnicodeEncodeError:
                raise UserError(f"{path}, line {number}: half of a surrogate pair, which is no character") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: a JSON object is needed, not {type(value).__name__}")


def check_parquet(path):
    """Raises UserError if the file is no Parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None


def _parts(text, size):
    start = 0
    while start < len(text):
        stop = min(start + size, len(text))
        line_end = text.rfind("\n", start, stop) + 1
        stop = line_end if stop < len(text) and line_end > start else stop
        yield text[start:stop]
        start = stop
