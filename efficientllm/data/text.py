"""Text data of a run: batches of tokens, held-out batches and the row's description, behind one object."""

import dataclasses
import pathlib
import typing

from efficientllm.data import pipeline, tokenizers
from efficientllm.data.corpus import Corpus
from efficientllm.typing import Record


@dataclasses.dataclass(frozen=True)
class TextData:
    """The text of `config.data` as tokens of `tokenizer`; `data.images.ImageData` has the same methods.

    Rows are packed to `length` tokens.
    """

    spec: str
    tokenizer: typing.Any
    length: int

    def train(self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1) -> typing.Any:
        """Builds `pipeline.train_iterator`."""
        return pipeline.train_iterator(
            self.spec, self.tokenizer, batch_size, self.length, seed, process_index, process_count
        )

    def held_out(
        self, batch_size: int, process_index: int = 0, process_count: int = 1, limit: int | None = None
    ) -> pipeline.EvalBatches:
        """Builds `pipeline.eval_batches`."""
        return pipeline.eval_batches(
            self.spec, self.tokenizer, batch_size, self.length, process_index, process_count, limit
        )

    def keep(self, workdir: pathlib.Path) -> None:
        """Writes the tokenizer into a run's folder, which serving reads."""
        tokenizers.keep(self.tokenizer, workdir / "tokenizer")

    @property
    def has_records(self) -> bool:
        """Whether documents are conversations, of which the answers are learnt."""
        return Corpus(self.spec).has_records

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """A hash of the tokenizer's content, or None."""
        return getattr(self.tokenizer, "fingerprint", None)

    def describe(self) -> Record:
        """Returns the row's description of the data."""
        return pipeline.describe_data(self.spec, self.tokenizer, self.length)
