"""Token ids of prompts for a text encoder, padded to its length."""

import dataclasses
import functools
import logging
import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.data import hf_tokenizer
from efficientllm.errors import UserError, short_repr

log = logging.getLogger("efficientllm")


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizer of a folder as transformers reads it, with its own padding token.

    Args:
      folder: a pipeline's `tokenizer`, `tokenizer_2` or `tokenizer_3`.
      length: the tokens that the encoder reads, start and end included.
      vocab_size: that of the encoder.
      truncate: whether longer prompts are cut, as diffusers does; otherwise they are refused.
    """

    folder: pathlib.Path
    length: int
    vocab_size: int
    truncate: bool = False

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError as `encode` does; the log says which prompts are cut."""
        self.encode(prompts)
        if self.truncate and (long := self._longer(prompts)):
            others = f"; so are {len(long) - 1:,} more" if len(long) > 1 else ""
            log.warning(f"{self._describe(*long[0])}: it is cut{others}")

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 ids `[B, length]`, and which are no padding.

        Raises UserError for a prompt that is too long, unless it is to be cut, and for ids that the encoder does not
        have.
        """
        if not self.truncate and (long := self._longer(prompts)):
            raise UserError(f"{self._describe(*long[0])}; shorten it, or let it be cut with truncate = True")
        encoded = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=self.truncate, verbose=False
        )
        ids_BT = np.asarray(encoded["input_ids"], np.int32)
        if ids_BT.max() >= self.vocab_size:
            raise UserError(
                f"{self.folder}: has the id {ids_BT.max()}, and its encoder {self.vocab_size} tokens: it is the "
                "tokenizer of another model"
            )
        return ids_BT, np.asarray(encoded["attention_mask"], bool)

    @functools.cached_property
    def _tokenizer(self) -> typing.Any:
        return hf_tokenizer.load_with_transformers(str(self.folder), str(self.folder))

    def _longer(self, prompts):
        """`(prompt, its tokens)` of those that are too long."""
        ids = self._tokenizer(list(prompts), verbose=False)["input_ids"]
        return [(prompt, len(row)) for prompt, row in zip(prompts, ids, strict=True) if len(row) > self.length]

    def _describe(self, prompt, tokens):
        return (
            f"prompt {short_repr(prompt)}: {tokens} tokens of {self.folder.name}, and its encoder reads {self.length} "
            "at most, start and end included"
        )
