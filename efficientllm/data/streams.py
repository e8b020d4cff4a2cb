"""Text files, read in lines or pieces: decompressed by content rather than by name, decoded as UTF-8."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import typing
import zlib

from efficientllm.errors import UserError
from efficientllm.typing import PathLike

LINE_BYTES = 1 << 28  # of a record; a longer line is no record
CHUNK = 1 << 20
BOM = "\ufeff"
_OTHERS = {  # how files of other encodings begin; the first that fits
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_ARCHIVES = {b"PK\x03\x04": "a zip archive or a spreadsheet", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # as names end; what counts is a file's first bytes


@contextlib.contextmanager
def opened(path: PathLike) -> typing.Iterator[io.BufferedReader]:
    """Opens a file for reading bytes, decompressed if it is gzip, bzip2, xz, zstd or lz4.

    Raises UserError that names the file for one that cannot be read, is damaged, or is an archive of several.
    """
    with reading(path), open(path, "rb", buffering=0) as file:
        head = file.read(16)
        file.seek(0)
        if kind := next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), None):
            raise UserError(f"{path}: is {kind}; unpack it, or export it as CSV or JSON lines")
        with io.BufferedReader(_decompressed(file, head), CHUNK) as stream:
            if stream.peek(512)[257:262] == b"ustar":
                raise UserError(f"{path}: is a tar archive; unpack it and name the files in it")
            yield stream


@contextlib.contextmanager
def reading(path: PathLike) -> typing.Iterator[None]:
    """Turns errors of reading a file or of decompressing it into a UserError of one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _decompressed(file, head):
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMAFile(file)
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return bz2.BZ2File(file)
    for magic, codec in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(magic):
            import pyarrow

            return pyarrow.CompressedInputStream(file, codec)
    return file


def lines(path: PathLike) -> typing.Iterator[tuple[int, str]]:
    """Yields (number from 1, text with its line end) of every line. Only a line feed ends one: U+2028 and the like are
    characters of a text. Raises UserError for what is not UTF-8, or too long to be a record."""
    with opened(path) as stream:
        offset = number = 0
        while line := stream.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {LINE_BYTES >> 20} MiB; one record a line is read")
            yield number, decode_text(line, path, offset)
            offset += len(line)


def whole(path: PathLike) -> str:
    """Reads the whole text of a file. Raises UserError if it is not UTF-8."""
    with opened(path) as stream:
        return decode_text(stream.read(), path)


def documents(path: PathLike, size: int) -> typing.Iterator[str]:
    """Yields the file's text in `pieces`. Every line end is a line feed, however the file writes it. Raises UserError
    for what is not UTF-8."""
    with opened(path) as stream:
        if stream.peek(4)[:4] == b"PAR1":
            raise UserError(
                f"{path}: is a Parquet file; write parquet(path=...) to read the text in one of its columns"
            )
    newlines, rest = io.IncrementalNewlineDecoder(None, translate=True), ""
    for chunk, final in _decoded(path):
        *ready, rest = pieces(rest + newlines.decode(chunk, final), size) or [""]
        yield from ready
    if rest:
        yield rest


def pieces(text: str, size: int) -> list[str]:
    """Splits a text into pieces of at most `size` characters, at line ends where there are any."""
    cuts, start = [], 0
    while len(text) - start > size:
        stop = text.rfind("\n", start, start + size) + 1 or start + size
        cuts.append(text[start:stop])
        start = stop
    return [*cuts, text[start:]] if start < len(text) else cuts


def _decoded(path):
    """Yields (text, whether it is the last) of chunks of the file."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as stream:
        while True:
            chunk = stream.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start, chunk if offset == 0 else b"") from None
            yield text if offset else text.removeprefix(BOM), not chunk
            if not chunk:
                return
            offset += len(chunk)


def decode_text(data: bytes, path: PathLike, offset: int = 0) -> str:
    """Decodes bytes that lie at `offset` of a file, without a byte order mark. Raises UserError if it is not UTF-8."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, data if offset == 0 else b"") from None
    return text if offset else text.removeprefix(BOM)


def _not_utf8(path, byte, begin):
    other = next((name for mark, name in _OTHERS.items() if begin.startswith(mark)), None)
    hint = f"; it is {other.upper()}, which `iconv -f {other} -t utf-8` converts" if other else "; write it as UTF-8"
    return UserError(f"{path}: not UTF-8: byte {byte}{hint}")
