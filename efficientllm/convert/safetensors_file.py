"""Folders of safetensors, read lazily: headers are checked as a whole before a byte of a tensor is.

The format: eight bytes with the header's length, the header (JSON: name -> dtype, shape, data_offsets), the tensors.
"""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np

from efficientllm.convert import mapped
from efficientllm.errors import UserError

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: one file, or several under an index.

    Opening it reads and checks all headers. Raises UserError naming the file, and the tensor, that is wrong.
    """

    def __init__(self, folder):
        self.where = pathlib.Path(folder)
        self._entries = {}
        for file, expected in _files(self.where).items():
            held = read_header(file)
            if missing := [name for name in expected or () if name not in held]:
                raise UserError(f"{file}: tensor {missing[0]!r} is not in it, though {INDEX} says so")
            for name, entry in held.items():
                if name in self._entries:
                    raise UserError(f"{file}: tensor {name!r} is in {self._entries[name][0].name} too")
                self._entries[name] = (file, *entry)
        self.shapes = {name: shape for name, (_, _, shape, _) in self._entries.items()}

    def dtype(self, name):
        """The dtype that a tensor is stored in."""
        return np.dtype(self._entries[name][1])

    def read(self, name):
        """The tensor, mapped: no copy is made."""
        file, dtype, shape, offset = self._entries[name]
        return mapped.array(file, offset, dtype, shape)

    def stored(self, name):
        """None: nothing is rounded here."""
        return None


def _files(folder):
    """`{file: the tensors it must hold, or None}`."""
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise UserError(f"{folder}: {len(found)} safetensors files and no {INDEX} that says what is where")
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is never loaded; where you trust it: "
            "transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder}: no *.safetensors in it")


def _indexed(folder, index):
    try:
        names = json.loads(index.read_text())["weight_map"]
        files = {}
        for tensor, name in names.items():
            files.setdefault(_inside(folder, name, index), set()).add(tensor)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of tensors ({type(error).__name__}: {error})") from None
    return files


def _inside(folder, name, index):
    """A file of the folder itself. Raises UserError for a name that leads elsewhere, be it over a link in the name."""
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise UserError(f"{index}: {name!r} leads out of the folder; an index names files beside itself")
    if not (folder / name).is_file():
        raise UserError(f"{folder}: {name} is missing, though {index.name} lists it")
    return folder / name


def read_header(file):
    """`{tensor: (dtype, shape, offset in the file)}`. Raises UserError for a header that its file does not bear out."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise UserError(f"{file}: no safetensors file, or one cut short ({size} bytes, a header of {length})")
        text = opened.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{file}: its header cannot be read ({error})") from None
    start = 8 + length
    entries = {name: _entry(file, name, entry, size - start) for name, entry in tensors.items()}
    _check_apart(file, entries)
    return {name: (dtype, shape, start + begin) for name, (dtype, shape, begin, _) in entries.items()}


def _unique(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name stands in it twice")
    return dict(pairs)


def _entry(file, name, entry, room):
    """`(dtype, shape, begin, end)`, checked against each other and the bytes there are."""
    where = f"{file}: tensor {name!r}"
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} has no dtype, shape and data_offsets") from None
    if kind not in DTYPES:
        raise UserError(f"{where} is of dtype {kind!r}; known: {', '.join(DTYPES)}")
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in (*shape, begin, end)):
        raise UserError(f"{where}: shape and data_offsets must be whole numbers, not {list(shape)}, {[begin, end]}")
    needed = np.dtype(DTYPES[kind]).itemsize
    for value in shape:
        needed *= value
    if end - begin != needed:
        raise UserError(f"{where} has {end - begin} bytes; {kind} of shape {list(shape)} has {needed}")
    if end > room:
        raise UserError(f"{where} ends {end - room} bytes behind the end of the file: it is cut short")
    return DTYPES[kind], shape, begin, end


def _check_apart(file, entries):
    last, before = 0, None
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if begin < last:
            raise UserError(f"{file}: tensors {before!r} and {name!r} overlap")
        last, before = end, name
