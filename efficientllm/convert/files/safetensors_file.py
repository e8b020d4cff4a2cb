"""Lazy reader of safetensors folders; all headers are checked before any tensor is read.

Format: eight bytes with the header's length, the header (JSON: name -> dtype, shape, data_offsets), the tensors.
"""

import os
import pathlib
import struct

import ml_dtypes
import numpy as np

from efficientllm.convert.files import memory_map
from efficientllm.convert.tensors.tensor_reader import TensorReader
from efficientllm.errors import UserError, short_repr
from efficientllm.untrusted import files, json_text

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
MOST_AXES = 8
_LARGEST = 1 << 48  # bound of an axis or an offset, even if another axis is 0
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
METADATA = "__metadata__"  # the key of a header that is no tensor
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")  # of transformers and of diffusers
INDEX = f"model{INDEX_SUFFIX}"
# Prefixes of files that may lie beside a model's: Mistral's own format, and adapters.
OTHERS = ("consolidated", "adapter_model", "pytorch_lora_weights")


class SafetensorsFolder(TensorReader):
    """The tensors of a Hugging Face folder: one file, or several under an index.

    Opening it reads and checks all headers. Raises UserError naming the file, and the tensor, that is wrong.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.where = pathlib.Path(folder)
        self._entries: dict[str, tuple] = {}
        for file, expected in _files(self.where).items():
            header = read_header(file)
            if missing := [name for name in expected or () if name not in header]:
                raise UserError(f"{file}: tensor {missing[0]!r} is not in it, though its index says so")
            for name, entry in header.items():
                if name in self._entries:
                    raise UserError(f"{file}: tensor {name!r} is in {self._entries[name][0].name} too")
                self._entries[name] = (file, *entry)
        self.shapes = {name: shape for name, (_, _, shape, _) in self._entries.items()}

    def dtype(self, name: str) -> np.dtype:
        """The stored dtype of a tensor."""
        return np.dtype(self._entries[name][1])

    def read(self, name: str) -> np.ndarray:
        """Maps a tensor, without a copy."""
        file, dtype, shape, offset = self._entries[name]
        return memory_map.map_array(file, offset, dtype, shape)


def _files(folder):
    """`{file: the tensors it must hold, or None}`, chosen like transformers and diffusers do."""
    for stem in STEMS:
        if files.is_there(folder / f"{stem}{SUFFIX}"):
            return {folder / f"{stem}{SUFFIX}": None}
        if files.is_there(index := folder / f"{stem}{INDEX_SUFFIX}"):
            return _indexed(folder, index)
    candidates = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(OTHERS))
    if len(candidates) == 1:
        return {candidates[0]: None}
    if candidates:
        raise UserError(f"{folder}: {len(candidates)} safetensors files and no {INDEX} that says what is where")
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickled:
        raise UserError(
            f"{folder}: {pickled[0]} is a pickle, which can run code and is never loaded; where you trust it: "
            "transformers' AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    beside = f" but {others[0]}, which is none of a model's files in transformers' form" if others else ""
    raise UserError(f"{folder}: no *.safetensors in it{beside}")


def _indexed(folder, index):
    names = json_text.read(index, most=LONGEST_HEADER).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: no index of tensors: weight_map = {short_repr(names)}")
    tensors_by_file = {}
    for tensor, name in names.items():
        tensors_by_file.setdefault(_inside(folder, name, index), set()).add(tensor)
    return tensors_by_file


def _inside(folder, name, index):
    """Path of a file in the folder itself. Raises UserError for a name that leads out of the folder."""
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise UserError(f"{index}: {short_repr(name)} leads out of the folder; an index names files beside itself")
    if not files.is_there(folder / name):
        raise UserError(f"{folder}: {name} is missing, though {index.name} lists it")
    return folder / name


def read_header(file: str | os.PathLike[str]) -> dict[str, tuple[type, tuple[int, ...], int]]:
    """Reads `{tensor: (dtype, shape, offset in the file)}`. Raises UserError for a header that contradicts its file."""
    header, start, size = _header(file)
    tensors = {name: entry for name, entry in header.items() if name != METADATA}
    entries = {name: _entry(file, name, entry, size - start) for name, entry in tensors.items()}
    _check_apart(file, entries)
    return {name: (dtype, shape, start + begin) for name, (dtype, shape, begin, _) in entries.items()}


def read_metadata(file: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the texts that a file's header has beside its tensors. Raises UserError for a damaged file."""
    metadata = _header(file)[0].get(METADATA, {})
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return {key: text for key, text in texts if isinstance(text, str)}


def _header(file):
    """`(header, where the tensors start, the file's bytes)`."""
    with files.open_file(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        first = opened.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise UserError(f"{file}: no safetensors file, or one cut short ({size} bytes, a header of {length})")
        text = opened.read(length)
    return json_text.parse(text, f"{file}: its header cannot be read", unique=True), 8 + length, size


def _entry(file, name, entry, room):
    """`(dtype, shape, begin, end)`, checked against each other and the size of the file."""
    where = f"{file}: tensor {short_repr(name)}"
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > MOST_AXES:
        raise UserError(f"{where} has no dtype, shape and data_offsets")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(f"{where} is of dtype {short_repr(kind)}; known: {', '.join(DTYPES)}")
    if not all(type(value) is int and 0 <= value < _LARGEST for value in (*shape, *offsets)):
        raise UserError(f"{where}: shape and data_offsets must be whole numbers, not {shape}, {offsets}")
    shape, (begin, end) = tuple(shape), offsets
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
