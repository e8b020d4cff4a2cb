"""States of prompts out of the cache, out of a folder of the user's, or computed and cached."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import typing
from collections.abc import Sequence

from efficientllm.data import cache
from efficientllm.errors import UserError
from efficientllm.text_states.pipelines import PromptEncoders
from efficientllm.text_states.states_file import StatesShape, TextStates, read_states, write_states
from efficientllm.typing import PathLike

FORMAT = 1  # of a cache entry
_READ = (".json", ".txt", ".model", ".safetensors")


@dataclasses.dataclass(frozen=True)
class CachedEncoders:
    """Prompt encoders that encode a prompt once.

    Args:
      encoders: of a pipeline.
      cache_root: the folder of the cache (`data.cache.root`).
    """

    encoders: PromptEncoders
    cache_root: pathlib.Path

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt that is longer than an encoder reads."""
        self.encoders.check_prompts(prompts)

    def shape(self, prompts: Sequence[str]) -> StatesShape:
        """The shape of the states of each prompt. Raises UserError for parts that do not fit."""
        self.encoders.check_parts()
        return self.encoders.shape

    def weights_bytes(self) -> dict[str, int | None]:
        """Bytes of the parameters of each encoder, which is in memory while it encodes; None where unknown."""
        return {name: encoder.weights_bytes for name, encoder in self.encoders.opened.items()}

    def uncached(self, prompts: Sequence[str]) -> list[str]:
        """The distinct prompts whose states `encode` would compute."""
        return [prompt for prompt, name in self._entries(prompts).items() if not (self.cache_root / name).is_dir()]

    def _entries(self, prompts):
        """The name of the cache's folder of each distinct prompt."""
        key = cache.digest(FORMAT, self.encoders.describe(), fingerprint(self.encoders, self.cache_root))
        return {prompt: f"text-states-{cache.digest(key, ascii(prompt))}" for prompt in prompts}

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Returns the states of prompts; those that are not cached are encoded together, before any is written."""
        entries, missing = self._entries(prompts), self.uncached(prompts)
        computed: dict[str, TextStates] = {}
        if missing:
            states = self.encoders.encode(missing)
            computed = {prompt: states.take(slice(row, row + 1)) for row, prompt in enumerate(missing)}

        def fill(prompt, folder):  # an entry that is found damaged is computed here
            states = computed[prompt] if prompt in computed else self.encoders.encode([prompt])
            write_states(folder, [prompt], states)

        folders = {
            prompt: cache.entry(self.cache_root, name, functools.partial(fill, prompt))
            for prompt, name in entries.items()
        }
        return read_states([folders[prompt] for prompt in prompts], prompts)


@dataclasses.dataclass(frozen=True)
class StatesFolder:
    """A folder of the user's with a file of states for each prompt; no encoder is needed."""

    folder: PathLike

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError as `encode` does."""
        self.encode(prompts)

    def shape(self, prompts: Sequence[str]) -> StatesShape:
        """The shape of the states of each prompt."""
        return self.encode(prompts).shape

    def weights_bytes(self) -> dict[str, int | None]:
        """No encoder."""
        return {}

    def uncached(self, prompts: Sequence[str]) -> list[str]:
        """No prompt: states are read."""
        return []

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Reads the states of prompts. Raises UserError for a prompt without a file, and for files that do not fit."""
        if not os.path.isdir(self.folder):
            raise UserError(f"{self.folder}: no such folder; it holds a file of states for each prompt")
        return read_states([self.folder] * len(prompts), prompts)


def fingerprint(encoders: PromptEncoders, cache_root: pathlib.Path) -> str:
    """The SHA-256 of the files of all encoders and tokenizers; read once, until a file is touched."""
    candidates = [path for folder in encoders.part_folders() for path in sorted(folder.glob("*"))]
    paths = [path for path in candidates if path.suffix in _READ and path.is_file()]

    def fill(new):
        whole: typing.Any = hashlib.sha256()
        for path in paths:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.relative_to(encoders.folder)} {content}\n".encode())
        (new / "sha256").write_text(whole.hexdigest())

    real_paths = [os.path.realpath(path) for path in paths]
    folder = cache.entry(cache_root, f"sha256-{cache.digest(cache.stat_key(real_paths), *paths)}", fill)
    return (folder / "sha256").read_text()
