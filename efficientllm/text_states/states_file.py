"""Files of the states of prompts: one safetensors file a prompt, named by the prompt's hash (README.md)."""

import hashlib
import pathlib
import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from efficientllm.convert.files import memory_map, safetensors_file
from efficientllm.embeds.condition import Condition
from efficientllm.errors import UserError, short_repr
from efficientllm.typing import PathLike
from efficientllm.untrusted import files

TEXT, POOLED = "text", "pooled"


class StatesShape(typing.NamedTuple):
    """Shape of a prompt's states: tokens, the width of each, and that of the vector of the whole, 0 without one."""

    tokens: int
    width: int
    pooled: int


class TextStates(typing.NamedTuple):
    """States of the tokens of prompts, and vectors of whole prompts or None, on the host."""

    text_BSE: np.ndarray
    pooled_BE: np.ndarray | None

    @property
    def shape(self) -> StatesShape:
        """The shape of one prompt's states."""
        _, tokens, width = self.text_BSE.shape
        return StatesShape(tokens, width, 0 if self.pooled_BE is None else self.pooled_BE.shape[1])

    def take(self, rows: slice | np.ndarray) -> "TextStates":
        """Takes the prompts `rows`, by a slice or their numbers."""
        return TextStates(self.text_BSE[rows], None if self.pooled_BE is None else self.pooled_BE[rows])

    @property
    def condition(self) -> Condition:
        """The condition of pictures, one a prompt."""
        pooled_BE = None if self.pooled_BE is None else jnp.asarray(self.pooled_BE)
        return Condition(text_BSE=jnp.asarray(self.text_BSE), pooled_BE=pooled_BE)


def file_name(prompt: str) -> str:
    """The name of a prompt's file: the SHA-256 of its UTF-8 bytes."""
    return f"{hashlib.sha256(prompt.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"


def write_states(folder: PathLike, prompts: Sequence[str], states: TextStates) -> None:
    """Writes a file for each prompt."""
    from safetensors.numpy import save_file

    for row, prompt in enumerate(prompts):
        tensors = {TEXT: np.ascontiguousarray(states.text_BSE[row])}
        if states.pooled_BE is not None:
            tensors[POOLED] = np.ascontiguousarray(states.pooled_BE[row])
        save_file(tensors, pathlib.Path(folder) / file_name(prompt), metadata={"prompt": ascii(prompt)})


def read_states(folders: Sequence[PathLike], prompts: Sequence[str]) -> TextStates:
    """Reads the states of prompts, each out of its folder.

    Raises UserError for a prompt without a file, and for files whose tensors are missing, not finite, or of other
    shapes than the first's.
    """
    if not prompts:
        raise UserError("no prompt: give one at least")
    rows = [_read(pathlib.Path(folder), prompt) for folder, prompt in zip(folders, prompts, strict=True)]
    (first, first_pooled), *_ = rows
    for prompt, (text, pooled) in zip(prompts, rows, strict=True):
        for name, array, expected in ((TEXT, text, first), (POOLED, pooled, first_pooled)):
            if _kind(array) != _kind(expected):
                raise UserError(
                    f"states of prompt {short_repr(prompt)}: {name!r} is {_kind(array)}, that of the first prompt "
                    f"{_kind(expected)}; all need one shape and dtype"
                )
    text_BSE = np.stack([text for text, _ in rows])
    return TextStates(text_BSE, None if first_pooled is None else np.stack([pooled for _, pooled in rows]))


def _kind(array):
    return "missing" if array is None else f"{array.dtype.name} {list(array.shape)}"


def _read(folder, prompt):
    file = folder / file_name(prompt)
    if not files.is_there(file):
        raise UserError(f"{folder}: has no states of prompt {short_repr(prompt)}, a file {file.name}")
    entries, arrays = safetensors_file.read_header(file), []
    for name, axes in ((TEXT, 2), (POOLED, 1)):
        if name not in entries and name == POOLED:
            arrays.append(None)
            continue
        dtype, shape, offset = entries.get(name, (np.float32, (), 0))
        if name not in entries or len(shape) != axes or not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{file}: needs {name!r}, floats with {axes} axes; it holds {', '.join(entries)}")
        array = memory_map.map_array(file, offset, dtype, shape)
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{file}: tensor {name!r} has values that are not finite")
        arrays.append(array)
    return tuple(arrays)
