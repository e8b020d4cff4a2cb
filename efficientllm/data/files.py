"""File data sources: text files, and a text field of JSON, CSV or Parquet rows."""

import dataclasses
import os
import typing

from efficientllm.data import cache, paths, row_readers, streams
from efficientllm.data.base import Source, Tally
from efficientllm.errors import FieldError, UserError
from efficientllm.registry import register


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Files that `path` names: a file, a folder, or a glob (`**` crosses folders), in the order of their names.

    They may be compressed (gzip, bzip2, xz, zstd, lz4). Empty ones are passed over, and counted.
    """

    path: str
    tally: Tally = dataclasses.field(default_factory=Tally, init=False, repr=False, compare=False)

    endings: typing.ClassVar[tuple[str, ...]] = ()  # of the files that a folder stands for; none: all

    def key(self) -> str | None:
        """Changes when a file or a field does."""
        return f"{self} {cache.stat_key(self._paths())}"

    def notes(self) -> list[str]:
        return list(self.tally.lines())

    def _paths(self):
        return paths.find_files(self.path, self.endings)

    def _files(self):
        """Yields the paths of files that are not empty, counting them. Raises UserError if all are."""
        self.tally.reset()
        files = self._paths()
        for path in files:
            with streams.reading(path):
                empty = os.path.getsize(path) == 0
            if empty:
                self.tally.skip("empty files", path)
            else:
                self.tally.files += 1
                yield path
        if not self.tally.files:
            what = f"{files[0]} is empty" if len(files) == 1 else f"all {len(files)} files are empty"
            raise FieldError("data", f"{what}; name files with text")


@register("data", "text")
@dataclasses.dataclass(frozen=True)
class Text(Files):
    """UTF-8 text files. One longer than `document_size` characters becomes several documents, cut at line ends,
    so that a single big file has a held-out part too."""

    held_out: float = 0.05
    document_size: int = 65_536

    def documents(self) -> typing.Iterator[str]:
        """Yields documents. Raises UserError for what is not UTF-8."""
        if self.document_size < 1:
            raise FieldError("data", f"document_size = {self.document_size}: must be at least 1 character")
        for path in self._files():
            before = self.tally.read
            for piece in streams.documents(path, self.document_size):
                if not piece.isspace():
                    self.tally.read += 1
                    yield piece
            if self.tally.read == before:
                self.tally.skip("files of white space alone", path)


@dataclasses.dataclass(frozen=True)
class Rows(Files):
    """Files of rows, of which `field` holds the text; a file's format is the one that its name ends in, `.jsonl`,
    `.json` (also one array), `.csv`, `.tsv` or `.parquet`, else that of the source."""

    field: str = "text"
    held_out: float = 0.05

    endings, fallback = row_readers.ENDINGS, "json"

    def documents(self) -> typing.Iterator[str]:
        """Yields the texts. Raises UserError that names the file and the line of what is none."""
        for path in self._files():
            for where, row in row_readers.read_rows(path, self.fallback, self._column):
                text = row_readers.check_text(row_readers.field_value(row, self.field, where), self.field, where)
                if text is None or not text.strip():
                    self.tally.skip("rows whose text is null" if text is None else "rows whose text is blank", where)
                else:
                    self.tally.read += 1
                    yield text

    def _column(self, names, where):
        if self.field not in names:
            raise UserError(row_readers.missing_field(self.field, names, where))
        return [self.field]


@register("data", "jsonl")
@dataclasses.dataclass(frozen=True)
class JsonLines(Rows):
    """JSON lines, or an array of objects, of which `field` holds the text."""


@register("data", "csv")
@dataclasses.dataclass(frozen=True)
class Csv(Rows):
    """CSV or TSV files with a header, of which the column `field` holds the text."""

    fallback = "csv"


@register("data", "parquet")
@dataclasses.dataclass(frozen=True)
class Parquet(Rows):
    """Parquet files, of which the column `field` holds the text. Only it is read."""

    fallback = "parquet"
