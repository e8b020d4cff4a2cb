"""Data sets of the Hugging Face hub, or of a folder laid out as one, whole or streamed."""

import dataclasses
import functools
import itertools

from efficientllm.data import cache
from efficientllm.data.files import column, library
from efficientllm.errors import UserError
from efficientllm.registry import register


@register("data", "hf")
@dataclasses.dataclass(frozen=True)
class Hub:
    """`datasets.load_dataset(path, name, split=split)`, of which `field` holds the text.

    Streamed, nothing is stored and training reads on without end; what must be known beforehand (the trained
    tokenizer, the held-out text, the fingerprint) then comes from the first `sample` documents.
    """

    path: str
    name: str = ""
    split: str = "train"
    streaming: bool = False
    field: str = "text"
    held_out: float = 0.05
    sample: int = 2000

    def key(self):
        """Changes with the stored files or a field; None for a stream, which has to be read to be known."""
        if self.streaming:
            return None
        return f"{self} {cache.stat_key(file['filename'] for file in self.rows().cache_files)}"

    def documents(self):
        """Yields (text, what decides its side of the split): all documents, or the first `sample` of a stream.

        Raises UserError if the data set cannot be reached or has no such field.
        """
        yield from ((text, text) for text in (_sample(self) if self.streaming else self.texts(self.rows())))

    def rows(self):
        """The `datasets` data set. Raises UserError with the reason if there is none."""
        datasets = library()
        try:
            return datasets.load_dataset(self.path, self.name or None, split=self.split, streaming=self.streaming)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._where()} cannot be loaded ({reason}); check path, name and split, or, without a network, use "
                "python_docs() or files of your own through text(), jsonl() or parquet()"
            ) from error

    def texts(self, rows, batch_size=64):
        """Yields the documents among `rows`, read `batch_size` at a time."""
        yield from column(rows, self.field, self._where(), batch_size)

    def _where(self):
        return f"data hf(path={self.path!r}, name={self.name!r}, split={self.split!r})"


@functools.lru_cache(maxsize=1)
def _sample(source):
    return list(itertools.islice(source.texts(source.rows()), source.sample))
