"""Safe GGUF header reader: checks every count, length and offset against the size of the file.

The package `gguf` does not check counts: it loops over a claimed count of 2^60 and builds a list of that length.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import importlib.util
import math
import mmap
import struct
import types

from efficientllm.errors import UserError, short_repr
from efficientllm.typing import PathLike
from efficientllm.untrusted import files

VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_LONGEST_NAME, _LONGEST_TEXT, _MOST_ENTRIES, _LARGEST_ALIGNMENT = 1 << 12, 1 << 24, 1 << 23, 1 << 16
_LONGEST_ARRAY = 1 << 10  # arrays of fewer entries are returned, longer ones are checked and dropped


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Place of a tensor: `kind` is the number of its ggml type, `shape` is in numpy's order, `offset` counts bytes."""

    kind: int
    shape: tuple
    offset: int
    size: int  # bytes


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata `values` by key, None for arrays of 2^10 entries and more, and `tensors` by name."""

    values: dict
    tensors: dict


def read_header(path: PathLike) -> Header:
    """Reads the header of a GGUF file with the block sizes of the package `gguf`. Raises UserError as `read` does."""
    sizes = package(path).GGML_QUANT_SIZES
    return read(path, {int(kind): size for kind, size in sizes.items()})


def package(where: PathLike) -> types.ModuleType:
    """Imports the package `gguf`. Raises UserError that says how to install it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{where}: needs the package gguf; pip install gguf")
    import gguf

    return gguf


def read(path: PathLike, block_sizes: dict) -> Header:
    """Reads and checks the header of a GGUF file; `block_sizes` are `{kind: (weights, bytes)}` of a block.

    Raises UserError for a file that is no GGUF, and for a header that does not fit the size of the file.
    """
    with files.open_file(path) as opened:
        if files.size_of(path) < 24:
            raise UserError(f"{path}: no GGUF file: it has {files.size_of(path)} bytes")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, block_sizes).header()
            except _Bad as problem:
                raise UserError(f"{path}: no GGUF file that can be read: {problem}") from None


class _Bad(Exception):
    """A header that is wrong; the message says how."""


class _Reader:
    """Sequential reader of a header, never past the end of `data`."""

    def __init__(self, data, block_sizes):
        self._data, self._at, self._entries_left, self._blocks = data, 0, _MOST_ENTRIES, block_sizes

    def header(self):
        """Reads the whole header and checks it."""
        if self._bytes(4) != b"GGUF":
            raise _Bad("it does not begin with GGUF")
        version, tensors, keys = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in VERSIONS:
            raise _Bad(f"version {version}; known are 2 and 3, of little-endian machines")
        self._require_room(keys, 13, "keys")
        values = dict(self._distinct(keys, self._key, "key"))
        self._require_room(tensors, 24, "tensors")
        described = dict(self._distinct(tensors, self._tensor, "tensor"))
        start = self._start(values.get("general.alignment", 32))
        return Header(values, self._placed(described, *start))

    def _require_room(self, count, size, what):
        if count * size > len(self._data) - self._at:
            raise _Bad(f"{count:,} {what} in a file of {len(self._data):,} bytes: it is cut short")

    def _bytes(self, count):
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise _Bad(f"{count:,} bytes at byte {self._at:,} are not there: it is cut short")
        self._at += count
        return data

    def _scalar(self, form):
        return struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))[0]

    def _text(self, most=_LONGEST_TEXT):
        length = self._scalar("Q")
        if length > most:
            raise _Bad(f"a text of {length:,} bytes, where at most {most:,} are read")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise _Bad(f"a text that is not UTF-8, at byte {self._at - length:,}") from None

    def _distinct(self, count, read, what):
        names = set()
        for _ in range(count):
            name, value = read()
            if name in names:
                raise _Bad(f"{what} {short_repr(name)} stands in it twice")
            names.add(name)
            yield name, value

    def _key(self):
        return self._text(_LONGEST_NAME), self._value(self._scalar("I"))

    def _value(self, kind):
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _Bad(f"a value of type {kind}, which is not known")
        return self._scalar(_SCALARS[kind])

    def _array(self):
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind != _TEXT and kind not in _SCALARS:
            raise _Bad(f"an array of type {kind}, which is not known")
        form = _SCALARS.get(kind)
        self._require_room(count, struct.calcsize(form) if form else 8, "entries of an array")
        self._entries_left -= count
        if self._entries_left < 0:
            raise _Bad(f"arrays of more than {_MOST_ENTRIES:,} entries")
        if form is None:
            entries = [self._text() for _ in range(count)]
        else:
            entries = list(struct.unpack(f"<{count}{form}", self._bytes(count * struct.calcsize(f"<{form}"))))
        return entries if count < _LONGEST_ARRAY else None

    def _tensor(self):
        name, axes = self._text(_LONGEST_NAME), self._scalar("I")
        if not 1 <= axes <= 4:
            raise _Bad(f"tensor {short_repr(name)} of {axes} axes")
        sizes = [self._scalar("Q") for _ in range(axes)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        if kind not in self._blocks:
            raise _Bad(f"tensor {short_repr(name)} of type {kind}, which is not known")
        weights, size = self._blocks[kind]
        count = math.prod(sizes)
        if count == 0 or sizes[0] % weights:
            raise _Bad(f"tensor {short_repr(name)} of shape {sizes[::-1]}, which blocks of {weights} do not make")
        return name, Tensor(kind, tuple(sizes[::-1]), offset, count // weights * size)

    def _start(self, alignment):
        """Returns `(offset of the first tensor in the file, alignment)`, both in bytes."""
        is_power = type(alignment) is int and 0 < alignment <= _LARGEST_ALIGNMENT and not alignment & (alignment - 1)
        if not is_power:
            raise _Bad(f"general.alignment = {short_repr(alignment)}, no power of two up to {_LARGEST_ALIGNMENT}")
        return -(-self._at // alignment) * alignment, alignment

    def _placed(self, tensors, start, alignment):
        """Returns the tensors with offsets in the file. Raises for one outside the file or over another."""
        end, before = 0, None
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
            if tensor.offset % alignment:
                raise _Bad(f"tensor {short_repr(name)} begins at {tensor.offset}, no multiple of {alignment}")
            if tensor.offset < end:
                raise _Bad(f"tensors {short_repr(before)} and {short_repr(name)} overlap")
            end, before = tensor.offset + tensor.size, name
            if start + end > len(self._data):
                raise _Bad(f"tensor {short_repr(name)} ends behind the end of the file: it is cut short")
        return {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
