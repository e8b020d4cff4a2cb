"""Token ids of prompts for a text encoder, padded to its length."""

import dataclasses
import pathlib
import typing
from collections.abc import Sequence

import numpy as np

from efficientllm.data import hf_tokenizer
from efficientllm.errors import UserError, short_repr


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

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 ids `[B, length]`, and which are no padding.

        Raises UserError for a prompt that is too long, and for ids that the encoder does not have.
        """
        tokenizer: typing.Any = hf_tokenizer.load_with_transformers(str(self.folder), str(self.folder))
        encoded = tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=self.truncate, verbose=False
        )
        for prompt, ids in zip(prompts, encoded["input_ids"], strict=True):
            if len(ids) > self.length:
                raise UserError(
                    f"prompt {short_repr(prompt)}: {len(ids)} tokens of {self.folder.name}, and its encoder reads "
                    f"{self.length} at most, start and end included; shorten it, or let it be cut with truncate = True"
                )
        ids_BT = np.asarray(encoded["input_ids"], np.int32)
        if ids_BT.max() >= self.vocab_size:
            raise UserError(
                f"{self.folder}: has the id {ids_BT.max()}, and its encoder {self.vocab_size} tokens: it is the "
                "tokenizer of another model"
            )
        return ids_BT, np.asarray(encoded["attention_mask"], bool)
